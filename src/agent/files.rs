//! The guest's files: below a root that tests replace, written whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The guest that the agent is in, or a directory that stands for it.
#[derive(Clone, Debug)]
pub struct Guest {
    root: PathBuf,
}

impl Guest {
    pub fn at(root: &Path) -> Guest {
        Guest { root: root.to_path_buf() }
    }

    /// Whether this is the running system, whose kernel and services are configured as well.
    pub fn is_real(&self) -> bool {
        self.root == Path::new("/")
    }

    /// The file at this absolute path of the guest.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// The guest's name now.
    pub fn hostname(&self) -> String {
        match self.is_real() {
            true => rustix::system::uname().nodename().to_string_lossy().into_owned(),
            false => fs::read_to_string(self.path("/etc/hostname")).unwrap_or_default().trim().to_string(),
        }
    }

    /// Replaces a file; directories on the way are made. False when it had just these contents and mode already.
    ///
    /// # Errors
    /// When a directory or the file cannot be written; the former file stays.
    pub fn write(&self, path: &str, contents: &[u8], mode: u32) -> Result<bool> {
        let path = self.path(path);
        let same = fs::read(&path).is_ok_and(|former| former == contents);
        if same && fs::metadata(&path).is_ok_and(|metadata| metadata.permissions().mode() & 0o7777 == mode) {
            return Ok(false);
        }
        let write = || -> std::io::Result<()> {
            let parent = path.parent().unwrap_or(Path::new("/"));
            fs::create_dir_all(parent)?;
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let temporary = parent.join(format!(".{name}.puter"));
            let _ = fs::remove_file(&temporary);
            let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
            let written = file
                .set_permissions(fs::Permissions::from_mode(mode))
                .and_then(|()| file.write_all(contents))
                .and_then(|()| file.sync_all())
                .and_then(|()| fs::rename(&temporary, &path));
            if written.is_err() {
                let _ = fs::remove_file(&temporary);
            }
            written?;
            File::open(parent)?.sync_all()
        };
        write().with_context(|| format!("cannot write {}", path.display()))?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_only_where_it_differs() {
        let dir = tempfile::tempdir().unwrap();
        let guest = Guest::at(dir.path());
        assert!(guest.write("/etc/a/b", b"one", 0o600).unwrap());
        assert!(!guest.write("/etc/a/b", b"one", 0o600).unwrap());
        assert!(guest.write("/etc/a/b", b"one", 0o644).unwrap());
        assert!(guest.write("/etc/a/b", b"two", 0o644).unwrap());
        assert_eq!(fs::read(guest.path("/etc/a/b")).unwrap(), b"two");
        assert_eq!(fs::read_dir(guest.path("/etc/a")).unwrap().count(), 1);
    }
}
