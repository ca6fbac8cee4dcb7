//! `puter doctor`.

use anyhow::{Result, anyhow};
use argh::FromArgs;
use serde::Serialize;

use super::{Quiet, output};
use crate::vm::doctor::{self, State};
use crate::vm::home::Home;
use crate::vm::settings::Settings;

/// Check what puter needs of this host, and tell the command that mends each lack.
#[derive(FromArgs)]
#[argh(subcommand, name = "doctor")]
pub struct Doctor {
    /// print JSON
    #[argh(switch)]
    json: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    ready: bool,
    checks: &'a [doctor::Check],
}

impl Doctor {
    pub fn run(self) -> Result<()> {
        let checks = doctor::examine(&Home::from_env()?, &Settings::load()?);
        let missing = checks.iter().filter(|check| check.state == State::Missing).count();
        if self.json {
            output::print_json(&Report { ready: missing == 0, checks: &checks })?;
        } else {
            for check in &checks {
                output::print(&format!("{:<7} {}: {}", check.state.word(), check.name, check.found));
                if let Some(mend) = &check.mend {
                    output::print(&format!("        mend: {mend}"));
                }
            }
            output::print(&match missing {
                0 => "\nThis host can run VMs.".to_string(),
                1 => "\nOne thing is missing.".to_string(),
                n => format!("\n{n} things are missing."),
            });
        }
        match missing {
            0 => Ok(()),
            _ => Err(anyhow!(Quiet(1))),
        }
    }
}
