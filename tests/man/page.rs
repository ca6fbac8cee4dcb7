//! The manual pages, read line by line.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Where the pages are.
pub fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("man")
}

/// The pages by their files' names.
pub fn pages() -> BTreeMap<String, String> {
    let entries = std::fs::read_dir(directory()).unwrap().map(|entry| entry.unwrap());
    let page = |path: PathBuf| std::fs::read_to_string(path).unwrap();
    entries.map(|entry| (entry.file_name().into_string().unwrap(), page(entry.path()))).collect()
}

/// The parts that begin with this macro: what follows it on its line, and the lines below.
pub fn parts<'a>(lines: &[&'a str], begin: &str) -> Vec<(&'a str, Vec<&'a str>)> {
    let mut parts: Vec<(&'a str, Vec<&'a str>)> = Vec::new();
    for &line in lines {
        match line.strip_prefix(begin) {
            Some(rest) if rest.is_empty() || rest.starts_with(' ') => parts.push((rest.trim(), Vec::new())),
            _ => {
                if let Some((_, part)) = parts.last_mut() {
                    part.push(line);
                }
            }
        }
    }
    parts
}

/// The lines of a page's section.
pub fn section<'a>(page: &'a str, title: &str) -> Vec<&'a str> {
    let lines: Vec<&str> = page.lines().collect();
    let found = parts(&lines, ".Sh").into_iter().find(|(name, _)| *name == title);
    found.unwrap_or_else(|| panic!("no section {title} in: {}", page.lines().nth(1).unwrap_or_default())).1
}
