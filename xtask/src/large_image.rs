//! An image of about one GiB for the benchmark: the guest's, tools out of Debian packages, and an application in two
//! versions, so that two images share all layers but the uppermost.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::guest_image;
use crate::shell::{as_root, run};

/// Tags of the two images, which differ in their last layer.
pub const TAGS: [&str; 2] = ["first", "second"];

/// What the layer of tools holds beyond the guest.
const TOOLS: &[&str] = &["build-essential", "git", "golang-go", "python3-pip", "vim"];
/// Files of the application and bytes of each.
const FILES: usize = 2000;
const BYTES: usize = 20 << 10;

/// Makes the OCI layout `out` beside and on top of the guest's `layout`, as root.
///
/// # Errors
/// When a tool fails; no layout is left then.
pub fn build(layout: &Path, tag: &str, out: &Path) -> Result<()> {
    let work = tempfile::Builder::new().prefix("puter-large-").tempdir_in("/var/tmp")?;
    let (tar, bundle) = (work.path().join("tools.tar"), work.path().join("bundle"));
    guest_image::debian(TOOLS, &tar)?;
    let new = out.with_extension("new");
    for former in [new.as_path(), out] {
        run(as_root("rm").arg("-rf").arg(former))?;
    }
    run(Command::new("cp").arg("-r").arg(layout).arg(&new))?;
    let image = |tag: &str| format!("{}:{tag}", new.display());
    let umoci = |words: &[&str]| run(as_root("umoci").args(words));
    umoci(&["unpack", "--image", &image(tag), &bundle.to_string_lossy()])?;
    let mut unpack = as_root("tar");
    unpack.args(["--extract", "--xattrs", "--xattrs-include=*", "--numeric-owner", "--same-owner"]);
    run(unpack.arg("--file").arg(&tar).arg("--directory").arg(bundle.join("rootfs")))?;
    umoci(&["repack", "--image", &image("tools"), &bundle.to_string_lossy()])?;
    for (number, tag) in (1..).zip(TAGS) {
        let layer = work.path().join(format!("{tag}.tar"));
        let tree = work.path().join(tag);
        application(&tree.join("srv/application"), number)?;
        let mut pack = Command::new("tar");
        pack.args(["--create", "--owner=0", "--group=0", "--numeric-owner", "--sort=name", "--file"]).arg(&layer);
        run(pack.arg("--directory").arg(&tree).arg("srv/application"))?;
        umoci(&["tag", "--image", &image("tools"), tag])?;
        umoci(&["raw", "add-layer", "--image", &image(tag), &layer.to_string_lossy()])?;
    }
    run(as_root("rm").arg("-rf").arg(&bundle))?;
    fs::rename(&new, out).with_context(|| format!("cannot make {}", out.display()))
}

/// Files of which about half are noise: as compressible as programs are.
fn application(dir: &Path, seed: u64) -> Result<()> {
    fs::create_dir_all(dir)?;
    // Xorshift (Marsaglia 2003): the same bytes in each run.
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for number in 0..FILES {
        let mut bytes = Vec::with_capacity(BYTES);
        while bytes.len() < BYTES {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend(state.to_le_bytes());
            bytes.extend(b"a=value\n");
        }
        fs::write(dir.join(format!("{number:04}")), bytes)?;
    }
    Ok(())
}
