//! `cargo xtask package check`: what the packages do to a fresh Debian, in namespaces of its own.

mod rpm;
mod units;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::{Source, deb, read, tar};
use crate::shell::{output, run};

const SUITE: &str = "bookworm";
const EXECUTABLE: &str = "usr/lib/puter/puter-multi";
const LOCAL: &str = "usr/local/lib/puter/puter-multi";
const CAPABILITIES: &str = "cap_net_bind_service,cap_net_admin,cap_net_raw=ep";
/// The same three as the kernel writes them (linux/capability.h).
const CAPABILITY_BITS: &str = "0000000000003400";
const SYSUSERS: &str = "usr/bin/systemd-sysusers";
const ENABLED: &str = "etc/systemd/system/multi-user.target.wants/puter-agent.service";
/// A number that no user of a fresh Debian has.
const USER: &str = "4711";

/// What every installation and removal writes.
const OF_TOOLS: [&str; 11] = [
    "var/lib/dpkg",
    "var/lib/rpm",
    "var/log",
    "var/cache",
    "etc/group",
    "etc/group-",
    "etc/gshadow",
    "etc/gshadow-",
    "etc/.pwd.lock",
    "proc",
    // A file system of its own on any running machine.
    "run",
];

/// Makes the packages, has lintian judge them, and installs, upgrades, removes and purges them.
///
/// # Errors
/// When anything is not as it should be.
pub fn run_all(source: &Source) -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "this check needs root: it makes a Debian and enters it");
    let made = deb::make(source)?;
    for package in [&made.host, &made.agent] {
        let mut lintian = Command::new("lintian");
        lintian.args(["--allow-root", "--tag-display-limit=0", "--fail-on=error,warning"]);
        run(lintian.arg(package))?;
    }
    println!("lintian: no error and no warning");
    units::verify()?;
    let work = tempfile::Builder::new().prefix("puter-packages-").tempdir_in("/var/tmp")?;
    let (root, later) = (work.path().join("root"), work.path().join("later"));
    // The user has to come through to the root.
    super::set_mode(work.path(), 0o755)?;
    fs::create_dir(&later)?;
    let later = deb::make_as(source, &format!("{}+later", source.version), &later, "-Zgzip")?;
    let rpms = super::rpm::make(source)?;
    let again = work.path().join("again");
    fs::create_dir(&again)?;
    is_same(&made.host, &deb::build(&deb::HOST, source, &source.version, &again, "-Zxz")?)?;
    is_same(&rpms.host, &super::rpm::make_as(source, &source.version, &again)?.host)?;
    println!("made twice: the same bytes");
    let mut debian = Command::new("mmdebstrap");
    debian.args(["--quiet", "--variant=minbase", "--include=libcap2-bin,systemd-standalone-sysusers", SUITE]);
    run(debian.arg(&root))?;
    let host = Root { root };
    host.life(source, &made, &later)?;
    println!("with systemd-sysusers: well");
    // As where there is no systemd at all.
    output(host.inside("groupdel").arg("puter"))?;
    fs::remove_file(host.root.join(SYSUSERS)).or_else(|_| fs::remove_file(host.root.join("bin/systemd-sysusers")))?;
    host.life(source, &made, &later)?;
    println!("with addgroup: well");
    output(host.inside("groupdel").arg("puter"))?;
    host.rpm_life(source, &rpms, work.path())?;
    output(host.inside("groupdel").arg("puter"))?;
    host.archive(&tar::make(source)?)
}

/// The same source makes the same package, at another time and place.
fn is_same(one: &Path, other: &Path) -> Result<()> {
    ensure!(fs::read(one)? == fs::read(other)?, "{} and {} differ", one.display(), other.display());
    Ok(())
}

/// unshare, with puterd as the first process of its namespaces. It ends when this does: a program that gains capabilities
/// is no longer killed with its parent (PR_SET_PDEATHSIG), so unshare's own option does nothing for it.
struct Puterd(Child);

impl Puterd {
    fn inside(&self) -> Option<Pid> {
        let pid = self.0.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
        Pid::from_raw(children.split_whitespace().next()?.parse().ok()?)
    }
}

impl Drop for Puterd {
    fn drop(&mut self) {
        if let Some(pid) = self.inside() {
            let _ = kill_process(pid, Signal::KILL);
        }
        let _ = self.0.wait();
    }
}

/// A Debian in a directory.
struct Root {
    root: PathBuf,
}

