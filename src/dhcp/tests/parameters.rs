//! What a client is told, in which order, and how much of it fits; what of the client's own words is kept.

use super::super::{Config, Engine};
use super::*;

/// A server that has something to say for each option that it knows.
fn full() -> Engine {
    let dns = vec![Ipv4Addr::from(SERVER), Ipv4Addr::new(192, 0, 2, 1)];
    let domain = Some("puter".to_owned());
    Engine::new(Config { dns, domain, mtu: Some(1400), ..Config::new(Subnet::default()) })
}

#[test]
fn parameters_come_in_the_clients_order_with_the_mask_before_the_router() {
    const HEAD: &[u8] = &[53, 54, 51, 58, 59];
    type Row<'a> = (&'a str, &'a str, Option<&'a [u8]>, &'a [u8]);
    #[rustfmt::skip]
    let rows: &[Row] = &[
        ("2132, 9.8", "in their order", Some(&[12, 1, 28]), &[12, 1, 28]),
        ("2132, 9.8", "another order", Some(&[28, 1, 12]), &[28, 1, 12]),
        ("2132, 3.3", "the mask goes before the router", Some(&[3, 12, 1]), &[1, 3, 12]),
        ("2132, 3.3", "a router that was asked for alone", Some(&[3]), &[1, 3]),
        ("2131, 4.3.1", "the mask is told unasked", Some(&[12]), &[12, 1]),
        ("2132, 9.8", "each once, however often asked for", Some(&[12, 12, 3, 3, 1, 1]), &[12, 1, 3]),
        ("2132, 9.8", "what we do not have", Some(&[42, 66, 67, 252, 0, 255]), &[1]),
        ("2131, 3.5", "those which every answer holds", Some(&[51, 53, 54, 58, 59, 61]), &[1]),
        ("2131, 3.5", "all that we have", Some(&[1, 3, 6, 12, 15, 119, 28, 26]), &[1, 3, 6, 12, 15, 119, 28, 26]),
        ("2131, 4.3.1", "no list", None, &[1, 3, 6, 12, 15, 119, 28, 26]),
        ("2132, 9.8", "an empty list", Some(&[]), &[1]),
    ];
    for (section, name, wanted, told) in rows {
        let list: Vec<(u8, &[u8])> = wanted.iter().map(|wanted| (code::PARAMETERS, *wanted)).collect();
        let reply = ask(&mut full(), &discover(&list)).unwrap();
        assert_eq!(order(&reply), [HEAD, told].concat(), "RFC {section}: {name}");
        // 4.3.1: the ACK says what the offer said.
        let request = message(kind::REQUEST, NONE, &[&[(code::REQUESTED_IP, &OWN[..])], &list[..]].concat());
        let (offer, ack) = (options(&reply), options(&ask(&mut full(), &request).unwrap()));
        assert_eq!(offer[1..], ack[1..], "RFC {section}: {name}");
    }
}

#[test]
fn each_parameter_has_the_form_of_its_section() {
    let reply = ask(&mut full(), &discover(&[])).unwrap();
    #[rustfmt::skip]
    let rows: &[(&str, u8, &[u8])] = &[
        ("2132, 3.3", code::SUBNET_MASK, &[255, 255, 255, 0]),
        ("2132, 3.5", code::ROUTER, &SERVER),
        ("2132, 3.8", code::DNS, &[10, 0, 0, 1, 192, 0, 2, 1]),
        ("2132, 3.14", code::HOSTNAME, b"web"),
        ("2132, 3.17", code::DOMAIN, b"puter"),
        ("3397, 2", code::SEARCH, b"\x05puter\0"),
        ("2132, 5.1", code::MTU, &[5, 120]),
        ("2132, 5.3", code::BROADCAST, &[10, 0, 0, 255]),
    ];
    for (section, code, expected) in rows {
        assert_eq!(value(&reply, *code).as_deref(), Some(*expected), "RFC {section}: option {code}");
    }
}

