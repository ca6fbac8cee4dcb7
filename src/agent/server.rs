//! Connections and lines: the agent's protocol without what its methods do.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use vsock::VsockStream;

use super::files::Guest;
use super::request::{self, refusal};
use super::{configure, exec};
use crate::protocol::agent::{
    BAD_REQUEST, Call, Exec, FAILED, IDLE, MAX_CONNECTIONS, MAX_LINE, Pong, Response, VERSION,
};

/// Pause after a failed accept, so that a lack of file descriptors does not spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// A stream whose waits have limits.
pub trait Stream: Read + Write + Send + Sized + 'static {
    /// Limits each read and write; `None` waits for ever.
    fn limit(&self, limit: Option<Duration>) -> io::Result<()>;
    /// Another handle of the same stream.
    fn another(&self) -> io::Result<Self>;
    /// Ends it in both directions, for every handle.
    fn end(&self);
}

impl Stream for UnixStream {
    fn limit(&self, limit: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(limit)?;
        self.set_write_timeout(limit)
    }

    fn another(&self) -> io::Result<Self> {
        self.try_clone()
    }

    fn end(&self) {
        let _ = self.shutdown(Shutdown::Both);
    }
}

impl Stream for VsockStream {
    fn limit(&self, limit: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(limit)?;
        self.set_write_timeout(limit)
    }

    fn another(&self) -> io::Result<Self> {
        self.try_clone()
    }

    fn end(&self) {
        let _ = self.shutdown(Shutdown::Both);
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
    stream.limit(Some(Duration::from_secs(IDLE)))?;
    let mut stream = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        stream.by_ref().take(MAX_LINE as u64).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(());
        }
        let complete = line.last() == Some(&b'\n');
        let (response, then) = match complete {
            true => answer(&line, guest),
            false => (refusal(0, BAD_REQUEST, format!("a line ends within {MAX_LINE} bytes")), Then::End),
        };
        let (response, then) = match then {
            // It must run before the answer can say so.
            Then::Exec(wanted) => match exec::start(guest, &wanted) {
                Ok(program) => (response, Then::Run(program)),
                Err(error) => (refusal(response.id, FAILED, format!("{error:#}")), Then::Go),
            },
            then => (response, then),
        };
        let mut bytes = serde_json::to_vec(&response)?;
        bytes.push(b'\n');
        stream.get_mut().write_all(&bytes)?;
        stream.get_mut().flush()?;
        match then {
            Then::Go => {}
            Then::End => return Ok(()),
            Then::PowerOff => super::system::power_off(),
            Then::Exec(_) => {}
            Then::Run(program) => return exec::attend(program, stream),
        }
    }
}

/// What follows an answer.
enum Then {
    /// The next request.
    Go,
    End,
    PowerOff,
    Exec(Box<Exec>),
    Run(exec::Program),
}

fn answer(line: &[u8], guest: &Guest) -> (Response, Then) {
    let (id, call) = match request::read(line) {
        Ok(read) => read,
        Err(refused) => return (*refused, Then::Go),
    };
    match call {
        Call::Ping {} => (reply(id, ping(guest)), Then::Go),
        Call::Configure(wanted) => (reply(id, configure::configure(guest, &wanted)), Then::Go),
        Call::Shutdown {} => {
            let then = if guest.is_real() { Then::PowerOff } else { Then::Go };
            (reply(id, Ok(serde_json::json!({}))), then)
        }
        Call::Exec(wanted) => (reply(id, Ok(serde_json::json!({}))), Then::Exec(wanted)),
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
