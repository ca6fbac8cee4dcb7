//! An HTTP client on a Unix socket: how the CLI reaches puterd and each VM's hypervisor.
//!
//! ureq speaks HTTP; this module gives it a stream that is a Unix socket. The host in a URL is ignored: write
//! `http://localhost/path`.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, Transport, time::Duration as Remaining,
};
use ureq::{Agent, Error, Timeout};

/// Longest path of a Unix socket in bytes: `sun_path` without the closing NUL (unix(7)).
pub const MAX_SOCKET_PATH: usize = 107;

/// An agent whose every request goes to this socket and takes at most `timeout`, from connecting to the last byte of
/// the body. Statuses of 400 and above are answers, not errors. No connection is kept between requests, so that an
/// agent outlives a restart of the server.
pub fn agent(socket: &Path, timeout: Duration) -> Agent {
    let config = Agent::config_builder()
        .timeout_global(Some(timeout))
        .http_status_as_error(false)
        .max_redirects(0)
        .max_idle_connections(0)
        .proxy(None)
        .build();
    Agent::with_parts(config, UnixConnector(socket.to_owned()), NoResolver)
}

/// Connects to a Unix stream socket within `timeout`; a full backlog is waited for.
///
/// # Errors
/// The kernel's, with the socket's path; `TimedOut` where the backlog stays full.
pub fn connect(socket: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let named = |e: io::Error| io::Error::new(e.kind(), format!("cannot connect to {}: {e}", socket.display()));
    let length = socket.as_os_str().len();
    if length > MAX_SOCKET_PATH {
        let why = format!("a Unix socket's path has at most {MAX_SOCKET_PATH} bytes and this one has {length}");
        return Err(named(io::Error::new(io::ErrorKind::InvalidInput, why)));
    }
    let address = SocketAddrUnix::new(socket).map_err(|e| named(e.into()))?;
    // Non-blocking, since a blocking connect waits on a full backlog without limit.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let end = Instant::now() + timeout;
    loop {
        match rustix::net::connect(&fd, &address) {
            Ok(()) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) if Instant::now() < end => thread::sleep(Duration::from_millis(5)),
            Err(rustix::io::Errno::AGAIN) => return Err(named(io::ErrorKind::TimedOut.into())),
            Err(error) => return Err(named(error.into())),
        }
    }
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// The time left as the socket options want it: `None` waits without limit.
fn limit(timeout: NextTimeout) -> Result<Option<Duration>, Error> {
    match timeout.after {
        Remaining::NotHappening => Ok(None),
        Remaining::Exact(Duration::ZERO) => Err(Error::Timeout(timeout.reason)),
        Remaining::Exact(left) => Ok(Some(left)),
    }
}

/// A socket's time limit shows as `WouldBlock`.
fn timed_out(error: io::Error, reason: Timeout) -> Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Error::Timeout(reason),
        _ => Error::Io(error),
    }
}

#[derive(Debug)]
struct UnixConnector(PathBuf);

impl Connector for UnixConnector {
    type Out = UnixTransport;

    fn connect(&self, details: &ConnectionDetails, _: Option<()>) -> Result<Option<UnixTransport>, Error> {
        let timeout = limit(details.timeout)?.unwrap_or(Duration::MAX / 4);
        let stream = connect(&self.0, timeout.min(Duration::from_secs(86400)))
            .map_err(|e| timed_out(e, details.timeout.reason))?;
        let buffers = LazyBuffers::new(details.config.input_buffer_size(), details.config.output_buffer_size());
        Ok(Some(UnixTransport { stream, buffers }))
    }
}

struct UnixTransport {
    stream: UnixStream,
    buffers: LazyBuffers,
}

impl fmt::Debug for UnixTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UnixTransport").field("stream", &self.stream).finish_non_exhaustive()
    }
}

impl Transport for UnixTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        let timeout = timeout.for_write();
        self.stream.set_write_timeout(limit(timeout)?)?;
        let output = &self.buffers.output()[..amount];
        self.stream.write_all(output).map_err(|e| timed_out(e, timeout.reason))
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        let timeout = timeout.for_read();
        self.stream.set_read_timeout(limit(timeout)?)?;
        let input = self.buffers.input_append_buf();
        let amount = loop {
            match self.stream.read(input) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => break other.map_err(|e| timed_out(e, timeout.reason))?,
            }
        };
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    fn is_open(&mut self) -> bool {
        false // Never used for a second request.
    }
}

/// The socket's path is the address, so no name is looked up.
#[derive(Debug)]
struct NoResolver;

impl Resolver for NoResolver {
    fn resolve(
        &self,
        _: &ureq::http::Uri,
        _: &ureq::config::Config,
        _: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, Error> {
        let mut addresses = self.empty();
        addresses.push(([127, 0, 0, 1], 80).into());
        Ok(addresses)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn serve(answer: &'static str) -> (tempfile::TempDir, PathBuf, thread::JoinHandle<String>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            let mut byte = [0];
            while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
                request.push(byte[0]);
            }
            let body = if request.windows(18).any(|w| w.eq_ignore_ascii_case(b"content-length: 7\r")) { 7 } else { 0 };
            let mut rest = vec![0; body];
            stream.read_exact(&mut rest).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
            if answer.is_empty() {
                let _ = stream.read(&mut byte); // Held open until the client gives up.
            }
            request.extend(rest);
            String::from_utf8(request).unwrap()
        });
        (dir, path, server)
    }

    #[test]
    fn a_body_goes_there_and_back() {
        let (_dir, path, server) = serve("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nwell");
        let mut answer = agent(&path, Duration::from_secs(5)).put("http://localhost/api/x").send(r#"{"a":1}"#).unwrap();
        assert_eq!(answer.body_mut().read_to_string().unwrap(), "well");
        let request = server.join().unwrap();
        assert!(request.starts_with("PUT /api/x HTTP/1.1\r\n"), "{request}");
        assert!(request.ends_with(r#"{"a":1}"#), "{request}");
    }

    #[test]
    fn a_status_of_500_is_an_answer() {
        let (_dir, path, server) = serve("HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\nno");
        let mut answer = agent(&path, Duration::from_secs(5)).get("http://localhost/").call().unwrap();
        assert_eq!(answer.status(), 500);
        assert_eq!(answer.body_mut().read_to_string().unwrap(), "no");
        server.join().unwrap();
    }

    #[test]
    fn a_silent_server_ends_in_a_timeout() {
        let (_dir, path, server) = serve("");
        let error = agent(&path, Duration::from_millis(200)).get("http://localhost/").call().unwrap_err();
        assert!(matches!(error, Error::Timeout(_)), "{error}");
        server.join().unwrap();
    }

    #[test]
    fn a_full_backlog_ends_in_a_timeout() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let fd = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&fd, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&fd, 0).unwrap();
        let _first = connect(&path, Duration::from_millis(50)).unwrap();
        let error = connect(&path, Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
    }

    #[test]
    fn errors_name_the_socket() {
        let error = agent(Path::new("/nowhere/s"), Duration::from_secs(1)).get("http://localhost/").call().unwrap_err();
        assert!(error.to_string().contains("cannot connect to /nowhere/s"), "{error}");
        let deep = PathBuf::from(format!("/{}", "d".repeat(107)));
        let error = connect(&deep, Duration::from_secs(1)).unwrap_err();
        assert!(error.to_string().contains("at most 107 bytes and this one has 108"), "{error}");
    }
}
