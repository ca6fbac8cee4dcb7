//! The table that keeps isolated TAPs apart from every other port of the bridge. The bridge's own port isolation holds
//! among isolated ports alone; here every frame to or from an isolated one stops, whatever it carries.

use rustix::io::Errno;

use super::rule::{Meta, Rule};
use super::{
    BRIDGE, DELETE_ELEMENT, Error, Guest, Hook, INET, ISOLATED, ISOLATED6, Message, NEW_ELEMENT, chain, commit,
    commit_with_keys, elements, fresh_table, host, rule, set, table_name,
};

const FORWARD: u32 = 2;
/// Before br_netfilter shows packets to other tables (NF_BR_PRI_FILTER_BRIDGED).
const PRIORITY_BRIDGED: i32 = -200;
/// nft(8)'s number for the type `ifname`.
const TYPE_INTERFACE: u32 = 41;

/// Between ports: frames from the host and to it do not come here.
pub(super) fn rules() -> Vec<(&'static str, Rule)> {
    let either = [Meta::InputName, Meta::OutputName];
    either.map(|key| ("forward", Rule::new().interface_in(key, ISOLATED).drop())).into()
}

fn messages(name: &str) -> Vec<Message> {
    let mut messages = fresh_table(BRIDGE, name);
    let hook = Hook { number: FORWARD, priority: PRIORITY_BRIDGED, device: None };
    messages
        .extend([set(BRIDGE, name, (ISOLATED, 1), TYPE_INTERFACE, 16), chain(BRIDGE, name, "forward", "filter", hook)]);
    messages.extend(rules().into_iter().map(|(chain, body)| rule(BRIDGE, name, chain, body)));
    messages
}

/// An interface's name fills its key with NULs.
fn key(tap: &str) -> Vec<u8> {
    let mut key = tap.as_bytes().to_vec();
    key.resize(16, 0);
    key
}

/// The isolated guests' TAPs, as the set holds them.
pub(super) fn keys(guests: &[Guest]) -> Vec<Vec<u8>> {
    guests.iter().filter(|guest| guest.isolated).map(|guest| key(&guest.tap)).collect()
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
pub fn separate(bridge: &str, guests: &[Guest]) -> Result<(), Error> {
    let (name, keys) = (table_name(bridge), [(ISOLATED, keys(guests))]);
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
    match change(BRIDGE, ISOLATED, key(&guest.tap)) {
        Err(error) if !guest.isolated && is_absent(&error) => Ok(()),
        other => other,
    }
}

/// The keys that each set must hold.
pub(super) fn expected(guests: &[Guest]) -> [(u8, &'static str, Vec<Vec<u8>>); 3] {
    [(INET, ISOLATED, host::keys(guests)), (INET, ISOLATED6, host::keys6(guests)), (BRIDGE, ISOLATED, keys(guests))]
}
