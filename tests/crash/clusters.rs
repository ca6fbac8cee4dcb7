//! Commands on clusters that are killed at any step of theirs: the same command again comes to what it was to come to.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;

use super::host::{Host, text};
use super::{LIMIT, host, run, steps};

/// The steps of a snapshot at which machines stand still.
const STILL: [&str; 4] = ["snapshot: marked", "snapshot: paused", "snapshot: disk copied", "snapshot: resumed"];

fn members(host: &Host, cluster: &str) -> Vec<(String, String)> {
    let shown = host.json(&["cluster", "status", cluster, "--json"]);
    let word = |value: &serde_json::Value| value.as_str().unwrap().to_string();
    shown["members"].as_array().unwrap().iter().map(|one| (word(&one["member"]), word(&one["status"]))).collect()
}

fn run_all(host: &Host, cluster: &str, count: usize, what: &str) {
    let members = members(host, cluster);
    assert_eq!(members.len(), count, "{what}: {members:?}");
    assert!(members.iter().all(|(_, status)| status == "running"), "{what}: {members:?}");
    let names = host.ok(&["cluster", "exec", cluster, "--", "/bin/busybox", "hostname"]);
    assert_eq!(names.lines().count(), count, "{what}: {names}");
}

/// Runs the command killed at each of the cluster's steps in turn, and then again; `check` looks at what there is.
fn kill_at_each_step(
    host: &Host,
    words: &[&str],
    again: &[&str],
    prepare: &dyn Fn(),
    check: &dyn Fn(&str),
) -> BTreeSet<String> {
    prepare();
    let mut points = BTreeSet::from_iter(steps(host, words));
    check(&format!("{words:?}"));
    points.retain(|point| point.starts_with("cluster: ") || STILL.contains(&point.as_str()));
    for point in &points {
        let what = format!("{words:?} killed at '{point}'");
        eprintln!("{what}");
        prepare();
        let output = run(host, &[("PUTER_FAIL_POINT", point)], words);
        assert_eq!(output.status.signal(), Some(9), "{what}: {}", text(&output.stderr));
        let output = run(host, &[], again);
        assert!(output.status.success(), "{what}, then {again:?}: {}", text(&output.stderr));
        check(&what);
    }
    points
}

fn delete(host: &Host, cluster: &str) {
    let there = host.json(&["cluster", "list", "--json"]);
    if there.as_array().unwrap().iter().any(|one| one["name"] == cluster) {
        host.ok(&["cluster", "delete", "--force", "--snapshots", cluster]);
    }
}

