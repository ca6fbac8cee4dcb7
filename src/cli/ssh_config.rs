//! `puter ssh-config`.

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};

use super::{each, output};
use crate::vm::home::Home;
use crate::vm::key;
use crate::vm::state::{Vm, existing, load_all};

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
        output::print(vms.iter().map(|vm| host(&home, vm)).collect::<String>().trim_end());
        Ok(())
    }
}

/// A host's part of ssh_config(5): the options that `puter ssh` gives on its command line.
fn host(home: &Home, vm: &Vm) -> String {
    format!(
        "Host {name}\n  HostName {ip}\n  User root\n  HostKeyAlias {name}\n  IdentityFile \"{key}\"\n  IdentitiesOnly yes\n  \
         UserKnownHostsFile \"{hosts}\"\n  GlobalKnownHostsFile none\n  StrictHostKeyChecking yes\n  UpdateHostKeys no\n\n",
        name = vm.name,
        ip = vm.ip,
        key = key::private(home).display(),
        hosts = home.known_hosts(&vm.name).display(),
    )
}
