//! Snapshots of several machines that are of one instant.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::vm::cancel;

/// How often somebody who waits looks whether the user has had enough.
const TURN: Duration = Duration::from_millis(100);

/// What a machine's snapshot comes to, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// Everything is checked and prepared: from here on it is quick.
    Ready,
    /// The machine stands still.
    Paused,
    /// Its memory and its disk are written.
    Written,
}

/// The error of a part that another's failure ended.
#[derive(Debug)]
pub struct AnotherFailed;

impl std::fmt::Display for AnotherFailed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the snapshot of another member failed")
    }
}

impl std::error::Error for AnotherFailed {}

/// Where the snapshots of several machines wait for each other: all stand still before the first is written, and none
/// goes on before the last has been.
#[derive(Debug)]
pub struct Together {
    members: usize,
    arrived: Mutex<Arrived>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Arrived {
    at: [usize; 3],
    /// When the first and the last machine that ran came to stand still.
    still: Option<(Instant, Instant)>,
    failed: bool,
}

impl Together {
    pub fn new(members: usize) -> Together {
        Together { members, arrived: Mutex::default(), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Arrived> {
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all are at this point.
    ///
    /// # Errors
    /// When another cannot come, or the user cancels.
    pub fn arrive(&self, point: Point) -> Result<()> {
        let place = point as usize;
        let mut arrived = self.lock();
        arrived.at[place] += 1;
        self.changed.notify_all();
        while arrived.at[place] < self.members {
            if arrived.failed {
                bail!(AnotherFailed);
            }
            cancel::check()?;
            let waited = self.changed.wait_timeout(arrived, TURN);
            arrived = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// A machine that ran stands still since now.
    pub fn stands_still(&self, now: Instant) {
        let mut arrived = self.lock();
        let (first, last) = arrived.still.unwrap_or((now, now));
        arrived.still = Some((first.min(now), last.max(now)));
    }

    /// How far apart the first and the last machine came to stand still; `None` where none ran.
    pub fn spread(&self) -> Option<Duration> {
        self.lock().still.map(|(first, last)| last - first)
    }

    /// One of them will not come.
    fn fail(&self) {
        self.lock().failed = true;
        self.changed.notify_all();
    }

    /// Does one machine's part. Where it fails the others do not wait for it.
    pub fn part<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        struct Leave<'a>(&'a Together, bool);
        impl Drop for Leave<'_> {
            fn drop(&mut self) {
                if !self.1 {
                    self.0.fail();
                }
            }
        }
        let mut leave = Leave(self, false);
        let result = work();
        leave.1 = result.is_ok();
        result
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn nobody_passes_a_point_before_all_are_there() {
        let (together, before) = (Together::new(4), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for number in 0..4 {
                let (together, before) = (&together, &before);
                scope.spawn(move || {
                    for (round, point) in [Point::Ready, Point::Paused, Point::Written].into_iter().enumerate() {
                        std::thread::sleep(Duration::from_millis(number * 10));
                        before.fetch_add(1, Ordering::SeqCst);
                        together.part(|| together.arrive(point)).unwrap();
                        assert!(before.load(Ordering::SeqCst) >= (round + 1) * 4);
                    }
                });
            }
        });
    }

    #[test]
    fn where_one_fails_nobody_waits() {
        let together = Together::new(3);
        let results: Vec<Result<()>> = std::thread::scope(|scope| {
            let work = |number| {
                let together = &together;
                scope.spawn(move || {
                    together.part(|| {
                        together.arrive(Point::Ready)?;
                        if number == 1 {
                            bail!("no room");
                        }
                        together.arrive(Point::Paused)
                    })
                })
            };
            let threads: Vec<_> = (0..3).map(work).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let led_to: Vec<bool> =
            results.iter().map(|result| result.as_ref().unwrap_err().is::<AnotherFailed>()).collect();
        assert_eq!(led_to, [true, false, true]);
        let said: Vec<String> = results.into_iter().map(|result| result.unwrap_err().to_string()).collect();
        assert_eq!(said, ["the snapshot of another member failed", "no room", "the snapshot of another member failed"]);
    }

    #[test]
    fn the_spread_is_between_the_first_and_the_last_in_whatever_order_they_tell() {
        let (together, now) = (Together::new(3), Instant::now());
        assert_eq!(together.spread(), None);
        for milliseconds in [5, 2, 9] {
            together.stands_still(now + Duration::from_millis(milliseconds));
        }
        assert_eq!(together.spread(), Some(Duration::from_millis(7)));
    }

    #[test]
    fn a_panic_is_a_failure_as_well() {
        let together = Together::new(2);
        std::thread::scope(|scope| {
            let one = scope.spawn(|| together.part(|| together.arrive(Point::Paused)));
            let two = scope.spawn(|| together.part(|| -> Result<()> { panic!("of this test") }));
            assert!(two.join().is_err());
            assert!(one.join().unwrap().is_err());
        });
    }
}
