//! A rule as the kernel reads it: a list of expressions which load a value into a register and compare it, as
//! `nft --debug=netlink` shows them.

use std::net::Ipv4Addr;

use super::{Attributes, NFTA_LIST_ELEM};
use crate::protocol::address::{Mac, Subnet};
use crate::protocol::ipv6::Network6;
use crate::protocol::ports::{HostPort, Protocol};

pub(super) const NFPROTO_IPV4: u8 = 2;
pub(super) const NFPROTO_IPV6: u8 = 10;
pub(super) const NFTA_EXPR_NAME: u16 = 1;
pub(super) const NFTA_EXPR_DATA: u16 = 2;
pub(super) const NFTA_DATA_VALUE: u16 = 1;
pub(super) const NFTA_DATA_VERDICT: u16 = 2;
pub(super) const NFTA_VERDICT_CODE: u16 = 1;
pub(super) const NFTA_VERDICT_CHAIN: u16 = 2;
pub(super) const DROP: u32 = 0;
pub(super) const ACCEPT: u32 = 1;
/// NFT_JUMP, which is -3.
const JUMP: u32 = 0xffff_fffd;
/// Where a verdict goes (NFT_REG_VERDICT).
const REGISTER_VERDICT: u32 = 0;
/// The first of the 16-byte registers (NFT_REG_1).
const REGISTER: u32 = 1;
pub(super) const IPPROTO_ICMP: u8 = 1;
pub(super) const IPPROTO_TCP: u8 = 6;
pub(super) const IPPROTO_UDP: u8 = 17;
pub(super) const IPPROTO_ICMPV6: u8 = 58;
/// No packet has it (IANA: reserved).
const IPPROTO_NONE: u8 = 255;

/// One or more expressions of a rule, in order.
#[derive(Clone, Default)]
pub(super) struct Rule(pub(super) Attributes);

/// What a packet is asked for (NFT_META_*).
#[derive(Clone, Copy)]
pub(super) enum Meta {
    /// The frame's EtherType, in network byte order, after a tag.
    EtherType = 1,
    InputName = 6,
    OutputName = 7,
    /// What kind of hardware the frame came from (ARPHRD_*), in the machine's byte order.
    InputType = 8,
    Family = 15,
    Protocol = 16,
    /// Whom the frame is for (PACKET_*), one byte.
    PacketType = 19,
}

/// The verdict that goes through a chain and comes back.
pub(super) fn jump(chain: &str) -> Attributes {
    let verdict = Attributes::new().be32(NFTA_VERDICT_CODE, JUMP).string(NFTA_VERDICT_CHAIN, chain);
    Attributes::new().nest(NFTA_DATA_VERDICT, verdict)
}

impl Rule {
    pub(super) fn new() -> Rule {
        Rule::default()
    }

    pub(super) fn expression(self, name: &str, data: Attributes) -> Rule {
        let element = Attributes::new().string(NFTA_EXPR_NAME, name).nest(NFTA_EXPR_DATA, data);
        Rule(self.0.nest(NFTA_LIST_ELEM, element))
    }

    /// Goes on if the register equals, or with `not` differs from, the value.
    pub(super) fn compare(self, not: bool, value: &[u8]) -> Rule {
        let value = Attributes::new().bytes(NFTA_DATA_VALUE, value);
        self.expression("cmp", Attributes::new().be32(1, REGISTER).be32(2, u32::from(not)).nest(3, value))
    }

    pub(super) fn meta(self, key: Meta, not: bool, value: &[u8]) -> Rule {
        self.expression("meta", Attributes::new().be32(1, REGISTER).be32(2, key as u32)).compare(not, value)
    }

    /// An interface's name fills its register with NULs.
    pub(super) fn interface(self, key: Meta, not: bool, name: &str) -> Rule {
        let mut padded = [0; 16];
        for (to, from) in padded.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        self.meta(key, not, &padded)
    }

    pub(super) fn input(self, name: &str) -> Rule {
        self.interface(Meta::InputName, false, name)
    }

    pub(super) fn output(self, name: &str) -> Rule {
        self.interface(Meta::OutputName, false, name)
    }

    pub(super) fn mask(self, mask: &[u8]) -> Rule {
        let value = |bytes: &[u8]| Attributes::new().bytes(NFTA_DATA_VALUE, bytes);
        let zero = vec![0; mask.len()];
        let data = Attributes::new().be32(1, REGISTER).be32(2, REGISTER).be32(3, mask.len() as u32);
        self.expression("bitwise", data.nest(4, value(mask)).nest(5, value(&zero)))
    }

    /// Loads bytes of the packet; base 0 is the link header, 1 the network header, 2 the transport header
    /// (NFT_PAYLOAD_*).
    pub(super) fn payload(self, base: u32, offset: u32, length: u32) -> Rule {
        let data = Attributes::new().be32(1, REGISTER).be32(2, base).be32(3, offset).be32(4, length);
        self.expression("payload", data)
    }

    /// Goes on if the set holds what the register does.
    fn lookup(self, set: &str) -> Rule {
        self.expression("lookup", Attributes::new().string(1, set).be32(2, REGISTER))
    }

    /// Goes through the chain to which the map leads from what the register holds.
    pub(super) fn go_by(self, map: &str) -> Rule {
        let data = Attributes::new().string(1, map).be32(2, REGISTER).be32(3, REGISTER_VERDICT);
        self.expression("lookup", data)
    }

