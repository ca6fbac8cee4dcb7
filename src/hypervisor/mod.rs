//! cloud-hypervisor, and the emulator that stands in for it, behind one interface: cloud-hypervisor's own.

pub mod arguments;
pub mod client;
mod detect;
pub mod emulator;
pub mod process;
pub mod vsock;

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

pub use arguments::{Disk, DiskFormat, Machine, Net, Vsock};
pub use client::{Client, State};
pub use detect::{Kind, MINIMUM_VERSION, Setting, detect};

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
}

/// Starts the hypervisor with the machine; it goes on when this process ends. What it prints goes to `log`.
///
/// Sockets that a crash left behind are removed first: they would block this start.
///
/// # Errors
/// When the program or the log cannot be opened, or the machine cannot be told on a command line.
pub fn launch(kind: &Kind, machine: &Machine, log: &Path) -> Result<Process> {
    let arguments = machine.to_arguments()?;
    let lock = PathBuf::from(format!("{}.lock", machine.api_socket.display()));
    let vsock = machine.vsock.as_ref().map(|vsock| vsock.socket.as_path());
    ensure!(
        std::os::unix::net::UnixStream::connect(&machine.api_socket).is_err(),
        "a hypervisor already listens on {}",
        machine.api_socket.display()
    );
    for stale in [Some(machine.api_socket.as_path()), Some(lock.as_path()), vsock].into_iter().flatten() {
        match std::fs::remove_file(stale) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", stale.display()));
            }
            _ => {}
        }
    }
    let mut options = OpenOptions::new();
    let log_file = options.write(true).create(true).truncate(true).mode(0o600).open(log);
    let log_file = log_file.with_context(|| format!("cannot write {}", log.display()))?;
    let mut command = kind.command()?;
    command.args(&arguments).stdin(Stdio::null()).stdout(log_file.try_clone()?).stderr(log_file);
    // Out of the terminal's reach: Ctrl-C is for the command, not for the machine.
    command.process_group(0).current_dir("/");
    let program = Path::new(command.get_program()).to_path_buf();
    let child = command.spawn().with_context(|| format!("cannot run {}", program.display()))?;
    // A child that has ended stays until it is waited for, so it has a start time or is a failure told by wait_ready.
    let start_time = process::start_time(child.id()).unwrap_or(0);
    Ok(Process { child, start_time })
}

/// The hypervisors that serve this API socket: those which a command started and was killed before it wrote that down.
pub fn serving(api_socket: &Path) -> Vec<(u32, u64)> {
    process::with_argument(&arguments::api_socket(api_socket))
}

/// Waits until the API answers and the machine runs.
///
/// # Errors
/// When the hypervisor ends, the time runs out, or `cancelled` becomes true.
pub fn wait_ready(process: &mut Process, client: &Client, cancelled: &AtomicBool, limit: Duration) -> Result<()> {
    let end = Instant::now() + limit;
    let mut pause = Duration::from_millis(2);
    loop {
        ensure!(!cancelled.load(Ordering::Relaxed), "interrupted");
        if let Some(status) = process.child.try_wait().context("cannot wait for the hypervisor")? {
            bail!("the hypervisor ended at once ({status})");
        }
        match client.info() {
            Ok(info) if info.state == State::Running => return Ok(()),
            Ok(info) if Instant::now() >= end => {
                bail!("the machine is {:?} and not running after {} s", info.state, limit.as_secs())
            }
            Err(error) if Instant::now() >= end => {
                return Err(error.context(format!("the hypervisor was not ready within {} s", limit.as_secs())));
            }
            _ => std::thread::sleep(pause),
        }
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}
