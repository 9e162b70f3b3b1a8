//! The counters behind `torch.cuda.memory_stats()`. Names and meanings are `c10::CachingDeviceAllocator::DeviceStats`'s.

use crate::place::Populated;

/// One statistic: a level, its peak, and what went in and out of it (counts or bytes).
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Stat {
    /// The level now.
    pub current: i64,
    /// The highest level since the last reset of peaks.
    pub peak: i64,
    /// All that was added since the last reset of accumulated statistics.
    pub allocated: i64,
    /// All that was taken away, likewise.
    pub freed: i64,
}

impl Stat {
    /// Raises the level.
    #[inline]
    pub fn increase(&mut self, amount: u64) {
        self.current += amount as i64;
        self.allocated += amount as i64;
        self.peak = self.peak.max(self.current);
    }

    /// Lowers the level.
    #[inline]
    pub fn decrease(&mut self, amount: u64) {
        self.current -= amount as i64;
        self.freed += amount as i64;
        debug_assert!(self.current >= 0, "negative statistic");
    }

    /// Takes note of what went in and out meanwhile.
    fn exchange(&mut self, added: u64, taken: u64) {
        self.current += added as i64 - taken as i64;
        self.allocated += added as i64;
        self.freed += taken as i64;
        self.peak = self.peak.max(self.current);
    }

    #[inline]
    fn would_peak(&self, amount: u64) -> bool {
        self.current + amount as i64 > self.peak
    }

    fn reset_accumulated(&mut self) {
        self.allocated = 0;
        self.freed = 0;
    }

    fn reset_peak(&mut self) {
        self.peak = self.current;
    }
}

/// A statistic in total and by pool size.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct StatArray {
    /// Both pools together.
    pub aggregate: Stat,
    /// Blocks of at most 1 MiB.
    pub small_pool: Stat,
    /// The others.
    pub large_pool: Stat,
}

impl StatArray {
    /// Raises the total and one pool's level.
    #[inline]
    pub fn increase(&mut self, small: bool, amount: u64) {
        self.aggregate.increase(amount);
        self.pool(small).increase(amount);
    }

    /// Lowers the total and one pool's level.
    #[inline]
    pub fn decrease(&mut self, small: bool, amount: u64) {
        self.aggregate.decrease(amount);
        self.pool(small).decrease(amount);
    }

    #[inline]
    fn pool(&mut self, small: bool) -> &mut Stat {
        if small { &mut self.small_pool } else { &mut self.large_pool }
    }

    /// Whether the total or one pool's level would be higher than ever with `amount` more.
    #[inline]
    pub fn would_peak(&self, small: bool, amount: u64) -> bool {
        let pool = if small { &self.small_pool } else { &self.large_pool };
        self.aggregate.would_peak(amount) || pool.would_peak(amount)
    }

    /// Takes note of what went in and out of the total and one pool meanwhile.
    pub fn exchange(&mut self, small: bool, added: u64, taken: u64) {
        self.aggregate.exchange(added, taken);
        self.pool(small).exchange(added, taken);
    }

    /// Starts what went in and out anew.
    pub fn reset_accumulated(&mut self) {
        self.each(Stat::reset_accumulated);
    }

    /// Starts the peaks anew.
    pub fn reset_peak(&mut self) {
        self.each(Stat::reset_peak);
    }

    fn each(&mut self, f: impl Fn(&mut Stat)) {
        f(&mut self.aggregate);
        f(&mut self.small_pool);
        f(&mut self.large_pool);
    }
}

/// The statistics of one device.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct DeviceStats {
    /// Count of allocations the program holds.
    pub allocation: StatArray,
    /// Count of segments of fixed size. Growing segments are not counted, as `native`'s expandable ones are not.
    pub segment: StatArray,
    /// Count of blocks allocated or still used by a stream.
    pub active: StatArray,
    /// Count of free blocks that split segments of fixed size.
    pub inactive_split: StatArray,
    /// Bytes in `allocation`'s blocks.
    pub allocated_bytes: StatArray,
    /// Bytes populated or allocated from CUDA.
    pub reserved_bytes: StatArray,
    /// Bytes in `active`'s blocks.
    pub active_bytes: StatArray,
    /// Bytes in `inactive_split`'s blocks.
    pub inactive_split_bytes: StatArray,
    /// Bytes as the program asked for them, before rounding.
    pub requested_bytes: StatArray,
    /// Allocations that only succeeded after caches were given back.
    pub num_alloc_retries: i64,
    /// Allocations that failed.
    pub num_ooms: i64,
    /// Allocations of at least `max_split_size`.
    pub oversize_allocations: Stat,
    /// Segments of at least `max_split_size`.
    pub oversize_segments: Stat,
    /// How often all outstanding events were waited for.
    pub num_sync_all_streams: i64,
    /// How often CUDA was asked for memory, populations included.
    pub num_device_alloc: i64,
    /// How often memory was given back to CUDA.
    pub num_device_free: i64,
    /// Allocations that failed at a limit before CUDA was asked, where `throw_on_cudamalloc_oom` wants them counted.
    pub num_oom_rejections: i64,
}

