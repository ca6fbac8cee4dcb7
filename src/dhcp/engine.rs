//! The state machine (RFC 2131, section 4.3).

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use super::message::{Request, Writer, code, kind};
use crate::protocol::address::{Mac, Subnet};
use crate::protocol::daemon::Lease;

/// IP and UDP headers, which the sizes of option 57 and of the MTU include.
const HEADERS: usize = 28;
/// The datagram that every client must take (RFC 2131, section 2).
const MIN_DATAGRAM: usize = 576;
/// An Ethernet frame's payload.
const MAX_DATAGRAM: usize = 1500;

/// What the server tells its clients.
#[derive(Clone, Debug)]
pub struct Config {
    /// The bridge's network; its gateway is router and server identifier.
    pub subnet: Subnet,
    /// How long an address is lent. T1 is half of it and T2 seven eighths (RFC 2131, section 4.4.5).
    pub lease: Duration,
    /// Name servers; none leaves the option out.
    pub dns: Vec<Ipv4Addr>,
    /// The clients' domain, in which they also look up names without a dot.
    pub domain: Option<String>,
    /// The link's MTU in bytes, told only when set.
    pub mtu: Option<u16>,
}

impl Config {
    /// One hour's leases in this network, with no name server, domain or MTU.
    pub fn new(subnet: Subnet) -> Config {
        Config { subnet, lease: Duration::from_secs(3600), dns: Vec::new(), domain: None, mtu: None }
    }
}

/// A machine that may have an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// The VM's name, sent as its host name.
    pub vm: String,
    /// Its address.
    pub ip: Ipv4Addr,
}

/// Knows which machines exist.
pub trait Directory {
    /// The machine with this MAC; `None` gets silence.
    fn host(&self, mac: Mac) -> Option<Host>;
}

/// Where an answer goes, always to UDP port 68.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// Every station on the link.
    Broadcast,
    /// This station, which may not answer ARP for the address yet.
    Unicast { mac: Mac, ip: Ipv4Addr },
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The UDP payload.
    pub payload: Vec<u8>,
    pub to: Destination,
}

struct Held {
    vm: String,
    ip: Ipv4Addr,
    hostname: Option<String>,
    expires: Instant,
}

/// The DHCP server of one bridge, without its sockets.
pub struct Engine {
    config: Config,
    /// Only machines of the directory get in, so their number bounds it.
    held: BTreeMap<Mac, Held>,
}

impl Engine {
    pub fn new(config: Config) -> Engine {
        Engine { config, held: BTreeMap::new() }
    }

    /// From now on clients are told of this name server, and of the domain that it knows.
    pub fn name_server(&mut self, address: Ipv4Addr, domain: &str) {
        self.config.dns = vec![address];
        self.config.domain = Some(domain.to_owned());
    }

    /// The bridge's address, which answers come from.
    pub fn server_id(&self) -> Ipv4Addr {
        self.config.subnet.gateway()
    }

    /// Takes one UDP payload. Malformed, relayed or unknown clients' messages get no answer.
    pub fn handle(&mut self, now: Instant, bytes: &[u8], directory: &dyn Directory) -> Option<Reply> {
        let request = Request::parse(bytes)?;
        // A bridge is one link: whoever claims to be a relay wants packets sent elsewhere.
        if !request.giaddr.is_unspecified() {
            return None;
        }
        let kind = request.kind()?;
        let host = directory.host(request.mac).filter(|host| self.config.subnet.contains(host.ip))?;
        let wanted = request.address(code::REQUESTED_IP).ok()?;
        let server = request.address(code::SERVER_ID).ok()?;
        let ours = server == Some(self.server_id());
        match kind {
            kind::DISCOVER => Some(self.give(&request, &host, kind::OFFER)),
            kind::REQUEST => {
                if server.is_some() && !ours {
                    return None; // SELECTING, and another server was chosen
                }
                // SELECTING and INIT-REBOOT name the address in the option, RENEWING and REBINDING in ciaddr.
                let claimed = wanted.or(Some(request.ciaddr).filter(|ip| !ip.is_unspecified()))?;
                let stale = !request.ciaddr.is_unspecified() && request.ciaddr != host.ip;
                if claimed != host.ip || stale {
                    self.held.remove(&request.mac);
                    return Some(self.refuse(&request));
                }
                self.hold(now, &request, &host);
                Some(self.give(&request, &host, kind::ACK))
            }
            // These must name their server (RFC 2131, table 5). systemd-networkd's release names none; on this link that
            // can only be us.
            kind::DECLINE if (ours || server.is_none()) && wanted == Some(host.ip) => {
                self.held.remove(&request.mac);
                None
            }
            kind::RELEASE if (ours || server.is_none()) && request.ciaddr == host.ip => {
                self.held.remove(&request.mac);
                None
            }
            kind::INFORM if request.ciaddr == host.ip => Some(self.inform(&request, &host)),
            _ => None,
        }
    }

