//! `puter snapshots`.

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};

use super::output::{self, show_seconds};
use super::snapshot::shown;
use crate::vm::home::Home;
use crate::vm::lifecycle::unix_now;
use crate::vm::settings::show_size;
use crate::vm::snapshots::{self, Leaf, Snapshot};
use crate::vm::state::load_all;

/// List snapshots: their size, their age and who needs them.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "snapshots")]
pub struct Snapshots {
    /// of this VM alone
    #[argh(positional)]
    name: Option<String>,
    /// show which machine and which snapshot came from which
    #[argh(switch)]
    tree: bool,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl Snapshots {
    pub fn run(self) -> Result<()> {
        let home = Home::from_env()?;
        if let Some(name) = &self.name {
            crate::protocol::address::check_vm_name(name).map_err(anyhow::Error::msg)?;
        }
        let of = self.name.as_deref().filter(|_| !self.tree);
        let all = snapshots::all(&home, of)?;
        for (origin, error) in &all.damaged {
            eprintln!("puter: the snapshot {origin} is left out: {error:#}");
        }
        let users = snapshots::users(&home)?;
        let of = |snapshot: &Snapshot| users.get(&snapshot.origin).cloned().unwrap_or_default();
        if self.json {
            let shown: Vec<_> = all.snapshots.iter().map(|s| shown(&home, s, &of(s))).collect();
            return output::print_json(&shown);
        }
        if self.tree {
            return self.draw(&home, &all.snapshots);
        }
        if all.snapshots.is_empty() {
            output::print("no snapshots yet; `puter snapshot NAME` takes one");
            return Ok(());
        }
        let mut rows = vec![["SNAPSHOT", "NAME", "AGE", "SIZE", "HOLDS", "USED BY"].map(String::from)];
        for snapshot in &all.snapshots {
            let users: Vec<String> = of(snapshot).iter().map(snapshots::User::name).collect();
            rows.push([
                snapshot.origin.to_string(),
                snapshot.name.clone().unwrap_or_else(|| if snapshot.automatic { "(clone)".into() } else { "-".into() }),
                show_seconds(unix_now().saturating_sub(snapshot.created)),
                show_size(snapshot.used(&home).1),
                if snapshot.memory.is_some() { "memory, disk".into() } else { "disk".into() },
                if users.is_empty() { "-".into() } else { users.join(" ") },
            ]);
        }
        output::print(&output::table(&rows));
        Ok(())
    }

    fn draw(&self, home: &Home, all: &[Snapshot]) -> Result<()> {
        let machines = load_all(home)?.vms;
        for (branch, leaf) in snapshots::lines(all, &machines) {
            let text = match leaf {
                Leaf::Machine(vm) => format!("{} ({})", vm.name, vm.state()),
                Leaf::Snapshot(snapshot) => {
                    let name = snapshot.name.as_ref().map_or(String::new(), |name| format!(" '{name}'"));
                    let age = show_seconds(unix_now().saturating_sub(snapshot.created));
                    format!("{}{name}, {}, {age} ago", snapshot.origin, show_size(snapshot.used(home).1))
                }
            };
            output::print(&format!("{branch}{text}"));
        }
        Ok(())
    }
}
