//! How long a clone takes, against the hypervisor's own restore of the same snapshot and against a cold start.
//!
//! `cargo xtask bench clone` runs it with the emulator in a world of its own. With `--here` it uses the puter, the puterd
//! and the default image of whoever calls it: so it is run on a host with KVM.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use puter::disk::qcow2;
use puter::hypervisor::snapshot::{CONFIG, Own, prepare};
use puter::hypervisor::{self, Kind, Launch, MemoryMode, Restore, process};
use puter::protocol::address::Mac;
use puter::protocol::daemon::TapRequest;
use puter::vm::agent::Agent;
use puter::vm::home::Home;
use puter::vm::settings::Settings;
use puter::vm::snapshots::{self, Snapshot};
use puter::vm::{daemon, files};

const SOURCE: &str = "bench-source";
/// Pairs of measurements.
const ROUNDS: usize = 5;
/// Clones in one command.
const MANY: usize = 10;
/// Numbers of machines that puter does not know; beside those of its VMs.
const FIRST_ID: u32 = 200;
const LIMIT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    // As puter does, this program starts itself under another name where the hypervisor is the emulator.
    if std::env::args_os().next().is_some_and(|name| name == "puter-emulator") {
        return puter::dispatch(std::env::args_os().collect());
    }
    let here = std::env::args().any(|word| word == "--here");
    // cargo's own words, such as --bench, are nothing to us.
    let result = if here { measure() } else { in_a_world() };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Makes a world with the emulator and runs itself in it, as its user.
