//! Further bridges, since one has too few ports for thousands of TAPs: which there are and which TAP goes where, decided
//! from the list of interfaces.
//!
//! Each is joined to the first by a veth pair, so that all of them are one network, a star without loops. The first alone
//! has addresses; the host is at home there.

use std::collections::BTreeMap;

use super::bridge::Settings;
use crate::net::link::Link;
use crate::net::nft::Joint;
use crate::protocol::address::{MAX_INTERFACE_NAME, Mac, short_hash};

/// The most ports of a bridge (BR_MAX_PORTS, net/bridge/br_private.h; number 0 is none).
pub const MAX_PORTS: usize = 1023;
/// The most further bridges.
const MOST: u32 = 512;
/// How many letters of the first bridge's name one that must be shortened keeps.
const KEPT: usize = 5;

/// An interface's part in a further bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    Bridge,
    /// The first bridge's port.
    Near,
    /// The further bridge's port.
    Far,
}

const PIECES: [Piece; 3] = [Piece::Bridge, Piece::Near, Piece::Far];

impl Piece {
    /// Its MAC, by which one is known that puterd had no time to mark. No guest's begins so.
    pub fn mac(self, number: u32) -> Mac {
        let [_, _, high, low] = number.to_be_bytes();
        Mac([0x52, 0x54, 0x01, self as u8, high, low])
    }

    fn kind(self) -> &'static str {
        if self == Piece::Bridge { "bridge" } else { "veth" }
    }
}

/// The names of a further bridge's interfaces: `puter0-1`, `puter0-1a` on the first bridge and `puter0-1b` on itself.
pub fn names(first: &str, number: u32) -> Joint {
    let suffix = format!("-{number}");
    let stem = if first.len() + suffix.len() < MAX_INTERFACE_NAME {
        first.to_owned()
    } else {
        format!("{}{}", &first[..KEPT], short_hash(first))
    };
    let bridge = format!("{stem}{suffix}");
    Joint { near: format!("{bridge}a"), far: format!("{bridge}b"), bridge }
}

fn name_of(joint: &Joint, piece: Piece) -> &str {
    match piece {
        Piece::Bridge => &joint.bridge,
        Piece::Near => &joint.near,
        Piece::Far => &joint.far,
    }
}

fn mark(settings: &Settings) -> String {
    format!("puter-branch:{}:{}:", settings.uid, settings.bridge)
}

/// The alias of each interface of a further bridge.
pub fn alias(settings: &Settings, number: u32) -> String {
    format!("{}{number}", mark(settings))
}

/// What there is of a further bridge.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Branch {
    pub bridge: Option<Link>,
    pub near: Option<Link>,
    pub far: Option<Link>,
}

impl Branch {
    /// Whether all of it is there, and where it must be.
    pub fn is_right(&self, first: u32) -> bool {
        let Branch { bridge: Some(bridge), near: Some(near), far: Some(far) } = self else { return false };
        let marked = [bridge, near, far].iter().all(|link| link.alias.is_some() && link.up);
        marked && near.master == Some(first) && far.master == Some(bridge.index)
    }
}

/// Which part of which further bridge a link is.
pub fn piece(settings: &Settings, link: &Link) -> Option<(u32, Piece)> {
    let number = match link.alias.as_deref() {
        Some(alias) => alias.strip_prefix(&mark(settings))?.parse().ok()?,
        None => {
            let Mac([_, _, _, _, high, low]) = link.mac?;
            u32::from_be_bytes([0, 0, high, low])
        }
    };
    if !(1..=MOST).contains(&number) {
        return None;
    }
    let joint = names(&settings.bridge, number);
    let is = |piece: &Piece| {
        let named = link.name == name_of(&joint, *piece) && link.kind.as_deref() == Some(piece.kind());
        named && (link.alias.is_some() || link.mac == Some(piece.mac(number)))
    };
    PIECES.into_iter().find(is).map(|piece| (number, piece))
}

/// The further bridges, by number.
pub fn find(settings: &Settings, links: &[Link]) -> BTreeMap<u32, Branch> {
    let mut all: BTreeMap<u32, Branch> = BTreeMap::new();
    for link in links {
        let Some((number, piece)) = piece(settings, link) else { continue };
        let branch = all.entry(number).or_default();
        let place = match piece {
            Piece::Bridge => &mut branch.bridge,
            Piece::Near => &mut branch.near,
            Piece::Far => &mut branch.far,
        };
        *place = Some(link.clone());
    }
    all
}

