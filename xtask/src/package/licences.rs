//! The licences of the crates that are linked into the executable: they want their text to go with it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::shell::{output, top};

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
    let mut tree = cargo();
    // For the target that .cargo/config.toml names.
    tree.args(["tree", "--locked", "--package", "puter", "--edges", "normal,no-proc-macro", "--prefix", "none"]);
    tree.args(["--no-dedupe", "--format", "{p}|{l}"]).current_dir(top());
    let mut lines: Vec<String> = output(&mut tree)?.lines().map(str::to_string).collect();
    lines.sort();
    lines.dedup();
    for line in lines {
        let Some((name, version, licence)) = parse(&line) else { continue };
        if name == "puter" {
            continue;
        }
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
    ensure!(!texts.is_empty(), "cargo names no crate of the executable");
    for (text, crates) in texts {
        list.push_str(&format!("\n{}\n{}:\n\n{text}\n", "-".repeat(72), crates.join(", ")));
    }
    Ok(list)
}

/// The cargo that runs this, with its compiler: sudo's PATH may have neither.
fn cargo() -> Command {
    let Some(cargo) = std::env::var_os("CARGO").map(PathBuf::from) else { return Command::new("cargo") };
    let former = std::env::var_os("PATH").unwrap_or_default();
    let dirs = cargo.parent().map(Path::to_path_buf).into_iter().chain(std::env::split_paths(&former));
    let mut command = Command::new(&cargo);
    if let Ok(path) = std::env::join_paths(dirs) {
        command.env("PATH", path);
    }
    command
}

/// A line such as `ring v0.17.14|Apache-2.0 AND ISC`.
fn parse(line: &str) -> Option<(&str, &str, &str)> {
    let (package, licence) = line.split_once('|')?;
    let mut words = package.split_whitespace();
    Some((words.next()?, words.next()?.strip_prefix('v')?, licence))
}

/// Where cargo keeps the sources of registries.
fn sources() -> Result<Vec<PathBuf>> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    let dir = home.context("cannot tell where cargo keeps sources: HOME is not set")?.join("registry/src");
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
    fn lines_of_cargo_tree_are_understood() {
        assert_eq!(parse("ring v0.17.14|Apache-2.0 AND ISC"), Some(("ring", "0.17.14", "Apache-2.0 AND ISC")));
        assert_eq!(parse("puter v0.1.0 (/src/puter)|MIT"), Some(("puter", "0.1.0", "MIT")));
        assert_eq!(parse(""), None);
    }

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
