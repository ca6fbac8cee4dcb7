//! More TAPs than one bridge has ports: further bridges, which are one network with the first. To make them come soon,
//! puterd is told of bridges with very few ports.

use std::net::{Ipv4Addr, UdpSocket};

use puter::protocol::address::Mac;
use puter::protocol::daemon::{Status, Tap};
use rustix::process::Signal;
use simple_dns::TYPE;

use crate::dhcp::leases;
use crate::dns;
use crate::isolation::{Machine, WAYS};
use crate::lab::{Daemon, LIMIT, Lab, Process, SERVER, wait};
use crate::traffic::frames;

/// Bridges of four ports: two TAPs on the first, which has two further ones, and three on each of those.
const FOUR: [&str; 2] = ["--bridge-ports", "4"];
const FAILURES: [&str; 5] = [
    "daemon.branch.bridge",
    "daemon.branch.sealed",
    "daemon.branch.pair",
    "daemon.branch.marked",
    "daemon.branch.joined",
];

fn make(lab: &Lab, id: u32) -> Tap {
    lab.json("POST", "/v1/taps", &format!(r#"{{"vm":"t{id}","id":{id}}}"#))
}

/// The bridge that an interface is a port of.
fn master(lab: &Lab, name: &str) -> String {
    let shown = lab.host(&format!("ip -o link show {name}"));
    shown.split(" master ").nth(1).map_or(String::new(), |rest| rest.split(' ').next().unwrap().to_owned())
}

fn masters(lab: &Lab, ids: std::ops::RangeInclusive<u32>) -> Vec<String> {
    ids.map(|id| master(lab, &format!("pt-t{id}"))).collect()
}

/// All interfaces, with what they are ports of. The kernel learns of a carrier in its own time.
fn links(lab: &Lab) -> String {
    lab.host(
        "ip -o link | sed 's/^[0-9]*: //; s/ link.*//; s/ mode.*//; s/ qdisc [a-z]*//; s/state [A-Z]*//; \
         s/NO-CARRIER,//; s/,LOWER_UP//' | sort",
    )
}

/// A Linux machine on this bridge with the MAC of this id, without an address.
fn guest(lab: &Lab, name: &str, id: u32, bridge: &str) -> Process {
    let holder = lab.guest(name, "10.0.0.9");
    lab.host(&format!("ip link set {name} nomaster; ip link set {name} master {bridge}"));
    lab.run(
        &holder,
        &format!(
            "ip addr flush dev eth0; ip link set eth0 down; ip link set eth0 address {}; ip link set eth0 up",
            Mac::of_id(id)
        ),
    );
    lab.passes(name);
    holder
}

/// Gets the guest its address by DHCP and returns it.
fn lease(lab: &Lab, guest: &Process) -> String {
    let script = lab.dir.path().join("udhcpc.sh");
    let body =
        "#!/bin/sh\n[ $1 = bound ] && ip addr replace $ip/$mask dev eth0 && ip route replace default via $router\n";
    std::fs::write(&script, body).unwrap();
    lab.host(&format!("chmod 755 {}", script.display()));
    let ask = format!("busybox udhcpc -f -q -n -i eth0 -s {} -t 25 -T 1 2>&1", script.display());
    let (said, well) = lab.attempt(guest, &ask);
    if !well {
        let host = lab.host("ip -s -d link; bridge -d link; bridge fdb; ip addr; ss -anup; nft list ruleset");
        panic!("no lease: {said}\n{host}\n{}", lab.run(guest, "ip -s -d link; ip addr; ip neigh"));
    }
    let shown = lab.run(guest, "ip -4 -o addr show dev eth0");
    shown.split("inet ").nth(1).unwrap().split('/').next().unwrap().to_owned()
}

#[test]
#[ignore = "needs root"]
fn vms_on_all_bridges_are_one_network() {
    let lab = Lab::new();
    let daemon = lab.start(&[&FOUR[..], &["--ipv6", "fd00:1:2:3::/64"]].concat());
    (1..=6).for_each(|id| drop(make(&lab, id)));
    assert_eq!(masters(&lab, 1..=6), ["puter0", "puter0", "puter0-1", "puter0-1", "puter0-1", "puter0-2"]);
    let status: Status = lab.json("GET", "/v1/status", "");
    let further: Vec<_> = status.further.iter().map(|bridge| (bridge.name.as_str(), bridge.ports)).collect();
    assert_eq!((status.taps, further), (6, vec![("puter0-1", 3), ("puter0-2", 1)]));
    assert_eq!(lab.json::<Vec<Tap>>("GET", "/v1/taps", "").len(), 6);
    // Theirs are the MACs of the second, third and sixth VM.
    let guests = [("puter0", 2), ("puter0-1", 3), ("puter0-2", 6)];
    let guests = guests.map(|(bridge, id)| (id, guest(&lab, &format!("g{id}"), id, bridge)));
    let _far = lab.web_server(lab.internet_holder(), &format!("{SERVER}:80"), "internet");
    for (id, guest) in &guests {
        let own = format!("10.0.0.{}", id + 10);
        assert_eq!(lease(&lab, guest), own);
        lab.run(guest, "ping -c 1 -W 5 10.0.0.1; ping -c 1 -W 5 203.0.113.1");
        lab.host(&format!("ping -c 1 -W 5 {own}"));
        // The gateway is the first bridge and no other.
        assert!(lab.run(guest, "ip neigh show 10.0.0.1").contains("lladdr 52:54:00:00:00:01"));
        let ask = r"printf 'GET / HTTP/1.0\r\n\r\n' | socat -t 3 -T 3 - TCP:203.0.113.1:80,connect-timeout=3";
        assert!(lab.run(guest, ask).ends_with("internet"));
        let name = frames::inside(guest, || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.connect("10.0.0.1:53").unwrap();
            socket.set_read_timeout(Some(LIMIT)).unwrap();
            socket.send(&dns::query("t6.puter", TYPE::A)).unwrap();
            let mut buffer = [0; 4096];
            let length = socket.recv(&mut buffer).unwrap();
            dns::told(&buffer[..length])
        });
        assert_eq!(name, dns::found("10.0.0.16"));
        let own6 = format!("fd00:1:2:3:5054:ff:fe00:{:x}/64", id + 10);
        wait("a router advertisement comes, and nobody else has the address", || {
            lab.run(guest, "ip -6 -o addr show dev eth0 -tentative").contains(&own6)
        });
    }
    // Where br_netfilter is loaded, and where it shows the bridges' own frames to other tables.
    for value in [0, 1] {
        lab.attempt(lab.host_holder(), &format!("echo {value} >/proc/sys/net/bridge/bridge-nf-call-iptables"));
        for (id, from) in &guests {
            lab.run(from, "ping -c 1 -W 5 203.0.113.1");
            for (other, _) in guests.iter().filter(|(other, _)| other != id) {
                lab.run(from, &format!("ping -c 1 -W 5 10.0.0.{}", other + 10));
                lab.run(from, &format!("ping -6 -c 1 -W 5 fd00:1:2:3:5054:ff:fe00:{:x}", other + 10));
            }
        }
    }
    // As wide a frame as anywhere, and no more addresses of the host than it has on the first.
    lab.run(&guests[1].1, "ping -c 1 -W 5 -M do -s 1472 10.0.0.16");
    assert_eq!(leases(&lab).len(), 3);
    assert!(!lab.host("ip -o addr").contains("puter0-"), "{}", lab.host("ip -o addr"));
    drop(daemon);
}

#[test]
#[ignore = "needs root"]
fn isolation_holds_between_all_bridges() {
    let lab = Lab::new();
    let daemon = lab.start(&FOUR);
    let isolated: fn(u32) -> bool = |id| [1, 3, 6].contains(&id);
    let machines: Vec<Machine> = (1..=7).map(|id| Machine::new(&lab, &format!("t{id}"), id, isolated(id))).collect();
    assert_eq!(masters(&lab, 1..=7)[4..], ["puter0-1", "puter0-2", "puter0-2"]);
    let host = frames::inside(lab.host_holder(), || UdpSocket::bind("10.0.0.1:0").unwrap());
    let far = frames::inside(lab.internet_holder(), || UdpSocket::bind((SERVER, 7000)).unwrap());
    far.set_read_timeout(Some(LIMIT)).unwrap();
    let check = |apart: &dyn Fn(u32, u32) -> bool| {
        for from in &machines {
            for to in machines.iter().filter(|to| to.made.id != from.made.id) {
                let came = from.reaches_by(to, || frames::drain_after(&to.tap, &host, to.made.ip));
                let ways = if apart(from.made.id, to.made.id) { &WAYS[..0] } else { &WAYS[..] };
                assert_eq!(came, ways, "{} to {}", from.made.vm, to.made.vm);
            }
            // The host and the outside are there for all.
            frames::drain(&from.tap);
            frames::send(&from.tap, &[frames::arp(from.made.mac.0, from.own(), Ipv4Addr::new(10, 0, 0, 1))]);
            assert_eq!(frames::arp_answer(&from.tap), (from.made.mac.0, from.made.ip));
            let out = frames::udp(from.own(), 1000, (SERVER.parse().unwrap(), 7000), &from.made.vm);
            frames::send(&from.tap, &[frames::to([0x52, 0x54, 0, 0, 0, 1], out)]);
            let mut text = [0; 10];
            let (size, _) = far.recv_from(&mut text).unwrap();
            assert_eq!(&text[..size], from.made.vm.as_bytes());
        }
    };
    let either = |of: fn(u32) -> bool| move |a: u32, b: u32| of(a) || of(b);
    check(&either(isolated));
    // It changes while they run, and outlives puterd.
    let _: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"t3","id":3}"#);
    let _: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"t7","id":7,"isolated":true}"#);
    let now: fn(u32) -> bool = |id| [1, 6, 7].contains(&id);
    check(&either(now));
    daemon.stop(Signal::KILL);
    let daemon = lab.start(&FOUR);
    check(&either(now));
    // Members on three bridges are kept in their cluster, and the rest from it.
    for id in [1, 2, 5, 6] {
        let member =
            format!(r#"{{"vm":"t{id}","id":{id},"isolated":true,"member":{{"cluster":"k","member":"n{id}"}}}}"#);
        let _: Tap = lab.json("POST", "/v1/taps", &member);
    }
    let inside = |id: u32| [1, 2, 5, 6].contains(&id);
    let apart = |a: u32, b: u32| inside(a) != inside(b) || a == 7 || b == 7;
    check(&apart);
    daemon.stop(Signal::KILL);
    let _daemon = lab.start(&FOUR);
    check(&apart);
    // Whoever else is on the first bridge is not taken for the host.
    let stranger = lab.guest("g1", "10.0.0.200");
    lab.run(&stranger, "ip link set eth0 down; ip link set eth0 address 52:54:00:00:00:01; ip link set eth0 up");
    let victim = &machines[5];
    frames::drain(&victim.tap);
    lab.run(
        &stranger,
        &format!(
            "ip neigh replace {} lladdr {} dev eth0; ping -c 3 -i 0.2 -W 1 {0} || :",
            victim.made.ip, victim.made.mac
        ),
    );
    let came = frames::drain_after(&victim.tap, &host, victim.made.ip);
    assert!(!came.iter().any(|frame| frame[26..30] == [10, 0, 0, 200]), "a stranger's frame came: {came:?}");
}

