//! `delete`: removes a stopped VM and all that belongs to it.

use std::time::Duration;

use anyhow::{Result, anyhow};

use super::{Context, stop};
use crate::hypervisor::process;
use crate::vm::state::{Status, Vm, existing};
use crate::vm::{Hint, files};

/// Deletes the VM. The state file goes last, so that a command which is killed midway can be repeated.
///
/// # Errors
/// When there is no such VM, it runs and `force` is not set, or something cannot be removed.
pub fn delete(context: &Context, name: &str, force: bool) -> Result<()> {
    context.locked(name, || delete_locked(context, name, force))
}

fn delete_locked(context: &Context, name: &str, force: bool) -> Result<()> {
    let mut vm = match Vm::load(context.home, name) {
        Err(error) if force => {
            context.observer.note(name, &format!("removing what its name tells: {error:#}"));
            return remove_files(context, name, context.home.overlay(name).as_path());
        }
        Err(error) => return Err(error).hint(format!("`puter delete --force {name}` removes the VM all the same")),
        Ok(None) => existing(context.home, name)?,
        Ok(Some(vm)) => vm,
    };
    if let Some(id) = vm.process.filter(|_| vm.is_alive()) {
        if !force {
            return Err(anyhow!("'{name}' is {}", vm.status().word()))
                .hint(format!("stop it first: puter stop {name}; or give --force"));
        }
        process::kill(id.pid, id.start_time, Duration::from_secs(10));
    }
    remove(context, &mut vm)
}

/// Removes everything of a VM that does not run, but for its lock, which the caller holds.
pub(super) fn remove(context: &Context, vm: &mut Vm) -> Result<()> {
    vm.status = Status::Deleting;
    vm.save(context.home)?;
    stop::clear(context, vm)?;
    remove_files(context, &vm.name, &vm.overlay)
}

fn remove_files(context: &Context, name: &str, overlay: &std::path::Path) -> Result<()> {
    files::remove(overlay)?;
    for path in context.home.volatile(name).into_iter().chain(context.home.leftovers(name)) {
        files::remove(&path)?;
    }
    files::remove(&context.home.state(name))
}
