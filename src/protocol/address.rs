//! The rule that turns a VM's id into its addresses, shared by the CLI and puterd.
//!
//! The number `id + 10` fills the host part of the IPv4 address and the last three bytes of the MAC, so either one
//! names the VM and nothing has to be stored to answer DHCP.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Distance between a VM's id and its host number: leaves `.1` to the bridge and a few for later.
pub const FIRST_HOST: u32 = 10;
/// The largest id of a VM, which only the widest subnet has.
pub const MAX_ID: u32 = 0xff_fffe - FIRST_HOST;
/// First three bytes of each MAC: QEMU's and KVM's locally administered prefix.
pub const MAC_PREFIX: [u8; 3] = [0x52, 0x54, 0x00];
/// The bridge's MAC: the addressing rule applied to its host number 1. It stays the same whatever ports come and go, so
/// that guests' ARP entries stay right.
pub const BRIDGE_MAC: Mac = Mac([0x52, 0x54, 0x00, 0x00, 0x00, 0x01]);
/// Distance between a VM's id and its vsock context id; 0 to 2 are reserved (linux/vm_sockets.h).
pub const FIRST_CID: u32 = 3;
/// Longest interface name, without the closing NUL (IFNAMSIZ, linux/if.h).
pub const MAX_INTERFACE_NAME: usize = 15;
/// Longest name of a VM: a DNS label (RFC 1035, section 2.3.4).
pub const MAX_VM_NAME: usize = 63;
/// The domain of the VMs.
pub const DOMAIN: &str = "puter";
/// What guests call the machine that they run on, unless a VM is called so.
pub const HOST: &str = "host";
/// What a TAP's name begins with.
pub const TAP_PREFIX: &str = "pt-";

/// An Ethernet address, written as six hexadecimal bytes with colons.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The MAC of the VM with this id.
    pub fn of_id(id: u32) -> Mac {
        let [_, a, b, c] = (id + FIRST_HOST).to_be_bytes();
        let [x, y, z] = MAC_PREFIX;
        Mac([x, y, z, a, b, c])
    }

    /// The id of the VM that has this MAC, `None` for an address that puter never gives.
    pub fn id(self) -> Option<u32> {
        let [x, y, z, a, b, c] = self.0;
        if [x, y, z] != MAC_PREFIX {
            return None;
        }
        u32::from_be_bytes([0, a, b, c]).checked_sub(FIRST_HOST).filter(|id| *id > 0)
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Mac, String> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = part
                .and_then(|p| u8::from_str_radix(p, 16).ok())
                .ok_or_else(|| format!("'{text}' is not a MAC address: six hexadecimal bytes joined by ':'"))?;
        }
        match parts.next() {
            None => Ok(Mac(bytes)),
            Some(_) => Err(format!("'{text}' is not a MAC address: it has more than six bytes")),
        }
    }
}

impl TryFrom<String> for Mac {
    type Error = String;

    fn try_from(text: String) -> Result<Mac, String> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> String {
        mac.to_string()
    }
}

/// The VMs' network: the bridge's own address with the length of its prefix, as in `10.0.0.1/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    network: Ipv4Addr,
    prefix: u8,
}

impl Default for Subnet {
    fn default() -> Subnet {
        Subnet { network: Ipv4Addr::new(10, 0, 0, 0), prefix: 24 }
    }
}

impl Subnet {
    /// The bridge's address, the first host of the network: the guests' gateway and DHCP server.
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.network) + 1)
    }

    /// Length of the prefix in bits, 8 to 27.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// First address of the network.
    pub fn network(self) -> Ipv4Addr {
        self.network
    }

    /// The network's mask.
    pub fn mask(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::MAX << (32 - u32::from(self.prefix)))
    }

    /// Last address of the network, which reaches every host.
    pub fn broadcast(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.network) | !u32::from(self.mask()))
    }

    /// The highest id that still has an address: the last host number is the broadcast address.
    pub fn last_id(self) -> u32 {
        (u32::MAX >> self.prefix) - 1 - FIRST_HOST
    }

    /// The address of the VM with this id; `None` beyond the subnet's last host.
    pub fn address(self, id: u32) -> Option<Ipv4Addr> {
        (1..=self.last_id()).contains(&id).then(|| Ipv4Addr::from(u32::from(self.network) + id + FIRST_HOST))
    }

    /// The id of the VM with this address.
    pub fn id(self, address: Ipv4Addr) -> Option<u32> {
        let id = u32::from(address).checked_sub(u32::from(self.network))?.checked_sub(FIRST_HOST)?;
        self.address(id).map(|_| id)
    }

    /// Whether the address lies in the network.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address) & u32::from(self.mask()) == u32::from(self.network)
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.gateway(), self.prefix)
    }
}

