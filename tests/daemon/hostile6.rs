//! The same by IPv6: what a hostile guest may try, and what an honest one must be able to.

use std::net::Ipv6Addr;

use puter::protocol::address::Mac;
use puter::protocol::daemon::Tap;
use puter::protocol::ipv6::link_local;

use crate::ipv6::frames6::{
    ALL_NODES, ICMP, PADDING, Packet, ROUTER_ALERT, TCP, UDP, about, extension, fragment, ports,
};
use crate::lab::Lab;
use crate::traffic::frames;

const MARK: &str = "hostile-frame";
const OTHER_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0x0d];
const NONE: Ipv6Addr = Ipv6Addr::UNSPECIFIED;

/// A guest's two addresses, and those of others.
#[derive(Clone, Copy)]
struct Who {
    mac: [u8; 6],
    global: Ipv6Addr,
    local: Ipv6Addr,
    other: Ipv6Addr,
    other_local: Ipv6Addr,
    gateway: Ipv6Addr,
}

type Frames = Vec<(&'static str, Vec<u8>)>;

fn honest(who: Who) -> Frames {
    let packet = |source, next| Packet::of(source, who.other, next);
    let raw = |packet: Packet, payload: &[u8]| packet.frame(who.mac, payload, MARK);
    let icmp = |packet: Packet, kind: u8, rest: &[u8]| raw(packet, &packet.icmp(kind, 0, rest));
    let all = |source| Packet::of(source, ALL_NODES, ICMP);
    let own = Some((1, who.mac));
    let report = |packet: Packet, kind: u8, rest: &[u8]| {
        let packet = Packet { next: 0, hops: 1, ..packet };
        raw(packet, &extension(ICMP, ROUTER_ALERT, &packet.icmp(kind, 0, rest)))
    };
    let group = [&[0; 4][..], &[0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0, 0, 0x0b]].concat();
    let group =
        |packet: Packet, kind| report(Packet { target: "ff02::1:ff00:b".parse().unwrap(), ..packet }, kind, &group);
    let echo = packet(who.global, ICMP).icmp(128, 0, &[0, 1, 0, 1, 1, 2, 3, 4]);
    vec![
        ("TCP", raw(packet(who.global, TCP), &ports(1000, 80))),
        ("UDP", raw(packet(who.global, UDP), &ports(1000, 80))),
        ("UDP on the link", raw(packet(who.local, UDP), &ports(546, 547))),
        ("echo", raw(packet(who.global, ICMP), &echo)),
        ("an error", icmp(packet(who.global, ICMP), 1, &[0; 52])),
        ("a solicitation", icmp(all(who.global), 135, &about(who.other, own))),
        ("one without a MAC", icmp(all(who.local), 135, &about(who.other, None))),
        ("its advertisement", icmp(all(who.global), 136, &about(who.global, Some((2, who.mac))))),
        ("that of the link", icmp(all(who.local), 136, &about(who.local, Some((2, who.mac))))),
        ("one without a MAC", icmp(all(who.global), 136, &about(who.global, None))),
        ("the question whether another has its address", icmp(all(NONE), 135, &about(who.global, None))),
        ("one with a nonce", icmp(all(NONE), 135, &about(who.local, Some((14, [1, 2, 3, 4, 5, 6]))))),
        ("a router's solicitation", icmp(all(who.local), 133, &[0; 4])),
        ("one from nowhere", icmp(all(NONE), 133, &[0; 4])),
        ("a report", group(all(who.local), 131)),
        ("its end", group(all(who.local), 132)),
        ("a report from nowhere", report(Packet { target: "ff02::16".parse().unwrap(), ..all(NONE) }, 143, &[0; 4])),
        ("ESP", raw(packet(who.global, 50), &[0; 32])),
        ("SCTP", raw(packet(who.global, 132), &ports(1, 2))),
        ("a first fragment", raw(packet(who.global, 44), &fragment(UDP, 0, true, &ports(1000, 80)))),
        ("one of TCP", raw(packet(who.global, 44), &fragment(TCP, 0, true, &ports(1000, 80)))),
        ("one of echo", raw(packet(who.global, 44), &fragment(ICMP, 0, true, &echo))),
        ("a later fragment", raw(packet(who.global, 44), &fragment(UDP, 100, false, &[0; 16]))),
    ]
}

fn hostile(who: Who) -> Frames {
    let packet = |source, next| Packet::of(source, who.other, next);
    let raw = |packet: Packet, payload: &[u8]| packet.frame(who.mac, payload, MARK);
    let all = |source| Packet::of(source, ALL_NODES, ICMP);
    let icmp = |packet: Packet, kind: u8, rest: &[u8]| raw(packet, &packet.icmp(kind, 0, rest));
    let advertisement = [&[64, 0, 7, 8][..], &[0; 8]].concat();
    let router = |packet: Packet| packet.icmp(134, 0, &advertisement);
    let redirect = [&[0; 4][..], &who.local.octets(), &who.other.octets()].concat();
    let query = {
        let packet = Packet { next: 0, hops: 1, ..all(who.local) };
        let rest = [&[0x03, 0xe8, 0, 0][..], &[0; 16], &[2, 125, 0, 0]].concat();
        raw(packet, &extension(ICMP, ROUTER_ALERT, &packet.icmp(130, 0, &rest)))
    };
    let own = packet(who.global, ICMP);
    let dhcp = ports(547, 546);
    let routed = |kind: u8, next, payload: &[u8]| extension(next, [kind, 0, 0, 0, 0, 0], payload);
    let twice = extension(60, PADDING, &extension(ICMP, PADDING, &router(own)));
    vec![
        ("another's MAC", packet(who.global, UDP).frame(OTHER_MAC, &ports(1, 2), MARK)),
        ("another's address", raw(packet(who.other, UDP), &ports(1, 2))),
        ("another's address on the link", raw(packet(who.other_local, UDP), &ports(1, 2))),
        ("the gateway's address", raw(packet(who.gateway, UDP), &ports(53, 2))),
        ("an address of the outside", raw(packet("2001:db8::7".parse().unwrap(), TCP), &ports(1, 2))),
        ("UDP from nowhere", raw(packet(NONE, UDP), &ports(1, 2))),
        ("TCP from nowhere", raw(packet(NONE, TCP), &ports(1, 2))),
        ("echo from nowhere", icmp(packet(NONE, ICMP), 128, &[0; 4])),
        ("a router advertisement", raw(all(who.local), &router(all(who.local)))),
        ("one with its other address", raw(all(who.global), &router(all(who.global)))),
        ("one in a first fragment", raw(packet(who.local, 44), &fragment(ICMP, 0, true, &router(own)))),
        ("one in the only fragment", raw(packet(who.local, 44), &fragment(ICMP, 0, false, &router(own)))),
        ("one behind an extension header", raw(packet(who.local, 60), &extension(ICMP, PADDING, &router(own)))),
        ("one behind two", raw(packet(who.local, 60), &twice)),
        ("one behind a router alert", raw(packet(who.local, 0), &extension(ICMP, ROUTER_ALERT, &router(own)))),
        (
            "one behind a router alert, with one hop",
            raw(Packet { hops: 1, ..packet(who.local, 0) }, &extension(ICMP, ROUTER_ALERT, &router(own))),
        ),
        ("one behind a header for routing", raw(packet(who.local, 43), &routed(0, ICMP, &router(own)))),
        (
            "one in a fragment behind an extension header",
            raw(packet(who.local, 60), &extension(44, PADDING, &fragment(ICMP, 0, false, &router(own)))),
        ),
        (
            "one behind an extension header in a fragment",
            raw(packet(who.local, 44), &fragment(60, 0, false, &extension(ICMP, PADDING, &router(own)))),
        ),
        (
            "one with a length beyond the packet's",
            raw(Packet { length: Some(900), ..all(who.local) }, &router(all(who.local))),
        ),
        ("one of another version", raw(Packet { version: 4, ..all(who.local) }, &router(all(who.local)))),
        ("a redirect", icmp(all(who.local), 137, &redirect)),
        ("a query for listeners", query),
        ("a report without the router alert", icmp(Packet { hops: 1, ..all(who.local) }, 143, &[0; 4])),
        ("an advertisement for another", icmp(all(who.global), 136, &about(who.other, Some((2, who.mac))))),
        (
            "one for another's address on the link",
            icmp(all(who.local), 136, &about(who.other_local, Some((2, who.mac)))),
        ),
        ("one for the gateway", icmp(all(who.local), 136, &about(who.gateway, Some((2, who.mac))))),
        ("one with another's MAC", icmp(all(who.global), 136, &about(who.global, Some((2, OTHER_MAC))))),
        (
            "one with two MACs",
            icmp(all(who.global), 136, &[&about(who.global, Some((2, who.mac)))[..], &[2, 1], &OTHER_MAC].concat()),
        ),
        (
            "one in a fragment",
            raw(packet(who.global, 44), &fragment(ICMP, 0, false, &own.icmp(136, 0, &about(who.other, None)))),
        ),
        ("a solicitation with another's MAC", icmp(all(who.global), 135, &about(who.other, Some((1, OTHER_MAC))))),
        ("the question whether another has its own address", icmp(all(NONE), 135, &about(who.other, None))),
        ("one that came from afar", icmp(Packet { hops: 64, ..all(who.global) }, 135, &about(who.other, None))),
        ("a DHCP server's answer", raw(packet(who.local, UDP), &dhcp)),
        ("one from another port", raw(packet(who.local, UDP), &ports(1000, 546))),
        ("one to another port", raw(packet(who.local, UDP), &ports(547, 1000))),
        ("one in a first fragment", raw(packet(who.local, 44), &fragment(UDP, 0, true, &dhcp))),
        ("one behind an extension header", raw(packet(who.local, 60), &extension(UDP, PADDING, &dhcp))),
        ("one behind a header for routing", raw(packet(who.local, 43), &routed(0, UDP, &dhcp))),
        ("routing by the packet", raw(packet(who.global, 43), &routed(0, TCP, &ports(1, 2)))),
        ("hop by hop", raw(packet(who.global, 0), &extension(TCP, PADDING, &ports(1, 2)))),
        ("another's fragment", raw(packet(who.other, 44), &fragment(UDP, 100, false, &[0; 16]))),
        ("a fragment from nowhere", raw(packet(NONE, 44), &fragment(UDP, 0, true, &ports(1, 2)))),
        ("a tunnel", raw(packet(who.global, 41), &[0x60; 48])),
        ("a node's information", icmp(packet(who.global, ICMP), 139, &[0; 12])),
    ]
}

#[test]
#[ignore = "needs root"]
fn nothing_hostile_leaves_a_tap_by_ipv6_and_what_is_honest_does() {
    let lab = Lab::new();
    let daemon = lab.start(&["--ipv6", "fd00:1:2:3::/64"]);
    let made: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"web","id":1}"#);
    let peer: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"db","id":2}"#);
    assert_eq!(made.ip6, Some("fd00:1:2:3:5054:ff:fe00:b".parse().unwrap()));
    let (tap, to) = (frames::take(&lab, "pt-web"), frames::take(&lab, "pt-db"));
    let who = Who {
        mac: made.mac.0,
        global: made.ip6.unwrap(),
        local: link_local(made.mac),
        other: peer.ip6.unwrap(),
        other_local: link_local(Mac::of_id(2)),
        gateway: "fd00:1:2:3::1".parse().unwrap(),
    };
    let comes = |frame: &[u8]| {
        frames::drain(&to);
        frames::send(&tap, &[frame.to_vec()]);
        frames::drain(&to).iter().any(|f| String::from_utf8_lossy(f).contains(MARK))
    };
    lab.attempt(lab.host_holder(), "echo 0 >/proc/sys/net/bridge/bridge-nf-call-ip6tables");
    for (what, frame) in honest(who) {
        assert!(comes(&frame), "{what} is stopped");
    }
    for (what, frame) in hostile(who) {
        assert!(!comes(&frame), "{what} came through");
    }
    let known = lab.host("ip -6 neigh show dev puter0; ip -6 route show");
    assert!(!known.contains("52:54:00:00:00:0d") && !known.contains("proto ra"), "the host believed it: {known}");
    // Each of them comes through where there is no filter: so it is the filter that stopped it.
    daemon.freeze(true);
    lab.host("nft delete table netdev puter");
    for (what, frame) in hostile(who) {
        assert!(comes(&frame), "{what} is stopped by something else");
    }
    daemon.freeze(false);
    // And where guests have no IPv6 nothing of it comes through.
    daemon.stop(rustix::process::Signal::TERM);
    let _daemon = lab.start(&["--ipv6", "off"]);
    for (what, frame) in honest(who) {
        assert!(!comes(&frame), "{what} came through");
    }
}
