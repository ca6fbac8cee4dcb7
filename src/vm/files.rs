//! Writes that are whole or absent, and locks that a killed process cannot leave behind.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};

use super::{Hint, cancel};
use crate::failpoint;

/// Replaces `path` by `bytes`, mode 0600: a reader sees the old file or the new one, after a crash as well.
///
/// # Errors
/// When a write fails; the former file stays and the temporary one is removed.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let parent = path.parent().context("a file needs a directory")?;
    let name = path.file_name().context("a file needs a name")?;
    let temporary = parent.join(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
    let write = || -> std::io::Result<()> {
        failpoint::write()?;
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        File::open(parent)?.sync_all()
    };
    write().map_err(|error| {
        let _ = std::fs::remove_file(&temporary);
        anyhow::Error::new(error).context(format!("cannot write {}", path.display()))
    })
}

/// A file that is written and waits beside its place: to put it there needs no room any more.
#[derive(Debug)]
pub struct Prepared {
    temporary: PathBuf,
    path: PathBuf,
}

impl Prepared {
    /// Writes `bytes` beside `path`, which stays as it is.
    ///
    /// # Errors
    /// When a write fails; nothing is left then.
    pub fn new(path: &Path, bytes: &[u8]) -> Result<Prepared> {
        let parent = path.parent().context("a file needs a directory")?;
        let name = path.file_name().context("a file needs a name")?.to_string_lossy();
        let temporary = parent.join(format!(".{name}.{}.ready.tmp", std::process::id()));
        let write = || -> std::io::Result<()> {
            failpoint::write()?;
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        let prepared = Prepared { temporary: temporary.clone(), path: path.to_path_buf() };
        write().with_context(|| format!("cannot write {}", path.display()))?;
        Ok(prepared)
    }

    /// Puts it in its place.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn commit(self) -> Result<()> {
        let put = || -> std::io::Result<()> {
            std::fs::rename(&self.temporary, &self.path)?;
            File::open(self.path.parent().unwrap_or(Path::new("/")))?.sync_all()
        };
        put().with_context(|| format!("cannot write {}", self.path.display()))
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.temporary);
    }
}

/// Whether something failed because the disk is full.
pub fn is_full(error: &anyhow::Error) -> bool {
    failed_with(error, std::io::ErrorKind::StorageFull)
}

/// The way out where the disk is what failed.
pub fn disk_hint(error: &anyhow::Error) -> Option<&'static str> {
    use std::io::ErrorKind as Kind;
    let hints = [
        (Kind::StorageFull, "make room: `puter df` shows what takes it, `puter delete` gives a VM's share back"),
        (Kind::QuotaExceeded, "your quota on this file system is used up: `puter df` shows what takes it"),
        (Kind::ReadOnlyFilesystem, "make the file system writable again, or set PUTER_HOME to another one"),
        (Kind::PermissionDenied, "look at who owns the file: puter's data directory is to be yours alone"),
    ];
    hints.into_iter().find(|(kind, _)| failed_with(error, *kind)).map(|(_, hint)| hint)
}

fn failed_with(error: &anyhow::Error, kind: std::io::ErrorKind) -> bool {
    error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>()).any(|error| error.kind() == kind)
}

/// Removes what killed writers of `path` left beside it. The caller holds the lock under which it is written.
///
/// # Errors
/// When such a file cannot be removed.
pub fn remove_temporaries(path: &Path) -> Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    let prefix = format!(".{}.", name.to_string_lossy());
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(&prefix) && name.ends_with(".tmp") {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Removes a file or a directory that may be absent.
///
/// # Errors
/// When it is there and cannot be removed.
pub fn remove(path: &Path) -> Result<()> {
    // Asked first, since a read-only file system refuses the removal of what is not there as well.
    let remove = match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Ok(metadata) if metadata.is_dir() => std::fs::remove_dir_all,
        _ => std::fs::remove_file,
    };
    match failpoint::remove().and_then(|()| remove(path)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// The last `lines` lines of a text file, read from its end; empty where there is none.
pub fn tail(path: &Path, lines: usize) -> String {
    const MOST: u64 = 8192;
    let read = || -> std::io::Result<Vec<u8>> {
        use std::io::{Read, Seek, SeekFrom};
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(MOST)))?;
        let mut bytes = Vec::new();
        file.take(MOST).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let text = String::from_utf8_lossy(&read().unwrap_or_default()).into_owned();
    let clean = plain(&text);
    let all: Vec<&str> = clean.lines().filter(|line| !line.trim().is_empty()).collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// The text without colours and without anything else that could steer a terminal: it may come from a guest.
pub fn plain(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            // A control sequence (ECMA-48, section 5.4) ends with a character from '@' to '~'.
            '\x1b' if chars.next_if_eq(&'[').is_some() => {
                while chars.next_if(|c| matches!(c, ' '..='?')).is_some() {}
                chars.next_if(|c| matches!(c, '@'..='~'));
            }
            '\n' | '\t' => clean.push(c),
            c if !c.is_control() => clean.push(c),
            _ => {}
        }
    }
    clean
}

