//! The heap of one device: which bytes are in use, which are free, and who may have them. Pure data structures: no
//! CUDA, no statistics, no history.
//!
//! A request is served from the [free list](crate::free_list::FreeList) of its pool, size class and stream. The rest of
//! a block is split off, and what becomes free is merged with its free neighbours. Where segments come from, how they
//! grow and shrink is in `address_space.rs`.

mod address_space;
#[cfg(test)]
mod tests;

pub use address_space::{Growth, NewSegment};

use crate::blocks::{Block, BlockState, Blocks};
use crate::driver::{DevicePtr, Stream};
use crate::error::{Error, Result};
use crate::free_list::FreeList;
use crate::ids::{BlockId, ListId, PoolId, SegmentId};
use crate::options::NativeOptions;
use crate::pools::{List, Pools};
use crate::segments::{Segment, population_step};
use crate::sizes::{MIN_BLOCK, SMALL_LIMIT};
use rustc_hash::FxHashMap;

/// What an allocation is asked to be.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Bytes as the program asked, at least 1.
    pub bytes: u64,
    /// Rounded: a multiple of 512.
    pub rounded: u64,
    /// The stream it will be used on.
    pub stream: Stream,
    /// The free list that serves it.
    pub list: ListId,
}

/// A block that was taken out of its free list.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    /// The block.
    pub block: BlockId,
    /// Its segment grows.
    pub growing: bool,
    /// Only its front was taken.
    pub split: bool,
    /// Before, it shared its segment with others.
    pub was_split: bool,
    /// Bytes of the free block before.
    pub before: u64,
    /// Of the small pool.
    pub small: bool,
}

/// A block that was put into its free list.
#[derive(Clone, Copy, Debug)]
pub struct Returned {
    /// Its segment grows.
    pub growing: bool,
    /// Of the small pool.
    pub small: bool,
    /// With how many free neighbours it was merged.
    pub merged: u64,
    /// How many bytes those had.
    pub merged_bytes: u64,
    /// It shares its segment with others.
    pub split: bool,
    /// Bytes of the free block now.
    pub bytes: u64,
}

/// The blocks, segments and pools of one device.
#[derive(Default)]
pub struct Heap {
    /// All blocks.
    pub blocks: Blocks,
    /// All pools and their free lists.
    pub pools: Pools,
    segments: Vec<Option<Segment>>,
    /// Growing segments by the free list they feed.
    growing: FxHashMap<ListId, Vec<SegmentId>>,
    /// Live allocations by address.
    live: FxHashMap<u64, BlockId>,
}

/// The smallest free block of at least `bytes` that `fits`. But the end of a growing segment is taken last: there a
/// large request grows in place, elsewhere it needs a hole of its size (wilderness preservation; Wilson, Johnstone,
/// Neely and Boles, Dynamic Storage Allocation, 1995, 3.3).
#[inline]
fn best_fit_of(free: &FreeList, blocks: &Blocks, bytes: u64, fits: impl Fn(&Block) -> bool) -> Option<BlockId> {
    let is_end = |block: &Block| block.growing && block.next == BlockId::NONE;
    let found = free.find(blocks, bytes, &fits)?;
    if !is_end(&blocks[found]) || blocks[found].bytes == bytes {
        return Some(found);
    }
    free.find(blocks, bytes, |block| fits(block) && !is_end(block)).or(Some(found))
}

fn live_segment(segments: &mut [Option<Segment>], id: SegmentId) -> &mut Segment {
    segments[id.0 as usize].as_mut().expect("a SegmentId is only kept while its segment lives")
}

impl Heap {
    /// The best fitting free block of the request's list, still in it.
    #[inline]
    pub fn best_fit(&mut self, request: &Request, native: &NativeOptions) -> Option<BlockId> {
        let max_split = native.max_split_size;
        let list = &mut self.pools[request.list];
        list.requests += 1;
        if max_split == u64::MAX {
            return best_fit_of(&list.free, &self.blocks, request.rounded, |_| true);
        }
        // Oversize blocks are segments of their own: neither split for small requests, nor wasted on much smaller ones.
        // What would be made anew for the request is never too large for it.
        let made = population_step(request.rounded, request.rounded, 0, native);
        let ceiling = request.rounded.saturating_add(native.max_non_split_rounding_size);
        let oversize = request.rounded >= max_split;
        best_fit_of(&list.free, &self.blocks, request.rounded, |block| {
            if oversize {
                !block.growing && (block.bytes < ceiling || block.bytes <= made)
            } else {
                block.growing || block.bytes < max_split || block.bytes <= made
            }
        })
    }

