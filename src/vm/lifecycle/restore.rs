//! `restore` and `clone`: a machine that goes on from a snapshot, as itself or as a new one.

use std::path::PathBuf;
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};

use super::create::{NewVm, new_vm, reserve};
use super::meet::{Knock, meet_agent};
use super::snapshot::{SnapshotOptions, Taken, check, snapshot};
use super::start::{boot_files, bring_up, check_disk, clean, connect, take_tap, tap_request, undo};
use super::{Context, delete, stop};
use crate::disk::chain::Chain;
use crate::disk::qcow2;
use crate::failpoint::reach;
use crate::hypervisor::snapshot::{Own, prepare};
use crate::hypervisor::{self, Kind, MemoryMode, Restore};
use crate::protocol::daemon::{Membership, Tap};
use crate::sparse;
use crate::vm::machine::{Action, Command, Event, Refusal, State};
use crate::vm::snapshots::{self, Reference, Snapshot};
use crate::vm::state::{Vm, refusal};
use crate::vm::{Hint, cancel, daemon, files};

/// Disks that stand on one another, at most: cloud-hypervisor opens ten (its MAX_NESTING_DEPTH), and each costs time.
const DEEPEST: usize = 6;

/// How a machine goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RestoreOptions {
    /// What it did since is given up although it runs.
    pub force: bool,
    /// Not the memory: the machine is stopped, and will boot from the disk.
    pub disk_only: bool,
    /// A clone's disk stands on no snapshot.
    pub flatten: bool,
    /// A clone and all other VMs are kept from each other, whether or not its original is.
    pub isolate: bool,
}

/// A machine that went on, or is ready to.
#[derive(Debug)]
pub struct Restored {
    pub vm: Vm,
    pub took: Duration,
    pub snapshot: Snapshot,
}

/// Lets the VM go on from one of its snapshots. What it did since then is lost.
///
/// # Errors
/// When there is no such snapshot, it is damaged or cannot go on here, or the VM runs and `force` is not set: the VM is
/// left as it was. When the machine does not come back it is stopped, with the snapshot's disk.
pub fn restore(context: &Context, reference: &Reference, options: RestoreOptions) -> Result<Restored> {
    context.locked(&reference.vm, || restore_locked(context, reference, options))
}

fn restore_locked(context: &Context, reference: &Reference, options: RestoreOptions) -> Result<Restored> {
    let began = Instant::now();
    let (home, name) = (context.home, reference.vm.as_str());
    let Some(mut vm) = Vm::load(home, name)? else {
        let error = refusal(name, State::Absent, Refusal::Absent);
        return match snapshots::find(home, reference) {
            Ok(snapshot) => Err(anyhow!("{error:#}, only its snapshot {}", snapshot.origin))
                .hint(format!("make a VM of it: puter clone {} NEW", snapshot.origin)),
            Err(_) => Err(error),
        };
    };
    let held = snapshots::hold(home, name)?;
    let snapshot = snapshots::find(home, reference)?;
    let command = if options.force { Command::RestoreForce } else { Command::Restore };
    let state = vm.state();
    let ends = match state.decide(command) {
        Action::Refuse(Refusal::Active) => {
            return Err(anyhow!("'{name}' is {state}; what it did since {} would be lost", snapshot.origin))
                .hint("give --force, or stop it first; `puter snapshot` keeps what it is now");
        }
        Action::Refuse(why) => return Err(refusal(name, state, why)),
        action => action == Action::EndAndBoot,
    };
    let kind = hypervisor::detect(&context.settings.hypervisor)?;
    context.step(name, "check", || check(context, &snapshot, &kind, options.disk_only))?;
    let with_memory = snapshot.memory.is_some() && !options.disk_only;
    let daemon = daemon::Client::new(home);
    if with_memory {
        daemon.status()?;
    }
    let _guard = cancel::guard();
    let fresh = home.overlays().join(format!(".{name}.qcow2.tmp"));
    context.step(name, "disk", || {
        files::remove(&fresh)?;
        copy_disk(&snapshot.disk(home), &fresh)
    })?;
    reach("restore: disk copied");
    if ends {
        context.end(vm.process);
        reach("restore: ended");
    }
    stop::clear(context, &mut vm);
    crate::failpoint::write()
        .and_then(|()| std::fs::rename(&fresh, &vm.overlay))
        .with_context(|| format!("cannot replace {}", vm.overlay.display()))?;
    reach("restore: disk replaced");
    let was = &snapshot.machine;
    (vm.cpus, vm.memory, vm.disk, vm.image) = (was.cpus, was.memory, was.disk, was.image.clone());
    vm.mounts.clone_from(&was.mounts);
    vm.head = Some(snapshot.origin.clone());
    vm.retry = None;
    vm.save(home)?;
    reach("restore: written down");
    drop(held);
    if with_memory {
        let former = vm.clone();
        let result = check_disk(&vm)
            .and_then(|()| connect(context, &mut vm, &daemon))
            .and_then(|()| go_on(context, &mut vm, &kind, &snapshot));
        if let Err(error) = result {
            undo(context, &vm, former, &daemon, false);
            return Err(error);
        }
    }
    Ok(Restored { vm, took: began.elapsed(), snapshot })
}

