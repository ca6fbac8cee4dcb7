//! puterd on real interfaces, in network namespaces that each test makes for itself.

#[path = "daemon/api.rs"]
mod api;
#[path = "daemon/branches.rs"]
mod branches;
#[path = "daemon/clients.rs"]
mod clients;
#[path = "daemon/dhcp.rs"]
mod dhcp;
#[path = "daemon/dns.rs"]
mod dns;
#[path = "daemon/firewalls.rs"]
mod firewalls;
#[path = "daemon/hostile.rs"]
mod hostile;
#[path = "daemon/hostile6.rs"]
mod hostile6;
#[path = "daemon/ipv6.rs"]
mod ipv6;
#[path = "daemon/isolation.rs"]
mod isolation;
#[path = "daemon/lab.rs"]
mod lab;
#[path = "daemon/removal.rs"]
mod removal;
#[path = "daemon/scale.rs"]
mod scale;
#[path = "daemon/traffic.rs"]
mod traffic;
#[path = "daemon/upkeep.rs"]
mod upkeep;

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use puter::protocol::daemon::{ErrorBody, Lease, Status, Tap, TapRequest};
use rustix::process::{Signal, Uid};

use lab::{CAPABILITIES, Daemon, LIMIT, Lab, OTHER, Process, UID, mode, split, wait};

fn code(body: &str) -> String {
    serde_json::from_str::<ErrorBody>(body).unwrap_or_else(|e| panic!("{e}: {body}")).error.code
}

/// A hypervisor's hold on a TAP: QEMU opens it by name, as cloud-hypervisor does, with vnet_hdr.
fn hold_tap(lab: &Lab, uid: u32, name: &str) -> Process {
    let mut command = lab.as_user(uid, &[]);
    let netdev = format!("tap,id=n,ifname={name},script=no,downscript=no,vnet_hdr=on");
    command.args(["qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none", "-netdev", &netdev]);
    Process(command.stderr(Stdio::null()).spawn().unwrap())
}

fn attached(lab: &Lab, vm: &str) -> bool {
    let taps: Vec<Tap> = lab.json("GET", "/v1/taps", "");
    taps.iter().find(|t| t.vm == vm).unwrap().attached
}

