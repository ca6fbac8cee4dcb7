//! DHCP as real clients see it: busybox's udhcpc and ISC's dhclient, on the bridge of a real puterd.

use puter::protocol::daemon::{Lease, Tap};

use crate::lab::{Lab, Process, wait};

pub const MAC: &str = "52:54:00:00:00:0b";

/// A client's network namespace, its link on the bridge with this MAC.
pub fn client(lab: &Lab, name: &str, mac: &str) -> Process {
    let holder = lab.guest(name, "10.0.0.9");
    let reset =
        format!("ip addr flush dev eth0; ip link set eth0 down; ip link set eth0 address {mac}; ip link set eth0 up");
    lab.run(&holder, &reset);
    lab.passes(name);
    holder
}

/// A script for a client: it writes down what it was told and configures the link.
fn script(lab: &Lab, name: &str, body: &str) -> String {
    let path = lab.dir.path().join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
    lab.host(&format!("chmod 755 {}", path.display()));
    path.display().to_string()
}

fn udhcpc(lab: &Lab) -> String {
    let log = lab.dir.path().join("udhcpc.log");
    let body = format!(
        "echo \"$1 ip=$ip router=$router subnet=$subnet lease=$lease server=$serverid name=$hostname\" >>{}\n\
         case $1 in bound|renew) ip addr replace $ip/$mask dev $interface; ip route replace default via $router;; esac",
        log.display()
    );
    script(lab, "udhcpc.sh", &body)
}

fn read(lab: &Lab, name: &str) -> String {
    std::fs::read_to_string(lab.dir.path().join(name)).unwrap_or_default()
}