#[test]
#[ignore = "needs root"]
fn the_host_is_reached_through_the_first_bridge_alone() {
    let lab = Lab::new();
    let daemon = lab.start(&FOUR);
    let machines: Vec<Machine> = (1..=3).map(|id| Machine::new(&lab, &format!("t{id}"), id, false)).collect();
    let (web, host) = (&machines[2], Ipv4Addr::new(10, 0, 0, 1));
    assert_eq!(master(&lab, "pt-t3"), "puter0-1");
    // Another request for where the host is, and one answer.
    frames::send(&web.tap, &[frames::arp(web.made.mac.0, web.own(), host)]);
    frames::arp_answer(&web.tap);
    let service = frames::inside(lab.host_holder(), || UdpSocket::bind("0.0.0.0:7000").unwrap());
    service.set_nonblocking(true).unwrap();
    let word = frames::inside(lab.host_holder(), || UdpSocket::bind("10.0.0.1:0").unwrap());
    let came = frames::drain_after(&web.tap, &word, web.made.ip);
    let arp = came.iter().filter(|frame| frame[12..14] == [8, 6] && frame[21] == 2).count();
    assert_eq!(arp, 0, "two machines say that they are the host: {came:?}");
    let macs: Vec<[u8; 6]> = ["puter0-1", "puter0-1a", "puter0-1b", "pt-t3", "puter0"]
        .map(|name| lab.host(&format!("cat /sys/class/net/{name}/address")).trim().parse::<Mac>().unwrap().0)
        .into();
    let send = || {
        for mac in &macs {
            let frame = frames::udp(web.own(), 1000, (host, 7000), "hello");
            frames::send(&web.tap, &[frames::to(*mac, frame)]);
        }
        frames::drain_after(&web.tap, &word, web.made.ip);
        std::iter::from_fn(|| service.recv(&mut [0; 10]).ok()).count()
    };
    assert_eq!(send(), 0, "the host's port is closed to guests");
    // It is the filter of the further bridge that stops what the first's rules do not see.
    daemon.freeze(true);
    lab.host("nft delete chain netdev puter puter0-1");
    assert_ne!(send(), 0, "or the test proves nothing");
    daemon.freeze(false);
    daemon.log_until("puter's nftables rules were changed or flushed: put back");
    wait("it is closed again", || send() == 0);
}