/// The ports of the first bridge and of all further ones, but for those that join them.
pub fn ports<'a>(settings: &Settings, links: &'a [Link]) -> Vec<&'a Link> {
    let first = links.iter().find(|link| link.name == settings.bridge).map(|link| link.index);
    let further = find(settings, links).into_values().filter_map(|branch| Some(branch.bridge?.index));
    let bridges: Vec<u32> = first.into_iter().chain(further).collect();
    let is = |link: &&Link| link.master.is_some_and(|master| bridges.contains(&master));
    links.iter().filter(is).filter(|link| piece(settings, link).is_none()).collect()
}

/// A bridge of puterd's, as a TAP's home.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Home {
    /// 0 is the first.
    pub number: u32,
    pub index: u32,
    /// Its ports, but for those that join bridges.
    pub used: usize,
}

/// All of puterd's bridges, and where there is room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bridges {
    /// The first one, then the others by number.
    homes: Vec<Home>,
    /// Ports that a bridge may have.
    limit: usize,
    /// How many of the first one's are for further bridges.
    reserve: usize,
}

impl Bridges {
    /// What the list of interfaces shows; `first` is the first bridge's number.
    pub fn of(settings: &Settings, first: u32, links: &[Link]) -> Bridges {
        let further = find(settings, links).into_iter();
        let further = further.filter_map(|(number, branch)| Some((number, branch.bridge?.index)));
        let homes = [(0, first)].into_iter().chain(further).map(|(number, index)| Home { number, index, used: 0 });
        let mut homes: Vec<Home> = homes.collect();
        for port in ports(settings, links) {
            homes.iter_mut().filter(|home| port.master == Some(home.index)).for_each(|home| home.used += 1);
        }
        let limit = settings.bridge_ports;
        // As many as it takes to hold the subnet's last VM, but the first bridge is there for VMs as well.
        let needed = (settings.subnet.last_id() as usize).div_ceil(limit.saturating_sub(1).max(1));
        Bridges { homes, limit, reserve: needed.min(limit / 2).min(MOST as usize) }
    }

    /// The first bridge's number.
    pub fn first(&self) -> u32 {
        self.homes.first().map_or(0, |home| home.index)
    }

    /// Notes that the first bridge was made anew, and nothing is on it yet.
    pub fn renew_first(&mut self, index: u32) {
        self.homes.iter_mut().filter(|home| home.number == 0).for_each(|home| (home.index, home.used) = (index, 0));
    }

    /// Whether a port's master is one of them.
    pub fn holds(&self, master: Option<u32>) -> bool {
        master.is_some_and(|master| self.homes.iter().any(|home| home.index == master))
    }

    /// Numbers of the further ones.
    pub fn further(&self) -> impl Iterator<Item = u32> {
        self.homes.iter().map(|home| home.number).filter(|number| *number > 0)
    }

    /// All of them.
    pub fn homes(&self) -> &[Home] {
        &self.homes
    }

    fn room_of(&self, home: &Home) -> usize {
        self.limit.saturating_sub(if home.number == 0 { self.reserve } else { 1 })
    }

    /// The first one that has room for a TAP.
    pub fn room(&self) -> Option<u32> {
        self.homes.iter().find(|home| home.used < self.room_of(home)).map(|home| home.index)
    }

    /// Numbers for more of them; the kernel tells when the first has no port left for one.
    pub fn free_numbers(&self) -> impl Iterator<Item = u32> {
        (1..=MOST).filter(|number| self.further().all(|there| there != *number)).take(self.reserve)
    }

    /// Notes a further one, or that it was made anew.
    pub fn add(&mut self, number: u32, index: u32) {
        if self.homes.iter().any(|home| home.number == number && home.index == index) {
            return;
        }
        self.homes.retain(|home| home.number != number);
        self.homes.push(Home { number, index, used: 0 });
        self.homes.sort_by_key(|home| home.number);
    }

    /// Forgets a further one.
    pub fn remove(&mut self, number: u32) {
        self.homes.retain(|home| home.number != number || number == 0);
    }

    fn count(&mut self, index: u32, change: impl FnOnce(usize) -> usize) {
        if let Some(home) = self.homes.iter_mut().find(|home| home.index == index) {
            home.used = change(home.used);
        }
    }

    /// Notes that a bridge has one more port.
    pub fn taken(&mut self, index: u32) {
        self.count(index, |used| used + 1);
    }

    /// Notes that a bridge has one port less.
    pub fn freed(&mut self, index: u32) {
        self.count(index, |used| used.saturating_sub(1));
    }

