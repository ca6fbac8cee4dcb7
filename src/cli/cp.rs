//! `puter cp`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Result, anyhow};
use argh::{ArgsInfo, FromArgs};

use super::progress::Progress;
use super::{misused, output, show_error};
use crate::transfer::Count;
use crate::vm::cancel;
use crate::vm::copy::{self, Options, Place};
use crate::vm::home::Home;
use crate::vm::lifecycle::Observer;
use crate::vm::settings::show_size;

/// Copy files between the host and VMs, over vsock: no network, no keys.
///
/// NAME:PATH is in a VM, anything else on the host; a relative PATH is one of the user's home. A directory that is
/// there gets the source inside it; SOURCE/. means its contents.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "cp")]
pub struct Cp {
    /// sources, and at last the destination
    #[argh(positional, arg_name = "place")]
    places: Vec<Place>,
    /// copy what links lead to, in place of the links
    #[argh(switch, short = 'L')]
    follow_links: bool,
    /// user in the VM: whose rights apply, and who owns what is made there (default: root)
    #[argh(option, default = "String::new()")]
    user: String,
    /// say nothing of what went well
    #[argh(switch, short = 'q')]
    quiet: bool,
}

impl Cp {
    pub fn run(self) -> Result<()> {
        let Some((to, sources @ [_, ..])) = self.places.split_last() else {
            return Err(misused("cp needs a source and a destination", "puter cp FILE NAME:PATH, or NAME:PATH FILE"));
        };
        if !self.places.iter().any(|place| matches!(place, Place::Guest { .. })) {
            return Err(misused("none of these is in a VM", "a file in a VM is written NAME:PATH"));
        }
        let home = Home::from_env()?;
        let options = Options { follow: self.follow_links, user: self.user, directory: sources.len() > 1 };
        let progress = Progress::new();
        // Until all is put back that was half made.
        let _guard = cancel::guard();
        let mut failed = 0;
        for from in sources {
            let began = Instant::now();
            let bytes = AtomicU64::new(0);
            let bar = progress.bytes(&from.to_string());
            let seen = |length| {
                bytes.fetch_add(length, Ordering::Relaxed);
                bar.inc(length);
            };
            let note = |text: &str| progress.note("cp", text);
            let copied = copy::copy(&home, from, to, &options, &seen, &note);
            bar.finish_and_clear();
            match copied {
                Ok(_) if self.quiet => {}
                Ok(Count { files, bytes: exact }) => {
                    let size = if files > 0 { exact } else { bytes.into_inner() };
                    let seconds = began.elapsed().as_secs_f64();
                    output::print(&format!("{from} copied to {to} ({}, {seconds:.1} s)", show_size(size)));
                }
                Err(error) if sources.len() == 1 => return Err(error),
                Err(error) => {
                    show_error(&error);
                    failed += 1;
                    cancel::check()?;
                }
            }
        }
        match failed {
            0 => Ok(()),
            _ => Err(anyhow!("{failed} of {} failed", sources.len())),
        }
    }
}