impl DeviceStats {
    fn arrays(&mut self) -> [&mut StatArray; 9] {
        [
            &mut self.allocation,
            &mut self.segment,
            &mut self.active,
            &mut self.inactive_split,
            &mut self.allocated_bytes,
            &mut self.reserved_bytes,
            &mut self.active_bytes,
            &mut self.inactive_split_bytes,
            &mut self.requested_bytes,
        ]
    }

    /// `torch.cuda.reset_accumulated_memory_stats`.
    pub fn reset_accumulated(&mut self) {
        for array in self.arrays() {
            array.each(Stat::reset_accumulated);
        }
        self.oversize_allocations.reset_accumulated();
        self.oversize_segments.reset_accumulated();
        self.num_alloc_retries = 0;
        self.num_ooms = 0;
        self.num_sync_all_streams = 0;
        self.num_device_alloc = 0;
        self.num_device_free = 0;
    }

    /// `torch.cuda.reset_peak_memory_stats`.
    pub fn reset_peak(&mut self) {
        for array in self.arrays() {
            array.each(Stat::reset_peak);
        }
        self.oversize_allocations.reset_peak();
        self.oversize_segments.reset_peak();
    }
}

/// A level in bytes, and the highest since peaks were reset.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Level {
    /// Now.
    pub current: u64,
    /// The highest.
    pub peak: u64,
}

impl Level {
    fn set(&mut self, bytes: u64) {
        self.current = bytes;
        self.peak = self.peak.max(bytes);
    }
}

/// What is populated where on one device, and what moved. The books know what this process was asked for; what the driver
/// moves by itself at a page fault they do not see.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct PlaceStats {
    /// Populated on the GPU.
    pub device: Level,
    /// Populated in host memory.
    pub host: Level,
    /// Populated wherever the driver moves it.
    pub unplaced: Level,
    /// Bytes of live and cached memory that hints and the allocator moved to the device.
    pub moved_to_device: u64,
    /// The same to the host.
    pub moved_to_host: u64,
    /// Bytes whose contents were dropped, by hints and by the allocator.
    pub discarded: u64,
    /// Count of hints: prefetches.
    pub prefetches: u64,
    /// Count of hints: advice.
    pub advices: u64,
    /// Count of hints: discards.
    pub discards: u64,
    /// How short of device memory it is: 0 not, 1 cached memory is given back, 2 the limit is met.
    pub stage: u64,
    /// How often that changed.
    pub stage_changes: u64,
    /// How often cached memory was given back because the device was nearly full.
    pub light_reclamations: u64,
    /// How often the device limit or the cap was met: live memory was moved out, or all caches were given back.
    pub hard_reclamations: u64,
    /// Bytes that either gave back or moved out.
    pub reclaimed: u64,
    /// How often a live allocation was moved to the host to make room, and its bytes.
    pub moves_out: u64,
    /// Bytes of live allocations that were moved out.
    pub moved_out: u64,
    /// How many of them were freed soon after.
    pub regrets: u64,
}

impl PlaceStats {
    /// What is populated has changed.
    pub fn levels(&mut self, populated: &Populated) {
        self.device.set(populated.device);
        self.host.set(populated.host);
        self.unplaced.set(populated.unplaced);
    }

    /// Starts what accumulates anew.
    pub fn reset_accumulated(&mut self) {
        let Self { device, host, unplaced, stage, .. } = *self;
        *self = Self { device, host, unplaced, stage, ..Self::default() };
    }

    /// Starts the peaks anew.
    pub fn reset_peak(&mut self) {
        for level in [&mut self.device, &mut self.host, &mut self.unplaced] {
            level.peak = level.current;
        }
    }
}
