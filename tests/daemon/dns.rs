//! DNS as guests see it: the machines' names from puterd, the rest from the host's name servers, which are dnsmasq here.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use puter::protocol::daemon::Tap;
use rustix::process::Signal;
use simple_dns::rdata::RData;
use simple_dns::{CLASS, Name, Packet, PacketFlag, Question, RCODE, TYPE};

use crate::lab::{Daemon, LIMIT, Lab, Process, wait};
use crate::traffic::frames::inside;

const SERVER: &str = "10.0.0.1:53";

/// A guest that asks.
struct Asker {
    socket: UdpSocket,
    tcp: Box<dyn Fn() -> TcpStream>,
}

/// What came back: the code, whether it is cut off, and the first record.
pub type Told = (RCODE, bool, String);

pub fn query(name: &str, kind: TYPE) -> Vec<u8> {
    let mut packet = Packet::new_query(4711);
    packet.set_flags(PacketFlag::RECURSION_DESIRED);
    packet.questions.push(Question::new(Name::new(name).unwrap(), kind.into(), CLASS::IN.into(), false));
    packet.build_bytes_vec().unwrap()
}

pub fn told(bytes: &[u8]) -> Told {
    let packet = Packet::parse(bytes).unwrap();
    assert_eq!(packet.id(), 4711);
    let text = packet.answers.first().map_or(String::new(), |record| match &record.rdata {
        RData::A(a) => Ipv4Addr::from(a.address).to_string(),
        RData::AAAA(a) => Ipv6Addr::from(a.address).to_string(),
        RData::PTR(name) => name.0.to_string(),
        RData::TXT(text) => format!("{} bytes", String::try_from(text.clone()).unwrap().len()),
        other => format!("{other:?}"),
    });
    (packet.rcode(), packet.has_flags(PacketFlag::TRUNCATION), text)
}

impl Asker {
    fn new(lab: &Lab, name: &str, address: &str) -> (Asker, Process) {
        let holder = lab.guest(name, address);
        let socket = inside(&holder, || UdpSocket::bind("0.0.0.0:0").unwrap());
        socket.connect(SERVER).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        let pid = holder.pid();
        let tcp = move || {
            let namespace = std::fs::File::open(format!("/proc/{pid}/ns/net")).unwrap();
            let connect = move || {
                rustix::thread::move_into_link_name_space(
                    std::os::fd::AsFd::as_fd(&namespace),
                    Some(rustix::thread::LinkNameSpaceType::Network),
                )
                .unwrap();
                TcpStream::connect(SERVER.parse::<SocketAddr>().unwrap()).unwrap()
            };
            std::thread::spawn(connect).join().unwrap()
        };
        (Asker { socket, tcp: Box::new(tcp) }, holder)
    }

    fn ask(&self, name: &str, kind: TYPE) -> Told {
        self.socket.send(&query(name, kind)).unwrap();
        let mut buffer = [0; 65_536];
        let length = self.socket.recv(&mut buffer).unwrap();
        told(&buffer[..length])
    }

    fn ask_by_tcp(&self, name: &str, kind: TYPE) -> Told {
        let mut stream = (self.tcp)();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let query = query(name, kind);
        // In two pieces, as TCP may have it.
        stream.write_all(&(query.len() as u16).to_be_bytes()[..1]).unwrap();
        stream.write_all(&[&(query.len() as u16).to_be_bytes()[1..], &query].concat()).unwrap();
        let mut length = [0; 2];
        stream.read_exact(&mut length).unwrap();
        let mut answer = vec![0; u16::from_be_bytes(length).into()];
        stream.read_exact(&mut answer).unwrap();
        told(&answer)
    }
}

/// The host's resolv.conf in this lab.
fn resolv_conf(lab: &Lab) -> std::path::PathBuf {
    let file = lab.dir.path().join("resolv.conf");
    std::fs::write(&file, "").unwrap();
    lab.host(&format!("mount --bind {} /etc/resolv.conf", file.display()));
    file
}

/// A name server in the internet that knows example.org by this address.
fn dnsmasq(lab: &Lab, listen: &str, answer: &str) -> Process {
    lab.internet(&format!("ip addr replace {listen}/24 dev inet0"));
    let mut command = lab.enter(lab.internet_holder());
    command.args(["dnsmasq", "--no-daemon", "--no-resolv", "--no-hosts", "--bind-interfaces", "--conf-file=/dev/null"]);
    command.args(["--pid-file", &format!("--listen-address={listen}"), &format!("--address=/example.org/{answer}")]);
    let parts: Vec<String> = (0..8).map(|_| "x".repeat(250)).collect();
    command.arg(format!("--txt-record=long.example.net,{}", parts.join(",")));
    let process = Process(command.stderr(std::process::Stdio::null()).spawn().unwrap());
    wait("dnsmasq listens", || lab.internet("ss -Hlun").contains(&format!("{listen}:53 ")));
    process
}

pub fn found(text: &str) -> Told {
    (RCODE::NoError, false, text.to_string())
}

