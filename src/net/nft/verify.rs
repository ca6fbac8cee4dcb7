//! Whether the kernel still has puter's rules as they were given to it: others may flush or change them.

use std::collections::HashMap;

use rustix::io::Errno;

use super::dump::{self, Ruled};
use super::rule::Rule;
use super::{BRIDGE, Error, Guest, INET, NETDEV, Policy, Socket, guard, host, isolation, table_name};
use crate::net::message::{attributes, covers};

/// Whether a chain's rules are these.
fn same(expected: &[Rule], found: &[&Ruled]) -> bool {
    let count = |list: &[u8]| attributes(list, 0).count();
    expected.len() == found.len()
        && expected.iter().zip(found).all(|(rule, found)| {
            let sent = rule.0.as_bytes();
            count(sent) == count(&found.expressions) && covers(sent, &found.expressions)
        })
}

/// Whether a table is there, awake, and has exactly these rules in these chains.
fn table_is_whole(
    socket: &mut Socket,
    family: u8,
    name: &str,
    expected: &HashMap<&str, Vec<Rule>>,
) -> Result<bool, Error> {
    if !dump::is_awake(socket, family, name)? {
        return Ok(false);
    }
    let rules = dump::rules(socket, family, name)?;
    let mut found: HashMap<&str, Vec<&Ruled>> = HashMap::new();
    for rule in &rules {
        found.entry(&rule.chain).or_default().push(rule);
    }
    Ok(expected.iter().all(|(chain, rules)| found.get(chain).is_some_and(|found| same(rules, found))))
}

fn by_chain(rules: Vec<(&'static str, Rule)>) -> HashMap<&'static str, Vec<Rule>> {
    let mut chains: HashMap<&str, Vec<Rule>> = HashMap::new();
    for (chain, rule) in rules {
        chains.entry(chain).or_default().push(rule);
    }
    chains
}

/// Whether all that was installed for the bridge and these guests is in force.
///
/// # Errors
/// The kernel's.
pub fn is_whole(policy: &Policy, guests: &[Guest]) -> Result<bool, Error> {
    let mut socket = Socket::netfilter()?;
    let name = table_name(&policy.bridge);
    let mut tables = vec![(INET, by_chain(host::rules(policy)))];
    if !guests.is_empty() {
        let chains = guests.iter().map(|guest| (guest.tap.as_str(), guard::rules(guest)));
        tables.push((NETDEV, chains.collect()));
    }
    if guests.iter().any(|guest| guest.isolated) {
        tables.push((BRIDGE, by_chain(isolation::rules())));
    }
    for (family, chains) in &tables {
        if !table_is_whole(&mut socket, *family, &name, chains)? {
            return Ok(false);
        }
    }
    for (family, set, mut expected) in isolation::expected(guests) {
        expected.sort_unstable();
        match dump::keys(&mut socket, family, &name, set) {
            Ok(found) if found == expected => {}
            Err(error) if expected.is_empty() && error.errno == Errno::NOENT => {}
            Ok(_) => return Ok(false),
            Err(error) if error.errno == Errno::NOENT => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}
