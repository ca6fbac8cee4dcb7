//! One boot of a machine: QEMU, vhost-device-vsock and the guest's memory; and how both become a snapshot and come back
//! from one.
//!
//! QEMU cannot carry its vsock device over (it is marked as unmigratable), so the device is unplugged for a snapshot and
//! plugged in again when the machine goes on: connections over vsock end with it. The memory is this process's own
//! memfd, which QEMU is told to leave out of its stream (`x-ignore-shared`).

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::config::Config;
use super::events::Events;
use super::qmp::Qmp;
use super::relay::{self, Relay};
use super::{CHILD_TIMEOUT, Owned, Tools, qemu, spawn};
use crate::hypervisor::arguments::{Machine, Restore, Vsock};
use crate::hypervisor::client::VSOCK_DEVICE;
use crate::sparse;

/// How long the guest may take to let go of its vsock device.
const UNPLUG_TIMEOUT: Duration = Duration::from_secs(15);
/// The guest's memory, and what it is called where it is mapped (proc_pid_maps(5)).
const MEMORY_NAME: &str = "guest";
const MEMORY_MAP: &str = "/memfd:guest";
/// How often is looked whether the guest's driver has taken the vsock device, in a machine that boots and in one that
/// was given the device.
const BOOT_PAUSE: Duration = Duration::from_millis(20);
const PLUG_PAUSE: Duration = Duration::from_millis(5);
/// How long QEMU may take for its part of a snapshot, which holds no memory.
const STREAM_TIMEOUT: Duration = Duration::from_secs(60);
/// The largest state that is read from a snapshot, in bytes.
const MAX_STATE: u64 = 64 << 20;

/// The files of a snapshot; the first three are named as cloud-hypervisor names its own.
const CONFIG: &str = "config.json";
const STATE: &str = "state.json";
const MEMORY: &str = "memory-ranges";
/// QEMU's stream: processors and devices.
const STREAM: &str = "vmstate";

/// A machine's surroundings for all of its boots.
#[derive(Debug)]
pub struct Place {
    pub tools: Tools,
    pub machine: Machine,
    pub device_socket: PathBuf,
    pub events: Arc<Events>,
}

/// `state.json` of the emulator.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    /// The QEMU that wrote the stream; another may read it differently.
    qemu: String,
    /// Bytes.
    memory: u64,
}

/// What the API's thread and the one that waits for QEMU share of a boot.
#[derive(Debug)]
pub struct Running {
    place: Arc<Place>,
    pub qmp: Arc<Qmp>,
    memory: File,
    /// Absent while a snapshot is made and until the machine goes on.
    vsock: Mutex<Option<Device>>,
}

/// The vsock device, and the way to it; the relay ends first.
#[derive(Debug)]
struct Device {
    _relay: Relay,
    _program: Owned,
}

impl Running {
    /// Boots the machine.
    ///
    /// # Errors
    /// When a program does not come up.
    pub fn boot(place: &Arc<Place>) -> Result<(Child, Arc<Running>)> {
        let program = place.machine.vsock.as_ref().map(|vsock| place.start_vsock(vsock)).transpose()?;
        let memory = memory(place.machine.memory)?;
        let (qemu, qmp) = place.start_qemu(&memory, false)?;
        let vsock = program.map(|program| place.relay(program, &qmp, BOOT_PAUSE)).transpose()?;
        Ok((qemu, Arc::new(Running { place: place.clone(), qmp, memory, vsock: Mutex::new(vsock) })))
    }

