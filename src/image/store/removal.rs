//! Taking images and cached layers away. What nobody names any more is out of sight by one rename; then its bytes go. Who is
//! killed between leaves what the next one who opens the store removes.

use std::fs::{self, File};

use anyhow::{Result, anyhow};
use serde::Serialize;

use super::{Digest, Kept, LayerId, Named, Reference, Store, Target, files, size_on_disk};
use crate::failpoint::reach;
use crate::hint::Hint;

/// Tells who needs an image.
pub type Users<'a> = &'a dyn Fn(&Digest) -> Result<Vec<String>>;

/// What [`Store::prune`] or [`Store::delete`] took away, or would.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Removed {
    pub images: Vec<Gone>,
    /// Cached layers.
    pub layers: usize,
    /// Bytes of storage that they took.
    pub layer_bytes: u64,
}

/// An image that lost names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Gone {
    pub digest: Digest,
    /// The names that are forgotten.
    pub names: Vec<Reference>,
    /// The names under which it is still there; with none it is gone.
    pub left: Vec<Reference>,
    /// Bytes of storage that its disk took.
    pub bytes: u64,
}

impl Removed {
    /// Bytes of storage given back.
    pub fn bytes(&self) -> u64 {
        self.images.iter().map(|image| image.bytes).sum::<u64>() + self.layer_bytes
    }
}

impl Store {
    /// Forgets a name, and deletes its image if it has no other, with the cached layers that no other image has. By its
    /// digest an image loses all its names.
    ///
    /// `users` is asked under the lock that [`Store::hold`] shares.
    ///
    /// # Errors
    /// When it is not here, is needed (names by whom), or another command uses the store.
    pub fn delete(&self, text: &str, users: Users) -> Result<Removed> {
        let _lock = self.exclusive()?;
        let target = self.find(text)?;
        let digest = *target.digest();
        let names = self.names()?.remove(&digest).unwrap_or_default();
        let (names, left): (Vec<_>, Vec<_>) = match &target {
            Target::Name(name, _) => names.into_iter().partition(|one| one == name),
            Target::Digest(_) => (names, Vec::new()),
        };
        let mut removed = Removed::default();
        let mut bytes = 0;
        if left.is_empty() {
            let needed = users(&digest)?;
            if !needed.is_empty() {
                return Err(anyhow!("image '{text}' is needed by {}", needed.join(", "))).hint("delete those first");
            }
            // A cache may go first: who is killed here has lost nothing.
            for layer in self.own_layers(&digest)? {
                self.remove_layer(&layer, &mut removed);
            }
            bytes = self.remove_disk(&digest)?;
        }
        for name in &names {
            files::remove(&self.directory.reference(&name.to_string()));
            reach("image delete: name forgotten");
        }
        removed.images.push(Gone { digest, names, left, bytes });
        self.directory.clean_locked();
        Ok(removed)
    }

    /// What [`Store::prune`] would take away now.
    pub fn prunable(&self, users: Users) -> Result<Removed> {
        let mut removed = Removed::default();
        for Kept { digest, names, used, .. } in self.kept()? {
            if users(&digest)?.is_empty() {
                removed.images.push(Gone { digest, names, left: Vec::new(), bytes: used });
            }
        }
        for path in self.layers() {
            removed.layers += 1;
            removed.layer_bytes += size_on_disk(&path);
        }
        Ok(removed)
    }

    /// Deletes every image that `users` names nobody for, and all cached layers: nobody needs a layer whose image is made.
    ///
    /// # Errors
    /// When another command uses the store, or something cannot be removed; what was removed before stays so.
    pub fn prune(&self, users: Users) -> Result<Removed> {
        let _lock = self.exclusive()?;
        let mut removed = Removed { images: self.prunable(users)?.images, ..Removed::default() };
        for image in &removed.images {
            self.remove_disk(&image.digest)?;
        }
        self.forget_names();
        for path in self.layers() {
            self.remove_layer(&path, &mut removed);
        }
        self.directory.clean_locked();
        Ok(removed)
    }

    /// Removes what killed commands left, if no other command is at work.
    pub(super) fn clean(&self) -> Result<()> {
        let Some(_lock) = self.directory.try_lock(true)? else { return Ok(()) };
        self.directory.clean_locked();
        self.forget_names();
        Ok(())
    }

    /// Removes names that can be read by nobody or name what is not there. The caller holds the exclusive lock.
    fn forget_names(&self) {
        for entry in fs::read_dir(self.directory.root.join("refs")).into_iter().flatten().flatten() {
            let named = fs::read(entry.path()).ok().and_then(|bytes| serde_json::from_slice::<Named>(&bytes).ok());
            if named.is_none_or(|named| !self.directory.disk(&named.digest).exists()) {
                files::remove(&entry.path());
                reach("image prune: name forgotten");
            }
        }
    }

    fn exclusive(&self) -> Result<File> {
        for _ in 0..50 {
            if let Some(lock) = self.directory.try_lock(true)? {
                return Ok(lock);
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        Err(anyhow!("another command is using the images")).hint("wait for it to end, then try again")
    }

    /// The files of the cached layers.
    fn layers(&self) -> Vec<std::path::PathBuf> {
        let entries = fs::read_dir(self.directory.root.join("blobs/sha256")).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }

    /// The files of the cached layers that no other image has.
    fn own_layers(&self, digest: &Digest) -> Result<Vec<std::path::PathBuf>> {
        let cached =
            |layer: LayerId| layer.digest.map(|digest| self.directory.blob(&digest)).filter(|path| path.exists());
        let mut own: Vec<_> =
            self.record(digest)?.into_iter().flat_map(|record| record.layers).filter_map(cached).collect();
        own.sort();
        own.dedup();
        for other in self.digests()?.into_iter().filter(|other| other != digest) {
            for layer in self.record(&other)?.into_iter().flat_map(|record| record.layers).filter_map(cached) {
                own.retain(|path| *path != layer);
            }
        }
        Ok(own)
    }

    fn remove_layer(&self, path: &std::path::Path, removed: &mut Removed) {
        let bytes = size_on_disk(path);
        files::remove(path);
        if !path.exists() {
            removed.layers += 1;
            removed.layer_bytes += bytes;
        }
        reach("image prune: layer removed");
    }

    /// Takes a disk away at once (by a rename), then its bytes.
    fn remove_disk(&self, digest: &Digest) -> Result<u64> {
        let path = self.directory.disk(digest);
        let bytes = size_on_disk(&path);
        let grave = self.directory.temporary(&format!("deleted-{}", digest.hex()));
        files::remove(&grave);
        reach("image delete: begins");
        files::rename(&path, &grave)?;
        reach("image delete: out of sight");
        files::remove(&grave);
        reach("image delete: disk removed");
        Ok(bytes)
    }
}
