//! The table that keeps isolated TAPs apart from every other port of the bridges. The bridge's own port isolation holds
//! among isolated ports of one bridge alone; here every frame to or from an isolated one stops, whatever it carries.
//!
//! Where there are further bridges, an isolated TAP's frames pass between its bridge and the first, for the host is
//! there. So they are known by their MAC as well, which each TAP's filter vouches for: from an isolated one they go to
//! no port of the first, and to one they come from the host's MAC alone, which nobody has who is not the host.
//!
//! Isolated members of a cluster are kept apart from all but each other: see [`cluster`].

use std::collections::BTreeMap;

use rustix::io::Errno;

use super::rule::{Meta, Rule};
use super::{
    BRIDGE, DELETE_ELEMENT, Element, Error, Guest, Hook, INET, INTERFACE, ISOLATED, ISOLATED6, Isolation, Joint, MAC,
    Message, NEW_ELEMENT, Policy, chain, cluster, commit, commit_all, elements, fill, fresh_table, rule, set,
    table_name,
};
use crate::protocol::address::BRIDGE_MAC;

const FORWARD: u32 = 2;
/// Before br_netfilter shows packets to other tables (NF_BR_PRI_FILTER_BRIDGED).
const PRIORITY_BRIDGED: i32 = -200;
/// The set of isolated guests' MACs.
const ISOLATED_MACS: &str = "isolated_macs";
/// The sets of further bridges' ports that lead to the first, and of the first one's that lead to them.
const UPLINKS: &str = "uplinks";
const DOWNLINKS: &str = "downlinks";

/// Between ports: frames from the host and to it do not come here on the first bridge.
pub(super) fn rules() -> Vec<(&'static str, Rule)> {
    use Meta::{InputName, OutputName};
    let alone = [
        Rule::new().interface_in(InputName, ISOLATED).interface_not_in(OutputName, UPLINKS),
        Rule::new().interface_in(OutputName, ISOLATED).interface_not_in(InputName, UPLINKS),
        Rule::new().interface_in(OutputName, ISOLATED).source_mac(true, BRIDGE_MAC),
        Rule::new().interface_in(InputName, DOWNLINKS).source_mac_in(ISOLATED_MACS),
        Rule::new().interface_in(OutputName, DOWNLINKS).source_mac(false, BRIDGE_MAC),
    ];
    let to_cluster = Rule::new().go_by_interface(OutputName, cluster::PORTS);
    let astray = Rule::new().source_mac_in(cluster::MACS);
    let astray = astray.interface_not_in(OutputName, UPLINKS).interface_not_in(OutputName, DOWNLINKS);
    let rules = alone.map(Rule::drop).into_iter().chain([to_cluster, astray.drop()]);
    rules.map(|rule| ("forward", rule)).collect()
}

fn messages(name: &str) -> Vec<Message> {
    let mut messages = fresh_table(BRIDGE, name);
    let sets = [
        (ISOLATED, INTERFACE),
        (ISOLATED_MACS, MAC),
        (UPLINKS, INTERFACE),
        (DOWNLINKS, INTERFACE),
        (cluster::MACS, MAC),
    ];
    messages.extend((1..).zip(sets).map(|(number, (of, keys))| set(BRIDGE, name, (of, number), keys, false)));
    messages.push(set(BRIDGE, name, (cluster::PORTS, 6), INTERFACE, true));
    let hook = Hook { number: FORWARD, priority: PRIORITY_BRIDGED, device: None };
    messages.push(chain(BRIDGE, name, "forward", "filter", hook));
    messages.extend(rules().into_iter().map(|(chain, body)| rule(BRIDGE, name, chain, body)));
    messages
}

/// An interface's name fills its key with NULs.
pub(super) fn key(tap: &str) -> Vec<u8> {
    let mut key = tap.as_bytes().to_vec();
    key.resize(16, 0);
    key
}

