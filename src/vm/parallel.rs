//! Work on several things at the same time.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Does `work` for each item, so many at the same time; the results are in the items' order.
pub fn side_by_side<I: Sync, T: Send>(items: &[I], most: usize, work: impl Fn(&I) -> T + Sync) -> Vec<Option<T>> {
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

#[cfg(test)]
mod tests {
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
