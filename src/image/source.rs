//! What every source of images comes down to: a list of layers in files, and how to check them.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::OFlags;

use super::arrival::{Arrival, Arriving};
use super::digest::{Digest, Hasher};
use super::store::LayerId;

/// One layer, somewhere in a file.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub path: PathBuf,
    pub offset: u64,
    pub length: u64,
    /// The digest of these bytes, where one is known.
    pub digest: Option<Digest>,
    /// The digest of the decompressed bytes.
    pub diff_id: Digest,
    /// Where it is still being downloaded: `path` is where it will be.
    pub arrival: Option<Arc<Arrival>>,
}

impl Layer {
    /// What is remembered of it.
    pub fn id(&self) -> LayerId {
        LayerId { digest: self.digest, diff_id: self.diff_id, size: self.length }
    }

    /// The layer's bytes as they lie there, or as they arrive.
    pub fn open(&self) -> Result<Box<dyn Read + Send>> {
        if let Some(arrival) = &self.arrival {
            return Ok(Box::new(Arriving::new(arrival.clone(), self.length)));
        }
        let cannot = || format!("cannot read {}", self.path.display());
        let mut file = open_file(&self.path)?;
        file.seek(SeekFrom::Start(self.offset)).with_context(cannot)?;
        Ok(Box::new(file.take(self.length)))
    }

    /// Whether the bytes there are those of its digest, as far as one is known.
    pub fn is_intact(&self) -> Result<bool> {
        let Some(digest) = self.digest else { return Ok(true) };
        let mut hasher = Hasher::default();
        let mut file = self.open()?;
        let mut buffer = vec![0; 256 << 10];
        loop {
            let got = file.read(&mut buffer).with_context(|| format!("cannot read {}", self.path.display()))?;
            match buffer.get(..got) {
                None | Some([]) => return Ok(hasher.finish() == digest),
                Some(bytes) => hasher.update(bytes),
            }
        }
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
