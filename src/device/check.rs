//! The check that the heap is whole and the accounting balances: one function an invariant. For tests.

use super::state::DeviceState;
use crate::blocks::BlockState;
use crate::heap::Heap;
use crate::ids::{BlockId, SegmentId};
use crate::pages::{self, PAGE};
use crate::place::Populated;
use crate::segments::Segment;
use crate::sizes::SMALL_STEP;
use std::collections::HashSet;

/// What the blocks of a device add up to.
#[derive(Default)]
struct Sums {
    populated: Populated,
    live: usize,
    allocated: u64,
    active: u64,
    requested: u64,
    reserved: u64,
    free: HashSet<BlockId>,
}

/// Checks every promise that the data structures make to each other.
///
/// # Errors
/// What does not hold, in words.
pub(crate) fn check(device: &DeviceState) -> Result<(), String> {
    let mut sums = Sums::default();
    for (id, segment) in device.heap.segments() {
        sums.populated.add(segment.place, segment.populated_in(segment.place));
        sums.populated.add(segment.place.other(), segment.nonresident());
        sums.reserved += segment.populated();
        segment_is_whole(device, id, segment)?;
        blocks_fill_segment(&device.heap, id, segment)?;
        for block in device.heap.blocks_of(id) {
            block_is_where_it_belongs(device, segment, block)?;
            add_up(&device.heap, block, &mut sums);
        }
    }
    segments_are_apart(&device.heap)?;
    if sums.live != device.heap.live().len() {
        return Err(format!("{} allocations in blocks, {} by address", sums.live, device.heap.live().len()));
    }
    free_lists_are_right(&device.heap, &sums.free)?;
    pools_count_their_segments(&device.heap)?;
    accounting_is_right(device, &sums)
}

fn segment_is_whole(device: &DeviceState, id: SegmentId, segment: &Segment) -> Result<(), String> {
    if segment.filled.max(segment.discarded) > segment.range_bytes {
        return Err(format!("segment {:?} is filled beyond its range", segment.base));
    }
    if device.heap.blocks[segment.last].state == BlockState::Decommitted {
        return Err(format!("segment {:?} ends in a decommitted block", segment.base));
    }
    if device.heap.is_listed_as_growing(id) != segment.growing {
        return Err(format!("segment {:?} is wrongly listed as growing or not", segment.base));
    }
    if segment.flags.any(segment.filled / PAGE..segment.range_bytes / PAGE) {
        return Err(format!("segment {:?} has flags on pages that it does not have", segment.base));
    }
    Ok(())
}

fn blocks_fill_segment(heap: &Heap, id: SegmentId, segment: &Segment) -> Result<(), String> {
    let mut next = segment.base.0;
    let mut before = BlockState::Allocated;
    let mut decommitted = 0;
    for block in heap.blocks_of(id) {
        let block = &heap.blocks[block];
        if block.address != next || block.bytes == 0 || block.segment != id || block.list != segment.list {
            return Err(format!("block {:#x} does not continue its segment", block.address));
        }
        next += block.bytes;
        if block.state == BlockState::Free && before == BlockState::Free {
            return Err(format!("free block {:#x} was not merged", block.address));
        }
        if block.state == BlockState::Decommitted {
            if before == BlockState::Decommitted || !block.address.is_multiple_of(SMALL_STEP) {
                return Err(format!("decommitted block {:#x} was not merged or not of whole pages", block.address));
            }
            decommitted += block.bytes;
        }
        before = block.state;
    }
    if next != segment.base.0 + segment.filled || decommitted != segment.decommitted {
        return Err(format!("the blocks of segment {:?} do not fill it", segment.base));
    }
    Ok(())
}

