//! Private pools: CUDA graphs and MemPools, and the checkpoints that CUDA graph trees make of them.

use super::ready;
use super::state::DeviceState;
use crate::blocks::BlockState;
use crate::driver::{DeviceIndex, DevicePtr, Stream};
use crate::error::{Error, Result};
use crate::heap::Request;
use crate::history::Context;
use crate::hooks::StreamFilter;
use crate::ids::{BlockId, MempoolId, PoolId, SegmentId};
use crate::options::AccessPattern;
use crate::placement;
use crate::segments::CustomAllocator;
use crate::streams::StreamOn;

/// What a private pool held at one moment: enough to bring it back there.
#[derive(Clone, Debug)]
pub struct PoolState {
    id: MempoolId,
    device: DeviceIndex,
    segments: Vec<SegmentState>,
}

impl PoolState {
    /// The device that the pool belongs to.
    pub fn device(&self) -> DeviceIndex {
        self.device
    }
}

#[derive(Clone, Debug)]
struct SegmentState {
    base: DevicePtr,
    blocks: Vec<BlockStateAt>,
}

#[derive(Clone, Debug)]
struct BlockStateAt {
    address: u64,
    bytes: u64,
    requested: u64,
    allocated: bool,
    uses: Vec<StreamOn>,
}

/// What bringing a pool back to a checkpoint did. An address may be in both.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Allocations that are no more.
    pub freed: Vec<u64>,
    /// Allocations that are, and that the caller owns now.
    pub created: Vec<u64>,
}

fn unknown_pool(id: MempoolId) -> Error {
    Error::InvalidArgument(format!("mempool ({}, {}) does not exist on this device", id.0, id.1))
}

fn pool_named(device: &DeviceState, id: MempoolId) -> Result<PoolId> {
    device.heap.pools.find(id).filter(|&pool| pool != PoolId::DEFAULT).ok_or_else(|| unknown_pool(id))
}

/// Makes a pool, or holds it once more.
///
/// # Errors
/// [`Error::InvalidArgument`] for a pool that everybody has let go of, and for the default pool.
pub(crate) fn ensure(device: &mut DeviceState, id: MempoolId, custom: Option<CustomAllocator>) -> Result<PoolId> {
    match device.heap.pools.find(id) {
        None => Ok(device.heap.pools.create(id, custom)),
        Some(PoolId::DEFAULT) => Err(Error::InvalidArgument("mempool (0, 0) is the default pool".into())),
        Some(pool) => {
            let held = &mut device.heap.pools[pool];
            if held.use_count == 0 {
                return Err(Error::InvalidArgument(format!(
                    "mempool ({}, {}) has been released and cannot be used again",
                    id.0, id.1
                )));
            }
            held.use_count += 1;
            held.custom = held.custom.or(custom);
            Ok(pool)
        }
    }
}

/// From now on requests on the streams that `filter` selects are served from this pool. `stream` is the caller's
/// current one: where a graph is captured, it is captured on that.
///
/// # Errors
/// As [`ensure`]; [`Error::InvalidArgument`] when this pool already is recorded to.
pub(crate) fn begin(
    device: &mut DeviceState,
    id: MempoolId,
    filter: StreamFilter,
    stream: Stream,
    custom: Option<CustomAllocator>,
) -> Result<()> {
    if device.heap.pools.find(id).is_some_and(|pool| device.routes.leads_to(pool)) {
        return Err(Error::InvalidArgument(format!(
            "beginAllocateToPool: already recording to mempool ({}, {})",
            id.0, id.1
        )));
    }
    let pool = ensure(device, id, custom)?;
    device.empty_thread_caches();
    device.routes.begin(pool, filter, stream);
    Ok(())
}

/// Ends [`begin`].
///
/// # Errors
/// [`Error::InvalidArgument`] when this pool is not recorded to.
pub(crate) fn end(device: &mut DeviceState, id: MempoolId) -> Result<()> {
    let ended = device.heap.pools.find(id).is_some_and(|pool| device.routes.end(pool));
    if !ended {
        return Err(Error::InvalidArgument(format!(
            "endAllocateToPool: not currently recording to mempool ({}, {})",
            id.0, id.1
        )));
    }
    Ok(())
}

