//! `puter daemon`.

use std::os::unix::process::CommandExt;

use anyhow::{Context, Result, anyhow};
use argh::{ArgsInfo, FromArgs};

use super::{Quiet, output, with_context};
use crate::protocol::ports::show_list;
use crate::vm::Hint;
use crate::vm::daemon::{self, Client};
use crate::vm::home::Home;
use crate::vm::service::{self, Service};
use crate::vm::settings::Settings;

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
    Logs(Logs),
    Enable(Enable),
    Disable(Disable),
}

/// Start puterd, as a service of your systemd where there is one; nothing happens where it runs already.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "start")]
struct Start {
    /// start it without systemd
    #[argh(switch)]
    no_service: bool,
}

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

/// Show what puterd wrote.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "logs")]
struct Logs {
    /// go on showing
    #[argh(switch, short = 'f')]
    follow: bool,
}

/// Start puterd, and VMs with --autostart, when this machine starts.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "enable")]
struct Enable {}

/// Start nothing any more when this machine starts.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "disable")]
struct Disable {}

impl Daemon {
    pub fn run(self) -> Result<()> {
        match self.command {
            Command::Start(command) => start(command.no_service),
            Command::Stop(_) => stop(),
            Command::Status(command) => status(command.json),
            Command::Logs(command) => logs(command.follow),
            Command::Enable(_) => enable(),
            Command::Disable(_) => disable(),
        }
    }
}

/// What puterd is told of the settings.
fn network(settings: &Settings) -> daemon::Network<'_> {
    daemon::Network { subnet: settings.subnet, ipv6: settings.ipv6, host_ports: &settings.host_ports }
}

fn start(no_service: bool) -> Result<()> {
    with_context(|context| {
        match daemon::start(context.home, &network(context.settings), context.settings.service && !no_service)? {
            None => output::print("puterd runs already"),
            Some(status) => output::print(&format!(
                "puterd runs (process {}): bridge {} at {}",
                status.pid, status.bridge, status.subnet
            )),
        }
        Ok(())
    })
}

fn logs(follow: bool) -> Result<()> {
    let home = Home::from_env()?;
    if let Some(unit) = system_unit(&home) {
        let mut command = std::process::Command::new("journalctl");
        command.args(["--lines", "1000", "--output", "cat", "--unit", &unit]).args(follow.then_some("--follow"));
        return Err(command.exec()).context("cannot run journalctl");
    }
    let log = home.daemon_log();
    std::fs::metadata(&log)
        .with_context(|| format!("cannot read {}", log.display()))
        .hint("puterd has logs once it was started: puter daemon start")?;
    let mut command = std::process::Command::new("tail");
    command.args(["-n", "1000"]).args(follow.then_some("-F")).arg(log);
    Err(command.exec()).context("cannot run tail")
}

/// The service, or why there is none.
fn service(home: &Home) -> Result<Service> {
    Service::of(home).context("no systemd of yours answers, and without it nothing starts by itself").hint(
        "log in with a session of your own (not by su), or let another supervisor run `puter daemon start` and \
         `puter start --boot`",
    )
}

fn enable() -> Result<()> {
    with_context(|context| {
        let service = service(context.home)?;
        let puterd = daemon::program()?;
        let puter = puterd.with_file_name("puter");
        match system_unit(context.home) {
            Some(unit) => {
                service.enable_vms(context.home, &puter)?;
                output::print(&format!(
                    "the VMs with `puter set NAME --autostart yes` start with your services, on the puterd of {unit}"
                ));
            }
            None => {
                service.enable(context.home, &network(context.settings), &puterd, &puter)?;
                output::print(
                    "puterd starts with your services, and after it the VMs with `puter set NAME --autostart yes`",
                );
            }
        }
        if service::lingers() == Some(false) {
            eprintln!(
                "hint: your services wait for your login; to start them with the machine: loginctl enable-linger"
            );
        }
        Ok(())
    })
}

fn disable() -> Result<()> {
    service(&Home::from_env()?)?.disable()?;
    output::print("nothing of puter starts by itself any more");
    Ok(())
}

fn stop() -> Result<()> {
    let home = Home::from_env()?;
    let unit = system_unit(&home);
    match daemon::stop(&home)? {
        true => output::print("puterd stopped"),
        false => output::print("puterd was not running"),
    }
    if let Some(unit) = unit {
        let socket = service::socket_of(&unit);
        eprintln!(
            "hint: {socket} starts it again at the next command; for good: sudo systemctl disable --now {socket}"
        );
    }
    Ok(())
}

/// The unit of puterd where it is one of the system's systemd.
fn system_unit(home: &Home) -> Option<String> {
    service::system_unit(Client::new(home).status().ok()?.pid)
}

/// Who sees to puterd.
#[derive(serde::Serialize)]
struct Shown {
    #[serde(flatten)]
    status: crate::protocol::daemon::Status,
    /// systemd's unit, where it is one.
    unit: Option<String>,
    /// Whether it starts with the user's services, or with the machine.
    enabled: bool,
}

fn status(json: bool) -> Result<()> {
    let home = Home::from_env()?;
    match Client::new(&home).status() {
        Ok(status) => {
            let of_system = service::system_unit(status.pid);
            let service = Service::of(&home).filter(|_| of_system.is_none());
            let enabled = match &of_system {
                Some(unit) => service::is_enabled_for_all(&service::socket_of(unit)),
                None => service.as_ref().is_some_and(Service::is_enabled),
            };
            let unit = of_system.or_else(|| service.filter(Service::is_active).map(|service| service.unit()));
            if json {
                return output::print_json(&Shown { status, unit, enabled });
            }
            let by = unit.as_deref().map_or("puter".to_string(), |unit| format!("systemd ({unit})"));
            let open = show_list(&status.host_ports);
            let six = status.ipv6.map_or("-".to_string(), |network| {
                format!("{network}, {}", if status.ipv6_outside { "also to the outside" } else { "not to the outside" })
            });
            let further: String = status.further.iter().map(|bridge| format!(", {}", bridge.name)).collect();
            let rows = [
                ["puterd:", &format!("version {}, process {}", status.version, status.pid)],
                ["up:", &output::show_seconds(status.uptime)],
                ["bridge:", &format!("{} at {}{further}", status.bridge, status.subnet)],
                ["ipv6:", &six],
                ["taps:", &status.taps.to_string()],
                ["host ports:", if open.is_empty() { "-" } else { &open }],
                ["run by:", &by],
                ["at boot:", if enabled { "yes" } else { "no" }],
            ];
            output::print(&output::table(&rows.map(|row| row.map(String::from))));
            for problem in &status.problems {
                eprintln!("puter: {problem}");
            }
            Ok(())
        }
        Err(error) if json => {
            output::print_json(&serde_json::json!({ "running": false, "why": format!("{error:#}") }))?;
            Err(anyhow!(Quiet(1)))
        }
        Err(error) => Err(error),
    }
}
