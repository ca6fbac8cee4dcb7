//! `puter exec`.

use std::io::IsTerminal;

use anyhow::{Result, anyhow};
use argh::{ArgsInfo, FromArgs};

use super::terminal::Raw;
use super::{Quiet, misused};
use crate::protocol::agent::Exec as Wanted;
use crate::vm::exec;
use crate::vm::home::Home;
use crate::vm::state::running;

/// Run a command in a VM, over vsock: it needs neither network nor keys. The exit code is the command's.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "exec")]
pub struct Exec {
    /// name of the VM
    #[argh(positional)]
    name: String,
    /// user to run as (default: root)
    #[argh(option, default = "String::new()")]
    user: String,
    /// directory to run in (default: the user's home)
    #[argh(option, default = "String::new()")]
    directory: String,
    /// a variable for the command, as NAME=VALUE
    #[argh(option, from_str_fn(variable))]
    env: Vec<(String, String)>,
    /// give it a terminal (default: where input and output are one)
    #[argh(switch)]
    tty: bool,
    /// give it no terminal
    #[argh(switch)]
    no_tty: bool,
    /// command to run
    #[argh(positional, greedy)]
    command: Vec<String>,
}

pub fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.into(), value.into())),
        _ => Err(format!("'{text}' is not NAME=VALUE")),
    }
}

/// A guest's command without the mark between puter's words and its own, which argh leaves.
pub fn unmarked(mut command: Vec<String>) -> Vec<String> {
    if command.first().is_some_and(|first| first == "--") {
        command.remove(0);
    }
    command
}

impl Exec {
    pub fn run(self) -> Result<()> {
        let command = unmarked(self.command);
        if command.is_empty() {
            return Err(misused("no command is named", &format!("puter exec {} -- COMMAND", self.name)));
        }
        let home = Home::from_env()?;
        running(&home, &self.name)?;
        let on_terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
        let raw = if (self.tty || on_terminal) && !self.no_tty { Some(Raw::enter()) } else { None };
        let mut environment = self.env;
        if let (Some(_), Ok(term)) = (&raw, std::env::var("TERM")) {
            environment.insert(0, ("TERM".into(), term));
        }
        let wanted = Wanted {
            command,
            environment,
            directory: self.directory,
            user: self.user,
            terminal: raw.as_ref().map(|_| Raw::size()),
        };
        let program = exec::start(&home, &self.name, wanted)?;
        let keyboard = program.keyboard();
        if raw.is_some() {
            super::terminal::follow_size(keyboard.clone());
        }
        // Reading blocks for ever; the thread ends with the process.
        std::thread::spawn(move || keyboard.type_all(&mut std::io::stdin()));
        let code = program.attend(&mut std::io::stdout(), &mut std::io::stderr());
        drop(raw);
        match code? {
            0 => Ok(()),
            code => Err(anyhow!(Quiet(u8::try_from(code).unwrap_or(1)))),
        }
    }
}
