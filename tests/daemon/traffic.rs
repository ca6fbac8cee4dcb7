//! What gets through: NAT, the filter, the guard on each TAP.

use std::net::{Ipv4Addr, UdpSocket};

use puter::net::nft::{self, Guest};
use puter::protocol::daemon::Tap;
use rustix::process::Signal;

use crate::lab::{LIMIT, Lab, Process, SERVER, wait};
use frames::Sender;

#[path = "frames.rs"]
pub mod frames;

#[test]
#[ignore = "needs root"]
fn guests_reach_the_internet_and_it_does_not_reach_them() {
    let lab = Lab::new();
    let daemon = lab.start(&[]);
    let _far = lab.web_server(lab.internet_holder(), &format!("{SERVER}:80"), "internet");
    let guest = lab.guest("g1", "10.0.0.200");
    let other = lab.guest("g2", "10.0.0.201");
    let get = |holder: &Process, address: &str| {
        let (host, port) = address.split_once(':').unwrap_or((address, "80"));
        let ask = format!(r"printf 'GET / HTTP/1.0\r\n\r\n' | socat -t 3 -T 3 - TCP:{host}:{port},connect-timeout=3");
        let answer = lab.attempt(holder, &ask).0;
        answer.rsplit("\r\n").next().unwrap_or_default().to_owned()
    };
    assert_eq!(get(&guest, SERVER), "internet", "only NAT can bring the answer back: the far end has no route here");
    // The host gives DHCP, DNS and echo; its other services are closed to guests and its own loopback is not.
    let _service = lab.web_server(lab.host_holder(), "0.0.0.0:8080", "service");
    assert_eq!(get(lab.host_holder(), "127.0.0.1:8080"), "service");
    for address in ["10.0.0.1:8080", "203.0.113.2:8080"] {
        assert_ne!(get(&guest, address), "service", "{address}");
    }
    lab.run(&guest, "ping -c 1 -W 5 10.0.0.1");
    // Guests and the host reach a guest; the internet, even with a route, does not.
    let _page = lab.web_server(&guest, "10.0.0.200:80", "guest");
    assert_eq!(get(&other, "10.0.0.200"), "guest");
    assert_eq!(get(lab.host_holder(), "10.0.0.200"), "guest");
    lab.internet("ip route add 10.0.0.0/24 via 203.0.113.2");
    assert_ne!(get(lab.internet_holder(), "10.0.0.200"), "guest");
    // A source that is not of the subnet does not leave.
    lab.run(&guest, "ip addr add 198.51.100.7/32 dev eth0");
    lab.internet("ip route add 198.51.100.0/24 via 203.0.113.2");
    lab.host("ip route add 198.51.100.7/32 dev puter0");
    assert!(!lab.attempt(&guest, "ping -c 1 -W 2 -I 198.51.100.7 203.0.113.1").1);
    // puterd would take these out at once.
    daemon.freeze(true);
    lab.host("nft insert rule inet puter forward ip saddr 198.51.100.7 accept");
    lab.host("nft insert rule inet puter forward ip daddr 198.51.100.7 accept");
    lab.run(&guest, "ping -c 1 -W 5 -I 198.51.100.7 203.0.113.1");
    // A restart puts the rules back as they were, and the guest goes on.
    daemon.stop(Signal::KILL);
    let _daemon = lab.start(&[]);
    assert!(!lab.attempt(&guest, "ping -c 1 -W 2 -I 198.51.100.7 203.0.113.1").1);
    assert_eq!(get(&guest, SERVER), "internet");
}

