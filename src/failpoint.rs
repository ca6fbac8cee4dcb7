//! Points at which a test can end the process as SIGKILL does. They exist only in a build with the feature
//! `fail-points`, which the crash tests make for themselves; elsewhere nothing is compiled.
//!
//! `PUTER_FAIL_POINT=NAME` ends the process when it comes there, `PUTER_PAUSE_POINT=NAME` stops it until SIGCONT, so that
//! a test can end another process at this moment; `PUTER_FAIL_POINTS_LOG=FILE` writes down each point that is passed, so
//! that a test learns of all of them.

/// A step of something that must survive being cut off here.
#[cfg(not(feature = "fail-points"))]
#[inline(always)]
pub fn reach(_name: &str) {}

/// A step of something that must survive being cut off here.
#[cfg(feature = "fail-points")]
pub fn reach(name: &str) {
    use std::io::Write;
    if let Some(path) = std::env::var_os("PUTER_FAIL_POINTS_LOG") {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
        let _ = file.and_then(|mut file| file.write_all(format!("{name}\n").as_bytes()));
    }
    use rustix::process::{Signal, getpid, kill_process};
    let wanted = |variable: &str| std::env::var(variable).is_ok_and(|wanted| wanted == name);
    for (variable, signal) in [("PUTER_FAIL_POINT", Signal::KILL), ("PUTER_PAUSE_POINT", Signal::STOP)] {
        if wanted(variable) {
            let _ = kill_process(getpid(), signal);
        }
    }
}

/// A write that the disk may refuse: `PUTER_FAIL_WRITES=N:ERRNO` refuses the Nth of this process and all that follow, as
/// a full or read-only disk does.
///
/// # Errors
/// When a test wants it to fail.
#[cfg(not(feature = "fail-points"))]
#[inline(always)]
pub fn write() -> std::io::Result<()> {
    Ok(())
}

/// A removal, which only a read-only disk refuses; otherwise as [`write`].
///
/// # Errors
/// When a test wants it to fail.
#[cfg(not(feature = "fail-points"))]
#[inline(always)]
pub fn remove() -> std::io::Result<()> {
    Ok(())
}

#[cfg(feature = "fail-points")]
mod disk {
    use std::sync::atomic::{AtomicU32, Ordering};

    static COUNT: AtomicU32 = AtomicU32::new(0);

    /// The errno with which this write fails.
    pub fn refusal() -> Option<i32> {
        let wanted = std::env::var("PUTER_FAIL_WRITES").ok()?;
        let (first, errno) = wanted.split_once(':')?;
        let count = COUNT.fetch_add(1, Ordering::SeqCst) + 1;
        (count >= first.parse::<u32>().ok()?).then(|| errno.parse().ok()).flatten()
    }
}

/// A write that a test may refuse.
///
/// # Errors
/// When it does.
#[cfg(feature = "fail-points")]
pub fn write() -> std::io::Result<()> {
    disk::refusal().map_or(Ok(()), |errno| Err(std::io::Error::from_raw_os_error(errno)))
}

/// A removal that a test may refuse.
///
/// # Errors
/// When it does.
#[cfg(feature = "fail-points")]
pub fn remove() -> std::io::Result<()> {
    let full = rustix::io::Errno::NOSPC.raw_os_error();
    disk::refusal().filter(|&errno| errno != full).map_or(Ok(()), |errno| Err(std::io::Error::from_raw_os_error(errno)))
}
