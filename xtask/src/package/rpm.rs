//! Packages for systems with RPM, by rpmbuild from `packaging/rpm/puter.spec`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::deb::{self, AGENT, HOST, Made};
use super::{Source, directory, put, read, set_mode, set_modes};
use crate::shell::{output, top};

/// systemd's answer to what is to be enabled (systemd.preset(5)).
const PRESET: &str = "usr/lib/systemd/system-preset/80-puter-agent.preset";

/// Makes both in `target/packages`.
///
/// # Errors
/// When a tool fails.
pub fn make(source: &Source) -> Result<Made> {
    make_as(source, &source.version, &directory()?)
}

/// Makes both under another version, as an upgrade's check needs.
pub(super) fn make_as(source: &Source, version: &str, out: &Path) -> Result<Made> {
    let work = tempfile::Builder::new().prefix("puter-rpm-").tempdir_in("/var/tmp")?;
    let (tree, made) = (work.path().join("tree"), work.path().join("made"));
    fs::create_dir(&tree)?;
    for kind in [&HOST, &AGENT] {
        deb::files(kind, source, &tree, "site-functions")?;
        for licence in ["LICENSE-MIT", "LICENSE-APACHE"] {
            put(&tree.join("usr/share/licenses").join(kind.name).join(licence), read(&top().join(licence))?)?;
        }
    }
    put(&tree.join(PRESET), "enable puter-agent.service\n")?;
    set_modes(&tree)?;
    for kind in [&HOST, &AGENT] {
        set_mode(&tree.join(kind.executable), 0o755)?;
    }
    let spec = read(&top().join("packaging/rpm/puter.spec"))?;
    let tree = tree.to_str().context("the temporary directory is not UTF-8")?;
    let file = work.path().join("puter.spec");
    put(&file, spec.replace("@VERSION@", version).replace("@TREE@", tree))?;
    let mut command = Command::new("rpmbuild");
    command.args(["--quiet", "-bb"]);
    for (name, value) in [("_topdir", work.path().join("build")), ("_rpmdir", made.clone())] {
        command.args(["--define", &format!("{name} {}", value.display())]);
    }
    output(command.arg(file).env("SOURCE_DATE_EPOCH", &source.epoch))?;
    let take = |name: &str| -> Result<PathBuf> {
        let architecture = std::env::consts::ARCH;
        let file = format!("{name}-{version}-1.{architecture}.rpm");
        let to = out.join(&file);
        fs::copy(made.join(architecture).join(&file), &to).with_context(|| format!("rpmbuild made no {file}"))?;
        Ok(to)
    };
    Ok(Made { host: take(HOST.name)?, agent: take(AGENT.name)? })
}
