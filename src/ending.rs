//! Processes that were shot and have not let go of their files yet.
//!
//! A thread that is within a call to the kernel, a change of nf_tables say, ends only after that; until then what the
//! process listened on still takes connections, and what it had locked is locked.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::sockopt::socket_peercred;

/// How long one may take to end.
pub const LIMIT: Duration = Duration::from_secs(10);

/// Whether a process has been shot and is still there (proc(5): no command line is left, and there is more than a zombie).
pub fn is_ending(pid: u32) -> bool {
    let proc = Path::new("/proc").join(pid.to_string());
    let without_memory = fs::read(proc.join("cmdline")).is_ok_and(|line| line.is_empty());
    let threads = fs::read_dir(proc.join("task")).map_or(0, Iterator::count);
    let stat = fs::read_to_string(proc.join("stat")).unwrap_or_default();
    let zombie = stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['Z', 'X']));
    without_memory && (threads > 1 || threads == 1 && !zombie)
}

/// Connects to whoever listens on `path`; one who is ending is waited for, and whoever listens then is asked.
///
/// # Errors
/// The kernel's: nobody listens.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let end = Instant::now() + LIMIT;
    loop {
        let stream = UnixStream::connect(path)?;
        let listener = socket_peercred(&stream)?.pid.as_raw_nonzero().get().unsigned_abs();
        if !is_ending(listener) || Instant::now() >= end {
            return Ok(stream);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn who_lives_and_who_has_ended_is_not_ending() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = child.id();
        let line = || fs::read(format!("/proc/{pid}/cmdline")).unwrap();
        while !line().starts_with(b"cat") {
            std::thread::yield_now();
        }
        assert!(!is_ending(pid));
        drop(child.stdin.take());
        while fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().split(' ').nth(2) != Some("Z") {
            std::thread::yield_now();
        }
        assert!(line().is_empty() && !is_ending(pid));
        child.wait().unwrap();
        assert!(!is_ending(pid));
    }

    #[test]
    fn who_listens_and_lives_is_reached() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        assert!(connect(&path).is_err());
        let _listener = UnixListener::bind(&path).unwrap();
        connect(&path).unwrap();
    }
}
