//! The sockets around the state machine.
//!
//! Requests arrive on a UDP socket bound to the bridge, so the kernel keeps those of other interfaces away. Answers
//! leave as IP packets on a packet socket: a client without an address answers no ARP, and one with an address is
//! reached at the MAC that the request came for, whatever the neighbour table was made to believe.

use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use async_io::{Async, Timer};
use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, eth};
use socket2::{Domain, Socket, Type};

use super::engine::{Destination, Directory, Engine, Reply};

/// UDP port of servers (RFC 2131, section 4.1).
pub const SERVER_PORT: u16 = 67;
/// UDP port of clients.
pub const CLIENT_PORT: u16 = 68;
/// How often a quiet server looks whether its bridge was made anew.
const CHECK_EVERY: Duration = Duration::from_secs(1);
/// Longest pause between attempts after errors.
const MAX_BACKOFF: Duration = Duration::from_secs(30);

/// The DHCP server on one bridge.
pub struct Server {
    interface: String,
    engine: Arc<Mutex<Engine>>,
    directory: Arc<dyn Directory + Send + Sync>,
    first: Mutex<Option<Sockets>>,
}

struct Sockets {
    udp: Async<UdpSocket>,
    packet: OwnedFd,
    index: u32,
}

impl Server {
    /// Opens the sockets on a bridge that exists, in the calling thread's network namespace.
    ///
    /// # Errors
    /// The interface is missing, a capability is missing, or another DHCP server holds the port.
    pub fn bind(
        interface: &str,
        engine: Arc<Mutex<Engine>>,
        directory: Arc<dyn Directory + Send + Sync>,
    ) -> Result<Server> {
        let first = Mutex::new(Some(Sockets::open(interface)?));
        Ok(Server { interface: interface.to_owned(), engine, directory, first })
    }

    /// Serves until dropped. Errors are logged and the sockets opened again, later and later: the bridge may come back.
    pub async fn run(&self) {
        let mut sockets = self.first.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut backoff = CHECK_EVERY;
        loop {
            let opened = match sockets.take() {
                Some(sockets) => Ok(sockets),
                None => Sockets::open(&self.interface),
            };
            let error = match opened {
                Ok(sockets) => {
                    let since = Instant::now();
                    let error = self.serve(&sockets).await;
                    if since.elapsed() > MAX_BACKOFF {
                        backoff = CHECK_EVERY;
                    }
                    error
                }
                Err(error) => error,
            };
            // Not eprintln!, which ends the process where nobody reads the log any more.
            let said =
                format!("puterd: DHCP on {}: {error:#}; trying again in {} s\n", self.interface, backoff.as_secs());
            let _ = io::stderr().write_all(said.as_bytes());
            Timer::after(backoff).await;
            backoff = (backoff * 2).min(MAX_BACKOFF);
        }
    }

    async fn serve(&self, sockets: &Sockets) -> anyhow::Error {
        let mut buffer = [0; 2048];
        let mut checked = Instant::now();
        loop {
            let received = smol::future::or(async { sockets.udp.recv_from(&mut buffer).await.map(Some) }, async {
                Timer::after(CHECK_EVERY).await;
                Ok(None)
            })
            .await;
            match received {
                // Port 0 and longer messages than the buffer are nobody's; parsing refuses what was cut off.
                Ok(Some((length, _))) => self.answer(sockets, buffer.get(..length).unwrap_or_default()),
                Ok(None) => {}
                Err(error) => return anyhow::Error::new(error).context("cannot receive"),
            }
            if checked.elapsed() >= CHECK_EVERY {
                checked = Instant::now();
                match rustix::net::netdevice::name_to_index(&sockets.packet, &self.interface) {
                    Ok(index) if index == sockets.index => {}
                    Ok(_) => return anyhow::anyhow!("the interface was made anew"),
                    Err(error) => return anyhow::Error::new(error).context("the interface is gone"),
                }
            }
        }
    }

    /// Answers one message. An answer that cannot be sent is lost, as on any network; the client asks again.
    fn answer(&self, sockets: &Sockets, bytes: &[u8]) {
        let mut engine = self.engine.lock().unwrap_or_else(PoisonError::into_inner);
        let reply = engine.handle(Instant::now(), bytes, &*self.directory);
        let source = engine.server_id();
        drop(engine);
        let Some(reply) = reply else { return };
        let _ = sockets.send(source, &reply);
    }
}

