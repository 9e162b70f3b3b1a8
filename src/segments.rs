//! Segments: ranges of address space taken from CUDA, and how much of each is populated.
//!
//! A *growing* segment is managed address space of which only the start is populated; it grows as blocks need it, so
//! that large and changing requests tile into one range. Where CUDA can discard memory, its free pages can be given
//! back alone: those at its end, and others, which leave decommitted blocks. A *fixed* segment is populated whole when
//! it is made: plain device memory, a MemPool's own allocator, and oversize requests.

use crate::driver::DevicePtr;
use crate::history::Context;
use crate::ids::{BlockId, ListId};
use crate::options::NativeOptions;
use crate::pages::{PAGE, PageFlags};
use crate::place::Place;
use crate::sizes::{LARGE_REQUEST, MIN_BLOCK, SMALL_LIMIT, SMALL_STEP, round_up};

const MIB: u64 = 1 << 20;

/// Address space of a small pool's segment, at least. CUDA only takes a segment back whole, so it is not larger
/// than saves calls.
const SMALL_RANGE: u64 = 32 * MIB;
/// Address space of a large pool's segment, at least. The same trade: larger ranges fragment less, smaller
/// ones are given back sooner.
const LARGE_RANGE: u64 = 512 * MIB;
/// Where the free end of a segment can be given back alone, a segment has this share of the device's memory: free
/// memory does not merge across segments.
const LARGE_SHARE: u64 = 8;
/// The same of small pools, which are a small share of a program's memory.
const SMALL_SHARE: u64 = 128;

/// What kind of memory a segment is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Memory {
    /// `cuMemAllocManaged`.
    Managed,
    /// `cuMemAlloc`.
    Device,
    /// A MemPool's own allocator.
    Custom(CustomAllocator),
}

/// A `CUDAAllocator*` that a MemPool was given. Opaque here; the bridge calls it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct CustomAllocator(pub u64);

/// A range of address space taken from CUDA.
pub struct Segment {
    /// First byte.
    pub base: DevicePtr,
    /// Length of the address range in bytes.
    pub range_bytes: u64,
    /// Bytes from the start of the range that its blocks fill; equal to `range_bytes` for fixed segments.
    pub filled: u64,
    /// How many of them are decommitted ([`crate::blocks::BlockState::Decommitted`]). The rest is populated.
    pub decommitted: u64,
    /// Up to here, in bytes from the start, what lies beyond `filled` has been discarded. Writing there without a
    /// prefetch first takes seconds a GiB.
    pub discarded: u64,
    /// Whether it may grow.
    pub growing: bool,
    /// What it is made of.
    pub memory: Memory,
    /// Where it is meant to live.
    pub place: Place,
    /// Whether it counted as oversize (`max_split_size_mb`) when it was made: the setting may change.
    pub oversize: bool,
    /// The free list that its blocks belong to.
    pub list: ListId,
    /// The block at the end of the filled part; never a decommitted one.
    pub last: BlockId,
    /// The list's reuse counter when the segment became wholly free (garbage collection's age).
    pub free_since: u64,
    /// What is special about some of its pages. Never about decommitted ones.
    pub flags: PageFlags,
    /// The stack that made it.
    pub context: Option<Context>,
}

impl Segment {
    /// How many bytes it can still grow.
    pub fn growable(&self) -> u64 {
        if self.growing { self.range_bytes - self.filled } else { 0 }
    }

    /// How many bytes are populated.
    pub fn populated(&self) -> u64 {
        self.filled - self.decommitted
    }

    /// How many bytes are populated elsewhere than its place says.
    pub fn nonresident(&self) -> u64 {
        self.flags.nonresident.len() * PAGE
    }

    /// How many bytes are populated in `place`.
    pub fn populated_in(&self, place: Place) -> u64 {
        if place == self.place {
            self.populated() - self.nonresident()
        } else if place == self.place.other() {
            self.nonresident()
        } else {
            0
        }
    }

    /// How many bytes beyond the filled ones are discarded.
    pub fn discarded_end(&self) -> u64 {
        self.discarded.saturating_sub(self.filled)
    }
}

/// A request as blocks serve it: a multiple of 512 bytes, or of a share of its power of two where
/// `roundup_power2_divisions` says so.
#[inline]
pub fn round_size(bytes: u64, native: &NativeOptions) -> u64 {
    if bytes <= MIN_BLOCK {
        return MIN_BLOCK;
    }
    // The options' intervals are 1 MiB to 64 GiB by powers of two; smaller and larger sizes use the outermost.
    let interval = (bytes.ilog2()).clamp(20, 35) - 20;
    let divisions = native.roundup_power2_divisions[interval as usize];
    if divisions > 1 && bytes > MIN_BLOCK * divisions {
        round_to_division(bytes, divisions)
    } else {
        round_up(bytes, MIN_BLOCK)
    }
}

