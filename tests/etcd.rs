//! The example of packaging/examples/etcd as its readers run it, on real Debian guests: a cluster of etcd that is kept and
//! cloned whole, by programs that nobody has told of it.

#[path = "e2e/host.rs"]
mod host;

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::time::Duration;

use host::{Host, text};
use serde_json::Value;
use xtask::shell::{output, top};

/// Nothing here depends on how long it takes, but whether it comes at all.
const LIMIT: Duration = Duration::from_secs(300);
const CTL: &str = "etcdctl --command-timeout=60s";

/// Puts the example into the user's home, with nothing changed but the image, and gives the path of its cluster.toml.
fn example(host: &Host, image: &str) -> String {
    let from = top().join("packaging/examples/etcd");
    let to = host.world.dir().join("home/etcd");
    output(host.world.command("mkdir").arg(&to)).unwrap();
    let written = fs::read_to_string(from.join("cluster.toml")).unwrap();
    let line = written.lines().find(|line| line.starts_with("image = ")).unwrap();
    fs::write(to.join("cluster.toml"), written.replace(line, &format!("image = \"{image}\""))).unwrap();
    fs::copy(from.join("first-boot.sh"), to.join("first-boot.sh")).unwrap();
    to.join("cluster.toml").display().to_string()
}

/// What etcdctl prints on one member.
fn ctl(host: &Host, vm: &str, words: &str) -> String {
    host.ok(&["exec", vm, "--", "sh", "-c", &format!("{CTL} {words}")])
}

/// Waits until every member of the cluster says that all three answer and serve.
fn until_healthy(host: &Host, cluster: &str) {
    for member in 1..=3 {
        let vm = format!("{cluster}-etcd{member}");
        let words = format!("{CTL} endpoint health --cluster");
        host.until(LIMIT, || {
            let said = host.world.puter(&["exec", &vm, "--", "sh", "-c", &words]).unwrap();
            let said = text(&said.stdout) + &text(&said.stderr);
            said.matches("is healthy").count() == 3
        });
    }
}

/// The addresses of the cluster's members, of each both.
fn addresses(host: &Host, cluster: &str) -> Vec<[IpAddr; 2]> {
    let shown = host.json(&["cluster", "inventory", cluster, "--json"]);
    let of = |one: &Value| ["ip", "ip6"].map(|key| one[key].as_str().unwrap().parse().unwrap());
    shown["members"].as_array().unwrap().iter().map(of).collect()
}

/// To whom the member's etcd has connections, by address. Those of a clone's former address lead nowhere: the kernel tries
/// for a quarter of an hour, and nothing of it passes the bridge.
fn peers(host: &Host, vm: &str, own: &[IpAddr; 2]) -> BTreeSet<IpAddr> {
    let said = host.ok(&["exec", vm, "--", "ss", "-Htn", "state", "established", "dport = :2380"]);
    let address = |word: Option<&str>| {
        let (address, _port) = word.unwrap().rsplit_once(':').unwrap();
        address.trim_matches(['[', ']']).parse::<IpAddr>().unwrap().to_canonical()
    };
    let ends = said.lines().map(|line| {
        let mut words = line.split_whitespace().skip(2);
        (address(words.next()), address(words.next()))
    });
    ends.filter(|(from, _)| own.contains(from)).map(|(_, to)| to).collect()
}

/// Checks that each member's name leads to the cluster's own, as the members' programs find it.
fn names_lead_home(host: &Host, cluster: &str) {
    let own = addresses(host, cluster);
    for vm in (1..=3).map(|number| format!("{cluster}-etcd{number}")) {
        let found = host.ok(&["exec", &vm, "--", "getent", "ahosts", "etcd1", "etcd2", "etcd3"]);
        let found = found.lines().map(|line| line.split_whitespace().next().unwrap().parse::<IpAddr>().unwrap());
        let (found, own): (BTreeSet<_>, BTreeSet<_>) = (found.collect(), own.iter().flatten().copied().collect());
        assert_eq!(found, own, "{vm}");
    }
}

