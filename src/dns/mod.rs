//! Names on the bridge: each VM by its own, everything else from the host's name servers. What a query comes to is
//! decided here, bytes in and bytes out; the sockets are in `server.rs`, the way to the host's servers in `upstream.rs`.

pub mod server;
mod upstream;

pub use upstream::relayed;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use simple_dns::rdata::{A, AAAA, OPT, PTR, RData, SOA};
use simple_dns::{CLASS, Name, OPCODE, Packet, PacketFlag, QCLASS, QTYPE, Question, RCODE, ResourceRecord, TYPE};

use crate::protocol::address::Subnet;
pub use crate::protocol::address::{DOMAIN, HOST};
use crate::protocol::ipv6::Network6;

/// Seconds for which an answer of ours may be kept: names come and go with their VMs.
const TTL: u32 = 5;
/// Bytes of a message's header (RFC 1035, section 4.1.1).
const HEADER: usize = 12;
/// What a client takes by UDP unless it says otherwise (RFC 1035, section 4.2.1), and what we say of ourselves.
const UDP_SIZE: u16 = 1232;

/// Whom the names stand for.
pub trait Names {
    /// The address of the VM with this name.
    fn address(&self, vm: &str) -> Option<Ipv4Addr>;
    /// Its IPv6 address, where VMs have that.
    fn address6(&self, vm: &str) -> Option<Ipv6Addr>;
    /// The VM with this address.
    fn name(&self, address: IpAddr) -> Option<String>;
    /// The cluster of the VM with this IPv4 address.
    fn cluster(&self, address: IpAddr) -> Option<String>;
    /// The VM that is this member of the cluster.
    fn member(&self, cluster: &str, member: &str) -> Option<String>;
    /// Whether the cluster has members here.
    fn has_cluster(&self, cluster: &str) -> bool;
    /// The VMs' network.
    fn subnet(&self) -> Subnet;
    /// Their IPv6 network, where they have one.
    fn network6(&self) -> Option<Network6>;
}

/// What a query comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Answer(Vec<u8>),
    /// The host's servers know, or do not.
    Forward,
    /// It is no query.
    Ignore,
}

/// Decides about one message. What a name stands for depends on the guest that asks: the other members of its cluster
/// come first.
pub fn handle(bytes: &[u8], names: &dyn Names, asker: Option<IpAddr>) -> Outcome {
    let Some(header) = bytes.first_chunk::<HEADER>() else { return Outcome::Ignore };
    let count = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    if header[2] & 0x80 != 0 {
        return Outcome::Ignore;
    }
    if (header[2] >> 3) & 0x0f != 0 {
        return Outcome::Answer(refusal(bytes, RCODE::NotImplemented));
    }
    // One question, and beside it at most EDNS and a signature: all that clients send (RFC 9619).
    if count(4) != 1 || count(6) != 0 || count(8) != 0 || count(10) > 2 {
        return Outcome::Answer(refusal(bytes, RCODE::FormatError));
    }
    if let Some(outcome) = unknown_type(bytes, names, asker) {
        return outcome;
    }
    let Ok(query) = Packet::parse(bytes) else { return Outcome::Answer(refusal(bytes, RCODE::FormatError)) };
    let Some(question) = query.questions.first() else {
        return Outcome::Answer(refusal(bytes, RCODE::FormatError));
    };
    if !matches!(question.qclass, QCLASS::CLASS(CLASS::IN) | QCLASS::ANY) {
        return Outcome::Answer(refusal(bytes, RCODE::Refused));
    }
    match look_up(question, names, asker) {
        Found::Elsewhere => Outcome::Forward,
        found => {
            Outcome::Answer(answer(&query, question, found).unwrap_or_else(|| refusal(bytes, RCODE::ServerFailure)))
        }
    }
}

