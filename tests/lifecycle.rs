//! The life of a VM with real, small guests: how it ends by itself, what follows, its console and its logs.

#[path = "e2e/host.rs"]
mod host;

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use host::{Host, text};

const LIMIT: Duration = Duration::from_secs(60);

/// A host with puterd and the small guest as its image.
fn host() -> Host {
    let host = Host::new();
    host.ready();
    host
}

/// Runs BusyBox in the guest.
fn busybox(host: &Host, vm: &str, words: &[&str]) -> String {
    host.ok(&[&["exec", vm, "--", "/bin/busybox"], words].concat())
}

fn info(host: &Host, vm: &str) -> serde_json::Value {
    host.json(&["info", vm, "--json"])[0].clone()
}

fn status(host: &Host, vm: &str) -> String {
    info(host, vm)["status"].as_str().unwrap().to_string()
}

/// A `puter console` in the background.
struct Console {
    child: Child,
    shown: Arc<Mutex<Vec<u8>>>,
}

impl Console {
    fn attach(mut command: Command) -> Console {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut output = child.stdout.take().unwrap();
        let shown = Arc::new(Mutex::new(Vec::new()));
        let screen = shown.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = output.read(&mut buffer) {
                screen.lock().unwrap().extend(&buffer[..length]);
            }
        });
        Console { child, shown }
    }

    fn puter(host: &Host, vm: &str) -> Console {
        let mut command = host.world.command("puter");
        command.args(["console", vm]);
        Console::attach(command)
    }

    fn shows(&self, what: &str) -> bool {
        String::from_utf8_lossy(&self.shown.lock().unwrap()).contains(what)
    }

    fn types(&mut self, keys: &str) {
        self.child.stdin.as_mut().unwrap().write_all(keys.as_bytes()).unwrap();
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "needs root"]
fn a_console_is_for_many_shows_the_past_and_outlives_its_monitor() {
    let host = host();
    host.ok(&["start", "web", "--memory", "256M"]);
    let mut first = Console::puter(&host, "web");
    // Written before anybody attached.
    host.until(LIMIT, || first.shows("login:"));
    first.types("root\n");
    host.until(LIMIT, || first.shows("/root #"));
    let second = Console::puter(&host, "web");
    host.until(LIMIT, || second.shows("/root #"));
    first.types("echo six times seven is $((6 * 7))\n");
    host.until(LIMIT, || first.shows("seven is 42") && second.shows("seven is 42"));
    assert!(host.ok(&["logs", "web"]).contains("seven is 42"));

    // The key that detaches, typed on a terminal.
    let mut command = host.world.command("script");
    command.args(["--quiet", "--return", "--command", "puter console web", "/dev/null"]);
    let mut third = Console::attach(command);
    host.until(LIMIT, || third.shows("Ctrl-] detaches") && third.shows("seven is 42"));
    third.types("\x1d");
    host.until(LIMIT, || third.shows("detached from the console of 'web'"));
    assert!(third.child.wait().unwrap().success());

    // A monitor that is shot takes no machine along, and the next who attaches gets another.
    let monitors = host.processes("puter-monitor");
    assert_eq!(monitors.len(), 1, "{monitors:?}");
    assert!(host.world.root("kill").args(["-KILL", &monitors[0]]).status().unwrap().success());
    host.until(LIMIT, || host.processes("puter-monitor").is_empty());
    let mut fourth = Console::puter(&host, "web");
    host.until(LIMIT, || fourth.shows("seven is 42"));
    fourth.types("echo two times three is $((2 * 3))\n");
    host.until(LIMIT, || fourth.shows("three is 6"));
    assert_eq!(status(&host, "web"), "running");

    // Who follows the logs sees the last line, and then the end.
    let mut logs = host.world.command("puter");
    let logs = logs.args(["logs", "--follow", "web"]).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    host.ok(&["stop", "web"]);
    let told = text(&logs.wait_with_output().unwrap().stdout);
    assert!(told.contains("three is 6") && told.contains("Power down"), "{told}");
    host.fails(&["console", "web"], "'web' is stopped", "puter start web");
    host.until(LIMIT, || host.processes("puter-monitor").is_empty());
    host.ok(&["delete", "web"]);
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

#[test]
#[ignore = "needs root"]
fn a_machine_that_ends_by_itself_is_put_in_order_at_once() {
    let host = host();
    host.ok(&["start", "web", "--memory", "256M"]);
    let pid = info(&host, "web")["pid"].clone();

    // A reboot is none of puter's business: the same process goes on, and the agent is back.
    let boot = busybox(&host, "web", &["cat", "/proc/sys/kernel/random/boot_id"]);
    busybox(&host, "web", &["reboot"]);
    let rebooted = || {
        let output = host.world.puter(&["exec", "web", "--", "/bin/busybox", "cat", "/proc/sys/kernel/random/boot_id"]);
        output.is_ok_and(|output| output.status.success() && text(&output.stdout).trim() != boot)
    };
    host.until(LIMIT, rebooted);
    assert_eq!(info(&host, "web")["pid"], pid);
    assert_eq!(status(&host, "web"), "running");

    // A power-off is the end: nobody has to call a command to have its network back.
    busybox(&host, "web", &["poweroff"]);
    host.until(LIMIT, || host.processes("puter-monitor").is_empty() && host.taps().is_empty());
    let ended = info(&host, "web");
    assert_eq!((&ended["status"], &ended["exit"]["reason"]), (&"stopped".into(), &"powered-off".into()));
    assert!(host.ok(&["info", "web"]).contains("the guest powered off"));

    // A panic too, with the kernel's own words in the log.
    host.ok(&["start", "web"]);
    assert!(info(&host, "web")["exit"].is_null(), "that was the end of another run");
    let _ = host.world.puter(&["exec", "web", "--", "/bin/busybox", "sh", "-c", "echo c >/proc/sysrq-trigger"]);
    host.until(LIMIT, || status(&host, "web") == "stopped");
    host.until(LIMIT, || info(&host, "web")["exit"]["reason"] == "panicked");
    assert!(host.ok(&["logs", "web"]).contains("Kernel panic"));

    // What the kernel does when memory runs out.
    host.ok(&["start", "web"]);
    let pid = info(&host, "web")["pid"].to_string();
    assert!(host.world.root("kill").args(["-KILL", &pid]).status().unwrap().success());
    host.until(LIMIT, || info(&host, "web")["exit"]["reason"] == serde_json::json!({ "killed": 9 }));
    host.until(LIMIT, || host.taps().is_empty() && host.processes("qemu-system").is_empty());
    assert!(host.ok(&["info", "web"]).contains("ended by signal 9"));

    // A number that belongs to another process by now is not believed.
    let state = host.world.home().join("state/web.json");
    let mut told: serde_json::Value = serde_json::from_slice(&std::fs::read(&state).unwrap()).unwrap();
    told["status"] = "running".into();
    told["process"] = serde_json::json!({ "pid": 1, "start_time": 1 });
    std::fs::write(&state, told.to_string()).unwrap();
    assert_eq!(status(&host, "web"), "stopped");
    host.ok(&["start", "web"]);
    host.ok(&["delete", "--force", "web"]);
    host.until(LIMIT, || host.processes("puter-monitor").is_empty());
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

#[test]
#[ignore = "needs root"]
fn a_machine_starts_again_where_its_policy_says_so() {
    let host = host();
    host.ok(&["start", "web", "--memory", "256M", "--restart", "on-failure"]);
    let shoot = || {
        let pid = info(&host, "web")["pid"].clone();
        assert!(host.world.root("kill").args(["-KILL", &pid.to_string()]).status().unwrap().success());
        pid
    };
    let former = shoot();
    let back = |former: &serde_json::Value| {
        let now = info(&host, "web");
        now["status"] == "running" && now["pid"] != *former
    };
    host.until(LIMIT, || back(&former));
    assert_eq!(info(&host, "web")["retry"]["count"], 1);
    // A guest that powers off has not failed.
    busybox(&host, "web", &["poweroff"]);
    host.until(LIMIT, || host.processes("puter-monitor").is_empty());
    assert_eq!(status(&host, "web"), "stopped");

    host.ok(&["start", "web", "--restart", "always"]);
    assert!(info(&host, "web")["retry"].is_null(), "the user's own start begins the count anew");
    let former = info(&host, "web")["pid"].clone();
    busybox(&host, "web", &["poweroff"]);
    host.until(LIMIT, || back(&former));
    // A stop by the user is the end, also while a restart is due.
    host.ok(&["stop", "web"]);
    host.until(LIMIT, || host.processes("puter-monitor").is_empty());
    assert_eq!(status(&host, "web"), "stopped");
    host.ok(&["start", "web"]);
    host.ok(&["daemon", "stop"]);
    shoot();
    // Without puterd it cannot start; it is tried again.
    host.until(LIMIT, || info(&host, "web")["retry"]["count"].as_u64().is_some_and(|count| count >= 2));
    host.ok(&["stop", "web"]);
    host.ok(&["daemon", "start"]);
    host.until(LIMIT, || host.processes("puter-monitor").is_empty());
    assert_eq!(status(&host, "web"), "stopped");
    assert!(info(&host, "web")["retry"].is_null());
}

#[test]
#[ignore = "needs root"]
fn a_directory_of_the_host_is_in_the_guest_and_read_only_means_it() {
    let host = host();
    let shared = host.world.dir().join("home/shared");
    let other = host.world.dir().join("home/other");
    for (directory, file) in [(&shared, "from-host"), (&other, "fixed")] {
        let script = "mkdir -p \"$0\" && echo written by the host >\"$0/$1\"";
        let mut command = host.world.command("sh");
        xtask::shell::output(command.args(["-c", script]).arg(directory).arg(file)).unwrap();
    }
    let mounts = [format!("{}:/data", shared.display()), format!("{}:/fixed:ro", other.display())];
    let start = ["start", "web", "--memory", "256M", "--mount", &mounts[0], "--mount", &mounts[1]];
    host.fails(&start, "virtiofsd", "install virtiofsd");
    assert_eq!(host.leftovers(), Vec::<String>::new());
    std::fs::copy(host::variable("PUTER_TEST_VIRTIOFSD"), host.world.dir().join("bin/virtiofsd")).unwrap();
    host.ok(&start);

    assert_eq!(busybox(&host, "web", &["cat", "/data/from-host"]), "written by the host");
    busybox(&host, "web", &["sh", "-c", "echo written by the guest >/data/from-guest; sync"]);
    assert_eq!(std::fs::read_to_string(shared.join("from-guest")).unwrap(), "written by the guest\n");
    assert_eq!(busybox(&host, "web", &["cat", "/fixed/fixed"]), "written by the host");
    // The guest's root may mount it as it likes: the host has the last word.
    let script = "umount /fixed && mount -t virtiofs puter1 /fixed && echo x >/fixed/mine";
    let output = host.world.puter(&["exec", "web", "--", "/bin/busybox", "sh", "-c", script]).unwrap();
    assert_ne!(output.status.code(), Some(0));
    assert!(!other.join("mine").exists());
    assert!(host.ok(&["info", "web"]).contains(&mounts[1]));

    // They outlive a stop and a start, and go with `set`.
    host.ok(&["stop", "web"]);
    host.until(LIMIT, || host.processes("virtiofsd").is_empty());
    host.ok(&["start", "web"]);
    assert_eq!(busybox(&host, "web", &["cat", "/data/from-guest"]), "written by the guest");
    host.fails(&["set", "web", "--no-mount"], "'web' is running", "puter stop web");
    host.ok(&["stop", "web"]);
    host.ok(&["set", "web", "--no-mount"]);
    let gone = format!("{}:/gone", host.world.dir().join("home/gone").display());
    host.ok(&["set", "web", "--mount", &gone]);
    host.fails(&["start", "web"], "cannot share", "");
    host.ok(&["delete", "web"]);
    host.until(LIMIT, || host.processes("virtiofsd").is_empty());
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

#[test]
#[ignore = "needs root"]
fn a_vm_is_isolated_when_it_is_made_or_while_it_runs() {
    let host = host();
    host.ok(&["start", "web", "db", "--memory", "256M"]);
    let reaches = |from: &str, address: &str| {
        let ping = ["exec", from, "--", "/bin/busybox", "ping", "-c", "1", "-W", "2", address];
        host.world.puter(&ping).unwrap().status.success()
    };
    // Which of them was first is chance.
    let ip = |vm: &str| info(&host, vm)["ip"].as_str().unwrap().to_string();
    let (web, db) = (ip("web"), ip("db"));
    let (web, db) = (web.as_str(), db.as_str());
    assert!(reaches("web", db) && reaches("db", web));
    assert!(host.ok(&["set", "web", "--isolate", "yes"]).ends_with(", isolated"));
    assert_eq!(info(&host, "web")["isolate"], true);
    assert!(host.ok(&["info", "web"]).contains("isolated:"));
    assert!(!reaches("web", db) && !reaches("db", web));
    assert!(reaches("web", "10.0.0.1") && reaches("web", "203.0.113.1"), "the host and the outside are there");
    // It stays so, for its clones too.
    host.ok(&["restart", "web"]);
    assert!(!reaches("web", db) && !reaches("db", web));
    host.ok(&["stop", "web"]);
    host.ok(&["clone", "web", "copy"]);
    assert_eq!(info(&host, "copy")["isolate"], true);
    host.ok(&["set", "web", "--isolate", "no"]);
    host.ok(&["start", "web"]);
    assert!(reaches("web", db) && reaches("db", web));
    // The setting is for new ones alone; the option comes before it.
    let with = |args: &[&str]| {
        let output = host.world.command_with(&[("PUTER_ISOLATE", "yes")], "puter").args(args).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
    };
    with(&["start", "alone", "--memory", "256M"]);
    with(&["restart", "web"]);
    assert_eq!((&info(&host, "alone")["isolate"], &info(&host, "web")["isolate"]), (&true.into(), &false.into()));
    assert!(!reaches("alone", web));
}

#[test]
#[ignore = "needs root"]
fn traffic_goes_on_whatever_happens_to_puterd() {
    let host = host();
    host.ok(&["start", "web", "--memory", "256M"]);
    let get = "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | /bin/busybox nc -w 10 203.0.113.1 80 | /bin/busybox tail -n 1";
    let page = || busybox(&host, "web", &["sh", "-c", get]);
    assert_eq!(page(), xtask::world::PAGE);
    let shoot = || {
        for puterd in host.processes("puterd ") {
            assert!(host.world.root("kill").args(["-KILL", &puterd]).status().unwrap().success());
        }
        host.until(LIMIT, || host.processes("puterd ").is_empty());
    };
    shoot();
    assert_eq!(page(), xtask::world::PAGE, "puterd is dead");
    host.fails(&["start", "db"], "puterd does not run", "puter daemon start");
    host.ok(&["daemon", "start"]);
    // The lease is as it was, and can be had anew.
    let ask = "/bin/busybox udhcpc -i eth0 -n -q -s /bin/busybox 2>&1; true";
    let lease = busybox(&host, "web", &["sh", "-c", ask]);
    assert!(lease.contains("lease of 10.0.0.11 obtained"), "{lease}");
    assert_eq!(page(), xtask::world::PAGE);
    host.ok(&["daemon", "stop"]);
    assert_eq!(page(), xtask::world::PAGE, "puterd was stopped");
    assert_eq!(host.taps(), ["pt-web"]);
    // A machine that ends meanwhile cannot give its TAP back; the next command that can does so.
    host.ok(&["stop", "web"]);
    host.ok(&["daemon", "start"]);
    host.ok(&["start", "web", "db", "--memory", "256M"]);
    assert_eq!(page(), xtask::world::PAGE);
    shoot();
    host.ok(&["daemon", "start"]);
    assert_eq!(host.ok(&["daemon", "start"]), "puterd runs already");
    assert_eq!(host.processes("puterd ").len(), 1);
    // Two at once: one of them starts it.
    host.ok(&["daemon", "stop"]);
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..4).map(|_| scope.spawn(|| host.ok(&["daemon", "start"]))).collect();
        let told: Vec<String> = all.into_iter().map(|one| one.join().unwrap()).collect();
        assert_eq!(told.iter().filter(|told| told.contains("puterd runs (process")).count(), 1, "{told:?}");
    });
    assert_eq!(host.processes("puterd ").len(), 1);
    assert_eq!(page(), xtask::world::PAGE);
    host.ok(&["delete", "--force", "web", "db"]);
    host.until(LIMIT, || host.leftovers().is_empty());
}

