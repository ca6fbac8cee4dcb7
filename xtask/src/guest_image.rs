//! The guest's OCI image from Debian packages: see packaging/guest/README.md.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::shell::{run, top};

/// The Debian release that the guest is made of.
const SUITE: &str = "bookworm";

/// What to build and where.
pub struct Options<'a> {
    /// The static executable that becomes the agent.
    pub binary: &'a Path,
    /// Where the OCI layout is made; it must not exist.
    pub out: &'a Path,
    pub tag: &'a str,
}

/// Builds the image, as root or, by user namespaces, as any user.
///
/// # Errors
/// When a tool fails; no layout is left then.
pub fn build(options: &Options) -> Result<()> {
    let recipe = top().join("packaging/guest");
    let work = tempfile::Builder::new().prefix("puter-guest-").tempdir_in("/var/tmp")?;
    let base = work.path().join("base.tar");
    let agent = work.path().join("agent.tar");
    debian(&recipe, &base)?;
    agent_layer(&recipe, options.binary, &work.path().join("agent"), &agent)?;

    let layout = work.path().join("oci");
    let image = format!("{}:{}", layout.display(), options.tag);
    let umoci = |words: &[&str]| -> Result<()> { run(Command::new("umoci").args(words)) };
    umoci(&["init", "--layout", &layout.to_string_lossy()])?;
    umoci(&["new", "--image", &image])?;
    for layer in [&base, &agent] {
        umoci(&["raw", "add-layer", "--image", &image, &layer.to_string_lossy()])?;
    }
    umoci(&["config", "--image", &image, "--os", "linux", "--architecture", "amd64", "--config.cmd", "/sbin/init"])?;
    if let Some(parent) = options.out.parent() {
        fs::create_dir_all(parent)?;
    }
    // Beside its place first: another file system may hold the work directory.
    let beside = options.out.with_extension("new");
    let _ = fs::remove_dir_all(&beside);
    run(Command::new("cp").arg("-r").arg(&layout).arg(&beside))?;
    fs::rename(&beside, options.out).with_context(|| format!("cannot make {}", options.out.display()))
}

fn debian(recipe: &Path, tar: &Path) -> Result<()> {
    let list = recipe.join("packages");
    let text = fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))?;
    let packages: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')).collect();
    let mut command = Command::new("mmdebstrap");
    command.args(["--quiet", "--variant=minbase", &format!("--include={}", packages.join(","))]);
    for unneeded in ["doc", "man", "locale", "info", "lintian"] {
        command.arg(format!("--dpkgopt=path-exclude=/usr/share/{unneeded}/*"));
    }
    command.arg("--dpkgopt=path-include=/usr/share/doc/*/copyright");
    command.arg(format!("--customize-hook={}/customize.sh \"$1\"", recipe.display()));
    run(command.arg(SUITE).arg(tar))
}

fn agent_layer(recipe: &Path, binary: &Path, tree: &Path, tar: &Path) -> Result<()> {
    run(Command::new("cp").arg("-r").arg(recipe.join("agent")).arg(tree))?;
    let bin = tree.join("usr/bin");
    fs::create_dir_all(&bin)?;
    let executable = bin.join("puter-multi");
    fs::copy(binary, &executable).with_context(|| format!("cannot copy {}", binary.display()))?;
    fs::set_permissions(&executable, fs::Permissions::from_mode(0o755))?;
    symlink("puter-multi", bin.join("puter-agent"))?;
    // Only what the layer adds: a directory's own entry would change that of the layer below.
    let mut command = Command::new("tar");
    command.args(["--create", "--owner=0", "--group=0", "--numeric-owner", "--sort=name", "--mode=u=rwX,go=rX"]);
    command.arg("--file").arg(tar).arg("--directory").arg(tree);
    run(command.args([
        "usr/bin/puter-multi",
        "usr/bin/puter-agent",
        "usr/lib/systemd/system/puter-agent.service",
        "etc/systemd/system/multi-user.target.wants/puter-agent.service",
    ]))
}
