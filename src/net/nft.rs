//! puter's nftables tables (linux/netfilter/nf_tables.h), all with the same name: one for the bridge, one with a chain
//! for each TAP, one that keeps isolated TAPs apart. Each table or chain is replaced whole in one batch.

mod cluster;
mod dump;
mod foreign;
mod guard;
mod guard6;
mod host;
mod isolation;
mod rule;
mod verify;

pub use foreign::{Firewall, Place, admit, dismiss, firewalls};
pub use guard::{Chain, batches_to_unguard, chain_of, guard, guard_new, seal, unguard};
pub use host::{Policy, install};
pub use isolation::{isolate, separate};
pub use verify::{generation, is_whole, unguarded};

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::message::{Attributes, Message, flags};
use super::{Error, Socket};
use crate::protocol::address::Mac;
use rule::{ACCEPT, Rule};

const NFNL_MSG_BATCH_BEGIN: u16 = 16;
const NFNL_MSG_BATCH_END: u16 = 17;
/// NFNL_SUBSYS_NFTABLES.
const SUBSYSTEM: u16 = 10;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const GET_TABLE: u16 = (SUBSYSTEM << 8) | 1;
const DELETE_TABLE: u16 = (SUBSYSTEM << 8) | 2;
const NEW_CHAIN: u16 = (SUBSYSTEM << 8) | 3;
const GET_CHAIN: u16 = (SUBSYSTEM << 8) | 4;
const DELETE_CHAIN: u16 = (SUBSYSTEM << 8) | 5;
const NEW_RULE: u16 = (SUBSYSTEM << 8) | 6;
const GET_RULE: u16 = (SUBSYSTEM << 8) | 7;
const DELETE_RULE: u16 = (SUBSYSTEM << 8) | 8;
const NEW_SET: u16 = (SUBSYSTEM << 8) | 9;
const NEW_ELEMENT: u16 = (SUBSYSTEM << 8) | 12;
const GET_ELEMENT: u16 = (SUBSYSTEM << 8) | 13;
const DELETE_ELEMENT: u16 = (SUBSYSTEM << 8) | 14;
const GET_GENERATION: u16 = (SUBSYSTEM << 8) | 16;
/// IPv4 and IPv6 at once (NFPROTO_INET).
const INET: u8 = 1;
/// IPv4 alone, where iptables keeps its tables (NFPROTO_IPV4).
const IPV4: u8 = 2;
/// IPv6 alone (NFPROTO_IPV6).
const IPV6: u8 = 10;
/// What arrives on one interface, before all else (NFPROTO_NETDEV).
const NETDEV: u8 = 5;
/// What a bridge passes from port to port (NFPROTO_BRIDGE).
const BRIDGE: u8 = 7;

const NFTA_TABLE_NAME: u16 = 1;
const NFTA_TABLE_FLAGS: u16 = 2;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NFTA_HOOK_DEV: u16 = 3;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_HANDLE: u16 = 3;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_RULE_USERDATA: u16 = 7;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_SET_TABLE: u16 = 1;
const NFTA_SET_NAME: u16 = 2;
const NFTA_SET_FLAGS: u16 = 3;
const NFTA_SET_KEY_TYPE: u16 = 4;
const NFTA_SET_KEY_LEN: u16 = 5;
const NFTA_SET_DATA_TYPE: u16 = 6;
const NFTA_SET_ID: u16 = 10;
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_DATA: u16 = 2;

const PRIORITY_FILTER: i32 = 0;
/// Each key of the set leads somewhere (NFT_SET_MAP, NFT_DATA_VERDICT).
const SET_MAP: u32 = 8;
const DATA_VERDICT: u32 = 0xffff_ff00;
/// The set of what is isolated: addresses in the bridge's table, interfaces in the one that keeps TAPs apart.
const ISOLATED: &str = "isolated";
/// The set of isolated guests' IPv6 addresses.
const ISOLATED6: &str = "isolated6";
/// The longest batch in bytes.
const LONGEST_BATCH: usize = 2 << 20;
/// How many elements of a set are in one message: a list of them has at most 64 KiB.
const ELEMENTS_AT_ONCE: usize = 400;

