//! `puter set`.

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};

use super::{each, misused, output, size, with_context, yes_or_no};
use crate::vm::lifecycle::{self, StartOptions};
use crate::vm::port::Forward;
use crate::vm::settings::show_size;
use crate::vm::state::{Mount, Restart};

/// Change VMs: their resources while they are stopped, the rest at any time.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "set")]
pub struct Set {
    /// names of the VMs
    #[argh(positional, arg_name = "name")]
    names: Vec<String>,
    /// number of processors
    #[argh(option)]
    cpus: Option<u32>,
    /// memory, such as 512M or 2G
    #[argh(option, from_str_fn(size))]
    memory: Option<u64>,
    /// size of the disk, such as 20G; it can only grow
    #[argh(option, from_str_fn(size))]
    disk: Option<u64>,
    /// share a directory with the guest, as HOST:GUEST or HOST:GUEST:ro, in place of those of before; can be given
    /// several times
    #[argh(option)]
    mount: Vec<Mount>,
    /// share no directory any more
    #[argh(switch)]
    no_mount: bool,
    /// lead a port of the host to one of the guest's, as [ADDRESS:]HOSTPORT:GUESTPORT[/tcp|/udp], in place of those of
    /// before; can be given several times
    #[argh(option, arg_name = "spec")]
    publish: Vec<Forward>,
    /// publish no port any more
    #[argh(switch)]
    no_publish: bool,
    /// what happens when the VM ends by itself: no, on-failure or always
    #[argh(option, arg_name = "policy")]
    restart: Option<Restart>,
    /// whether the VM starts with the user's services: yes or no
    #[argh(option, from_str_fn(yes_or_no), arg_name = "answer")]
    autostart: Option<bool>,
    /// whether the VM and all others are kept from each other: yes or no
    #[argh(option, from_str_fn(yes_or_no), arg_name = "answer")]
    isolate: Option<bool>,
}

impl Set {
    pub fn run(self) -> Result<()> {
        if self.no_mount && !self.mount.is_empty() {
            return Err(misused("--mount and --no-mount exclude one another", "give one of them"));
        }
        if self.no_publish && !self.publish.is_empty() {
            return Err(misused("--publish and --no-publish exclude one another", "give one of them"));
        }
        let options = StartOptions {
            cpus: self.cpus,
            memory: self.memory,
            disk: self.disk,
            mounts: (self.no_mount || !self.mount.is_empty()).then_some(self.mount),
            ports: (self.no_publish || !self.publish.is_empty()).then_some(self.publish),
            restart: self.restart,
            autostart: self.autostart,
            isolate: self.isolate,
            ..StartOptions::default()
        };
        if options == StartOptions::default() {
            return Err(misused("nothing to change is named", "`puter set --help` shows what can be changed"));
        }
        super::port::check_for(&self.names, options.ports.as_deref())?;
        with_context(|context| {
            each(&self.names, |name| {
                let vm = lifecycle::change(context, name, &options)?;
                let (memory, disk) = (show_size(vm.memory), show_size(vm.disk));
                let autostart = if vm.autostart { ", autostart" } else { "" };
                let isolate = if vm.isolate { ", isolated" } else { "" };
                output::print(&format!(
                    "{name}: {} cpus, {memory} of memory, {disk} of disk, restart {}{autostart}{isolate}",
                    vm.cpus,
                    vm.restart.word()
                ));
                for mount in &vm.mounts {
                    output::print(&format!("{name}: shares {mount}"));
                }
                super::port::tell(&vm);
                Ok(())
            })?;
            Ok(())
        })
    }
}
