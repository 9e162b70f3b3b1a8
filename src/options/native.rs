//! PyTorch's own settings that this allocator honours.

use crate::sizes::LARGE_STEP;

const MIB: u64 = 1 << 20;

/// PyTorch's own settings that this allocator honours, as PyTorch has parsed and checked them.
#[derive(Clone, PartialEq, Debug)]
pub struct NativeOptions {
    /// `max_split_size_mb` in bytes: larger blocks are not split. [`u64::MAX`]: off.
    pub max_split_size: u64,
    /// `max_non_split_rounding_mb` in bytes: how much larger than the request an unsplit block may be.
    pub max_non_split_rounding_size: u64,
    /// `garbage_collection_threshold`: share of the allowed memory above which old cached blocks are freed. 0: off.
    pub garbage_collection_threshold: f64,
    /// `roundup_power2_divisions` for sizes from 1 MiB (or less) to 32 GiB (or more), by powers of two. 0 and 1: off.
    pub roundup_power2_divisions: [u64; 16],
    /// `expandable_segments`: managed segments grow with and without it; with it, those of private pools do too.
    pub expandable_segments: bool,
    /// `large_segment_size_mb` in bytes: how much the large pool takes at a time.
    pub large_segment_size: u64,
    /// `throw_on_cudamalloc_oom`: observers of allocations that are refused before CUDA is asked want to be told.
    pub throw_on_oom: bool,
}

impl Default for NativeOptions {
    fn default() -> Self {
        Self {
            max_split_size: u64::MAX,
            max_non_split_rounding_size: 20 * MIB,
            garbage_collection_threshold: 0.0,
            roundup_power2_divisions: [0; 16],
            expandable_segments: false,
            large_segment_size: LARGE_STEP,
            throw_on_oom: false,
        }
    }
}
