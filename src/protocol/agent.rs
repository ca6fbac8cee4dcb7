//! The agent's messages: one JSON object a line each way on vsock port [`PORT`].
//!
//! A request names its protocol version and an id that the response repeats. Unknown fields are ignored; an unknown
//! method is answered with the error code [`UNKNOWN_METHOD`].

use serde::{Deserialize, Serialize};

/// The vsock port on which the agent listens.
pub const PORT: u32 = 1024;
/// The protocol's version; it grows when a message changes its meaning, not when one is added.
pub const VERSION: u32 = 1;
/// Longest line either side accepts, in bytes with the line feed.
pub const MAX_LINE: usize = 256 * 1024;

/// Connections that an agent serves at once; it closes any more.
pub const MAX_CONNECTIONS: usize = 32;
/// Seconds for which a connection may be silent, or take no bytes, unless a program runs on it.
pub const IDLE: u64 = 600;
/// The largest seed of an [`Identity`], in bytes.
pub const MAX_SEED: usize = 256;

/// Error code: the method is not known to this agent.
pub const UNKNOWN_METHOD: &str = "unknown_method";
/// Error code: the line is no request, or its parameters do not fit the method.
pub const BAD_REQUEST: &str = "bad_request";
/// Error code: the request's version is newer than the agent's.
pub const UNSUPPORTED_VERSION: &str = "unsupported_version";
/// Error code: the method was tried and failed.
pub const FAILED: &str = "failed";

/// A line from the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the caller; the response repeats it.
    pub id: u64,
    /// The protocol version that the caller speaks.
    pub version: u32,
    #[serde(flatten)]
    pub call: Call,
}

/// What is asked, with its parameters: `{"method":"ping","params":{}}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "method", content = "params", rename_all = "snake_case")]
pub enum Call {
    /// Is the agent there? Answered with [`Pong`].
    Ping {},
    /// Make the guest this machine. Idempotent; answered with [`Configured`].
    Configure(Box<Configure>),
    /// Power the guest off in an orderly way; answered before it begins.
    Shutdown {},
    /// Run a program. Answered with `{}` once it runs; after that the connection is the program's: lines of
    /// [`Input`] go to it and lines of [`Output`] come from it, the last of which is [`Output::Exit`].
    Exec(Box<Exec>),
}

/// Parameters of `exec`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Exec {
    /// The program and its arguments, looked for in PATH.
    pub command: Vec<String>,
    /// Variables beyond the user's own.
    pub environment: Vec<(String, String)>,
    /// Where it runs; the user's home when empty.
    pub directory: String,
    /// As whom it runs; root when empty.
    pub user: String,
    /// Gives it a terminal of this size; stderr is then part of stdout.
    pub terminal: Option<Window>,
}

/// Size of a terminal, in characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    pub rows: u16,
    pub columns: u16,
}

/// A line from the host to a running program. Bytes are base64.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Input {
    Stdin(String),
    /// There is no more: the program reads end of file.
    StdinEnd,
    Resize(Window),
}

/// A line from a running program to the host. Bytes are base64.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Output {
    Stdout(String),
    Stderr(String),
    /// The program ended with this code; 128 and the signal's number where a signal ended it, as shells have it.
    Exit(i32),
}

/// Bytes of a program's input or output in one line, so that the line stays within [`MAX_LINE`].
pub const CHUNK: usize = 128 * 1024;

/// Parameters of `configure`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Configure {
    /// The guest's host name: a DNS label.
    pub hostname: String,
    /// The MAC for the first Ethernet link.
    pub mac: String,
    /// Text of the netplan file, applied where netplan is present.
    pub netplan: String,
    /// The IPv4 address that DHCP will give; the agent waits until the guest has it. Any address where it is empty.
    pub address: String,
    /// Seconds that the guest may take to get its address; 30 where it is absent, and 0 does not wait.
    pub address_timeout: Option<u32>,
    /// The guest's memory came from a snapshot: its randomness is renewed and its generation counted on, also where its
    /// identity stays.
    pub restored: bool,
    /// Public keys that may log in, one authorized_keys line each; they replace puter's former ones.
    pub ssh_keys: Vec<String>,
    /// The user who gets the keys; root when empty.
    pub user: String,
    /// The host's time in nanoseconds since 1970-01-01 UTC; the guest's clock is set to it past 20 ms of drift.
    pub time: Option<u64>,
    /// Directories of the host that the guest mounts.
    pub mounts: Vec<Mount>,
    /// What makes this machine itself; absent for one that keeps what it has.
    pub identity: Option<Identity>,
}

/// A directory of the host in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// The virtiofs device's name.
    pub tag: String,
    /// Where it is mounted: an absolute path in the guest.
    pub path: String,
    #[serde(default)]
    pub read_only: bool,
}

/// A machine's own identity, new for each new machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Identity {
    /// Names this identity: the agent takes on each value once, so that a repeated `configure` changes nothing.
    pub instance: String,
    /// 32 hexadecimal digits for /etc/machine-id.
    pub machine_id: String,
    /// Fresh random bytes for the kernel's pool, base64.
    pub seed: String,
}

/// Result of `ping`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong {
    /// The agent's version.
    pub agent: String,
    /// The newest protocol version that the agent speaks.
    pub version: u32,
    pub hostname: String,
    /// Seconds since the guest booted.
    pub uptime: u64,
}

/// Result of `configure`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Configured {
    pub hostname: String,
    /// `netplan` or `networkd`: which one now holds the network's configuration.
    pub network: String,
    /// The guest's public ssh host keys, one line each as in /etc/ssh/ssh_host_*_key.pub.
    pub host_keys: Vec<String>,
    /// Size of the root file system in bytes after growing.
    pub root_size: u64,
    /// What did not work but does not make the machine useless.
    pub warnings: Vec<String>,
}

/// A line from the agent: `result` on success, `error` otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Response {
    /// The request's id; 0 where the request could not be read.
    pub id: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Error>,
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Error {
    /// One of this module's error codes.
    pub code: String,
    pub message: String,
}
