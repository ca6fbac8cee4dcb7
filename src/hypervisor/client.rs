//! cloud-hypervisor's REST API, as far as puter uses it (docs/api.md and vmm/src/api/openapi there).

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::protocol::unix_http;

/// How long one request may take.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How long a snapshot may take: the machine's memory goes to the disk meanwhile.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(900);
/// The longest answer that is read, in bytes: a VM's whole configuration fits many times.
const MAX_ANSWER: u64 = 1 << 20;

/// What the emulator calls its vsock device.
pub const VSOCK_DEVICE: &str = "vsock-0";

/// Speaks to one VM's hypervisor.
#[derive(Debug)]
pub struct Client {
    agent: ureq::Agent,
    socket: PathBuf,
}

/// Answer to `vmm.ping`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Ping {
    pub version: String,
    #[serde(default)]
    pub pid: i64,
}

/// Answer to `vm.info`, what puter reads of it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Info {
    pub state: State,
}

/// What the VM does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum State {
    Created,
    Running,
    Shutdown,
    Paused,
    BreakPoint,
    #[serde(other)]
    Unknown,
}

impl Client {
    /// A client for the API socket; nothing is sent yet.
    pub fn new(socket: &Path) -> Client {
        Client { agent: unix_http::agent(socket, TIMEOUT), socket: socket.to_path_buf() }
    }

    /// Is the hypervisor there?
    ///
    /// # Errors
    /// When it does not answer; the other calls fail alike, or with what the hypervisor says.
    pub fn ping(&self) -> Result<Ping> {
        self.get("vmm.ping")
    }

    /// What the VM does.
    pub fn info(&self) -> Result<Info> {
        self.get("vm.info")
    }

    /// Presses the power button; the guest decides what follows.
    pub fn power_button(&self) -> Result<()> {
        self.put("vm.power-button")
    }

    /// Takes the vsock device away until the VM is resumed. Before its memory is written the emulator needs that, and the
    /// guest must run for it.
    ///
    /// # Errors
    /// As for [`Client::ping`], or when the guest does not let go of it.
    pub fn remove_vsock(&self) -> Result<()> {
        let body = serde_json::json!({ "id": VSOCK_DEVICE }).to_string();
        self.put_json(&self.agent, "vm.remove-device", &body)
    }

    /// Stops the processors.
    pub fn pause(&self) -> Result<()> {
        self.put("vm.pause")
    }

    /// Lets the processors go on.
    pub fn resume(&self) -> Result<()> {
        self.put("vm.resume")
    }

    /// Writes memory, processors and devices of a paused VM into this directory, which exists and is empty
    /// (cloud-hypervisor's docs/snapshot_restore.md). The disk is the caller's.
    ///
    /// # Errors
    /// As for [`Client::ping`]; the VM stays paused.
    pub fn snapshot(&self, directory: &Path) -> Result<()> {
        let url = directory.to_str().map(|path| format!("file://{path}")).context("the path is not UTF-8")?;
        let patient = unix_http::agent(&self.socket, SNAPSHOT_TIMEOUT);
        let body = serde_json::json!({ "destination_url": url }).to_string();
        self.put_json(&patient, "vm.snapshot", &body)
    }

    /// Ends the hypervisor, and with it the VM.
    pub fn shutdown_vmm(&self) -> Result<()> {
        self.put("vmm.shutdown")
    }

    fn get<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let bytes = self.send("GET", name)?;
        serde_json::from_slice(&bytes).with_context(|| format!("the hypervisor's answer to {name} is not understood"))
    }

    fn put_json(&self, agent: &ureq::Agent, name: &str, body: &str) -> Result<()> {
        let request = agent.put(format!("http://localhost/api/v1/{name}")).header("content-type", "application/json");
        read(name, request.send(body)).map(|_| ())
    }

    fn put(&self, name: &str) -> Result<()> {
        self.send("PUT", name).map(|_| ())
    }

    fn send(&self, method: &str, name: &str) -> Result<Vec<u8>> {
        let uri = format!("http://localhost/api/v1/{name}");
        let sent = match method {
            "GET" => self.agent.get(uri).call(),
            // With a length of zero: cloud-hypervisor's server knows no other way to say that there is no body.
            _ => self.agent.put(uri).send_empty(),
        };
        read(name, sent)
    }
}

/// The answer's body, or the error that it tells of.
fn read(name: &str, sent: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<Vec<u8>> {
    let mut response = sent.with_context(|| format!("the hypervisor does not answer {name}"))?;
    let status = response.status();
    let bytes = response
        .body_mut()
        .with_config()
        .limit(MAX_ANSWER)
        .read_to_vec()
        .with_context(|| format!("the hypervisor's answer to {name} broke off"))?;
    if status.is_success() {
        return Ok(bytes);
    }
    bail!("the hypervisor refuses {name}: {}", reason(&bytes).unwrap_or_else(|| status.to_string()))
}

/// The chain of messages in an error's body: a JSON list of strings.
fn reason(body: &[u8]) -> Option<String> {
    let chain: Vec<String> = serde_json::from_slice(body).ok()?;
    Some(chain.join(": ")).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_read_those_of_later_versions_too() {
        let state = |text: &str| serde_json::from_str::<Info>(text).map(|info| info.state);
        assert_eq!(state(r#"{"config":{},"state":"Running","memory_actual_size":1}"#).unwrap(), State::Running);
        assert_eq!(state(r#"{"state":"Dreaming"}"#).unwrap(), State::Unknown);
        assert!(state(r#"{"state":7}"#).is_err());
        assert!(state("[]").is_err());
    }

    #[test]
    fn an_errors_body_becomes_a_sentence() {
        assert_eq!(reason(br#"["VM is not running","No VM"]"#).unwrap(), "VM is not running: No VM");
        assert_eq!(reason(b"<html>"), None);
        assert_eq!(reason(b"[]"), None);
    }
}
