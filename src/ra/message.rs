//! The messages as bytes (RFC 4861, sections 4.1, 4.2 and 4.6; RFC 8106, section 5). The kernel adds the checksum.

use std::net::Ipv6Addr;

use crate::dns::DOMAIN;
use crate::protocol::address::Mac;
use crate::protocol::ipv6::{Network6, PREFIX};

pub(super) const SOLICITATION: u8 = 133;
const ADVERTISEMENT: u8 = 134;
/// Bytes of a solicitation before its options.
const HEADER: usize = 8;
const SOURCE_LINK_ADDRESS: u8 = 1;
const PREFIX_INFORMATION: u8 = 3;
const NAME_SERVER: u8 = 25;
const SEARCH_LIST: u8 = 31;
/// What guests write into their packets' hop limit.
const HOP_LIMIT: u8 = 64;
/// Seconds, three times the longest pause between two messages (AdvDefaultLifetime).
const LIFETIME: u16 = 1800;
/// On this link, and for addresses that guests make themselves.
const ON_LINK_AUTONOMOUS: u8 = 0xc0;
/// Seconds for which an address is valid and preferred (AdvValidLifetime, AdvPreferredLifetime).
const VALID: u32 = 2_592_000;
const PREFERRED: u32 = 604_800;

/// What is said to guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advertisement {
    pub network: Network6,
    /// The bridge's MAC.
    pub mac: Mac,
    /// Whether the outside is reached through the host.
    pub router: bool,
    /// Whether there is a name server at the network's first address.
    pub dns: bool,
}

