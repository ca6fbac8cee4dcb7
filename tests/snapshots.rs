//! Snapshots, restores and clones of small guests that really run.

#[path = "e2e/host.rs"]
mod host;

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use host::{Host, text};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(120);

/// A host with puterd and the small guest as its image.
fn host() -> Host {
    let host = Host::new();
    host.ready();
    host
}

/// Runs a line of shell in the guest.
fn sh(host: &Host, vm: &str, line: &str) -> String {
    host.ok(&["exec", vm, "--", "/bin/busybox", "sh", "-c", &format!("PATH=/bin:/sbin; alias b=busybox; {line}")])
}

fn info(host: &Host, vm: &str) -> Value {
    host.json(&["info", vm, "--json"])[0].clone()
}

fn status(host: &Host, vm: &str) -> String {
    info(host, vm)["status"].as_str().unwrap().to_string()
}

fn snapshots(host: &Host) -> Vec<Value> {
    host.json(&["snapshots", "--json"]).as_array().unwrap().clone()
}

fn names(directory: &std::path::Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn delete_all(host: &Host, vms: &[&str]) {
    host.ok(&[&["delete", "--force", "--snapshots"], vms].concat());
    host.until(LIMIT, || host.leftovers().is_empty());
    assert_eq!(names(&host.world.home().join("snapshot")), Vec::<String>::new());
}

#[test]
#[ignore = "needs root"]
fn a_machine_goes_on_as_it_was() {
    let host = host();
    host.ok(&["start", "web", "--memory", "256M"]);
    sh(&host, "web", "echo one >/run/memory; echo one >/root/disk; busybox sync");
    // Made when it is first asked for.
    let boot = sh(&host, "web", "busybox cat /proc/sys/kernel/random/boot_id");
    // A process with something in mind.
    sh(
        &host,
        "web",
        "(n=0; while :; do n=$((n+1)); echo $n >/run/count; busybox usleep 100000; done) >/dev/null 2>&1 &",
    );
    let told = host.ok(&["snapshot", "web", "--name", "before"]);
    assert!(told.starts_with("web@") && told.contains("'before' taken") && told.contains("paused for"), "{told}");
    assert_eq!(status(&host, "web"), "running");
    let generation = || sh(&host, "web", "busybox cat /run/puter/generation").parse::<u32>().unwrap();
    let first = generation();
    sh(&host, "web", "echo two >/run/memory; echo two >/root/disk; busybox sync");

    host.fails(&["restore", "web"], "would be lost", "give --force");
    let told = host.ok(&["restore", "--force", "web", "before"]);
    assert!(told.starts_with("web goes on from web@") && told.contains("at 10.0.0.11"), "{told}");
    assert_eq!(sh(&host, "web", "busybox cat /run/memory /root/disk"), "one\none");
    assert_eq!(sh(&host, "web", "echo 3 >/proc/sys/vm/drop_caches; busybox cat /root/disk"), "one");
    assert_eq!(sh(&host, "web", "busybox cat /proc/sys/kernel/random/boot_id"), boot, "it has not booted");
    let count = || sh(&host, "web", "busybox cat /run/count").parse::<u32>().unwrap_or(0);
    let now = count();
    host.until(LIMIT, || count() > now);
    // It is the same machine at a later time.
    assert_eq!(generation(), first + 1);
    let guest: f64 = sh(&host, "web", "busybox date +%s").parse().unwrap();
    assert!((guest - host.unix_time() as f64).abs() <= 2.0, "the clock is {guest}");
    assert_eq!(sh(&host, "web", "busybox hostname"), "web");
    let get = "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | busybox nc -w 10 203.0.113.1 80 | busybox tail -n 1";
    assert_eq!(sh(&host, "web", get), xtask::world::PAGE);

    // Again, from stopped, and the disk alone.
    host.ok(&["stop", "--force", "web"]);
    host.ok(&["restore", "web@before"]);
    assert_eq!(sh(&host, "web", "busybox cat /run/memory"), "one");
    sh(&host, "web", "echo three >/root/disk; busybox sync");
    let told = host.ok(&["restore", "--force", "--disk-only", "web"]);
    assert!(told.contains("and is stopped"), "{told}");
    host.ok(&["start", "web"]);
    assert_eq!(sh(&host, "web", "busybox cat /root/disk; busybox ls /run/memory 2>/dev/null; true"), "one");
    // The machine that came back can reboot and be stopped like any other.
    host.ok(&["restore", "--force", "web"]);
    sh(&host, "web", "busybox reboot");
    host.until(LIMIT, || {
        let output = host.world.puter(&["exec", "web", "--", "/bin/busybox", "cat", "/proc/sys/kernel/random/boot_id"]);
        output.is_ok_and(|output| output.status.success() && text(&output.stdout).trim() != boot)
    });
    host.ok(&["stop", "web"]);
    host.fails(&["delete", "web"], "has the snapshot web@", "give --snapshots");
    host.fails(&["restore", "web", "nothing"], "has no snapshot 'nothing'", "puter snapshots web");
    host.fails(&["snapshot", "web", "--name", "before"], "has a snapshot 'before' already", "another name");
    delete_all(&host, &["web"]);
}

/// The guest counts, in memory and with fsync on the disk; after each restore both tell the same.
#[test]
#[ignore = "needs root"]
fn memory_and_disk_are_of_one_instant() {
    let host = host();
    host.ok(&["start", "web", "--memory", "256M"]);
    // `begun` is written before the disk, `done` after it: the disk is at one of the two.
    let count = "n=0; while :; do n=$((n+1)); echo $n >/run/begun; echo $n >>/root/count; \
                 busybox fsync /root/count; echo $n >/run/done; done";
    sh(&host, "web", &format!("({count}) >/dev/null 2>&1 & echo $! >/run/pid"));
    let mut random = 7_u64;
    for round in 0..20 {
        // Moments that nobody chose (Knuth's multiplier).
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        std::thread::sleep(Duration::from_millis(random >> 55));
        host.ok(&["snapshot", "web", "--name", &format!("r{round}")]);
        // What it does after that must leave no trace.
        std::thread::sleep(Duration::from_millis(100));
        host.ok(&["restore", "--force", "web"]);
        // Stopped, and nothing of the disk in its memory any more.
        let look = "kill -STOP $(busybox cat /run/pid); echo 3 >/proc/sys/vm/drop_caches; \
                    echo begun $(busybox cat /run/begun); echo done $(busybox cat /run/done); \
                    echo disk $(busybox tail -n 1 /root/count); kill -CONT $(busybox cat /run/pid)";
        let seen = sh(&host, "web", look);
        let number = |word: &str| -> Option<u64> {
            seen.lines().find_map(|line| line.strip_prefix(word)).unwrap_or_default().trim().parse().ok()
        };
        let disk = number("disk").unwrap_or_else(|| panic!("round {round}: {seen}"));
        // One of the two files may be cut short at this moment, for the next number.
        let (begun, done) = match (number("begun"), number("done")) {
            (Some(begun), Some(done)) => (begun, done),
            (None, Some(done)) => (done + 1, done),
            (Some(begun), None) => (begun, begun - 1),
            (None, None) => panic!("round {round}: {seen}"),
        };
        assert!(done >= 1 && (done..=begun).contains(&disk), "round {round}: {seen}");
        if round > 0 {
            host.ok(&["snapshot", "delete", &format!("web@r{}", round - 1)]);
        }
    }
    // And what the snapshot itself holds is a file system that a loss of power could have left.
    let disk = snapshots(&host)[0]["directory"].as_str().unwrap().to_string();
    let raw = host.world.dir().join("disk.raw");
    let convert =
        Command::new("qemu-img").args(["convert", "-O", "raw", &format!("{disk}/disk.qcow2")]).arg(&raw).output();
    assert!(convert.unwrap().status.success());
    let e2fsck = |option: &str| {
        let output = Command::new("e2fsck").args(["-f", option]).arg(&raw).output().unwrap();
        (output.status.code(), text(&output.stdout))
    };
    // The journal is replayed first, as a boot does it.
    let replayed = e2fsck("-p");
    assert!(matches!(replayed.0, Some(0 | 1)), "{replayed:?}");
    assert_eq!(e2fsck("-n").0, Some(0));
    delete_all(&host, &["web"]);
}

/// What a machine is told apart by.
fn identity(host: &Host, vm: &str) -> Vec<String> {
    let line = "busybox hostname; busybox cat /etc/machine-id /sys/class/net/eth0/address; \
                busybox ip -4 -o address show dev eth0 | busybox awk '{print $4}'; busybox cat /run/puter/generation; \
                busybox head -c 16 /dev/urandom | busybox hexdump -ve '1/1 \"%02x\"'";
    sh(host, vm, line).lines().map(String::from).collect()
}

#[test]
#[ignore = "needs root"]
fn a_clone_is_a_new_machine_before_its_first_packet() {
    let host = host();
    host.ok(&["start", "web", "--memory", "256M"]);
    sh(&host, "web", "echo here >/run/memory");
    // Whatever wakes up in the clone goes on talking as the source.
    let talk = "while :; do busybox arping -q -U -c 1 -I eth0 10.0.0.11; echo x | busybox nc -w 1 -u 10.0.0.1 9; done";
    sh(&host, "web", &format!("({talk}) >/dev/null 2>&1 &"));
    // Into files: a pipe that nobody reads is soon full.
    let file = |name: &str| host.world.dir().join(name);
    let mut forwarding = host.world.root("bridge");
    forwarding.args(["-o", "monitor", "fdb"]).stdout(fs::File::create(file("fdb")).unwrap()).stderr(Stdio::null());
    let mut monitor = forwarding.spawn().unwrap();
    let mut capture = host.world.root("tcpdump");
    capture.args(["-l", "--immediate-mode", "-n", "-e", "-i", "puter0"]);
    capture.stdout(fs::File::create(file("frames")).unwrap()).stderr(Stdio::null());
    let mut capture = capture.spawn().unwrap();
    let boot = sh(&host, "web", "busybox cat /proc/sys/kernel/random/boot_id");
    let session = {
        // A session that goes on while the machine is cloned.
        let script =
            "#!/bin/busybox sh\ni=0; while [ $i -lt 100 ]; do echo tick; i=$((i+1)); busybox usleep 100000; done";
        sh(&host, "web", &format!("echo '{script}' >/run/ticks; busybox chmod +x /run/ticks"));
        sh(&host, "web", "(PATH=/bin busybox nc -l -p 7 -e /run/ticks) >/dev/null 2>&1 &");
        let mut client = host.world.root("sh");
        client.args(["-c", "for i in 1 2 3 4 5 6 7 8 9; do socat -u TCP:10.0.0.11:7 - && break; sleep 1; done"]);
        client.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
    };
    std::thread::sleep(Duration::from_secs(2));

    host.ok(&["clone", "web", "one", "two"]);
    let (web, one, two) = (identity(&host, "web"), identity(&host, "one"), identity(&host, "two"));
    assert_eq!([&web[0], &web[2], &web[3]], ["web", "52:54:00:00:00:0b", "10.0.0.11/24"]);
    for (name, seen) in [("one", &one), ("two", &two)] {
        let told = info(&host, name);
        let address = format!("{}/24", told["ip"].as_str().unwrap());
        assert_eq!(
            (&seen[0], &seen[2], &seen[3]),
            (&name.to_string(), &told["mac"].as_str().unwrap().to_string(), &address)
        );
        assert!(seen[1].len() == 32 && seen[1] != web[1]);
        assert_eq!(sh(&host, name, "busybox cat /run/memory"), "here");
        assert_eq!(sh(&host, name, "busybox cat /proc/sys/kernel/random/boot_id"), boot, "it has not booted");
        let get = "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | busybox nc -w 10 203.0.113.1 80 | busybox tail -n 1";
        assert_eq!(sh(&host, name, get), xtask::world::PAGE);
        // Counted on: a program that watches the file knows that it is somewhere else.
        assert_eq!(seen[4].parse::<u32>().unwrap(), web[4].parse::<u32>().unwrap() + 1);
        let millis = "busybox adjtimex | busybox awk '/time.tv_sec/ {s=$2} /time.tv_usec/ {u=$2} END {printf \"%d.%06d\", s, u}'";
        let before = now();
        let guest: f64 = sh(&host, name, millis).parse().unwrap();
        assert!(
            guest > before - 0.05 && guest < now() + 0.05,
            "the clock of {name}: {guest}, between {before} and {}",
            now()
        );
    }
    assert!(one[1] != two[1] && one[5] != two[5] && one[5] != web[5], "{one:?} {two:?} {web:?}");
    // The source has noticed nothing.
    let ticks = text(&session.wait_with_output().unwrap().stdout);
    assert_eq!(ticks.lines().filter(|line| *line == "tick").count(), 100);

    // The bridge learns from each frame that comes in: the source's MAC came by its own TAP alone.
    for pid in host.processes("monitor fdb") {
        host.world.root("kill").arg(&pid).status().unwrap();
    }
    monitor.wait().unwrap();
    let learned = fs::read_to_string(file("fdb")).unwrap();
    let by =
        |mac: &str, tap: &str| learned.lines().any(|line| line.contains(mac) && line.contains(&format!("dev {tap} ")));
    assert!(by(&one[2], "pt-one") && by(&two[2], "pt-two"), "{learned}");
    assert!(!by("52:54:00:00:00:0b", "pt-one") && !by("52:54:00:00:00:0b", "pt-two"), "{learned}");

    // Each frame that the bridge took from a clone names its own address, or none yet as DHCP has it.
    for pid in host.processes("tcpdump") {
        host.world.root("kill").args(["-INT", &pid]).status().unwrap();
    }
    capture.wait().unwrap();
    let frames = fs::read_to_string(file("frames")).unwrap();
    for (seen, tap) in [(&web, "pt-web"), (&one, "pt-one"), (&two, "pt-two")] {
        let sent = |line: &&str| line.split_whitespace().nth(1) == Some(seen[2].as_str());
        let own = seen[3].trim_end_matches("/24");
        let (mut all, mut named) = (0, 0);
        for frame in frames.lines().filter(sent) {
            all += 1;
            named += usize::from(frame.contains(&format!("{own}.")) || frame.contains(&format!("tell {own},")));
            for other in ["10.0.0.11", "10.0.0.12", "10.0.0.13"].into_iter().filter(|other| *other != own) {
                let from = [format!(": {other}."), format!(": {other} >"), format!("tell {other},")];
                assert!(from.iter().all(|from| !frame.contains(from)), "{tap}: {frame}");
            }
        }
        assert!(all > 0 && named > 0, "{tap}: {frames}");
    }

    // What nobody asked for takes no memory, and goes with the last that stands on it.
    let kept = snapshots(&host);
    assert_eq!(
        (kept.len(), &kept[0]["automatic"], &kept[0]["has_memory"]),
        (1, &true.into(), &false.into()),
        "{kept:?}"
    );
    assert_eq!(kept[0]["used_by"], serde_json::json!(["one", "two"]));
    let id = format!("web@{}", kept[0]["id"].as_str().unwrap());
    host.fails(&["snapshot", "delete", &id], "is needed by the VM one, the VM two", "--flatten");
    host.ok(&["delete", "--force", "web"]);
    host.ok(&["restart", "one"]);
    assert_eq!(identity(&host, "one")[..4], one[..4]);
    host.ok(&["delete", "--force", "one"]);
    assert_eq!(snapshots(&host).len(), 1);
    delete_all(&host, &["two"]);
}

fn now() -> f64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64()
}