#[test]
#[ignore = "needs root"]
fn what_others_take_away_of_further_bridges_comes_back() {
    let lab = Lab::new();
    let daemon = lab.start(&FOUR);
    (1..=4).for_each(|id| drop(make(&lab, id)));
    let guests = [("puter0", 2), ("puter0-1", 3)];
    let guests = guests.map(|(bridge, id)| (id, guest(&lab, &format!("g{id}"), id, bridge)));
    for (_, guest) in &guests {
        lease(&lab, guest);
    }
    let works = || lab.attempt(&guests[1].1, "ping -c 1 -W 1 10.0.0.1 && ping -c 1 -W 1 10.0.0.12").1;
    wait("both are there", works);
    let before = links(&lab);
    for (harm, said) in [
        ("ip link delete puter0-1a", "a further bridge was"),
        ("ip link set puter0-1a nomaster", "a further bridge was"),
        ("ip link set puter0-1b nomaster", "a further bridge was"),
        ("ip link set puter0-1 down", "a further bridge was"),
        ("ip link set puter0-1b down", "a further bridge was"),
        ("ip link set pt-t3 nomaster", "TAPs were off"),
        ("ip link delete puter0; until ip link set g2 master puter0; do sleep 0.1; done", "the bridge was gone"),
        // The guest's own port is not puterd's to put back.
        (
            "ip link delete puter0-1; sleep 0.5; until ip link set g3 master puter0-1; do sleep 0.1; done",
            "TAPs were off",
        ),
    ] {
        daemon.said();
        lab.host(harm);
        daemon.log_until(said);
        wait(harm, || links(&lab) == before);
        wait("traffic goes on", works);
    }
}

