//! The blocks that a thread freed last, kept where the thread finds them again without the device's lock.
//!
//! Threads that allocate at the same time would otherwise hand the device's lock, and every cache line behind it, to
//! and fro. A [`ThreadCache`] belongs to one thread and one device. It holds a few blocks of the default pool that the
//! device's heap calls allocated. Each is either *live*, the program's, or *parked*, freed and waiting for the thread's
//! next request of its size and stream. Going from one to the other takes the cache's own lock, which nobody else
//! wants.
//!
//! The accounting stays exact because everybody else looks first: whoever asks the device for a figure, or for a block
//! that the free lists do not have or that would raise a peak, first takes the parked blocks of all threads back
//! ([`crate::device`]). So parked memory is never the reason for more memory, for an error, or for a wrong figure.
//!
//! Locks are taken in one order: the device's, then a cache's.

use crate::driver::{DeviceIndex, DevicePtr, Stream};
use crate::ids::{BlockId, ThreadId};
use crate::sizes::round_to_block;
use crate::sync::{AtomicBool, AtomicU32, Mutex, Ordering};
use std::cell::RefCell;
use std::sync::Arc;

/// How many blocks a cache holds: a loop body seldom frees more before it allocates again.
const SLOTS: usize = 8;
/// After a hit, so many parked blocks in a row may be taken back unused before the thread stops parking.
const TRUST: u32 = 16;
/// A thread that does not park tries again with one free in so many.
const PROBE: u32 = 16;

/// A block in a cache, and what happened to it since the accounting was brought up to date.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    /// First byte.
    pub address: u64,
    /// Bytes of the block.
    pub bytes: u64,
    /// What the program asked for last, before rounding.
    pub requested: u64,
    /// The stream it serves.
    pub stream: Stream,
    /// Its place in the heap.
    pub block: BlockId,
    /// Freed, and not yet the program's again.
    pub parked: bool,
    /// How often it was freed and allocated again.
    pub rounds: u64,
    /// What was asked for in those rounds, in bytes before rounding.
    pub requested_again: u64,
    /// What had been asked for by those whose frees began them.
    pub requested_before: u64,
}

#[derive(Default)]
struct Slots {
    held: [Option<Slot>; SLOTS],
    /// Where the next block goes if all are taken.
    next: usize,
    trust: u32,
    frees: u32,
}

/// One thread's blocks of one device. A cache line of its own: nobody else writes there.
#[repr(align(128))]
#[derive(Default)]
pub struct ThreadCache {
    slots: Mutex<Slots>,
    /// How many are parked; written under the lock.
    parked: AtomicU32,
    /// How many there are; written under the lock.
    held: AtomicU32,
    /// Its thread has ended.
    abandoned: AtomicBool,
}

impl ThreadCache {
    /// A parked block of this size and stream, now the program's.
    #[inline]
    fn allocate(&self, bytes: u64, stream: Stream) -> Option<DevicePtr> {
        if self.parked.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let rounded = round_to_block(bytes);
        let mut slots = self.slots.lock();
        let slot = slots
            .held
            .iter_mut()
            .flatten()
            .find(|slot| slot.parked && slot.bytes == rounded && slot.stream == stream)?;
        slot.parked = false;
        slot.rounds += 1;
        slot.requested_before += slot.requested;
        slot.requested_again += bytes;
        slot.requested = bytes;
        let address = slot.address;
        slots.trust = TRUST;
        self.count(&self.parked, -1);
        Some(DevicePtr(address))
    }

    /// Parks a live block. False: it is not one of this cache's live ones.
    #[inline]
    fn free(&self, ptr: DevicePtr) -> bool {
        if self.held.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let mut slots = self.slots.lock();
        let Some(slot) = slots.held.iter_mut().flatten().find(|slot| slot.address == ptr.0 && !slot.parked) else {
            return false;
        };
        slot.parked = true;
        self.count(&self.parked, 1);
        true
    }

    /// Whether the thread's next free is worth parking: its parked blocks were used lately, or it is time to try.
    fn wants(&self) -> bool {
        let mut slots = self.slots.lock();
        slots.frees = slots.frees.wrapping_add(1);
        slots.trust > 0 || slots.frees.is_multiple_of(PROBE)
    }

