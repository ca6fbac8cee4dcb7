//! The host's end of a guest's vsock: a Unix socket on which one asks for a port.
//!
//! The protocol is Firecracker's, as cloud-hypervisor's docs/vsock.md describes it: `CONNECT <port>\n`, answered by
//! `OK <host port>\n`; after that the bytes are the guest's.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::protocol::unix_http;

/// The longest answer to CONNECT, in bytes.
const MAX_ANSWER: usize = 32;
/// How often a wait looks whether it is still wanted.
const TURN: Duration = Duration::from_millis(200);

/// Connects to a port of the guest.
///
/// # Errors
/// When nobody listens there, the answer does not come within `timeout`, or `cancelled` becomes true.
pub fn connect(socket: &Path, port: u32, timeout: Duration, cancelled: &AtomicBool) -> Result<UnixStream> {
    let end = Instant::now() + timeout;
    let mut stream = unix_http::connect(socket, timeout)?;
    stream.set_write_timeout(Some(timeout))?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).context("cannot ask for the guest's port")?;
    let mut answer = Vec::new();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "the guest's port {port} did not answer within {timeout:?}");
        ensure!(!cancelled.load(Ordering::Relaxed), "interrupted");
        stream.set_read_timeout(Some(left.min(TURN)))?;
        // One byte at a time: what follows the line belongs to the caller.
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(0) => bail!("nobody listens on the guest's port {port}"),
            Ok(_) if byte == *b"\n" => break,
            Ok(_) => answer.extend(byte),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("cannot read the vsock socket's answer"),
        }
        ensure!(answer.len() <= MAX_ANSWER, "the vsock socket's answer to CONNECT is too long");
    }
    ensure!(answer.starts_with(b"OK "), "the vsock socket refuses the guest's port {port}");
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn answering(answer: &'static [u8]) -> Result<UnixStream> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 13];
            stream.read_exact(&mut request).unwrap();
            assert_eq!(&request, b"CONNECT 1024\n");
            stream.write_all(answer).unwrap();
            stream // Kept open until the client has read.
        });
        let result = connect(&path, 1024, Duration::from_millis(300), &AtomicBool::new(false));
        drop(server.join().unwrap());
        result
    }

    #[test]
    fn what_follows_the_answer_is_left_to_the_caller() {
        let mut stream = answering(b"OK 1073741824\nhello").unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "hello");
    }

    #[test]
    fn other_answers_are_refused() {
        for bad in [&b"NO\n"[..], b"OK", b"\n", b"OKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOK"] {
            assert!(answering(bad).is_err(), "{bad:?}");
        }
        assert!(connect(Path::new("/nowhere"), 1, Duration::from_secs(1), &AtomicBool::new(false)).is_err());
    }
}
