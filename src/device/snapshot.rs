//! What `torch.cuda.memory._snapshot()` shows, and the check that the books balance.

use super::DeviceState;
use crate::blocks::{BlockId, BlockState};
use crate::budget::Populated;
use crate::driver::{DeviceIndex, Stream};
use crate::history::{Action, Context, TraceEntry};
use crate::pages::{self, PAGE};
use crate::pools::{DEFAULT_POOL, MempoolId};
use crate::segments::{SMALL_STEP, SegmentId};
use std::collections::HashSet;

/// One block of a segment (`c10::cuda::CUDACachingAllocator::BlockInfo`).
#[derive(Clone)]
pub struct BlockInfo {
    /// Bytes.
    pub bytes: u64,
    /// Bytes as the program asked; 0 where it is free.
    pub requested_bytes: u64,
    /// Held by the program.
    pub allocated: bool,
    /// Held by the program or still used by a stream.
    pub active: bool,
    /// The stack that allocated it.
    pub context: Option<Context>,
}

/// A segment, or the part of one between holes (`c10::cuda::CUDACachingAllocator::SegmentInfo`).
#[derive(Clone)]
pub struct SegmentInfo {
    /// On which device.
    pub device: DeviceIndex,
    /// First byte.
    pub address: u64,
    /// Populated bytes.
    pub total_bytes: u64,
    /// What the program asked for in its active blocks.
    pub requested_bytes: u64,
    /// Bytes in allocated blocks.
    pub allocated_bytes: u64,
    /// Bytes in active blocks.
    pub active_bytes: u64,
    /// The stream it serves.
    pub stream: Stream,
    /// Large pool.
    pub is_large: bool,
    /// It grows.
    pub is_expandable: bool,
    /// The pool it belongs to.
    pub mempool: MempoolId,
    /// The stack that made it.
    pub context: Option<Context>,
    /// All its blocks in address order.
    pub blocks: Vec<BlockInfo>,
}

impl DeviceState {
    /// All segments, or one pool's, by address.
    pub fn snapshot(&mut self, mempool: MempoolId) -> Vec<SegmentInfo> {
        let mut segments: Vec<SegmentInfo> = (0..self.segments.len() as u32)
            .map(SegmentId)
            .filter(|id| {
                self.segments[id.0 as usize].as_ref().is_some_and(|segment| {
                    mempool == DEFAULT_POOL || self.pools[self.pools[segment.list].pool].id == mempool
                })
            })
            .flat_map(|id| self.segment_infos(id))
            .collect();
        segments.sort_by_key(|segment| segment.address);
        let active = segments.iter().map(|segment| segment.active_bytes).sum();
        self.trace_event(Action::Snapshot, 0, active, Stream(0), None);
        segments
    }

    /// A segment as `native` shows its expandable ones: a segment for each part between holes.
    fn segment_infos(&self, id: SegmentId) -> Vec<SegmentInfo> {
        self.blocks_of(id)
            .split(|&block| self.blocks[block].state == BlockState::Vacant)
            .filter(|part| !part.is_empty())
            .map(|part| self.segment_info(id, part))
            .collect()
    }

    fn segment_info(&self, id: SegmentId, part: &[BlockId]) -> SegmentInfo {
        let segment = self.segment(id);
        let list = &self.pools[segment.list];
        let blocks: Vec<BlockInfo> = part.iter().map(|&block| self.block_info(block)).collect();
        let sum = |which: fn(&BlockInfo) -> bool, what: fn(&BlockInfo) -> u64| {
            blocks.iter().filter(|&block| which(block)).map(what).sum()
        };
        SegmentInfo {
            device: self.device,
            address: part.first().map_or(segment.base.0, |&block| self.blocks[block].address),
            total_bytes: sum(|_| true, |block| block.bytes),
            requested_bytes: sum(|block| block.active, |block| block.requested_bytes),
            allocated_bytes: sum(|block| block.allocated, |block| block.bytes),
            active_bytes: sum(|block| block.active, |block| block.bytes),
            stream: list.stream,
            is_large: !list.small,
            is_expandable: segment.growing,
            mempool: self.pools[list.pool].id,
            context: segment.context.clone(),
            blocks,
        }
    }

    fn block_info(&self, id: BlockId) -> BlockInfo {
        let block = &self.blocks[id];
        BlockInfo {
            bytes: block.bytes,
            requested_bytes: block.requested,
            allocated: block.state == BlockState::Allocated,
            active: block.state != BlockState::Free,
            context: self.contexts.get(&id).cloned(),
        }
    }

    /// The recorded history, oldest first.
    pub fn trace_entries(&self) -> Vec<TraceEntry> {
        self.history.entries()
    }
}

