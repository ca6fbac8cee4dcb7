//! The completion scripts in the real shells.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

/// A directory with `puter` on its path, and a home with two VMs that do not run and the names of two images.
fn world() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    symlink(env!("CARGO_BIN_EXE_puter-multi"), dir.path().join("puter")).unwrap();
    std::fs::create_dir_all(dir.path().join("home/state")).unwrap();
    for (id, name) in [(1, "web"), (2, "worker-two")] {
        let state = serde_json::json!({
            "schema": 1, "name": name, "id": id, "status": "stopped", "process": null, "mac": "52:54:00:00:00:0b",
            "ip": format!("10.0.0.{}", 10 + id), "tap": "pt-x", "cid": 4,
            "image": { "reference": "r", "digest": "sha256:0" }, "overlay": "/o", "cpus": 1, "memory": 1 << 29,
            "disk": 1 << 30, "instance": "i", "machine_id": "m", "created": 0, "started": null, "hypervisor": null,
            "ports": [{ "address": "127.0.0.1", "host_port": 8080 + id, "guest_port": 80, "protocol": "tcp" }],
        });
        std::fs::write(dir.path().join(format!("home/state/{name}.json")), state.to_string()).unwrap();
    }
    std::fs::create_dir_all(dir.path().join("home/cluster")).unwrap();
    let roles = serde_json::json!([{ "name": "db", "count": 1 }, { "name": "web", "count": 2 }]);
    let shop = serde_json::json!({ "schema": 1, "name": "shop", "created": 0, "roles": roles });
    std::fs::write(dir.path().join("home/cluster/shop.json"), shop.to_string()).unwrap();
    for (digit, name) in [("a", "localhost:5000/puter/debian:12"), ("b", "docker.io/library/other:latest")] {
        let images = dir.path().join("home/images");
        std::fs::create_dir_all(images.join("disks").join(digit.repeat(64))).unwrap();
        std::fs::create_dir_all(images.join("refs")).unwrap();
        let named = serde_json::json!({ "reference": name, "digest": format!("sha256:{}", digit.repeat(64)) });
        std::fs::write(images.join(format!("refs/{digit}.json")), named.to_string()).unwrap();
    }
    for shell in ["bash", "zsh", "fish"] {
        let output = Command::new(dir.path().join("puter")).args(["completions", shell]).output().unwrap();
        assert!(output.status.success());
        std::fs::write(dir.path().join(shell), output.stdout).unwrap();
    }
    dir
}

fn run(dir: &Path, shell: &str, args: &[&str]) -> String {
    let path = format!("{}:/usr/local/bin:/usr/bin:/bin", dir.display());
    let mut command = Command::new(shell);
    command.args(args).env_clear().env("PATH", path).env("PUTER_HOME", dir.join("home")).env("HOME", dir);
    let output = command.env("TERM", "dumb").env("LC_ALL", "C.UTF-8").current_dir(dir).output();
    let output = output.unwrap_or_else(|error| panic!("cannot run {shell}: {error}"));
    let (said, wrong) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && wrong.is_empty(), "{shell} {args:?}: {}\n{said}\n{wrong}", output.status);
    said.trim_end().to_string()
}

