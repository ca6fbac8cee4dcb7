//! The table that keeps isolated TAPs apart from every other port of the bridges. The bridge's own port isolation holds
//! among isolated ports of one bridge alone; here every frame to or from an isolated one stops, whatever it carries.
//!
//! Where there are further bridges, an isolated TAP's frames pass between its bridge and the first, for the host is
//! there. So they are known by their MAC as well, which each TAP's filter vouches for: from an isolated one they go to
//! no port of the first, and to one they come from the host's MAC alone, which nobody has who is not the host.
//!
//! Isolated members of a cluster are kept apart from all but each other: see [`cluster`].

use rustix::io::Errno;

use super::rule::{Meta, Rule};
use super::{
    BRIDGE, DELETE_ELEMENT, Element, Error, Guest, Hook, INET, INTERFACE, ISOLATED, Isolation, Joint, MAC, Message,
    NEW_ELEMENT, Policy, chain, cluster, commit, commit_with_keys, elements, fresh_table, host, rule, set, table_name,
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

/// What each set of this table must hold, as far as it is of no cluster.
fn contents(joints: &[Joint], guests: &[Guest]) -> [(&'static str, Vec<Element>); 4] {
    let alone = || guests.iter().filter(|guest| guest.isolated == Some(Isolation::Alone));
    [
        (ISOLATED, alone().map(|guest| Element::of(key(&guest.tap))).collect()),
        (ISOLATED_MACS, alone().map(|guest| Element::of(guest.mac.0)).collect()),
        (UPLINKS, joints.iter().map(|joint| Element::of(key(&joint.far))).collect()),
        (DOWNLINKS, joints.iter().map(|joint| Element::of(key(&joint.near))).collect()),
    ]
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
    let (name, contents) = (table_name(&policy.bridge), contents(&policy.joints, guests));
    let made = commit_with_keys(BRIDGE, &name, messages(&name), &contents);
    match made.and_then(|()| cluster::install(BRIDGE, &name, guests)) {
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
    let change = |family: u8, of: &dyn Fn(&Guest) -> Vec<(&'static str, Element)>| {
        let mut messages = cluster::moving(family, bridge, before, after);
        let each = |kind: u16, guest: &Guest| {
            of(guest).into_iter().map(move |(set, element)| (kind, set, element)).collect::<Vec<_>>()
        };
        let all =
            before.map_or(Vec::new(), |guest| each(DELETE_ELEMENT, guest)).into_iter().chain(each(NEW_ELEMENT, after));
        messages.extend(all.map(|(kind, set, element)| elements(family, kind, &table, set, &[element])));
        if messages.is_empty() { Ok(()) } else { commit(messages) }
    };
    change(INET, &host::entries)?;
    match change(BRIDGE, &|guest| {
        let alone = guest.isolated == Some(Isolation::Alone);
        let all = [(ISOLATED, Element::of(key(&guest.tap))), (ISOLATED_MACS, Element::of(guest.mac.0))];
        all.into_iter().filter(|_| alone).collect()
    }) {
        Err(error) if after.isolated.is_none() && is_absent(&error) => Ok(()),
        other => other,
    }
}

/// The elements that each set must hold, by family.
pub(super) fn expected(policy: &Policy, guests: &[Guest]) -> Vec<(u8, String, Vec<Element>)> {
    let mut all = Vec::new();
    let mut add = |family: u8, sets: &[(&str, Vec<Element>)], maps: &[&str]| {
        let mut clusters = cluster::contents(family, guests);
        // One of them may have to be empty.
        for map in maps {
            clusters.entry((*map).into()).or_default();
        }
        all.extend(sets.iter().map(|(set, elements)| (family, (*set).to_owned(), elements.clone())));
        all.extend(clusters.into_iter().map(|(set, elements)| (family, set, elements)));
    };
    add(INET, &host::contents(guests), &[cluster::ADDRESSES, cluster::ADDRESSES6]);
    add(BRIDGE, &contents(&policy.joints, guests), &[cluster::PORTS, cluster::MACS]);
    all
}
