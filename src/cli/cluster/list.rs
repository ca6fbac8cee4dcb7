//! `puter cluster list`.

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};
use serde_json::json;

use super::super::output::{self, show_seconds};
use crate::vm::cluster;
use crate::vm::home::Home;
use crate::vm::lifecycle::unix_now;
use crate::vm::machine::State;

/// List the clusters, and how many of their members run.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "list")]
pub struct List {
    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl List {
    pub fn run(self) -> Result<()> {
        let home = Home::from_env()?;
        let all = cluster::load_all(&home)?;
        for (name, error) in &all.damaged {
            eprintln!("puter: '{}' is left out: {error:#}", name.escape_default());
            eprintln!(
                "hint: mend it, or remove it with its VMs: puter cluster delete --force {}",
                name.escape_default()
            );
        }
        let mut shown = Vec::new();
        let mut rows = vec![["NAME", "MEMBERS", "RUNNING", "ROLES", "AGE"].map(String::from)];
        for cluster in all.clusters {
            let members = cluster.members();
            let found: Vec<_> =
                members.iter().filter_map(|member| cluster::machine(&home, member).ok().flatten()).collect();
            let running = found.iter().filter(|vm| vm.state() == State::Running).count();
            let roles: Vec<_> =
                cluster.roles.iter().map(|role| json!({ "name": role.name, "count": role.count })).collect();
            shown.push(json!({
                "name": cluster.name, "members": members.len(), "made": found.len(), "running": running,
                "roles": roles, "created": cluster.created,
            }));
            let roles: Vec<String> = cluster.roles.iter().map(|role| format!("{}={}", role.name, role.count)).collect();
            let age = show_seconds(unix_now().saturating_sub(cluster.created));
            rows.push([cluster.name, members.len().to_string(), running.to_string(), roles.join(" "), age]);
        }
        match (self.json, shown.is_empty()) {
            (true, _) => return output::print_json(&shown),
            (false, true) => output::print("no clusters yet; `puter cluster create NAME --count N` makes one"),
            (false, false) => output::print(&output::table(&rows)),
        }
        Ok(())
    }
}
