//! `puter cluster status`.

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};
use serde_json::json;

use super::super::output;
use crate::vm::cluster::{self, Target};
use crate::vm::home::Home;
use crate::vm::settings::show_size;

/// Show the members of a cluster: which there are, and what they are doing.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "status")]
pub struct Status {
    /// name of the cluster, or NAME:ROLE, or NAME:MEMBER
    #[argh(positional, arg_name = "part", from_str_fn(super::target))]
    target: Target,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl Status {
    pub fn run(self) -> Result<()> {
        let home = Home::from_env()?;
        let cluster = cluster::existing(&home, &self.target.cluster)?;
        let mut shown = Vec::new();
        let mut rows = vec![["MEMBER", "ROLE", "VM", "STATUS", "IP", "CPUS", "MEMORY"].map(String::from)];
        for member in self.target.select(&cluster)? {
            let runs = cluster.role(&member.role).is_some_and(|role| role.run.is_some());
            // A damaged one hides no other.
            let found = cluster::machine(&home, &member);
            let status = match &found {
                Ok(Some(vm)) => vm.state().to_string(),
                Ok(None) => "absent".to_string(),
                Err(_) => "damaged".to_string(),
            };
            let vm = found.as_ref().ok().and_then(Option::as_ref);
            shown.push(json!({
                "member": member.member, "role": member.role, "vm": member.vm, "status": status,
                "ip": vm.map(|vm| vm.ip), "cpus": vm.map(|vm| vm.cpus), "memory": vm.map(|vm| vm.memory),
                "first_boot_done": vm.map(|vm| vm.prepared || !runs),
                "error": found.as_ref().err().map(|error| format!("{error:#}")),
            }));
            if let Err(error) = &found {
                eprintln!("puter: '{}' cannot be looked at: {error:#}", member.vm);
            }
            let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".into());
            rows.push([
                member.member,
                member.role,
                member.vm,
                status,
                or_none(vm.map(|vm| vm.ip.to_string())),
                or_none(vm.map(|vm| vm.cpus.to_string())),
                or_none(vm.map(|vm| show_size(vm.memory))),
            ]);
        }
        match self.json {
            true => {
                output::print_json(&json!({ "cluster": cluster.name, "created": cluster.created, "members": shown }))
            }
            false => {
                output::print(&output::table(&rows));
                Ok(())
            }
        }
    }
}
