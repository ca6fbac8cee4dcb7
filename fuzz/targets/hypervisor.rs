//! What hypervisors say. The first byte tells where: an answer on the API's socket, events, QEMU's control channel, the files
//! of a snapshot (`memory's size (eight bytes)`, then configuration and state as pieces), or the version.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use puter::hypervisor::emulator::config::Config;
use puter::hypervisor::emulator::events::Events;
use puter::hypervisor::emulator::qmp::Qmp;
use puter::hypervisor::snapshot::{CONFIG, FILES, MEMORY, Own, STATE, prepare};
use puter::hypervisor::{Client, MemoryMode, Restore, events, parse_version};
use serde_json::{Value, json};

use crate::{pieces, scratch};

/// More of an input is not sent: it fits a socket's buffer.
const SENT: usize = 64 << 10;

pub fn run(input: &[u8]) {
    let Some((kind, rest)) = input.split_first() else { return };
    match kind % 5 {
        0 => answer(rest),
        1 => happened(rest),
        2 => qemu(rest),
        3 => snapshot(rest),
        _ => {
            if let Some((version, major)) = parse_version(&String::from_utf8_lossy(rest)) {
                assert!(version.len() < 64 && version.bytes().all(|byte| byte.is_ascii_graphic()));
                assert!(
                    version.trim_start_matches(['v', '+', '0']).starts_with(major.to_string().trim_start_matches('0'))
                );
            }
        }
    }
}

fn answer(bytes: &[u8]) {
    let path = scratch::empty().join("api");
    let listener = UnixListener::bind(&path).expect("a socket");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..2 {
                let (mut stream, _) = listener.accept().expect("a client");
                let mut head = [0; 4096];
                let _ = stream.read(&mut head);
                let _ = stream.write_all(&bytes[..bytes.len().min(SENT)]);
                let _ = stream.shutdown(Shutdown::Write);
            }
        });
        let client = Client::new(&path);
        let (ping, pause) = (client.ping(), client.pause());
        let says = |error: anyhow::Error| format!("{error:#}");
        // Both had the same answer: a status that is no success is an error of both.
        if let (Ok(_), Err(error)) = (&ping, pause.map_err(says)) {
            panic!("what is an answer to one is none to the other: {error}");
        }
        if let Err(error) = ping.map_err(says) {
            assert!(error.contains("vmm.ping") && error.len() < 3 * SENT, "{error}");
        }
    });
}

fn happened(bytes: &[u8]) {
    let all = events::parse(bytes);
    // What is there half is never told as something else.
    let half = events::parse(&bytes[..bytes.len() / 2]);
    assert_eq!(all.get(..half.len()), Some(&half[..]));
    let booted = |all: &[events::Event]| events::booted(all);
    assert!(!booted(&half) || booted(&all));
    assert!(!events::panicked(&all) || all.iter().any(|event| event.source == "guest"));
}

fn qemu(bytes: &[u8]) {
    let bytes = &bytes[..bytes.len().min(SENT)];
    let (ours, mut theirs) = UnixStream::pair().expect("a pair of sockets");
    theirs.write_all(bytes).expect("room");
    theirs.shutdown(Shutdown::Write).expect("a socket");
    let events = Arc::new(Events::open(None).expect("no file"));
    let lines: Vec<Value> =
        bytes.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
    let Ok(qmp) = Qmp::connect(ours, events, Duration::from_secs(10)) else { return };
    let first = lines.iter().find(|line| line["event"].as_str().is_none()).expect("a greeting from nothing");
    assert!(first.get("QMP").is_some());
    assert!(qmp.version().bytes().all(|byte| byte.is_ascii_digit() || byte == b'.'));
    // An answer is taken from the line that has the command's id, and from no other.
    if let Ok(value) = qmp.run("query-status", json!({})) {
        let of = |line: &&Value| line["id"] == 2 && line.get("error").is_none() && line["event"].as_str().is_none();
        assert!(lines.iter().filter(of).any(|line| line["return"] == value));
    }
    let reset = qmp.is_reset_at_end();
    let named = |name: &'static str| lines.iter().filter(move |line| line["event"] == name);
    assert_eq!(reset, named("SHUTDOWN").any(|event| event["data"]["reason"] == "guest-reset"));
    let last = lines.iter().rev().find(|line| line["event"] == "STOP" || line["event"] == "RESUME");
    assert_eq!(qmp.is_paused(), last.is_some_and(|event| event["event"] == "STOP"));
    let status = |data: &Value| data["status"].as_str().map(String::from);
    if let Ok(found) = qmp.wait_for("MIGRATION", Duration::ZERO, status) {
        assert!(named("MIGRATION").any(|event| event["data"]["status"] == found.as_str()));
    }
}

