//! What the commands do to a VM: start, stop, delete, snapshot, restore and clone, each under the VM's own lock.

mod create;
mod delete;
mod meet;
mod publish;
mod restore;
mod snapshot;
mod start;
mod stop;
mod together;

use std::time::{Duration, Instant};

use anyhow::Result;

pub use create::check_image;
pub use delete::delete;
pub use publish::{Change, Line, check_taken, ports, publish};
pub use restore::{RestoreOptions, Restored, clone, clone_check, clone_source, clones_made, restore};
pub use snapshot::{SnapshotOptions, Taken, snapshot, snapshot_together, watch_over};
pub use start::{StartOptions, Started, change, check_resources, finish, is_made_from, restart, start};
pub use stop::{Stopped, stop};
pub use together::{AnotherFailed, Together};

use super::home::Home;
use super::settings::Settings;
use super::state::{ProcessId, Retry, Vm, existing};
use super::{files, monitor};
use crate::hypervisor;
use crate::image::{self, PullOptions};

/// Directories that one VM may share: each has a place on its PCI bus.
pub const MOST_SHARES: usize = 8;
/// How long a stray hypervisor may take to end.
const STRAY_LIMIT: Duration = Duration::from_secs(10);

/// What every command works with.
pub struct Context<'a> {
    pub home: &'a Home,
    pub settings: &'a Settings,
    pub observer: &'a dyn Observer,
}

/// Hears what a command is doing, so that the user can be told.
pub trait Observer: Sync {
    /// A step begins.
    fn begin(&self, vm: &str, step: &str);
    /// The step ended well.
    fn end(&self, vm: &str, step: &str, took: Duration);
    /// Something that the user should know.
    fn note(&self, vm: &str, text: &str);
    /// These VMs are worked on together from now on; each with what it is called among them.
    fn together(&self, _vms: &[(&str, &str)]) {}
    /// The work on one of those has ended, with an error where it failed.
    fn ended(&self, _vm: &str, _error: Option<&anyhow::Error>) {}
    /// Shows the progress of a pull of `what`, until it is dropped.
    fn pull<'a>(&'a self, what: &str) -> Box<dyn image::Progress + 'a>;
}