fn memory(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[test]
#[ignore = "needs root"]
fn machines_are_known_by_name_as_long_as_they_are_there() {
    let lab = Lab::new();
    resolv_conf(&lab);
    let daemon = lab.start(&[]);
    let (asker, _guest) = Asker::new(&lab, "g1", "10.0.0.200");
    let missing = (RCODE::NameError, false, String::new());
    assert_eq!(asker.ask("web.puter", TYPE::A), missing);
    let _: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"web","id":1}"#);
    for name in ["web.puter", "web", "WEB.PUTER"] {
        assert_eq!(asker.ask(name, TYPE::A), found("10.0.0.11"), "{name}");
        assert_eq!(asker.ask_by_tcp(name, TYPE::A), found("10.0.0.11"), "{name}");
    }
    assert_eq!(asker.ask("web.puter", TYPE::TXT), found(""));
    assert_eq!(asker.ask("host.puter", TYPE::A), found("10.0.0.1"));
    assert_eq!(asker.ask("11.0.0.10.in-addr.arpa", TYPE::PTR), found("web.puter"));
    // Also by one that starts anew, and no longer when it is gone.
    daemon.stop(Signal::KILL);
    let _daemon = lab.start(&[]);
    assert_eq!(asker.ask("web.puter", TYPE::A), found("10.0.0.11"));
    assert_eq!(lab.request("DELETE", "/v1/taps/web", "").0, 204);
    assert_eq!(asker.ask("web.puter", TYPE::A), missing);
    assert_eq!(asker.ask_by_tcp("11.0.0.10.in-addr.arpa", TYPE::PTR), missing);
}

#[test]
#[ignore = "needs root"]
fn each_cluster_knows_its_own_members_also_after_a_new_start() {
    let lab = Lab::new();
    resolv_conf(&lab);
    let daemon = lab.start(&["--ipv6", "off"]);
    let tap = |vm: &str, id: u32, member: Option<(&str, &str)>| {
        let member = member.map(|(cluster, member)| serde_json::json!({ "cluster": cluster, "member": member }));
        let request = serde_json::json!({ "vm": vm, "id": id, "member": member });
        let _: Tap = lab.json("POST", "/v1/taps", &request.to_string());
    };
    tap("red-node1", 1, Some(("red", "node1")));
    tap("red-node2", 2, Some(("red", "node2")));
    tap("blue-node1", 3, Some(("blue", "node1")));
    tap("blue-node2", 4, Some(("blue", "node2")));
    tap("alone", 5, None);
    // Guests at the addresses of red-node1, blue-node1 and the one that is in no cluster.
    let (red, _one) = Asker::new(&lab, "g1", "10.0.0.11");
    let (blue, _two) = Asker::new(&lab, "g2", "10.0.0.13");
    let (alone, _three) = Asker::new(&lab, "g3", "10.0.0.15");
    let missing = (RCODE::NameError, false, String::new());
    let check = || {
        for name in ["node2", "node2.puter"] {
            assert_eq!(red.ask(name, TYPE::A), found("10.0.0.12"), "{name}");
            assert_eq!(red.ask_by_tcp(name, TYPE::A), found("10.0.0.12"), "{name}");
            assert_eq!(blue.ask(name, TYPE::A), found("10.0.0.14"), "{name}");
            assert_eq!(alone.ask(name, TYPE::A), missing, "{name}");
        }
        assert_eq!(red.ask("node2.red", TYPE::A), found("10.0.0.12"));
        for asker in [&red, &blue, &alone] {
            assert_eq!(asker.ask("node2.red.puter", TYPE::A), found("10.0.0.12"));
            assert_eq!(asker.ask("node2.blue.puter", TYPE::A), found("10.0.0.14"));
            assert_eq!(asker.ask("red-node2", TYPE::A), found("10.0.0.12"));
        }
    };
    check();
    daemon.stop(Signal::KILL);
    let _daemon = lab.start(&["--ipv6", "off"]);
    check();
    // A member that is gone has no name, and one that leaves the cluster none in it.
    assert_eq!(lab.request("DELETE", "/v1/taps/red-node2", "").0, 204);
    assert_eq!(red.ask("node2", TYPE::A), missing);
    assert_eq!(alone.ask("node2.red.puter", TYPE::A), missing);
    assert_eq!(blue.ask("node2", TYPE::A), found("10.0.0.14"));
    tap("blue-node2", 4, None);
    assert_eq!(blue.ask("node2", TYPE::A), missing);
    assert_eq!(blue.ask("blue-node2", TYPE::A), found("10.0.0.14"));
}