impl FromStr for Subnet {
    type Err = String;

    /// Takes `ADDRESS/PREFIX`, where the address is the network's own or its first host.
    fn from_str(text: &str) -> Result<Subnet, String> {
        let wrong = |why: &str| format!("'{text}' is not a usable subnet: {why}; an example is 10.0.0.1/24");
        let (address, prefix) = text.split_once('/').ok_or_else(|| wrong("it has no /PREFIX"))?;
        let address: Ipv4Addr = address.parse().map_err(|_| wrong("its address is not IPv4"))?;
        let prefix: u8 = prefix.parse().map_err(|_| wrong("its prefix is not a number"))?;
        if !(8..=27).contains(&prefix) {
            return Err(wrong("the prefix must be from 8 to 27"));
        }
        let network = Ipv4Addr::from(u32::from(address) & (u32::MAX << (32 - u32::from(prefix))));
        let subnet = Subnet { network, prefix };
        if address != network && address != subnet.gateway() {
            return Err(wrong("give the network's first address or the one after it, which is the bridge's"));
        }
        if network.is_loopback() || network.is_multicast() || network.is_link_local() || network.octets()[0] == 0 {
            return Err(wrong("that range is reserved"));
        }
        Ok(subnet)
    }
}

impl TryFrom<String> for Subnet {
    type Error = String;

    fn try_from(text: String) -> Result<Subnet, String> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> String {
        subnet.to_string()
    }
}

/// Checks a VM's name: a DNS label in lower case (RFC 1123, section 2.1).
///
/// # Errors
/// A sentence that names the rule which the name breaks.
pub fn check_vm_name(name: &str) -> Result<(), String> {
    let rule = "a name is 1 to 63 of a-z, 0-9 and '-', with no '-' at either end";
    if name.is_empty() {
        return Err(format!("the name is empty; {rule}"));
    }
    if name.len() > MAX_VM_NAME {
        return Err(format!("the name '{name}' has {} characters; {rule}", name.chars().count()));
    }
    if let Some(bad) = name.chars().find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '-')) {
        return Err(format!("the name '{}' contains {bad:?}; {rule}", name.escape_default()));
    }
    if name.starts_with('-') || name.ends_with('-') {
        return Err(format!("the name '{name}' begins or ends with '-'; {rule}"));
    }
    Ok(())
}

/// The name of a VM's TAP: `pt-<name>`, or for a longer name its first six characters, `_` and five digits of a hash.
///
/// A VM's name never holds `_`, so a shortened name cannot equal a whole one; two shortened ones that do collide are
/// told apart by puterd, which keeps the VM's whole name in the interface's alias.
pub fn tap_name(vm: &str) -> String {
    let whole = format!("{TAP_PREFIX}{vm}");
    if whole.len() <= MAX_INTERFACE_NAME {
        return whole;
    }
    format!("{TAP_PREFIX}{}_{}", &vm[..6], short_hash(vm))
}