fn copy_disk(from: &std::path::Path, to: &std::path::Path) -> Result<()> {
    let copied = sparse::copy_file(from, to).and_then(|_| std::fs::File::open(to)?.sync_all());
    copied.with_context(|| format!("cannot write {}", to.display()))
}

/// Starts the hypervisor with the snapshot's memory and meets the agent; disk and TAP are there.
fn go_on(context: &Context, vm: &mut Vm, kind: &Kind, snapshot: &Snapshot) -> Result<()> {
    let home = context.home;
    let name = vm.name.clone();
    let (kernel, initrd) = boot_files(context, vm)?;
    reach("restore: network made");
    clean(context, &name)?;
    let own = Own {
        disk: vm.overlay.clone(),
        tap: vm.tap.clone(),
        mac: vm.mac.to_string(),
        vsock: home.vsock(&name),
        serial: home.serial(&name),
        kernel,
        initrd,
    };
    // Its pages come when they are touched, from the page cache that all machines of this snapshot share.
    let map = matches!(kind, Kind::CloudHypervisor { .. });
    prepare(&snapshot.directory(home), &home.restore(&name), &own, map)?;
    reach("restore: prepared");
    let restore = Restore {
        source: home.restore(&name),
        memory: MemoryMode::Copy,
        api_socket: home.api(&name),
        events: Some(home.events(&name)),
    };
    let sockets: Vec<PathBuf> = vec![home.vsock(&name), home.serial(&name)];
    let launch = hypervisor::Launch::restore(kind, &restore, sockets, &home.hypervisor_log(&name))?;
    let knock = Knock::listen(home, &name)?;
    bring_up(context, vm, kind, launch, Vec::new())?;
    files::remove(&home.restore(&name))?;
    meet_agent(context, vm, &knock, true)
}

/// The snapshot that a clone begins from: the one that is named, or a new one of the VM as it is.
///
/// # Errors
/// When there is none, or none can be taken.
pub fn clone_source(context: &Context, reference: &Reference, disk_only: bool) -> Result<(Snapshot, Option<Taken>)> {
    if reference.which.is_some() {
        return Ok((snapshots::find(context.home, reference)?, None));
    }
    if Vm::load(context.home, &reference.vm)?.is_none() {
        // Of a VM that is gone the latest snapshot may be left.
        return match snapshots::find(context.home, reference) {
            Ok(snapshot) => Ok((snapshot, None)),
            Err(_) => Err(refusal(&reference.vm, State::Absent, Refusal::Absent)),
        };
    }
    let options = SnapshotOptions { name: None, disk_only, automatic: true };
    let taken = snapshot(context, &reference.vm, &options)?;
    Ok((taken.snapshot.clone(), Some(taken)))
}

/// Checks a snapshot once for all the clones that one command makes of it.
///
/// # Errors
/// When it is damaged, or this host cannot go on with its memory.
pub fn clone_check(context: &Context, snapshot: &Snapshot, options: RestoreOptions) -> Result<Kind> {
    let kind = hypervisor::detect(&context.settings.hypervisor)?;
    check(context, snapshot, &kind, options.disk_only)?;
    Ok(kind)
}

/// Makes a new VM that goes on from the snapshot, with an identity of its own, as a `member` of a cluster or of none.
///
/// # Errors
/// When there is a VM of this name, or any step fails: nothing of the new one is left then.
pub fn clone(
    context: &Context,
    snapshot: &Snapshot,
    kind: &Kind,
    name: &str,
    options: RestoreOptions,
    member: Option<Membership>,
) -> Result<Restored> {
    context.locked(name, || clone_locked(context, snapshot, kind, name, options, member))
}

