//! IPv4 routes (rtnetlink(7)) and whether they overlap a subnet.

use std::fmt;
use std::net::Ipv4Addr;

use super::message::{self, Attributes, Message};
use super::{Error, Socket};
use crate::protocol::address::Subnet;

const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const AF_INET: u8 = 2;
/// Size of `struct rtmsg`.
const HEADER: usize = 12;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
/// Shorter prefixes split the default route in parts, as VPNs do; they clash with nothing more than it does.
const DEFAULT_LIKE: u8 = 8;

/// What a route does with a packet (RTN_*); the kernel's own kinds are left out of [`list`].
const RTN_UNICAST: u8 = 1;
const RTN_BLACKHOLE: u8 = 6;
const RTN_UNREACHABLE: u8 = 7;
const RTN_PROHIBIT: u8 = 8;

/// A route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    pub destination: Ipv4Addr,
    /// Length of the destination's prefix in bits.
    pub prefix: u8,
    /// The interface's number, `None` for a route with several hops or none.
    pub index: Option<u32>,
    pub gateway: Option<Ipv4Addr>,
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.destination, self.prefix)?;
        self.gateway.map_or(Ok(()), |gateway| write!(f, " via {gateway}"))
    }
}

/// Whether the two networks share an address.
pub fn overlaps(subnet: Subnet, address: Ipv4Addr, prefix: u8) -> bool {
    let mask = u32::MAX.checked_shl(32 - u32::from(subnet.prefix().min(prefix))).unwrap_or(0);
    u32::from(subnet.network()) & mask == u32::from(address) & mask
}

impl Route {
    /// Whether packets for this subnet would take the route, were it not for a more exact one.
    pub fn clashes(&self, subnet: Subnet) -> bool {
        self.prefix >= DEFAULT_LIKE && overlaps(subnet, self.destination, self.prefix)
    }
}

/// Reads the body of an RTM_NEWROUTE message; `None` for the kernel's own entries for local and broadcast addresses.
pub fn decode(body: &[u8]) -> Option<Route> {
    let (family, prefix, kind) = (*body.first()?, *body.get(1)?, *body.get(7)?);
    if family != AF_INET
        || prefix > 32
        || !matches!(kind, RTN_UNICAST | RTN_BLACKHOLE | RTN_UNREACHABLE | RTN_PROHIBIT)
        || body.len() < HEADER
    {
        return None;
    }
    let mut route = Route { destination: Ipv4Addr::UNSPECIFIED, prefix, index: None, gateway: None };
    for (kind, payload) in message::attributes(body, HEADER) {
        let address = || <[u8; 4]>::try_from(payload).ok().map(Ipv4Addr::from);
        match kind {
            RTA_DST => route.destination = address()?,
            RTA_OIF => route.index = message::u32_at(payload, 0),
            RTA_GATEWAY => route.gateway = address(),
            _ => {}
        }
    }
    Some(route)
}

/// The IPv4 routes of all tables of this network namespace.
///
/// # Errors
/// The kernel's.
pub fn list(socket: &mut Socket) -> Result<Vec<Route>, Error> {
    let mut header = [0; HEADER];
    header[0] = AF_INET;
    let entries = socket.dump(&Message::new(RTM_GETROUTE, 0, &header, Attributes::new()))?;
    Ok(entries.iter().filter(|(kind, _)| *kind == RTM_NEWROUTE).filter_map(|(_, body)| decode(body)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(prefix: u8, kind: u8) -> Vec<u8> {
        let header = [AF_INET, prefix, 0, 0, 254, 3, 0, kind, 0, 0, 0, 0];
        let attributes =
            Attributes::new().bytes(RTA_DST, &[10, 0, 0, 0]).u32(RTA_OIF, 4).bytes(RTA_GATEWAY, &[192, 0, 2, 1]);
        let mut bytes = Vec::new();
        Message::new(RTM_NEWROUTE, 0, &header, attributes).encode(0, 1, &mut bytes);
        bytes[message::HEADER..].to_vec()
    }

    #[test]
    fn a_route_is_read_and_shown() {
        let route = decode(&body(16, RTN_UNICAST)).unwrap();
        assert_eq!(route.index, Some(4));
        assert_eq!(route.to_string(), "10.0.0.0/16 via 192.0.2.1");
        assert_eq!(decode(&body(32, 2)), None, "a local address is no route");
        assert_eq!(decode(&body(33, RTN_UNICAST)), None);
        for cut in 0..HEADER {
            assert_eq!(decode(&body(16, RTN_UNICAST)[..cut]), None, "{cut}");
        }
    }

    #[test]
    fn routes_clash_in_both_directions_but_default_ones_never() {
        let subnet = Subnet::default();
        let clash = |text: &str| {
            let (address, prefix) = text.split_once('/').unwrap();
            let route = Route {
                destination: address.parse().unwrap(),
                prefix: prefix.parse().unwrap(),
                index: None,
                gateway: None,
            };
            route.clashes(subnet)
        };
        for text in ["10.0.0.0/24", "10.0.0.0/8", "10.0.0.128/25", "10.0.0.7/32"] {
            assert!(clash(text), "{text}");
        }
        for text in ["10.0.1.0/24", "10.1.0.0/16", "192.168.0.0/16", "0.0.0.0/0", "0.0.0.0/1"] {
            assert!(!clash(text), "{text}");
        }
    }
}
