//! `puter cluster stop`.

use std::time::Duration;

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};
use serde_json::json;

use super::super::{output, with_context};
use super::{as_json, conclude};
use crate::vm::cluster::{self, Member, Target};
use crate::vm::lifecycle::Stopped;

/// Stop the members that run, side by side, and in the order opposite to that of their start.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "stop")]
pub struct Stop {
    /// name of the cluster, or NAME:ROLE, or NAME:MEMBER
    #[argh(positional, arg_name = "part", from_str_fn(super::target))]
    target: Target,
    /// seconds to wait before force (default: the setting stop_timeout, 30)
    #[argh(option)]
    timeout: Option<u64>,
    /// end the members at once, as if by pulling their plugs
    #[argh(switch)]
    force: bool,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

fn how(stopped: &Option<Stopped>) -> &'static str {
    match stopped {
        None => "is not there",
        Some(stopped) if stopped.was_stopped => "was stopped already",
        Some(stopped) if stopped.forced => "did not power off in time and was ended by force",
        Some(_) => "stopped",
    }
}

impl Stop {
    pub fn run(self) -> Result<()> {
        with_context(|context| {
            let timeout = self.timeout.map_or(context.settings.stop_timeout, Duration::from_secs);
            let tell = |member: &Member, result: &Result<Option<Stopped>>| {
                if let (false, Ok(stopped)) = (self.json, result) {
                    output::print(&format!("{}: {}", member.member, how(stopped)));
                }
            };
            let done = cluster::stop(context, &self.target, timeout, self.force, &tell)?;
            if self.json {
                let shown = |stopped: &Option<Stopped>| match stopped {
                    Some(one) => {
                        json!({ "forced": one.forced, "was_stopped": one.was_stopped, "seconds": one.took.as_secs_f64() })
                    }
                    None => json!({ "forced": false, "was_stopped": true, "seconds": 0.0 }),
                };
                let all: Vec<_> = done.iter().map(|one| as_json(one, shown)).collect();
                output::print_json(&all)?;
            }
            conclude(&done, format_args!("puter cluster stop {}", self.target))
        })
    }
}
