//! The client's side of puterd: its API, and starting and stopping it.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::home::Home;
use super::service::Service;
use super::{Hint, files};
use crate::protocol::address::Subnet;
use crate::protocol::daemon::{ErrorBody, Lease, Status, Tap, TapRequest};
use crate::protocol::ipv6::Ipv6;
use crate::protocol::ports::HostPort;
use crate::protocol::unix_http;

/// How long one request may take.
const TIMEOUT: Duration = Duration::from_secs(15);
/// The largest answer that is read: thousands of TAPs fit.
const MAX_ANSWER: u64 = 16 << 20;

/// Speaks to puterd on its socket.
pub struct Client {
    agent: ureq::Agent,
    socket: PathBuf,
}

/// puterd refused a request.
#[derive(Debug)]
pub struct Refused {
    pub status: u16,
    pub code: String,
    message: String,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "puterd: {}", self.message)
    }
}

impl std::error::Error for Refused {}

impl Client {
    pub fn new(home: &Home) -> Client {
        let socket = home.daemon_socket();
        Client { agent: unix_http::agent(&socket, TIMEOUT), socket }
    }

    /// `GET /v1/status`.
    ///
    /// # Errors
    /// When puterd does not answer; the hint tells how to start it. The other calls fail alike, or with [`Refused`].
    pub fn status(&self) -> Result<Status> {
        self.call::<(), _>("GET", "/v1/status", None)
    }

    /// Makes the VM's TAP, or finds it made.
    pub fn ensure_tap(&self, request: &TapRequest) -> Result<Tap> {
        self.call("POST", "/v1/taps", Some(request))
    }

    /// All TAPs.
    pub fn taps(&self) -> Result<Vec<Tap>> {
        self.call::<(), _>("GET", "/v1/taps", None)
    }

    /// All leases.
    pub fn leases(&self) -> Result<Vec<Lease>> {
        self.call::<(), _>("GET", "/v1/leases", None)
    }

    /// Removes the VM's TAP; no error where there is none.
    pub fn delete_tap(&self, vm: &str) -> Result<()> {
        match self.send::<()>("DELETE", &format!("/v1/taps/{vm}"), None) {
            Err(error) if error.downcast_ref::<Refused>().is_some_and(|r| r.status == 404) => Ok(()),
            other => other.map(|_| ()),
        }
    }

    fn call<B: Serialize, T: DeserializeOwned>(&self, method: &str, path: &str, body: Option<&B>) -> Result<T> {
        let answer = self.send(method, path, body)?;
        serde_json::from_slice(&answer).with_context(|| format!("puterd's answer to {method} {path} is not understood"))
    }

    fn send<B: Serialize>(&self, method: &str, path: &str, body: Option<&B>) -> Result<Vec<u8>> {
        let uri = format!("http://puterd{path}");
        let request = ureq::http::Request::builder().method(method).uri(uri);
        let sent = match body {
            Some(body) => {
                let request = request.header("content-type", "application/json").body(serde_json::to_vec(body)?)?;
                self.agent.run(request)
            }
            None => self.agent.run(request.body(())?),
        };
        let response = sent.map_err(|error| match error {
            ureq::Error::Io(error) => anyhow::Error::from(error).context("puterd does not run"),
            error => anyhow::Error::from(error).context(format!("puterd does not answer on {}", self.socket.display())),
        });
        let mut response = response.hint("start it with `puter daemon start`")?;
        let status = response.status();
        let bytes = response
            .body_mut()
            .with_config()
            .limit(MAX_ANSWER)
            .read_to_vec()
            .with_context(|| format!("puterd's answer to {method} {path} broke off"))?;
        if status.is_success() {
            return Ok(bytes);
        }
        match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(ErrorBody { error }) => {
                bail!(Refused { status: status.as_u16(), code: error.code, message: error.message })
            }
            Err(_) => bail!("puterd answered {method} {path} with status {status}"),
        }
    }
}

/// How long puterd may take to come up or to end.
const DAEMON_TIMEOUT: Duration = Duration::from_secs(15);

/// What puterd is told of the settings.
#[derive(Clone, Copy, Debug)]
pub struct Network<'a> {
    pub subnet: Subnet,
    pub ipv6: Ipv6,
    pub host_ports: &'a [HostPort],
}

