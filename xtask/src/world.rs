//! A world of its own for puter: a network, mount and PID namespace for the host, and one more network namespace that
//! plays the internet behind an uplink, with a web server in it.
//!
//! Nothing of the machine's own network is touched. Closing the world ends every process in it, whatever happens to
//! the one who made it: the kernel does so when the namespace's first process ends.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context, Result, ensure};

use crate::build;
use crate::shell::{as_root, output, run};

/// Where the web server of the world's internet answers.
pub const INTERNET: &str = "203.0.113.1";
/// What its page says.
pub const PAGE: &str = "Hello from the other side of the uplink.";

/// Runs as the first process of the namespaces, as root; `$1` is the web server's directory. It ends when its input does.
const SETUP: &str = r#"
set -e
[ -d /dev/net ] || mkdir /dev/net
mount -t tmpfs -o mode=0755 none /dev/net
mknod -m 0666 /dev/net/tun c 10 200
mount -t sysfs none /sys
ip link set lo up
ip link add uplink type veth peer name internet
unshare --net sh -c '
    until ip link show internet >/dev/null 2>&1; do sleep 0.05; done
    ip link set lo up
    ip address add 203.0.113.1/24 dev internet
    ip link set internet up
    exec busybox httpd -f -p 203.0.113.1:80 -h "$0"
' "$1" </dev/null >/dev/null 2>&1 &
while [ "$(readlink /proc/$!/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link set internet netns $!
ip address add 203.0.113.2/24 dev uplink
ip link set uplink up
ip route add default via 203.0.113.1
echo ready
exec cat >/dev/null
"#;

/// What runs the world's machines: the emulator, or what PUTER_TEST_HYPERVISOR says (`auto`, or a path) on a host whose
/// /dev/kvm every user may open.
pub fn hypervisor() -> String {
    std::env::var("PUTER_TEST_HYPERVISOR").unwrap_or_else(|_| "emulated".into())
}

/// The namespaces, a directory for puter's files, and the unprivileged user who runs it.
pub struct World {
    dir: PathBuf,
    anchor: Child,
    /// The namespaces' first process, as the machine numbers it.
    pid: u32,
    user: User,
}

#[derive(Clone, Debug)]
struct User {
    name: String,
    uid: u32,
    gid: u32,
}

impl User {
    /// Who called; nobody where that is root.
    fn current() -> Result<User> {
        let name = match rustix::process::getuid().is_root() {
            true => "nobody".to_string(),
            false => output(Command::new("id").arg("-un"))?,
        };
        let number = |option: &str| -> Result<u32> {
            output(Command::new("id").args([option, &name]))?.parse().context("id gives no number")
        };
        Ok(User { uid: number("-u")?, gid: number("-g")?, name })
    }
}

impl World {
    /// Makes the namespaces, and a place with copies of the executable and of the emulator's vsock device.
    ///
    /// # Errors
    /// When the kernel or a tool refuses.
    pub fn new(executable: &Path, vsock: &Path) -> Result<World> {
        let user = User::current()?;
        // Not /tmp: where that is a tmpfs it ignores files' capabilities, and it may be small.
        let dir = tempfile::Builder::new().prefix("puter-").tempdir_in("/var/tmp")?.keep();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
        let (bin, home, www) = (dir.join("bin"), dir.join("home"), dir.join("www"));
        build::place(executable, &bin)?;
        fs::copy(vsock, bin.join("vhost-device-vsock")).with_context(|| format!("cannot copy {}", vsock.display()))?;
        for owned in [&home, &www] {
            fs::create_dir(owned)?;
        }
        if rustix::process::geteuid().is_root() {
            chown(&home, Some(user.uid), Some(user.gid))?;
        }
        fs::write(www.join("index.html"), format!("{PAGE}\n"))?;

        let mut command = as_root("unshare");
        command.args([
            "--net",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child=KILL",
            "--mount-proc",
            "sh",
            "-c",
            SETUP,
            "world",
        ]);
        let mut anchor =
            command.arg(&www).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot run unshare")?;
        let mut line = String::new();
        BufReader::new(anchor.stdout.take().context("no output")?).read_line(&mut line)?;
        ensure!(line == "ready\n", "the world's namespaces could not be set up");
        let pid = first_inside(anchor.id()).context("cannot find the world's first process")?;
        Ok(World { dir, anchor, pid, user })
    }

    /// The world's directory, readable by its user.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The data directory of the user's puter.
    pub fn home(&self) -> PathBuf {
        self.dir.join("home/puter")
    }

    /// The user's name.
    pub fn user(&self) -> &str {
        &self.user.name
    }

    /// The user's number.
    pub fn uid(&self) -> u32 {
        self.user.uid
    }

    /// Gives the executable puterd's capabilities, as an administrator would once.
    ///
    /// # Errors
    /// When setcap fails.
    pub fn grant(&self) -> Result<()> {
        let capabilities = "cap_net_admin,cap_net_raw,cap_net_bind_service=+ep";
        run(as_root("setcap").arg(capabilities).arg(self.dir.join("bin/puter-multi")))
    }

    /// A command inside, as root.
    pub fn root(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = as_root("nsenter");
        command.args(["--target", &self.pid.to_string(), "--net", "--mount", "--pid", "--"]).arg(program);
        command
    }

    /// A command inside, as the user, with an environment of its own.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        self.command_with(&[], program)
    }

    /// As [`World::command`], with more variables.
    pub fn command_with(&self, variables: &[(&str, &str)], program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = self.root("setpriv");
        command.args([&format!("--reuid={}", self.user.uid), &format!("--regid={}", self.user.gid)]);
        command.args(["--clear-groups", "--inh-caps=-all", "env", "-i"]);
        let bin = self.dir.join("bin");
        command.arg(format!("PATH={}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", bin.display()));
        command.arg(format!("HOME={}", self.dir.join("home").display()));
        command.arg(format!("PUTER_HOME={}", self.home().display()));
        // The caller's own systemd is outside of this world.
        command.args(["PUTER_SERVICE=no", "LC_ALL=C.UTF-8"]).arg(format!("PUTER_HYPERVISOR={}", hypervisor()));
        command.args(variables.iter().map(|(name, value)| format!("{name}={value}")));
        command.arg(program);
        command
    }

    /// Runs `puter` with these arguments as the user.
    ///
    /// # Errors
    /// When it cannot be started; its own failure is in the output.
    pub fn puter(&self, args: &[&str]) -> Result<Output> {
        self.command("puter").args(args).stdin(Stdio::null()).output().context("cannot run puter")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        drop(self.anchor.stdin.take());
        let _ = self.anchor.wait();
        if let Err(error) = run(as_root("rm").args(["-rf", "--"]).arg(&self.dir)) {
            let _ = writeln!(std::io::stderr(), "{error:#}");
        }
    }
}

/// The first descendant of `pid` that lives in a PID namespace of its own.
fn first_inside(pid: u32) -> Option<u32> {
    let depth = |pid: u32| -> Option<usize> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        Some(status.lines().find_map(|line| line.strip_prefix("NSpid:"))?.split_whitespace().count())
    };
    let own = depth(pid)?;
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().filter_map(|word| word.parse().ok()).find_map(|child: u32| match depth(child)? {
        deeper if deeper > own => Some(child),
        _ => first_inside(child),
    })
}
