//! What serves the VM's shared directories, for as long as the VM runs.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::hypervisor::virtiofs::Server;
use crate::vm::files;
use crate::watch::{self, Watch};

/// How long one may take to make its socket.
const LIMIT: Duration = Duration::from_secs(10);
/// Pause before one that has ended is started again.
const AGAIN: Duration = Duration::from_millis(200);

/// The servers, each with its process.
#[derive(Debug, Default)]
pub struct Servers {
    all: Vec<(Server, Child)>,
    log: PathBuf,
}

impl Servers {
    /// Starts them, and waits until each can be connected to. What they say goes to the end of `log`.
    ///
    /// # Errors
    /// When one cannot be started or ends at once: the error holds its last words. None is left then.
    pub fn start(servers: Vec<Server>, log: &Path) -> Result<Servers> {
        let mut started = Servers { all: Vec::new(), log: log.to_path_buf() };
        for server in servers {
            let begun = started.begin(server);
            if let Err(error) = begun {
                started.end();
                return Err(error);
            }
        }
        Ok(started)
    }

    fn begin(&mut self, server: Server) -> Result<()> {
        let watch = Watch::directory(server.socket.parent().context("a socket is in a directory")?)?;
        // Of its own: the hypervisor begins the common log anew.
        let log = self.log.with_extension("virtiofsd");
        let mut child = server.spawn(open(&log, true)?)?;
        let end = Instant::now() + LIMIT;
        while !server.socket.exists() {
            if let Some(status) = child.try_wait()? {
                let said = files::tail(&log, 4);
                let _ = files::remove(&log);
                bail!("virtiofsd ended at once ({status}): {said}");
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let _ = child.kill();
                let _ = child.wait();
                bail!("virtiofsd made no socket within {} s", LIMIT.as_secs());
            }
            watch::wait(&[watch.as_fd()], left.min(Duration::from_millis(50)))?;
            watch.drain();
        }
        let _ = files::remove(&log);
        self.all.push((server, child));
        Ok(())
    }

    /// Ends all of them.
    pub fn end(&mut self) {
        for (_, child) in &mut self.all {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts again each one that ends: it does when its hypervisor lets go, as at a guest's reboot.
    pub async fn keep(&mut self) {
        if self.all.is_empty() {
            return smol::future::pending().await;
        }
        loop {
            for (server, child) in &mut self.all {
                if let (Ok(Some(_)), Ok(log)) = (child.try_wait(), open(&self.log, false))
                    && let Ok(again) = server.spawn(log)
                {
                    *child = again;
                }
            }
            smol::Timer::after(AGAIN).await;
        }
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.end();
    }
}

fn open(log: &Path, new: bool) -> Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).mode(0o600);
    let options = if new { options.write(true).truncate(true) } else { options.append(true) };
    options.open(log).with_context(|| format!("cannot write {}", log.display()))
}
