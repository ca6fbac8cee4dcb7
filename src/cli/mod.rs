//! `puter`: the command line. One file per command; what they do lives in [`crate::vm`].

mod clone;
mod cluster;
mod completions;
mod config;
mod console;
mod cp;
mod daemon;
mod delete;
mod df;
mod diff;
mod doctor;
mod exec;
mod image;
mod info;
mod init;
mod list;
mod logs;
mod output;
mod port;
mod progress;
mod restart;
mod restore;
mod set;
mod snapshot;
mod snapshots;
mod ssh;
mod ssh_config;
mod start;
mod stop;
mod terminal;
mod version;

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::{Result, anyhow};
use argh::{ArgsInfo, FromArgs};

use crate::USAGE;
use crate::vm::files::plain;
use crate::vm::home::Home;
use crate::vm::lifecycle::{self, Context};
use crate::vm::settings::Settings;
use crate::vm::{Hint, Hinted, cancel};

/// Real virtual machines with the ease of containers, and no root.
///
/// First steps: `puter init --image IMAGE`, `puter daemon start`, `puter start NAME`, `puter ssh NAME`.
/// `puter COMMAND --help` tells more of each command.
#[derive(ArgsInfo, FromArgs)]
struct Puter {
    #[argh(subcommand)]
    command: Command,
}

#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand)]
enum Command {
    Init(init::Init),
    Start(start::Start),
    Stop(stop::Stop),
    Restart(restart::Restart),
    Set(set::Set),
    List(list::List),
    Info(info::Info),
    Delete(delete::Delete),
    Snapshot(snapshot::Snapshot),
    Snapshots(snapshots::Snapshots),
    Restore(restore::Restore),
    Clone(clone::Clone),
    Cluster(cluster::Cluster),
    Diff(diff::Diff),
    Ssh(ssh::Ssh),
    SshConfig(ssh_config::SshConfig),
    Exec(exec::Exec),
    Cp(cp::Cp),
    Logs(logs::Logs),
    Console(console::Console),
    Port(port::Port),
    Image(image::Image),
    Daemon(daemon::Daemon),
    Df(df::Df),
    Doctor(doctor::Doctor),
    Config(config::Config),
    Completions(completions::Completions),
    Version(version::Version),
}

/// Entry point; `args` is the command line without the program's name.
pub fn main(args: Vec<OsString>) -> ExitCode {
    let mut words = Vec::with_capacity(args.len());
    for arg in args {
        match arg.into_string() {
            Ok(word) => words.push(word),
            Err(bad) => {
                eprintln!("puter: the argument '{}' is not UTF-8", bad.to_string_lossy());
                return ExitCode::from(USAGE);
            }
        }
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        // What `start --no-wait` leaves behind; not for people, so not in the help.
        ["start-finish", name] => finish(name),
        // What `snapshot` has watch over it; neither.
        ["__thaw", name] => watch_over(name),
        // argh has no command that takes either names or commands.
        ["snapshot", "delete", words @ ..] => {
            match snapshot::SnapshotDelete::from_args(&["puter", "snapshot", "delete"], words) {
                Ok(command) => {
                    cancel::listen();
                    command.run()
                }
                Err(exit) => return usage(&exit, &["snapshot"]),
            }
        }
        ["cluster", "snapshot", "delete", words @ ..] => {
            match cluster::SnapshotDelete::from_args(&["puter", "cluster", "snapshot", "delete"], words) {
                Ok(command) => {
                    cancel::listen();
                    command.run()
                }
                Err(exit) => return usage(&exit, &["cluster"]),
            }
        }
        // What the shells' scripts ask.
        ["__complete", words @ ..] => {
            completions::complete(words);
            Ok(())
        }
        [] => help(),
        ["--version" | "-V"] => version::Version { json: false }.run(),
        words => match Puter::from_args(&["puter"], words) {
            Ok(puter) => puter.command.run(),
            Err(exit) => return usage(&exit, words),
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report(&error),
    }
}

impl Command {
    fn run(self) -> Result<()> {
        match &self {
            // ssh's own process takes over; it hears the signals itself.
            Command::Ssh(_) => {}
            Command::Cluster(command) if command.is_ssh() => {}
            _ => cancel::listen(),
        }
        match self {
            Command::Init(command) => command.run(),
            Command::Start(command) => command.run(),
            Command::Stop(command) => command.run(),
            Command::Restart(command) => command.run(),
            Command::Set(command) => command.run(),
            Command::List(command) => command.run(),
            Command::Info(command) => command.run(),
            Command::Delete(command) => command.run(),
            Command::Snapshot(command) => command.run(),
            Command::Snapshots(command) => command.run(),
            Command::Restore(command) => command.run(),
            Command::Clone(command) => command.run(),
            Command::Cluster(command) => command.run(),
            Command::Diff(command) => command.run(),
            Command::Ssh(command) => command.run(),
            Command::SshConfig(command) => command.run(),
            Command::Exec(command) => command.run(),
            Command::Cp(command) => command.run(),
            Command::Logs(command) => command.run(),
            Command::Console(command) => command.run(),
            Command::Port(command) => command.run(),
            Command::Image(command) => command.run(),
            Command::Daemon(command) => command.run(),
            Command::Df(command) => command.run(),
            Command::Doctor(command) => command.run(),
            Command::Config(command) => command.run(),
            Command::Completions(command) => command.run(),
            Command::Version(command) => command.run(),
        }
    }
}

/// `puter` alone: the commands, as with --help.
fn help() -> Result<()> {
    if let Err(exit) = Puter::from_args(&["puter"], &["--help"]) {
        output::print(exit.output.trim_end());
    }
    Ok(())
}

/// argh's own text: help on stdout, a mistake on stderr with the way to the help.
fn usage(exit: &argh::EarlyExit, words: &[&str]) -> ExitCode {
    if exit.status.is_ok() {
        output::print(exit.output.trim_end());
        return ExitCode::SUCCESS;
    }
    eprintln!("puter: {}", exit.output.trim_end());
    let command = words.first().filter(|word| word.bytes().all(|b| b.is_ascii_lowercase()));
    match command.filter(|_| !exit.output.starts_with("Unrecognized argument") || words.len() > 1) {
        Some(command) => eprintln!("hint: `puter {command} --help` shows what it takes"),
        None => eprintln!("hint: `puter --help` lists the commands"),
    }
    ExitCode::from(USAGE)
}

fn report(error: &anyhow::Error) -> ExitCode {
    if let Some(Quiet(code)) = error.downcast_ref() {
        return ExitCode::from(*code);
    }
    show_error(error);
    match cancel::check() {
        Ok(()) => ExitCode::FAILURE,
        Err(_) => ExitCode::from(cancel::EXIT_CODE as u8),
    }
}

fn show_error(error: &anyhow::Error) {
    let hint = error.downcast_ref::<Hinted>().map(|hinted| hinted.hint());
    progress::aside(|| {
        // Its words may be a guest's, a registry's or those of a file.
        eprintln!("puter: {}", plain(&format!("{error:#}")));
        if let Some(hint) = hint.or_else(|| crate::vm::files::disk_hint(error)) {
            eprintln!("hint: {hint}");
        }
    });
}

/// The command failed and has said why already.
#[derive(Debug)]
struct Quiet(u8);

impl std::fmt::Display for Quiet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "exit code {}", self.0)
    }
}

