//! `puter-emulator`: cloud-hypervisor's command line and REST API, with QEMU's TCG behind them.
//!
//! For hosts without KVM. It runs QEMU and `vhost-device-vsock` as its children, which die with it, and ends when the
//! guest powers off, as cloud-hypervisor does.

mod events;
mod qemu;
mod qmp;
mod server;

use std::ffi::OsString;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use async_signal::{Signal, Signals};
use rustix::process::{Signal as RawSignal, set_parent_process_death_signal};

use super::arguments::{Machine, Serial, Vsock};
use super::detect::{is_executable, on_path};
use crate::hint::Hint;
use events::Events;
use qmp::Qmp;

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
    let machine = match Machine::from_arguments(&words) {
        Ok(machine) => machine,
        Err(error) => {
            eprintln!("puter-emulator: {error:#}");
            return ExitCode::from(crate::USAGE);
        }
    };
    match run(&machine) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("puter-emulator: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(machine: &Machine) -> Result<()> {
    // Everything made here is the user's alone, and no terminal reaches it.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let _ = rustix::process::setsid();
    let tools = Tools::find()?;
    let signals = Signals::new([Signal::Term, Signal::Int]).context("cannot listen for signals")?;
    let events = Arc::new(Events::open(machine.events.as_deref())?);
    let listener = UnixListener::bind(&machine.api_socket)
        .with_context(|| format!("cannot listen on {}", machine.api_socket.display()))?;
    let mut files = Files(vec![machine.api_socket.clone()]);
    events.write("vmm", "starting");
    events.write("vm", "booting");

    let device_socket = machine.api_socket.with_extension("vhost");
    if let Some(vsock) = &machine.vsock {
        files.0.extend([device_socket.clone(), vsock.socket.clone()]);
    }
    if let Serial::Socket(path) = &machine.serial {
        files.0.push(path.clone());
    }
    let mut parts = Parts::start(&tools, machine, &device_socket, &events)?;
    events.write("vm", "booted");
    let control = Control::new(parts.qmp.clone());
    server::serve(listener, control.clone(), events.clone(), machine);
    end_on_signal(signals, control.clone());
    let status = loop {
        let status = parts.qemu.wait().context("cannot wait for QEMU")?;
        // A thread reads QEMU's last words; it has them once the channel is closed.
        if !parts.qmp.is_reset_at_end() || control.is_ending() {
            break status;
        }
        // As cloud-hypervisor does, a reboot makes the machine anew: vhost-device-vsock outlives no reset.
        events.write("vm", "rebooting");
        drop(parts);
        parts = Parts::start(&tools, machine, &device_socket, &events)?;
        control.replace(parts.qmp.clone());
        events.write("vm", "rebooted");
    };
    for (source, event) in [("vm", "shutdown"), ("vm", "deleted"), ("vmm", "shutdown")] {
        events.write(source, event);
    }
    drop(parts);
    drop(files);
    match status.success() {
        true => Ok(()),
        false => bail!("QEMU ended with {status}"),
    }
}

/// The processes of one boot.
struct Parts {
    qemu: Child,
    qmp: Arc<Qmp>,
    /// Ends after QEMU, whose device it is.
    _vsock: Option<Owned>,
}

impl Parts {
    fn start(tools: &Tools, machine: &Machine, device_socket: &Path, events: &Arc<Events>) -> Result<Parts> {
        let vsock = machine.vsock.as_ref().map(|vsock| start_vsock(tools, vsock, device_socket)).transpose()?;
        let (qemu, qmp) = start_qemu(tools, machine, device_socket, events)?;
        Ok(Parts { qemu, qmp, _vsock: vsock })
    }
}

/// The way to QEMU, which is another after a reboot.
#[derive(Clone)]
struct Control(Arc<Mutex<(Arc<Qmp>, bool)>>);

impl Control {
    fn new(qmp: Arc<Qmp>) -> Control {
        Control(Arc::new(Mutex::new((qmp, false))))
    }

    fn qmp(&self) -> Arc<Qmp> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    fn replace(&self, qmp: Arc<Qmp>) {
        let ending = {
            let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            inner.0 = qmp.clone();
            inner.1
        };
        if ending {
            let _ = qmp.execute("quit");
        }
    }

    /// Ends QEMU; a reboot that is under way comes to nothing.
    fn end(&self) -> Result<()> {
        let qmp = {
            let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            inner.1 = true;
            inner.0.clone()
        };
        qmp.execute("quit").map(drop)
    }

    fn is_ending(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).1
    }
}

/// Files that go when the emulator ends.
struct Files(Vec<PathBuf>);

impl Drop for Files {
    fn drop(&mut self) {
        for file in &self.0 {
            let _ = std::fs::remove_file(file);
        }
    }
}

/// A child that is ended with its owner.
struct Owned(Child);

impl Drop for Owned {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a child that the kernel ends when this process ends, however it does.
fn spawn(command: &mut Command) -> Result<Child> {
    let program = Path::new(command.get_program()).display().to_string();
    // SAFETY: only one system call runs between fork and exec; it takes no lock and allocates nothing.
    unsafe {
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(RawSignal::KILL))?));
    }
    command.spawn().with_context(|| format!("cannot run {program}"))
}

fn start_vsock(tools: &Tools, vsock: &Vsock, device_socket: &Path) -> Result<Owned> {
    // One that did not end in an orderly way leaves its sockets, and would not bind over them.
    for former in [device_socket, &vsock.socket] {
        let _ = std::fs::remove_file(former);
    }
    let mut command = Command::new(&tools.vhost_device_vsock);
    command.arg("--guest-cid").arg(vsock.cid.to_string());
    command.arg("--socket").arg(device_socket).arg("--uds-path").arg(&vsock.socket);
    let mut child = Owned(spawn(command.stdin(Stdio::null()).env("RUST_LOG", "error"))?);
    let end = Instant::now() + CHILD_TIMEOUT;
    while !device_socket.exists() {
        if let Some(status) = child.0.try_wait()? {
            bail!("vhost-device-vsock ended at once ({status})");
        }
        if Instant::now() >= end {
            bail!("vhost-device-vsock made no socket within {} s", CHILD_TIMEOUT.as_secs());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(child)
}

fn start_qemu(
    tools: &Tools,
    machine: &Machine,
    device_socket: &Path,
    events: &Arc<Events>,
) -> Result<(Child, Arc<Qmp>)> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().context("cannot make a socket pair")?;
    let mut command = Command::new(&tools.qemu);
    command.args(qemu::arguments(machine, device_socket));
    // The control channel is QEMU's standard input: no socket that another process could open.
    command.stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)));
    let mut child = spawn(&mut command)?;
    drop(command);
    match Qmp::connect(ours, events.clone(), CHILD_TIMEOUT) {
        Ok(qmp) => Ok((child, Arc::new(qmp))),
        Err(error) => {
            let _ = child.kill();
            let status = child.wait();
            Err(error.context(match status {
                Ok(status) if status.code().is_some() => format!("QEMU did not start ({status})"),
                _ => "QEMU did not start".into(),
            }))
        }
    }
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
