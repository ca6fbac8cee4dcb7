//! The local store of images.
//!
//! ```text
//! images/lock                  held shared while the store is used, exclusively to take something away
//! images/blobs/sha256/<hex>    layers as registries sent them, verified
//! images/disks/<hex>/          an image by its digest: disk.raw, image.json, config.json, vmlinuz, initrd
//! images/refs/<hex>.json       which image a reference named when it was last pulled
//! images/tmp/                  work in progress, and the locks of those who do it
//! ```
//!
//! Content appears under its final name by a rename after fsync, so what is there is whole.

mod find;
mod removal;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

pub use find::{Kept, Target};
pub use removal::{Gone, Removed};

use super::files::{self, Directory};
use super::{Digest, Progress, PullOptions, Reference, pull};
use crate::failpoint::reach;

/// The version of `image.json` and of what the conversion makes; a disk of another version is made anew.
pub(crate) const VERSION: u32 = 1;

/// Names written by this process.
static NAMED: AtomicU64 = AtomicU64::new(0);

/// The directory `images/` of puter's home.
#[derive(Debug, Clone)]
pub struct Store {
    directory: Directory,
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
    /// The path inside the image that it was taken from. The image's maker chose it: it may hold anything.
    pub kernel_name: Option<String>,
    /// The initrd that belongs to `kernel`.
    pub initrd: Option<PathBuf>,
    /// The path inside the image that it was taken from.
    pub initrd_name: Option<String>,
    /// The path of the init inside the image.
    pub init: Option<String>,
    /// The path of puter-agent inside the image.
    pub agent: Option<String>,
    /// When the image was converted, in seconds since 1970.
    pub created: u64,
    /// The layers that it was made of; none where an older puter made it.
    pub layers: Vec<LayerId>,
}

/// A layer of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerId {
    /// The digest of its compressed bytes, where it came with one.
    pub digest: Option<Digest>,
    /// The digest of the decompressed bytes.
    pub diff_id: Digest,
    /// Compressed bytes.
    pub size: u64,
}

/// `image.json`: what the conversion found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    pub version: u32,
    pub digest: Digest,
    pub architecture: String,
    pub disk_size: u64,
    /// The paths inside the image that `vmlinuz` and `initrd` were taken from.
    pub kernel: Option<String>,
    pub initrd: Option<String>,
    pub init: Option<String>,
    pub agent: Option<String>,
    pub created: u64,
    #[serde(default)]
    pub layers: Vec<LayerId>,
}

/// A file of `refs/`.
#[derive(Serialize, Deserialize)]
struct Named {
    reference: Reference,
    digest: Digest,
}

/// Keeps all images of the store from being deleted, by any process, until it is dropped.
#[derive(Debug)]
pub struct Hold(#[expect(dead_code, reason = "the lock lives as long as the file is open")] File);

impl Image {
    /// Fails with what the image lacks to be a machine of puter's: an init, puter-agent.
    pub fn check_bootable(&self) -> Result<()> {
        let Some(missing) = self.lacks() else { return Ok(()) };
        let remedy = match (&self.init, &self.agent) {
            (None, Some(_)) => "install systemd in yours",
            (Some(_), _) => "add the agent and its service to yours",
            (None, None) => "add systemd, the agent and its service to yours",
        };
        bail!(
            "image '{}' is no machine: it lacks {missing}; use an image made for puter, or {remedy} (see packaging/guest)",
            self.reference
        )
    }

    /// What it lacks to be a machine, in words.
    pub fn lacks(&self) -> Option<&'static str> {
        match (&self.init, &self.agent) {
            (Some(_), Some(_)) => None,
            (None, Some(_)) => Some("an init (/sbin/init, /lib/systemd/systemd or /init)"),
            (Some(_), None) => Some("puter-agent (/usr/bin/puter-agent or /usr/local/bin/puter-agent)"),
            (None, None) => Some("an init and puter-agent"),
        }
    }

    /// The image's configuration as its maker wrote it (OCI image spec, "Image Configuration").
    pub fn config(&self) -> Result<serde_json::Value> {
        let path = self.disk.with_file_name("config.json");
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged: pull the image again", path.display()))
    }
}