#[test]
#[ignore = "needs root"]
fn clones_of_clones_go_deep_and_a_flat_one_stands_alone() {
    let host = host();
    host.ok(&["start", "m0", "--memory", "256M"]);
    sh(&host, "m0", "echo 0 >/root/0; busybox sync");
    for number in 1..=16 {
        let (from, to) = (format!("m{}", number - 1), format!("m{number}"));
        host.ok(&["clone", &from, &to]);
        sh(&host, &to, &format!("echo {number} >/root/{number}; busybox sync"));
        host.ok(&["delete", "--force", &from]);
    }
    let all: Vec<String> = (0..=16).map(|number| number.to_string()).collect();
    let look = "echo 3 >/proc/sys/vm/drop_caches; busybox cat $(busybox ls /root | busybox sort -n | busybox sed 's|^|/root/|')";
    assert_eq!(sh(&host, "m16", look).lines().collect::<Vec<_>>(), all);
    let overlay = info(&host, "m16")["overlay"].as_str().unwrap().to_string();
    let chain =
        Command::new("qemu-img").args(["info", "-U", "--backing-chain", "--output=json", &overlay]).output().unwrap();
    let chain: Vec<Value> = serde_json::from_slice(&chain.stdout).unwrap();
    assert!((3..=8).contains(&chain.len()), "{} disks", chain.len());

    // Of a stopped one there is a disk to clone; a flat one needs nobody.
    host.ok(&["stop", "m16"]);
    let told = host.ok(&["clone", "--flatten", "m16", "flat"]);
    assert!(told.contains("flat is made and stopped"), "{told}");
    host.ok(&["clone", "m16", "thin"]);
    host.ok(&["delete", "m16"]);
    let users: Vec<_> = snapshots(&host).iter().flat_map(|s| s["used_by"].as_array().unwrap().clone()).collect();
    assert!(users.contains(&"thin".into()) && !users.contains(&"flat".into()), "{users:?}");
    host.ok(&["delete", "thin"]);
    assert_eq!(snapshots(&host).len(), 0, "nobody stands on the chain any more");
    host.ok(&["start", "flat"]);
    assert_eq!(sh(&host, "flat", look).lines().collect::<Vec<_>>(), all);
    assert_eq!(sh(&host, "flat", "busybox hostname"), "flat");
    delete_all(&host, &["flat"]);
}