/// What udhcpc tells its script in these variables, for the VM `web`.
pub fn told(lab: &Lab, variables: &str) -> String {
    lab.json::<Tap>("POST", "/v1/taps", r#"{"vm":"web","id":1}"#);
    let holder = client(lab, "c1", MAC);
    let log = lab.dir.path().join("told");
    let words: Vec<String> = variables.split(' ').map(|name| format!("${name}")).collect();
    let script = script(lab, "told.sh", &format!("[ $1 = bound ] && echo {} >{}", words.join(" "), log.display()));
    lab.run(&holder, &format!("busybox udhcpc -f -q -n -i eth0 -s {script} -t 10 -T 1 -O search"));
    lab.host("ip link delete c1");
    std::fs::read_to_string(log).unwrap().trim().to_owned()
}

pub fn leases(lab: &Lab) -> Vec<Lease> {
    lab.json("GET", "/v1/leases", "")
}

#[test]
#[ignore = "needs root"]
fn udhcpc_gets_renews_and_gives_back_the_address_of_its_mac() {
    let lab = Lab::new();
    let _daemon = lab.start(&[]);
    lab.json::<Tap>("POST", "/v1/taps", r#"{"vm":"web","id":1}"#);
    let holder = client(&lab, "c1", MAC);
    let script = udhcpc(&lab);
    let mut command = lab.enter(&holder);
    command.args(["busybox", "udhcpc", "-f", "-i", "eth0", "-s", &script, "-t", "5", "-T", "1", "-R"]);
    let mut udhcpc = Process(command.args(["-O", "hostname", "-F", "asked-for"]).spawn().unwrap());
    wait("udhcpc is bound", || read(&lab, "udhcpc.log").contains("bound "));
    let bound = read(&lab, "udhcpc.log").lines().find(|line| line.starts_with("bound ")).unwrap().to_owned();
    assert_eq!(bound, "bound ip=10.0.0.11 router=10.0.0.1 subnet=255.255.255.0 lease=3600 server=10.0.0.1 name=web");
    // The client's script writes before it acts.
    wait("the address is set", || lab.attempt(&holder, "ping -c 1 -W 5 10.0.0.1").1);
    let held = leases(&lab);
    assert_eq!((held.len(), held[0].vm.as_str(), held[0].ip.to_string().as_str()), (1, "web", "10.0.0.11"));
    assert!((3590..=3600).contains(&held[0].remaining), "{held:?}");

    // SIGUSR1 renews: by unicast, from the address.
    lab.host(&format!("kill -USR1 {}", udhcpc.pid()));
    wait("udhcpc renews", || read(&lab, "udhcpc.log").contains("renew ip=10.0.0.11"));

    // SIGTERM gives the address back.
    lab.host(&format!("kill -TERM {}", udhcpc.pid()));
    wait("udhcpc ends", || udhcpc.0.try_wait().unwrap().is_some());
    wait("the lease ends", || leases(&lab).is_empty());
}

/// Ends the process whose number is in this file.
struct Ended(std::path::PathBuf);

impl Drop for Ended {
    fn drop(&mut self) {
        let pid = std::fs::read_to_string(&self.0).ok().and_then(|text| text.trim().parse().ok());
        if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

#[test]
#[ignore = "needs root"]
fn dhclient_that_remembers_another_address_is_told_and_gets_its_own() {
    let lab = Lab::new();
    let _daemon = lab.start(&[]);
    lab.json::<Tap>("POST", "/v1/taps", r#"{"vm":"web","id":1}"#);
    let holder = client(&lab, "c1", MAC);
    let log = lab.dir.path().join("dhclient.log");
    let body = format!(
        "echo \"$reason ip=$new_ip_address router=$new_routers name=$new_host_name\" >>{}\n\
         case $reason in BOUND|REBOOT|RENEW) ip addr replace $new_ip_address/24 dev $interface;; esac",
        log.display()
    );
    let script = script(&lab, "dhclient.sh", &body);
    let dir = lab.dir.path().display();
    std::fs::write(
        lab.dir.path().join("leases"),
        "lease {\n  interface \"eth0\";\n  fixed-address 10.0.0.99;\n  option subnet-mask 255.255.255.0;\n  \
         renew never;\n  rebind never;\n  expire never;\n}\n",
    )
    .unwrap();
    // It goes to the background, and must not outlive a test that fails.
    let _end = Ended(lab.dir.path().join("pid"));
    let dhclient = format!("dhclient -v -cf /dev/null -sf {script} -lf {dir}/leases -pf {dir}/pid");
    let said = lab.run(&holder, &format!("timeout 50 {dhclient} -1 eth0 2>&1"));
    assert!(said.contains("DHCPREQUEST for 10.0.0.99"), "{said}");
    assert!(said.contains("DHCPNAK from 10.0.0.1"), "{said}");
    assert!(said.contains("bound to 10.0.0.11"), "{said}");
    assert!(read(&lab, "dhclient.log").contains("BOUND ip=10.0.0.11 router=10.0.0.1 name=web"));
    assert_eq!(leases(&lab)[0].ip.to_string(), "10.0.0.11");
    let said = lab.run(&holder, &format!("timeout 50 {dhclient} -r eth0 2>&1"));
    assert!(said.contains("DHCPRELEASE of 10.0.0.11"), "{said}");
    wait("the lease ends", || leases(&lab).is_empty());
}

#[test]
#[ignore = "needs root"]
fn a_client_whose_mac_is_no_machines_gets_no_answer() {
    let lab = Lab::new();
    let _daemon = lab.start(&[]);
    lab.json::<Tap>("POST", "/v1/taps", r#"{"vm":"web","id":1}"#);
    let script = udhcpc(&lab);
    for (name, mac) in [("c1", "52:54:00:00:00:0c"), ("c2", "02:00:00:00:00:0b")] {
        let holder = client(&lab, name, mac);
        let (said, well) = lab.attempt(&holder, &format!("busybox udhcpc -f -n -q -i eth0 -s {script} -t 2 -T 1 2>&1"));
        assert!(!well && said.contains("no lease"), "{said}");
    }
    assert!(!read(&lab, "udhcpc.log").contains("bound"));
    assert!(leases(&lab).is_empty());
}

#[test]
#[ignore = "needs root"]
fn the_server_survives_a_flood_of_garbage() {
    let lab = Lab::new();
    let daemon = lab.start(&[]);
    lab.json::<Tap>("POST", "/v1/taps", r#"{"vm":"web","id":1}"#);
    let holder = client(&lab, "c1", MAC);
    lab.run(&holder, "ip addr add 10.0.0.200/24 dev eth0");
    let before = memory(daemon.pid());
    // 20 MB of nonsense in datagrams of 400 bytes; the sender ends by itself.
    lab.run(&holder, "head -c 20000000 /dev/urandom | socat -u -b 400 - UDP4-SENDTO:10.0.0.1:67");
    let (status, _) = lab.request("GET", "/v1/status", "");
    assert_eq!(status, 200);
    let after = memory(daemon.pid());
    assert!(after < before + 4096, "{before} KiB became {after} KiB");
    lab.run(&holder, "ip addr flush dev eth0");
    let script = udhcpc(&lab);
    lab.run(&holder, &format!("busybox udhcpc -f -n -q -i eth0 -s {script} -t 10 -T 1 2>&1"));
    assert!(read(&lab, "udhcpc.log").contains("bound ip=10.0.0.11"));
}

/// Resident memory of a process, in KiB (proc(5)).
fn memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
