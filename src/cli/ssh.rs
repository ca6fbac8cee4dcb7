//! `puter ssh`.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};
use argh::{ArgsInfo, FromArgs};

use crate::vm::home::Home;
use crate::vm::state::running;
use crate::vm::{Hint, key};

/// Log in to a VM, or run a command in it.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "ssh")]
pub struct Ssh {
    /// name of the VM
    #[argh(positional)]
    pub name: String,
    /// user to log in as (default: root)
    #[argh(option, default = "String::from(\"root\")")]
    pub user: String,
    /// command to run in place of a shell
    #[argh(positional, greedy)]
    pub command: Vec<String>,
}

impl Ssh {
    pub fn run(self) -> Result<()> {
        let home = Home::from_env()?;
        let vm = running(&home, &self.name)?;
        let mut ssh = Command::new("ssh");
        // No file of the user's: an alias or a proxy meant for other hosts would hit the VM's address.
        ssh.args(["-F", "none", "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=yes"]);
        ssh.args(["-o", "ConnectTimeout=30", "-o", "ConnectionAttempts=10", "-o", "LogLevel=ERROR"]);
        ssh.arg("-o").arg(format!("UserKnownHostsFile=\"{}\"", home.known_hosts(&vm.name).display()));
        ssh.args(["-o", "GlobalKnownHostsFile=none", "-o", "UpdateHostKeys=no"]);
        ssh.arg("-o").arg(format!("HostKeyAlias={}", vm.name));
        ssh.arg("-i").arg(key::private(&home)).arg("-l").arg(&self.user).arg(vm.ip.to_string());
        // ssh would take a command that begins with '-' as its own option.
        ssh.arg("--").args(&self.command);
        Err(ssh.exec()).context("cannot run ssh").hint("install OpenSSH's client (Debian: openssh-client)")
    }
}
