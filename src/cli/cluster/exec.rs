//! `puter cluster exec`.

use std::io::{IsTerminal, Write};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, anyhow};
use argh::{ArgsInfo, FromArgs};
use serde_json::json;

use super::super::{Quiet, exec, misused, output, show_error};
use super::as_json;
use crate::protocol::agent::Exec as Wanted;
use crate::vm::cluster::{self, Member, Outcome, Outputs, Target};
use crate::vm::files::plain;
use crate::vm::home::Home;

/// Run a command on all members at once, or on some, over vsock and without input. Each line of output has the member's
/// name before it; the exit code is 1 where any is not 0.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "exec")]
pub struct Exec {
    /// name of the cluster, or NAME:ROLE, or NAME:MEMBER
    #[argh(positional, arg_name = "part", from_str_fn(super::target))]
    target: Target,
    /// user to run as (default: root)
    #[argh(option, default = "String::new()")]
    user: String,
    /// directory to run in (default: the user's home)
    #[argh(option, default = "String::new()")]
    directory: String,
    /// a variable for the command, as NAME=VALUE
    #[argh(option, from_str_fn(exec::variable))]
    env: Vec<(String, String)>,
    /// print JSON when all have ended: exit codes, and the first MiB of each output
    #[argh(switch)]
    json: bool,
    /// command to run
    #[argh(positional, greedy)]
    command: Vec<String>,
}

impl Exec {
    pub fn run(self) -> Result<()> {
        let command = exec::unmarked(self.command);
        if command.is_empty() {
            return Err(misused("no command is named", &format!("puter cluster exec {} -- COMMAND", self.target)));
        }
        let home = Home::from_env()?;
        let environment = self.env;
        let wanted = Wanted { command, environment, directory: self.directory, user: self.user, terminal: None };
        let outcomes = match self.json {
            true => collect(&home, &self.target, &wanted)?,
            false => show(&home, &self.target, &wanted)?,
        };
        if outcomes.is_empty() {
            eprintln!("puter: '{}' has no members", self.target);
        }
        let mut bad = Vec::new();
        for Outcome { member, result } in &outcomes {
            match result {
                Ok(0) => {}
                Ok(code) => bad.push(format!("{} ({code})", member.member)),
                Err(error) => {
                    show_error(error);
                    bad.push(member.member.clone());
                }
            }
        }
        match bad.is_empty() {
            true => Ok(()),
            false if self.json => Err(anyhow!(Quiet(1))),
            false => Err(anyhow!("the command failed on {} of {}: {}", bad.len(), outcomes.len(), bad.join(", "))),
        }
    }
}

fn show(home: &Home, target: &Target, wanted: &Wanted) -> Result<Vec<Outcome<i32>>> {
    let width =
        target.select(&cluster::existing(home, &target.cluster)?)?.iter().map(|m| m.member.len()).max().unwrap_or(0);
    let output = |member: &Member| -> Outputs<'static> {
        let prefix = format!("{:<width$} | ", member.member);
        let (out, err) = (std::io::stdout(), std::io::stderr());
        // What steers a terminal could make one member's line another's.
        let (clean_out, clean_err) = (out.is_terminal(), err.is_terminal());
        (Box::new(Lines::new(prefix.clone(), out, clean_out)), Box::new(Lines::new(prefix, err, clean_err)))
    };
    cluster::exec(home, target, wanted, &output)
}

/// Puts a name before each line, and writes whole lines alone: those of many come to one place.
struct Lines<W: Write> {
    prefix: String,
    line: Vec<u8>,
    to: W,
    clean: bool,
}

/// A line that is longer is broken.
const LONGEST: usize = 64 << 10;

impl<W: Write> Lines<W> {
    fn new(prefix: String, to: W, clean: bool) -> Lines<W> {
        Lines { prefix, line: Vec::new(), to, clean }
    }

    fn put(&mut self) -> std::io::Result<()> {
        let line = std::mem::take(&mut self.line);
        let line = match self.clean {
            true => plain(&String::from_utf8_lossy(&line)).into_bytes(),
            false => line,
        };
        // In one piece, since others write as well.
        self.to.write_all(&[self.prefix.as_bytes(), &line, b"\n"].concat())
    }
}

impl<W: Write> Write for Lines<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        for byte in bytes {
            if *byte == b'\n' || self.line.len() >= LONGEST {
                self.put()?;
            }
            if *byte != b'\n' {
                self.line.push(*byte);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.to.flush()
    }
}

impl<W: Write> Drop for Lines<W> {
    fn drop(&mut self) {
        if !self.line.is_empty() {
            let _ = self.put();
        }
        let _ = self.to.flush();
    }
}

/// The first part of an output. Clones write to the same.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

const MOST_KEPT: usize = 1 << 20;

impl Kept {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }
}

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let room = MOST_KEPT.saturating_sub(kept.len()).min(bytes.len());
        kept.extend(&bytes[..room]);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn collect(home: &Home, target: &Target, wanted: &Wanted) -> Result<Vec<Outcome<i32>>> {
    let kept: Mutex<Vec<(String, Kept, Kept)>> = Mutex::default();
    let output = |member: &Member| -> Outputs<'static> {
        let (out, err) = (Kept::default(), Kept::default());
        let entry = (member.member.clone(), out.clone(), err.clone());
        kept.lock().unwrap_or_else(PoisonError::into_inner).push(entry);
        (Box::new(out), Box::new(err))
    };
    let outcomes = cluster::exec(home, target, wanted, &output)?;
    let kept = kept.into_inner().unwrap_or_else(PoisonError::into_inner);
    let shown = |one: &Outcome<i32>| {
        let said = kept.iter().find(|(member, _, _)| *member == one.member.member);
        let mut all = as_json(one, |code| json!({ "exit_code": code }));
        all["stdout"] = said.map(|(_, out, _)| out.text()).into();
        all["stderr"] = said.map(|(_, _, err)| err.text()).into();
        all
    };
    output::print_json(&outcomes.iter().map(shown).collect::<Vec<_>>())?;
    Ok(outcomes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_has_a_name_however_it_comes() {
        let mut to = Vec::new();
        let mut lines = Lines::new("web1 | ".into(), &mut to, false);
        for part in ["one\ntw", "o\n", "\n", "last"] {
            lines.write_all(part.as_bytes()).unwrap();
        }
        drop(lines);
        assert_eq!(String::from_utf8(to).unwrap(), "web1 | one\nweb1 | two\nweb1 | \nweb1 | last\n");
        let mut to = Vec::new();
        Lines::new("a | ".into(), &mut to, true).write_all(b"\x1b[1Aev\ril\n").unwrap();
        assert_eq!(String::from_utf8(to).unwrap(), "a | evil\n");
        let mut to = Vec::new();
        Lines::new("a | ".into(), &mut to, false).write_all(&vec![b'x'; LONGEST * 3]).unwrap();
        assert_eq!(to.iter().filter(|byte| **byte == b'\n').count(), 3);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let kept = Kept::default();
        for _ in 0..300 {
            kept.clone().write_all(&[b'x'; 5000]).unwrap();
        }
        assert_eq!(kept.text().len(), MOST_KEPT);
    }
}
