//! `cargo xtask msrv`: whether the oldest Rust that Cargo.toml states is enough.

use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::shell::{cargo, find, output, run, top};

/// Asks the dependencies what they state, clippy since when what is used of the standard library is there, and the
/// compiler of that version itself where rustup has it.
///
/// # Errors
/// When something needs a newer one.
pub fn run_all() -> Result<()> {
    let stated = check_dependencies()?;
    println!("Rust {stated}: all that the dependencies ask for");
    let mut clippy = cargo();
    clippy.args(["clippy", "--workspace", "--all-targets", "--locked", "--quiet", "--"]);
    run(clippy.args(["--allow=clippy::all", "--deny=clippy::incompatible_msrv"]).current_dir(top()))?;
    println!("Rust {stated}: has all that is used of its library (clippy)");
    let here = find("rustup").map(|rustup| output(Command::new(rustup).args(["toolchain", "list"])));
    if !here.is_some_and(|list| list.is_ok_and(|list| list.lines().any(|line| line.starts_with(&stated)))) {
        println!(
            "NOT compiled with Rust {stated}, which is not here: rustup toolchain install {stated} --profile minimal"
        );
        return Ok(());
    }
    let mut check = Command::new("rustup");
    check.args(["run", &stated, "cargo", "check", "--workspace", "--all-targets", "--locked"]).env_remove("CARGO");
    run(check.current_dir(top()))?;
    println!("Rust {stated}: compiles it");
    Ok(())
}

/// The version that puter states; no dependency states a newer one.
fn check_dependencies() -> Result<String> {
    let mut metadata = cargo();
    metadata.args(["metadata", "--locked", "--format-version=1", "--all-features"]).current_dir(top());
    let metadata: Value = serde_json::from_str(&output(&mut metadata)?)?;
    newest(&metadata)
}

fn newest(metadata: &Value) -> Result<String> {
    let packages = metadata["packages"].as_array().context("cargo metadata names no packages")?;
    let stated = packages.iter().find(|package| package["name"] == "puter").map(|package| &package["rust_version"]);
    let stated = stated.and_then(Value::as_str).context("Cargo.toml states no rust-version")?;
    let limit = number(stated)?;
    for package in packages {
        let Some(wanted) = package["rust_version"].as_str() else { continue };
        let (name, version) = (&package["name"], &package["version"]);
        ensure!(number(wanted)? <= limit, "{name} {version} wants Rust {wanted}, and Cargo.toml states {stated}");
    }
    Ok(stated.to_string())
}

fn number(version: &str) -> Result<Vec<u32>> {
    let parts: Result<Vec<u32>, _> = version.split('.').map(str::parse).collect();
    match parts {
        // 1.88 and 1.88.0 are the same.
        Ok(mut parts) if parts.len() <= 3 => {
            parts.resize(3, 0);
            Ok(parts)
        }
        _ => bail!("'{version}' is no version of Rust"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn no_dependency_states_a_newer_rust() {
        check_dependencies().unwrap();
    }

    #[test]
    fn a_newer_one_is_told() {
        let with = |wanted: &str| {
            let one = json!({ "name": "one", "version": "1.0.0", "rust_version": wanted });
            let silent = json!({ "name": "two", "version": "1.0.0", "rust_version": null });
            newest(&json!({ "packages": [one, silent, { "name": "puter", "rust_version": "1.88" }] }))
        };
        assert_eq!(with("1.88.0").unwrap(), "1.88");
        assert_eq!(with("1.9").unwrap(), "1.88");
        assert!(with("1.88.1").unwrap_err().to_string().contains("wants Rust 1.88.1"));
        assert!(with("1.100").is_err() && with("2").is_err() && with("new").is_err());
    }
}
