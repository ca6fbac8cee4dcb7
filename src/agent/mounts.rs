//! The host's directories that the guest is to see, by virtiofs.

use std::fs;

use anyhow::{Context, Result, bail, ensure};
use rustix::mount::{MountFlags, mount};

use super::command::run;
use super::files::Guest;
use super::ssh::marked;
use crate::protocol::agent::Mount;

const FSTAB: &str = "/etc/fstab";

/// Mounts them now, and by fstab(5) after a reboot of the guest's own; those of before that are not wanted any more
/// leave fstab.
///
/// # Errors
/// When a path cannot be used, or the kernel has no virtiofs or no such device.
pub fn apply(guest: &Guest, mounts: &[Mount]) -> Result<()> {
    for mount in mounts {
        check(mount)?;
    }
    let former = fs::read_to_string(guest.path(FSTAB)).unwrap_or_default();
    let lines: Vec<String> = mounts.iter().map(line).collect();
    let ours = !lines.is_empty() || former.contains(super::ssh::BEGIN);
    if ours {
        guest.write(FSTAB, marked(&former, &lines).as_bytes(), 0o644)?;
    }
    for mount in mounts {
        let at = guest.path(&mount.path);
        fs::create_dir_all(&at).with_context(|| format!("cannot make the directory {}", mount.path))?;
        if guest.is_real() && !is_mounted(&fs::read_to_string("/proc/mounts").unwrap_or_default(), mount) {
            attach(mount)?;
        }
    }
    Ok(())
}

fn check(mount: &Mount) -> Result<()> {
    let path = &mount.path;
    let plain = path.starts_with('/') && !path.split('/').any(|part| part == "..") && path != "/";
    ensure!(plain && !path.chars().any(char::is_control), "'{path}' is no place to mount at");
    let tag = &mount.tag;
    ensure!(!tag.is_empty() && tag.bytes().all(|b| b.is_ascii_alphanumeric()), "'{tag}' is no name of a device");
    Ok(())
}

/// In fstab a space, a tab or a backslash is written in octal.
fn escape(path: &str) -> String {
    path.replace('\\', "\\134").replace(' ', "\\040").replace('\t', "\\011")
}

fn line(mount: &Mount) -> String {
    let access = if mount.read_only { "ro" } else { "rw" };
    format!("{} {} virtiofs {access},nofail 0 0", mount.tag, escape(&mount.path))
}

fn is_mounted(table: &str, mount: &Mount) -> bool {
    let path = escape(mount.path.trim_end_matches('/'));
    table.lines().any(|line| {
        let mut words = line.split(' ');
        words.next() == Some(&mount.tag) && words.next() == Some(&path) && words.next() == Some("virtiofs")
    })
}

fn attach(wanted: &Mount) -> Result<()> {
    let flags = if wanted.read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    let try_once = || mount(wanted.tag.as_str(), wanted.path.as_str(), "virtiofs", flags, None::<&std::ffi::CStr>);
    match try_once() {
        Ok(()) => Ok(()),
        // The file system may be a module that nothing has asked for yet.
        Err(rustix::io::Errno::NODEV) => {
            let loaded = run("modprobe", &["virtiofs"]);
            match (try_once(), loaded) {
                (Ok(()), _) => Ok(()),
                (Err(_), Err(error)) => Err(error).context("the guest's kernel has no virtiofs"),
                (Err(error), Ok(())) => bail!("cannot mount at {}: {error}", wanted.path),
            }
        }
        Err(error) => bail!("cannot mount at {}: {error}", wanted.path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount_at(path: &str) -> Mount {
        Mount { tag: "share0".into(), path: path.into(), read_only: true }
    }

    #[test]
    fn fstab_names_what_is_wanted_and_keeps_the_guests_own_lines() {
        let dir = tempfile::tempdir().unwrap();
        let guest = Guest::at(dir.path());
        apply(&guest, &[]).unwrap();
        assert!(!guest.path(FSTAB).exists());
        guest.write(FSTAB, b"/dev/vda / ext4 defaults 0 1\n", 0o644).unwrap();
        apply(&guest, &[mount_at("/srv/my data")]).unwrap();
        let text = fs::read_to_string(guest.path(FSTAB)).unwrap();
        assert!(
            text.starts_with("/dev/vda / ext4") && text.contains("share0 /srv/my\\040data virtiofs ro,nofail 0 0\n")
        );
        assert!(guest.path("/srv/my data").is_dir());
        apply(&guest, &[]).unwrap();
        assert!(!fs::read_to_string(guest.path(FSTAB)).unwrap().contains("virtiofs"));
    }

    #[test]
    fn bad_places_are_refused() {
        for path in ["", "srv", "/", "/a/../b", "/a\nb"] {
            assert!(apply(&Guest::at(std::path::Path::new("/nowhere")), &[mount_at(path)]).is_err(), "{path:?}");
        }
    }

    #[test]
    fn what_is_mounted_is_seen() {
        let table = "share0 /srv/my\\040data virtiofs rw,relatime 0 0\n";
        assert!(is_mounted(table, &mount_at("/srv/my data/")));
        assert!(!is_mounted(table, &mount_at("/srv")));
        assert!(!is_mounted(&table.replace("share0", "share1"), &mount_at("/srv/my data")));
    }
}
