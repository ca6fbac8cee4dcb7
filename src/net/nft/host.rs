//! The bridge's table: what guests may send to the host and through it, and the way back.

use super::rule::{IPPROTO_ICMP, Meta, NFPROTO_IPV4, Rule};
use super::{
    ADDRESS, ADDRESS6, Attributes, Error, Guest, Hook, INET, ISOLATED, ISOLATED6, Joint, Message, PRIORITY_FILTER,
    chain, cluster, commit_all, fill, fresh_table, isolation, rule, set, table_name,
};
use crate::protocol::address::Subnet;
use crate::protocol::ipv6::Network6;
use crate::protocol::ports::{HostPort, Protocol};

const PREROUTING: u32 = 0;
const LOCAL_IN: u32 = 1;
const FORWARD: u32 = 2;
const POSTROUTING: u32 = 4;
const PRIORITY_SOURCE_NAT: i32 = 100;
/// Before connections are followed (NF_IP_PRI_RAW).
const PRIORITY_RAW: i32 = -300;
/// Where an IPv4 header has its addresses (RFC 791).
pub(super) const SOURCE: u32 = 12;
pub(super) const DESTINATION: u32 = 16;
/// Where an IPv6 header has its addresses (RFC 8200).
pub(super) const SOURCE6: u32 = 8;
pub(super) const DESTINATION6: u32 = 24;
/// A packet to the host's own link address (linux/if_packet.h).
const PACKET_HOST: u8 = 0;
/// ICMPv6's echo request (RFC 4443).
const ECHO6: u8 = 128;
/// A router's and a neighbour's solicitation, and a neighbour's advertisement (RFC 4861); no router's of a guest.
const DISCOVERY: [u8; 3] = [133, 135, 136];

/// What holds for all guests of a bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The bridge's interface name.
    pub bridge: String,
    /// Further bridges, which are one network with it.
    pub joints: Vec<Joint>,
    pub subnet: Subnet,
    /// Their IPv6 network, where they have one.
    pub network6: Option<Network6>,
    /// Ports of the host, besides DHCP and DNS, that guests may reach.
    pub host_ports: Vec<HostPort>,
}

/// What guests may send to the host: DHCP, DNS, ICMP echo, what the user allows, and answers to what the host began; by
/// IPv6, where they have it, the same and neighbour discovery.
fn input(policy: &Policy) -> Vec<Rule> {
    let own = [(Protocol::Udp, 67), (Protocol::Udp, 53), (Protocol::Tcp, 53)];
    let ports = own.into_iter().map(|(protocol, port)| HostPort { protocol, port });
    let ports = ports.chain(policy.host_ports.iter().copied());
    let echo = Rule::new().meta(Meta::Protocol, false, &[IPPROTO_ICMP]).payload(2, 0, 1).compare(false, &[8]);
    let mut rules =
        vec![Rule::new().interface(Meta::InputName, true, &policy.bridge).accept(), Rule::new().established().accept()];
    match policy.network6 {
        None => rules.push(Rule::new().meta(Meta::Family, true, &[NFPROTO_IPV4]).drop()),
        Some(_) => {
            // From the same link: no router has counted the hops down, 7 bytes into the header.
            let on_link = |kind| Rule::new().icmp6(kind).payload(1, 7, 1).compare(false, &[255]);
            rules.extend(DISCOVERY.map(|kind| on_link(kind).accept()));
            rules.push(Rule::new().icmp6(ECHO6).accept());
        }
    }
    rules.extend(ports.map(|port| Rule::new().host_port(port).accept()));
    rules.extend([echo.accept(), Rule::new().drop()]);
    rules
}

