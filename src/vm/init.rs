//! `init`: the ssh key, the default image and its kernel.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

use super::files::write_atomic;
use super::home::Home;
use super::lifecycle::Context;
use super::{Hint, key};
use crate::image::{Image, Store};

/// The largest kernel or initrd that is installed, in bytes.
const MAX_BOOT_FILE: u64 = 1 << 30;

#[derive(Serialize, Deserialize)]
struct Defaults {
    image: String,
    digest: String,
}

fn defaults(home: &Home) -> Option<Defaults> {
    serde_json::from_slice(&std::fs::read(home.defaults()).ok()?).ok()
}

/// The image of new VMs where none is named: the setting, else what a former `init` chose.
pub fn default_image(context: &Context) -> Option<String> {
    let chosen = || defaults(context.home).map(|defaults| defaults.image);
    context.settings.image.clone().or_else(chosen)
}

/// The digest of the image that `init` chose, whose kernel is installed.
pub fn default_digest(home: &Home) -> Option<String> {
    defaults(home).map(|defaults| defaults.digest)
}

/// Pulls the image, makes its disk, installs its kernel and initrd, and makes the ssh key.
///
/// # Errors
/// When the image cannot be had or lacks something, or a file cannot be written; what was installed before stays.
pub fn init(
    context: &Context,
    image: &str,
    kernel: Option<&Path>,
    initrd: Option<&Path>,
    refresh: bool,
) -> Result<Image> {
    context.home.prepare()?;
    key::public(context.home)?;
    let busy = "another init has been working for 10 minutes";
    let _lock = super::files::lock(&context.home.init_lock(), Duration::from_secs(600), busy)?;
    for path in [context.home.kernel(), context.home.initrd(), context.home.defaults()] {
        super::files::remove_temporaries(&path)?;
    }
    let store = Store::open(&context.home.images())?;
    // Until the defaults name the image, nothing else says that it is needed.
    let _hold = store.hold()?;
    let image = context.pull(&store, image, refresh)?;
    let (kernel, initrd): (PathBuf, Option<PathBuf>) = match (kernel, &image.kernel) {
        (Some(kernel), _) => (kernel.into(), initrd.map(Into::into)),
        (None, Some(kernel)) => (kernel.clone(), initrd.map(Into::into).or_else(|| image.initrd.clone())),
        (None, None) => {
            return Err(anyhow!("the image {} has no kernel in its /boot", image.reference))
                .hint("give one with --kernel FILE and --initrd FILE");
        }
    };
    install(&kernel, &context.home.kernel())?;
    match initrd {
        Some(initrd) => install(&initrd, &context.home.initrd())?,
        None => super::files::remove(&context.home.initrd())?,
    }
    write_atomic(
        &context.home.defaults(),
        &serde_json::to_vec_pretty(&Defaults { image: image.reference.to_string(), digest: image.digest.to_string() })?,
    )?;
    Ok(image)
}

fn install(from: &Path, to: &Path) -> Result<()> {
    let file = std::fs::File::open(from).with_context(|| format!("cannot open {}", from.display()))?;
    let length = file.metadata()?.len();
    ensure!(length > 0, "{} is empty", from.display());
    ensure!(length <= MAX_BOOT_FILE, "{} has {length} bytes; a kernel or initrd that large is not one", from.display());
    let mut bytes = Vec::new();
    file.take(MAX_BOOT_FILE).read_to_end(&mut bytes).with_context(|| format!("cannot read {}", from.display()))?;
    write_atomic(to, &bytes)
}