    /// Whether the rest of a block is worth a block of its own.
    #[inline]
    pub fn should_split(&self, block: BlockId, request: &Request, native: &NativeOptions) -> bool {
        let Block { bytes, list, growing, .. } = self.blocks[block];
        let rest = bytes - request.rounded;
        let list = &self.pools[list];
        if rest == 0 || list.no_split {
            return false;
        }
        if list.small || growing {
            rest >= MIN_BLOCK
        } else {
            request.rounded < native.max_split_size && rest > SMALL_LIMIT
        }
    }

    /// Takes a free block out of its list: whole, or its first `bytes`.
    #[inline]
    pub fn take(&mut self, free: BlockId, bytes: u64, split: bool) -> Taken {
        let List { free: list, small, .. } = &mut self.pools[self.blocks[free].list];
        let was_split = self.blocks.is_split(free);
        let before = self.blocks[free].bytes;
        let block = if split {
            // The front is handed out; what remains most often stays where it is in the list.
            let front = self.blocks.split_front(free, bytes);
            list.resized(&mut self.blocks, free, before);
            front
        } else {
            list.remove(&mut self.blocks, free);
            free
        };
        Taken { block, growing: self.blocks[block].growing, split, was_split, before, small: *small }
    }

    /// Makes a block that was taken the program's. `clock` is the age it is born at.
    #[inline]
    pub fn allocate(&mut self, block: BlockId, requested: u64, clock: u64) -> u64 {
        let taken = &mut self.blocks[block];
        taken.born = clock;
        taken.state = BlockState::Allocated;
        taken.requested = requested;
        let address = taken.address;
        self.live.insert(address, block);
        address
    }

    /// Puts a block that nobody uses any more into its free list, merged with its free neighbours.
    #[inline]
    pub fn put_back(&mut self, block: BlockId) -> Returned {
        let Self { blocks, pools, segments, .. } = self;
        let freed = &mut blocks[block];
        let list = freed.list;
        let (segment, growing) = (freed.segment, freed.growing);
        let (prev, next) = (freed.prev, freed.next);
        freed.state = BlockState::Free;
        let List { free, small, requests, .. } = &mut pools[list];
        let small = *small;
        let is_free = |id: BlockId, blocks: &Blocks| id.is_some() && blocks[id].state == BlockState::Free;
        let (block, merged, merged_bytes) = match (is_free(prev, blocks), is_free(next, blocks)) {
            (false, false) => {
                free.insert(blocks, block);
                (block, 0, 0)
            }
            (false, true) => {
                let before = blocks.merge_up(block, next);
                free.resized(blocks, next, before);
                (next, 1, before)
            }
            (true, upper) => {
                let mut upper_bytes = 0;
                if upper {
                    free.remove(blocks, next);
                    upper_bytes = blocks[next].bytes;
                    blocks.merge_down(next, block);
                }
                let before = blocks.merge_down(block, prev);
                free.resized(blocks, prev, before);
                if !blocks[prev].next.is_some() {
                    live_segment(segments, segment).last = prev;
                }
                (prev, 1 + u64::from(upper), before + upper_bytes)
            }
        };
        let split = blocks.is_split(block);
        if !split {
            live_segment(segments, segment).free_since = *requests;
        }
        Returned { growing, small, merged, merged_bytes, split, bytes: blocks[block].bytes }
    }

    /// The live allocation at an address.
    #[inline]
    pub fn live_at(&self, ptr: DevicePtr) -> Option<BlockId> {
        self.live.get(&ptr.0).copied()
    }

    /// The live allocation at an address, which must be one.
    ///
    /// # Errors
    /// [`Error::InvalidPointer`].
    pub fn find(&self, ptr: DevicePtr) -> Result<BlockId> {
        self.live_at(ptr).ok_or(Error::InvalidPointer(ptr))
    }

