//! The sockets around it: UDP and TCP on the bridge.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use async_io::{Async, Timer};
use simple_dns::RCODE;
use smol::LocalExecutor;
use smol::io::AsyncWriteExt;
use socket2::{Domain, Socket, Type};

use super::upstream::{Upstream, framed, read_framed, within};
use super::{Names, Outcome, handle, refusal};

const PORT: u16 = 53;
/// Longest query by UDP, in bytes: a name, and what EDNS adds.
const MAX_QUERY: usize = 4096;
/// Questions of all guests that the host's servers are asked at the same time, and those of one guest.
const MAX_ASKED: usize = 256;
const MAX_ASKED_OF_ONE: usize = 64;
/// Connections at the same time, and those of one guest.
const MAX_CONNECTIONS: usize = 64;
const MAX_CONNECTIONS_OF_ONE: usize = 8;
/// How long a connection may be silent.
const IDLE: Duration = Duration::from_secs(10);
const BACKLOG: i32 = 16;
/// After an error that may last, such as too many open files.
const PAUSE: Duration = Duration::from_millis(200);

/// The DNS server on one bridge.
pub struct Server {
    /// One pair for each address of the bridge.
    sockets: Vec<(UdpSocket, TcpListener)>,
    names: Arc<dyn Names + Send + Sync>,
    resolv_conf: PathBuf,
}

/// What the tasks of one server share; they run on one thread.
struct Shared {
    names: Arc<dyn Names + Send + Sync>,
    upstream: Upstream,
    asked: Turns,
    connections: Turns,
}

/// The addresses at which the server answers.
fn own(names: &dyn Names) -> Vec<IpAddr> {
    let six = names.network6().map(|network| network.gateway().into());
    [Some(names.subnet().gateway().into()), six].into_iter().flatten().collect()
}

impl Server {
    /// Opens the sockets on a bridge that exists and has its address; others reach neither.
    ///
    /// # Errors
    /// When a capability is missing, or another server holds the port.
    pub fn bind(interface: &str, names: Arc<dyn Names + Send + Sync>, resolv_conf: PathBuf) -> Result<Server> {
        let open = |address: SocketAddr, kind: Type, what: &str| -> Result<Socket> {
            let socket = Socket::new(Domain::for_address(address), kind, None)
                .with_context(|| format!("cannot open a {what} socket"))?;
            socket.set_reuse_address(kind == Type::STREAM)?;
            socket
                .bind_device(Some(interface.as_bytes()))
                .with_context(|| format!("cannot bind a socket to {interface} (it needs CAP_NET_RAW)"))?;
            socket.bind(&address.into()).with_context(|| {
                format!("cannot listen on {what} {address} (it needs CAP_NET_BIND_SERVICE and no other server there)")
            })?;
            Ok(socket)
        };
        let pair = |address: IpAddr| -> Result<(UdpSocket, TcpListener)> {
            let address = SocketAddr::from((address, PORT));
            let tcp = open(address, Type::STREAM, "TCP")?;
            tcp.listen(BACKLOG)?;
            Ok((open(address, Type::DGRAM, "UDP")?.into(), tcp.into()))
        };
        let sockets = own(&*names).into_iter().map(pair).collect::<Result<_>>()?;
        Ok(Server { sockets, names, resolv_conf })
    }

    /// Serves until dropped. What fails costs one answer, never the server.
    ///
    /// # Errors
    /// When the sockets cannot be watched.
    pub async fn run(self) -> Result<()> {
        let shared = Rc::new(Shared {
            upstream: Upstream::new(self.resolv_conf, own(&*self.names)),
            names: self.names,
            asked: Turns::new(MAX_ASKED, MAX_ASKED_OF_ONE),
            connections: Turns::new(MAX_CONNECTIONS, MAX_CONNECTIONS_OF_ONE),
        });
        let tasks = Rc::new(LocalExecutor::new());
        for (udp, tcp) in self.sockets {
            let udp = Rc::new(Async::new(udp).context("cannot watch the UDP socket")?);
            let tcp = Async::new(tcp).context("cannot watch the TCP socket")?;
            tasks.spawn(datagrams(Rc::downgrade(&tasks), shared.clone(), udp)).detach();
            tasks.spawn(connections(Rc::downgrade(&tasks), shared.clone(), tcp)).detach();
        }
        // None of them ends.
        tasks.run(std::future::pending()).await
    }
}

/// Where a task puts what it begins; those who are in it do not keep it.
type Tasks = Weak<LocalExecutor<'static>>;