/// A TAP and what its guest may call itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    /// The TAP's name.
    pub tap: String,
    pub mac: Mac,
    pub address: Ipv4Addr,
    /// Its IPv6 address besides the one of its link alone, where guests have IPv6.
    pub address6: Option<Ipv6Addr>,
    /// Whether it is kept from other guests, and from which.
    pub isolated: Option<Isolation>,
}

/// From whom a guest is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Isolation {
    /// All others.
    Alone,
    /// All that are not isolated members of this cluster.
    WithCluster(String),
}

/// How a further bridge is joined to the first: names of interfaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Joint {
    /// The further bridge.
    pub bridge: String,
    /// The first bridge's port that leads to it.
    pub near: String,
    /// Its own port that leads to the first.
    pub far: String,
}

/// The name of a bridge's tables: `puter`, or for a second installation's bridge `puter-<bridge>`.
pub fn table_name(bridge: &str) -> String {
    if bridge == "puter0" { "puter".to_owned() } else { format!("puter-{bridge}") }
}

/// The header of each message of a batch (`struct nfgenmsg`).
fn header(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

fn table(family: u8, kind: u16, flags: u16, name: &str) -> Message {
    Message::new(kind, flags, &header(family, 0), Attributes::new().string(NFTA_TABLE_NAME, name))
}

/// Makes a table anew, whether or not there is one: deleting one that does not exist fails, so it is made first.
fn fresh_table(family: u8, name: &str) -> Vec<Message> {
    vec![
        table(family, NEW_TABLE, flags::CREATE, name),
        table(family, DELETE_TABLE, 0, name),
        table(family, NEW_TABLE, flags::CREATE, name),
    ]
}

fn rule(family: u8, table: &str, chain: &str, rule: Rule) -> Message {
    let attributes = Attributes::new()
        .string(NFTA_RULE_TABLE, table)
        .string(NFTA_RULE_CHAIN, chain)
        .nest(NFTA_RULE_EXPRESSIONS, rule.0);
    Message::new(NEW_RULE, flags::CREATE | flags::APPEND, &header(family, 0), attributes)
}

/// Where a chain is called.
#[derive(Clone, Copy)]
struct Hook<'a> {
    number: u32,
    priority: i32,
    /// The interface, for the family netdev.
    device: Option<&'a str>,
}

fn chain(family: u8, table: &str, name: &str, kind: &str, hook: Hook<'_>) -> Message {
    let place =
        Attributes::new().be32(NFTA_HOOK_HOOKNUM, hook.number).bytes(NFTA_HOOK_PRIORITY, &hook.priority.to_be_bytes());
    let place = match hook.device {
        Some(device) => place.string(NFTA_HOOK_DEV, device),
        None => place,
    };
    let attributes = Attributes::new()
        .string(NFTA_CHAIN_TABLE, table)
        .string(NFTA_CHAIN_NAME, name)
        .nest(NFTA_CHAIN_HOOK, place)
        .be32(NFTA_CHAIN_POLICY, ACCEPT)
        .string(NFTA_CHAIN_TYPE, kind);
    Message::new(NEW_CHAIN, flags::CREATE, &header(family, 0), attributes)
}

/// What the keys of a set are: a type as nft(8) numbers it, and its length in bytes.
#[derive(Clone, Copy)]
struct Kind {
    number: u32,
    length: u32,
}

/// nft(8)'s types `ipv4_addr`, `ipv6_addr`, `ether_addr` and `ifname`.
const ADDRESS: Kind = Kind { number: 7, length: 4 };
const ADDRESS6: Kind = Kind { number: 8, length: 16 };
const MAC: Kind = Kind { number: 9, length: 6 };
const INTERFACE: Kind = Kind { number: 41, length: 16 };