    /// The live allocation at an address is no more.
    #[inline]
    pub fn remove_live(&mut self, address: u64) -> Option<BlockId> {
        self.live.remove(&address)
    }

    /// A block stays the program's after all.
    #[inline]
    pub fn keep_live(&mut self, address: u64, block: BlockId) {
        self.live.insert(address, block);
    }

    /// All live allocations.
    pub fn live(&self) -> impl ExactSizeIterator<Item = BlockId> + '_ {
        self.live.values().copied()
    }

    /// The live allocation that this address lies inside of.
    pub fn allocated_around(&self, address: u64) -> Option<BlockId> {
        let inside = |start: u64, bytes: u64| (start..start + bytes).contains(&address);
        let (id, _) = self.segments().find(|(_, segment)| inside(segment.base.0, segment.filled))?;
        self.blocks_of(id).into_iter().find(|&id| {
            let block = &self.blocks[id];
            block.state == BlockState::Allocated && inside(block.address, block.bytes)
        })
    }

    /// The free block of a list in which the bytes at `address` lie.
    pub fn free_around(&mut self, list: ListId, address: u64, bytes: u64) -> Option<BlockId> {
        let fits = |block: &Block| {
            address >= block.address
                && (address - block.address).is_multiple_of(MIN_BLOCK)
                && (address - block.address).checked_add(bytes).is_some_and(|end| end <= block.bytes)
        };
        let list = &mut self.pools[list];
        list.requests += 1;
        list.free.iter(&self.blocks).find(|&id| fits(&self.blocks[id]))
    }

    /// Whether an address lies in one of this device's segments.
    pub fn holds(&self, ptr: DevicePtr) -> bool {
        self.segments().any(|(_, segment)| (segment.base.0..segment.base.0 + segment.range_bytes).contains(&ptr.0))
    }

    /// The segment of this index.
    #[inline]
    pub fn segment(&self, id: SegmentId) -> &Segment {
        self.segments[id.0 as usize].as_ref().expect("a SegmentId is only kept while its segment lives")
    }

    /// The segment of this index.
    #[inline]
    pub fn segment_mut(&mut self, id: SegmentId) -> &mut Segment {
        live_segment(&mut self.segments, id)
    }

    /// All segments.
    pub fn segments(&self) -> impl Iterator<Item = (SegmentId, &Segment)> {
        let numbered = self.segments.iter().enumerate();
        numbered.filter_map(|(index, segment)| Some((SegmentId(index as u32), segment.as_ref()?)))
    }

    /// The pool that a block belongs to.
    pub fn pool_of(&self, block: BlockId) -> PoolId {
        self.pools[self.blocks[block].list].pool
    }

    /// The blocks of a segment in address order.
    pub fn blocks_of(&self, segment: SegmentId) -> Vec<BlockId> {
        let mut blocks = Vec::new();
        let mut block = self.segment(segment).last;
        while block.is_some() {
            blocks.push(block);
            block = self.blocks[block].prev;
        }
        blocks.reverse();
        blocks
    }

    /// Whether the program, or a stream, still uses some of a segment.
    pub fn in_use(&self, id: SegmentId) -> bool {
        let used = |state| matches!(state, BlockState::Allocated | BlockState::Pending);
        self.blocks_of(id).into_iter().any(|block| used(self.blocks[block].state))
    }

    /// The addresses of the live allocations in a segment.
    pub fn live_in(&self, id: SegmentId) -> Vec<u64> {
        self.blocks_of(id)
            .into_iter()
            .filter(|&block| self.blocks[block].state == BlockState::Allocated)
            .map(|block| self.blocks[block].address)
            .collect()
    }

    /// The free bytes of all private pools.
    pub fn free_in_private_pools(&self) -> u64 {
        let private = self.pools.ids().filter(|&pool| pool != PoolId::DEFAULT);
        private.flat_map(|pool| self.pools.lists_of(pool)).map(|list| self.pools[list].free.bytes()).sum()
    }

    /// The bytes of the largest free block.
    pub fn largest_free(&self) -> u64 {
        let lists = self.pools.ids().flat_map(|pool| self.pools.lists_of(pool));
        lists.map(|list| self.pools[list].free.largest(&self.blocks)).max().unwrap_or(0)
    }
}
