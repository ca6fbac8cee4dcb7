//! `cp`: files between the host and VMs, over the channel of `exec`: neither network nor keys.

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};

use super::agent::printable;
use super::home::Home;
use super::state::running;
use super::{cancel, exec};
use crate::protocol::address::check_vm_name;
use crate::protocol::agent::Exec;
use crate::transfer::{self, Count, Target};

/// What a guest says of a failure, in bytes.
const MOST_WORDS: usize = 4096;

/// One end of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    Host(PathBuf),
    Guest { vm: String, path: String },
}

impl std::str::FromStr for Place {
    type Err = String;

    /// `NAME:PATH` is in a VM; what has a slash before its first colon, or no colon, is on the host.
    fn from_str(text: &str) -> Result<Place, String> {
        match text.split_once(':') {
            Some((vm, path)) if !vm.contains('/') && !vm.is_empty() => {
                check_vm_name(vm).map_err(|why| format!("{why} (a file of the host is written ./{text})"))?;
                let path = if path.is_empty() { "." } else { path };
                Ok(Place::Guest { vm: vm.into(), path: path.into() })
            }
            _ if text.is_empty() => Err("a place to copy from or to cannot be empty".into()),
            _ => Ok(Place::Host(text.into())),
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::Host(path) => write!(f, "{}", path.display()),
            Place::Guest { vm, path } => write!(f, "{vm}:{path}"),
        }
    }
}

/// How it is copied.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// What links lead to, in place of the links.
    pub follow: bool,
    /// The user in a guest; root when empty.
    pub user: String,
    /// The destination must be a directory.
    pub directory: bool,
}

/// Copies a file or tree; `seen` hears of each piece that passes, in bytes, `note` of what is left out.
///
/// # Errors
/// When either end fails: the error names the file and the side.
pub fn copy(
    home: &Home,
    from: &Place,
    to: &Place,
    options: &Options,
    seen: &(dyn Fn(u64) + Sync),
    note: &(dyn Fn(&str) + Sync),
) -> Result<Count> {
    for place in [from, to] {
        if let Place::Guest { vm, .. } = place {
            running(home, vm)?;
        }
    }
    let (reader, writer) = io::pipe().context("cannot make a pipe")?;
    let result = std::thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let mut writer = Counting { inner: writer, seen };
            send(home, from, options, &mut writer, note)
        });
        let received = receive(home, to, &target(from, to, options), options, reader, note);
        let sent = sending.join().unwrap_or_else(|_| Err(anyhow!("the sender panicked")));
        (sent, received)
    });
    match result {
        // The receiver's end breaks the sender's pipe, and the sender's the receiver's stream: the cause is the other.
        (Err(sent), Err(_)) if !is_broken(&sent) => Err(sent),
        (_, Err(received)) => Err(received),
        (Err(sent), Ok(_)) => Err(sent),
        (Ok(sent), Ok(received)) => Ok(sent.or(received).unwrap_or_default()),
    }
    .with_context(|| format!("cannot copy {from} to {to}"))
}

fn is_broken(error: &anyhow::Error) -> bool {
    let broken = |error: &io::Error| error.kind() == io::ErrorKind::BrokenPipe;
    error.chain().filter_map(|cause| cause.downcast_ref()).any(broken)
}

fn target(from: &Place, to: &Place, options: &Options) -> Target {
    let source = match from {
        Place::Host(path) => path.as_os_str().as_bytes().to_vec(),
        Place::Guest { path, .. } => path.clone().into_bytes(),
    };
    let path = match to {
        Place::Host(path) => path.clone(),
        Place::Guest { path, .. } => path.into(),
    };
    let contents = source == b"." || source.ends_with(b"/.");
    // The source's own name; `..` and `/` have none, and then the destination must give one.
    let name = Path::new(OsStr::from_bytes(&source)).file_name().map(|name| name.as_bytes().to_vec());
    let directory = options.directory || path.as_os_str().as_bytes().ends_with(b"/");
    Target { path, name: name.unwrap_or_default(), contents, directory }
}

fn send(
    home: &Home,
    from: &Place,
    options: &Options,
    out: &mut (dyn Write + Send),
    note: &(dyn Fn(&str) + Sync),
) -> Result<Option<Count>> {
    match from {
        Place::Host(path) => transfer::pack(path, options.follow, out, &mut |text| note(&text)).map(Some),
        Place::Guest { vm, path } => {
            let mut words = vec!["puter-agent".into(), "pack".into()];
            words.extend(options.follow.then(|| "--follow".to_string()));
            words.extend(["--".into(), path.clone()]);
            let program = exec::start(home, vm, wanted(words, options))?;
            program.keyboard().end()?;
            let mut said = Words::default();
            let code = program.attend(out, &mut said)?;
            said.check(code, note).map(|()| None)
        }
    }
}