#[test]
fn answers_are_as_long_as_the_client_takes_and_the_link_carries() {
    // A client identifier is echoed, so that the answers below have something that fills them.
    let long = [7; 255];
    // Option 57; the link's MTU; the largest UDP payload.
    for (asked, mtu, most) in [
        (None, None, 548),
        (Some(&[2, 64][..]), None, 548),
        // RFC 2132, section 9.10: 576 is the least.
        (Some(&[0, 0]), None, 548),
        (Some(&[2, 63]), None, 548),
        (Some(&[3, 0]), None, 740),
        (Some(&[5, 220]), None, 1472),
        (Some(&[255, 255]), None, 1472),
        (Some(&[255, 255]), Some(1000), 972),
        (Some(&[255, 255]), Some(68), 548),
        (Some(&[255, 255]), Some(9000), 1472),
        // Another length than two bytes says nothing.
        (Some(&[255]), None, 548),
        (Some(&[0, 255, 255]), None, 548),
    ] {
        let servers = vec![Ipv4Addr::from(SERVER); 400];
        let config = Config { mtu, dns: servers, domain: Some("d".repeat(63)), ..Config::new(Subnet::default()) };
        let sizes: Vec<(u8, &[u8])> = asked.iter().map(|asked| (code::MAX_SIZE, *asked)).collect();
        let bytes = discover(&[&sizes[..], &[(code::CLIENT_ID, &long)]].concat());
        let reply = ask(&mut Engine::new(config), &bytes).unwrap();
        let length = reply.payload.len();
        assert!(length <= most, "{asked:?}, {mtu:?}: {length}");
        // What did not fit is left out whole, and what fits is there: 63 servers are the most that one option holds.
        assert_eq!(value(&reply, code::DNS).is_some(), most >= 972, "{asked:?}, {mtu:?}");
        assert_eq!(value(&reply, code::SUBNET_MASK).unwrap(), [255, 255, 255, 0]);
    }
}

#[test]
fn the_client_id_changes_nothing_but_its_echo() {
    let plain = answer(&discover(&[])).unwrap();
    let duid: &[u8] = b"\xff\x12\x34\x56\x78\x00\x02\x00\x00\xab\x11\x01\x02\x03\x04";
    let macs_of_another = [&[1][..], &Mac::of_id(2).0].concat();
    for id in [&macs_of_another[..], duid, b"\0", &[9; 255]] {
        let mut reply = answer(&discover(&[(code::CLIENT_ID, id)])).unwrap();
        assert_eq!(value(&reply, code::CLIENT_ID).unwrap(), id);
        assert_eq!((reply.to, &reply.payload[..OPTIONS]), (plain.to, &plain.payload[..OPTIONS]));
        reply.payload.drain(OPTIONS + 9..OPTIONS + 11 + id.len());
        assert_eq!(options(&reply), options(&plain));
    }
    // Parts of one that is longer than an option can be are joined, and not echoed: nothing could hold it.
    let reply = answer(&discover(&[(code::CLIENT_ID, &[9; 255]), (code::CLIENT_ID, &[9; 255])])).unwrap();
    assert_eq!(value(&reply, code::CLIENT_ID), None);
}

#[test]
fn a_guests_name_for_itself_is_kept_only_if_it_is_a_host_name() {
    let long = [&[b'a'; 63][..], b".", &[b'b'; 63], b".", &[b'c'; 63], b".", &[b'd'; 61]].concat();
    let too_long = [&long[..], b"d"].concat();
    #[rustfmt::skip]
    let rows: &[(&[u8], Option<&str>)] = &[
        (b"me", Some("me")),
        (b"Me-2.example.ORG", Some("Me-2.example.ORG")),
        (b"me\0", Some("me")),
        (&long, Some(std::str::from_utf8(&long).unwrap())),
        (&too_long, None),
        (&[b'a'; 64], None),
        (b"", None),
        (b"\0\0", None),
        (b".", None),
        (b"a..b", None),
        (b"a.", None),
        (b"-a", None),
        (b"--json", None),
        (b"a-", None),
        (b"a b", None),
        (b"a\nb", None),
        (b"a\0b", None),
        (b"\x1b[31m", None),
        (b"../../etc", None),
        (b"$(reboot)", None),
        ("ä".as_bytes(), None),
        (b"\xff\xfe", None),
    ];
    for (name, kept) in rows {
        let (mut engine, now) = (engine(), Instant::now());
        engine.handle(now, &message(kind::REQUEST, OWN, &[(code::HOSTNAME, name)]), &One).unwrap();
        assert_eq!(engine.leases(now)[0].hostname.as_deref(), *kept, "{}", name.escape_ascii());
        // What it is told stays its VM's name.
        let reply = engine.handle(now, &discover(&[(code::HOSTNAME, name)]), &One).unwrap();
        assert_eq!(value(&reply, code::HOSTNAME).unwrap(), b"web");
    }
}