/// What passes through the host. Packets from guest to guest come here where the host routes them, as when a guest
/// sends them to the host on purpose, or where br_netfilter shows a bridge's own traffic.
fn forward(policy: &Policy) -> Vec<Rule> {
    let bridge = policy.bridge.as_str();
    let between = || Rule::new().input(bridge).output(bridge);
    // Where br_netfilter shows a bridge's broadcasts the bridge's own table has decided; none is routed.
    let routed = || between().meta(Meta::PacketType, false, &[PACKET_HOST]);
    let mut rules = cluster::by_source(between, policy.network6.is_some());
    rules.push(routed().address_in(SOURCE, ISOLATED).drop());
    rules.push(between().address_in(DESTINATION, ISOLATED).drop());
    if policy.network6.is_some() {
        rules.push(routed().address6_in(SOURCE6, ISOLATED6).drop());
        rules.push(between().address6_in(DESTINATION6, ISOLATED6).drop());
    }
    // Out with a guest's own source alone, and back in only to what a guest began.
    rules.extend([between().accept(), Rule::new().input(bridge).source(policy.subnet).accept()]);
    rules.extend(policy.network6.map(|network| Rule::new().input(bridge).source6(network).accept()));
    rules.extend([
        Rule::new().input(bridge).drop(),
        Rule::new().output(bridge).established().accept(),
        Rule::new().output(bridge).drop(),
    ]);
    rules
}

/// Guests speak to the outside with the host's address, whichever way it goes.
fn postrouting(policy: &Policy) -> Vec<Rule> {
    let outside =
        |source: Rule| source.interface(Meta::OutputName, true, &policy.bridge).expression("masq", Attributes::new());
    let four = Rule::new().source(policy.subnet);
    [Some(four), policy.network6.map(|network| Rule::new().source6(network))]
        .into_iter()
        .flatten()
        .map(outside)
        .collect()
}

/// Where br_netfilter shows a further bridge's own frames, connections are no matter of that bridge: they are followed on
/// the first, which every packet between a guest and the host passes, and which gives them the host's address. Whoever
/// follows a connection first has decided on its addresses.
fn prerouting(policy: &Policy) -> Vec<Rule> {
    policy
        .joints
        .iter()
        .map(|joint| Rule::new().input(&joint.bridge).expression("notrack", Attributes::new()))
        .collect()
}

/// The rules of each chain, in order.
pub(super) fn rules(policy: &Policy) -> Vec<(&'static str, Rule)> {
    let of = |name: &'static str, rules: Vec<Rule>| rules.into_iter().map(move |rule| (name, rule));
    of("input", input(policy))
        .chain(of("forward", forward(policy)))
        .chain(of("postrouting", postrouting(policy)))
        .chain(of("prerouting", prerouting(policy)))
        .collect()
}

/// The messages that replace the table, with nobody isolated yet.
pub(super) fn messages(policy: &Policy) -> Vec<Message> {
    let name = table_name(&policy.bridge);
    let hook = |number, priority| Hook { number, priority, device: None };
    let mut messages = fresh_table(INET, &name);
    messages.extend([
        set(INET, &name, (ISOLATED, 1), ADDRESS, false),
        set(INET, &name, (ISOLATED6, 2), ADDRESS6, false),
        set(INET, &name, (cluster::ADDRESSES, 3), ADDRESS, true),
        set(INET, &name, (cluster::ADDRESSES6, 4), ADDRESS6, true),
    ]);
    messages.extend([
        chain(INET, &name, "input", "filter", hook(LOCAL_IN, PRIORITY_FILTER)),
        chain(INET, &name, "forward", "filter", hook(FORWARD, PRIORITY_FILTER)),
        chain(INET, &name, "postrouting", "nat", hook(POSTROUTING, PRIORITY_SOURCE_NAT)),
    ]);
    if !policy.joints.is_empty() {
        messages.push(chain(INET, &name, "prerouting", "filter", hook(PREROUTING, PRIORITY_RAW)));
    }
    messages.extend(rules(policy).into_iter().map(|(chain, body)| rule(INET, &name, chain, body)));
    messages
}

/// Puts the table for this bridge in the place of any former one, with no moment in between.
///
/// # Errors
/// The kernel's; `OPNOTSUPP` or `NOENT` where it lacks a part of nf_tables.
pub fn install(policy: &Policy, guests: &[Guest]) -> Result<(), Error> {
    let name = table_name(&policy.bridge);
    let clusters = cluster::all(INET, &name, guests);
    commit_all([messages(policy), clusters, fill(INET, &name, &isolation::contents(INET, guests))].concat())
}