    /// Takes a block in; answers the one that had to leave for it.
    fn insert(&self, slot: Slot) -> Option<Slot> {
        let mut slots = self.slots.lock();
        let empty = slots.held.iter().position(Option::is_none);
        let place = empty.unwrap_or_else(|| {
            slots.next = (slots.next + 1) % SLOTS;
            slots.next
        });
        let left = slots.held[place].replace(slot);
        self.count(&self.held, i32::from(left.is_none()));
        self.count(&self.parked, i32::from(slot.parked) - i32::from(left.is_some_and(|left| left.parked)));
        left
    }

    /// Takes blocks out: the parked ones, or all.
    pub fn take(&self, all: bool, taken: &mut Vec<Slot>) {
        let nothing = if all { &self.held } else { &self.parked };
        if nothing.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut slots = self.slots.lock();
        for place in 0..SLOTS {
            if let Some(slot) = slots.held[place].filter(|slot| all || slot.parked) {
                slots.held[place] = None;
                self.count(&self.held, -1);
                self.count(&self.parked, -i32::from(slot.parked));
                slots.trust = slots.trust.saturating_sub(u32::from(slot.parked));
                taken.push(slot);
            }
        }
    }

    /// Takes one block out, where it is there.
    pub fn take_one(&self, address: u64) -> Option<Slot> {
        let mut slots = self.slots.lock();
        let place = slots.held.iter().position(|slot| slot.is_some_and(|slot| slot.address == address))?;
        let slot = slots.held[place].take()?;
        self.count(&self.held, -1);
        self.count(&self.parked, -i32::from(slot.parked));
        Some(slot)
    }

    /// Takes one block out, where it is there and the program's.
    pub fn take_live(&self, address: u64) -> Option<Slot> {
        let mut slots = self.slots.lock();
        let place =
            slots.held.iter().position(|slot| slot.is_some_and(|slot| slot.address == address && !slot.parked))?;
        let slot = slots.held[place].take()?;
        self.count(&self.held, -1);
        Some(slot)
    }

    /// Calls `merge` for every block that stays, and forgets what happened to it.
    pub fn merge(&self, mut merge: impl FnMut(&Slot)) {
        if self.held.load(Ordering::Relaxed) == 0 {
            return;
        }
        for slot in self.slots.lock().held.iter_mut().flatten().filter(|slot| slot.rounds > 0) {
            merge(slot);
            (slot.rounds, slot.requested_again, slot.requested_before) = (0, 0, 0);
        }
    }

    /// Whether its thread has ended.
    pub fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    /// Only under the lock: nobody else writes.
    #[inline]
    fn count(&self, what: &AtomicU32, change: i32) {
        what.store(what.load(Ordering::Relaxed).wrapping_add_signed(change), Ordering::Relaxed);
    }
}

/// A cache of this thread, and whose it is.
struct Mine {
    allocator: u64,
    device: DeviceIndex,
    id: ThreadId,
    cache: Arc<ThreadCache>,
}

/// This thread's caches; at its end, what is parked in them is everybody's again.
struct All(RefCell<Vec<Mine>>);

impl Drop for All {
    fn drop(&mut self) {
        for mine in self.0.get_mut() {
            mine.cache.abandoned.store(true, Ordering::Release);
        }
    }
}

thread_local! {
    static MINE: All = const { All(RefCell::new(Vec::new())) };
}

/// A block that this thread freed last, if it is of this size and stream. Takes no lock that others want.
#[inline]
pub fn allocate(allocator: u64, device: DeviceIndex, bytes: u64, stream: Stream) -> Option<DevicePtr> {
    // While a thread ends, its storage may be gone already.
    MINE.try_with(|all| {
        let all = all.0.borrow();
        let mine = all.iter().find(|mine| mine.device == device && mine.allocator == allocator)?;
        mine.cache.allocate(bytes, stream)
    })
    .ok()
    .flatten()
}

/// This thread's cache of a device.
#[inline]
pub fn mine(allocator: u64, device: DeviceIndex) -> Option<ThreadId> {
    MINE.try_with(|all| {
        all.0.borrow().iter().find(|mine| mine.device == device && mine.allocator == allocator).map(|mine| mine.id)
    })
    .ok()
    .flatten()
}

