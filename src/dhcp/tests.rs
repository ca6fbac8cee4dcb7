//! The state machine against RFC 2131, case by case.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use super::message::{Request, code, kind};
use super::{Config, Destination, Directory, Engine, Host, Reply};
use crate::protocol::address::{Mac, Subnet};

const OWN: [u8; 4] = [10, 0, 0, 11];
const OTHER: [u8; 4] = [10, 0, 0, 99];
const SERVER: [u8; 4] = [10, 0, 0, 1];
const NONE: [u8; 4] = [0; 4];

struct One;

impl Directory for One {
    fn host(&self, mac: Mac) -> Option<Host> {
        (mac == Mac::of_id(1)).then(|| Host { vm: "web".into(), ip: Ipv4Addr::from(OWN) })
    }
}

fn message(mac: Mac, ciaddr: [u8; 4], options: &[(u8, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; 236];
    bytes[..8].copy_from_slice(&[1, 1, 6, 0, 1, 2, 3, 4]);
    bytes[12..16].copy_from_slice(&ciaddr);
    bytes[28..34].copy_from_slice(&mac.0);
    bytes.extend([99, 130, 83, 99]);
    for (code, value) in options {
        bytes.extend([*code, value.len() as u8]);
        bytes.extend(*value);
    }
    bytes.push(code::END);
    bytes
}

fn ask(engine: &mut Engine, bytes: &[u8]) -> Option<Reply> {
    engine.handle(Instant::now(), bytes, &One)
}

/// The reply's options in order.
fn options(reply: &Reply) -> Vec<(u8, Vec<u8>)> {
    let (mut rest, mut found) = (&reply.payload[240..], Vec::new());
    while rest[0] != code::END {
        let end = 2 + usize::from(rest[1]);
        found.push((rest[0], rest[2..end].to_vec()));
        rest = &rest[end..];
    }
    found
}

fn value(reply: &Reply, code: u8) -> Option<Vec<u8>> {
    options(reply).into_iter().find(|o| o.0 == code).map(|o| o.1)
}

fn engine() -> Engine {
    Engine::new(Config::new(Subnet::default()))
}

#[test]
fn each_state_of_a_client_gets_the_answer_of_the_rfc() {
    use code::{REQUESTED_IP as IP, SERVER_ID as ID};
    type Case<'a> = (&'a str, u8, [u8; 4], &'a [(u8, &'a [u8])], Option<u8>);
    let cases: &[Case] = &[
        ("discover", kind::DISCOVER, NONE, &[], Some(kind::OFFER)),
        ("discover, other wish", kind::DISCOVER, NONE, &[(IP, &OTHER)], Some(kind::OFFER)),
        ("selecting", kind::REQUEST, NONE, &[(IP, &OWN), (ID, &SERVER)], Some(kind::ACK)),
        ("selecting, wrong address", kind::REQUEST, NONE, &[(IP, &OTHER), (ID, &SERVER)], Some(kind::NAK)),
        ("selecting another server", kind::REQUEST, NONE, &[(IP, &OWN), (ID, &OTHER)], None),
        ("init-reboot", kind::REQUEST, NONE, &[(IP, &OWN)], Some(kind::ACK)),
        ("init-reboot, wrong address", kind::REQUEST, NONE, &[(IP, &OTHER)], Some(kind::NAK)),
        ("renewing or rebinding", kind::REQUEST, OWN, &[], Some(kind::ACK)),
        ("rebinding, wrong address", kind::REQUEST, OTHER, &[], Some(kind::NAK)),
        ("request for nothing", kind::REQUEST, NONE, &[], None),
        ("cut address", kind::REQUEST, NONE, &[(IP, &[10, 0, 0])], None),
        ("decline", kind::DECLINE, NONE, &[(IP, &OWN), (ID, &SERVER)], None),
        ("release", kind::RELEASE, OWN, &[(ID, &SERVER)], None),
        ("inform", kind::INFORM, OWN, &[], Some(kind::ACK)),
        ("inform for another", kind::INFORM, OTHER, &[], None),
        ("an offer from a rogue", kind::OFFER, NONE, &[], None),
    ];
    for (name, kind, ciaddr, extra, expected) in cases {
        let all: Vec<(u8, &[u8])> =
            [(code::MESSAGE_TYPE, std::slice::from_ref(kind))].into_iter().chain(extra.iter().copied()).collect();
        let reply = ask(&mut engine(), &message(Mac::of_id(1), *ciaddr, &all));
        let got = reply.as_ref().map(|r| value(r, code::MESSAGE_TYPE).unwrap()[0]);
        assert_eq!(got, *expected, "{name}");
        assert_eq!(ask(&mut engine(), &message(Mac::of_id(2), *ciaddr, &all)), None, "{name}, unknown MAC");
        let Some(reply) = reply else { continue };
        assert!(reply.payload.len() >= 300, "{name}");
        let nak = *expected == Some(kind::NAK);
        assert_eq!(reply.to == Destination::Broadcast, nak, "{name}");
        let given = if nak || *kind == kind::INFORM { NONE } else { OWN };
        assert_eq!(reply.payload[16..20], given, "{name}");
        assert_eq!(value(&reply, code::LEASE_TIME).is_some(), given == OWN, "{name}");
    }
}

