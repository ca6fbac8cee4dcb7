//! IPv6 frames as a guest writes them, honest or not.

use std::net::Ipv6Addr;

use crate::traffic::frames;

pub const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
pub const ICMP: u8 = 58;
pub const UDP: u8 = 17;
pub const TCP: u8 = 6;

/// A packet's header, whose payload length may be told wrong (RFC 8200).
#[derive(Clone, Copy)]
pub struct Packet {
    pub source: Ipv6Addr,
    pub target: Ipv6Addr,
    pub next: u8,
    pub hops: u8,
    pub version: u8,
    pub length: Option<u16>,
}

impl Packet {
    pub fn of(source: Ipv6Addr, target: Ipv6Addr, next: u8) -> Packet {
        Packet { source, target, next, hops: 255, version: 6, length: None }
    }

    /// The packet in a frame to all, with something after it by which it is known again.
    pub fn frame(self, mac: [u8; 6], payload: &[u8], mark: &str) -> Vec<u8> {
        let length = self.length.unwrap_or(payload.len() as u16);
        let mut packet = vec![self.version << 4, 0, 0, 0];
        packet.extend(length.to_be_bytes());
        packet.extend([self.next, self.hops]);
        packet.extend(self.source.octets());
        packet.extend(self.target.octets());
        packet.extend(payload);
        packet.extend(mark.bytes());
        frames::ethernet(mac, 0x86dd, &packet)
    }

    /// An ICMPv6 message with its checksum (RFC 4443, section 2.3).
    pub fn icmp(self, kind: u8, code: u8, rest: &[u8]) -> Vec<u8> {
        let mut message = [&[kind, code, 0, 0][..], rest].concat();
        let mut sum: u32 = message.len() as u32 + u32::from(ICMP);
        let all = [&self.source.octets()[..], &self.target.octets(), &message].concat();
        sum += all
            .chunks(2)
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])))
            .sum::<u32>();
        sum = (sum & 0xffff) + (sum >> 16);
        let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
        message[2..4].copy_from_slice(&checksum.to_be_bytes());
        message
    }
}

/// Neighbour discovery about an address, with a MAC or none (RFC 4861, sections 4.3 and 4.4).
pub fn about(target: Ipv6Addr, option: Option<(u8, [u8; 6])>) -> Vec<u8> {
    let mut rest = vec![0x20, 0, 0, 0];
    rest.extend(target.octets());
    if let Some((kind, mac)) = option {
        rest.extend([kind, 1]);
        rest.extend(mac);
    }
    rest
}

/// Ports, as UDP and TCP begin with them, and enough after them for a header.
pub fn ports(source: u16, target: u16) -> Vec<u8> {
    let mut payload = [source.to_be_bytes(), target.to_be_bytes()].concat();
    payload.extend([0, 20, 0, 0]);
    payload.extend([0; 12]);
    payload
}

/// A fragment's header (RFC 8200, section 4.5): what follows, where it belongs, and whether there is more.
pub fn fragment(next: u8, offset: u16, more: bool, payload: &[u8]) -> Vec<u8> {
    let mut header = vec![next, 0];
    header.extend((offset << 3 | u16::from(more)).to_be_bytes());
    header.extend([0, 0, 0, 7]);
    header.extend(payload);
    header
}

/// An extension header of eight bytes.
pub fn extension(next: u8, content: [u8; 6], payload: &[u8]) -> Vec<u8> {
    [&[next, 0][..], &content, payload].concat()
}

/// What stands before a listener's report: a router alert (RFC 2710, section 3).
pub const ROUTER_ALERT: [u8; 6] = [5, 2, 0, 0, 1, 0];
/// Nothing, in six bytes.
pub const PADDING: [u8; 6] = [1, 4, 0, 0, 0, 0];