/// A held lock; it ends with the value or the process.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// Takes the lock at `path`, waiting up to `limit` for another process to let go.
///
/// # Errors
/// When another process still holds it at the end of the limit, the user cancels, or the file cannot be made.
pub fn lock(path: &Path, limit: Duration, busy: &str) -> Result<Lock> {
    take(path, limit, busy, FlockOperation::NonBlockingLockExclusive)
}

/// As [`lock`], beside others who share it.
///
/// # Errors
/// As for [`lock`].
pub fn lock_shared(path: &Path, limit: Duration, busy: &str) -> Result<Lock> {
    take(path, limit, busy, FlockOperation::NonBlockingLockShared)
}

fn take(path: &Path, limit: Duration, busy: &str, operation: FlockOperation) -> Result<Lock> {
    let end = Instant::now() + limit;
    loop {
        let open = || {
            // To open what is there needs no room.
            let room = if path.exists() { Ok(()) } else { failpoint::write() };
            let made =
                room.and_then(|()| OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path));
            match made {
                // A lock that is there can be taken on a read-only disk too, so that a VM there can be stopped.
                Err(error) if error.kind() == std::io::ErrorKind::ReadOnlyFilesystem => File::open(path).or(Err(error)),
                made => made,
            }
        };
        let file = open().with_context(|| format!("cannot open the lock {}", path.display()))?;
        match flock(&file, operation) {
            // The former holder may have removed the file with its VM: a lock on that excludes nobody.
            Ok(()) if is_at(&file, path)? => return Ok(Lock { _file: file }),
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < end => {
                cancel::check()?;
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(anyhow::anyhow!("{busy}")).hint("wait for it to end, then try again");
            }
            Err(error) => return Err(error).with_context(|| format!("cannot lock {}", path.display())),
        }
    }
}

/// Whether the open file is the one that `path` names now.
fn is_at(file: &File, path: &Path) -> Result<bool> {
    let open = file.metadata()?;
    match std::fs::metadata(path) {
        Ok(named) => Ok((open.dev(), open.ino()) == (named.dev(), named.ino())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("cannot examine {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_no_temporary_one_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        write_atomic(&path, b"one").unwrap();
        write_atomic(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        for left in [".state.json.7.tmp", ".other.json.7.tmp"] {
            std::fs::write(dir.path().join(left), "").unwrap();
        }
        remove_temporaries(&path).unwrap();
        assert!(!dir.path().join(".state.json.7.tmp").exists() && dir.path().join(".other.json.7.tmp").exists());
    }

    #[test]
    fn a_prepared_file_takes_its_place_or_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        let count = || std::fs::read_dir(dir.path()).unwrap().count();
        let prepared = Prepared::new(&path, b"later").unwrap();
        write_atomic(&path, b"now").unwrap();
        assert_eq!((std::fs::read(&path).unwrap(), count()), (b"now".to_vec(), 2));
        prepared.commit().unwrap();
        assert_eq!((std::fs::read(&path).unwrap(), count()), (b"later".to_vec(), 1));
        drop(Prepared::new(&path, b"never").unwrap());
        assert_eq!((std::fs::read(&path).unwrap(), count()), (b"later".to_vec(), 1));
    }

    #[test]
    fn a_lock_excludes_and_ends_with_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = lock(&path, Duration::ZERO, "busy").unwrap();
        assert_eq!(lock(&path, Duration::ZERO, "busy").unwrap_err().to_string(), "busy");
        drop(held);
        drop(lock(&path, Duration::ZERO, "busy").unwrap());
        let shared = || lock_shared(&path, Duration::ZERO, "busy");
        let (_one, _two) = (shared().unwrap(), shared().unwrap());
        assert!(lock(&path, Duration::ZERO, "busy").is_err());
    }

    #[test]
    fn the_tail_of_a_log_holds_no_terminal_controls() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "one\n[\x1b[0;1;31mtwo\x1b[0m]\n\x1b]0;title\x07three\n\n").unwrap();
        assert_eq!(tail(&path, 2), "[two]\n]0;titlethree");
        assert_eq!(tail(&dir.path().join("absent"), 2), "");
    }
}