/// Decides about a question for a type that the library has no name for; there are always more of those (RFC 3597). A
/// type that no machine has a record of stands for it meanwhile.
fn unknown_type(bytes: &[u8], names: &dyn Names, asker: Option<IpAddr>) -> Option<Outcome> {
    fn asked(message: &mut [u8]) -> Option<&mut [u8; 2]> {
        let end = question_end(message)?;
        message.get_mut(end - 4..)?.first_chunk_mut()
    }
    let mut query = bytes.to_vec();
    let asked_for = *asked(&mut query)?;
    if QTYPE::try_from(u16::from_be_bytes(asked_for)).is_ok() {
        return None;
    }
    *asked(&mut query)? = u16::from(TYPE::TXT).to_be_bytes();
    let mut outcome = handle(&query, names, asker);
    if let Outcome::Answer(answer) = &mut outcome
        && let Some(kind) = asked(answer)
    {
        *kind = asked_for;
    }
    Some(outcome)
}

/// What we know of a question.
enum Found {
    Record(RData<'static>),
    /// The name is there and has nothing of this type.
    Nothing,
    NoName,
    Elsewhere,
}

fn look_up(question: &Question, names: &dyn Names, asker: Option<IpAddr>) -> Found {
    let Some(labels) = labels(&question.qname) else { return Found::Elsewhere };
    let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
    let asks = |kind: TYPE| question.qtype == QTYPE::TYPE(kind) || question.qtype == QTYPE::ANY;
    let machine = |name: &str| {
        let (four, six) = match names.address(name) {
            Some(address) => (address, names.address6(name)),
            None if name == HOST => (names.subnet().gateway(), names.network6().map(Network6::gateway)),
            None => return None,
        };
        Some(match six {
            _ if asks(TYPE::A) => Found::Record(RData::A(A::from(four))),
            Some(six) if asks(TYPE::AAAA) => Found::Record(RData::AAAA(AAAA::from(six))),
            _ => Found::Nothing,
        })
    };
    let own = asker.and_then(|address| names.cluster(address));
    let member = |cluster: &str, member: &str| names.member(cluster, member).and_then(|vm| machine(&vm));
    let near = |name: &str| own.as_deref().and_then(|cluster| member(cluster, name)).or_else(|| machine(name));
    match labels.as_slice() {
        [domain] if *domain == DOMAIN && names.address(DOMAIN).is_none() => Found::Nothing,
        // What has names below it is there, with nothing of its own (RFC 8020).
        [name, domain] if *domain == DOMAIN => match near(name) {
            None if names.has_cluster(name) => Found::Nothing,
            found => found.unwrap_or(Found::NoName),
        },
        [name, cluster, domain] if *domain == DOMAIN => member(cluster, name).unwrap_or(Found::NoName),
        // Only where it is the asker's own: another's may be called as a domain of the internet is.
        [name, cluster] if own.as_deref() == Some(*cluster) => member(cluster, name).unwrap_or(Found::Elsewhere),
        [.., domain] if labels.len() > 2 && *domain == DOMAIN => Found::NoName,
        // A name without a dot is one of ours or nobody's: the servers of the internet have no business with it.
        [name] => match near(name) {
            Some(found) => found,
            None if asks(TYPE::A) || asks(TYPE::AAAA) => Found::NoName,
            None => Found::Elsewhere,
        },
        [d, c, b, a, "in-addr", "arpa"] => {
            let Ok(address) = format!("{a}.{b}.{c}.{d}").parse::<Ipv4Addr>() else { return Found::Elsewhere };
            if !names.subnet().contains(address) {
                return Found::Elsewhere;
            }
            pointer(address.into(), address == names.subnet().gateway(), names, asks(TYPE::PTR))
        }
        [nibbles @ .., "ip6", "arpa"] => match (names.network6(), reversed(nibbles)) {
            (Some(network), Some(address)) if network.contains(address) => {
                pointer(address.into(), address == network.gateway(), names, asks(TYPE::PTR))
            }
            _ => Found::Elsewhere,
        },
        _ => Found::Elsewhere,
    }
}

/// The name of an address of ours.
fn pointer(address: IpAddr, is_host: bool, names: &dyn Names, asked: bool) -> Found {
    let name = names.name(address).or(is_host.then(|| HOST.to_string()));
    match name.and_then(|name| Name::new(&format!("{name}.{DOMAIN}")).ok().map(Name::into_owned)) {
        Some(name) if asked => Found::Record(RData::PTR(PTR(name))),
        Some(_) => Found::Nothing,
        None => Found::NoName,
    }
}

/// The address of 32 labels, the last four bits first (RFC 3596, section 2.5).
fn reversed(nibbles: &[&str]) -> Option<Ipv6Addr> {
    let one = |label: &&str| match label.as_bytes() {
        [digit @ (b'0'..=b'9' | b'a'..=b'f')] => char::from(*digit).to_digit(16),
        _ => None,
    };
    let digits: Vec<u32> = nibbles.iter().rev().map(one).collect::<Option<_>>()?;
    let number = digits.iter().fold(0_u128, |number, digit| (number << 4) | u128::from(*digit));
    (digits.len() == 32).then(|| number.into())
}

/// The name's labels in small letters (RFC 4343); `None` where one is no text.
fn labels(name: &Name) -> Option<Vec<String>> {
    let label = |bytes: &[u8]| std::str::from_utf8(bytes).ok().map(str::to_ascii_lowercase);
    name.as_bytes().map(label).collect()
}

fn answer(query: &Packet, question: &Question, found: Found) -> Option<Vec<u8>> {
    let mut reply = Packet::new_reply(query.id());
    let recursion = query.has_flags(PacketFlag::RECURSION_DESIRED);
    reply.set_flags(PacketFlag::AUTHORITATIVE_ANSWER | PacketFlag::RECURSION_AVAILABLE);
    if recursion {
        reply.set_flags(PacketFlag::RECURSION_DESIRED);
    }
    reply.questions.push(question.clone());
    match found {
        Found::Record(data) => {
            reply.answers.push(ResourceRecord::new(question.qname.clone(), CLASS::IN, TTL, data));
        }
        nothing => {
            if matches!(nothing, Found::NoName) {
                *reply.rcode_mut() = RCODE::NameError;
            }
            // For how long this may be remembered (RFC 2308).
            let zone = Name::new_unchecked(DOMAIN);
            let soa = SOA {
                mname: zone.clone(),
                rname: zone.clone(),
                serial: 1,
                refresh: 3600,
                retry: 600,
                expire: 86_400,
                minimum: TTL,
            };
            reply.name_servers.push(ResourceRecord::new(zone, CLASS::IN, TTL, RData::SOA(soa)));
        }
    }
    // Who speaks EDNS is answered in it (RFC 6891, section 6.1.1).
    if query.opt().is_some() {
        *reply.opt_mut() = Some(OPT { opt_codes: Vec::new(), udp_packet_size: UDP_SIZE, version: 0 });
    }
    reply.build_bytes_vec_compressed().ok()
}

/// An answer without records. The question is repeated where it can be read.
pub fn refusal(query: &[u8], code: RCODE) -> Vec<u8> {
    let id = query.first_chunk().map_or(0, |bytes| u16::from_be_bytes(*bytes));
    let mut reply = Packet::new_reply(id);
    if query.get(2).is_some_and(|flags| flags & 1 != 0) {
        reply.set_flags(PacketFlag::RECURSION_DESIRED);
    }
    reply.set_flags(PacketFlag::RECURSION_AVAILABLE);
    *reply.rcode_mut() = code;
    *reply.opcode_mut() = OPCODE::StandardQuery;
    let counts = query.get(4..6) == Some(&[0, 1]);
    let parsed = counts.then(|| question_end(query)).flatten();
    let mut bytes = reply.build_bytes_vec().unwrap_or_default();
    if let (Some(end), Some(question), true) = (parsed, query.get(HEADER..), bytes.len() == HEADER) {
        bytes[5] = 1;
        bytes.extend(&question[..end - HEADER]);
    }
    if let (Some(flags), Some(asked)) = (bytes.get_mut(2), query.get(2)) {
        *flags |= asked & 0x78;
    }
    bytes
}

/// Where the first question ends, its type and class included. A name in a question is not compressed.
fn question_end(message: &[u8]) -> Option<usize> {
    let mut at = HEADER;
    loop {
        match *message.get(at)? {
            0 => break,
            length @ 1..=63 => at += 1 + usize::from(length),
            _ => return None,
        }
    }
    Some(at + 5).filter(|end| *end <= message.len() && at - HEADER < 255)
}

#[cfg(test)]
mod tests;
