//! Published ports with real, small guests.

#[path = "e2e/host.rs"]
mod host;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use host::{Host, text};
use serde_json::Value;
use xtask::shell::output;

const LIMIT: Duration = Duration::from_secs(60);

/// A host with puterd, the small guest as its image, and the tests' server and client.
fn host() -> Host {
    let host = Host::new();
    host.ready();
    let rustc = Path::new(env!("CARGO")).with_file_name("rustc");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/ports/peer.rs");
    let mut command = Command::new(rustc);
    command.args(["--edition=2024", "-O", "-Cstrip=symbols", "-Ctarget-feature=+crt-static", "-o"]);
    output(command.arg(peer(&host)).arg(source)).unwrap();
    host
}

fn peer(host: &Host) -> std::path::PathBuf {
    host.world.dir().join("bin/peer")
}

/// Has the guest answer on this port, by TCP and UDP.
fn serve(host: &Host, vm: &str, port: &str) {
    host.ok(&["cp", peer(host).to_str().unwrap(), &format!("{vm}:/root/peer")]);
    let script = format!("/root/peer serve {port} </dev/null >/dev/null 2>&1 &");
    host.ok(&["exec", vm, "--", "/bin/busybox", "sh", "-c", &script]);
    let listens = format!("/bin/busybox netstat -lnu | /bin/busybox grep -q ':{port} '");
    host.until(LIMIT, || {
        host.world.puter(&["exec", vm, "--", "/bin/busybox", "sh", "-c", &listens]).unwrap().status.success()
    });
}

/// What a client on the host hears, or how it fails.
fn ask(host: &Host, protocol: &str, address: &str) -> String {
    output(host.world.command("peer").args([protocol, address, "hello"])).unwrap()
}

/// The published ports, as `SPEC listens` or `SPEC does not: WHY`.
fn list(host: &Host, words: &[&str]) -> Vec<String> {
    let all = host.json(&[&["port", "list", "--json"], words].concat());
    let line = |port: &Value| {
        let why = port["why"].as_str().unwrap_or("stopped");
        let how = if port["listening"] == true { "listens".into() } else { format!("does not: {why}") };
        format!("{} {} {how}", port["vm"].as_str().unwrap(), port["spec"].as_str().unwrap())
    };
    all.as_array().unwrap().iter().map(line).collect()
}

