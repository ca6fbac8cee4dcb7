//! puter-agent-protocol(7) and the code: each method and each field is described as it is, and nothing that is not there.

#[path = "man/page.rs"]
mod page;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use page::{pages, parts, section};
use puter::protocol::agent::{
    BAD_REQUEST, CHUNK, Call, Configure, Configured, Error, Exec, FAILED, IDLE, Identity, Input, MAX_CONNECTIONS,
    MAX_LINE, MAX_SEED, Mount, Output, Pong, Request, Response, UNKNOWN_METHOD, UNSUPPORTED_VERSION, VERSION, Window,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// Fields by name: what they hold, and whether they may be left out.
type Fields = BTreeMap<String, (String, bool)>;

fn protocol() -> String {
    pages().remove("puter-agent-protocol.7").unwrap()
}

/// What each part of the page lists.
fn described() -> BTreeMap<String, Fields> {
    let page = protocol();
    let mut all = BTreeMap::new();
    for title in ["LINES", "METHODS"] {
        for (name, text) in parts(&section(&page, title), ".Ss") {
            let entries = text.iter().filter_map(|line| line.strip_prefix(".It Va "));
            let field = |entry: &str| {
                let (name, kind) = entry.split_once(" Pq ").unwrap_or_else(|| panic!("no kind: {entry}"));
                match kind.strip_suffix(", optional") {
                    Some(kind) => (name.to_string(), (kind.to_string(), true)),
                    None => (name.to_string(), (kind.to_string(), false)),
                }
            };
            let fields: Fields = entries.map(field).collect();
            assert!(all.insert(name.to_string(), fields).is_none(), "'{name}' is there twice");
        }
    }
    all
}

/// What JSON calls by these words.
fn kind(value: &Value) -> String {
    match value {
        Value::String(_) => "text".into(),
        Value::Number(_) => "number".into(),
        Value::Bool(_) => "truth".into(),
        Value::Object(_) => "object".into(),
        Value::Array(all) => format!("list of {}", kind(all.first().unwrap()).split(' ').next().unwrap()),
        Value::Null => panic!("a sample has nothing empty"),
    }
}

/// The fields of a type, from a value in which none is empty. What may be left out is tried.
fn fields<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(full: &T) -> Fields {
    let value = serde_json::to_value(full).unwrap();
    let mut more = value.clone();
    more["of_a_later_time"] = json!([1]);
    assert_eq!(&serde_json::from_value::<T>(more).unwrap(), full, "unknown fields are ignored");
    let one = |(name, field): (&String, &Value)| {
        let mut without = value.clone();
        without.as_object_mut().unwrap().remove(name);
        (name.clone(), (kind(field), serde_json::from_value::<T>(without).is_ok()))
    };
    value.as_object().unwrap().iter().map(one).collect()
}

// Each sample is written with all its fields: one that is new does not compile until it is here.

fn configure() -> Configure {
    Configure {
        hostname: "web".into(),
        mac: "52:54:00:00:00:0b".into(),
        netplan: "network: {}".into(),
        address: "10.0.0.11".into(),
        address_timeout: Some(30),
        restored: true,
        ssh_keys: vec!["ssh-ed25519 AAAA".into()],
        user: "root".into(),
        time: Some(1),
        mounts: vec![mount()],
        identity: Some(identity()),
    }
}

fn mount() -> Mount {
    Mount { tag: "puter0".into(), path: "/srv".into(), read_only: true }
}

fn identity() -> Identity {
    Identity { instance: "a1".into(), machine_id: "0".repeat(32), seed: "AAAA".into() }
}

fn exec() -> Exec {
    Exec {
        command: vec!["true".into()],
        environment: vec![("A".into(), "b".into())],
        directory: "/".into(),
        user: "root".into(),
        terminal: Some(Window { rows: 24, columns: 80 }),
    }
}

/// One of each method. The match does not compile where one is missing.
fn calls() -> Vec<(&'static str, Call)> {
    let all = [Call::Ping {}, Call::Configure(Box::new(configure())), Call::Shutdown {}, Call::Exec(Box::new(exec()))];
    let name = |call: &Call| match call {
        Call::Ping {} => "ping",
        Call::Configure(_) => "configure",
        Call::Shutdown {} => "shutdown",
        Call::Exec(_) => "exec",
    };
    all.map(|call| (name(&call), call)).into()
}

/// The name and kind of a line from or to a program.
fn line(value: impl Serialize) -> (String, (String, bool)) {
    match serde_json::to_value(value).unwrap() {
        Value::String(name) => (name, ("alone".into(), false)),
        Value::Object(one) => one.iter().map(|(name, value)| (name.clone(), (kind(value), false))).next().unwrap(),
        other => panic!("{other}"),
    }
}

fn to_the_program() -> Fields {
    let all = [Input::Stdin("AA==".into()), Input::StdinEnd, Input::Resize(Window { rows: 1, columns: 1 })];
    let each = |one: &Input| match one {
        Input::Stdin(_) | Input::StdinEnd | Input::Resize(_) => line(one),
    };
    all.iter().map(each).collect()
}

fn from_the_program() -> Fields {
    let all = [Output::Stdout("AA==".into()), Output::Stderr("AA==".into()), Output::Exit(1)];
    let each = |one: &Output| match one {
        Output::Stdout(_) | Output::Stderr(_) | Output::Exit(_) => line(one),
    };
    all.iter().map(each).collect()
}

#[test]
fn each_method_and_each_field_is_described_as_it_is() {
    let error = Error { code: FAILED.into(), message: "why".into() };
    let result = json!({"a": 1});
    let response = Response { id: 1, result: Some(result), error: Some(error.clone()) };
    let pong = Pong { agent: "0.1.0".into(), version: VERSION, hostname: "web".into(), uptime: 1 };
    let configured = Configured {
        hostname: "web".into(),
        network: "netplan".into(),
        host_keys: vec!["ssh-ed25519 AAAA".into()],
        root_size: 1,
        warnings: vec!["none".into()],
    };
    // A request's fields do not depend on its method, and its parameters are the method's.
    let mut there = BTreeMap::new();
    for (name, call) in calls() {
        let request = Request { id: 1, version: VERSION, call };
        let request = fields(&request);
        there.insert("Request".to_string(), request);
        there.insert(name.to_string(), Fields::new());
    }
    let more = [
        ("Answer", fields(&response)),
        ("Error", fields(&error)),
        ("Result of ping", fields(&pong)),
        ("configure", fields(&configure())),
        ("Entry of mounts", fields(&mount())),
        ("Fields of identity", fields(&identity())),
        ("Result of configure", fields(&configured)),
        ("exec", fields(&exec())),
        ("Size of a terminal", fields(&Window { rows: 1, columns: 1 })),
        ("Lines to the program", to_the_program()),
        ("Lines from the program", from_the_program()),
        ("Files", Fields::new()),
    ];
    there.extend(more.map(|(title, fields)| (title.to_string(), fields)));
    let page = described();
    for (title, fields) in &there {
        assert_eq!(page.get(title), Some(fields), "{title}: the page (left) and the code (right)");
    }
    let titles = |all: &BTreeMap<String, Fields>| all.keys().cloned().collect::<Vec<_>>();
    assert_eq!(titles(&page), titles(&there), "parts of the page (left) and of the code (right)");
}

#[test]
fn limits_versions_and_codes_are_those_of_the_code() {
    let page = protocol();
    let rows = section(&page, "LIMITS");
    let rows: BTreeMap<&str, &str> =
        rows.iter().filter_map(|line| line.strip_prefix(".It ")?.split_once(" Ta ")).collect();
    let wanted = [
        ("A line", format!("{MAX_LINE} bytes")),
        ("Bytes of a program in one line", CHUNK.to_string()),
        ("Connections at the same time", MAX_CONNECTIONS.to_string()),
        ("Silence on a connection", format!("{IDLE} seconds")),
        ("Random bytes of a seed", MAX_SEED.to_string()),
    ];
    for (what, limit) in &wanted {
        assert_eq!(rows.get(what), Some(&limit.as_str()), "{what}");
    }
    let codes: Vec<&str> =
        section(&page, "ERROR CODES").iter().filter_map(|line| line.strip_prefix(".It Li ")).collect();
    assert_eq!(codes, [BAD_REQUEST, UNKNOWN_METHOD, UNSUPPORTED_VERSION, FAILED]);
    assert!(page.contains(&format!("There is one version of the protocol, {VERSION}.")));
}

/// An agent on a root of its own, ended with it.
struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_pages_conversation_takes_place() {
    let page = protocol();
    let mut turns: Vec<(&str, String)> = Vec::new();
    let mut shown = false;
    for line in section(&page, "EXAMPLES") {
        if let Some((who @ ("host" | "agent"), said)) = line.split_once(':') {
            turns.push((who, said.to_string()));
            shown = true;
        } else if let Some((_, said)) = turns.last_mut().filter(|_| shown && line.starts_with(' ')) {
            said.push_str(line);
        }
    }
    assert!(turns.len() >= 6, "{turns:?}");

    let dir = tempfile::tempdir().unwrap();
    let me = fs::metadata(dir.path()).unwrap();
    for below in ["etc", "root"] {
        fs::create_dir(dir.path().join(below)).unwrap();
    }
    fs::write(dir.path().join("etc/passwd"), format!("root:x:{}:{}::/root:/bin/sh\n", me.uid(), me.gid())).unwrap();
    let socket = dir.path().join("socket");
    let mut command = Command::new(env!("CARGO_BIN_EXE_puter-multi"));
    command.arg("puter-agent");
    command.args(["--listen", &format!("unix:{}", socket.display()), "--root"]).arg(dir.path());
    let _agent = Agent(command.spawn().unwrap());
    let end = Instant::now() + Duration::from_secs(60);
    let mut stream = loop {
        match UnixStream::connect(&socket) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut answers = BufReader::new(stream.try_clone().unwrap());
    for (who, said) in turns {
        let said: Value = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"));
        if who == "host" {
            stream.write_all(format!("{said}\n").as_bytes()).unwrap();
        } else {
            let mut answer = String::new();
            answers.read_line(&mut answer).unwrap();
            assert_eq!(serde_json::from_str::<Value>(&answer).unwrap(), said);
        }
    }
}
