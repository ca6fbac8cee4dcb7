//! The table that keeps isolated TAPs apart from every other port of the bridges. The bridge's own port isolation holds
//! among isolated ports of one bridge alone; here every frame to or from an isolated one stops, whatever it carries.
//!
//! Where there are further bridges, an isolated TAP's frames pass between its bridge and the first, for the host is
//! there. So they are known by their MAC as well, which each TAP's filter vouches for: from an isolated one they go to
//! no port of the first, and to one they come from the host's MAC alone, which nobody has who is not the host.

use rustix::io::Errno;

use super::rule::{Meta, Rule};
use super::{
    BRIDGE, DELETE_ELEMENT, Error, Guest, Hook, INET, ISOLATED, ISOLATED6, Joint, Message, NEW_ELEMENT, Policy, chain,
    commit, commit_with_keys, elements, fresh_table, host, rule, set, table_name,
};
use crate::protocol::address::BRIDGE_MAC;

const FORWARD: u32 = 2;
/// Before br_netfilter shows packets to other tables (NF_BR_PRI_FILTER_BRIDGED).
const PRIORITY_BRIDGED: i32 = -200;
/// nft(8)'s numbers for the types `ifname` and `ether_addr`.
const TYPE_INTERFACE: u32 = 41;
const TYPE_MAC: u32 = 9;
/// The set of isolated guests' MACs.
const ISOLATED_MACS: &str = "isolated_macs";
/// The sets of further bridges' ports that lead to the first, and of the first one's that lead to them.
const UPLINKS: &str = "uplinks";
const DOWNLINKS: &str = "downlinks";

/// Between ports: frames from the host and to it do not come here on the first bridge.
pub(super) fn rules() -> Vec<(&'static str, Rule)> {
    use Meta::{InputName, OutputName};
    let rules = [
        Rule::new().interface_in(InputName, ISOLATED).interface_not_in(OutputName, UPLINKS),
        Rule::new().interface_in(OutputName, ISOLATED).interface_not_in(InputName, UPLINKS),
        Rule::new().interface_in(OutputName, ISOLATED).source_mac(true, BRIDGE_MAC),
        Rule::new().interface_in(InputName, DOWNLINKS).source_mac_in(ISOLATED_MACS),
        Rule::new().interface_in(OutputName, DOWNLINKS).source_mac(false, BRIDGE_MAC),
    ];
    rules.map(|rule| ("forward", rule.drop())).into()
}

fn messages(name: &str) -> Vec<Message> {
    let mut messages = fresh_table(BRIDGE, name);
    let sets = [
        (ISOLATED, TYPE_INTERFACE, 16),
        (ISOLATED_MACS, TYPE_MAC, 6),
        (UPLINKS, TYPE_INTERFACE, 16),
        (DOWNLINKS, TYPE_INTERFACE, 16),
    ];
    messages.extend((1..).zip(sets).map(|(number, (of, kind, length))| set(BRIDGE, name, (of, number), kind, length)));
    let hook = Hook { number: FORWARD, priority: PRIORITY_BRIDGED, device: None };
    messages.push(chain(BRIDGE, name, "forward", "filter", hook));
    messages.extend(rules().into_iter().map(|(chain, body)| rule(BRIDGE, name, chain, body)));
    messages
}

/// An interface's name fills its key with NULs.
fn key(tap: &str) -> Vec<u8> {
    let mut key = tap.as_bytes().to_vec();
    key.resize(16, 0);
    key
}

/// What each set of this table must hold.
fn keys(joints: &[Joint], guests: &[Guest]) -> [(&'static str, Vec<Vec<u8>>); 4] {
    let isolated = || guests.iter().filter(|guest| guest.isolated);
    [
        (ISOLATED, isolated().map(|guest| key(&guest.tap)).collect()),
        (ISOLATED_MACS, isolated().map(|guest| guest.mac.0.to_vec()).collect()),
        (UPLINKS, joints.iter().map(|joint| key(&joint.far)).collect()),
        (DOWNLINKS, joints.iter().map(|joint| key(&joint.near)).collect()),
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
    let (name, keys) = (table_name(&policy.bridge), keys(&policy.joints, guests));
    match commit_with_keys(BRIDGE, &name, messages(&name), &keys) {
        Err(error) if keys[0].1.is_empty() && is_absent(&error) => Ok(()),
        other => other,
    }
}

/// Begins or ends a guest's isolation, as the guest says and for whatever was before.
///
/// # Errors
/// The kernel's; `NOENT` where there are no tables.
pub fn isolate(bridge: &str, guest: &Guest) -> Result<(), Error> {
    let name = table_name(bridge);
    let change = |family: u8, set: &str, key: Vec<u8>| {
        let keys = [key];
        // Taking away what is not there fails, so it is added first.
        let mut messages = vec![elements(family, NEW_ELEMENT, &name, set, &keys)];
        if !guest.isolated {
            messages.push(elements(family, DELETE_ELEMENT, &name, set, &keys));
        }
        commit(messages)
    };
    change(INET, ISOLATED, guest.address.octets().to_vec())?;
    if let Some(address) = guest.address6 {
        change(INET, ISOLATED6, address.octets().to_vec())?;
    }
    let bridged =
        change(BRIDGE, ISOLATED_MACS, guest.mac.0.to_vec()).and_then(|()| change(BRIDGE, ISOLATED, key(&guest.tap)));
    match bridged {
        Err(error) if !guest.isolated && is_absent(&error) => Ok(()),
        other => other,
    }
}

/// The keys that each set must hold, by family.
pub(super) fn expected(policy: &Policy, guests: &[Guest]) -> Vec<(u8, &'static str, Vec<Vec<u8>>)> {
    let mut all = vec![(INET, ISOLATED, host::keys(guests)), (INET, ISOLATED6, host::keys6(guests))];
    all.extend(keys(&policy.joints, guests).map(|(set, keys)| (BRIDGE, set, keys)));
    all
}
