//! The serial console as one stream for many: what came so far, and each piece as it comes.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use smol::channel::{Receiver, Sender, bounded};

/// How much of the past one who attaches is shown, in bytes.
const HISTORY: usize = 64 << 10;
/// A log that reaches this size becomes the former one, in bytes: the guest decides how much it writes.
const MOST: u64 = 4 << 20;
/// Pieces that one who attached may be behind; then it is let go, so that it holds up nobody.
const BEHIND: usize = 256;

/// Output of the console.
#[derive(Debug)]
pub struct Console {
    history: VecDeque<u8>,
    log: Log,
    listeners: Vec<Sender<Arc<[u8]>>>,
}

impl Console {
    /// A console that goes on in the log at `path`; what is in there already counts as its past.
    pub fn new(path: PathBuf, former: PathBuf) -> Console {
        let mut history = VecDeque::new();
        if let Ok(text) = std::fs::read(&path) {
            history.extend(&text[text.len().saturating_sub(HISTORY)..]);
        }
        Console { history, log: Log::new(path, former), listeners: Vec::new() }
    }

    /// Takes what the guest wrote.
    pub fn take(&mut self, bytes: &[u8]) {
        self.log.write(bytes);
        self.history.extend(bytes);
        let past = self.history.len().saturating_sub(HISTORY);
        self.history.drain(..past);
        let piece: Arc<[u8]> = bytes.into();
        self.listeners.retain(|listener| listener.try_send(piece.clone()).is_ok());
    }

    /// The past, and a channel on which the rest comes: nothing is lost or twice between them.
    pub fn attach(&mut self) -> (Vec<u8>, Receiver<Arc<[u8]>>) {
        let (sender, receiver) = bounded(BEHIND);
        self.listeners.push(sender);
        (self.history.iter().copied().collect(), receiver)
    }
}

/// A file that is moved away when it is full: at most two of them are there.
#[derive(Debug)]
struct Log {
    path: PathBuf,
    former: PathBuf,
    file: Option<File>,
    length: u64,
}

impl Log {
    fn new(path: PathBuf, former: PathBuf) -> Log {
        let mut log = Log { path, former, file: None, length: 0 };
        log.open();
        log
    }

    fn open(&mut self) {
        // A disk that is full or read-only ends no machine: the console goes on without a log.
        self.file = OpenOptions::new().append(true).create(true).mode(0o600).open(&self.path).ok();
        self.length = self.file.as_ref().and_then(|file| file.metadata().ok()).map_or(0, |data| data.len());
    }

    fn write(&mut self, bytes: &[u8]) {
        if self.length >= MOST && std::fs::rename(&self.path, &self.former).is_ok() {
            self.open();
        }
        if self.length >= MOST {
            return;
        }
        if self.file.as_mut().is_some_and(|file| file.write_all(bytes).is_ok()) {
            self.length += bytes.len() as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console(dir: &tempfile::TempDir) -> Console {
        Console::new(dir.path().join("log"), dir.path().join("log.1"))
    }

    #[test]
    fn who_attaches_gets_the_past_and_then_each_piece_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut console = console(&dir);
        console.take(b"one ");
        let (past, rest) = console.attach();
        console.take(b"two ");
        console.take(b"three");
        assert_eq!(past, b"one ");
        assert_eq!([rest.try_recv().unwrap(), rest.try_recv().unwrap()].concat(), b"two three");
        assert_eq!(std::fs::read(dir.path().join("log")).unwrap(), b"one two three");
        let again = Console::new(dir.path().join("log"), dir.path().join("log.1")).attach().0;
        assert_eq!(again, b"one two three", "another monitor goes on where the first one ended");
    }

    #[test]
    fn a_guest_that_never_stops_writing_fills_neither_disk_nor_memory() {
        let dir = tempfile::tempdir().unwrap();
        let mut console = console(&dir);
        let (_, lazy) = console.attach();
        let piece = [b'x'; 64 << 10];
        for _ in 0..300 {
            console.take(&piece);
        }
        let size = |name| std::fs::metadata(dir.path().join(name)).unwrap().len();
        assert!(size("log") + size("log.1") <= 2 * (MOST + piece.len() as u64));
        assert_eq!(console.history.len(), HISTORY);
        assert!(console.listeners.is_empty(), "one who does not read is let go");
        assert_eq!(lazy.len(), BEHIND);
    }

    #[test]
    fn a_log_that_cannot_be_written_stops_nothing() {
        let mut console = Console::new("/no/such/log".into(), "/no/such/log.1".into());
        console.take(b"still here");
        assert_eq!(console.attach().0, b"still here");
    }
}