/// Checks every promise that the data structures make to each other.
pub(super) fn check(state: &DeviceState) -> Result<(), String> {
    let mut populated = Populated::default();
    let mut live = 0;
    let (mut allocated, mut active, mut requested, mut reserved) = (0, 0, 0, 0);
    let mut free: HashSet<BlockId> = HashSet::new();
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for (index, segment) in state.segments.iter().enumerate() {
        let Some(segment) = segment else { continue };
        let id = SegmentId(index as u32);
        populated.add(segment.place, segment.populated_in(segment.place));
        populated.add(segment.place.other(), segment.away());
        reserved += segment.populated();
        ranges.push((segment.base.0, segment.base.0 + segment.range_bytes));
        if segment.filled.max(segment.discarded) > segment.range_bytes {
            return Err(format!("segment {:?} is filled beyond its range", segment.base));
        }
        if state.blocks[segment.last].state == BlockState::Vacant {
            return Err(format!("segment {:?} ends in a hole", segment.base));
        }
        let grows = state.growing.get(&segment.list).is_some_and(|ids| ids.contains(&id));
        if grows != segment.growing {
            return Err(format!("segment {:?} is wrongly listed as growing or not", segment.base));
        }
        let mut next = segment.base.0;
        let mut before_free = false;
        let mut before_vacant = false;
        let mut vacant = 0;
        for block_id in state.blocks_of(id) {
            let block = &state.blocks[block_id];
            if block.address != next || block.bytes == 0 || block.segment != id || block.list != segment.list {
                return Err(format!("block {:#x} does not continue its segment", block.address));
            }
            next += block.bytes;
            let is_free = block.state == BlockState::Free;
            if is_free && before_free {
                return Err(format!("free block {:#x} was not merged", block.address));
            }
            before_free = is_free;
            let is_vacant = block.state == BlockState::Vacant;
            if is_vacant && (before_vacant || !block.address.is_multiple_of(SMALL_STEP)) {
                return Err(format!("hole {:#x} was not merged or not of whole pages", block.address));
            }
            before_vacant = is_vacant;
            let pages = pages::touched(block.address - segment.base.0, block.bytes);
            if segment.marks.any(pages) && (is_vacant || !block.has_marks) {
                return Err(format!("block {:#x} does not know of the marks on its pages", block.address));
            }
            if block.has_marks && block.thread.is_some() {
                return Err(format!("block {:#x} has marks and is in a thread's cache", block.address));
            }
            match block.state {
                BlockState::Free => {
                    free.insert(block_id);
                }
                BlockState::Allocated => {
                    let cached = state.threads.get(block.thread.index()).is_some_and(Option::is_some);
                    if block.thread.is_some() != cached {
                        return Err(format!("allocation {:#x} is in the cache of no thread", block.address));
                    }
                    live += 1;
                    allocated += block.bytes;
                    if state.live.get(&block.address) != Some(&block_id) {
                        return Err(format!("allocation {:#x} is not known by its address", block.address));
                    }
                }
                BlockState::Pending => {
                    if !state.waits.any(|waiting| waiting == block_id) {
                        return Err(format!("block {:#x} waits for nothing", block.address));
                    }
                }
                BlockState::Vacant => vacant += block.bytes,
            }
            if !is_free && !is_vacant {
                active += block.bytes;
                requested += block.requested;
            }
        }
        if segment.marks.any(segment.filled / PAGE..segment.range_bytes / PAGE) {
            return Err(format!("segment {:?} has marks on pages that it does not have", segment.base));
        }
        if next != segment.base.0 + segment.filled || vacant != segment.vacant {
            return Err(format!("the blocks of segment {:?} do not fill it", segment.base));
        }
    }
    ranges.sort_unstable();
    if let Some(overlap) = ranges.windows(2).find(|pair| pair[0].1 > pair[1].0) {
        return Err(format!("segments {:#x} and {:#x} overlap", overlap[0].0, overlap[1].0));
    }
    if live != state.live.len() {
        return Err(format!("{live} allocations in blocks, {} by address", state.live.len()));
    }
    let mut listed = 0;
    for pool in state.pools.ids() {
        let mut segments = 0;
        for list in state.pools.lists_of(pool) {
            for block in state.pools[list].free.iter(&state.blocks) {
                listed += 1;
                if !free.contains(&block) || state.blocks[block].list != list {
                    return Err(format!("block {:#x} is in the wrong free list", state.blocks[block].address));
                }
            }
        }
        for segment in state.segments.iter().flatten() {
            segments += u32::from(state.pools[segment.list].pool == pool);
        }
        if segments != state.pools[pool].segments {
            return Err(format!(
                "pool {:?} counts {} segments, not {segments}",
                state.pools[pool].id, state.pools[pool].segments
            ));
        }
    }
    if listed != free.len() {
        return Err(format!("{} free blocks, {listed} of them in free lists", free.len()));
    }
    if populated != state.populated {
        return Err(format!("populated {populated:?}, but the books say {:?}", state.populated));
    }
    let places = [state.places.device, state.places.host, state.places.unplaced];
    if places.map(|level| level.current) != [populated.device, populated.host, populated.unplaced] {
        return Err(format!("populated {populated:?}, but the statistics say {places:?}"));
    }
    let stats = &state.stats;
    let figures = [
        ("allocation", stats.allocation, live as u64),
        ("allocated_bytes", stats.allocated_bytes, allocated),
        ("active_bytes", stats.active_bytes, active),
        ("requested_bytes", stats.requested_bytes, requested),
        ("reserved_bytes", stats.reserved_bytes, reserved),
    ];
    for (name, stat, real) in figures {
        if stat.aggregate.current != real as i64
            || stat.small_pool.current + stat.large_pool.current != stat.aggregate.current
        {
            return Err(format!("{name} is {:?}, but the blocks have {real}", stat.aggregate.current));
        }
    }
    Ok(())
}
