//! Where everything lives: one directory, mode 0700.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::Hint;

/// Longest path of a Unix socket in bytes, without the closing NUL (sun_path, linux/un.h).
pub const MAX_SOCKET_PATH: usize = 107;

/// The data directory, `$PUTER_HOME` or `$XDG_DATA_HOME/puter` or `~/.local/share/puter`.
#[derive(Clone, Debug)]
pub struct Home {
    root: PathBuf,
}

impl Home {
    /// Finds the directory from the environment; nothing is made yet.
    ///
    /// # Errors
    /// When no variable names a place, or the named one is not an absolute path.
    pub fn from_env() -> Result<Home> {
        let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let root = var("PUTER_HOME")
            .or_else(Home::default_root)
            .context("cannot tell where to keep data: neither PUTER_HOME, XDG_DATA_HOME nor HOME is set")
            .hint("set PUTER_HOME to a directory of your own")?;
        if !root.is_absolute() {
            return Err(anyhow::anyhow!("the data directory '{}' is not an absolute path", root.display()))
                .hint("set PUTER_HOME to one that begins with '/'");
        }
        Ok(Home { root })
    }

    /// Where it is when nobody has chosen another place.
    pub fn default_root() -> Option<PathBuf> {
        let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let data = var("XDG_DATA_HOME").filter(|d| d.is_absolute()).map(|d| d.join("puter"));
        data.or_else(|| var("HOME").map(|d| d.join(".local/share/puter")))
    }

    /// A home at this place.
    pub fn at(root: impl Into<PathBuf>) -> Home {
        Home { root: root.into() }
    }

