//! The agent's own binary, driven over a Unix socket, on a root made for the test.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// The end of a shell's script that waits for a signal. It starts no program any more once it says so: dash forgets a
/// signal that comes while it does.
const IDLE: &str = "sleep 60 </dev/null >/dev/null 2>&1 & echo ready; wait";

struct Guest {
    dir: tempfile::TempDir,
    child: Child,
}

impl Guest {
    fn new() -> Guest {
        let dir = tempfile::tempdir().unwrap();
        let me = fs::metadata(dir.path()).unwrap();
        let (uid, gid) = (std::os::unix::fs::MetadataExt::uid(&me), std::os::unix::fs::MetadataExt::gid(&me));
        for d in ["etc/ssh", "root", "usr/sbin"] {
            fs::create_dir_all(dir.path().join(d)).unwrap();
        }
        fs::write(dir.path().join("etc/passwd"), format!("root:x:{uid}:{gid}::/root:/bin/sh\n")).unwrap();
        fs::write(dir.path().join("usr/sbin/netplan"), "").unwrap();
        fs::write(dir.path().join("etc/ssh/ssh_host_rsa_key"), "of the image").unwrap();
        // Under systemd no signal is ignored; whatever runs the tests may have it otherwise.
        let child = Command::new("env")
            .args(["--default-signal=INT,HUP", env!("CARGO_BIN_EXE_puter-multi"), "puter-agent", "--listen"])
            .arg(format!("unix:{}/s", dir.path().display()))
            .arg("--root")
            .arg(dir.path())
            .spawn()
            .unwrap();
        let end = Instant::now() + Duration::from_secs(60);
        // The socket's file is there before anybody listens.
        while UnixStream::connect(dir.path().join("s")).is_err() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
        Guest { dir, child }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.dir.path().join("s")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    fn ask(&self, line: &str) -> Value {
        let mut stream = self.connect();
        let _ = stream.write_all(format!("{line}\n").as_bytes());
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap()
    }

    fn call(&self, method: &str, params: Value) -> Value {
        self.ask(&json!({"id": 7, "version": 1, "method": method, "params": params}).to_string())
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.dir.path().join(path)).unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn bad_lines_are_answered_and_the_agent_goes_on() {
    let guest = Guest::new();
    assert_eq!(guest.ask("\u{1}nonsense")["id"], 0);
    assert_eq!(guest.ask(r#"{"id":3,"version":1,"method":"fly"}"#)["error"]["code"], "unknown_method");
    assert_eq!(guest.ask(r#"{"id":3,"version":2,"method":"ping"}"#)["error"]["code"], "unsupported_version");
    assert_eq!(guest.ask(&"x".repeat(8 << 20))["error"]["code"], "bad_request");
    let silent: Vec<_> = (0..8).map(|_| guest.connect()).collect();
    assert_eq!(guest.call("ping", json!({}))["result"]["version"], 1);
    assert_eq!(guest.ask(r#"{"id":9,"version":1,"method":"ping"}"#)["id"], 9);
    drop(silent);
}

#[test]
fn configure_makes_the_machine_and_repeats_without_change() {
    let guest = Guest::new();
    let params = json!({"hostname": "web", "mac": "52:54:00:00:00:0b", "netplan": "network: {}\n",
        "ssh_keys": ["ssh-ed25519 AAAA me"], "identity": {"instance": "one",
        "machine_id": "0123456789abcdef0123456789abcdef", "seed": "AAAA"}});
    for _ in 0..2 {
        let answer = guest.call("configure", params.clone());
        assert_eq!(answer["result"]["network"], "netplan", "{answer}");
        assert_eq!(answer["result"]["warnings"], json!([]), "{answer}");
        assert_eq!(guest.read("run/puter/generation"), "1\n");
    }
    assert_eq!(guest.read("etc/machine-id"), "0123456789abcdef0123456789abcdef\n");
    assert_eq!(guest.read("etc/hostname"), "web\n");
    assert_eq!(guest.read("etc/netplan/60-puter.yaml"), "network: {}\n");
    assert!(guest.read("root/.ssh/authorized_keys").contains("ssh-ed25519 AAAA me\n"));
    assert!(!guest.dir.path().join("etc/ssh/ssh_host_rsa_key").exists());
    let mode = fs::metadata(guest.dir.path().join("root/.ssh/authorized_keys")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
}

#[test]
fn a_link_in_place_of_the_ssh_directory_is_not_followed() {
    let guest = Guest::new();
    fs::create_dir(guest.dir.path().join("elsewhere")).unwrap();
    std::os::unix::fs::symlink("../elsewhere", guest.dir.path().join("root/.ssh")).unwrap();
    let params = json!({"hostname": "web", "mac": "52:54:00:00:00:0b", "ssh_keys": ["ssh-ed25519 AAAA me"]});
    let answer = guest.call("configure", params);
    assert_eq!(answer["error"]["code"], "failed", "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("authorized_keys"), "{answer}");
    assert_eq!(fs::read_dir(guest.dir.path().join("elsewhere")).unwrap().count(), 0);
}

#[test]
fn values_that_cannot_be_used_are_refused_before_anything_changes() {
    let guest = Guest::new();
    let good = json!({"hostname": "web", "mac": "52:54:00:00:00:0b", "identity": {"instance": "one",
        "machine_id": "0123456789abcdef0123456789abcdef", "seed": "AAAA"}});
    for (pointer, bad, says) in [
        ("/hostname", json!("../web"), "hostname"),
        ("/mac", json!("52:54"), "MAC address"),
        ("/identity/machine_id", json!("short"), "machine-id"),
        ("/identity/instance", json!("a/b"), "instance"),
        ("/identity/seed", json!("?"), "base64"),
    ] {
        let mut params = good.clone();
        *params.pointer_mut(pointer).unwrap() = bad;
        let answer = guest.call("configure", params);
        assert!(answer["error"]["message"].as_str().unwrap().contains(says), "{answer}");
        assert!(!guest.dir.path().join("etc/machine-id").exists() && !guest.dir.path().join("etc/hostname").exists());
    }
    assert_eq!(guest.call("configure", json!({"hostname": 7}))["error"]["code"], "bad_request");
}

#[test]
fn more_clients_than_there_are_places_are_turned_away_and_the_others_served() {
    let guest = Guest::new();
    let held: Vec<_> = (0..40).map(|_| guest.connect()).collect();
    let end = Instant::now() + Duration::from_secs(60);
    drop(held);
    loop {
        let mut stream = guest.connect();
        let mut answer = String::new();
        let sent = stream.write_all(b"{\"id\":1,\"version\":1,\"method\":\"ping\",\"params\":{}}\n");
        if sent.is_ok() && BufReader::new(stream).read_line(&mut answer).is_ok() && !answer.is_empty() {
            break;
        }
        assert!(Instant::now() < end, "the places were not given back");
    }
}

/// What a program printed on each stream, and its exit code.
#[derive(Debug, Default, PartialEq, Eq)]
struct Printed {
    stdout: String,
    stderr: String,
    code: Option<i64>,
}

impl Guest {
    /// Starts a program and gives the connection, which is the program's from then on.
    fn exec(&self, params: Value) -> BufReader<UnixStream> {
        let mut stream = self.connect();
        let line = json!({"id": 1, "version": 1, "method": "exec", "params": params});
        stream.write_all(format!("{line}\n").as_bytes()).unwrap();
        let mut reader = BufReader::new(stream);
        let mut answer = String::new();
        reader.read_line(&mut answer).unwrap();
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert!(answer["error"].is_null(), "{answer}");
        reader
    }
}

fn send(stream: &BufReader<UnixStream>, line: Value) {
    stream.get_ref().write_all(format!("{line}\n").as_bytes()).unwrap();
}

fn decode(text: &Value) -> String {
    use base64::Engine;
    let bytes = base64::engine::general_purpose::STANDARD.decode(text.as_str().unwrap()).unwrap();
    String::from_utf8(bytes).unwrap()
}

/// Reads until the program ends or has printed `until`.
fn printed(stream: &mut BufReader<UnixStream>, until: &str) -> Printed {
    let mut printed = Printed::default();
    let mut line = String::new();
    while stream.read_line(&mut line).unwrap() > 0 {
        let output: Value = serde_json::from_str(&line).unwrap();
        line.clear();
        if output["exit"].is_i64() {
            printed.code = output["exit"].as_i64();
            break;
        }
        match output["stdout"].is_string() {
            true => printed.stdout += &decode(&output["stdout"]),
            false => printed.stderr += &decode(&output["stderr"]),
        }
        if !until.is_empty() && printed.stdout.contains(until) {
            break;
        }
    }
    printed
}

#[test]
fn a_program_has_its_input_both_outputs_its_environment_and_its_exit_code() {
    let guest = Guest::new();
    let script = "cat; echo \"$GREETING\" >&2; exit 3";
    let mut stream = guest.exec(json!({"command": ["sh", "-c", script], "environment": [["GREETING", "well met"]]}));
    send(&stream, json!({"stdin": "b25lIA=="}));
    send(&stream, json!({"stdin": "dHdv"}));
    send(&stream, json!("stdin_end"));
    let expected = Printed { stdout: "one two".into(), stderr: "well met\n".into(), code: Some(3) };
    assert_eq!(printed(&mut stream, ""), expected);
    // A signal shows as shells show it.
    let mut stream = guest.exec(json!({"command": ["sh", "-c", "kill -9 $$"]}));
    assert_eq!(printed(&mut stream, "").code, Some(137));
}

#[test]
fn a_program_on_a_terminal_learns_its_size_and_hears_its_keys() {
    let guest = Guest::new();
    let script = format!("tty -s && stty size; trap 'stty size; exit 0' WINCH; {IDLE}");
    let params = json!({"command": ["sh", "-c", script], "terminal": {"rows": 30, "columns": 100}});
    let mut stream = guest.exec(params);
    let first = printed(&mut stream, "ready").stdout;
    assert!(first.contains("30 100"), "{first}");
    send(&stream, json!({"resize": {"rows": 40, "columns": 120}}));
    let second = printed(&mut stream, "");
    assert!(second.stdout.contains("40 120"), "{second:?}");
    assert_eq!(second.code, Some(0));
    // Ctrl-C is a key like any other, and the terminal makes a signal of it.
    let script = format!("trap 'exit 130' INT; {IDLE}");
    let params = json!({"command": ["sh", "-c", script], "terminal": {"rows": 2, "columns": 20}});
    let mut stream = guest.exec(params);
    printed(&mut stream, "ready");
    send(&stream, json!({"stdin": "Aw=="}));
    assert_eq!(printed(&mut stream, "").code, Some(130));
}

#[test]
fn a_program_whose_host_goes_away_is_hung_up_on() {
    let guest = Guest::new();
    let file = guest.dir.path().join("ended");
    let script = format!("trap 'echo hup >{}; exit' HUP; {IDLE}", file.display());
    let mut stream = guest.exec(json!({"command": ["sh", "-c", script]}));
    printed(&mut stream, "ready");
    drop(stream);
    let end = Instant::now() + Duration::from_secs(60);
    while !file.exists() {
        assert!(Instant::now() < end, "the program was not told");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn what_cannot_run_is_said_and_a_leftover_process_holds_up_nobody() {
    let guest = Guest::new();
    for (params, says) in [
        (json!({"command": []}), "no program is named"),
        (json!({"command": ["/no/such/program"]}), "/no/such/program"),
        (json!({"command": ["true"], "user": "nobody-here"}), "no user 'nobody-here'"),
        (json!({"command": ["true"], "directory": "/no/such"}), "/no/such"),
    ] {
        let answer = guest.call("exec", params);
        assert_eq!(answer["error"]["code"], "failed", "{answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(says), "{answer}");
    }
    let began = Instant::now();
    let mut stream = guest.exec(json!({"command": ["sh", "-c", "sleep 90 & echo started"]}));
    let printed = printed(&mut stream, "");
    assert_eq!((printed.stdout.as_str(), printed.code), ("started\n", Some(0)));
    assert!(began.elapsed() < Duration::from_secs(55), "it waited for what the program left behind");
}

#[test]
fn a_large_output_arrives_whole_while_others_run() {
    let guest = Guest::new();
    let _other = guest.exec(json!({"command": ["sleep", "60"]}));
    let mut stream = guest.exec(json!({"command": ["sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' x"]}));
    let printed = printed(&mut stream, "");
    assert_eq!((printed.stdout.len(), printed.code), (3_000_000, Some(0)));
}
