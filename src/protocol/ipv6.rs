//! The VMs' IPv6 network, and the rule that turns a MAC into addresses in it.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::address::Mac;

/// Length of the network's prefix, the one with which guests make their own addresses (RFC 4862, section 5.5.3).
pub const PREFIX: u8 = 64;
/// Half of an address.
const HALF: u32 = 64;
/// What the first half of a link-local address is (RFC 4291, section 2.5.6).
const LINK_LOCAL: u64 = 0xfe80 << 48;

/// The half of an address that a MAC makes: `ff:fe` in its midst, and the bit for "unique everywhere" turned around
/// (RFC 4291, appendix A).
pub fn interface_id(mac: Mac) -> u64 {
    let [a, b, c, d, e, f] = mac.0;
    u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

/// The address that a MAC has on its link alone.
pub fn link_local(mac: Mac) -> Ipv6Addr {
    join(LINK_LOCAL, interface_id(mac))
}

fn join(high: u64, low: u64) -> Ipv6Addr {
    Ipv6Addr::from((u128::from(high) << HALF) | u128::from(low))
}

/// A network of 64 bits, written with the bridge's own address in it, as in `fd12:3456:789a::1/64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Network6(u64);

impl Network6 {
    /// A unique local network (RFC 4193) for a bridge: `fd`, 40 bits of a hash of what tells it from all others, and
    /// the subnet 0. The same words make the same network; another `attempt` makes another.
    pub fn unique(machine: &str, uid: u32, bridge: &str, attempt: u32) -> Network6 {
        // The machine's id is to be shown to nobody (machine-id(5)); its hash tells nothing of it.
        let words = format!("puter's IPv6 network\0{machine}\0{uid}\0{bridge}\0{attempt}");
        let hash = Sha256::digest(words.as_bytes());
        Network6(u64::from_be_bytes([0xfd, hash[0], hash[1], hash[2], hash[3], hash[4], 0, 0]))
    }

    /// The network that an address of the bridge's own kind, `…::1`, is in; `None` for any other address.
    pub fn of_gateway(address: Ipv6Addr) -> Option<Network6> {
        let network = Network6((u128::from(address) >> HALF) as u64);
        (address == network.gateway() && network.is_usable()).then_some(network)
    }

    fn is_usable(self) -> bool {
        let first = (self.0 >> 48) as u16;
        // Global unicast addresses and unique local ones (RFC 4291, section 2.4; RFC 4193, section 3).
        first & 0xe000 == 0x2000 || first & 0xfe00 == 0xfc00
    }

    /// Whether it is a unique local network.
    pub fn is_local(self) -> bool {
        self.0 >> 57 == 0xfc >> 1
    }

    /// First address of the network.
    pub fn network(self) -> Ipv6Addr {
        join(self.0, 0)
    }

    /// The bridge's address: the guests' name server.
    pub fn gateway(self) -> Ipv6Addr {
        join(self.0, 1)
    }

    /// The address that the machine with this MAC gives itself.
    pub fn address(self, mac: Mac) -> Ipv6Addr {
        join(self.0, interface_id(mac))
    }

    /// The id of the VM with this address; `None` for one that puter never gives.
    pub fn id(self, address: Ipv6Addr) -> Option<u32> {
        let [a, b, c, 0xff, 0xfe, d, e, f] = (u128::from(address) as u64).to_be_bytes() else { return None };
        let mac = Mac([a ^ 2, b, c, d, e, f]);
        mac.id().filter(|_| self.address(mac) == address)
    }

    /// Whether the address lies in the network.
    pub fn contains(self, address: Ipv6Addr) -> bool {
        (u128::from(address) >> HALF) as u64 == self.0
    }

    /// Whether this network and another one share an address.
    pub fn overlaps(self, address: Ipv6Addr, prefix: u8) -> bool {
        let mask = u128::MAX.checked_shl(128 - u32::from(prefix.min(PREFIX))).unwrap_or(0);
        u128::from(address) & mask == u128::from(self.network()) & mask
    }
}

impl fmt::Display for Network6 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{PREFIX}", self.gateway())
    }
}

impl FromStr for Network6 {
    type Err = String;

    /// Takes `ADDRESS/64`, where the address is the network's own or its first host.
    fn from_str(text: &str) -> Result<Network6, String> {
        let wrong =
            |why: &str| format!("'{text}' is not a usable IPv6 network: {why}; an example is fd12:3456:789a::/64");
        let (address, prefix) = text.split_once('/').ok_or_else(|| wrong("it has no /64"))?;
        let address: Ipv6Addr = address.parse().map_err(|_| wrong("its address is not IPv6"))?;
        if prefix != "64" {
            return Err(wrong("the prefix must be 64, or guests cannot make their addresses"));
        }
        let network = Network6((u128::from(address) >> HALF) as u64);
        if address != network.network() && address != network.gateway() {
            return Err(wrong("give the network's first address or the one after it, which is the bridge's"));
        }
        if !network.is_usable() {
            return Err(wrong("that range is reserved"));
        }
        Ok(network)
    }
}

