//! `puter doctor`.

use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, anyhow};
use argh::{ArgsInfo, FromArgs};
use serde::Serialize;

use super::{Quiet, misused, output};
use crate::vm::Hint;
use crate::vm::doctor::{self, Check, State};
use crate::vm::home::Home;
use crate::vm::settings::Settings;

/// Check what puter needs of this host, and tell the command that mends each lack.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "doctor")]
pub struct Doctor {
    /// run the commands that mend, after asking for each
    #[argh(switch)]
    fix: bool,
    /// with --fix: do not ask
    #[argh(switch)]
    yes: bool,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    ready: bool,
    checks: &'a [Check],
}

impl Doctor {
    pub fn run(self) -> Result<()> {
        if self.yes && !self.fix {
            return Err(misused("--yes is of no use without --fix", "puter doctor --fix --yes"));
        }
        let (home, settings) = (Home::from_env()?, Settings::load()?);
        if self.fix && !self.yes && !std::io::stdin().is_terminal() {
            return Err(anyhow!("there is nobody to ask: standard input is no terminal"))
                .hint("`puter doctor --fix --yes` runs every command without asking");
        }
        let mut checks = doctor::examine(&home, &settings);
        if self.fix {
            self.mend(&home, &settings, &checks)?;
            checks = doctor::examine(&home, &settings);
        }
        let missing = checks.iter().filter(|check| check.state == State::Missing).count();
        if self.json {
            output::print_json(&Report { ready: missing == 0, checks: &checks })?;
        } else {
            checks.iter().for_each(show);
            output::print(&match missing {
                0 => "\nThis host can run VMs.".to_string(),
                1 => "\nOne thing is missing.".to_string(),
                n => format!("\n{n} things are missing."),
            });
        }
        match missing {
            0 => Ok(()),
            _ => Err(anyhow!(Quiet(1))),
        }
    }

    /// Runs what the user agrees to. What is said goes to stderr: stdout is the report's.
    fn mend(&self, home: &Home, settings: &Settings, checks: &[Check]) -> Result<()> {
        let mut tried: Vec<&str> = Vec::new();
        for check in checks.iter().filter(|check| check.state != State::Ok) {
            let Some(mend) = check.mend.as_deref() else { continue };
            eprintln!("{}: {}", check.name, check.found);
            if !check.is_command {
                eprintln!("  this needs you: {mend}");
                continue;
            }
            // One command may mend several.
            if tried.contains(&mend) {
                continue;
            }
            if !self.agreed(mend)? {
                continue;
            }
            tried.push(mend);
            let mut command = Command::new("sh");
            let command = command.args(["-c", mend]).env("PATH", path_with_puter()).stdout(std::io::stderr());
            let status = command.status();
            let status = status.context("cannot run sh")?;
            let now = doctor::examine(home, settings);
            let mended = is_mended(check, checks, &now);
            eprintln!(
                "  {}",
                match (mended, status.success()) {
                    (true, _) => "mended",
                    (false, true) => "done, but the lack is still there: it may need a new login",
                    (false, false) => "the command failed",
                }
            );
        }
        Ok(())
    }

    fn agreed(&self, mend: &str) -> Result<bool> {
        if self.yes {
            eprintln!("  running: {mend}");
            return Ok(true);
        }
        eprint!("  run `{mend}`? [y/N] ");
        std::io::stderr().flush()?;
        let mut answer = String::new();
        std::io::stdin().lock().read_line(&mut answer).context("cannot read the answer")?;
        Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
    }
}

/// Whether a lack is gone. Of several checks with one name each has its own command.
fn is_mended(check: &Check, before: &[Check], now: &[Check]) -> bool {
    let alone = before.iter().filter(|other| other.name == check.name).count() == 1;
    let left = |other: &&Check| other.name == check.name && other.state != State::Ok;
    !now.iter().filter(left).any(|other| alone || other.mend == check.mend)
}

fn show(check: &Check) {
    output::print(&format!("{:<7} {}: {}", check.state.word(), check.name, check.found));
    if let Some(mend) = &check.mend {
        output::print(&format!("        mend: {mend}"));
    }
}

/// The user's PATH, and before it where this puter is: a command may be one of puter's own.
fn path_with_puter() -> std::ffi::OsString {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let own = std::env::current_exe().ok().and_then(|exe| exe.parent().map(PathBuf::from));
    let all = own.into_iter().chain(std::env::split_paths(&path));
    std::env::join_paths(all).unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_of_several_lacks_is_mended_by_its_own_command() {
        let check = |name, state, mend: &str| Check {
            name,
            state,
            found: String::new(),
            mend: Some(mend.to_owned()),
            is_command: true,
        };
        let (one, two) = (check("firewall", State::Advice, "one"), check("firewall", State::Advice, "two"));
        let before = [one.clone(), two.clone()];
        let now = [check("firewall", State::Ok, "one"), two.clone()];
        assert!(is_mended(&one, &before, &now) && !is_mended(&two, &before, &now));
        let puterd = check("puterd", State::Missing, "grant");
        let other = check("puterd", State::Missing, "start");
        assert!(!is_mended(&puterd, std::slice::from_ref(&puterd), &[other]));
        assert!(is_mended(&puterd, std::slice::from_ref(&puterd), &[]));
    }
}
