//! The agent's own binary, driven over a Unix socket, on a root made for the test.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

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
        let child = Command::new(env!("CARGO_BIN_EXE_puter-multi"))
            .args(["puter-agent", "--listen"])
            .arg(format!("unix:{}/s", dir.path().display()))
            .arg("--root")
            .arg(dir.path())
            .spawn()
            .unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        while !dir.path().join("s").exists() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
        Guest { dir, child }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.dir.path().join("s")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
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
    let end = Instant::now() + Duration::from_secs(20);
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
