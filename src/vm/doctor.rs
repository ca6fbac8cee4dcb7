//! What puter needs of its host, and the command that mends each lack.

use std::fs::OpenOptions;
use std::path::Path;

use serde::Serialize;

mod network;

use super::daemon::{self, Client};
use super::home::{Home, free_space};
use super::settings::{Settings, show_size};
use crate::hypervisor::{self, Kind};
use crate::protocol::daemon::Status;

/// Less free space than this and new VMs soon stop.
const COMFORTABLE: u64 = 4 << 30;

/// A VM takes about a dozen files.
const FEW_INODES: u64 = 100;

/// What a check found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Ok,
    /// VMs run, but less well than they could.
    Advice,
    /// VMs cannot run.
    Missing,
}

impl State {
    pub fn word(self) -> &'static str {
        match self {
            State::Ok => "ok",
            State::Advice => "advice",
            State::Missing => "missing",
        }
    }
}

/// One need and how it is met.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub state: State,
    pub found: String,
    /// The command or step that mends it.
    pub mend: Option<String>,
    /// Whether that is a command of a shell, which `doctor --fix` can run.
    pub is_command: bool,
}

impl Check {
    /// What mends it is a command.
    fn by_command(self) -> Check {
        Check { is_command: self.mend.is_some(), ..self }
    }
}

fn ok(name: &'static str, found: impl Into<String>) -> Check {
    Check { name, state: State::Ok, found: found.into(), mend: None, is_command: false }
}