    /// The leases that have not ended.
    pub fn leases(&self, now: Instant) -> Vec<Lease> {
        let live = self.held.iter().filter(|(_, held)| held.expires > now);
        live.map(|(mac, held)| Lease {
            vm: held.vm.clone(),
            mac: *mac,
            ip: held.ip,
            hostname: held.hostname.clone(),
            remaining: held.expires.duration_since(now).as_secs(),
        })
        .collect()
    }

    /// Drops the lease of a machine that is gone.
    pub fn forget(&mut self, mac: Mac) {
        self.held.remove(&mac);
    }

    fn lease_seconds(&self) -> u32 {
        // All ones would mean for ever (RFC 2131, section 3.3).
        u32::try_from(self.config.lease.as_secs()).unwrap_or(u32::MAX).min(u32::MAX - 1)
    }

    fn hold(&mut self, now: Instant, request: &Request, host: &Host) {
        let expires = now + Duration::from_secs(self.lease_seconds().into());
        let hostname = request.option(code::HOSTNAME).and_then(clean_hostname);
        self.held.insert(request.mac, Held { vm: host.vm.clone(), ip: host.ip, hostname, expires });
    }

    /// OFFER or ACK (RFC 2131, table 3).
    fn give(&self, request: &Request, host: &Host, kind: u8) -> Reply {
        let ciaddr = if kind == kind::ACK { request.ciaddr } else { Ipv4Addr::UNSPECIFIED };
        let mut writer = Writer::new(request, ciaddr, host.ip, request.flags, self.limit(request));
        self.head(&mut writer, request, kind);
        let lease = self.lease_seconds();
        writer.option(code::LEASE_TIME, &lease.to_be_bytes());
        writer.option(code::T1, &(lease / 2).to_be_bytes());
        writer.option(code::T2, &(lease - lease / 8).to_be_bytes());
        self.parameters(&mut writer, request, host);
        // A client that has its address is reached there (RFC 2131, section 4.1), whatever it asks for.
        let to = match (ciaddr.is_unspecified(), request.broadcast()) {
            (true, true) => Destination::Broadcast,
            _ => Destination::Unicast { mac: request.mac, ip: host.ip },
        };
        Reply { payload: writer.finish(), to }
    }

    /// ACK to INFORM: no address and no lease (RFC 2131, section 4.3.5).
    fn inform(&self, request: &Request, host: &Host) -> Reply {
        let mut writer =
            Writer::new(request, request.ciaddr, Ipv4Addr::UNSPECIFIED, request.flags, self.limit(request));
        self.head(&mut writer, request, kind::ACK);
        self.parameters(&mut writer, request, host);
        Reply { payload: writer.finish(), to: Destination::Unicast { mac: request.mac, ip: host.ip } }
    }

    /// NAK, broadcast because the client's address may be wrong (RFC 2131, section 4.3.2).
    fn refuse(&self, request: &Request) -> Reply {
        let none = Ipv4Addr::UNSPECIFIED;
        let mut writer = Writer::new(request, none, none, request.flags, self.limit(request));
        self.head(&mut writer, request, kind::NAK);
        writer.option(code::MESSAGE, b"that address is not this machine's");
        Reply { payload: writer.finish(), to: Destination::Broadcast }
    }