#[test]
#[ignore = "needs root"]
fn a_restart_adopts_further_bridges_and_removes_empty_ones() {
    let lab = Lab::new();
    lab.host("ip link add puter0-1 type veth peer name mine0");
    let before = links(&lab);
    let daemon = lab.start(&FOUR);
    (1..=6).for_each(|id| drop(make(&lab, id)));
    // A name that somebody has is left to them.
    assert_eq!(masters(&lab, 1..=6)[2..], ["puter0-2", "puter0-2", "puter0-2", "puter0-3"]);
    let (shown, rules) = (links(&lab), lab.host("nft list ruleset"));
    let index = || ["puter0-2", "puter0-2a", "puter0-3", "pt-t6"].map(|name| lab.index(name));
    let first = index();
    daemon.stop(Signal::KILL);
    let daemon = lab.start(&FOUR);
    assert!(daemon.log.contains("puterd: adopted 6 TAPs on 3 bridges\n"), "{}", daemon.log);
    assert!(!daemon.log.contains("left alone"), "{}", daemon.log);
    assert_eq!((links(&lab), lab.host("nft list ruleset"), index()), (shown, rules, first));
    let refused = {
        daemon.stop(Signal::TERM);
        lab.refused(lab.puterd().args(["--subnet", "10.7.0.1/16"]))
    };
    assert!(refused.contains("VMs on it (pt-t1, pt-t2, pt-t3, pt-t4, pt-t5 and 1 more)"), "{refused}");
    let daemon = lab.start(&FOUR);
    // Room on the first is used first; an empty bridge goes with the next start.
    assert_eq!(lab.request("DELETE", "/v1/taps/t1", "").0, 204);
    assert_eq!(lab.request("DELETE", "/v1/taps/t6", "").0, 204);
    wait("they go", || !lab.host("ip link").contains("pt-t1:"));
    make(&lab, 7);
    assert_eq!(master(&lab, "pt-t7"), "puter0");
    daemon.stop(Signal::TERM);
    let daemon = lab.start(&[&FOUR[..], &["--teardown"]].concat());
    assert!(daemon.log.contains("puterd: removed the further bridge puter0-3: it has no VM\n"), "{}", daemon.log);
    assert!(!lab.host("ip link").contains("puter0-3"));
    make(&lab, 6);
    assert!(daemon.stop(Signal::TERM).success());
    assert_eq!(links(&lab), before);
    assert_eq!(lab.host("nft list ruleset"), "");
}

