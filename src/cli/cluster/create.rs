//! `puter cluster create`.

use std::path::PathBuf;

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};

use super::super::{misused, output, size, with_context, yes_or_no};
use super::{as_json, began, conclude, tell_began};
use crate::vm::cluster::{self, Role};
use crate::vm::port::Forward;

/// Make a cluster and start it, of members that are alike or from a file with roles. The same command again completes
/// what failed.
///
/// With --count the members are called node1, node2 and so on, and their VMs NAME-node1, NAME-node2.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "create")]
pub struct Create {
    /// name of the cluster; a file may have it
    #[argh(positional, arg_name = "new")]
    name: Option<String>,
    /// how many members
    #[argh(option)]
    count: Option<u32>,
    /// file with the cluster's roles, in TOML
    #[argh(option, short = 'f')]
    file: Option<PathBuf>,
    /// image of the members (default: the setting, else the one that init chose)
    #[argh(option)]
    image: Option<String>,
    /// number of processors
    #[argh(option)]
    cpus: Option<u32>,
    /// memory, such as 512M or 2G
    #[argh(option, from_str_fn(size))]
    memory: Option<u64>,
    /// size of the disk, such as 20G
    #[argh(option, from_str_fn(size))]
    disk: Option<u64>,
    /// lead a port of the host to one of each member, as [ADDRESS:]HOSTPORT:GUESTPORT[/tcp|/udp]; of many members without
    /// HOSTPORT; can be given several times
    #[argh(option, arg_name = "spec")]
    publish: Vec<Forward>,
    /// whether the members are kept from all other VMs: yes or no
    #[argh(option, from_str_fn(yes_or_no), arg_name = "answer")]
    isolate: Option<bool>,
    /// what each member's shell runs once, at its first boot
    #[argh(option, arg_name = "command")]
    run: Option<String>,
    /// write it down and start nothing
    #[argh(switch)]
    no_start: bool,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl Create {
    pub fn run(self) -> Result<()> {
        let (wanted, again) = match (&self.file, self.count) {
            (Some(_), Some(_)) => {
                return Err(misused("--count and --file exclude each other", "write count into the file"));
            }
            (Some(file), None) => {
                let bare = self.image.is_none() && self.cpus.is_none() && self.memory.is_none() && self.disk.is_none();
                if !bare || !self.publish.is_empty() || self.isolate.is_some() || self.run.is_some() {
                    return Err(misused(
                        "a file says itself what its members are",
                        "leave the options out, or write them into the file",
                    ));
                }
                let wanted = cluster::read(file, self.name.as_deref())?;
                let again = format!("puter cluster start {}", wanted.name);
                (wanted, again)
            }
            (None, count) => {
                let Some(name) = self.name else {
                    return Err(misused(
                        "no name is given for the cluster",
                        "puter cluster create NAME --count N, or --file FILE",
                    ));
                };
                let Some(count) = count else {
                    let hint = format!("puter cluster create {name} --count N, or --file FILE");
                    return Err(misused("neither a count nor a file is given", &hint));
                };
                let node = Role {
                    name: "node".into(),
                    count,
                    image: self.image,
                    cpus: self.cpus,
                    memory: self.memory,
                    disk: self.disk,
                    publish: self.publish,
                    isolate: self.isolate,
                    run: self.run,
                    after: Vec::new(),
                };
                let again = format!("puter cluster start {name}");
                (cluster::Cluster::new(&name, vec![node], 0), again)
            }
        };
        with_context(|context| {
            let (name, members) = (wanted.name.clone(), wanted.members().len());
            let done = cluster::create(context, wanted, !self.no_start, &tell_began(self.json))?;
            if self.json {
                let all: Vec<_> = done.iter().map(|one| as_json(one, began)).collect();
                output::print_json(&all)?;
            } else if self.no_start {
                output::print(&format!("{name} is made, with {members} members; start it: {again}"));
            }
            conclude(&done, again)
        })
    }
}