impl Store {
    /// Opens the store in `directory` (usually `images/` of puter's home), creates what is missing, and removes what
    /// a killed pull left.
    pub fn open(directory: &Path) -> Result<Store> {
        let store = Store { directory: Directory::create(directory)? };
        store.clean()?;
        Ok(store)
    }

    /// The store in `directory` for one who only looks: `None` where there is none. It can be on a read-only disk.
    pub fn look(directory: &Path) -> Option<Store> {
        if !directory.join("disks").is_dir() {
            return None;
        }
        let store = Store { directory: Directory { root: directory.to_path_buf() } };
        // What cannot be cleaned up stays for one who writes.
        let _ = store.clean();
        Some(store)
    }

    /// The image that `reference` named when it was last pulled; asks no registry.
    pub fn get(&self, reference: &Reference) -> Result<Option<Image>> {
        let reference = reference.absolute().context("cannot find the working directory")?;
        let Some(bytes) = files::read(&self.directory.reference(&reference.to_string()))? else { return Ok(None) };
        // A damaged file is as none: the next pull writes it anew.
        let Ok(named) = serde_json::from_slice::<Named>(&bytes) else { return Ok(None) };
        if named.reference != reference {
            return Ok(None);
        }
        self.by_digest(&named.digest, Some(reference))
    }

    /// The image with that digest, named by `reference` or else by any reference that names it.
    pub fn by_digest(&self, digest: &Digest, reference: Option<Reference>) -> Result<Option<Image>> {
        let Some(record) = self.record(digest)? else { return Ok(None) };
        let known = match reference {
            Some(reference) => Some(reference),
            None => self.names()?.remove(digest).and_then(|names| names.into_iter().next()),
        };
        let directory = self.directory.disk(digest);
        Ok(Some(Image {
            reference: known.unwrap_or_else(|| unnamed(digest)),
            digest: record.digest,
            architecture: record.architecture,
            disk: directory.join("disk.raw"),
            disk_size: record.disk_size,
            kernel: record.kernel.is_some().then(|| directory.join("vmlinuz")),
            kernel_name: record.kernel,
            initrd: record.initrd.is_some().then(|| directory.join("initrd")),
            initrd_name: record.initrd,
            init: record.init,
            agent: record.agent,
            created: record.created,
            layers: record.layers,
        }))
    }

    /// Makes the image that `reference` names available here. A registry is asked only if the image is not here or
    /// `options.refresh` is set; a local directory or archive is always looked at, since it may have changed.
    ///
    /// Two pulls of one image, by any processes, do the work once.
    ///
    /// # Errors
    /// Each names the thing, the reason and the way out, and leaves the store as it was, except for layers that
    /// came whole. [`super::is_cancelled`] tells whether `progress` ended the pull.
    pub fn pull(&self, reference: &Reference, options: &PullOptions, progress: &dyn Progress) -> Result<Image> {
        let reference = reference.absolute().context("cannot find the working directory")?;
        if reference.path().is_none()
            && !options.refresh
            && let Some(image) = self.get(&reference)?
            && image.architecture == options.architecture()
        {
            return Ok(image);
        }
        self.directory.clean()?;
        let digest = pull::pull(&self.directory, self, &reference, options, progress);
        self.directory.clean()?;
        let digest = digest.with_context(|| format!("cannot pull '{reference}'"))?;
        match self.by_digest(&digest, Some(reference.clone()))? {
            Some(image) => Ok(image),
            None => bail!("image '{reference}' was deleted while it was pulled: pull it again"),
        }
    }

    /// Bytes of storage that an image's directory takes.
    pub fn usage(&self, digest: &Digest) -> u64 {
        size_on_disk(&self.directory.disk(digest))
    }

    /// Bytes of storage that the cached layers take; [`Store::prune`] gives them back.
    pub fn cached(&self) -> u64 {
        size_on_disk(&self.directory.root.join("blobs"))
    }