/// What is in `run/`, locks included.
fn run_files(host: &Host) -> Vec<String> {
    let files = fs::read_dir(host.world.home().join("run")).unwrap();
    files.map(|file| file.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

/// A connection that is open.
struct Held {
    child: Child,
    said: BufReader<std::process::ChildStdout>,
}

impl Held {
    fn new(host: &Host, address: &str) -> Held {
        let mut command = host.world.command("peer");
        let mut child = command.args(["hold", address]).stdout(Stdio::piped()).spawn().unwrap();
        let mut held = Held { said: BufReader::new(child.stdout.take().unwrap()), child };
        assert_eq!(held.line(), "held");
        held
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.said.read_line(&mut line).unwrap();
        line.trim_end().to_string()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "needs root"]
fn a_published_port_leads_to_the_guest_as_long_as_it_runs() {
    let host = host();
    let specs = ["8080:7", "[::1]:8080:7", "0.0.0.0:5353:7/udp", "7"];
    let publish: Vec<&str> = specs.iter().flat_map(|spec| ["--publish", spec]).collect();
    let told = host.ok(&[&["start", "web", "--memory", "256M"][..], &publish].concat());
    assert!(told.contains("web publishes 7/tcp at 127.0.0.1:8080\n"), "{told}");
    let info = host.json(&["info", "web", "--json"])[0].clone();
    let chosen = info["ports"][3]["host_port"].as_u64().unwrap();
    assert!(chosen >= 1024 && told.contains(&format!("web publishes 7/tcp at 127.0.0.1:{chosen}")), "{told}");
    assert!(host.ok(&["info", "web"]).contains("127.0.0.1:8080:7/tcp"));

    // Nobody listens in the guest yet: a client is refused as it would be there.
    assert_eq!(ask(&host, "tcp", "127.0.0.1:8080"), "ConnectionReset");
    serve(&host, "web", "7");
    let any = format!("127.0.0.1:{chosen}");
    for address in ["127.0.0.1:8080", "[::1]:8080", &any] {
        assert_eq!(ask(&host, "tcp", address), "hello (5 bytes)", "{address}");
    }
    for address in ["127.0.0.1:5353", "203.0.113.2:5353"] {
        assert_eq!(ask(&host, "udp", address), "hello", "{address}");
    }
    assert_eq!(ask(&host, "tcp", "203.0.113.2:8080"), "ConnectionRefused", "the loopback alone");
    let whole = |how: &str| {
        let any = format!("127.0.0.1:{chosen}:7/tcp");
        let specs = ["127.0.0.1:8080:7/tcp", "[::1]:8080:7/tcp", "0.0.0.0:5353:7/udp", &any];
        specs.map(|spec| format!("web {spec} {how}"))
    };
    assert_eq!(list(&host, &[]), whole("listens"));

    // While it runs they come and go, and the others keep their connections.
    let mut held = [Held::new(&host, "127.0.0.1:8080"), Held::new(&host, &any)];
    let told = host.ok(&["port", "add", "web", "8081:7", "8081:7/udp"]);
    assert!(told.ends_with("web publishes 7/udp at 127.0.0.1:8081"), "{told}");
    assert_eq!(ask(&host, "tcp", "127.0.0.1:8081"), "hello (5 bytes)");
    assert_eq!(ask(&host, "udp", "127.0.0.1:8081"), "hello");
    host.ok(&["port", "remove", "web", "8081:7", "8081:7/udp", "7"]);
    assert_eq!(ask(&host, "tcp", "127.0.0.1:8081"), "ConnectionRefused");
    assert_eq!(held[1].line(), "ConnectionReset", "its port is gone");
    assert_eq!(list(&host, &["web"]), whole("listens")[..3]);
    host.ok(&["port", "add", "web", &format!("{chosen}:7")]);

    // A monitor that is killed takes the ports along; whoever asks for them has them back.
    let shoot = || {
        let monitors = host.processes("puter-monitor");
        assert_eq!(monitors.len(), 1, "{monitors:?}");
        assert!(host.world.root("kill").args(["-KILL", &monitors[0]]).status().unwrap().success());
        host.until(LIMIT, || host.processes("puter-monitor").is_empty());
    };
    shoot();
    assert_eq!(held[0].line(), "ConnectionReset");
    // It listens until the kernel has let its last thread go.
    host.until(LIMIT, || ask(&host, "tcp", "127.0.0.1:8080") == "ConnectionRefused");
    let output = host.world.puter(&["port", "list"]).unwrap();
    assert!(text(&output.stderr).contains("another one has taken over"), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout).matches("listens").count(), 4, "{}", text(&output.stdout));
    assert_eq!(ask(&host, "tcp", "127.0.0.1:8080"), "hello (5 bytes)");
    shoot();
    host.ok(&["port", "remove", "web", &format!("{chosen}:7")]);
    assert_eq!(ask(&host, "udp", "127.0.0.1:5353"), "hello");
    assert_eq!(host.processes("puter-monitor").len(), 1);
    // Two at once make one monitor, not two.
    shoot();
    std::thread::scope(|scope| {
        let host = &host;
        let all: Vec<_> = (0..4).map(|_| scope.spawn(|| list(host, &[]))).collect();
        for one in all {
            let told = one.join().unwrap();
            assert_eq!(told.len(), 3, "{told:?}");
        }
    });
    assert_eq!(list(&host, &[]), whole("listens")[..3]);
    assert_eq!(host.processes("puter-monitor").len(), 1);

    // With the VM they end, and they come back with it: also where it starts again by itself.
    let mut held = Held::new(&host, "127.0.0.1:8080");
    host.ok(&["stop", "--force", "web"]);
    assert_eq!(held.line(), "ConnectionReset");
    assert_eq!(ask(&host, "tcp", "127.0.0.1:8080"), "ConnectionRefused");
    assert_eq!(list(&host, &[]), whole("does not: stopped")[..3]);
    host.ok(&["start", "web"]);
    host.ok(&["restart", "--force", "web"]);
    host.ok(&["set", "web", "--restart", "always"]);
    serve(&host, "web", "7");
    assert_eq!(ask(&host, "tcp", "127.0.0.1:8080"), "hello (5 bytes)");
    let pid = host.json(&["info", "web", "--json"])[0]["pid"].clone();
    assert!(host.world.root("kill").args(["-KILL", &pid.to_string()]).status().unwrap().success());
    host.until(LIMIT, || {
        let now = host.json(&["info", "web", "--json"])[0].clone();
        now["status"] == "running" && now["pid"] != pid
    });
    serve(&host, "web", "7");
    assert_eq!(ask(&host, "tcp", "[::1]:8080"), "hello (5 bytes)");
    assert_eq!(ask(&host, "udp", "127.0.0.1:5353"), "hello");
    let told = host.ok(&["set", "web", "--no-publish"]);
    assert!(!told.contains("publishes"), "{told}");
    assert_eq!(ask(&host, "tcp", "127.0.0.1:8080"), "ConnectionRefused");
    host.ok(&["delete", "--force", "web"]);
    host.until(LIMIT, || host.processes("puter-monitor").is_empty());
    assert_eq!(host.leftovers(), Vec::<String>::new());
    assert!(run_files(&host).iter().all(|name| !name.contains("web")), "{:?}", run_files(&host));
}

#[test]
#[ignore = "needs root"]
fn a_port_that_cannot_be_had_is_told_and_changes_nothing() {
    let host = host();
    host.ok(&["start", "web", "--memory", "256M", "--publish", "8080:7"]);
    let hold = |port: &str| {
        let mut child = host.world.command("peer").args(["serve", port]).spawn().unwrap();
        std::thread::spawn(move || child.wait());
        host.until(LIMIT, || ask(&host, "tcp", &format!("127.0.0.1:{port}")) == "hello (5 bytes)");
    };
    let let_go = |port: &str| {
        for peer in host.processes(&format!("peer serve {port}")) {
            assert!(host.world.root("kill").args(["-KILL", &peer]).status().unwrap().success());
        }
    };
    hold("9000");

    // By a running VM, by a new one, by one that is stopped.
    let started = |name, spec| ["start", name, "--memory", "256M", "--publish", spec];
    host.fails(&["port", "add", "web", "8081:7", "9000:7"], "port 9000/tcp of 127.0.0.1 is taken", "sport = :9000");
    host.fails(&["port", "add", "web", "9000:7/udp"], "port 9000/udp of 127.0.0.1 is taken", "ss -lpu");
    host.fails(&started("db", "9000:7"), "port 9000/tcp of 127.0.0.1 is taken", "any that is free");
    host.fails(
        &started("db", "0.0.0.0:8080:7"),
        "published by 'web', as 127.0.0.1:8080:7/tcp",
        "puter port remove web",
    );
    host.fails(&started("db", "80:7"), "port 80", "net.ipv4.ip_unprivileged_port_start=80");
    host.fails(&started("db", "203.0.113.77:8082:7"), "does not have the address 203.0.113.77", "0.0.0.0");
    host.fails(&["port", "add", "web", "8080:7"], "'web' publishes 127.0.0.1:8080:7/tcp already", "port list web");
    host.fails(&["port", "add", "web", "8081:7", "8081:7"], "is named twice", "");
    host.fails(&["port", "add", "web", "8080:8"], "cannot both have port 8080", "");
    host.fails(&["set", "web", "--publish", "0.0.0.0:8080:7"], "cannot take the place of", "puter port remove web");
    host.fails(&["port", "remove", "web", "8081:7"], "does not publish", "port list web");
    host.fails(&["port", "add", "db", "8081:7"], "no VM named 'db'", "puter list");
    assert_eq!(list(&host, &[]), ["web 127.0.0.1:8080:7/tcp listens"]);
    assert_eq!(ask(&host, "tcp", "127.0.0.1:8081"), "ConnectionRefused");
    assert!(run_files(&host).iter().all(|name| !name.contains("db")), "nothing is left of what was refused");

    // An administrator allows low ports: then they are had.
    let allow = "echo 80 >/proc/sys/net/ipv4/ip_unprivileged_port_start";
    output(host.world.root("sh").args(["-c", allow])).unwrap();
    host.ok(&["port", "add", "web", "80:7"]);
    serve(&host, "web", "7");
    assert_eq!(ask(&host, "tcp", "127.0.0.1:80"), "hello (5 bytes)");
    // To lead a port elsewhere needs no other port.
    host.ok(&["set", "web", "--publish", "8080:8"]);
    assert_eq!(ask(&host, "tcp", "127.0.0.1:8080"), "ConnectionReset");
    host.ok(&["set", "web", "--publish", "8080:7"]);

    // A clone publishes nothing, a restored VM what it did; and what was taken meanwhile is told.
    host.ok(&["snapshot", "web", "--name", "before"]);
    host.ok(&["set", "web", "--publish", "8080:7", "--publish", "8085:7"]);
    host.ok(&["clone", "web@before", "copy"]);
    assert_eq!(host.json(&["info", "copy", "--json"])[0]["ports"], serde_json::json!([]));
    host.ok(&["restore", "--force", "web", "before"]);
    for address in ["127.0.0.1:8080", "127.0.0.1:8085"] {
        assert_eq!(ask(&host, "tcp", address), "hello (5 bytes)");
    }
    host.ok(&["stop", "--force", "web", "copy"]);
    host.fails(&["port", "add", "copy", "8080:7"], "published by 'web'", "puter port remove web");
    hold("8080");
    host.fails(&["start", "web"], "port 8080/tcp of 127.0.0.1 is taken", "sport = :8080");
    assert_eq!(host.json(&["info", "web", "--json"])[0]["status"], "stopped");
    host.ok(&["start", "web", "--publish", "8090:7"]);
    assert_eq!(list(&host, &["web"]), ["web 127.0.0.1:8090:7/tcp listens"]);

    // Without its monitor, and with the port in other hands, the list tells the truth; then it is mended.
    let monitor = host.processes("puter-monitor");
    assert!(host.world.root("kill").args(["-KILL", &monitor[0]]).status().unwrap().success());
    host.until(LIMIT, || host.processes("puter-monitor").is_empty());
    hold("8090");
    assert_eq!(list(&host, &["web"]), ["web 127.0.0.1:8090:7/tcp does not: port 8090/tcp of 127.0.0.1 is taken"]);
    let_go("8090");
    host.until(LIMIT, || list(&host, &["web"]) == ["web 127.0.0.1:8090:7/tcp listens"]);
    host.ok(&["delete", "copy"]);
    host.ok(&["delete", "--force", "web", "--snapshots"]);
    host.until(LIMIT, || host.processes("puter-monitor").is_empty());
    assert_eq!(host.leftovers(), Vec::<String>::new());
}
