//! Whether the kernel still has puter's rules as they were given to it: others may flush or change them.

use std::collections::{HashMap, HashSet};

use rustix::io::Errno;

use super::dump::{self, Ruled};
use super::rule::Rule;
use super::{
    BRIDGE, Chain, Error, GET_GENERATION, Guest, INET, Joint, Message, NETDEV, Policy, Socket, cluster, guard, header,
    host, isolation, table_name,
};
use crate::net::message::{Attributes, attributes, covers};

/// The number of a generation (NFTA_GEN_ID).
const NFTA_GEN_ID: u16 = 1;
/// Size of `struct nfgenmsg`.
const HEADER: usize = 4;

/// How many changes to nftables this network namespace has seen: as long as the number stays, so do the rules.
///
/// # Errors
/// The kernel's.
pub fn generation() -> Result<u32, Error> {
    let (_, body) = Socket::netfilter()?.get(&Message::new(GET_GENERATION, 0, &header(0, 0), Attributes::new()))?;
    let number = dump::find(&body, HEADER, NFTA_GEN_ID).and_then(dump::be32);
    number.ok_or(Error { errno: Errno::BADMSG, detail: None })
}

/// Compares a table's chains with what they must be, rule by rule as the kernel lists them: all of thousands of TAPs
/// would be a hundred megabytes.
struct Reader<'a, F> {
    /// What a chain must hold; `None` where it is none of puter's.
    expect: &'a F,
    now: Option<Reading>,
    found: Found,
}

/// What a table holds.
#[derive(Default)]
struct Found {
    /// Chains that hold what they must.
    whole: HashSet<String>,
    /// Those that must not be there.
    strays: Vec<String>,
}

struct Reading {
    chain: String,
    rules: std::vec::IntoIter<Rule>,
    same: bool,
}