/// Parks a block that this thread allocated last. False: it must be freed in the heap.
#[inline]
pub fn free(allocator: u64, ptr: DevicePtr) -> bool {
    MINE.try_with(|all| all.0.borrow().iter().any(|mine| mine.allocator == allocator && mine.cache.free(ptr)))
        .unwrap_or(false)
}

/// Parks a block in this thread's cache, which `register` makes known to the device if it is new. Answers whether it
/// was taken, and the block that had to leave for it. Called under the device's lock.
pub fn park(
    allocator: u64,
    device: DeviceIndex,
    slot: impl FnOnce(ThreadId) -> Slot,
    register: impl FnOnce(&Arc<ThreadCache>) -> Option<ThreadId>,
) -> (bool, Option<Slot>) {
    MINE.try_with(|all| {
        let mut all = all.0.borrow_mut();
        let known = all.iter().position(|mine| mine.device == device && mine.allocator == allocator);
        let index = match known {
            Some(index) => index,
            None => {
                let cache = Arc::new(ThreadCache::default());
                let Some(id) = register(&cache) else { return (false, None) };
                all.push(Mine { allocator, device, id, cache });
                all.len() - 1
            }
        };
        let mine = &all[index];
        if !mine.cache.wants() {
            return (false, None);
        }
        (true, mine.cache.insert(slot(mine.id)))
    })
    .unwrap_or((false, None))
}

#[cfg(all(test, loom))]
mod orders;

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const S: Stream = Stream(0);

    fn slot(address: u64, bytes: u64) -> Slot {
        Slot {
            address,
            bytes,
            requested: bytes,
            stream: S,
            block: BlockId::NONE,
            parked: true,
            rounds: 0,
            requested_again: 0,
            requested_before: 0,
        }
    }

    #[test]
    fn a_parked_block_serves_its_size_and_stream_only() {
        let cache = ThreadCache::default();
        assert!(cache.insert(slot(4096, 1024)).is_none());
        assert_eq!(cache.allocate(1025, S), None);
        assert_eq!(cache.allocate(512, S), None);
        assert_eq!(cache.allocate(1024, Stream(1)), None);
        assert_eq!(cache.allocate(0, S), None);
        assert_eq!(cache.allocate(u64::MAX, S), None);
        assert_eq!(cache.allocate(513, S), Some(DevicePtr(4096)));
        assert_eq!(cache.allocate(513, S), None, "it is the program's");
        assert!(!cache.free(DevicePtr(8192)));
        assert!(cache.free(DevicePtr(4096)));
        assert!(!cache.free(DevicePtr(4096)), "freed twice");
    }

    #[test]
    fn what_happened_is_told_once() {
        let cache = ThreadCache::default();
        cache.insert(slot(4096, 1024));
        for bytes in [1000, 900] {
            assert!(cache.allocate(bytes, S).is_some() && cache.free(DevicePtr(4096)));
        }
        let mut told = Vec::new();
        cache.merge(|slot| told.push((slot.rounds, slot.requested_again, slot.requested_before)));
        cache.merge(|slot| told.push((slot.rounds, slot.requested_again, slot.requested_before)));
        assert_eq!(told, [(2, 1900, 2024)]);
    }

    #[test]
    fn the_oldest_leaves_when_all_places_are_taken() {
        let cache = ThreadCache::default();
        let left: Vec<_> = (1..=SLOTS as u64 + 2).filter_map(|n| cache.insert(slot(n * 4096, 512))).collect();
        assert_eq!(left.len(), 2);
        let mut taken = Vec::new();
        cache.take(false, &mut taken);
        assert_eq!(taken.len(), SLOTS);
        assert_eq!((cache.parked.load(Ordering::Relaxed), cache.held.load(Ordering::Relaxed)), (0, 0));
        let mut all: Vec<_> = taken.into_iter().chain(left).map(|slot| slot.address).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), SLOTS + 2);
    }

    #[test]
    fn a_thread_whose_parked_blocks_are_never_used_stops_parking() {
        let cache = ThreadCache::default();
        let parks = |n: usize| (0..n).filter(|_| cache.wants()).count();
        assert_eq!(parks(PROBE as usize * 4), 4);
        cache.insert(slot(4096, 512));
        assert!(cache.allocate(512, S).is_some());
        assert_eq!(parks(10), 10);
    }
}