#[test]
#[ignore = "needs root"]
fn a_command_on_a_cluster_that_is_killed_at_any_step_is_gone_on_with() {
    let host = host();
    let create = ["cluster", "create", "red", "--count", "2", "--memory", "128M", "--run", "true"];
    let grow = ["cluster", "scale", "red", "node=2"];
    let shrink = ["cluster", "scale", "red", "node=1"];
    let gone = || delete(&host, "red");
    let whole = |what: &str| run_all(&host, "red", 2, what);
    let points = kill_at_each_step(&host, &create, &create, &gone, &whole);
    assert!(points.contains("cluster: written down") && points.contains("cluster: first boot done"), "{points:?}");
    let one = |what: &str| run_all(&host, "red", 1, what);
    let grown = || drop(host.ok(&grow));
    let points = kill_at_each_step(&host, &shrink, &shrink, &grown, &one);
    assert!(points.contains("cluster: member removed") && points.contains("cluster: scaled"), "{points:?}");
    grown();

    // All go on, whoever is killed while they stand still; a snapshot is there whole or not at all.
    let parts = |vm: &str| host.json(&["snapshots", vm, "--json"]).as_array().unwrap().len();
    let cuts = || host.json(&["cluster", "snapshots", "red", "--json"]);
    let snapshot = ["cluster", "snapshot", "red"];
    let all_run = |what: &str| {
        host.until(LIMIT, || members(&host, "red").iter().all(|(_, status)| status == "running"));
        run_all(&host, "red", 2, what);
        assert!(cuts().as_array().unwrap().iter().all(|cut| cut["whole"] == true), "{what}: {}", cuts());
    };
    let points = kill_at_each_step(&host, &snapshot, &snapshot, &|| {}, &all_run);
    assert!(STILL.iter().all(|point| points.contains(*point)), "{points:?}");
    // Nothing is written before all stand still, and nobody goes on before all is written.
    let log = std::fs::read_to_string(host.world.dir().join("home/points")).unwrap();
    let at = |point: &str| -> Vec<usize> {
        let all =
            log.lines().enumerate().filter(|(_, line)| line.ends_with(point)).map(|(at, _)| at).collect::<Vec<_>>();
        assert_eq!(all.len(), 2, "{point}: {log}");
        all
    };
    assert!(at("snapshot: paused")[1] < at("snapshot: memory written")[0], "{log}");
    assert!(at("snapshot: disk copied")[1] < at("snapshot: resumed")[0], "{log}");
    assert!(points.contains("cluster: snapshot written down") && parts("red-node1") >= 2, "{points:?}");

    let restore = ["cluster", "restore", "--force", "red"];
    let points = kill_at_each_step(&host, &restore, &restore, &|| {}, &all_run);
    assert!(points.contains("cluster: ended for a restore"), "{points:?}");

    let clone = ["cluster", "clone", "red", "blue"];
    let without = || delete(&host, "blue");
    let second = |what: &str| run_all(&host, "blue", 2, what);
    // What is finished is there, so that the same command would be refused.
    let points = kill_at_each_step(&host, &clone, &["cluster", "list"], &without, &|what| {
        if what.ends_with("written down'") {
            let told = run(&host, &[], &["cluster", "start", "blue"]);
            assert!(text(&told.stderr).contains("a clone that is being made, or was broken off"), "{what}");
            host.ok(&clone);
        }
        if !what.contains("snapshot: ") {
            second(what);
        }
    });
    assert!(points.contains("cluster: clone written down") && points.contains("cluster: clone finished"), "{points:?}");
    without();

    let delete = ["cluster", "delete", "--force", "--snapshots", "red"];
    let there = || drop(host.ok(&create));
    host.ok(&["cluster", "delete", "--force", "--snapshots", "red"]);
    let left = |what: &str| {
        let list = host.json(&["list", "--json"]);
        assert!(list.as_array().unwrap().is_empty(), "{what}: {list}");
    };
    let points =
        kill_at_each_step(&host, &["cluster", "delete", "--force", "red"], &["cluster", "list"], &there, &|what| {
            let again = run(&host, &[], &delete);
            assert!(
                again.status.success() || text(&again.stderr).contains("no cluster named"),
                "{what}: {}",
                text(&again.stderr)
            );
            left(what);
        });
    assert!(points.contains("cluster: member removed") && points.contains("cluster: record removed"), "{points:?}");
    host.until(LIMIT, || host.processes("puter-monitor").is_empty());
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

#[test]
#[ignore = "needs root"]
fn a_cluster_that_is_half_changed_is_changed_whole_by_the_same_again() {
    let host = host();
    let path = host.world.dir().join("home/cluster.toml");
    let write = |text: &str| {
        let mut command = host.world.command("sh");
        xtask::shell::output(command.args(["-c", "printf %s \"$1\" >\"$0\""]).arg(&path).arg(text)).unwrap();
    };
    let apply = ["cluster", "apply", "-f", path.to_str().unwrap(), "--yes"];
    let as_before = || {
        write("name = 'red'\n[roles.node]\ncount = 2\nmemory = '128M'\npublish = ['80']");
        host.ok(&apply);
        write(
            "name = 'red'\n[roles.node]\nmemory = '192M'\npublish = ['81']\n\
             [roles.web]\nmemory = '128M'\nrun = 'echo x >>/first'",
        );
    };
    let as_wanted = |what: &str| {
        run_all(&host, "red", 2, what);
        let told = host.json(&["cluster", "apply", "-f", path.to_str().unwrap(), "--dry-run", "--json"]);
        assert_eq!(told["members"], serde_json::Value::Array(Vec::new()), "{what}");
        let record = std::fs::read_to_string(host.world.home().join("cluster/red.json")).unwrap();
        assert!(!record.contains("former"), "{what}: {record}");
        let info = host.json(&["info", "red-node1", "--json"]);
        assert_eq!(
            (&info[0]["memory"], &info[0]["ports"][0]["guest_port"]),
            (&(192 << 20).into(), &81.into()),
            "{what}"
        );
    };
    let points = kill_at_each_step(&host, &apply, &apply, &as_before, &as_wanted);
    for point in
        ["member removed", "apply written down", "ports taken back", "member changed", "first boot done", "applied"]
    {
        assert!(points.contains(&format!("cluster: {point}")), "{point}: {points:?}");
    }

    // A snapshot of the whole that is being deleted.
    let snapshot = || drop(host.ok(&["cluster", "snapshot", "red", "--name", "kept", "--disk-only"]));
    let delete = ["cluster", "snapshot", "delete", "red@kept"];
    let left = |what: &str| {
        for vm in ["red-node1", "red-web1"] {
            let parts = host.json(&["snapshots", vm, "--json"]);
            assert_eq!(parts, serde_json::Value::Array(Vec::new()), "{what}");
        }
        assert_eq!(
            host.json(&["cluster", "snapshots", "red", "--json"]),
            serde_json::Value::Array(Vec::new()),
            "{what}"
        );
    };
    for point in ["snapshot delete: out of sight", "cluster: snapshot's parts removed", "cluster: snapshot forgotten"] {
        snapshot();
        let output = run(&host, &[("PUTER_FAIL_POINT", point)], &delete);
        assert_eq!(output.status.signal(), Some(9), "{point}: {}", text(&output.stderr));
        let again = run(&host, &[], &delete);
        let gone = text(&again.stderr).contains("has no snapshot");
        assert!(again.status.success() || gone, "{point}: {}", text(&again.stderr));
        left(point);
    }
    delete_cluster(&host);
}

fn delete_cluster(host: &Host) {
    delete(host, "red");
    host.until(LIMIT, || host.processes("puter-monitor").is_empty());
    assert_eq!(host.leftovers(), Vec::<String>::new());
}