impl Root {
    /// All that happens to packages, from installation to purge.
    fn life(&self, source: &Source, made: &deb::Made, later: &deb::Made) -> Result<()> {
        let before = self.files()?;
        self.dpkg("--install", made)?;
        self.installed(&source.version)?;
        let mut puterd = self.start_puterd()?;
        let upgraded =
            self.dpkg("--install", later).and_then(|()| self.installed(&format!("{}+later", source.version)));
        let ended = puterd.0.try_wait()?;
        drop(puterd);
        upgraded?;
        ensure!(ended.is_none(), "the upgrade ended puterd: {ended:?}");
        println!("upgrade: puterd went on");
        for action in ["--remove", "--purge"] {
            output(self.inside("dpkg").args([action, "puter", "puter-agent"]))?;
            ensure!(!self.root.join(EXECUTABLE).exists(), "{action} left the executable");
            ensure!(
                !self.root.join(ENABLED).is_symlink() || action == "--remove",
                "{action} left the agent's unit enabled"
            );
        }
        let after = self.files()?;
        let left: Vec<_> = after.difference(&before).map(|path| path.display().to_string()).collect();
        ensure!(left.is_empty(), "purged packages left {}", left.join(" "));
        let lost: Vec<_> = before.difference(&after).map(|path| path.display().to_string()).collect();
        ensure!(lost.is_empty(), "purged packages took {}", lost.join(" "));
        println!("purge: no file is left");
        Ok(())
    }

    /// What the archive's own script installs, a second time over a puterd that runs.
    fn archive(&self, archive: &Path) -> Result<()> {
        output(
            Command::new("tar")
                .arg("--extract")
                .arg("--file")
                .arg(archive)
                .arg("--directory")
                .arg(self.root.join("opt")),
        )?;
        let name = archive.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let script = format!("/opt/{}/install.sh", name.trim_end_matches(".tar.gz"));
        let refused = self.user(&["--clear-groups"], &script).output()?;
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        ensure!(
            !refused.status.success() && said.contains("only root"),
            "{script} for a user: {} {said}",
            refused.status
        );
        output(&mut self.inside(&script))?;
        self.is_guarded(LOCAL)?;
        let mut puterd = self.start_puterd()?;
        let again = output(&mut self.inside(&script)).and_then(|_| self.is_guarded(LOCAL));
        let ended = puterd.0.try_wait()?;
        drop(puterd);
        again?;
        ensure!(ended.is_none(), "installing again ended puterd: {ended:?}");
        for file in ["man/man1/puter.1.gz", "man/man8/puterd.8.gz", "bash-completion/completions/puter"] {
            ensure!(self.root.join("usr/local/share").join(file).is_file(), "{script} installed no {file}");
        }
        let unit = read(&self.root.join("usr/local/lib/systemd/system/puterd@.service"))?;
        ensure!(
            unit.contains("\nExecStart=/usr/local/bin/puterd "),
            "{script} installed a unit for another puterd: {unit}"
        );
        println!("{name}: refused to a user, installed by root");
        Ok(())
    }

    fn dpkg(&self, action: &str, packages: &deb::Made) -> Result<()> {
        let mut names = Vec::new();
        for package in [&packages.host, &packages.agent] {
            let name = package.file_name().context("a package has no name")?;
            fs::copy(package, self.root.join("tmp").join(name))?;
            names.push(Path::new("/tmp").join(name));
        }
        let done = output(self.inside("dpkg").arg(action).args(&names));
        for name in names {
            fs::remove_file(self.root.join(name.strip_prefix("/")?))?;
        }
        done.map(|_| ())
    }

    /// Both packages are there as they should be.
    fn installed(&self, version: &str) -> Result<()> {
        for package in ["puter", "puter-agent"] {
            let shown = output(self.inside("dpkg-query").args(["-W", "-f=${db:Status-Abbrev}${Version}", package]))?;
            ensure!(shown == format!("ii {version}"), "{package} is '{shown}'");
        }
        let verified = output(self.inside("dpkg").args(["--verify", "puter", "puter-agent"]))?;
        ensure!(verified.is_empty(), "dpkg finds other files than it installed: {verified}");
        println!("{version} is installed");
        self.is_guarded(EXECUTABLE)?;
        self.is_enabled()?;
        self.agent()?;
        let page = output(self.inside("gzip").args(["-dc", "/usr/share/man/man1/puter.1.gz"]))?;
        ensure!(page.contains(".Nm puter"), "puter's page is '{page}'");
        Ok(())
    }

    /// This file alone has capabilities, those three, and nobody outside the group runs it.
    fn is_guarded(&self, executable: &str) -> Result<()> {
        let group = &self.group()?;
        let metadata = fs::metadata(self.root.join(executable))?;
        let found = (metadata.uid(), metadata.gid().to_string(), metadata.mode() & 0o7777);
        ensure!(found == (0, group.clone(), 0o750), "{executable} has owner, group and mode {found:?}");
        let shown = output(self.inside("getcap").args(["-r", "/usr", "/etc", "/var"]))?;
        ensure!(shown == format!("/{executable} {CAPABILITIES}"), "getcap says '{shown}'");
        println!("root:puter 0750, {shown}");
        for name in ["puter", "puterd"] {
            for mut command in [self.inside(name), self.user(&["--groups", group], name)] {
                let help = output(command.arg("--help"))?;
                ensure!(help.contains(&format!("Usage: {name}")), "{name} --help says '{help}'");
            }
            let refused = self.user(&["--clear-groups"], name).arg("--help").output()?;
            let said = String::from_utf8_lossy(&refused.stderr);
            let is_refused =
                !refused.status.success() && refused.stdout.is_empty() && said.contains("Permission denied");
            ensure!(is_refused, "{name} runs for another user, or fails otherwise ({}): {said}", refused.status);
        }
        println!("root and a member of puter run it; another user: Permission denied");
        Ok(())
    }

