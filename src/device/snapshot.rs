//! What `torch.cuda.memory._snapshot()` shows, and where segments lie.

use super::state::DeviceState;
use crate::blocks::BlockState;
use crate::driver::{DeviceIndex, DevicePtr, Stream};
use crate::history::{Action, Context, Recording, TraceEntry};
use crate::ids::{BlockId, DEFAULT_POOL, MempoolId, SegmentId};
use crate::place::Place;
use crate::segments::{Memory, Segment};

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

/// A segment and where its pages lie. Sizes in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentPlace {
    /// First byte.
    pub base: DevicePtr,
    /// Length of its address range.
    pub range_bytes: u64,
    /// From its start, what its blocks fill, holes included.
    pub filled: u64,
    /// How much of that is holes.
    pub vacant: u64,
    /// What is discarded beyond `filled`.
    pub discarded_end: u64,
    /// Populated on the device.
    pub device: u64,
    /// Populated in host memory.
    pub host: u64,
    /// Populated wherever the driver keeps it.
    pub unplaced: u64,
    /// What it is made of.
    pub memory: Memory,
    /// Where it is meant to live.
    pub place: Place,
    /// Of blocks of at most 1 MiB.
    pub small: bool,
    /// It grows.
    pub growing: bool,
    /// The pool it belongs to.
    pub pool: MempoolId,
}

/// What a snapshot holds.
pub struct Snapshot {
    /// Segments by device and address.
    pub segments: Vec<SegmentInfo>,
    /// The trace of each device, oldest entry first.
    pub traces: Vec<Vec<TraceEntry>>,
}

/// All segments, or one pool's, by address.
pub(crate) fn take(device: &mut DeviceState, mempool: MempoolId) -> Vec<SegmentInfo> {
    let pools = &device.heap.pools;
    let mut segments: Vec<SegmentInfo> = device
        .heap
        .segments()
        .filter(|(_, segment)| mempool == DEFAULT_POOL || pools[pools[segment.list].pool].id == mempool)
        .flat_map(|(id, _)| segment_infos(device, id))
        .collect();
    segments.sort_by_key(|segment| segment.address);
    let active = segments.iter().map(|segment| segment.active_bytes).sum();
    device.tracer.event(Action::Snapshot, 0, active, Stream(0), None);
    segments
}

/// A segment as `native` shows its expandable ones: a segment for each part between decommitted blocks.
fn segment_infos(device: &DeviceState, id: SegmentId) -> Vec<SegmentInfo> {
    let blocks = device.heap.blocks_of(id);
    blocks
        .split(|&block| device.heap.blocks[block].state == BlockState::Decommitted)
        .filter(|part| !part.is_empty())
        .map(|part| segment_info(device, id, part))
        .collect()
}

fn segment_info(device: &DeviceState, id: SegmentId, part: &[BlockId]) -> SegmentInfo {
    let heap = &device.heap;
    let segment = heap.segment(id);
    let list = &heap.pools[segment.list];
    let blocks: Vec<BlockInfo> = part.iter().map(|&block| block_info(device, block)).collect();
    let sum = |which: fn(&BlockInfo) -> bool, what: fn(&BlockInfo) -> u64| {
        blocks.iter().filter(|&block| which(block)).map(what).sum()
    };
    SegmentInfo {
        device: device.gpu.index,
        address: part.first().map_or(segment.base.0, |&block| heap.blocks[block].address),
        total_bytes: sum(|_| true, |block| block.bytes),
        requested_bytes: sum(|block| block.active, |block| block.requested_bytes),
        allocated_bytes: sum(|block| block.allocated, |block| block.bytes),
        active_bytes: sum(|block| block.active, |block| block.bytes),
        stream: list.stream,
        is_large: !list.small,
        is_expandable: segment.growing,
        mempool: heap.pools[list.pool].id,
        context: segment.context.clone(),
        blocks,
    }
}

fn block_info(device: &DeviceState, id: BlockId) -> BlockInfo {
    let block = &device.heap.blocks[id];
    BlockInfo {
        bytes: block.bytes,
        requested_bytes: block.requested,
        allocated: block.state == BlockState::Allocated,
        active: block.state != BlockState::Free,
        context: device.tracer.context_of(id),
    }
}

/// All segments by address, and where their pages lie.
pub(crate) fn segment_places(device: &DeviceState) -> Vec<SegmentPlace> {
    let mut all: Vec<_> = device.heap.segments().map(|(_, segment)| place_of(device, segment)).collect();
    all.sort_by_key(|segment| segment.base);
    all
}

fn place_of(device: &DeviceState, segment: &Segment) -> SegmentPlace {
    let list = &device.heap.pools[segment.list];
    SegmentPlace {
        base: segment.base,
        range_bytes: segment.range_bytes,
        filled: segment.filled,
        vacant: segment.decommitted,
        discarded_end: segment.discarded_end(),
        device: segment.populated_in(Place::Device),
        host: segment.populated_in(Place::Host),
        unplaced: segment.populated_in(Place::Unplaced),
        memory: segment.memory,
        place: segment.place,
        small: list.small,
        growing: segment.growing,
        pool: device.heap.pools[list.pool].id,
    }
}

/// Starts or stops the memory history, and the samples of what is populated where.
pub(crate) fn record(device: &mut DeviceState, recording: Recording) {
    device.empty_thread_caches();
    device.accounting.sample(recording.enabled, recording.clear);
    device.tracer.record(recording);
}

/// Whether the trace trackers are told of everything.
pub(crate) fn track(device: &mut DeviceState, on: bool) {
    device.empty_thread_caches();
    device.tracer.track(on);
}
