//! Firewalls of others. A packet must pass every table: an accept in puter's own does not undo a drop in another's. So
//! where iptables' own table drops by default (docker, ufw), puter adds rules there that let its bridge pass, marked by
//! a comment.
//!
//! For what is forwarded they stand last, so that whatever the owner decides comes first: docker goes on closing its
//! containers to guests. For what goes to the host they stand first, since ufw drops DHCP before the chain's end; what
//! guests may send there is decided by puter's own table.

use super::dump::{self, Ruled};
use super::rule::{self, DROP, Meta, Rule};
use super::{
    Attributes, DELETE_RULE, Error, INET, IPV4, IPV6, Joint, Message, NEW_RULE, NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS,
    NFTA_RULE_HANDLE, NFTA_RULE_TABLE, NFTA_RULE_USERDATA, Socket, commit, flags, header, table_name,
};
use crate::net::message::{attributes, text};

const NFTA_RULE_POSITION: u16 = 6;
const LOCAL_IN: u32 = 1;
const FORWARD: u32 = 2;
/// The table that iptables' commands speak of.
const IPTABLES: &str = "filter";

/// Where a firewall looks at packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On their way to the host.
    Input,
    /// On their way through it.
    Forward,
}

/// A chain of somebody else that drops what it does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Firewall {
    /// As nft(8) writes it: `ip`, `ip6` or `inet`.
    pub family: &'static str,
    pub table: String,
    pub chain: String,
    pub place: Place,
    /// Whether something in its table speaks of the bridge.
    pub knows_bridge: bool,
    /// Whether puter's own rules are in it.
    pub admits: bool,
    /// The rule at its end that drops all that is left, where it does not drop by its policy.
    last: Option<u64>,
}

impl Firewall {
    /// Whether puter may add its rules: iptables' table is everybody's, others belong to who made them.
    pub fn is_shared(&self) -> bool {
        let chain = match self.place {
            Place::Input => "INPUT",
            Place::Forward => "FORWARD",
        };
        matches!(self.family, "ip" | "ip6") && self.table == IPTABLES && self.chain == chain
    }

    /// Whether it drops by its policy, and not by its last rule.
    pub fn by_policy(&self) -> bool {
        self.last.is_none()
    }
}

/// The comment that marks puter's rules for this bridge.
fn mark(bridge: &str) -> Vec<u8> {
    let comment = format!("puter:{bridge}\0");
    // A list of type (0: a comment), length and value, as libnftnl writes it.
    let mut bytes = vec![0, comment.len() as u8];
    bytes.extend(comment.bytes());
    bytes
}

/// Whether a rule drops whatever comes to it.
fn is_last_word(list: &[u8]) -> bool {
    let expressions: Vec<(String, &[u8])> = attributes(list, 0)
        .map(|(_, element)| {
            let name = dump::find(element, 0, rule::NFTA_EXPR_NAME).map(text).unwrap_or_default();
            (name, dump::find(element, 0, rule::NFTA_EXPR_DATA).unwrap_or_default())
        })
        .collect();
    let Some(((name, data), before)) = expressions.split_last() else { return false };
    let ends = match name.as_str() {
        "reject" => true,
        "immediate" => {
            let verdict = dump::find(data, 0, 2).and_then(|data| dump::find(data, 0, rule::NFTA_DATA_VERDICT));
            verdict.and_then(|verdict| dump::find(verdict, 0, rule::NFTA_VERDICT_CODE)).and_then(dump::be32)
                == Some(DROP)
        }
        "target" => dump::find(data, 0, 1).map(text).as_deref() == Some("REJECT"),
        _ => false,
    };
    ends && before.iter().all(|(name, _)| name == "counter" || name == "log")
}

/// The rules of puter's that a chain needs: by the bridge and, where br_netfilter shows their own frames, by the further
/// ones.
fn needed<'a>(bridge: &'a str, joints: &'a [Joint], place: Place) -> Vec<(Meta, &'a str)> {
    match place {
        Place::Input => vec![(Meta::InputName, bridge)],
        Place::Forward => {
            let further = joints.iter().map(|joint| (Meta::InputName, joint.bridge.as_str()));
            [(Meta::InputName, bridge), (Meta::OutputName, bridge)].into_iter().chain(further).collect()
        }
    }
}