    fn is_enabled(&self) -> Result<()> {
        let target = fs::read_link(self.root.join(ENABLED)).context("the agent's unit is not enabled")?;
        let target = target.strip_prefix("/").unwrap_or(&target);
        ensure!(self.root.join(target).is_file(), "the agent's unit is not at {}", target.display());
        Ok(())
    }

    fn agent(&self) -> Result<()> {
        let mut command = self.user(&["--clear-groups"], "puter-agent");
        let reported = output(command.arg("--version"))?;
        ensure!(reported.starts_with("puter-agent "), "puter-agent --version says '{reported}'");
        Ok(())
    }

    /// Starts it as a member of the group, and looks at what it may do.
    fn start_puterd(&self) -> Result<Puterd> {
        let group = self.group()?;
        let mut command = self.user(&["--groups", &group], "puterd");
        command.args(["--home", "/tmp/home"]).stdin(Stdio::null()).stderr(Stdio::piped());
        let home = self.root.join("tmp/home");
        let _ = fs::remove_dir_all(&home);
        fs::create_dir(&home)?;
        let number = USER.parse().ok();
        std::os::unix::fs::chown(&home, number, number)?;
        // It ends with its namespace; that puter finds and starts it is what counts.
        let started = output(self.user(&["--groups", &group], "puter").args(["daemon", "start", "--no-service"]))?;
        ensure!(started.starts_with("puterd runs (process "), "puter daemon start says '{started}'");
        let mut puterd = Puterd(command.spawn().context("cannot run unshare")?);
        let mut said = String::new();
        // It ends or is ready; its output stays open, since it goes on writing there.
        let mut lines = BufReader::new(puterd.0.stderr.take().context("puterd has no output")?);
        while !said.contains("ready on") {
            if lines.read_line(&mut said)? == 0 {
                bail!("puterd did not start: {said}");
            }
        }
        std::thread::spawn(move || std::io::copy(&mut lines, &mut std::io::sink()));
        let pid = puterd.inside().context("cannot find puterd's process")?;
        let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero()))?;
        for (field, value) in
            [("Uid", USER), ("CapPrm", CAPABILITY_BITS), ("CapEff", CAPABILITY_BITS), ("NoNewPrivs", "1")]
        {
            let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
            let found = line.and_then(|line| line.split_whitespace().next());
            ensure!(found == Some(value), "puterd has {field} {found:?} and not {value}");
        }
        println!("puterd runs as user {USER} with {CAPABILITY_BITS}");
        Ok(puterd)
    }

    /// The number of the group puter.
    fn group(&self) -> Result<String> {
        let text = read(&self.root.join("etc/group"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("puter:"));
        Ok(line.and_then(|line| line.split(':').nth(1)).context("there is no group puter")?.to_string())
    }

    /// A command in the root, in namespaces that end with it.
    fn inside(&self, program: &str) -> Command {
        let mut command = Command::new("unshare");
        command.args(["--net", "--mount", "--ipc", "--uts", "--pid", "--fork", "--kill-child=KILL"]);
        command.arg(format!("--mount-proc={}", self.root.join("proc").display())).arg("chroot").arg(&self.root);
        command.args([
            "env",
            "-i",
            "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME=/tmp/home",
            "LC_ALL=C.UTF-8",
        ]);
        command.args(["DEBIAN_FRONTEND=noninteractive", program]);
        command
    }

    /// A command in the root as the user, with groups as setpriv(1) takes them.
    fn user(&self, groups: &[&str], program: &str) -> Command {
        let mut command = self.inside("setpriv");
        command.args([&format!("--reuid={USER}"), &format!("--regid={USER}"), "--inh-caps=-all"]);
        // setpriv itself still has root's capabilities when it executes a program, and may execute any.
        command.args(groups).args(["--", "env", program]);
        command
    }

    /// All that is there, but for what dpkg, rpm and this check write themselves.
    fn files(&self) -> Result<BTreeSet<PathBuf>> {
        let _ = fs::remove_dir_all(self.root.join("tmp/home"));
        let mut find = Command::new("find");
        let Output { status, stdout, .. } =
            find.args([".", "-xdev", "-printf", "%P\\0"]).current_dir(&self.root).output()?;
        ensure!(status.success(), "find: {status}");
        let paths = stdout.split(|byte| *byte == 0).map(|path| PathBuf::from(std::ffi::OsStr::from_bytes(path)));
        Ok(paths.filter(|path| !OF_TOOLS.iter().any(|own| path.starts_with(own))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[ignore = "needs root and Debian's archive"]
    fn packages_install_upgrade_and_leave_nothing() {
        let dir = std::env::var_os("PUTER_TEST_BIN").expect("PUTER_TEST_BIN names the directory of puter-multi");
        crate::packages::install(crate::packages::PACKAGE).unwrap();
        run_all(&Source::of(Some(Path::new(&dir).join("puter-multi"))).unwrap()).unwrap();
    }
}
