//! `puter cluster ssh`.

use anyhow::{Result, anyhow};
use argh::{ArgsInfo, FromArgs};

use super::super::ssh;
use crate::vm::Hint;
use crate::vm::cluster::{self, Target};
use crate::vm::home::Home;

/// Log in to a member, or run a command in it.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "ssh")]
pub struct Ssh {
    /// the member, as NAME:MEMBER; NAME alone where there is only one
    #[argh(positional, arg_name = "part", from_str_fn(super::target))]
    target: Target,
    /// user to log in as (default: root)
    #[argh(option, default = "String::from(\"root\")")]
    user: String,
    /// command to run in place of a shell
    #[argh(positional, greedy)]
    command: Vec<String>,
}

impl Ssh {
    pub fn run(self) -> Result<()> {
        let home = Home::from_env()?;
        let cluster = cluster::existing(&home, &self.target.cluster)?;
        let members = self.target.select(&cluster)?;
        let [member] = members.as_slice() else {
            let names: Vec<&str> = members.iter().take(5).map(|member| member.member.as_str()).collect();
            let first = names.first().unwrap_or(&"MEMBER");
            return Err(anyhow!("'{}' is {} members: {}", self.target, members.len(), names.join(", ")))
                .hint(format!("name one: puter cluster ssh {}:{first}", cluster.name));
        };
        ssh::Ssh { name: member.vm.clone(), user: self.user, command: self.command }.run()
    }
}