fn block_is_where_it_belongs(device: &DeviceState, segment: &Segment, id: BlockId) -> Result<(), String> {
    let block = &device.heap.blocks[id];
    let pages = pages::touched(block.address - segment.base.0, block.bytes);
    if segment.flags.any(pages) && (block.state == BlockState::Decommitted || !block.may_have_flags) {
        return Err(format!("block {:#x} does not know of the flags on its pages", block.address));
    }
    if block.may_have_flags && block.thread.is_some() {
        return Err(format!("block {:#x} has flags and is in a thread's cache", block.address));
    }
    match block.state {
        BlockState::Allocated => {
            if block.thread.is_some() != device.caches.exists(block.thread) {
                return Err(format!("allocation {:#x} is in the cache of no thread", block.address));
            }
            if device.heap.live_at(crate::driver::DevicePtr(block.address)) != Some(id) {
                return Err(format!("allocation {:#x} is not known by its address", block.address));
            }
        }
        BlockState::Pending if !device.waits.any(|waiting| waiting == id) => {
            return Err(format!("block {:#x} waits for nothing", block.address));
        }
        BlockState::Free | BlockState::Pending | BlockState::Decommitted => {}
    }
    Ok(())
}

fn add_up(heap: &Heap, id: BlockId, sums: &mut Sums) {
    let block = &heap.blocks[id];
    match block.state {
        BlockState::Free => {
            sums.free.insert(id);
        }
        BlockState::Allocated => {
            sums.live += 1;
            sums.allocated += block.bytes;
        }
        BlockState::Pending | BlockState::Decommitted => {}
    }
    if matches!(block.state, BlockState::Allocated | BlockState::Pending) {
        sums.active += block.bytes;
        sums.requested += block.requested;
    }
}

fn segments_are_apart(heap: &Heap) -> Result<(), String> {
    let mut ranges: Vec<(u64, u64)> =
        heap.segments().map(|(_, segment)| (segment.base.0, segment.base.0 + segment.range_bytes)).collect();
    ranges.sort_unstable();
    match ranges.windows(2).find(|pair| pair[0].1 > pair[1].0) {
        Some(overlap) => Err(format!("segments {:#x} and {:#x} overlap", overlap[0].0, overlap[1].0)),
        None => Ok(()),
    }
}

fn free_lists_are_right(heap: &Heap, free: &HashSet<BlockId>) -> Result<(), String> {
    let mut listed = 0;
    for list in heap.pools.ids().flat_map(|pool| heap.pools.lists_of(pool)) {
        for block in heap.pools[list].free.iter(&heap.blocks) {
            listed += 1;
            if !free.contains(&block) || heap.blocks[block].list != list {
                return Err(format!("block {:#x} is in the wrong free list", heap.blocks[block].address));
            }
        }
    }
    if listed != free.len() {
        return Err(format!("{} free blocks, {listed} of them in free lists", free.len()));
    }
    Ok(())
}

fn pools_count_their_segments(heap: &Heap) -> Result<(), String> {
    for pool in heap.pools.ids() {
        let (segments, counted) = (heap.segments_of(pool).len(), heap.pools[pool].segments);
        if segments != counted as usize {
            return Err(format!("pool {:?} counts {counted} segments, not {segments}", heap.pools[pool].id));
        }
    }
    Ok(())
}

fn accounting_is_right(device: &DeviceState, sums: &Sums) -> Result<(), String> {
    let (populated, told) = (&sums.populated, device.accounting.populated());
    if populated != told {
        return Err(format!("populated {populated:?}, but the accounting says {told:?}"));
    }
    let places = &device.accounting.places;
    let places = [places.device, places.host, places.unplaced];
    if places.map(|level| level.current) != [populated.device, populated.host, populated.unplaced] {
        return Err(format!("populated {populated:?}, but the statistics say {places:?}"));
    }
    let stats = &device.accounting.stats;
    let figures = [
        ("allocation", stats.allocation, sums.live as u64),
        ("allocated_bytes", stats.allocated_bytes, sums.allocated),
        ("active_bytes", stats.active_bytes, sums.active),
        ("requested_bytes", stats.requested_bytes, sums.requested),
        ("reserved_bytes", stats.reserved_bytes, sums.reserved),
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
