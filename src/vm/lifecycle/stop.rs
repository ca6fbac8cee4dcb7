//! `stop`: by the power button, after a time by force.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::Context;
use crate::hypervisor::{self, process};
use crate::vm::state::{ProcessId, Status, Vm, existing};
use crate::vm::{cancel, daemon, files};

/// Pause between two looks at a process that is about to end; the kernel wakes us earlier by its pidfd.
const FORCE_LIMIT: Duration = Duration::from_secs(10);

/// A VM that was stopped.
#[derive(Debug)]
pub struct Stopped {
    pub vm: Vm,
    pub took: Duration,
    /// The guest did not power off in time and was ended by force.
    pub forced: bool,
    /// It was not running in the first place.
    pub was_stopped: bool,
}

/// Stops the VM: asks the guest to power off, and ends it by force after `timeout` or at once where `force` is set.
///
/// # Errors
/// When there is no such VM or its process cannot be ended.
pub fn stop(context: &Context, name: &str, timeout: Duration, force: bool) -> Result<Stopped> {
    context.locked(name, || stop_locked(context, name, timeout, force))
}

fn stop_locked(context: &Context, name: &str, timeout: Duration, force: bool) -> Result<Stopped> {
    let began = Instant::now();
    let mut vm = existing(context.home, name)?;
    let Some(id) = vm.process.filter(|_| vm.is_alive()) else {
        clear(context, &mut vm)?;
        return Ok(Stopped { vm, took: began.elapsed(), forced: false, was_stopped: true });
    };
    let _guard = cancel::guard();
    let former = vm.status;
    vm.status = Status::Stopping;
    vm.save(context.home)?;
    let mut forced = force;
    if !force {
        let left = context.step(name, "power button", || {
            // A guest that hangs or a dead API socket is no reason to fail: force follows.
            let _ = hypervisor::Client::new(&context.home.api(name)).power_button();
            wait_exit(id, timeout)
        });
        match left {
            Ok(ended) => forced = !ended,
            Err(error) => {
                vm.status = former;
                vm.save(context.home)?;
                return Err(error);
            }
        }
    }
    if forced {
        context.step(name, "force", || {
            process::kill(id.pid, id.start_time, FORCE_LIMIT);
            ensure!(!vm.is_alive(), "the process {} of '{name}' does not end", id.pid);
            Ok(())
        })?;
    }
    clear(context, &mut vm)?;
    Ok(Stopped { vm, took: began.elapsed(), forced: forced && !force, was_stopped: false })
}

/// Waits for the process to end; false when the time ran out.
fn wait_exit(id: ProcessId, timeout: Duration) -> Result<bool> {
    let end = Instant::now() + timeout;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        // Short turns, so that Ctrl-C is heard.
        if process::wait_exit(id.pid, id.start_time, left.min(Duration::from_millis(200))) {
            return Ok(true);
        }
        cancel::check()?;
        if left.is_zero() {
            return Ok(false);
        }
    }
}

/// Removes what only a running VM has.
pub(super) fn clear(context: &Context, vm: &mut Vm) -> Result<()> {
    context.end_strays(&vm.name);
    for path in context.home.volatile(&vm.name) {
        files::remove(&path)?;
    }
    if let Err(error) = daemon::Client::new(context.home).delete_tap(&vm.name) {
        // Without puterd the TAP stays until the VM starts or is deleted; it harms nobody.
        if vm.process.is_some() {
            context.observer.note(&vm.name, &format!("its TAP {} stays for now: {error:#}", vm.tap));
        }
    }
    if matches!(vm.status, Status::Creating | Status::Deleting) {
        return Ok(());
    }
    vm.status = Status::Stopped;
    vm.process = None;
    vm.save(context.home)
}
