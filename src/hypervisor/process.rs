//! Processes that cannot be mistaken for others with a recycled number: a PID and its start time, held by a pidfd.

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

pub use crate::ending::start_time;

/// How much of the time for ending a process it has to end by itself, at most.
const GRACE: Duration = Duration::from_secs(3);

/// Whether the process lives.
pub fn is_alive(pid: u32, start: u64) -> bool {
    start_time(pid) == Some(start)
}

/// Holds the process by a pidfd, which can be read once it has ended; `None` where it has.
pub fn hold(pid: u32, start: u64) -> Option<OwnedFd> {
    let raw = Pid::from_raw(i32::try_from(pid).ok()?)?;
    let fd = pidfd_open(raw, PidfdFlags::empty()).ok()?;
    // Looked at after the number is held: now both speak of the same process.
    is_alive(pid, start).then_some(fd)
}

/// Waits for the end; false when the time ran out.
pub fn wait_exit(pid: u32, start: u64, timeout: Duration) -> bool {
    match hold(pid, start) {
        Some(fd) => wait_held(&fd, timeout),
        None => !is_alive(pid, start),
    }
}

fn wait_held(fd: &OwnedFd, timeout: Duration) -> bool {
    let end = Instant::now() + timeout;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let Ok(left) = Timespec::try_from(left) else { return false };
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&left)) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// Ends the process: SIGTERM first, so that a hypervisor closes its disks, then SIGKILL. False when it still lives
/// after `limit`.
pub fn kill(pid: u32, start: u64, limit: Duration) -> bool {
    let Some(fd) = hold(pid, start) else { return !is_alive(pid, start) };
    let grace = GRACE.min(limit / 2);
    let _ = pidfd_send_signal(&fd, Signal::TERM);
    if wait_held(&fd, grace) {
        return true;
    }
    let _ = pidfd_send_signal(&fd, Signal::KILL);
    wait_held(&fd, limit - grace)
}

/// The processes of this user that have this very argument, each with its start time.
pub fn with_argument(argument: &str) -> Vec<(u32, u64)> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let me = rustix::process::geteuid().as_raw();
    let matches = |pid: &u32| {
        let path = format!("/proc/{pid}");
        let mine = std::fs::metadata(&path).is_ok_and(|metadata| metadata.uid() == me);
        let line = std::fs::read(format!("{path}/cmdline")).unwrap_or_default();
        mine && line.split(|byte| *byte == 0).any(|word| word == argument.as_bytes())
    };
    pids.filter(matches).filter_map(|pid| Some((pid, start_time(pid)?))).collect()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_waited_for_and_ended_and_another_with_its_number_is_not() {
        let mut child = Command::new("sleep").arg("60.25").spawn().unwrap();
        let pid = child.id();
        let start = start_time(pid).unwrap();
        assert!(is_alive(pid, start));
        // Between fork and exec it still has this process's arguments.
        while with_argument("60.25") != [(pid, start)] {
            std::thread::yield_now();
        }
        assert!(!wait_exit(pid, start, Duration::from_millis(20)));
        assert!(kill(pid, start + 1, Duration::from_secs(1)), "that process is not there");
        assert!(is_alive(pid, start), "and this one goes on");
        assert!(kill(pid, start, Duration::from_secs(10)));
        assert_eq!(with_argument("60.25").len(), 0);
        assert!(!is_alive(pid, start), "what waits to be reaped does not live");
        child.wait().unwrap();
        assert!(wait_exit(pid, start, Duration::ZERO));
    }
}
