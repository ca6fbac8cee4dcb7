//! `puter version`.

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};

use super::output;
use crate::hypervisor;
use crate::vm::settings::Settings;

/// Show the versions of puter and of the hypervisor it would use.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "version")]
pub struct Version {
    /// print JSON
    #[argh(switch)]
    pub json: bool,
}

impl Version {
    pub fn run(self) -> Result<()> {
        let kind = Settings::load().and_then(|settings| hypervisor::detect(&settings.hypervisor));
        let hypervisor = kind.map(|kind| kind.to_string()).unwrap_or_else(|error| format!("none: {error:#}"));
        if self.json {
            return output::print_json(&serde_json::json!({ "puter": crate::VERSION, "hypervisor": hypervisor }));
        }
        output::print(&format!("puter {}\nhypervisor: {hypervisor}", crate::VERSION));
        Ok(())
    }
}
