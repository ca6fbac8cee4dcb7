//! Many commands at once on the same machines: whatever each of them comes to, what must always hold holds afterwards.

#[path = "e2e/host.rs"]
mod host;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use host::{Host, text};

const PROCESSES: u64 = 16;
const LENGTH: Duration = Duration::from_secs(60);
const NAMES: [&str; 5] = ["a", "b", "c", "web", "a-name-that-is-longer-than-an-interface"];

/// A command by chance, out of a generator that gives the same for the same seed (Knuth's MMIX).
fn command(random: &mut u64) -> Vec<&'static str> {
    let mut next = |below: u64| {
        *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*random >> 33) % below
    };
    let name = NAMES[next(NAMES.len() as u64) as usize];
    match next(10) {
        0..4 => vec!["start", name, "--memory", "128M", "--cpus", "1"],
        4 => vec!["start", name, "--no-wait", "--memory", "128M", "--cpus", "1"],
        5 => vec!["stop", name, "--timeout", "5"],
        6 => vec!["stop", "--force", name],
        7 => vec!["delete", "--force", name],
        8 => vec!["restart", "--force", name],
        _ => vec!["list", "--json"],
    }
}

#[test]
#[ignore = "needs root"]
fn sixteen_processes_at_random_leave_everything_in_order() {
    let host = Host::new();
    host.ready();

    let end = Instant::now() + LENGTH;
    let (done, failed) = std::thread::scope(|scope| {
        let host = &host;
        let work = |seed: u64| {
            let mut random = seed;
            let (mut done, mut failed) = (0, 0);
            while Instant::now() < end {
                let words = command(&mut random);
                let output = host.world.puter(&words).unwrap();
                let said = text(&output.stderr);
                match output.status.code() {
                    Some(0) => done += 1,
                    // One of many commands on a machine may come too late; it says so.
                    Some(1) if said.contains("puter: ") && !said.contains("bug of puter") => failed += 1,
                    code => panic!("puter {}: {code:?}: {said}", words.join(" ")),
                }
            }
            (done, failed)
        };
        let all: Vec<_> = (0..PROCESSES).map(|seed| scope.spawn(move || work(seed))).collect();
        all.into_iter().map(|one| one.join().unwrap()).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    });
    eprintln!("{done} commands did what they were to do, {failed} were refused or failed");
    assert!(done >= 10, "{done} of {}", done + failed);

    // What `--no-wait` left in the background, and the monitors of machines that were shot, come to their end.
    let active = || {
        let list = host.json(&["list", "--json"]);
        let all = list.as_array().unwrap().clone();
        all.into_iter().filter(|vm| vm["status"] != "stopped").collect::<Vec<_>>()
    };
    host.until(Duration::from_secs(120), || {
        let active = active();
        active.iter().all(|vm| vm["status"] == "running")
            && ["puter-emulator", "qemu-system", "vhost-device-vsock", "puter-monitor"]
                .iter()
                .all(|program| host.processes(program).len() == active.len())
            && host.processes("start-finish").is_empty()
    });
    let output = host.world.puter(&["list", "--json"]).unwrap();
    assert_eq!(text(&output.stderr), "", "every state file can be read");
    let list = host.json(&["list", "--json"]);
    let all = list.as_array().unwrap();
    for key in ["id", "mac", "ip", "tap", "cid", "name"] {
        let values: BTreeSet<String> = all.iter().map(|vm| vm[key].to_string()).collect();
        assert_eq!(values.len(), all.len(), "{key} is not each VM's own: {list}");
    }
    let mut taps = host.taps();
    taps.sort();
    let mut wanted: Vec<String> = active().iter().map(|vm| vm["tap"].as_str().unwrap().to_string()).collect();
    wanted.sort();
    assert_eq!(taps, wanted, "each TAP is one of a machine that runs");
    for vm in active() {
        let name = vm["name"].as_str().unwrap();
        assert_eq!(host.ok(&["exec", name, "--", "/bin/busybox", "hostname"]), name);
    }

    for vm in all {
        host.ok(&["delete", "--force", vm["name"].as_str().unwrap()]);
    }
    host.until(Duration::from_secs(30), || host.processes("puter-monitor").is_empty());
    assert_eq!(host.leftovers(), Vec::<String>::new());
    let states = host.world.home().join("state");
    let left: Vec<_> = std::fs::read_dir(states).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    let litter = left.iter().filter(|name| !name.to_string_lossy().starts_with(".ids") && *name != ".init.lock");
    assert_eq!(litter.collect::<Vec<_>>(), Vec::<&std::ffi::OsString>::new(), "no lock outlives its VM");
}
