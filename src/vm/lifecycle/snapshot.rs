//! `snapshot`: the machine's disk, and of one that runs its memory and processors, all of one instant.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};

use super::start::check_disk;
use super::together::{Point, Together};
use super::{Context, unix_now};
use crate::failpoint::reach;
use crate::hypervisor::{self, snapshot::MEMORY};
use crate::sparse;
use crate::vm::home::{Home, free_space};
use crate::vm::machine::{self, Action, Event, Refusal, State};
use crate::vm::settings::show_size;
use crate::vm::snapshots::{self, DISK, Maker, SCHEMA, Snapshot};
use crate::vm::state::{Origin, Vm, existing, refusal};
use crate::vm::{Hint, cancel, files};

/// How a snapshot is taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotOptions {
    /// By which people will name it.
    pub name: Option<String>,
    /// Of a machine that runs: the disk as if its plug were pulled, and no memory.
    pub disk_only: bool,
    /// Nobody asked for it: it serves one `clone`.
    pub automatic: bool,
}

/// A snapshot that was taken.
#[derive(Debug)]
pub struct Taken {
    pub snapshot: Snapshot,
    pub took: Duration,
}

/// Takes a snapshot of the VM, which goes on as if nothing had been.
///
/// # Errors
/// When the VM is in no state for it, has shared directories, the name is taken, or something cannot be written: nothing
/// is left then, and the VM goes on.
pub fn snapshot(context: &Context, name: &str, options: &SnapshotOptions) -> Result<Taken> {
    context.locked(name, || snapshot_locked(context, name, options, None))
}

/// As [`snapshot`], at the same instant as the others that take part.
///
/// # Errors
/// As for [`snapshot`], or when another's fails before all are written.
pub fn snapshot_together(
    context: &Context,
    name: &str,
    options: &SnapshotOptions,
    together: &Together,
) -> Result<Taken> {
    together.part(|| context.locked(name, || snapshot_locked(context, name, options, Some(together))))
}

fn snapshot_locked(
    context: &Context,
    name: &str,
    options: &SnapshotOptions,
    together: Option<&Together>,
) -> Result<Taken> {
    let began = Instant::now();
    let home = context.home;
    let mut vm = existing(home, name)?;
    thaw(context, &mut vm)?;
    let state = vm.state();
    if let Action::Refuse(why) = state.decide(machine::Command::Snapshot) {
        return match why {
            Refusal::Active => Err(anyhow!("'{name}' is {state}")).hint("wait until it has stopped, then try again"),
            why => Err(refusal(name, state, why)),
        };
    }
    let with_memory = state == State::Running && !options.disk_only;
    if with_memory && !vm.mounts.is_empty() {
        return Err(anyhow!("'{name}' has shared directories, which no snapshot of its memory can hold"))
            .hint("take one with --disk-only, or stop the VM and `puter set --no-mount` it");
    }
    check_disk(&vm)?;
    reach("snapshot: locked");
    let _held = snapshots::hold(home, name)?;
    snapshots::sweep(home, name)?;
    if let Some(wanted) = &options.name {
        snapshots::check_name(wanted).map_err(anyhow::Error::msg)?;
        let all = snapshots::all(home, Some(name))?.snapshots;
        if all.iter().any(|other| other.name.as_ref() == Some(wanted) || other.origin.id == *wanted) {
            return Err(anyhow!("'{name}' has a snapshot '{wanted}' already"))
                .hint(format!("choose another name, or remove it: puter snapshot delete {name}@{wanted}"));
        }
    }
    check_space(home, &vm, with_memory)?;
    let now = unix_now();
    let origin = Origin { vm: name.into(), id: snapshots::new_id(home, name, now)? };
    let temporary = home.snapshots_of(name).join(format!(".{}.tmp", origin.id));
    let made = crate::failpoint::write().and_then(|()| fs::DirBuilder::new().mode(0o700).create(&temporary));
    made.with_context(|| format!("cannot make {}", temporary.display()))?;
    let mut snapshot = Snapshot {
        schema: SCHEMA,
        origin,
        name: options.name.clone(),
        created: now,
        automatic: options.automatic,
        maker: if options.automatic { snapshots::me() } else { None },
        parent: vm.head.clone(),
        machine: vm.clone(),
        memory: None,
        paused: None,
        shared: 0,
        files: BTreeMap::new(),
    };
    let result = match with_memory {
        true => {
            context.step(name, "memory and disk", || capture(context, &mut vm, &mut snapshot, &temporary, together))
        }
        false => {
            context.step(name, "disk", || capture_disk(context, &mut vm, state, &mut snapshot, &temporary, together))
        }
    };
    let result = result.and_then(|()| {
        context.step(name, "seal", || {
            let parent = snapshot.parent.as_ref().map(|parent| snapshots::directory(home, parent).join(MEMORY));
            snapshots::seal(&mut snapshot, &temporary, parent.as_deref(), !options.automatic)?;
            snapshot.save(&temporary)?;
            reach("snapshot: sealed");
            crate::failpoint::write()?;
            fs::rename(&temporary, snapshot.directory(home))?;
            fs::File::open(home.snapshots_of(name))?.sync_all()?;
            Ok(())
        })
    });
    if let Err(error) = result {
        let _ = files::remove(&temporary);
        return Err(error.context(format!("cannot take a snapshot of '{name}'")));
    }
    reach("snapshot: in place");
    vm.head = Some(snapshot.origin.clone());
    // The snapshot is whole; only the tree would not show where the machine is.
    if let Err(error) = vm.save(home) {
        context.observer.note(name, &format!("its state is not written down: {error:#}"));
    }
    reach("snapshot: written down");
    Ok(Taken { snapshot, took: began.elapsed() })
}

