//! Many interfaces: what a request costs does not grow with them, and the kernel's own limits are met.

use std::fs;

use puter::protocol::daemon::{Lease, Status, Tap};
use rustix::process::Signal;

use crate::code;
use crate::lab::{Daemon, Lab, UID, wait};
use crate::traffic::frames;

#[allow(dead_code)]
#[path = "../../benches/net/driver.rs"]
mod driver;

/// More TAPs than one bridge has ports, and a part of them.
const MANY: u32 = 1100;
const SOME: u32 = MANY / 4;

/// Ports that are not puterd's.
const STRANGERS: u32 = 900;
/// The most ports of a bridge (BR_MAX_PORTS, net/bridge/br_private.h).
const MOST: u32 = 1023;
/// TAPs made and removed for one measurement.
const TIMES: u32 = 50;

/// Adds ports to the bridge, which stay down and so see no traffic.
fn add_ports(lab: &Lab, numbers: std::ops::Range<u32>) {
    let lines: String =
        numbers.map(|n| format!("link add s{n} type veth peer name t{n}\nlink set dev s{n} master puter0\n")).collect();
    let file = lab.dir.path().join("ports");
    std::fs::write(&file, lines).unwrap();
    lab.host(&format!("ip -batch {}", file.display()));
}

fn body(vm: &str, id: u32) -> String {
    format!(r#"{{"vm":"{vm}","id":{id}}}"#)
}

/// The processor time that puterd, and the kernel for it, have taken so far, in ticks of 10 ms (proc(5)).
fn ticks(daemon: &Daemon) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).unwrap();
    let fields: Vec<u64> = stat.rsplit(')').next().unwrap().split(' ').filter_map(|word| word.parse().ok()).collect();
    // utime and stime are the 14th and 15th; the third is a letter, and what is before it has been cut off.
    fields[10] + fields[11]
}

/// A size of puterd's memory in KiB (proc_pid_status(5)).
fn memory(daemon: &Daemon, which: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(&format!("{which}:"))).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// What it takes to make and remove TAPs.
fn work(lab: &Lab, daemon: &Daemon) -> u64 {
    let before = ticks(daemon);
    for n in 0..TIMES {
        lab.json::<Tap>("POST", "/v1/taps", &body(&format!("x-{n}"), 3000 + n));
    }
    for n in 0..TIMES {
        assert_eq!(lab.request("DELETE", &format!("/v1/taps/x-{n}"), "").0, 204);
    }
    wait("they go", || !lab.host("ip link").contains("pt-x-"));
    ticks(daemon) - before
}

#[test]
#[ignore = "needs root"]
fn a_request_costs_the_same_among_hundreds_of_ports_and_a_full_bridge_is_told() {
    let lab = Lab::new();
    let daemon = lab.start(&["--subnet", "10.7.0.1/16"]);
    lab.json::<Tap>("POST", "/v1/taps", &body("web", 1));
    let alone = work(&lab, &daemon);
    add_ports(&lab, 0..STRANGERS);
    let among = work(&lab, &daemon);
    // Lists of all the interfaces would make it ten times as much and more.
    assert!(among < 3 * alone + 5, "{alone} ticks became {among}");

    // One port is web's.
    add_ports(&lab, STRANGERS..MOST - 1);
    let (status, error) = lab.request("POST", "/v1/taps", &body("db", 2));
    assert_eq!((status, code(&error).as_str()), (507, "bridge_full"), "{error}");
    assert!(error.contains("--bridge"), "{error}");
    assert!(!lab.host("ip link").contains("puter0-1"), "half a further bridge is left");
    let taps: Vec<Tap> = lab.json("GET", "/v1/taps", "");
    assert_eq!(taps.iter().map(|tap| tap.vm.as_str()).collect::<Vec<_>>(), ["web"]);
    assert!(!lab.host("ip link").contains("pt-db"), "half a TAP is left");
    lab.json::<Tap>("POST", "/v1/taps", &body("web", 1));
    lab.host("ip link delete s0");
    assert_eq!(lab.json::<Tap>("POST", "/v1/taps", &body("db", 2)).ip.to_string(), "10.7.0.12");
}

#[test]
#[ignore = "needs root"]
fn what_others_do_to_taps_is_seen_by_the_next_request() {
    let lab = Lab::new();
    let _daemon = lab.start(&[]);
    lab.json::<Tap>("POST", "/v1/taps", &body("web", 1));
    let (status, error) = lab.request("POST", "/v1/taps", &body("db", 1));
    assert_eq!((status, code(&error).as_str()), (409, "id_taken"), "{error}");
    let (status, error) = lab.request("POST", "/v1/taps", &body("web", 2));
    assert_eq!((status, code(&error).as_str()), (409, "vm_has_another_id"), "{error}");
    // Someone removes the TAP behind puterd's back: its id and its name are free.
    lab.host("ip link delete pt-web");
    assert_eq!(lab.json::<Tap>("POST", "/v1/taps", &body("db", 1)).id, 1);
    assert_eq!(lab.json::<Tap>("POST", "/v1/taps", &body("web", 2)).id, 2);
    lab.host("ip link delete pt-db");
    assert_eq!(lab.request("DELETE", "/v1/taps/db", "").0, 404);
    assert_eq!(lab.json::<Tap>("POST", "/v1/taps", &body("cache", 1)).id, 1);
    // One that was taken off the bridge still holds its id, and comes back.
    lab.host("ip link set dev pt-cache nomaster");
    assert_eq!(lab.request("POST", "/v1/taps", &body("db", 1)).0, 409);
    lab.json::<Tap>("POST", "/v1/taps", &body("cache", 1));
    assert!(lab.host("ip link show pt-cache").contains("master puter0"));
}