    /// Brings the machine back from a snapshot and lets it run.
    ///
    /// # Errors
    /// When the snapshot's files are not what they must be, or QEMU refuses them.
    pub fn restore(place: &Arc<Place>, restore: &Restore) -> Result<(Child, Arc<Running>)> {
        let file = |name: &str| restore.source.join(name);
        let state: State = read_json(&file(STATE))?;
        let open = |name: &str| File::open(file(name)).with_context(|| format!("cannot open {}", file(name).display()));
        let (saved, stream) = (open(MEMORY)?, open(STREAM)?);
        let size = place.machine.memory;
        let found = saved.metadata()?.len();
        ensure!(state.memory == size && found == size, "the snapshot's memory has {found} bytes, not {size}");
        let memory = memory(size)?;
        let (mut qemu, qmp) = place.start_qemu(&memory, true)?;
        let running = Arc::new(Running { place: place.clone(), qmp, memory, vsock: Mutex::new(None) });
        match running.take_in(&state, &saved, stream) {
            Ok(()) => Ok((qemu, running)),
            Err(error) => {
                let _ = qemu.kill();
                let _ = qemu.wait();
                Err(error)
            }
        }
    }

    fn take_in(&self, state: &State, saved: &File, mut stream: File) -> Result<()> {
        let qmp = &self.qmp;
        let version = qmp.version();
        ensure!(state.qemu == version, "the snapshot was taken with QEMU {}, this is QEMU {version}", state.qemu);
        sparse::copy(saved, &self.memory).context("cannot read the snapshot's memory")?;
        self.prepare_stream()?;
        let socket = self.place.stream_socket();
        let _ = std::fs::remove_file(&socket);
        let _file = super::Files(vec![socket.clone()]);
        qmp.run("migrate-incoming", json!({ "uri": format!("unix:{}", socket.display()) }))?;
        let mut to = UnixStream::connect(&socket).context("QEMU does not take the snapshot's state")?;
        std::io::copy(&mut stream, &mut to).context("QEMU does not take the snapshot's state")?;
        to.shutdown(std::net::Shutdown::Write)?;
        self.wait_for_stream().context("QEMU refuses the snapshot's state")?;
        self.resume()
    }

    /// Writes the paused machine into the directory.
    ///
    /// # Errors
    /// When it has its vsock device yet, or a file cannot be written; the machine stays paused.
    pub fn snapshot(&self, directory: &Path) -> Result<()> {
        ensure!(self.qmp.is_paused(), "the VM is not paused");
        ensure!(self.place.machine.shares.is_empty(), "a VM with shared directories cannot be snapshotted");
        // Held to the end: who asks meanwhile that the machine go on, as its user was killed, waits until it may.
        let vsock = self.vsock();
        // The guest would have to run for that, and this would be another instant.
        ensure!(vsock.is_none(), "the VM has its vsock device yet, which is removed before it is paused");
        let create = |name: &str| {
            let path = directory.join(name);
            File::create_new(&path).with_context(|| format!("cannot write {}", path.display()))
        };
        let (target, mut stream) = (create(MEMORY)?, create(STREAM)?);
        sparse::copy(&self.memory, &target).context("cannot write the memory")?;
        self.prepare_stream()?;
        let socket = self.place.stream_socket();
        let _ = std::fs::remove_file(&socket);
        let _file = super::Files(vec![socket.clone()]);
        let listener = UnixListener::bind(&socket).context("cannot listen for QEMU's state")?;
        self.qmp.run("migrate", json!({ "uri": format!("unix:{}", socket.display()) }))?;
        let (mut from, _) = listener.accept().context("QEMU does not give its state")?;
        from.set_read_timeout(Some(STREAM_TIMEOUT))?;
        let copied = std::io::copy(&mut from, &mut stream).context("cannot write the machine's state");
        drop(from);
        self.wait_for_stream().and(copied.map(drop))?;
        let state = State { qemu: self.qmp.version().into(), memory: self.place.machine.memory };
        create(STATE)?.write_all(&serde_json::to_vec(&state)?).context("cannot write the state")?;
        let config = serde_json::to_vec_pretty(&Config::of(&self.place.machine))?;
        create(CONFIG)?.write_all(&config).context("cannot write the configuration")
    }

    /// Lets the machine go on, with its vsock device. A snapshot that is being written is waited for.
    ///
    /// # Errors
    /// When a program does not come up or QEMU refuses.
    pub fn resume(&self) -> Result<()> {
        let mut device = self.vsock();
        if let Some(vsock) = self.place.machine.vsock.as_ref().filter(|_| device.is_none()) {
            *device = Some(self.plug(vsock)?);
        }
        self.qmp.execute("cont").map(drop)
    }

