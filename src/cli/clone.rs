//! `puter clone`.

use anyhow::{Result, anyhow};
use argh::{ArgsInfo, FromArgs};

use super::{each, misused, output, with_context};
use crate::vm::lifecycle::{self, RestoreOptions};
use crate::vm::snapshots::Reference;

/// Make new VMs that go on from a VM as it is now, or from a snapshot. Each has a name, an address and keys of its own;
/// of a stopped VM they are stopped as well.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "clone")]
pub struct Clone {
    /// name of the VM to begin from, or VM@SNAPSHOT
    #[argh(positional, arg_name = "name")]
    source: String,
    /// names of the new VMs
    #[argh(positional, arg_name = "new")]
    names: Vec<String>,
    /// not the memory: the new VMs are stopped, and boot from the disk
    #[argh(switch)]
    disk_only: bool,
    /// copy the disk, so that the new VMs need no snapshot
    #[argh(switch)]
    flatten: bool,
    /// keep the new VMs and all others from each other; one of an isolated VM is so anyway
    #[argh(switch)]
    isolate: bool,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl Clone {
    pub fn run(self) -> Result<()> {
        let reference: Reference = self.source.parse().map_err(|why: String| anyhow!(why))?;
        if self.names.is_empty() {
            let hint = format!("puter clone {} NEW [NEW...]", self.source);
            return Err(misused("no name is given for the clone", &hint));
        }
        let (disk_only, flatten, isolate) = (self.disk_only, self.flatten, self.isolate);
        let options = RestoreOptions { force: false, disk_only, flatten, isolate };
        with_context(|context| {
            let (snapshot, taken) = lifecycle::clone_source(context, &reference, self.disk_only)?;
            let done = lifecycle::clone_check(context, &snapshot, options).and_then(|kind| {
                each(&self.names, |name| {
                    let cloned = lifecycle::clone(context, &snapshot, &kind, name, options, None)?;
                    if !self.json {
                        let (vm, seconds) = (&cloned.vm, cloned.took.as_secs_f64());
                        output::print(&match vm.state().is_active() {
                            true => format!("{name} runs at {} ({seconds:.1} s)", vm.ip),
                            false => format!("{name} is made and stopped ({seconds:.1} s)"),
                        });
                    }
                    Ok(cloned)
                })
            });
            if taken.is_some() {
                lifecycle::clones_made(context, &snapshot);
            }
            let cloned = done?;
            if self.json {
                let all: Vec<_> = cloned.iter().map(|c| super::info::Shown::new(context.home, &c.vm)).collect();
                output::print_json(&all)?;
            }
            Ok(())
        })
    }
}
