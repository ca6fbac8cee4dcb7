//! systemd itself reads the units.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};

use super::read;
use crate::shell::{output, top};

/// The most that puterd@.service may be exposed, in tenths, as `systemd-analyze security` counts.
const EXPOSURE: &str = "--threshold=24";

/// The examples, which are a user's, and the system's.
pub fn verify() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let take = |from: &str, name: &str| -> Result<_> {
        // The packaged puterd may not be here.
        let text = read(&top().join("packaging").join(from))?.replace("/usr/bin/puterd", "/bin/true");
        fs::write(dir.path().join(name), text)?;
        Ok(dir.path().join(name))
    };
    let examples = ["puterd.service", "puterd.socket"].map(|unit| take(&format!("examples/{unit}"), unit));
    let mut command = Command::new("systemd-analyze");
    command.args(["verify", "--user"]);
    for unit in examples {
        command.arg(unit?);
    }
    judge(&mut command, dir.path())?;
    let system = "debian/puter/tree/usr/lib/systemd/system";
    let [service, socket] =
        ["service", "socket"].map(|kind| take(&format!("{system}/puterd@.{kind}"), &format!("puterd@alice.{kind}")));
    let service = service?;
    judge(Command::new("systemd-analyze").arg("verify").arg(&service).arg(socket?), dir.path())?;
    let mut security = Command::new("systemd-analyze");
    security.args(["security", "--no-pager", "--offline=yes", EXPOSURE]).arg(service);
    let table = output(&mut security).context("puterd@.service is less confined than it was")?;
    let overall = table.lines().find(|line| line.contains("Overall")).unwrap_or_default();
    println!("systemd takes all units {overall}");
    Ok(())
}

fn judge(command: &mut Command, runtime: &Path) -> Result<()> {
    command.args(["--man=no", "--recursive-errors=no"]).env("XDG_RUNTIME_DIR", runtime);
    let Output { stderr, .. } = command.output().context("cannot run systemd-analyze")?;
    let said = String::from_utf8_lossy(&stderr).into_owned();
    ensure!(!said.lines().any(|line| line.contains("puter")), "systemd does not take the units:\n{said}");
    Ok(())
}