#[test]
#[ignore = "needs root"]
fn a_snapshot_that_is_damaged_or_of_elsewhere_is_found_out_before_anything_is_lost() {
    let host = host();
    host.ok(&["start", "web", "--memory", "256M"]);
    sh(&host, "web", "echo now >/run/memory");
    host.ok(&["snapshot", "web", "--name", "good"]);
    let directory = snapshots(&host)[0]["directory"].as_str().unwrap().to_string();
    let mut files = names(directory.as_ref());
    files.sort();
    // What QEMU has of processors and devices is in a file of its own.
    let emulated = xtask::world::hypervisor() == "emulated";
    let all = ["config.json", "disk.qcow2", "memory-ranges", "snapshot.json", "state.json", "vmstate"];
    assert_eq!(files, all[..if emulated { 6 } else { 5 }]);
    for file in &files {
        let path = format!("{directory}/{file}");
        let change = |how: &str| {
            xtask::shell::output(host.world.root("cp").args(["--preserve=all", &path, &format!("{path}.kept")]))
                .unwrap();
            xtask::shell::output(host.world.root("sh").args(["-c", how, &path])).unwrap();
            for command in [&["restore", "--force", "web"][..], &["clone", "web@good", "new"]] {
                let output = host.world.puter(command).unwrap();
                let said = text(&output.stderr);
                assert_eq!(output.status.code(), Some(1), "{file}, {how}: {said}");
                assert!(said.contains(file.as_str()) && said.contains("hint: "), "{file}, {how}: {said}");
            }
            xtask::shell::output(host.world.root("mv").args([&format!("{path}.kept"), &path])).unwrap();
        };
        change("truncate -s -1 \"$0\"");
        change("rm \"$0\"");
        // One byte in its midst, and the times as they were.
        if file != "snapshot.json" {
            change(
                "t=$(stat -c %y \"$0\"); n=$(stat -c %s \"$0\"); printf '\\252' | dd of=\"$0\" bs=1 seek=$((n/2)) conv=notrunc status=none; touch -d \"$t\" \"$0\"",
            );
        }
    }
    // The machine has gone on all the while, and the files are as good as before.
    assert_eq!(sh(&host, "web", "busybox cat /run/memory"), "now");
    assert_eq!(host.json(&["list", "--json"]).as_array().unwrap().len(), 1);
    host.ok(&["restore", "--force", "web"]);

    // Written by another hypervisor.
    let path = format!("{directory}/snapshot.json");
    let mut about: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    about["memory"]["hypervisor"] = "cloud-hypervisor v99.0".into();
    fs::write(&path, about.to_string()).unwrap();
    host.fails(&["restore", "--force", "web"], "written by cloud-hypervisor v99.0", "--disk-only");
    host.ok(&["clone", "--disk-only", "web@good", "new"]);
    host.ok(&["start", "new"]);
    assert_eq!(sh(&host, "new", "busybox hostname"), "new");
    host.fails(&["delete", "--force", "--snapshots", "web"], "is needed by the VM new", "--flatten");
    assert_eq!(status(&host, "web"), "running", "nothing is lost");
    host.ok(&["delete", "--force", "new"]);
    delete_all(&host, &["web"]);
}

