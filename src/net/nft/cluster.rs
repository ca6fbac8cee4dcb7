//! Isolated members of a cluster, which are kept from all but each other: for each cluster a chain and sets of its
//! members in the bridge's table and in the one that keeps TAPs apart. A map leads from a member to its cluster's chain.

use std::collections::BTreeMap;

use super::isolation::key;
use super::rule::{Meta, NFPROTO_IPV4, NFPROTO_IPV6, Rule};
use super::{
    ADDRESS, ADDRESS6, Attributes, BRIDGE, DELETE_ELEMENT, DELETE_RULE, ELEMENTS_AT_ONCE, Element, Error, Guest,
    Isolation, MAC, Message, NEW_CHAIN, NEW_ELEMENT, NFTA_CHAIN_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_CHAIN,
    NFTA_RULE_TABLE, commit_long, elements, flags, header, host, rule, set, table_name,
};
use crate::protocol::address::BRIDGE_MAC;

/// The maps to a cluster's chain: from a TAP, and from an address.
pub(super) const PORTS: &str = "cluster_ports";
pub(super) const ADDRESSES: &str = "cluster";
pub(super) const ADDRESSES6: &str = "cluster6";
/// The set of members' MACs, of all clusters.
pub(super) const MACS: &str = "cluster_macs";
/// How many clusters share a batch.
const CLUSTERS_AT_ONCE: usize = 16;

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
fn all(guests: &[Guest]) -> BTreeMap<&str, Vec<&Guest>> {
    let mut all: BTreeMap<&str, Vec<&Guest>> = BTreeMap::new();
    for (cluster, guest) in guests.iter().filter_map(|guest| Some((of(guest)?, guest))) {
        all.entry(cluster).or_default().push(guest);
    }
    all
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
    all(guests)
        .into_keys()
        .flat_map(|cluster| of(cluster).into_iter().map(move |rule| (name("cluster", cluster), rule)))
        .collect()
}

/// What is in the sets of this family for this guest.
fn entries(family: u8, guest: &Guest) -> Vec<(String, Element)> {
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

/// What each set of this family must hold, as far as it is of clusters.
pub(super) fn contents<'a>(family: u8, guests: impl IntoIterator<Item = &'a Guest>) -> BTreeMap<String, Vec<Element>> {
    let mut sets: BTreeMap<String, Vec<Element>> = BTreeMap::new();
    for (set, element) in guests.into_iter().flat_map(|guest| entries(family, guest)) {
        sets.entry(set).or_default().push(element);
    }
    sets
}

/// Makes the chain and the sets of a cluster, or leaves them as they are.
fn messages(family: u8, table: &str, cluster: &str, number: u32) -> Vec<Message> {
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

/// Makes all clusters' chains and sets in a table that has none yet.
///
/// # Errors
/// The kernel's.
pub(super) fn install(family: u8, table: &str, guests: &[Guest]) -> Result<(), Error> {
    let all: Vec<(&str, Vec<&Guest>)> = all(guests).into_iter().collect();
    for some in all.chunks(CLUSTERS_AT_ONCE) {
        let mut batch = Vec::new();
        for ((cluster, members), number) in some.iter().zip((1..).step_by(2)) {
            batch.extend(messages(family, table, cluster, number));
            for (set, all) in &contents(family, members.iter().copied()) {
                batch.extend(all.chunks(ELEMENTS_AT_ONCE).map(|some| elements(family, NEW_ELEMENT, table, set, some)));
            }
        }
        commit_long(batch)?;
    }
    Ok(())
}

/// Takes a guest out of one cluster and into another, at once.
pub(super) fn moving(family: u8, bridge: &str, before: Option<&Guest>, after: &Guest) -> Vec<Message> {
    let table = table_name(bridge);
    let (out, into) = (before.map_or(Vec::new(), |guest| entries(family, guest)), entries(family, after));
    let change =
        |kind, (set, element): &(String, Element)| elements(family, kind, &table, set, std::slice::from_ref(element));
    let made = of(after).map_or(Vec::new(), |cluster| messages(family, &table, cluster, 1));
    let away = out.iter().map(|entry| change(DELETE_ELEMENT, entry));
    made.into_iter().chain(away).chain(into.iter().map(|entry| change(NEW_ELEMENT, entry))).collect()
}

/// From a packet to the chain of its sender's cluster.
pub(super) fn by_source(rule: impl Fn() -> Rule, six: bool) -> Vec<Rule> {
    let four = rule().meta(Meta::Family, false, &[NFPROTO_IPV4]).payload(1, host::SOURCE, 4).go_by(ADDRESSES);
    let six =
        six.then(|| rule().meta(Meta::Family, false, &[NFPROTO_IPV6]).payload(1, host::SOURCE6, 16).go_by(ADDRESSES6));
    [four].into_iter().chain(six).collect()
}