/// The next of `divisions` (a power of two) equal steps between the powers of two around `bytes`.
fn round_to_division(bytes: u64, divisions: u64) -> u64 {
    if bytes.is_power_of_two() {
        return bytes;
    }
    let floor = 1 << bytes.ilog2();
    match floor >> divisions.ilog2() {
        0 => floor << 1,
        step => round_up(bytes, step),
    }
}

/// How many bytes to populate for a request of `bytes` (rounded) that lacks `missing` of them, at `offset` bytes from
/// the start of its segment. Where it is more than what is missing, population ends at a multiple of the step, so that
/// a segment never has more than the next multiple of what its blocks need, whatever larger requests lie in between.
pub fn population_step(bytes: u64, missing: u64, offset: u64, native: &NativeOptions) -> u64 {
    if bytes <= SMALL_LIMIT {
        SMALL_STEP
    } else if bytes < LARGE_REQUEST {
        let step = native.large_segment_size.max(SMALL_STEP);
        round_up(round_up(offset + missing, step) - offset, SMALL_STEP)
    } else {
        round_up(missing, SMALL_STEP)
    }
}

/// The address space of a new growing segment for a request of `bytes` (rounded). A quarter of slack lets a large
/// request that comes back somewhat larger grow in place. `shrinks_on` is the memory, in bytes, of a device on which
/// its free end can be given back alone.
pub fn range_bytes(bytes: u64, shrinks_on: Option<u64>) -> u64 {
    let device_memory = shrinks_on.unwrap_or(0);
    let range = if bytes <= SMALL_LIMIT {
        SMALL_RANGE.max(device_memory / SMALL_SHARE)
    } else {
        (bytes + bytes / 4).max(LARGE_RANGE).max(device_memory / LARGE_SHARE)
    };
    round_up(range, SMALL_STEP)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_round_as_native_rounds_them() {
        let native = NativeOptions::default();
        assert_eq!(round_size(1, &native), 512);
        assert_eq!(round_size(513, &native), 1024);
        let four = NativeOptions { roundup_power2_divisions: [4; 16], ..NativeOptions::default() };
        // The example of PyTorch's documentation: 1200 lies between 1024 and 2048, steps 1280, 1536, 1792.
        assert_eq!(round_to_division(1200, 4), 1280);
        assert_eq!(round_size(1200, &four), 1536); // too small for divisions: 512 * 4
        assert_eq!(round_size(5 << 20, &four), 5 << 20);
        assert_eq!(round_size((5 << 20) + 1, &four), 6 << 20);
        assert_eq!(round_to_division(3, 8), 4);
    }

    #[test]
    fn population_follows_natives_segment_sizes() {
        let native = NativeOptions::default();
        let step = |bytes, missing| population_step(bytes, missing, 0, &native);
        assert_eq!(step(512, 512), 2 * MIB);
        assert_eq!(step(MIB + 512, MIB + 512), 20 * MIB);
        assert_eq!(step(10 * MIB + 512, 10 * MIB + 512), 12 * MIB);
        assert_eq!(step(64 * MIB, 2 * MIB - 512), 2 * MIB);
        let at = |offset, missing| population_step(5 * MIB, missing, offset, &native);
        assert_eq!([at(20 * MIB, 5 * MIB), at(34 * MIB, 5 * MIB), at(38 * MIB, 5 * MIB)], [20, 6, 22].map(|n| n * MIB));
        let large = NativeOptions { large_segment_size: 33 * MIB, ..native };
        assert_eq!(population_step(2 * MIB, 2 * MIB, 0, &large), 34 * MIB);
        assert_eq!(population_step(512, 512, 0, &large), 2 * MIB);
    }

    #[test]
    fn ranges_are_larger_where_their_end_can_be_given_back() {
        let gib = 1 << 30;
        assert_eq!([range_bytes(512, None), range_bytes(2 * MIB, None)], [32 * MIB, 512 * MIB]);
        assert_eq!(range_bytes(gib, None), gib + gib / 4);
        assert_eq!(
            [512, 2 * MIB, 16 * gib].map(|bytes| range_bytes(bytes, Some(80 * gib))),
            [640 * MIB, 10 * gib, 20 * gib]
        );
        assert_eq!([512, 2 * MIB].map(|bytes| range_bytes(bytes, Some(gib + 1))), [32 * MIB, 512 * MIB]);
    }

    proptest! {
        #[test]
        fn rounding_never_shrinks(bytes in 1_u64..1 << 59, log2 in 0_u32..8) {
            let native = NativeOptions { roundup_power2_divisions: [1 << log2; 16], ..NativeOptions::default() };
            let rounded = round_size(bytes, &native);
            prop_assert!(rounded >= bytes && rounded.is_multiple_of(MIN_BLOCK));
            for shrinks_on in [None, Some(80 << 30)] {
                prop_assert!(range_bytes(rounded, shrinks_on) >= population_step(rounded, rounded, 0, &native));
            }
        }
    }
}