/// All chains of others that drop what they do not know, on the way to the host or through it; with those for IPv6 alone
/// where guests have that.
///
/// # Errors
/// The kernel's.
pub fn firewalls(bridge: &str, joints: &[Joint], ipv6: bool) -> Result<Vec<Firewall>, Error> {
    let mut socket = Socket::netfilter()?;
    let mut found = Vec::new();
    let named = format!("{bridge}\0").into_bytes();
    let (mark, own) = (mark(bridge), table_name("puter0"));
    for (family, word) in [(IPV4, "ip"), (INET, "inet"), (IPV6, "ip6")] {
        if family == IPV6 && !ipv6 {
            continue;
        }
        for chain in dump::chains(&mut socket, family)? {
            let place = match chain.hook {
                LOCAL_IN => Place::Input,
                FORWARD => Place::Forward,
                _ => continue,
            };
            // Other bridges of puter look at their own packets alone.
            if chain.kind != "filter" || chain.table == own || chain.table.starts_with(&format!("{own}-")) {
                continue;
            }
            let rules = dump::rules(&mut socket, family, &chain.table)?;
            let here: Vec<&Ruled> = rules.iter().filter(|rule| rule.chain == chain.name).collect();
            let last = here.last().filter(|rule| is_last_word(&rule.expressions)).map(|rule| rule.handle);
            if chain.policy != DROP && last.is_none() {
                continue;
            }
            let marked = here.iter().filter(|rule| rule.userdata == mark).count();
            let knows = |rule: &&Ruled| rule.expressions.windows(named.len()).any(|part| part == named);
            found.push(Firewall {
                family: word,
                knows_bridge: rules.iter().any(|rule| knows(&rule)),
                admits: marked >= needed(bridge, joints, place).len(),
                table: chain.table,
                chain: chain.name,
                place,
                last,
            });
        }
    }
    Ok(found)
}

/// A rule as iptables writes it, so that its commands go on to understand the table.
fn accept(interface: &str, key: Meta) -> Rule {
    Rule::new().meta(key, false, format!("{interface}\0").as_bytes()).accept()
}

/// Adds puter's rules to a chain that is shared, in place of what is left of them.
///
/// # Errors
/// The kernel's.
pub fn admit(bridge: &str, joints: &[Joint], firewall: &Firewall) -> Result<(), Error> {
    let family = if firewall.family == "ip6" { IPV6 } else { IPV4 };
    let mut messages = marked(bridge, family, Some(&firewall.chain))?;
    for (key, name) in needed(bridge, joints, firewall.place) {
        let attributes = Attributes::new()
            .string(NFTA_RULE_TABLE, &firewall.table)
            .string(NFTA_RULE_CHAIN, &firewall.chain)
            .nest(NFTA_RULE_EXPRESSIONS, accept(name, key).0)
            .bytes(NFTA_RULE_USERDATA, &mark(bridge));
        // Without APPEND it comes first, or before the rule that is named.
        let (append, attributes) = match (firewall.place, firewall.last) {
            (Place::Input, _) => (0, attributes),
            (Place::Forward, Some(last)) => (0, attributes.bytes(NFTA_RULE_POSITION, &last.to_be_bytes())),
            (Place::Forward, None) => (flags::APPEND, attributes),
        };
        messages.push(Message::new(NEW_RULE, flags::CREATE | append, &header(family, 0), attributes));
    }
    commit(messages)
}

/// The messages that remove puter's rules from iptables' table of a family: from one chain, or from all.
fn marked(bridge: &str, family: u8, chain: Option<&str>) -> Result<Vec<Message>, Error> {
    let mark = mark(bridge);
    let rules = dump::rules(&mut Socket::netfilter()?, family, IPTABLES)?;
    let ours = rules.iter().filter(|rule| rule.userdata == mark && chain.is_none_or(|chain| rule.chain == chain));
    let remove = |rule: &Ruled| {
        let attributes = Attributes::new()
            .string(NFTA_RULE_TABLE, IPTABLES)
            .string(NFTA_RULE_CHAIN, &rule.chain)
            .bytes(NFTA_RULE_HANDLE, &rule.handle.to_be_bytes());
        Message::new(DELETE_RULE, 0, &header(family, 0), attributes)
    };
    Ok(ours.map(remove).collect())
}

/// Removes puter's rules from the tables of others.
///
/// # Errors
/// The kernel's.
pub fn dismiss(bridge: &str) -> Result<(), Error> {
    for family in [IPV4, IPV6] {
        let messages = marked(bridge, family, None)?;
        if !messages.is_empty() {
            commit(messages)?;
        }
    }
    Ok(())
}
