//! `puter cluster snapshot`, `snapshot delete`, `snapshots` and `restore`.

use anyhow::{Result, anyhow};
use argh::{ArgsInfo, FromArgs};
use serde_json::json;

use super::super::output::{self, show_seconds};
use super::super::snapshot::delete_each;
use super::super::{info, with_context};
use super::{as_json, conclude, tell_restored};
use crate::vm::cluster::{self, Cut, CutName, Outcome};
use crate::vm::home::Home;
use crate::vm::lifecycle::{Taken, unix_now};
use crate::vm::settings::show_size;

/// Take a snapshot of all members at one instant: all stand still, all are written, all go on. All or none.
///
/// `puter cluster snapshot delete NAME@SNAPSHOT` deletes one; `puter cluster snapshots NAME` lists them.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "snapshot")]
pub struct Snapshot {
    /// name of the cluster
    #[argh(positional, arg_name = "cluster")]
    name: String,
    /// what to call the snapshot (default: the time, such as 20261231-235959)
    #[argh(option, long = "name", arg_name = "name")]
    label: Option<String>,
    /// no memory: the disks as if the members had lost their power
    #[argh(switch)]
    disk_only: bool,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

/// Delete snapshots of a whole cluster, each with all its parts. One on which a clone's disk stands stays whole.
#[derive(ArgsInfo, FromArgs)]
pub struct SnapshotDelete {
    /// snapshots, as NAME@SNAPSHOT
    #[argh(positional, arg_name = "snapshot")]
    snapshots: Vec<String>,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

/// List the snapshots of a whole cluster.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "snapshots")]
pub struct Snapshots {
    /// name of the cluster
    #[argh(positional, arg_name = "cluster")]
    name: String,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

/// Let all members go on from a snapshot of the whole. What they did since then is lost.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "restore")]
pub struct Restore {
    /// name of the cluster, or NAME@SNAPSHOT (default: the latest)
    #[argh(positional, arg_name = "cluster")]
    name: CutName,
    /// also of members that run
    #[argh(switch)]
    force: bool,
    /// not the memory: the members are then stopped, and boot from their disks
    #[argh(switch)]
    disk_only: bool,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

fn shown(cluster: &str, cut: &Cut) -> serde_json::Value {
    json!({ "cluster": cluster, "name": cut.name, "created": cut.created, "members": cut.members })
}

impl Snapshot {
    pub fn run(self) -> Result<()> {
        with_context(|context| {
            let taken = cluster::snapshot(context, &self.name, self.label.as_deref(), self.disk_only)?;
            let all = || taken.members.iter().filter_map(|one: &Outcome<Taken>| one.result.as_ref().ok());
            let used: u64 = all().map(|one| one.snapshot.used(context.home).1).sum();
            let paused = all()
                .filter_map(|one| one.snapshot.paused)
                .fold(None, |most: Option<f64>, one| Some(most.unwrap_or(0.0).max(one)));
            if self.json {
                let mut told = shown(&self.name, &taken.cut);
                told["used"] = used.into();
                told["paused"] = paused.into();
                told["pause_spread"] = taken.spread.map(|spread| spread.as_secs_f64()).into();
                return output::print_json(&told);
            }
            let spread = taken.spread.map_or(0.0, |spread| spread.as_secs_f64() * 1e3);
            let paused = paused.map_or(String::new(), |paused| {
                format!(", paused for {paused:.3} s, {spread:.1} ms from first to last")
            });
            let count = taken.members.len();
            output::print(&format!(
                "{}@{} taken of {count} members ({}{paused})",
                self.name,
                taken.cut.name,
                show_size(used)
            ));
            Ok(())
        })
    }
}

impl SnapshotDelete {
    pub fn run(self) -> Result<()> {
        delete_each(&self.snapshots, "puter cluster snapshot delete NAME@SNAPSHOT", self.json, |home, text| {
            let name: CutName = text.parse().map_err(|why: String| anyhow!(why))?;
            let cut = cluster::delete_cut(home, &name)?;
            Ok((name.to_string(), shown(&name.cluster, &cut)))
        })
    }
}

impl Snapshots {
    pub fn run(self) -> Result<()> {
        let home = Home::from_env()?;
        let cuts = cluster::cuts(&home, &self.name)?;
        if self.json {
            let all: Vec<_> = cuts
                .iter()
                .map(|(cut, whole)| {
                    let mut told = shown(&self.name, cut);
                    told["whole"] = (*whole).into();
                    told
                })
                .collect();
            return output::print_json(&all);
        }
        if cuts.is_empty() {
            output::print(&format!("no snapshots yet; `puter cluster snapshot {}` takes one", self.name));
            return Ok(());
        }
        let mut rows = vec![["SNAPSHOT", "MEMBERS", "AGE", "WHOLE"].map(String::from)];
        for (cut, whole) in cuts {
            let age = show_seconds(unix_now().saturating_sub(cut.created));
            let whole = if whole { "yes" } else { "no: parts are deleted" };
            rows.push([format!("{}@{}", self.name, cut.name), cut.members.len().to_string(), age, whole.into()]);
        }
        output::print(&output::table(&rows));
        Ok(())
    }
}

impl Restore {
    pub fn run(self) -> Result<()> {
        with_context(|context| {
            let tell = tell_restored(self.json);
            let (cut, done) = cluster::restore(context, &self.name, self.force, self.disk_only, &tell)?;
            if self.json {
                let show = |one: &crate::vm::lifecycle::Restored| json!(info::Shown::new(context.home, &one.vm));
                output::print_json(&done.iter().map(|one| as_json(one, show)).collect::<Vec<_>>())?;
            }
            conclude(&done, format_args!("puter cluster restore --force {}@{}", self.name.cluster, cut.name))
        })
    }
}
