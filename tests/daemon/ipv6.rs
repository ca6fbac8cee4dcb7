//! IPv6 as guests see it: Linux machines that make their addresses of what puterd says.

use std::io::{Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpStream, UdpSocket};

use puter::protocol::daemon::{Status, Tap};
use rustix::process::Signal;
use simple_dns::{RCODE, TYPE};

use crate::dns;
use crate::lab::{LIMIT, Lab, Process, wait};
use crate::traffic::frames;

#[path = "frames6.rs"]
pub mod frames6;

const FAR: &str = "2001:db8:7::1";

/// A machine on the bridge with the MAC of this id, that has no address but those that its kernel makes.
fn guest(lab: &Lab, name: &str, id: u32) -> Process {
    let holder = lab.guest(name, &format!("10.0.0.{}", 200 + id));
    let mac = puter::protocol::address::Mac::of_id(id);
    lab.run(
        &holder,
        &format!(
            "ip link set eth0 down; ip link set eth0 address {mac}; ip link set eth0 up; \
        ip route replace default via 10.0.0.1"
        ),
    );
    holder
}

fn addresses(lab: &Lab, guest: &Process) -> String {
    lab.run(guest, "ip -6 -o addr show dev eth0 scope global | grep -v tentative || true")
}

fn routes(lab: &Lab, guest: &Process) -> String {
    lab.run(guest, "ip -6 route show default")
}

fn network(lab: &Lab) -> String {
    let status: Status = lab.json("GET", "/v1/status", "");
    status.ipv6.unwrap().network().to_string()
}

/// Gives the internet an address, and the host one beside it.
fn with_far_end(lab: &Lab) {
    lab.internet(&format!("ip addr add {FAR}/64 dev inet0 nodad"));
    lab.host("ip addr add 2001:db8:7::2/64 dev up0 nodad");
}

fn get(lab: &Lab, holder: &Process, address: &str) -> String {
    let ask = format!(r"printf 'GET / HTTP/1.0\r\n\r\n' | socat -t 3 -T 3 - TCP6:{address},connect-timeout=3");
    let answer = lab.attempt(holder, &ask).0;
    answer.rsplit("\r\n").next().unwrap_or_default().to_owned()
}

#[test]
#[ignore = "needs root"]
fn guests_make_their_addresses_and_reach_what_the_host_reaches() {
    let lab = Lab::new();
    with_far_end(&lab);
    let _far = lab.web_server(lab.internet_holder(), &format!("[{FAR}]:80"), "internet");
    let mut daemon = lab.start(&[]);
    let web = guest(&lab, "g1", 1);
    let other = guest(&lab, "g2", 2);
    let prefix = network(&lab);
    let own = |id: u32| format!("{prefix}5054:ff:fe00:{:x}", id + 10).replacen("::", ":0:", 1);
    let own = |id: u32| own(id).parse::<Ipv6Addr>().unwrap().to_string();
    wait("the guest has its address", || addresses(&lab, &web).contains(&own(1)));
    wait("the other has its own", || addresses(&lab, &other).contains(&own(2)));
    assert_eq!(addresses(&lab, &web).lines().count(), 1, "{}", addresses(&lab, &web));
    // The host has no way out by IPv6, so guests do not try.
    assert_eq!(routes(&lab, &web), "");
    let forwarding = || lab.host("cat /proc/sys/net/ipv6/conf/all/forwarding");
    assert_eq!(forwarding(), "0\n");
    lab.run(&web, &format!("ping -6 -c 1 -W 5 {prefix}1; ping -6 -c 1 -W 5 {}", own(2)));
    lab.host(&format!("ping -6 -c 1 -W 5 {}", own(1)));

    // It gets one: guests are told, and packets pass.
    lab.host("echo 1 >/proc/sys/net/ipv6/conf/up0/accept_ra");
    lab.host(&format!("ip -6 route add default via {FAR}"));
    wait("the guest has a way out", || routes(&lab, &web).contains("via fe80::5054:ff:fe00:1 "));
    wait("the host forwards", || forwarding() == "1\n");
    assert_eq!(lab.host("cat /proc/sys/net/ipv6/conf/up0/accept_ra"), "2\n");
    assert_eq!(lab.host("cat /proc/sys/net/ipv6/conf/puter0/accept_ra"), "0\n");
    let internet = format!("[{FAR}]:80");
    assert_eq!(get(&lab, &web, &internet), "internet", "only NAT can bring the answer back");
    let status: Status = lab.json("GET", "/v1/status", "");
    assert!(status.ipv6_outside && status.problems.is_empty(), "{status:?}");
    // The host's own services are closed, and so are guests to the internet, even with a route.
    let _service = lab.web_server(lab.host_holder(), "[::]:8080", "service");
    assert_eq!(get(&lab, lab.host_holder(), "[::1]:8080"), "service");
    for address in [format!("[{prefix}1]:8080"), "[2001:db8:7::2]:8080".to_string()] {
        assert_ne!(get(&lab, &web, &address), "service", "{address}");
    }
    let _page = lab.web_server(&web, "[::]:80", "guest");
    assert_eq!(get(&lab, &other, &format!("[{}]:80", own(1))), "guest");
    lab.internet(&format!("ip -6 route add {prefix}/64 via 2001:db8:7::2"));
    assert_ne!(get(&lab, lab.internet_holder(), &format!("[{}]:80", own(1))), "guest");
    // A source that is not of the network does not leave.
    lab.run(&web, "ip addr add 2001:db8:9::7/128 dev eth0 nodad");
    lab.internet("ip -6 route add 2001:db8:9::/64 via 2001:db8:7::2");
    lab.host("ip -6 route add 2001:db8:9::7/128 dev puter0");
    assert!(!lab.attempt(&web, &format!("ping -6 -c 1 -W 2 -I 2001:db8:9::7 {FAR}")).1);
    lab.run(&web, "ip addr del 2001:db8:9::7/128 dev eth0");

    // A restart keeps all of it.
    daemon.stop(Signal::KILL);
    daemon = lab.start(&[]);
    assert_eq!(network(&lab), prefix);
    assert_eq!(get(&lab, &web, &internet), "internet");
    // The way out goes, and comes back.
    lab.host("ip -6 route del default");
    wait("the guest has no way out", || routes(&lab, &web).is_empty());
    lab.host(&format!("ip -6 route add default via {FAR}"));
    wait("the guest has one again", || !routes(&lab, &web).is_empty());
    // Who takes the address away finds it put back.
    daemon.said();
    lab.host(&format!("ip -6 addr del {prefix}1/64 dev puter0; ip -6 addr del fe80::5054:ff:fe00:1/64 dev puter0"));
    daemon.log_until("put right");
    wait("the host answers", || lab.attempt(&web, &format!("ping -6 -c 1 -W 2 {prefix}1")).1);
    assert_eq!(get(&lab, &web, &internet), "internet");
}

