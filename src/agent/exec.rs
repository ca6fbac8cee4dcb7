//! `exec`: a program of the host's choice, its input and output on the connection that asked for it.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::fs::{Gid, Uid};
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::files::Guest;
use super::request::{self, Typed};
use super::server::Stream;
use super::ssh::account;
use crate::protocol::agent::{CHUNK, Exec, MAX_LINE, Output, Window};

/// Where programs are looked for.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How long output is waited for after the program's end: one that it left behind may hold it open.
const DRAIN: Duration = Duration::from_secs(2);

/// A program that runs.
pub struct Program {
    child: Child,
    /// The other end of its terminal.
    terminal: Option<OwnedFd>,
}

/// Starts the program.
///
/// # Errors
/// When there is no such program, user or directory.
pub fn start(guest: &Guest, wanted: &Exec) -> Result<Program> {
    let mut command = wanted.command.clone();
    // The agent itself, wherever it lies: the other end of `puter cp`.
    if command.first().is_some_and(|program| program == "puter-agent") {
        let me = std::env::current_exe().context("cannot find the agent's own executable")?;
        command.insert(0, me.to_str().context("the agent's path is not UTF-8")?.to_string());
    }
    let (program, args) = command.split_first().context("no program is named")?;
    ensure!(!wanted.command.iter().any(|word| word.contains('\0')), "a word of the command contains a NUL");
    let user = if wanted.user.is_empty() { "root" } else { &wanted.user };
    let passwd = std::fs::read_to_string(guest.path("/etc/passwd")).context("cannot read /etc/passwd")?;
    let (uid, gid, home) = account(&passwd, user).with_context(|| format!("the guest has no user '{user}'"))?;
    let mut command = Command::new(program);
    command.args(args);
    let directory = match wanted.directory.as_str() {
        // A home that is not there is no reason to fail, as for login(1).
        "" if guest.path(&home).is_dir() => &home,
        "" => "/",
        wanted => wanted,
    };
    command.env_clear().envs([("PATH", PATH), ("HOME", &home), ("USER", user), ("LOGNAME", user)]);
    command.envs(wanted.environment.iter().filter(|(name, _)| !name.is_empty()).map(|(name, value)| (name, value)));
    command.current_dir(guest.path(directory));
    let terminal = match wanted.terminal {
        Some(size) => Some(give_terminal(&mut command, size)?),
        None => {
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
            None
        }
    };
    // The agent's own tests run as whoever they run.
    if user != "root" {
        let text = std::fs::read_to_string(guest.path("/etc/group")).unwrap_or_default();
        become_user(&mut command, uid, gid, groups(&text, user, gid));
    }
    let child = command.spawn().with_context(|| format!("cannot run '{program}' in {directory}"))?;
    Ok(Program { child, terminal })
}

/// Has the program run as this user. After the terminal: that is still root's to give.
fn become_user(command: &mut Command, uid: u32, gid: u32, groups: Vec<Gid>) {
    use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};
    // SAFETY: three system calls between fork and exec, which take no lock and allocate nothing; the child has one
    // thread.
    unsafe {
        command.pre_exec(move || {
            set_thread_groups(&groups)?;
            set_thread_gid(Gid::from_raw(gid))?;
            set_thread_uid(Uid::from_raw(uid))?;
            Ok(())
        });
    }
}

/// The groups of a user, by group(5).
fn groups(text: &str, user: &str, own: u32) -> Vec<Gid> {
    let member = |line: &str| -> Option<u32> {
        let fields: Vec<&str> = line.split(':').collect();
        fields.get(3)?.split(',').any(|name| name == user).then(|| fields.get(2)?.parse().ok()).flatten()
    };
    let mut all = vec![own];
    all.extend(text.lines().filter_map(member).filter(|&gid| gid != own && gid != u32::MAX));
    all.into_iter().map(Gid::from_raw).collect()
}

/// Makes a terminal the program's own and gives its other end.
fn give_terminal(command: &mut Command, size: Window) -> Result<OwnedFd> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = openpt(flags).context("cannot make a terminal")?;
    grantpt(&ours).and_then(|()| unlockpt(&ours)).context("cannot make a terminal")?;
    let name = ptsname(&ours, Vec::new()).context("cannot name a terminal")?;
    let open = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let theirs = rustix::fs::open(name, open, rustix::fs::Mode::empty()).context("cannot open a terminal")?;
    resize(&ours, size);
    command.stdin(theirs.try_clone()?).stdout(theirs.try_clone()?).stderr(theirs);
    // SAFETY: two system calls between fork and exec, which take no lock and allocate nothing. Descriptor 0 is the
    // terminal by then: std sets up the standard descriptors before it calls this.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
            Ok(())
        });
    }
    Ok(ours)
}