#[test]
#[ignore = "needs root"]
fn a_guest_sends_as_itself_alone() {
    let lab = Lab::new();
    let daemon = lab.start(&[]);
    let made: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"web","id":1}"#);
    let peer = lab.guest("g2", "10.0.0.201");
    let tap = frames::take(&lab, "pt-web");
    let socket = frames::inside(&peer, || UdpSocket::bind("10.0.0.201:7000").unwrap());
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let receive = || {
        let mut text = [0; 100];
        let size = socket.recv(&mut text).unwrap();
        String::from_utf8_lossy(&text[..size]).into_owned()
    };
    let own = Sender { mac: made.mac.0, ip: made.ip };
    let mac = Sender { mac: [0x52, 0x54, 0, 0, 0, 0x0c], ..own };
    let ip = Sender { ip: Ipv4Addr::new(10, 0, 0, 12), ..own };
    let to = (Ipv4Addr::new(10, 0, 0, 201), 7000);
    let gateway = Ipv4Addr::new(10, 0, 0, 1);
    let datagrams = [
        frames::udp(mac, 1000, to, "another's MAC"),
        frames::udp(ip, 1000, to, "another's address"),
        frames::udp(Sender { ip: Ipv4Addr::UNSPECIFIED, ..own }, 68, to, "no address"),
        frames::udp(own, 67, to, "a DHCP server's answer"),
        frames::udp(own, 1000, to, "its own"),
    ];
    // Frames keep their order: what came first tells what was dropped before it.
    let check = || {
        let probe = |outer, sender| frames::arp(outer, sender, gateway);
        let lies = [probe(mac.mac, own), probe(own.mac, mac), probe(own.mac, ip)];
        frames::send(&tap, &lies);
        frames::send(&tap, &[probe(own.mac, own)]);
        assert_eq!(frames::arp_answer(&tap), (own.mac, own.ip));
        frames::send(&tap, &datagrams);
        assert_eq!(receive(), "its own");
    };
    check();
    // To a DHCP server it speaks for its own MAC alone, which is 28 bytes into the message.
    let server = frames::inside(&peer, || UdpSocket::bind("10.0.0.201:67").unwrap());
    server.set_read_timeout(Some(LIMIT)).unwrap();
    let message = |mac: &str| {
        frames::udp(own, 68, (Ipv4Addr::new(10, 0, 0, 201), 67), &format!("{}{mac}{}", "x".repeat(28), "x".repeat(20)))
    };
    frames::send(&tap, &[message("RT\0\0\0\u{c}"), message("RT\0\0\0\u{b}")]);
    let mut text = [0; 100];
    let size = server.recv(&mut text).unwrap();
    assert_eq!(&text[28..34], b"RT\0\0\0\x0b", "{size} bytes");
    // A restart leaves the filter as it is, and so does a repeated request.
    daemon.stop(Signal::KILL);
    let daemon = lab.start(&[]);
    let _: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"web","id":1}"#);
    check();
    // puterd would put the filter back at once.
    daemon.freeze(true);
    // Without the filter all but the packet with no source arrive: so it is the filter that stopped them.
    lab.host("nft delete table netdev puter");
    frames::send(&tap, &datagrams);
    assert_eq!([receive(), receive(), receive()], ["another's MAC", "another's address", "a DHCP server's answer"]);
    daemon.freeze(false);
    let _: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"web","id":1}"#);
    assert_eq!(receive(), "its own");
    check();
    assert_eq!(lab.request("DELETE", "/v1/taps/web", "").0, 204);
    wait("its filter goes", || !lab.host("nft list table netdev puter").contains("pt-web"));
}

#[test]
#[ignore = "needs root"]
fn a_refused_batch_is_an_error_and_changes_nothing() {
    let lab = Lab::new();
    let _daemon = lab.start(&[]);
    let made: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"web","id":1}"#);
    let before = lab.host("nft list ruleset");
    let guest = |tap: &str| Guest {
        tap: tap.to_owned(),
        mac: made.mac,
        address: Ipv4Addr::new(10, 0, 0, 99),
        address6: None,
        isolated: None,
    };
    // The first one's name is too long for an interface; all that follows is well.
    let guests = [guest("pt-too-long-for-the-kernel"), guest("pt-web")];
    let error = frames::inside(lab.host_holder(), || nft::guard("puter0", &guests)).unwrap_err();
    assert!([rustix::io::Errno::INVAL, rustix::io::Errno::RANGE].contains(&error.errno), "{error}");
    assert_eq!(lab.host("nft list ruleset"), before);
}
