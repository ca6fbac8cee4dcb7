//! What a hostile guest may try, frame by frame: none of it leaves its TAP.

use std::net::{Ipv4Addr, UdpSocket};

use puter::protocol::daemon::{Status, Tap};

use crate::lab::Lab;
use crate::traffic::frames::{self, Sender};

/// By which a frame is known again.
const MARK: &str = "hostile-frame";

/// An IPv4 packet without options, whose header says what it is told to.
struct Packet {
    first: u8,
    length: Option<u16>,
    fragment: u16,
    protocol: u8,
    source: Ipv4Addr,
}

impl Packet {
    fn with(&self, payload: &[u8]) -> Vec<u8> {
        let length = self.length.unwrap_or(20 + payload.len() as u16);
        let mut packet = vec![self.first, 0];
        for value in [length, 7, self.fragment] {
            packet.extend(value.to_be_bytes());
        }
        packet.extend([64, self.protocol, 0, 0]);
        packet.extend(self.source.octets());
        packet.extend([10, 0, 0, 12]);
        let sum: u32 = packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        let checksum = !(((sum & 0xffff) + (sum >> 16)) as u16);
        packet[10..12].copy_from_slice(&checksum.to_be_bytes());
        packet.extend(payload);
        packet
    }
}

fn ports(source: u16, destination: u16) -> Vec<u8> {
    let mut payload = Vec::new();
    for value in [source, destination, 8 + MARK.len() as u16, 0] {
        payload.extend(value.to_be_bytes());
    }
    payload.extend(MARK.bytes());
    payload
}

