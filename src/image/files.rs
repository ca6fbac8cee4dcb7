//! The store's directories and files, their locks, and names that appear only when the content is safe.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::digest::Digest;
use super::progress::TICK;

/// The paths inside `images/`.
#[derive(Debug, Clone)]
pub(crate) struct Directory {
    pub root: PathBuf,
}

impl Directory {
    /// Creates what is missing.
    pub fn create(root: &Path) -> Result<Directory> {
        let directory = Directory { root: root.to_path_buf() };
        for path in [root.join("blobs/sha256"), root.join("disks"), root.join("refs"), root.join("tmp")] {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
            made.with_context(|| format!("cannot create {}", path.display()))?;
        }
        Ok(directory)
    }

    pub fn blob(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    /// Whether a verified blob of that size is here.
    pub fn has_blob(&self, digest: &Digest, size: u64) -> bool {
        fs::symlink_metadata(self.blob(digest)).is_ok_and(|data| data.is_file() && data.len() == size)
    }

    /// The directory of an image's disk.
    pub fn disk(&self, digest: &Digest) -> PathBuf {
        self.root.join("disks").join(digest.hex())
    }

    pub fn temporary(&self, name: &str) -> PathBuf {
        self.root.join("tmp").join(name)
    }

    /// The file that says which image a reference names.
    pub fn reference(&self, canonical: &str) -> PathBuf {
        self.root.join("refs").join(format!("{}.json", Digest::of(canonical.as_bytes()).hex()))
    }

    /// Locks the store: shared while using it, exclusively to take things away. `None` if it is not free.
    pub fn try_lock(&self, exclusive: bool) -> Result<Option<File>> {
        let path = self.root.join("lock");
        let file = open_lock(&path)?;
        let operation = match exclusive {
            true => FlockOperation::NonBlockingLockExclusive,
            false => FlockOperation::NonBlockingLockShared,
        };
        match flock(&file, operation) {
            Ok(()) => Ok(Some(file)),
            Err(Errno::WOULDBLOCK | Errno::INTR) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
        }
    }

    /// Removes what killed commands left in `tmp`, if no other command is at work.
    pub fn clean(&self) -> Result<()> {
        let Some(_lock) = self.try_lock(true)? else { return Ok(()) };
        self.clean_locked();
        Ok(())
    }

    /// The same for one who holds the exclusive lock.
    pub fn clean_locked(&self) {
        for entry in fs::read_dir(self.root.join("tmp")).into_iter().flatten().flatten() {
            remove(&entry.path());
        }
    }
}

/// Fails if the file system has no room for `bytes` more.
pub(crate) fn check_space(path: &Path, bytes: u64) -> Result<()> {
    let found = rustix::fs::statvfs(path).with_context(|| format!("cannot examine {}", path.display()))?;
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    if bytes > free {
        bail!(
            "{} MiB are to be downloaded, but {} has room for {} MiB only: free some space, or set PUTER_HOME to a directory on a larger file system",
            bytes >> 20,
            path.display(),
            free >> 20
        );
    }
    Ok(())
}

/// Removes a file or a directory with all that is in it; what cannot be removed stays for the next time.
pub(crate) fn remove(path: &Path) {
    let is_directory = fs::symlink_metadata(path).is_ok_and(|data| data.is_dir());
    let _ = if is_directory { fs::remove_dir_all(path) } else { fs::remove_file(path) };
}

fn open_lock(path: &Path) -> Result<File> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    file.with_context(|| format!("cannot open {}", path.display()))
}

/// Waits for an exclusive lock on `path`; `check` ends the wait by its error.
pub(crate) fn lock(path: &Path, check: &dyn Fn() -> Result<()>) -> Result<File> {
    loop {
        check()?;
        let file = open_lock(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK | Errno::INTR) => std::thread::sleep(TICK),
            Err(error) => return Err(error).with_context(|| format!("cannot lock {}", path.display())),
        }
    }
}

/// Gives a file or directory, already on stable storage, its final name, durably.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).with_context(|| format!("cannot rename {} to {}", from.display(), to.display()))?;
    to.parent().map_or(Ok(()), sync_directory)
}

/// Brings a directory's entries to stable storage.
pub(crate) fn sync_directory(path: &Path) -> Result<()> {
    let synced = File::open(path).and_then(|directory| directory.sync_all());
    synced.with_context(|| format!("cannot sync {}", path.display()))
}

/// Writes a new file whole, with fsync.
pub(crate) fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Reads a small file of ours; `None` if it does not exist.
pub(crate) fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}
