//! Every order in which a cache's thread and another can take turns, by loom: `cargo xtask test loom`.
//!
//! The other thread stands for whoever has the device's lock: it takes blocks back, or merges what happened into the books.

use super::*;
use loom::sync::Arc;
use loom::thread;

const S: Stream = Stream(0);
const ADDRESS: u64 = 4096;
const BYTES: u64 = 512;

fn slot(parked: bool) -> Slot {
    Slot {
        address: ADDRESS,
        bytes: BYTES,
        requested: BYTES,
        stream: S,
        block: BlockId::NONE,
        parked,
        rounds: 0,
        requested_again: 0,
        requested_before: 0,
    }
}

/// A cache that holds one block.
fn cache(parked: bool) -> Arc<ThreadCache> {
    let cache = Arc::new(ThreadCache::default());
    assert!(cache.insert(slot(parked)).is_none());
    cache
}

/// Runs `work` in another thread.
fn beside<T: 'static>(
    cache: &Arc<ThreadCache>,
    work: impl FnOnce(&ThreadCache) -> T + 'static,
) -> thread::JoinHandle<T> {
    let cache = Arc::clone(cache);
    thread::spawn(move || work(&cache))
}

fn taken(cache: &ThreadCache, all: bool) -> Vec<Slot> {
    let mut taken = Vec::new();
    cache.take(all, &mut taken);
    taken
}

/// An error unless the numbers outside of the lock are those inside.
fn check(cache: &ThreadCache) {
    let slots = cache.slots.lock();
    let held = slots.held.iter().flatten();
    assert_eq!(cache.held.load(Ordering::Relaxed) as usize, held.clone().count());
    assert_eq!(cache.parked.load(Ordering::Relaxed) as usize, held.filter(|slot| slot.parked).count());
}

#[test]
fn a_parked_block_goes_to_one_of_two() {
    loom::model(|| {
        let cache = cache(true);
        let other = beside(&cache, |cache| taken(cache, false).len());
        let mine = cache.allocate(BYTES, S).is_some();
        assert_eq!(usize::from(mine) + other.join().unwrap(), 1);
        check(&cache);
    });
}

#[test]
fn a_freed_block_is_parked_or_left_to_the_books() {
    loom::model(|| {
        let cache = cache(false);
        let other = beside(&cache, |cache| taken(cache, true));
        let parked = cache.free(DevicePtr(ADDRESS));
        let mut all = other.join().unwrap();
        assert_eq!(
            all.first().is_some_and(|slot| !slot.parked),
            !parked,
            "who takes a live block leaves its free to the books"
        );
        all.extend(taken(&cache, true));
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].parked, parked);
        check(&cache);
    });
}

#[test]
fn every_round_is_told_once() {
    loom::model(|| {
        let cache = cache(true);
        let rounds = |cache: &ThreadCache| {
            let mut told = (0, 0);
            cache.merge(|slot| told = (told.0 + slot.rounds, told.1 + slot.requested_again));
            told
        };
        let other = beside(&cache, move |cache| rounds(cache));
        let mut allocated = 0;
        for _ in 0..2 {
            assert!(cache.allocate(BYTES, S).is_some());
            allocated += 1;
            assert!(cache.free(DevicePtr(ADDRESS)));
        }
        let (first, second) = (other.join().unwrap(), rounds(&cache));
        assert_eq!((first.0 + second.0, first.1 + second.1), (allocated, allocated * BYTES));
        check(&cache);
    });
}

#[test]
fn a_block_taken_by_its_address_is_gone() {
    loom::model(|| {
        let cache = cache(true);
        let other = beside(&cache, |cache| cache.take_one(ADDRESS));
        let mine = cache.allocate(BYTES, S).is_some();
        let left = mine && cache.free(DevicePtr(ADDRESS));
        let other = other.join().unwrap();
        assert!(mine || other.is_some());
        assert_eq!(taken(&cache, true).len(), usize::from(other.is_none()), "the block is held, or was taken");
        assert!(
            !left || other.is_none_or(|slot| slot.parked),
            "a parked block that was taken is still the cache's to give"
        );
        check(&cache);
    });
}

#[test]
fn who_sees_a_thread_gone_finds_all_that_it_parked() {
    loom::model(|| {
        let cache = cache(false);
        let other = beside(&cache, |cache| (cache.is_abandoned(), taken(cache, false).len()));
        assert!(cache.free(DevicePtr(ADDRESS)));
        cache.abandoned.store(true, Ordering::Release);
        let (abandoned, found) = other.join().unwrap();
        assert!(!abandoned || found == 1);
        check(&cache);
    });
}
