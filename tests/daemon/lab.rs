//! A network of its own for each test: one namespace is the host, one is the internet, and a test may add guests.
//! Nothing outside them is touched, and they end with the processes that hold them.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, Uid};
use serde::de::DeserializeOwned;
use tempfile::TempDir;

/// The user as whom puterd runs: one that exists nowhere.
pub const UID: u32 = 64_123;
/// Another user.
pub const OTHER: u32 = 64_124;
/// The uplink's far end, where the internet's server listens.
pub const SERVER: &str = "203.0.113.1";
/// The three capabilities of puterd, as setpriv(1) writes them.
pub const CAPABILITIES: [&str; 3] = ["net_admin", "net_raw", "net_bind_service"];
/// How long anything here may take: a bound, far beyond what is needed.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A process that is killed at the end.
pub struct Process(pub Child);

impl Process {
    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until the condition holds.
pub fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < end, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Starts a process that holds new namespaces and first runs this script in them.
fn hold(flags: &[&str], script: &str) -> Process {
    let script = format!("set -e; {script}; echo held; exec sleep 900");
    let mut child = Command::new("unshare")
        .args(flags)
        .args(["--", "setpriv", "--pdeathsig", "KILL", "sh", "-c", &script])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let process = Process(child);
    assert_eq!(line, "held\n", "cannot make namespaces");
    process
}

pub struct Lab {
    pub dir: TempDir,
    host: Process,
    internet: Process,
}

impl Lab {
    pub fn new() -> Lab {
        let dir = tempfile::Builder::new().prefix("puter-net-").tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let home = dir.path().join("home");
        fs::create_dir(&home).unwrap();
        fs::set_permissions(&home, fs::Permissions::from_mode(0o700)).unwrap();
        chown(&home, Some(UID), Some(UID)).unwrap();
        // The executable's own path may be closed to the user.
        let program = dir.path().join("puter-multi");
        fs::write(&program, "").unwrap();
        let script = format!(
            "mount --bind {} {}; mount -t tmpfs none /dev/net; mknod /dev/net/tun c 10 200; chmod 666 /dev/net/tun; \
             mount -t sysfs none /sys; ip link set lo up",
            env!("CARGO_BIN_EXE_puter-multi"),
            program.display()
        );
        let host = hold(&["--net", "--mount"], &script);
        let internet = hold(&["--net"], "ip link set lo up");
        let lab = Lab { dir, host, internet };
        let far = lab.internet.pid();
        lab.host(&format!("ip link add up0 type veth peer name inet0 netns {far}"));
        lab.host("ip addr add 203.0.113.2/24 dev up0; ip link set up0 up; ip route add default via 203.0.113.1");
        lab.internet("ip addr add 203.0.113.1/24 dev inet0; ip link set inet0 up");
        lab
    }

    pub fn home(&self) -> PathBuf {
        self.dir.path().join("home")
    }

    pub fn socket(&self) -> PathBuf {
        self.home().join("run/daemon.sock")
    }

