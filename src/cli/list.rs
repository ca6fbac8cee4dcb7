//! `puter list`.

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};

use super::info::Shown;
use super::output::{self, show_seconds};
use crate::vm::home::Home;
use crate::vm::settings::show_size;
use crate::vm::state::load_all;

/// List the VMs. Nothing is asked of them: a dead one costs no time.
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
        let all = load_all(&home)?;
        let shown: Vec<Shown> = all.vms.iter().map(|vm| Shown::new(&home, vm)).collect();
        for (name, error) in &all.damaged {
            eprintln!("puter: '{}' is left out: {error:#}", name.escape_default());
            eprintln!("hint: mend it, or remove the VM: puter delete --force {}", name.escape_default());
        }
        if self.json {
            return output::print_json(&shown);
        }
        if shown.is_empty() {
            output::print("no VMs yet; `puter start NAME` makes one");
            return Ok(());
        }
        let mut rows = vec![["NAME", "STATUS", "IP", "CPUS", "MEMORY", "DISK", "UP", "IMAGE"].map(String::from)];
        for vm in shown {
            rows.push([
                vm.name.to_string(),
                vm.status.to_string(),
                vm.ip.to_string(),
                vm.cpus.to_string(),
                show_size(vm.memory),
                show_size(vm.disk),
                vm.uptime.map_or("-".to_string(), show_seconds),
                vm.image.reference.clone(),
            ]);
        }
        output::print(&output::table(&rows));
        Ok(())
    }
}
