//! Debian packages that a command needs.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::shell::{as_root, find, run};

/// For building the guest's image.
pub const GUEST_IMAGE: &[&str] = &["mmdebstrap", "umoci", "e2fsprogs", "uidmap", "zstd"];

/// For packages of it, and their check.
pub const PACKAGE: &[&str] =
    &["dpkg", "libcap2-bin", "lintian", "mmdebstrap", "rpm", "rpmlint", "systemd", "util-linux"];

/// For judging its dependencies.
pub const DENY: &[&str] = &["ca-certificates", "git", "python3-venv"];

/// For running it: the emulator, a registry, namespaces and ssh.
pub const RUN: &[&str] = &[
    "qemu-system-x86",
    "docker-registry",
    "skopeo",
    "iproute2",
    "util-linux",
    "busybox-static",
    "openssh-client",
    "libcap2-bin",
];

/// For the tests alone.
pub const TEST: &[&str] = &[
    "qemu-utils",
    "tcpdump",
    "dhcpcd-base",
    "isc-dhcp-client",
    "dnsmasq-base",
    "udhcpc",
    "nftables",
    "iptables",
    "curl",
    "iputils-ping",
    "openssl",
    "ansible-core",
    "apache2-utils",
    "attr",
    "cpio",
    "file",
    "fish",
    "libarchive-tools",
    "libbluetooth3",
    "libcap-ng-dev",
    "libcurl3-gnutls",
    "libmm-glib0",
    "libndp0",
    "libnm0",
    "libpsl5",
    "libseccomp-dev",
    "libteamdctl0",
    "libvirt-clients",
    "libvirt-daemon",
    "mandoc",
    "python3-venv",
    "socat",
    "xfsprogs",
    "zsh",
];

/// For the benchmark of images: its peers.
pub const BENCH_IMAGE: &[&str] = &["qemu-utils"];

/// For the benchmarks of the command line and of clones: their peers, and who counts instructions.
pub const BENCH_CLI: &[&str] =
    &["libvirt-clients", "libvirt-daemon", "libvirt-daemon-driver-qemu", "qemu-guest-agent", "valgrind"];

/// For the benchmark of the network: its peers, and namespaces.
pub const BENCH_NET: &[&str] = &["dnsmasq-base", "kea-dhcp4-server", "iproute2", "nftables", "util-linux"];

/// Installs those that are missing, asking sudo for root.
///
/// # Errors
/// When this is no Debian, or a package cannot be installed.
pub fn install(packages: &[&str]) -> Result<()> {
    ensure!(
        find("apt-get").is_some(),
        "apt-get is not here; install by your own means what these Debian packages hold: {}",
        packages.join(" ")
    );
    let mut missing = absent(packages)?;
    if missing.is_empty() {
        return Ok(());
    }
    println!("installing {}", missing.join(" "));
    run(apt().args(["-qq", "update"]))?;
    // A package from another suite may stand in the way of one that shares its source; apt then removes it, and the
    // second round brings back the fitting version.
    for _ in 0..2 {
        for package in &missing {
            run(apt().args(["-qq", "-y", "--no-install-recommends", "install", package]))?;
        }
        missing = absent(packages)?;
        if missing.is_empty() {
            return Ok(());
        }
    }
    anyhow::bail!("apt-get did not install {}", missing.join(" "))
}

/// Puts a package's files below the directory `to`, and installs nothing: what would run from then on, as services do,
/// is of no use to who just tests with it.
///
/// # Errors
/// When it cannot be had or unpacked.
pub fn unpack(package: &str, to: &Path) -> Result<()> {
    let all = to.with_extension("deb");
    let _ = std::fs::remove_dir_all(&all);
    std::fs::create_dir_all(&all)?;
    run(Command::new("apt-get").args(["-qq", "download", package]).current_dir(&all))?;
    let file = std::fs::read_dir(&all)?.next().with_context(|| format!("apt-get gave no {package}"))??.path();
    run(Command::new("dpkg").arg("--extract").arg(file).arg(to))?;
    Ok(std::fs::remove_dir_all(&all)?)
}

fn apt() -> Command {
    let mut command = as_root("env");
    command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "-o", "Dpkg::Use-Pty=0"]);
    command
}

fn absent<'a>(packages: &[&'a str]) -> Result<Vec<&'a str>> {
    let output = Command::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Abbrev} ${Package}\n"])
        .args(packages)
        .output()
        .context("cannot run dpkg-query")?;
    let listing = String::from_utf8_lossy(&output.stdout).into_owned();
    let present: Vec<&str> = listing.lines().filter_map(|line| line.strip_prefix("ii ")).map(str::trim).collect();
    Ok(packages.iter().copied().filter(|package| !present.contains(package)).collect())
}