/// Five digits that stand for the rest of a name that is too long for the kernel. FNV-1a, 32 bits: stable over versions,
/// and no secret depends on it.
pub fn short_hash(name: &str) -> String {
    let hash = name.bytes().fold(0x811c_9dc5_u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
    format!("{:05x}", hash & 0xf_ffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_vm_has_the_documented_addresses() {
        let subnet = Subnet::default();
        assert_eq!(subnet.to_string(), "10.0.0.1/24");
        assert_eq!(subnet.address(1), Some(Ipv4Addr::new(10, 0, 0, 11)));
        assert_eq!(Mac::of_id(1).to_string(), "52:54:00:00:00:0b");
        assert_eq!(Mac::of_id(1).id(), Some(1));
    }

    #[test]
    fn a_subnet_is_full_before_its_broadcast_address() {
        let small = Subnet::default();
        assert_eq!(small.last_id(), 244);
        assert_eq!(small.address(244), Some(Ipv4Addr::new(10, 0, 0, 254)));
        assert_eq!(small.address(245), None);
        assert_eq!(small.address(0), None);
        let wide: Subnet = "10.7.0.0/16".parse().unwrap();
        assert_eq!(wide.last_id(), 65_524);
        assert_eq!(wide.address(65_524), Some(Ipv4Addr::new(10, 7, 255, 254)));
        assert_eq!(wide.broadcast(), Ipv4Addr::new(10, 7, 255, 255));
        assert_eq!(Mac::of_id(65_524).id(), Some(65_524));
    }

    #[test]
    fn every_prefix_is_right_at_its_edges() {
        for prefix in 8..=27u8 {
            for base in
                [Ipv4Addr::new(10, 0, 0, 0), Ipv4Addr::new(172, 31, 255, 255), Ipv4Addr::new(223, 255, 255, 255)]
            {
                let size = 1u64 << (32 - prefix);
                let first = u64::from(u32::from(base)) / size * size;
                let at = |offset: u64| Ipv4Addr::from(u32::try_from(first + offset).unwrap());
                let subnet: Subnet = format!("{}/{prefix}", at(0)).parse().unwrap();
                assert_eq!(subnet.to_string().parse(), Ok(subnet));
                assert_eq!((subnet.network(), subnet.gateway(), subnet.broadcast()), (at(0), at(1), at(size - 1)));
                assert_eq!(u32::from(subnet.mask()).count_ones(), u32::from(prefix));
                assert_eq!(u32::from(subnet.mask()).leading_ones(), u32::from(prefix));
                // The last machine is the one before the broadcast address; each address, MAC and id name the others.
                let last = subnet.last_id();
                assert_eq!(u64::from(last), size - 2 - u64::from(FIRST_HOST));
                assert_eq!(subnet.address(last), Some(at(size - 2)));
                for id in [1, 2, last / 2 + 1, last - 1, last] {
                    let address = subnet.address(id).unwrap();
                    assert!(subnet.contains(address) && address != subnet.gateway() && address != subnet.broadcast());
                    assert_eq!((subnet.id(address), Mac::of_id(id).id()), (Some(id), Some(id)), "{subnet}");
                }
                for id in [0, last + 1, u32::MAX - FIRST_HOST, u32::MAX] {
                    assert_eq!(subnet.address(id), None, "{subnet}: {id}");
                }
                for offset in [0, 1, u64::from(FIRST_HOST), size - 1] {
                    assert_eq!(subnet.id(at(offset)), None, "{subnet}: {}", at(offset));
                }
                let outside = [u32::from(at(0)).checked_sub(1), u32::from(at(size - 1)).checked_add(1)];
                for address in outside.into_iter().flatten().map(Ipv4Addr::from) {
                    assert!(!subnet.contains(address) && subnet.id(address).is_none(), "{subnet}: {address}");
                }
            }
        }
        // Shorter ones are the whole internet, longer ones have no room for a machine beside what is kept free.
        for prefix in [0, 1, 7, 28, 29, 30, 31, 32, 33, 255] {
            assert!(format!("10.0.0.0/{prefix}").parse::<Subnet>().is_err(), "{prefix}");
        }
        assert_eq!("10.0.0.0/27".parse::<Subnet>().unwrap().last_id(), 20);
    }

    #[test]
    fn subnets_that_cannot_work_are_refused_with_the_reason() {
        for (text, why) in [
            ("10.0.0.1", "no /PREFIX"),
            ("10.0.0.1/31", "from 8 to 27"),
            ("10.0.0.7/24", "first address"),
            ("127.0.0.0/8", "reserved"),
            ("fd00::/64", "not IPv4"),
        ] {
            let error = text.parse::<Subnet>().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn macs_of_others_name_no_vm() {
        for text in ["02:00:00:00:00:0b", "52:54:00:00:00:0a", "52:54:00:00:00:00"] {
            assert_eq!(text.parse::<Mac>().unwrap().id(), None, "{text}");
        }
        for text in
            ["52:54:00:00:00", "52:54:00:00:00:0b:0c", "5:254:00:00:00:0b", "52-54-00-00-00-0b", "+2:54:0:0:0:0"]
        {
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
    }

    #[test]
    fn names_are_dns_labels() {
        for good in ["a", "web-1", &"x".repeat(63)] {
            check_vm_name(good).unwrap();
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a.b", "ä", "../x", &"x".repeat(64)] {
            assert!(check_vm_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn tap_names_fit_the_kernel_and_differ() {
        assert_eq!(tap_name("web"), "pt-web");
        assert_eq!(tap_name("exactly-12ch"), "pt-exactly-12ch");
        let (a, b) = (tap_name("a-rather-long-name-1"), tap_name("a-rather-long-name-2"));
        assert_eq!((a.len(), b.len()), (15, 15));
        assert_ne!(a, b);
        assert_eq!(a, tap_name("a-rather-long-name-1"));
    }
}