/// Before anything stands still: does it fit?
fn check_space(home: &Home, vm: &Vm, with_memory: bool) -> Result<()> {
    let allocated = fs::metadata(&vm.overlay).map_or(0, |metadata| metadata.blocks() * 512);
    // What the guest has touched; the rest of its memory is nowhere.
    let resident = vm.process.filter(|_| with_memory).and_then(|id| resident(id.pid)).unwrap_or(0).min(vm.memory);
    let needed = allocated.saturating_add(resident);
    let free = free_space(home.root())?;
    if free < needed {
        let (free, needed) = (show_size(free), show_size(needed));
        return Err(anyhow!("no disk space for a snapshot of '{}': it may take {needed}, {free} are free", vm.name))
            .hint("make room: `puter df` shows what takes it, `puter snapshot delete` gives a snapshot's share back");
    }
    Ok(())
}

/// Bytes of the process's memory that are really there, and of its children's, of which the emulator's QEMU is one
/// (proc_pid_status(5), VmRSS).
fn resident(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let own = line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)?;
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let children = children.split_whitespace().filter_map(|child| resident(child.parse().ok()?));
    Some(children.fold(own, u64::saturating_add))
}

/// The machine as it is: it stands still while memory and disk are written.
fn capture(
    context: &Context,
    vm: &mut Vm,
    snapshot: &mut Snapshot,
    temporary: &Path,
    together: Option<&Together>,
) -> Result<()> {
    let home = context.home;
    let client = hypervisor::Client::new(&home.api(&vm.name));
    let made_by = vm.hypervisor.clone().context("nobody knows what runs it")?;
    check_hypervisor(&made_by)?;
    let emulated = !made_by.starts_with("cloud-hypervisor");
    snapshot.memory = Some(Maker { hypervisor: made_by, cpu: if emulated { None } else { snapshots::cpu() } });
    let write = |vm: &Vm| {
        client.snapshot(temporary)?;
        reach("snapshot: memory written");
        copy_disk(vm, temporary)
    };
    let prepare = || if emulated { client.remove_vsock() } else { Ok(()) };
    snapshot.paused = Some(while_paused(context, vm, &client, temporary, together, (prepare, write))?);
    Ok(())
}

