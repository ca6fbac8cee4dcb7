//! Records: JSON files `<name>.json` of a directory, each with the version of its layout.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// What a record holds; `None` where there is none.
///
/// # Errors
/// When it cannot be read.
pub fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// Parses a record of this version. The version is looked at first: of another layout nothing else can be told.
///
/// # Errors
/// When it is damaged, or has another version.
pub fn parse<T: DeserializeOwned>(bytes: &[u8], known: u32) -> Result<T> {
    #[derive(Deserialize)]
    struct Versioned {
        schema: u32,
    }
    let Versioned { schema } = serde_json::from_slice(bytes)?;
    if schema != known {
        bail!("it has schema {schema}, this puter knows {known}");
    }
    Ok(serde_json::from_slice(bytes)?)
}

/// Records that cannot be used, by name, each with its reason.
pub type Damaged = Vec<(String, anyhow::Error)>;

/// Loads every record of a directory by its name; beside them, by name, those that cannot be used. A damaged one hides no
/// other, and one that goes meanwhile is none.
///
/// # Errors
/// When the directory cannot be read; one that is not there holds none.
pub fn load_each<T>(directory: &Path, load: impl Fn(&str) -> Result<Option<T>>) -> Result<(Vec<T>, Damaged)> {
    let (mut all, mut damaged) = (Vec::new(), Damaged::new());
    let what = || format!("cannot read {}", directory.display());
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok((all, damaged)),
        other => other.with_context(what)?,
    };
    for entry in entries {
        let file = entry.with_context(what)?.file_name();
        let Some(name) = file.to_str().and_then(|file| file.strip_suffix(".json")) else { continue };
        if name.starts_with('.') {
            continue;
        }
        match load(name) {
            Ok(found) => all.extend(found),
            Err(error) => damaged.push((name.to_string(), error)),
        }
    }
    damaged.sort_by(|a, b| a.0.cmp(&b.0));
    Ok((all, damaged))
}
