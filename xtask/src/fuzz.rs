//! `cargo xtask fuzz`: the targets of fuzz/, with libFuzzer; and a short run of each as part of the tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::shell::{self, top};
use crate::{build, packages};

/// The targets of fuzz/targets/main.rs, and their longest input in bytes.
const TARGETS: [(&str, u32); 18] = [
    ("agent", 4096),
    ("archive", 8 << 10),
    ("auth", 4096),
    ("dhcp", 4096),
    ("diff", 1024),
    ("disk", 4096),
    ("dns", 4096),
    ("guest", 4096),
    ("http", 4096),
    ("hypervisor", 4096),
    ("layers", 16 << 10),
    ("manifest", 4096),
    ("netlink", 4096),
    ("records", 16 << 10),
    ("reference", 512),
    ("settings", 4096),
    ("solicitation", 4096),
    ("transfer", 16 << 10),
];
/// An input that takes so many seconds, or so many MiB, is a finding.
const LIMITS: [&str; 2] = ["-timeout=20", "-rss_limit_mb=1024"];
/// Coverage for libFuzzer: what cargo-fuzz asks of a nightly compiler, by the flags of a stable one. The address sanitizer
/// is not among them, and not needed where the code has next to no `unsafe`.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
     -Cllvm-args=-sanitizer-coverage-trace-compares";
/// Inputs of so many bytes are shown when they are found, so that a log is enough to try them again.
const SHOWN: usize = 6 << 10;
/// Seconds for each target as part of the tests; the variable sets another number, and with 0 the seeds alone are tried.
const BRIEF: (&str, u32) = ("PUTER_FUZZ_SECONDS", 5);

/// Runs one target, or all in turn, for so many seconds. What they learn is kept in target/fuzz/.
///
/// # Errors
/// When there is no such target, it cannot be built, or it found something: then with the path of the input.
pub fn run(only: Option<&str>, seconds: u32) -> Result<()> {
    ensure!(
        only.is_none_or(|name| TARGETS.iter().any(|(target, _)| *target == name)),
        "there is no target '{}'; there are: {}",
        only.unwrap_or_default(),
        TARGETS.map(|(target, _)| target).join(", ")
    );
    let fuzzer = Fuzzer::build()?;
    for (target, length) in TARGETS.iter().filter(|(target, _)| only.is_none_or(|name| name == *target)) {
        println!("{target}: {seconds} s, {} inputs to begin with", fs::read_dir(seeds(target))?.count());
        println!("{target}: {}", fuzzer.one(target, *length, seconds)?);
    }
    Ok(())
}

/// Runs each target whose name contains `filter` for a few seconds, several side by side, and prints what comes of it as
/// the runners of tests do.
///
/// # Errors
/// When they cannot be built. A finding is no error here: it is a test that failed, in the lines that are printed.
pub fn briefly(filter: Option<&str>, tell: &mut (dyn FnMut(&str) + Send)) -> Result<()> {
    let seconds = match std::env::var(BRIEF.0) {
        Ok(text) => text.parse().with_context(|| format!("{} is '{text}', which is no number", BRIEF.0))?,
        Err(_) => BRIEF.1,
    };
    let name = |target: &str| format!("fuzz::{target}");
    let wanted: Vec<_> =
        TARGETS.iter().filter(|(target, _)| filter.is_none_or(|filter| name(target).contains(filter))).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let fuzzer = Fuzzer::build()?;
    tell(&format!("\nrunning {} targets of fuzz/ for {seconds} s each", wanted.len()));
    let (next, failures, tell) = (AtomicUsize::new(0), Mutex::new(Vec::new()), Mutex::new(tell));
    let lock = "nobody panics with it";
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some((target, length)) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = fuzzer.one(target, *length, seconds);
                    let word = if result.is_ok() { "ok" } else { "FAILED" };
                    tell.lock().expect(lock)(&format!("test {} ... {word}", name(target)));
                    failures.lock().expect(lock).extend(result.err().map(|error| (name(target), error)));
                }
            });
        }
    });
    let (failures, tell) = (failures.into_inner().expect(lock), tell.into_inner().expect(lock));
    for (name, error) in &failures {
        tell(&format!("\n---- {name} ----\n{error:#}"));
    }
    let word = if failures.is_empty() { "ok" } else { "FAILED" };
    let (passed, failed) = (wanted.len() - failures.len(), failures.len());
    tell(&format!("\ntest result: {word}. {passed} passed; {failed} failed"));
    Ok(())
}

fn seeds(target: &str) -> PathBuf {
    top().join("fuzz/seeds").join(target)
}

/// The program that holds the targets, and where it keeps things.
struct Fuzzer {
    program: PathBuf,
    directory: PathBuf,
    /// For what targets write: in memory where the host has a file system there.
    scratch: PathBuf,
}