    /// A command line in a namespace of this lab.
    pub fn enter(&self, holder: &Process) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &holder.pid().to_string(), "--net"]);
        if holder.pid() == self.host.pid() {
            command.arg("--mount");
        }
        command.arg("--").stdin(Stdio::null());
        command
    }

    /// Runs a script in a namespace and returns its output and whether it succeeded.
    pub fn attempt(&self, holder: &Process, script: &str) -> (String, bool) {
        let output = self.enter(holder).args(["timeout", "60", "sh", "-c", script]).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (String::from_utf8_lossy(&text).into_owned(), output.status.success())
    }

    pub fn run(&self, holder: &Process, script: &str) -> String {
        let (text, well) = self.attempt(holder, &format!("set -e; {script}"));
        assert!(well, "{script}: {text}");
        text
    }

    /// Runs a script on the host.
    pub fn host(&self, script: &str) -> String {
        self.run(&self.host, script)
    }

    /// Runs a script in the internet.
    pub fn internet(&self, script: &str) -> String {
        self.run(&self.internet, script)
    }

    pub fn host_holder(&self) -> &Process {
        &self.host
    }

    pub fn internet_holder(&self) -> &Process {
        &self.internet
    }

    /// A machine on the bridge, with this address and the bridge as its gateway.
    pub fn guest(&self, name: &str, address: &str) -> Process {
        let guest = hold(&["--net"], "ip link set lo up");
        self.host(&format!("ip link add {name} type veth peer name eth0 netns {}", guest.pid()));
        self.host(&format!("ip link set {name} master puter0; ip link set {name} up"));
        let gateway = "ip route add default via 10.0.0.1";
        self.run(&guest, &format!("ip addr add {address}/24 dev eth0; ip link set eth0 up; {gateway}"));
        self.passes(name);
        guest
    }

    /// Waits until bridges pass the frames of this port: they do once the kernel's watch of links has seen its carrier, which
    /// takes its time on a busy host.
    pub fn passes(&self, name: &str) {
        let of_guest = format!(" {name}@");
        wait("the bridge passes a guest's frames", || {
            let links = self.host("bridge link");
            let mut ports = links.lines().filter(|line| line.contains(&of_guest) || line.contains(": puter0-"));
            links.contains(&of_guest) && ports.all(|line| line.contains("state forwarding"))
        });
    }

    /// Serves a page which says `what` on a port of a namespace.
    pub fn web_server(&self, holder: &Process, listen: &str, what: &str) -> Process {
        let root = self.dir.path().join(what);
        fs::create_dir(&root).unwrap();
        fs::write(root.join("index.html"), what).unwrap();
        let mut command = self.enter(holder);
        command.args(["busybox", "httpd", "-f", "-p", listen, "-h"]).arg(&root);
        let process = Process(command.spawn().unwrap());
        let port = listen.rsplit(':').next().unwrap();
        wait("the web server listens", || self.run(holder, "ss -Hltn").contains(&format!(":{port} ")));
        process
    }

    /// A command that runs as this user with these capabilities, on the host.
    pub fn as_user(&self, uid: u32, capabilities: &[&str]) -> Command {
        let set: String = capabilities.iter().map(|c| format!(",+{c}")).collect();
        let set = format!("-all{set}");
        let mut command = self.enter(&self.host);
        command.args(["setpriv", "--reuid", &uid.to_string(), "--regid", &uid.to_string(), "--clear-groups"]);
        command.args(["--inh-caps", &set, "--ambient-caps", &set, "--bounding-set", &set]);
        command.args(["env", "-u", "XDG_DATA_HOME"]).env("PUTER_HOME", self.home());
        command
    }

    /// puterd's command line.
    pub fn puterd(&self) -> Command {
        let mut command = self.as_user(UID, &CAPABILITIES);
        command.arg(self.dir.path().join("puter-multi")).arg("puterd");
        command
    }

    /// Starts puterd and waits until it is ready.
    pub fn start(&self, args: &[&str]) -> Daemon {
        Daemon::start(self.puterd().args(args))
    }

    /// Runs a puterd that must fail and returns its errors.
    pub fn refused(&self, command: &mut Command) -> String {
        let mut child = Process(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap());
        let mut text = String::new();
        let mut stderr = child.0.stderr.take().unwrap();
        wait("puterd ends", || child.0.try_wait().unwrap().is_some());
        stderr.read_to_string(&mut text).unwrap();
        assert_eq!(child.0.wait().unwrap().code(), Some(1), "{text}");
        text
    }

    /// Connects to puterd as this user: the credentials of a connection are those of the thread that makes it.
    pub fn connect(&self, uid: u32) -> UnixStream {
        let path = self.socket();
        let connected = thread::spawn(move || {
            let uid = Uid::from_raw(uid);
            rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
            UnixStream::connect(path)
        });
        let stream = connected.join().unwrap().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }

    /// Sends bytes and returns all that comes back.
    pub fn exchange(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect(UID);
        let _ = stream.write_all(bytes); // puterd may refuse before it has read all.
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// Sends a request and returns the status and the body.
    pub fn request(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let length = body.len();
        let request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}");
        split(&self.exchange(request.as_bytes()))
    }

    /// Sends a request that succeeds and reads its answer.
    pub fn json<T: DeserializeOwned>(&self, method: &str, path: &str, body: &str) -> T {
        let (status, text) = self.request(method, path, body);
        assert_eq!(status, 200, "{method} {path}: {text}");
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    }

    /// The number of an interface of the host.
    pub fn index(&self, name: &str) -> String {
        self.host(&format!("ip -o link show {name} | cut -d: -f1"))
    }
}

/// The status and body of an HTTP answer.
pub fn split(answer: &str) -> (u16, String) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP answer: {answer:?}"));
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or_else(|| panic!("no status: {head}"));
    (status, body.to_owned())
}

/// A puterd that runs.
pub struct Daemon {
    process: Process,
    lines: Receiver<String>,
    /// What it wrote up to its ready line.
    pub log: String,
}

impl Drop for Daemon {
    /// A test that fails shows what puterd said.
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("puterd: {}{}", self.log, self.said().join("\n"));
        }
    }
}

impl Daemon {
    pub fn start(command: &mut Command) -> Daemon {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || stderr.lines().map_while(Result::ok).for_each(|line| drop(sender.send(line))));
        let mut daemon = Daemon { process: Process(child), lines, log: String::new() };
        let log = daemon.log_until("puterd: ready on ");
        daemon.log = log;
        daemon
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Reads the log up to a line that holds this text.
    pub fn log_until(&self, text: &str) -> String {
        let mut log = String::new();
        loop {
            match self.lines.recv_timeout(LIMIT) {
                Ok(line) => {
                    log.extend([line.as_str(), "\n"]);
                    if line.contains(text) {
                        return log;
                    }
                }
                Err(error) => panic!("puterd did not say '{text}' ({error}) but: {log}"),
            }
        }
    }

    /// What it has said since it was last asked.
    pub fn said(&self) -> Vec<String> {
        self.lines.try_iter().collect()
    }

    /// Lets it do nothing, or go on.
    pub fn freeze(&self, frozen: bool) {
        let signal = if frozen { Signal::STOP } else { Signal::CONT };
        rustix::process::kill_process(Pid::from_child(&self.process.0), signal).unwrap();
    }

    /// Shoots it and waits for nothing: it may still be within a call to the kernel.
    pub fn shoot(&self) {
        rustix::process::kill_process(Pid::from_child(&self.process.0), Signal::KILL).unwrap();
    }

    /// Waits for an end that comes by itself.
    pub fn ended(&mut self) {
        wait("puterd ends", || self.process.0.try_wait().unwrap().is_some());
    }

    /// Sends a signal and waits for the end.
    pub fn stop(mut self, signal: Signal) -> ExitStatus {
        rustix::process::kill_process(Pid::from_child(&self.process.0), signal).unwrap();
        wait("puterd stops", || self.process.0.try_wait().unwrap().is_some());
        self.process.0.wait().unwrap()
    }
}

/// The file's permission bits.
pub fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777
}
