//! Beside docker's, ufw's and firewalld's rules, made with the tools that make them, and beside libvirt itself.

use std::os::unix::net::UnixStream;

use puter::protocol::daemon::{Firewall, Status};
use rustix::process::Signal;

use crate::lab::{Lab, Process, UID, wait};

/// What docker makes in iptables' table: what it does not know is dropped, and containers are closed to others.
const DOCKER: &str = "iptables -P FORWARD DROP; iptables -N DOCKER-USER; iptables -N DOCKER; \
    iptables -I FORWARD -i docker0 -j ACCEPT; iptables -I FORWARD -o docker0 -j DOCKER; \
    iptables -I FORWARD -j DOCKER-USER; iptables -A DOCKER-USER -j RETURN; \
    iptables -A DOCKER ! -i docker0 -o docker0 -j DROP";
/// What ufw makes: it drops DHCP before the chain's end. Echo stands for all that it drops so.
const UFW: &str = "iptables -P INPUT DROP; iptables -P FORWARD DROP; iptables -N ufw-after-input; \
    iptables -N ufw-skip-to-policy-input; iptables -A ufw-skip-to-policy-input -j DROP; \
    iptables -A ufw-after-input -p icmp -j ufw-skip-to-policy-input; iptables -A INPUT -j ufw-after-input";

fn pings(lab: &Lab, from: &Process, address: &str) -> bool {
    lab.attempt(from, &format!("ping -c 1 -W 1 {address}")).1
}

fn count(lab: &Lab, chain: &str) -> usize {
    lab.host(&format!("iptables -S {chain}")).matches("--comment \"puter:puter0\"").count()
        + lab.host(&format!("iptables -S {chain}")).matches("--comment puter:puter0").count()
}

#[test]
#[ignore = "needs root"]
fn docker_lets_vms_pass_and_its_containers_stay_closed() {
    let lab = Lab::new();
    let daemon = lab.start(&["--teardown"]);
    let guest = lab.guest("g1", "10.0.0.200");
    // A container behind docker's bridge.
    let container = lab.guest("c1", "10.0.0.210");
    lab.host("ip link add docker0 type bridge; ip addr add 172.17.0.1/16 dev docker0; ip link set docker0 up");
    lab.host("ip link set c1 master docker0");
    lab.run(
        &container,
        "ip addr flush dev eth0; ip addr add 172.17.0.2/16 dev eth0; ip route add default via 172.17.0.1",
    );
    lab.host("ping -c 1 -W 5 172.17.0.2");
    assert!(pings(&lab, &guest, "203.0.113.1"));
    daemon.freeze(true);
    lab.host(DOCKER);
    assert!(!pings(&lab, &guest, "203.0.113.1"), "or the test proves nothing");
    daemon.freeze(false);
    daemon.log_until("iptables' table drops what it does not know");
    wait("the guest gets out", || pings(&lab, &guest, "203.0.113.1"));
    assert!(!pings(&lab, &guest, "172.17.0.2"), "a guest reached a closed container");
    assert_eq!(count(&lab, "FORWARD"), 2);
    // Docker's tools go on to understand the table.
    lab.host("iptables-save >/tmp/rules-of-$$; iptables-restore --test </tmp/rules-of-$$; rm /tmp/rules-of-$$");
    lab.host("iptables -C FORWARD -j DOCKER-USER; iptables -L FORWARD -n -v");
    // Docker restarts, and somebody flushes the chain.
    lab.host("iptables -D FORWARD -j DOCKER-USER; iptables -I FORWARD -j DOCKER-USER");
    lab.host("iptables -F FORWARD; iptables -I FORWARD -j DOCKER-USER");
    wait("the guest gets out again", || pings(&lab, &guest, "203.0.113.1"));
    // Another puterd adds nothing twice.
    daemon.stop(Signal::KILL);
    let daemon = lab.start(&["--teardown"]);
    let status: Status = lab.json("GET", "/v1/status", "");
    let forward = status.firewalls.iter().find(|f| f.chain == "FORWARD").unwrap();
    assert!(forward.passes && forward.by_puterd && forward.by_policy, "{forward:?}");
    assert_eq!(count(&lab, "FORWARD"), 2);
    lab.host("ip link set g1 nomaster");
    assert!(daemon.stop(Signal::TERM).success());
    assert_eq!(count(&lab, "FORWARD"), 0, "a teardown takes them away");
    lab.host("iptables -C FORWARD -j DOCKER-USER");
}