    /// Gives the machine its vsock device; where that fails it is as it was, and can be tried again.
    fn plug(&self, vsock: &Vsock) -> Result<Device> {
        let device = self.place.relay(self.place.start_vsock(vsock)?, &self.qmp, PLUG_PAUSE)?;
        let address = json!({ "type": "unix", "data": { "path": self.place.device_socket } });
        let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
        self.qmp.run("chardev-add", json!({ "id": "vsock", "backend": backend }))?;
        let added = self.qmp.run("device_add", qemu::plug(&qemu::vsock_device()));
        if added.is_err() {
            let _ = self.qmp.run("chardev-remove", json!({ "id": "vsock" }));
        }
        added.map(|_| device)
    }

    fn vsock(&self) -> MutexGuard<'_, Option<Device>> {
        self.vsock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Is it without the vsock device that it is to have?
    pub fn is_unplugged(&self) -> bool {
        self.place.machine.vsock.is_some() && self.vsock().is_none()
    }

    /// Takes the vsock device away, until the machine is resumed. The guest must run for that.
    ///
    /// # Errors
    /// When it does not let go of it.
    pub fn unplug(&self) -> Result<()> {
        let mut device = self.vsock();
        if device.is_none() {
            return Ok(());
        }
        self.qmp.forget();
        let gone = |data: &Value| (data["device"] == VSOCK_DEVICE).then_some(());
        self.qmp
            .run("device_del", json!({ "id": VSOCK_DEVICE }))
            .and_then(|_| self.qmp.wait_for("DEVICE_DELETED", UNPLUG_TIMEOUT, gone))
            .context("the guest does not let go of its vsock device")?;
        self.qmp.run("chardev-remove", json!({ "id": "vsock" }))?;
        *device = None;
        Ok(())
    }

    fn prepare_stream(&self) -> Result<()> {
        let capability = |name: &str| json!({ "capability": name, "state": true });
        let wanted = json!({ "capabilities": [capability("x-ignore-shared"), capability("events")] });
        self.qmp.run("migrate-set-capabilities", wanted)?;
        self.qmp.forget();
        Ok(())
    }

    fn wait_for_stream(&self) -> Result<()> {
        let status = self.qmp.wait_for("MIGRATION", STREAM_TIMEOUT, |data| match data["status"].as_str()? {
            end @ ("completed" | "failed" | "cancelled") => Some(end.to_string()),
            _ => None,
        })?;
        if status != "completed" {
            let why = self.qmp.execute("query-migrate")?["error-desc"].as_str().map(String::from);
            bail!("{}", why.unwrap_or(status));
        }
        Ok(())
    }
}

/// Reads a small JSON file of a snapshot.
///
/// # Errors
/// When it cannot be read, is too large or says something else.
pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    use std::io::Read;
    let what = || format!("cannot read {}", path.display());
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(MAX_STATE).read_to_end(&mut bytes)).with_context(what)?;
    serde_json::from_slice(&bytes).with_context(what)
}

/// The machine that a snapshot's directory tells of.
///
/// # Errors
/// When its configuration cannot be read.
pub fn machine_of(restore: &Restore) -> Result<Machine> {
    read_json::<Config>(&restore.source.join(CONFIG))?.into_machine(restore)
}