    /// What every answer begins with; the client identifier is echoed (RFC 6842).
    fn head(&self, writer: &mut Writer, request: &Request, kind: u8) {
        writer.option(code::MESSAGE_TYPE, &[kind]);
        writer.option(code::SERVER_ID, &self.server_id().octets());
        writer.option(code::CLIENT_ID, request.option(code::CLIENT_ID).unwrap_or_default());
    }

    /// The parameters in the client's order (RFC 2132, section 9.8), or all of them for one that names none.
    fn parameters(&self, writer: &mut Writer, request: &Request, host: &Host) {
        use code::{BROADCAST, DNS, DOMAIN, HOSTNAME, MTU, ROUTER, SEARCH, SUBNET_MASK};
        const ALL: &[u8] = &[SUBNET_MASK, ROUTER, DNS, HOSTNAME, DOMAIN, SEARCH, BROADCAST, MTU];
        let subnet = self.config.subnet;
        let wanted = request.option(code::PARAMETERS).unwrap_or(ALL);
        let mut sent = [false; 256];
        // The mask comes before the router (RFC 2132, section 3.3), whatever was asked.
        let first_router = wanted.iter().position(|c| *c == ROUTER);
        for (at, &option) in wanted.iter().enumerate().chain([(usize::MAX, &SUBNET_MASK)]) {
            let options: &[u8] = if Some(at) == first_router { &[SUBNET_MASK, ROUTER] } else { &[option] };
            for &option in options {
                if std::mem::replace(&mut sent[usize::from(option)], true) {
                    continue;
                }
                match option {
                    SUBNET_MASK => writer.option(option, &subnet.mask().octets()),
                    ROUTER => writer.option(option, &subnet.gateway().octets()),
                    BROADCAST => writer.option(option, &subnet.broadcast().octets()),
                    DNS => {
                        let servers: Vec<u8> = self.config.dns.iter().take(63).flat_map(|ip| ip.octets()).collect();
                        writer.option(option, &servers);
                    }
                    HOSTNAME => writer.option(option, host.vm.as_bytes()),
                    DOMAIN => writer.option(option, self.config.domain.as_deref().unwrap_or_default().as_bytes()),
                    SEARCH => writer.option(option, &self.config.domain.as_deref().map_or(Vec::new(), encoded)),
                    MTU => writer.option(option, self.config.mtu.map(u16::to_be_bytes).as_ref().map_or(&[], |v| v)),
                    _ => {}
                }
            }
        }
    }

    /// The largest payload that this client takes and the link carries.
    fn limit(&self, request: &Request) -> usize {
        let asked = match request.option(code::MAX_SIZE) {
            Some([a, b]) => usize::from(u16::from_be_bytes([*a, *b])),
            _ => MIN_DATAGRAM,
        };
        let link = self.config.mtu.map_or(MAX_DATAGRAM, usize::from).clamp(MIN_DATAGRAM, MAX_DATAGRAM);
        asked.clamp(MIN_DATAGRAM, link) - HEADERS
    }
}

/// A domain as DNS writes it, which is how a search list holds it (RFC 3397).
fn encoded(domain: &str) -> Vec<u8> {
    let labels = domain.split('.').filter(|label| (1..=63).contains(&label.len()));
    let mut bytes: Vec<u8> = labels.flat_map(|label| [&[label.len() as u8], label.as_bytes()].concat()).collect();
    bytes.push(0);
    bytes
}

/// A guest's name for itself, kept only if it is a host name (RFC 1123, section 2.1): it is shown to people.
fn clean_hostname(bytes: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(bytes).ok()?.trim_end_matches('\0');
    let plain = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    (text.len() <= 253 && text.split('.').all(plain)).then(|| text.to_owned())
}
