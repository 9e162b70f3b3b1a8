//! The accounting of one device: what `memory_stats` and `memory_info` show. One method an event; it decides nothing.

use crate::heap::{Returned, Taken};
use crate::history::{PlaceHistory, PlaceSample};
use crate::hooks::Hooks;
use crate::ids::MempoolId;
use crate::place::{Place, Populated};
use crate::stats::{DeviceStats, PlaceStats, StatArray};
use crate::thread_cache::Slot;
use rustc_hash::FxHashMap;
use std::sync::Arc;

/// The list that memory belongs to, as far as statistics ask.
#[derive(Clone, Copy, Debug)]
pub struct Owner {
    /// Of the small pool.
    pub small: bool,
    /// The private pool; the default pool has no statistic of its own.
    pub private: Option<MempoolId>,
}

/// The figures of one device.
pub struct Accounting {
    /// PyTorch's statistics.
    pub stats: DeviceStats,
    /// What is populated where, and what moved.
    pub places: PlaceStats,
    populated: Populated,
    /// Reserved bytes of private pools; those of pools that are gone stay until statistics are reset.
    pool_reserved: FxHashMap<MempoolId, StatArray>,
    /// Bytes freed by the program in all: the clock by which allocations age.
    clock: u64,
    hooks: Arc<dyn Hooks>,
    sampling: bool,
    /// What was populated where, while the history is recorded.
    samples: PlaceHistory,
}

impl Accounting {
    /// Nothing is populated yet.
    pub fn new(hooks: Arc<dyn Hooks>) -> Self {
        Self {
            stats: DeviceStats::default(),
            places: PlaceStats::default(),
            populated: Populated::default(),
            pool_reserved: FxHashMap::default(),
            clock: 0,
            hooks,
            sampling: false,
            samples: PlaceHistory::default(),
        }
    }

    /// What is populated, by place.
    pub fn populated(&self) -> &Populated {
        &self.populated
    }

    /// Bytes freed by the program in all.
    #[inline]
    pub fn clock(&self) -> u64 {
        self.clock
    }

    /// Bytes in live allocations.
    pub fn allocated_bytes(&self) -> u64 {
        self.stats.allocated_bytes.aggregate.current.unsigned_abs()
    }

    /// Bytes populated in all, as `reserved_bytes` has them.
    pub fn reserved_bytes(&self) -> u64 {
        self.stats.reserved_bytes.aggregate.current.unsigned_abs()
    }

    /// A block was taken out of its free list.
    #[inline]
    pub fn taken(&mut self, taken: &Taken, bytes: u64) {
        if taken.growing {
            return;
        }
        let (count, sum) = (&mut self.stats.inactive_split, &mut self.stats.inactive_split_bytes);
        match (taken.split, taken.was_split) {
            (true, true) => sum.decrease(taken.small, bytes),
            (true, false) => {
                count.increase(taken.small, 1);
                sum.increase(taken.small, taken.before - bytes);
            }
            (false, true) => {
                count.decrease(taken.small, 1);
                sum.decrease(taken.small, taken.before);
            }
            (false, false) => {}
        }
    }

    /// A block of `bytes` was handed out for a request of `requested`.
    #[inline]
    pub fn allocated(&mut self, small: bool, bytes: u64, requested: u64) {
        let stats = &mut self.stats;
        stats.allocation.increase(small, 1);
        stats.allocated_bytes.increase(small, bytes);
        stats.active.increase(small, 1);
        stats.active_bytes.increase(small, bytes);
        stats.requested_bytes.increase(small, requested);
    }

    /// The program has freed a block. Streams may still use it.
    #[inline]
    pub fn freed(&mut self, small: bool, bytes: u64) {
        self.clock += bytes;
        self.stats.allocation.decrease(small, 1);
        self.stats.allocated_bytes.decrease(small, bytes);
    }

