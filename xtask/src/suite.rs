//! `cargo xtask test`: every test there is, with the totals of all runners at the end.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::shell::top;
use crate::{build, fuzz, packages};

/// Runs all tests, as root where they need it; `filter` picks those whose name contains it.
///
/// # Errors
/// When a test fails, or what the tests need cannot be had.
pub fn run(filter: Option<&str>) -> Result<()> {
    // Also what single tests would install by themselves: side by side they would meet apt's lock.
    for list in [packages::GUEST_IMAGE, packages::RUN, packages::TEST, packages::PACKAGE, packages::DENY] {
        packages::install(list)?;
    }
    let built = build::release()?;
    let vsock = build::vhost_device_vsock()?;
    let guest = build::guest_image(&built)?;
    let virtiofsd = build::virtiofsd()?;
    let network_manager = build::network_manager()?;
    let schemathesis = build::schemathesis()?;
    let (small, etcd) = (build::small_guest(&built)?, build::etcd_guest(&built)?);
    let mut cargo = Command::new("cargo");
    cargo
        .args(["test", "--workspace", "--features", "puter/fail-points", "--no-fail-fast", "--"])
        .args(filter)
        .arg("--include-ignored");
    if std::env::var_os("PUTER_TEST_CLOUD_HYPERVISOR").is_none() {
        println!("PUTER_TEST_CLOUD_HYPERVISOR names no cloud-hypervisor: its own test is left out");
        cargo.args(["--skip", "cloud_hypervisor_itself"]);
    }
    cargo.current_dir(top());
    cargo.env("PUTER_TEST_KERNEL", build::guest_kernel()?);
    cargo.env("PUTER_TEST_BIN", &built.dir).env("PUTER_TEST_GUEST", &guest);
    cargo
        .env("PUTER_TEST_SMALL_GUEST", &small)
        .env("PUTER_TEST_ETCD_GUEST", &etcd)
        .env("PUTER_TEST_VIRTIOFSD", &virtiofsd)
        .env("PUTER_TEST_NETWORK_MANAGER", &network_manager)
        .env("PUTER_TEST_SCHEMATHESIS", &schemathesis)
        .env("PUTER_VHOST_DEVICE_VSOCK", &vsock);
    as_root(&mut cargo)?;
    let mut child = cargo.stdout(Stdio::piped()).spawn().context("cannot run cargo test")?;
    let mut totals = Totals::default();
    for line in BufReader::new(child.stdout.take().context("cargo has no output")?).lines() {
        let line = line.context("cannot read cargo's output")?;
        totals.add(&line);
        println!("{line}");
        std::io::stdout().flush()?;
    }
    let status = child.wait()?;
    let failed = totals.failed;
    fuzz::briefly(filter, &mut |line| {
        line.lines().for_each(|line| totals.add(line));
        println!("{line}");
    })?;
    let findings = totals.failed - failed;
    println!("\n{} passed, {} failed", totals.passed, totals.failed);
    ensure!(status.success(), "the tests failed ({status})");
    ensure!(findings == 0, "{findings} targets of fuzz/ have found something: see above");
    ensure!(totals.passed > 0, "no test ran");
    Ok(())
}

/// Lets cargo run what it builds through sudo where this process is not root's.
pub(crate) fn as_root(cargo: &mut Command) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        let target = crate::shell::output(Command::new("rustc").args(["--print", "host-tuple"]))?;
        let variable = format!("CARGO_TARGET_{}_RUNNER", target.to_ascii_uppercase().replace('-', "_"));
        cargo.env(variable, "sudo --preserve-env");
    }
    Ok(())
}

/// Sums of the runners' result lines.
#[derive(Debug, Default, PartialEq, Eq)]
struct Totals {
    passed: u64,
    failed: u64,
}

impl Totals {
    /// Takes a line such as `test result: ok. 5 passed; 0 failed; 0 ignored; …`.
    fn add(&mut self, line: &str) {
        let Some(counts) = line.strip_prefix("test result: ") else { return };
        let count = |word: &str| -> u64 {
            let before = counts.split(word).next().unwrap_or_default();
            before.rsplit([' ', ';']).find(|w| !w.is_empty()).and_then(|n| n.parse().ok()).unwrap_or(0)
        };
        self.passed += count(" passed");
        self.failed += count(" failed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_are_summed() {
        let mut totals = Totals::default();
        totals.add("test result: ok. 12 passed; 0 failed; 3 ignored; 0 measured; 0 filtered out; finished in 0.1s");
        totals.add("test some::test ... ok");
        totals.add("test result: FAILED. 5 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out");
        assert_eq!(totals, Totals { passed: 17, failed: 2 });
    }
}
