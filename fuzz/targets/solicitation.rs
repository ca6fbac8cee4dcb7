//! Router solicitations of guests: `seconds since the last (one byte), who asks (one byte)`, then a piece as elsewhere.

use std::net::Ipv6Addr;
use std::time::{Duration, Instant};

use puter::protocol::address::Mac;
use puter::ra::{Advertisement, Advertiser};

use crate::pieces;

pub fn run(input: &[u8]) {
    let start = Instant::now();
    let mut now = start;
    let network = "fd00::/64".parse().expect("a network");
    let content = Advertisement { network, mac: Mac([0x52, 0x54, 0, 0, 0, 1]), router: false, dns: true };
    let mut advertiser = Advertiser::new(content, now);
    let (mut to_all, mut answers) = (0_u32, 0_u32);
    let mut last = Vec::<(Ipv6Addr, Instant)>::new();
    for piece in pieces(input) {
        let Some(([seconds, who], message)) = piece.split_first_chunk::<2>() else { continue };
        now += Duration::from_secs((*seconds).into());
        let from = match who {
            0 => Ipv6Addr::UNSPECIFIED,
            1..=127 => Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, (*who).into()),
            _ => Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, (*who).into()),
        };
        if let Some(to) = advertiser.receive(message, from, now, u32::from(*who)) {
            assert_eq!(to, from);
            assert!(from.is_unicast_link_local() && message.len() >= 8 && message[..2] == [133, 0]);
            // One guest is not answered more often than the RFC allows.
            assert!(last.iter().all(|(other, at)| *other != to || now - *at >= Duration::from_secs(3)));
            last.retain(|(other, _)| *other != to);
            last.push((to, now));
            answers += 1;
        }
        to_all += u32::from(advertiser.tick(now, u32::from(*seconds)));
        assert!(advertiser.due() > now || advertiser.due() == start);
    }
    // Whoever asks, all are told at most once in three seconds.
    let passed = (now - start).as_secs() as u32;
    assert!(to_all <= 1 + passed / 3, "{to_all} messages to all in {passed} s, {answers} answers");
}
