//! `puter restore`.

use anyhow::{Result, anyhow};
use argh::{ArgsInfo, FromArgs};

use super::{output, with_context};
use crate::vm::lifecycle::{self, RestoreOptions};
use crate::vm::snapshots::{Reference, check_name};

/// Let a VM go on from one of its snapshots. What it did since then is lost.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "restore")]
pub struct Restore {
    /// name of the VM, or VM@SNAPSHOT
    #[argh(positional)]
    name: String,
    /// name or time of the snapshot (default: the latest)
    #[argh(positional)]
    snapshot: Option<String>,
    /// also of a VM that runs
    #[argh(switch)]
    force: bool,
    /// not the memory: the VM is then stopped, and boots from the disk
    #[argh(switch)]
    disk_only: bool,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl Restore {
    pub fn run(self) -> Result<()> {
        let mut reference: Reference = self.name.parse().map_err(|why: String| anyhow!(why))?;
        if let Some(snapshot) = self.snapshot {
            check_name(&snapshot).map_err(|why| anyhow!(why))?;
            reference.which = Some(snapshot);
        }
        let options = RestoreOptions { force: self.force, disk_only: self.disk_only, flatten: false, isolate: false };
        with_context(|context| {
            let restored = lifecycle::restore(context, &reference, options)?;
            if self.json {
                return output::print_json(&[super::info::Shown::new(context.home, &restored.vm)]);
            }
            let (vm, seconds) = (&restored.vm, restored.took.as_secs_f64());
            let origin = &restored.snapshot.origin;
            output::print(&match vm.state().is_active() {
                true => format!("{} goes on from {origin} at {} ({seconds:.1} s)", vm.name, vm.ip),
                false => format!("{} has the disk of {origin} and is stopped ({seconds:.1} s)", vm.name),
            });
            Ok(())
        })
    }
}
