//! cloud-hypervisor, and the emulator that stands in for it, behind one interface: cloud-hypervisor's own.

pub mod arguments;
pub mod client;
mod detect;
pub mod emulator;
pub mod events;
pub mod process;
pub mod snapshot;
pub mod virtiofs;
pub mod vsock;

use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::watch::{self, Watch};

pub use arguments::{Disk, DiskFormat, Machine, MemoryMode, Net, Restore, Serial, Share, Vsock};
pub use client::{Client, State};
pub use detect::{Kind, MINIMUM_VERSION, Setting, detect, parse_version};

/// A command line for a hypervisor, ready to run: what one process makes for another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    program: PathBuf,
    /// The name to call it by, where that is not the program's own.
    name: Option<String>,
    arguments: Vec<String>,
    api_socket: PathBuf,
    /// Files of a former run that would block this one.
    stale: Vec<PathBuf>,
    log: PathBuf,
}

/// A hypervisor that was just started.
#[derive(Debug)]
pub struct Process {
    child: Child,
    start_time: u64,
}

impl Process {
    /// Its number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// See [`process::start_time`].
    pub fn start_time(&self) -> u64 {
        self.start_time
    }

    /// The process as its parent has it.
    pub fn into_child(self) -> Child {
        self.child
    }
}

impl Launch {
    /// The machine's command line; what the hypervisor prints will go to `log`.
    ///
    /// # Errors
    /// When the program cannot be found, or the machine cannot be told on a command line.
    pub fn new(kind: &Kind, machine: &Machine, log: &Path) -> Result<Launch> {
        let mut stale: Vec<PathBuf> = machine.vsock.iter().map(|vsock| vsock.socket.clone()).collect();
        if let Serial::Socket(path) = &machine.serial {
            stale.push(path.clone());
        }
        Launch::with(kind, machine.to_arguments()?, &machine.api_socket, stale, log)
    }

    /// The command line for a machine that comes back from a snapshot; `sockets` are those that it makes.
    ///
    /// # Errors
    /// As for [`Launch::new`].
    pub fn restore(kind: &Kind, restore: &Restore, sockets: Vec<PathBuf>, log: &Path) -> Result<Launch> {
        Launch::with(kind, restore.to_arguments()?, &restore.api_socket, sockets, log)
    }

    fn with(
        kind: &Kind,
        arguments: Vec<String>,
        api_socket: &Path,
        mut stale: Vec<PathBuf>,
        log: &Path,
    ) -> Result<Launch> {
        let (program, name) = kind.program()?;
        stale.extend([api_socket.to_path_buf(), PathBuf::from(format!("{}.lock", api_socket.display()))]);
        Ok(Launch { program, name, arguments, api_socket: api_socket.to_path_buf(), stale, log: log.to_path_buf() })
    }

    /// Starts the hypervisor; it goes on when this process ends. Sockets that a crash left behind are removed first:
    /// they would block this start.
    ///
    /// # Errors
    /// When the program or the log cannot be opened, or a hypervisor serves the API socket already.
    pub fn spawn(&self) -> Result<Process> {
        ensure!(
            std::os::unix::net::UnixStream::connect(&self.api_socket).is_err(),
            "a hypervisor already listens on {}",
            self.api_socket.display()
        );
        for stale in &self.stale {
            match std::fs::remove_file(stale) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("cannot remove {}", stale.display()));
                }
                _ => {}
            }
        }
        let mut options = OpenOptions::new();
        let log = options.write(true).create(true).truncate(true).mode(0o600).open(&self.log);
        let log = log.with_context(|| format!("cannot write {}", self.log.display()))?;
        let mut command = Command::new(&self.program);
        if let Some(name) = &self.name {
            command.arg0(name);
        }
        command.args(&self.arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // Out of the terminal's reach: Ctrl-C is for the command, not for the machine.
        command.process_group(0).current_dir("/");
        let child = command.spawn().with_context(|| format!("cannot run {}", self.program.display()))?;
        // A child that has ended stays until it is waited for, so it has a start time or is a failure told later.
        let start_time = process::start_time(child.id()).unwrap_or(0);
        Ok(Process { child, start_time })
    }
}

/// The hypervisors that serve this API socket: those which a command started and was killed before it wrote that down.
pub fn serving(api_socket: &Path) -> Vec<(u32, u64)> {
    process::with_argument(&arguments::api_socket(api_socket))
}

/// Waits until the machine runs, by the hypervisor's own events, which it writes to `events`.
///
/// # Errors
/// When the hypervisor ends, the time runs out, or `cancelled` becomes true.
pub fn wait_ready((pid, start_time): (u32, u64), events: &Path, cancelled: &AtomicBool, limit: Duration) -> Result<()> {
    let end = Instant::now() + limit;
    let watch = Watch::directory(events.parent().context("a file is in a directory")?)?;
    let Some(held) = process::hold(pid, start_time) else { bail!("the hypervisor ended at once") };
    loop {
        watch.drain();
        if events::booted(&events::read(events)) {
            return Ok(());
        }
        ensure!(!cancelled.load(Ordering::Relaxed), "interrupted");
        ensure!(process::is_alive(pid, start_time), "the hypervisor ended at once");
        let left = end.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "the machine did not run within {} s", limit.as_secs());
        // Short turns, so that Ctrl-C is heard.
        watch::wait(&[watch.as_fd(), held.as_fd()], left.min(Duration::from_millis(200)))?;
    }
}
