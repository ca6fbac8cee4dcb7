//! `puter logs`.

use std::fs::File;
use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};
use argh::FromArgs;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;

use crate::vm::Hint;
use crate::vm::home::Home;
use crate::vm::state::existing;

/// How often a quiet log is looked at all the same: the end of its VM writes nothing.
const LOOK: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Show what a VM wrote to its serial console since its last start.
#[derive(FromArgs)]
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
        let path = if self.hypervisor { home.hypervisor_log(&self.name) } else { home.console_log(&self.name) };
        let mut file = File::open(&path)
            .with_context(|| format!("cannot open {}", path.display()))
            .hint(format!("a VM has logs once it was started: puter start {}", self.name))?;
        let changes = if self.follow { Some(watch(&path)?) } else { None };
        let mut stdout = std::io::stdout().lock();
        loop {
            // Looked at before the reading, so that the last lines are read after it.
            let alive = vm.is_alive();
            let mut bytes = vec![0; 64 * 1024];
            loop {
                let length = file.read(&mut bytes).with_context(|| format!("cannot read {}", path.display()))?;
                if length == 0 {
                    break;
                }
                if stdout.write_all(&bytes[..length]).and_then(|()| stdout.flush()).is_err() {
                    return Ok(());
                }
            }
            match &changes {
                Some(changes) if alive => wait(changes)?,
                _ => return Ok(()),
            }
        }
    }
}

fn watch(path: &Path) -> Result<OwnedFd> {
    let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
    let fd = inotify::init(flags).context("cannot watch files")?;
    let what = inotify::WatchFlags::MODIFY;
    inotify::add_watch(&fd, path, what).with_context(|| format!("cannot watch {}", path.display()))?;
    Ok(fd)
}

/// Waits for a change, or a little.
fn wait(changes: &OwnedFd) -> Result<()> {
    match poll(&mut [PollFd::new(changes, PollFlags::IN)], Some(&LOOK)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error).context("cannot wait for a change"),
    }
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(changes.as_fd(), &mut buffer);
    while reader.next().is_ok() {}
    Ok(())
}
