//! OpenSSH in the guest: whose key may log in, and the host's own keys.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid, openat};

use super::command::run;
use super::configure::warn;
use super::files::Guest;

const DIRECTORY: &str = "/etc/ssh";
pub const BEGIN: &str = "# puter: begin";
const END: &str = "# puter: end";
/// The largest authorized_keys that is read, in bytes.
const MAX_KEYS: usize = 1 << 20;

/// Lets these keys log in as `user` (root when empty), in place of those that puter let in before; others stay.
///
/// # Errors
/// When there is no such user, a key is no key line, or the file cannot be written.
pub fn authorize(guest: &Guest, user: &str, keys: &[String]) -> Result<()> {
    let user = if user.is_empty() { "root" } else { user };
    for key in keys {
        let clean = key.len() < 16 * 1024 && !key.chars().any(char::is_control) && !key.trim().is_empty();
        ensure!(clean, "an ssh key is not one line of text");
    }
    let passwd = fs::read_to_string(guest.path("/etc/passwd")).context("cannot read /etc/passwd")?;
    let (uid, gid, home) = account(&passwd, user).with_context(|| format!("the guest has no user '{user}'"))?;
    let home_path = guest.path(&home);
    let write = || -> rustix::io::Result<()> {
        // By descriptors and without following links: the directory may be an ordinary user's.
        let home = rustix::fs::open(&home_path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        match rustix::fs::mkdirat(&home, ".ssh", Mode::from_raw_mode(0o700)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = openat(&home, ".ssh", flags, Mode::empty())?;
        rustix::fs::fchmod(&directory, Mode::from_raw_mode(0o700))?;
        own(guest, &directory, uid, gid)?;
        let former = read(&directory, "authorized_keys")?;
        let wanted = marked(&former, keys);
        if wanted == former {
            return Ok(());
        }
        replace(guest, &directory, "authorized_keys", wanted.as_bytes(), (uid, gid))
    };
    write().with_context(|| format!("cannot write {}/.ssh/authorized_keys", home_path.display()))
}

fn read(directory: &OwnedFd, name: &str) -> rustix::io::Result<String> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = match openat(directory, name, flags, Mode::empty()) {
        Err(rustix::io::Errno::NOENT) => return Ok(String::new()),
        other => other?,
    };
    let mut bytes = Vec::new();
    let mut buffer = [0; 8192];
    loop {
        match rustix::io::read(&file, &mut buffer)? {
            0 => return Ok(String::from_utf8_lossy(&bytes).into_owned()),
            count => bytes.extend(buffer.iter().take(count)),
        }
        if bytes.len() > MAX_KEYS {
            return Err(rustix::io::Errno::FBIG);
        }
    }
}

fn replace(guest: &Guest, directory: &OwnedFd, name: &str, bytes: &[u8], owner: (u32, u32)) -> rustix::io::Result<()> {
    let temporary = format!(".{name}.puter");
    let _ = rustix::fs::unlinkat(directory, &temporary, AtFlags::empty());
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(directory, &temporary, flags, Mode::from_raw_mode(0o600))?;
    own(guest, &file, owner.0, owner.1)?;
    let mut rest = bytes;
    while !rest.is_empty() {
        let written = rustix::io::write(&file, rest)?;
        rest = rest.get(written..).unwrap_or_default();
    }
    rustix::fs::fsync(&file)?;
    rustix::fs::renameat(directory, &temporary, directory, name)?;
    rustix::fs::fsync(directory)
}

/// In a directory that stands for the guest, an ordinary user's test cannot give files away.
fn own(guest: &Guest, file: &OwnedFd, uid: u32, gid: u32) -> rustix::io::Result<()> {
    match guest.is_real() {
        true => rustix::fs::fchown(file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))),
        false => Ok(()),
    }
}

/// The user's numbers and home (passwd(5)).
pub fn account(passwd: &str, user: &str) -> Option<(u32, u32, String)> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == user).then_some(())?;
        let (uid, gid) = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
        let home = fields.nth(1)?;
        home.starts_with('/').then(|| (uid, gid, home.to_string()))
    })
}

/// A text whose part between puter's marks holds these lines, in place of those of before; nobody else's line is touched.
pub fn marked(former: &str, ours: &[String]) -> String {
    let mut lines = Vec::new();
    let mut inside = false;
    for (index, line) in former.lines().enumerate() {
        match line {
            // A part without its end is somebody's edit: nothing after it is ours to remove.
            BEGIN => inside = former.lines().skip(index).any(|line| line == END),
            END => inside = false,
            line if !inside => lines.push(line),
            _ => {}
        }
    }
    lines.push(BEGIN);
    lines.extend(ours.iter().map(|line| line.trim()));
    lines.push(END);
    lines.join("\n") + "\n"
}