#[test]
#[ignore = "needs root"]
fn names_lead_to_ipv6_addresses_and_back_by_ipv6() {
    let lab = Lab::new();
    let _daemon = lab.start(&["--ipv6", "fd00:1:2:3::/64"]);
    let _: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"db","id":7}"#);
    let web = guest(&lab, "g1", 1);
    wait("the guest has its address", || addresses(&lab, &web).contains("fd00:1:2:3:5054:ff:fe00:b/"));
    let server = "[fd00:1:2:3::1]:53".parse::<SocketAddr>().unwrap();
    let ask = |name: &str, kind| {
        frames::inside(&web, || {
            let socket = UdpSocket::bind("[::]:0").unwrap();
            socket.connect(server).unwrap();
            socket.set_read_timeout(Some(LIMIT)).unwrap();
            socket.send(&dns::query(name, kind)).unwrap();
            let mut buffer = [0; 4096];
            let length = socket.recv(&mut buffer).unwrap();
            dns::told(&buffer[..length])
        })
    };
    let ask_by_tcp = |name: &str, kind| {
        frames::inside(&web, || {
            let mut stream = TcpStream::connect(server).unwrap();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            let query = dns::query(name, kind);
            stream.write_all(&[&(query.len() as u16).to_be_bytes()[..], &query].concat()).unwrap();
            let mut length = [0; 2];
            stream.read_exact(&mut length).unwrap();
            let mut answer = vec![0; u16::from_be_bytes(length).into()];
            stream.read_exact(&mut answer).unwrap();
            dns::told(&answer)
        })
    };
    let reverse = |address: &str| {
        let number: u128 = address.parse::<Ipv6Addr>().unwrap().into();
        (0..32)
            .map(|at| format!("{:x}.", (number >> (4 * at)) & 15))
            .chain(["ip6.arpa".to_string()])
            .collect::<String>()
    };
    let db = "fd00:1:2:3:5054:ff:fe00:11";
    assert_eq!(ask("db.puter", TYPE::AAAA), dns::found(db));
    assert_eq!(ask_by_tcp("db", TYPE::AAAA), dns::found(db));
    assert_eq!(ask("db.puter", TYPE::A), dns::found("10.0.0.17"));
    assert_eq!(ask("host.puter", TYPE::AAAA), dns::found("fd00:1:2:3::1"));
    assert_eq!(ask(&reverse(db), TYPE::PTR), dns::found("db.puter"));
    assert_eq!(ask(&reverse("fd00:1:2:3::1"), TYPE::PTR), dns::found("host.puter"));
    assert_eq!(ask(&reverse("fd00:1:2:3::2"), TYPE::PTR).0, RCODE::NameError);
}

