//! Datagrams to a guest's port: each client has a socket of its own to the guest, so that answers find their way back.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::rc::Rc;
use std::time::{Duration, Instant};

use smol::lock::SemaphoreGuardArc;
use smol::{Async, LocalExecutor, Task, Timer};

use super::Room;
use super::table::Table;

/// Pause after an error other than that there is nothing.
const PAUSE: Duration = Duration::from_millis(20);

/// A forward's sockets.
struct Datagrams {
    host: Rc<Async<UdpSocket>>,
    guest: SocketAddr,
    room: Rc<Room>,
    clients: RefCell<Table<Client>>,
    open: Rc<Cell<usize>>,
}

/// A client's socket to the guest, and the task that brings the answers.
struct Client {
    socket: Rc<Async<UdpSocket>>,
    _answers: Task<()>,
    _turn: SemaphoreGuardArc,
}

/// Carries datagrams until dropped.
pub async fn serve(host: Rc<Async<UdpSocket>>, guest: SocketAddr, room: Rc<Room>, open: Rc<Cell<usize>>) {
    let clients = RefCell::new(Table::new(room.limits.idle));
    let all = Rc::new(Datagrams { host, guest, room, clients, open });
    let tasks = LocalExecutor::new();
    let take = async {
        loop {
            match all.take(&tasks) {
                // One that never stops leaves the others their turn.
                Ok(()) => smol::future::yield_now().await,
                Err(error) => wait(&all.host, &error).await,
            }
        }
    };
    tasks.run(take).await
}

/// Waits for more where there is nothing, and a little after any other error.
async fn wait(socket: &Async<UdpSocket>, error: &io::Error) {
    if error.kind() != io::ErrorKind::WouldBlock || socket.readable().await.is_err() {
        Timer::after(PAUSE).await;
    }
}

impl Datagrams {
    /// Passes one datagram on to the guest.
    fn take(self: &Rc<Self>, tasks: &LocalExecutor<'static>) -> io::Result<()> {
        // One buffer for all forwards: nothing waits while it is in use.
        let mut buffer = self.room.datagram.borrow_mut();
        let (length, from) = self.host.get_ref().recv_from(&mut buffer)?;
        let mut clients = self.clients.borrow_mut();
        let now = Instant::now();
        if clients.heard(from, now).is_none() {
            let mut turn = self.room.associations.try_acquire_arc();
            if turn.is_none() {
                drop(clients.evict());
                turn = self.room.associations.try_acquire_arc();
            }
            // Where nobody here can give way the datagram is lost, as on any full network.
            let Some(turn) = turn else { return Ok(()) };
            let socket = Rc::new(self.connect()?);
            let answers = tasks.spawn(self.clone().answer(socket.clone(), from));
            clients.insert(from, now, Client { socket, _answers: answers, _turn: turn });
        }
        if let Some(client) = clients.heard(from, now) {
            // The first try may tell that the guest refused an earlier one. What does not fit its queue is lost.
            let send = || client.socket.get_ref().send(&buffer[..length]);
            if send().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
                let _ = send();
            }
        }
        self.open.set(clients.len());
        Ok(())
    }

    fn connect(&self) -> io::Result<Async<UdpSocket>> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect(self.guest)?;
        Async::new(socket)
    }

    /// Brings what the guest sends back to the client, until there has been nothing either way for a while.
    async fn answer(self: Rc<Self>, socket: Rc<Async<UdpSocket>>, client: SocketAddr) {
        loop {
            let Some(end) = self.expire(client) else { return };
            match self.bring(&socket, client) {
                Ok(()) => smol::future::yield_now().await,
                Err(error) => {
                    let silence = async {
                        Timer::at(end).await;
                    };
                    smol::future::or(wait(&socket, &error), silence).await;
                }
            }
        }
    }

    fn expire(&self, client: SocketAddr) -> Option<Instant> {
        let mut clients = self.clients.borrow_mut();
        let end = clients.expire(client, Instant::now());
        self.open.set(clients.len());
        end
    }

    fn bring(&self, socket: &Async<UdpSocket>, client: SocketAddr) -> io::Result<()> {
        let mut buffer = self.room.datagram.borrow_mut();
        let length = socket.get_ref().recv(&mut buffer)?;
        let _ = self.host.get_ref().send_to(&buffer[..length], client);
        self.clients.borrow_mut().heard(client, Instant::now());
        Ok(())
    }
}