/// A set of keys, which lead to chains where it is a map, with a number of its own in its batch.
fn set(family: u8, table: &str, (name, number): (&str, u32), keys: Kind, map: bool) -> Message {
    let attributes = Attributes::new().string(NFTA_SET_TABLE, table).string(NFTA_SET_NAME, name);
    let attributes = match map {
        true => attributes.be32(NFTA_SET_FLAGS, SET_MAP).be32(NFTA_SET_DATA_TYPE, DATA_VERDICT),
        false => attributes,
    };
    let attributes =
        attributes.be32(NFTA_SET_KEY_TYPE, keys.number).be32(NFTA_SET_KEY_LEN, keys.length).be32(NFTA_SET_ID, number);
    Message::new(NEW_SET, flags::CREATE, &header(family, 0), attributes)
}

/// A key of a set, and the chain to which it leads in a map.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Element {
    key: Vec<u8>,
    chain: Option<String>,
}

impl Element {
    fn of(key: impl Into<Vec<u8>>) -> Element {
        Element { key: key.into(), chain: None }
    }
}

/// Adds elements to a set or takes them away.
fn elements(family: u8, kind: u16, table: &str, set: &str, all: &[Element]) -> Message {
    let list = all.iter().fold(Attributes::new(), |list, element| {
        let key = Attributes::new().bytes(rule::NFTA_DATA_VALUE, &element.key);
        let one = Attributes::new().nest(NFTA_SET_ELEM_KEY, key);
        let one = match &element.chain {
            Some(chain) if kind == NEW_ELEMENT => one.nest(NFTA_SET_ELEM_DATA, rule::jump(chain)),
            _ => one,
        };
        list.nest(NFTA_LIST_ELEM, one)
    });
    let attributes = Attributes::new()
        .string(NFTA_SET_ELEM_LIST_TABLE, table)
        .string(NFTA_SET_ELEM_LIST_SET, set)
        .nest(NFTA_SET_ELEM_LIST_ELEMENTS, list);
    let flags = if kind == NEW_ELEMENT { flags::CREATE } else { 0 };
    Message::new(kind, flags, &header(family, 0), attributes)
}

fn framed(messages: Vec<Message>) -> Vec<Message> {
    let mark = |kind| Message::new(kind, 0, &header(0, SUBSYSTEM), Attributes::new());
    let mut batch = vec![mark(NFNL_MSG_BATCH_BEGIN)];
    batch.extend(messages);
    batch.push(mark(NFNL_MSG_BATCH_END));
    batch
}

/// Sends one batch, which the kernel takes on whole or not at all.
fn commit(messages: Vec<Message>) -> Result<(), Error> {
    Socket::netfilter()?.batch(&framed(messages), true)
}

/// As [`commit`], for a batch longer than a socket's buffer is by default.
fn commit_long(messages: Vec<Message>) -> Result<(), Error> {
    let mut socket = Socket::netfilter()?;
    socket.widen(LONGEST_BATCH)?;
    socket.batch(&framed(messages), true)
}

/// The messages that fill sets.
fn fill(family: u8, table: &str, sets: &BTreeMap<String, Vec<Element>>) -> Vec<Message> {
    let of = |(set, all): (&String, &Vec<Element>)| -> Vec<Message> {
        all.chunks(ELEMENTS_AT_ONCE).map(|some| elements(family, NEW_ELEMENT, table, set, some)).collect()
    };
    sets.iter().flat_map(of).collect()
}

/// As [`commit`], for what may be too much for one batch. A table that is installed so with its sets has no moment
/// without them where there are not very many.
fn commit_all(messages: Vec<Message>) -> Result<(), Error> {
    batches(messages).into_iter().try_for_each(commit_long)
}

/// As much as fits in each batch, in order.
fn batches(messages: Vec<Message>) -> Vec<Vec<Message>> {
    let mut all = vec![Vec::new()];
    let mut length = 0;
    for message in messages {
        if length + message.length() > LONGEST_BATCH / 2 {
            all.push(Vec::new());
            length = 0;
        }
        length += message.length();
        all.last_mut().expect("there is one").push(message);
    }
    all
}