#[test]
#[ignore = "needs root"]
fn a_home_that_is_read_only_or_anothers_is_told_and_its_machines_can_be_stopped() {
    let host = Host::new();
    host.small_home(2 << 30);
    host.ready();
    host.ok(&["start", "web", "--memory", "256M"]);
    let remount = |how: &str| {
        let mut command = host.world.root("mount");
        xtask::shell::output(command.args(["-o", &format!("remount,{how}")]).arg(host.world.home())).unwrap();
    };
    // A disk that the guest holds open for writing keeps the mount from changing: a bind mount changes alone.
    let mut bind = host.world.root("mount");
    xtask::shell::output(bind.args(["--bind"]).arg(host.world.home()).arg(host.world.home())).unwrap();
    remount("bind,ro");
    assert_eq!(status(&host, "web"), "running");
    assert_eq!(busybox(&host, "web", &["hostname"]), "web");
    host.fails(&["start", "db"], "Read-only file system", "writable again");
    host.fails(&["set", "web", "--restart", "always"], "Read-only file system", "writable again");
    host.fails(&["delete", "--force", "web"], "Read-only file system", "writable again");
    assert!(host.ok(&["image", "list"]).lines().nth(1).unwrap().ends_with(" web"));
    for words in
        [&["image", "prune"][..], &["image", "delete", "localhost:5000/puter/small"], &["image", "pull", "oci:/x"]]
    {
        host.fails(words, "Read-only file system", "writable again");
    }
    host.ok(&["stop", "--force", "web"]);
    assert_eq!(status(&host, "web"), "stopped");
    remount("bind,rw");
    host.ok(&["start", "web"]);
    assert_eq!(busybox(&host, "web", &["hostname"]), "web");
    host.ok(&["delete", "--force", "web"]);
    host.until(LIMIT, || host.leftovers().is_empty());

    let mut other = host.world.root(host.world.dir().join("bin/puter"));
    let output = other.arg("start").arg("web").env("PUTER_HOME", host.world.home()).output().unwrap();
    let said = text(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("belongs to user") && said.contains("hint: "), "{said}");
}

