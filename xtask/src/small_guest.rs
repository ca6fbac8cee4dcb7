//! A guest that boots in a second or two: Debian's kernel, BusyBox and the agent. Tests that start machines by the
//! dozen use it; those of the guest's own system use the one of packaging/guest.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::shell::{output, run, top};

/// What to build and where.
pub struct Options<'a> {
    /// Debian's tree as a tar archive: the kernel and its modules come from there.
    pub base: &'a Path,
    /// The static executable that becomes the agent.
    pub binary: &'a Path,
    /// Where the OCI layout is made; what was there is replaced.
    pub out: &'a Path,
    pub tag: &'a str,
}

/// Builds the image.
///
/// # Errors
/// When a tool fails or Debian's tree lacks something; no layout is left then.
pub fn build(options: &Options) -> Result<()> {
    let work = tempfile::Builder::new().prefix("puter-small-").tempdir_in("/var/tmp")?;
    let recipe = top().join("tests/small-guest");
    let debian = work.path().join("debian");
    fs::create_dir(&debian)?;
    let mut unpack = Command::new("tar");
    unpack.args(["--extract", "--wildcards", "--no-same-owner", "--file"]).arg(options.base);
    run(unpack.arg("--directory").arg(&debian).args(["./boot/vmlinuz-*", "./usr/lib/modules/*.ko"]))?;

    let tree = work.path().join("tree");
    run(Command::new("cp").arg("-r").arg(recipe.join("tree")).arg(&tree))?;
    for directory in ["bin", "boot", "dev", "proc", "root", "run", "sys", "tmp", "usr/bin", "var/lib"] {
        fs::create_dir_all(tree.join(directory))?;
    }
    let busybox = crate::shell::find("busybox").context("busybox is not here")?;
    place(&busybox, &tree.join("bin/busybox"))?;
    place(options.binary, &tree.join("usr/bin/puter-agent"))?;
    for (name, target) in [("bin/sh", "busybox"), ("bin/login", "busybox"), ("sbin/init", "../bin/busybox")] {
        fs::create_dir_all(tree.join(name).parent().context("a name has a parent")?)?;
        std::os::unix::fs::symlink(target, tree.join(name))?;
    }
    for entry in fs::read_dir(debian.join("boot"))? {
        let kernel = entry?;
        let name = kernel.file_name().to_string_lossy().into_owned();
        fs::copy(kernel.path(), tree.join("boot").join(&name))?;
        let initrd = tree.join("boot").join(name.replace("vmlinuz", "initrd.img"));
        initramfs(&recipe, &debian, &busybox, &initrd)?;
    }

    let layer = work.path().join("layer.tar");
    let mut pack = Command::new("tar");
    pack.args(["--create", "--owner=0", "--group=0", "--numeric-owner", "--sort=name", "--mode=u=rwX,go=rX"]);
    run(pack.arg("--file").arg(&layer).arg("--directory").arg(&tree).arg("."))?;
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
    umoci(&["raw", "add-layer", "--image", &image, &layer.to_string_lossy()])?;
    fs::rename(&layout, options.out).with_context(|| format!("cannot make {}", options.out.display()))
}

fn place(from: &Path, to: &Path) -> Result<()> {
    // A copy of what a link leads to.
    fs::copy(from, to).map(drop).with_context(|| format!("cannot copy {}", from.display()))
}

/// BusyBox, the kernel's modules that the disk, the network and the agent need, and a script that loads them.
fn initramfs(recipe: &Path, debian: &Path, busybox: &Path, out: &Path) -> Result<()> {
    let root = debian.with_file_name("initramfs");
    for directory in ["bin", "dev", "disk", "modules", "proc"] {
        fs::create_dir_all(root.join(directory))?;
    }
    place(busybox, &root.join("bin/busybox"))?;
    place(&recipe.join("initramfs"), &root.join("init"))?;
    place(&recipe.join("modules"), &root.join("modules/list"))?;
    let list = fs::read_to_string(recipe.join("modules"))?;
    for module in list.lines() {
        let mut find = Command::new("find");
        let found = output(find.arg(debian).args(["-name", &format!("{module}.ko")]))?;
        ensure!(!found.is_empty(), "Debian's kernel has no module {module}");
        place(Path::new(&found), &root.join(format!("modules/{module}.ko")))?;
    }
    let script = "find . | LC_ALL=C sort | cpio --quiet --create --format=newc --owner=0:0 >\"$0\"";
    run(Command::new("sh").args(["-c", script]).arg(out).current_dir(&root))?;
    fs::remove_dir_all(&root).context("cannot remove the unpacked initramfs")
}
