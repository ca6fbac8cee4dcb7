//! The command line, the agent and the executable, against libvirt's and QEMU's: how long they take, what they need.
//!
//! `cargo xtask bench cli` runs it with the emulator in a world of its own.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{Context, Result, ensure};
use puter::protocol::address::{Mac, Subnet, tap_name};
use puter::vm::home::Home;
use puter::vm::state::Vm;
use xtask::report::{Figure, median, resident};
use xtask::{bench, shell};

/// Pairs of runs of a command.
const ROUNDS: usize = 51;
const VMS: u32 = 200;
const NAME: &str = "bench";
const MIB: f64 = 1024.0 * 1024.0;
/// What libvirt consists of, for one user's machines on QEMU.
const LIBVIRT: [&str; 5] =
    ["libvirt0", "libvirt-clients", "libvirt-daemon", "libvirt-daemon-driver-qemu", "dnsmasq-base"];
const VIRSH: &str = "virsh -q -c qemu:///session";

fn main() -> ExitCode {
    let here = env::args().any(|word| word == "--here");
    let result = if here { measure() } else { bench::world().and_then(|world| bench::run_in(&world, &[])) };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn figure(what: &str, value: f64, unit: &str, peer: Option<(&str, f64)>) {
    match peer {
        Some((name, other)) => {
            println!("{what:<44} {value:>12.3} {unit:<4} {name}: {other:.3} ({:.3})", value / other);
            Figure::new("cli", what, value, unit).against(name, other).tell();
        }
        None => {
            println!("{what:<44} {value:>12.3} {unit}");
            Figure::new("cli", what, value, unit).tell();
        }
    }
}

fn measure() -> Result<()> {
    let home = Path::new(&env::var_os("HOME").context("no HOME")?).to_owned();
    let size = fs::metadata(shell::find("puter").context("puter is not on the PATH")?)?.len() as f64 / MIB;
    figure("the executable", size, "MiB", Some(("libvirt, installed", installed(&LIBVIRT)?)));

    pair("start-up, --version", &words("puter --version"), &words("virsh --version"))?;
    agent(&home)?;
    many()?;
    let _libvirtd = define_domains(&home)?;
    pair(&format!("list of {VMS} VMs"), &words("puter list"), &words(&format!("{VIRSH} list --all")))
}

fn words(line: &str) -> Vec<String> {
    line.split(' ').map(str::to_owned).collect()
}

/// What these Debian packages take, in MiB (deb-control(5), Installed-Size).
fn installed(packages: &[&str]) -> Result<f64> {
    let said = shell::output(Command::new("dpkg-query").args(["-W", "-f", "${Installed-Size}\n"]).args(packages))?;
    let sizes: Result<Vec<f64>, _> = said.lines().map(str::parse).collect();
    Ok(sizes?.iter().sum::<f64>() / 1024.0)
}

/// Time and instructions of a command of puter's and of one of libvirt's, in turn.
fn pair(what: &str, ours: &[String], theirs: &[String]) -> Result<()> {
    let (mut own, mut peer) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        own.push(time(ours)?);
        peer.push(time(theirs)?);
    }
    figure(what, median(own), "ms", Some(("virsh", median(peer))));
    let millions = |words: &[String]| instructions(words).map(|count| count / 1e6);
    figure(&format!("{what}: instructions"), millions(ours)?, "M", Some(("virsh", millions(theirs)?)));
    Ok(())
}

fn time(words: &[String]) -> Result<f64> {
    let began = Instant::now();
    let status = Command::new(&words[0]).args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::null()).status()?;
    ensure!(status.success(), "{}: {status}", words.join(" "));
    Ok(began.elapsed().as_secs_f64() * 1e3)
}

/// How many instructions a command takes by itself, which no other load changes.
fn instructions(words: &[String]) -> Result<f64> {
    // Valgrind runs no program that has capabilities.
    let program = shell::find(&words[0]).with_context(|| format!("{} is not on the PATH", words[0]))?;
    let directory = tempfile::tempdir()?;
    let copy = directory.path().join(&words[0]);
    fs::copy(program, &copy)?;
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(&copy).args(&words[1..]);
    let output = command.stdin(Stdio::null()).output().context("cannot run valgrind")?;
    let said = String::from_utf8_lossy(&output.stderr);
    let count = said.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse().ok());
    count.with_context(|| format!("valgrind counted nothing of {}: {said}", words.join(" ")))
}

fn puter(arguments: &[&str]) -> Result<String> {
    shell::output(Command::new("puter").args(arguments))
}