    /// Notes that the kernel has no port left on a bridge, whoever has them.
    pub fn full(&mut self, index: u32) {
        let limit = self.limit;
        self.count(index, |used| used.max(limit));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::ipv6::Ipv6;

    fn settings(bridge: &str, subnet: &str, bridge_ports: usize) -> Settings {
        let subnet = subnet.parse().unwrap();
        Settings { bridge: bridge.to_owned(), subnet, uid: 1000, host_ports: Vec::new(), ipv6: Ipv6::Off, bridge_ports }
    }

    fn link(index: u32, name: &str, kind: &str, alias: Option<&str>, master: Option<u32>) -> Link {
        Link {
            index,
            name: name.to_owned(),
            kind: Some(kind.to_owned()),
            alias: alias.map(str::to_owned),
            master,
            up: true,
            ..Link::default()
        }
    }

    fn star() -> Vec<Link> {
        let alias = Some("puter-branch:1000:puter0:1");
        vec![
            link(5, "puter0", "bridge", Some("puter-bridge:1000"), None),
            link(6, "puter0-1", "bridge", alias, None),
            link(7, "puter0-1a", "veth", alias, Some(5)),
            link(8, "puter0-1b", "veth", alias, Some(6)),
            link(9, "pt-web", "tun", Some("puter:web:1:0"), Some(5)),
            link(10, "pt-db", "tun", Some("puter:db:2:0"), Some(6)),
        ]
    }

    #[test]
    fn names_fit_an_interface_whatever_the_first_ones() {
        assert_eq!(names("puter0", 1).near, "puter0-1a");
        let mut seen = std::collections::BTreeSet::new();
        for first in ["a", "puter0", "nine-char", "exactly-15-char", "exactly-15-chat", "twelve-chars"] {
            for number in 1..=MOST {
                let Joint { bridge, near, far } = names(first, number);
                for name in [bridge, near, far] {
                    assert!(name.len() <= MAX_INTERFACE_NAME, "{name}");
                    super::super::bridge::check_name(&name).unwrap();
                    assert!(seen.insert(name.clone()), "{name} twice");
                }
            }
        }
    }

    #[test]
    fn what_is_marked_or_half_made_is_found_and_nothing_else() {
        let settings = settings("puter0", "10.0.0.1/24", MAX_PORTS);
        let found = find(&settings, &star());
        assert!(found.len() == 1 && found[&1].is_right(5), "{found:?}");
        let links = star();
        let names: Vec<&str> = ports(&settings, &links).iter().map(|port| port.name.as_str()).collect();
        assert_eq!(names, ["pt-web", "pt-db"]);
        for (at, harm) in [(2, Some(77)), (3, None), (3, Some(5))] {
            let mut links = star();
            links[at].master = harm;
            assert!(!find(&settings, &links)[&1].is_right(5), "{links:?}");
        }
        let half = |mac| Link { mac: Some(mac), ..link(9, "puter0-2b", "veth", None, None) };
        assert_eq!(piece(&settings, &half(Piece::Far.mac(2))), Some((2, Piece::Far)));
        assert_eq!(piece(&settings, &half(Piece::Near.mac(2))), None);
        assert_eq!(piece(&settings, &half(Mac([2; 6]))), None, "a stranger of that name");
        for alias in [
            "puter-branch:1001:puter0:1",
            "puter-branch:1000:lab0:1",
            "puter-branch:1000:puter0:2",
            "puter-branch:1000:puter0:99999",
            "mine",
        ] {
            assert_eq!(piece(&settings, &link(6, "puter0-1", "bridge", Some(alias), None)), None, "{alias}");
        }
    }

    #[test]
    fn taps_fill_one_bridge_after_the_other() {
        // The subnet may need more than two further bridges of three TAPs each: half of the first is for them.
        let settings = settings("puter0", "10.0.0.1/24", 4);
        let mut bridges = Bridges::of(&settings, 5, &star()[..1]);
        let mut homes = Vec::new();
        loop {
            let Some(index) = bridges.room() else {
                let further = bridges.further().count();
                let number = bridges.free_numbers().next().filter(|_| further < 2);
                let Some(number) = number else { break };
                bridges.add(number, 100 + number);
                continue;
            };
            bridges.taken(index);
            homes.push(index);
        }
        assert_eq!(homes, [5, 5, 101, 101, 101, 102, 102, 102]);
        bridges.freed(5);
        assert_eq!(bridges.room(), Some(5));
        bridges.full(5);
        assert_eq!(bridges.room(), None, "strangers took it");
        assert!(bridges.holds(Some(102)) && !bridges.holds(Some(103)) && !bridges.holds(None));
    }

    #[test]
    fn a_wide_subnet_has_a_bridge_for_every_vm() {
        let room = |subnet: &str| {
            let bridges = Bridges::of(&settings("puter0", subnet, MAX_PORTS), 5, &star()[..1]);
            (MAX_PORTS - bridges.reserve, bridges.reserve * (MAX_PORTS - 1))
        };
        assert_eq!(room("10.0.0.1/24").0, MAX_PORTS - 1);
        let (first, further) = room("10.0.0.1/16");
        assert!(first > 950 && first + further > 65_524, "{first} {further}");
    }
}
