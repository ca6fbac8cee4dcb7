//! What a pull tells whoever waits for it, and what it may be told.

use std::path::PathBuf;
use std::time::Duration;

use super::digest::Digest;
use super::mirror::Mirrors;
use super::tls::usual_directories;

/// How often one who waits looks around: whether it is time to stop, and what there is to tell.
pub(crate) const TICK: Duration = Duration::from_millis(50);

/// What a pull is busy with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Asking the registry what the reference means.
    Resolving,
    /// Another command makes the same image: waiting for it.
    Waiting,
    /// Downloading (or copying) layers.
    Downloading,
    /// Writing the layers into one file system.
    Converting,
    /// Writing everything to stable storage.
    Finishing,
}

impl Stage {
    /// The stage in a word, for a progress line.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Resolving => "resolving",
            Stage::Waiting => "waiting",
            Stage::Downloading => "downloading",
            Stage::Converting => "converting",
            Stage::Finishing => "finishing",
        }
    }
}

/// Watches a pull. All calls come from the thread that called [`super::Store::pull`]; every method has a default,
/// so that `&()` watches nothing.
pub trait Progress: Sync {
    /// The pull enters a stage.
    fn stage(&self, _stage: Stage) {}
    /// What is to be downloaded is known: this many layers of this many bytes altogether (those already here
    /// are not counted).
    fn total(&self, _layers: usize, _bytes: u64) {}
    /// The download of a layer of `size` bytes begins.
    fn layer_begin(&self, _layer: &Digest, _size: u64) {}
    /// `done` bytes of the layer are here now. It may go back when a broken download must begin anew.
    fn layer_advance(&self, _layer: &Digest, _done: u64) {}
    /// The layer is here, whole and verified.
    fn layer_end(&self, _layer: &Digest) {}
    /// The conversion has read `done` of `total` bytes of (compressed) layers.
    fn converted(&self, _done: u64, _total: u64) {}
    /// Something worth a line: a connection broke and is tried again, and why.
    fn note(&self, _text: &str) {}
    /// Asked several times a second: true ends the pull at once with an error for which
    /// [`is_cancelled`] is true, and leaves nothing behind.
    fn cancelled(&self) -> bool {
        false
    }
}

impl Progress for () {}

/// How a pull behaves.
#[derive(Debug, Clone)]
pub struct PullOptions {
    /// Registries (`host` or `host:port`) which may be spoken to without TLS; those on loopback always may.
    pub insecure: Vec<String>,
    /// A file of certificate authorities (PEM) that are believed besides the system's.
    pub ca: Option<PathBuf>,
    /// Directories which hold, per registry, a directory of its name with certificates (containers-certs.d(5)).
    pub certificates: Vec<PathBuf>,
    /// What is asked before a registry, in order: `host[:port][/prefix]` by the registry's name.
    pub mirrors: Mirrors,
    /// Ask the registry even when the image is here already: a tag may have moved.
    pub refresh: bool,
    /// The architecture to take from an image index, in OCI's words (`amd64`, `arm64`); none means the host's.
    pub architecture: Option<String>,
    /// The longest wait for a connection, TLS included.
    pub connect_timeout: Duration,
    /// The longest silence of a connected registry.
    pub idle_timeout: Duration,
    /// How often a broken download is taken up again, per layer.
    pub retries: u32,
    /// The longest time that a registry's `Retry-After` is obeyed.
    pub max_retry_after: Duration,
    /// Layers downloaded at once.
    pub parallel: usize,
    /// Bytes that all layers of an image may have, compressed.
    pub max_download: u64,
    /// Bytes that all layers of an image may have, decompressed.
    pub max_unpacked: u64,
}

impl Default for PullOptions {
    fn default() -> PullOptions {
        PullOptions {
            insecure: Vec::new(),
            ca: None,
            certificates: usual_directories(std::env::home_dir().as_deref()),
            mirrors: Mirrors::new(),
            refresh: false,
            architecture: None,
            connect_timeout: Duration::from_secs(15),
            idle_timeout: Duration::from_secs(30),
            retries: 5,
            max_retry_after: Duration::from_secs(60),
            parallel: 3,
            max_download: 64 << 30,
            max_unpacked: 256 << 30,
        }
    }
}

impl PullOptions {
    /// The architecture to choose, in OCI's words.
    pub fn architecture(&self) -> &str {
        self.architecture.as_deref().unwrap_or(host_architecture())
    }
}

/// The host's architecture in the words of OCI (GOARCH).
pub fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The error of a pull that [`Progress::cancelled`] ended.
#[derive(Debug)]
pub struct Cancelled;

impl std::fmt::Display for Cancelled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Cancelled {}

/// Whether `error` only says that the user ended the pull.
pub fn is_cancelled(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.is::<Cancelled>())
}
