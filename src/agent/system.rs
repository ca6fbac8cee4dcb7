//! The guest as a whole: its name, its clock, its disk, its power.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, bail};
use rustix::ioctl::{Setter, ioctl, opcode};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

use super::command::run;
use super::files::Guest;

/// A clock nearer to the host's than this is left alone, in nanoseconds: what keeps time in the guest does better.
const DRIFT: i128 = 20_000_000;
const NANOSECONDS: u64 = 1_000_000_000;

/// Gives the guest its name, in the kernel and in /etc.
///
/// # Errors
/// When the name cannot be set or written.
pub fn set_hostname(guest: &Guest, name: &str) -> Result<()> {
    guest.write("/etc/hostname", format!("{name}\n").as_bytes(), 0o644)?;
    let former = fs::read_to_string(guest.path("/etc/hosts")).unwrap_or_default();
    guest.write("/etc/hosts", hosts(&former, name).as_bytes(), 0o644)?;
    if guest.is_real() && guest.hostname() != name {
        rustix::system::sethostname(name.as_bytes()).context("cannot set the hostname")?;
    }
    Ok(())
}

/// The file with the machine's own name at 127.0.1.1, where Debian has it.
fn hosts(former: &str, name: &str) -> String {
    const OWN: &str = "127.0.1.1";
    let own = format!("{OWN} {name}");
    let mut lines: Vec<&str> = former.lines().filter(|line| line.split_whitespace().next() != Some(OWN)).collect();
    if former.is_empty() {
        lines.extend(["127.0.0.1 localhost", "::1 localhost"]);
    }
    lines.push(&own);
    lines.join("\n") + "\n"
}

/// Sets the clock to the host's time, in nanoseconds since 1970-01-01 UTC, where it is more than 20 ms away.
///
/// # Errors
/// When the kernel refuses.
pub fn set_clock(guest: &Guest, time: u64) -> Result<()> {
    if !guest.is_real() {
        return Ok(());
    }
    let now = clock_gettime(ClockId::Realtime);
    let now = i128::from(now.tv_sec) * i128::from(NANOSECONDS) + i128::from(now.tv_nsec);
    if (now - i128::from(time)).abs() <= DRIFT {
        return Ok(());
    }
    let wanted = Timespec { tv_sec: (time / NANOSECONDS) as i64, tv_nsec: (time % NANOSECONDS) as i64 };
    clock_settime(ClockId::Realtime, wanted).context("cannot set the clock")
}

/// Grows the root file system to its disk and gives its size in bytes.
///
/// # Errors
/// When the disk cannot be found or the kernel refuses.
pub fn grow_root(guest: &Guest) -> Result<u64> {
    if !guest.is_real() {
        return Ok(0);
    }
    const EXT4: i64 = 0xef53; // linux/magic.h
    let root = File::open("/").context("cannot open /")?;
    let stat = rustix::fs::fstatfs(&root).context("cannot examine /")?;
    if stat.f_type as i64 != EXT4 {
        bail!("it is not ext4");
    }
    let device = fs::metadata("/")?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let path = format!("/sys/dev/block/{major}:{minor}");
    if fs::metadata(format!("{path}/partition")).is_ok() {
        bail!("it is on a partition, which is not grown");
    }
    // In units of 512 bytes, whatever the device's own are.
    let sectors = fs::read_to_string(format!("{path}/size")).with_context(|| format!("cannot read {path}/size"))?;
    let bytes = sectors.trim().parse::<u64>().ok().and_then(|n| n.checked_mul(512)).context("no size")?;
    let blocks = bytes / (stat.f_bsize as u64).max(1024);
    const RESIZE: u32 = opcode::write::<u64>(b'f', 16); // EXT4_IOC_RESIZE_FS, fs/ext4/ext4.h
    // SAFETY: the kernel reads one u64.
    unsafe { ioctl(root.as_fd(), Setter::<RESIZE, u64>::new(blocks)) }.context("the kernel does not resize it")?;
    Ok(bytes)
}

/// Begins an orderly power-off.
pub fn power_off() {
    if let Err(error) = run("systemctl", &["poweroff"]) {
        eprintln!("puter-agent: {error:#}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_in_hosts_once_and_other_lines_stay() {
        let first = hosts("127.0.0.1 localhost\n10.0.0.5 db\n", "web");
        assert_eq!(first, "127.0.0.1 localhost\n10.0.0.5 db\n127.0.1.1 web\n");
        assert_eq!(hosts(&first, "new"), first.replace("web", "new"));
        assert_eq!(hosts("", "web"), "127.0.0.1 localhost\n::1 localhost\n127.0.1.1 web\n");
    }
}
