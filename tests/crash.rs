//! Whatever ends at whatever step, the next command finds it, tells it and mends it. The steps are the fail points of
//! the executable; the tests learn of them from the executable itself, so that none is forgotten.

#[path = "crash/clusters.rs"]
mod clusters;
#[path = "e2e/host.rs"]
mod host;
#[path = "crash/images.rs"]
mod images;

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use host::{Host, text};

const LIMIT: Duration = Duration::from_secs(60);
const START: &[&str] = &["start", "web", "--memory", "256M"];

/// A host with an executable that has fail points, with puterd and the small guest as its image.
fn host() -> Host {
    // Debug information makes it thirty times larger, and each world copies it.
    let small = tempfile::tempdir().unwrap();
    let executable = small.path().join("puter-multi");
    let strip = Command::new("strip").arg("-o").arg(&executable).arg(env!("CARGO_BIN_EXE_puter-multi")).status();
    assert!(strip.unwrap().success());
    let host = Host::with(&executable);
    host.ready();
    host
}

/// In which state a command finds the VM.
#[derive(Clone, Copy, Debug)]
enum Before {
    Absent,
    Stopped,
    Running,
}

/// The commands and what they find.
const CASES: [(&[&str], Before); 5] = [
    (START, Before::Absent),
    (START, Before::Stopped),
    (&["stop", "web"], Before::Running),
    (&["delete", "web"], Before::Stopped),
    (&["delete", "--force", "web"], Before::Running),
];

fn prepare(host: &Host, before: Before) {
    if host.processes("puterd").is_empty() {
        host.ok(&["daemon", "start"]);
    }
    let there = !host.json(&["list", "--json"]).as_array().unwrap().is_empty();
    match before {
        Before::Absent if there => drop(host.ok(&["delete", "--force", "web"])),
        Before::Absent => {}
        Before::Running if status(host) == "running" => {}
        Before::Running => drop(host.ok(START)),
        Before::Stopped => {
            if !there {
                host.ok(START);
            }
            host.ok(&["stop", "--force", "web"]);
        }
    }
    let monitors = usize::from(matches!(before, Before::Running));
    host.until(LIMIT, || host.processes("puter-monitor").len() == monitors);
}

fn status(host: &Host) -> String {
    host.json(&["list", "--json"])[0]["status"].as_str().unwrap_or("absent").to_string()
}

fn run(host: &Host, variables: &[(&str, &str)], words: &[&str]) -> Output {
    host.world.command_with(variables, "puter").args(words).stdin(Stdio::null()).output().unwrap()
}

/// Runs a command, which must succeed, and gives the points that it passes, each once, in their order. The whole log of
/// them stays.
fn steps(host: &Host, words: &[&str]) -> Vec<String> {
    let log = host.world.dir().join("home/points");
    let _ = std::fs::remove_file(&log);
    let output = run(host, &[("PUTER_FAIL_POINTS_LOG", log.to_str().unwrap())], words);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let mut seen = BTreeSet::new();
    let all = std::fs::read_to_string(&log).unwrap();
    all.lines().filter(|point| seen.insert(point.to_string())).map(String::from).collect()
}

/// The points that this command passes.
fn points(host: &Host, words: &[&str], before: Before) -> Vec<String> {
    prepare(host, before);
    steps(host, words)
}

const QEMU: &str = "qemu-system";

/// The program in which a machine runs.
fn machine() -> &'static str {
    if xtask::world::hypervisor() == "emulated" { QEMU } else { "cloud-hypervisor --" }
}

