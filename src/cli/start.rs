//! `puter start`.

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};

use super::{each, misused, output, size, with_context, yes_or_no};
use crate::vm::lifecycle::{self, StartOptions};
use crate::vm::machine::{Action, Command};
use crate::vm::port::Forward;
use crate::vm::state::{Mount, Restart, Vm, load_all};

/// Start VMs; one that does not exist is made first.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "start")]
pub struct Start {
    /// names of the VMs
    #[argh(positional, arg_name = "name")]
    names: Vec<String>,
    /// image for a new VM, or sha256:… of one that is here (default: the setting, else the one that init chose)
    #[argh(option)]
    image: Option<String>,
    /// number of processors
    #[argh(option)]
    cpus: Option<u32>,
    /// memory, such as 512M or 2G
    #[argh(option, from_str_fn(size))]
    memory: Option<u64>,
    /// size of the disk, such as 20G; that of an existing VM grows
    #[argh(option, from_str_fn(size))]
    disk: Option<u64>,
    /// share a directory with the guest, as HOST:GUEST or HOST:GUEST:ro; can be given several times
    #[argh(option)]
    mount: Vec<Mount>,
    /// lead a port of the host to one of the guest's, as [ADDRESS:]HOSTPORT:GUESTPORT[/tcp|/udp]; without HOSTPORT any
    /// free one, without ADDRESS 127.0.0.1; can be given several times
    #[argh(option, arg_name = "spec")]
    publish: Vec<Forward>,
    /// what happens when the VM ends by itself: no, on-failure or always
    #[argh(option, arg_name = "policy")]
    restart: Option<Restart>,
    /// whether the VM starts with the user's services: yes or no
    #[argh(option, from_str_fn(yes_or_no), arg_name = "answer")]
    autostart: Option<bool>,
    /// whether the VM and all others are kept from each other: yes or no
    #[argh(option, from_str_fn(yes_or_no), arg_name = "answer")]
    isolate: Option<bool>,
    /// start the VMs that are to start by themselves, and no other
    #[argh(switch)]
    boot: bool,
    /// return once the VM boots; a process in the background ends the rest
    #[argh(switch)]
    no_wait: bool,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl Start {
    pub fn run(self) -> Result<()> {
        if self.boot && !self.names.is_empty() {
            return Err(misused("--boot chooses the VMs itself", "leave out the names, or --boot"));
        }
        let options = StartOptions {
            image: self.image,
            cpus: self.cpus,
            memory: self.memory,
            disk: self.disk,
            no_wait: self.no_wait,
            mounts: Some(self.mount).filter(|mounts| !mounts.is_empty()),
            ports: Some(self.publish).filter(|ports| !ports.is_empty()),
            restart: self.restart,
            autostart: self.autostart,
            isolate: self.isolate,
            member: None,
            retry: None,
        };
        with_context(|context| {
            let mut names = self.names;
            if self.boot {
                let all = load_all(context.home)?.vms;
                let due = |vm: &Vm| vm.autostart && vm.state().decide(Command::Start) == Action::Boot;
                names = all.into_iter().filter(due).map(|vm| vm.name).collect();
                if names.is_empty() {
                    return Ok(());
                }
            }
            super::port::check_for(&names, options.ports.as_deref())?;
            let started = each(&names, |name| {
                let started = lifecycle::start(context, name, &options)?;
                if !self.json {
                    let verb = if options.no_wait { "boots" } else { "runs" };
                    let seconds = started.took.as_secs_f64();
                    output::print(&format!("{name} {verb} at {} ({seconds:.1} s)", started.vm.ip));
                    super::port::tell(&started.vm);
                }
                Ok(started)
            })?;
            if self.json {
                let all: Vec<_> = started.iter().map(|s| super::info::Shown::new(context.home, &s.vm)).collect();
                output::print_json(&all)?;
            }
            Ok(())
        })
    }
}