/// An ICMPv6 router advertisement (RFC 4861), as far as a filter looks.
fn advertisement() -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 16 + MARK.len() as u8, 58, 255, 0xfe, 0x80];
    packet.extend([0; 13]);
    packet.push(1);
    packet.extend([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    packet.extend([134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0]);
    packet.extend(MARK.bytes());
    packet
}

fn tagged(tag: u16, inner: u16, payload: &[u8]) -> Vec<u8> {
    [&tag.to_be_bytes()[..], &inner.to_be_bytes(), payload].concat()
}

fn hostile(own: Sender) -> Vec<(&'static str, Vec<u8>)> {
    let other = Sender { mac: [0x52, 0x54, 0, 0, 0, 0x0d], ip: Ipv4Addr::new(10, 0, 0, 13) };
    let gateway = Ipv4Addr::new(10, 0, 0, 1);
    let victim = Ipv4Addr::new(10, 0, 0, 12);
    let raw = |kind: u16, payload: &[u8]| frames::ethernet(own.mac, kind, payload);
    let ip = |packet: Packet, payload: &[u8]| raw(0x0800, &packet.with(payload));
    let plain = |source| Packet { first: 0x45, length: None, fragment: 0, protocol: 17, source };
    let spoofed = plain(other.ip).with(&ports(1000, 2000));
    let honest = plain(own.ip).with(&ports(1000, 2000));
    // So that an ARP packet is known again, it has something after it, as frames may have.
    let arp = |operation, outer, sender, target| {
        let mut frame = frames::arp_of(operation, outer, sender, target);
        frame.extend(MARK.bytes());
        frame
    };
    let mut odd_arp = arp(1, own.mac, own, victim);
    odd_arp[28] = 8; // The length of a hardware address.
    let bpdu = [&[0, 38, 0x42, 0x42, 3, 0, 0, 0, 0, 0][..], &[0; 30], MARK.as_bytes()].concat();
    let length_in_place_of_a_type = u16::from_be_bytes([bpdu[0], bpdu[1]]);
    vec![
        ("another's MAC", frames::udp(Sender { mac: other.mac, ..own }, 1000, (victim, 2000), MARK)),
        ("another's address", raw(0x0800, &spoofed)),
        ("the gateway's address", ip(plain(gateway), &ports(53, 2000))),
        ("an ARP request as another", arp(1, own.mac, Sender { ip: other.ip, ..own }, victim)),
        ("an ARP reply as the gateway", arp(2, own.mac, Sender { ip: gateway, ..own }, victim)),
        ("an ARP reply with another's MAC", arp(2, own.mac, Sender { mac: other.mac, ..own }, victim)),
        ("a gratuitous ARP for another", arp(1, own.mac, Sender { ip: other.ip, ..own }, other.ip)),
        ("a probe for another's address", arp(1, own.mac, Sender { ip: Ipv4Addr::UNSPECIFIED, ..own }, victim)),
        ("ARP with another length of addresses", odd_arp),
        ("a DHCP server's answer", ip(plain(own.ip), &ports(67, 68))),
        ("one from another port", ip(plain(own.ip), &ports(1000, 68))),
        ("one with a length beyond the packet's", ip(Packet { length: Some(900), ..plain(own.ip) }, &ports(67, 68))),
        ("one with a header too short", ip(Packet { first: 0x44, ..plain(own.ip) }, &ports(67, 68))),
        ("one of another version", ip(Packet { first: 0x55, ..plain(own.ip) }, &ports(67, 68))),
        ("one in a first fragment", ip(Packet { fragment: 0x2000, ..plain(own.ip) }, &ports(67, 68))),
        ("DHCP from no address to a client", ip(plain(Ipv4Addr::UNSPECIFIED), &ports(68, 68))),
        ("another's first fragment", ip(Packet { fragment: 0x2000, ..plain(other.ip) }, &ports(1000, 2000))),
        ("another's second fragment", ip(Packet { fragment: 1, ..plain(other.ip) }, &ports(1000, 2000))),
        ("a fragment from no address", ip(Packet { fragment: 1, ..plain(Ipv4Addr::UNSPECIFIED) }, &ports(68, 67))),
        ("a router advertisement", raw(0x86dd, &advertisement())),
        ("a tagged frame with another's address", raw(0x8100, &tagged(5, 0x0800, &spoofed))),
        ("a tagged frame with its own", raw(0x8100, &tagged(5, 0x0800, &honest))),
        ("a frame with a service tag", raw(0x88a8, &tagged(5, 0x0800, &honest))),
        ("a frame with two tags", raw(0x88a8, &tagged(5, 0x8100, &tagged(6, 0x0800, &spoofed)))),
        ("a frame with a priority alone", raw(0x8100, &tagged(0xe000, 0x0800, &spoofed))),
        ("LLDP", raw(0x88cc, MARK.as_bytes())),
        ("IPX", raw(0x8137, MARK.as_bytes())),
        ("PPPoE", raw(0x8863, MARK.as_bytes())),
        ("a bridge's BPDU", frames::to([1, 0x80, 0xc2, 0, 0, 0], raw(length_in_place_of_a_type, &bpdu[2..]))),
        ("a BPDU to all", raw(length_in_place_of_a_type, &bpdu[2..])),
    ]
}

#[test]
#[ignore = "needs root"]
fn nothing_hostile_leaves_a_tap() {
    nothing_hostile_comes_through(&[]);
}

#[test]
#[ignore = "needs root"]
fn nothing_hostile_comes_to_a_further_bridge() {
    nothing_hostile_comes_through(&["--bridge-ports", "2"]);
}

fn nothing_hostile_comes_through(args: &[&str]) {
    let lab = Lab::new();
    let daemon = lab.start(args);
    let made: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"web","id":1}"#);
    let _: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"db","id":2}"#);
    let (tap, peer) = (frames::take(&lab, "pt-web"), frames::take(&lab, "pt-db"));
    let own = Sender { mac: made.mac.0, ip: made.ip };
    let further = lab.host("ip -o link show pt-db").contains("master puter0-1 ");
    assert_eq!(further, !args.is_empty());
    let host = frames::inside(lab.host_holder(), || UdpSocket::bind("10.0.0.1:0").unwrap());
    lab.host("ip neigh replace 10.0.0.12 lladdr 52:54:00:00:00:0c dev puter0 nud permanent");
    let comes = |frame: &[u8]| {
        frames::drain(&peer);
        frames::send(&tap, &[frame.to_vec()]);
        let came = frames::drain_after(&peer, &host, Ipv4Addr::new(10, 0, 0, 12));
        came.iter().any(|f| String::from_utf8_lossy(f).contains(MARK))
    };
    let honest = frames::udp(own, 1000, (Ipv4Addr::new(10, 0, 0, 12), 2000), MARK);
    assert!(comes(&honest), "or the test proves nothing");
    // br_netfilter would drop some of these for reasons of its own.
    lab.attempt(lab.host_holder(), "echo 0 >/proc/sys/net/bridge/bridge-nf-call-iptables");
    for (what, frame) in hostile(own) {
        assert!(!comes(&frame), "{what} came through");
    }
    let known = lab.host("ip neigh show dev puter0");
    assert!(!known.contains("10.0.0.13") && !known.contains("52:54:00:00:00:0d"), "the host believed it: {known}");
    assert!(comes(&honest));
    // Each of them comes through where there is no filter: so it is the filter that stopped it.
    daemon.freeze(true);
    lab.host("nft delete table netdev puter");
    for (what, frame) in hostile(own) {
        assert!(comes(&frame), "{what} is stopped by something else");
    }
    daemon.freeze(false);
}

#[test]
#[ignore = "needs root"]
fn the_hosts_ports_are_open_as_puterd_is_told() {
    let lab = Lab::new();
    let daemon = lab.start(&["--host-port", "tcp/8080", "--host-port", "udp/7000"]);
    let status: Status = lab.json("GET", "/v1/status", "");
    assert_eq!(puter::protocol::ports::show_list(&status.host_ports), "tcp/8080,udp/7000");
    let _open = lab.web_server(lab.host_holder(), "0.0.0.0:8080", "open");
    let _closed = lab.web_server(lab.host_holder(), "0.0.0.0:8081", "closed");
    let guest = lab.guest("g1", "10.0.0.200");
    let connects = |port: u16| {
        let ask = format!("socat -u OPEN:/dev/null TCP:10.0.0.1:{port},connect-timeout=2");
        lab.attempt(&guest, &ask).1
    };
    assert!(connects(8080) && !connects(8081));
    let rules = lab.host("nft list chain inet puter input");
    assert!(rules.contains("tcp dport 8080 accept") && rules.contains("udp dport 7000 accept"), "{rules}");
    // Without the option the next puterd closes them.
    daemon.stop(rustix::process::Signal::TERM);
    let _daemon = lab.start(&[]);
    assert!(!connects(8080));
}
