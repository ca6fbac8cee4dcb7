//! `puter-emulator`: cloud-hypervisor's command line and REST API, with QEMU's TCG behind them.
//!
//! For hosts without KVM. It runs QEMU and `vhost-device-vsock` as its children, which die with it, and ends when the
//! guest powers off, as cloud-hypervisor does.

pub mod config;
pub mod events;
mod qemu;
pub mod qmp;
mod relay;
mod running;
mod server;

use std::ffi::OsString;
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use async_signal::{Signal, Signals};
use rustix::process::{Signal as RawSignal, set_parent_process_death_signal};

use super::arguments::{Serial, Wanted};
use super::detect::{is_executable, on_path};
use crate::hint::Hint;
use events::Events;
use running::{Place, Running};

/// How long a child may take to come up.
const CHILD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long QEMU may take to close its disks after it was told to end.
const QUIT_TIMEOUT: Duration = Duration::from_secs(2);

/// The programs that the emulator runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tools {
    pub qemu: PathBuf,
    pub vhost_device_vsock: PathBuf,
}

impl Tools {
    /// Finds them: on the PATH, beside this executable, in cargo's directory, or where
    /// `PUTER_VHOST_DEVICE_VSOCK` says.
    ///
    /// # Errors
    /// When one is missing; the hint tells how to get it.
    pub fn find() -> Result<Tools> {
        let name = match std::env::consts::ARCH {
            "aarch64" => "qemu-system-aarch64",
            _ => "qemu-system-x86_64",
        };
        let qemu = on_path(name)
            .with_context(|| format!("{name} is not on the PATH"))
            .hint("install QEMU (Debian: apt install qemu-system-x86)")?;
        let device = "vhost-device-vsock";
        let named = std::env::var_os("PUTER_VHOST_DEVICE_VSOCK").filter(|path| !path.is_empty()).map(PathBuf::from);
        let me = std::env::current_exe().ok();
        let beside = me.as_deref().and_then(Path::parent).map(|dir| dir.join(device));
        let cargo = std::env::var_os("HOME").map(|home| Path::new(&home).join(".cargo/bin").join(device));
        let found = named.or_else(|| {
            beside.filter(|file| is_executable(file)).or_else(|| on_path(device)).or(cargo.filter(|f| is_executable(f)))
        });
        let vhost_device_vsock = found
            .ok_or_else(|| anyhow!("{device} is neither beside puter nor on the PATH"))
            .hint("install it: cargo install vhost-device-vsock (or Debian's package where there is one)")?;
        Ok(Tools { qemu, vhost_device_vsock })
    }
}