#[test]
fn options_follow_the_clients_order_with_the_mask_before_the_router() {
    let wanted = [code::HOSTNAME, code::ROUTER, code::BROADCAST, code::SUBNET_MASK];
    let options_in: &[(u8, &[u8])] =
        &[(code::MESSAGE_TYPE, &[kind::DISCOVER]), (code::PARAMETERS, &wanted), (code::CLIENT_ID, b"\xffid")];
    let reply = ask(&mut engine(), &message(Mac::of_id(1), NONE, options_in)).unwrap();
    let order: Vec<u8> = options(&reply).iter().map(|o| o.0).collect();
    assert_eq!(order, [53, 54, 61, 51, 58, 59, 12, 1, 3, 28]);
    assert_eq!(value(&reply, code::HOSTNAME).unwrap(), b"web");
    assert_eq!(value(&reply, code::CLIENT_ID).unwrap(), b"\xffid");
}

#[test]
fn flags_relays_and_overload_are_minded() {
    let mut bytes = message(Mac::of_id(1), NONE, &[(code::OVERLOAD, &[1])]);
    bytes[108..112].copy_from_slice(&[code::MESSAGE_TYPE, 1, kind::DISCOVER, code::END]);
    bytes[10] = 0x80;
    assert_eq!(ask(&mut engine(), &bytes).unwrap().to, Destination::Broadcast);
    bytes[24] = 10;
    assert_eq!(ask(&mut engine(), &bytes), None, "relayed");
}

#[test]
fn a_lease_lasts_until_it_ends_or_is_released() {
    let (mut engine, now) = (engine(), Instant::now());
    let request = message(Mac::of_id(1), OWN, &[(code::MESSAGE_TYPE, &[kind::REQUEST]), (code::HOSTNAME, b"me")]);
    engine.handle(now, &request, &One).unwrap();
    let leases = engine.leases(now);
    assert_eq!((leases.len(), leases[0].remaining, leases[0].hostname.as_deref()), (1, 3600, Some("me")));
    assert!(engine.leases(now + Duration::from_secs(3600)).is_empty());
    let release = message(Mac::of_id(1), OWN, &[(code::MESSAGE_TYPE, &[kind::RELEASE]), (code::SERVER_ID, &SERVER)]);
    assert_eq!(engine.handle(now, &release, &One), None);
    assert!(engine.leases(now).is_empty());
}

#[test]
fn damaged_messages_never_panic_and_every_truncation_is_survived() {
    let whole =
        message(Mac::of_id(1), NONE, &[(53, &[3]), (50, &OWN), (54, &SERVER), (55, &[1, 3, 6]), (57, &[2, 64])]);
    let (mut engine, mut seed) = (engine(), 0x9e37_79b9_7f4a_7c15_u64);
    for length in 0..240 {
        assert!(Request::parse(&whole[..length]).is_none());
    }
    for _ in 0..50_000 {
        let mut bytes = whole.clone();
        for _ in 0..4 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let at = (seed >> 8) as usize % bytes.len();
            bytes[at] = seed as u8;
        }
        bytes.truncate(bytes.len() - (seed >> 40) as usize % 24);
        if let Some(reply) = ask(&mut engine, &bytes) {
            assert!((300..=1472).contains(&reply.payload.len()));
        }
    }
    assert!(engine.leases(Instant::now()).len() <= 1);
}