/// Waits until the guest's driver has taken the vsock device and vhost-device-vsock has heard of it: a connection that
/// comes in between would end its work. Returns at once when QEMU is gone, or is one before 7.2, which cannot tell.
fn wait_for_driver(qmp: &Qmp, program: u32, pause: Duration) {
    // QEMU is not asked over and over while the guest boots: it shares the guest's memory when the driver is there.
    loop {
        match std::fs::read_to_string(format!("/proc/{program}/maps")) {
            Ok(maps) if maps.contains(MEMORY_MAP) => break,
            Ok(_) => std::thread::sleep(pause),
            Err(_) => return,
        }
    }
    let path = json!({ "path": format!("/machine/peripheral/{VSOCK_DEVICE}/virtio-backend") });
    let has_driver = |status: Value| status["status"].to_string().contains("DRIVER_OK");
    while let Ok(status) = qmp.run("x-query-virtio-status", path.clone()) {
        if has_driver(status) {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    // QEMU has sent all it has to say by now; who has read it sleeps.
    while is_busy(program) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whether a thread of the process runs, could, or waits for a disk or a lock of the kernel (proc_pid_stat(5)).
fn is_busy(pid: u32) -> bool {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    tasks.flatten().any(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with(['R', 'D']))
    })
}

/// Whether somebody listens on this Unix socket: its file is there before that, and to connect would be to use it
/// (proc_net(5), /proc/net/unix; the flag is the kernel's __SO_ACCEPTCON).
fn listens(socket: &Path) -> bool {
    const LISTENS: &str = "00010000";
    let all = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let path = socket.to_string_lossy();
    all.lines().any(|line| line.ends_with(&*path) && line.split_whitespace().nth(3) == Some(LISTENS))
}

/// The guest's memory.
fn memory(size: u64) -> Result<File> {
    let memory =
        rustix::fs::memfd_create(MEMORY_NAME, MemfdFlags::CLOEXEC).context("cannot make the guest's memory")?;
    let memory = File::from(memory);
    memory.set_len(size).context("cannot make the guest's memory")?;
    Ok(memory)
}

impl Place {
    /// Where QEMU's stream passes.
    fn stream_socket(&self) -> PathBuf {
        self.machine.api_socket.with_extension("stream")
    }

    /// Starts vhost-device-vsock, the guest's connections on `socket`.
    fn start_vsock(&self, vsock: &Vsock) -> Result<Owned> {
        let (device_socket, socket) = (&self.device_socket, &vsock.socket);
        // One that did not end in an orderly way leaves its sockets, and would not bind over them.
        for former in [device_socket.as_path(), socket, &relay::behind(socket)] {
            let _ = std::fs::remove_file(former);
        }
        let mut command = Command::new(&self.tools.vhost_device_vsock);
        command.arg("--guest-cid").arg(vsock.cid.to_string());
        command.arg("--socket").arg(device_socket).arg("--uds-path").arg(socket);
        let mut child = Owned(spawn(command.stdin(Stdio::null()).env("RUST_LOG", "error"), None)?);
        let end = Instant::now() + CHILD_TIMEOUT;
        while !listens(device_socket) {
            if let Some(status) = child.0.try_wait()? {
                bail!("vhost-device-vsock ended at once ({status})");
            }
            if Instant::now() >= end {
                bail!("vhost-device-vsock does not listen after {} s", CHILD_TIMEOUT.as_secs());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(child)
    }

    fn relay(&self, program: Owned, qmp: &Arc<Qmp>, pause: Duration) -> Result<Device> {
        let socket = &self.machine.vsock.as_ref().context("there is no vsock device")?.socket;
        let (qmp, pid) = (qmp.clone(), program.0.id());
        let relay = Relay::start(socket, move || wait_for_driver(&qmp, pid, pause))?;
        Ok(Device { _relay: relay, _program: program })
    }

    fn start_qemu(&self, memory: &File, incoming: bool) -> Result<(Child, Arc<Qmp>)> {
        let (ours, theirs) = UnixStream::pair().context("cannot make a socket pair")?;
        let mut command = Command::new(&self.tools.qemu);
        let memory = memory.as_raw_fd();
        let around = qemu::Surroundings { device_socket: &self.device_socket, memory, incoming };
        command.args(qemu::arguments(&self.machine, around));
        // The control channel is QEMU's standard input: no socket that another process could open.
        command.stdin(Stdio::from(OwnedFd::from(theirs)));
        let mut child = spawn(&mut command, Some(memory))?;
        drop(command);
        match Qmp::connect(ours, self.events.clone(), CHILD_TIMEOUT) {
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
}
