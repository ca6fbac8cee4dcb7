//! The host's end of the emulated vsock. vhost-device-vsock 0.3 stops for good when who asked for a port is gone before
//! the guest has answered (vsock_conn.rs there, VSOCK_OP_RESPONSE): so it is the relay that asks, and it stays.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use anyhow::{Context, Result};

/// Bytes that are passed on at once.
const PIECE: usize = 64 << 10;

/// Listens in the place of vhost-device-vsock until it is dropped.
#[derive(Debug)]
pub struct Relay {
    listener: Arc<UnixListener>,
    files: [PathBuf; 2],
}

/// Where vhost-device-vsock's own socket is.
pub fn behind(socket: &Path) -> PathBuf {
    PathBuf::from(format!("{}.device", socket.display()))
}

impl Relay {
    /// Takes the name of vhost-device-vsock's socket, which listens there. Connections wait until `ready` returns. What
    /// the guest asks of the host goes on under that name, as vhost-device-vsock makes it up by itself.
    ///
    /// # Errors
    /// When the socket cannot be moved or made.
    pub fn start(socket: &Path, ready: impl FnOnce() + Send + 'static) -> Result<Relay> {
        let device = behind(socket);
        std::fs::rename(socket, &device).with_context(|| format!("cannot rename {}", socket.display()))?;
        let listener = UnixListener::bind(socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
        let relay = Relay { listener: Arc::new(listener), files: [socket.to_path_buf(), device.clone()] };
        let listener = relay.listener.clone();
        std::thread::spawn(move || {
            ready();
            // The end is a listener that was shut down.
            while let Ok((client, _)) = listener.accept() {
                let Ok(device) = UnixStream::connect(&device) else { continue };
                let _ = pass(client, device);
            }
        });
        Ok(relay)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
        for file in &self.files {
            let _ = std::fs::remove_file(file);
        }
    }
}

/// Passes on what either says, in threads that end with the connection.
fn pass(client: UnixStream, device: UnixStream) -> std::io::Result<()> {
    let (from_client, to_device) = (client.try_clone()?, device.try_clone()?);
    let (answered, answer) = sync_channel(1);
    std::thread::spawn(move || towards_guest(from_client, to_device, &answer));
    std::thread::spawn(move || towards_host(device, client, &answered));
    Ok(())
}

fn towards_guest(mut client: UnixStream, mut device: UnixStream, answer: &Receiver<()>) {
    let mut buffer = vec![0; PIECE];
    while let Ok(length @ 1..) = client.read(&mut buffer) {
        if device.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    // Not before the guest has answered, or will not.
    let _ = answer.recv();
    let _ = device.shutdown(Shutdown::Write);
}

fn towards_host(mut device: UnixStream, mut client: UnixStream, answered: &SyncSender<()>) {
    let mut buffer = vec![0; PIECE];
    let mut listens = true;
    while let Ok(length @ 1..) = device.read(&mut buffer) {
        let _ = answered.try_send(());
        // Read on when nobody listens any more, so that the guest can end it.
        if listens && client.write_all(&buffer[..length]).is_err() {
            listens = false;
            let _ = client.shutdown(Shutdown::Both);
        }
    }
    let _ = client.shutdown(Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A device that answers late, and tells what it read to the end.
    fn device(socket: &Path) -> std::thread::JoinHandle<Vec<u8>> {
        let listener = UnixListener::bind(socket).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut line = [0; 13];
            stream.read_exact(&mut line).unwrap();
            std::thread::sleep(Duration::from_millis(100));
            stream.write_all(b"OK 1024\n").expect("whoever asked is still there");
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).unwrap();
            stream.write_all(&[1; 1 << 20]).expect("it is read to its end");
            rest
        })
    }

    #[test]
    fn who_gives_up_is_waited_for_by_the_relay() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("v");
        let device = device(&socket);
        let relay = Relay::start(&socket, || {}).unwrap();
        let mut client = UnixStream::connect(&socket).unwrap();
        client.write_all(b"CONNECT 1024\nmore").unwrap();
        drop(client);
        assert_eq!(device.join().unwrap(), b"more");
        drop(relay);
        assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none());
    }

    #[test]
    fn connections_wait_until_it_is_ready_and_bytes_go_both_ways() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("v");
        let device = device(&socket);
        let (go, wait) = sync_channel(1);
        let _relay = Relay::start(&socket, move || wait.recv().unwrap_or(())).unwrap();
        let mut client = UnixStream::connect(&socket).unwrap();
        client.write_all(b"CONNECT 1024\n").unwrap();
        client.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let mut answer = [0; 8];
        assert!(client.read(&mut answer).is_err(), "nothing is passed on yet");
        go.send(()).unwrap();
        client.set_read_timeout(None).unwrap();
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"OK 1024\n");
        client.write_all(b"hello").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).unwrap();
        assert_eq!((rest.len(), device.join().unwrap().as_slice()), (1 << 20, &b"hello"[..]));
    }
}