fn in_a_world() -> Result<()> {
    let variable = |name: &str| {
        std::env::var_os(name).map(PathBuf::from).with_context(|| format!("{name} is not set: run `cargo xtask bench`"))
    };
    let world = xtask::world::World::new(
        &variable("PUTER_TEST_BIN")?.join("puter-multi"),
        &variable("PUTER_VHOST_DEVICE_VSOCK")?,
    )?;
    world.grant()?;
    xtask::registry::start(&world)?;
    let image =
        xtask::registry::push(&world, &variable("PUTER_TEST_SMALL_GUEST")?, xtask::build::GUEST_TAG, "puter/small")?;
    for words in [&["daemon", "start"][..], &["init", "--image", &image]] {
        let output = world.puter(words)?;
        ensure!(output.status.success(), "puter {}: {}", words.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    let copy = world.dir().join("bin/bench-clone");
    std::fs::copy(std::env::current_exe()?, &copy)?;
    let status = world.command_with(&[("BENCH_MEMORY", "256M")], &copy).arg("--here").status()?;
    ensure!(status.success(), "the measurement failed ({status})");
    Ok(())
}

/// What all measurements use.
struct Bench {
    home: Home,
    kind: Kind,
    daemon: daemon::Client,
    memory: String,
}

fn measure() -> Result<()> {
    let home = Home::from_env()?;
    let kind = hypervisor::detect(&Settings::load()?.hypervisor)?;
    let daemon = daemon::Client::new(&home);
    daemon.status()?;
    let memory = std::env::var("BENCH_MEMORY").unwrap_or_else(|_| "1G".into());
    let bench = Bench { home, kind, daemon, memory };
    bench.clear();
    let result = bench.all();
    bench.clear();
    result
}

/// How the hypervisor brings the memory back.
struct Way {
    name: &'static str,
    map: bool,
    memory: MemoryMode,
}

/// A machine that the hypervisor restored without puter.
struct Bare {
    name: String,
    process: hypervisor::Process,
    began: Instant,
}

impl Bench {
    fn all(&self) -> Result<()> {
        println!("hypervisor: {}; memory of the machine: {}", self.kind, self.memory);
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        println!("host: {cores} processors, {}\n", snapshots::cpu().map_or(String::new(), |cpu| cpu.model));
        // The first start makes the disk and the second is what users see from then on.
        self.timed(&["start", SOURCE, "--memory", &self.memory], &[SOURCE], "boot")?;
        self.puter(&["stop", SOURCE])?;
        let (cold, _) = self.timed(&["start", SOURCE], &[SOURCE], "boot")?;
        self.puter(&["snapshot", SOURCE, "--name", "bench"])?;
        let snapshot = snapshots::find(&self.home, &format!("{SOURCE}@bench").parse().map_err(anyhow::Error::msg)?)?;

        let ways = self.ways();
        let (mut clones, mut wholes) = (Vec::new(), Vec::new());
        let mut bares = vec![Vec::new(); ways.len()];
        for _ in 0..ROUNDS {
            let (agent, whole) =
                self.timed(&["clone", &format!("{SOURCE}@bench"), "bench-0"], &["bench-0"], "agent")?;
            self.puter(&["delete", "--force", "bench-0"])?;
            clones.push(agent);
            wholes.push(whole);
            for (way, times) in ways.iter().zip(&mut bares) {
                times.push(self.bare(&snapshot, 1, way)?);
            }
        }
        let names: Vec<String> = (0..MANY).map(|number| format!("bench-{number}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let source = format!("{SOURCE}@bench");
        let mut words = vec!["clone", source.as_str()];
        words.extend(&names);
        let (many, many_whole) = self.timed(&words, &names, "agent")?;
        words[0] = "delete";
        words[1] = "--force";
        self.puter(&words)?;
        let bare_many = self.bare(&snapshot, MANY, &ways[0])?;

        let (clone, whole) = (median(&mut clones), median(&mut wholes));
        let line = |what: &str, time: f64| println!("{what:<66} {time:8.3} s");
        line("cold `puter start`, to the agent's answer", cold);
        line("`puter clone`, to the agent's answer (median)", clone);
        line("`puter clone`, whole (median)", whole);
        for (way, times) in ways.iter().zip(&mut bares) {
            line(&format!("bare restore, {}, to the agent's answer (median)", way.name), median(times));
        }
        line(&format!("{MANY} clones in one command, to the last agent's answer"), many);
        line(&format!("{MANY} clones in one command, whole"), many_whole);
        line(&format!("{MANY} bare restores at once, to the last agent's answer"), bare_many);
        println!();
        for (way, times) in ways.iter().zip(&mut bares) {
            println!("clone / bare restore, {}: {:.3}", way.name, clone / median(times));
        }
        println!("clone / cold start:   {:.3}", clone / cold);
        println!("{MANY} clones / {MANY} bare: {:.3}", many / bare_many);
        Ok(())
    }

    /// The ways of the hypervisor; the first is the one that puter takes.
    fn ways(&self) -> Vec<Way> {
        let mut ways = Vec::new();
        if matches!(self.kind, Kind::CloudHypervisor { .. }) {
            ways.push(Way { name: "memory mapped privately", map: true, memory: MemoryMode::Copy });
        }
        ways.push(Way { name: "memory copied", map: false, memory: MemoryMode::Copy });
        let allowed = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default();
        if ways.len() > 1 && allowed.trim() == "1" {
            ways.push(Way { name: "memory on demand", map: false, memory: MemoryMode::OnDemand });
        }
        ways
    }

    fn puter(&self, words: &[&str]) -> Result<()> {
        let output = Command::new("puter").args(words).stdin(Stdio::null()).output().context("cannot run puter")?;
        ensure!(output.status.success(), "puter {}: {}", words.join(" "), String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// Runs puter, and tells when it had done this step of all the machines, and when it ended.
    fn timed(&self, words: &[&str], names: &[&str], step: &str) -> Result<(f64, f64)> {
        let began = Instant::now();
        let mut child = Command::new("puter")
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run puter")?;
        let (mut done, mut at, mut said) = (0, 0.0, String::new());
        for line in BufReader::new(child.stderr.take().context("no output")?).lines() {
            let line = line?;
            if names.iter().any(|name| line.starts_with(&format!("{name}: {step} "))) {
                done += 1;
                at = began.elapsed().as_secs_f64();
            }
            said += &(line + "\n");
        }
        let status = child.wait()?;
        ensure!(status.success() && done == names.len(), "puter {}: {said}", words.join(" "));
        Ok((at, began.elapsed().as_secs_f64()))
    }

    /// Lets the hypervisor restore so many machines at once, and tells when the agents of all have answered.
    fn bare(&self, snapshot: &Snapshot, count: usize, way: &Way) -> Result<f64> {
        let mut ready = Vec::new();
        for number in 0..count {
            let name = format!("bench-bare-{number}");
            let id = FIRST_ID + number as u32;
            let tap = self.daemon.ensure_tap(&TapRequest { vm: name.clone(), id, isolated: false })?;
            let overlay = self.home.overlay(&name);
            files::remove(&overlay)?;
            qcow2::create_overlay(&overlay, &snapshot.disk(&self.home), qcow2::Format::Qcow2, snapshot.machine.disk)?;
            let directory = snapshot.directory(&self.home);
            let config: serde_json::Value = serde_json::from_slice(&std::fs::read(directory.join(CONFIG))?)?;
            let path = |field: &str| config["payload"][field].as_str().map(PathBuf::from);
            let own = Own {
                disk: overlay,
                tap: tap.name,
                mac: Mac::of_id(id).to_string(),
                vsock: self.home.vsock(&name),
                serial: self.home.serial(&name),
                kernel: path("kernel").context("the snapshot names no kernel")?,
                initrd: path("initramfs"),
            };
            let source = self.home.restore(&name);
            files::remove(&source)?;
            prepare(&directory, &source, &own, way.map)?;
            let api_socket = self.home.api(&name);
            let restore = Restore { source, memory: way.memory, api_socket, events: None };
            let sockets = vec![self.home.vsock(&name), self.home.serial(&name)];
            ready.push((
                name.clone(),
                Launch::restore(&self.kind, &restore, sockets, &self.home.hypervisor_log(&name))?,
            ));
        }
        let began = Instant::now();
        let mut running = Vec::new();
        for (name, launch) in ready {
            running.push(Bare { name, process: launch.spawn()?, began });
        }
        let answered: Result<Vec<()>> = std::thread::scope(|scope| {
            let all: Vec<_> = running.iter().map(|bare| scope.spawn(|| self.answer(bare))).collect();
            all.into_iter()
                .map(|one| one.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked"))))
                .collect()
        });
        let took = began.elapsed().as_secs_f64();
        for bare in running {
            let (pid, start) = (bare.process.pid(), bare.process.start_time());
            process::kill(pid, start, Duration::from_secs(10));
            let _ = bare.process.into_child().wait();
            self.forget(&bare.name);
        }
        answered.map(|_| took)
    }

    fn answer(&self, bare: &Bare) -> Result<()> {
        let socket = self.home.vsock(&bare.name);
        loop {
            let asked = Agent::connect(&socket, Duration::from_secs(5))
                .and_then(|mut agent| agent.ping(Duration::from_secs(5)));
            match asked {
                Ok(_) => return Ok(()),
                Err(error) => ensure!(
                    bare.began.elapsed() < LIMIT && process::is_alive(bare.process.pid(), bare.process.start_time()),
                    "{} does not answer: {error:#}\n{}",
                    bare.name,
                    files::tail(&self.home.hypervisor_log(&bare.name), 8)
                ),
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Removes what a measurement leaves of a bare machine.
    fn forget(&self, name: &str) {
        let _ = self.daemon.delete_tap(name);
        let others = self.home.volatile(name).into_iter().chain(self.home.leftovers(name));
        for path in others.chain([self.home.overlay(name)]) {
            let _ = files::remove(&path);
        }
    }

    /// Removes all that this program makes.
    fn clear(&self) {
        for number in 0..MANY {
            let _ = self.puter(&["delete", "--force", &format!("bench-{number}")]);
            if exists(&self.home.overlay(&format!("bench-bare-{number}"))) {
                self.forget(&format!("bench-bare-{number}"));
            }
        }
        let _ = self.puter(&["delete", "--force", "--snapshots", SOURCE]);
    }
}

fn exists(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok()
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
