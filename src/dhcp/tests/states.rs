//! What each message of each state of a client comes to.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use super::super::{Config, Destination, Engine};
use super::*;

#[test]
fn each_state_of_a_client_gets_the_answer_of_the_rfc() {
    const NOTHING: Option<u8> = None;
    const OFFER: Option<u8> = Some(kind::OFFER);
    const ACK: Option<u8> = Some(kind::ACK);
    const NAK: Option<u8> = Some(kind::NAK);
    let ours: (u8, &[u8]) = (code::SERVER_ID, &SERVER);
    let theirs: (u8, &[u8]) = (code::SERVER_ID, &OTHER);
    let own: (u8, &[u8]) = (code::REQUESTED_IP, &OWN);
    let other: (u8, &[u8]) = (code::REQUESTED_IP, &OTHER);
    type Row<'a> = (&'a str, &'a str, u8, [u8; 4], &'a [(u8, &'a [u8])], Option<u8>);
    #[rustfmt::skip]
    let rows: &[Row] = &[
        ("4.3.1", "discover", kind::DISCOVER, NONE, &[], OFFER),
        ("4.3.1", "discover that asks for the own address", kind::DISCOVER, NONE, &[own], OFFER),
        ("4.3.1", "discover that asks for another address", kind::DISCOVER, NONE, &[other], OFFER),
        ("4.3.1", "discover that asks for a lease of a second", kind::DISCOVER, NONE, &[(code::LEASE_TIME, &[0, 0, 0, 1])], OFFER),
        ("4.3.2", "selecting", kind::REQUEST, NONE, &[own, ours], ACK),
        ("4.3.2", "selecting, wrong address", kind::REQUEST, NONE, &[other, ours], NAK),
        ("4.3.2", "selecting another server", kind::REQUEST, NONE, &[own, theirs], NOTHING),
        ("4.3.2", "selecting another server, wrong address", kind::REQUEST, NONE, &[other, theirs], NOTHING),
        ("4.3.2", "init-reboot", kind::REQUEST, NONE, &[own], ACK),
        ("4.3.2", "init-reboot, wrong address", kind::REQUEST, NONE, &[other], NAK),
        ("4.3.2", "init-reboot, address of another network", kind::REQUEST, NONE, &[(code::REQUESTED_IP, &[192, 0, 2, 1])], NAK),
        ("4.3.2", "renewing or rebinding", kind::REQUEST, OWN, &[], ACK),
        ("4.3.2", "renewing or rebinding, wrong address", kind::REQUEST, OTHER, &[], NAK),
        ("4.3.2", "renewing, and naming another address", kind::REQUEST, OWN, &[other], NAK),
        ("4.3.2", "holding another address, and naming the own", kind::REQUEST, OTHER, &[own], NAK),
        ("4.3.2", "request for nothing", kind::REQUEST, NONE, &[], NOTHING),
        ("4.3.2", "request for nothing from us", kind::REQUEST, NONE, &[ours], NOTHING),
        ("4.3.3", "decline", kind::DECLINE, NONE, &[own, ours], NOTHING),
        ("4.3.3", "decline of another address", kind::DECLINE, NONE, &[other, ours], NOTHING),
        ("4.3.4", "release", kind::RELEASE, OWN, &[ours], NOTHING),
        ("4.3.4", "release of another address", kind::RELEASE, OTHER, &[ours], NOTHING),
        ("4.3.5", "inform", kind::INFORM, OWN, &[], ACK),
        ("4.3.5", "inform from another address", kind::INFORM, OTHER, &[], NOTHING),
        ("4.3.5", "inform from no address", kind::INFORM, NONE, &[], NOTHING),
        ("4.3", "an offer of a rogue", kind::OFFER, NONE, &[], NOTHING),
        ("4.3", "an ack of a rogue", kind::ACK, OWN, &[ours], NOTHING),
        ("4.3", "a nak of a rogue", kind::NAK, NONE, &[ours], NOTHING),
        ("4.3", "a type that nobody knows", 200, NONE, &[], NOTHING),
        ("4.3", "type 0", 0, NONE, &[], NOTHING),
    ];
    for (section, name, kind, ciaddr, extra, expected) in rows {
        let mut bytes = message(*kind, *ciaddr, extra);
        assert_eq!(answer(&bytes).as_ref().map(kind_of), *expected, "{section}: {name}");
        // 4.3.2: of a client that is not known we have nothing to say, not even a NAK.
        bytes[CHADDR..CHADDR + 6].copy_from_slice(&Mac::of_id(2).0);
        assert_eq!(answer(&bytes), None, "{section}: {name}, of an unknown client");
    }
}

#[test]
fn each_answer_holds_what_table_3_says_and_nothing_else() {
    use code::{CLIENT_ID, LEASE_TIME, MESSAGE, MESSAGE_TYPE, SERVER_ID, SUBNET_MASK, T1, T2};
    let id: (u8, &[u8]) = (CLIENT_ID, b"\xffid");
    let mask: (u8, &[u8]) = (code::PARAMETERS, &[SUBNET_MASK]);
    let given: &[u8] = &[MESSAGE_TYPE, SERVER_ID, CLIENT_ID, LEASE_TIME, T1, T2, SUBNET_MASK];
    let told: &[u8] = &[MESSAGE_TYPE, SERVER_ID, CLIENT_ID, SUBNET_MASK];
    let refused: &[u8] = &[MESSAGE_TYPE, SERVER_ID, CLIENT_ID, MESSAGE];
    #[rustfmt::skip]
    let rows = [
        // What, kind, its ciaddr, its wish; then ciaddr, yiaddr and options of the answer.
        ("offer", kind::DISCOVER, NONE, None, NONE, OWN, given),
        ("ack, selecting", kind::REQUEST, NONE, Some(OWN), NONE, OWN, given),
        ("ack, renewing", kind::REQUEST, OWN, None, OWN, OWN, given),
        ("nak", kind::REQUEST, NONE, Some(OTHER), NONE, NONE, refused),
        ("nak, rebinding", kind::REQUEST, OTHER, None, NONE, NONE, refused),
        ("ack to inform", kind::INFORM, OWN, None, OWN, NONE, told),
    ];
    for (name, kind, ciaddr, wish, expected_ciaddr, yiaddr, expected) in rows {
        let wish = wish.map(|ip: [u8; 4]| (code::REQUESTED_IP, ip));
        let mut extra = vec![id, mask];
        extra.extend(wish.iter().map(|(code, ip)| (*code, &ip[..])));
        let mut bytes = message(kind, ciaddr, &extra);
        bytes[3] = 7; // hops
        bytes[8..10].copy_from_slice(&[0, 9]); // secs
        bytes[FLAGS] = 0x80;
        let reply = answer(&bytes).unwrap();
        let fixed = &reply.payload;
        assert_eq!(fixed[..4], [2, 1, 6, 0], "{name}: op, htype, hlen, hops");
        assert_eq!(fixed[4..8], [1, 2, 3, 4], "{name}: xid");
        assert_eq!(fixed[8..12], [0, 0, 0x80, 0], "{name}: secs and flags");
        assert_eq!(fixed[CIADDR..YIADDR], expected_ciaddr, "{name}: ciaddr");
        assert_eq!(fixed[YIADDR..SIADDR], yiaddr, "{name}: yiaddr");
        assert_eq!(fixed[SIADDR..CHADDR], [0; 8], "{name}: siaddr and giaddr");
        assert_eq!(fixed[CHADDR..CHADDR + 6], Mac::of_id(1).0, "{name}: chaddr");
        assert!(fixed[CHADDR + 6..MAGIC].iter().all(|byte| *byte == 0), "{name}: sname and file");
        assert_eq!(order(&reply), expected, "{name}: options");
        assert_eq!(value(&reply, SERVER_ID).unwrap(), SERVER, "{name}");
        assert_eq!(value(&reply, CLIENT_ID).unwrap(), b"\xffid", "{name}: RFC 6842");
        assert!(fixed.len() >= 300, "{name}: RFC 1542, section 2.1");
    }
}

#[test]
fn each_answer_goes_where_section_4_1_sends_it() {
    let everyone = Destination::Broadcast;
    let client = Destination::Unicast { mac: Mac::of_id(1), ip: Ipv4Addr::from(OWN) };
    let own: &[(u8, &[u8])] = &[(code::REQUESTED_IP, &OWN)];
    let other: &[(u8, &[u8])] = &[(code::REQUESTED_IP, &OTHER)];
    #[rustfmt::skip]
    let rows = [
        // What, kind, ciaddr, options; to whom without the broadcast flag, and with it.
        ("offer", kind::DISCOVER, NONE, &[][..], client, everyone),
        // Table 5: a discover's ciaddr is 0; what else it holds says nothing of where its client listens.
        ("offer, nonsense in ciaddr", kind::DISCOVER, OTHER, &[], client, everyone),
        ("ack, no address yet", kind::REQUEST, NONE, own, client, everyone),
        ("ack, to its address", kind::REQUEST, OWN, &[], client, client),
        ("ack to inform, to its address (4.3.5)", kind::INFORM, OWN, &[], client, client),
        ("nak", kind::REQUEST, NONE, other, everyone, everyone),
        ("nak, holding an address", kind::REQUEST, OTHER, &[], everyone, everyone),
    ];
    for (name, kind, ciaddr, options, without, with) in rows {
        let mut bytes = message(kind, ciaddr, options);
        assert_eq!(answer(&bytes).unwrap().to, without, "{name}");
        // Section 2, figure 2: the other bits of the flags mean nothing.
        bytes[FLAGS..FLAGS + 2].copy_from_slice(&[0x7f, 0xff]);
        assert_eq!(answer(&bytes).unwrap().to, without, "{name}");
        bytes[FLAGS..FLAGS + 2].copy_from_slice(&[0x80, 0]);
        assert_eq!(answer(&bytes).unwrap().to, with, "{name}, broadcast flag");
    }
}

#[test]
fn the_times_are_those_of_section_4_4_5_and_never_mean_for_ever() {
    for (lease, told, t1, t2) in [
        (1, 1, 0, 1),
        (60, 60, 30, 53),
        (3600, 3600, 1800, 3150),
        (86_400, 86_400, 43_200, 75_600),
        // Section 3.3: all ones would be for ever.
        (u64::from(u32::MAX), u32::MAX - 1, 0x7fff_ffff, 0xdfff_ffff),
        (u64::MAX, u32::MAX - 1, 0x7fff_ffff, 0xdfff_ffff),
    ] {
        let config = Config { lease: Duration::from_secs(lease), ..Config::new(Subnet::default()) };
        let mut engine = Engine::new(config);
        let discover = discover(&[]);
        let request = message(kind::REQUEST, OWN, &[]);
        for bytes in [discover, request] {
            let reply = ask(&mut engine, &bytes).unwrap();
            let seconds = |code| u32::from_be_bytes(value(&reply, code).unwrap().try_into().unwrap());
            let times = (seconds(code::LEASE_TIME), seconds(code::T1), seconds(code::T2));
            assert_eq!(times, (told, t1, t2), "{lease}");
            assert!(t1 <= t2 && t2 <= told);
        }
    }
}

#[test]
fn a_lease_begins_with_an_ack_and_ends_by_time_decline_release_or_nak() {
    let ours: (u8, &[u8]) = (code::SERVER_ID, &SERVER);
    let theirs: (u8, &[u8]) = (code::SERVER_ID, &OTHER);
    let own: (u8, &[u8]) = (code::REQUESTED_IP, &OWN);
    let other: (u8, &[u8]) = (code::REQUESTED_IP, &OTHER);
    let now = Instant::now();
    type Row<'a> = (&'a str, u8, [u8; 4], &'a [(u8, &'a [u8])], bool);
    #[rustfmt::skip]
    let rows: [Row; 13] = [
        ("a discover lends nothing and takes nothing", kind::DISCOVER, NONE, &[], true),
        ("renewed", kind::REQUEST, OWN, &[], true),
        ("refused", kind::REQUEST, NONE, &[other], false),
        ("for another server", kind::REQUEST, NONE, &[own, theirs], true),
        ("declined", kind::DECLINE, NONE, &[own, ours], false),
        ("declined to another server", kind::DECLINE, NONE, &[own, theirs], true),
        ("another address declined", kind::DECLINE, NONE, &[other, ours], true),
        ("declined without a server's name", kind::DECLINE, NONE, &[own], false),
        ("released", kind::RELEASE, OWN, &[ours], false),
        ("released without a server's name, as systemd does", kind::RELEASE, OWN, &[], false),
        ("released to another server", kind::RELEASE, OWN, &[theirs], true),
        ("another address released", kind::RELEASE, OTHER, &[ours], true),
        ("informed", kind::INFORM, OWN, &[], true),
    ];
    for (name, kind, ciaddr, options, stays) in rows {
        let mut engine = engine();
        engine.handle(now, &discover(&[]), &One).unwrap();
        assert!(engine.leases(now).is_empty(), "an offer is no lease");
        engine.handle(now, &message(kind::REQUEST, NONE, &[own, ours]), &One).unwrap();
        assert_eq!(engine.leases(now)[0].remaining, 3600);
        let later = now + Duration::from_secs(1000);
        engine.handle(later, &message(kind, ciaddr, options), &One);
        assert_eq!(engine.leases(later).len(), usize::from(stays), "{name}");
        let renewed = name == "renewed";
        let end = now + Duration::from_secs(if renewed { 4600 } else { 3600 });
        let left = engine.leases(end - Duration::from_secs(1)).first().map(|lease| lease.remaining);
        assert_eq!(left, stays.then_some(1), "{name}");
        assert!(engine.leases(end).is_empty(), "{name}");
    }
}
