//! `exec`: a program in the guest over vsock, without network or keys.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::agent::{Agent, lines, understood};
use super::home::Home;
use crate::protocol::agent::{CHUNK, Exec, Input, Output, Window};

/// How long the agent may take to be reached and to start the program.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A program that runs in a guest.
pub struct Running {
    stream: std::io::BufReader<UnixStream>,
    input: Keyboard,
}

/// Sends input to the program; it can be used from any thread.
#[derive(Clone)]
pub struct Keyboard(Arc<Mutex<UnixStream>>);

/// Starts a program in the VM.
///
/// # Errors
/// When the agent cannot be reached or refuses.
pub fn start(home: &Home, vm: &str, wanted: Exec) -> Result<Running> {
    let agent = Agent::reach(&home.vsock(vm), START_TIMEOUT).with_context(|| format!("cannot reach '{vm}'"))?;
    Running::begin(agent, wanted)
}

impl Keyboard {
    fn send(&self, input: &Input) -> Result<()> {
        let mut line = serde_json::to_vec(input)?;
        line.push(b'\n');
        let mut stream = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        stream.write_all(&line).context("the program's connection is closed")
    }

    /// Tells the new size of the terminal.
    ///
    /// # Errors
    /// When the program has ended.
    pub fn resize(&self, window: Window) -> Result<()> {
        self.send(&Input::Resize(window))
    }

    /// Breaks the connection: the program is hung up on.
    pub fn hang_up(&self) {
        let _ = self.0.lock().unwrap_or_else(PoisonError::into_inner).shutdown(std::net::Shutdown::Both);
    }

    /// Tells that there is no input.
    ///
    /// # Errors
    /// When the program has ended.
    pub fn end(&self) -> Result<()> {
        self.send(&Input::StdinEnd)
    }

    /// Sends everything from `source`, then its end.
    ///
    /// # Errors
    /// When `source` cannot be read or the program has ended.
    pub fn type_all(&self, source: &mut dyn Read) -> Result<()> {
        let mut buffer = vec![0; CHUNK];
        loop {
            match source.read(&mut buffer) {
                Ok(0) => return self.send(&Input::StdinEnd),
                Ok(length) => {
                    let bytes = buffer.get(..length).unwrap_or_default();
                    self.send(&Input::Stdin(STANDARD.encode(bytes)))?;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("cannot read the input"),
            }
        }
    }
}

impl Running {
    /// Has this agent start a program; its connection is the program's from then on.
    ///
    /// # Errors
    /// When the agent refuses.
    pub fn begin(mut agent: Agent, wanted: Exec) -> Result<Running> {
        agent.exec(wanted, START_TIMEOUT)?;
        let stream = agent.into_stream()?;
        let input = Keyboard(Arc::new(Mutex::new(stream.get_ref().try_clone()?)));
        Ok(Running { stream, input })
    }

    /// Where its input goes.
    pub fn keyboard(&self) -> Keyboard {
        self.input.clone()
    }

    /// Copies output until the program ends, and gives its exit code.
    ///
    /// # Errors
    /// When the connection breaks, or nobody takes the output.
    pub fn attend(mut self, stdout: &mut dyn Write, stderr: &mut dyn Write) -> Result<i32> {
        loop {
            let Some(line) = lines::next(&mut self.stream)? else {
                bail!("the connection to the guest broke off before the program ended");
            };
            match understood("the guest's output", serde_json::from_slice(&line))? {
                Output::Stdout(text) => put(stdout, &text)?,
                Output::Stderr(text) => put(stderr, &text)?,
                Output::Exit(code) => return Ok(code),
            }
        }
    }
}

fn put(to: &mut dyn Write, text: &str) -> Result<()> {
    let bytes = STANDARD.decode(text).context("the guest's output is not base64")?;
    to.write_all(&bytes).and_then(|()| to.flush()).context("cannot write the output")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_of_no_kind_is_an_error_that_steers_no_terminal() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let lines = "{\"id\":1,\"result\":{}}\n{\"stdout\":\"b2s=\"}\n{\"\\u001b]0;x\\u0007\":\"\"}\n";
        theirs.write_all(lines.as_bytes()).unwrap();
        let running = Running::begin(Agent::over(ours), Exec::default()).unwrap();
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let error = format!("{:#}", running.attend(&mut stdout, &mut stderr).unwrap_err());
        assert_eq!((stdout.as_slice(), stderr.as_slice()), (&b"ok"[..], &b""[..]));
        assert!(error.contains("unknown variant") && !error.contains(char::is_control), "{}", error.escape_debug());
    }
}
