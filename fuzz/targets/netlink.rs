//! What the kernel answers, damaged: lists of links, addresses and routes, and errors.

use std::net::{Ipv4Addr, Ipv6Addr};

use puter::net::{address, link, message, route, socket};
use puter::protocol::address::Subnet;

pub fn run(input: &[u8]) {
    let mut total = 0;
    for answer in message::answers(input) {
        total += answer.body.len() + message::HEADER;
        assert!(total <= input.len());
        let _ = socket::check(&answer);
        let attributes = message::attributes(answer.body, 4).map(|(_, payload)| payload.len() + 4).sum::<usize>();
        assert!(attributes <= answer.body.len());
        if let Some(link) = link::decode(answer.body) {
            assert!(!link.name.is_empty() && !link.name.contains('\0'));
        }
        if let Some(address) = address::decode::<Ipv4Addr>(answer.body) {
            assert!(address.prefix <= 32);
        }
        if let Some(address) = address::decode::<Ipv6Addr>(answer.body) {
            assert!(address.prefix <= 128);
        }
        if let Some(route) = route::decode::<Ipv4Addr>(answer.body) {
            assert!(route.prefix <= 32);
            let _ = (route.clashes(Subnet::default()), route.to_string());
        }
        if let Some(route) = route::decode::<Ipv6Addr>(answer.body) {
            assert!(route.prefix <= 128);
            let _ = (route.clashes("fd00::/64".parse().expect("a network")), route.to_string());
        }
    }
}
