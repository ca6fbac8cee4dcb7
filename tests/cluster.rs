//! Clusters of real, small guests: made, scaled, stopped and deleted as one thing, and known to one another by name.

#[path = "e2e/host.rs"]
mod host;
#[path = "e2e/terminal.rs"]
mod terminal;

use std::time::Duration;

use host::{Host, text};
use serde_json::Value;
use terminal::Terminal;

const LIMIT: Duration = Duration::from_secs(60);

/// A host with puterd and the small guest as its image.
fn host() -> Host {
    let host = Host::new();
    host.ready();
    host
}

/// A file in the user's home.
fn write(host: &Host, name: &str, text: &str) -> String {
    let path = host.world.dir().join("home").join(name);
    let mut command = host.world.command("sh");
    let text = text.to_string();
    xtask::shell::output(command.args(["-c", "printf %s \"$1\" >\"$0\""]).arg(&path).arg(text)).unwrap();
    path.display().to_string()
}

/// Runs a command that must fail with exit code 1; what it said on stdout and stderr.
fn fails(host: &Host, args: &[&str]) -> (String, String) {
    let output = host.world.puter(args).unwrap();
    assert_eq!(output.status.code(), Some(1), "puter {}: {}", args.join(" "), text(&output.stderr));
    (text(&output.stdout), text(&output.stderr))
}

fn status(host: &Host, target: &str) -> Vec<(String, String)> {
    let shown = host.json(&["cluster", "status", target, "--json"]);
    let word = |value: &Value| value.as_str().unwrap().to_string();
    shown["members"].as_array().unwrap().iter().map(|one| (word(&one["member"]), word(&one["status"]))).collect()
}

/// The address to which a name leads in the guest.
fn resolve(host: &Host, vm: &str, name: &str) -> Option<String> {
    let output = host.world.puter(&["exec", vm, "--", "/bin/busybox", "nslookup", name, "10.0.0.1"]).unwrap();
    let said = text(&output.stdout);
    let answer = said.split_once("Name:")?.1;
    let address = |line: &str| Some(line.strip_prefix("Address")?.rsplit(' ').next()?.to_string());
    answer.lines().filter_map(address).find(|text| text.parse::<std::net::Ipv4Addr>().is_ok())
}

/// How many snapshots somebody asked for.
fn kept(all: &Value) -> usize {
    all.as_array().unwrap().iter().filter(|one| one["automatic"] == false).count()
}

fn pairs(all: &[(&str, &str)]) -> Vec<(String, String)> {
    all.iter().map(|(one, two)| (one.to_string(), two.to_string())).collect()
}