#[test]
#[ignore = "needs root"]
fn a_network_is_kept_replaced_or_refused_as_ipv4s_is() {
    let lab = Lab::new();
    let own = || lab.host("ip -6 -o addr show dev puter0 scope global | awk '{print $4}'");
    let daemon = lab.start(&[]);
    let first = own();
    assert!(first.starts_with("fd") && first.ends_with("::1/64\n"), "{first}");
    daemon.stop(Signal::TERM);
    // Made anew, it has the same; with a route of the host in its way it has another.
    lab.host("ip link delete puter0");
    lab.start(&[]).stop(Signal::TERM);
    assert_eq!(own(), first);
    lab.host(&format!("ip link delete puter0; ip -6 route add {} dev up0", first.trim().replace("::1/", "::/")));
    let daemon = lab.start(&[]);
    assert!(own().starts_with("fd") && own() != first);
    daemon.stop(Signal::TERM);
    let text = lab.refused(lab.puterd().args(["--ipv6", first.trim()]));
    assert!(text.contains("overlaps the host's route") && text.contains("(dev up0)"), "{text}");
    // Without VMs it may change, with them it may not.
    let daemon = lab.start(&["--ipv6", "fd00:7::/64"]);
    assert_eq!(own(), "fd00:7::1/64\n");
    let _: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"web","id":1}"#);
    daemon.stop(Signal::TERM);
    let text = lab.refused(lab.puterd().args(["--ipv6", "fd00:8::/64"]));
    assert!(text.contains("stop those VMs first") && text.contains("--ipv6 fd00:7::1/64"), "{text}");
    // Off, nothing is left of it.
    let _daemon = lab.start(&["--ipv6", "off"]);
    assert_eq!(own(), "");
    let tap: Vec<Tap> = lab.json("GET", "/v1/taps", "");
    assert_eq!(tap[0].ip6, None);
    assert!(!lab.host("nft list table netdev puter; nft list table inet puter").contains("ip6"));
}

#[test]
#[ignore = "needs root"]
fn a_host_without_ipv6_serves_ipv4_as_before() {
    let lab = Lab::new();
    lab.host("echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6");
    let daemon = lab.start(&[]);
    let status: Status = lab.json("GET", "/v1/status", "");
    assert_eq!(status.ipv6, None);
    let tap: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"web","id":1}"#);
    assert_eq!(tap.ip6, None);
    assert!(lab.host("nft list chain inet puter input").contains("meta nfproto != ipv4 drop"));
    daemon.stop(Signal::TERM);
    let text = lab.refused(lab.puterd().args(["--ipv6", "on"]));
    assert!(text.contains("has no IPv6") && text.contains("--ipv6 auto"), "{text}");
}

#[test]
#[ignore = "needs root"]
fn isolation_holds_by_ipv6() {
    let lab = Lab::new();
    let _daemon = lab.start(&["--ipv6", "fd00:1:2:3::/64"]);
    let make = |vm: &str, id: u32, isolated: bool| -> (Tap, std::fs::File) {
        let body = format!(r#"{{"vm":"{vm}","id":{id},"isolated":{isolated}}}"#);
        let tap: Tap = lab.json("POST", "/v1/taps", &body);
        let file = frames::take(&lab, &tap.name);
        lab.host(&format!("ip neigh replace {} lladdr {} dev puter0 nud permanent", tap.ip6.unwrap(), tap.mac));
        (tap, file)
    };
    lab.host("echo 1 >/proc/sys/net/ipv6/conf/all/forwarding");
    let (a, b, c) = (make("a", 1, true), make("b", 2, false), make("c", 3, false));
    let reaches = |from: &(Tap, std::fs::File), to: &(Tap, std::fs::File)| {
        let packet = frames6::Packet::of(from.0.ip6.unwrap(), to.0.ip6.unwrap(), frames6::UDP);
        let frame = packet.frame(from.0.mac.0, &[&frames6::ports(1, 2)[..], b"straight"].concat(), "");
        let routed = packet.frame(from.0.mac.0, &[&frames6::ports(1, 2)[..], b"by the host"].concat(), "");
        frames::drain(&to.1);
        frames::send(&from.1, &[frame, frames::to([0x52, 0x54, 0, 0, 0, 1], routed)]);
        let came = frames::drain(&to.1);
        let has = |text: &str| came.iter().any(|f| String::from_utf8_lossy(f).contains(text));
        (has("straight"), has("by the host"))
    };
    assert_eq!(reaches(&b, &c), (true, true), "or the test proves nothing");
    assert_eq!((reaches(&a, &b), reaches(&b, &a)), ((false, false), (false, false)));
    let _: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"a","id":1}"#);
    assert_eq!((reaches(&a, &b), reaches(&b, &a)), ((true, true), (true, true)));
    let _: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"a","id":1,"isolated":true}"#);
    assert_eq!((reaches(&a, &b), reaches(&b, &a)), ((false, false), (false, false)));
    for (vm, id) in [("a", 1), ("b", 2)] {
        let member = format!(r#"{{"vm":"{vm}","id":{id},"isolated":true,"member":{{"cluster":"k","member":"{vm}"}}}}"#);
        let _: Tap = lab.json("POST", "/v1/taps", &member);
    }
    assert_eq!((reaches(&a, &b), reaches(&b, &a)), ((true, true), (true, true)));
    assert_eq!((reaches(&a, &c), reaches(&c, &b)), ((false, false), (false, false)));
}
