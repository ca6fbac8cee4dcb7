//! Routes (rtnetlink(7)) and whether they overlap a subnet.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::family::Family;
use super::message::{self, Attributes, Message};
use super::{Error, Socket};
use crate::protocol::address::Subnet;
use crate::protocol::ipv6::Network6;

const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
/// Size of `struct rtmsg`.
const HEADER: usize = 12;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
/// Shorter prefixes split the default route in parts, as VPNs do; they clash with nothing more than it does.
const DEFAULT_LIKE: u8 = 8;
/// The same for IPv6: whole kinds of addresses, such as fd00::/8, are no clash with one network in them.
const DEFAULT_LIKE_6: u8 = 16;
/// A route to so much of IPv6 leads to the internet; 2000::/3 is all of it that is in use.
const INTERNET: u8 = 3;

/// What a route does with a packet (RTN_*); the kernel's own kinds are left out of [`list`].
const RTN_UNICAST: u8 = 1;
const RTN_BLACKHOLE: u8 = 6;
const RTN_UNREACHABLE: u8 = 7;
const RTN_PROHIBIT: u8 = 8;

/// A route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route<A = Ipv4Addr> {
    pub destination: A,
    /// Length of the destination's prefix in bits.
    pub prefix: u8,
    /// The interface's number, `None` for a route with several hops or none.
    pub index: Option<u32>,
    pub gateway: Option<A>,
    /// Whether packets go somewhere by it; others refuse them.
    pub passes: bool,
}

impl<A: Family> fmt::Display for Route<A> {
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

impl Route<Ipv6Addr> {
    /// Whether packets for this network would take the route, were it not for a more exact one.
    pub fn clashes(&self, network: Network6) -> bool {
        self.prefix >= DEFAULT_LIKE_6 && network.overlaps(self.destination, self.prefix)
    }

    /// Whether it leads to the internet, by another interface than this one.
    pub fn leads_out(&self, own: u32) -> bool {
        self.passes && self.prefix <= INTERNET && self.index != Some(own)
    }
}

/// Reads the body of an RTM_NEWROUTE message; `None` for one of another family, and for the kernel's own entries for
/// local and broadcast addresses.
pub fn decode<A: Family>(body: &[u8]) -> Option<Route<A>> {
    let (family, prefix, kind) = (*body.first()?, *body.get(1)?, *body.get(7)?);
    if family != A::NUMBER
        || prefix > A::BITS
        || !matches!(kind, RTN_UNICAST | RTN_BLACKHOLE | RTN_UNREACHABLE | RTN_PROHIBIT)
        || body.len() < HEADER
    {
        return None;
    }
    let passes = kind == RTN_UNICAST;
    let mut route = Route { destination: A::UNSPECIFIED, prefix, index: None, gateway: None, passes };
    for (kind, payload) in message::attributes(body, HEADER) {
        let address = || A::read(payload);
        match kind {
            RTA_DST => route.destination = address()?,
            RTA_OIF => route.index = message::u32_at(payload, 0),
            RTA_GATEWAY => route.gateway = address(),
            _ => {}
        }
    }
    Some(route)
}

/// The routes of this family in all tables of this network namespace.
///
/// # Errors
/// The kernel's.
pub fn list<A: Family>(socket: &mut Socket) -> Result<Vec<Route<A>>, Error> {
    let mut header = [0; HEADER];
    header[0] = A::NUMBER;
    let entries = socket.dump(&Message::new(RTM_GETROUTE, 0, &header, Attributes::new()))?;
    Ok(entries.iter().filter(|(kind, _)| *kind == RTM_NEWROUTE).filter_map(|(_, body)| decode(body)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(prefix: u8, kind: u8) -> Vec<u8> {
        let header = [Ipv4Addr::NUMBER, prefix, 0, 0, 254, 3, 0, kind, 0, 0, 0, 0];
        let attributes =
            Attributes::new().bytes(RTA_DST, &[10, 0, 0, 0]).u32(RTA_OIF, 4).bytes(RTA_GATEWAY, &[192, 0, 2, 1]);
        let mut bytes = Vec::new();
        Message::new(RTM_NEWROUTE, 0, &header, attributes).encode(0, 1, &mut bytes);
        bytes[message::HEADER..].to_vec()
    }

    #[test]
    fn a_route_is_read_and_shown() {
        let route = decode::<Ipv4Addr>(&body(16, RTN_UNICAST)).unwrap();
        assert_eq!(route.index, Some(4));
        assert_eq!(route.to_string(), "10.0.0.0/16 via 192.0.2.1");
        assert_eq!(decode::<Ipv4Addr>(&body(32, 2)), None, "a local address is no route");
        assert_eq!(decode::<Ipv4Addr>(&body(33, RTN_UNICAST)), None);
        assert_eq!(decode::<Ipv6Addr>(&body(16, RTN_UNICAST)), None, "of the other family");
        for cut in 0..HEADER {
            assert_eq!(decode::<Ipv4Addr>(&body(16, RTN_UNICAST)[..cut]), None, "{cut}");
        }
    }

    #[test]
    fn routes_clash_in_both_directions_but_default_ones_never() {
        let subnet = Subnet::default();
        let clash = |text: &str| {
            let (address, prefix) = text.split_once('/').unwrap();
            let route = Route::<Ipv4Addr> {
                destination: address.parse().unwrap(),
                prefix: prefix.parse().unwrap(),
                index: None,
                gateway: None,
                passes: true,
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

    #[test]
    fn only_what_leads_elsewhere_leads_out() {
        let route = |text: &str, index, passes| {
            let (address, prefix) = text.split_once('/').unwrap();
            let (destination, prefix) = (address.parse::<Ipv6Addr>().unwrap(), prefix.parse().unwrap());
            Route { destination, prefix, index, gateway: None, passes }
        };
        assert!(route("::/0", Some(2), true).leads_out(5) && route("2000::/3", None, true).leads_out(5));
        assert!(!route("::/0", Some(5), true).leads_out(5), "by the bridge itself");
        assert!(!route("::/0", Some(1), false).leads_out(5), "it refuses");
        assert!(!route("fd00::/8", Some(2), true).leads_out(5));
        let network = "fd00:1:2:3::/64".parse().unwrap();
        assert!(route("fd00:1::/32", None, true).clashes(network));
        assert!(
            !route("fd00::/8", None, true).clashes(network) && !route("fd00:1:2:4::/64", None, true).clashes(network)
        );
    }
}
