//! What the packages for RPM do to the same Debian, with a database of their own and without dependencies: there is no
//! system with RPM here.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};

use super::{EXECUTABLE, Root};
use crate::package::{Source, deb, rpm};
use crate::shell::{output, run, top};

impl Root {
    /// From installation to removal.
    pub(super) fn rpm_life(&self, source: &Source, made: &deb::Made, work: &Path) -> Result<()> {
        let mut rpmlint = Command::new("rpmlint");
        rpmlint.arg("--strict").arg("--config").arg(top().join("packaging/rpm/rpmlint.toml"));
        run(rpmlint.args([&made.host, &made.agent]))?;
        for (package, wanted) in [(&made.host, "group(puter)"), (&made.agent, "puter-agent")] {
            let provides = output(Command::new("rpm").args(["-qp", "--provides"]).arg(package))?;
            ensure!(provides.contains(wanted), "{} provides '{provides}'", package.display());
        }
        let later = work.join("later-rpm");
        std::fs::create_dir(&later)?;
        let later = rpm::make_as(source, &format!("{}.later", source.version), &later)?;
        let before = self.files()?;
        self.rpm(["--install", "--nodeps"], made)?;
        self.rpm_installed()?;
        let mut puterd = self.start_puterd()?;
        let upgraded = self.rpm(["--upgrade", "--nodeps"], &later).and_then(|()| self.rpm_installed());
        let ended = puterd.0.try_wait()?;
        drop(puterd);
        upgraded?;
        ensure!(ended.is_none(), "the upgrade ended puterd: {ended:?}");
        output(self.rpm_command().args(["--erase", "puter", "puter-agent"]))?;
        let after = self.files()?;
        // Directories that other packages would own there stay, empty.
        let changed = after.symmetric_difference(&before).filter(|path| !self.root.join(path).is_dir());
        let left: Vec<_> = changed.map(|path| path.display().to_string()).collect();
        ensure!(left.is_empty(), "installing and erasing with rpm changed {}", left.join(" "));
        println!("rpm: installed, upgraded under a puterd that runs, erased, and nothing is left");
        Ok(())
    }

    fn rpm_installed(&self) -> Result<()> {
        let verified = self.rpm_command().args(["--verify", "--nodeps", "puter", "puter-agent"]).output()?;
        let said = String::from_utf8_lossy(&verified.stdout).into_owned();
        ensure!(verified.status.success() && said.is_empty(), "rpm finds other files than it installed: {said}");
        self.is_guarded(EXECUTABLE)?;
        self.agent()
    }

    fn rpm(&self, action: [&str; 2], packages: &deb::Made) -> Result<()> {
        output(self.rpm_command().args(action).args([&packages.host, &packages.agent])).map(|_| ())
    }

    fn rpm_command(&self) -> Command {
        let mut command = Command::new("rpm");
        command.arg("--root").arg(&self.root).args(["--dbpath", "/var/lib/rpm"]);
        command
    }
}