/// Lets go of a pool once. When nobody holds it, its segments may be given back as they become free.
///
/// # Errors
/// [`Error::InvalidArgument`] for an unknown pool or one that nobody holds.
pub(crate) fn release(device: &mut DeviceState, id: MempoolId) -> Result<()> {
    let pool = pool_named(device, id)?;
    let held = &mut device.heap.pools[pool];
    if held.use_count == 0 {
        return Err(Error::InvalidArgument(format!("mempool ({}, {}) has already been released", id.0, id.1)));
    }
    held.use_count -= 1;
    Ok(())
}

/// How many hold the pool.
///
/// # Errors
/// [`Error::InvalidArgument`] for an unknown pool.
pub(crate) fn use_count(device: &DeviceState, id: MempoolId) -> Result<i32> {
    Ok(device.heap.pools[pool_named(device, id)?].use_count)
}

/// Whether others may take this pool's free blocks before they run out of memory.
///
/// # Errors
/// [`Error::InvalidArgument`] for an unknown pool.
pub(crate) fn set_use_on_oom(device: &mut DeviceState, id: MempoolId, on: bool) -> Result<()> {
    let pool = pool_named(device, id)?;
    device.heap.pools[pool].use_on_oom = on;
    Ok(())
}

/// Whether this pool's blocks are handed out whole.
///
/// # Errors
/// [`Error::InvalidArgument`] for an unknown pool.
pub(crate) fn set_no_split(device: &mut DeviceState, id: MempoolId, on: bool) -> Result<()> {
    let pool = pool_named(device, id)?;
    device.heap.pools.set_no_split(pool, on);
    Ok(())
}

/// Where what the pool takes from CUDA from now on is placed.
///
/// # Errors
/// [`Error::InvalidArgument`] for an unknown pool; [`Error::NotSupported`] for managed memory on a device that has
/// none worth the name.
pub(crate) fn set_placement(device: &mut DeviceState, id: MempoolId, pattern: AccessPattern) -> Result<()> {
    let pool = pool_named(device, id)?;
    placement::check_supported(&device.gpu.info, device.gpu.index, pattern)?;
    device.heap.pools[pool].placement = Some(pattern);
    Ok(())
}

/// Whether the live allocations of the pool are exactly these addresses.
///
/// # Errors
/// [`Error::InvalidArgument`] for an unknown pool.
pub(crate) fn live_allocations_are(device: &DeviceState, id: MempoolId, expected: &[u64]) -> Result<bool> {
    let pool = pool_named(device, id)?;
    let in_pool = |block: BlockId| device.heap.pools[device.heap.blocks[block].list].pool == pool;
    let live = device.heap.live().filter(|&block| in_pool(block)).count();
    Ok(live == expected.len()
        && expected.iter().all(|address| device.heap.live_at(DevicePtr(*address)).is_some_and(in_pool)))
}

fn pool_waits(device: &DeviceState, pool: PoolId) -> bool {
    device.waits.any(|block| device.heap.pools[device.heap.blocks[block].list].pool == pool)
}

/// What the pool holds now.
///
/// # Errors
/// [`Error::InvalidArgument`] for an unknown or released pool, or one with frees that wait for events; the driver's.
pub(crate) fn checkpoint(device: &mut DeviceState, id: MempoolId) -> Result<PoolState> {
    let pool = pool_named(device, id)?;
    if device.heap.pools[pool].use_count == 0 {
        return Err(Error::InvalidArgument(format!(
            "mempool ({}, {}) has been released and cannot be checkpointed",
            id.0, id.1
        )));
    }
    if !device.capturing() {
        device.process_events()?;
    }
    if pool_waits(device, pool) {
        return Err(Error::InvalidArgument(
            "a private pool can only be checkpointed when no freed block in it waits for another stream".into(),
        ));
    }
    let segments = device
        .heap
        .segments_of(pool)
        .into_iter()
        .map(|id| SegmentState {
            base: device.heap.segment(id).base,
            blocks: device
                .heap
                .blocks_of(id)
                .into_iter()
                .map(|block| BlockStateAt {
                    address: device.heap.blocks[block].address,
                    bytes: device.heap.blocks[block].bytes,
                    requested: device.heap.blocks[block].requested,
                    allocated: device.heap.blocks[block].state == BlockState::Allocated,
                    uses: device.waits.uses(block),
                })
                .collect(),
        })
        .collect();
    Ok(PoolState { id, device: device.gpu.index, segments })
}

