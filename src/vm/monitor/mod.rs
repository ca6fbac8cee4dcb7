//! The monitor: one small process for each VM that runs. It starts the hypervisor and sees it end, holds the serial
//! console for everybody who attaches, writes the log within limits, carries what comes to the ports that the VM
//! publishes, and starts the VM again where its policy says so.
//!
//! Nothing else depends on its life: a VM whose monitor is killed runs on, and the next command that wants the console or
//! the ports starts another.

mod console;
mod control;
mod end;
mod forward;
mod run;
mod shares;

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

pub use control::{NoReply, Request, ask};
pub use forward::{Published, check_privilege, probe};

use self::control::Failure;
use super::files::{self, Lock};
use super::home::Home;
use super::port::Forward;
use super::state::{ProcessId, Vm};
use crate::ending;
use crate::hypervisor::Launch;
use crate::hypervisor::virtiofs::Server;

/// The longest order or answer, in bytes.
const MAX_LINE: u64 = 1 << 20;
/// How long the former monitor of a VM that has ended may take to let its ports go.
const FORMER_LIMIT: Duration = Duration::from_secs(10);

/// What a command wants of a new monitor.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Order {
    /// Start this hypervisor, after what serves its shared directories.
    Launch { hypervisor: Launch, shares: Vec<Server>, ports: Ports },
    /// See to this one, which runs.
    Adopt { hypervisor: ProcessId, ports: Ports },
}

/// The ports that a VM publishes, and where its guest is.
#[derive(Debug, Serialize, Deserialize)]
struct Ports {
    guest: Ipv4Addr,
    forwards: Vec<Forward>,
}

impl Ports {
    fn of(vm: &Vm) -> Ports {
        Ports { guest: vm.ip, forwards: vm.ports.clone() }
    }
}

/// What a monitor has begun with.
#[derive(Debug, Serialize, Deserialize)]
struct Started {
    hypervisor: ProcessId,
    /// The published ports, each with its number of the host.
    forwards: Vec<Forward>,
}

/// What the monitor answers: the hypervisor, or why there is none.
type Answer = Result<Started, Failure>;

/// A monitor that has started its hypervisor and waits to hear that this is written down.
#[derive(Debug)]
pub struct Monitored {
    pub hypervisor: ProcessId,
    /// The published ports, each with its number of the host.
    pub ports: Vec<Forward>,
    monitor: Child,
    /// Its closing without a word ends the hypervisor: the command was killed before it could save the state.
    leash: ChildStdin,
}

impl Monitored {
    /// The state names the hypervisor: from now on it outlives the command.
    ///
    /// # Errors
    /// When the monitor has ended.
    pub fn let_go(mut self) -> Result<()> {
        self.leash.write_all(b"saved\n").context("the VM's monitor has ended")?;
        // It ends with the VM, or when somebody else reaps it.
        drop(self.leash);
        let mut monitor = self.monitor;
        std::thread::spawn(move || monitor.wait());
        Ok(())
    }
}

/// Starts a monitor, and by it the hypervisor.
///
/// # Errors
/// When one of them cannot be started, or a published port cannot be had.
pub fn launch(home: &Home, vm: &Vm, hypervisor: Launch, shares: Vec<Server>) -> Result<Monitored> {
    start(home, &vm.name, &Order::Launch { hypervisor, shares, ports: Ports::of(vm) })
}

/// Starts a monitor for a VM that runs and has lost its own. A published port that cannot be had now is left out.
///
/// # Errors
/// When it cannot be started, or the VM does not run.
pub fn adopt(home: &Home, vm: &Vm) -> Result<()> {
    let hypervisor = vm.process.with_context(|| format!("'{}' does not run", vm.name))?;
    start(home, &vm.name, &Order::Adopt { hypervisor, ports: Ports::of(vm) })?.let_go()
}

/// Waits until no monitor holds the VM's ports any more: that of a VM that has just ended lets them go at once. One that
/// does not is found by whoever wants them.
pub fn wait_for_former(home: &Home, vm: &str) {
    // To look is not to make.
    if home.monitor_lock(vm).exists() {
        let _ = hold(home, vm, FORMER_LIMIT);
    }
}

/// What proves that there is a monitor: a lock, which a killed one leaves to the next.
fn hold(home: &Home, vm: &str, limit: Duration) -> Result<Lock> {
    files::lock(&home.monitor_lock(vm), limit, &format!("another monitor sees to '{vm}'"))
}

/// Connects to the console of a VM that runs: first comes what it showed before, then each piece as it comes; what is
/// written is typed. A monitor that was killed is replaced.
///
/// # Errors
/// When there is no console to be had.
pub fn attach(home: &Home, vm: &Vm) -> Result<UnixStream> {
    let path = home.console(&vm.name);
    let connect = || ending::connect(&path).with_context(|| format!("cannot reach the console {}", path.display()));
    match (connect(), vm.process) {
        (Ok(stream), _) => Ok(stream),
        (Err(_), Some(_)) => {
            let adopted = adopt(home, vm);
            // Another command may have been faster.
            connect().map_err(|error| adopted.err().unwrap_or(error))
        }
        (Err(error), None) => Err(error),
    }
}

fn start(home: &Home, vm: &str, order: &Order) -> Result<Monitored> {
    let me = std::env::current_exe().context("cannot find puter's own executable")?;
    let mut command = Command::new(me);
    command.arg0("puter-monitor").arg(home.root()).arg(vm).current_dir("/").process_group(0);
    // The terminal may close, and a command that fails is not to wait for the monitor's end.
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut monitor = command.spawn().context("cannot start the VM's monitor")?;
    let (leash, answer) = (monitor.stdin.take(), monitor.stdout.take());
    let (mut leash, answer) = (leash.context("no pipe")?, answer.context("no pipe")?);
    let mut line = serde_json::to_vec(order)?;
    line.push(b'\n');
    leash.write_all(&line).context("the VM's monitor ended at once")?;
    let mut line = String::new();
    BufReader::new(answer.take(MAX_LINE)).read_line(&mut line).context("the VM's monitor does not answer")?;
    match serde_json::from_str::<Answer>(&line) {
        Ok(Ok(Started { hypervisor, forwards })) => Ok(Monitored { hypervisor, ports: forwards, monitor, leash }),
        Ok(Err(failure)) => {
            let _ = monitor.wait();
            Err(failure.into())
        }
        Err(_) => {
            let _ = monitor.kill();
            let _ = monitor.wait();
            bail!("the VM's monitor ended without an answer")
        }
    }
}

/// Entry point; `args` is the command line without the program's name.
pub fn main(args: Vec<OsString>) -> ExitCode {
    let [root, vm] = args.as_slice() else {
        eprintln!("puter-monitor: puter starts it; there is nothing here to be called by hand");
        return ExitCode::from(crate::USAGE);
    };
    let vm = vm.to_string_lossy().into_owned();
    match run::run(&Home::at(root), &vm) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("puter-monitor: {error:#}");
            ExitCode::FAILURE
        }
    }
}
