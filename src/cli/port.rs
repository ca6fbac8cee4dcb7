//! `puter port`.

use anyhow::{Result, anyhow};
use argh::{ArgsInfo, FromArgs};
use serde_json::json;

use super::progress::Progress;
use super::{misused, output, with_context};
use crate::vm::Hint;
use crate::vm::home::Home;
use crate::vm::lifecycle::{self, Change, Context, Line};
use crate::vm::port::{self, Forward};
use crate::vm::settings::Settings;
use crate::vm::state::Vm;

/// Publish ports of VMs on the host, list them and take them back. It takes effect at once; a VM that is stopped has
/// them from its next start on.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "port")]
pub struct Port {
    #[argh(subcommand)]
    command: Command,
}

#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand)]
enum Command {
    Add(Add),
    List(List),
    Remove(Remove),
}

/// Publish more ports of a VM.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "add")]
struct Add {
    /// name of the VM
    #[argh(positional)]
    name: String,
    /// ports as [ADDRESS:]HOSTPORT:GUESTPORT[/tcp|/udp]; without HOSTPORT any free one, without ADDRESS 127.0.0.1
    #[argh(positional, arg_name = "spec")]
    specs: Vec<Forward>,
}

/// List published ports, and whether each listens. Where a VM's monitor was killed another one takes over first.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "list")]
struct List {
    /// of this VM alone
    #[argh(positional)]
    name: Option<String>,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

/// Publish ports of a VM no longer; connections to them end.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "remove")]
struct Remove {
    /// name of the VM
    #[argh(positional)]
    name: String,
    /// ports as they were added, or as the list shows them
    #[argh(positional, arg_name = "spec")]
    specs: Vec<Forward>,
}

impl Port {
    pub fn run(self) -> Result<()> {
        match self.command {
            Command::Add(Add { name, specs }) => change(&name, "add", specs, Change::Add),
            Command::Remove(Remove { name, specs }) => change(&name, "remove", specs, Change::Remove),
            Command::List(list) => list.run(),
        }
    }
}

fn change(name: &str, verb: &str, specs: Vec<Forward>, make: impl Fn(Vec<Forward>) -> Change) -> Result<()> {
    if specs.is_empty() {
        return Err(misused(
            "no port is named",
            &format!("puter port {verb} {name} [ADDRESS:]HOSTPORT:GUESTPORT[/tcp|/udp]"),
        ));
    }
    with_context(|context| {
        let vm = lifecycle::publish(context, name, &make(specs.clone()))?;
        if vm.ports.is_empty() {
            output::print(&format!("{name} publishes no port"));
        }
        tell(&vm);
        Ok(())
    })
}

/// Checks what one command publishes for several VMs.
pub fn check_for(names: &[String], ports: Option<&[Forward]>) -> Result<()> {
    match port::check_for(names, ports.unwrap_or_default()) {
        Ok(()) => Ok(()),
        Err((why, hint)) => Err(anyhow!(why)).hint(hint),
    }
}

/// Prints the ports that a VM publishes, a line each.
pub fn tell(vm: &Vm) {
    for forward in &vm.ports {
        output::print(&format!("{} publishes {} at {}", vm.name, forward.target(), place(forward)));
    }
}

/// Where the host listens, in words.
fn place(forward: &Forward) -> String {
    match forward.host_port {
        0 => format!("a free port of {}", forward.address),
        _ => forward.endpoint().to_string(),
    }
}

impl List {
    fn run(self) -> Result<()> {
        // To look is not to make: no home is prepared.
        let (home, settings, progress) = (Home::from_env()?, Settings::load()?, Progress::new());
        let context = Context { home: &home, settings: &settings, observer: &progress };
        let lines = lifecycle::ports(&context, self.name.as_deref())?;
        progress.finish();
        if self.json {
            return output::print_json(&lines.iter().map(shown).collect::<Vec<_>>());
        }
        if lines.is_empty() {
            output::print("no published ports; `puter port add NAME HOSTPORT:GUESTPORT` publishes one");
            return Ok(());
        }
        let mut rows = vec![["NAME", "HOST", "GUEST", "STATE", "OPEN"].map(String::from)];
        for line in &lines {
            rows.push([
                line.vm.clone(),
                place(&line.forward),
                line.forward.target(),
                state(line),
                if line.listening { line.open.to_string() } else { "-".into() },
            ]);
        }
        output::print(&output::table(&rows));
        Ok(())
    }
}

fn state(line: &Line) -> String {
    match (line.listening, line.active) {
        (true, _) => "listens".into(),
        (false, false) => "stopped".into(),
        (false, true) => format!("does not listen: {}", line.why.as_deref().unwrap_or("its monitor does not have it")),
    }
}

fn shown(line: &Line) -> serde_json::Value {
    json!({
        "vm": line.vm,
        "spec": line.forward.to_string(),
        "address": line.forward.address,
        "host_port": line.forward.host_port,
        "guest_port": line.forward.guest_port,
        "protocol": line.forward.protocol,
        "any": line.forward.any,
        "listening": line.listening,
        "why": line.why,
        "open": line.open,
    })
}
