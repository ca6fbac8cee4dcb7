//! The command line as a user meets it before there is any machine: names, help, mistakes, exit codes.

use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

use serde_json::Value;

const EXECUTABLE: &str = env!("CARGO_BIN_EXE_puter-multi");

struct User {
    dir: tempfile::TempDir,
}

impl User {
    fn new() -> User {
        User { dir: tempfile::tempdir().unwrap() }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(EXECUTABLE);
        command.arg0("puter").args(args).env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("PUTER_HOME", self.dir.path().join("h")).env("XDG_CONFIG_HOME", self.dir.path().join("c"));
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn the_name_decides_what_the_file_is() {
    let dir = tempfile::tempdir().unwrap();
    for (name, says) in [("puter", "puter "), ("puterd", "puterd ")] {
        let link = dir.path().join(name);
        symlink(EXECUTABLE, &link).unwrap();
        let output = Command::new(&link).arg("--version").output().unwrap();
        assert!(output.status.success());
        assert!(text(&output.stdout).starts_with(says), "{name}: {output:?}");
        let output = Command::new(EXECUTABLE).args([name, "--version"]).output().unwrap();
        assert!(text(&output.stdout).starts_with(says), "puter-multi {name}: {output:?}");
    }
    let output = Command::new(EXECUTABLE).arg("nonsense").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("puter-agent"), "{output:?}");
}

#[test]
fn every_command_has_help() {
    let user = User::new();
    let help = user.run(&["--help"]);
    assert!(help.status.success() && help.stderr.is_empty());
    let listing = text(&help.stdout).split("Commands:").nth(1).unwrap().to_string();
    let commands: Vec<&str> = listing
        .lines()
        .filter_map(|line| line.strip_prefix("  ")?.split(' ').next().filter(|w| !w.is_empty()))
        .collect();
    assert!(commands.len() >= 11, "{commands:?}");
    for command in commands {
        let output = user.run(&[command, "--help"]);
        assert!(output.status.success(), "{command}");
        assert!(text(&output.stdout).starts_with(&format!("Usage: puter {command}")), "{command}: {output:?}");
    }
    assert_eq!(user.run(&[]).stdout, help.stdout);
}

#[test]
fn a_mistake_on_the_command_line_is_exit_code_2_with_a_way_to_the_help() {
    let user = User::new();
    for (args, says, hint) in [
        (&["strat"][..], "strat", "puter --help"),
        (&["start"], "no VM is named", "puter list"),
        (&["start", "--bogus", "web"], "--bogus", "puter start --help"),
        (&["start", "--memory", "lots", "web"], "'lots' is not a size", "puter start --help"),
        (&["stop", "--timeout", "-1", "web"], "--timeout", "puter stop --help"),
        (&["daemon"], "start", "puter daemon --help"),
    ] {
        let output = user.run(args);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        assert!(said.starts_with("puter: ") && said.contains(says), "{args:?}: {said}");
        assert!(said.lines().last().unwrap().starts_with("hint: ") && said.contains(hint), "{args:?}: {said}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn a_failure_is_exit_code_1_with_a_reason_and_a_way_out() {
    let user = User::new();
    for (args, says, hint) in [
        (&["info", "web"][..], "there is no VM named 'web'", "puter list"),
        (&["ssh", "web"], "there is no VM named 'web'", "puter list"),
        (&["stop", "web"], "there is no VM named 'web'", "puter list"),
        (&["delete", "web"], "there is no VM named 'web'", "puter list"),
        (&["start", "web"], "puterd does not run", "puter daemon start"),
        (&["daemon", "status"], "puterd does not run", "puter daemon start"),
        (&["init"], "no image is named", "puter init --image IMAGE"),
        (&["init", "--image", "oci:/nowhere"], "/nowhere", ""),
    ] {
        let output = user.run(args);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        assert!(said.starts_with("puter: ") && said.contains(says), "{args:?}: {said}");
        assert!(said.contains(hint), "{args:?}: {said}");
        assert!(output.stdout.is_empty());
    }
    for name in ["UPPER", "-x", "a.b", &"x".repeat(64)] {
        let output = user.run(&["start", "--", name]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(text(&output.stderr).contains("a name is 1 to 63 of a-z, 0-9 and '-'"), "{output:?}");
    }
}

#[test]
fn an_error_steers_no_terminal_whatever_it_repeats() {
    let user = User::new();
    let states = user.dir.path().join("h/state");
    std::fs::create_dir_all(&states).unwrap();
    std::fs::write(states.join("web.json"), r#"{"schema":1,"name":"web","id":1,"status":"\u001b[2J\u0007x"}"#).unwrap();
    let output = user.run(&["info", "web"]);
    let said = text(&output.stderr);
    assert!(said.contains("unknown variant `x`") && !said.contains(['\x1b', '\x07']), "{}", said.escape_debug());
}

#[test]
fn reports_are_json_when_asked() {
    let user = User::new();
    let json = |args: &[&str]| -> Value { serde_json::from_slice(&user.run(args).stdout).unwrap() };
    assert_eq!(json(&["list", "--json"]), Value::Array(vec![]));
    assert!(json(&["version", "--json"])["puter"].is_string());
    assert_eq!(json(&["daemon", "status", "--json"])["running"], false);
    let doctor = json(&["doctor", "--json"]);
    assert_eq!(doctor["ready"], false);
    let image = doctor["checks"].as_array().unwrap().iter().find(|check| check["name"] == "image").unwrap().clone();
    assert_eq!((&image["state"], &image["mend"]), (&"missing".into(), &"puter init --image IMAGE".into()));
}

#[test]
fn a_setting_comes_from_the_environment_before_the_file() {
    let user = User::new();
    std::fs::create_dir_all(user.dir.path().join("c/puter")).unwrap();
    std::fs::write(user.dir.path().join("c/puter/config.toml"), "cpus = 3\nmemory = \"2G\"\n").unwrap();
    let output = user.command(&["config", "--json"]).env("PUTER_CPUS", "5").output().unwrap();
    let config: Value = serde_json::from_slice(&output.stdout).unwrap();
    let setting =
        |name: &str| config["settings"].as_array().unwrap().iter().find(|s| s["name"] == name).unwrap().clone();
    assert_eq!((&setting("cpus")["value"], &setting("cpus")["source"]), (&"5".into(), &"environment".into()));
    assert_eq!((&setting("memory")["value"], &setting("memory")["source"]), (&"2G".into(), &"file".into()));
    std::fs::write(user.dir.path().join("c/puter/config.toml"), "cpus = \"many\"\n").unwrap();
    let output = user.run(&["config"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("config.toml"), "{output:?}");
}

#[test]
fn a_reader_that_goes_away_is_no_crash() {
    let user = User::new();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = user.command(&["--help"]).stdout(writer).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}

#[test]
fn hundreds_of_machines_are_listed_and_none_of_them_is_waited_for() {
    let user = User::new();
    let states = user.dir.path().join("h/state");
    std::fs::create_dir_all(&states).unwrap();
    // A hypervisor that hangs: it lives and answers nothing.
    let mut hung = Command::new("sleep").arg("600").spawn().unwrap();
    let stop = Command::new("kill").args(["-STOP", &hung.id().to_string()]).status().unwrap();
    assert!(stop.success());
    let start_time = puter::hypervisor::process::start_time(hung.id()).unwrap();
    for id in 1..=240 {
        let process = (id == 7).then(|| serde_json::json!({ "pid": hung.id(), "start_time": start_time }));
        let state = serde_json::json!({
            "schema": 1, "name": format!("vm{id}"), "id": id, "status": "running", "process": process,
            "mac": "52:54:00:00:00:0b", "ip": "10.0.0.11", "tap": "pt-x", "cid": 4,
            "image": { "reference": "r", "digest": "sha256:0" }, "overlay": "/o", "cpus": 1, "memory": 1 << 29,
            "disk": 1 << 30, "instance": "i", "machine_id": "m", "created": 0, "started": 0, "hypervisor": null,
        });
        std::fs::write(states.join(format!("vm{id}.json")), state.to_string()).unwrap();
    }
    let output = user.run(&["list", "--json"]);
    hung.kill().unwrap();
    hung.wait().unwrap();
    let list: Value = serde_json::from_slice(&output.stdout).unwrap();
    let status = |id: usize| list[id - 1]["status"].as_str().unwrap();
    assert_eq!(list.as_array().unwrap().len(), 240);
    assert_eq!((status(7), status(8)), ("running", "stopped"));
}
