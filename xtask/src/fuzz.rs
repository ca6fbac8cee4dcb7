//! `cargo xtask fuzz`: the targets of fuzz/, with libFuzzer.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::shell::{self, top};
use crate::{build, packages};

/// The targets of fuzz/Cargo.toml, and their longest input in bytes.
const TARGETS: [(&str, u32); 7] = [
    ("dhcp", 4096),
    ("dns", 4096),
    ("http", 4096),
    ("layers", 16 << 10),
    ("manifest", 4096),
    ("netlink", 4096),
    ("reference", 512),
];
/// An input that takes so many seconds, or so many MiB, is a finding.
const LIMITS: [&str; 2] = ["-timeout=20", "-rss_limit_mb=1024"];
/// Coverage for libFuzzer: what cargo-fuzz asks of a nightly compiler, by the flags of a stable one. The address sanitizer
/// is not among them, and not needed where the code has next to no `unsafe`.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
     -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1";

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
    packages::install(&["g++"])?;
    let dir = top().join("target/fuzz");
    let host = build::host_target()?;
    shell::run(
        Command::new("cargo")
            .args(["build", "--release", "--quiet", "--target", &host, "--manifest-path"])
            .arg(top().join("fuzz/Cargo.toml"))
            .arg("--target-dir")
            .arg(&dir)
            .args(only.iter().flat_map(|name| ["--bin", name]))
            .env("RUSTFLAGS", FLAGS),
    )?;
    for (target, length) in TARGETS.iter().filter(|(target, _)| only.is_none_or(|name| name == *target)) {
        one(&dir, &dir.join(&host).join("release").join(target), (target, *length), seconds)?;
    }
    Ok(())
}

fn one(dir: &Path, program: &Path, (target, length): (&str, u32), seconds: u32) -> Result<()> {
    let (learnt, found) = (dir.join("corpus").join(target), dir.join("found"));
    for path in [&learnt, &found] {
        fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
    }
    let seeds = top().join("fuzz/seeds").join(target);
    println!("{target}: {seconds} s, {} inputs to begin with", fs::read_dir(&seeds)?.count());
    let log = dir.join(format!("{target}.log"));
    let status = Command::new(program)
        .args([&format!("-max_total_time={seconds}"), &format!("-max_len={length}"), "-print_final_stats=1"])
        .args(LIMITS)
        .arg(format!("-artifact_prefix={}/{target}-", found.display()))
        .args([&learnt, &seeds])
        .stdout(fs::File::create(&log)?)
        .stderr(fs::File::options().append(true).open(&log)?)
        .status()
        .with_context(|| format!("cannot run {}", program.display()))?;
    let said = fs::read_to_string(&log).unwrap_or_default();
    for line in said.lines().filter(|line| line.contains("DONE") || line.contains("number_of_executed_units")) {
        println!("{target}: {}", line.trim());
    }
    ensure!(status.success(), "{target}: {status}; see {}\n{}", log.display(), tail(&said));
    Ok(())
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(25)..].join("\n")
}
