//! `puter delete`.

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};

use super::{each, output, with_context};
use crate::vm::lifecycle;

/// Delete VMs with their disks. There is no way back.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "delete")]
pub struct Delete {
    /// names of the VMs
    #[argh(positional, arg_name = "name")]
    names: Vec<String>,
    /// delete a running VM as well, and one whose state file is damaged
    #[argh(switch)]
    force: bool,
    /// delete their snapshots as well
    #[argh(switch)]
    snapshots: bool,
}

impl Delete {
    pub fn run(self) -> Result<()> {
        with_context(|context| {
            each(&self.names, |name| {
                lifecycle::delete(context, name, self.force, self.snapshots)?;
                output::print(&format!("{name} deleted"));
                Ok(())
            })?;
            Ok(())
        })
    }
}
