//! What is linked into the executable: the crates as cargo sees them, and what the file itself tells.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};

use crate::shell::{cargo, output, top};

/// A crate in the executable.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Crate {
    pub name: String,
    pub version: String,
    pub licence: String,
}

/// The crates, each with how far below puter it stands; puter is the first. One that several want comes with each.
///
/// # Errors
/// When cargo does not tell.
pub fn tree() -> Result<Vec<(usize, Crate)>> {
    let mut tree = cargo();
    // For the target that .cargo/config.toml names.
    tree.args(["tree", "--locked", "--package", "puter", "--edges", "normal,no-proc-macro", "--prefix", "depth"]);
    tree.args(["--no-dedupe", "--format", "|{p}|{l}"]).current_dir(top());
    let found: Vec<_> = output(&mut tree)?.lines().filter_map(parse).collect();
    ensure!(found.len() > 1 && found[0].0 == 0, "cargo names no crate of the executable");
    Ok(found)
}

/// The crates, each once and without puter itself.
///
/// # Errors
/// When cargo does not tell.
pub fn crates() -> Result<BTreeSet<Crate>> {
    Ok(tree()?.into_iter().filter(|(depth, _)| *depth > 0).map(|(_, found)| found).collect())
}

/// A line such as `2|ring v0.17.14|Apache-2.0 AND ISC`.
fn parse(line: &str) -> Option<(usize, Crate)> {
    let mut fields = line.split('|');
    let depth = fields.next()?.parse().ok()?;
    let mut words = fields.next()?.split_whitespace();
    let (name, version) = (words.next()?, words.next()?.strip_prefix('v')?);
    Some((depth, Crate { name: name.into(), version: version.into(), licence: fields.next()?.into() }))
}

/// What an executable says of its making.
#[derive(Debug, PartialEq, Eq)]
pub struct Marks {
    /// As glibc calls itself: `Debian GLIBC 2.36-9+deb12u14`, and its version.
    pub glibc: (String, String),
    pub rust: String,
    pub gcc: String,
    /// Crates whose sources messages in it name, as `NAME-VERSION`.
    pub crates: BTreeSet<String>,
}

/// Reads them.
///
/// # Errors
/// When one is missing: it is not linked with glibc, or by another compiler.
pub fn marks(executable: &[u8]) -> Result<Marks> {
    let file: &str = &String::from_utf8_lossy(executable);
    let all = |start: &'static str| file.match_indices(start).map(|(at, found)| text(&file[at + found.len()..]));
    let after = |start| all(start).next();
    let banner = after("GNU C Library (").context("the executable names no glibc that it would be linked with")?;
    let (called, rest) = banner.split_once(')').context("glibc's name does not end")?;
    let version = rest.split("version ").nth(1).map(|version| version.trim_end_matches('.'));
    let version = version.context("glibc has no version")?.to_string();
    let first = |text: &str| text.split_whitespace().next().unwrap_or_default().to_string();
    let rust = after("rustc version ").map(first).context("the executable names no Rust")?;
    let gcc = after("GCC: (").and_then(|rest| Some(first(rest.split_once(") ")?.1)));
    let gcc = gcc.context("the executable names no GCC")?;
    // One message's path may follow another's without anything between.
    let sources = all("registry/src/").filter(|path| path.contains(".rs"));
    let crates = sources.filter_map(|path| Some(path.split('/').nth(1)?.to_string())).collect();
    Ok(Marks { glibc: (called.to_string(), version), rust, gcc, crates })
}

/// The printable characters at the beginning.
fn text(rest: &str) -> &str {
    let end = rest.bytes().take(512).position(|byte| !(b' '..=b'~').contains(&byte));
    // Up to there all are of one byte each.
    &rest[..end.unwrap_or(rest.len().min(512))]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_cargo_tree_are_understood() {
        let ring = Crate { name: "ring".into(), version: "0.17.14".into(), licence: "Apache-2.0 AND ISC".into() };
        assert_eq!(parse("2|ring v0.17.14|Apache-2.0 AND ISC"), Some((2, ring)));
        assert_eq!(parse("0|puter v0.1.0 (/src/puter)|MIT").unwrap().1.version, "0.1.0");
        assert_eq!(parse(""), None);
    }

    #[test]
    fn what_an_executable_says_of_its_making_is_read() {
        let file = b"\0GNU C Library (Debian GLIBC 2.36-9+deb12u14) stable release version 2.36.\n\0\x01\
            /h/.cargo/registry/src/index-1/ring-0.17.14/src/aead.rs/h/registry/src/index-1/tar-0.4.1/src/lib.rs\0\
            rustc version 1.95.0 (59807616e 2026-04-14)\0GCC: (Debian 12.2.0-14+deb12u1) 12.2.0\0";
        let found = marks(file).unwrap();
        assert_eq!(found.glibc, ("Debian GLIBC 2.36-9+deb12u14".into(), "2.36".into()));
        assert_eq!((found.rust.as_str(), found.gcc.as_str()), ("1.95.0", "12.2.0"));
        assert_eq!(found.crates, ["ring-0.17.14".to_string(), "tar-0.4.1".to_string()].into());
        assert!(marks(b"\x7fELF").unwrap_err().to_string().contains("no glibc"));
    }
}