async fn datagrams(tasks: Tasks, shared: Rc<Shared>, udp: Rc<Async<UdpSocket>>) {
    let mut buffer = vec![0; MAX_QUERY];
    loop {
        let Some((length, from)) = patiently(udp.recv_from(&mut buffer).await, "UDP").await else { continue };
        // A guest that floods us leaves the others their turns.
        smol::future::yield_now().await;
        let Some(guest) = shared.guest(from) else { continue };
        let query = &buffer[..length];
        match handle(query, &*shared.names, Some(guest)) {
            Outcome::Ignore => {}
            Outcome::Answer(answer) => drop(udp.get_ref().send_to(&answer, from)),
            Outcome::Forward => {
                let Some(turn) = shared.asked.take(guest) else {
                    let _ = udp.get_ref().send_to(&refusal(query, RCODE::ServerFailure), from);
                    continue;
                };
                let (shared, udp, query) = (shared.clone(), udp.clone(), query.to_vec());
                let work = async move {
                    let answer = shared.upstream.ask(&query).await;
                    let answer = answer.unwrap_or_else(|_| refusal(&query, RCODE::ServerFailure));
                    // One that cannot be sent is lost, as on any network; the guest asks again.
                    let _ = udp.get_ref().send_to(&answer, from);
                    drop(turn);
                };
                let Some(tasks) = tasks.upgrade() else { return };
                tasks.spawn(work).detach();
            }
        }
    }
}

async fn connections(tasks: Tasks, shared: Rc<Shared>, tcp: Async<TcpListener>) {
    loop {
        let Some((stream, from)) = patiently(tcp.accept().await, "TCP").await else { continue };
        let Some(guest) = shared.guest(from) else { continue };
        let Some(turn) = shared.connections.take(guest) else { continue };
        let shared = shared.clone();
        let work = async move {
            let _ = shared.converse(stream, guest).await;
            drop(turn);
        };
        let Some(tasks) = tasks.upgrade() else { return };
        tasks.spawn(work).detach();
    }
}

impl Shared {
    /// The guest that a message came from, by its IPv4 address whichever it used: nobody else is answered.
    fn guest(&self, from: SocketAddr) -> Option<IpAddr> {
        match from.ip() {
            IpAddr::V4(address) => self.names.subnet().contains(address).then_some(address.into()),
            IpAddr::V6(address) => {
                let network = self.names.network6().filter(|network| network.contains(address))?;
                let known = network.id(address).and_then(|id| self.names.subnet().address(id));
                Some(known.map_or(address.into(), IpAddr::V4))
            }
        }
    }

    /// One connection of a guest, question by question.
    async fn converse(&self, mut stream: Async<TcpStream>, guest: IpAddr) -> Result<()> {
        let read = async |stream: &mut Async<TcpStream>| Ok(read_framed(stream).await?);
        while let Some(query) = within(IDLE, read(&mut stream)).await? {
            let answer = match handle(&query, &*self.names, Some(guest)) {
                Outcome::Ignore => return Ok(()),
                Outcome::Answer(answer) => answer,
                Outcome::Forward => match self.upstream.ask_by_tcp(&query).await {
                    Ok(answer) => answer,
                    Err(_) => refusal(&query, RCODE::ServerFailure),
                },
            };
            let bytes = framed(&answer)?;
            within(IDLE, async { Ok(stream.write_all(&bytes).await?) }).await?;
        }
        Ok(())
    }
}

/// Waits a little after an error, so that one that lasts costs no processor.
async fn patiently<T>(result: io::Result<T>, what: &str) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            // Not eprintln!, which ends the process where nobody reads the log any more.
            let _ = io::stderr().write_all(format!("puterd: DNS by {what}: {error}\n").as_bytes());
            Timer::after(PAUSE).await;
            None
        }
    }
}

/// How many may be at something at the same time, in all and of one guest.
struct Turns {
    taken: Rc<RefCell<HashMap<IpAddr, usize>>>,
    most: usize,
    most_of_one: usize,
}

/// A turn that ends when it is dropped.
struct Turn {
    taken: Rc<RefCell<HashMap<IpAddr, usize>>>,
    guest: IpAddr,
}

impl Turns {
    fn new(most: usize, most_of_one: usize) -> Turns {
        Turns { taken: Rc::default(), most, most_of_one }
    }

    fn take(&self, guest: IpAddr) -> Option<Turn> {
        let mut taken = self.taken.borrow_mut();
        let own = taken.get(&guest).copied().unwrap_or(0);
        if own >= self.most_of_one || taken.values().sum::<usize>() >= self.most {
            return None;
        }
        taken.insert(guest, own + 1);
        Some(Turn { taken: self.taken.clone(), guest })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut taken = self.taken.borrow_mut();
        match taken.get_mut(&self.guest) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(taken.remove(&self.guest)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_bounded_and_come_back() {
        let turns = Turns::new(3, 2);
        let guest = |last| IpAddr::from([10, 0, 0, last]);
        let first = turns.take(guest(1)).unwrap();
        let second = turns.take(guest(1)).unwrap();
        assert!(turns.take(guest(1)).is_none(), "of one");
        let _third = turns.take(guest(2)).unwrap();
        assert!(turns.take(guest(3)).is_none(), "in all");
        drop(first);
        assert!(turns.take(guest(3)).is_some());
        drop(second);
        assert_eq!(turns.taken.borrow().len(), 1);
    }
}