#[test]
#[ignore = "needs root"]
fn what_a_guest_deletes_comes_back_to_the_host() {
    let host = host();
    host.ok(&["start", "web", "--memory", "256M"]);
    let used = || info(&host, "web")["overlay_used"].as_u64().unwrap();
    let before = used();
    busybox(
        &host,
        "web",
        &["sh", "-c", "/bin/busybox dd if=/dev/urandom of=/root/large bs=1M count=64; /bin/busybox sync"],
    );
    let full = used();
    assert!(full >= before + (60 << 20), "{before} {full}");
    busybox(&host, "web", &["sh", "-c", "/bin/busybox rm /root/large; /bin/busybox sync; /bin/busybox fstrim /"]);
    host.until(LIMIT, || used() < before + (16 << 20));
    let shown = host.ok(&["df"]);
    let row = |line: &str| line.split_whitespace().take(2).eq(["vm", "web"]);
    assert!(shown.lines().any(row), "{shown}");
    let usage = host.json(&["df", "--json"]);
    assert_eq!(usage["images"][0]["used_by"], serde_json::json!(["web"]));
    assert!(usage["vms"][0]["overlay"].as_u64().unwrap() < full, "{usage}");
}

#[test]
#[ignore = "needs root"]
fn doctor_mends_what_the_user_agrees_to() {
    let host = Host::new();
    let image = host.push_small_guest();
    let missing = |report: &serde_json::Value| -> Vec<String> {
        let checks = report["checks"].as_array().unwrap().iter();
        checks.filter(|check| check["state"] == "missing").map(|check| check["name"].as_str().unwrap().into()).collect()
    };
    let examine = || {
        let output = host.world.puter(&["doctor", "--json"]).unwrap();
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(i32::from(report["ready"] == false)));
        report
    };
    assert_eq!(missing(&examine()), ["puterd", "image"]);
    // One who says no gets nothing done.
    let mut command = host.world.command("script");
    command.args(["--quiet", "--return", "--command", "puter doctor --fix", "/dev/null"]);
    let mut asked = Console::attach(command);
    host.until(LIMIT, || asked.shows("run `puter daemon start`? [y/N]"));
    asked.types("n\n");
    assert_eq!(asked.child.wait().unwrap().code(), Some(1));
    assert_eq!(missing(&examine()), ["puterd", "image"]);
    // And one who agrees has it; what needs an answer of his own is told.
    let output = host.world.puter(&["doctor", "--fix", "--yes", "--json"]).unwrap();
    let said = text(&output.stderr);
    for part in ["  running: puter daemon start\n", "\n  mended\n", "this needs you: puter init"] {
        assert!(said.contains(part), "{said}");
    }
    assert_eq!(missing(&serde_json::from_slice(&output.stdout).unwrap()), ["image"]);
    host.ok(&["init", "--image", &image]);
    assert_eq!(examine()["ready"], true);
}