fn gone(host: &Host) {
    host.until(LIMIT, || host.processes("puter-monitor").is_empty());
    assert_eq!(host.leftovers(), Vec::<String>::new());
    let left: Vec<_> = std::fs::read_dir(host.world.home().join("cluster")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
#[ignore = "needs root"]
fn a_cluster_is_made_used_scaled_and_deleted_as_one() {
    let host = host();
    host.fails(&["cluster", "status", "red"], "no cluster named 'red'", "puter cluster list");
    let create = [
        "cluster",
        "create",
        "red",
        "--count",
        "2",
        "--memory",
        "192M",
        "--run",
        "echo $PUTER_MEMBER of $PUTER_MEMBERS >>/first",
    ];
    let said = host.ok(&create);
    assert!(said.contains("node1: runs at 10.0.0.1") && said.contains("node2: runs at 10.0.0.1"), "{said}");
    assert_eq!(status(&host, "red"), pairs(&[("node1", "running"), ("node2", "running")]));
    let list = host.json(&["cluster", "list", "--json"]);
    assert_eq!((&list[0]["name"], &list[0]["members"], &list[0]["running"]), (&"red".into(), &2.into(), &2.into()));
    assert!(host.ok(&["cluster", "list"]).contains("node=2"));
    // The same again has nothing to do; another of the name is refused.
    assert!(host.ok(&create).contains("node1: runs already"));
    host.fails(&["cluster", "create", "red", "--count", "3"], "it is not the same", "scale");

    // Names within, and from outside the whole one alone.
    host.ok(&["cluster", "create", "blue", "--count", "1", "--memory", "192M"]);
    host.ok(&["start", "alone", "--memory", "192M"]);
    let address = |vm: &str| host.json(&["info", vm, "--json"])[0]["ip"].as_str().unwrap().to_string();
    let (red1, red2, blue1) = (address("red-node1"), address("red-node2"), address("blue-node1"));
    for (asker, name, expected) in [
        ("red-node2", "node1", Some(&red1)),
        ("red-node1", "node2", Some(&red2)),
        ("red-node1", "node2.red", Some(&red2)),
        ("red-node1", "node2.red.puter", Some(&red2)),
        ("red-node1", "node1.blue.puter", Some(&blue1)),
        ("blue-node1", "node1", Some(&blue1)),
        ("blue-node1", "node2", None),
        ("alone", "node1", None),
        ("alone", "node1.red.puter", Some(&red1)),
        ("alone", "red-node1", Some(&red1)),
    ] {
        assert_eq!(resolve(&host, asker, name).as_ref(), expected, "{asker} asks for {name}");
    }
    assert_eq!(host.json(&["info", "red-node2", "--json"])[0]["member"]["member"], "node2");
    assert!(host.ok(&["info", "red-node2"]).contains("red, as node2"));
    // A name that is looked up as programs do it, by way of the search list.
    let ping = ["cluster", "exec", "red:node1", "--", "/bin/busybox", "ping", "-4", "-c", "1", "-W", "5", "node2"];
    let said = host.ok(&ping);
    assert!(said.starts_with("node1 | PING node2") && said.contains(&red2), "{said}");
    // A puterd that starts anew knows it again.
    host.ok(&["daemon", "stop"]);
    host.ok(&["daemon", "start"]);
    assert_eq!(resolve(&host, "red-node2", "node1"), Some(red1.clone()));

    // Commands on all or some.
    let said = host.ok(&["cluster", "exec", "red", "--", "/bin/busybox", "hostname"]);
    let mut lines: Vec<&str> = said.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["node1 | red-node1", "node2 | red-node2"]);
    assert_eq!(
        host.ok(&["cluster", "exec", "red:node2", "--", "/bin/busybox", "cat", "/first"]),
        "node2 | node2 of node1 node2",
        "once"
    );
    let script = "hostname; [ $(hostname) = red-node1 ] || exit 3";
    let (out, err) = fails(&host, &["cluster", "exec", "red:node", "--", "sh", "-c", script]);
    assert!(out.contains("node1 | red-node1") && out.contains("node2 | red-node2"), "{out}");
    assert!(err.contains("failed on 1 of 2: node2 (3)"), "{err}");
    let (out, _) = fails(&host, &["cluster", "exec", "red", "--json", "--", "sh", "-c", script]);
    let codes: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (&codes[0]["exit_code"], &codes[1]["exit_code"], &codes[1]["stdout"]),
        (&0.into(), &3.into(), &"red-node2\n".into())
    );
    host.fails(
        &["cluster", "exec", "red:web", "--", "true"],
        "neither a role nor a member 'web'",
        "its roles are node",
    );

    host.fails(&["cluster", "ssh", "red"], "'red' is 2 members: node1, node2", "puter cluster ssh red:node1");

    // What programs need to know of it, and when it is ready.
    assert!(
        host.ok(&["cluster", "inventory", "red"])
            .contains(&format!("{red1:<15} node1.red.puter node1.red red-node1 node1"))
    );
    assert_eq!(host.json(&["cluster", "inventory", "red", "--format", "json"])["members"][1]["ip"], red2.as_str());
    assert!(host.ok(&["cluster", "wait", "red"]).contains("node2: ready"));
    let wait = ["cluster", "wait", "red", "--for", "port:8000", "--timeout", "1"];
    let (_, err) = fails(&host, &wait);
    assert!(err.contains("'red-node1' was not ready (port:8000) within 1 s") && err.contains("2 of 2"), "{err}");
    host.ok(&[
        "cluster",
        "exec",
        "red",
        "--",
        "sh",
        "-c",
        "/bin/busybox setsid /bin/busybox nc -l -p 8000 </dev/null >/dev/null 2>&1 &",
    ]);
    host.ok(&["cluster", "wait", "red", "--for", "port:8000", "--timeout", "20"]);

    // Another size.
    assert!(host.ok(&["cluster", "scale", "red", "node=3"]).contains("node3: runs at"));
    assert_eq!(resolve(&host, "red-node1", "node3"), Some(address("red-node3")));
    host.ok(&["cluster", "scale", "red", "node=1"]);
    assert_eq!(status(&host, "red"), pairs(&[("node1", "running")]));
    assert_eq!(resolve(&host, "red-node1", "node3"), None);
    host.fails(&["cluster", "scale", "red", "db=1"], "has no role 'db'", "its roles are node");

    // Down and up again.
    let stopped = host.json(&["cluster", "stop", "red", "--json"]);
    assert_eq!((&stopped[0]["member"], &stopped[0]["error"]), (&"node1".into(), &Value::Null));
    assert_eq!(status(&host, "red"), pairs(&[("node1", "stopped")]));
    assert_eq!(status(&host, "blue"), pairs(&[("node1", "running")]), "the other goes on");
    let (_, err) = fails(&host, &["cluster", "exec", "red", "--", "true"]);
    assert!(err.contains("'red-node1' is stopped"), "{err}");
    let started = host.json(&["cluster", "start", "red:node1", "--json"]);
    assert_eq!((&started[0]["vm"], &started[0]["ip"]), (&"red-node1".into(), &address("red-node1").into()));
    assert_eq!(
        host.ok(&["cluster", "exec", "red", "--", "/bin/busybox", "cat", "/first"]),
        "node1 | node1 of node1 node2",
        "still once"
    );
    host.fails(&["cluster", "delete", "red"], "members of 'red' run: node1", "puter cluster stop red");
    host.ok(&["cluster", "delete", "--force", "red"]);
    host.fails(&["cluster", "status", "red"], "no cluster named 'red'", "");
    assert!(!host.ok(&["list"]).contains("red-node"));
    host.ok(&["cluster", "delete", "--force", "blue"]);
    host.ok(&["delete", "--force", "alone"]);
    gone(&host);
}

