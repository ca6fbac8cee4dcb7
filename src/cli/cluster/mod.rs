//! `puter cluster`.

mod apply;
mod clone;
mod create;
mod delete;
mod exec;
mod inventory;
mod list;
mod scale;
mod snapshot;
mod ssh;
mod start;
mod status;
mod stop;
mod wait;

use std::fmt::Display;

use anyhow::{Result, anyhow};
use argh::{ArgsInfo, FromArgs};
use serde_json::json;

pub use snapshot::SnapshotDelete;

use super::{output, show_error};
use crate::vm::cluster::{Began, Member, Outcome, Target};
use crate::vm::lifecycle::Restored;

/// Groups of VMs as one thing, with names for one another: make them, start, stop and delete them, run commands on all.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "cluster")]
pub struct Cluster {
    #[argh(subcommand)]
    command: Command,
}

#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand)]
enum Command {
    Create(create::Create),
    Apply(apply::Apply),
    Start(start::Start),
    Stop(stop::Stop),
    Delete(delete::Delete),
    List(list::List),
    Status(status::Status),
    Exec(exec::Exec),
    Ssh(ssh::Ssh),
    Scale(scale::Scale),
    Wait(wait::Wait),
    Inventory(inventory::Inventory),
    Snapshot(snapshot::Snapshot),
    Snapshots(snapshot::Snapshots),
    Restore(snapshot::Restore),
    Clone(clone::Clone),
}

impl Cluster {
    /// Whether another program takes over.
    pub fn is_ssh(&self) -> bool {
        matches!(self.command, Command::Ssh(_))
    }

    pub fn run(self) -> Result<()> {
        match self.command {
            Command::Create(command) => command.run(),
            Command::Apply(command) => command.run(),
            Command::Start(command) => command.run(),
            Command::Stop(command) => command.run(),
            Command::Delete(command) => command.run(),
            Command::List(command) => command.run(),
            Command::Status(command) => command.run(),
            Command::Exec(command) => command.run(),
            Command::Ssh(command) => command.run(),
            Command::Scale(command) => command.run(),
            Command::Wait(command) => command.run(),
            Command::Inventory(command) => command.run(),
            Command::Snapshot(command) => command.run(),
            Command::Snapshots(command) => command.run(),
            Command::Restore(command) => command.run(),
            Command::Clone(command) => command.run(),
        }
    }
}

/// Reads the positional that says which members are meant.
fn target(text: &str) -> Result<Target, String> {
    text.parse().map_err(|why| format!("{why}; it is written NAME, NAME:ROLE or NAME:MEMBER"))
}

/// Tells that a member runs.
fn tell_began(json: bool) -> impl Fn(&Member, &Result<Began>) + Sync {
    move |member, result| {
        if let (false, Ok(began)) = (json, result) {
            let how = match began.ran {
                true => "runs already".to_string(),
                false => format!("runs at {} ({:.1} s)", began.ip, began.took.as_secs_f64()),
            };
            output::print(&format!("{}: {how}", member.member));
        }
    }
}

/// Tells that a member is deleted.
fn tell_deleted(json: bool) -> impl Fn(&Member, &Result<()>) + Sync {
    move |member, result| {
        if let (false, Ok(())) = (json, result) {
            output::print(&format!("{}: deleted", member.member));
        }
    }
}

/// Tells that a member goes on from a snapshot.
fn tell_restored(json: bool) -> impl Fn(&Member, &Result<Restored>) + Sync {
    move |member, result| {
        if let (false, Ok(restored)) = (json, result) {
            let (vm, seconds) = (&restored.vm, restored.took.as_secs_f64());
            output::print(&match vm.state().is_active() {
                true => format!("{}: goes on at {} ({seconds:.1} s)", member.member, vm.ip),
                false => format!("{}: has the disk and is stopped ({seconds:.1} s)", member.member),
            });
        }
    }
}

fn began(began: &Began) -> serde_json::Value {
    json!({ "ip": began.ip, "seconds": began.took.as_secs_f64(), "ran": began.ran })
}

/// A member's result as JSON: what `show` makes of a good one, and `error` of another.
fn as_json<T>(outcome: &Outcome<T>, show: impl Fn(&T) -> serde_json::Value) -> serde_json::Value {
    let mut all = match &outcome.result {
        Ok(done) => show(done),
        Err(_) => json!({}),
    };
    let Member { member, role, vm, .. } = &outcome.member;
    all["member"] = member.as_str().into();
    all["role"] = role.as_str().into();
    all["vm"] = vm.as_str().into();
    all["error"] = outcome.result.as_ref().err().map(|error| format!("{error:#}")).into();
    all
}

/// Tells the errors of members one by one; the command fails where there is one. `again` is what completes the rest.
fn conclude<T>(outcomes: &[Outcome<T>], again: impl Display) -> Result<()> {
    let failed: Vec<_> = outcomes.iter().filter_map(|one| Some((&one.member, one.result.as_ref().err()?))).collect();
    for (_, error) in &failed {
        show_error(error);
    }
    let names: Vec<&str> = failed.iter().map(|(member, _)| member.member.as_str()).collect();
    if names.is_empty() {
        return Ok(());
    }
    use crate::vm::Hint;
    Err(anyhow!("{} of {} members failed: {}", names.len(), outcomes.len(), names.join(", ")))
        .hint(format!("the same again does the rest: {again}"))
}
