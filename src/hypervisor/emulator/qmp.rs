//! QEMU's control protocol: one JSON object a line each way (docs/interop/qmp-spec in QEMU).

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

use super::events::Events;

/// How long a command may take.
const TIMEOUT: Duration = Duration::from_secs(20);
/// Longest line that is read from QEMU, in bytes.
const MAX_LINE: u64 = 1 << 20;

/// A connection to QEMU.
#[derive(Debug)]
pub struct Qmp {
    /// One command at a time: the next id and both ends.
    channel: Mutex<Channel>,
    seen: Arc<Seen>,
    version: String,
}

/// What QEMU told by itself.
#[derive(Debug, Default)]
struct Seen {
    paused: AtomicBool,
    reset: AtomicBool,
    /// Events that somebody may wait for, until they are taken.
    events: Mutex<Vec<Value>>,
    more: Condvar,
}

#[derive(Debug)]
struct Channel {
    id: u64,
    writer: UnixStream,
    replies: Receiver<Value>,
}

impl Qmp {
    /// Takes over the socket: waits for the greeting and leaves negotiation mode.
    ///
    /// # Errors
    /// When QEMU closes the socket or does not answer within `limit`.
    pub fn connect(socket: UnixStream, events: Arc<Events>, limit: Duration) -> Result<Qmp> {
        let (sender, replies) = channel();
        let reader = socket.try_clone().context("cannot duplicate a socket")?;
        let seen = Arc::<Seen>::default();
        let sees = seen.clone();
        std::thread::spawn(move || read(reader, &sender, &sees, &events));
        let greeting = replies.recv_timeout(limit).context("QEMU says nothing on its control channel")?;
        if greeting.get("QMP").is_none() {
            bail!("QEMU's control channel does not greet");
        }
        let number = |part: &str| greeting["QMP"]["version"]["qemu"][part].as_u64().unwrap_or(0);
        let version = format!("{}.{}.{}", number("major"), number("minor"), number("micro"));
        let qmp = Qmp { channel: Mutex::new(Channel { id: 0, writer: socket, replies }), seen, version };
        qmp.execute("qmp_capabilities")?;
        Ok(qmp)
    }

    /// Runs a command without arguments.
    ///
    /// # Errors
    /// When QEMU refuses, is gone, or takes longer than 20 s.
    pub fn execute(&self, command: &str) -> Result<Value> {
        self.run(command, json!({}))
    }

