//! The licences of the crates that are linked into the executable: they want their text to go with it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::linked;
use crate::shell::cargo_home;

/// Beginnings of the names of files that hold a licence or a notice.
const NAMES: [&str; 6] = ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE", "UNLICENSE"];

/// Each crate with the name of its licence, then each text once with the crates that it came with.
///
/// # Errors
/// When cargo does not tell, or a crate's source is not there.
pub fn text() -> Result<String> {
    let mut list = String::from("The crates in the executable, and their licences:\n\n");
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let sources = sources()?;
    for linked::Crate { name, version, licence } in linked::crates()? {
        let full = format!("{name}-{version}");
        list.push_str(&format!("{full}: {licence}\n"));
        let dir = sources.iter().map(|source| source.join(&full)).find(|dir| dir.is_dir());
        let mut found = Vec::new();
        collect(&dir.with_context(|| format!("the source of {full} is not there"))?, 3, &mut found)?;
        for path in found {
            let text = String::from_utf8_lossy(&fs::read(path)?).trim_end().to_string();
            let of = texts.entry(text).or_default();
            if !of.contains(&full) {
                of.push(full.clone());
            }
        }
    }
    ensure!(!texts.is_empty(), "no crate has a licence's text");
    for (text, crates) in texts {
        list.push_str(&format!("\n{}\n{}:\n\n{text}\n", "-".repeat(72), crates.join(", ")));
    }
    Ok(list)
}

/// Where cargo keeps the sources of registries.
fn sources() -> Result<Vec<PathBuf>> {
    let dir = cargo_home()?.join("registry/src");
    let entries = fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))?;
    Ok(entries.filter_map(|entry| Some(entry.ok()?.path())).collect())
}

/// Licences below `dir`: some crates hold other projects' in directories of their own.
fn collect(dir: &Path, depth: usize, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_uppercase();
        if path.is_dir() && depth > 0 {
            collect(&path, depth - 1, found)?;
        } else if path.is_file() && NAMES.iter().any(|start| name.starts_with(start)) && !name.ends_with(".RS") {
            found.push(path);
        }
    }
    found.sort();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licences_are_found_also_of_what_a_crate_holds_of_others() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["LICENSE-MIT", "src/license.rs", "third_party/fiat/LICENSE", "README.md"] {
            super::super::put(&dir.path().join(name), "x").unwrap();
        }
        let mut found = Vec::new();
        collect(dir.path(), 3, &mut found).unwrap();
        let names: Vec<_> = found.iter().map(|path| path.strip_prefix(dir.path()).unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["LICENSE-MIT", "third_party/fiat/LICENSE"]);
    }
}