#[test]
#[ignore = "needs root"]
fn a_cluster_of_etcd_is_kept_whole_and_goes_on_twice() {
    let host = Host::new();
    let image = host.push_etcd_guest();
    host.ok(&["daemon", "start"]);
    host.ok(&["init", "--image", &image]);
    let file = example(&host, &image);
    let said = host.ok(&["cluster", "create", "-f", &file]);
    assert_eq!(said.matches("runs at").count(), 3, "{said}");
    until_healthy(&host, "kv");
    let members: Value = serde_json::from_str(&ctl(&host, "kv-etcd1", "member list -w json")).unwrap();
    assert_eq!(members["members"].as_array().unwrap().len(), 3, "{members}");
    let id = members["header"]["cluster_id"].clone();
    assert_eq!(ctl(&host, "kv-etcd1", "put colour red"), "OK");
    assert_eq!(ctl(&host, "kv-etcd3", "get colour --print-value-only"), "red");

    // Every member looks up every other, and has the answers yet when it stands still.
    names_lead_home(&host, "kv");
    let taken = host.json(&["cluster", "snapshot", "kv", "--name", "red", "--json"]);
    println!("paused {} s, {} s from first to last", taken["paused"], taken["pause_spread"]);
    host.ok(&["cluster", "clone", "kv@red", "twin"]);
    names_lead_home(&host, "twin");
    // The first went on meanwhile; what it learns is its own.
    assert_eq!(ctl(&host, "kv-etcd2", "put colour green"), "OK");
    until_healthy(&host, "twin");
    until_healthy(&host, "kv");
    for cluster in ["twin", "kv"] {
        let own = addresses(&host, cluster);
        for number in 0..3 {
            let vm = format!("{cluster}-etcd{}", number + 1);
            let others: Vec<&[IpAddr; 2]> = (0..3).filter(|other| *other != number).map(|other| &own[other]).collect();
            let met = peers(&host, &vm, &own[number]);
            let each = others.iter().all(|both| both.iter().any(|one| met.contains(one)));
            let astray = met.iter().find(|one| !others.iter().any(|both| both.contains(one)));
            assert_eq!((each, astray), (true, None), "{vm} is connected with {met:?}");
        }
    }
    // The same etcd cluster by its own account, and yet another one.
    let members: Value = serde_json::from_str(&ctl(&host, "twin-etcd2", "member list -w json")).unwrap();
    assert_eq!((&members["header"]["cluster_id"], members["members"].as_array().unwrap().len()), (&id, 3));
    assert_eq!(ctl(&host, "twin-etcd1", "get colour --print-value-only"), "red");
    assert_eq!(ctl(&host, "twin-etcd3", "put shape square"), "OK");
    assert_eq!(ctl(&host, "kv-etcd1", "get shape --print-value-only"), "");
    assert_eq!(ctl(&host, "kv-etcd1", "get colour --print-value-only"), "green");
    assert_eq!(ctl(&host, "twin-etcd1", "get shape --print-value-only"), "square");

    inventories_are_understood(&host, &addresses(&host, "kv"));
    for cluster in ["twin", "kv"] {
        host.ok(&["cluster", "delete", "--force", "--snapshots", cluster]);
    }
    host.until(LIMIT, || host.leftovers().is_empty());
}

/// The forms of `puter cluster inventory`, read by those for whom they are.
fn inventories_are_understood(host: &Host, own: &[[IpAddr; 2]]) {
    let write = |format: &str| {
        let path = host.world.dir().join("home").join(format);
        let script = "puter cluster inventory kv --format \"$1\" >\"$0\"";
        output(host.world.command("sh").args(["-c", script]).arg(&path).arg(format)).unwrap();
        path
    };
    let inventory = write("ansible");
    let ansible = |program: &str, words: &[&str]| {
        let mut command = host.world.command_with(&[("ANSIBLE_NOCOLOR", "1")], program);
        output(command.arg("-i").arg(&inventory).args(words)).unwrap()
    };
    let listed: Value = serde_json::from_str(&ansible("ansible-inventory", &["--list"])).unwrap();
    assert_eq!(listed["kv"]["children"], serde_json::json!(["etcd"]), "{listed}");
    assert_eq!(listed["etcd"]["hosts"], serde_json::json!(["etcd1", "etcd2", "etcd3"]), "{listed}");
    // Of all modules this one alone needs no Python in the guest.
    let said = ansible("ansible", &["kv", "-m", "raw", "-a", "hostname"]);
    let config = write("ssh");
    for (number, [four, _]) in (1..).zip(own) {
        let name = format!("kv-etcd{number}");
        assert!(said.contains(&format!("etcd{number} | CHANGED | rc=0 >>\n{name}")), "{said}");
        for host_name in [name.clone(), format!("etcd{number}.kv")] {
            let mut ssh = host.world.command("ssh");
            ssh.arg("-F").arg(&config).args(["-o", "BatchMode=yes", &host_name, "hostname"]);
            assert_eq!(output(&mut ssh).unwrap(), name);
        }
        let listed = &listed["_meta"]["hostvars"][format!("etcd{number}")]["ansible_host"];
        assert_eq!(listed, &four.to_string());
    }
    // In the place of the host's own file, in this world.
    output(host.world.root("mount").arg("--bind").arg(write("hosts")).arg("/etc/hosts")).unwrap();
    for (number, [four, _]) in (1..).zip(own) {
        for name in ["etcd#", "kv-etcd#", "etcd#.kv", "etcd#.kv.puter"] {
            let name = name.replace('#', &number.to_string());
            let found = output(host.world.command("getent").args(["-s", "hosts:files", "ahostsv4", &name])).unwrap();
            assert!(found.starts_with(&format!("{four} ")), "{name}: {found}");
        }
    }
}
