//! `delete`: removes a stopped VM and all that belongs to it.

use anyhow::{Result, anyhow};

use super::{Context, stop};
use crate::disk::qcow2;
use crate::failpoint::reach;
use crate::vm::machine::{Action, Command, Event, Refusal};
use crate::vm::state::{Vm, existing, refusal};
use crate::vm::{Hint, files, snapshots};

/// Deletes the VM. The state file goes last, so that a command which is killed midway can be repeated. Its snapshots go
/// with it where `with_snapshots` is set; those that only a `clone` needed go when nobody stands on them.
///
/// # Errors
/// When there is no such VM, it runs and `force` is not set, it has snapshots that are not to go or that others need, or
/// something cannot be removed.
pub fn delete(context: &Context, name: &str, force: bool, with_snapshots: bool) -> Result<()> {
    context.locked(name, || delete_locked(context, name, force, with_snapshots))
}

fn delete_locked(context: &Context, name: &str, force: bool, with_snapshots: bool) -> Result<()> {
    let mut vm = match Vm::load(context.home, name) {
        Err(error) if force => {
            context.observer.note(name, &format!("removing what its name tells: {error:#}"));
            check_snapshots(context, name, with_snapshots)?;
            context.end_strays(name);
            return remove_files(context, name);
        }
        Err(error) => return Err(error),
        Ok(None) => existing(context.home, name)?,
        Ok(Some(vm)) => vm,
    };
    let state = vm.state();
    if !matches!(state.decide(Command::DeleteForce), Action::Refuse(_)) && (force || !state.is_active()) {
        check_snapshots(context, name, with_snapshots)?;
    }
    match state.decide(if force { Command::DeleteForce } else { Command::Delete }) {
        Action::Refuse(Refusal::Active) => {
            Err(anyhow!("'{name}' is {state}")).hint(format!("stop it first: puter stop {name}; or give --force"))
        }
        Action::Refuse(why) => Err(refusal(name, state, why)),
        Action::EndAndRemove => {
            context.end(vm.process);
            reach("delete: ended");
            remove(context, &mut vm)
        }
        _ => remove(context, &mut vm),
    }
}

/// Removes the VM's snapshots where that was asked for. First of all: where one is needed, nothing is lost.
fn check_snapshots(context: &Context, name: &str, with_snapshots: bool) -> Result<()> {
    if with_snapshots {
        return snapshots::delete_all(context.home, name);
    }
    let kept = snapshots::asked_for(context.home, name)?;
    match kept.as_slice() {
        [] => Ok(()),
        [first, rest @ ..] => {
            let more = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
            Err(anyhow!("'{name}' has the snapshot {first}{more}"))
                .hint("give --snapshots to delete them too, or remove them one by one: puter snapshot delete")
        }
    }
}

/// Removes everything of a VM that does not run, but for its lock, which the caller holds.
pub(super) fn remove(context: &Context, vm: &mut Vm) -> Result<()> {
    vm.advance(Event::Condemned)?;
    match vm.save(context.home) {
        // To delete is how a user makes room.
        Err(error) if !files::is_full(&error) => return Err(error),
        _ => {}
    }
    reach("delete: marked");
    stop::clear(context, vm);
    remove_files(context, &vm.name)
}

/// Removes what is the VM's by its name: a damaged state file may name anything as its disk.
fn remove_files(context: &Context, name: &str) -> Result<()> {
    reach("delete: cleared");
    let overlay = context.home.overlay(name);
    let stood_on = qcow2::read_header(&overlay).ok().and_then(|header| header.backing);
    files::remove(&overlay)?;
    reach("delete: disk removed");
    if let Some(origin) = stood_on.and_then(|disk| snapshots::origin_of(context.home, &disk)) {
        snapshots::tidy(context.home, &origin);
    }
    for path in context.home.volatile(name).into_iter().chain(context.home.leftovers(name)) {
        files::remove(&path)?;
    }
    reach("delete: files removed");
    files::remove(&context.home.state(name))?;
    reach("delete: state removed");
    Ok(())
}
