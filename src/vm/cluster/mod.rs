//! Clusters: named groups of VMs as one thing. A cluster is a record of its roles in the home; its members are VMs like
//! any other, which know their place in it, and the members that there are follow from the record.

mod delete;
mod file;
mod inventory;
mod model;
mod run;
mod snapshot;
mod store;
mod wait;

pub use delete::{delete, scale};
pub use file::read;
pub use inventory::{Format, inventory};
pub use model::{Cluster, MOST_MEMBERS, Member, Role, SCHEMA, Target};
pub use run::{Began, Outputs, create, exec, start, stop};
pub use snapshot::{Cut, CutName, TakenCut, clone, cuts, restore, snapshot};
use store::whole;
pub use store::{All, existing, load_all, machine};
pub use wait::{Sign, wait};

use anyhow::{Result, anyhow};

use super::{Hint, cancel};

/// Members that are started or stopped at the same time: each takes a processor of the host for a while.
const AT_ONCE: usize = 16;
/// Members that are asked something at the same time.
const ASKED_AT_ONCE: usize = 64;

/// What came of one member.
#[derive(Debug)]
pub struct Outcome<T> {
    pub member: Member,
    pub result: Result<T>,
}

/// Does `work` for each item, so many at the same time; the results are in the items' order.
pub fn side_by_side<I: Sync, T: Send>(items: &[I], most: usize, work: impl Fn(&I) -> T + Sync) -> Vec<Option<T>> {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};
    let next = AtomicUsize::new(0);
    let done: Vec<Mutex<Option<T>>> = items.iter().map(|_| Mutex::new(None)).collect();
    let turn = || {
        while let Some((item, place)) = {
            let at = next.fetch_add(1, Ordering::Relaxed);
            items.get(at).zip(done.get(at))
        } {
            let result = work(item);
            if let Ok(mut place) = place.lock() {
                *place = Some(result);
            }
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..most.min(items.len())).map(|_| scope.spawn(turn)).collect();
        // Of one that panicked there is no result.
        threads.into_iter().for_each(|thread| drop(thread.join()));
    });
    done.into_iter().map(|place| place.into_inner().unwrap_or_default()).collect()
}

/// Does `work` for each member, so many at the same time, and tells each result as it comes.
fn for_each<T: Send>(
    members: &[Member],
    most: usize,
    work: impl Fn(&Member) -> Result<T> + Sync,
    tell: &(dyn Fn(&Member, &Result<T>) + Sync),
) -> Vec<Outcome<T>> {
    let results = side_by_side(members, most, |member| {
        let result = cancel::check().map_err(anyhow::Error::from).and_then(|()| work(member));
        tell(member, &result);
        result
    });
    let outcomes = members.iter().cloned().zip(results);
    outcomes
        .map(|(member, result)| Outcome {
            member,
            result: result.unwrap_or_else(|| Err(anyhow!("the thread of a member panicked"))),
        })
        .collect()
}

/// An error with its way out.
fn wrong(what: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
    Err::<(), _>(anyhow!(what.into())).hint(hint).expect_err("it is an error")
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    #[test]
    fn no_more_than_so_many_are_at_work_and_each_result_has_its_place() {
        let (now, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let items: Vec<usize> = (0..40).collect();
        let results = side_by_side(&items, 4, |item| {
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(2));
            now.fetch_sub(1, Ordering::SeqCst);
            item * 2
        });
        assert_eq!(results, items.iter().map(|item| Some(item * 2)).collect::<Vec<_>>());
        assert_eq!(most.load(Ordering::SeqCst), 4, "as many as may be, and no more");
        assert!(side_by_side(&[] as &[u8], 4, |item| *item).is_empty());
    }
}