impl Advertisement {
    /// The message, with a checksum of 0.
    pub fn encode(&self) -> Vec<u8> {
        let lifetime = if self.router { LIFETIME } else { 0 };
        let mut bytes = vec![ADVERTISEMENT, 0, 0, 0, HOP_LIMIT, 0];
        bytes.extend(lifetime.to_be_bytes());
        bytes.extend([0; 8]); // How long neighbours stay known, and how often they are asked: as guests like.
        bytes.extend([SOURCE_LINK_ADDRESS, 1]);
        bytes.extend(self.mac.0);
        bytes.extend([PREFIX_INFORMATION, 4, PREFIX, ON_LINK_AUTONOMOUS]);
        bytes.extend(VALID.to_be_bytes());
        bytes.extend(PREFERRED.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(self.network.network().octets());
        if self.dns {
            let lifetime = u32::from(LIFETIME).to_be_bytes();
            bytes.extend([NAME_SERVER, 3, 0, 0]);
            bytes.extend(lifetime);
            bytes.extend(self.network.gateway().octets());
            let mut name = vec![DOMAIN.len() as u8];
            name.extend(DOMAIN.bytes());
            name.push(0);
            name.resize(name.len().next_multiple_of(8), 0);
            bytes.extend([SEARCH_LIST, 1 + (name.len() / 8) as u8, 0, 0]);
            bytes.extend(lifetime);
            bytes.extend(name);
        }
        bytes
    }
}

/// The options of a message: type and content. `None` where one has no length or goes beyond the end.
fn options(mut bytes: &[u8]) -> Option<Vec<(u8, &[u8])>> {
    let mut all = Vec::new();
    while let Some(kind) = bytes.first() {
        let length = usize::from(*bytes.get(1)?) * 8;
        if length == 0 {
            return None;
        }
        all.push((*kind, bytes.get(2..length)?));
        bytes = bytes.get(length..)?;
    }
    Some(all)
}

/// Whether it is a valid router solicitation (RFC 4861, section 6.1.1). The kernel has looked at the checksum, and the
/// filter at the hop limit.
pub fn is_solicitation(bytes: &[u8], from: Ipv6Addr) -> bool {
    let (Some([SOLICITATION, 0, ..]), Some(rest)) = (bytes.first_chunk::<HEADER>(), bytes.get(HEADER..)) else {
        return false;
    };
    let Some(options) = options(rest) else { return false };
    !(from.is_unspecified() && options.iter().any(|(kind, _)| *kind == SOURCE_LINK_ADDRESS))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content() -> Advertisement {
        Advertisement {
            network: "fd12:3456:789a::/64".parse().unwrap(),
            mac: Mac([0x52, 0x54, 0, 0, 0, 1]),
            router: true,
            dns: true,
        }
    }

    #[test]
    fn an_advertisement_is_laid_out_as_the_rfcs_draw_it() {
        let expected = [
            // Type, code, checksum, hop limit, flags, lifetime, reachable and retransmission time.
            &[134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0][..],
            &[1, 1, 0x52, 0x54, 0, 0, 0, 1],
            // Length of the prefix, L and A; 30 days, 7 days, reserved, the prefix.
            &[3, 4, 64, 0xc0, 0x00, 0x27, 0x8d, 0x00, 0x00, 0x09, 0x3a, 0x80, 0, 0, 0, 0],
            &[0xfd, 0x12, 0x34, 0x56, 0x78, 0x9a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[25, 3, 0, 0, 0, 0, 0x07, 0x08],
            &[0xfd, 0x12, 0x34, 0x56, 0x78, 0x9a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
            &[31, 2, 0, 0, 0, 0, 0x07, 0x08, 5, b'p', b'u', b't', b'e', b'r', 0, 0],
        ]
        .concat();
        assert_eq!(content().encode(), expected);
        let kinds = |content: Advertisement| -> Vec<u8> {
            let bytes = content.encode();
            options(&bytes[16..]).unwrap().iter().map(|(kind, _)| *kind).collect()
        };
        assert_eq!(kinds(content()), [1, 3, 25, 31]);
        assert_eq!(kinds(Advertisement { dns: false, ..content() }), [1, 3]);
        assert_eq!(Advertisement { router: false, ..content() }.encode()[6..8], [0, 0]);
    }

    #[test]
    fn only_whole_solicitations_are_taken() {
        let from: Ipv6Addr = "fe80::1".parse().unwrap();
        let plain = [133, 0, 1, 2, 0, 0, 0, 0];
        let named = [&plain[..], &[1, 1, 2, 0, 0, 0, 0, 9]].concat();
        assert!(is_solicitation(&plain, from) && is_solicitation(&named, from));
        assert!(is_solicitation(&plain, Ipv6Addr::UNSPECIFIED));
        assert!(!is_solicitation(&named, Ipv6Addr::UNSPECIFIED), "from nowhere, and yet with a MAC");
        for cut in (0..8).chain(9..16) {
            assert!(!is_solicitation(&named[..cut], from), "{cut}");
        }
        let without_length = [&plain[..], &[1, 0, 0, 0, 0, 0, 0, 0]].concat();
        let another = [134, 0, 0, 0, 0, 0, 0, 0];
        let coded = [133, 1, 0, 0, 0, 0, 0, 0];
        for bad in [&without_length[..], &another, &coded] {
            assert!(!is_solicitation(bad, from), "{bad:?}");
        }
    }

    #[test]
    fn whatever_comes_is_read_without_harm() {
        // A generator of its own, so that each run is the same (xorshift, Marsaglia).
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let from: Ipv6Addr = "fe80::1".parse().unwrap();
        let (mut good, mut bad) = (0, 0);
        for _ in 0..200_000 {
            let mut bytes: Vec<u8> = (0..random() % 64).map(|_| random() as u8).collect();
            if let (Some(start), true) = (bytes.first_chunk_mut::<2>(), random() % 2 == 0) {
                *start = [133, 0];
            }
            if let (Some(length), true) = (bytes.get_mut(9), random() % 2 == 0) {
                *length %= 4;
            }
            if is_solicitation(&bytes, from) {
                good += 1;
                assert!(bytes.len().is_multiple_of(8) && bytes[..2] == [133, 0]);
            } else {
                bad += 1;
            }
        }
        assert!(good > 500 && bad > 500, "{good} and {bad}");
    }
}
