//! Connections to a guest's port: bytes both ways, each end's last word passed on to the other.

use std::cell::Cell;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::rc::Rc;
use std::time::Duration;

use smol::io::{AsyncReadExt, AsyncWriteExt};
use smol::{Async, LocalExecutor, Timer};
use socket2::{SockRef, TcpKeepalive};

use super::Room;

/// Bytes that are read at once; each direction of a connection holds as many.
const PIECE: usize = 16 << 10;
/// Pause after an error that may last, such as too many open files.
const PAUSE: Duration = Duration::from_millis(100);

/// Takes connections and carries them to the guest, until dropped; then all of them are reset.
pub async fn serve(listener: Rc<Async<TcpListener>>, guest: SocketAddr, room: Rc<Room>, open: Rc<Cell<usize>>) {
    let tasks = LocalExecutor::new();
    let own = room.turns_of_one();
    tasks
        .run(async {
            loop {
                let client = match listener.accept().await {
                    Ok((client, _)) => Stream::new(client),
                    Err(_) => {
                        Timer::after(PAUSE).await;
                        continue;
                    }
                };
                // More wait here and in the socket's backlog. One forward alone cannot take the turns of the others.
                let turn = (own.acquire_arc().await, room.connections.acquire_arc().await);
                let (room, open) = (room.clone(), open.clone());
                let task = async move {
                    open.set(open.get() + 1);
                    carry(client, guest, room.limits.connect).await;
                    open.set(open.get() - 1);
                    drop(turn);
                };
                tasks.spawn(task).detach();
                smol::future::yield_now().await;
            }
        })
        .await
}

async fn carry(client: Stream, guest: SocketAddr, limit: Duration) {
    let connect = async { Async::<TcpStream>::connect(guest).await.map(Stream::new) };
    let late = async {
        Timer::after(limit).await;
        Err(io::ErrorKind::TimedOut.into())
    };
    // A client that nobody in the guest wants is reset, which is what it would see there.
    let Ok(server) = smol::future::or(connect, late).await else { return };
    let both = smol::future::try_zip(pump(&client, &server), pump(&server, &client));
    if both.await.is_ok() {
        client.part();
        server.part();
    }
}

/// Carries bytes until one end has said its last, which the other is told.
async fn pump(from: &Stream, to: &Stream) -> io::Result<()> {
    let (mut from, mut to) = (&from.socket, &to.socket);
    let mut buffer = vec![0; PIECE];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return to.get_ref().shutdown(Shutdown::Write);
        }
        to.write_all(&buffer[..length]).await?;
        // One that always has something leaves the others their turn.
        smol::future::yield_now().await;
    }
}

/// One end of a connection. Unless both have said their last it is reset when it is dropped, also by the kernel for a
/// monitor that is killed: a peer must not take what was cut off for the end.
struct Stream {
    socket: Async<TcpStream>,
}

impl Stream {
    fn new(socket: Async<TcpStream>) -> Stream {
        let raw = SockRef::from(&socket);
        // None of this is needed, and nobody could be told that it failed. The probes find a peer that has vanished;
        // they are patient enough for a guest that stands still for a snapshot.
        let _ = raw.set_linger(Some(Duration::ZERO));
        let _ = raw.set_tcp_nodelay(true);
        let alive = TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(15));
        let _ = raw.set_tcp_keepalive(&alive.with_retries(10));
        Stream { socket }
    }

    fn part(&self) {
        let _ = SockRef::from(&self.socket).set_linger(None);
    }
}