/// What is in the sets of this family for this guest.
fn entries(family: u8, guest: &Guest) -> Vec<(String, Element)> {
    let mut own: Vec<(&str, Element)> = Vec::new();
    match (family, &guest.isolated) {
        (BRIDGE, Some(Isolation::Alone)) => {
            own.extend([(ISOLATED, Element::of(key(&guest.tap))), (ISOLATED_MACS, Element::of(guest.mac.0))]);
        }
        (INET, Some(_)) => {
            own.push((ISOLATED, Element::of(guest.address.octets())));
            own.extend(guest.address6.map(|address| (ISOLATED6, Element::of(address.octets()))));
        }
        _ => {}
    }
    own.into_iter().map(|(set, element)| (set.to_owned(), element)).chain(cluster::entries(family, guest)).collect()
}

/// What each set of this family must hold of guests; those that are always there may be empty.
pub(super) fn contents(family: u8, guests: &[Guest]) -> BTreeMap<String, Vec<Element>> {
    let fixed = match family {
        BRIDGE => [ISOLATED, ISOLATED_MACS, cluster::PORTS, cluster::MACS],
        _ => [ISOLATED, ISOLATED6, cluster::ADDRESSES, cluster::ADDRESSES6],
    };
    let mut sets: BTreeMap<String, Vec<Element>> = fixed.map(|set| (set.to_owned(), Vec::new())).into();
    for (set, element) in guests.iter().flat_map(|guest| entries(family, guest)) {
        sets.entry(set).or_default().push(element);
    }
    sets
}

/// The same of this table, with what it must hold of further bridges.
fn contents_with(joints: &[Joint], guests: &[Guest]) -> BTreeMap<String, Vec<Element>> {
    let mut sets = contents(BRIDGE, guests);
    let all = |of: fn(&Joint) -> &str| joints.iter().map(|joint| Element::of(key(of(joint)))).collect();
    sets.insert(UPLINKS.to_owned(), all(|joint| &joint.far));
    sets.insert(DOWNLINKS.to_owned(), all(|joint| &joint.near));
    sets
}

/// Whether the error says that the kernel has no nftables for bridges.
pub(super) fn is_absent(error: &Error) -> bool {
    [Errno::OPNOTSUPP, Errno::AFNOSUPPORT, Errno::NOENT].contains(&error.errno)
}

/// Puts the table that keeps isolated TAPs apart in the place of any former one. A kernel without nftables for bridges
/// needs none as long as nobody is isolated.
///
/// # Errors
/// The kernel's.
pub fn separate(policy: &Policy, guests: &[Guest]) -> Result<(), Error> {
    let name = table_name(&policy.bridge);
    let sets = fill(BRIDGE, &name, &contents_with(&policy.joints, guests));
    match commit_all([messages(&name), cluster::all(BRIDGE, &name, guests), sets].concat()) {
        Err(error) if guests.iter().all(|guest| guest.isolated.is_none()) && is_absent(&error) => Ok(()),
        other => other,
    }
}

/// Begins or ends a guest's isolation, as `after` says; `before` is what it was, where it was isolated.
///
/// # Errors
/// The kernel's; `NOENT` where there are no tables, or what was before is not in them.
pub fn isolate(bridge: &str, before: Option<&Guest>, after: &Guest) -> Result<(), Error> {
    let table = table_name(bridge);
    let change = |family: u8| {
        let one = |kind, (set, element): (String, Element)| elements(family, kind, &table, &set, &[element]);
        let mut messages = cluster::of(after).map_or(Vec::new(), |name| cluster::messages(family, &table, name, 1));
        messages.extend(before.into_iter().flat_map(|guest| entries(family, guest)).map(|e| one(DELETE_ELEMENT, e)));
        messages.extend(entries(family, after).into_iter().map(|entry| one(NEW_ELEMENT, entry)));
        if messages.is_empty() { Ok(()) } else { commit(messages) }
    };
    change(INET)?;
    match change(BRIDGE) {
        Err(error) if after.isolated.is_none() && is_absent(&error) => Ok(()),
        other => other,
    }
}

/// The elements that each set must hold, by family.
pub(super) fn expected(policy: &Policy, guests: &[Guest]) -> Vec<(u8, String, Vec<Element>)> {
    let of = |family: u8, sets: BTreeMap<String, Vec<Element>>| {
        sets.into_iter().map(move |(set, elements)| (family, set, elements))
    };
    of(INET, contents(INET, guests)).chain(of(BRIDGE, contents_with(&policy.joints, guests))).collect()
}