#[test]
#[ignore = "needs root"]
fn ufw_lets_guests_reach_the_hosts_services_and_the_outside() {
    let lab = Lab::new();
    lab.host(UFW);
    let _daemon = lab.start(&[]);
    let guest = lab.guest("g1", "10.0.0.200");
    wait("the guest reaches the host", || pings(&lab, &guest, "10.0.0.1"));
    wait("the guest gets out", || {
        lab.host("iptables -C INPUT -i up0 -j ACCEPT || iptables -A INPUT -i up0 -j ACCEPT");
        pings(&lab, &guest, "203.0.113.1")
    });
    assert_eq!((count(&lab, "INPUT"), count(&lab, "FORWARD")), (1, 2));
    // The host's other services stay closed, whatever iptables' table now lets pass.
    let _service = lab.web_server(lab.host_holder(), "0.0.0.0:8080", "service");
    assert!(!lab.attempt(&guest, "socat -u OPEN:/dev/null TCP:10.0.0.1:8080,connect-timeout=2").1);
    // A chain that ends in a word of its own gets puter's rules before it.
    lab.host("iptables -F FORWARD; iptables -P FORWARD ACCEPT; iptables -A FORWARD -j REJECT");
    wait("the guest gets out again", || pings(&lab, &guest, "203.0.113.1"));
    let rules = lab.host("iptables -S FORWARD");
    assert!(rules.lines().last().unwrap().contains("-j REJECT"), "{rules}");
}

#[test]
#[ignore = "needs root"]
fn a_firewall_that_is_not_shared_is_named_and_left_alone() {
    let lab = Lab::new();
    let firewalld = "nft 'add table inet firewalld; add chain inet firewalld filter_FORWARD { type filter hook forward priority 10; }'; \
        nft 'add chain inet firewalld zones; add rule inet firewalld filter_FORWARD jump zones'; \
        nft 'add rule inet firewalld filter_FORWARD reject with icmpx type admin-prohibited'";
    lab.host(firewalld);
    lab.host("nft 'add table inet own; add chain inet own input { type filter hook input priority 0; policy drop; }'");
    let before = lab.host("nft list table inet firewalld; nft list table inet own");
    let _daemon = lab.start(&[]);
    let guest = lab.guest("g1", "10.0.0.200");
    assert!(!pings(&lab, &guest, "203.0.113.1"));
    let find = |table: &str| {
        let status: Status = lab.json("GET", "/v1/status", "");
        status.firewalls.into_iter().find(|firewall| firewall.table == table).unwrap()
    };
    let expected = Firewall {
        family: "inet".to_owned(),
        table: "firewalld".to_owned(),
        chain: "filter_FORWARD".to_owned(),
        hook: "forward".to_owned(),
        passes: false,
        by_puterd: false,
        by_policy: false,
    };
    assert_eq!(find("firewalld"), expected);
    let own = find("own");
    assert!(own.hook == "input" && own.by_policy && !own.passes, "{own:?}");
    assert_eq!(lab.host("nft list table inet firewalld; nft list table inet own"), before);
    // Doctor names the chains, and the command that it tells mends.
    let mut doctor = lab.as_user(UID, &[]);
    doctor.arg(lab.dir.path().join("puter-multi")).args(["puter", "doctor", "--json"]).env("HOME", lab.home());
    let report: serde_json::Value = serde_json::from_slice(&doctor.output().unwrap().stdout).unwrap();
    let mend = |chain: &str| {
        let all = report["checks"].as_array().unwrap();
        let check = all.iter().find(|check| check["found"].as_str().unwrap().contains(chain)).unwrap();
        check["mend"].as_str().unwrap().to_owned()
    };
    assert!(mend("nftables' inet firewalld filter_FORWARD drops").contains("firewall-cmd --permanent"), "{report}");
    let command = mend("nftables' inet own input drops").replace("sudo ", "");
    assert!(!pings(&lab, &guest, "10.0.0.1"));
    lab.host(&command);
    assert!(pings(&lab, &guest, "10.0.0.1") && find("own").passes, "{command}");
    // As firewall-cmd does for an interface that is in a zone.
    lab.host("nft add rule inet firewalld zones iifname puter0 accept; nft add rule inet firewalld zones oifname puter0 accept");
    assert!(pings(&lab, &guest, "203.0.113.1") && find("firewalld").passes);
}

