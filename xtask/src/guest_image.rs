//! The guest's OCI image from Debian packages: see packaging/guest/README.md.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::shell::{run, top};

/// The Debian release that the guest is made of.
const SUITE: &str = "bookworm";

/// What to build and where.
pub struct Options<'a> {
    /// The base layer, as [`base`] makes it.
    pub base: &'a Path,
    /// The static executable that becomes the agent.
    pub binary: &'a Path,
    /// Where the OCI layout is made; what was there is replaced.
    pub out: &'a Path,
    pub tag: &'a str,
}

/// Makes the base layer, a tar archive of Debian, as root or, by user namespaces, as any user.
///
/// # Errors
/// When a tool fails; no file is left then.
pub fn base(tar: &Path) -> Result<()> {
    let new = tar.with_extension("new");
    debian(&[], &new)?;
    fs::rename(&new, tar).with_context(|| format!("cannot make {}", tar.display()))
}

/// Makes a tar archive of the Debian in `base` with more packages, none of whose `services` starts by itself.
///
/// # Errors
/// When a tool fails; no file is left then.
pub fn with(base: &Path, packages: &[&str], services: &[&str], tar: &Path) -> Result<()> {
    let new = tar.with_extension("new");
    let unpack = "--extract --xattrs --xattrs-include='*' --numeric-owner";
    let mut command = Command::new("mmdebstrap");
    command.args(["--quiet", "--format=tar", "--variant=custom", &format!("--include={}", packages.join(","))]);
    command.arg(format!("--setup-hook=tar {unpack} --file '{}' --directory \"$1\"", base.display()));
    command.arg(format!("--customize-hook=chroot \"$1\" systemctl --quiet disable {}", services.join(" ")));
    run(command.arg(SUITE).arg(&new))?;
    fs::rename(&new, tar).with_context(|| format!("cannot make {}", tar.display()))
}

/// Puts the layers into an OCI layout.
///
/// # Errors
/// When a tool fails; no layout is left then.
pub fn build(options: &Options) -> Result<()> {
    let work = tempfile::Builder::new().prefix("puter-guest-").tempdir_in("/var/tmp")?;
    let agent = work.path().join("agent.tar");
    agent_layer(&recipe(), options.binary, &work.path().join("agent"), &agent)?;

    // Made beside its place: another file system may hold the work directory.
    let layout = options.out.with_extension("new");
    for former in [layout.as_path(), options.out] {
        if former.exists() {
            fs::remove_dir_all(former).with_context(|| format!("cannot remove {}", former.display()))?;
        }
    }
    let image = format!("{}:{}", layout.display(), options.tag);
    let umoci = |words: &[&str]| -> Result<()> { run(Command::new("umoci").args(words)) };
    umoci(&["init", "--layout", &layout.to_string_lossy()])?;
    umoci(&["new", "--image", &image])?;
    for layer in [options.base, &agent] {
        umoci(&["raw", "add-layer", "--image", &image, &layer.to_string_lossy()])?;
    }
    umoci(&["config", "--image", &image, "--os", "linux", "--architecture", "amd64", "--config.cmd", "/sbin/init"])?;
    umoci(&["gc", "--layout", &layout.to_string_lossy()])?;
    fs::rename(&layout, options.out).with_context(|| format!("cannot make {}", options.out.display()))
}

fn recipe() -> PathBuf {
    top().join("packaging/guest")
}

/// Makes a tar archive of the guest's Debian with `more` packages.
pub(crate) fn debian(more: &[&str], tar: &Path) -> Result<()> {
    let recipe = recipe();
    let list = recipe.join("packages");
    let text = fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))?;
    let listed = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
    let packages: Vec<&str> = listed.chain(more.iter().copied()).collect();
    let mut command = Command::new("mmdebstrap");
    command.args(["--quiet", "--format=tar", "--variant=minbase", &format!("--include={}", packages.join(","))]);
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