/// Brings a pool back to a checkpoint: frees what it has allocated, then allocates what was allocated then, at the same
/// addresses. Segments made or grown since then stay, free.
///
/// # Errors
/// [`Error::InvalidArgument`] for an unknown or released pool, one with frees that wait for events, or a checkpoint
/// that does not fit it (a segment is gone); the driver's. Nothing has changed then.
pub(crate) fn restore(device: &mut DeviceState, state: &PoolState, context: Option<Context>) -> Result<Restored> {
    let pool = pool_named(device, state.id)?;
    if device.heap.pools[pool].use_count == 0 {
        return Err(Error::InvalidArgument(format!(
            "mempool ({}, {}) has been released and cannot be restored",
            state.id.0, state.id.1
        )));
    }
    if pool_waits(device, pool) {
        return Err(Error::InvalidArgument(
            "a private pool can only be restored when no freed block in it waits for another stream".into(),
        ));
    }
    let segments = device.heap.segments_of(pool);
    let mut targets = Vec::with_capacity(state.segments.len());
    for then in &state.segments {
        let found = segments.iter().copied().find(|&id| device.heap.segment(id).base == then.base);
        match found {
            Some(id) => targets.push((id, then)),
            None => {
                return Err(Error::InvalidArgument(format!(
                    "the checkpoint's segment at {:?} is not in the pool any more",
                    then.base
                )));
            }
        }
    }

    // What is handed out again below keeps its contents, so nothing moves; but nothing is handed out discarded.
    for &id in &segments {
        let stream = device.heap.pools[device.heap.segment(id).list].stream;
        ready::populate_all(device, id, stream)?;
    }

    let mut restored = Restored::default();
    for &id in &segments {
        for address in device.heap.live_in(id) {
            // Their uses belong to replays that are over.
            if let Some(block) = device.heap.live_at(DevicePtr(address)) {
                device.heap.blocks[block].has_uses = false;
                device.waits.forget(block);
            }
            device.free(DevicePtr(address), &mut context.clone());
            device.flush_thread_caches();
            restored.freed.push(address);
        }
    }
    for (id, then) in targets {
        restore_segment(device, id, then, &context, &mut restored);
    }
    Ok(restored)
}

/// Cuts a wholly free segment as it was: allocates every block up to the last live one in address order, then frees
/// those that were free.
fn restore_segment(
    device: &mut DeviceState,
    id: SegmentId,
    then: &SegmentState,
    context: &Option<Context>,
    restored: &mut Restored,
) {
    let Some(end) = then.blocks.iter().rposition(|block| block.allocated) else { return };
    let list = device.heap.segment(id).list;
    let stream: Stream = device.heap.pools[list].stream;
    let mut holes = Vec::new();
    for block in &then.blocks[..=end] {
        let free = device.heap.segment(id).last;
        // A free block counts as a request for all of it, so that statistics go up and down by the same.
        let bytes = if block.allocated { block.requested } else { block.bytes };
        let request = Request { bytes, rounded: block.bytes, stream, list };
        let ptr = device.hand_out_exactly(free, &request, context.clone());
        debug_assert_eq!(ptr.0, block.address);
        if block.allocated {
            for &(other, stream) in &block.uses {
                let known = device.record_stream(ptr, other, stream);
                debug_assert!(known.is_ok());
            }
            restored.created.push(ptr.0);
        } else {
            holes.push(ptr);
        }
    }
    for hole in holes {
        device.free(hole, &mut context.clone());
        device.flush_thread_caches();
    }
}