/// Where the file system shares blocks, a snapshot of a large disk and ten clones of it take next to nothing.
#[test]
#[ignore = "needs root"]
fn a_disk_is_shared_where_the_file_system_can() {
    let host = Host::new();
    let reflinks = || {
        let output = host.world.puter(&["doctor", "--json"]).unwrap();
        let told: Value = serde_json::from_slice(&output.stdout).unwrap();
        let check = told["checks"].as_array().unwrap().iter().find(|check| check["name"] == "reflinks").cloned();
        check.unwrap()["state"].clone()
    };
    host.small_home(16 << 20);
    assert_eq!(reflinks(), "advice");
    host.xfs_home(2 << 30);
    assert_eq!(reflinks(), "ok");
    host.ready();
    host.ok(&["start", "web", "--memory", "256M"]);
    sh(&host, "web", "busybox dd if=/dev/urandom of=/root/large bs=1M count=300 2>/dev/null; busybox sync");
    let sum = sh(&host, "web", "busybox md5sum /root/large");
    host.ok(&["stop", "web"]);
    let free = || -> u64 {
        let mut command = host.world.root("stat");
        let told = xtask::shell::output(command.args(["-f", "-c", "%a %S"]).arg(host.world.home())).unwrap();
        let (blocks, size) = told.split_once(' ').unwrap();
        blocks.parse::<u64>().unwrap() * size.parse::<u64>().unwrap()
    };
    let before = free();
    host.ok(&["snapshot", "web", "--name", "large"]);
    let names: Vec<String> = (0..10).map(|number| format!("c{number}")).collect();
    let mut words = vec!["clone", "web@large"];
    words.extend(names.iter().map(String::as_str));
    host.ok(&words);
    host.ok(&["restore", "web", "large"]);
    let taken = before.saturating_sub(free());
    assert!(taken < 16 << 20, "{taken} bytes for a snapshot of 300 MB, ten clones and a restore");
    host.ok(&["start", "c9"]);
    assert_eq!(sh(&host, "c9", "busybox md5sum /root/large"), sum);

    // Of a machine's memory a second snapshot takes what changed since the first.
    host.ok(&["snapshot", "c9", "--name", "first"]);
    sh(&host, "c9", "busybox dd if=/dev/urandom of=/run/large bs=1M count=4 2>/dev/null");
    let before = free();
    let told = host.ok(&["snapshot", "c9", "--name", "second"]);
    let taken = before.saturating_sub(free());
    let all = host.json(&["snapshots", "c9", "--json"]);
    let second = all.as_array().unwrap().iter().find(|snapshot| snapshot["name"] == "second").unwrap();
    let (memory, shared) = (second["memory_used"].as_u64().unwrap(), second["memory_shared"].as_u64().unwrap());
    assert!(told.contains("of it shared with c9@"), "{told}");
    assert!(shared > memory / 2 && taken < memory / 2 + (4 << 20), "{taken} bytes taken, {shared} of {memory} shared");
    // Either is whole without the other.
    host.ok(&["snapshot", "delete", "c9@first"]);
    host.ok(&["restore", "--force", "c9@second"]);
    assert_eq!(sh(&host, "c9", "busybox md5sum /root/large"), sum);
    host.ok(&["delete", "--force", "--snapshots", "c9"]);
}

