//! What puterd keeps in memory: it runs for months, and mostly waits.

use std::ffi::c_void;
use std::fs;

use rustix::mm::{Advice, madvise};

/// Gives back what is in memory only because it was needed once: free parts of the heap, and the pages of the executable.
/// What is needed again of these comes again from the page cache, in microseconds; what is not, such as relocations and the
/// reading of options, does not.
pub fn give_back() {
    // SAFETY: malloc_trim(3) takes a number, and the locks that it needs.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
    let Ok(maps) = fs::read_to_string("/proc/self/maps") else { return };
    let Ok(own) = std::env::current_exe() else { return };
    let own = own.to_string_lossy();
    for (start, end) in maps.lines().filter_map(|line| unwritten(line, &own)) {
        // SAFETY: the range is the executable's code or constants, mapped privately and never written to: its pages are
        // those of the file, and are read from there when they are next used (MADV_DONTNEED, madvise(2)).
        let _ = unsafe { madvise(start as *mut c_void, end - start, Advice::LinuxDontNeed) };
    }
}

/// The range of a mapping of this file that nobody can have written to (proc_pid_maps(5)): code, and the constants with
/// which the file begins. What else is for reading alone was relocated before it came to be so.
fn unwritten(line: &str, file: &str) -> Option<(usize, usize)> {
    let (range, rest) = line.split_once(' ')?;
    let kind = rest.starts_with("r-xp ") || rest.starts_with("r--p 00000000 ");
    if !kind || !rest.ends_with(&format!(" {file}")) {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let number = |text| usize::from_str_radix(text, 16).ok();
    Some((number(start)?, number(end)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_never_written_is_given_back() {
        let line = |rights: &str, file: &str| format!("7f9d4995d000-7f9d49fd3000 {rights} fe:00 53    {file}");
        let unwritten = |rights| unwritten(&line(rights, "/usr/bin/puter"), "/usr/bin/puter");
        for kind in ["r-xp 0015c000", "r--p 00000000"] {
            assert_eq!(unwritten(kind), Some((0x7f9d4995d000, 0x7f9d49fd3000)), "{kind}");
        }
        // What these hold the file may not.
        for kind in ["r--p 007d1000", "rw-p 007f0000", "rw-p 00000000", "rwxp 0015c000", "r-xs 0015c000"] {
            assert_eq!(unwritten(kind), None, "{kind}");
        }
        assert_eq!(super::unwritten(&line("r-xp 00000000", "[vdso]"), "/usr/bin/puter"), None);
        assert_eq!(super::unwritten("nonsense", "/usr/bin/puter"), None);
    }
}
