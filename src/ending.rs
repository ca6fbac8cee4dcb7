//! Processes that have ended, and those that were shot and have not let go of their files yet.
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

/// When the process started, in clock ticks since boot; `None` where there is no such process or only its remains
/// wait to be reaped (proc_pid_stat(5), fields 3 and 22).
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse_stat(&stat)
}

fn parse_stat(stat: &str) -> Option<u64> {
    // The second field is the program's name, in parentheses, and may itself hold any character.
    let fields: Vec<&str> = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace().collect();
    match *fields.first()? {
        "Z" | "X" => None,
        _ => fields.get(19)?.parse().ok(),
    }
}

/// SIGKILL in a mask of signals (signal(7)).
const KILL: u64 = 1 << 8;
/// The kernel's mark of a thread that ends (PF_EXITING, linux/sched.h).
const EXITING: u64 = 4;

/// Whether these files of a process's main thread tell that it was shot, though on a busy host it may not have run since
/// (proc_pid_status(5), SigPnd; proc_pid_stat(5), field 9).
fn is_shot(status: &str, stat: &str) -> bool {
    let pending = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigPnd:")?.trim(), 16).ok());
    let rest = stat.rfind(')').and_then(|at| stat.get(at + 1..)).unwrap_or_default();
    let marks = rest.split_ascii_whitespace().nth(6).and_then(|marks| marks.parse::<u64>().ok());
    pending.is_some_and(|pending| pending & KILL != 0) || marks.is_some_and(|marks| marks & EXITING != 0)
}

/// Whether a process has been shot and is still there (proc(5): no command line is left, and there is more than a zombie).
pub fn is_ending(pid: u32) -> bool {
    let proc = Path::new("/proc").join(pid.to_string());
    let read = |name: &str| fs::read_to_string(proc.join(name)).unwrap_or_default();
    let stat = read("stat");
    if parse_stat(&stat).is_some() && is_shot(&read("status"), &stat) {
        return true;
    }
    let without_memory = fs::read(proc.join("cmdline")).is_ok_and(|line| line.is_empty());
    let threads = fs::read_dir(proc.join("task")).map_or(0, Iterator::count);
    without_memory && (threads > 1 || threads == 1 && start_time(pid).is_some())
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
    fn a_stat_line_is_read_whatever_the_programs_name() {
        let rest = (5..=21).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        assert_eq!(parse_stat(&format!("7 (a) b) S 1 {rest} 4242 0")), Some(4242));
        assert_eq!(parse_stat(&format!("7 (a) Z 1 {rest} 4242 0")), None);
        for bad in ["", "7 (a", "7 (a) S", ")", "7 (a) S 1 2"] {
            assert_eq!(parse_stat(bad), None, "{bad}");
        }
    }

    #[test]
    fn who_was_shot_is_known_before_it_has_run_again() {
        let stat = |marks: &str| format!("7 (a) b) R 1 2 3 4 5 {marks} 0 0");
        for (pending, marks, shot) in
            [("0", "4194560", false), ("100", "4194560", true), ("0", "4194564", true), ("4000", "64", false)]
        {
            let status = format!("Name:\ta\nSigPnd:\t{pending:0>16}\nShdPnd:\t0000000000000100\n");
            assert_eq!(is_shot(&status, &stat(marks)), shot, "{pending} {marks}");
        }
        assert!(!is_shot("", "") && !is_shot("SigPnd:\tx\n", "7 (a"));
    }

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
