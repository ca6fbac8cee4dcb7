//! The socket around it: ICMPv6 on the bridge.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use async_io::{Async, Timer};
use rustix::net::{RecvFlags, SendFlags};
use smol::channel::Receiver;
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use super::message::SOLICITATION;
use super::{Advertisement, Advertiser};

/// All machines of a link, and all its routers (RFC 4291, section 2.7.1).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
/// What no router has passed on (RFC 4861, section 4.2).
const HOPS: u32 = 255;
/// After an error that may last, such as a bridge that is down.
const PAUSE: Duration = Duration::from_secs(1);
const MAX_MESSAGE: usize = 2048;

/// The router of one bridge.
pub struct Server {
    socket: Async<Socket>,
    index: u32,
    content: Advertisement,
    /// Tells whether there is a way to the outside, each time that it changes.
    ways: Receiver<bool>,
}

enum Event {
    Came(Vec<u8>, Ipv6Addr),
    Way(bool),
    Time,
    Failed,
}

impl Server {
    /// Opens the socket on a bridge that exists.
    ///
    /// # Errors
    /// When a capability is missing, or the kernel has no IPv6.
    pub fn bind(interface: &str, index: u32, content: Advertisement, ways: Receiver<bool>) -> Result<Server> {
        let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))
            .context("cannot open an ICMPv6 socket (it needs CAP_NET_RAW)")?;
        socket.attach_filter(&solicitations()).context("cannot filter an ICMPv6 socket")?;
        socket.bind_device(Some(interface.as_bytes())).with_context(|| format!("cannot bind to {interface}"))?;
        socket.set_multicast_hops_v6(HOPS)?;
        socket.set_unicast_hops_v6(HOPS)?;
        socket.set_multicast_loop_v6(false)?;
        socket.set_multicast_if_v6(index)?;
        socket.join_multicast_v6(&ALL_ROUTERS, index).context("cannot join the routers' group")?;
        let socket = Async::new(socket).context("cannot watch the ICMPv6 socket")?;
        Ok(Server { socket, index, content, ways })
    }

    /// Serves until nobody can tell of ways any more.
    pub async fn run(self) {
        let mut advertiser = Advertiser::new(self.content, Instant::now());
        loop {
            let event = smol::future::or(self.receive(), smol::future::or(self.way(), self.time(advertiser.due())));
            let Some(event) = event.await else { return };
            let now = Instant::now();
            match event {
                Event::Came(bytes, from) => {
                    if let Some(guest) = advertiser.receive(&bytes, from, now, random()) {
                        self.send(&advertiser, guest);
                    }
                }
                Event::Way(router) => advertiser.set_router(router, now),
                Event::Time => {}
                Event::Failed => drop(Timer::after(PAUSE).await),
            }
            if advertiser.tick(Instant::now(), random()) {
                self.send(&advertiser, ALL_NODES);
            }
        }
    }

    async fn receive(&self) -> Option<Event> {
        let read = |socket: &Socket| {
            let mut buffer = [0; MAX_MESSAGE];
            let (length, _, from) = rustix::net::recvfrom(socket, &mut buffer, RecvFlags::DONTWAIT)?;
            let from = from.and_then(|from| SocketAddrV6::try_from(from).ok());
            Ok((buffer[..length].to_vec(), from))
        };
        Some(match self.socket.read_with(read).await {
            Ok((bytes, Some(from))) => Event::Came(bytes, *from.ip()),
            Ok(_) => Event::Time,
            Err(_) => Event::Failed,
        })
    }

    async fn way(&self) -> Option<Event> {
        self.ways.recv().await.ok().map(Event::Way)
    }

    async fn time(&self, due: Instant) -> Option<Event> {
        Timer::at(due).await;
        Some(Event::Time)
    }

    /// A message that cannot be sent is lost, as on any network; there will be others.
    fn send(&self, advertiser: &Advertiser, to: Ipv6Addr) {
        let to = SocketAddrV6::new(to, 0, 0, self.index);
        let _ = rustix::net::sendto(self.socket.get_ref(), &advertiser.message(), SendFlags::DONTWAIT, &to);
    }
}

fn random() -> u32 {
    let mut bytes = [0; 4];
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    u32::from_ne_bytes(bytes)
}

/// Lets the kernel drop all other messages of ICMPv6, of which guests can send many: the first byte is looked at
/// (linux/filter.h, linux/bpf_common.h).
fn solicitations() -> [SockFilter; 4] {
    const LOAD_BYTE: u16 = 0x30;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    [
        SockFilter::new(LOAD_BYTE, 0, 0, 0),
        SockFilter::new(JUMP_IF_EQUAL, 0, 1, SOLICITATION.into()),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
        SockFilter::new(RETURN, 0, 0, 0),
    ]
}
