//! Messages of a guest, one after the other, to the DHCP server. Each is `length (two bytes), message`.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use puter::dhcp::message::{Request, code, kind};
use puter::dhcp::{Config, Directory, Engine, Host};
use puter::protocol::address::{Mac, Subnet};

/// Every id up to 3 is a machine.
struct Three;

impl Directory for Three {
    fn host(&self, mac: Mac) -> Option<Host> {
        let id = mac.id().filter(|id| *id <= 3)?;
        Some(Host { vm: format!("vm-{id}"), ip: Subnet::default().address(id)? })
    }
}

pub fn run(input: &[u8]) {
    let mut engine = Engine::new(Config::new(Subnet::default()));
    engine.name_server(Ipv4Addr::new(10, 0, 0, 1), "puter");
    let (mut rest, mut now) = (input, Instant::now());
    while let Some((length, after)) = rest.split_first_chunk::<2>() {
        let (message, after) = after.split_at(usize::from(u16::from_be_bytes(*length)).min(after.len()));
        rest = after;
        now += Duration::from_secs(600);
        let reply = engine.handle(now, message, &Three);
        let leases = engine.leases(now);
        assert!(leases.len() <= 3);
        for lease in &leases {
            assert_eq!(lease.mac.id().and_then(|id| Subnet::default().address(id)), Some(lease.ip));
            assert!(lease.remaining <= 3600);
            let printable = |name: &String| name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b));
            assert!(lease.hostname.as_ref().is_none_or(printable));
        }
        let Some(reply) = reply else { continue };
        let request = Request::parse(message).expect("an answer to no request");
        let bytes = &reply.payload;
        assert!((300..=1472).contains(&bytes.len()));
        assert_eq!((&bytes[4..8], &bytes[28..34]), (&request.xid[..], &request.mac.0[..]));
        let host = Three.host(request.mac).expect("an answer to a stranger");
        let given = Ipv4Addr::new(bytes[16], bytes[17], bytes[18], bytes[19]);
        assert!(given == host.ip || given.is_unspecified());
        // What we write, we can read.
        let mut back = bytes.clone();
        back[0] = 1;
        let back = Request::parse(&back).expect("an answer that cannot be read");
        assert!(matches!(back.kind(), Some(kind::OFFER | kind::ACK | kind::NAK)));
        assert_eq!(back.option(code::SERVER_ID), Some(&[10, 0, 0, 1][..]));
    }
}
