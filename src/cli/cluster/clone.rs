//! `puter cluster clone`.

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};
use serde_json::json;

use super::super::{info, output, with_context};
use super::{as_json, conclude, tell_restored};
use crate::vm::cluster::{self, CutName};
use crate::vm::lifecycle::{RestoreOptions, Restored};

/// Make a second cluster that goes on from the first as it is now, or from a snapshot of the whole. Each member has an
/// address and keys of its own, and the members' names lead to the new ones. It publishes no ports.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "clone")]
pub struct Clone {
    /// name of the cluster to begin from, or NAME@SNAPSHOT
    #[argh(positional, arg_name = "cluster")]
    source: CutName,
    /// name of the new cluster
    #[argh(positional)]
    new: String,
    /// not the memory: the new members are stopped, and boot from their disks
    #[argh(switch)]
    disk_only: bool,
    /// keep the new members from all VMs but each other; those of isolated members are so anyway
    #[argh(switch)]
    isolate: bool,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl Clone {
    pub fn run(self) -> Result<()> {
        with_context(|context| {
            let (disk_only, isolate) = (self.disk_only, self.isolate);
            let options = RestoreOptions { force: false, disk_only, flatten: false, isolate };
            let done = cluster::clone(context, &self.source, &self.new, options, &tell_restored(self.json))?;
            if self.json {
                let show = |one: &Restored| json!(info::Shown::new(context.home, &one.vm));
                output::print_json(&done.iter().map(|one| as_json(one, show)).collect::<Vec<_>>())?;
            }
            conclude(&done, format_args!("puter cluster clone {} {}", self.source, self.new))
        })
    }
}
