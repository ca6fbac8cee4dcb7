//! What a guest may send by IPv6 (RFC 8200). Where a packet's own header does not say what is in it, because others
//! stand between, it is let through only if those are known: others look behind headers that this filter cannot.

use std::net::Ipv6Addr;

use super::guard::IPV6;
use super::rule::{IPPROTO_ICMPV6, IPPROTO_TCP, IPPROTO_UDP, Rule};
use crate::protocol::address::Mac;
use crate::protocol::ipv6::link_local;

/// Where the header has these (RFC 8200, section 3): the payload's length, what follows and the hop limit, the source.
const LENGTH: u32 = 4;
const NEXT: u32 = 6;
const SOURCE: u32 = 8;
/// Where what follows begins, and what follows a fragment's header.
const PAYLOAD: u32 = 40;
const FRAGMENT: u32 = PAYLOAD + 8;
/// Headers by number.
const HOP_BY_HOP: u8 = 0;
const FRAGMENTED: u8 = 44;
const ESP: u8 = 50;
const SCTP: u8 = 132;
/// Neighbour discovery comes from the same link: no router has counted its hops down (RFC 4861, section 6.1).
const ON_LINK: u8 = 255;
const ROUTER_SOLICITATION: u8 = 133;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// Who listens to which groups: a report, its end, a report of version 2. Queries are a router's (RFC 3810).
const LISTENER_REPORTS: [u8; 3] = [131, 132, 143];
/// What every such report has before it: the router alert, and two bytes of nothing.
const ROUTER_ALERT: [u8; 8] = [IPPROTO_ICMPV6, 0, 5, 2, 0, 0, 1, 0];
const DHCP_SERVER: u16 = 547;
const DHCP_CLIENT: u16 = 546;

/// Packets whose header the kernel understood, to the last of those before the payload.
fn ip() -> Rule {
    Rule::new().ether_type(IPV6).well_formed()
}

fn next(header: u8) -> Rule {
    ip().payload(1, NEXT, 1).compare(false, &[header])
}

/// ICMPv6 (RFC 4443) of neighbour discovery, with no header between.
fn discovery(kind: u8) -> Rule {
    ip().payload(1, NEXT, 2)
        .compare(false, &[IPPROTO_ICMPV6, ON_LINK])
        .payload(1, PAYLOAD, 2)
        .compare(false, &[kind, 0])
}

/// Errors (1 to 4 are in use), or echo.
fn messages(rule: impl Fn() -> Rule, at: u32) -> [Rule; 2] {
    [
        rule().payload(1, at, 1).mask(&[0xf8]).compare(false, &[0]).accept(),
        rule().payload(1, at, 1).mask(&[0xfe]).compare(false, &[128]).accept(),
    ]
}

/// Never as a DHCP server, nor to a DHCP client, which may look at no other port (RFC 8415, section 7.2).
fn no_dhcp_server(rule: Rule, at: u32) -> Rule {
    let rule = rule.payload(1, at, 2).compare(true, &DHCP_SERVER.to_be_bytes());
    rule.payload(1, at + 2, 2).compare(true, &DHCP_CLIENT.to_be_bytes()).accept()
}

/// A message with one option, which names a MAC, or with none: what a neighbour says of itself.
fn of_own_mac(rule: impl Fn() -> Rule, option: u8, mac: Mac) -> [Rule; 2] {
    let [a, b, c, d, e, f] = mac.0;
    let named = rule().payload(1, LENGTH, 2).compare(false, &32u16.to_be_bytes());
    [
        rule().payload(1, LENGTH, 2).compare(false, &24u16.to_be_bytes()).accept(),
        named.payload(1, PAYLOAD + 24, 8).compare(false, &[option, 1, a, b, c, d, e, f]).accept(),
    ]
}

/// From its own two addresses alone, or from none where a machine has none yet: to find out whether another has its
/// address, and to tell which groups it listens to. Never as a router.
pub(super) fn rules(mac: Mac, address: Ipv6Addr) -> Vec<Rule> {
    let (global, local, none) = (address.octets(), link_local(mac).octets(), [0; 16]);
    let target = |kind, of: &[u8; 16]| discovery(kind).payload(1, PAYLOAD + 8, 16).compare(false, of);
    let from = |rule: Rule, not: bool, source: &[u8; 16]| rule.payload(1, SOURCE, 16).compare(not, source);
    let mut rules =
        vec![from(Rule::new().ether_type(IPV6), true, &global).compare(true, &local).compare(true, &none).drop()];
    rules.push(from(next(IPPROTO_TCP), true, &none).accept());
    rules.push(no_dhcp_server(from(next(IPPROTO_UDP), true, &none), PAYLOAD));
    for kind in LISTENER_REPORTS {
        let alert = [&ROUTER_ALERT[..], &[kind]].concat();
        let report = ip().payload(1, NEXT, 2).compare(false, &[HOP_BY_HOP, 1]);
        rules.push(from(report, true, &global).payload(1, PAYLOAD, 9).compare(false, &alert).accept());
    }
    for own in [&local, &global] {
        rules.push(from(target(NEIGHBOUR_SOLICITATION, own), false, &none).accept());
    }
    rules.push(from(discovery(ROUTER_SOLICITATION), true, &global).accept());
    rules.push(from(Rule::new().ether_type(IPV6), false, &none).drop());
    rules.extend(of_own_mac(|| discovery(NEIGHBOUR_SOLICITATION), 1, mac));
    for own in [&local, &global] {
        rules.extend(of_own_mac(|| target(NEIGHBOUR_ADVERTISEMENT, own), 2, mac));
    }
    rules.extend(messages(|| next(IPPROTO_ICMPV6), PAYLOAD));
    rules.extend([ESP, SCTP].map(|header| next(header).accept()));
    // The first fragment holds all headers (RFC 7112). Of later ones a receiver takes nothing but data, and without
    // the first it takes them not at all.
    let fragment = |later| next(FRAGMENTED).payload(1, PAYLOAD + 2, 2).mask(&[0xff, 0xf8]).compare(later, &[0; 2]);
    let first = |header| fragment(false).payload(1, PAYLOAD, 1).compare(false, &[header]);
    rules.push(fragment(true).accept());
    rules.push(no_dhcp_server(first(IPPROTO_UDP), FRAGMENT));
    rules.push(first(IPPROTO_TCP).payload(1, FRAGMENT, 4).compare(true, &[0; 4]).accept());
    rules.extend(messages(|| first(IPPROTO_ICMPV6), FRAGMENT));
    rules
}