#[test]
#[ignore = "needs root"]
fn what_only_the_last_requests_needed_is_given_back_when_it_is_quiet() {
    let lab = Lab::new();
    let daemon = lab.start(&[]);
    let mut made = 0;
    let mut busy = || {
        made += 1;
        lab.json::<Tap>("POST", "/v1/taps", &body(&format!("vm-{made}"), made));
        memory(&daemon, "RssFile")
    };
    for _ in 0..2 {
        let most = busy().max(busy());
        wait("pages of the executable go", || memory(&daemon, "RssFile") < most * 2 / 3);
    }
    // And all goes on.
    assert_eq!(lab.json::<Vec<Tap>>("GET", "/v1/taps", "").len(), 4);
}

#[test]
#[ignore = "needs root"]
fn more_vms_than_a_bridge_has_ports_cost_no_more_each() {
    let lab = Lab::new();
    let args = ["--subnet", "10.7.0.1/16", "--teardown"];
    let make = |ids: std::ops::RangeInclusive<u32>| {
        for id in ids {
            lab.json::<Tap>("POST", "/v1/taps", &body(&format!("vm-{id}"), id));
        }
    };
    // A start that adopts all that there is, and what it took.
    let again = |daemon: Daemon| {
        daemon.stop(Signal::KILL);
        let daemon = lab.start(&args);
        let took = (ticks(&daemon), memory(&daemon, "VmHWM"));
        (daemon, took)
    };
    let daemon = lab.start(&args);
    make(1..=1);
    let alone = work(&lab, &daemon);
    make(2..=SOME);
    let (daemon, some) = again(daemon);
    make(SOME + 1..=MANY);
    let among = work(&lab, &daemon);
    assert!(among < 3 * alone + 10, "{alone} ticks became {among}");
    let (daemon, many) = again(daemon);
    assert!(daemon.log.contains(&format!("adopted {MANY} TAPs on 2 bridges")), "{}", daemon.log);
    let times = u64::from(MANY / SOME);
    assert!(many.0 < 2 * times * some.0 + 10, "{some:?} became {many:?}");
    assert!(many.1 < some.1 + 4096, "{some:?} KiB became {many:?}");
    let status: Status = lab.json("GET", "/v1/status", "");
    assert_eq!((status.taps as u32, status.further.len()), (MANY, 1));
    let on = |bridge: &str| lab.host("ip -o link").matches(&format!(" master {bridge} ")).count();
    // One port of each joins them.
    assert_eq!((on("puter0") + on("puter0-1")) as u32, MANY + 2);
    assert!(on("puter0") < MOST as usize && on("puter0-1") > 100, "{} {}", on("puter0"), on("puter0-1"));
    // All have their addresses, whichever bridge they are on.
    let clients = frames::inside(lab.host_holder(), || puter::net::tap::open("clients")).unwrap();
    lab.host("ip link set dev clients master puter0-1; ip link set dev clients up");
    let run = driver::dhcp(&clients, MANY, MANY as usize);
    let leases: Vec<Lease> = lab.json("GET", "/v1/leases", "");
    assert_eq!(leases.len() as u32, MANY, "{} were asked again", run.again);
    // Another's flush of all rules is mended for all of them.
    let filtered = || lab.host("nft list chains netdev").matches("chain pt-vm-").count();
    assert_eq!(filtered() as u32, MANY);
    lab.host("nft flush ruleset");
    daemon.log_until("puter's nftables rules were changed or flushed: put back");
    assert_eq!(filtered() as u32, MANY);
    drop(clients);
    assert!(daemon.stop(Signal::TERM).success());
    assert_eq!(lab.host("ip -o link | cut -d: -f2; nft list ruleset"), " lo\n up0@if2\n");
}

#[test]
#[ignore = "needs root"]
fn the_kernels_limits_of_neighbours_grow_with_the_vms() {
    let lab = Lab::new();
    // A network namespace has no limits of its own; here are some that puterd may write, as it may those of a host.
    for family in ["ipv4", "ipv6"] {
        let dir = format!("/proc/sys/net/{family}/neigh");
        lab.host(&format!("mount -t tmpfs none {dir}; mkdir {dir}/default; chmod 755 {dir}"));
        for (limit, value) in [(1, 2), (2, 4), (3, 8)] {
            let file = format!("{dir}/default/gc_thresh{limit}");
            lab.host(&format!("echo {value} >{file}; chown {UID} {file}"));
        }
    }
    let limits = |family: &str| {
        lab.host(&format!("cat /proc/sys/net/{family}/neigh/default/gc_thresh*")).replace('\n', " ").trim().to_owned()
    };
    let daemon = lab.start(&["--ipv6", "off"]);
    (1..=4).for_each(|id| drop(lab.json::<Tap>("POST", "/v1/taps", &body(&format!("vm-{id}"), id))));
    assert_eq!(limits("ipv4"), "2 4 8", "there is room");
    daemon.stop(Signal::TERM);
    lab.host("echo 7 >/proc/sys/net/ipv4/neigh/default/gc_thresh3");
    let daemon = lab.start(&[]);
    let said = "puterd: 4 VMs: raised the kernel's limit of ipv4 neighbours from 7 to 16 (net.ipv4.neigh.default)\n";
    assert!(daemon.log.contains(said), "{}", daemon.log);
    assert_eq!((limits("ipv4").as_str(), limits("ipv6").as_str()), ("4 8 16", "8 16 32"));
    (5..=60).for_each(|id| drop(lab.json::<Tap>("POST", "/v1/taps", &body(&format!("vm-{id}"), id))));
    assert_eq!((limits("ipv4").as_str(), limits("ipv6").as_str()), ("64 128 256", "128 256 512"));
}