#[test]
#[ignore = "needs root"]
fn the_hosts_network_is_made_ready() {
    let lab = Lab::new();
    assert_eq!(lab.host("cat /proc/sys/net/ipv4/ip_forward"), "0\n", "or the test proves nothing");
    let daemon = lab.start(&["--ipv6", "off"]);
    let ready = format!("puterd: ready on {}: bridge puter0, 10.0.0.1/24\n", lab.socket().display());
    assert!(daemon.log.ends_with(&ready), "{}", daemon.log);
    assert_eq!((mode(&lab.socket()), mode(&lab.home().join("run"))), (0o600, 0o700));
    assert_eq!(lab.host("cat /proc/sys/net/ipv4/ip_forward"), "1\n");
    let bridge = lab.host("ip -d link show puter0; ip -4 addr show puter0");
    for part in ["52:54:00:00:00:01", "forward_delay 0", "stp_state 0", "inet 10.0.0.1/24 brd 10.0.0.255"] {
        assert!(bridge.contains(part), "{part}: {bridge}");
    }
    assert!(lab.host("ip link show up").contains("puter0"));
    let rules = lab.host("nft list ruleset");
    let squeezed: Vec<&str> = rules.lines().map(str::trim).filter(|l| !l.is_empty() && *l != "}").collect();
    let expected = [
        "table inet puter {",
        "set isolated {",
        "type ipv4_addr",
        "set isolated6 {",
        "type ipv6_addr",
        "map cluster {",
        "type ipv4_addr : verdict",
        "map cluster6 {",
        "type ipv6_addr : verdict",
        "chain input {",
        "type filter hook input priority filter; policy accept;",
        r#"iifname != "puter0" accept"#,
        "ct state established,related accept",
        "meta nfproto != ipv4 drop",
        "udp dport 67 accept",
        "udp dport 53 accept",
        "tcp dport 53 accept",
        "icmp type echo-request accept",
        "drop",
        "chain forward {",
        "type filter hook forward priority filter; policy accept;",
        r#"iifname "puter0" oifname "puter0" ip saddr vmap @cluster"#,
        r#"iifname "puter0" oifname "puter0" meta pkttype host ip saddr @isolated drop"#,
        r#"iifname "puter0" oifname "puter0" ip daddr @isolated drop"#,
        r#"iifname "puter0" oifname "puter0" accept"#,
        r#"iifname "puter0" ip saddr 10.0.0.0/24 accept"#,
        r#"iifname "puter0" drop"#,
        r#"oifname "puter0" ct state established,related accept"#,
        r#"oifname "puter0" drop"#,
        "chain postrouting {",
        "type nat hook postrouting priority srcnat; policy accept;",
        r#"ip saddr 10.0.0.0/24 oifname != "puter0" masquerade"#,
        "table bridge puter {",
        "set isolated {",
        "type ifname",
        "set isolated_macs {",
        "type ether_addr",
        "set uplinks {",
        "type ifname",
        "set downlinks {",
        "type ifname",
        "set cluster_macs {",
        "type ether_addr",
        "map cluster_ports {",
        "type ifname : verdict",
        "chain forward {",
        "type filter hook forward priority filter; policy accept;",
        "iifname @isolated oifname != @uplinks drop",
        "oifname @isolated iifname != @uplinks drop",
        "oifname @isolated ether saddr != 52:54:00:00:00:01 drop",
        "iifname @downlinks ether saddr @isolated_macs drop",
        "oifname @downlinks ether saddr 52:54:00:00:00:01 drop",
        "oifname vmap @cluster_ports",
        "ether saddr @cluster_macs oifname != @uplinks oifname != @downlinks drop",
    ];
    assert_eq!(squeezed, expected, "{rules}");
    let status: Status = lab.json("GET", "/v1/status", "");
    assert_eq!((status.pid, status.uid, status.taps), (daemon.pid(), UID, 0));
    assert_eq!((status.bridge.as_str(), status.subnet.to_string().as_str()), ("puter0", "10.0.0.1/24"));
    let leases: Vec<Lease> = lab.json("GET", "/v1/leases", "");
    assert!(leases.is_empty());
    let process = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    // net_bind_service is capability 10, net_admin 12 and net_raw 13 (linux/capability.h).
    let sets =
        ["CapInh:\t0000000000000000", "CapPrm:\t0000000000003400", "CapEff:\t0000000000003400", "NoNewPrivs:\t1"];
    for line in sets {
        assert!(process.contains(line), "{line}: {process}");
    }
}