#[test]
#[ignore = "needs root"]
fn roles_come_in_their_order_and_what_fails_is_done_again() {
    let host = host();
    let file = write(
        &host,
        "cluster.toml",
        "name = 'shop'\n\
         [roles.db]\nmemory = '192M'\nscript = 'setup.sh'\n\
         [roles.web]\ncount = 2\nmemory = '192M'\nafter = ['db']\npublish = ['80']\nrun = 'ping -c 1 -W 5 db1'\n",
    );
    let broken =
        write(&host, "broken.toml", "name = 'shop'\n[roles.db]\nafter = ['web']\n[roles.web]\nafter = ['db']\n");
    host.fails(&["cluster", "create", "-f", &broken], "db after web after db", "'after'");
    write(
        &host,
        "setup.sh",
        "#!/bin/sh\n[ -e /ready ] || { echo not ready yet; touch /ready; exit 7; }\necho $0 >/first\n",
    );
    // The first boot of the database fails: what comes after it waits.
    let (out, err) = fails(&host, &["cluster", "create", "-f", &file]);
    assert_eq!(out, "");
    for part in [
        "'shop-db1' runs at its first boot ended with exit code 7",
        "not ready yet",
        "'shop-web1' waits for the role 'db'",
        "3 of 3 members failed: db1, web1, web2",
        "hint: the same again does the rest: puter cluster start shop",
    ] {
        assert!(err.contains(part), "{part}: {err}");
    }
    assert_eq!(status(&host, "shop"), pairs(&[("db1", "running"), ("web1", "absent"), ("web2", "absent")]));
    // A machine that only has a member's name is in the way, and said to be; the rest is done.
    host.ok(&["start", "shop-web2", "--memory", "192M"]);
    let (out, err) = fails(&host, &["cluster", "start", "shop"]);
    assert!(out.contains("db1: runs at") && out.contains("web1: runs at") && !out.contains("web2"), "{out}");
    assert!(
        err.contains("a VM 'shop-web2' already, which is not this cluster's")
            && err.contains("1 of 3 members failed: web2"),
        "{err}"
    );
    host.ok(&["delete", "--force", "shop-web2"]);
    assert!(host.ok(&["cluster", "create", "-f", &file]).contains("web2: runs at"), "the same command completes it");
    assert_eq!(status(&host, "shop:web"), pairs(&[("web1", "running"), ("web2", "running")]));
    let ports = host.json(&["cluster", "inventory", "shop", "--json"]);
    assert_eq!(ports["members"][1]["ports"][0]["guest_port"], 80);
    assert!(
        host.ok(&["cluster", "exec", "shop:db", "--", "/bin/busybox", "cat", "/first"])
            .contains("/run/puter-first-boot")
    );

    // One member's end is told, and the next start brings it back.
    host.ok(&["stop", "--force", "shop-web1"]);
    let (_, err) = fails(&host, &["cluster", "wait", "shop", "--timeout", "1"]);
    assert!(err.contains("'shop-web1' is stopped") && err.contains("1 of 3"), "{err}");
    let again = host.ok(&["cluster", "start", "shop"]);
    assert!(again.contains("db1: runs already") && again.contains("web1: runs at"), "{again}");

    // A clone of a member is nobody's member, and its disk needs the snapshot of the one that is.
    host.ok(&["cluster", "stop", "shop", "--force"]);
    host.ok(&["snapshot", "shop-db1", "--name", "kept"]);
    host.fails(&["cluster", "delete", "shop"], "members of 'shop' have snapshots: shop-db1@", "--snapshots");
    host.ok(&["clone", "shop-db1@kept", "copy"]);
    host.fails(&["cluster", "delete", "--snapshots", "shop"], "by the VM copy", "puter clone --flatten");
    assert_eq!(status(&host, "shop").len(), 3, "nothing is deleted");
    assert!(host.world.home().join("state/shop-web1.json").exists());
    host.ok(&["start", "copy"]);
    assert_eq!(resolve(&host, "copy", "db1"), None);
    host.ok(&["delete", "--force", "copy"]);
    // A record that is damaged hides nothing, and can be deleted.
    std::fs::write(host.world.home().join("cluster/shop.json"), "{").unwrap();
    let output = host.world.puter(&["cluster", "list"]).unwrap();
    assert!(output.status.success() && text(&output.stderr).contains("puter cluster delete --force shop"));
    host.fails(&["cluster", "delete", "shop"], "cannot be used", "delete --force shop");
    host.ok(&["cluster", "delete", "--force", "--snapshots", "shop"]);
    gone(&host);
}

