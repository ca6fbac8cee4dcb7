//! What every source of images comes down to: a list of layers in files, and how to check them.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Take};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::OFlags;

use super::digest::Digest;

/// One layer, somewhere in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layer {
    pub path: PathBuf,
    pub offset: u64,
    pub length: u64,
    /// The digest of these bytes, where one is known.
    pub digest: Option<Digest>,
    /// The digest of the decompressed bytes.
    pub diff_id: Digest,
}

impl Layer {
    /// The layer's bytes as they lie there.
    pub fn open(&self) -> Result<Take<File>> {
        let cannot = || format!("cannot read {}", self.path.display());
        let mut file = open_file(&self.path)?;
        file.seek(SeekFrom::Start(self.offset)).with_context(cannot)?;
        Ok(file.take(self.length))
    }
}

/// An image that can be converted.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub digest: Digest,
    pub architecture: String,
    /// The image's configuration, as it is.
    pub config: Vec<u8>,
    pub layers: Vec<Layer>,
}

/// Opens what must be a regular file: a pipe in a directory from a stranger would be waited for without end.
pub(crate) fn open_file(path: &Path) -> Result<File> {
    let flags = OFlags::NONBLOCK.bits() as i32;
    let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
    let file = opened.with_context(|| format!("cannot open {}", path.display()))?;
    let data = file.metadata().with_context(|| format!("cannot examine {}", path.display()))?;
    ensure!(data.is_file(), "{} is no regular file", path.display());
    Ok(file)
}

/// Reads a part of a file, refusing more than `limit` bytes.
pub(crate) fn read_part(path: &Path, offset: u64, length: u64, limit: u64) -> Result<Vec<u8>> {
    if length > limit {
        bail!("{} holds a document of {} KiB: more than {} KiB are refused", path.display(), length >> 10, limit >> 10);
    }
    let cannot = || format!("cannot read {}", path.display());
    let mut file = open_file(path)?;
    file.seek(SeekFrom::Start(offset)).with_context(cannot)?;
    let mut bytes = vec![];
    file.take(length).read_to_end(&mut bytes).with_context(cannot)?;
    if bytes.len() as u64 != length {
        bail!("{} ends too early: it is cut off", path.display());
    }
    Ok(bytes)
}

/// Refuses an image whose layers are too many bytes altogether.
pub(crate) fn check_total(sizes: impl Iterator<Item = u64>, limit: u64) -> Result<u64> {
    let total = sizes.fold(0_u64, u64::saturating_add);
    if total > limit {
        bail!("its layers have {} MiB altogether: more than {} MiB are refused", total >> 20, limit >> 20);
    }
    Ok(total)
}