    /// Nothing uses a freed block any more.
    #[inline]
    pub fn retired(&mut self, small: bool, bytes: u64, requested: u64) {
        let stats = &mut self.stats;
        stats.active.decrease(small, 1);
        stats.active_bytes.decrease(small, bytes);
        stats.requested_bytes.decrease(small, requested);
    }

    /// A block was put into its free list.
    #[inline]
    pub fn returned(&mut self, returned: &Returned) {
        if returned.growing {
            return;
        }
        let (count, sum) = (&mut self.stats.inactive_split, &mut self.stats.inactive_split_bytes);
        count.decrease(returned.small, returned.merged);
        sum.decrease(returned.small, returned.merged_bytes);
        if returned.split {
            count.increase(returned.small, 1);
            sum.increase(returned.small, returned.bytes);
        }
    }

    /// What a thread's cache did with a block: each round was a free and an allocation.
    pub fn rounds(&mut self, small: bool, slot: &Slot) {
        let stats = &mut self.stats;
        self.clock += slot.rounds * slot.bytes;
        for counts in [&mut stats.allocation, &mut stats.active] {
            counts.exchange(small, slot.rounds, slot.rounds);
        }
        for bytes in [&mut stats.allocated_bytes, &mut stats.active_bytes] {
            bytes.exchange(small, slot.rounds * slot.bytes, slot.rounds * slot.bytes);
        }
        stats.requested_bytes.exchange(small, slot.requested_again, slot.requested_before);
    }

    /// Whether a statistic would be higher than ever with one more allocation.
    #[inline]
    pub fn raises_a_peak(&self, small: bool, bytes: u64, requested: u64) -> bool {
        let stats = &self.stats;
        stats.allocated_bytes.would_peak(small, bytes)
            || stats.active_bytes.would_peak(small, bytes)
            || stats.requested_bytes.would_peak(small, requested)
            || stats.allocation.would_peak(small, 1)
            || stats.active.would_peak(small, 1)
    }

    /// Memory was populated for a list.
    pub fn populate(&mut self, owner: Owner, place: Place, bytes: u64) {
        self.populated.add(place, bytes);
        self.levels_changed();
        self.stats.reserved_bytes.increase(owner.small, bytes);
        if let Some(of_pool) = self.reserved_in(owner) {
            of_pool.increase(owner.small, bytes);
        }
        self.stats.num_device_alloc += 1;
    }

    /// Memory of a list was given back: so many bytes in each place.
    pub fn unpopulate(&mut self, owner: Owner, places: &[(Place, u64)]) {
        let mut bytes = 0;
        for &(place, there) in places {
            self.populated.sub(place, there);
            bytes += there;
        }
        self.levels_changed();
        self.stats.reserved_bytes.decrease(owner.small, bytes);
        if let Some(of_pool) = self.reserved_in(owner) {
            of_pool.decrease(owner.small, bytes);
        }
        self.stats.num_device_free += 1;
    }

    /// A segment of fixed size was made.
    pub fn segment_made(&mut self, small: bool, oversize: bool) {
        self.stats.segment.increase(small, 1);
        if oversize {
            self.stats.oversize_segments.increase(1);
        }
    }

    /// A segment of fixed size is gone.
    pub fn segment_gone(&mut self, small: bool, oversize: bool) {
        self.stats.segment.decrease(small, 1);
        if oversize {
            self.stats.oversize_segments.decrease(1);
        }
    }

    /// So many bytes lie at `to` now, and did not before.
    pub fn moved(&mut self, to: Place, bytes: u64) {
        self.populated.sub(to.other(), bytes);
        self.populated.add(to, bytes);
        match to {
            Place::Device => self.places.moved_to_device += bytes,
            Place::Host | Place::Unplaced => self.places.moved_to_host += bytes,
        }
        self.levels_changed();
    }

    /// Cached memory was given back because the device was nearly full.
    pub fn reclaimed_lightly(&mut self, bytes: u64) {
        self.places.light_reclamations += 1;
        self.places.reclaimed += bytes;
    }

    /// A limit was met: all caches were given back, or live memory was evicted.
    pub fn reclaimed_hard(&mut self, bytes: u64) {
        self.places.hard_reclamations += 1;
        self.places.reclaimed += bytes;
    }

