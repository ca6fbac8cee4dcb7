//! The table with a chain for each TAP: what a guest may send at all.

use std::net::Ipv4Addr;

use rustix::io::Errno;

use super::guard6;
use super::rule::{IPPROTO_UDP, Meta, Rule};
use super::{
    Attributes, DELETE_CHAIN, Error, Guest, Hook, Joint, Message, NETDEV, NEW_CHAIN, NEW_TABLE, NFTA_CHAIN_NAME,
    NFTA_CHAIN_TABLE, PRIORITY_FILTER, chain, commit, commit_long, flags, header, rule, table, table_name,
};
use crate::protocol::address::Mac;

const INGRESS: u32 = 0;
const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
pub(super) const IPV6: u16 = 0x86dd;
const DHCP_SERVER: u16 = 67;
const DHCP_CLIENT: u16 = 68;
/// How many VMs' chains share a table: with each change the kernel reads all rules of its table.
const GUESTS_OF_A_TABLE: u32 = 64;
/// How many TAPs share a batch: each commit waits for the kernel some 15 ms, and a batch has a largest size.
const GUESTS_AT_ONCE: usize = 64;
/// How many TAPs that are gone share one: three short messages each.
const GONE_AT_ONCE: usize = 64;

/// An interface's chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    pub table: String,
    /// Its name, which is the interface's.
    pub name: String,
}

/// The chain of a guest's TAP: in the bridge's own table, or in one of those that follow it for thousands of VMs.
pub fn chain_of(bridge: &str, guest: &Guest) -> Chain {
    let table = match guest.mac.id().unwrap_or(0) / GUESTS_OF_A_TABLE {
        0 => table_name(bridge),
        number => format!("{}{FURTHER}{number}", table_name(bridge)),
    };
    Chain { table, name: guest.tap.clone() }
}

/// What is between the name of a bridge's table and the number of one that follows it; no bridge's name has it.
const FURTHER: char = '/';

/// Whether a table is one of a bridge's.
pub(super) fn is_table_of(bridge: &str, table: &str) -> bool {
    let rest = table.strip_prefix(&table_name(bridge));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(FURTHER))
}

/// Frames with its own MAC (IEEE 802.3) and no other's, and without a tag (IEEE 802.1Q).
fn ethernet_rules(mac: Mac) -> Vec<Rule> {
    // A TAP is always Ethernet; to say so is how nft(8) knows the address for one.
    let frame = || Rule::new().meta(Meta::InputType, false, &1u16.to_ne_bytes());
    vec![
        frame().payload(0, 6, 6).compare(true, &mac.0).drop(),
        frame().frame_type(0x8100).drop(),
        frame().frame_type(0x88a8).drop(),
    ]
}

/// ARP (RFC 826) for Ethernet and IPv4, with its own addresses as the sender's.
fn arp_rules(mac: Mac, address: Ipv4Addr) -> Vec<Rule> {
    let octets = address.octets();
    let arp = || Rule::new().ether_type(ARP);
    vec![
        arp().payload(1, 0, 6).compare(true, &[0, 1, 8, 0, 6, 4]).drop(),
        arp().payload(1, 8, 6).compare(true, &mac.0).drop(),
        arp().payload(1, 14, 4).compare(false, &octets).accept(),
        // A probe for a duplicate of its address names no sender (RFC 5227); one for another's would be an attack.
        arp().payload(1, 14, 4).compare(false, &[0; 4]).payload(1, 24, 4).compare(false, &octets).accept(),
    ]
}

/// IPv4 (RFC 791) from its own address, or from none to a DHCP server; never as a DHCP server, nor to a DHCP client,
/// for some clients look at no other port.
fn ipv4_rules(mac: Mac, address: Ipv4Addr) -> Vec<Rule> {
    let ip = || Rule::new().ether_type(IPV4);
    vec![
        ip().source_port(IPPROTO_UDP, DHCP_SERVER).drop(),
        ip().port(IPPROTO_UDP, DHCP_CLIENT).drop(),
        // A client speaks for its own MAC: 28 bytes into the message (RFC 2131, section 2), after UDP's header.
        ip().port(IPPROTO_UDP, DHCP_SERVER).payload(2, 8 + 28, 6).compare(true, &mac.0).drop(),
        // Of a packet with a wrong header no port is known above, and who reads raw frames may take it all the same.
        ip().well_formed().payload(1, 12, 4).compare(false, &address.octets()).accept(),
        ip().whole().payload(1, 12, 4).compare(false, &[0; 4]).port(IPPROTO_UDP, DHCP_SERVER).accept(),
    ]
}

/// What a guest may send: frames with its own MAC that are ARP, IPv4 or, where it has that, IPv6 with its own address,
/// or a request to a DHCP server. Anything else goes nowhere: tagged frames, bridges' and switches' protocols.
pub(super) fn rules(guest: &Guest) -> Vec<Rule> {
    let mut rules = ethernet_rules(guest.mac);
    rules.extend(arp_rules(guest.mac, guest.address));
    rules.extend(ipv4_rules(guest.mac, guest.address));
    if let Some(address) = guest.address6 {
        rules.extend(guard6::rules(guest.mac, address));
    }
    rules.push(Rule::new().drop());
    rules
}