fn snapshot(bytes: &[u8]) {
    let Some((size, rest)) = bytes.split_first_chunk::<8>() else { return };
    let mut pieces = pieces(rest);
    let directory = scratch::empty();
    let source = directory.join("source");
    fs::create_dir(&source).expect("a directory");
    for name in [CONFIG, STATE] {
        fs::write(source.join(name), pieces.next().unwrap_or_default()).expect("room");
    }
    let size = u64::from_be_bytes(*size) & ((1 << 40) - 1);
    File::create(source.join(MEMORY)).and_then(|file| file.set_len(size)).expect("room for a hole");
    for map in [false, true] {
        let target = directory.join("target");
        let own = own(&directory);
        match prepare(&source, &target, &own, map) {
            Ok(()) => prepared(&source, &target, &own, map.then_some(size)),
            Err(error) => assert!(!format!("{error:#}").is_empty() && !target.exists(), "{error:#}"),
        }
        let _ = fs::remove_dir_all(&target);
        assert_eq!(fs::read_dir(&directory).expect("a directory").count(), 1);
    }
}

fn own(directory: &Path) -> Own {
    Own {
        disk: directory.join("disk"),
        tap: "pt-new".into(),
        mac: "52:54:00:00:00:0c".into(),
        vsock: directory.join("vsock"),
        serial: directory.join("serial"),
        kernel: directory.join("kernel"),
        initrd: None,
    }
}

/// The machine has its own things and no others, and maps no more memory than the file has.
fn prepared(source: &Path, target: &Path, own: &Own, mapped: Option<u64>) {
    let read = |name: &str| -> Value {
        serde_json::from_slice(&fs::read(target.join(name)).expect("a file")).expect("what was written")
    };
    let config = read(CONFIG);
    assert_eq!(config["disks"].as_array().map(Vec::len), Some(1));
    assert_eq!(config["net"].as_array().map(Vec::len), Some(1));
    let owned = [
        (&config["disks"][0]["path"], json!(own.disk)),
        (&config["net"][0]["tap"], json!(own.tap)),
        (&config["net"][0]["mac"], json!(own.mac)),
        (&config["vsock"]["socket"], json!(own.vsock)),
        (&config["serial"]["socket"], json!(own.serial)),
        (&config["payload"]["kernel"], json!(own.kernel)),
        (&config["payload"]["initramfs"], Value::Null),
    ];
    assert!(owned.iter().all(|(is, must)| *is == must), "{config}");
    if let Some(size) = mapped {
        assert_eq!(config["memory"]["zones"][0]["size"], size);
        assert_eq!(config["memory"]["zones"][0]["file"], json!(source.join(MEMORY)));
        let state = read(STATE);
        let text = state["snapshots"]["memory-manager"]["snapshot_data"]["state"].as_str().expect("a state");
        let manager: Value = serde_json::from_str(text).expect("what was written");
        for mapping in manager["guest_ram_mappings"].as_array().expect("mappings") {
            let number = |field: &str| mapping[field].as_u64().expect("a number");
            assert!(number("file_offset").checked_add(number("size")).is_some_and(|end| end <= size), "{manager}");
        }
    }
    for name in FILES {
        let path = target.join(name);
        if path.is_symlink() {
            assert_eq!(fs::read_link(&path).expect("a link"), source.join(name));
        }
    }
    let Ok(config) = serde_json::from_value::<Config>(config) else { return };
    let restore =
        Restore { source: target.into(), memory: MemoryMode::Copy, api_socket: target.join("api"), events: None };
    if let Ok(machine) = config.into_machine(&restore) {
        assert_eq!(machine.disks[0].path, own.disk);
        let again = serde_json::to_value(Config::of(&machine)).expect("a configuration");
        let again: Config = serde_json::from_value(again).expect("what was written");
        assert_eq!(again.into_machine(&restore).expect("the same machine"), machine);
    }
}
