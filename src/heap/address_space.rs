//! Segments of the heap: where they can grow, what is added to them, and what can be taken away.

use super::{Heap, Request};
use crate::blocks::{Block, BlockState};
use crate::driver::DevicePtr;
use crate::history::Context;
use crate::ids::{BlockId, ListId, PoolId, SegmentId};
use crate::pages::{self, PAGE, PageFlags};
use crate::place::Place;
use crate::segments::{Memory, Segment};
use std::ops::Range;

/// Where a growing segment can be populated further for a request.
#[derive(Clone, Copy, Debug)]
pub struct Growth {
    /// The segment.
    pub segment: SegmentId,
    /// In this decommitted block; else at its end.
    pub decommitted: Option<BlockId>,
    /// How many bytes the request needs there.
    pub missing: u64,
    /// Where, in bytes from the segment's start.
    pub offset: u64,
    /// How many bytes can be populated there.
    pub available: u64,
}

/// A segment as it is made.
#[derive(Clone)]
pub struct NewSegment {
    /// The free list that its blocks belong to.
    pub list: ListId,
    /// First byte.
    pub base: DevicePtr,
    /// Length of its address range.
    pub range_bytes: u64,
    /// How many bytes from its start are populated.
    pub populated: u64,
    /// Whether it may grow.
    pub growing: bool,
    /// What it is made of.
    pub memory: Memory,
    /// Where it is meant to live.
    pub place: Place,
    /// Whether it counts as oversize (`max_split_size_mb`).
    pub oversize: bool,
    /// The stack that made it.
    pub context: Option<Context>,
}

impl Heap {
    /// Adds a segment: one free block. Answers its index and that of the block.
    pub fn add_segment(&mut self, new: NewSegment) -> (SegmentId, BlockId) {
        let NewSegment { list, base, range_bytes, populated, growing, memory, place, oversize, context } = new;
        let slot = self.segments.iter().position(Option::is_none).unwrap_or_else(|| {
            self.segments.push(None);
            self.segments.len() - 1
        });
        let id = SegmentId(slot as u32);
        let block = self.blocks.create(base.0, populated, (id, growing), list, (BlockId::NONE, BlockId::NONE));
        self.segments[slot] = Some(Segment {
            base,
            range_bytes,
            filled: populated,
            decommitted: 0,
            discarded: 0,
            growing,
            memory,
            place,
            oversize,
            list,
            last: block,
            free_since: self.pools[list].requests,
            flags: PageFlags::default(),
            context,
        });
        self.pools[list].free.insert(&mut self.blocks, block);
        let pool = self.pools[list].pool;
        self.pools[pool].segments += 1;
        if growing {
            self.growing.entry(list).or_default().push(id);
        }
        (id, block)
    }

    /// Removes a segment in which nothing is in use, with its blocks.
    pub fn remove_segment(&mut self, id: SegmentId) {
        let Segment { list, growing, .. } = *self.segment(id);
        for block in self.blocks_of(id).into_iter().rev() {
            if self.blocks[block].state == BlockState::Free {
                self.pools[list].free.remove(&mut self.blocks, block);
            }
            self.blocks.discard(block);
        }
        let pool = self.pools[list].pool;
        self.pools[pool].segments -= 1;
        if growing && let Some(ids) = self.growing.get_mut(&list) {
            ids.retain(|&other| other != id);
            if ids.is_empty() {
                self.growing.remove(&list);
            }
        }
        self.segments[id.0 as usize] = None;
    }

    /// The segments of a pool.
    pub fn segments_of(&self, pool: PoolId) -> Vec<SegmentId> {
        let of_pool = self.segments().filter(|(_, segment)| self.pools[segment.list].pool == pool);
        of_pool.map(|(id, _)| id).collect()
    }