impl Sockets {
    fn open(interface: &str) -> Result<Sockets> {
        let udp = Socket::new(Domain::IPV4, Type::DGRAM, None).context("cannot open a UDP socket")?;
        udp.set_reuse_address(true)?;
        udp.set_broadcast(true)?;
        let index = rustix::net::netdevice::name_to_index(&udp, interface)
            .with_context(|| format!("cannot find the interface {interface}"))?;
        udp.bind_device(Some(interface.as_bytes()))
            .with_context(|| format!("cannot bind a socket to {interface} (it needs CAP_NET_RAW)"))?;
        udp.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, SERVER_PORT)).into()).with_context(|| {
            format!("cannot listen on UDP port {SERVER_PORT} of {interface} (it needs CAP_NET_BIND_SERVICE and no other DHCP server there)")
        })?;
        let udp = Async::new(UdpSocket::from(udp)).context("cannot watch the UDP socket")?;
        // Protocol 0: this socket only sends.
        let packet = rustix::net::socket_with(AddressFamily::PACKET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
            .context("cannot open a packet socket (it needs CAP_NET_RAW)")?;
        Ok(Sockets { udp, packet, index })
    }

    fn send(&self, source: Ipv4Addr, reply: &Reply) -> io::Result<()> {
        let (station, ip) = match reply.to {
            Destination::Broadcast => ([0xff; 6], Ipv4Addr::BROADCAST),
            Destination::Unicast { mac, ip } => (mac.0, ip),
        };
        let Some(packet) = udp_packet(source, ip, &reply.payload) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let [a, b, c, d, e, f] = station;
        let to = LinkAddress {
            family: AddressFamily::PACKET.as_raw(),
            // Already in network order, in the low half.
            protocol: eth::IP.as_raw().get() as u16,
            index: self.index.cast_signed(),
            hardware: 0,
            kind: 0,
            length: 6,
            address: [a, b, c, d, e, f, 0, 0],
        };
        rustix::net::sendto(&self.packet, &packet, SendFlags::DONTWAIT, &to)?;
        Ok(())
    }
}

/// `struct sockaddr_ll` (linux/if_packet.h).
#[repr(C)]
struct LinkAddress {
    family: u16,
    protocol: u16,
    index: i32,
    hardware: u16,
    kind: u8,
    length: u8,
    address: [u8; 8],
}

// SAFETY: the pointer is to a live value of the kernel's layout, without padding, and the length is its size.
unsafe impl SocketAddrArg for LinkAddress {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        f(std::ptr::from_ref(self).cast(), size_of::<LinkAddress>() as SocketAddrLen)
    }
}

/// An IPv4 packet (RFC 791) with a UDP datagram (RFC 768) from the server's port to the client's.
fn udp_packet(from: Ipv4Addr, to: Ipv4Addr, payload: &[u8]) -> Option<Vec<u8>> {
    let udp_length = u16::try_from(payload.len().checked_add(8)?).ok()?;
    let total = udp_length.checked_add(20)?;
    let mut ip = Vec::with_capacity(total.into());
    ip.extend([0x45, 0x10]);
    ip.extend(total.to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    ip.extend(from.octets());
    ip.extend(to.octets());
    let header_sum = checksum(&[&ip]).to_be_bytes();
    ip[10..12].copy_from_slice(&header_sum);
    let mut udp = Vec::with_capacity(8);
    udp.extend(SERVER_PORT.to_be_bytes());
    udp.extend(CLIENT_PORT.to_be_bytes());
    udp.extend(udp_length.to_be_bytes());
    udp.extend([0, 0]);
    let [high, low] = udp_length.to_be_bytes();
    let sum = checksum(&[&from.octets(), &to.octets(), &[0, 17, high, low], &udp, payload]);
    // Zero would mean that there is no checksum.
    udp[6..].copy_from_slice(&(if sum == 0 { u16::MAX } else { sum }).to_be_bytes());
    ip.extend(udp);
    ip.extend(payload);
    Some(ip)
}

/// The Internet checksum (RFC 1071); every part but the last has an even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let sum =
        words.fold(0u32, |sum, word| sum + u32::from(u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)])));
    let sum = (sum >> 16) + (sum & 0xffff);
    !((sum + (sum >> 16)) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_of_a_whole_packet_verify_to_zero() {
        for payload in [&b"even"[..], b"odd"] {
            let packet = udp_packet(Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::BROADCAST, payload).unwrap();
            assert_eq!(checksum(&[&packet[..20]]), 0);
            let length = packet[24..26].to_vec();
            assert_eq!(checksum(&[&packet[12..20], &[0, 17], &length, &packet[20..]]), 0);
        }
    }
}
