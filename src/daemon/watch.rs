//! Watches what the kernel tells of changes to the network, and has what is not right put right: at once the first
//! times, and with longer and longer pauses where somebody undoes it again and again.
//!
//! Whose change it was does not matter: each leads to one look, puterd's own to one that finds nothing wrong.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::time::{ClockId, clock_gettime};

use super::memory;
use super::upkeep::{Kept, Part};
use crate::net::events::Events;

/// Changes come in crowds: this long after the first one is looked.
const SETTLE: Duration = Duration::from_millis(20);
/// Looking takes at most about one part in this many of a processor's time.
const LOOK_SHARE: u32 = 10;
/// How long the next look waits at most because this one had to wait.
const LONGEST_WAIT: Duration = Duration::from_millis(500);
/// After so long without a change there will be none for some time.
const QUIET: Duration = Duration::from_secs(5);
/// How often in a row something is mended without a pause.
const AT_ONCE: u32 = 3;
/// The first pause, which doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Once nobody undid it for so long, all is forgotten.
const PEACE: Duration = Duration::from_secs(180);

/// How often a part had to be mended of late.
#[derive(Clone, Copy, Debug)]
struct Effort {
    count: u32,
    last: Instant,
}

impl Effort {
    fn pause(self) -> Duration {
        match self.count.checked_sub(AT_ONCE) {
            None => Duration::ZERO,
            Some(more) => FIRST_PAUSE.saturating_mul(1 << more.min(10)).min(LONGEST_PAUSE),
        }
    }

    fn is_contested(self) -> bool {
        self.count > AT_ONCE
    }
}

/// What was mended, and when.
#[derive(Debug, Default)]
struct Efforts(BTreeMap<Part, Effort>);

impl Efforts {
    /// When this part may be mended: now, or a later time.
    fn due(&self, part: Part, now: Instant) -> Instant {
        self.0.get(&part).map_or(now, |effort| (effort.last + effort.pause()).max(now))
    }

    /// Notes that it was mended, or that mending it failed; true when it has just become contested.
    fn mended(&mut self, part: Part, now: Instant) -> bool {
        let effort = self.0.entry(part).or_insert(Effort { count: 0, last: now });
        if now.saturating_duration_since(effort.last) > PEACE {
            effort.count = 0;
        }
        *effort = Effort { count: effort.count + 1, last: now };
        effort.count == AT_ONCE + 1
    }

    /// Forgets what has been at peace, and tells what has not.
    fn troubles(&mut self, now: Instant) -> Vec<String> {
        self.0.retain(|_, effort| now.saturating_duration_since(effort.last) <= PEACE);
        let contested = self.0.iter().filter(|(_, effort)| effort.is_contested());
        contested
            .map(|(part, effort)| {
                let pause = effort.pause().as_secs_f32();
                format!(
                    "something on this host undoes {part} again and again ({} times); puterd puts it back every \
                     {pause} s at most: find out what does it",
                    effort.count
                )
            })
            .collect()
    }

    /// When the first trouble will be forgotten.
    fn peace(&self) -> Option<Instant> {
        self.0.values().map(|effort| effort.last + PEACE).min()
    }
}

/// Starts to watch, on threads of its own.
///
/// # Errors
/// When the kernel does not tell of changes.
pub fn start(kept: Arc<dyn Kept + Send + Sync>) -> Result<()> {
    let (sender, changes) = sync_channel(1);
    listen("nftables", Events::nftables().context("cannot hear of changes to nftables")?, sender.clone())?;
    listen("interfaces", Events::network().context("cannot hear of changes to interfaces")?, sender)?;
    let work = move || attend(&*kept, &changes);
    thread::Builder::new().name("watch".into()).spawn(work).context("cannot start the watch's thread").map(drop)
}

fn listen(what: &'static str, events: Events, sender: SyncSender<()>) -> Result<()> {
    let work = move || {
        while let Ok(()) = events.wait() {
            // One that is not taken yet says the same.
            let _ = sender.try_send(());
        }
        log!("the kernel tells no longer of changes to {what}");
    };
    thread::Builder::new().name(what.into()).spawn(work).context("cannot start a thread").map(drop)
}

