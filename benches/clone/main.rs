//! How long a clone takes, against the hypervisor's own restore of the same snapshot and against a cold start; and a cold
//! start against the hypervisor's own.
//!
//! `cargo xtask bench clone` runs it with the emulator in a world of its own. With `--here` it uses the puter, the puterd
//! and the default image of whoever calls it: so it is run on a host with KVM. `BENCH_MEMORY` is the machine's memory,
//! `BENCH_TOUCH` how many MiB of it the guest fills before the snapshot.

mod memory;
mod offload;
mod start;

use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use offload::Offload;
use puter::disk::qcow2;
use puter::hypervisor::snapshot::{CONFIG, Own, prepare};
use puter::hypervisor::{self, Kind, Launch, MemoryMode, Restore, process};
use puter::protocol::address::Mac;
use puter::protocol::daemon::TapRequest;
use puter::vm::agent::Agent;
use puter::vm::home::Home;
use puter::vm::settings::{Settings, show_size};
use puter::vm::snapshots::{self, Snapshot};
use puter::vm::state::Vm;
use puter::vm::{daemon, files};
use xtask::bench;
use xtask::report::{Figure, median};

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
    let in_a_world = || bench::run_in(&bench::world()?, &[("BENCH_MEMORY", "256M")]);
    let result = if here { measure() } else { in_a_world() };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
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
    how: How,
}

enum How {
    /// By `--restore`, with the memory as a zone or as the hypervisor does it by itself.
    Restore { map: bool, memory: MemoryMode },
    /// From another process, which hands it over.
    Offload { on_demand: bool },
}

/// How long a machine took to answer, and what it has of the memory then.
#[derive(Clone, Copy)]
struct Measured {
    seconds: f64,
    memory: memory::Memory,
}

/// A machine that the hypervisor brings back without puter.
struct Bare {
    name: String,
    own: Own,
    began: Instant,
    child: Child,
    start_time: u64,
    /// Who hands it its memory, where somebody does.
    _coming: Option<offload::Helper>,
}