fn resize(terminal: &OwnedFd, size: Window) {
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    let _ = tcsetwinsize(terminal, size);
}

/// Carries input and output until the program has ended. One whose host goes away is hung up on.
///
/// # Errors
/// When the connection breaks.
pub fn attend<S: Stream>(mut program: Program, stream: BufReader<S>) -> io::Result<()> {
    stream.get_ref().limit(None)?;
    let group = Pid::from_child(&program.child);
    let end = stream.get_ref().another()?;
    let writer = Arc::new(Mutex::new(stream.get_ref().another()?));
    let (done, ended) = channel();
    let mut outputs = 0;
    let mut output = |source: File, wrap: fn(String) -> Output| {
        let (writer, done) = (writer.clone(), done.clone());
        outputs += 1;
        std::thread::spawn(move || {
            let _ = carry_out(source, &*writer, wrap);
            let _ = done.send(());
        });
    };
    let file = |fd: &OwnedFd| fd.try_clone().map(File::from);
    let stdin = match &program.terminal {
        Some(terminal) => {
            output(file(terminal)?, Output::Stdout);
            Some(file(terminal)?)
        }
        None => {
            if let Some(stdout) = program.child.stdout.take() {
                output(File::from(OwnedFd::from(stdout)), Output::Stdout);
            }
            if let Some(stderr) = program.child.stderr.take() {
                output(File::from(OwnedFd::from(stderr)), Output::Stderr);
            }
            program.child.stdin.take().map(|stdin| File::from(OwnedFd::from(stdin)))
        }
    };
    let terminal = program.terminal.take();
    let over = Arc::new(AtomicBool::new(false));
    let seen = over.clone();
    std::thread::spawn(move || {
        carry_in(stream, stdin, terminal.as_ref());
        // The host has gone. After the program's end its number may be another's.
        if !seen.load(Ordering::SeqCst) {
            let _ = kill_process_group(group, Signal::HUP);
        }
    });
    let status = program.child.wait();
    over.store(true, Ordering::SeqCst);
    let status = status?;
    for _ in 0..outputs {
        if ended.recv_timeout(DRAIN).is_err() {
            break;
        }
    }
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    let sent = send(&writer, &Output::Exit(code));
    // Lets the input's thread go.
    end.end();
    sent
}

fn send<S: Stream>(writer: &Mutex<S>, output: &Output) -> io::Result<()> {
    let mut line = serde_json::to_vec(output)?;
    line.push(b'\n');
    writer.lock().unwrap_or_else(PoisonError::into_inner).write_all(&line)
}

fn carry_out<S: Stream>(mut source: File, writer: &Mutex<S>, wrap: fn(String) -> Output) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match source.read(&mut buffer) {
            // A terminal whose last user is gone gives EIO.
            Ok(0) | Err(_) => return Ok(()),
            Ok(length) => send(writer, &wrap(STANDARD.encode(&buffer[..length])))?,
        }
    }
}

/// Reads lines until the host ends the connection or talks nonsense.
fn carry_in<S: Stream>(mut stream: BufReader<S>, mut stdin: Option<File>, terminal: Option<&OwnedFd>) {
    loop {
        let mut line = Vec::new();
        let read = stream.by_ref().take(MAX_LINE as u64).read_until(b'\n', &mut line);
        if !read.is_ok_and(|length| length > 0) {
            return;
        }
        let Some(typed) = request::typed(&line) else { return };
        match typed {
            Typed::Bytes(bytes) => {
                // A program that reads no more is not to be ended for it.
                if stdin.as_mut().is_some_and(|stdin| stdin.write_all(&bytes).is_err()) {
                    stdin = None;
                }
            }
            Typed::End => match terminal {
                // As if the user had typed it (termios(3), VEOF).
                Some(terminal) => drop(rustix::io::write(terminal.as_fd(), b"\x04")),
                None => stdin = None,
            },
            Typed::Resize(size) => {
                if let Some(terminal) = terminal {
                    resize(terminal, size);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_has_the_groups_that_name_it_and_its_own() {
        let text = "root:x:0:\nwheel:x:10:root,me\ndocker:x:999:me\nme:x:1000:me\nbad:x\nother:x:7:you,mean\n";
        assert_eq!(groups(text, "me", 1000), [1000, 10, 999].map(Gid::from_raw));
        assert_eq!(groups("", "me", 1000), [Gid::from_raw(1000)]);
    }
}