/// Looks at the beginning, after each crowd of changes and when something is due; returns when nobody can tell of
/// changes any more.
fn attend(kept: &dyn Kept, changes: &Receiver<()>) {
    let mut efforts = Efforts::default();
    loop {
        let (began, before) = (Instant::now(), worked());
        let next = look(kept, &mut efforts);
        // While it waits for the kernel, requests may wait for it.
        let waits = (began.elapsed() * LOOK_SHARE).min(LONGEST_WAIT);
        thread::sleep((worked().saturating_sub(before) * LOOK_SHARE).max(waits).max(SETTLE));
        // What came meanwhile is looked at now: it was not heard, so it is still in the channel.
        let wake = [next, efforts.peace()].into_iter().flatten().min();
        match hear(changes, wake) {
            Ok(()) => thread::sleep(SETTLE),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// Waits for a change, until a time. When it has been quiet for a while, what the last changes needed is given back.
fn hear(changes: &Receiver<()>, until: Option<Instant>) -> Result<(), RecvTimeoutError> {
    let left = || until.map(|at| at.saturating_duration_since(Instant::now()));
    match left() {
        Some(left) if left <= QUIET => return changes.recv_timeout(left),
        _ => match changes.recv_timeout(QUIET) {
            Err(RecvTimeoutError::Timeout) => memory::give_back(),
            heard => return heard,
        },
    }
    match left() {
        Some(left) => changes.recv_timeout(left),
        None => changes.recv().map_err(|_| RecvTimeoutError::Disconnected),
    }
}

/// The processor's time that this thread has had: of time that it waits, or that others have, nobody is deprived.
fn worked() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// Mends what is wrong and due, and returns when the rest is.
fn look(kept: &dyn Kept, efforts: &mut Efforts) -> Option<Instant> {
    let wrong = kept.examine().unwrap_or_else(|error| {
        log!("cannot look after the network: {error:#}");
        Vec::new()
    });
    let mut next = None;
    for part in wrong {
        let now = Instant::now();
        let due = efforts.due(part, now);
        if due > now {
            next = Some(next.map_or(due, |next: Instant| next.min(due)));
            continue;
        }
        match kept.mend(part) {
            Ok(false) => continue,
            Ok(true) => log!("{}", part.mended()),
            Err(error) => log!("{part}: {error:#}"),
        }
        if efforts.mended(part, Instant::now()) {
            log!("something undoes {part} again and again; from now on puterd waits longer each time");
        }
        // It may not have worked.
        let again = efforts.due(part, Instant::now());
        next = Some(next.map_or(again, |next: Instant| next.min(again)));
    }
    kept.complain(efforts.troubles(Instant::now()));
    next
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn whoever_fights_back_meets_longer_and_longer_pauses_until_there_is_peace() {
        let mut efforts = Efforts::default();
        let mut now = Instant::now();
        let mut pauses = Vec::new();
        for count in 1..=20 {
            let due = efforts.due(Part::Filter, now);
            pauses.push(due - now);
            now = due;
            assert_eq!(efforts.mended(Part::Filter, now), count == AT_ONCE + 1, "{count}");
        }
        assert!(pauses[..3].iter().all(Duration::is_zero), "{pauses:?}");
        assert_eq!(pauses[3], FIRST_PAUSE);
        assert!(pauses.is_sorted() && pauses.last() == Some(&LONGEST_PAUSE), "{pauses:?}");
        assert_eq!(efforts.due(Part::Taps, now), now, "the others are not held up");
        let troubles = efforts.troubles(now);
        assert!(troubles.len() == 1 && troubles[0].contains("puter's nftables rules"), "{troubles:?}");
        now += PEACE + Duration::from_secs(1);
        assert!(efforts.troubles(now).is_empty());
        assert_eq!(efforts.due(Part::Filter, now), now);
    }

    /// A network in which a part goes wrong as often as it is told to.
    struct Broken {
        times: Mutex<u32>,
        mended: Mutex<u32>,
        complaints: Mutex<Vec<String>>,
    }

    impl Kept for Broken {
        fn examine(&self) -> Result<Vec<Part>> {
            Ok(if *self.times.lock().unwrap() > 0 { vec![Part::Bridge] } else { Vec::new() })
        }

        fn mend(&self, _: Part) -> Result<bool> {
            *self.times.lock().unwrap() -= 1;
            *self.mended.lock().unwrap() += 1;
            Ok(true)
        }

        fn complain(&self, troubles: Vec<String>) {
            *self.complaints.lock().unwrap() = troubles;
        }
    }

    #[test]
    fn a_change_is_heard_at_once_and_an_end_too_however_long_it_was_quiet() {
        let (sender, changes) = sync_channel(1);
        let soon = |after| Some(Instant::now() + after);
        assert_eq!(hear(&changes, soon(Duration::ZERO)), Err(RecvTimeoutError::Timeout));
        sender.send(()).unwrap();
        assert_eq!(hear(&changes, None), Ok(()));
        let began = Instant::now();
        let late = thread::spawn(move || {
            thread::sleep(QUIET + Duration::from_millis(200));
            sender.send(()).unwrap();
        });
        assert_eq!(hear(&changes, soon(QUIET * 10)), Ok(()));
        assert!(began.elapsed() > QUIET, "after it was quiet");
        late.join().unwrap();
        assert_eq!(hear(&changes, soon(QUIET * 10)), Err(RecvTimeoutError::Disconnected));
    }

    #[test]
    fn what_is_right_is_left_alone_and_what_is_not_due_waits() {
        let network = Broken { times: Mutex::new(0), mended: Mutex::default(), complaints: Mutex::default() };
        let mut efforts = Efforts::default();
        assert_eq!(look(&network, &mut efforts), None);
        assert_eq!(*network.mended.lock().unwrap(), 0);
        *network.times.lock().unwrap() = 100;
        for _ in 0..10 {
            assert!(look(&network, &mut efforts).is_some());
        }
        assert_eq!(*network.mended.lock().unwrap(), AT_ONCE, "and then it waits");
        efforts.0.get_mut(&Part::Bridge).unwrap().count += 1;
        look(&network, &mut efforts);
        assert!(network.complaints.lock().unwrap()[0].contains("the bridge's state or address"));
    }
}
