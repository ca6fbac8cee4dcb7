//! `puter daemon`.

use anyhow::{Result, anyhow};
use argh::{ArgsInfo, FromArgs};

use super::{Quiet, output, with_context};
use crate::vm::daemon::{self, Client};
use crate::vm::home::Home;

/// Start, stop and ask puterd, which makes the VMs' network.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "daemon")]
pub struct Daemon {
    #[argh(subcommand)]
    command: Command,
}

#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand)]
enum Command {
    Start(Start),
    Stop(Stop),
    Status(Status),
}

/// Start puterd in the background; nothing happens where it runs already.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "start")]
struct Start {}

/// Stop puterd. VMs go on running with their network.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "stop")]
struct Stop {}

/// Tell whether puterd runs; exit code 1 where it does not.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "status")]
struct Status {
    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl Daemon {
    pub fn run(self) -> Result<()> {
        match self.command {
            Command::Start(_) => start(),
            Command::Stop(_) => stop(),
            Command::Status(command) => status(command.json),
        }
    }
}

fn start() -> Result<()> {
    with_context(|context| {
        match daemon::start(context.home, context.settings.subnet)? {
            None => output::print("puterd runs already"),
            Some(status) => output::print(&format!(
                "puterd runs (process {}): bridge {} at {}",
                status.pid, status.bridge, status.subnet
            )),
        }
        Ok(())
    })
}

fn stop() -> Result<()> {
    match daemon::stop(&Home::from_env()?)? {
        true => output::print("puterd stopped"),
        false => output::print("puterd was not running"),
    }
    Ok(())
}

fn status(json: bool) -> Result<()> {
    let home = Home::from_env()?;
    match Client::new(&home).status() {
        Ok(status) if json => output::print_json(&status),
        Ok(status) => {
            let rows = [
                ["puterd:", &format!("version {}, process {}", status.version, status.pid)],
                ["up:", &output::show_seconds(status.uptime)],
                ["bridge:", &format!("{} at {}", status.bridge, status.subnet)],
                ["taps:", &status.taps.to_string()],
            ];
            output::print(&output::table(&rows.map(|row| row.map(String::from))));
            Ok(())
        }
        Err(error) if json => {
            output::print_json(&serde_json::json!({ "running": false, "why": format!("{error:#}") }))?;
            Err(anyhow!(Quiet(1)))
        }
        Err(error) => Err(error),
    }
}