/// Makes and deletes an interface's chain, so that none is left.
fn no_chain(Chain { table: name, name: device }: &Chain) -> Vec<Message> {
    let attributes = || Attributes::new().string(NFTA_CHAIN_TABLE, name).string(NFTA_CHAIN_NAME, device);
    vec![
        table(NETDEV, NEW_TABLE, flags::CREATE, name),
        Message::new(NEW_CHAIN, flags::CREATE, &header(NETDEV, 0), attributes()),
        Message::new(DELETE_CHAIN, 0, &header(NETDEV, 0), attributes()),
    ]
}

/// The messages that replace the chain of one TAP.
fn messages(bridge: &str, guest: &Guest) -> Vec<Message> {
    let chain = chain_of(bridge, guest);
    [no_chain(&chain), new_chain(&chain, rules(guest), 0)].concat()
}

/// The messages that make the chain of one interface.
fn new_chain(Chain { table: name, name: device }: &Chain, rules: Vec<Rule>, exclusive: u16) -> Vec<Message> {
    let hook = Hook { number: INGRESS, priority: PRIORITY_FILTER, device: Some(device) };
    let mut chain = chain(NETDEV, name, device, "filter", hook);
    chain.flags |= exclusive;
    let mut messages = vec![table(NETDEV, NEW_TABLE, flags::CREATE, name), chain];
    messages.extend(rules.into_iter().map(|body| rule(NETDEV, name, device, body)));
    messages
}

/// What the host may receive on a further bridge: nothing, for it is at home on the first. Else a guest could reach it
/// there past the rules, which know the first alone.
pub(super) fn sealed() -> Vec<Rule> {
    vec![Rule::new().drop()]
}

/// Closes a further bridge to the host itself, with no moment in between where it was closed before.
///
/// # Errors
/// See [`guard`].
pub fn seal(bridge: &str, joint: &Joint) -> Result<(), Error> {
    let chain = Chain { table: table_name(bridge), name: joint.bridge.clone() };
    commit([no_chain(&chain), new_chain(&chain, sealed(), 0)].concat())
}

/// Lets nothing into the host from these TAPs but what their guests may send, with no moment in between where a former
/// chain is replaced.
///
/// # Errors
/// The kernel's; `OPNOTSUPP` where it lacks nf_tables for interfaces.
pub fn guard(bridge: &str, guests: &[Guest]) -> Result<(), Error> {
    for some in guests.chunks(GUESTS_AT_ONCE) {
        commit_long(some.iter().flat_map(|guest| messages(bridge, guest)).collect())?;
    }
    Ok(())
}

/// As [`guard`], for a TAP that was made just now: what takes its time is to delete a chain, and it has none.
///
/// # Errors
/// See [`guard`].
pub fn guard_new(bridge: &str, guest: &Guest) -> Result<(), Error> {
    match commit(new_chain(&chain_of(bridge, guest), rules(guest), flags::EXCLUSIVE)) {
        // Of a TAP of this name that is gone.
        Err(error) if error.errno == Errno::EXIST => guard(bridge, std::slice::from_ref(guest)),
        done => done,
    }
}

/// How many batches [`unguard`] makes of these.
pub fn batches_to_unguard(chains: &[Chain]) -> u32 {
    chains.len().div_ceil(GONE_AT_ONCE) as u32
}

/// Removes the chains of interfaces that are gone; newer kernels keep them without those.
///
/// # Errors
/// The kernel's.
pub fn unguard(chains: &[Chain]) -> Result<(), Error> {
    for some in chains.chunks(GONE_AT_ONCE) {
        commit(some.iter().flat_map(no_chain).collect())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{Isolation, LONGEST_BATCH};
    use super::*;

    #[test]
    fn a_batch_of_guards_fits_its_socket() {
        let guest = Guest {
            tap: "pt-123456789abc".to_owned(),
            mac: Mac([0xff; 6]),
            address: Ipv4Addr::new(10, 255, 255, 254),
            address6: Some(std::net::Ipv6Addr::LOCALHOST),
            isolated: Some(Isolation::Alone),
        };
        let mut bytes = Vec::new();
        for message in messages("exactly-15-chars", &guest) {
            message.encode(flags::ACK, 1, &mut bytes);
        }
        assert!(bytes.len() * GUESTS_AT_ONCE < LONGEST_BATCH, "{} bytes each", bytes.len());
        // One alone goes through any socket: the default of net.core.wmem_default is 212,992 bytes, half for data.
        assert!(bytes.len() < 106_496, "{} bytes", bytes.len());
    }

    #[test]
    fn few_vms_share_a_table_and_no_bridges_do() {
        let table = |bridge: &str, id: u32| {
            let guest = Guest {
                tap: "pt-x".to_owned(),
                mac: Mac::of_id(id),
                address: Ipv4Addr::LOCALHOST,
                address6: None,
                isolated: None,
            };
            chain_of(bridge, &guest).table
        };
        assert_eq!((table("puter0", 1), table("puter0", 63)), ("puter".to_owned(), "puter".to_owned()));
        assert_eq!((table("puter0", 64), table("lab.1", 4000)), ("puter/1".to_owned(), "puter-lab.1/62".to_owned()));
        for id in [1, 64, 65_524] {
            assert!(is_table_of("lab", &table("lab", id)) && !is_table_of("lab", &table("lab.1", id)));
            assert!(is_table_of("puter0", &table("puter0", id)) && !is_table_of("puter0", &table("lab", id)));
        }
    }
}