/// Once a start has taken much longer than any does, tells what is going on there: its failure leaves no trace of it.
fn look_at_what_is_slow(host: &Host, started: &AtomicBool) {
    let began = std::time::Instant::now();
    while !started.load(Ordering::SeqCst) {
        if began.elapsed() > Duration::from_secs(150) {
            return eprintln!("a start hangs:\n{}", host.look());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// The next command: it brings the VM to run, and there is one of everything.
fn mend(host: &Host, what: &str) {
    if host.processes("puterd").is_empty() {
        host.ok(&["daemon", "start"]);
    }
    // A monitor whose VM was shot puts it in order; a command that comes meanwhile waits for it.
    if status(host) != "running" {
        let started = AtomicBool::new(false);
        let output = std::thread::scope(|scope| {
            scope.spawn(|| look_at_what_is_slow(host, &started));
            let output = run(host, &[], START);
            started.store(true, Ordering::SeqCst);
            output
        });
        assert!(output.status.success(), "{what}: {}", text(&output.stderr));
    }
    let list = host.json(&["list", "--json"]);
    assert_eq!(list.as_array().unwrap().len(), 1, "{what}: {list}");
    assert_eq!((&list[0]["status"], &list[0]["id"]), (&"running".into(), &1.into()), "{what}: {list}");
    assert_eq!(host.ok(&["exec", "web", "--", "/bin/busybox", "hostname"]), "web", "{what}");
    assert_eq!(host.taps(), ["pt-web"], "{what}");
    let emulator: &[&str] = &["puter-emulator", "vhost-device-vsock"];
    let own = if machine() == QEMU { emulator } else { &[] };
    let one = |program: &&str| host.processes(program).len() == 1;
    host.until(LIMIT, || own.iter().chain(&[machine(), "puter-monitor"]).all(one));
}

/// And when it is deleted, nothing at all is left.
fn nothing_left(host: &Host) {
    host.ok(&["delete", "--force", "web"]);
    host.until(LIMIT, || host.processes("puter-monitor").is_empty());
    assert_eq!(host.leftovers(), Vec::<String>::new());
    assert!(host.processes(machine()).is_empty() && host.processes("vhost-device").is_empty());
}

fn kill_the_command_at_each_step(cases: &[(&[&str], Before)]) {
    let host = host();
    for (words, before) in cases {
        let points = points(&host, words, *before);
        assert!(points.len() >= 5, "{points:?}");
        for point in points {
            let what = format!("{words:?} of a VM {before:?}, killed at '{point}'");
            eprintln!("{what}");
            prepare(&host, *before);
            let output = run(&host, &[("PUTER_FAIL_POINT", &point)], words);
            assert_eq!(output.status.signal(), Some(9), "{what}: {}", text(&output.stderr));
            mend(&host, &what);
        }
    }
    nothing_left(&host);
}

#[test]
#[ignore = "needs root"]
fn a_start_that_is_killed_at_any_step_is_mended_by_the_next_command() {
    kill_the_command_at_each_step(&CASES[..2]);
}

#[test]
#[ignore = "needs root"]
fn a_stop_or_delete_that_is_killed_at_any_step_is_mended_by_the_next_command() {
    kill_the_command_at_each_step(&CASES[2..]);
}

/// Stops the command at each of its steps, kills others meanwhile, and lets it go on: it ends by itself, well or with a
/// reason.
fn kill_others_at_each_step(victims: &[&str]) {
    let host = host();
    for (words, before) in CASES {
        for (number, point) in points(&host, words, before).into_iter().enumerate() {
            // The first at each step; the others, which end with it or it with them, at every third.
            let chosen = victims.iter().enumerate().filter(|(index, _)| *index == 0 || number % 3 == 0);
            for (_, victim) in chosen {
                let what = format!("{words:?} of a VM {before:?}, {victim} killed at '{point}'");
                prepare(&host, before);
                let mut command = host.world.command_with(&[("PUTER_PAUSE_POINT", &point)], "puter");
                let child = command.args(words).stdin(Stdio::null()).stderr(Stdio::piped()).stdout(Stdio::piped());
                let child = child.spawn().unwrap();
                let carrier = child.id().to_string();
                let paused = || {
                    let all = host.processes(&format!("puter {}", words[0]));
                    all.into_iter().find(|pid| {
                        let stat = xtask::shell::output(host.world.root("cat").arg(format!("/proc/{pid}/stat")));
                        stat.is_ok_and(|stat| stat.split(')').nth(1).is_some_and(|rest| rest.starts_with(" T")))
                    })
                };
                host.until(LIMIT, || paused().is_some());
                let pid = paused().unwrap();
                let hit = host.processes(victim);
                for victim in &hit {
                    host.world.root("kill").args(["-KILL", victim]).status().unwrap();
                }
                // A point that is passed twice stops it again.
                let began = std::time::Instant::now();
                let output = std::thread::scope(|scope| {
                    let waiting = scope.spawn(|| child.wait_with_output().unwrap());
                    while !waiting.is_finished() {
                        assert!(began.elapsed() < Duration::from_secs(120), "{what}: it hangs");
                        let _ = host.world.root("kill").args(["-CONT", &pid]).stderr(Stdio::null()).status();
                        // nsenter, which carried it into the world, has stopped along with it.
                        let _ = Command::new("kill").args(["-CONT", &carrier]).stderr(Stdio::null()).status();
                        std::thread::sleep(Duration::from_millis(50));
                    }
                    waiting.join().unwrap()
                });
                let said = text(&output.stderr);
                eprintln!("{what} ({} of them): {} {}", hit.len(), output.status, said.trim().replace('\n', " | "));
                assert_eq!(output.status.signal(), None, "{what}");
                match output.status.code() {
                    Some(0) => {}
                    Some(1) => assert!(said.contains("puter: "), "{what}: no reason is given: {said}"),
                    code => panic!("{what}: exit code {code:?}: {said}"),
                }
                mend(&host, &what);
            }
        }
    }
    nothing_left(&host);
}

#[test]
#[ignore = "needs root"]
fn puterd_killed_at_any_step_of_a_command_is_told_and_mended() {
    kill_others_at_each_step(&["puterd "]);
}

#[test]
#[ignore = "needs root"]
fn a_hypervisor_killed_at_any_step_of_a_command_is_told_and_mended() {
    kill_others_at_each_step(&["puter-emulator", "qemu-system"]);
}

/// Each write of each command is refused, and all that follow, as on a disk that is full or has become read-only: the
/// command says why, what was there is there, and it works once the disk does.
#[test]
#[ignore = "needs root"]
fn a_disk_that_refuses_any_write_is_told_and_loses_nothing() {
    let host = host();
    for (words, before) in CASES {
        // What is the same for any refusal is tried at each write, what is different at some.
        for (errno, why, step) in [(28, "No space left on device", 1), (30, "Read-only file system", 3)] {
            for first in (1..).step_by(step) {
                let what = format!("{words:?} of a VM {before:?}, from write {first} on: {why}");
                prepare(&host, before);
                let output = run(&host, &[("PUTER_FAIL_WRITES", &format!("{first}:{errno}"))], words);
                let said = text(&output.stderr);
                eprintln!("{what}: {} {}", output.status, said.trim().replace('\n', " | "));
                if output.status.success() && !said.contains(why) {
                    break;
                }
                assert!(said.contains(why), "{what}: {said}");
                // Room is made by stopping and deleting: these a full disk does not keep from their work. And a machine
                // can be stopped wherever its files are.
                let must = words[0] == "stop" || (errno == 28 && words[0] == "delete");
                assert_eq!(output.status.code(), Some(i32::from(!must)), "{what}: {said}");
                let there = host.json(&["list", "--json"]);
                match (words[0], before) {
                    ("start", Before::Absent) => {
                        // On a read-only disk what was made cannot be removed; the next command does that.
                        if errno == 30 {
                            let done = run(&host, &[], &["delete", "--force", "web"]).status.success();
                            assert_eq!(done, there != serde_json::json!([]), "{what}");
                        }
                        host.until(LIMIT, || host.leftovers().is_empty());
                    }
                    ("start", _) => {
                        assert_eq!(there[0]["status"], "stopped", "{what}");
                        host.until(LIMIT, || host.taps().is_empty() && host.processes(machine()).is_empty());
                    }
                    ("stop", _) => assert_eq!(there[0]["status"], "stopped", "{what}"),
                    _ if must => assert_eq!(there, serde_json::json!([]), "{what}"),
                    _ => assert_eq!(there[0]["name"], "web", "{what}"),
                }
            }
        }
    }
    mend(&host, "at the end");
    nothing_left(&host);
}

/// What is published while the VM runs, after a kill or a refused write at any step: what the state says, or what it will
/// say once the command is given again; and the monitor has neither more nor less.
#[test]
#[ignore = "needs root"]
fn a_change_of_published_ports_that_is_cut_off_is_whole_or_not_at_all() {
    let host = host();
    let (former, wanted) =
        (["set", "web", "--publish", "8080:7"], ["set", "web", "--publish", "8081:7", "--publish", "7"]);
    let listening = || -> Vec<u64> {
        let listed = host.json(&["port", "list", "--json"]);
        let all = listed.as_array().unwrap().iter();
        all.map(|port| {
            assert_eq!(port["listening"], true, "{listed}");
            port["host_port"].as_u64().unwrap()
        })
        .collect()
    };
    // What the kernel says, whatever puter believes (proc(5), state 0A).
    let sockets = || {
        let table = xtask::shell::output(host.world.root("cat").arg("/proc/net/tcp")).unwrap();
        let lines = table.lines().filter(|line| line.split_whitespace().nth(3) == Some("0A"));
        let ports =
            lines.filter_map(|line| u64::from_str_radix(line.split_whitespace().nth(1)?.split(':').nth(1)?, 16).ok());
        let mut ports: Vec<u64> = ports.filter(|port| ![53, 5000].contains(port)).collect();
        ports.sort_unstable();
        ports
    };
    let check = |what: &str| {
        let mut listed = listening();
        listed.sort_unstable();
        assert_eq!(sockets(), listed, "{what}");
        assert!(listed == [8080] || (listed.len() == 2 && listed[0] == 8081), "{what}: {listed:?}");
    };
    prepare(&host, Before::Running);
    host.ok(&former);
    check("before");
    for point in points(&host, &wanted, Before::Running) {
        host.ok(&former);
        let output = run(&host, &[("PUTER_FAIL_POINT", &point)], &wanted);
        assert_eq!(output.status.signal(), Some(9), "{point}: {}", text(&output.stderr));
        check(&point);
    }
    for first in 1.. {
        host.ok(&former);
        let output = run(&host, &[("PUTER_FAIL_WRITES", &format!("{first}:28"))], &wanted);
        check(&format!("from write {first} on"));
        if output.status.success() {
            break;
        }
        assert!(text(&output.stderr).contains("No space left on device"), "{}", text(&output.stderr));
        assert_eq!(listening(), [8080], "nothing has changed");
    }
    host.ok(&wanted);
    check("after");
    nothing_left(&host);
}

/// Commands on snapshots, with one taken of the VM under the name `kept`.
const SNAPSHOT_CASES: [(&[&str], Before); 6] = [
    (&["snapshot", "web", "--name", "more"], Before::Running),
    (&["snapshot", "web", "--name", "more"], Before::Stopped),
    (&["restore", "--force", "web", "kept"], Before::Running),
    (&["clone", "web@kept", "new"], Before::Running),
    (&["clone", "web", "new"], Before::Running),
    (&["snapshot", "delete", "web@more"], Before::Running),
];

/// As [`prepare`], with the snapshot `kept` alone, no clone, and `more` where that is to be deleted.
fn prepare_snapshots(host: &Host, words: &[&str], before: Before) {
    if host.json(&["list", "--json"]).as_array().unwrap().iter().any(|vm| vm["name"] == "new") {
        host.ok(&["delete", "--force", "new"]);
    }
    for snapshot in host.json(&["snapshots", "--json"]).as_array().unwrap() {
        // An automatic one whose command was killed goes with the next snapshot.
        if snapshot["name"] != "kept" && snapshot["automatic"] == false {
            host.ok(&["snapshot", "delete", &format!("web@{}", snapshot["id"].as_str().unwrap())]);
        }
    }
    prepare(host, before);
    if host.json(&["snapshots", "--json"]).as_array().unwrap().is_empty() {
        host.ok(&["snapshot", "web", "--name", "kept"]);
    }
    if words[1] == "delete" {
        host.ok(&["snapshot", "web", "--disk-only", "--name", "more"]);
    }
}

/// What holds after whatever happened to a command on snapshots: the source runs as it did, or does so after a start;
/// what is listed is whole; and a clone of the snapshot is made in the place of what there may be.
fn mend_snapshots(host: &Host, words: &[&str], before: Before, what: &str) {
    // Nobody has to do anything for a machine that stood still.
    if matches!(before, Before::Running) && words[0] != "restore" {
        host.until(LIMIT, || status(host) == "running");
        assert_eq!(host.ok(&["exec", "web", "--", "/bin/busybox", "hostname"]), "web", "{what}");
    }
    let list = host.json(&["list", "--json"]);
    let new = list.as_array().unwrap().iter().any(|vm| vm["name"] == "new");
    if words[0] == "clone" {
        if new && list[1]["status"] != "running" {
            host.ok(&["start", "new", "--memory", "256M"]);
        } else if !new {
            host.ok(&["clone", "web@kept", "new"]);
        }
        assert_eq!(host.ok(&["exec", "new", "--", "/bin/busybox", "hostname"]), "new", "{what}");
        host.ok(&["delete", "--force", "new"]);
    } else if status(host) != "running" {
        host.ok(START);
    }
    assert_eq!(host.ok(&["exec", "web", "--", "/bin/busybox", "hostname"]), "web", "{what}");
    assert_eq!(host.taps(), ["pt-web"], "{what}");
    // Every snapshot that is listed can be used, and nothing lies about.
    let kept = host.json(&["snapshots", "--json"]);
    assert!(kept.as_array().unwrap().len() <= 3, "{what}: {kept}");
    assert!(kept.as_array().unwrap().iter().any(|snapshot| snapshot["name"] == "kept"), "{what}: {kept}");
    for snapshot in kept.as_array().unwrap() {
        let directory = std::path::Path::new(snapshot["directory"].as_str().unwrap());
        assert!(directory.join("disk.qcow2").is_file(), "{what}: {snapshot}");
        let memory = directory.join("memory-ranges").is_file();
        assert_eq!(snapshot["has_memory"].as_bool(), Some(memory), "{what}: {snapshot}");
    }
    host.until(LIMIT, || host.processes(machine()).len() == 1 && host.processes("__thaw").is_empty());
}

#[test]
#[ignore = "needs root"]
fn a_command_on_snapshots_that_is_killed_at_any_step_is_mended_by_the_next() {
    let host = host();
    for (words, before) in SNAPSHOT_CASES {
        prepare_snapshots(&host, words, before);
        let own = ["snapshot", "restore", "clone"];
        let mut points = steps(&host, words);
        // Those of a start are killed by its own test.
        points.retain(|point| own.iter().any(|own| point.starts_with(own)) || point.contains("launched"));
        assert!(!points.is_empty());
        for point in points {
            let what = format!("{words:?} of a VM {before:?}, killed at '{point}'");
            eprintln!("{what}");
            prepare_snapshots(&host, words, before);
            let output = run(&host, &[("PUTER_FAIL_POINT", &point)], words);
            assert_eq!(output.status.signal(), Some(9), "{what}: {}", text(&output.stderr));
            mend_snapshots(&host, words, before, &what);
        }
    }
    prepare_snapshots(&host, SNAPSHOT_CASES[0].0, Before::Running);
    host.ok(&["delete", "--force", "--snapshots", "web"]);
    host.until(LIMIT, || host.processes("puter-monitor").is_empty());
    assert_eq!(host.leftovers(), Vec::<String>::new());
    assert!(!host.world.home().join("snapshot/web").exists());
}

#[test]
#[ignore = "needs root"]
fn a_disk_that_refuses_any_write_of_a_snapshot_or_clone_loses_nothing() {
    let host = host();
    let why = "No space left on device";
    for (words, before) in SNAPSHOT_CASES.into_iter().filter(|(words, _)| words[1] != "delete") {
        for first in 1.. {
            let what = format!("{words:?} of a VM {before:?}, from write {first} on");
            prepare_snapshots(&host, words, before);
            let count = || host.json(&["snapshots", "--json"]).as_array().unwrap().len();
            let snapshots = count();
            let output = run(&host, &[("PUTER_FAIL_WRITES", &format!("{first}:28"))], words);
            let said = text(&output.stderr);
            eprintln!("{what}: {} {}", output.status, said.trim().replace('\n', " | "));
            if !said.contains(why) {
                assert!(output.status.success(), "{what}: {said}");
                break;
            }
            // A note that the state is not written down is no failure: the snapshot is there.
            if !output.status.success() {
                assert_eq!((output.status.code(), count()), (Some(1), snapshots), "{what}: {said}");
                let list = host.json(&["list", "--json"]);
                assert_eq!(list.as_array().unwrap().len(), 1, "{what}: {list}");
            }
            mend_snapshots(&host, words, before, &what);
        }
    }
    prepare_snapshots(&host, SNAPSHOT_CASES[0].0, Before::Running);
}
