//! Layers that are still on their way: the conversion reads what is here of them while the download goes on.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::digest::Digest;
use super::progress::TICK;
use super::registry::Stop;

/// The layers that a pull downloads, by their digests.
pub(crate) type Arrivals = BTreeMap<Digest, Arc<Arrival>>;

/// One layer on its way.
#[derive(Debug)]
pub(crate) struct Arrival {
    state: Mutex<State>,
    changed: Condvar,
    stop: Stop,
}

#[derive(Debug, Default)]
struct State {
    /// Where its bytes come to.
    file: Option<Arc<File>>,
    /// How many are here. It goes back where a download begins anew.
    bytes: u64,
    /// Where it is whole and verified.
    whole: Option<PathBuf>,
    /// It began anew: what was read before may not be what is there now.
    anew: bool,
}

impl Arrival {
    /// Nothing is here yet; `stop` ends every wait.
    pub fn new(stop: Stop) -> Arrival {
        Arrival { state: Mutex::default(), changed: Condvar::new(), stop }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its bytes come to `file`.
    pub fn begin(&self, file: File) {
        let mut state = self.state();
        state.anew |= state.file.is_some();
        state.bytes = 0;
        state.file = Some(Arc::new(file));
    }

    /// The first `bytes` are there.
    pub fn advance(&self, bytes: u64) {
        let mut state = self.state();
        state.anew |= bytes < state.bytes;
        state.bytes = bytes;
        drop(state);
        self.changed.notify_all();
    }

    /// It is whole, verified and at `path`.
    pub fn end(&self, path: PathBuf) {
        self.state().whole = Some(path);
        self.changed.notify_all();
    }

    /// Whether one who read it as it came may have read something else than what it became.
    pub fn began_anew(&self) -> bool {
        self.state().anew
    }
}

/// Reads a layer of `length` bytes as it arrives.
///
/// The bytes have not been verified: whoever reads them checks what they become.
pub(crate) struct Arriving {
    arrival: Arc<Arrival>,
    length: u64,
    at: u64,
    /// The whole layer.
    file: Option<Arc<File>>,
}

impl Arriving {
    pub fn new(arrival: Arc<Arrival>, length: u64) -> Arriving {
        Arriving { arrival, length, at: 0, file: None }
    }

    /// Waits until bytes are here; gives the file and how far it may be read.
    fn wait(&mut self) -> io::Result<(Arc<File>, u64)> {
        let mut state = self.arrival.state();
        loop {
            if let Some(path) = &state.whole {
                let file = match &self.file {
                    Some(file) => file,
                    None => self.file.insert(Arc::new(File::open(path)?)),
                };
                return Ok((file.clone(), self.length));
            }
            match &state.file {
                Some(file) if state.bytes > self.at => return Ok((file.clone(), state.bytes)),
                _ => {}
            }
            self.arrival.stop.check().map_err(io::Error::other)?;
            state = self.arrival.changed.wait_timeout(state, TICK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Read for Arriving {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at >= self.length || buffer.is_empty() {
            return Ok(0);
        }
        let (file, end) = self.wait()?;
        let want = usize::try_from(end - self.at).unwrap_or(usize::MAX).min(buffer.len());
        // A download that begins anew may cut the file at this moment; what is read then is found out by its digest.
        let got = file.read_at(buffer.get_mut(..want).unwrap_or_default(), self.at)?;
        if got == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the download was cut off"));
        }
        self.at += got as u64;
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn bytes_are_read_as_they_come_and_from_the_place_of_another_download() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer");
        let mut file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        let arrival = Arc::new(Arrival::new(Stop::default()));
        let mut reader = Arriving::new(arrival.clone(), 6);
        let mut late = Arriving::new(arrival.clone(), 6);
        std::thread::scope(|scope| {
            let read = scope.spawn(move || {
                let mut first = [0; 3];
                reader.read_exact(&mut first).unwrap();
                let mut rest = String::new();
                reader.read_to_string(&mut rest).unwrap();
                (first, rest)
            });
            arrival.begin(file.try_clone().unwrap());
            file.write_all(b"abcd").unwrap();
            arrival.advance(4);
            assert!(!arrival.began_anew());
            // A server that knows no ranges sends all again.
            arrival.advance(0);
            file.write_all(b"ef").unwrap();
            arrival.advance(6);
            arrival.end(path.clone());
            assert_eq!(read.join().unwrap(), (*b"abc", "def".to_string()));
            assert!(arrival.began_anew());
        });
        let other = Arrival::new(Stop::default());
        other.end(path.clone());
        late.arrival = Arc::new(other);
        let mut all = String::new();
        late.read_to_string(&mut all).unwrap();
        assert_eq!(all, "abcdef");
    }

    #[test]
    fn who_waits_for_what_never_comes_is_told_to_stop() {
        let stop = Stop::default();
        let mut reader = Arriving::new(Arc::new(Arrival::new(stop.clone())), 6);
        stop.set();
        let error = reader.read(&mut [0; 3]).unwrap_err();
        assert!(error.get_ref().is_some());
    }
}
