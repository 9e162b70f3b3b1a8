//! Blocks: pure data structures, no CUDA.
//!
//! A [`Block`] is a range of bytes inside one segment. The blocks of a segment form a list in address order without
//! gaps; free neighbours are always merged. Which of the free ones serves a request is for their [free
//! list](crate::free_list::FreeList).

use crate::ids::{BlockId, ListId, SegmentId, ThreadId};

/// What a block is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BlockState {
    /// In a free list.
    Free,
    /// Held by the program.
    Allocated,
    /// Freed by the program, but streams it was recorded on may still use it.
    Pending,
    /// Decommitted: whole pages of a growing segment whose contents were discarded. In no free list; neighbours are
    /// merged.
    Decommitted,
}

/// A range of bytes inside one segment. One cache line: the hot path touches a few of them.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub struct Block {
    /// First byte.
    pub address: u64,
    /// Length in bytes, a multiple of [`MIN_BLOCK`](crate::sizes::MIN_BLOCK).
    pub bytes: u64,
    /// What the program asked for, before rounding; 0 while free.
    pub requested: u64,
    /// How many bytes of the device the program had freed in all when it was handed out last.
    pub born: u64,
    /// The neighbour below in the same segment.
    pub prev: BlockId,
    /// The neighbour above in the same segment.
    pub next: BlockId,
    /// The neighbours in its free list's bin.
    pub(crate) bin_prev: BlockId,
    pub(crate) bin_next: BlockId,
    /// Where it lies.
    pub segment: SegmentId,
    /// Whether that segment grows.
    pub growing: bool,
    /// Where it goes when it is freed.
    pub list: ListId,
    /// What it is doing.
    pub state: BlockState,
    /// Whether [`crate::streams`] knows of uses on other streams.
    pub has_uses: bool,
    /// Whether a context is kept for it.
    pub has_context: bool,
    /// Whether it counted as oversize (`max_split_size_mb`) when it was handed out: the setting may change.
    pub oversize: bool,
    /// Whether something may be special about pages that it lies in ([`crate::pages::PageFlags`]). The flags are the
    /// truth.
    pub may_have_flags: bool,
    /// The thread whose cache it is in: that knows whether it is the program's now.
    pub thread: ThreadId,
}

/// All blocks of one device, by index. Indices are reused; the arena only grows.
#[derive(Default)]
pub struct Blocks {
    slots: Vec<Block>,
    unused: Vec<BlockId>,
}

impl std::ops::Index<BlockId> for Blocks {
    type Output = Block;
    #[inline]
    fn index(&self, id: BlockId) -> &Block {
        &self.slots[id.0 as usize]
    }
}

impl std::ops::IndexMut<BlockId> for Blocks {
    #[inline]
    fn index_mut(&mut self, id: BlockId) -> &mut Block {
        &mut self.slots[id.0 as usize]
    }
}

impl Blocks {
    /// Makes a free block between two neighbours of the same segment (either may be [`BlockId::NONE`]).
    pub fn create(
        &mut self,
        address: u64,
        bytes: u64,
        (segment, growing): (SegmentId, bool),
        list: ListId,
        (prev, next): (BlockId, BlockId),
    ) -> BlockId {
        let block = Block {
            address,
            bytes,
            requested: 0,
            born: 0,
            prev,
            next,
            bin_prev: BlockId::NONE,
            bin_next: BlockId::NONE,
            segment,
            growing,
            list,
            state: BlockState::Free,
            has_uses: false,
            has_context: false,
            oversize: false,
            may_have_flags: false,
            thread: ThreadId::NONE,
        };
        let id = match self.unused.pop() {
            Some(id) => {
                self[id] = block;
                id
            }
            None => {
                self.slots.push(block);
                BlockId(u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 blocks"))
            }
        };
        if prev.is_some() {
            self[prev].next = id;
        }
        if next.is_some() {
            self[next].prev = id;
        }
        id
    }

    /// Cuts the first `bytes` off a block; returns the new block below. The block itself keeps its place in its free
    /// list, which must be told of its new size ([`FreeList::resized`](crate::free_list::FreeList::resized)).
    #[inline]
    pub fn split_front(&mut self, id: BlockId, bytes: u64) -> BlockId {
        let Block { address, segment, growing, list, prev, may_have_flags, .. } = self[id];
        debug_assert!(bytes > 0 && bytes < self[id].bytes);
        let front = self.create(address, bytes, (segment, growing), list, (prev, id));
        self[front].may_have_flags = may_have_flags;
        let rest = &mut self[id];
        rest.address += bytes;
        rest.bytes -= bytes;
        front
    }

    /// Joins a block (in no free list) into the neighbour above it, and forgets the block. Returns the neighbour's
    /// size before: its free list must be told ([`FreeList::resized`](crate::free_list::FreeList::resized)).
    #[inline]
    pub fn merge_up(&mut self, lower: BlockId, upper: BlockId) -> u64 {
        let Block { address, bytes, prev, next, may_have_flags, .. } = self[lower];
        debug_assert_eq!(next, upper);
        debug_assert_eq!(address + bytes, self[upper].address);
        let above = &mut self[upper];
        let before = above.bytes;
        above.address = address;
        above.bytes += bytes;
        above.prev = prev;
        above.may_have_flags |= may_have_flags;
        if prev.is_some() {
            self[prev].next = upper;
        }
        self.unused.push(lower);
        before
    }

    /// Joins a block (in no free list) into the neighbour below it, and forgets the block. Returns the neighbour's
    /// size before: its free list must be told ([`FreeList::resized`](crate::free_list::FreeList::resized)).
    #[inline]
    pub fn merge_down(&mut self, upper: BlockId, lower: BlockId) -> u64 {
        let Block { address, bytes, prev, next, may_have_flags, .. } = self[upper];
        debug_assert_eq!(prev, lower);
        let below = &mut self[lower];
        debug_assert_eq!(below.address + below.bytes, address);
        let before = below.bytes;
        below.bytes += bytes;
        below.next = next;
        below.may_have_flags |= may_have_flags;
        if next.is_some() {
            self[next].prev = lower;
        }
        self.unused.push(upper);
        before
    }

    /// Forgets the last block of a segment (in no free list).
    pub fn discard(&mut self, id: BlockId) {
        let Block { prev, next, .. } = self[id];
        debug_assert!(!next.is_some());
        if prev.is_some() {
            self[prev].next = BlockId::NONE;
        }
        self.unused.push(id);
    }

    /// Whether the block shares its segment with others.
    #[inline]
    pub fn is_split(&self, id: BlockId) -> bool {
        self[id].prev.is_some() || self[id].next.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_a_cache_line() {
        assert_eq!((size_of::<Block>(), align_of::<Block>()), (64, 64));
    }
}
