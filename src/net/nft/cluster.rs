//! Isolated members of a cluster, which are kept from all but each other: for each cluster a chain and sets of its
//! members in the bridge's table and in the one that keeps TAPs apart. A map leads from a member to its cluster's chain.

use std::collections::BTreeSet;

use super::isolation::key;
use super::rule::{Meta, NFPROTO_IPV4, NFPROTO_IPV6, Rule};
use super::{
    ADDRESS, ADDRESS6, Attributes, BRIDGE, DELETE_RULE, Element, Guest, Isolation, MAC, Message, NEW_CHAIN,
    NFTA_CHAIN_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_CHAIN, NFTA_RULE_TABLE, flags, header, host, rule, set,
};
use crate::protocol::address::BRIDGE_MAC;

/// The maps to a cluster's chain: from a TAP, and from an address.
pub(super) const PORTS: &str = "cluster_ports";
pub(super) const ADDRESSES: &str = "cluster";
pub(super) const ADDRESSES6: &str = "cluster6";
/// The set of members' MACs, of all clusters.
pub(super) const MACS: &str = "cluster_macs";
/// No table has so many sets besides those of clusters.
const FIRST_NUMBER: u32 = 100;

/// What a chain or a set of one cluster is called.
fn name(kind: &str, cluster: &str) -> String {
    format!("{kind}-{cluster}")
}

/// The cluster that an isolated guest is kept in.
pub(super) fn of(guest: &Guest) -> Option<&str> {
    match guest.isolated.as_ref()? {
        Isolation::WithCluster(cluster) => Some(cluster),
        Isolation::Alone => None,
    }
}

/// The clusters that have isolated members.
fn names(guests: &[Guest]) -> BTreeSet<&str> {
    guests.iter().filter_map(of).collect()
}

/// A cluster's chain in the table that keeps TAPs apart: what comes to a member's TAP. The last bridge on a frame's way
/// has that TAP as its port, and what comes from the host has the host's MAC.
fn bridge_rules(cluster: &str) -> Vec<Rule> {
    vec![Rule::new().source_mac_in(&name("macs", cluster)).accept(), Rule::new().source_mac(true, BRIDGE_MAC).drop()]
}

/// A cluster's chain in the bridge's table: where a member's packet may go.
fn host_rules(cluster: &str) -> Vec<Rule> {
    vec![
        Rule::new().address_in(host::DESTINATION, &name("addresses", cluster)).accept(),
        Rule::new().address6_in(host::DESTINATION6, &name("addresses6", cluster)).accept(),
    ]
}

/// The chains of clusters in this family, with their rules.
pub(super) fn rules(family: u8, guests: &[Guest]) -> Vec<(String, Rule)> {
    let of = |cluster: &str| match family {
        BRIDGE => bridge_rules(cluster),
        _ => host_rules(cluster),
    };
    names(guests)
        .into_iter()
        .flat_map(|cluster| of(cluster).into_iter().map(move |rule| (name("cluster", cluster), rule)))
        .collect()
}

/// What is in the sets of this family for this guest.
pub(super) fn entries(family: u8, guest: &Guest) -> Vec<(String, Element)> {
    let Some(cluster) = of(guest) else { return Vec::new() };
    let jump = |key: &[u8]| Element { key: key.to_vec(), chain: Some(name("cluster", cluster)) };
    let plain = |key: &[u8]| Element::of(key);
    match family {
        BRIDGE => vec![
            (name("macs", cluster), plain(&guest.mac.0)),
            (MACS.into(), plain(&guest.mac.0)),
            (PORTS.into(), jump(&key(&guest.tap))),
        ],
        _ => {
            let address = guest.address.octets();
            let mut all = vec![(name("addresses", cluster), plain(&address)), (ADDRESSES.into(), jump(&address))];
            if let Some(address) = guest.address6.map(|address| address.octets()) {
                all.extend([(name("addresses6", cluster), plain(&address)), (ADDRESSES6.into(), jump(&address))]);
            }
            all
        }
    }
}

/// Makes the chain and the sets of a cluster, whose numbers in the batch begin with this one, or leaves them as they are.
pub(super) fn messages(family: u8, table: &str, cluster: &str, number: u32) -> Vec<Message> {
    let chain = name("cluster", cluster);
    let (sets, rules) = match family {
        BRIDGE => (vec![(name("macs", cluster), MAC)], bridge_rules(cluster)),
        _ => {
            (vec![(name("addresses", cluster), ADDRESS), (name("addresses6", cluster), ADDRESS6)], host_rules(cluster))
        }
    };
    let numbered = sets.iter().zip(number..);
    let mut messages: Vec<Message> =
        numbered.map(|((name, keys), number)| set(family, table, (name, number), *keys, false)).collect();
    let attributes = Attributes::new().string(NFTA_CHAIN_TABLE, table).string(NFTA_CHAIN_NAME, &chain);
    messages.push(Message::new(NEW_CHAIN, flags::CREATE, &header(family, 0), attributes));
    let former = Attributes::new().string(NFTA_RULE_TABLE, table).string(NFTA_RULE_CHAIN, &chain);
    messages.push(Message::new(DELETE_RULE, 0, &header(family, 0), former));
    messages.extend(rules.into_iter().map(|body| rule(family, table, &chain, body)));
    messages
}

/// Makes the chains and the sets of all clusters. They follow the table's own sets in the batch.
pub(super) fn all(family: u8, table: &str, guests: &[Guest]) -> Vec<Message> {
    let numbered = names(guests).into_iter().zip((FIRST_NUMBER..).step_by(2));
    numbered.flat_map(|(cluster, number)| messages(family, table, cluster, number)).collect()
}

/// From a packet to the chain of its sender's cluster.
pub(super) fn by_source(rule: impl Fn() -> Rule, six: bool) -> Vec<Rule> {
    let four = rule().meta(Meta::Family, false, &[NFPROTO_IPV4]).payload(1, host::SOURCE, 4).go_by(ADDRESSES);
    let six =
        six.then(|| rule().meta(Meta::Family, false, &[NFPROTO_IPV6]).payload(1, host::SOURCE6, 16).go_by(ADDRESSES6));
    [four].into_iter().chain(six).collect()
}