fn receive(
    home: &Home,
    to: &Place,
    target: &Target,
    options: &Options,
    stream: impl Read + Send,
    note: &(dyn Fn(&str) + Sync),
) -> Result<Option<Count>> {
    match to {
        Place::Host(_) => {
            let stream = Interruptible(stream);
            transfer::unpack(stream, target, &mut |text| note(&crate::vm::files::plain(&text))).map(Some)
        }
        Place::Guest { vm, .. } => {
            let mut words = vec!["puter-agent".into(), "unpack".into()];
            words.extend(target.contents.then(|| "--contents".to_string()));
            words.extend(target.directory.then(|| "--directory".to_string()));
            let name = String::from_utf8(target.name.clone())
                .ok()
                .context("the name is not UTF-8: copy its directory, or to a file with another name")?;
            let path = target.path.to_string_lossy().into_owned();
            words.extend(["--name".into(), name, "--".into(), path]);
            let program = exec::start(home, vm, wanted(words, options))?;
            let keyboard = program.keyboard();
            let mut said = Words::default();
            let (typed, code) = std::thread::scope(|scope| {
                let mut stream = Interruptible(stream);
                let typing = scope.spawn(move || {
                    // What was broken off must not look like the end of the files.
                    keyboard.type_all(&mut stream).inspect_err(|_| keyboard.hang_up())
                });
                let code = program.attend(&mut io::sink(), &mut said);
                (typing.join().unwrap_or_else(|_| Err(anyhow!("the typist panicked"))), code)
            });
            said.check(code?, note)?;
            typed.map(|()| None)
        }
    }
}

fn wanted(command: Vec<String>, options: &Options) -> Exec {
    Exec { command, user: options.user.clone(), ..Exec::default() }
}

/// What the guest's end says on stderr: notes line by line, and at last why it failed.
#[derive(Default)]
struct Words(Vec<u8>);

impl Write for Words {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = MOST_WORDS.saturating_sub(self.0.len());
        self.0.extend(bytes.iter().take(room));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Words {
    fn check(&self, code: i32, note: &(dyn Fn(&str) + Sync)) -> Result<()> {
        let text = printable(&String::from_utf8_lossy(&self.0));
        let lines: Vec<&str> = text.lines().collect();
        if code == 0 {
            lines.into_iter().for_each(note);
            return Ok(());
        }
        let Some((last, notes)) = lines.split_last() else { bail!("the guest's end failed with exit code {code}") };
        notes.iter().for_each(|line| note(line));
        bail!("in the guest: {}", last.strip_prefix("puter-agent: ").unwrap_or(last))
    }
}

/// Breaks off when the user has asked to stop, so that nothing half-made stays.
struct Interruptible<R>(R);

impl<R: Read> Read for Interruptible<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        cancel::check().map_err(io::Error::other)?;
        self.0.read(buffer)
    }
}

struct Counting<'a, W> {
    inner: W,
    seen: &'a (dyn Fn(u64) + Sync),
}

impl<W: Write> Write for Counting<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = self.inner.write(bytes)?;
        (self.seen)(length as u64);
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_in_a_vm_or_on_the_host() {
        let guest = |vm: &str, path: &str| Ok(Place::Guest { vm: vm.into(), path: path.into() });
        assert_eq!("web:/etc/hosts".parse(), guest("web", "/etc/hosts"));
        assert_eq!("web:".parse(), guest("web", "."));
        assert_eq!("web:a:b".parse(), guest("web", "a:b"));
        for host in ["/srv", "./web:x", "file", "/a:b", ":x"] {
            assert_eq!(host.parse(), Ok(Place::Host(host.into())), "{host}");
        }
        assert!("Web:x".parse::<Place>().unwrap_err().contains("./Web:x"));
        assert!("".parse::<Place>().is_err());
    }

    #[test]
    fn the_target_follows_from_how_the_source_is_written() {
        let of = |from: &str, to: &str| target(&from.parse().unwrap(), &to.parse().unwrap(), &Options::default());
        let (plain, contents) = (of("web:/var/log", "there"), of("src/.", "web:/opt/"));
        assert_eq!((plain.name.as_slice(), plain.contents, plain.directory), (&b"log"[..], false, false));
        assert_eq!((contents.contents, contents.directory), (true, true));
        assert_eq!(of("/", "x").name, b"");
        assert_eq!(of("dir/", "x").name, b"dir");
    }
}
