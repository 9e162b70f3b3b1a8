//! The counters behind `torch.cuda.memory_stats()`. Names and meanings are `c10::CachingDeviceAllocator::DeviceStats`'s.

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

/// A size as PyTorch's messages print it (`c10::CachingDeviceAllocator::format_size`).
pub fn format_size(bytes: u64) -> String {
    const KIB: f64 = 1024.0;
    let b = bytes as f64;
    if bytes <= 1 << 10 {
        format!("{bytes} bytes")
    } else if bytes <= 1 << 20 {
        format!("{:.2} KiB", b / KIB)
    } else if bytes <= 1 << 30 {
        format!("{:.2} MiB", b / (KIB * KIB))
    } else {
        format!("{:.2} GiB", b / (KIB * KIB * KIB))
    }
}
