//! An archive for systems without a package: the executable, the manual, completions, and what installs them.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::{Source, directory, gzip, pages, put, put_page, read, sbom, set_mode, set_modes};
use crate::shell::{output, top};

/// Makes `target/packages/puter-VERSION-ARCHITECTURE-linux.tar.gz`.
///
/// # Errors
/// When a tool fails.
pub fn make(source: &Source) -> Result<PathBuf> {
    let work = tempfile::Builder::new().prefix("puter-tar-").tempdir_in("/var/tmp")?;
    let name = format!("puter-{}-{}-linux", source.version, std::env::consts::ARCH);
    let tree = work.path().join(&name);
    put(&tree.join("puter-multi"), fs::read(&source.executable).context("cannot read the executable")?)?;
    for (page, path) in pages()? {
        put_page(&page, &path, &tree)?;
    }
    for shell in ["bash", "zsh", "fish"] {
        put(&tree.join("completions").join(shell), source.completions(shell)?)?;
    }
    for file in ["README.md", "CHANGELOG.md", "LICENSE-MIT", "LICENSE-APACHE", "packaging/tar/install.sh"] {
        let from = top().join(file);
        put(&tree.join(from.file_name().unwrap_or_default()), read(&from)?)?;
    }
    let lib = top().join("packaging/debian/puter/tree/usr/lib");
    put(&tree.join("60-puter.rules"), read(&lib.join("udev/rules.d/60-puter.rules"))?)?;
    for unit in ["puterd@.service", "puterd@.socket"] {
        put(&tree.join("systemd").join(unit), read(&lib.join("systemd/system").join(unit))?)?;
    }
    put(&tree.join("third-party-licences.gz"), &source.licences)?;
    put(&tree.join(sbom::NAME), &source.bill)?;
    set_modes(&tree)?;
    for executable in ["puter-multi", "install.sh"] {
        set_mode(&tree.join(executable), 0o755)?;
    }
    let plain = work.path().join("archive.tar");
    let mut command = Command::new("tar");
    command.args(["--create", "--owner=0", "--group=0", "--numeric-owner", "--sort=name", "--format=ustar"]);
    command.arg(format!("--mtime=@{}", source.epoch)).arg("--file").arg(&plain);
    output(command.arg("--directory").arg(work.path()).arg(&name))?;
    let archive = directory()?.join(format!("{name}.tar.gz"));
    put(&archive, gzip(&fs::read(&plain)?)?)?;
    Ok(archive)
}