impl Bench {
    fn all(&self) -> Result<()> {
        println!("hypervisor: {}; memory of the machine: {}", self.kind, self.memory);
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        println!("host: {cores} processors, {}\n", snapshots::cpu().map_or(String::new(), |cpu| cpu.model));
        // The first start makes the disk and the second is what users see from then on.
        self.timed(&["start", SOURCE, "--memory", &self.memory], &[SOURCE], "boot")?;
        let (cold, bare_cold) = self.starts()?;
        self.touch()?;
        self.puter(&["snapshot", SOURCE, "--name", "bench"])?;
        let snapshot = snapshots::find(&self.home, &format!("{SOURCE}@bench").parse().map_err(anyhow::Error::msg)?)?;
        let paused = snapshot.paused.unwrap_or_default();
        let offload = Offload::take(&self.home, &self.kind, SOURCE)?;

        let ways = self.ways(offload.is_some());
        let (mut clones, mut wholes) = (Vec::new(), Vec::new());
        let mut bares = vec![Vec::new(); ways.len()];
        for round in 1..=ROUNDS {
            let (agent, whole) =
                self.timed(&["clone", &format!("{SOURCE}@bench"), "bench-0"], &["bench-0"], "agent")?;
            self.puter(&["delete", "--force", "bench-0"])?;
            eprintln!("round {round} of {ROUNDS}: clone {agent:.3} s, {whole:.3} s in all");
            clones.push(agent);
            wholes.push(whole);
            for (way, times) in ways.iter().zip(&mut bares) {
                let bare = self.bare(&snapshot, offload.as_ref(), 1, way)?;
                eprintln!("    {}: {:.3} s", way.name, bare.seconds);
                times.push(bare);
            }
        }
        drop(offload);
        let names: Vec<String> = (0..MANY).map(|number| format!("bench-{number}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let source = format!("{SOURCE}@bench");
        let mut words = vec!["clone", source.as_str()];
        words.extend(&names);
        let (many, many_whole) = self.timed(&words, &names, "agent")?;
        let shares = self.shares(&names)?;
        eprintln!("{MANY} clones: {many:.3} s, {many_whole:.3} s in all; each {shares}");
        words[0] = "delete";
        words[1] = "--force";
        self.puter(&words)?;
        let bare_many = self.bare(&snapshot, None, MANY, &ways[0])?.seconds;

        let (clone, whole) = (median(clones), median(wholes));
        let line = |what: &str, time: f64| println!("{what:<66} {time:8.3} s");
        line("cold `puter start`, to the agent's answer (median)", cold);
        line("bare start of the same machine, to the agent's answer (median)", bare_cold);
        line("paused for `puter snapshot`", paused);
        line("`puter clone`, to the agent's answer (median)", clone);
        line("`puter clone`, whole (median)", whole);
        let times: Vec<f64> = bares.iter().map(|all| median(all.iter().map(|one| one.seconds))).collect();
        for ((way, time), all) in ways.iter().zip(&times).zip(&bares) {
            line(&format!("bare restore, {}, to the agent's answer (median)", way.name), *time);
            let private = median(all.iter().map(|one| one.memory.private as f64));
            println!("    its memory then: {} of its own", show_size(private as u64));
        }
        line(&format!("{MANY} clones in one command, to the last agent's answer"), many);
        line(&format!("{MANY} clones in one command, whole"), many_whole);
        line(&format!("{MANY} bare restores at once, to the last agent's answer"), bare_many);
        println!("\neach of {MANY} clones once it runs (medians): {shares}\n");
        for (way, time) in ways.iter().zip(&times) {
            println!("clone / bare restore, {}: {:.3}", way.name, clone / time);
        }
        println!("clone / cold start:   {:.3}", clone / cold);
        println!("cold start / bare start: {:.3}", cold / bare_cold);
        println!("{MANY} clones / {MANY} bare: {:.3}", many / bare_many);
        let figure = |what: &str, value| Figure::new("clone", what, value, "s");
        figure("a clone, to its agent's answer", clone).against("bare restore", times[0]).goal(1.15).tell();
        // The goal is the real hypervisor's: an emulated clone copies its memory.
        let started = figure("a clone, to its agent's answer", clone).against("cold puter start", cold);
        let real = matches!(self.kind, Kind::CloudHypervisor { .. });
        let started = if real { started.goal(0.1) } else { started };
        started.tell();
        figure(&format!("{MANY} clones at once"), many).against(&format!("{MANY} bare restores"), bare_many).tell();
        figure("a cold start, to the agent's answer", cold).against("bare start", bare_cold).tell();
        figure("paused for a snapshot", paused).tell();
        Ok(())
    }

    /// Has the guest fill as many MiB of its memory with what is not zero as `BENCH_TOUCH` says.
    fn touch(&self) -> Result<()> {
        let Some(size) = std::env::var("BENCH_TOUCH").ok().and_then(|text| text.parse::<u64>().ok()) else {
            return Ok(());
        };
        let fill = format!(
            "mkdir -p /run/touched && mount -t tmpfs -o size={size}m none /run/touched && \
             yes puter | head -c {size}M >/run/touched/file"
        );
        self.puter(&["exec", SOURCE, "--", "/bin/sh", "-c", &fill])
    }

    /// What each of these machines has for itself, and what it shares.
    fn shares(&self, names: &[&str]) -> Result<String> {
        let (mut private, mut resident, mut share, mut disk) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for name in names {
            let vm = Vm::load(&self.home, name)?.context("the clone is gone")?;
            let memory = memory::of(vm.process.context("the clone does not run")?.pid)?;
            private.push(memory.private as f64);
            resident.push(memory.resident as f64);
            share.push(memory.share as f64);
            disk.push(std::fs::metadata(&vm.overlay)?.blocks() as f64 * 512.0);
        }
        let size = |all: Vec<f64>| show_size(median(all) as u64);
        let (private, resident, share, disk) = (size(private), size(resident), size(share), size(disk));
        Ok(format!("{resident} resident, {private} of it its own, {share} its share (PSS); disk {disk}"))
    }

    /// The ways of the hypervisor; the first is the one that puter takes.
    fn ways(&self, offload: bool) -> Vec<Way> {
        let restore = |name, map, memory| Way { name, how: How::Restore { map, memory } };
        let copied = restore("memory copied", false, MemoryMode::Copy);
        if !matches!(self.kind, Kind::CloudHypervisor { .. }) {
            return vec![copied];
        }
        let mut ways = vec![restore("memory mapped privately", true, MemoryMode::Copy), copied];
        let allowed = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default();
        let on_demand = allowed.trim() == "1";
        if on_demand {
            ways.push(restore("memory on demand", false, MemoryMode::OnDemand));
        }
        if offload {
            ways.push(Way { name: "memory handed over", how: How::Offload { on_demand: false } });
        }
        if offload && on_demand {
            ways.push(Way { name: "memory handed over on demand", how: How::Offload { on_demand: true } });
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

    /// Lets the hypervisor bring back so many machines at once, and tells when the agents of all have answered.
    fn bare(&self, snapshot: &Snapshot, offload: Option<&Offload>, count: usize, way: &Way) -> Result<Measured> {
        let mut ready = Vec::new();
        let directory = snapshot.directory(&self.home);
        let (base, source) = match (&way.how, offload) {
            (How::Offload { .. }, Some(offload)) => (offload.disk.clone(), offload.directory.clone()),
            _ => (snapshot.disk(&self.home), directory),
        };
        for number in 0..count {
            let name = format!("bench-bare-{number}");
            let id = FIRST_ID + number as u32;
            let tap = self.daemon.ensure_tap(&TapRequest { vm: name.clone(), id, isolated: false, member: None })?;
            let overlay = self.home.overlay(&name);
            files::remove(&overlay)?;
            qcow2::create_overlay(&overlay, &base, qcow2::Format::Qcow2, snapshot.machine.disk)?;
            let config: serde_json::Value = serde_json::from_slice(&std::fs::read(source.join(CONFIG))?)?;
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
            let target = self.home.restore(&name);
            files::remove(&target)?;
            match &way.how {
                How::Restore { map, .. } => prepare(&source, &target, &own, *map)?,
                How::Offload { .. } => offload.context("nobody took the machine")?.prepare(&target, &own)?,
            }
            ready.push((name, own));
        }
        let began = Instant::now();
        let mut running = Vec::new();
        for (name, own) in ready {
            running.push(self.begin(name, own, offload, way, began)?);
        }
        let answered: Result<Vec<()>> = std::thread::scope(|scope| {
            let all: Vec<_> = running.iter().map(|bare| scope.spawn(|| self.answer(bare))).collect();
            all.into_iter()
                .map(|one| one.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked"))))
                .collect()
        });
        let seconds = began.elapsed().as_secs_f64();
        let memory = running.first().map(|bare| memory::of(bare.child.id()));
        for mut bare in running {
            process::kill(bare.child.id(), bare.start_time, Duration::from_secs(10));
            let _ = bare.child.wait();
            self.forget(&bare.name);
        }
        answered?;
        Ok(Measured { seconds, memory: memory.context("no machine")?? })
    }

    fn begin(&self, name: String, own: Own, offload: Option<&Offload>, way: &Way, began: Instant) -> Result<Bare> {
        let source = self.home.restore(&name);
        let (api_socket, log) = (self.home.api(&name), self.home.hypervisor_log(&name));
        let (child, start_time, coming) = match (&way.how, offload) {
            (How::Restore { memory, .. }, _) => {
                let restore = Restore { source, memory: *memory, api_socket, events: None };
                let sockets = vec![own.vsock.clone(), own.serial.clone()];
                let process = Launch::restore(&self.kind, &restore, sockets, &log)?.spawn()?;
                let start_time = process.start_time();
                (process.into_child(), start_time, None)
            }
            (How::Offload { on_demand }, Some(offload)) => {
                let (child, helper) = offload.restore(&self.kind, &source, &api_socket, &log, *on_demand)?;
                let start_time = process::start_time(child.id()).unwrap_or(0);
                (child, start_time, Some(helper))
            }
            (How::Offload { .. }, None) => anyhow::bail!("nobody took the machine"),
        };
        Ok(Bare { name, own, began, child, start_time, _coming: coming })
    }

    fn answer(&self, bare: &Bare) -> Result<()> {
        let socket = &bare.own.vsock;
        loop {
            let asked =
                Agent::connect(socket, Duration::from_secs(5)).and_then(|mut agent| agent.ping(Duration::from_secs(5)));
            match asked {
                Ok(_) => return Ok(()),
                Err(error) => ensure!(
                    bare.began.elapsed() < LIMIT && process::is_alive(bare.child.id(), bare.start_time),
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
