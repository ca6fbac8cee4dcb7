//! `puter cluster delete`.

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};
use serde_json::json;

use super::super::{output, with_context};
use super::{as_json, conclude, tell_deleted};
use crate::vm::cluster;

/// Delete a cluster with its VMs and their disks. There is no way back.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "delete")]
pub struct Delete {
    /// name of the cluster
    #[argh(positional, arg_name = "cluster")]
    name: String,
    /// delete members that run as well, and a cluster whose record is damaged
    #[argh(switch)]
    force: bool,
    /// delete the members' snapshots as well
    #[argh(switch)]
    snapshots: bool,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl Delete {
    pub fn run(self) -> Result<()> {
        with_context(|context| {
            let done = cluster::delete(context, &self.name, self.force, self.snapshots, &tell_deleted(self.json))?;
            let whole = done.iter().all(|one| one.result.is_ok());
            if self.json {
                let all: Vec<_> = done.iter().map(|one| as_json(one, |()| json!({}))).collect();
                output::print_json(&all)?;
            } else if whole {
                output::print(&format!("{} deleted", self.name));
            }
            conclude(&done, format_args!("puter cluster delete {}", self.name))
        })
    }
}
