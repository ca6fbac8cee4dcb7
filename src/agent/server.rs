//! Connections and lines: the agent's protocol without what its methods do.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vsock::VsockStream;

use super::configure;
use super::files::Guest;
use crate::protocol::agent::{
    BAD_REQUEST, Call, Error, FAILED, MAX_LINE, Pong, Response, UNKNOWN_METHOD, UNSUPPORTED_VERSION, VERSION,
};

/// Connections at once; more wait for nothing and are closed.
const MAX_CONNECTIONS: usize = 32;
/// How long a connection may be silent, or take no bytes.
const IDLE: Duration = Duration::from_secs(600);
/// Pause after a failed accept, so that a lack of file descriptors does not spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// The methods of [`Call`].
const METHODS: [&str; 3] = ["ping", "configure", "shutdown"];

/// A stream whose waits have limits.
pub trait Stream: Read + Write + Send + 'static {
    /// Limits each read and write.
    fn limit(&self, limit: Duration) -> io::Result<()>;
}

impl Stream for UnixStream {
    fn limit(&self, limit: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(limit))?;
        self.set_write_timeout(Some(limit))
    }
}

impl Stream for VsockStream {
    fn limit(&self, limit: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(limit))?;
        self.set_write_timeout(Some(limit))
    }
}

/// Answers requests for one guest.
pub struct Server {
    guest: Arc<Guest>,
    connections: Arc<AtomicUsize>,
}

impl Server {
    pub fn new(guest: Guest) -> Server {
        Server { guest: Arc::new(guest), connections: Arc::default() }
    }

    /// Serves for ever what `accept` gives; `None` is a peer that is not served.
    pub fn serve<S: Stream>(&self, mut accept: impl FnMut() -> io::Result<Option<S>>) -> ! {
        loop {
            match accept() {
                Ok(Some(stream)) => self.start(stream),
                Ok(None) => {}
                Err(error) => {
                    eprintln!("puter-agent: cannot accept a connection: {error}");
                    std::thread::sleep(ACCEPT_RETRY);
                }
            }
        }
    }

    fn start<S: Stream>(&self, stream: S) {
        let place = Place::take(&self.connections);
        let guest = self.guest.clone();
        let Some(place) = place else { return };
        let spawned = std::thread::Builder::new().spawn(move || {
            // A client that breaks off or talks nonsense harms only its own connection.
            let _ = connection(stream, &guest);
            drop(place);
        });
        if let Err(error) = spawned {
            eprintln!("puter-agent: cannot start a thread: {error}");
        }
    }
}

/// One of the places for connections.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(count: &Arc<AtomicUsize>) -> Option<Place> {
        let taken = count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| (n < MAX_CONNECTIONS).then_some(n + 1));
        taken.ok().map(|_| Place(count.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn connection<S: Stream>(stream: S, guest: &Guest) -> io::Result<()> {
    stream.limit(IDLE)?;
    let mut stream = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        stream.by_ref().take(MAX_LINE as u64).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(());
        }
        let complete = line.last() == Some(&b'\n');
        let (response, after) = match complete {
            true => answer(&line, guest),
            false => (refusal(0, BAD_REQUEST, format!("a line ends within {MAX_LINE} bytes")), None),
        };
        let mut bytes = serde_json::to_vec(&response)?;
        bytes.push(b'\n');
        stream.get_mut().write_all(&bytes)?;
        stream.get_mut().flush()?;
        if let Some(after) = after {
            after();
        }
        if !complete {
            return Ok(());
        }
    }
}

/// What is left to do once the answer is on its way.
type After = Box<dyn FnOnce()>;

#[derive(Deserialize)]
struct Envelope {
    #[serde(default)]
    id: u64,
    #[serde(default)]
    version: u32,
    #[serde(default)]
    method: String,
}

fn answer(line: &[u8], guest: &Guest) -> (Response, Option<After>) {
    let mut value: Value = match serde_json::from_slice(line) {
        Ok(value) => value,
        Err(error) => return (refusal(0, BAD_REQUEST, format!("the line is not JSON: {error}")), None),
    };
    let envelope = match Envelope::deserialize(&value) {
        Ok(envelope) => envelope,
        Err(error) => return (refusal(0, BAD_REQUEST, format!("the line is no request: {error}")), None),
    };
    let id = envelope.id;
    if envelope.version > VERSION {
        let why = format!("version {} is not known; this agent speaks {VERSION}", envelope.version);
        return (refusal(id, UNSUPPORTED_VERSION, why), None);
    }
    if !METHODS.contains(&envelope.method.as_str()) {
        let name: String = envelope.method.chars().take(64).collect();
        return (refusal(id, UNKNOWN_METHOD, format!("this agent does not know the method '{name}'")), None);
    }
    // A method that takes nothing may be asked without `params`.
    if let Some(request) = value.as_object_mut() {
        request.entry("params").or_insert_with(|| Value::Object(Default::default()));
    }
    match Call::deserialize(&value) {
        Ok(Call::Ping {}) => (reply(id, ping(guest)), None),
        Ok(Call::Configure(wanted)) => (reply(id, configure::configure(guest, &wanted)), None),
        Ok(Call::Shutdown {}) => {
            let off = guest.is_real().then(|| Box::new(super::system::power_off) as After);
            (reply(id, Ok(serde_json::json!({}))), off)
        }
        Err(error) => (refusal(id, BAD_REQUEST, format!("the parameters do not fit: {error}")), None),
    }
}

fn ping(guest: &Guest) -> Result<Pong> {
    let uptime = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = uptime.split('.').next().and_then(|s| s.parse().ok()).unwrap_or(0);
    Ok(Pong { agent: crate::VERSION.into(), version: VERSION, hostname: guest.hostname(), uptime: seconds })
}

fn reply<T: Serialize>(id: u64, result: Result<T>) -> Response {
    match result.and_then(|value| Ok(serde_json::to_value(value)?)) {
        Ok(value) => Response { id, result: Some(value), error: None },
        Err(error) => refusal(id, FAILED, format!("{error:#}")),
    }
}

fn refusal(id: u64, code: &str, message: String) -> Response {
    Response { id, result: None, error: Some(Error { code: code.into(), message }) }
}
