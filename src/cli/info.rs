//! `puter info`.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};
use serde::Serialize;

use super::{each, output};
use crate::protocol::address::Mac;
use crate::protocol::daemon::Membership;
use crate::vm::home::Home;
use crate::vm::lifecycle::unix_now;
use crate::vm::port::Forward;
use crate::vm::settings::show_size;
use crate::vm::state::{Exit, ImageId, Mount, Restart, Retry, Vm, existing};

/// Show everything about VMs.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "info")]
pub struct Info {
    /// names of the VMs
    #[argh(positional, arg_name = "name")]
    names: Vec<String>,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

/// A VM as `list --json` and `info --json` show it.
#[derive(Serialize)]
pub struct Shown<'a> {
    pub name: &'a str,
    pub id: u32,
    pub status: String,
    pub pid: Option<u32>,
    pub ip: Ipv4Addr,
    /// Where VMs have IPv6.
    pub ip6: Option<Ipv6Addr>,
    pub mac: Mac,
    pub tap: &'a str,
    pub cid: u32,
    pub cpus: u32,
    /// Bytes.
    pub memory: u64,
    /// Bytes.
    pub disk: u64,
    pub image: &'a ImageId,
    pub overlay: &'a Path,
    /// Bytes that the overlay takes on the host.
    pub overlay_used: u64,
    pub console: PathBuf,
    /// Seconds since 1970-01-01 UTC.
    pub created: u64,
    /// Seconds since the start, of a VM that runs.
    pub uptime: Option<u64>,
    pub hypervisor: Option<&'a str>,
    pub mounts: &'a [Mount],
    pub ports: &'a [Forward],
    pub restart: Restart,
    pub autostart: bool,
    /// Whether it and all other VMs are kept from each other.
    pub isolate: bool,
    /// The cluster that it is in, and its name there.
    pub member: Option<&'a Membership>,
    /// How it last ended by itself.
    pub exit: Option<&'a Exit>,
    /// Restarts in a row, and when the next is due.
    pub retry: Option<Retry>,
}

impl<'a> Shown<'a> {
    pub fn new(home: &Home, vm: &'a Vm) -> Shown<'a> {
        use std::os::unix::fs::MetadataExt;
        let state = vm.state();
        let alive = state.is_active();
        Shown {
            name: &vm.name,
            id: vm.id,
            status: state.to_string(),
            pid: vm.process.filter(|_| alive).map(|p| p.pid),
            ip: vm.ip,
            ip6: vm.ip6,
            mac: vm.mac,
            tap: &vm.tap,
            cid: vm.cid,
            cpus: vm.cpus,
            memory: vm.memory,
            disk: vm.disk,
            image: &vm.image,
            overlay: &vm.overlay,
            overlay_used: std::fs::metadata(&vm.overlay).map_or(0, |m| m.blocks() * 512),
            console: home.console_log(&vm.name),
            created: vm.created,
            uptime: vm.started.filter(|_| alive).map(|started| unix_now().saturating_sub(started)),
            hypervisor: vm.hypervisor.as_deref().filter(|_| alive),
            mounts: &vm.mounts,
            ports: &vm.ports,
            restart: vm.restart,
            autostart: vm.autostart,
            isolate: vm.isolate,
            member: vm.member.as_ref(),
            exit: vm.exit.as_ref().filter(|_| !alive),
            retry: vm.retry,
        }
    }

    fn text(&self) -> String {
        let mut rows = Vec::new();
        let mut row = |name: &str, value: String| rows.push([format!("{name}:"), value]);
        row("name", self.name.to_string());
        row("status", self.status.to_string());
        if let Some(uptime) = self.uptime {
            row("up", output::show_seconds(uptime));
        }
        if let (Some(hypervisor), Some(pid)) = (self.hypervisor, self.pid) {
            row("hypervisor", format!("{hypervisor}, process {pid}"));
        }
        if let Some(exit) = self.exit {
            row("ended", format!("{} ago: {}", output::show_seconds(unix_now().saturating_sub(exit.at)), exit.reason));
        }
        if let Some(retry) = self.retry.filter(|_| self.pid.is_none()) {
            let left = retry.at.saturating_sub(unix_now());
            row("restart", format!("{}, attempt {} in {left} s", self.restart.word(), retry.count));
        } else if self.restart != Restart::No {
            row("restart", self.restart.word().to_string());
        }
        row("address", self.ip.to_string());
        if let Some(ip6) = self.ip6 {
            row("ipv6", ip6.to_string());
        }
        row("mac", self.mac.to_string());
        row("tap", self.tap.to_string());
        if let Some(Membership { cluster, member }) = self.member {
            row("cluster", format!("{cluster}, as {member}"));
        }
        if self.isolate {
            row("isolated", "from all other VMs".to_string());
        }
        row("vsock cid", self.cid.to_string());
        row("cpus", self.cpus.to_string());
        row("memory", show_size(self.memory));
        row("disk", format!("{}, {} used on the host", show_size(self.disk), show_size(self.overlay_used)));
        row("overlay", self.overlay.display().to_string());
        for mount in self.mounts {
            row("shares", mount.to_string());
        }
        for forward in self.ports {
            row("publishes", forward.to_string());
        }
        row("image", self.image.reference.clone());
        row("digest", self.image.digest.clone());
        row("console", self.console.display().to_string());
        output::table(&rows)
    }
}

impl Info {
    pub fn run(self) -> Result<()> {
        let home = Home::from_env()?;
        let vms = each(&self.names, |name| existing(&home, name))?;
        let shown: Vec<Shown> = vms.iter().map(|vm| Shown::new(&home, vm)).collect();
        if self.json {
            return output::print_json(&shown);
        }
        output::print(&shown.iter().map(Shown::text).collect::<Vec<_>>().join("\n\n"));
        Ok(())
    }
}