fn advice(name: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Check {
    Check { name, state: State::Advice, found: found.into(), mend: Some(mend.into()), is_command: false }
}

fn missing(name: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Check {
    Check { name, state: State::Missing, found: found.into(), mend: Some(mend.into()), is_command: false }
}

/// Looks at everything; changes nothing.
pub fn examine(home: &Home, settings: &Settings) -> Vec<Check> {
    let mut checks = vec![directory(home), space(home), inodes(home), reflinks(home)];
    let kind = hypervisor::detect(&settings.hypervisor);
    if !matches!(settings.hypervisor, hypervisor::Setting::Emulated) {
        checks.push(device("kvm", "/dev/kvm", "sudo usermod -aG kvm \"$USER\", then log in again", State::Advice));
    }
    checks.push(match &kind {
        Ok(kind @ Kind::Emulated { reason }) => advice(
            "hypervisor",
            format!("{kind}, which is slow: {reason}"),
            "give this user access to /dev/kvm and install cloud-hypervisor 51 or newer",
        ),
        Ok(kind) => ok("hypervisor", kind.to_string()),
        Err(error) => missing("hypervisor", format!("{error:#}"), hint(error)),
    });
    checks.push(device("tun", "/dev/net/tun", "sudo modprobe tun && sudo chmod 0666 /dev/net/tun", State::Missing));
    let status = Client::new(home).status().ok();
    checks.push(puterd(status.as_ref()));
    checks.push(forwarding());
    checks.extend(network::checks(status.as_ref(), settings));
    checks.push(tool("ssh", "puter ssh", "openssh-client"));
    checks.push(tool("ssh-keygen", "the key for puter ssh", "openssh-client"));
    checks.push(match home.kernel().is_file() {
        true => ok("image", format!("{} is installed", home.kernel().display())),
        false => missing("image", "no kernel is installed", "puter init --image IMAGE"),
    });
    checks
}

fn hint(error: &anyhow::Error) -> String {
    match error.downcast_ref::<super::Hinted>() {
        Some(hinted) => hinted.hint().to_string(),
        None => "see the message".to_string(),
    }
}

fn directory(home: &Home) -> Check {
    match home.prepare() {
        Ok(()) => ok("home", home.root().display().to_string()),
        Err(error) => missing("home", format!("{error:#}"), hint(&error)),
    }
}

fn space(home: &Home) -> Check {
    match free_space(home.root()) {
        Ok(free) if free < COMFORTABLE => advice(
            "space",
            format!("{} free at {}", show_size(free), home.root().display()),
            "delete VMs that are no longer needed, or set PUTER_HOME to a larger file system",
        ),
        Ok(free) => ok("space", format!("{} free", show_size(free))),
        Err(error) => missing("space", format!("{error:#}"), "set PUTER_HOME to a directory of your own"),
    }
}

fn inodes(home: &Home) -> Check {
    match rustix::fs::statvfs(home.root()) {
        // Some file systems make them as needed and tell of none.
        Ok(stat) if stat.f_files > 0 && stat.f_favail < FEW_INODES => missing(
            "inodes",
            format!("the file system of {} can hold {} more files", home.root().display(), stat.f_favail),
            "delete files there, or set PUTER_HOME to another file system",
        ),
        Ok(_) => ok("inodes", "enough"),
        Err(error) => missing("inodes", format!("{error}"), "set PUTER_HOME to a directory of your own"),
    }
}

fn device(name: &'static str, path: &str, mend: &str, otherwise: State) -> Check {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => ok(name, format!("{path} opens")),
        Err(error) => Check {
            name,
            state: otherwise,
            found: format!("cannot open {path}: {error}"),
            mend: Some(mend.to_string()),
            is_command: true,
        },
    }
}

/// Where files share their blocks, a snapshot and a clone cost nothing at first, however large the disk is.
fn reflinks(home: &Home) -> Check {
    let name = "reflinks";
    match crate::sparse::shares(home.root()) {
        Ok(true) => ok(name, "files share their blocks: snapshots copy nothing"),
        Ok(false) => advice(
            name,
            format!(
                "the file system of {} cannot share blocks: a snapshot copies what it holds",
                home.root().display()
            ),
            "set PUTER_HOME to a directory on btrfs, or on XFS",
        ),
        Err(error) => missing(name, format!("{error}"), "set PUTER_HOME to a directory of your own"),
    }
}

fn puterd(status: Option<&Status>) -> Check {
    let name = "puterd";
    if let Some(status) = status {
        let further = match status.further.len() {
            0 => String::new(),
            more => format!(" and {more} further"),
        };
        return ok(name, format!("runs, bridge {}{further} at {}", status.bridge, status.subnet));
    }
    let program = match daemon::program() {
        Ok(program) => program,
        Err(error) => return missing(name, format!("{error:#}"), hint(&error)),
    };
    let file = program.canonicalize().unwrap_or(program);
    if gains_nothing() && !rustix::process::geteuid().is_root() {
        return missing(
            name,
            "this session may gain no privileges (no_new_privs): puterd cannot have its capabilities here",
            "start puterd from an ordinary login",
        );
    }
    if let Ok(mount) = rustix::fs::statvfs(&file)
        && mount.f_flag.contains(rustix::fs::StatVfsMountFlags::NOSUID)
    {
        return missing(
            name,
            format!("{} is on a file system mounted nosuid, which takes capabilities away", file.display()),
            "install puter on another file system, such as in /usr/local/bin",
        );
    }
    if rustix::process::geteuid().is_root() || has_capabilities(&file) {
        return missing(name, "does not run", "puter daemon start").by_command();
    }
    missing(
        name,
        format!("{} has no network capabilities", file.display()),
        format!(
            "sudo setcap cap_net_admin,cap_net_raw,cap_net_bind_service=+ep {} && puter daemon start",
            quoted(&file.display().to_string())
        ),
    )
    .by_command()
}

/// Whether the file carries puterd's three capabilities, permitted and effective (linux/capability.h, vfs_cap_data).
fn has_capabilities(file: &Path) -> bool {
    const NEEDED: u32 = 1 << 12 | 1 << 13 | 1 << 10;
    let mut value = [0_u8; 64];
    let Ok(length) = rustix::fs::getxattr(file, "security.capability", &mut value) else { return false };
    let word = |at: usize| value.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
    length >= 12 && word(0) & 1 == 1 && word(4) & NEEDED == NEEDED
}

/// A word that a shell takes as it is.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+".contains(c);
    match word.chars().all(plain) {
        true => word.to_string(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

/// Whether the process can never gain what a file's capabilities would give (prctl(2), PR_SET_NO_NEW_PRIVS).
fn gains_nothing() -> bool {
    rustix::thread::no_new_privs().unwrap_or(false)
}

fn forwarding() -> Check {
    let name = "forwarding";
    match std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward") {
        Ok(value) if value.trim() == "1" => ok(name, "on"),
        Ok(_) => advice(name, "off; puterd turns it on when it starts", "puter daemon start").by_command(),
        Err(error) => advice(name, format!("cannot be read: {error}"), "mount /proc"),
    }
}

fn tool(name: &'static str, purpose: &str, package: &str) -> Check {
    let path = std::env::var_os("PATH").unwrap_or_default();
    match std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file()) {
        Some(file) => ok(name, file.display().to_string()),
        None => missing(name, format!("not on the PATH; needed for {purpose}"), format!("sudo apt install {package}"))
            .by_command(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_comes_with_its_remedy() {
        let absent = device("tun", "/dev/none/such", "mend it", State::Missing);
        assert_eq!((absent.state, absent.mend.as_deref()), (State::Missing, Some("mend it")));
        assert!(absent.found.contains("/dev/none/such"));
        assert_eq!(device("null", "/dev/null", "", State::Missing).state, State::Ok);
        let tool = tool("no-such-tool", "a test", "nothing");
        assert_eq!(tool.mend.as_deref(), Some("sudo apt install nothing"));
    }

    #[test]
    fn a_shell_takes_the_path_as_one_word() {
        assert_eq!(quoted("/usr/bin/puter-multi"), "/usr/bin/puter-multi");
        assert_eq!(quoted("/home/me/it's here"), "'/home/me/it'\\''s here'");
    }

    #[test]
    fn a_file_without_capabilities_has_none() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(!has_capabilities(file.path()));
    }

    #[test]
    fn a_fresh_home_lacks_an_image_and_says_how_to_get_one() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        let checks = examine(&home, &Settings::load().unwrap());
        let image = checks.iter().find(|check| check.name == "image").unwrap();
        assert_eq!(image.state, State::Missing);
        assert!(image.mend.as_ref().unwrap().contains("puter init"));
    }
}