/// Removes the host keys, so that new ones are made.
///
/// # Errors
/// When one cannot be removed.
pub fn forget_host_keys(guest: &Guest) -> Result<()> {
    for path in host_key_files(guest, "") {
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}

/// The public host keys; makes them where there are none, and lets the server know of new ones.
///
/// # Errors
/// When ssh-keygen fails.
pub fn host_keys(guest: &Guest, mut new: bool, warnings: &mut Vec<String>) -> Result<Vec<String>> {
    let server = ["/usr/sbin/sshd", "/usr/bin/sshd"].into_iter().any(|path| guest.path(path).exists());
    if guest.is_real() && server {
        if host_key_files(guest, ".pub").is_empty() {
            new = true;
            // No RSA key: it takes long to make, and no client of the last decade needs it.
            for kind in ["ed25519", "ecdsa"] {
                let file = format!("{DIRECTORY}/ssh_host_{kind}_key");
                run("ssh-keygen", &["-q", "-t", kind, "-N", "", "-C", "", "-f", &file])?;
            }
        }
        if new {
            let debian = ["/lib/systemd/system/ssh.service", "/usr/lib/systemd/system/ssh.service"];
            let unit = if debian.iter().any(|path| Path::new(path).exists()) { "ssh.service" } else { "sshd.service" };
            warn(warnings, run("systemctl", &["restart", unit]));
        }
    }
    let mut keys = Vec::new();
    for path in host_key_files(guest, ".pub") {
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        keys.push(text.trim().to_string());
    }
    keys.sort();
    Ok(keys)
}

/// The files `ssh_host_*_key`, public ones included, that end in `suffix`.
fn host_key_files(guest: &Guest, suffix: &str) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(guest.path(DIRECTORY)).into_iter().flatten().flatten();
    let of_host = |name: &str| name.starts_with("ssh_host_") && name.contains("_key") && name.ends_with(suffix);
    entries
        .map(|entry| entry.path())
        .filter(|path| path.file_name().and_then(|n| n.to_str()).is_some_and(of_host))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn puters_keys_are_replaced_and_others_stay() {
        let first = marked("ssh-rsa AAA me\n", &["ssh-ed25519 ONE puter".into()]);
        assert_eq!(first, "ssh-rsa AAA me\n# puter: begin\nssh-ed25519 ONE puter\n# puter: end\n");
        let second = marked(&first, &["ssh-ed25519 TWO puter".into()]);
        assert_eq!(second, first.replace("ONE", "TWO"));
        assert_eq!(marked(&second, &["ssh-ed25519 TWO puter".into()]), second);
        assert!(marked("# puter: begin\nssh-rsa BBB you\n", &[]).contains("ssh-rsa BBB you\n"));
    }

    #[test]
    fn accounts_are_found_whatever_surrounds_them() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbad\nx:y:z\nann:x:1000:1001:,,,:/home/ann:/bin/bash\n";
        assert_eq!(account(passwd, "root"), Some((0, 0, "/root".into())));
        assert_eq!(account(passwd, "ann"), Some((1000, 1001, "/home/ann".into())));
        assert_eq!(account(passwd, "bad"), None);
        assert_eq!(account(passwd, "bob"), None);
    }

    #[test]
    fn a_link_in_place_of_the_directory_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let guest = Guest::at(dir.path());
        guest.write("/etc/passwd", b"root:x:0:0::/root:/bin/sh\n", 0o644).unwrap();
        fs::create_dir_all(guest.path("/root")).unwrap();
        fs::create_dir_all(guest.path("/elsewhere")).unwrap();
        std::os::unix::fs::symlink(guest.path("/elsewhere"), guest.path("/root/.ssh")).unwrap();
        let key = ["ssh-ed25519 AAAA puter".to_string()];
        assert!(authorize(&guest, "", &key).is_err());
        assert_eq!(fs::read_dir(guest.path("/elsewhere")).unwrap().count(), 0);
        assert!(authorize(&guest, "", &["two\nlines".to_string()]).is_err());
        assert!(authorize(&guest, "nobody", &key).unwrap_err().to_string().contains("no user 'nobody'"));
    }
}