impl Fuzzer {
    fn build() -> Result<Fuzzer> {
        packages::install(&["g++"])?;
        let directory = top().join("target/fuzz");
        let host = build::host_target()?;
        shell::run(
            Command::new("cargo")
                .args(["build", "--release", "--quiet", "--target", &host, "--manifest-path"])
                .arg(top().join("fuzz/Cargo.toml"))
                .arg("--target-dir")
                .arg(&directory)
                .env("RUSTFLAGS", FLAGS),
        )?;
        let memory = Path::new("/dev/shm");
        let name = format!("puter-fuzz-{}", std::process::id());
        let scratch = if memory.is_dir() { memory.join(name) } else { directory.join(name) };
        fs::create_dir_all(&scratch).with_context(|| format!("cannot make {}", scratch.display()))?;
        Ok(Fuzzer { program: directory.join(host).join("release/puter-fuzz"), directory, scratch })
    }

    /// Runs one target and gives libFuzzer's own summary; with 0 seconds the seeds alone are tried.
    fn one(&self, target: &str, length: u32, seconds: u32) -> Result<String> {
        let (learnt, found) = (self.directory.join("corpus").join(target), self.directory.join("found"));
        for path in [&learnt, &found] {
            fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
        }
        let log = self.directory.join(format!("{target}.log"));
        let limit = if seconds == 0 { "-runs=0".to_string() } else { format!("-max_total_time={seconds}") };
        let status = Command::new(&self.program)
            .args([limit, format!("-max_len={length}"), "-print_final_stats=1".into()])
            .args(LIMITS)
            .arg(format!("-artifact_prefix={}/{target}-", found.display()))
            .args([&learnt, &seeds(target)])
            .env("PUTER_FUZZ_TARGET", target)
            .env("TMPDIR", &self.scratch)
            .stdout(fs::File::create(&log)?)
            .stderr(fs::File::options().append(true).open(&log)?)
            .status()
            .with_context(|| format!("cannot run {}", self.program.display()))?;
        let said = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
        if status.success() {
            let summary = said.lines().filter(|line| line.starts_with("Done ") || line.contains("new_units_added"));
            return Ok(summary.map(str::trim).collect::<Vec<_>>().join(", "));
        }
        bail!("{target}: {status}; {}the log is {}\n{}", input(&said), log.display(), reason(&said))
    }
}

impl Drop for Fuzzer {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.scratch);
    }
}

/// The input that libFuzzer says it has written, and how to have it again from what is printed here.
fn input(log: &str) -> String {
    let Some(path) = log.lines().find_map(|line| line.split_once("Test unit written to ")).map(|(_, path)| path.trim())
    else {
        return String::new();
    };
    let shown = match fs::read(path) {
        Ok(bytes) if bytes.len() <= SHOWN => format!(", by `base64 -d` of\n{}\n", STANDARD.encode(bytes)),
        _ => "; ".into(),
    };
    format!("the input is {path}{shown}")
}

/// What a log says of a finding: the panic, or its last lines where there was none (too long, or too much memory).
fn reason(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    let panic = lines.iter().position(|line| line.contains("panicked at"));
    let from = panic.unwrap_or(lines.len().saturating_sub(25));
    lines[from..].iter().take(25).copied().collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_seeds_and_every_seed_a_target() {
        let source = fs::read_to_string(top().join("fuzz/targets/main.rs")).unwrap();
        let mut kept: Vec<String> = fs::read_dir(top().join("fuzz/seeds"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        kept.sort();
        assert_eq!(kept, TARGETS.map(|(target, _)| target));
        for (target, length) in TARGETS {
            assert!(source.contains(&format!("\"{target}\" => {target}::run")), "{target}");
            let sizes = fs::read_dir(seeds(target)).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len());
            let longest = sizes.max().expect("a seed");
            assert!(longest <= length.into(), "{target} has a seed of {longest} bytes, which are cut off");
        }
    }

    #[test]
    fn a_finding_can_be_had_again_from_what_is_printed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent-crash-1");
        fs::write(&path, [0, 255, b'x']).unwrap();
        let log = format!("==1== ERROR\nartifact_prefix='x'; Test unit written to {}\nBase64: \n", path.display());
        assert_eq!(input(&log), format!("the input is {}, by `base64 -d` of\nAP94\n", path.display()));
        fs::write(&path, vec![7; SHOWN + 1]).unwrap();
        assert_eq!(input(&log), format!("the input is {}; ", path.display()));
        assert_eq!(input("nothing of the kind"), "");
        let log = format!("#1 INITED\nthread panicked at a.rs:1\nwhy\n{}", "frame\n".repeat(100));
        assert!(
            reason(&log).starts_with("thread panicked at a.rs:1\nwhy\nframe") && reason(&log).lines().count() == 25
        );
        assert_eq!(reason("#1\n#2"), "#1\n#2");
    }
}
