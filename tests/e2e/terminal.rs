//! A pseudo terminal for a command, and what it then looks like.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::num::NonZero;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

const LIMIT: Duration = Duration::from_secs(60);

/// A terminal, as what was written to it makes it look.
pub struct Terminal {
    master: Arc<OwnedFd>,
    seen: Arc<Mutex<Seen>>,
    pub child: Child,
}

pub struct Seen {
    parser: vt100::Parser,
    /// Everything that was written.
    pub raw: Vec<u8>,
    /// Each picture, the last one at the end.
    pub pictures: Vec<Vec<String>>,
    closed: bool,
}

impl Seen {
    fn look(&mut self) {
        let columns = self.parser.screen().size().1;
        let rows: Vec<String> = self.parser.screen().rows(0, columns.get()).collect();
        if self.pictures.last() != Some(&rows) {
            self.pictures.push(rows);
        }
    }
}

impl Terminal {
    /// Runs a command with its output on a terminal.
    pub fn run(command: Command, rows: u16, columns: u16) -> Terminal {
        Terminal::with(command, rows, columns, false)
    }

    /// As [`Terminal::run`], with its input there as well.
    pub fn ask(command: Command, rows: u16, columns: u16) -> Terminal {
        Terminal::with(command, rows, columns, true)
    }

    fn with(mut command: Command, rows: u16, columns: u16, input: bool) -> Terminal {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        set_size(&master, rows, columns);
        let name = ptsname(&master, vec![]).unwrap();
        let open = || rustix::fs::open(&name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        if input {
            command.stdin(open());
        }
        let child = command.stdout(open()).stderr(open()).spawn().unwrap();
        // The command keeps its ends of the terminal open otherwise.
        drop(command);
        let parser = vt100::Parser::new(some(rows), some(columns), 1000);
        let seen = Seen { parser, raw: vec![], pictures: vec![], closed: false };
        let (master, seen) = (Arc::new(master), Arc::new(Mutex::new(seen)));
        let (from, into) = (master.clone(), seen.clone());
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // A terminal that nobody has open any more gives an error.
            while let Ok(count @ 1..) = rustix::io::read(&*from, &mut buffer) {
                let mut seen = into.lock().unwrap();
                seen.raw.extend(&buffer[..count]);
                seen.parser.process(&buffer[..count]);
                seen.look();
            }
            into.lock().unwrap().closed = true;
        });
        Terminal { master, seen, child }
    }

    /// Types something.
    pub fn write(&self, text: &str) {
        assert_eq!(rustix::io::write(&*self.master, text.as_bytes()).unwrap(), text.len());
    }

    pub fn resize(&self, rows: u16, columns: u16) {
        let mut seen = self.seen.lock().unwrap();
        set_size(&self.master, rows, columns);
        seen.parser.screen_mut().set_size(some(rows), some(columns));
    }

    /// Waits for a picture that is as wanted, and gives it.
    pub fn until(&self, what: &str, wanted: impl Fn(&[String]) -> bool) -> Vec<String> {
        let end = Instant::now() + LIMIT;
        loop {
            let seen = self.seen.lock().unwrap();
            let last = seen.pictures.last().cloned().unwrap_or_default();
            if wanted(&last) {
                return last;
            }
            assert!(!seen.closed && Instant::now() < end, "{what}: {:#?}", seen.pictures);
            drop(seen);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for the end; what is on the screen and above it then, without empty lines.
    pub fn end(mut self) -> (ExitStatus, Vec<String>, Seen) {
        let status = self.child.wait().unwrap();
        let end = Instant::now() + LIMIT;
        while !self.seen.lock().unwrap().closed {
            assert!(Instant::now() < end, "the terminal is not closed");
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut seen = Arc::into_inner(self.seen).unwrap().into_inner().unwrap();
        let columns = seen.parser.screen().size().1;
        let screen = seen.parser.screen_mut();
        screen.set_scrollback(1000);
        let above = screen.scrollback();
        let mut lines: Vec<String> = vec![];
        for at in (1..=above).rev() {
            screen.set_scrollback(at);
            lines.extend(screen.rows(0, columns.get()).next());
        }
        screen.set_scrollback(0);
        lines.extend(screen.rows(0, columns.get()));
        lines.retain(|line| !line.is_empty());
        (status, lines, seen)
    }
}

fn some(number: u16) -> NonZero<u16> {
    NonZero::new(number).unwrap()
}

fn set_size(terminal: &OwnedFd, rows: u16, columns: u16) {
    tcsetwinsize(terminal, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
}