#[test]
#[ignore = "needs root"]
fn a_firewall_that_drops_what_it_does_not_know_knows_further_bridges() {
    let lab = Lab::new();
    lab.host("iptables -P FORWARD DROP");
    let daemon = lab.start(&[&FOUR[..], &["--teardown"]].concat());
    (1..=4).for_each(|id| drop(make(&lab, id)));
    lab.attempt(lab.host_holder(), "echo 1 >/proc/sys/net/bridge/bridge-nf-call-iptables");
    let guests = [3, 4].map(|id| guest(&lab, &format!("g{id}"), id, "puter0-1"));
    for guest in &guests {
        lease(&lab, guest);
    }
    let passes = || lab.attempt(&guests[0], "ping -c 1 -W 1 203.0.113.1 && ping -c 1 -W 1 10.0.0.14").1;
    wait("the guest gets out and to its neighbour", passes);
    let rules = lab.host("iptables -S FORWARD");
    assert_eq!(rules.matches("puter:puter0").count(), 3, "{rules}");
    assert!(rules.contains("-i puter0-1 ") && !rules.contains("-o puter0-1 "), "{rules}");
    drop(guests);
    wait("the guests are gone", || !lab.host("ip link").contains("g3"));
    assert!(daemon.stop(Signal::TERM).success());
    assert!(!lab.host("iptables -S FORWARD").contains("puter"));
}

#[test]
#[ignore = "needs root"]
fn a_long_name_of_the_first_bridge_leaves_room_for_further_ones() {
    let lab = Lab::new();
    let daemon = lab.start(&[&FOUR[..], &["--bridge", "fifteen-letters", "--teardown"]].concat());
    (1..=3).for_each(|id| drop(make(&lab, id)));
    let further = master(&lab, "pt-t3");
    assert!(further.starts_with("fifte") && further.ends_with("-1"), "{further}");
    assert!(daemon.stop(Signal::TERM).success());
    assert!(!lab.host("ip link").contains("fifte"));
}

#[test]
#[ignore = "needs root, and a build with fail-points"]
fn a_kill_while_a_further_bridge_is_made_leaves_nothing_that_is_not_taken_up() {
    let lab = Lab::new();
    let before = links(&lab);
    for point in FAILURES {
        let mut command = lab.puterd();
        let daemon = Daemon::start(command.args(FOUR).env("PUTER_FAIL_POINT", point));
        (1..=2).for_each(|id| drop(make(&lab, id)));
        lab.exchange(b"POST /v1/taps HTTP/1.1\r\nHost: x\r\nContent-Length: 18\r\n\r\n{\"vm\":\"t3\",\"id\":3}");
        assert!(!daemon.stop(Signal::TERM).success(), "{point} was not reached");
        let daemon = lab.start(&[&FOUR[..], &["--teardown"]].concat());
        assert_eq!(master(&lab, "pt-t3"), "puter0-1", "{point}: {}", daemon.log);
        make(&lab, 4);
        assert_eq!(masters(&lab, 1..=4), ["puter0", "puter0", "puter0-1", "puter0-1"], "{point}");
        let guest = guest(&lab, "g3", 3, "puter0-1");
        assert_eq!(lease(&lab, &guest), "10.0.0.13", "{point}");
        let rules = lab.host("nft list table netdev puter");
        assert!(rules.contains("chain puter0-1 "), "{point}: {rules}");
        drop(guest);
        wait("the guest is gone", || !lab.host("ip link").contains("g3"));
        assert!(daemon.stop(Signal::TERM).success());
        assert_eq!((links(&lab), lab.host("nft list ruleset")), (before.clone(), String::new()), "{point}");
    }
}
