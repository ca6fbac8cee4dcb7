//! Debian's docker-registry on the loopback of a [`World`].

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::shell::output;
use crate::world::World;

/// Where the registry answers, inside the world.
pub const ADDRESS: &str = "localhost:5000";

/// Starts a registry with nothing in it; it ends with its world.
///
/// # Errors
/// When it does not answer within 10 seconds.
pub fn start(world: &World) -> Result<()> {
    let config = world.dir().join("registry.yml");
    let storage = world.dir().join("home/registry");
    let text = format!(
        "version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n    \
             rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:5000\n",
        storage.display()
    );
    fs::write(&config, text)?;
    let mut command = world.command("docker-registry");
    let command = command.arg("serve").arg(&config).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().context("cannot run docker-registry")?;
    for _ in 0..100 {
        let url = format!("http://{ADDRESS}/v2/");
        if output(world.command("busybox").args(["wget", "-q", "-O", "/dev/null", &url])).is_ok() {
            return Ok(());
        }
        sleep(Duration::from_millis(100));
    }
    anyhow::bail!("docker-registry does not answer on {ADDRESS}")
}

/// Pushes the image `tag` of an OCI layout as `name` and gives its reference.
///
/// # Errors
/// When skopeo fails.
pub fn push(world: &World, layout: &Path, tag: &str, name: &str) -> Result<String> {
    ensure!(layout.is_dir(), "{} is no OCI layout", layout.display());
    let reference = format!("{ADDRESS}/{name}");
    // The layout may lie where the world's user cannot read, so root copies; the registry is on loopback.
    let mut skopeo: Command = world.root("skopeo");
    skopeo.args(["--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"]);
    output(skopeo.arg(format!("oci:{}:{tag}", layout.display())).arg(format!("docker://{reference}")))?;
    Ok(reference)
}
