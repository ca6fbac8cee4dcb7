//! puterd as a service of the user's own systemd, and the VMs that start with it (systemd.service(5)).

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use sha2::{Digest, Sha256};

use super::daemon::Network;
use super::home::Home;
use super::settings::config_home;
use super::{Hint, files};

/// Where packages put units for users.
const PACKAGED: [&str; 3] = ["/etc/systemd/user", "/usr/local/lib/systemd/user", "/usr/lib/systemd/user"];
/// Users whose services run without a login (loginctl(1), enable-linger).
const LINGER: &str = "/var/lib/systemd/linger";

/// The service of one data directory.
#[derive(Clone, Debug)]
pub struct Service {
    /// systemd's own directory for this user.
    runtime: PathBuf,
    units: PathBuf,
    /// Empty for the default data directory; others must not fight with it.
    suffix: String,
}

impl Service {
    /// The service for this data directory; `None` where no systemd of the user answers.
    pub fn of(home: &Home) -> Option<Service> {
        let uid = rustix::process::geteuid();
        // A shell of `su` has no XDG_RUNTIME_DIR though the directory is there.
        let named = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()).map(PathBuf::from);
        let runtime = named.unwrap_or_else(|| PathBuf::from(format!("/run/user/{}", uid.as_raw())));
        let socket = runtime.join("systemd/private");
        std::os::unix::net::UnixStream::connect(socket).ok()?;
        let default = Home::default_root().is_some_and(|root| root == home.root());
        let suffix = if default { String::new() } else { format!("-{}", short_hash(home.root())) };
        Some(Service { runtime, units: config_home()?.join("systemd/user"), suffix })
    }

    /// puterd's unit.
    pub fn unit(&self) -> String {
        format!("puterd{}.service", self.suffix)
    }

    fn boot_unit(&self) -> String {
        format!("puter-boot{}.service", self.suffix)
    }

    /// Whether puterd runs as this service.
    pub fn is_active(&self) -> bool {
        self.systemctl(&["is-active", "--quiet", &self.unit()]).is_ok_and(|output| output.status.success())
    }

    /// Writes the unit where it is missing or another, and starts it; systemd says when it is ready.
    ///
    /// # Errors
    /// When the unit cannot be written, or puterd fails: the error holds its last words.
    pub fn start(&self, home: &Home, network: &Network<'_>, puterd: &Path) -> Result<()> {
        self.install(&self.unit(), &daemon_unit(home, network, puterd)?)?;
        let output = self.systemctl(&["restart", &self.unit()])?;
        if output.status.success() {
            return Ok(());
        }
        // It would be tried again and again.
        let _ = self.systemctl(&["stop", &self.unit()]);
        let said = files::tail(&home.daemon_log(), 12);
        // The last of its complaints, after those of former runs.
        let (_, last) = said.rsplit_once("puterd: ").unwrap_or_default();
        let (said, hint) = last.split_once("\nhint: ").unwrap_or((last, ""));
        let error = match said {
            "" => anyhow!("the service {} failed: {}", self.unit(), text(&output.stderr)),
            said => anyhow!("puterd did not start: {said}"),
        };
        let own =
            format!("`journalctl --user -u {}` shows more; `--no-service` starts it without systemd", self.unit());
        Err(error).hint(if hint.is_empty() { own } else { hint.to_string() })
    }

    /// Stops it.
    ///
    /// # Errors
    /// When systemd refuses.
    pub fn stop(&self) -> Result<()> {
        self.done(&["stop", &self.unit()])
    }

    /// Has puterd, and after it the VMs that are to, start when the user's services do.
    ///
    /// # Errors
    /// When a unit cannot be written or systemd refuses.
    pub fn enable(&self, home: &Home, network: &Network<'_>, puterd: &Path, puter: &Path) -> Result<()> {
        self.install(&self.unit(), &daemon_unit(home, network, puterd)?)?;
        self.install(&self.boot_unit(), &boot_unit(home, puter, Some(&self.unit()))?)?;
        self.done(&["enable", &self.unit(), &self.boot_unit()])
    }

    /// The same for the VMs alone, where puterd is the system's service.
    ///
    /// # Errors
    /// When a unit cannot be written or systemd refuses.
    pub fn enable_vms(&self, home: &Home, puter: &Path) -> Result<()> {
        self.install(&self.boot_unit(), &boot_unit(home, puter, None)?)?;
        self.done(&["enable", &self.boot_unit()])
    }

    /// Undoes [`Service::enable`]; what runs goes on.
    ///
    /// # Errors
    /// When systemd refuses.
    pub fn disable(&self) -> Result<()> {
        for unit in [self.unit(), self.boot_unit()].iter().filter(|unit| self.starts(unit)) {
            self.done(&["disable", unit])?;
        }
        Ok(())
    }

    /// Whether it starts with the user's services.
    pub fn is_enabled(&self) -> bool {
        self.starts(&self.unit())
    }

    fn starts(&self, unit: &str) -> bool {
        self.systemctl(&["is-enabled", "--quiet", unit]).is_ok_and(|output| output.status.success())
    }

    fn install(&self, name: &str, contents: &str) -> Result<()> {
        if PACKAGED.iter().any(|dir| Path::new(dir).join(name).exists()) {
            return Ok(());
        }
        let path = self.units.join(name);
        if std::fs::read_to_string(&path).is_ok_and(|former| former == contents) {
            return Ok(());
        }
        std::fs::create_dir_all(&self.units).with_context(|| format!("cannot make {}", self.units.display()))?;
        files::write_atomic(&path, contents.as_bytes())?;
        self.done(&["daemon-reload"])
    }

    fn done(&self, words: &[&str]) -> Result<()> {
        let output = self.systemctl(words)?;
        match output.status.success() {
            true => Ok(()),
            false => bail!("systemctl --user {}: {}", words.join(" "), text(&output.stderr)),
        }
    }

    fn systemctl(&self, words: &[&str]) -> Result<Output> {
        let mut command = Command::new("systemctl");
        command.arg("--user").args(words).env("XDG_RUNTIME_DIR", &self.runtime).stdin(Stdio::null());
        command.output().context("cannot run systemctl")
    }
}

