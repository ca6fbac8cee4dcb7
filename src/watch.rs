//! Waiting for what happens in a directory or on descriptors, without looking again and again (inotify(7), poll(2)).

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;

/// Tells of files that come, change, move or go in one directory.
#[derive(Debug)]
pub struct Watch(OwnedFd);

impl Watch {
    /// Begins to watch.
    ///
    /// # Errors
    /// When the directory cannot be watched, or the user's inotify instances are used up.
    pub fn directory(path: &Path) -> Result<Watch> {
        use inotify::WatchFlags as Flags;
        let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
            .context("cannot watch files (inotify)")?;
        let what = Flags::CREATE | Flags::MODIFY | Flags::MOVED_TO | Flags::DELETE | Flags::ONLYDIR;
        inotify::add_watch(&fd, path, what).with_context(|| format!("cannot watch {}", path.display()))?;
        Ok(Watch(fd))
    }

    /// Takes what has been told so far, so that the next wait is for something new.
    pub fn drain(&self) {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(self.0.as_fd(), &mut buffer);
        while reader.next().is_ok() {}
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until one of the descriptors can be read or `limit` has passed; for each, whether it can be.
///
/// # Errors
/// When the kernel refuses.
pub fn wait(descriptors: &[BorrowedFd<'_>], limit: Duration) -> Result<Vec<bool>> {
    let mut polled: Vec<PollFd> = descriptors.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    let limit = Timespec::try_from(limit).context("too long a wait")?;
    match poll(&mut polled, Some(&limit)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error).context("cannot wait for events"),
    }
    Ok(polled.iter().map(|fd| !fd.revents().is_empty()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_file_wakes_and_what_was_taken_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let watch = Watch::directory(dir.path()).unwrap();
        assert_eq!(wait(&[watch.as_fd()], Duration::ZERO).unwrap(), [false]);
        std::fs::write(dir.path().join("new"), "x").unwrap();
        assert_eq!(wait(&[watch.as_fd()], Duration::from_secs(10)).unwrap(), [true]);
        watch.drain();
        assert_eq!(wait(&[watch.as_fd()], Duration::ZERO).unwrap(), [false]);
        let error = Watch::directory(Path::new("/no/such")).unwrap_err().to_string();
        assert!(error.contains("/no/such"), "{error}");
    }
}
