//! The ports that a VM publishes: sockets of the host, and what carries bytes between them and the guest.
//!
//! All of it runs on the monitor's one thread. What is open has limits, and nothing waits for one guest or client alone.

mod listen;
mod table;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;

use std::cell::{Cell, RefCell};
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use smol::lock::Semaphore;
use smol::{LocalExecutor, Task};

use listen::{Listener, open};
pub use listen::{check_privilege, probe};

use crate::vm::port::Forward;

/// Descriptors that a monitor asks for, and those that stay for other uses than connections.
const DESCRIPTORS: u64 = 4096;
const RESERVE: u64 = 256;
/// The longest datagram, in bytes.
const DATAGRAM: usize = 64 << 10;

/// What a VM's forwards may take, all together.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub connections: usize,
    /// Clients of UDP.
    pub associations: usize,
    /// How long the guest may take to accept a connection.
    pub connect: Duration,
    /// How long a client of UDP may be silent.
    pub idle: Duration,
}

impl Limits {
    /// As many as the process may have descriptors for.
    pub fn of_process() -> Limits {
        let limit = getrlimit(Resource::Nofile);
        let most = limit.maximum.unwrap_or(DESCRIPTORS).min(DESCRIPTORS);
        let current = limit.current.unwrap_or(DESCRIPTORS);
        if current < most {
            let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(most), maximum: limit.maximum });
        }
        let room = getrlimit(Resource::Nofile).current.unwrap_or(DESCRIPTORS).saturating_sub(RESERVE) as usize;
        Limits {
            // Two descriptors each, and one.
            connections: (room * 2 / 5).clamp(8, 1024),
            associations: (room / 5).clamp(8, 512),
            connect: Duration::from_secs(10),
            idle: Duration::from_secs(90),
        }
    }
}

/// What all forwards share.
struct Room {
    limits: Limits,
    connections: Arc<Semaphore>,
    associations: Arc<Semaphore>,
    datagram: RefCell<Vec<u8>>,
}

impl Room {
    /// What one forward may take of the connections: a quarter is left to the others.
    fn turns_of_one(&self) -> Arc<Semaphore> {
        Arc::new(Semaphore::new((self.limits.connections * 3 / 4).max(1)))
    }
}

/// A forward as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    pub forward: Forward,
    /// Why it does not listen; absent where it does.
    pub why: Option<String>,
    /// Connections, or clients of UDP, that are open.
    pub open: usize,
}

/// A forward for which a socket was opened, or why there is none.
pub struct Opened {
    forward: Forward,
    listener: Result<Listener, String>,
}

impl Opened {
    pub fn forward(&self) -> Forward {
        self.forward
    }
}

/// Opens the sockets of these forwards; `former` ones are used again.
///
/// # Errors
/// When one cannot be had and `all` are wanted; none of the new ones is left then.
fn open_all(forwards: &[Forward], all: bool, former: &[Entry]) -> Result<Vec<Opened>> {
    let one = |forward: &Forward| {
        let same = |entry: &&Entry| {
            (entry.forward.endpoint(), entry.forward.protocol) == (forward.endpoint(), forward.protocol)
        };
        if let Some(Running { listener, .. }) = former.iter().find(same).and_then(|entry| entry.state.as_ref().ok()) {
            return Ok(Opened { forward: *forward, listener: Ok(listener.clone()) });
        }
        match open(forward) {
            Ok((forward, listener)) => Ok(Opened { forward, listener: Ok(listener) }),
            Err(error) if all => Err(error),
            Err(error) => Ok(Opened { forward: *forward, listener: Err(error.to_string()) }),
        }
    };
    forwards.iter().map(one).collect()
}

/// Opens the sockets of a VM that is about to run.
///
/// # Errors
/// When one cannot be had and `all` are wanted.
pub fn prepare(forwards: &[Forward], all: bool) -> Result<Vec<Opened>> {
    open_all(forwards, all, &[])
}

struct Entry {
    forward: Forward,
    state: Result<Running, String>,
}

struct Running {
    listener: Listener,
    task: Task<()>,
    open: Rc<Cell<usize>>,
}

/// A running VM's forwards.
pub struct Forwards {
    executor: Rc<LocalExecutor<'static>>,
    guest: Ipv4Addr,
    room: Rc<Room>,
    entries: RefCell<Vec<Entry>>,
}

impl Forwards {
    /// Begins to carry what comes to these sockets.
    pub fn new(
        executor: Rc<LocalExecutor<'static>>,
        guest: Ipv4Addr,
        limits: Limits,
        opened: Vec<Opened>,
    ) -> Rc<Forwards> {
        let room = Room {
            limits,
            connections: Arc::new(Semaphore::new(limits.connections)),
            associations: Arc::new(Semaphore::new(limits.associations)),
            datagram: RefCell::new(vec![0; DATAGRAM]),
        };
        let forwards = Forwards { executor, guest, room: Rc::new(room), entries: RefCell::default() };
        let entries = opened.into_iter().map(|opened| forwards.run(opened)).collect();
        forwards.entries.replace(entries);
        Rc::new(forwards)
    }

    fn run(&self, opened: Opened) -> Entry {
        let start = |listener: Listener| {
            let open = Rc::new(Cell::new(0));
            let guest = SocketAddr::from((self.guest, opened.forward.guest_port));
            let (room, count) = (self.room.clone(), open.clone());
            let task = match listener.clone() {
                Listener::Tcp(socket) => self.executor.spawn(tcp::serve(socket, guest, room, count)),
                Listener::Udp(socket) => self.executor.spawn(udp::serve(socket, guest, room, count)),
            };
            Running { listener, task, open }
        };
        Entry { forward: opened.forward, state: opened.listener.map(start) }
    }

    /// How each of them is.
    pub fn shown(&self) -> Vec<Published> {
        let entries = self.entries.borrow();
        let shown = entries.iter().map(|entry| match &entry.state {
            Ok(running) => Published { forward: entry.forward, why: None, open: running.open.get() },
            Err(why) => Published { forward: entry.forward, why: Some(why.clone()), open: 0 },
        });
        shown.collect()
    }

    /// Publishes these and no others. What stays as it was keeps its connections; those of the rest end.
    ///
    /// # Errors
    /// When one cannot listen and `all` are wanted: then everything is as before.
    pub async fn set(&self, wanted: &[Forward], all: bool) -> Result<()> {
        let opened = open_all(wanted, all, &self.entries.borrow())?;
        let (kept, ended): (Vec<Entry>, Vec<Entry>) = self
            .entries
            .take()
            .into_iter()
            .partition(|entry| entry.state.is_ok() && opened.iter().any(|opened| opened.forward == entry.forward));
        // First, so that two never take from one socket.
        end(ended).await;
        let mut kept = kept;
        let entries = opened.into_iter().map(|opened| match kept.iter().position(|e| e.forward == opened.forward) {
            Some(at) => kept.swap_remove(at),
            None => self.run(opened),
        });
        let entries = entries.collect();
        self.entries.replace(entries);
        Ok(())
    }

    /// Ends all of them; when this returns nothing listens any more.
    pub async fn close(&self) {
        end(self.entries.take()).await;
    }
}

async fn end(entries: Vec<Entry>) {
    for running in entries.into_iter().filter_map(|entry| entry.state.ok()) {
        running.task.cancel().await;
    }
}