/// Entry point; `args` is the command line without the program's name.
pub fn main(args: Vec<OsString>) -> ExitCode {
    let words: Vec<String> = args.into_iter().map(|arg| arg.to_string_lossy().into_owned()).collect();
    if words.is_empty() || words.iter().any(|word| word == "--help") {
        println!("puter-emulator takes cloud-hypervisor's arguments and runs the machine on QEMU; puter calls it.");
        return ExitCode::from(if words.is_empty() { crate::USAGE } else { 0 });
    }
    let wanted = match Wanted::from_arguments(&words) {
        Ok(wanted) => wanted,
        Err(error) => {
            eprintln!("puter-emulator: {error:#}");
            return ExitCode::from(crate::USAGE);
        }
    };
    match run(wanted) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("puter-emulator: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(wanted: Wanted) -> Result<()> {
    // Everything made here is the user's alone, and no terminal reaches it.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let _ = rustix::process::setsid();
    let (machine, restore) = match wanted {
        Wanted::Boot(machine) => (*machine, None),
        Wanted::Restore(restore) => (running::machine_of(&restore)?, Some(restore)),
    };
    let tools = Tools::find()?;
    let signals = Signals::new([Signal::Term, Signal::Int]).context("cannot listen for signals")?;
    let events = Arc::new(Events::open(machine.events.as_deref())?);
    let listener = UnixListener::bind(&machine.api_socket)
        .with_context(|| format!("cannot listen on {}", machine.api_socket.display()))?;
    let mut files = Files(vec![machine.api_socket.clone()]);
    let device_socket = machine.api_socket.with_extension("vhost");
    if let Some(vsock) = &machine.vsock {
        files.0.extend([device_socket.clone(), vsock.socket.clone(), relay::behind(&vsock.socket)]);
    }
    if let Serial::Socket(path) = &machine.serial {
        files.0.push(path.clone());
    }
    let place = Arc::new(Place { tools, machine, device_socket, events: events.clone() });
    events.write("vmm", "starting");
    let (before, after) = if restore.is_some() { ("restoring", "restored") } else { ("booting", "booted") };
    events.write("vm", before);
    let (mut qemu, mut running) = match &restore {
        Some(restore) => Running::restore(&place, restore)?,
        None => Running::boot(&place)?,
    };
    events.write("vm", after);
    let control = Control::new(running.clone());
    server::serve(listener, control.clone(), events.clone(), &place.machine);
    end_on_signal(signals, control.clone());
    let status = loop {
        let status = qemu.wait().context("cannot wait for QEMU")?;
        // A thread reads QEMU's last words; it has them once the channel is closed.
        if !running.qmp.is_reset_at_end() || control.is_ending() {
            break status;
        }
        // As cloud-hypervisor does, a reboot makes the machine anew: vhost-device-vsock outlives no reset.
        events.write("vm", "rebooting");
        control.forget();
        drop(running);
        (qemu, running) = Running::boot(&place)?;
        control.replace(running.clone());
        events.write("vm", "rebooted");
    };
    for (source, event) in [("vm", "shutdown"), ("vm", "deleted"), ("vmm", "shutdown")] {
        events.write(source, event);
    }
    control.forget();
    drop(running);
    drop(files);
    match status.success() {
        true => Ok(()),
        false => bail!("QEMU ended with {status}"),
    }
}

/// The way to the machine, whose programs are others after a reboot.
#[derive(Clone, Default)]
struct Control(Arc<Mutex<Controlled>>);

#[derive(Default)]
struct Controlled {
    /// Absent while it reboots.
    running: Option<Arc<Running>>,
    ending: bool,
}

impl Control {
    fn new(running: Arc<Running>) -> Control {
        Control(Arc::new(Mutex::new(Controlled { running: Some(running), ending: false })))
    }

    fn inner(&self) -> MutexGuard<'_, Controlled> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn running(&self) -> Option<Arc<Running>> {
        self.inner().running.clone()
    }

    fn forget(&self) {
        self.inner().running = None;
    }

    fn replace(&self, running: Arc<Running>) {
        let ending = {
            let mut inner = self.inner();
            inner.running = Some(running.clone());
            inner.ending
        };
        if ending {
            let _ = running.qmp.execute("quit");
        }
    }

    /// Ends QEMU; a reboot that is under way comes to nothing.
    fn end(&self) -> Result<()> {
        let running = {
            let mut inner = self.inner();
            inner.ending = true;
            inner.running.clone()
        };
        running.map_or(Ok(()), |running| running.qmp.execute("quit").map(drop))
    }

    fn is_ending(&self) -> bool {
        self.inner().ending
    }
}

/// Files that go with their owner.
#[derive(Debug)]
struct Files(Vec<PathBuf>);

impl Drop for Files {
    fn drop(&mut self) {
        for file in &self.0 {
            let _ = std::fs::remove_file(file);
        }
    }
}

/// A child that is ended with its owner.
#[derive(Debug)]
struct Owned(Child);

impl Drop for Owned {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a child that the kernel ends when this process ends, however it does. It inherits the descriptor `keep`.
fn spawn(command: &mut Command, keep: Option<RawFd>) -> Result<Child> {
    let program = Path::new(command.get_program()).display().to_string();
    // SAFETY: only system calls run between fork and exec; they take no lock and allocate nothing. The descriptor is
    // open as long as its owner, who calls this.
    unsafe {
        command.pre_exec(move || {
            if let Some(keep) = keep {
                rustix::io::fcntl_setfd(BorrowedFd::borrow_raw(keep), rustix::io::FdFlags::empty())?;
            }
            Ok(set_parent_process_death_signal(Some(RawSignal::KILL))?)
        });
    }
    command.spawn().with_context(|| format!("cannot run {program}"))
}

/// On SIGTERM QEMU closes its disks and ends; the emulator follows it.
fn end_on_signal(mut signals: Signals, control: Control) {
    std::thread::spawn(move || {
        use smol::stream::StreamExt;
        if smol::block_on(signals.next()).is_some() {
            let _ = control.end();
            std::thread::sleep(QUIT_TIMEOUT);
            // QEMU hangs: the kernel ends it with this process.
            std::process::exit(1);
        }
    });
}
