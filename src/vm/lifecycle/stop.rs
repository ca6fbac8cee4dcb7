//! `stop`: by the power button, after a time by force.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::{Context, snapshot};
use crate::failpoint::reach;
use crate::hypervisor::{self, process};
use crate::vm::machine::{Action, Command, Event, State};
use crate::vm::state::{ProcessId, Vm, existing, refusal};
use crate::vm::{cancel, daemon, files};

/// How long a hypervisor that is ended by force may take.
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
    let mut vm = existing(context.home, name)?;
    if !force {
        snapshot::thaw(context, &mut vm)?;
    }
    end(context, &mut vm, timeout, force)
}

/// Ends the VM, whatever its state. The caller holds its lock.
pub(super) fn end(context: &Context, vm: &mut Vm, timeout: Duration, force: bool) -> Result<Stopped> {
    let began = Instant::now();
    let name = vm.name.clone();
    let state = vm.state();
    let id = match (state.decide(Command::Stop), vm.process) {
        (Action::Refuse(why), _) => return Err(refusal(&name, state, why)),
        (Action::End | Action::Resume, Some(id)) => id,
        _ => {
            vm.retry = None;
            clear(context, vm);
            return Ok(Stopped { vm: vm.clone(), took: began.elapsed(), forced: false, was_stopped: true });
        }
    };
    let _guard = cancel::guard();
    vm.advance(Event::Asked)?;
    // A disk that is full or read-only is no reason to let it run on.
    save_or_note(context, vm);
    reach("stop: marked");
    let mut forced = force;
    if !force {
        let left = context.step(&name, "power button", || {
            // A guest that hangs or a dead API socket is no reason to fail: force follows.
            let _ = hypervisor::Client::new(&context.home.api(&name)).power_button();
            reach("stop: asked");
            wait_exit(id, timeout)
        });
        match left {
            Ok(ended) => forced = !ended,
            Err(error) => {
                // One that had not come so far stays marked: the next command ends what this one began.
                if state == State::Running {
                    vm.advance(Event::Reprieved)?;
                    save_or_note(context, vm);
                }
                return Err(error);
            }
        }
    }
    if forced {
        context.step(&name, "force", || {
            process::kill(id.pid, id.start_time, FORCE_LIMIT);
            ensure!(!vm.is_alive(), "the process {} of '{name}' does not end", id.pid);
            Ok(())
        })?;
    }
    reach("stop: ended");
    vm.retry = None;
    clear(context, vm);
    reach("stop: cleared");
    Ok(Stopped { vm: vm.clone(), took: began.elapsed(), forced: forced && !force, was_stopped: false })
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

/// Saves the state; where that fails the process, which is what counts, tells the truth all the same.
fn save_or_note(context: &Context, vm: &Vm) {
    if let Err(error) = vm.save(context.home) {
        context.observer.note(&vm.name, &format!("its state is not written down: {error:#}"));
    }
}

/// Removes what only a running VM has. What cannot be removed now is in nobody's way, and the next start or delete
/// tries again.
pub(super) fn clear(context: &Context, vm: &mut Vm) {
    context.end_strays(&vm.name);
    for path in context.home.volatile(&vm.name) {
        if let Err(error) = files::remove(&path) {
            context.observer.note(&vm.name, &format!("{error:#}"));
        }
    }
    reach("clear: sockets removed");
    if let Err(error) = daemon::Client::new(context.home).delete_tap(&vm.name) {
        // Without puterd the TAP stays until the VM starts or is deleted; it harms nobody.
        if vm.process.is_some() {
            context.observer.note(&vm.name, &format!("its TAP {} stays for now: {error:#}", vm.tap));
        }
    }
    reach("clear: network removed");
    if !matches!(vm.state(), State::Creating | State::Deleting) && vm.advance(Event::Ended).is_ok() {
        vm.process = None;
        save_or_note(context, vm);
    }
}
