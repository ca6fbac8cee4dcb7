//! What the kernel has of nftables, as far as puter looks at it.

use super::{
    Attributes, Element, Error, GET_CHAIN, GET_ELEMENT, GET_RULE, GET_TABLE, Message, NFTA_CHAIN_HOOK, NFTA_CHAIN_NAME,
    NFTA_CHAIN_POLICY, NFTA_CHAIN_TABLE, NFTA_CHAIN_TYPE, NFTA_HOOK_HOOKNUM, NFTA_LIST_ELEM, NFTA_RULE_CHAIN,
    NFTA_RULE_EXPRESSIONS, NFTA_RULE_HANDLE, NFTA_RULE_TABLE, NFTA_RULE_USERDATA, NFTA_SET_ELEM_DATA,
    NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_LIST_ELEMENTS, NFTA_SET_ELEM_LIST_SET, NFTA_SET_ELEM_LIST_TABLE, NFTA_TABLE_FLAGS,
    NFTA_TABLE_NAME, Socket, header, rule,
};
use crate::net::message::{attributes, text};

/// Size of `struct nfgenmsg`.
const HEADER: usize = 4;
/// A table whose chains are not called (NFT_TABLE_F_DORMANT).
const DORMANT: u32 = 1;

/// A chain that the kernel calls at a hook.
pub(super) struct Chain {
    pub table: String,
    pub name: String,
    pub kind: String,
    pub hook: u32,
    pub policy: u32,
}

/// A rule.
#[derive(Debug)]
pub(super) struct Ruled {
    pub chain: String,
    pub handle: u64,
    /// The list of its expressions.
    pub expressions: Vec<u8>,
    pub userdata: Vec<u8>,
}

/// The number in network byte order that an attribute holds.
pub(super) fn be32(payload: &[u8]) -> Option<u32> {
    payload.first_chunk().map(|b| u32::from_be_bytes(*b))
}

/// The payload of the first attribute of this kind.
pub(super) fn find(body: &[u8], skip: usize, wanted: u16) -> Option<&[u8]> {
    attributes(body, skip).find(|(kind, _)| *kind == wanted).map(|(_, payload)| payload)
}

fn dump(socket: &mut Socket, kind: u16, family: u8, filter: Attributes) -> Result<Vec<Vec<u8>>, Error> {
    fold(socket, (kind, family), filter, Vec::new, |bodies, body| bodies.push(body.to_vec()))
}

/// As [`Socket::fold`], with the entries of one family: the list may hold others on some kernels.
fn fold<T>(
    socket: &mut Socket,
    (kind, family): (u16, u8),
    filter: Attributes,
    init: impl Fn() -> T,
    mut step: impl FnMut(&mut T, &[u8]),
) -> Result<T, Error> {
    socket.fold(&Message::new(kind, 0, &header(family, 0), filter), init, |made, _, body| {
        if body.first() == Some(&family) {
            step(made, body);
        }
    })
}

/// The tables of a family whose chains the kernel calls.
pub(super) fn awake(socket: &mut Socket, family: u8) -> Result<Vec<String>, Error> {
    let tables = dump(socket, GET_TABLE, family, Attributes::new())?;
    let awake =
        tables.iter().filter(|body| find(body, HEADER, NFTA_TABLE_FLAGS).and_then(be32).unwrap_or(0) & DORMANT == 0);
    Ok(awake.filter_map(|body| find(body, HEADER, NFTA_TABLE_NAME)).map(text).collect())
}

/// Whether there is this table and the kernel calls its chains.
pub(super) fn is_awake(socket: &mut Socket, family: u8, name: &str) -> Result<bool, Error> {
    Ok(awake(socket, family)?.iter().any(|table| table == name))
}

/// The chains of a family that stand at a hook.
pub(super) fn chains(socket: &mut Socket, family: u8) -> Result<Vec<Chain>, Error> {
    let read = |body: Vec<u8>| {
        let word = |kind| find(&body, HEADER, kind).map(text);
        Some(Chain {
            table: word(NFTA_CHAIN_TABLE)?,
            name: word(NFTA_CHAIN_NAME)?,
            kind: word(NFTA_CHAIN_TYPE)?,
            hook: find(find(&body, HEADER, NFTA_CHAIN_HOOK)?, 0, NFTA_HOOK_HOOKNUM).and_then(be32)?,
            policy: find(&body, HEADER, NFTA_CHAIN_POLICY).and_then(be32)?,
        })
    };
    Ok(dump(socket, GET_CHAIN, family, Attributes::new())?.into_iter().filter_map(read).collect())
}

/// Makes something of the rules of a table, in order within each chain, one at a time.
pub(super) fn each_rule<T>(
    socket: &mut Socket,
    family: u8,
    table: &str,
    init: impl Fn() -> T,
    mut step: impl FnMut(&mut T, Ruled),
) -> Result<T, Error> {
    let read = |body: &[u8]| {
        // Older kernels do not filter.
        if find(body, HEADER, NFTA_RULE_TABLE).map(text).as_deref() != Some(table) {
            return None;
        }
        Some(Ruled {
            chain: find(body, HEADER, NFTA_RULE_CHAIN).map(text)?,
            handle: find(body, HEADER, NFTA_RULE_HANDLE)?.first_chunk().map(|b| u64::from_be_bytes(*b))?,
            expressions: find(body, HEADER, NFTA_RULE_EXPRESSIONS).unwrap_or_default().to_vec(),
            userdata: find(body, HEADER, NFTA_RULE_USERDATA).unwrap_or_default().to_vec(),
        })
    };
    let filter = Attributes::new().string(NFTA_RULE_TABLE, table);
    fold(socket, (GET_RULE, family), filter, init, |made, body| {
        if let Some(rule) = read(body) {
            step(made, rule);
        }
    })
}

/// The rules of a table, in order within each chain.
pub(super) fn rules(socket: &mut Socket, family: u8, table: &str) -> Result<Vec<Ruled>, Error> {
    each_rule(socket, family, table, Vec::new, Vec::push)
}

/// The elements of a set, sorted.
pub(super) fn elements(socket: &mut Socket, family: u8, table: &str, set: &str) -> Result<Vec<Element>, Error> {
    let filter = Attributes::new().string(NFTA_SET_ELEM_LIST_TABLE, table).string(NFTA_SET_ELEM_LIST_SET, set);
    let chain = |element: &[u8]| {
        let verdict = find(find(element, 0, NFTA_SET_ELEM_DATA)?, 0, rule::NFTA_DATA_VERDICT)?;
        find(verdict, 0, rule::NFTA_VERDICT_CHAIN).map(text)
    };
    let mut all = Vec::new();
    for body in dump(socket, GET_ELEMENT, family, filter)? {
        let list = find(&body, HEADER, NFTA_SET_ELEM_LIST_ELEMENTS).unwrap_or_default();
        for (_, element) in attributes(list, 0).filter(|(kind, _)| *kind == NFTA_LIST_ELEM) {
            let key = find(element, 0, NFTA_SET_ELEM_KEY).and_then(|key| find(key, 0, rule::NFTA_DATA_VALUE));
            all.extend(key.map(|key| Element { key: key.to_vec(), chain: chain(element) }));
        }
    }
    all.sort_unstable();
    Ok(all)
}