/// The unit of the system's systemd that a process belongs to, if it is puterd@.service's (cgroups(7)).
pub fn system_unit(pid: u32) -> Option<String> {
    unit_in(&std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?)
}

fn unit_in(cgroups: &str) -> Option<String> {
    let (_, unit) = cgroups.lines().find_map(|line| line.strip_prefix("0::"))?.rsplit_once('/')?;
    (unit.starts_with("puterd@") && unit.ends_with(".service")).then(|| unit.to_string())
}

/// The socket by which systemd starts such a unit.
pub fn socket_of(unit: &str) -> String {
    format!("{}.socket", unit.trim_end_matches(".service"))
}

/// Whether the system's systemd has a unit start with the machine.
pub fn is_enabled_for_all(unit: &str) -> bool {
    let mut command = Command::new("systemctl");
    command.args(["is-enabled", "--quiet", unit]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Whether this user's services run without a login; `None` where that cannot be told.
pub fn lingers() -> Option<bool> {
    let uid = rustix::process::geteuid().as_raw().to_string();
    let passwd = std::fs::read_to_string("/etc/passwd").ok()?;
    let name = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then_some(name)
    })?;
    Some(Path::new(LINGER).join(name).exists())
}

fn daemon_unit(home: &Home, network: &Network<'_>, puterd: &Path) -> Result<String> {
    // No word of a list, so not quoted.
    let log = plain(&home.daemon_log())?.replace('%', "%%");
    Ok(format!(
        "# Written by `puter daemon start`.\n\
         [Unit]\n\
         Description=puter's network daemon\n\
         Documentation=man:puterd(8)\n\
         \n\
         [Service]\n\
         Type=notify\n\
         ExecStart={} --home {} {}\n\
         Restart=on-failure\n\
         RestartSec=1\n\
         UMask=0077\n\
         # The journal of a user is not everywhere readable for the user.\n\
         StandardOutput=append:{log}\n\
         StandardError=append:{log}\n\
         # No NoNewPrivileges=, nor anything that implies it: the file's capabilities would be void.\n\
         \n\
         [Install]\n\
         WantedBy=default.target\n",
        word(puterd)?,
        word(home.root())?,
        network.arguments().join(" ")
    ))
}

fn boot_unit(home: &Home, puter: &Path, daemon: Option<&str>) -> Result<String> {
    let puter = word(puter)?;
    let after = daemon.map_or(String::new(), |unit| format!("Requires={unit}\nAfter={unit}\n"));
    Ok(format!(
        "# Written by `puter daemon enable`.\n\
         [Unit]\n\
         Description=puter's VMs that start by themselves\n\
         {after}\
         \n\
         [Service]\n\
         Type=oneshot\n\
         RemainAfterExit=yes\n\
         Environment={}\n\
         ExecStart={puter} start --boot\n\
         ExecStop={puter} stop --all\n\
         TimeoutStartSec=infinity\n\
         TimeoutStopSec=120\n\
         KillMode=process\n\
         \n\
         [Install]\n\
         WantedBy=default.target\n",
        word(Path::new(&format!("PUTER_HOME={}", home.root().display())))?
    ))
}

