//! VMs that are isolated, and what still reaches them: frames as their guests write them, on real TAPs.

use std::fs::File;
use std::net::{Ipv4Addr, UdpSocket};

use puter::protocol::daemon::Tap;

use crate::lab::{Lab, SERVER};
use crate::traffic::frames::{self, Sender};

const BRIDGE_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
/// All ways from one guest to another.
pub const WAYS: [&str; 5] = ["unicast", "broadcast", "ARP request", "ARP reply", "by the host"];

/// Asks for a TAP.
fn request(lab: &Lab, vm: &str, id: u32, isolated: bool, cluster: Option<&str>) -> Tap {
    let member = cluster.map(|cluster| serde_json::json!({ "cluster": cluster, "member": vm }));
    let request = serde_json::json!({ "vm": vm, "id": id, "isolated": isolated, "member": member });
    lab.json("POST", "/v1/taps", &request.to_string())
}

pub struct Machine {
    pub made: Tap,
    pub tap: File,
}

impl Machine {
    pub fn new(lab: &Lab, vm: &str, id: u32, isolated: bool) -> Machine {
        Machine::of(lab, vm, id, isolated, None)
    }

    /// A member of a cluster, or of none.
    pub fn of(lab: &Lab, vm: &str, id: u32, isolated: bool, cluster: Option<&str>) -> Machine {
        let made = request(lab, vm, id, isolated, cluster);
        assert_eq!(made.isolated, isolated);
        // The host asks nobody where it is: its guest is none that answers.
        lab.host(&format!("ip neigh replace {} lladdr {} dev puter0 nud permanent", made.ip, made.mac));
        Machine { tap: frames::take(lab, &made.name), made }
    }

    pub fn own(&self) -> Sender {
        Sender { mac: self.made.mac.0, ip: self.made.ip }
    }

    /// The ways on which a frame comes from here to there.
    fn reaches(&self, other: &Machine) -> Vec<&'static str> {
        self.reaches_by(other, || frames::drain(&other.tap))
    }

    /// The same, where `came` waits for what comes.
    pub fn reaches_by(&self, other: &Machine, came: impl FnOnce() -> Vec<Vec<u8>>) -> Vec<&'static str> {
        let (own, mac, ip) = (self.own(), other.made.mac.0, other.made.ip);
        let said = |way: &str| format!("{way} from {}", self.made.vm);
        let udp = |to: Ipv4Addr, way: &str| frames::udp(own, 1000, (to, 2000), &said(way));
        frames::drain(&other.tap);
        frames::send(
            &self.tap,
            &[
                frames::to(mac, udp(ip, WAYS[0])),
                udp(Ipv4Addr::BROADCAST, WAYS[1]),
                frames::arp_of(1, own.mac, own, ip),
                frames::to(mac, frames::arp_of(2, own.mac, own, ip)),
                frames::to(BRIDGE_MAC, udp(ip, WAYS[4])),
            ],
        );
        let came = came();
        let arp = |operation: u8| {
            let is = |f: &Vec<u8>| f[12..14] == [8, 6] && f[21] == operation && f[28..32] == own.ip.octets();
            came.iter().any(is)
        };
        let text = |way: &str| came.iter().any(|f| String::from_utf8_lossy(f).contains(&said(way)));
        WAYS.into_iter()
            .filter(|way| match *way {
                "ARP request" => arp(1),
                "ARP reply" => arp(2),
                way => text(way),
            })
            .collect()
    }
}

#[test]
#[ignore = "needs root"]
fn an_isolated_vm_reaches_no_other_and_none_reaches_it() {
    let lab = Lab::new();
    let _daemon = lab.start(&[]);
    let far = frames::inside(lab.internet_holder(), || UdpSocket::bind((SERVER, 7000)).unwrap());
    far.set_read_timeout(Some(crate::lab::LIMIT)).unwrap();
    let a = Machine::new(&lab, "a", 1, true);
    let b = Machine::new(&lab, "b", 2, true);
    let c = Machine::new(&lab, "c", 3, false);
    let d = Machine::new(&lab, "d", 4, false);
    let switch = "/proc/sys/net/bridge/bridge-nf-call-iptables";
    let shown = lab.attempt(lab.host_holder(), &format!("cat {switch}")).1;
    let none: [&str; 0] = [];
    // Where br_netfilter is loaded, a bridge's own frames are shown to the tables for routed packets as well.
    for shows in if shown { &[Some(0), Some(1)][..] } else { &[None] } {
        if let Some(value) = shows {
            lab.host(&format!("echo {value} >{switch}"));
        }
        for (from, to) in [(&a, &b), (&b, &a), (&a, &c), (&c, &a), (&d, &b)] {
            assert_eq!(from.reaches(to), none, "{} to {}, br_netfilter {shows:?}", from.made.vm, to.made.vm);
        }
        for (from, to) in [(&c, &d), (&d, &c)] {
            assert_eq!(from.reaches(to), WAYS, "br_netfilter {shows:?}");
        }
        // The host and the outside are there for all.
        for vm in [&a, &c] {
            frames::drain(&vm.tap);
            frames::send(&vm.tap, &[frames::arp(vm.made.mac.0, vm.own(), Ipv4Addr::new(10, 0, 0, 1))]);
            assert_eq!(frames::arp_answer(&vm.tap), (vm.made.mac.0, vm.made.ip));
            let out = frames::udp(vm.own(), 1000, (SERVER.parse().unwrap(), 7000), &vm.made.vm);
            frames::send(&vm.tap, &[frames::to(BRIDGE_MAC, out)]);
            let mut text = [0; 10];
            let (size, from) = far.recv_from(&mut text).unwrap();
            assert_eq!((&text[..size], from.ip().to_string().as_str()), (vm.made.vm.as_bytes(), "203.0.113.2"));
        }
    }
}

