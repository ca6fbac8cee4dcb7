//! Who has sent datagrams lately. Pure: the clock is given.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Clients, and what is kept for each of them.
#[derive(Debug)]
pub struct Table<T> {
    clients: HashMap<SocketAddr, (Instant, T)>,
    /// How long one may be silent.
    idle: Duration,
}

impl<T> Table<T> {
    pub fn new(idle: Duration) -> Table<T> {
        Table { clients: HashMap::new(), idle }
    }

    pub fn len(&self) -> usize {
        self.clients.len()
    }

    /// What is kept for a client that was just heard of.
    pub fn heard(&mut self, client: SocketAddr, now: Instant) -> Option<&T> {
        let (last, kept) = self.clients.get_mut(&client)?;
        *last = now;
        Some(kept)
    }

    pub fn insert(&mut self, client: SocketAddr, now: Instant, kept: T) {
        self.clients.insert(client, (now, kept));
    }

    /// Lets go the client that has been silent for longest.
    pub fn evict(&mut self) -> Option<T> {
        let oldest = self.clients.iter().min_by_key(|(_, (last, _))| *last).map(|(client, _)| *client)?;
        self.clients.remove(&oldest).map(|(_, kept)| kept)
    }

    /// Lets go a client that has been silent for too long, and otherwise tells when it will have been.
    pub fn expire(&mut self, client: SocketAddr, now: Instant) -> Option<Instant> {
        let end = self.clients.get(&client)?.0 + self.idle;
        if end <= now {
            self.clients.remove(&client);
            return None;
        }
        Some(end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_stay_while_they_speak_and_the_most_silent_goes_first() {
        let idle = Duration::from_secs(10);
        let mut table = Table::new(idle);
        let client = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        for port in 1..=3 {
            assert_eq!(table.heard(client(port), at(0)), None);
            table.insert(client(port), at(u64::from(port)), port);
        }
        assert_eq!(table.heard(client(1), at(5)), Some(&1));
        assert_eq!(table.expire(client(1), at(11)), Some(at(15)), "heard of meanwhile");
        assert_eq!(table.evict(), Some(2));
        assert_eq!(table.expire(client(2), at(11)), None);
        assert_eq!(table.expire(client(3), at(13)), None, "silent for too long");
        assert_eq!(table.len(), 1);
        assert_eq!((table.evict(), table.evict()), (Some(1), None));
    }
}
