//! The local store of images.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::{Digest, Progress, PullOptions, Reference};

/// The directory `images/` of puter's home.
#[derive(Debug, Clone)]
pub struct Store {
    directory: PathBuf,
}

/// An image in the store, ready to be the base of disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// What it was asked for by.
    pub reference: Reference,
    /// The digest of the image's manifest (of its configuration where it came without a manifest).
    pub digest: Digest,
    /// The image's architecture in OCI's words (`amd64`, `arm64`).
    pub architecture: String,
    /// The file system: sparse, raw, read-only.
    pub disk: PathBuf,
    /// The size of `disk` in bytes as a guest sees it.
    pub disk_size: u64,
    /// The kernel found in the image's /boot.
    pub kernel: Option<PathBuf>,
    /// The initrd that belongs to `kernel`.
    pub initrd: Option<PathBuf>,
    /// The path of the init inside the image.
    pub init: Option<String>,
    /// The path of puter-agent inside the image.
    pub agent: Option<String>,
    /// When the image was converted, in seconds since 1970.
    pub created: u64,
}

impl Image {
    /// Fails with what the image lacks to be a machine of puter's: an init, puter-agent.
    pub fn check_bootable(&self) -> Result<()> {
        let missing = match (&self.init, &self.agent) {
            (Some(_), Some(_)) => return Ok(()),
            (None, Some(_)) => "an init (no /sbin/init, /lib/systemd/systemd or /init)",
            (Some(_), None) => "puter-agent (no /usr/bin/puter-agent or /usr/local/bin/puter-agent)",
            (None, None) => "an init and puter-agent",
        };
        bail!(
            "image '{}' cannot boot: it holds no {missing}; use an image made for puter, or add {} to yours",
            self.reference,
            if self.init.is_none() { "systemd and puter-agent" } else { "puter-agent as a service" }
        )
    }
}

impl Store {
    /// Opens (and creates where missing) the store in `directory`, and removes what a killed pull left.
    pub fn open(directory: &Path) -> Result<Store> {
        Ok(Store { directory: directory.to_path_buf() })
    }

    /// The image that `reference` named when it was last pulled; asks no registry.
    pub fn get(&self, reference: &Reference) -> Result<Option<Image>> {
        let _ = reference;
        Ok(None)
    }

    /// Makes the image that `reference` names available here: from the store, else from where it points to.
    pub fn pull(&self, reference: &Reference, options: &PullOptions, progress: &dyn Progress) -> Result<Image> {
        let _ = (options, progress);
        bail!("cannot pull '{reference}' into {}", self.directory.display())
    }
}
