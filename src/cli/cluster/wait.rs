//! `puter cluster wait`.

use std::time::Duration;

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};
use serde_json::json;

use super::super::output;
use super::{as_json, conclude};
use crate::vm::cluster::{self, Sign, Target};
use crate::vm::home::Home;

/// Wait until members are of use: until their agents or ssh servers answer, or something takes connections.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "wait")]
pub struct Wait {
    /// name of the cluster, or NAME:ROLE, or NAME:MEMBER
    #[argh(positional, arg_name = "part", from_str_fn(super::target))]
    target: Target,
    /// what for: agent, ssh, or port:N for a TCP port (default: agent)
    #[argh(option, long = "for", default = "Sign::Agent", arg_name = "sign")]
    sign: Sign,
    /// seconds to wait at most (default: 120)
    #[argh(option, default = "120")]
    timeout: u64,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl Wait {
    pub fn run(self) -> Result<()> {
        let home = Home::from_env()?;
        let done = cluster::wait(&home, &self.target, self.sign, Duration::from_secs(self.timeout))?;
        if self.json {
            let shown = |took: &Duration| json!({ "seconds": took.as_secs_f64() });
            let all: Vec<_> = done.iter().map(|one| as_json(one, shown)).collect();
            output::print_json(&all)?;
        } else {
            for one in &done {
                if let Ok(took) = &one.result {
                    output::print(&format!("{}: ready ({:.1} s)", one.member.member, took.as_secs_f64()));
                }
            }
        }
        conclude(&done, format_args!("puter cluster wait {} --for {}", self.target, self.sign))
    }
}
