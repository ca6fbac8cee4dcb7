//! `puter restart`.

use std::time::Duration;

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};

use super::{each, output, with_context};
use crate::vm::lifecycle;

/// Stop VMs and start them again.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "restart")]
pub struct Restart {
    /// names of the VMs
    #[argh(positional, arg_name = "name")]
    names: Vec<String>,
    /// seconds to wait before force (default: the setting stop_timeout, 30)
    #[argh(option)]
    timeout: Option<u64>,
    /// end the VM at once, as if by pulling its plug
    #[argh(switch)]
    force: bool,
}

impl Restart {
    pub fn run(self) -> Result<()> {
        with_context(|context| {
            let timeout = self.timeout.map_or(context.settings.stop_timeout, Duration::from_secs);
            each(&self.names, |name| {
                let started = lifecycle::restart(context, name, timeout, self.force)?;
                output::print(&format!("{name} runs at {} ({:.1} s)", started.vm.ip, started.took.as_secs_f64()));
                Ok(())
            })?;
            Ok(())
        })
    }
}