/// Does `prepare` while the machine runs yet, and `write` while the machine stands still, and tells for how many seconds it did.
///
/// # Errors
/// When the work fails, and what it has written is removed; or when the machine cannot go on.
fn while_paused(
    context: &Context,
    vm: &mut Vm,
    client: &hypervisor::Client,
    temporary: &Path,
    together: Option<&Together>,
    (prepare, write): (impl FnOnce() -> Result<()>, impl FnOnce(&Vm) -> Result<()>),
) -> Result<f64> {
    let home = context.home;
    let name = vm.name.clone();
    // Ctrl-C is heard before and after, not while the machine stands still.
    let _guard = cancel::guard();
    // Before anything says that it stands still: who is killed from now on is seen.
    let watcher = Watcher::start(home, &name)?;
    let afterwards = vm.prepare(home)?;
    vm.advance(Event::Paused)?;
    vm.save(home)?;
    reach("snapshot: marked");
    let at = |point| together.map_or(Ok(()), |together| together.arrive(point));
    let prepared = prepare();
    reach("snapshot: prepared");
    let ready = prepared.and_then(|()| at(Point::Ready));
    let began = Instant::now();
    let written = ready.and_then(|()| client.pause()).and_then(|()| {
        if let Some(together) = together {
            together.stands_still(Instant::now());
        }
        reach("snapshot: paused");
        at(Point::Paused)?;
        write(vm)?;
        at(Point::Written)
    });
    let resumed = go_on(client);
    let paused = began.elapsed().as_secs_f64();
    if written.is_err() {
        let _ = files::remove(temporary);
    }
    resumed.with_context(|| format!("'{name}' stands still")).hint(format!("end it: puter stop --force {name}"))?;
    reach("snapshot: resumed");
    vm.advance(Event::Resumed)?;
    afterwards.commit()?;
    watcher.dismiss();
    written.map(|()| paused)
}

/// The disk alone. Of a machine that runs it is what it would find after a loss of power.
fn capture_disk(
    context: &Context,
    vm: &mut Vm,
    state: State,
    snapshot: &mut Snapshot,
    temporary: &Path,
    together: Option<&Together>,
) -> Result<()> {
    if state != State::Running {
        let at = |point| together.map_or(Ok(()), |together| together.arrive(point));
        at(Point::Ready)?;
        at(Point::Paused)?;
        copy_disk(vm, temporary)?;
        return at(Point::Written);
    }
    let client = hypervisor::Client::new(&context.home.api(&vm.name));
    check_hypervisor(vm.hypervisor.as_deref().unwrap_or_default())?;
    let work = (|| Ok(()), |vm: &Vm| copy_disk(vm, temporary));
    snapshot.paused = Some(while_paused(context, vm, &client, temporary, together, work)?);
    Ok(())
}

fn copy_disk(vm: &Vm, temporary: &Path) -> Result<()> {
    let to = temporary.join(DISK);
    sparse::copy_file(&vm.overlay, &to).with_context(|| format!("cannot write {}", to.display()))?;
    reach("snapshot: disk copied");
    Ok(())
}

/// Since v54 cloud-hypervisor writes a disk's own tables when it is paused; before, a copy would lack what the guest
/// believes to be written.
fn check_hypervisor(made_by: &str) -> Result<()> {
    const OLDEST: u32 = 54;
    let Some(version) = made_by.strip_prefix("cloud-hypervisor v") else { return Ok(()) };
    let major: u32 = version.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(0);
    // A build from between two releases counts as the later one.
    let between = u32::from(version.contains("-g"));
    if major + between < OLDEST {
        return Err(anyhow!("{made_by} cannot write a consistent snapshot of a qcow2 disk"))
            .hint(format!("install cloud-hypervisor {OLDEST} or newer and restart the VM; or stop it first"));
    }
    Ok(())
}