    /// Makes the directories that are missing, mode 0700, and checks who owns them.
    ///
    /// # Errors
    /// When a directory cannot be made, belongs to somebody else, or is too deep for Unix sockets.
    pub fn prepare(&self) -> Result<()> {
        // First: what is of no use is not made.
        self.socket(&self.daemon_socket())?;
        let all =
            [self.root.clone(), self.states(), self.clusters(), self.overlays(), self.images(), self.run(), self.ssh()];
        for directory in all {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&directory)
                .with_context(|| format!("cannot make the directory {}", directory.display()))
                .hint("set PUTER_HOME to a directory of your own, on a file system with room")?;
        }
        let metadata = std::fs::metadata(&self.root)?;
        let me = rustix::process::geteuid().as_raw();
        if metadata.uid() != me {
            return Err(anyhow::anyhow!(
                "{} belongs to user {}, not to you (user {me})",
                self.root.display(),
                metadata.uid()
            ))
            .hint("run puter as that user, or set PUTER_HOME to a directory of your own");
        }
        if metadata.mode() & 0o077 != 0 {
            std::fs::set_permissions(&self.root, std::fs::Permissions::from_mode(0o700))
                .with_context(|| format!("cannot make {} private", self.root.display()))?;
        }
        Ok(())
    }

    fn socket(&self, path: &Path) -> Result<()> {
        let length = path.as_os_str().as_bytes().len();
        if length > MAX_SOCKET_PATH {
            return Err(anyhow::anyhow!(
                "the socket path {} has {length} bytes; Linux allows {MAX_SOCKET_PATH}",
                path.display()
            ))
            .hint("set PUTER_HOME to a shorter path");
        }
        Ok(())
    }

    /// Checks that the VM's sockets fit.
    ///
    /// # Errors
    /// When one is longer than Linux allows; the error names it.
    pub fn check_sockets(&self, vm: &str) -> Result<()> {
        // The emulator and guest-to-host vsock connections add a suffix of up to 6 bytes.
        self.socket(&self.vsock(vm).with_extension("vsock_12345"))?;
        self.socket(&self.api(vm))
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn states(&self) -> PathBuf {
        self.root.join("state")
    }

    /// The records of clusters.
    pub fn clusters(&self) -> PathBuf {
        self.root.join("cluster")
    }

    pub fn cluster(&self, name: &str) -> PathBuf {
        self.clusters().join(format!("{name}.json"))
    }

    /// Held by the command that works on the cluster.
    pub fn cluster_lock(&self, name: &str) -> PathBuf {
        self.clusters().join(format!("{name}.lock"))
    }

    pub fn overlays(&self) -> PathBuf {
        self.root.join("overlays")
    }

    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    pub fn run(&self) -> PathBuf {
        self.root.join("run")
    }

    /// The snapshots, a directory for each VM.
    pub fn snapshots(&self) -> PathBuf {
        self.root.join("snapshot")
    }

    /// A VM's snapshots.
    pub fn snapshots_of(&self, vm: &str) -> PathBuf {
        self.snapshots().join(vm)
    }

    /// From where a hypervisor brings the VM back.
    pub fn restore(&self, vm: &str) -> PathBuf {
        self.run().join(format!("{vm}.restore"))
    }

    pub fn ssh(&self) -> PathBuf {
        self.root.join("ssh")
    }

    /// The kernel that `puter init` installed.
    pub fn kernel(&self) -> PathBuf {
        self.root.join("vmlinuz")
    }

    /// The initial RAM disk that `puter init` installed.
    pub fn initrd(&self) -> PathBuf {
        self.root.join("initrd")
    }

    /// What `puter init` chose: the default image.
    pub fn defaults(&self) -> PathBuf {
        self.root.join("init.json")
    }

    pub fn daemon_socket(&self) -> PathBuf {
        self.run().join("daemon.sock")
    }

    pub fn daemon_log(&self) -> PathBuf {
        self.run().join("puterd.log")
    }

    pub fn overlay(&self, vm: &str) -> PathBuf {
        self.overlays().join(format!("{vm}.qcow2"))
    }

    pub fn state(&self, vm: &str) -> PathBuf {
        self.states().join(format!("{vm}.json"))
    }

    /// Held by the command that works on the VM.
    pub fn vm_lock(&self, vm: &str) -> PathBuf {
        self.states().join(format!("{vm}.lock"))
    }

    /// Held while an id is chosen.
    pub fn id_lock(&self) -> PathBuf {
        self.states().join(".ids.lock")
    }

    /// Held by `puter init`.
    pub fn init_lock(&self) -> PathBuf {
        self.states().join(".init.lock")
    }

    /// cloud-hypervisor's API socket.
    pub fn api(&self, vm: &str) -> PathBuf {
        self.run().join(format!("{vm}.api"))
    }

    pub fn vsock(&self, vm: &str) -> PathBuf {
        self.run().join(format!("{vm}.vsock"))
    }

    /// Where the guest's agent of a starting VM tells that it is there (hypervisor to host, docs/vsock.md).
    pub fn knock(&self, vm: &str) -> PathBuf {
        self.run().join(format!("{vm}.vsock_{}", crate::protocol::agent::PORT))
    }

    /// The hypervisor's end of the serial console, which the VM's monitor holds.
    pub fn serial(&self, vm: &str) -> PathBuf {
        self.run().join(format!("{vm}.serial"))
    }

    /// The monitor's socket, on which the console is for many.
    pub fn console(&self, vm: &str) -> PathBuf {
        self.run().join(format!("{vm}.console"))
    }

    /// The monitor's socket, on which it is asked about the published ports.
    pub fn monitor(&self, vm: &str) -> PathBuf {
        self.run().join(format!("{vm}.monitor"))
    }

    /// Held by the monitor as long as it holds the published ports.
    pub fn monitor_lock(&self, vm: &str) -> PathBuf {
        self.run().join(format!(".{vm}.monitor.lock"))
    }

    /// What the guest wrote to its serial console.
    pub fn console_log(&self, vm: &str) -> PathBuf {
        self.run().join(format!("{vm}.log"))
    }

    /// What it wrote before that, once the log is full.
    pub fn former_console_log(&self, vm: &str) -> PathBuf {
        self.run().join(format!("{vm}.log.1"))
    }

    /// virtiofsd's socket for one of the VM's shared directories.
    pub fn share(&self, vm: &str, number: usize) -> PathBuf {
        self.run().join(format!("{vm}.share{number}"))
    }

    /// What the hypervisor itself printed.
    pub fn hypervisor_log(&self, vm: &str) -> PathBuf {
        self.run().join(format!("{vm}.hypervisor"))
    }

    /// cloud-hypervisor's event monitor.
    pub fn events(&self, vm: &str) -> PathBuf {
        self.run().join(format!("{vm}.events"))
    }

    pub fn known_hosts(&self, vm: &str) -> PathBuf {
        self.ssh().join(format!("{vm}.known_hosts"))
    }

    /// Everything of a VM's run that means nothing once its process has ended.
    pub fn volatile(&self, vm: &str) -> Vec<PathBuf> {
        let lock = PathBuf::from(format!("{}.lock", self.api(vm).display()));
        let sockets = [self.vsock(vm), self.knock(vm), self.serial(vm), self.console(vm), self.monitor(vm)];
        let sockets = sockets.into_iter().chain([self.events(vm), self.restore(vm)]);
        // virtiofsd writes its number beside its socket.
        let shares = (0..super::lifecycle::MOST_SHARES).map(|number| self.share(vm, number));
        let shares = shares.flat_map(|share| [PathBuf::from(format!("{}.pid", share.display())), share]);
        // The emulator's own, which it removes unless it is killed.
        let emulator = ["vhost", "stream", "vsock.device"].map(|end| self.run().join(format!("{vm}.{end}")));
        [self.api(vm), lock].into_iter().chain(sockets).chain(emulator).chain(shares).collect()
    }

    /// Everything of a VM outside its state file, overlay and volatile files.
    pub fn leftovers(&self, vm: &str) -> Vec<PathBuf> {
        let logs = [self.console_log(vm), self.former_console_log(vm), self.hypervisor_log(vm)];
        logs.into_iter().chain([self.known_hosts(vm), self.monitor_lock(vm)]).collect()
    }
}

/// Free bytes for an ordinary user on the file system that holds `path`.
///
/// # Errors
/// When the path cannot be examined.
pub fn free_space(path: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(path).with_context(|| format!("cannot examine {}", path.display()))?;
    match stat.f_bavail.checked_mul(stat.f_frsize) {
        Some(bytes) => Ok(bytes),
        None => bail!("{} reports an impossible amount of free space", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_is_private_and_made_whole() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path().join("deep/puter"));
        home.prepare().unwrap();
        home.prepare().unwrap();
        for directory in [home.root().to_path_buf(), home.run(), home.states()] {
            assert_eq!(std::fs::metadata(directory).unwrap().mode() & 0o777, 0o700);
        }
    }

    #[test]
    fn a_home_too_deep_for_sockets_says_so_and_how_to_mend_it() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path().join("x".repeat(100)));
        let error = home.prepare().unwrap_err();
        assert!(error.to_string().contains("Linux allows 107"), "{error}");
        assert!(error.downcast_ref::<super::super::Hinted>().unwrap().hint().contains("PUTER_HOME"));
        let fits = Home::at("/x".repeat(20));
        fits.check_sockets(&"a".repeat(30)).unwrap();
        assert!(fits.check_sockets(&"a".repeat(63)).is_err());
    }
}