fn clone_locked(
    context: &Context,
    snapshot: &Snapshot,
    kind: &Kind,
    name: &str,
    options: RestoreOptions,
    member: Option<Membership>,
) -> Result<Restored> {
    let began = Instant::now();
    let home = context.home;
    home.check_sockets(name)?;
    if let Some(mut vm) = Vm::load(home, name)? {
        match vm.state() {
            State::Creating | State::Deleting => {
                context.observer.note(name, "removing what a command that was broken off left");
                delete::remove(context, &mut vm)?;
            }
            state => {
                return Err(anyhow!("there is a VM '{name}' already: it is {state}"))
                    .hint(format!("choose another name, or remove it: puter delete {name}"));
            }
        }
    }
    reach("clone: locked");
    let daemon = daemon::Client::new(home);
    let _guard = cancel::guard();
    let mut vm = reserve(context, name, &daemon, |id, subnet| {
        let was = &snapshot.machine;
        let what = NewVm { image: was.image.clone(), cpus: was.cpus, memory: was.memory, disk: was.disk };
        let vm = new_vm(context, name, id, subnet, what)?;
        // What was isolated stays so in its clones.
        let isolate = vm.isolate || was.isolate || options.isolate;
        // In a cluster it goes on where its original is; elsewhere it is in none.
        let prepared = member.is_some() && was.prepared;
        let head = Some(snapshot.origin.clone());
        Ok(Vm { mounts: was.mounts.clone(), head, isolate, member, prepared, ..vm })
    })?;
    let with_memory = snapshot.memory.is_some() && !options.disk_only;
    let request = tap_request(&vm);
    let (made, tap) = std::thread::scope(|scope| {
        // The kernel takes its time over a TAP's filter: the disk is made meanwhile.
        let tap = with_memory.then(|| scope.spawn(|| daemon.ensure_tap(&request)));
        let made = context.step(name, "disk", || {
            files::remove(&vm.overlay)?;
            clone_disk(context, snapshot, &vm, options.flatten)?;
            reach("clone: disk made");
            vm.advance(Event::Made)?;
            vm.save(home)?;
            reach("clone: state saved");
            check_disk(&vm)
        });
        let joined = |tap: ScopedJoinHandle<'_, Result<Tap>>| tap.join().unwrap_or_else(|_| Err(anyhow!("a panic")));
        (made, tap.map(|tap| context.step(name, "network", || joined(tap))))
    });
    let former = vm.clone();
    let result = made.and_then(|()| match tap {
        Some(tap) => take_tap(&mut vm, tap).and_then(|()| go_on(context, &mut vm, kind, snapshot)),
        None => Ok(()),
    });
    match result {
        Ok(()) => Ok(Restored { vm, took: began.elapsed(), snapshot: snapshot.clone() }),
        Err(error) => {
            undo(context, &vm, former, &daemon, true);
            Err(error)
        }
    }
}

/// A disk over the snapshot's, or a copy of it where the chain would be too long, or one over the image alone.
fn clone_disk(context: &Context, snapshot: &Snapshot, vm: &Vm, flatten: bool) -> Result<()> {
    let base = snapshot.disk(context.home);
    // Against who would remove it before the new disk names it.
    let _held = snapshots::share(context.home, &snapshot.origin.vm)?;
    ensure!(base.is_file(), "the snapshot {} is gone", snapshot.origin);
    let mut chain = Chain::open(&base)?;
    if flatten {
        return chain.flatten(&vm.overlay);
    }
    match chain.depth() < DEEPEST {
        true => qcow2::create_overlay(&vm.overlay, &base, qcow2::Format::Qcow2, vm.disk),
        false => copy_disk(&base, &vm.overlay),
    }
}

/// What is left to do when a command has made all its clones: the automatic snapshot gives its memory back, and goes
/// where nobody stands on it.
pub fn clones_made(context: &Context, snapshot: &Snapshot) {
    if !snapshot.automatic {
        return;
    }
    let _ = snapshots::drop_memory(context.home, &snapshot.origin);
    snapshots::tidy(context.home, &snapshot.origin);
}
