//! `puter console`.

use std::io::{IsTerminal, Read, Write};
use std::net::Shutdown;

use anyhow::{Context, Result};
use argh::{ArgsInfo, FromArgs};

use super::terminal::Raw;
use crate::vm::home::Home;
use crate::vm::machine::Command;
use crate::vm::monitor;
use crate::vm::state::ready_for;

/// The key that detaches, as it arrives from a raw terminal: Ctrl-] as for virsh and telnet.
const DETACH: u8 = 0x1d;

/// Attach to a VM's serial console; Ctrl-] detaches. What it showed before is shown first.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "console")]
pub struct Console {
    /// name of the VM
    #[argh(positional)]
    name: String,
}

impl Console {
    pub fn run(self) -> Result<()> {
        let home = Home::from_env()?;
        let vm = ready_for(&home, &self.name, Command::Console)?;
        let stream = monitor::attach(&home, &vm)?;
        let on_terminal = std::io::stdin().is_terminal();
        if on_terminal {
            eprintln!("attached to the console of '{}'; Ctrl-] detaches", vm.name);
        }
        let raw = on_terminal.then(Raw::enter);
        let mut keys = stream.try_clone().context("cannot duplicate a socket")?;
        // Reading blocks for ever; the thread ends with the process.
        std::thread::spawn(move || {
            type_all(&mut std::io::stdin().lock(), &mut keys, on_terminal);
            // From a pipe, the end of the input is no reason to leave: there is more to see. The user ends that.
            if on_terminal {
                let _ = keys.shutdown(Shutdown::Both);
            }
        });
        let shown = show_all(&stream, &mut std::io::stdout().lock());
        drop(raw);
        if on_terminal {
            let ended = if vm.is_alive() { "detached from" } else { "the VM has ended:" };
            eprintln!("\n{ended} the console of '{}'", vm.name);
        }
        shown
    }
}

/// Sends every key until the one that detaches, or the end.
fn type_all(source: &mut dyn Read, keys: &mut dyn Write, detaches: bool) {
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = source.read(&mut buffer) {
        let typed = &buffer[..length];
        let end = typed.iter().position(|&key| detaches && key == DETACH);
        if keys.write_all(&typed[..end.unwrap_or(length)]).is_err() || end.is_some() {
            return;
        }
    }
}

fn show_all(mut stream: &std::os::unix::net::UnixStream, screen: &mut dyn Write) -> Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => screen
                .write_all(&buffer[..length])
                .and_then(|()| screen.flush())
                .context("cannot write the console's output")?,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("the connection to the console broke off"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_detaches_on_a_terminal_alone() {
        let typed = |detaches| {
            let mut keys = Vec::new();
            type_all(&mut &b"ls\r\x1dlost"[..], &mut keys, detaches);
            keys
        };
        assert_eq!(typed(true), b"ls\r");
        assert_eq!(typed(false), b"ls\r\x1dlost");
    }
}
