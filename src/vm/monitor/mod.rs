//! The monitor: one small process for each VM that runs. It starts the hypervisor and sees it end, holds the serial
//! console for everybody who attaches, writes the log within limits, and starts the VM again where its policy says so.
//!
//! Nothing depends on its life: a VM whose monitor is killed runs on, and the next command that wants the console
//! starts another.

mod console;
mod end;
mod run;
mod shares;

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use super::home::Home;
use super::state::{ProcessId, Vm};
use crate::hypervisor::Launch;
use crate::hypervisor::virtiofs::Server;

/// The longest order or answer, in bytes.
const MAX_LINE: u64 = 1 << 20;

/// What a command wants of a new monitor.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Order {
    /// Start this hypervisor, after what serves its shared directories.
    Launch { hypervisor: Launch, shares: Vec<Server> },
    /// See to this one, which runs.
    Adopt(ProcessId),
}

/// What the monitor answers: the hypervisor, or why there is none.
type Answer = Result<ProcessId, String>;

/// A monitor that has started its hypervisor and waits to hear that this is written down.
#[derive(Debug)]
pub struct Monitored {
    pub hypervisor: ProcessId,
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
/// When one of them cannot be started.
pub fn launch(home: &Home, vm: &str, hypervisor: Launch, shares: Vec<Server>) -> Result<Monitored> {
    start(home, vm, &Order::Launch { hypervisor, shares })
}

/// Starts a monitor for a hypervisor that has lost its own.
///
/// # Errors
/// When it cannot be started.
pub fn adopt(home: &Home, vm: &str, hypervisor: ProcessId) -> Result<()> {
    start(home, vm, &Order::Adopt(hypervisor))?.let_go()
}

/// Connects to the console of a VM that runs: first comes what it showed before, then each piece as it comes; what is
/// written is typed. A monitor that was killed is replaced.
///
/// # Errors
/// When there is no console to be had.
pub fn attach(home: &Home, vm: &Vm) -> Result<UnixStream> {
    let path = home.console(&vm.name);
    let connect = || UnixStream::connect(&path).with_context(|| format!("cannot reach the console {}", path.display()));
    match (connect(), vm.process) {
        (Ok(stream), _) => Ok(stream),
        (Err(_), Some(hypervisor)) => {
            adopt(home, &vm.name, hypervisor)?;
            connect()
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
        Ok(Ok(hypervisor)) => Ok(Monitored { hypervisor, monitor, leash }),
        Ok(Err(why)) => {
            let _ = monitor.wait();
            Err(anyhow!(why))
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
