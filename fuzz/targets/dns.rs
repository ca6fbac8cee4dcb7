//! A question of a guest and the answer of a server of the host: `length (two bytes), question, answer`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use puter::dns::{self, Names, Outcome};
use puter::protocol::address::Subnet;
use puter::protocol::ipv6::Network6;
use simple_dns::{Packet, SimpleDnsError};

struct Web;

const WEB6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0x5054, 0xff, 0xfe00, 0xb);

impl Names for Web {
    fn address(&self, vm: &str) -> Option<Ipv4Addr> {
        (vm == "web").then_some(Ipv4Addr::new(10, 0, 0, 11))
    }

    fn address6(&self, vm: &str) -> Option<Ipv6Addr> {
        (vm == "web").then_some(WEB6)
    }

    fn name(&self, address: IpAddr) -> Option<String> {
        (address == Ipv4Addr::new(10, 0, 0, 11) || address == WEB6).then(|| "web".to_owned())
    }

    fn cluster(&self, address: IpAddr) -> Option<String> {
        self.name(address).map(|_| "c".to_owned())
    }

    fn member(&self, cluster: &str, member: &str) -> Option<String> {
        (cluster == "c" && member == "web1").then(|| "web".to_owned())
    }

    fn has_cluster(&self, cluster: &str) -> bool {
        cluster == "c"
    }

    fn subnet(&self) -> Subnet {
        Subnet::default()
    }

    fn network6(&self) -> Option<Network6> {
        Some("fd00::/64".parse().expect("a network"))
    }
}

pub fn run(input: &[u8]) {
    let Some((length, rest)) = input.split_first_chunk::<2>() else { return };
    let (question, answer) = rest.split_at(usize::from(u16::from_be_bytes(*length)).min(rest.len()));
    match dns::handle(question, &Web, Some(Ipv4Addr::new(10, 0, 0, 11).into())) {
        Outcome::Ignore => assert!(question.len() < 12 || question[2] & 0x80 != 0),
        Outcome::Answer(bytes) => {
            assert_eq!(bytes[..2], question[..2]);
            assert!(bytes[2] & 0x80 != 0);
            match Packet::parse(&bytes) {
                Ok(reply) => assert!(reply.questions.len() <= 1 && reply.answers.len() <= 1),
                // The question is repeated as it came: its type may be one that the library does not know.
                Err(SimpleDnsError::InvalidQType(_)) => {}
                Err(error) => assert!(![0, 3].contains(&(bytes[3] & 15)), "an answer that cannot be read: {error}"),
            }
            assert!(bytes.len() <= 1232);
        }
        Outcome::Forward => {
            let mut asked = question.to_vec();
            asked[..2].copy_from_slice(&[0x12, 0x34]);
            if let Some(relayed) = dns::relayed(question, &asked, answer) {
                assert_eq!(relayed[..2], question[..2]);
                assert!(relayed.len() <= answer.len() && answer[..2] == [0x12, 0x34]);
            }
        }
    }
}
