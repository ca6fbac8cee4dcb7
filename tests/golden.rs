//! Transcripts of the command line, as files that people read: a change of what users see is a change of these files.
//!
//! `UPDATE_GOLDEN=1 cargo test --test golden` writes them anew; the difference is then for the reviewer.

#[path = "e2e/host.rs"]
mod host;

use std::fmt::Write;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};

use host::{Host, text};

/// Runs each line that begins with `$ ` in the file, and compares what comes out with what stands there.
fn play(name: &str, run: impl Fn(&str) -> Output, plain: impl Fn(&str) -> String) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.txt"));
    let golden = std::fs::read_to_string(&path).unwrap();
    let mut told = String::new();
    for line in golden.lines() {
        if line.starts_with("# ") {
            writeln!(told, "{line}").unwrap();
        }
        let Some(command) = line.strip_prefix("$ ") else { continue };
        let output = run(command);
        writeln!(told, "{line}").unwrap();
        let said = plain(&text(&output.stdout));
        if !said.trim().is_empty() {
            writeln!(told, "{}", said.trim_end()).unwrap();
        }
        if !output.status.success() {
            writeln!(told, "[exit {}]", output.status.code().unwrap()).unwrap();
        }
        told.push('\n');
    }
    let told = told.trim_end().to_string() + "\n";
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        return std::fs::write(&path, told).unwrap();
    }
    if told != golden {
        let new = std::env::temp_dir().join(format!("{name}.{}.txt", std::process::id()));
        std::fs::write(&new, &told).unwrap();
        let output = Command::new("diff").arg("-u").arg(&path).arg(&new).output().unwrap();
        std::fs::remove_file(&new).unwrap();
        panic!("puter says something else now (UPDATE_GOLDEN=1 takes it over):\n{}", text(&output.stdout));
    }
}

/// Replaces each number with a decimal part that is followed by ` s`, and each word of digits after one of `words`.
fn without_times(said: &str) -> String {
    let mut plain = String::new();
    for line in said.lines() {
        let mut words: Vec<String> = line.split(' ').map(String::from).collect();
        for at in 0..words.len() {
            let word = words[at].trim_start_matches('(').to_string();
            let unit = words.get(at + 1).map(|unit| unit.trim_end_matches([')', ','])).unwrap_or_default().to_string();
            let number = word.parse::<f64>().is_ok();
            let before = at.checked_sub(1).map(|before| words[before].clone()).unwrap_or_default();
            if (number && unit == "s")
                || (before.ends_with("process") && word.trim_end_matches([')', ',', ':']).parse::<u32>().is_ok())
            {
                let digits: String = word.chars().filter(|c| c.is_ascii_digit() || *c == '.').collect();
                words[at] = words[at].replace(&digits, "N");
            }
        }
        plain.push_str(words.join(" ").trim_end());
        plain.push('\n');
    }
    plain
}

/// A user without any VM.
fn user() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    symlink(env!("CARGO_BIN_EXE_puter-multi"), dir.path().join("puter")).unwrap();
    dir
}

fn run_as(dir: &Path, line: &str) -> Output {
    let path = format!("{}:/usr/bin:/bin", dir.display());
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{{ {line}; }} 2>&1")]).env_clear().env("PATH", path);
    command.env("PUTER_HOME", dir.join("home")).env("XDG_CONFIG_HOME", dir.join("config")).env("PUTER_SERVICE", "no");
    command.env("HOME", dir).current_dir(dir).output().unwrap()
}

fn fast(name: &str) {
    let dir = user();
    let at = dir.path().display().to_string();
    play(
        name,
        |line| run_as(dir.path(), line),
        |said| without_times(&said.replace(&at, "DIR").replace(puter::VERSION, "VERSION")),
    );
}

#[test]
fn help_is_what_the_transcript_says() {
    fast("help");
}

#[test]
fn mistakes_are_answered_as_the_transcript_says() {
    fast("mistakes");
}

#[test]
#[ignore = "needs root"]
fn a_machines_life_reads_as_the_transcript_says() {
    let host = Host::new();
    host.ready();
    let at = host.world.dir().display().to_string();
    let plain = |said: &str| {
        let said = without_times(&said.replace(&at, "DIR"));
        // What differs from build to build and from disk to disk.
        let masked = |line: &str| match line.split_once(':') {
            Some((name, rest)) if ["digest", "up", "ended", "ipv6"].contains(&name) => {
                let gap: String = rest.chars().take_while(|c| *c == ' ').collect();
                let reason = rest.split_once(": ").map(|(_, reason)| format!(": {reason}")).unwrap_or_default();
                format!("{name}:{gap}MASKED{reason}")
            }
            Some(("disk", rest)) => {
                format!(
                    "disk:{}",
                    rest.split_once(", ").map_or(rest.to_string(), |(size, _)| format!("{size}, N used on the host"))
                )
            }
            _ => line.to_string(),
        };
        said.lines().map(masked).collect::<Vec<_>>().join("\n")
    };
    let run = |line: &str| host.world.command("sh").args(["-c", &format!("{{ {line}; }} 2>&1")]).output().unwrap();
    play("life", run, plain);
}