#[test]
#[ignore = "needs root"]
fn a_command_that_is_killed_is_gone_on_with() {
    let host = host();
    let create = ["cluster", "create", "red", "--count", "3", "--memory", "192M"];
    let mut child = host.world.command("puter").args(create).spawn().unwrap();
    host.until(LIMIT, || !host.processes("puter-emulator").is_empty());
    for process in host.processes("cluster create") {
        let _ = host.world.root("kill").args(["-KILL", &process]).status();
    }
    assert!(!child.wait().unwrap().success());
    host.ok(&create);
    assert_eq!(status(&host, "red"), pairs(&[("node1", "running"), ("node2", "running"), ("node3", "running")]));
    // One that its record does not name any more goes as well.
    let path = host.world.home().join("cluster/red.json");
    let record = std::fs::read_to_string(&path).unwrap().replace("\"count\": 3", "\"count\": 2");
    std::fs::write(&path, record).unwrap();
    assert_eq!(status(&host, "red").len(), 2);
    host.ok(&["cluster", "stop", "red", "--force"]);
    let (_, err) = fails(&host, &["cluster", "delete", "red"]);
    assert!(err.contains("members of 'red' run: node3"), "{err}");
    host.ok(&["cluster", "delete", "red", "--force"]);
    gone(&host);
}

