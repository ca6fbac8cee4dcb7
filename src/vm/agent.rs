//! The host's side of the agent's protocol.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::de::DeserializeOwned;

use super::files::plain;
use crate::hypervisor::vsock;
use crate::protocol::agent::{Call, Configure, Configured, Exec, MAX_LINE, PORT, Pong, Request, Response, VERSION};

/// A connection to one guest's agent.
pub struct Agent {
    stream: BufReader<UnixStream>,
    next: u64,
}

impl Agent {
    /// Connects by way of the VM's vsock socket.
    ///
    /// # Errors
    /// When nobody listens behind the socket within `timeout`: while the guest boots that is the usual answer.
    pub fn connect(socket: &Path, timeout: Duration) -> Result<Agent> {
        Ok(Agent::over(vsock::connect(socket, PORT, timeout, super::cancel::flag())?))
    }

    /// The agent at the other end of a connection.
    pub fn over(stream: UnixStream) -> Agent {
        Agent { stream: BufReader::new(stream), next: 1 }
    }

    /// As [`Agent::connect`], and sees that the agent answers. A guest that just went on after a snapshot or a restore may
    /// lose the first connections (cloud-hypervisor's issue 7263): it is asked again for a few seconds.
    ///
    /// # Errors
    /// When it does not answer in that time.
    pub fn reach(socket: &Path, timeout: Duration) -> Result<Agent> {
        const PATIENCE: Duration = Duration::from_secs(5);
        let end = Instant::now() + PATIENCE.min(timeout);
        let mut pause = Duration::from_millis(10);
        loop {
            let reached = Agent::connect(socket, timeout).and_then(|mut agent| agent.ping(timeout).map(|_| agent));
            match reached {
                Err(_) if Instant::now() + pause < end => {
                    super::cancel::check()?;
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(500));
                }
                reached => return reached,
            }
        }
    }

    /// Asks whether the agent is there.
    ///
    /// # Errors
    /// As for [`Agent::configure`].
    pub fn ping(&mut self, timeout: Duration) -> Result<Pong> {
        self.call(Call::Ping {}, timeout)
    }

    /// Makes the guest what `configure` says.
    ///
    /// # Errors
    /// When the connection breaks, the time runs out, or the agent answers with an error.
    pub fn configure(&mut self, configure: Configure, timeout: Duration) -> Result<Configured> {
        self.call(Call::Configure(Box::new(configure)), timeout)
    }

    /// Asks the guest to power off.
    ///
    /// # Errors
    /// As for [`Agent::configure`].
    pub fn shutdown(&mut self, timeout: Duration) -> Result<()> {
        self.call::<serde_json::Value>(Call::Shutdown {}, timeout).map(|_| ())
    }

    /// Starts a program; after that the connection is the program's.
    ///
    /// # Errors
    /// As for [`Agent::configure`].
    pub fn exec(&mut self, wanted: Exec, timeout: Duration) -> Result<()> {
        self.call::<serde_json::Value>(Call::Exec(Box::new(wanted)), timeout).map(|_| ())
    }

    /// The connection, without time limits.
    ///
    /// # Errors
    /// When the socket refuses.
    pub fn into_stream(self) -> Result<BufReader<UnixStream>> {
        self.stream.get_ref().set_read_timeout(None)?;
        self.stream.get_ref().set_write_timeout(None)?;
        Ok(self.stream)
    }

    fn call<T: DeserializeOwned>(&mut self, call: Call, timeout: Duration) -> Result<T> {
        let id = self.next;
        self.next += 1;
        let mut line = serde_json::to_vec(&Request { id, version: VERSION, call })?;
        line.push(b'\n');
        ensure!(line.len() <= MAX_LINE, "the request has {} bytes, the agent accepts {MAX_LINE}", line.len());
        self.stream.get_ref().set_write_timeout(Some(timeout))?;
        self.stream.get_mut().write_all(&line).context("cannot write to the agent")?;
        let line = self.read_line(timeout)?;
        let response: Response = understood("the agent's answer", serde_json::from_slice(&line))?;
        ensure!(response.id == id, "the agent answered request {} instead of {id}", response.id);
        match (response.result, response.error) {
            (_, Some(error)) => bail!("the agent says: {}", printable(&error.message)),
            (Some(result), None) => understood("the agent's answer", serde_json::from_value(result)),
            (None, None) => bail!("the agent's answer is empty"),
        }
    }

    /// Reads a line of at most [`MAX_LINE`] bytes; the limit holds for the whole line, however slowly it drips.
    fn read_line(&mut self, timeout: Duration) -> Result<Vec<u8>> {
        let end = Instant::now() + timeout;
        let mut line = Vec::new();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "the agent did not answer within {} s", timeout.as_secs());
            self.stream.get_ref().set_read_timeout(Some(left))?;
            let room = (MAX_LINE - line.len()) as u64;
            match self.stream.by_ref().take(room).read_until(b'\n', &mut line) {
                Ok(0) => bail!("the agent closed the connection"),
                Ok(_) if line.ends_with(b"\n") => return Ok(line),
                Ok(_) => ensure!(line.len() < MAX_LINE, "the agent's answer is longer than {MAX_LINE} bytes"),
                Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
                Err(error) => return Err(error).context("cannot read from the agent"),
            }
        }
    }
}

/// Lines without a time limit.
pub mod lines {
    use super::{BufRead, MAX_LINE, Read, Result, ensure};

    /// The next line; `None` at the end.
    ///
    /// # Errors
    /// When reading fails, or a line is longer than [`MAX_LINE`].
    pub fn next(stream: &mut impl BufRead) -> Result<Option<Vec<u8>>> {
        let mut line = Vec::new();
        stream.by_ref().take(MAX_LINE as u64).read_until(b'\n', &mut line)?;
        match line.last() {
            None => Ok(None),
            Some(b'\n') => Ok(Some(line)),
            Some(_) => {
                ensure!(line.len() < MAX_LINE, "the guest's line is longer than {MAX_LINE} bytes");
                Ok(None)
            }
        }
    }
}

/// What was read, or that it is not understood: the parser's words repeat those of the guest.
pub(super) fn understood<T>(what: &str, read: serde_json::Result<T>) -> Result<T> {
    read.map_err(|error| anyhow!("{what} is not understood: {}", printable(&error.to_string())))
}

/// The text without anything that could steer a terminal, and not too long.
pub fn printable(text: &str) -> String {
    plain(text).chars().take(4096).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_says_of_itself_steers_no_terminal() {
        for (said, tells) in [
            (r#"{"id":1,"result":{"\u001b]0;x\u0007":1}}"#, "the agent's answer is not understood"),
            (r#"{"id":1,"error":{"code":"failed","message":"a\u001b[2Jb\u0007"}}"#, "the agent says: ab"),
            (r#"{"id":1,"error":{"code":7,"message":""},"result":"\u009b"}"#, "the agent's answer is not understood"),
        ] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            writeln!(theirs, "{said}").unwrap();
            let error = format!("{:#}", Agent::over(ours).ping(Duration::from_secs(5)).unwrap_err());
            assert!(error.contains(tells) && !error.contains(char::is_control), "{}", error.escape_debug());
        }
    }
}
