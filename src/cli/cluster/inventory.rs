//! `puter cluster inventory`.

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};

use super::super::output;
use crate::vm::cluster::{self, Format};
use crate::vm::home::Home;

/// Print the members for other programs: as lines of /etc/hosts, as a configuration for ssh, as an inventory of
/// Ansible, or as JSON.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "inventory")]
pub struct Inventory {
    /// name of the cluster
    #[argh(positional, arg_name = "cluster")]
    name: String,
    /// hosts, ssh, ansible or json (default: hosts)
    #[argh(option, default = "Format::Hosts")]
    format: Format,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl Inventory {
    pub fn run(self) -> Result<()> {
        let home = Home::from_env()?;
        let cluster = cluster::existing(&home, &self.name)?;
        let format = if self.json { Format::Json } else { self.format };
        output::print(cluster::inventory(&home, &cluster, format)?.trim_end());
        Ok(())
    }
}