/// libvirtd with its network driver, in directories of its own: a user that its packages would make, no system bus.
fn libvirtd(lab: &Lab) -> Process {
    let script = r#"
        mount --make-rprivate /
        mount -t tmpfs none /run
        mkdir -p /etc/libvirt /var/lib/libvirt /var/cache/libvirt
        for d in /etc/libvirt /var/lib/libvirt /var/cache/libvirt; do mount -t tmpfs none $d; done
        cp /etc/passwd /etc/group /run
        echo 'libvirt-qemu:x:64055:64055::/:/bin/false' >>/run/passwd
        echo 'libvirt-qemu:x:64055:' >>/run/group
        mount --bind /run/passwd /etc/passwd
        mount --bind /run/group /etc/group
        printf 'auth_unix_rw = "none"\nunix_sock_dir = "%s"\n' "$1" >/run/libvirtd.conf
        exec libvirtd -f /run/libvirtd.conf 2>"$1/log"
    "#;
    let dir = lab.dir.path().join("libvirt");
    std::fs::create_dir(&dir).unwrap();
    let mut command = lab.enter(lab.host_holder());
    let own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-ec", script, "sh"];
    let process = Process(command.args(own).arg(&dir).spawn().unwrap());
    wait("libvirtd listens", || UnixStream::connect(dir.join("libvirt-sock")).is_ok());
    process
}

#[test]
#[ignore = "needs root"]
fn libvirts_network_and_puters_leave_each_other_alone() {
    let lab = Lab::new();
    let _libvirtd = libvirtd(&lab);
    let virsh = |command: &str| {
        let socket = lab.dir.path().join("libvirt/libvirt-sock");
        lab.host(&format!("virsh -q -c 'network:///system?socket={}' {command}", socket.display()))
    };
    let xml = "<network><name>default</name><forward mode='nat'/><bridge name='virbr0' stp='off' delay='0'/>\
        <ip address='192.168.122.1' netmask='255.255.255.0'>\
        <dhcp><range start='192.168.122.2' end='192.168.122.254'/></dhcp></ip></network>";
    let file = lab.dir.path().join("default.xml");
    std::fs::write(&file, xml).unwrap();
    virsh(&format!("net-define {}", file.display()));
    virsh("net-start default");
    assert!(lab.host("iptables -S LIBVIRT_FWO").contains("-i virbr0 -j REJECT"));

    let daemon = lab.start(&[]);
    let guest = lab.guest("g1", "10.0.0.200");
    let other = lab.guest("o1", "10.0.0.210");
    lab.host("ip link set o1 master virbr0");
    lab.run(
        &other,
        "ip addr flush dev eth0; ip addr add 192.168.122.2/24 dev eth0; ip route add default via 192.168.122.1",
    );
    let both = || pings(&lab, &guest, "203.0.113.1") && pings(&lab, &other, "203.0.113.1");
    wait("both get out", both);
    // libvirt keeps its guests closed to others, and puter its own.
    let apart = || !pings(&lab, &guest, "192.168.122.2") && !pings(&lab, &other, "10.0.0.200");
    assert!(apart());
    // libvirt takes its rules away and makes them anew, and so does puterd.
    virsh("net-destroy default");
    assert!(pings(&lab, &guest, "203.0.113.1"));
    virsh("net-start default");
    lab.host("ip link set o1 master virbr0");
    wait("both get out again", both);
    lab.host("nft delete table inet puter");
    daemon.log_until("put back");
    daemon.stop(Signal::KILL);
    let _daemon = lab.start(&["--teardown"]);
    wait("both get out with another puterd", both);
    assert!(apart());
    // Where libvirt's host drops what it does not know, puterd asks for no more than its own.
    lab.host("iptables -P FORWARD DROP");
    wait("both get out past a policy that drops", both);
    assert!(apart());
    assert!(lab.host("iptables -S LIBVIRT_FWO").contains("-i virbr0 -j REJECT"), "libvirt's chains are as they were");
}