/// A path as one word of a unit file: quoted, with systemd's own characters doubled (systemd.syntax(7)).
fn word(path: &Path) -> Result<String> {
    let escaped = plain(path)?.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%").replace('$', "$$");
    Ok(format!("\"{escaped}\""))
}

fn plain(path: &Path) -> Result<&str> {
    let text = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    if text.chars().any(char::is_control) {
        bail!("the path {text:?} cannot be in a unit file");
    }
    Ok(text)
}

fn short_hash(path: &Path) -> String {
    Sha256::digest(path.as_os_str().as_bytes()).iter().take(4).map(|byte| format!("{byte:02x}")).collect()
}

fn text(bytes: &[u8]) -> String {
    files::plain(&String::from_utf8_lossy(bytes)).trim().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::address::Subnet;
    use crate::protocol::ports::HostPort;

    fn network(host_ports: &[HostPort]) -> Network<'_> {
        Network { subnet: Subnet::default(), ipv6: crate::protocol::ipv6::Ipv6::Auto, host_ports }
    }

    #[test]
    fn units_hold_paths_as_single_words() {
        let home = Home::at("/home/me/100% \"mine\"");
        let unit =
            daemon_unit(&home, &network(&["tcp/22".parse().unwrap()]), Path::new("/opt/my puter/puterd")).unwrap();
        let line = "ExecStart=\"/opt/my puter/puterd\" --home \"/home/me/100%% \\\"mine\\\"\" --subnet 10.0.0.1/24 --host-port tcp/22\n";
        assert!(unit.contains(line), "{unit}");
        assert!(unit.contains("Type=notify") && !unit.contains("NoNewPrivileges=yes"));
        let boot = boot_unit(&Home::at("/h"), Path::new("/bin/puter"), Some("puterd.service")).unwrap();
        assert!(boot.contains("Environment=\"PUTER_HOME=/h\"\n") && boot.contains("\"/bin/puter\" start --boot\n"));
        assert!(boot.contains("\nRequires=puterd.service\nAfter=puterd.service\n\n[Service]"), "{boot}");
        let alone = boot_unit(&Home::at("/h"), Path::new("/bin/puter"), None).unwrap();
        assert!(alone.contains("themselves\n\n[Service]"), "{alone}");
        assert!(daemon_unit(&Home::at("/a\nb"), &network(&[]), Path::new("/p")).is_err());
    }

    #[test]
    fn systemd_itself_accepts_the_units() {
        let dir = tempfile::tempdir().unwrap();
        let program = std::env::current_exe().unwrap();
        let home = Home::at(dir.path());
        std::fs::write(dir.path().join("puterd.service"), daemon_unit(&home, &network(&[]), &program).unwrap())
            .unwrap();
        let boot = boot_unit(&home, &program, Some("puterd.service")).unwrap();
        std::fs::write(dir.path().join("puter-boot.service"), boot).unwrap();
        let mut command = Command::new("systemd-analyze");
        command.args(["verify", "--user", "--man=no", "--recursive-errors=no"]);
        command.args(["puterd.service", "puter-boot.service"].map(|unit| dir.path().join(unit)));
        let Ok(output) = command.env("XDG_RUNTIME_DIR", dir.path()).output() else {
            eprintln!("not checked: systemd-analyze is not installed");
            return;
        };
        let said = text(&output.stderr);
        let ours = said.lines().filter(|line| line.contains("puter")).collect::<Vec<_>>();
        assert!(ours.is_empty(), "{said}");
    }

    #[test]
    fn the_system_s_unit_is_known_by_its_control_group() {
        let unit = unit_in("1:name=x:/\n0::/system.slice/system-puterd.slice/puterd@al-ice.service\n").unwrap();
        assert_eq!((unit.as_str(), socket_of(&unit).as_str()), ("puterd@al-ice.service", "puterd@al-ice.socket"));
        assert_eq!(unit_in("0::/user.slice/user-1000.slice/user@1000.service/app.slice/puterd.service\n"), None);
        assert_eq!(unit_in("0::/\n"), None);
        assert_eq!(unit_in(""), None);
    }

    #[test]
    fn another_data_directory_has_a_service_of_its_own() {
        assert_ne!(short_hash(Path::new("/a")), short_hash(Path::new("/b")));
        assert_eq!(short_hash(Path::new("/a")).len(), 8);
    }
}