impl Network<'_> {
    /// The settings' part of puterd's command line; plain words, each of them.
    pub fn arguments(&self) -> Vec<String> {
        let mut words = vec!["--subnet".to_string(), self.subnet.to_string()];
        if self.ipv6 != Ipv6::Auto {
            words.extend(["--ipv6".to_string(), self.ipv6.to_string()]);
        }
        words.extend(self.host_ports.iter().flat_map(|port| ["--host-port".to_string(), port.to_string()]));
        words
    }
}

/// Starts puterd: as a service of the user's systemd where there is one and `as_service` wants it, else in the
/// background, its output in `run/puterd.log`. `None` where one answers already.
///
/// # Errors
/// When there is no puterd, or it ends at once: the error holds what it said.
pub fn start(home: &Home, network: &Network<'_>, as_service: bool) -> Result<Option<Status>> {
    let client = Client::new(home);
    if client.status().is_ok() {
        return Ok(None);
    }
    if let Some(service) = Service::of(home).filter(|_| as_service) {
        service.start(home, network, &program()?)?;
        return client.status().map(Some);
    }
    let program = program()?;
    let path = home.daemon_log();
    let log = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let mut command = Command::new(&program);
    command.arg("--home").arg(home.root()).args(network.arguments());
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0).current_dir("/");
    let mut child = command.spawn().with_context(|| format!("cannot run {}", program.display()))?;
    let end = Instant::now() + DAEMON_TIMEOUT;
    loop {
        if let Some(status) = child.try_wait()? {
            // Another command was quicker.
            if client.status().is_ok() {
                return Ok(None);
            }
            let said = files::tail(&path, 6);
            let (said, hint) = said.split_once("\nhint: ").unwrap_or((&said, ""));
            let said = said.strip_prefix("puterd: ").unwrap_or(said);
            let error = match said {
                "" => anyhow::anyhow!("puterd did not start ({status}) and said nothing"),
                said => anyhow::anyhow!("puterd did not start: {said}"),
            };
            return if hint.is_empty() { Err(error) } else { Err(error).hint(hint) };
        }
        if let Ok(status) = client.status() {
            // Ours, or that of a command that was quicker; then ours ends by itself.
            return Ok((status.pid == child.id()).then_some(status));
        }
        if Instant::now() >= end || super::cancel::check().is_err() {
            let _ = child.kill();
            bail!("puterd did not answer within {} s; its log is {}", DAEMON_TIMEOUT.as_secs(), path.display());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Ends puterd, by whichever way it was started; false where none ran. The TAPs stay, so running VMs keep their network.
///
/// # Errors
/// When it does not end.
pub fn stop(home: &Home) -> Result<bool> {
    let status = Client::new(home).status();
    if let Some(service) = Service::of(home).filter(Service::is_active) {
        // systemd would start again what ends in another way.
        service.stop()?;
        return Ok(true);
    }
    let Ok(status) = status else { return Ok(false) };
    let pid = i32::try_from(status.pid).ok().and_then(rustix::process::Pid::from_raw);
    let pid = pid.with_context(|| format!("puterd gives {} as its process", status.pid))?;
    let fd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())
        .with_context(|| format!("cannot find puterd's process {}", status.pid))?;
    rustix::process::pidfd_send_signal(&fd, rustix::process::Signal::TERM).context("cannot signal puterd")?;
    let mut poll = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
    let limit = rustix::event::Timespec { tv_sec: DAEMON_TIMEOUT.as_secs() as i64, tv_nsec: 0 };
    match rustix::event::poll(&mut poll, Some(&limit)) {
        Ok(0) => bail!("puterd (process {}) did not end within {} s", status.pid, DAEMON_TIMEOUT.as_secs()),
        other => other.map(|_| true).context("cannot wait for puterd"),
    }
}

/// The puterd beside this executable, as it was called or as it is, or the one on PATH.
///
/// # Errors
/// When there is none.
pub fn program() -> Result<PathBuf> {
    let real = std::env::current_exe().ok();
    let called = std::env::args_os().next().map(PathBuf::from).filter(|path| path.components().count() > 1);
    let beside = [called, real].into_iter().flatten().filter_map(|path| Some(path.parent()?.join("puterd")));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path: Vec<PathBuf> = std::env::split_paths(&path).map(|dir| dir.join("puterd")).collect();
    beside
        .chain(on_path)
        .find(|path| path.is_file())
        .and_then(|path| std::path::absolute(path).ok())
        .context("cannot find puterd: it is neither beside puter nor on the PATH")
        .hint("it is a symlink to the same file: ln -s puter-multi puterd")
}