#[test]
fn bash_completes_commands_options_names_and_files() {
    let dir = world();
    run(dir.path(), "bash", &["-n", "bash"]);
    let complete = |words: &str| {
        let script = format!(
            "source ./bash; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _puter; echo \"${{COMPREPLY[@]}}\""
        );
        run(dir.path(), "bash", &["-c", &script])
    };
    assert_eq!(complete("puter sto"), "stop");
    assert_eq!(complete("puter start ''"), "web worker-two");
    assert_eq!(complete("puter start wo"), "worker-two");
    assert_eq!(complete("puter start web --no-w"), "--no-wait");
    assert_eq!(complete("puter set web --isol"), "--isolate");
    assert_eq!(complete("puter set web --isolate ''"), "yes no");
    assert_eq!(complete("puter init --kernel ba"), "bash", "a file");
    assert_eq!(complete("puter cp zs"), "zsh");
    assert_eq!(complete("puter no-such-command ''"), "");
    assert_eq!(complete("puter port ''"), "add list remove");
    assert_eq!(complete("puter start web --pub"), "--publish");
    assert_eq!(complete("puter port remove web ''"), "127.0.0.1:8081:80/tcp");
    assert_eq!(complete("puter cluster delete ''"), "shop");
    assert_eq!(complete("puter cluster scale shop w"), "web=");
    assert_eq!(complete("puter image ''"), "list pull inspect delete prune");
    assert_eq!(complete("puter image delete lo"), "localhost:5000/puter/debian:12");
    assert_eq!(complete("puter start web --image do"), "docker.io/library/other:latest");

    // Where the user has typed a ':', bash has taken the word apart, and replaces what follows the ':'.
    let complete = |line: &str, words: &str| complete(&format!("{words}); COMP_LINE=({line}"));
    assert_eq!(complete("'puter port remove web 127.0.0.1:80'", "puter port remove web 127.0.0.1 : 80"), "8081:80/tcp");
    assert_eq!(complete("'puter port remove web 127.0.0.1:'", "puter port remove web 127.0.0.1 :"), "8081:80/tcp");
    assert_eq!(complete("'puter port remove  web 1'", "puter port remove web 1"), "127.0.0.1:8081:80/tcp");
    let image = complete("'puter image inspect localhost:5000/pu'", "puter image inspect localhost : 5000/pu");
    assert_eq!(image, "5000/puter/debian:12");
    let members = complete("'puter cluster exec shop:web'", "puter cluster exec shop : web");
    assert_eq!(members, "web web1 web2");
    assert_eq!(complete("'puter start --mount web:ba'", "puter start --mount web : ba"), "");
    assert_eq!(complete("'puter start web : wo'", "puter start web : wo"), "worker-two");
}

#[test]
#[ignore = "needs Debian packages"]
fn fish_completes_with_descriptions() {
    let dir = world();
    run(dir.path(), "fish", &["--no-execute", "fish"]);
    let complete = |line: &str| {
        let script = format!("source ./fish; complete --do-complete '{line}'");
        run(dir.path(), "fish", &["--no-config", "-c", &script])
    };
    assert!(complete("puter sto").starts_with("stop\tStop VMs"), "{}", complete("puter sto"));
    assert_eq!(complete("puter start "), "web\tstopped at 10.0.0.11\nworker-two\tstopped at 10.0.0.12");
    assert_eq!(complete("puter start web wo"), "worker-two\tstopped at 10.0.0.12");
    assert!(complete("puter start --no-w").starts_with("--no-wait\t"));
    assert_eq!(complete("puter port remove web 127"), "127.0.0.1:8081:80/tcp");
    assert!(complete("puter init --kernel ba").contains("bash"));
    assert_eq!(
        complete("puter image delete docker.io/library/other:latest lo"),
        "localhost:5000/puter/debian:12\timage"
    );
}

#[test]
#[ignore = "needs Debian packages"]
fn zsh_completes_with_descriptions() {
    let dir = world();
    run(dir.path(), "zsh", &["-n", "zsh"]);
    // Below a terminal of its own, as for a user; what the completion system is given is written down.
    let complete = |line: &str| {
        let script = format!(
            r#"
            zmodload zsh/zpty
            zpty shell zsh -f -i
            zpty -w shell 'PS1=; autoload -Uz compinit && compinit -D; source ./zsh'
            zpty -w shell 'compadd() {{ local -A o; local -a d; zparseopts -E -D -a ignored -A o J: V: X: O: A: D: a k d: P: S: p: s: i: I: W: F: r: R: x: M: E: q e f Q n U l o 1 2 C; print -rl -- $@ "${{(@P)@[-1]}}" >>./told; builtin compadd "$@" }}'
            zpty -w -n shell $'{line}\t'
            sleep 0.1
            repeat 100; do [ -s ./told ] && break; sleep 0.1; done
            sleep 0.3
            zpty -d shell
            cat ./told
            "#
        );
        let _ = std::fs::remove_file(dir.path().join("told"));
        run(dir.path(), "zsh", &["-f", "-c", &script])
    };
    let told = complete("puter start ");
    assert!(told.contains("web") && told.contains("worker-two"), "{told}");
    let told = complete("puter sto");
    assert!(told.contains("stop"), "{told}");
    let told = complete("puter image inspect local");
    assert!(told.contains("localhost:5000/puter/debian:12"), "{told}");
}