impl std::error::Error for Quiet {}

/// A command line that lacks something: told with the way out, and exit code 2.
fn misused(what: &str, hint: &str) -> anyhow::Error {
    eprintln!("puter: {what}\nhint: {hint}");
    anyhow!(Quiet(USAGE))
}

/// Runs `work` with the home made and the settings read.
fn with_context<T>(work: impl FnOnce(&Context) -> Result<T>) -> Result<T> {
    let home = Home::from_env()?;
    home.prepare()?;
    let settings = Settings::load()?;
    let progress = progress::Progress::new();
    let context = Context { home: &home, settings: &settings, observer: &progress };
    let result = work(&context);
    progress.finish();
    result
}

/// Does `work` for each name, side by side. All are tried; the errors are told one by one.
fn each<T: Send>(names: &[String], work: impl Fn(&str) -> Result<T> + Sync) -> Result<Vec<T>> {
    if names.is_empty() {
        return Err(misused("no VM is named", "`puter list` shows the VMs"));
    }
    for (index, name) in names.iter().enumerate() {
        if names[..index].contains(name) {
            return Err(anyhow!("'{name}' is named twice")).hint("name each VM once");
        }
    }
    if let [name] = names {
        return work(name).map(|done| vec![done]);
    }
    let mut done = Vec::new();
    let mut failed = 0;
    for result in crate::vm::parallel::side_by_side(names, names.len(), |name| work(name)) {
        match result.unwrap_or_else(|| Err(anyhow!("the thread of a VM panicked"))) {
            Ok(value) => done.push(value),
            Err(error) => {
                show_error(&error);
                failed += 1;
            }
        }
    }
    match failed {
        0 => Ok(done),
        _ => Err(anyhow!("{failed} of {} failed", names.len())),
    }
}

fn finish(name: &str) -> Result<()> {
    let home = Home::from_env()?;
    let settings = Settings::load()?;
    let context = Context { home: &home, settings: &settings, observer: &lifecycle::Silent };
    lifecycle::finish(&context, name).map(|_| ())
}

fn watch_over(name: &str) -> Result<()> {
    let home = Home::from_env()?;
    let settings = Settings::load()?;
    let context = Context { home: &home, settings: &settings, observer: &lifecycle::Silent };
    lifecycle::watch_over(&context, name)
}

/// Reads a size option.
fn size(text: &str) -> Result<u64, String> {
    crate::vm::settings::parse_size(text)
}

/// Reads a yes-or-no option.
fn yes_or_no(text: &str) -> Result<bool, String> {
    match text {
        "yes" => Ok(true),
        "no" => Ok(false),
        _ => Err(format!("'{text}' is neither yes nor no")),
    }
}
