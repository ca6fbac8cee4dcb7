//! The state machine against RFC 2131 and RFC 2132, as tables: each row names the section that it holds us to.

mod parameters;
mod states;
mod wire;

use std::net::Ipv4Addr;
use std::time::Instant;

use super::message::{code, kind};
use super::{Config, Directory, Engine, Host, Reply};
use crate::protocol::address::{Mac, Subnet};

const OWN: [u8; 4] = [10, 0, 0, 11];
const OTHER: [u8; 4] = [10, 0, 0, 99];
const SERVER: [u8; 4] = [10, 0, 0, 1];
const NONE: [u8; 4] = [0; 4];
/// Where each field of the fixed header is (RFC 2131, figure 1).
const FLAGS: usize = 10;
const CIADDR: usize = 12;
const YIADDR: usize = 16;
const SIADDR: usize = 20;
const GIADDR: usize = 24;
const CHADDR: usize = 28;
const SNAME: usize = 44;
const FILE: usize = 108;
const MAGIC: usize = 236;
const OPTIONS: usize = 240;

/// Knows the first VM alone.
struct One;

impl Directory for One {
    fn host(&self, mac: Mac) -> Option<Host> {
        (mac == Mac::of_id(1)).then(|| Host { vm: "web".into(), ip: Ipv4Addr::from(OWN) })
    }
}

/// A message of the first VM.
fn message(kind: u8, ciaddr: [u8; 4], options: &[(u8, &[u8])]) -> Vec<u8> {
    let mut bytes = bare(ciaddr);
    push(&mut bytes, code::MESSAGE_TYPE, &[kind]);
    for (code, value) in options {
        push(&mut bytes, *code, value);
    }
    bytes.push(code::END);
    bytes
}

/// A message of the first VM without options.
fn bare(ciaddr: [u8; 4]) -> Vec<u8> {
    let mut bytes = vec![0; MAGIC];
    bytes[..8].copy_from_slice(&[1, 1, 6, 0, 1, 2, 3, 4]);
    bytes[CIADDR..YIADDR].copy_from_slice(&ciaddr);
    bytes[CHADDR..CHADDR + 6].copy_from_slice(&Mac::of_id(1).0);
    bytes.extend([99, 130, 83, 99]);
    bytes
}

fn push(bytes: &mut Vec<u8>, code: u8, value: &[u8]) {
    bytes.extend([code, value.len() as u8]);
    bytes.extend(value);
}

fn discover(options: &[(u8, &[u8])]) -> Vec<u8> {
    message(kind::DISCOVER, NONE, options)
}

fn engine() -> Engine {
    Engine::new(Config::new(Subnet::default()))
}

fn ask(engine: &mut Engine, bytes: &[u8]) -> Option<Reply> {
    engine.handle(Instant::now(), bytes, &One)
}

/// What a new server says to this.
fn answer(bytes: &[u8]) -> Option<Reply> {
    ask(&mut engine(), bytes)
}

/// The reply's options in order; it must have an end mark, and nothing but padding after it.
fn options(reply: &Reply) -> Vec<(u8, Vec<u8>)> {
    let (mut rest, mut found) = (&reply.payload[OPTIONS..], Vec::new());
    while rest[0] != code::END {
        let end = 2 + usize::from(rest[1]);
        found.push((rest[0], rest[2..end].to_vec()));
        rest = &rest[end..];
    }
    assert!(rest[1..].iter().all(|byte| *byte == code::PAD), "bytes after the end");
    found
}

fn order(reply: &Reply) -> Vec<u8> {
    options(reply).into_iter().map(|option| option.0).collect()
}

fn value(reply: &Reply, code: u8) -> Option<Vec<u8>> {
    options(reply).into_iter().find(|option| option.0 == code).map(|option| option.1)
}

fn kind_of(reply: &Reply) -> u8 {
    value(reply, code::MESSAGE_TYPE).unwrap()[0]
}
