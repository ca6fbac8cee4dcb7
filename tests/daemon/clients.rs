//! More of the DHCP clients that guests run, each as it is packaged: dhcpcd, systemd-networkd and NetworkManager's own.
//!
//! perfdhcp is not among them: it can only act as a relay, and relayed messages get no answer here.

use puter::protocol::daemon::Tap;

use crate::dhcp::{MAC, client, leases};
use crate::lab::{Lab, Process, wait};

/// Directories of its own for a client that writes to the system's; a read-only /sys tells systemd that udev is absent.
const PRIVATE: &str = "mount --make-rprivate /; mount -t tmpfs none /run; mount -t sysfs -o ro none /sys";

/// A script in a client's network namespace, with directories of its own.
fn private(lab: &Lab, holder: &Process, script: &str) -> std::process::Command {
    let mut command = lab.enter(holder);
    command.args(["unshare", "--mount", "timeout", "60", "sh", "-c", &format!("set -e; {PRIVATE}; {script}")]);
    command
}

#[test]
#[ignore = "needs root"]
fn dhcpcd_gets_its_address_probes_for_it_and_gives_it_back() {
    let lab = Lab::new();
    let _daemon = lab.start(&[]);
    lab.json::<Tap>("POST", "/v1/taps", r#"{"vm":"web","id":1}"#);
    let holder = client(&lab, "c1", MAC);
    let dhcpcd = "dhcpcd -d -B -4 -f /dev/null -c /bin/true";
    let script = format!("mkdir -p /var/lib/dhcpcd; mount -t tmpfs none /var/lib/dhcpcd; {dhcpcd} -1 eth0 2>&1");
    let output = private(&lab, &holder, &script).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    for part in [
        "offered 10.0.0.11 from 10.0.0.1",
        "acknowledged 10.0.0.11 from 10.0.0.1",
        "DAD completed for 10.0.0.11",
        "leased 10.0.0.11 for 3600 seconds",
        "renew in 1800 seconds, rebind in 3150 seconds",
        "adding default route via 10.0.0.1",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    lab.run(&holder, "ping -c 1 -W 5 10.0.0.1");
    assert_eq!(leases(&lab)[0].ip.to_string(), "10.0.0.11");
    // With --release, its end gives the address back.
    lab.run(&holder, "ip addr flush dev eth0");
    let script = format!(
        "mkdir -p /var/lib/dhcpcd; mount -t tmpfs none /var/lib/dhcpcd; {dhcpcd} -p -A eth0 >/run/said 2>&1 & \
         until grep -q 'adding default route' /run/said; do sleep 0.1; done; dhcpcd -4 -k eth0; wait; cat /run/said"
    );
    let output = private(&lab, &holder, &script).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("releasing lease of 10.0.0.11"), "{said}");
    wait("the lease ends", || leases(&lab).is_empty());
}

#[test]
#[ignore = "needs root"]
fn systemd_networkd_gets_its_address_and_gives_it_back() {
    let lab = Lab::new();
    let _daemon = lab.start(&[]);
    lab.json::<Tap>("POST", "/v1/taps", r#"{"vm":"web","id":1}"#);
    let holder = client(&lab, "c1", MAC);
    let script = "mkdir -p /run/systemd/network /run/systemd/netif; chown systemd-network /run/systemd/netif; \
         printf '[Match]\\nName=eth0\\n[Network]\\nDHCP=ipv4\\n' >/run/systemd/network/a.network; \
         SYSTEMD_LOG_LEVEL=debug exec /lib/systemd/systemd-networkd";
    let log = lab.dir.path().join("networkd.log");
    let file = std::fs::File::create(&log).unwrap();
    let mut networkd = Process(private(&lab, &holder, script).stderr(file).spawn().unwrap());
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    wait("networkd is configured", || {
        assert!(networkd.0.try_wait().unwrap().is_none(), "{}", said());
        said().contains("eth0: State changed: configuring -> configured")
    });
    let acquired = "DHCPv4 address 10.0.0.11/24, gateway 10.0.0.1 acquired from 10.0.0.1";
    assert!(said().contains(acquired), "{}", said());
    lab.run(&holder, "ping -c 1 -W 5 10.0.0.1");
    assert_eq!(leases(&lab)[0].vm, "web");
    // timeout(1) passes the signal on; networkd's release names no server.
    lab.host(&format!("kill -TERM {}", networkd.pid()));
    wait("networkd ends", || networkd.0.try_wait().unwrap().is_some());
    assert!(said().contains("DHCPv4 client: RELEASE"), "{}", said());
    wait("the lease ends", || leases(&lab).is_empty());
}

#[test]
#[ignore = "needs root"]
fn network_manager_gets_its_address() {
    let lab = Lab::new();
    let _daemon = lab.start(&[]);
    lab.json::<Tap>("POST", "/v1/taps", r#"{"vm":"web","id":1}"#);
    let holder = client(&lab, "c1", MAC);
    let root = std::env::var("PUTER_TEST_NETWORK_MANAGER").expect("PUTER_TEST_NETWORK_MANAGER is set by xtask");
    // As in an initrd, where there is no system bus: it configures what the kernel's command line asks for, and ends. A
    // link that is up may have an address of a router advertisement by then, and would be left as it is.
    let script = format!(
        "ip link set eth0 down; mkdir -p /run/NetworkManager; mount -t tmpfs none /var/lib; mkdir /var/lib/NetworkManager; \
         printf '[main]\\ndhcp=internal\\nplugins=keyfile\\n' >/run/nm.conf; \
         {root}/usr/lib/NetworkManager/nm-initrd-generator -- ip=eth0:dhcp; \
         {root}/usr/sbin/NetworkManager --debug --log-level=DEBUG --config /run/nm.conf --configure-and-quit=initrd 2>&1"
    );
    let output = private(&lab, &holder, &script).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    for part in [
        "state changed new lease, address=10.0.0.11",
        "dhcp_lease_time      => '3600'",
        "dhcp_server_identifier => '10.0.0.1'",
        "domain_name_servers  => '10.0.0.1'",
        "domain_search        => 'puter'",
        "routers              => '10.0.0.1'",
        "subnet_mask          => '255.255.255.0'",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    lab.run(&holder, "ping -c 1 -W 5 10.0.0.1");
    assert_eq!(leases(&lab)[0].vm, "web");
}