/// Lets the processors go on, unless they do.
fn go_on(client: &hypervisor::Client) -> Result<()> {
    let resumed = client.resume();
    match client.info() {
        Ok(info) if info.state == hypervisor::State::Running => Ok(()),
        _ => resumed,
    }
}

/// A VM whose snapshot was cut off goes on. The caller holds its lock.
///
/// # Errors
/// When it cannot.
pub(super) fn thaw(context: &Context, vm: &mut Vm) -> Result<()> {
    if vm.state() != State::Paused {
        return Ok(());
    }
    context.observer.note(&vm.name, "a snapshot of it was broken off; it goes on");
    let client = hypervisor::Client::new(&context.home.api(&vm.name));
    go_on(&client)
        .with_context(|| format!("'{}' stands still", vm.name))
        .hint(format!("end it: puter stop --force {}", vm.name))?;
    reach("thaw: resumed");
    vm.advance(Event::Resumed)?;
    vm.save(context.home)
}

/// Lets a VM go on whose snapshot was cut off, as soon as its lock is free.
///
/// # Errors
/// When it cannot, or the VM is gone.
pub fn thaw_now(context: &Context, name: &str) -> Result<()> {
    context.locked(name, || {
        thaw(context, &mut existing(context.home, name)?)?;
        drop(snapshots::hold(context.home, name)?);
        Ok(())
    })
}

/// A process that lets the machine go on at once if this one is killed while it stands still.
struct Watcher {
    process: Child,
    leash: ChildStdin,
}

/// What the watcher reads when all is well.
const DISMISSED: &[u8] = b"done\n";

impl Watcher {
    fn start(home: &Home, vm: &str) -> Result<Watcher> {
        use std::os::unix::process::CommandExt;
        let me = std::env::current_exe().context("cannot find puter's own executable")?;
        let mut command = Command::new(me);
        command.arg0("puter").args(["__thaw", vm]).env("PUTER_HOME", home.root()).current_dir("/");
        // What a test lets fail here is not to fail there.
        for variable in ["PUTER_FAIL_POINT", "PUTER_PAUSE_POINT", "PUTER_FAIL_WRITES", "PUTER_FAIL_POINTS_LOG"] {
            command.env_remove(variable);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        let mut process = command.spawn().context("cannot start the process that watches over the snapshot")?;
        let leash = process.stdin.take().context("no pipe")?;
        Ok(Watcher { process, leash })
    }

    fn dismiss(mut self) {
        use std::io::Write;
        let _ = self.leash.write_all(DISMISSED);
        drop(self.leash);
        std::thread::spawn(move || self.process.wait());
    }
}

/// The watcher's work: waits for the end of the process that started it, and mends what that left undone.
///
/// # Errors
/// As for [`thaw_now`].
pub fn watch_over(context: &Context, name: &str) -> Result<()> {
    let mut word = Vec::new();
    let _ = std::io::stdin().take(DISMISSED.len() as u64).read_to_end(&mut word);
    if word == DISMISSED {
        return Ok(());
    }
    thaw_now(context, name)
}

/// Checks that there is nothing in the way of a restore, before anything is lost or made.
///
/// # Errors
/// When a file is damaged, or this host cannot go on with the memory.
pub(super) fn check(context: &Context, snapshot: &Snapshot, kind: &hypervisor::Kind, disk_only: bool) -> Result<()> {
    if let Some(maker) = snapshot.memory.as_ref().filter(|_| !disk_only) {
        let hypervisor = kind.to_string();
        maker
            .check(&hypervisor, snapshots::cpu().as_ref())
            .with_context(|| format!("the snapshot {} cannot go on here", snapshot.origin))?;
    }
    let verified = snapshots::verify(context.home, snapshot, disk_only || snapshot.memory.is_none());
    cancel::check()?;
    verified?;
    ensure!(snapshot.machine.disk > 0, "the snapshot {} has no disk", snapshot.origin);
    Ok(())
}
