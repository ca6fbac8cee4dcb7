//! Further bridges in the kernel: made when there is no room left, put right, and removed when nothing is on them. Each
//! step may be the last before a kill; what is there tells the next start how far it came.

use anyhow::{Context, Result, bail};
use rustix::io::Errno;

use super::branch::{self, Branch, Piece};
use super::filter::guests;
use super::network::Network;
use super::network6;
use crate::failpoint;
use crate::net::link::{self, Link};
use crate::net::nft::{self, Chain, Joint};
use crate::net::{Error, Socket};
use crate::protocol::daemon::FurtherBridge;

impl Network {
    /// Makes a TAP a port of a bridge that has room, and a further bridge where none has.
    pub(super) fn attach(&self, socket: &mut Socket, tap: &Link) -> Result<()> {
        let mut looked = false;
        loop {
            let room = self.read_place().bridges.room();
            let Some(bridge) = room else {
                // TAPs that are about to go may make room, and those that others removed may have left some.
                if looked {
                    self.grow(socket)?;
                } else {
                    self.clear(socket)?;
                    self.refresh(socket)?;
                    looked = true;
                }
                continue;
            };
            match link::set_master(socket, tap.index, bridge) {
                Ok(()) => {
                    self.place_mut().bridges.taken(bridge);
                    return Ok(());
                }
                // Ports that are not puterd's took the room.
                Err(error) if error.errno == Errno::XFULL => self.place_mut().bridges.full(bridge),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Makes a further bridge.
    fn grow(&self, socket: &mut Socket) -> Result<()> {
        let numbers: Vec<u32> = self.read_place().bridges.free_numbers().collect();
        let links = link::list(socket).context("cannot list the interfaces")?;
        let found = branch::find(&self.settings, &links);
        for number in numbers {
            let Joint { bridge, near, far } = branch::names(&self.settings.bridge, number);
            // An interface of somebody else may have a name.
            let taken = |link: &&Link| [&bridge, &near, &far].contains(&&link.name);
            if links.iter().filter(taken).any(|link| branch::piece(&self.settings, link).is_none()) {
                continue;
            }
            let made = self.complete(socket, number, found.get(&number).cloned().unwrap_or_default());
            if made.is_err() {
                let links = link::list(socket).context("cannot list the interfaces")?;
                let half = branch::find(&self.settings, &links).remove(&number).unwrap_or_default();
                self.discard(socket, number, &half)?;
                let _ = self.tell(socket);
                return made.with_context(|| format!("cannot make the further bridge {bridge}"));
            }
            log!("made the further bridge {bridge}: the others have no port left for a VM");
            return Ok(());
        }
        bail!(Error { errno: Errno::XFULL, detail: None })
    }

    /// Makes what a further bridge lacks, touching nothing that is right. It is closed to the host and known to the rules
    /// before its first frame.
    pub(super) fn complete(&self, socket: &mut Socket, number: u32, found: Branch) -> Result<()> {
        let joint = branch::names(&self.settings.bridge, number);
        let bridge = match found.bridge {
            Some(bridge) => bridge,
            None => {
                link::create_bridge(socket, &joint.bridge, Piece::Bridge.mac(number))?;
                failpoint::reach("daemon.branch.bridge");
                made(socket, &joint.bridge)?
            }
        };
        self.mark(socket, &bridge, number)?;
        self.place_mut().bridges.add(number, bridge.index);
        nft::seal(&self.settings.bridge, &joint)
            .with_context(|| format!("cannot close {} to the host in nftables", joint.bridge))?;
        failpoint::reach("daemon.branch.sealed");
        let (near, far) = match (found.near, found.far) {
            (Some(near), Some(far)) => (near, far),
            (near, far) => {
                // One whose other end is lost.
                for end in near.into_iter().chain(far) {
                    delete(socket, &end)?;
                }
                let ends = [(&joint.near, Piece::Near), (&joint.far, Piece::Far)];
                link::create_pair(socket, ends.map(|(name, piece)| (name.as_str(), piece.mac(number))))?;
                failpoint::reach("daemon.branch.pair");
                (made(socket, &joint.near)?, made(socket, &joint.far)?)
            }
        };
        self.mark(socket, &near, number)?;
        self.mark(socket, &far, number)?;
        self.tell(socket)?;
        failpoint::reach("daemon.branch.marked");
        for (end, master) in [(&far, bridge.index), (&near, self.read_place().bridges.first())] {
            if end.master != Some(master) {
                link::set_master(socket, end.index, master)?;
            }
        }
        failpoint::reach("daemon.branch.joined");
        for link in [&bridge, &far, &near].into_iter().filter(|link| !link.up) {
            link::set_up(socket, link.index)?;
        }
        Ok(())
    }

    /// Marks a part of a further bridge as puterd's, which has no IPv6 of the host.
    fn mark(&self, socket: &mut Socket, link: &Link, number: u32) -> Result<()> {
        network6::silence(&link.name);
        if link.alias.is_none() {
            link::set_alias(socket, link.index, &branch::alias(&self.settings, number))?;
        }
        Ok(())
    }

    /// Tells nftables which further bridges there are.
    fn tell(&self, socket: &mut Socket) -> Result<()> {
        let links = link::list(socket).context("cannot list the interfaces")?;
        self.install(&self.policy(&links), &guests(&self.place(), &links))
    }

    /// Removes a further bridge.
    pub(super) fn discard(&self, socket: &mut Socket, number: u32, branch: &Branch) -> Result<()> {
        let joint = branch::names(&self.settings.bridge, number);
        for link in [&branch.near, &branch.far, &branch.bridge].into_iter().flatten() {
            delete(socket, link).with_context(|| format!("cannot remove {}", link.name))?;
        }
        self.place_mut().bridges.remove(number);
        let table = nft::table_name(&self.settings.bridge);
        self.unguarded().push(Chain { table, name: joint.bridge });
        Ok(())
    }

    /// Removes further bridges that nothing is on, and returns what interfaces there are then.
    pub(super) fn drop_empty(&self, socket: &mut Socket) -> Result<Vec<Link>> {
        let links = link::list(socket).context("cannot list the interfaces")?;
        let ports = branch::ports(&self.settings, &links);
        let mut dropped = false;
        for (number, branch) in branch::find(&self.settings, &links) {
            let index = branch.bridge.as_ref().map(|bridge| bridge.index);
            if !ports.iter().any(|port| port.master == index) {
                self.discard(socket, number, &branch)?;
                log!(
                    "removed the further bridge {}: it has no VM",
                    branch::names(&self.settings.bridge, number).bridge
                );
                dropped = true;
            }
        }
        if dropped { link::list(socket).context("cannot list the interfaces") } else { Ok(links) }
    }

    /// Makes the further bridges that there are complete.
    pub(super) fn complete_all(&self, socket: &mut Socket) -> Result<()> {
        let links = link::list(socket).context("cannot list the interfaces")?;
        let (first, mut found) = (self.read_place().bridges.first(), branch::find(&self.settings, &links));
        // One that is known and gone has VMs that wait for it.
        for number in self.place().bridges.further() {
            found.entry(number).or_default();
        }
        for (number, branch) in found.into_iter().filter(|(_, branch)| !branch.is_right(first)) {
            let name = branch::names(&self.settings.bridge, number).bridge;
            self.complete(socket, number, branch).with_context(|| format!("cannot put {name} right"))?;
        }
        Ok(())
    }

    /// Whether a further bridge is not as it must be.
    pub(super) fn is_torn(&self, links: &[Link]) -> bool {
        let (place, found) = (self.place(), branch::find(&self.settings, links));
        place.bridges.further().any(|number| found.get(&number).is_none_or(|b| !b.is_right(place.bridges.first())))
    }

    /// The further bridges, as the API shows them.
    pub(super) fn further(&self) -> Vec<FurtherBridge> {
        let homes = self.place().bridges;
        let further = homes.homes().iter().filter(|home| home.number > 0);
        let show = |home: &branch::Home| FurtherBridge {
            name: branch::names(&self.settings.bridge, home.number).bridge,
            ports: home.used,
        };
        further.map(show).collect()
    }
}

/// Looks at an interface that was made just now.
fn made(socket: &mut Socket, name: &str) -> Result<Link> {
    link::find(socket, name)?.with_context(|| format!("{name} vanished while it was made"))
}

/// Removes an interface; one end of a veth takes the other along.
fn delete(socket: &mut Socket, link: &Link) -> Result<(), Error> {
    match link::delete(socket, link.index) {
        Err(error) if error.errno != Errno::NODEV => Err(error),
        _ => Ok(()),
    }
}