    /// Runs a command.
    ///
    /// # Errors
    /// As for [`Qmp::execute`].
    pub fn run(&self, command: &str, arguments: Value) -> Result<Value> {
        let mut channel = self.channel.lock().map_err(|_| anyhow!("the control channel is broken"))?;
        channel.id += 1;
        let id = channel.id;
        let mut line = serde_json::to_vec(&json!({ "execute": command, "arguments": arguments, "id": id }))?;
        line.push(b'\n');
        channel.writer.write_all(&line).context("QEMU has closed its control channel")?;
        let end = Instant::now() + TIMEOUT;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let reply =
                channel.replies.recv_timeout(left).with_context(|| format!("QEMU does not answer {command}"))?;
            // The answer to a command that was given up on comes late and is not ours.
            if reply["id"] != json!(id) {
                continue;
            }
            return match reply.get("error") {
                Some(error) => bail!("QEMU refuses {command}: {}", error["desc"].as_str().unwrap_or("no reason given")),
                None => Ok(reply["return"].clone()),
            };
        }
    }

    /// Whether QEMU ended because the guest asked for a reboot. Call it when QEMU has ended.
    pub fn is_reset_at_end(&self) -> bool {
        // The reader lets go of its end of the replies once it has read everything.
        if let Ok(channel) = self.channel.lock() {
            while channel.replies.recv_timeout(TIMEOUT).is_ok() {}
        }
        self.seen.reset.load(Ordering::SeqCst)
    }

    /// Whether the processors stand still.
    pub fn is_paused(&self) -> bool {
        self.seen.paused.load(Ordering::SeqCst)
    }

    /// QEMU's version, as it greets with it.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Waits for an event of this name for which `take` returns something, from the last [`Qmp::forget`] on.
    ///
    /// # Errors
    /// When it does not come within `limit`.
    pub fn wait_for<T>(&self, name: &str, limit: Duration, take: impl Fn(&Value) -> Option<T>) -> Result<T> {
        let end = Instant::now() + limit;
        let mut events = self.seen.events.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let mut found = events.iter().filter(|event| event["event"] == name);
            if let Some(value) = found.find_map(|event| take(&event["data"])) {
                return Ok(value);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("QEMU told of no {name} within {} s", limit.as_secs());
            }
            events = self.seen.more.wait_timeout(events, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Forgets the events so far.
    pub fn forget(&self) {
        self.seen.events.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// The most events that are kept for somebody who waits: a guest causes none of them.
const MAX_EVENTS: usize = 1000;

/// Sorts QEMU's lines into replies and events until it closes the socket.
fn read(socket: UnixStream, replies: &Sender<Value>, seen: &Seen, events: &Events) {
    let mut reader = BufReader::new(socket);
    loop {
        let mut line = Vec::new();
        match reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let Ok(message) = serde_json::from_slice::<Value>(&line) else { continue };
        match message["event"].as_str() {
            None => {
                if replies.send(message).is_err() {
                    return;
                }
            }
            Some("STOP") => {
                seen.paused.store(true, Ordering::SeqCst);
                events.write("vm", "paused");
            }
            Some("RESUME") => {
                seen.paused.store(false, Ordering::SeqCst);
                events.write("vm", "resumed");
            }
            Some("SHUTDOWN") if message["data"]["reason"] == "guest-reset" => {
                seen.reset.store(true, Ordering::SeqCst);
            }
            Some("GUEST_PANICKED") => events.write("guest", "panic"),
            Some("MIGRATION" | "DEVICE_DELETED") => {
                let mut kept = seen.events.lock().unwrap_or_else(PoisonError::into_inner);
                if kept.len() < MAX_EVENTS {
                    kept.push(message);
                }
                seen.more.notify_all();
            }
            Some(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_qemu(script: impl FnOnce(BufReader<UnixStream>, UnixStream) + Send + 'static) -> Result<Qmp> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || script(BufReader::new(theirs.try_clone().unwrap()), theirs));
        Qmp::connect(ours, Arc::new(Events::open(None).unwrap()), Duration::from_secs(5))
    }

    fn answer(reader: &mut impl BufRead, writer: &mut UnixStream, reply: &str) {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let id = serde_json::from_str::<Value>(&line).unwrap()["id"].clone();
        writeln!(writer, "{}", reply.replace("ID", &id.to_string())).unwrap();
    }

    #[test]
    fn replies_find_their_command_among_events_and_noise() {
        let qmp = with_qemu(|mut reader, mut writer| {
            writeln!(writer, r#"{{"QMP":{{}}}}"#).unwrap();
            answer(&mut reader, &mut writer, r#"{"return":{},"id":ID}"#);
            answer(
                &mut reader,
                &mut writer,
                "not json\n{\"return\":1,\"id\":99}\n{\"event\":\"STOP\"}\n{\"return\":{\"a\":1},\"id\":ID}",
            );
            answer(&mut reader, &mut writer, r#"{"error":{"class":"G","desc":"no such thing"},"id":ID}"#);
            writeln!(writer, r#"{{"event":"MIGRATION","data":{{"status":"active"}}}}"#).unwrap();
            writeln!(writer, r#"{{"event":"MIGRATION","data":{{"status":"completed"}}}}"#).unwrap();
        })
        .unwrap();
        assert_eq!(qmp.execute("stop").unwrap()["a"], 1);
        assert!(qmp.is_paused());
        assert!(qmp.execute("what").unwrap_err().to_string().contains("no such thing"));
        let completed = |data: &Value| (data["status"] == "completed").then_some(());
        qmp.wait_for("MIGRATION", Duration::from_secs(5), completed).unwrap();
        qmp.forget();
        assert!(qmp.wait_for("MIGRATION", Duration::ZERO, completed).is_err());
        assert!(qmp.execute("more").is_err(), "a closed channel is an error");
    }

    #[test]
    fn a_qemu_that_ends_or_speaks_otherwise_is_an_error() {
        assert!(with_qemu(|_, _| ()).is_err());
        assert!(with_qemu(|_, mut writer| writeln!(writer, "[1]").unwrap()).is_err());
    }
}
