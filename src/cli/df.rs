//! `puter df`.

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};

use super::output;
use crate::vm::home::Home;
use crate::vm::settings::{Settings, show_size};
use crate::vm::usage::usage;

/// Show who owns which bytes: images, VMs, snapshots.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "df")]
pub struct Df {
    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl Df {
    pub fn run(self) -> Result<()> {
        let home = Home::from_env()?;
        home.prepare()?;
        let usage = usage(&home, &Settings::load()?)?;
        if self.json {
            return output::print_json(&usage);
        }
        let mut rows = vec![["KIND", "NAME", "USED", "OF", "USED BY"].map(String::from)];
        for image in &usage.images {
            let users = if image.used_by.is_empty() { "-".to_string() } else { image.used_by.join(" ") };
            // A tag that has moved on leaves an image without a name.
            let name = image.reference.clone().unwrap_or_else(|| image.digest.chars().take(19).collect());
            rows.push(["image".into(), name, show_size(image.used), "-".into(), users]);
        }
        let mut row = |kind: &str, name: &str, used: u64, of: String| {
            rows.push([kind.into(), name.into(), show_size(used), of, "-".into()]);
        };
        row("layers", "-", usage.layers, "-".into());
        for vm in &usage.vms {
            row("vm", &vm.name, vm.overlay + vm.logs, show_size(vm.disk));
        }
        for snapshot in &usage.snapshots {
            let memory =
                if snapshot.memory > 0 { format!("{} memory", show_size(snapshot.memory)) } else { "-".into() };
            let users = if snapshot.used_by.is_empty() { "-".into() } else { snapshot.used_by.join(" ") };
            rows.push(["snapshot".into(), snapshot.name.clone(), show_size(snapshot.used), memory, users]);
        }
        let mut row = |kind: &str, name: &str, used: u64, of: String| {
            rows.push([kind.into(), name.into(), show_size(used), of, "-".into()]);
        };
        row("other", "-", usage.other, "-".into());
        output::print(&output::table(&rows));
        let (total, free) = (show_size(usage.total), show_size(usage.free));
        output::print(&format!(
            "\n{total} in all, {free} free; `puter image prune` would give back {}",
            show_size(usage.unused)
        ));
        Ok(())
    }
}
