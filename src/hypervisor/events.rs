//! What the hypervisor's event monitor has written (docs in cloud-hypervisor's event_monitor crate): JSON objects, one
//! after another.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;

/// More than this is not read, in bytes: a machine that lives for years reboots thousands of times in it.
const MOST: u64 = 4 << 20;

/// One event.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Event {
    /// `vmm`, `vm` or `guest`.
    pub source: String,
    pub event: String,
}

/// All events so far; what is still being written is left out, and a file that is not there has none.
pub fn read(path: &Path) -> Vec<Event> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MOST).read_to_end(&mut bytes));
    if read.is_err() {
        return Vec::new();
    }
    parse(&bytes)
}

/// The whole events at the beginning of these bytes.
pub fn parse(bytes: &[u8]) -> Vec<Event> {
    serde_json::Deserializer::from_slice(bytes).into_iter().map_while(Result::ok).collect()
}

/// Whether the machine has begun to run.
pub fn booted(events: &[Event]) -> bool {
    events.iter().any(|event| event.source == "vm" && matches!(event.event.as_str(), "booted" | "restored"))
}

/// Whether the guest's kernel has panicked since its last boot. One that will boot a crash kernel says so by another
/// event, and is left alone.
pub fn panicked(events: &[Event]) -> bool {
    let last = events.iter().rev().find(|event| matches!(event.event.as_str(), "panic" | "booted" | "rebooted"));
    last.is_some_and(|event| event.source == "guest" && event.event == "panic")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(text: &str) -> Vec<Event> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events");
        std::fs::write(&path, text).unwrap();
        read(&path)
    }

    #[test]
    fn whole_events_are_read_and_half_ones_wait() {
        let text =
            "{\"timestamp\":{\"secs\":0,\"nanos\":1},\"source\":\"vm\",\"event\":\"booting\",\"properties\":null}\n\n";
        let booted_text = text.replace("booting", "booted");
        assert!(!booted(&events(text)));
        let both = format!("{text}{booted_text}");
        assert!(booted(&events(&both)));
        assert_eq!(events(&both[..both.len() - 5]).len(), 1);
        assert_eq!(events("[]\n").len() + read(Path::new("/no/such")).len(), 0);
        let panic = text.replace("\"vm\"", "\"guest\"").replace("booting", "panic");
        assert!(panicked(&events(&format!("{booted_text}{panic}"))));
        assert!(!panicked(&events(&format!("{panic}{}", text.replace("booting", "rebooted")))));
    }
}