    /// Goes through the chain to which the map leads from an interface.
    pub(super) fn go_by_interface(self, key: Meta, map: &str) -> Rule {
        self.expression("meta", Attributes::new().be32(1, REGISTER).be32(2, key as u32)).go_by(map)
    }

    /// An interface whose name the set holds.
    pub(super) fn interface_in(self, key: Meta, set: &str) -> Rule {
        self.expression("meta", Attributes::new().be32(1, REGISTER).be32(2, key as u32)).lookup(set)
    }

    /// An interface whose name the set does not hold (NFT_LOOKUP_F_INV).
    pub(super) fn interface_not_in(self, key: Meta, set: &str) -> Rule {
        let inverted = Attributes::new().string(1, set).be32(2, REGISTER).be32(5, 1);
        self.expression("meta", Attributes::new().be32(1, REGISTER).be32(2, key as u32)).expression("lookup", inverted)
    }

    /// A frame from this MAC, or with `not` from any other.
    pub(super) fn source_mac(self, not: bool, mac: Mac) -> Rule {
        self.payload(0, 6, 6).compare(not, &mac.0)
    }

    /// A frame from a MAC that the set holds.
    pub(super) fn source_mac_in(self, set: &str) -> Rule {
        self.payload(0, 6, 6).lookup(set)
    }

    /// An IPv4 packet whose address at this offset of the header is in the set.
    pub(super) fn address_in(self, offset: u32, set: &str) -> Rule {
        self.meta(Meta::Family, false, &[NFPROTO_IPV4]).payload(1, offset, 4).lookup(set)
    }

    /// An IPv6 packet whose address at this offset of the header is in the set.
    pub(super) fn address6_in(self, offset: u32, set: &str) -> Rule {
        self.meta(Meta::Family, false, &[NFPROTO_IPV6]).payload(1, offset, 16).lookup(set)
    }

    /// An IPv6 packet whose source, 8 bytes into the header, lies in the network: half of its bits are the network's.
    pub(super) fn source6(self, network: Network6) -> Rule {
        let half = &network.network().octets()[..8];
        self.meta(Meta::Family, false, &[NFPROTO_IPV6]).payload(1, 8, 8).compare(false, half)
    }

    /// An ICMPv6 message of this type.
    pub(super) fn icmp6(self, kind: u8) -> Rule {
        self.meta(Meta::Family, false, &[NFPROTO_IPV6])
            .meta(Meta::Protocol, false, &[IPPROTO_ICMPV6])
            .payload(2, 0, 1)
            .compare(false, &[kind])
    }

    /// An IPv4 packet whose source, 12 bytes into the header, lies in the subnet.
    pub(super) fn source(self, subnet: Subnet) -> Rule {
        let octets = |address: Ipv4Addr| address.octets();
        self.meta(Meta::Family, false, &[NFPROTO_IPV4])
            .payload(1, 12, 4)
            .mask(&octets(subnet.mask()))
            .compare(false, &octets(subnet.network()))
    }

    pub(super) fn ether_type(self, kind: u16) -> Rule {
        self.meta(Meta::EtherType, false, &kind.to_be_bytes())
    }

    /// By what the frame itself says, 12 bytes into it: the kernel has taken a VLAN's tag off before, and shows it here
    /// alone.
    pub(super) fn frame_type(self, kind: u16) -> Rule {
        self.payload(0, 12, 2).compare(false, &kind.to_be_bytes())
    }

    /// A packet whose header the kernel understood: of any other it loads no protocol.
    pub(super) fn well_formed(self) -> Rule {
        self.meta(Meta::Protocol, true, &[IPPROTO_NONE])
    }

    /// An IPv4 packet that is no fragment: some kernels take a later fragment's first bytes for ports.
    pub(super) fn whole(self) -> Rule {
        self.payload(1, 6, 2).mask(&[0x3f, 0xff]).compare(false, &[0; 2])
    }

    /// A packet to this port of the host.
    pub(super) fn host_port(self, port: HostPort) -> Rule {
        let protocol = match port.protocol {
            Protocol::Tcp => IPPROTO_TCP,
            Protocol::Udp => IPPROTO_UDP,
        };
        self.port(protocol, port.port)
    }

    pub(super) fn source_port(self, protocol: u8, port: u16) -> Rule {
        self.meta(Meta::Protocol, false, &[protocol]).payload(2, 0, 2).compare(false, &port.to_be_bytes())
    }

    pub(super) fn port(self, protocol: u8, port: u16) -> Rule {
        self.meta(Meta::Protocol, false, &[protocol]).payload(2, 2, 2).compare(false, &port.to_be_bytes())
    }

    /// A packet of a connection that exists, or of one that belongs to it (NF_CT_STATE_BIT()).
    pub(super) fn established(self) -> Rule {
        let states: u32 = (1 << 1) | (1 << 2);
        let state = Attributes::new().be32(1, REGISTER).be32(2, 0);
        self.expression("ct", state).mask(&states.to_ne_bytes()).compare(true, &[0; 4])
    }

    pub(super) fn verdict(self, code: u32) -> Rule {
        let verdict = Attributes::new().be32(NFTA_VERDICT_CODE, code);
        let data = Attributes::new().nest(NFTA_DATA_VERDICT, verdict);
        self.expression("immediate", Attributes::new().be32(1, 0).nest(2, data))
    }

    pub(super) fn accept(self) -> Rule {
        self.verdict(ACCEPT)
    }

    pub(super) fn drop(self) -> Rule {
        self.verdict(DROP)
    }
}