/// The agent in a guest, beside QEMU's; and what stays on the host for each VM besides its hypervisor.
fn agent(home: &Path) -> Result<()> {
    puter(&["start", NAME, "--memory", "256M"])?;
    let script = "for s in /proc/[0-9]*/status; do \
        if /bin/busybox grep -q 'Name:.*puter-agent' $s; then /bin/busybox grep VmRSS $s; break; fi; done";
    let own = resident(&puter(&["exec", NAME, "--", "/bin/busybox", "sh", "-c", script])?)?;

    let socket = home.join("ga.sock");
    let state = home.join("ga");
    fs::create_dir(&state)?;
    let mut ga = Killed(
        Command::new("qemu-ga")
            .args(["-m", "unix-listen", "-p"])
            .arg(&socket)
            .arg("-t")
            .arg(&state)
            .stderr(Stdio::null())
            .spawn()
            .context("cannot run qemu-ga")?,
    );
    let mut stream = connect(&socket, &mut ga)?;
    stream.write_all(b"{\"execute\":\"guest-ping\"}\n")?;
    let mut answer = String::new();
    BufReader::new(&stream).read_line(&mut answer)?;
    ensure!(answer.contains("return"), "qemu-ga said {answer}");
    let peer = resident(&fs::read_to_string(format!("/proc/{}/status", ga.0.id()))?)?;
    figure("the agent, resident", own, "MiB", Some(("qemu-ga", peer)));

    let monitor = processes("puter-monitor")?;
    let [monitor] = monitor[..] else { anyhow::bail!("there are {} monitors", monitor.len()) };
    figure(
        "the monitor of a VM, resident",
        resident(&fs::read_to_string(format!("/proc/{monitor}/status"))?)?,
        "MiB",
        None,
    );
    puter(&["stop", NAME]).map(drop)
}

fn connect(socket: &Path, server: &mut Killed) -> Result<UnixStream> {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) => ensure!(
                Instant::now() < end && server.0.try_wait()?.is_none(),
                "nobody listens on {}: {error}",
                socket.display()
            ),
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Processes that were called so.
fn processes(name: &str) -> Result<Vec<u32>> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // It may have ended meanwhile.
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if words.split(|byte| *byte == 0).next() == Some(name.as_bytes()) {
            all.push(pid);
        }
    }
    Ok(all)
}

/// Makes more VMs that do not run, of the one there is.
fn many() -> Result<()> {
    let home = Home::from_env()?;
    let first = Vm::load(&home, NAME)?.context("there is no VM")?;
    for id in first.id + 1..first.id + VMS {
        let name = format!("{NAME}-{id}");
        let vm = Vm {
            id,
            mac: Mac::of_id(id),
            ip: Subnet::default().address(id).context("the subnet is too small")?,
            tap: tap_name(&name),
            overlay: home.overlay(&name),
            name,
            ..first.clone()
        };
        fs::copy(&first.overlay, &vm.overlay)?;
        vm.save(&home)?;
    }
    let listed = puter(&["list"])?;
    ensure!(listed.lines().count() == VMS as usize + 1, "{listed}");
    Ok(())
}

/// Defines as many domains in the user's own libvirtd, which stays as long as what is returned.
fn define_domains(home: &Path) -> Result<Killed> {
    let run = env::var_os("XDG_RUNTIME_DIR").map_or_else(|| home.join("run"), Into::into);
    fs::create_dir_all(&run)?;
    // SAFETY: this program has one thread.
    unsafe { env::set_var("XDG_RUNTIME_DIR", &run) };
    let daemon = Command::new("libvirtd").stderr(Stdio::null()).spawn().context("cannot run libvirtd")?;
    let mut daemon = Killed(daemon);
    drop(connect(&run.join("libvirt/libvirt-sock"), &mut daemon)?);
    let file = home.join("domain.xml");
    for number in 1..=VMS {
        fs::write(
            &file,
            format!(
                "<domain type='qemu'><name>{NAME}-{number}</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>\
                 <os><type arch='x86_64'>hvm</type></os><devices><disk type='file' device='disk'>\
                 <driver name='qemu' type='qcow2'/><source file='{}/{number}.qcow2'/>\
                 <target dev='vda' bus='virtio'/></disk></devices></domain>",
                home.display()
            ),
        )?;
        let words = words(&format!("{VIRSH} define"));
        shell::output(Command::new(&words[0]).args(&words[1..]).arg(&file))?;
    }
    Ok(daemon)
}

/// A process that ends with this value.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