    /// Takes a hold on all images, so that one can be looked up and then written into a machine's state with nobody
    /// deleting it between.
    pub fn hold(&self) -> Result<Hold> {
        self.hold_unless(&|| Ok(()))
    }

    pub(crate) fn hold_unless(&self, check: &dyn Fn() -> Result<()>) -> Result<Hold> {
        loop {
            check()?;
            match self.directory.try_lock(false)? {
                Some(lock) => return Ok(Hold(lock)),
                None => std::thread::sleep(std::time::Duration::from_millis(20)),
            }
        }
    }

    /// What is known about a disk that is here, whole and of this version.
    pub(crate) fn record(&self, digest: &Digest) -> Result<Option<Record>> {
        let directory = self.directory.disk(digest);
        let Some(bytes) = files::read(&directory.join("image.json"))? else { return Ok(None) };
        let Ok(record) = serde_json::from_slice::<Record>(&bytes) else { return Ok(None) };
        let size = fs::metadata(directory.join("disk.raw")).map(|data| data.len()).ok();
        let whole = record.version == VERSION && record.digest == *digest && size == Some(record.disk_size);
        Ok(whole.then_some(record))
    }

    /// Writes down that `reference` names `digest`.
    pub(crate) fn name(&self, reference: &Reference, digest: &Digest) -> Result<()> {
        let path = self.directory.reference(&reference.to_string());
        let bytes = serde_json::to_vec_pretty(&Named { reference: reference.clone(), digest: *digest })?;
        if files::read(&path)?.as_ref() == Some(&bytes) {
            return Ok(());
        }
        let stem = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        // Threads of one process may name the same image at once, when several VMs start.
        let number = NAMED.fetch_add(1, Ordering::Relaxed);
        let temporary = self.directory.temporary(&format!("ref-{}-{number}-{stem}", std::process::id()));
        files::write_synced(&temporary, &bytes)?;
        files::rename(&temporary, &path)?;
        reach("image pull: named");
        Ok(())
    }

    fn names(&self) -> Result<BTreeMap<Digest, Vec<Reference>>> {
        let mut names: BTreeMap<Digest, Vec<Reference>> = BTreeMap::new();
        let path = self.directory.root.join("refs");
        let entries = match fs::read_dir(&path) {
            // Who was killed when it made the store has made no names.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(names),
            other => other.with_context(|| format!("cannot read {}", path.display()))?,
        };
        for entry in entries.flatten() {
            let named = fs::read(entry.path()).ok().and_then(|bytes| serde_json::from_slice::<Named>(&bytes).ok());
            if let Some(named) = named {
                names.entry(named.digest).or_default().push(named.reference);
            }
        }
        names.values_mut().for_each(|references| references.sort());
        Ok(names)
    }

    fn digests(&self) -> Result<Vec<Digest>> {
        let path = self.directory.root.join("disks");
        let entries = fs::read_dir(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let parse = |name: &std::ffi::OsStr| format!("sha256:{}", name.to_str()?).parse().ok();
        let mut digests: Vec<Digest> = entries.flatten().filter_map(|entry| parse(&entry.file_name())).collect();
        digests.sort();
        Ok(digests)
    }
}

/// The name of an image that no reference names any more.
fn unnamed(digest: &Digest) -> Reference {
    Reference::Registry(super::reference::RegistryReference {
        registry: "localhost".into(),
        repository: "unnamed".into(),
        tag: None,
        digest: Some(*digest),
    })
}

/// Bytes of storage, holes not counted.
fn size_on_disk(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(data) = fs::symlink_metadata(path) else { return 0 };
    if !data.is_dir() {
        return data.blocks().saturating_mul(512);
    }
    fs::read_dir(path).into_iter().flatten().flatten().map(|entry| size_on_disk(&entry.path())).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_whose_making_was_cut_off_holds_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("disks")).unwrap();
        assert!(Store::look(dir.path()).unwrap().list().unwrap().is_empty());
        assert!(Store::open(dir.path()).unwrap().list().unwrap().is_empty());
    }
}
