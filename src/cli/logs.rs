//! `puter logs`.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use argh::{ArgsInfo, FromArgs};

use crate::hypervisor::process;
use crate::vm::Hint;
use crate::vm::home::Home;
use crate::vm::state::existing;
use crate::watch::{self, Watch};

/// Show what a VM wrote to its serial console since its last start.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "logs")]
pub struct Logs {
    /// name of the VM
    #[argh(positional)]
    name: String,
    /// go on showing until the VM stops
    #[argh(switch, short = 'f')]
    follow: bool,
    /// show what the hypervisor printed instead
    #[argh(switch)]
    hypervisor: bool,
}

impl Logs {
    pub fn run(self) -> Result<()> {
        let home = Home::from_env()?;
        let vm = existing(&home, &self.name)?;
        let name = &self.name;
        let (path, former) = match self.hypervisor {
            true => (home.hypervisor_log(name), None),
            false => (home.console_log(name), Some(home.former_console_log(name))),
        };
        let watch = if self.follow { Some(Watch::directory(&home.run())?) } else { None };
        let held = vm.process.and_then(|id| process::hold(id.pid, id.start_time));
        // A log that was full was moved away.
        if let Some(mut file) = former.and_then(|former| File::open(former).ok())
            && !copy(&mut file, &path)?
        {
            return Ok(());
        }
        let mut file = File::open(&path)
            .with_context(|| format!("cannot open {}", path.display()))
            .hint(format!("a VM has logs once it was started: puter start {name}"))?;
        loop {
            // Looked at before the reading, so that the last lines are read after it.
            let alive = vm.is_alive();
            if let Some(watch) = &watch {
                watch.drain();
            }
            if !copy(&mut file, &path)? {
                return Ok(());
            }
            if is_another(&file, &path) {
                file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
                continue;
            }
            match (&watch, &held) {
                (Some(watch), Some(held)) if alive => {
                    watch::wait(&[watch.as_fd(), held.as_fd()], Duration::from_secs(60))?;
                }
                // The monitor writes what it has read last a moment after the end.
                (Some(watch), Some(_)) => {
                    watch::wait(&[watch.as_fd()], Duration::from_millis(500))?;
                    copy(&mut file, &path)?;
                    return Ok(());
                }
                _ => return Ok(()),
            }
        }
    }
}

/// Copies what there is; false when nobody reads the output any more.
fn copy(file: &mut File, path: &Path) -> Result<bool> {
    let mut stdout = std::io::stdout().lock();
    let mut bytes = vec![0; 64 << 10];
    loop {
        let length = file.read(&mut bytes).with_context(|| format!("cannot read {}", path.display()))?;
        if length == 0 {
            return Ok(true);
        }
        if stdout.write_all(&bytes[..length]).and_then(|()| stdout.flush()).is_err() {
            return Ok(false);
        }
    }
}

/// Whether the path names another file by now.
fn is_another(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(open), Ok(named)) => (open.dev(), open.ino()) != (named.dev(), named.ino()),
        _ => false,
    }
}
