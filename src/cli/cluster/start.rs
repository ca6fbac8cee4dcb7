//! `puter cluster start`.

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};

use super::super::{output, with_context};
use super::{as_json, began, conclude, tell_began};
use crate::vm::cluster::{self, Target};

/// Start the members that do not run, side by side, and in the order that the roles' `after` gives. What is not there is
/// made.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "start")]
pub struct Start {
    /// name of the cluster, or NAME:ROLE, or NAME:MEMBER
    #[argh(positional, arg_name = "part", from_str_fn(super::target))]
    target: Target,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl Start {
    pub fn run(self) -> Result<()> {
        with_context(|context| {
            let done = cluster::start(context, &self.target, &tell_began(self.json))?;
            if self.json {
                let all: Vec<_> = done.iter().map(|one| as_json(one, began)).collect();
                output::print_json(&all)?;
            }
            conclude(&done, format_args!("puter cluster start {}", self.target))
        })
    }
}