#[test]
#[ignore = "needs root"]
fn the_rest_comes_from_the_hosts_servers_whichever_they_are() {
    let lab = Lab::new();
    let conf = resolv_conf(&lab);
    let servers = |text: &str| std::fs::write(&conf, text).unwrap();
    let failure = (RCODE::ServerFailure, false, String::new());
    let _daemon = lab.start(&[]);
    let (asker, _guest) = Asker::new(&lab, "g1", "10.0.0.200");
    assert_eq!(asker.ask("example.org", TYPE::A), failure, "the host has no server");

    let one = dnsmasq(&lab, "203.0.113.1", "192.0.2.1");
    servers("nameserver 203.0.113.1\n");
    assert_eq!(asker.ask("example.org", TYPE::A), found("192.0.2.1"));
    assert_eq!(asker.ask_by_tcp("example.org", TYPE::A), found("192.0.2.1"));
    // What does not fit is told to be cut off, and comes by TCP.
    let (code, cut, _) = asker.ask("long.example.net", TYPE::TXT);
    assert_eq!((code, cut), (RCODE::NoError, true));
    assert_eq!(asker.ask_by_tcp("long.example.net", TYPE::TXT), found("2000 bytes"));
    // Names without a dot are not the internet's business, nor is our own network.
    assert_eq!(asker.ask("example", TYPE::A).0, RCODE::NameError);

    // Another server, and one that is dead before it.
    let _two = dnsmasq(&lab, "203.0.113.3", "192.0.2.3");
    servers("nameserver 203.0.113.3\n");
    assert_eq!(asker.ask("example.org", TYPE::A), found("192.0.2.3"));
    drop(one);
    servers("nameserver 203.0.113.1\nnameserver 203.0.113.3\n");
    assert_eq!(asker.ask("example.org", TYPE::A), found("192.0.2.3"));
    // A server that never answers delays nobody but who asked it.
    lab.internet("ip addr add 203.0.113.77/24 dev inet0; nft add table ip f; \
                  nft 'add chain ip f i { type filter hook input priority 0; }'; nft add rule ip f i ip daddr 203.0.113.77 drop");
    servers("nameserver 203.0.113.77\n");
    let _: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"web","id":1}"#);
    let (other, _other) = Asker::new(&lab, "g2", "10.0.0.201");
    asker.socket.send(&query("example.org", TYPE::A)).unwrap();
    let began = Instant::now();
    assert_eq!(other.ask("web.puter", TYPE::A), found("10.0.0.11"));
    assert!(began.elapsed() < Duration::from_secs(2));
    let mut answer = [0; 512];
    let length = asker.socket.recv(&mut answer).unwrap();
    assert_eq!(told(&answer[..length]), failure);
    // Ourselves we do not ask.
    servers("nameserver 10.0.0.1\n");
    assert_eq!(asker.ask("example.org", TYPE::A), failure);
}

#[test]
#[ignore = "needs root"]
fn the_name_server_survives_a_flood_and_serves_guests_alone() {
    let lab = Lab::new();
    let conf = resolv_conf(&lab);
    lab.internet("ip addr add 203.0.113.77/24 dev inet0");
    std::fs::write(conf, "nameserver 203.0.113.99\n").unwrap();
    let daemon = lab.start(&[]);
    let _: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"web","id":1}"#);
    let (asker, _guest) = Asker::new(&lab, "g1", "10.0.0.200");
    assert_eq!(asker.ask("web.puter", TYPE::A), found("10.0.0.11"));
    let before = memory(&daemon);
    let mut random = 1_u64;
    for round in 0..60_000_u32 {
        // Knuth's multiplier.
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(round.into());
        let mut bytes = query(&format!("n{round}.example.org"), TYPE::A);
        if round % 3 > 0 {
            let at = (random >> 33) as usize % bytes.len();
            bytes[at] = (random >> 20) as u8;
        }
        let _ = asker.socket.send(&bytes);
    }
    // Connections that say nothing, and more than one guest may have.
    let idle: Vec<TcpStream> = (0..12).map(|_| (asker.tcp)()).collect();
    let (other, _other) = Asker::new(&lab, "g2", "10.0.0.201");
    assert_eq!(other.ask("web.puter", TYPE::A), found("10.0.0.11"));
    assert_eq!(other.ask_by_tcp("web.puter", TYPE::A), found("10.0.0.11"));
    drop(idle);
    let after = memory(&daemon);
    assert!(after < before + (8 << 20), "{before} bytes before, {after} after");

    // From elsewhere nobody is answered.
    lab.internet("ip route add 10.0.0.0/24 via 203.0.113.2");
    let socket = inside(lab.internet_holder(), || UdpSocket::bind("203.0.113.1:0").unwrap());
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    socket.send_to(&query("web.puter", TYPE::A), SERVER).unwrap();
    assert!(socket.recv(&mut [0; 512]).is_err());
}

#[test]
#[ignore = "needs root"]
fn where_the_port_is_taken_guests_are_told_of_the_hosts_own_servers() {
    let lab = Lab::new();
    let conf = resolv_conf(&lab);
    std::fs::write(conf, "nameserver 203.0.113.1\n").unwrap();
    let taken = inside(lab.host_holder(), || UdpSocket::bind("0.0.0.0:53").unwrap());
    let daemon = lab.start(&[]);
    assert!(daemon.log.contains("cannot listen on UDP 10.0.0.1:53"), "{}", daemon.log);
    assert_eq!(crate::dhcp::told(&lab, "dns"), "203.0.113.1");
    daemon.stop(Signal::TERM);
    drop(taken);
    let daemon = lab.start(&[]);
    assert!(!daemon.log.contains("cannot listen"), "{}", daemon.log);
    assert_eq!(crate::dhcp::told(&lab, "dns domain search"), "10.0.0.1 puter puter");
}