#[test]
#[ignore = "needs root"]
fn a_whole_cluster_is_kept_restored_and_cloned() {
    let host = host();
    host.ok(&["cluster", "create", "red", "--count", "2", "--memory", "128M", "--publish", "80"]);
    let sh = |target: &str, script: &str| host.ok(&["cluster", "exec", target, "--", "sh", "-c", script]);
    sh(
        "red",
        "mount -t tmpfs none /mnt 2>/dev/null || mkdir -p /mnt; echo before >/mnt/word; echo before >/word; sync",
    );
    // All or none: what is in one member's way leaves none of the other, and both go on.
    host.ok(&["snapshot", "red-node2", "--name", "dup"]);
    host.fails(
        &["cluster", "snapshot", "red", "--name", "dup"],
        "no snapshot of 'red' is taken: 'red-node2' has a snapshot 'dup'",
        "choose another",
    );
    assert_eq!(host.json(&["snapshots", "red-node1", "--json"]), Value::Array(Vec::new()));
    assert_eq!(status(&host, "red"), pairs(&[("node1", "running"), ("node2", "running")]));
    host.ok(&["snapshot", "delete", "red-node2@dup"]);

    let said = host.ok(&["cluster", "snapshot", "red", "--name", "kept"]);
    assert!(said.contains("red@kept taken of 2 members") && said.contains("paused for"), "{said}");
    host.fails(&["cluster", "snapshot", "red", "--name", "kept"], "has a snapshot 'kept' already", "");
    assert_eq!(host.json(&["cluster", "snapshots", "red", "--json"])[0]["whole"], true);
    sh("red", "echo after >/mnt/word; echo after >/word; sync");
    host.fails(&["cluster", "restore", "red"], "members of 'red' run: node1, node2", "--force");
    assert_eq!(sh("red:node1", "cat /word"), "node1 | after", "nothing has happened");
    let said = host.ok(&["cluster", "restore", "--force", "red@kept"]);
    assert!(said.contains("node1: goes on at") && said.contains("node2: goes on at"), "{said}");
    for member in ["node1", "node2"] {
        assert_eq!(
            sh(&format!("red:{member}"), "cat /mnt/word /word"),
            format!("{member} | before\n{member} | before")
        );
    }

    // A second cluster of it, with addresses and names of its own.
    let address = |vm: &str| host.json(&["info", vm, "--json"])[0]["ip"].as_str().unwrap().to_string();
    let identity = |vm: &str| host.ok(&["exec", vm, "--", "/bin/busybox", "cat", "/etc/machine-id", "/etc/hostname"]);
    for (new, more) in [("blue", &["red@kept", "blue"][..]), ("green", &["red", "green", "--isolate"])] {
        host.ok(&[&["cluster", "clone"], more].concat());
        assert_eq!(status(&host, new), pairs(&[("node1", "running"), ("node2", "running")]));
        let (one, two) = (format!("{new}-node1"), format!("{new}-node2"));
        assert_eq!(resolve(&host, &one, "node2"), Some(address(&two)), "{new}");
        assert_eq!(resolve(&host, "red-node1", "node2"), Some(address("red-node2")));
        assert_ne!(address(&two), address("red-node2"));
        assert_ne!(identity(&one), identity("red-node1"));
        assert_eq!(sh(&format!("{new}:node2"), "cat /mnt/word"), "node2 | before", "the memory came along");
        assert!(sh(&format!("{new}:node1"), "ping -4 -c 1 -W 5 node2").contains(&address(&two)));
        assert_eq!(host.json(&["info", &one, "--json"])[0]["ports"], Value::Array(Vec::new()));
    }
    let ping =
        |from: &str, to: &str| sh(from, &format!("ping -c 1 -W 2 {} >/dev/null && echo yes || echo no", address(to)));
    assert_eq!(ping("blue:node1", "red-node1"), "node1 | yes");
    for (from, to) in [("green:node1", "red-node1"), ("red:node1", "green-node1"), ("blue:node2", "green-node2")] {
        assert!(ping(from, to).ends_with("| no"), "{from} reaches {to}");
    }
    host.fails(&["cluster", "clone", "red", "blue"], "there is a cluster 'blue' already", "puter cluster delete blue");
    host.fails(&["cluster", "clone", "red@none", "new"], "has no snapshot 'none'", "there are: kept");
    // A snapshot of the whole goes as a whole, or stays so.
    let parts = || ["red-node1", "red-node2"].map(|vm| host.json(&["snapshots", vm, "--json"])).map(|all| kept(&all));
    let before = parts();
    host.fails(
        &["cluster", "snapshot", "delete", "red@kept"],
        "cannot delete red@kept: parts of it are needed",
        "flatten",
    );
    host.fails(&["cluster", "snapshot", "delete", "red"], "no snapshot is named", "puter cluster snapshots red");
    host.fails(&["cluster", "snapshot", "delete", "red@none"], "has no snapshot 'none'", "there are: kept");
    assert_eq!(parts(), before);
    host.ok(&["cluster", "snapshot", "red", "--name", "brief", "--disk-only"]);
    assert_eq!(parts().map(|count| count - 1), before);
    let brief = host.json(&["snapshots", "red-node1", "--json"]);
    let brief = brief.as_array().unwrap().iter().find(|one| one["name"] == "brief").unwrap()["id"].clone();
    // One of which a part is gone goes all the same.
    host.ok(&["snapshot", "delete", &format!("red-node1@{}", brief.as_str().unwrap())]);
    assert_eq!(host.json(&["cluster", "snapshots", "red", "--json"])[1]["whole"], false);
    assert_eq!(host.ok(&["cluster", "snapshot", "delete", "red@brief"]), "red@brief deleted");
    assert_eq!(parts(), before);
    assert_eq!(host.json(&["cluster", "snapshots", "red", "--json"]).as_array().unwrap().len(), 1);
    // What stands on snapshots keeps them; the clones go first.
    host.fails(&["cluster", "scale", "red", "node=1"], "have snapshots: red-node2@", "puter snapshot delete");
    host.ok(&["cluster", "stop", "red", "--force"]);
    host.fails(&["cluster", "delete", "--snapshots", "red"], "by the VM blue-node1", "flatten");
    for cluster in ["blue", "green"] {
        host.ok(&["cluster", "delete", "--force", cluster]);
    }
    // A part that somebody removed is missed before anything is touched.
    let kept = host.json(&["snapshots", "red-node2", "--json"])[0]["id"].as_str().unwrap().to_string();
    host.ok(&["snapshot", "delete", &format!("red-node2@{kept}")]);
    host.fails(&["cluster", "restore", "red"], "the snapshot 'kept' is not whole", "puter snapshots red-node2");
    host.ok(&["cluster", "delete", "--snapshots", "red"]);
    gone(&host);
}

