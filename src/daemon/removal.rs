//! TAPs on their way out. To remove an interface the kernel waits some 50 ms until nobody can use it any more, and for
//! many at once no longer than for one. So a TAP that nothing holds is only marked as removed: from then on it is
//! nobody's, and shortly after it goes, with all that were marked meanwhile.
//!
//! The mark is the TAP's alias, so what a run had no time to remove goes with the next start.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::io::Errno;

use super::filter::guests;
use super::network::Network;
use super::taps::{self, Alias};
use crate::failpoint;
use crate::net::link::{self, Link};
use crate::net::{Error, Socket, nft};

/// How long others may join the first that is marked.
const LINGER: Duration = Duration::from_millis(500);
/// How many go at once: requests wait meanwhile, some 150 ms.
const AT_ONCE: usize = 64;
/// Between two such crowds requests have their turn.
const TURN: Duration = Duration::from_millis(10);
/// From here on a number is sought for the group of interfaces that are removed together.
const GROUP: u32 = 0x7074_0000;

/// Which TAPs were marked, by number: the kernel tells whether one still is.
#[derive(Default)]
pub(super) struct Leaving {
    indices: Mutex<Vec<u32>>,
    more: Condvar,
}

impl Leaving {
    fn all(&self) -> MutexGuard<'_, Vec<u32>> {
        self.indices.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Network {
    /// Begins to remove marked TAPs, on a thread of its own.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn remove_marked(self: &Arc<Self>) -> Result<()> {
        let network = self.clone();
        let work = move || {
            loop {
                let all = network.leaving.all();
                drop(network.leaving.more.wait_while(all, |all| all.is_empty()));
                thread::sleep(LINGER);
                while !network.leaving.all().is_empty() {
                    if let Err(error) = network.clear(&mut network.lock()) {
                        log!("{error:#}; the next start tries it again");
                    }
                    thread::sleep(TURN);
                }
            }
        };
        thread::Builder::new().name("removal".into()).spawn(work).context("cannot start a thread").map(drop)
    }

    /// Marks a TAP as removed; the kernel has none of its guest's frames to pass, for nothing holds it.
    pub(super) fn leave(&self, socket: &mut Socket, link: &Link, alias: &Alias) -> Result<()> {
        link::set_alias(socket, link.index, &taps::removed(alias))?;
        self.leaving.all().push(link.index);
        self.leaving.more.notify_one();
        Ok(())
    }

    /// Removes all TAPs that are marked by now.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn clear_now(&self) -> Result<()> {
        let mut socket = self.lock();
        while !self.leaving.all().is_empty() {
            self.clear(&mut socket)?;
        }
        Ok(())
    }

    /// Removes some of them, if there are any.
    pub(super) fn clear(&self, socket: &mut Socket) -> Result<()> {
        let indices: Vec<u32> = {
            let mut all = self.leaving.all();
            // One that was taken into use again may have been marked again.
            all.sort_unstable();
            all.dedup();
            let count = all.len().min(AT_ONCE);
            all.drain(..count).collect()
        };
        let mut links = Vec::new();
        for index in indices {
            let link = link::get(socket, index).context("cannot look for an interface")?;
            links.extend(link.filter(|link| self.read_place().removed(link).is_some()));
        }
        if !links.is_empty() {
            failpoint::reach("daemon.taps.leaving");
        }
        self.remove_all(socket, &links)
    }

    /// Removes the TAPs that a former run marked.
    pub(super) fn clear_former(&self, socket: &mut Socket) -> Result<()> {
        let place = self.place();
        let mut links = link::list(socket).context("cannot list the interfaces")?;
        links.retain(|link| place.removed(link).is_some());
        self.remove_all(socket, &links)
    }

    /// Removes TAPs and forgets them; their filters go with the next look after the network.
    pub(super) fn remove_all(&self, socket: &mut Socket, links: &[Link]) -> Result<()> {
        // Before: the kernel tells that they go long before they have gone, and then the watch looks.
        let guests = guests(&self.place(), links);
        self.unguarded().extend(guests.iter().map(|guest| nft::chain_of(&self.settings.bridge, guest)));
        delete_all(socket, links)?;
        let mut place = self.place_mut();
        links.iter().filter_map(|link| link.master).for_each(|master| place.bridges.freed(master));
        Ok(())
    }
}

/// Removes interfaces, in about the time that one takes. One that is gone already is none to remove.
pub(super) fn delete_all(socket: &mut Socket, links: &[Link]) -> Result<()> {
    let left = |result: Result<(), Error>| match result {
        Err(error) if error.errno == Errno::NODEV => Ok(()),
        other => other,
    };
    if let [link] = links {
        return left(link::delete(socket, link.index)).with_context(|| format!("cannot remove the TAP {}", link.name));
    }
    if links.is_empty() {
        return Ok(());
    }
    let others = link::list(socket).context("cannot list the interfaces")?;
    // A number that nobody uses for anything.
    let group = (GROUP..).find(|group| others.iter().all(|link| link.group != *group)).unwrap_or(GROUP);
    for link in links {
        left(link::set_group(socket, link.index, group))
            .with_context(|| format!("cannot remove the TAP {}", link.name))?;
    }
    left(link::delete_group(socket, group)).context("cannot remove TAPs")
}