impl Context<'_> {
    /// Has the image, pulled where it is not here, and checks that it can be a machine. By its digest an image is found
    /// among those that are here.
    pub(crate) fn pull(&self, store: &image::Store, text: &str, refresh: bool) -> Result<image::Image> {
        let image = match text.starts_with("sha256:") {
            true => {
                let digest = *store.find(text)?.digest();
                let damaged = || anyhow::anyhow!("the image {text} is damaged: pull it again by its name");
                store.by_digest(&digest, None)?.ok_or_else(damaged)?
            }
            false => {
                let reference = text.parse().map_err(|why: image::reference::ReferenceError| anyhow::anyhow!(why))?;
                self.fetch(store, &reference, refresh, None)?
            }
        };
        image.check_bootable()?;
        Ok(image)
    }

    /// Has the image, pulled where it is not here; without an architecture it is the host's.
    pub(crate) fn fetch(
        &self,
        store: &image::Store,
        reference: &image::Reference,
        refresh: bool,
        architecture: Option<&str>,
    ) -> Result<image::Image> {
        let timeout = self.settings.registry_timeout;
        let defaults = PullOptions::default();
        let options = PullOptions {
            insecure: self.settings.insecure_registries.clone(),
            ca: self.settings.registry_ca.clone(),
            mirrors: self.settings.registry_mirrors.clone(),
            refresh,
            architecture: architecture.map(String::from),
            connect_timeout: timeout.min(defaults.connect_timeout),
            idle_timeout: timeout,
            ..defaults
        };
        // It ends soon by itself, takes its files away and its bars off the screen.
        let _guard = super::cancel::guard();
        let progress = self.observer.pull(&reference.to_string());
        store.pull(reference, &options, &*progress)
    }

    pub(crate) fn step<T>(&self, vm: &str, step: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        super::cancel::check()?;
        let began = Instant::now();
        self.observer.begin(vm, step);
        let result = work()?;
        self.observer.end(vm, step, began.elapsed());
        Ok(result)
    }

    /// Ends hypervisors of the VM that no state file knows: the command that started one was killed before it could
    /// write that down. The caller holds the lock and has seen that the VM does not run.
    fn end_strays(&self, vm: &str) {
        for (pid, start_time) in hypervisor::serving(&self.home.api(vm)) {
            self.observer.note(vm, &format!("ending the hypervisor (process {pid}) that a killed command left"));
            hypervisor::process::kill(pid, start_time, STRAY_LIMIT);
        }
        // They end with their hypervisor; those that never met it do not.
        for number in 0..MOST_SHARES {
            let socket = self.home.share(vm, number);
            for (pid, start_time) in hypervisor::virtiofs::serving(&socket).into_iter().filter(|_| socket.exists()) {
                hypervisor::process::kill(pid, start_time, STRAY_LIMIT);
            }
        }
        monitor::wait_for_former(self.home, vm);
    }

    /// Ends a hypervisor that nobody waits for.
    fn end(&self, process: Option<ProcessId>) {
        if let Some(id) = process {
            hypervisor::process::kill(id.pid, id.start_time, STRAY_LIMIT);
        }
    }

    /// Does `work` under the VM's lock: two commands on one VM take turns.
    fn locked<T>(&self, vm: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.locked_within(vm, Duration::from_secs(20), work)
    }

    /// As [`Context::locked`], for one who waits only so long.
    fn locked_within<T>(&self, vm: &str, limit: Duration, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let _lock = self.lock(vm, limit)?;
        let result = work();
        // The lock of a VM that is not, or not any more, would be litter.
        if !self.home.state(vm).exists() {
            let _ = files::remove(&self.home.vm_lock(vm));
        }
        result
    }

    fn lock(&self, vm: &str, limit: Duration) -> Result<files::Lock> {
        crate::protocol::address::check_vm_name(vm).map_err(anyhow::Error::msg)?;
        let busy = match limit.as_secs() {
            0 | 1 => format!("another command works on '{vm}'"),
            seconds => format!("another command has been working on '{vm}' for {seconds} seconds"),
        };
        let lock = files::lock(&self.home.vm_lock(vm), limit, &busy)?;
        for path in [self.home.state(vm), self.home.known_hosts(vm)] {
            files::remove_temporaries(&path)?;
        }
        Ok(lock)
    }
}

/// Says nothing: for what goes on in the background.
pub struct Silent;

impl Observer for Silent {
    fn begin(&self, _: &str, _: &str) {}
    fn end(&self, _: &str, _: &str, _: Duration) {}
    fn note(&self, _: &str, _: &str) {}
    fn pull<'a>(&'a self, _: &str) -> Box<dyn image::Progress + 'a> {
        Box::new(Silent)
    }
}

impl image::Progress for Silent {
    fn cancelled(&self) -> bool {
        super::cancel::check().is_err()
    }
}

/// Puts a VM in order whose hypervisor has ended by itself. `note` is called with its state, and what it returns is
/// returned.
///
/// # Errors
/// When a command holds the VM, or the state is not of this hypervisor any more or cannot be written.
pub fn settle<T>(context: &Context, name: &str, hypervisor: ProcessId, note: impl FnOnce(&mut Vm) -> T) -> Result<T> {
    context.locked(name, || {
        let mut vm = existing(context.home, name)?;
        anyhow::ensure!(vm.process == Some(hypervisor), "'{name}' is in other hands");
        let noted = note(&mut vm);
        stop::clear(context, &mut vm);
        Ok(noted)
    })
}

/// Puts off a restart that did not work; false where a command has changed the VM's course meanwhile.
///
/// # Errors
/// When the state cannot be written.
pub fn put_off(context: &Context, name: &str, due: Retry, next: Retry) -> Result<bool> {
    context.locked(name, || match Vm::load(context.home, name)? {
        Some(mut vm) if vm.retry == Some(due) => {
            vm.retry = Some(next);
            vm.save(context.home)?;
            Ok(true)
        }
        _ => Ok(false),
    })
}

/// Notes that the VM has run what its cluster runs at its first boot.
///
/// # Errors
/// When there is no such VM, or the state cannot be written.
pub fn prepared(context: &Context, name: &str) -> Result<Vm> {
    context.locked(name, || {
        let mut vm = existing(context.home, name)?;
        vm.prepared = true;
        vm.save(context.home)?;
        Ok(vm)
    })
}

/// Seconds since 1970-01-01 UTC.
pub fn unix_now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