#[test]
#[ignore = "needs root"]
fn branches_are_a_tree_and_their_files_can_be_compared() {
    let host = host();
    host.ok(&["start", "web", "--memory", "256M"]);
    sh(&host, "web", "echo old >/root/changed; echo x >/root/gone; busybox mkdir -p /root/d; busybox sync");
    host.ok(&["snapshot", "web", "--name", "first"]);
    let change = "echo longer >/root/changed; busybox rm /root/gone; echo new >/root/d/new; \
                  busybox ln -s d /root/link; busybox chmod 700 /root/d; busybox sync";
    sh(&host, "web", change);
    host.ok(&["snapshot", "web", "--name", "second"]);
    host.ok(&["restore", "--force", "web", "first"]);
    host.ok(&["snapshot", "web", "--disk-only", "--name", "other"]);
    host.ok(&["clone", "web@second", "new"]);
    host.ok(&["stop", "--force", "new"]);

    let id = |name: &str| {
        let all = snapshots(&host);
        let found = all.iter().find(|snapshot| snapshot["name"] == name).unwrap();
        format!("web@{}", found["id"].as_str().unwrap())
    };
    let drawn: Vec<String> = host
        .ok(&["snapshots", "--tree"])
        .lines()
        .map(|line| line.split(',').next().unwrap().trim_end().to_string())
        .collect();
    let (first, second, other) = (id("first"), id("second"), id("other"));
    assert_eq!(
        drawn,
        [
            format!("{first} 'first'"),
            format!("├─ {second} 'second'"),
            "│  └─ new (stopped)".to_string(),
            format!("└─ {other} 'other'"),
            "   └─ web (running)".to_string(),
        ]
    );

    let told = host.ok(&["diff", "web@first", "web@second"]);
    let lines: Vec<&str> = told.lines().filter(|line| line.contains("/root")).collect();
    assert_eq!(
        lines,
        ["~ /root/changed (4B -> 7B)", "~ /root/d/", "+ /root/d/new (4B)", "- /root/gone (2B)", "+ /root/link (1B)"],
        "{told}"
    );
    assert!(told.lines().last().unwrap().contains("files differ; memory "), "{told}");
    let same = host.json(&["diff", "web@first", "web@first", "--json"]);
    assert_eq!(same["changes"], serde_json::json!([]));
    // With what a clone has become, and with a machine whose disk changes meanwhile.
    assert!(host.ok(&["diff", "web@first", "new"]).contains("+ /root/d/new"));
    host.fails(&["diff", "web@first", "web"], "its disk changes while it is read", "take a snapshot");
    host.ok(&["delete", "new"]);
    delete_all(&host, &["web"]);
}