impl TryFrom<String> for Network6 {
    type Error = String;

    fn try_from(text: String) -> Result<Network6, String> {
        text.parse()
    }
}

impl From<Network6> for String {
    fn from(network: Network6) -> String {
        network.to_string()
    }
}

/// Whether guests have IPv6.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ipv6 {
    /// Where the host has it.
    #[default]
    Auto,
    On,
    Off,
    /// In this network and no other.
    In(Network6),
}

impl fmt::Display for Ipv6 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ipv6::Auto => f.write_str("auto"),
            Ipv6::On => f.write_str("on"),
            Ipv6::Off => f.write_str("off"),
            Ipv6::In(network) => network.fmt(f),
        }
    }
}

impl FromStr for Ipv6 {
    type Err = String;

    fn from_str(text: &str) -> Result<Ipv6, String> {
        match text {
            "auto" => Ok(Ipv6::Auto),
            "on" => Ok(Ipv6::On),
            "off" => Ok(Ipv6::Off),
            other if other.contains([':', '/']) => other.parse().map(Ipv6::In),
            other => Err(format!("'{other}' is none of auto, on, off and a network such as fd12:3456:789a::/64")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mac(text: &str) -> Mac {
        text.parse().unwrap()
    }

    #[test]
    fn a_mac_makes_the_addresses_of_the_rfc() {
        // RFC 2464, section 4.
        assert_eq!(interface_id(mac("34:56:78:9a:bc:de")), 0x3656_78ff_fe9a_bcde);
        assert_eq!(link_local(Mac::of_id(1)), "fe80::5054:ff:fe00:b".parse::<Ipv6Addr>().unwrap());
        let network: Network6 = "fd12:3456:789a::/64".parse().unwrap();
        let address = network.address(Mac::of_id(65_524));
        assert_eq!(address, "fd12:3456:789a:0:5054:ff:fe00:fffe".parse::<Ipv6Addr>().unwrap());
        assert_eq!(network.id(address), Some(65_524));
        for other in ["fd12:3456:789b:0:5054:ff:fe00:fffe", "fd12:3456:789a::1", "fd12:3456:789a:0:5054:ff:fe00:1"] {
            assert_eq!(network.id(other.parse().unwrap()), None, "{other}");
        }
    }

    #[test]
    fn a_network_is_unique_local_and_stays_the_same() {
        let network = Network6::unique("4711", 1000, "puter0", 0);
        assert_eq!(network, Network6::unique("4711", 1000, "puter0", 0));
        assert!(network.is_local() && network.to_string().starts_with("fd"), "{network}");
        assert_eq!(network.to_string().parse(), Ok(network));
        assert_eq!(Network6::of_gateway(network.gateway()), Some(network));
        assert_eq!(Network6::of_gateway(network.network()), None);
        let others = [
            ("4712", 1000, "puter0", 0),
            ("4711", 1001, "puter0", 0),
            ("4711", 1000, "lab0", 0),
            ("4711", 1000, "puter0", 1),
        ];
        for (machine, uid, bridge, attempt) in others {
            assert_ne!(network, Network6::unique(machine, uid, bridge, attempt));
        }
    }

    #[test]
    fn networks_that_cannot_work_are_refused_with_the_reason() {
        for (text, why) in [
            ("fd00::", "no /64"),
            ("fd00::/48", "must be 64"),
            ("fd00::7/64", "first address"),
            ("fe80::/64", "reserved"),
            ("ff02::/64", "reserved"),
            ("::/64", "reserved"),
            ("10.0.0.1/64", "not IPv6"),
        ] {
            let error = text.parse::<Network6>().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
        assert_eq!("fd00:1::1/64".parse::<Ipv6>().unwrap().to_string(), "fd00:1::1/64");
        assert!("maybe".parse::<Ipv6>().unwrap_err().contains("none of auto, on, off"));
    }

    #[test]
    fn overlaps_are_seen_in_both_directions() {
        let network: Network6 = "fd00:1:2:3::/64".parse().unwrap();
        for (address, prefix, expected) in [
            ("fd00:1:2:3::", 64, true),
            ("fd00:1:2::", 48, true),
            ("fd00:1:2:3:8000::", 65, true),
            ("fd00:1:2:3::7", 128, true),
            ("::", 0, true),
            ("fd00:1:2:4::", 64, false),
            ("fd00:1:2:4::1", 128, false),
        ] {
            assert_eq!(network.overlaps(address.parse().unwrap(), prefix), expected, "{address}/{prefix}");
        }
    }
}
