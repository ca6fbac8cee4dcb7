//! The event monitor: one JSON object after another, as cloud-hypervisor's event_monitor writes them.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

/// Writes events to a file; without one it does nothing.
#[derive(Debug)]
pub struct Events {
    file: Option<Mutex<File>>,
    began: Instant,
}

#[derive(Serialize)]
struct Event<'a> {
    /// Since the emulator started.
    timestamp: Duration,
    source: &'a str,
    event: &'a str,
    properties: Option<()>,
}

impl Events {
    /// # Errors
    /// When the file cannot be made.
    pub fn open(path: Option<&Path>) -> Result<Events> {
        let open = |path: &Path| {
            let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path);
            file.map(Mutex::new).with_context(|| format!("cannot write {}", path.display()))
        };
        Ok(Events { file: path.map(open).transpose()?, began: Instant::now() })
    }

    /// Writes an event. A disk that is full ends no machine.
    pub fn write(&self, source: &str, event: &str) {
        let Some(Ok(mut file)) = self.file.as_ref().map(Mutex::lock) else { return };
        let event = Event { timestamp: self.began.elapsed(), source, event, properties: None };
        if let Ok(text) = serde_json::to_string_pretty(&event) {
            let _ = write!(file, "{text}\n\n");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_read_back_as_a_stream_of_objects() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events");
        let events = Events::open(Some(&path)).unwrap();
        events.write("vm", "booting");
        events.write("vm", "booted");
        let text = std::fs::read_to_string(&path).unwrap();
        let all: Vec<serde_json::Value> =
            serde_json::Deserializer::from_str(&text).into_iter().collect::<Result<_, _>>().unwrap();
        assert_eq!(all.iter().map(|e| e["event"].as_str().unwrap()).collect::<Vec<_>>(), ["booting", "booted"]);
        assert!(all[0]["timestamp"]["secs"].is_u64(), "{text}");
    }
}