/// What is planned, as `member action`.
fn planned(host: &Host, file: &str) -> Vec<String> {
    let plan = host.json(&["cluster", "apply", "-f", file, "--dry-run", "--json"]);
    assert_eq!((&plan["applied"], &plan["results"]), (&false.into(), &Value::Null));
    let word = |one: &Value, key: &str| one[key].as_str().unwrap().to_string();
    let all = plan["members"].as_array().unwrap();
    all.iter().map(|one| format!("{} {}", word(one, "member"), word(one, "action"))).collect()
}

#[test]
#[ignore = "needs root"]
fn a_cluster_becomes_what_its_file_says_and_only_what_differs_changes() {
    let host = host();
    let first = write(
        &host,
        "cluster.toml",
        "name = 'shop'\n[roles.db]\ncpus = 1\nmemory = '128M'\ndisk = '3G'\nrun = 'echo $PUTER_MEMBER >>/first'\n\
         [roles.web]\ncount = 2\nmemory = '128M'\nafter = ['db']\npublish = ['80']\n",
    );
    let apply = |file: &str, more: &[&str]| host.ok(&[&["cluster", "apply", "-f", file][..], more].concat());
    let sh = |target: &str, script: &str| host.ok(&["cluster", "exec", target, "--", "sh", "-c", script]);
    let info = |vm: &str| host.json(&["info", vm, "--json"])[0].clone();
    let record = || std::fs::read_to_string(host.world.home().join("cluster/shop.json")).unwrap();

    // A plan alone makes nothing; then it is done, and then there is nothing to do.
    assert_eq!(planned(&host, &first), ["db1 create", "web1 create", "web2 create"]);
    host.fails(&["cluster", "status", "shop"], "no cluster named 'shop'", "");
    let said = apply(&first, &[]);
    for part in ["shop is not there yet", "  + db1   create\n", "3 to create, 0 to start", "web2: runs at 10.0.0.1"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    sh("shop", "echo kept >/word; echo kept >/run/word; sync");
    let (before, pids) = (record(), ["db1", "web1"].map(|one| info(&format!("shop-{one}"))["pid"].clone()));
    assert_eq!(apply(&first, &[]), "shop is as the file says; there is nothing to do");
    assert_eq!((record(), sh("shop:db1", "cat /first")), (before, "db1 | db1".into()));

    // What can be changed without a restart is, and nothing else is touched.
    let second = write(
        &host,
        "second.toml",
        "name = 'shop'\n[roles.db]\nmemory = '128M'\ncpus = 2\ndisk = '4G'\nrun = 'echo other >>/first'\n\
         [roles.web]\ncount = 1\nmemory = '128M'\nafter = ['db']\npublish = ['81']\nisolate = true\n\
         run = 'echo late >>/first'\n\
         [roles.cache]\nmemory = '128M'\n",
    );
    assert_eq!(planned(&host, &second), ["cache1 create", "db1 change", "web1 change", "web2 delete"]);
    let output = host.world.puter(&["cluster", "apply", "-f", &second]).unwrap();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{out}{err}");
    assert!(err.contains("1 member is deleted, and there is nobody to ask") && err.contains("hint: `--yes`"), "{err}");
    for part in ["  ~ db1     change cpus 1 -> 2 (restart), disk 3G -> 4G (restart)\n", "  - web2    delete\n"] {
        assert!(out.contains(part), "{part}: {out}");
    }
    assert_eq!(status(&host, "shop").len(), 3, "nothing is done");
    host.ok(&["snapshot", "shop-web2", "--name", "kept", "--disk-only"]);
    let (_, err) = fails(&host, &["cluster", "apply", "-f", &second, "--yes"]);
    assert!(err.contains("members of 'shop' have snapshots: shop-web2@"), "{err}");
    assert_eq!(info("shop-db1")["pid"], pids[0], "what is in the way is found before anything is done");
    let id = host.json(&["snapshots", "shop-web2", "--json"])[0]["id"].as_str().unwrap().to_string();
    host.ok(&["snapshot", "delete", &format!("shop-web2@{id}")]);
    let said = apply(&second, &["--yes"]);
    for part in ["web2: deleted\n", "db1: changed, runs at", "web1: changed", "cache1: runs at"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(status(&host, "shop"), pairs(&[("cache1", "running"), ("db1", "running"), ("web1", "running")]));
    let (db, web) = (info("shop-db1"), info("shop-web1"));
    assert_eq!((&db["cpus"], &db["disk"], &web["isolate"]), (&2.into(), &(4_u64 << 30).into(), &true.into()));
    assert_eq!((&web["ports"][0]["guest_port"], web["ports"].as_array().unwrap().len()), (&81.into(), 1));
    assert_eq!(web["pid"], pids[1], "it went on");
    assert_ne!(db["pid"], pids[0]);
    assert_eq!(sh("shop:web1", "cat /run/word"), "web1 | kept");
    assert_eq!(sh("shop:db1", "cat /word /first"), "db1 | kept\ndb1 | db1", "the disk stays, and is no first one");
    assert_eq!(planned(&host, &second), [""; 0]);

    // What somebody changed since goes back; what the file does not say stays.
    host.ok(&["cluster", "stop", "shop:db", "--force"]);
    host.ok(&["set", "shop-db1", "--cpus", "1", "--restart", "always"]);
    host.ok(&["port", "add", "shop-cache1", "90"]);
    assert_eq!(planned(&host, &second), ["db1 change"]);
    apply(&second, &[]);
    assert_eq!((&info("shop-db1")["cpus"], status(&host, "shop:db")), (&2.into(), pairs(&[("db1", "running")])));

    // Another image: what is on the disk goes, but not for one that cannot be had.
    let third = |image: &str| {
        let text = std::fs::read_to_string(host.world.dir().join("home/second.toml")).unwrap();
        let text = text.replace("[roles.db]\n", &format!("[roles.db]\nimage = '{image}'\n"));
        write(&host, "third.toml", &text.replace("disk = '4G'\n", ""))
    };
    let (_, err) = fails(&host, &["cluster", "apply", "-f", &third("localhost:1/none"), "--yes"]);
    assert!(err.contains("the role 'db'") && err.contains("localhost:1/none"), "{err}");
    assert_eq!(sh("shop:db1", "cat /word"), "db1 | kept");
    let file = third(&host.push_small_guest_as("puter/other"));
    let ask = |answer: &str| {
        let mut command = host.world.command_with(&[("TERM", "xterm")], "puter");
        command.args(["cluster", "apply", "-f", &file]);
        let terminal = Terminal::ask(command, 40, 100);
        let asked = |rows: &[String]| rows.iter().any(|row| row.contains("Go on? [y/N]"));
        let rows = terminal.until("the question", asked);
        assert!(
            rows.iter().any(|row| row.contains("1 member is made again, with all that is on their disks")),
            "{rows:?}"
        );
        terminal.write(answer);
        let (status, lines, _) = terminal.end();
        (status.code(), lines.join("\n"))
    };
    let (code, said) = ask("\n");
    assert!(code == Some(1) && said.contains("'shop' is left as it is"), "{said}");
    assert_eq!(sh("shop:db1", "cat /word"), "db1 | kept");
    let (code, said) = ask("y\n");
    assert!(code == Some(0) && said.contains("db1: made again, runs at"), "{said}");
    assert_eq!(sh("shop:db1", "cat /word /first 2>/dev/null; true"), "db1 | other");
    assert!(info("shop-db1")["image"].to_string().contains("puter/other"), "{}", info("shop-db1"));
    assert_eq!(info("shop-web1")["pid"], pids[1]);
    assert_eq!(planned(&host, &file), [""; 0]);
    host.ok(&["cluster", "delete", "--force", "shop"]);
    gone(&host);
}

/// Whether the row is one of the member's, and says this.
fn row(line: &str, member: &str, what: &str) -> bool {
    line.strip_prefix(member).is_some_and(|rest| rest.starts_with("  ") && rest.trim_start().starts_with(what))
}

#[test]
#[ignore = "needs root"]
fn on_a_terminal_each_member_has_a_row() {
    let host = host();
    let run = |columns: u16, term: &str, args: &[&str]| {
        let mut command = host.world.command_with(&[("TERM", term)], "puter");
        command.args(args).stdin(std::process::Stdio::null());
        Terminal::run(command, 24, columns)
    };
    let create = ["cluster", "create", "red", "--count", "2", "--memory", "128M"];
    let terminal = run(80, "xterm", &create);
    let both = |what: &'static str| {
        move |rows: &[String]| ["node1", "node2"].iter().all(|one| rows.iter().any(|line| row(line, one, what)))
    };
    terminal.until("both are at work at the same time", both("boot"));
    let (status, lines, seen) = terminal.end();
    assert!(status.success(), "{lines:#?}");
    let of = |lines: &[String], member: &str, what: &str| lines.iter().filter(|line| row(line, member, what)).count();
    for member in ["node1", "node2"] {
        assert_eq!(of(&lines, member, "ok "), 1, "{lines:#?}");
        assert!(lines.iter().any(|line| line.starts_with(&format!("{member}: runs at 10.0.0."))), "{lines:#?}");
        assert!(!lines.iter().any(|line| line.starts_with(&format!("red-{member}: boot"))), "{lines:#?}");
        let times = |picture: &Vec<String>| picture.iter().filter(|line| row(line, member, "")).count();
        assert!(seen.pictures.iter().all(|picture| times(picture) <= 1), "{:#?}", seen.pictures);
    }

    // A narrow one, on which a member fails: the first line of why is in its row, and nothing is wrapped.
    let fail = "printf '\\033[31mred\\n'; exit 3";
    let file = write(
        &host,
        "blue.toml",
        &format!("name = 'blue'\n[roles.a]\nmemory = '128M'\n[roles.b]\nmemory = '128M'\nrun = '''{fail}'''"),
    );
    let (status, lines, seen) = run(44, "xterm", &["cluster", "apply", "-f", &file]).end();
    assert_eq!(status.code(), Some(1), "{lines:#?}");
    assert_eq!((of(&lines, "a1", "ok "), of(&lines, "b1", "failed: what 'blu")), (1, 1), "{lines:#?}");
    let rows = seen.pictures.iter().flatten().filter(|line| ["a1  ", "b1  "].iter().any(|one| line.starts_with(one)));
    assert!(rows.clone().count() > 4 && rows.clone().all(|line| line.trim_end().chars().count() < 44));
    assert!(!String::from_utf8_lossy(&seen.raw).contains("\x1b[31m"), "no guest steers the terminal");

    // A dumb one has lines, and so has a file.
    let (_, lines, seen) = run(80, "dumb", &["cluster", "stop", "blue", "--force"]).end();
    assert!(!seen.raw.contains(&0x1b) && lines.iter().any(|line| line.starts_with("a1: ")), "{lines:#?}");
    let output = host.world.puter(&["cluster", "apply", "-f", &file]).unwrap();
    assert!(text(&output.stderr).contains("blue-a1: boot "), "{}", text(&output.stderr));

    // One that is interrupted leaves the terminal as it was, with what became of each.
    host.ok(&["cluster", "delete", "--force", "red"]);
    let terminal = run(80, "xterm", &create);
    terminal.until("both are at work at the same time", both("boot"));
    for process in host.processes("cluster create") {
        let _ = host.world.root("kill").args(["-INT", &process]).status();
    }
    let (status, lines, seen) = terminal.end();
    assert_eq!(status.code(), Some(130), "{lines:#?}");
    assert_eq!(
        of(&lines, "node1", "failed: interrupted") + of(&lines, "node2", "failed: interrupted"),
        2,
        "{lines:#?}"
    );
    let raw = String::from_utf8_lossy(&seen.raw);
    assert!(raw.ends_with("\r\n") && raw.matches("\x1b[?25l").count() <= raw.matches("\x1b[?25h").count(), "{raw:?}");
    for cluster in ["red", "blue"] {
        host.ok(&["cluster", "delete", "--force", cluster]);
    }
    gone(&host);
}
