//! The counters behind `torch.cuda.memory_stats()`. Names and meanings are `c10::CachingDeviceAllocator::DeviceStats`'s.

use crate::column::Column;
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

/// Makes [`PlaceStats`] of its rows, each `kind field: "the meaning";`, or with other names than the field's for programs:
/// `kind field "name" "path": "the meaning";`. The path is where `torch.cuda.memory_stats()` has it, below `uvm.`.
///
/// A `level` is a number of bytes and its peak. A `counter` accumulates and starts anew when accumulated statistics are
/// reset. A `gauge` is a number as it is now.
macro_rules! statistics {
    ($($kind:ident $field:ident $($name:literal $path:literal)?: $meaning:literal;)*) => {
        /// What is populated where on one device, and what moved. The books know what this process was asked for; what the
        /// driver moves by itself at a page fault they do not see.
        #[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
        pub struct PlaceStats {
            $(#[doc = $meaning] pub $field: statistics!(@type $kind),)*
        }

        impl PlaceStats {
            /// The columns by which programs know the numbers, in the order of [`PlaceStats::numbers`].
            pub fn columns() -> Vec<Column> {
                let mut columns = Vec::new();
                $(statistics!(@columns $kind columns, stringify!($field), [$($name, $path)?], $meaning);)*
                columns
            }

            /// The numbers.
            pub fn numbers(&self) -> Vec<u64> {
                let mut numbers = Vec::new();
                $(statistics!(@numbers $kind numbers, self.$field);)*
                numbers
            }

            /// Starts what accumulates anew.
            pub fn reset_accumulated(&mut self) {
                $(statistics!(@reset $kind self.$field);)*
            }

            /// Starts the peaks anew.
            pub fn reset_peak(&mut self) {
                $(statistics!(@reset_peak $kind self.$field);)*
            }
        }
    };
    (@type level) => { Level };
    (@type $kind:ident) => { u64 };
    (@name $field:expr, []) => { ($field, $field) };
    (@name $field:expr, [$name:literal, $path:literal]) => { ($name, $path) };
    (@columns level $columns:ident, $field:expr, $names:tt, $meaning:literal) => {
        let (name, path) = statistics!(@name $field, $names);
        $columns.push(Column::new(name, $meaning).in_memory_stats(format!("{path}.current")));
        $columns.push(
            Column::new(format!("{name}_peak"), "The most of it since peaks were reset.")
                .in_memory_stats(format!("{path}.peak")),
        );
    };
    (@columns $kind:ident $columns:ident, $field:expr, $names:tt, $meaning:literal) => {
        let (name, path) = statistics!(@name $field, $names);
        $columns.push(Column::new(name, $meaning).in_memory_stats(path));
    };
    (@numbers level $numbers:ident, $level:expr) => { $numbers.extend([$level.current, $level.peak]); };
    (@numbers $kind:ident $numbers:ident, $number:expr) => { $numbers.push($number); };
    (@reset counter $number:expr) => { $number = 0; };
    (@reset $kind:ident $number:expr) => {};
    (@reset_peak level $level:expr) => { $level.peak = $level.current; };
    (@reset_peak $kind:ident $number:expr) => {};
}

statistics! {
    level device "populated_device" "populated_bytes.device": "Bytes populated on the GPU.";
    level host "populated_host" "populated_bytes.host": "Bytes populated in host memory.";
    level unplaced "populated_unplaced" "populated_bytes.unplaced":
        "Bytes populated wherever the driver moves them (`balanced`).";
    counter moved_to_device "moved_to_device" "moved_bytes.to_device":
        "Bytes, in use or cached, that hints and the allocator moved to the device.";
    counter moved_to_host "moved_to_host" "moved_bytes.to_host":
        "Bytes, in use or cached, that hints and the allocator moved to the host.";
    counter discarded "discarded" "discarded_bytes": "Bytes whose contents were dropped, by hints and by the allocator.";
    counter prefetches: "Count of hints: `prefetch`.";
    counter advices: "Count of hints: `advise`.";
    counter discards: "Count of hints: `discard`.";
    gauge stage: "0: there is room on the device. 1: it is nearly full, cached memory is given back first. 2: the device limit \
        is met.";
    counter stage_changes: "How often the stage changed.";
    counter light_reclamations: "How often cached memory was given back because the device was nearly full.";
    counter hard_reclamations:
        "How often the device limit or the cap was met, and live memory was moved out or all caches were given back.";
    counter reclaimed "reclaimed" "reclaimed_bytes": "Bytes that light and hard reclamations gave back or moved out.";
    counter moves_out: "How often a live allocation was moved to the host to make room.";
    counter moved_out "moved_out" "moved_out_bytes": "Bytes of live allocations that were moved out.";
    counter regrets: "How many of them were freed soon after.";
}

impl PlaceStats {
    /// What is populated has changed.
    pub fn levels(&mut self, populated: &Populated) {
        self.device.set(populated.device);
        self.host.set(populated.host);
        self.unplaced.set(populated.unplaced);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resets_leave_what_is_there_now() {
        let level = Level { current: 3, peak: 5 };
        let mut stats = PlaceStats { host: level, stage: 2, moved_out: 7, prefetches: 1, ..PlaceStats::default() };
        stats.reset_accumulated();
        assert_eq!(stats, PlaceStats { host: level, stage: 2, ..PlaceStats::default() });
        stats.reset_peak();
        assert_eq!(stats.host, Level { current: 3, peak: 3 });
    }

    #[test]
    fn numbers_have_columns() {
        let stats = PlaceStats { unplaced: Level { current: 1, peak: 2 }, regrets: 9, ..PlaceStats::default() };
        let (columns, numbers) = (PlaceStats::columns(), stats.numbers());
        assert_eq!(columns.len(), numbers.len());
        let of = |name: &str| columns.iter().position(|column| column.name == name).map(|at| numbers[at]);
        assert_eq!(
            (of("populated_unplaced"), of("populated_unplaced_peak"), of("regrets")),
            (Some(1), Some(2), Some(9))
        );
        let path = |name: &str| columns.iter().find(|column| column.name == name).map(|column| column.path.to_string());
        assert_eq!(path("populated_unplaced_peak").as_deref(), Some("populated_bytes.unplaced.peak"));
        assert_eq!(path("regrets").as_deref(), Some("regrets"));
    }
}