    /// Starts or stops keeping what was populated where.
    pub fn sample(&mut self, on: bool, clear: bool) {
        if !on || clear {
            self.samples.clear();
        }
        self.sampling = on;
    }

    /// How what is populated where has changed while it was kept, oldest first.
    pub fn samples(&self) -> Vec<PlaceSample> {
        self.samples.entries()
    }

    /// The bytes reserved in each private pool.
    pub fn pool_reserved(&self) -> impl Iterator<Item = (MempoolId, StatArray)> {
        self.pool_reserved.iter().map(|(&id, &bytes)| (id, bytes))
    }

    /// Starts the accumulated statistics anew. `lives` says which private pools still exist.
    pub fn reset_accumulated(&mut self, lives: impl Fn(MempoolId) -> bool) {
        self.stats.reset_accumulated();
        self.places.reset_accumulated();
        self.pool_reserved.retain(|&id, _| lives(id));
        self.pool_reserved.values_mut().for_each(StatArray::reset_accumulated);
    }

    /// Starts the peaks anew. `lives` says which private pools still exist.
    pub fn reset_peaks(&mut self, lives: impl Fn(MempoolId) -> bool) {
        self.stats.reset_peak();
        self.places.reset_peak();
        self.pool_reserved.retain(|&id, _| lives(id));
        self.pool_reserved.values_mut().for_each(StatArray::reset_peak);
    }

    fn reserved_in(&mut self, owner: Owner) -> Option<&mut StatArray> {
        owner.private.map(|id| self.pool_reserved.entry(id).or_default())
    }

    fn levels_changed(&mut self) {
        self.places.levels(&self.populated);
        if self.sampling {
            let sample = PlaceSample {
                time: self.hooks.approximate_time(),
                populated: self.populated,
                allocated: self.allocated_bytes(),
            };
            self.samples.push(sample);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::DevicePtr;

    struct Nobody;

    impl Hooks for Nobody {
        fn free_memory_callbacks(&self) -> bool {
            false
        }
        fn approximate_time(&self) -> i64 {
            7
        }
        fn custom_alloc(&self, _: crate::segments::CustomAllocator, _: u64) -> Option<DevicePtr> {
            None
        }
        fn custom_free(&self, _: crate::segments::CustomAllocator, _: DevicePtr) -> bool {
            false
        }
        fn pool_forgotten(&self, _: crate::driver::DeviceIndex, _: MempoolId) {}
        fn trace(&self, _: &crate::history::TraceEntry) {}
    }

    #[test]
    fn what_goes_in_comes_out_again() {
        let mut accounting = Accounting::new(Arc::new(Nobody));
        let private = Owner { small: false, private: Some((0, 1)) };
        accounting.sample(true, false);
        accounting.populate(private, Place::Device, 100);
        accounting.allocated(false, 60, 50);
        assert!(accounting.raises_a_peak(false, 1, 0));
        accounting.moved(Place::Host, 40);
        accounting.freed(false, 60);
        accounting.retired(false, 60, 50);
        assert_eq!((accounting.allocated_bytes(), accounting.reserved_bytes(), accounting.clock()), (0, 100, 60));
        accounting.unpopulate(private, &[(Place::Device, 60), (Place::Host, 40)]);
        assert_eq!((accounting.populated().total(), accounting.reserved_bytes()), (0, 0));
        assert_eq!((accounting.places.host.peak, accounting.places.moved_to_host), (40, 40));
        let sampled: Vec<_> = accounting.samples().iter().map(|sample| sample.populated.total()).collect();
        assert_eq!(sampled, [100, 100, 0]);
        let (_, reserved) = accounting.pool_reserved().next().unwrap();
        assert_eq!((reserved.aggregate.current, reserved.aggregate.peak), (0, 100));
        accounting.reset_peaks(|_| false);
        assert_eq!(accounting.pool_reserved().count(), 0);
    }
}
