//! `puter ssh-config`.

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};

use super::{each, output};
use crate::vm::home::Home;
use crate::vm::key;
use crate::vm::state::{existing, load_all};

/// Print a configuration for ssh, and for editors that use it, in which each VM is a host.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "ssh-config")]
pub struct SshConfig {
    /// names of the VMs (default: all)
    #[argh(positional, arg_name = "name")]
    names: Vec<String>,
}

impl SshConfig {
    pub fn run(self) -> Result<()> {
        let home = Home::from_env()?;
        let vms = match self.names.is_empty() {
            true => load_all(&home)?.vms,
            false => each(&self.names, |name| existing(&home, name))?,
        };
        output::print(
            vms.iter().map(|vm| key::ssh_host(&home, &vm.name, &vm.name, vm.ip)).collect::<String>().trim_end(),
        );
        Ok(())
    }
}