    /// The growing segments of a pool.
    pub fn growing_of(&self, pool: PoolId) -> impl Iterator<Item = SegmentId> + '_ {
        self.pools.lists_of(pool).filter_map(|list| self.growing.get(&list)).flatten().copied()
    }

    /// Whether a segment is listed as one that feeds a free list by growing.
    pub fn is_listed_as_growing(&self, id: SegmentId) -> bool {
        self.growing.get(&self.segment(id).list).is_some_and(|ids| ids.contains(&id))
    }

    /// Where a growing segment of the request's list can be populated for it, for the fewest bytes.
    pub fn growth_for(&self, request: &Request, place: Place) -> Option<Growth> {
        match (self.decommitted_that_fits(request, place), self.end_that_fits(request, place)) {
            (Some(inside), Some(end)) => Some(if inside.missing <= end.missing { inside } else { end }),
            (inside, end) => inside.or(end),
        }
    }

    /// The growing segment of the request's list that lacks least at its end.
    fn end_that_fits(&self, request: &Request, place: Place) -> Option<Growth> {
        self.growing
            .get(&request.list)?
            .iter()
            .map(|&id| {
                let segment = self.segment(id);
                let last = &self.blocks[segment.last];
                let tail = if last.state == BlockState::Free { last.bytes } else { 0 };
                let missing = request.rounded.saturating_sub(tail);
                let available = segment.growable();
                Growth { segment: id, decommitted: None, missing, offset: segment.filled, available }
            })
            .filter(|growth| self.segment(growth.segment).place == place)
            .filter(|growth| growth.missing > 0 && growth.missing <= growth.available)
            .min_by_key(|growth| growth.missing)
    }

    /// The decommitted block of a growing segment of the request's list that would serve it, with the free memory on
    /// both sides, for the fewest bytes.
    fn decommitted_that_fits(&self, request: &Request, place: Place) -> Option<Growth> {
        let candidates = self.growing.get(&request.list)?.iter().copied().filter(|&id| {
            let segment = self.segment(id);
            segment.decommitted > 0 && segment.place == place
        });
        let free = |id: BlockId| match id {
            BlockId::NONE => 0,
            id if self.blocks[id].state == BlockState::Free => self.blocks[id].bytes,
            _ => 0,
        };
        candidates
            .flat_map(|id| self.blocks_of(id).into_iter().map(move |block| (id, block)))
            .filter(|&(_, block)| self.blocks[block].state == BlockState::Decommitted)
            .filter_map(|(segment, block)| {
                let Block { address, bytes: available, prev, next, .. } = self.blocks[block];
                // Populated from its start.
                let missing = request.rounded.saturating_sub(free(prev));
                let fits = missing > 0 && missing <= available + free(next);
                let offset = address - self.segment(segment).base.0;
                let missing = missing.min(available);
                fits.then_some(Growth { segment, decommitted: Some(block), missing, offset, available })
            })
            .min_by_key(|growth| growth.missing)
    }

    /// The next `bytes` of a growing segment are populated: free memory at its end. Answers the block there.
    pub fn extend(&mut self, id: SegmentId, bytes: u64) -> BlockId {
        let Segment { base, filled, last, list, .. } = *self.segment(id);
        self.segment_mut(id).filled += bytes;
        let free = &mut self.pools[list].free;
        if self.blocks[last].state == BlockState::Free {
            free.remove(&mut self.blocks, last);
            self.blocks[last].bytes += bytes;
            free.insert(&mut self.blocks, last);
            return last;
        }
        let tail = self.blocks.create(base.0 + filled, bytes, (id, true), list, (last, BlockId::NONE));
        self.pools[list].free.insert(&mut self.blocks, tail);
        self.segment_mut(id).last = tail;
        tail
    }

    /// The first `bytes` of a decommitted block are populated. Answers the block that they are, in no free list yet.
    pub fn recommit(&mut self, block: BlockId, bytes: u64) -> BlockId {
        let Block { bytes: all, segment, .. } = self.blocks[block];
        self.segment_mut(segment).decommitted -= bytes;
        if bytes < all { self.blocks.split_front(block, bytes) } else { block }
    }

    /// Pages of a free block are populated no more. Their address space stays: as a decommitted block, or beyond the
    /// segment's end. Answers the block that is left below them.
    pub fn decommit(&mut self, block: BlockId, pages: &Range<u64>) -> BlockId {
        let Block { address, bytes: all, segment: id, list, .. } = self.blocks[block];
        let (before, bytes) = (self.segment(id).base.0 + pages.start * PAGE - address, pages::bytes(pages));
        let free = &mut self.pools[list].free;
        free.remove(&mut self.blocks, block);
        let mut below = BlockId::NONE;
        if before > 0 {
            below = self.blocks.split_front(block, before);
            free.insert(&mut self.blocks, below);
        }
        let mut hole = block;
        if before + bytes < all {
            hole = self.blocks.split_front(block, bytes);
            free.insert(&mut self.blocks, block);
        }
        self.blocks[hole].state = BlockState::Decommitted;
        let Block { prev, next, .. } = self.blocks[hole];
        let decommitted = |id: BlockId, heap: &Self| id.is_some() && heap.blocks[id].state == BlockState::Decommitted;
        if decommitted(next, self) {
            self.blocks.merge_up(hole, next);
            hole = next;
        }
        if decommitted(prev, self) {
            self.blocks.merge_down(hole, prev);
            hole = prev;
        }
        let Block { bytes: hole_bytes, prev, next, .. } = self.blocks[hole];
        let at_end = !next.is_some();
        if at_end {
            self.blocks.discard(hole);
        }
        let segment = self.segment_mut(id);
        segment.decommitted += bytes;
        if at_end {
            segment.discarded = segment.discarded.max(segment.filled);
            segment.filled -= hole_bytes;
            segment.decommitted -= hole_bytes;
            segment.last = prev;
        }
        below
    }

    /// The wholly free segments of a pool, with their populated bytes.
    pub fn releasable(&self, pool: PoolId) -> Vec<(SegmentId, u64)> {
        let whole = self
            .pools
            .lists_of(pool)
            .flat_map(|list| self.pools[list].free.iter(&self.blocks))
            .filter(|&block| !self.blocks.is_split(block))
            .map(|block| self.blocks[block].segment);
        let in_parts = self.growing_of(pool).filter(|&id| self.segment(id).decommitted > 0 && !self.in_use(id));
        whole.chain(in_parts).map(|id| (id, self.segment(id).populated())).collect()
    }

    /// The free pages of a pool that could be decommitted alone, since their segments are in use otherwise: their
    /// blocks, and how many bytes of each. `can_shrink` says of which places.
    pub fn decommittable(&self, pool: PoolId, can_shrink: impl Fn(Place) -> bool) -> Vec<(BlockId, u64)> {
        self.growing_of(pool)
            .filter(|&id| can_shrink(self.segment(id).place) && self.in_use(id))
            .flat_map(|id| self.blocks_of(id))
            .filter(|&block| self.blocks[block].state == BlockState::Free)
            .map(|block| (block, self.ordinary_pages(block).iter().map(pages::bytes).sum()))
            .filter(|&(_, bytes)| bytes > 0)
            .collect()
    }

    /// The whole pages inside a block that lie where the segment's place says, and have its advice: runs of them,
    /// lowest first.
    pub fn ordinary_pages(&self, block: BlockId) -> Vec<Range<u64>> {
        let Block { address, bytes, segment, may_have_flags, .. } = self.blocks[block];
        let segment = self.segment(segment);
        let whole = pages::inside(address - segment.base.0, bytes);
        if !may_have_flags {
            return if whole.is_empty() { Vec::new() } else { vec![whole] };
        }
        let flags = &segment.flags;
        let special =
            |page| [&flags.nonresident, &flags.advice_swapped, &flags.advised].iter().any(|set| set.contains(page));
        pages::runs(whole, |page| !special(page))
    }

    /// The wholly free segments of a list that requests of at least `max_split` made, with their bytes.
    pub fn oversize_segments(&self, list: ListId, max_split: u64) -> Vec<(SegmentId, u64)> {
        let free = self.pools[list].free.iter(&self.blocks);
        free.filter(|&block| !self.blocks.is_split(block) && self.blocks[block].bytes >= max_split)
            .map(|block| (self.blocks[block].segment, self.blocks[block].bytes))
            .filter(|&(id, _)| !self.segment(id).growing)
            .collect()
    }

    /// The blocks that lie in some pages of a segment.
    pub fn blocks_in(&self, id: SegmentId, pages: &Range<u64>) -> Vec<BlockId> {
        let base = self.segment(id).base.0;
        let mut blocks = self.blocks_of(id);
        blocks.retain(|&block| {
            let Block { address, bytes, .. } = self.blocks[block];
            address < base + pages.end * PAGE && address + bytes > base + pages.start * PAGE
        });
        blocks
    }

    /// How many bytes of address space are decommitted: populated no more, but not given back to CUDA either.
    pub fn decommitted(&self) -> u64 {
        self.segments().map(|(_, segment)| segment.decommitted + segment.discarded_end()).sum()
    }
}