impl<'a, F: Fn(&str) -> Option<Vec<Rule>>> Reader<'a, F> {
    fn new(expect: &'a F) -> Reader<'a, F> {
        Reader { expect, now: None, found: Found::default() }
    }

    fn read(&mut self, rule: &Ruled) {
        if self.now.as_ref().is_none_or(|now| now.chain != rule.chain) {
            self.end();
            let rules = (self.expect)(&rule.chain);
            if rules.is_none() {
                self.found.strays.push(rule.chain.clone());
            }
            let rules = rules.unwrap_or_default().into_iter();
            self.now = Some(Reading { chain: rule.chain.clone(), rules, same: true });
        }
        let Some(now) = &mut self.now else { return };
        now.same &= now.rules.next().is_some_and(|expected| same(&expected, rule));
    }

    /// A chain's rules stand together in the list.
    fn end(&mut self) {
        if let Some(mut now) = self.now.take()
            && now.same
            && now.rules.next().is_none()
        {
            self.found.whole.insert(now.chain);
        }
    }
}

/// Whether the kernel's rule is this one.
fn same(expected: &Rule, found: &Ruled) -> bool {
    let count = |list: &[u8]| attributes(list, 0).count();
    let sent = expected.0.as_bytes();
    count(sent) == count(&found.expressions) && covers(sent, &found.expressions)
}

/// Compares the chains of a table, which is awake.
fn compare(
    socket: &mut Socket,
    family: u8,
    name: &str,
    expect: impl Fn(&str) -> Option<Vec<Rule>>,
) -> Result<Found, Error> {
    let mut reader = dump::each_rule(socket, family, name, || Reader::new(&expect), |reader, rule| reader.read(&rule))?;
    reader.end();
    Ok(reader.found)
}

/// Whether a table has exactly these rules in these chains.
fn table_is_whole(
    socket: &mut Socket,
    family: u8,
    name: &str,
    rules: Vec<(&'static str, Rule)>,
    guests: &[Guest],
) -> Result<bool, Error> {
    let mut chains: HashMap<String, Vec<Rule>> = HashMap::new();
    let rules = rules.into_iter().map(|(chain, rule)| (chain.to_owned(), rule));
    for (chain, rule) in rules.chain(cluster::rules(family, guests)) {
        chains.entry(chain).or_default().push(rule);
    }
    if !dump::is_awake(socket, family, name)? {
        return Ok(false);
    }
    let whole = compare(socket, family, name, |chain| chains.get(chain).cloned())?.whole;
    Ok(chains.keys().all(|chain| whole.contains(chain)))
}

/// The interfaces whose chains are as they must be, and chains that must not be there.
fn guarded(socket: &mut Socket, policy: &Policy, guests: &[Guest]) -> Result<(HashSet<String>, Vec<Chain>), Error> {
    let by_tap: HashMap<&str, &Guest> = guests.iter().map(|guest| (guest.tap.as_str(), guest)).collect();
    let own = table_name(&policy.bridge);
    let (mut whole, mut strays) = (HashSet::new(), Vec::new());
    for table in dump::awake(socket, NETDEV)?.into_iter().filter(|table| guard::is_table_of(&policy.bridge, table)) {
        let joint = |chain: &str| table == own && policy.joints.iter().any(|joint| joint.bridge == chain);
        let found = compare(socket, NETDEV, &table, |chain| match by_tap.get(chain) {
            Some(guest) => (guard::chain_of(&policy.bridge, guest).table == table).then(|| guard::rules(guest)),
            None => joint(chain).then(guard::sealed),
        })?;
        whole.extend(found.whole);
        strays.extend(found.strays.into_iter().map(|name| Chain { table: table.clone(), name }));
    }
    Ok((whole, strays))
}

/// What the tables of the family netdev lack, and what they have too much.
#[derive(Debug)]
pub struct Gaps {
    /// Whose TAPs' chains are not as they must be.
    pub guests: Vec<Guest>,
    /// Whose further bridges' chains are not.
    pub joints: Vec<Joint>,
    /// Chains of interfaces that are not there, or in another's table.
    pub strays: Vec<Chain>,
}

/// Looks which chains of TAPs and further bridges are not as they must be.
///
/// # Errors
/// The kernel's.
pub fn unguarded(policy: &Policy, guests: &[Guest]) -> Result<Gaps, Error> {
    let (whole, strays) = guarded(&mut Socket::netfilter()?, policy, guests)?;
    Ok(Gaps {
        guests: guests.iter().filter(|guest| !whole.contains(&guest.tap)).cloned().collect(),
        joints: policy.joints.iter().filter(|joint| !whole.contains(&joint.bridge)).cloned().collect(),
        strays,
    })
}

/// Whether all that was installed for the bridge and these guests is in force.
///
/// # Errors
/// The kernel's.
pub fn is_whole(policy: &Policy, guests: &[Guest]) -> Result<bool, Error> {
    let mut socket = Socket::netfilter()?;
    let name = table_name(&policy.bridge);
    if !table_is_whole(&mut socket, INET, &name, host::rules(policy), guests)? {
        return Ok(false);
    }
    if !guests.is_empty() || !policy.joints.is_empty() {
        let (whole, strays) = guarded(&mut socket, policy, guests)?;
        // One of a TAP that is gone does no harm, another than its own would stop what is a TAP's own.
        let strays: HashSet<&str> = strays.iter().map(|chain| chain.name.as_str()).collect();
        let taps = guests.iter().all(|guest| whole.contains(&guest.tap) && !strays.contains(guest.tap.as_str()));
        if !taps || !policy.joints.iter().all(|joint| whole.contains(&joint.bridge)) {
            return Ok(false);
        }
    }
    let isolated = guests.iter().any(|guest| guest.isolated.is_some());
    if isolated && !table_is_whole(&mut socket, BRIDGE, &name, isolation::rules(), guests)? {
        return Ok(false);
    }
    for (family, set, mut expected) in isolation::expected(policy, guests) {
        // Where nobody is isolated the kernel need not know such tables.
        if family == BRIDGE && !isolated && !dump::is_awake(&mut socket, family, &name).unwrap_or(false) {
            continue;
        }
        expected.sort_unstable();
        match dump::elements(&mut socket, family, &name, &set) {
            Ok(found) if found == expected => {}
            Err(error) if expected.is_empty() && error.errno == Errno::NOENT => {}
            Ok(_) => return Ok(false),
            Err(error) if error.errno == Errno::NOENT => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}
