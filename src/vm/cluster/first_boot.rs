//! What a member runs once, at its first boot.

use std::io::Write;

use anyhow::{Result, anyhow};

use super::model::{Member, Role};
use super::run::run_in;
use crate::protocol::agent::Exec;
use crate::vm::Hint;
use crate::vm::files::plain;
use crate::vm::lifecycle::Context;

/// Bytes of what a first boot's command wrote that an error repeats.
const TAIL: usize = 2048;

/// Runs what the role runs once.
pub(super) fn first_boot(context: &Context, member: &Member, role: &Role, text: &str) -> Result<()> {
    let name = &member.vm;
    context.step(name, "first boot", || {
        let mut said = Tail::default();
        let all = role.member_names().collect::<Vec<_>>().join(" ");
        let environment = [
            ("PUTER_CLUSTER", &member.cluster),
            ("PUTER_ROLE", &member.role),
            ("PUTER_MEMBER", &member.member),
            ("PUTER_MEMBERS", &all),
        ];
        let wanted = Exec {
            command: first_boot_command(text),
            environment: environment.map(|(name, value)| (name.to_string(), value.clone())).into(),
            ..Exec::default()
        };
        let mut errors = said.clone();
        let code = run_in(context.home, name, wanted, &mut said, &mut errors)?;
        if code == 0 {
            return Ok(());
        }
        let lines = said.text();
        let lines: String = lines.lines().map(|line| format!("\n  {line}")).collect();
        let told = if lines.is_empty() { String::new() } else { format!("; it said:{lines}") };
        Err(anyhow!("what '{name}' runs at its first boot ended with exit code {code}{told}"))
            .hint(format!("look at it (puter ssh {name}); the next start of the cluster runs it again"))
    })
}

/// A script with an interpreter of its own becomes a file in the guest; all else is for its shell. The interpreter is named
/// as the kernel would (execve(2)), with at most one argument: no program may be started from many a system's /run.
fn first_boot_command(text: &str) -> Vec<String> {
    const AS_FILE: &str = "set -e; umask 077; f=/run/puter-first-boot.$$; printf %s \"$1\" >\"$f\"; shift; c=0; \"$@\" \"$f\" || c=$?; rm -f \"$f\"; exit $c";
    let line = text.strip_prefix("#!").and_then(|rest| rest.lines().next()).map_or("", str::trim);
    let (interpreter, argument) = line.split_once([' ', '\t']).unwrap_or((line, ""));
    let words: &[&str] = match (interpreter, argument.trim()) {
        ("", _) => &["/bin/sh", "-c", text],
        (_, "") => &["/bin/sh", "-c", AS_FILE, "sh", text, interpreter],
        (_, argument) => &["/bin/sh", "-c", AS_FILE, "sh", text, interpreter, argument],
    };
    words.iter().map(|word| word.to_string()).collect()
}

/// The end of what a guest wrote. Clones write to the same.
#[derive(Clone, Default)]
struct Tail(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

impl Tail {
    fn text(&self) -> String {
        let bytes = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        plain(&String::from_utf8_lossy(&bytes)).trim_end().to_string()
    }
}

impl Write for Tail {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut kept = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        kept.extend(&bytes[bytes.len().saturating_sub(TAIL)..]);
        let more = kept.len().saturating_sub(TAIL);
        kept.drain(..more);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_what_a_guest_says_the_end_is_kept_without_what_steers_a_terminal() {
        let tail = Tail::default();
        let mut one = tail.clone();
        one.write_all(&[b'x'; 10_000]).unwrap();
        one.write_all(b"\x1b[31mred\n").unwrap();
        let text = tail.text();
        assert!(text.ends_with("xred") && text.len() <= TAIL, "{text}");
    }

    #[test]
    fn a_script_with_an_interpreter_is_run_as_a_file_by_a_real_shell() {
        let run = |text: &str| {
            let words = first_boot_command(&text.replace("/run/", "/tmp/"));
            let words: Vec<String> = words.iter().map(|word| word.replace("/run/", "/tmp/")).collect();
            let output = std::process::Command::new(&words[0]).args(&words[1..]).output().unwrap();
            (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
        };
        assert_eq!(run("echo one; echo two\nexit 3"), (3, "one\ntwo\n".into()));
        assert_eq!(run("#!/bin/cat\nit's \"%s\" $1\n"), (0, "#!/bin/cat\nit's \"%s\" $1\n".into()));
        assert_eq!(run("#!/bin/sh\nexit 7\n"), (7, String::new()));
        assert_eq!(run("#! /usr/bin/env  sh\necho $1 $0 | cut -c -20\n"), (0, "/tmp/puter-first-boo\n".into()));
        assert_eq!(run("#!\necho one"), (0, "one\n".into()));
    }
}