#[test]
#[ignore = "needs root"]
fn what_cannot_be_snapshotted_says_so_and_a_full_disk_stops_nothing() {
    let host = Host::new();
    host.small_home(260 << 20);
    host.ready();
    host.fails(&["snapshot", "web"], "there is no VM named 'web'", "puter list");
    host.ok(&["start", "web", "--memory", "512M", "--disk", "1G"]);
    // Its memory in use is more than what is left.
    sh(
        &host,
        "web",
        "busybox mount -o remount,size=400m /run; busybox dd if=/dev/urandom of=/run/large bs=1M count=200 2>/dev/null",
    );
    host.fails(&["snapshot", "web"], "no disk space for a snapshot", "puter df");
    host.fails(&["clone", "web", "new"], "no disk space for a snapshot", "puter df");
    assert_eq!(status(&host, "web"), "running");
    let left = xtask::shell::output(host.world.root("ls").arg("-A").arg(host.world.home().join("snapshot/web")));
    assert_eq!(left.unwrap(), ".lock");
    sh(&host, "web", "busybox rm /run/large");
    host.ok(&["stop", "web"]);
    let told = host.ok(&["snapshot", "web"]);
    assert!(told.contains("taken of the disk"), "{told}");
    host.fails(&["clone", "web", "web"], "there is a VM 'web' already", "another name");
    host.fails(&["clone", "nobody", "new"], "there is no VM named 'nobody'", "puter list");
    host.fails(&["clone", "web@x/y", "new"], "is no name of a snapshot", "");
    delete_all(&host, &["web"]);
}