#[test]
#[ignore = "needs root"]
fn a_guest_that_does_not_come_up_tells_why_and_leaves_nothing() {
    let host = Host::new();
    let image = host.push_small_guest();
    host.ok(&["daemon", "start"]);
    // Without its initrd the kernel finds no disk, and panics before it knows the device by which it could tell.
    host.ok(&["init", "--image", &image]);
    std::fs::remove_file(host.world.home().join("initrd")).unwrap();
    let output = host.world.command_with(&[("PUTER_START_TIMEOUT", "10")], "puter").args(["start", "web"]).output();
    let output = output.unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for part in
        ["did not answer within 10 s", "the guest's last lines", "Unable to mount root fs", "PUTER_START_TIMEOUT"]
    {
        assert!(said.contains(part), "{part}: {said}");
    }
    host.until(LIMIT, || host.leftovers().is_empty() && host.processes("qemu-system").is_empty());
}

#[test]
#[ignore = "needs root"]
fn many_programs_run_at_once_each_with_its_own_ends() {
    let host = host();
    host.ok(&["start", "web", "--memory", "256M"]);
    std::thread::scope(|scope| {
        for number in 0..12 {
            let host = &host;
            scope.spawn(move || {
                let script = format!("printf in{number} | puter exec web -- /bin/busybox sh -c 'cat; echo err{number} >&2; exit {number}'");
                let output = host.world.command("sh").args(["-c", &script]).output().unwrap();
                assert_eq!(output.status.code(), Some(number));
                assert_eq!(text(&output.stdout), format!("in{number}"));
                assert_eq!(text(&output.stderr).trim(), format!("err{number}"));
            });
        }
    });
    // On a terminal of its own, which has the size of the user's.
    let mut command = host.world.command("script");
    let line = "stty rows 33 columns 99; puter exec web -- /bin/busybox sh -c 'stty size; stty size | tr \" \" x'";
    command.args(["--quiet", "--return", "--command", line, "/dev/null"]);
    let shown = Console::attach(command);
    host.until(LIMIT, || shown.shows("33 99") && shown.shows("33x99"));
}
