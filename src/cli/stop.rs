//! `puter stop`.

use std::time::Duration;

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};

use super::{each, misused, output, with_context};
use crate::vm::lifecycle;
use crate::vm::state::load_all;

/// Stop VMs: by their power button, after a time by force.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "stop")]
pub struct Stop {
    /// names of the VMs
    #[argh(positional, arg_name = "name")]
    names: Vec<String>,
    /// seconds to wait before force (default: the setting stop_timeout, 30)
    #[argh(option)]
    timeout: Option<u64>,
    /// stop every VM that runs
    #[argh(switch)]
    all: bool,
    /// end the VM at once, as if by pulling its plug
    #[argh(switch)]
    force: bool,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl Stop {
    pub fn run(self) -> Result<()> {
        if self.all && !self.names.is_empty() {
            return Err(misused("--all means every VM", "leave out the names, or --all"));
        }
        with_context(|context| {
            let timeout = self.timeout.map_or(context.settings.stop_timeout, Duration::from_secs);
            let mut names = self.names;
            if self.all {
                let all = load_all(context.home)?.vms;
                names = all.into_iter().filter(|vm| vm.state().is_active()).map(|vm| vm.name).collect();
                if names.is_empty() {
                    return Ok(());
                }
            }
            let stopped = each(&names, |name| {
                let stopped = lifecycle::stop(context, name, timeout, self.force)?;
                if !self.json {
                    let seconds = stopped.took.as_secs_f64();
                    output::print(&match stopped {
                        _ if stopped.was_stopped => format!("{name} was stopped already"),
                        _ if stopped.forced => {
                            format!("{name} did not power off within {} s and was ended by force", timeout.as_secs())
                        }
                        _ => format!("{name} stopped ({seconds:.1} s)"),
                    });
                }
                Ok(stopped)
            })?;
            if self.json {
                let all: Vec<_> = stopped
                    .iter()
                    .map(|s| {
                        serde_json::json!({
                            "name": s.vm.name,
                            "forced": s.forced || (self.force && !s.was_stopped),
                            "was_stopped": s.was_stopped,
                            "seconds": s.took.as_secs_f64(),
                        })
                    })
                    .collect();
                output::print_json(&all)?;
            }
            Ok(())
        })
    }
}
