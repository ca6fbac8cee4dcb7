//! `puter snapshot`, and `puter snapshot delete`.

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};
use serde::Serialize;
use serde_json::json;

use super::{each, misused, output, with_context};
use crate::vm::home::Home;
use crate::vm::lifecycle::{self, SnapshotOptions, Taken};
use crate::vm::settings::show_size;
use crate::vm::snapshots::{self, Reference, Snapshot as Kept};

/// Take snapshots of VMs: memory, processors and disk of one instant, of a stopped VM the disk. The VMs go on.
///
/// `puter snapshot delete VM@SNAPSHOT` deletes one; `puter snapshots` lists them.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "snapshot")]
pub struct Snapshot {
    /// names of the VMs
    #[argh(positional, arg_name = "name")]
    names: Vec<String>,
    /// what to call the snapshot (default: the time, such as 20261231-235959)
    #[argh(option)]
    name: Option<String>,
    /// no memory: the disk as if the VM had lost its power
    #[argh(switch)]
    disk_only: bool,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

/// Delete snapshots. One on which a clone's disk stands stays.
#[derive(ArgsInfo, FromArgs)]
pub struct SnapshotDelete {
    /// snapshots, as VM@SNAPSHOT
    #[argh(positional, arg_name = "snapshot")]
    snapshots: Vec<String>,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

/// A snapshot as JSON.
pub fn shown(home: &Home, snapshot: &Kept, users: &[snapshots::User]) -> serde_json::Value {
    let (memory, size) = snapshot.used(home);
    json!({
        "vm": snapshot.origin.vm,
        "id": snapshot.origin.id,
        "name": snapshot.name,
        "created": snapshot.created,
        "automatic": snapshot.automatic,
        "has_memory": snapshot.memory.is_some(),
        "memory_used": memory,
        "used": size,
        "memory_shared": snapshot.shared,
        "paused": snapshot.paused,
        "parent": snapshot.parent.as_ref().map(ToString::to_string),
        "used_by": users.iter().map(snapshots::User::name).collect::<Vec<_>>(),
        "directory": snapshot.directory(home),
    })
}

impl Snapshot {
    pub fn run(self) -> Result<()> {
        with_context(|context| {
            let options = SnapshotOptions { name: self.name.clone(), disk_only: self.disk_only, automatic: false };
            let taken = each(&self.names, |name| {
                let taken = lifecycle::snapshot(context, name, &options)?;
                if !self.json {
                    output::print(&line(context.home, &taken));
                }
                Ok(taken)
            })?;
            if self.json {
                let all: Vec<_> = taken.iter().map(|taken| shown(context.home, &taken.snapshot, &[])).collect();
                output::print_json(&all)?;
            }
            Ok(())
        })
    }
}

fn line(home: &Home, taken: &Taken) -> String {
    let snapshot = &taken.snapshot;
    let (_, used) = snapshot.used(home);
    let what = if snapshot.memory.is_some() { "" } else { "of the disk " };
    let paused = snapshot.paused.map_or(String::new(), |paused| format!(", paused for {paused:.3} s"));
    let name = snapshot.name.as_ref().map_or(String::new(), |name| format!(" '{name}'"));
    let shared = match &snapshot.parent {
        Some(parent) if snapshot.shared > 0 => format!(", {} of it shared with {parent}", show_size(snapshot.shared)),
        _ => String::new(),
    };
    format!("{}{name} taken {what}({}{shared}{paused})", snapshot.origin, show_size(used))
}

impl SnapshotDelete {
    pub fn run(self) -> Result<()> {
        delete_each(&self.snapshots, "`puter snapshots` shows them: VM@SNAPSHOT", self.json, |home, text| {
            let reference: Reference = text.parse().map_err(|why: String| anyhow::anyhow!(why))?;
            let origin = snapshots::delete(home, &reference)?;
            Ok((origin.to_string(), origin))
        })
    }
}

/// Deletes each of the snapshots that are named so. `delete` gives what the deleted one is called, and what it is in JSON.
pub fn delete_each<T: Serialize + Send>(
    named: &[String],
    hint: &str,
    json: bool,
    delete: impl Fn(&Home, &str) -> Result<(String, T)> + Sync,
) -> Result<()> {
    if named.is_empty() {
        return Err(misused("no snapshot is named", hint));
    }
    let home = Home::from_env()?;
    let deleted = each(named, |text| {
        let (name, shown) = delete(&home, text)?;
        if !json {
            output::print(&format!("{name} deleted"));
        }
        Ok(shown)
    })?;
    match json {
        true => output::print_json(&deleted),
        false => Ok(()),
    }
}