#[test]
#[ignore = "needs root"]
fn taps_are_made_found_again_and_removed() {
    let lab = Lab::new();
    let _daemon = lab.start(&[]);
    let body = r#"{"vm":"web","id":1,"isolated":true}"#;
    let tap: Tap = lab.json("POST", "/v1/taps", body);
    assert_eq!((tap.name.as_str(), tap.id, tap.isolated, tap.attached), ("pt-web", 1, true, false));
    assert_eq!((tap.mac.to_string().as_str(), tap.ip.to_string().as_str()), ("52:54:00:00:00:0b", "10.0.0.11"));
    let show = || lab.host("ip -d link show pt-web");
    let first = show();
    let parts =
        ["vnet_hdr on", "persist on", "type tap", "pi off", "master puter0", "isolated on", "alias puter:web:1:1"];
    for part in parts {
        assert!(first.contains(part), "{part}: {first}");
    }
    let filter = lab.host("nft list table netdev puter");
    for part in [r#"device "pt-web""#, "ether saddr != 52:54:00:00:00:0b drop", "arp saddr ip 10.0.0.11 accept"] {
        assert!(filter.contains(part), "{part}: {filter}");
    }
    assert!(first.contains(&format!("user {UID}")) && first.contains(",UP"), "{first}");
    let index = lab.index("pt-web");
    assert_eq!(lab.json::<Tap>("POST", "/v1/taps", body), tap);
    let open: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"web","id":1}"#);
    assert!(!open.isolated && show().contains("isolated off") && show().contains("alias puter:web:1:0"), "{}", show());
    assert_eq!(lab.index("pt-web"), index, "the same request makes no new TAP");
    let long = "a-name-longer-than-an-interface-may-be";
    let other: Tap = lab.json("POST", "/v1/taps", &format!(r#"{{"vm":"{long}","id":2}}"#));
    assert_eq!((other.vm.as_str(), other.name.len()), (long, 15));
    for (body, status, expected) in [
        (r#"{"vm":"db","id":1}"#, 409, "id_taken"),
        (r#"{"vm":"web","id":3}"#, 409, "vm_has_another_id"),
        (r#"{"vm":"db","id":245}"#, 507, "subnet_full"),
        (r#"{"vm":"db","id":16777204}"#, 507, "subnet_full"),
        (r#"{"vm":"db","id":16777205}"#, 400, "invalid_id"),
        (r#"{"vm":"Db","id":3}"#, 400, "invalid_name"),
        ("{", 400, "invalid_json"),
    ] {
        let (got, text) = lab.request("POST", "/v1/taps", body);
        assert_eq!((got, code(&text).as_str()), (status, expected), "{body}");
    }
    lab.host("ip link add pt-mine type veth peer name mine0");
    let (status, text) = lab.request("POST", "/v1/taps", r#"{"vm":"mine","id":3}"#);
    assert_eq!((status, code(&text).as_str()), (409, "tap_name_taken"));
    assert_eq!(lab.json::<Vec<Tap>>("GET", "/v1/taps", ""), [open, other]);
    assert_eq!(lab.request("DELETE", "/v1/taps/web", "").0, 204);
    assert_eq!(lab.request("DELETE", "/v1/taps/web", "").0, 404);
    assert_eq!(lab.request("DELETE", "/v1/taps/mine", "").0, 404);
    wait("the TAP goes", || !lab.host("ip -o link").contains("pt-web"));
    assert!(lab.host("ip -o link").contains("pt-mine"));
}

#[test]
#[ignore = "needs root"]
fn the_products_own_client_is_understood() {
    let lab = Lab::new();
    let _daemon = lab.start(&[]);
    let socket = lab.socket();
    let asked = thread::spawn(move || {
        let uid = Uid::from_raw(UID);
        rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
        let agent = puter::protocol::unix_http::agent(&socket, LIMIT);
        let url = "http://localhost/v1/taps";
        let request = TapRequest { vm: "web".to_owned(), id: 1, isolated: false, member: None };
        let mut made = agent.post(url).send(serde_json::to_vec(&request).unwrap()).unwrap();
        let tap: Tap = serde_json::from_str(&made.body_mut().read_to_string().unwrap()).unwrap();
        let mut refused = agent.post(url).send(r#"{"vm":"db","id":1}"#).unwrap();
        let refused = (refused.status().as_u16(), code(&refused.body_mut().read_to_string().unwrap()));
        let gone = agent.delete(format!("{url}/web")).call().unwrap().status().as_u16();
        (tap.name, refused, gone)
    });
    let expected = ("pt-web".to_owned(), (409, "id_taken".to_owned()), 204);
    assert_eq!(asked.join().unwrap(), expected);
}

#[test]
#[ignore = "needs root"]
fn only_its_user_opens_a_tap_and_needs_no_capability() {
    let lab = Lab::new();
    let _daemon = lab.start(&[]);
    let _: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"web","id":1}"#);
    let mut stranger = hold_tap(&lab, OTHER, "pt-web");
    wait("a stranger's QEMU ends", || stranger.0.try_wait().unwrap().is_some());
    assert!(!stranger.0.wait().unwrap().success());
    assert!(!attached(&lab, "web"));
    let owner = hold_tap(&lab, UID, "pt-web");
    wait("the TAP is attached", || attached(&lab, "web"));
    drop(owner);
    wait("the TAP is free", || !attached(&lab, "web"));
}

#[test]
#[ignore = "needs root"]
fn a_restart_adopts_what_is_there() {
    let lab = Lab::new();
    let daemon = lab.start(&[]);
    let before: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"web","id":1,"isolated":true}"#);
    let _hypervisor = hold_tap(&lab, UID, "pt-web");
    wait("the TAP is attached", || attached(&lab, "web"));
    let numbers = || (lab.index("puter0"), lab.index("pt-web"));
    let first = numbers();
    let list = || lab.host("nft list table inet puter; nft list table netdev puter");
    let rules = list();
    // What the kernel says of every change to links and addresses from here on.
    let mut monitor = lab.enter(lab.host_holder());
    let mut monitor =
        Process(monitor.args(["ip", "monitor", "link", "address"]).stdout(Stdio::piped()).spawn().unwrap());
    assert!(daemon.stop(Signal::TERM).success());
    assert!(!lab.socket().exists(), "a clean stop removes the socket");
    let daemon = lab.start(&[]);
    assert!(daemon.log.contains("puterd: adopted 1 TAP\n"), "{}", daemon.log);
    daemon.stop(Signal::KILL);
    assert!(lab.socket().exists(), "killed, it leaves a stale socket");
    let daemon = lab.start(&[]);
    assert_eq!(numbers(), first);
    assert_eq!(list(), rules);
    let after: Vec<Tap> = lab.json("GET", "/v1/taps", "");
    assert_eq!(after, [Tap { attached: true, ..before }]);
    assert!(daemon.stop(Signal::INT).success());
    monitor.0.kill().unwrap();
    let mut changes = String::new();
    monitor.0.stdout.take().unwrap().read_to_string(&mut changes).unwrap();
    for sign in ["Deleted", "state DOWN", "NO-CARRIER"] {
        assert!(!changes.contains(sign), "traffic was disturbed: {changes}");
    }
}

#[test]
#[ignore = "needs root"]
fn a_puterd_that_was_shot_within_a_call_to_the_kernel_has_a_successor_at_once() {
    let lab = Lab::new();
    let mut shot = Vec::new();
    for id in 1..=12_u64 {
        let daemon = lab.start(&[]);
        // Each change of nf_tables keeps its thread in the kernel for some milliseconds.
        let body = format!(r#"{{"vm":"vm-{id}","id":{id}}}"#);
        let length = body.len();
        let mut stream = lab.connect(UID);
        write!(stream, "POST /v1/taps HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}").unwrap();
        thread::sleep(Duration::from_millis(id));
        daemon.shoot();
        shot.push(daemon);
    }
}

#[test]
#[ignore = "needs root"]
fn half_made_and_lost_taps_are_repaired() {
    let lab = Lab::new();
    lab.host(&format!(
        "ip tuntap add pt-half mode tap user {UID} vnet_hdr; ip tuntap add pt-foreign mode tap user {OTHER}"
    ));
    lab.host(&format!("ip tuntap add pt-lost mode tap user {UID} vnet_hdr; ip link set pt-lost alias puter:lost:7:1"));
    let daemon = lab.start(&[]);
    assert!(daemon.log.contains("puterd: removed the half-made TAP pt-half\n"), "{}", daemon.log);
    let links = lab.host("ip -d -o link");
    assert!(!links.contains("pt-half") && links.contains("pt-foreign"), "{links}");
    let taps: Vec<Tap> = lab.json("GET", "/v1/taps", "");
    assert_eq!(taps.iter().map(|t| (t.vm.as_str(), t.id, t.isolated)).collect::<Vec<_>>(), [("lost", 7, true)]);
    let lost = lab.host("ip -d link show pt-lost");
    assert!(lost.contains("master puter0") && lost.contains("isolated on") && lost.contains(",UP"), "{lost}");
    // One that appears while puterd runs is finished by the next request.
    lab.host(&format!("ip tuntap add pt-half mode tap user {UID} vnet_hdr"));
    let tap: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"half","id":1}"#);
    assert_eq!(tap.name, "pt-half");
    // A bridge that someone removed comes back with its TAPs.
    lab.host("ip link delete puter0");
    daemon.stop(Signal::KILL);
    let _daemon = lab.start(&[]);
    assert_eq!(lab.json::<Vec<Tap>>("GET", "/v1/taps", "").len(), 2);
}

#[test]
#[ignore = "needs root"]
fn the_filters_of_deleted_taps_go_soon_and_a_new_tap_of_the_name_has_its_own() {
    let lab = Lab::new();
    let _daemon = lab.start(&[]);
    let chains = || lab.host("nft list table netdev puter 2>/dev/null || true");
    for id in 1..=3 {
        let _: Tap = lab.json("POST", "/v1/taps", &format!(r#"{{"vm":"t{id}","id":{id}}}"#));
    }
    for id in 1..=3 {
        assert_eq!(lab.request("DELETE", &format!("/v1/taps/t{id}"), "").0, 204);
    }
    // With another MAC, while the former filter may still be there.
    let _: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"t1","id":9}"#);
    let end = Instant::now() + LIMIT;
    loop {
        let now = chains();
        if !now.contains("chain pt-t2 ") && !now.contains("chain pt-t3 ") {
            assert!(now.contains("chain pt-t1 ") && now.contains("52:54:00:00:00:13"), "{now}");
            assert!(!now.contains("52:54:00:00:00:0b"), "{now}");
            break;
        }
        assert!(Instant::now() < end, "{now}");
        thread::sleep(std::time::Duration::from_millis(50));
    }
}

#[test]
#[ignore = "needs root"]
fn each_missing_capability_is_named_with_the_command_that_grants_it() {
    let lab = Lab::new();
    let program = lab.dir.path().join("puter-multi");
    let grant = format!("sudo setcap cap_net_admin,cap_net_raw,cap_net_bind_service=+ep {}", program.display());
    for absent in CAPABILITIES {
        let rest: Vec<&str> = CAPABILITIES.into_iter().filter(|c| *c != absent).collect();
        let text = lab.refused(lab.as_user(UID, &rest).arg(&program).arg("puterd"));
        assert_eq!(text, format!("puterd: missing capability cap_{absent}: grant it with: {grant}\n"));
    }
    let text = lab.refused(lab.as_user(UID, &[]).arg(&program).arg("puterd"));
    let all = "cap_net_admin, cap_net_raw, cap_net_bind_service";
    assert_eq!(text, format!("puterd: missing capability {all}: grant it with: {grant}\n"));
    assert!(!lab.home().join("run").exists() && !lab.host("ip link").contains("puter0"), "nothing was begun");
}

#[test]
#[ignore = "needs root"]
fn root_gives_up_all_but_the_three() {
    let lab = Lab::new();
    chown(lab.home(), Some(0), Some(0)).unwrap();
    let mut command = lab.enter(lab.host_holder());
    command.arg(lab.dir.path().join("puter-multi")).arg("puterd").env("PUTER_HOME", lab.home());
    let daemon = Daemon::start(&mut command);
    assert!(daemon.log.contains("gives up every capability but its three"), "{}", daemon.log);
    for task in fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        for line in ["CapPrm:\t0000000000003400", "CapEff:\t0000000000003400", "CapBnd:\t0000000000003400"] {
            assert!(status.contains(line), "{line}: {status}");
        }
    }
}

#[test]
#[ignore = "needs root"]
fn a_second_instance_is_refused_and_the_first_goes_on() {
    let lab = Lab::new();
    let daemon = lab.start(&[]);
    let text = lab.refused(&mut lab.puterd());
    assert!(text.contains(&format!("another puterd (process {}) holds", daemon.pid())), "{text}");
    let _: Status = lab.json("GET", "/v1/status", "");
}

#[test]
#[ignore = "needs root"]
fn other_users_are_refused_even_where_the_files_mode_lets_them_in() {
    let lab = Lab::new();
    let daemon = lab.start(&[]);
    for path in [lab.home(), lab.home().join("run"), lab.socket()] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    }
    for uid in [0, OTHER] {
        let mut answer = String::new();
        let mut stream = lab.connect(uid);
        let _ = stream.write_all(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n");
        let _ = stream.read_to_string(&mut answer);
        let (status, body) = split(&answer);
        assert_eq!((status, code(&body).as_str()), (403, "forbidden"));
        daemon.log_until(&format!("refused a connection of uid {uid}"));
    }
    let _: Status = lab.json("GET", "/v1/status", "");
}

#[test]
#[ignore = "needs root"]
fn clashes_with_the_hosts_network_are_refused_before_anything_changes() {
    let lab = Lab::new();
    lab.host("ip route add 10.0.0.0/16 via 203.0.113.1");
    let text = lab.refused(&mut lab.puterd());
    assert!(text.contains("overlaps the host's route 10.0.0.0/16 via 203.0.113.1 (dev up0)"), "{text}");
    lab.host("ip route del 10.0.0.0/16; ip addr add 10.0.0.77/32 dev up0");
    let text = lab.refused(&mut lab.puterd());
    assert!(text.contains("overlaps the host's address 10.0.0.77/32 (dev up0)"), "{text}");
    assert!(!lab.host("ip link").contains("puter0"));
    assert_eq!(lab.host("nft list ruleset; cat /proc/sys/net/ipv4/ip_forward"), "0\n");
    assert!(!lab.socket().exists());
    let daemon = lab.start(&["--subnet", "10.87.0.0/16"]);
    assert!(daemon.log.contains("puter0, 10.87.0.1/16"), "{}", daemon.log);
    let tap: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"web","id":1000}"#);
    assert_eq!((tap.ip.to_string().as_str(), tap.mac.to_string().as_str()), ("10.87.3.242", "52:54:00:00:03:f2"));
    lab.host("ip addr del 10.0.0.77/32 dev up0");
    daemon.stop(Signal::TERM);
    let text = lab.refused(&mut lab.puterd());
    assert!(text.contains("VMs on it (pt-web)") && text.contains("--subnet 10.87.0.1/16"), "{text}");
    lab.host("ip link delete pt-web");
    let _daemon = lab.start(&[]);
    let addresses = lab.host("ip -4 -o addr show puter0");
    assert!(addresses.contains("10.0.0.1/24") && !addresses.contains("10.87"), "{addresses}");
}

#[test]
#[ignore = "needs root"]
fn a_bridge_of_someone_else_is_left_alone() {
    let lab = Lab::new();
    lab.host("ip link add puter0 type bridge; ip addr add 10.0.0.1/24 dev puter0");
    let text = lab.refused(&mut lab.puterd());
    assert!(text.contains("puterd did not make it") && text.contains("sudo ip link delete puter0"), "{text}");
    lab.host("ip link set puter0 alias puter-bridge:1");
    let text = lab.refused(&mut lab.puterd());
    assert!(text.contains("belongs to the puterd of uid 1"), "{text}");
    let _daemon = lab.start(&["--bridge", "lab0", "--subnet", "10.88.0.1/24"]);
    assert!(lab.host("nft list tables").contains("table inet puter-lab0"));
}

#[test]
#[ignore = "needs root"]
fn sizes_and_nonsense_are_bounded() {
    let lab = Lab::new();
    let _daemon = lab.start(&[]);
    let (status, body) = lab.request("POST", "/v1/taps", &"x".repeat(64 * 1024 + 1));
    assert_eq!((status, code(&body).as_str()), (413, "body_too_large"));
    let mut chunked = b"POST /v1/taps HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
    for _ in 0..20 {
        chunked.extend(format!("1000\r\n{}\r\n", "x".repeat(0x1000)).bytes());
    }
    assert_eq!(split(&lab.exchange(&chunked)).0, 413);
    let fits = format!(r#"{{"vm":"web","id":1{}}}"#, " ".repeat(60 * 1024));
    assert_eq!(lab.request("POST", "/v1/taps", &fits).0, 200);
    let header = |size: usize| format!("GET /v1/status HTTP/1.1\r\nHost: x\r\nX-Long: {}\r\n\r\n", "x".repeat(size));
    assert_eq!(split(&lab.exchange(header(12 * 1024).as_bytes())).0, 200);
    assert_eq!(split(&lab.exchange(header(17 * 1024).as_bytes())).0, 431);
    for garbage in
        [&b"\0\xff\xfe\r\n\r\n"[..], b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\0\x01\r\n\r\n"]
    {
        let answer = lab.exchange(garbage);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400 "), "{answer}");
    }
    assert_eq!(lab.request("BREW", "/v1/taps", "").0, 405);
    assert_eq!(lab.request("GET", "/../etc/passwd", "").0, 404);
    // Gone before its answer, in the middle of a body, in the middle of a header.
    for part in
        ["GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n", "POST /v1/taps HTTP/1.1\r\nContent-Length: 9\r\n\r\n{", "GET"]
    {
        lab.connect(UID).write_all(part.as_bytes()).unwrap();
    }
    let _: Status = lab.json("GET", "/v1/status", "");
}

#[test]
#[ignore = "needs root"]
fn slow_clients_are_cut_off_and_hold_up_nobody() {
    let lab = Lab::new();
    let _daemon = lab.start(&[]);
    let mut slow: Vec<_> = (0..40).map(|_| lab.connect(UID)).collect();
    for (at, stream) in slow.iter_mut().enumerate() {
        let parts = ["", "GET /v1/st", "POST /v1/taps HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{"];
        stream.write_all(parts[at % parts.len()].as_bytes()).unwrap();
    }
    let _: Status = lab.json("GET", "/v1/status", "");
    // With every connection taken the next one waits for the limit to free one.
    slow.extend((0..40).map(|_| lab.connect(UID)));
    let _: Status = lab.json("GET", "/v1/status", "");
    for (at, stream) in slow.iter_mut().enumerate() {
        let mut answer = String::new();
        let begun = Instant::now();
        let _ = stream.read_to_string(&mut answer);
        assert!(begun.elapsed() < LIMIT, "never cut off");
        if at < 40 && at % 3 == 2 {
            let (status, body) = split(&answer);
            assert_eq!((status, code(&body).as_str()), (408, "timeout"));
        }
    }
}

#[test]
#[ignore = "needs root"]
fn a_teardown_leaves_nothing() {
    let lab = Lab::new();
    lab.host("nft add table inet mine; nft add table netdev mine");
    let before = lab.host("ip -o link | cut -d: -f2; ip -4 -o addr; nft list ruleset");
    let daemon = lab.start(&["--teardown"]);
    // Many at once, each asked for twice: one TAP each.
    thread::scope(|scope| {
        for at in 0..100 {
            let (lab, id) = (&lab, at % 50 + 1);
            let body = format!(r#"{{"vm":"a-vm-with-a-long-name-{id}","id":{id}}}"#);
            scope.spawn(move || lab.json::<Tap>("POST", "/v1/taps", &body));
        }
    });
    let taps: Vec<Tap> = lab.json("GET", "/v1/taps", "");
    assert!(taps.iter().map(|t| t.id).eq(1..=50), "{taps:?}");
    daemon.stop(Signal::KILL);
    let daemon = lab.start(&["--teardown"]);
    assert!(daemon.log.contains("puterd: adopted 50 TAPs\n"), "{}", daemon.log);
    assert_eq!(lab.json::<Vec<Tap>>("GET", "/v1/taps", ""), taps);
    assert!(daemon.stop(Signal::TERM).success());
    assert_eq!(lab.host("ip -o link | cut -d: -f2; ip -4 -o addr; nft list ruleset"), before);
    assert!(!lab.socket().exists());
}

#[test]
#[ignore = "needs root"]
fn systemd_gives_the_socket_and_hears_that_puterd_is_ready() {
    let lab = Lab::new();
    let path = lab.socket();
    fs::create_dir(lab.home().join("run")).unwrap();
    chown(lab.home().join("run"), Some(UID), Some(UID)).unwrap();
    let socket = UnixListener::bind(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::empty()).unwrap();
    let notify = lab.dir.path().join("notify");
    let listener = UnixDatagram::bind(&notify).unwrap();
    listener.set_read_timeout(Some(LIMIT)).unwrap();
    fs::set_permissions(&notify, fs::Permissions::from_mode(0o666)).unwrap();
    // Not sh: dash knows no descriptors above 9.
    let script = format!(r#"exec 3<&{}; export LISTEN_PID=$$ LISTEN_FDS=1; exec "$0" puterd"#, socket.as_raw_fd());
    let mut command = lab.as_user(UID, &CAPABILITIES);
    command.args(["bash", "-c", &script]).arg(lab.dir.path().join("puter-multi")).env("NOTIFY_SOCKET", &notify);
    let daemon = Daemon::start(&mut command);
    drop(socket);
    let hear = || {
        let mut buffer = [0; 512];
        let size = listener.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..size]).into_owned()
    };
    assert_eq!(hear(), "READY=1\nSTATUS=bridge puter0, 10.0.0.1/24");
    let status: Status = lab.json("GET", "/v1/status", "");
    assert_eq!(status.pid, daemon.pid());
    assert!(daemon.stop(Signal::TERM).success());
    assert_eq!(hear(), "STOPPING=1");
    assert!(path.exists(), "the socket is systemd's");
}

#[test]
#[ignore = "needs root"]
fn puterd_outlives_the_reader_of_its_log() {
    let lab = Lab::new();
    let mut command = lab.puterd();
    let mut child = Process(command.stderr(Stdio::piped()).spawn().unwrap());
    drop(child.0.stderr.take());
    wait("puterd listens", || lab.socket().exists());
    let _: Tap = lab.json("POST", "/v1/taps", r#"{"vm":"web","id":1}"#);
    let status: Status = lab.json("GET", "/v1/status", "");
    assert_eq!((status.pid, status.taps), (child.pid(), 1));
}

#[test]
#[ignore = "needs root"]
fn a_tun_device_that_is_closed_to_the_user_is_named_with_the_remedy() {
    let lab = Lab::new();
    lab.host("chmod 600 /dev/net/tun");
    let _daemon = lab.start(&[]);
    let (status, body) = lab.request("POST", "/v1/taps", r#"{"vm":"web","id":1}"#);
    assert_eq!((status, code(&body).as_str()), (500, "internal"));
    assert!(body.contains("cannot open /dev/net/tun") && body.contains("sudo chmod 666 /dev/net/tun"), "{body}");
    assert_eq!(lab.json::<Vec<Tap>>("GET", "/v1/taps", ""), []);
}

#[test]
#[ignore = "needs root"]
fn a_home_that_cannot_hold_a_socket_is_refused() {
    let lab = Lab::new();
    let deep = lab.home().join("d".repeat(120));
    let text = lab.refused(lab.puterd().arg("--home").arg(&deep));
    assert!(text.contains("bytes and Linux allows 107") && text.contains("PUTER_HOME"), "{text}");
    let text = lab.refused(lab.puterd().args(["--home", "/proc/puter"]));
    assert!(text.contains("cannot create /proc/puter/run"), "{text}");
    let text = lab.refused(lab.puterd().arg("--home").arg(lab.dir.path()));
    assert!(text.contains("Permission denied") || text.contains("belongs to uid 0"), "{text}");
}