/// Removes the tables for this bridge and its TAPs, if there are any.
///
/// # Errors
/// The kernel's.
pub fn remove(bridge: &str) -> Result<(), Error> {
    let name = table_name(bridge);
    let gone =
        |family, name: &str| [table(family, NEW_TABLE, flags::CREATE, name), table(family, DELETE_TABLE, 0, name)];
    let mut messages = gone(INET, &name).to_vec();
    let tables = dump::awake(&mut Socket::netfilter()?, NETDEV)?;
    let of_taps = tables.iter().filter(|table| guard::is_table_of(bridge, table));
    messages.extend(of_taps.chain([&name]).flat_map(|table| gone(NETDEV, table)));
    commit_long(messages)?;
    match commit(gone(BRIDGE, &name).into()) {
        // The kernel has no such tables, so there is none to remove.
        Err(error) if isolation::is_absent(&error) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::address::Subnet;

    #[test]
    fn the_batch_is_framed_and_deletes_before_it_makes() {
        let network6 = Some("fd00::/64".parse().unwrap());
        let policy = Policy {
            bridge: "puter0".to_owned(),
            joints: Vec::new(),
            subnet: Subnet::default(),
            network6,
            host_ports: Vec::new(),
        };
        let batch = framed(host::messages(&policy));
        let kinds: Vec<u16> = batch.iter().map(|m| m.kind).collect();
        assert_eq!(kinds[..4], [NFNL_MSG_BATCH_BEGIN, NEW_TABLE, DELETE_TABLE, NEW_TABLE]);
        assert_eq!(kinds.last(), Some(&NFNL_MSG_BATCH_END));
        assert_eq!(kinds.iter().filter(|k| **k == NEW_CHAIN).count(), 3);
        assert_eq!(kinds.iter().filter(|k| **k == NEW_RULE).count(), host::rules(&policy).len());
    }

    #[test]
    fn an_accept_is_encoded_as_the_kernel_reads_it() {
        let expected = [
            (44u16.to_ne_bytes(), (NFTA_LIST_ELEM | 0x8000).to_ne_bytes()),
            (14u16.to_ne_bytes(), rule::NFTA_EXPR_NAME.to_ne_bytes()),
        ];
        let mut bytes = Vec::new();
        Message::new(0, 0, &[], Rule::new().accept().0).encode(0, 0, &mut bytes);
        let body = &bytes[crate::net::message::HEADER..];
        assert_eq!(body[..2], (body.len() as u16).to_ne_bytes());
        assert_eq!(body[2..4], expected[0].1);
        assert_eq!((&body[4..6], &body[6..8]), (&expected[1].0[..], &expected[1].1[..]));
        assert_eq!(&body[8..18], b"immediate\0");
        assert_eq!(body[body.len() - 4..], 1u32.to_be_bytes());
    }

    #[test]
    fn the_longest_list_of_elements_fits_its_attribute() {
        let chain = Some("c".repeat(71));
        let all = vec![Element { key: vec![0; 16], chain }; ELEMENTS_AT_ONCE];
        let mut bytes = Vec::new();
        elements(BRIDGE, NEW_ELEMENT, "puter-a-very-long-brid", ISOLATED, &all).encode(0, 1, &mut bytes);
        assert!(bytes.len() < usize::from(u16::MAX), "{}", bytes.len());
    }

    #[test]
    fn what_is_too_much_for_one_batch_goes_in_order_and_whole() {
        let message = |number| set(INET, "puter", ("s", number), ADDRESS, false);
        let whole = LONGEST_BATCH / 2 / message(0).length();
        let sent: Vec<Message> = (0..whole as u32 * 2 + 1).map(message).collect();
        let batches = batches(sent.clone());
        assert_eq!(batches.iter().map(Vec::len).collect::<Vec<_>>(), [whole, whole, 1]);
        let encode = |messages: &[Message]| {
            let mut bytes = Vec::new();
            messages.iter().for_each(|message| message.encode(0, 1, &mut bytes));
            bytes
        };
        assert_eq!(encode(&batches.concat()), encode(&sent));
        let few = super::batches(sent[..3].to_vec());
        assert_eq!((few.len(), few[0].len()), (1, 3));
    }

    #[test]
    fn a_second_bridge_has_a_table_of_its_own() {
        assert_eq!(table_name("puter0"), "puter");
        assert_eq!(table_name("lab0"), "puter-lab0");
    }
}