#[test]
#[ignore = "needs root"]
fn isolation_changes_while_vms_run_and_outlives_puterd() {
    let lab = Lab::new();
    let daemon = lab.start(&[]);
    let a = Machine::new(&lab, "a", 1, false);
    let b = Machine::new(&lab, "b", 2, false);
    assert_eq!(a.reaches(&b), WAYS);
    let set = |vm: &str, id: u32, isolated: bool| drop(request(&lab, vm, id, isolated, None));
    set("b", 2, true);
    assert!(a.reaches(&b).is_empty() && b.reaches(&a).is_empty());
    daemon.stop(rustix::process::Signal::KILL);
    let _daemon = lab.start(&[]);
    assert!(a.reaches(&b).is_empty() && b.reaches(&a).is_empty());
    set("b", 2, false);
    assert_eq!((a.reaches(&b).len(), b.reaches(&a).len()), (WAYS.len(), WAYS.len()));
    // Who comes after an isolated one with its number is not isolated.
    set("a", 1, true);
    assert!(a.reaches(&b).is_empty());
    drop(a);
    assert_eq!(lab.request("DELETE", "/v1/taps/a", "").0, 204);
    let after = Machine::new(&lab, "after", 1, false);
    assert_eq!(after.reaches(&b), WAYS);
}

#[test]
#[ignore = "needs root"]
fn isolated_members_reach_their_cluster_and_nobody_else() {
    const LONG: &str = "a-cluster-with-a-name-longer-than-an-interface-has";
    let lab = Lab::new();
    let daemon = lab.start(&[]);
    let member = |vm: &str, id: u32, cluster: &str| Machine::of(&lab, vm, id, true, Some(cluster));
    let (a, b) = (member("a", 1, "one"), member("b", 2, "one"));
    let (c, d) = (member("c", 3, LONG), member("d", 4, LONG));
    let e = Machine::of(&lab, "e", 5, false, Some("one"));
    let (f, alone) = (Machine::new(&lab, "f", 6, false), Machine::new(&lab, "alone", 7, true));
    let none: [&str; 0] = [];
    let switch = "/proc/sys/net/bridge/bridge-nf-call-iptables";
    let shown = lab.attempt(lab.host_holder(), &format!("cat {switch}")).1;
    let check = |shows: Option<u8>| {
        if let Some(value) = shows.filter(|_| shown) {
            lab.host(&format!("echo {value} >{switch}"));
        }
        for (from, to) in [(&a, &b), (&b, &a), (&c, &d), (&d, &c), (&e, &f), (&f, &e)] {
            assert_eq!(from.reaches(to), WAYS, "{} to {}", from.made.vm, to.made.vm);
        }
        // A member that is not isolated itself is like any other VM to those that are.
        for (from, to) in [(&a, &c), (&c, &a), (&a, &e), (&e, &a), (&b, &f), (&f, &d), (&alone, &a), (&a, &alone)] {
            assert_eq!(from.reaches(to), none, "{} to {}", from.made.vm, to.made.vm);
        }
        frames::drain(&a.tap);
        frames::send(&a.tap, &[frames::arp(a.made.mac.0, a.own(), Ipv4Addr::new(10, 0, 0, 1))]);
        assert_eq!(frames::arp_answer(&a.tap), (a.made.mac.0, a.made.ip));
    };
    check(Some(1));
    check(Some(0));
    daemon.stop(rustix::process::Signal::KILL);
    let daemon = lab.start(&[]);
    check(None);
    // Out of isolation, and into that of another cluster under the same name.
    request(&lab, "b", 2, false, Some("one"));
    assert_eq!((a.reaches(&b), b.reaches(&f).len()), (none.to_vec(), WAYS.len()));
    request(&lab, "b", 2, true, Some(LONG));
    assert_eq!((b.reaches(&a), b.reaches(&c).len(), b.reaches(&f)), (none.to_vec(), WAYS.len(), none.to_vec()));
    // And to no cluster: it is alone.
    request(&lab, "b", 2, true, None);
    assert_eq!((b.reaches(&c), c.reaches(&b)), (none.to_vec(), none.to_vec()));
    request(&lab, "b", 2, true, Some("one"));
    check(None);
    // The rules are whole, so that nothing is put back over and over.
    let generation = || lab.host("nft list table bridge puter");
    let before = generation();
    daemon.stop(rustix::process::Signal::TERM);
    let _daemon = lab.start(&[]);
    assert_eq!(generation(), before);
    assert!(before.contains("chain cluster-one") && !before.contains("chain cluster-two"), "{before}");
}
