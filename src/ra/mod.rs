//! Router advertisements (RFC 4861, 4862, 8106), by which guests make their IPv6 addresses: what is said, and when. The
//! socket is in `server.rs`.

mod message;
pub mod server;

use std::collections::HashMap;
use std::net::Ipv6Addr;
use std::time::{Duration, Instant};

pub use message::{Advertisement, is_solicitation};

/// Between two messages to all (RFC 4861, section 10: MIN_DELAY_BETWEEN_RAS), and between two to the same guest.
const MIN_DELAY: Duration = Duration::from_secs(3);
/// An answer to all waits up to so long, in case more ask (MAX_RA_DELAY_TIME).
const ANSWER_DELAY: Duration = Duration::from_millis(500);
/// Messages nobody asked for come at random within these (MinRtrAdvInterval, MaxRtrAdvInterval).
const MIN_INTERVAL: Duration = Duration::from_secs(200);
const MAX_INTERVAL: Duration = Duration::from_secs(600);
/// The first of them, and those after a change, come sooner (MAX_INITIAL_RTR_ADVERTISEMENTS, ..._INTERVAL).
const FIRST: u32 = 3;
const FIRST_INTERVAL: Duration = Duration::from_secs(16);
/// How many guests that were answered of late are remembered.
const MOST_REMEMBERED: usize = 1024;

/// What is said to whom and when: events and the clock go in, messages come out.
#[derive(Debug)]
pub struct Advertiser {
    content: Advertisement,
    /// When all are told again.
    due: Instant,
    /// When all were told.
    told: Option<Instant>,
    /// How many of the first messages are left.
    first: u32,
    answered: HashMap<Ipv6Addr, Instant>,
}

impl Advertiser {
    /// Begins: all are told at once.
    pub fn new(content: Advertisement, now: Instant) -> Advertiser {
        Advertiser { content, due: now, told: None, first: FIRST, answered: HashMap::new() }
    }

    /// What is said.
    pub fn message(&self) -> Vec<u8> {
        self.content.encode()
    }

    /// The way to the outside came or went: all are told soon, and some times more.
    pub fn set_router(&mut self, router: bool, now: Instant) {
        if self.content.router != router {
            self.content.router = router;
            self.first = FIRST;
            self.due = self.due.min(self.earliest(now));
        }
    }

    /// When [`Advertiser::tick`] has something to say.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Whether all are to be told now; `random` is any number.
    pub fn tick(&mut self, now: Instant, random: u32) -> bool {
        if now < self.due {
            return false;
        }
        let pause = match self.first.checked_sub(1) {
            Some(left) => {
                self.first = left;
                FIRST_INTERVAL
            }
            None => MIN_INTERVAL + share(MAX_INTERVAL - MIN_INTERVAL, random),
        };
        self.told = Some(now);
        self.due = now + pause;
        true
    }

    /// Takes a message that came from here; returns whom to answer at once. Who has no address is answered with all
    /// others, and so is one too many; `random` is any number.
    pub fn receive(&mut self, bytes: &[u8], from: Ipv6Addr, now: Instant, random: u32) -> Option<Ipv6Addr> {
        if !is_solicitation(bytes, from) {
            return None;
        }
        if from.is_unicast_link_local() {
            if self.answered.len() >= MOST_REMEMBERED {
                self.answered.retain(|_, when| now.saturating_duration_since(*when) < MIN_DELAY);
            }
            match self.answered.get(&from) {
                Some(when) if now.saturating_duration_since(*when) < MIN_DELAY => return None,
                None if self.answered.len() >= MOST_REMEMBERED => {}
                _ => {
                    self.answered.insert(from, now);
                    return Some(from);
                }
            }
        }
        self.due = self.due.min(self.earliest(now + share(ANSWER_DELAY, random)));
        None
    }

    /// Not before this may all be told again.
    fn earliest(&self, wanted: Instant) -> Instant {
        self.told.map_or(wanted, |told| wanted.max(told + MIN_DELAY))
    }
}

/// A part of a time, by a random number.
fn share(time: Duration, random: u32) -> Duration {
    time.mul_f64(f64::from(random) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::address::Mac;

    const ASK: [u8; 8] = [133, 0, 0, 0, 0, 0, 0, 0];
    const HALF: u32 = u32::MAX / 2;

    fn advertiser(now: Instant) -> Advertiser {
        let content = Advertisement {
            network: "fd00::/64".parse().unwrap(),
            mac: Mac([0x52, 0x54, 0, 0, 0, 1]),
            router: false,
            dns: true,
        };
        Advertiser::new(content, now)
    }

    fn guest(number: u16) -> Ipv6Addr {
        Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 1, number)
    }

    #[test]
    fn all_are_told_often_at_first_and_seldom_later() {
        let start = Instant::now();
        let mut advertiser = advertiser(start);
        let mut pauses = Vec::new();
        for _ in 0..6 {
            let now = advertiser.due();
            assert!(!advertiser.tick(now - Duration::from_millis(1), HALF) || now == start);
            assert!(advertiser.tick(now, HALF));
            pauses.push((advertiser.due() - now).as_secs());
        }
        assert_eq!(pauses, [16, 16, 16, 399, 399, 399]);
    }

    #[test]
    fn a_change_is_told_soon_but_not_at_every_turn() {
        let start = Instant::now();
        let mut advertiser = advertiser(start);
        assert!(advertiser.tick(start, HALF));
        let lifetime = |advertiser: &Advertiser| advertiser.message()[6..8].to_vec();
        assert_eq!(lifetime(&advertiser), [0, 0], "nobody's router");
        for (after, router) in [(1, true), (2, false), (2, true)] {
            advertiser.set_router(router, start + Duration::from_secs(after));
        }
        assert_eq!(advertiser.due(), start + MIN_DELAY);
        assert_eq!(lifetime(&advertiser), 1800u16.to_be_bytes());
        assert!(advertiser.tick(advertiser.due(), HALF));
        advertiser.set_router(true, start + Duration::from_secs(10));
        assert!(advertiser.due() > start + Duration::from_secs(15), "nothing has changed");
    }

    #[test]
    fn who_asks_is_answered_and_who_floods_is_not() {
        let start = Instant::now();
        let mut advertiser = advertiser(start);
        assert!(advertiser.tick(start, HALF));
        let mut ask = |from, millis: u64| advertiser.receive(&ASK, from, start + Duration::from_millis(millis), HALF);
        assert_eq!(ask(guest(1), 0), Some(guest(1)));
        assert_eq!((ask(guest(1), 1), ask(guest(1), 2999)), (None, None));
        assert_eq!((ask(guest(2), 2), ask(guest(1), 3000)), (Some(guest(2)), Some(guest(1))));
        // A flood of addresses is answered to all, within the limit for that.
        let answers = (0..5000).filter(|number| ask(guest(*number), 3001).is_some()).count();
        assert!(answers <= MOST_REMEMBERED, "{answers}");
        assert_eq!(advertiser.answered.len(), MOST_REMEMBERED);
        let told = start + Duration::from_secs(10);
        assert!(advertiser.tick(told.max(advertiser.due()), HALF));
        let mut messages = 0;
        for millis in 0..30_000 {
            let now = told + Duration::from_millis(millis);
            assert_eq!(advertiser.receive(&ASK, Ipv6Addr::UNSPECIFIED, now, HALF), None);
            messages += u32::from(advertiser.tick(now, HALF));
        }
        assert!((9..=10).contains(&messages), "{messages} in 30 s");
    }
}
