//! Cached memory goes back to CUDA: when the program asks, when the device is nearly full, at a limit, and when it was
//! free for long. Segments go whole; of others the free pages are decommitted, where the driver can discard them.

use super::eviction;
use super::state::DeviceState;
use crate::blocks::BlockState;
use crate::driver::Range;
use crate::error::Result;
use crate::heap::Request;
use crate::history::{Action, Context};
use crate::ids::{BlockId, DEFAULT_POOL, MempoolId, PoolId, SegmentId};
use crate::pages::{self, PAGE};
use crate::place::Place;
use crate::placement;
use crate::segments::{Memory, Segment};
use std::ops;

/// The program gives cached memory back: see [`release_cached`].
///
/// # Errors
/// The driver's.
pub(crate) fn empty_cache(device: &mut DeviceState, mempool: MempoolId, context: Option<Context>) -> Result<()> {
    device.tracer.begin_cause(context);
    let released = release_cached(device, mempool);
    device.tracer.end_cause();
    released
}

/// Gives all wholly free segments back, and the free pages of others: those of the default pool and of pools that
/// nobody holds, or only those of one such pool. Nothing while a CUDA graph is captured, as `native`: giving memory
/// back waits for the device. Where the device is ample then, live memory that was evicted is promoted.
///
/// # Errors
/// The driver's.
pub(super) fn release_cached(device: &mut DeviceState, mempool: MempoolId) -> Result<()> {
    let pools = &device.heap.pools;
    let freeable: Vec<PoolId> = pools
        .ids()
        .filter(|&pool| pool != PoolId::DEFAULT && pools[pool].use_count == 0)
        .filter(|&pool| mempool == DEFAULT_POOL || pools[pool].id == mempool)
        .collect();
    if mempool != DEFAULT_POOL && freeable.is_empty() {
        return Ok(());
    }
    if device.routes.capturing(&device.gpu)? {
        tracing::debug!(device = device.gpu.index, "cached memory is kept while a graph is captured");
        return Ok(());
    }
    // No stream of this device captures, but one of another may.
    let _relaxed = device.gpu.relaxed()?;
    let mut first = Ok(());
    if mempool == DEFAULT_POOL {
        device.synchronize_events(None);
        first = first.and(release_free(device, PoolId::DEFAULT));
    }
    for pool in freeable {
        if mempool != DEFAULT_POOL {
            device.synchronize_events(Some(pool));
        }
        let released = release_free(device, pool);
        first = first.and(released);
        if device.heap.pools[pool].segments == 0 {
            device.hooks.pool_forgotten(device.gpu.index, device.heap.pools[pool].id);
            device.heap.pools.forget(pool);
        }
    }
    device.gpu.retry_abandoned();
    eviction::note_pressure(device, 0);
    if mempool == DEFAULT_POOL {
        first = first.and(eviction::promote(device));
    }
    first
}

/// Gives what is free in a pool back: wholly free segments, and the free pages of others.
fn release_free(device: &mut DeviceState, pool: PoolId) -> Result<()> {
    let released = release_all(device, device.heap.releasable(pool));
    let rest = decommittable(device, pool);
    released.and(decommit_all(device, rest))
}

/// Gives segments back one after the other; an error does not keep the others.
fn release_all(device: &mut DeviceState, segments: Vec<(SegmentId, u64)>) -> Result<()> {
    let mut first = Ok(());
    for (id, _) in segments {
        let released = release_segment(device, id);
        first = first.and(released);
    }
    first
}

/// Gives one wholly free segment back to CUDA.
fn release_segment(device: &mut DeviceState, id: SegmentId) -> Result<()> {
    let heap = &device.heap;
    let Segment { base, list, growing, memory, oversize, place, .. } = *heap.segment(id);
    let segment = heap.segment(id);
    let places = [(place, segment.populated_in(place)), (place.other(), segment.nonresident())];
    let (freed, kept) =
        if growing { (Action::SegmentUnmap, Action::SegmentMap) } else { (Action::SegmentFree, Action::SegmentAlloc) };
    // All of it free, decommitted or not.
    let parts: Vec<(u64, u64)> = heap
        .blocks_of(id)
        .iter()
        .map(|&block| &heap.blocks[block])
        .filter(|block| block.state == BlockState::Free)
        .map(|block| (block.address, block.bytes))
        .collect();
    // Trackers (NCCL's registrations) must let go of the memory before it goes.
    for &(address, bytes) in &parts {
        device.tracer.segment(freed, &device.heap, id, address, bytes);
    }
    let given_back = match memory {
        Memory::Custom(custom) if device.hooks.custom_free(custom, base) => Ok(()),
        _ => device.gpu.free(base),
    };
    if let Err(error) = given_back {
        for &(address, bytes) in &parts {
            device.tracer.segment(kept, &device.heap, id, address, bytes);
        }
        return Err(error.into());
    }
    let owner = device.owner(list);
    device.heap.remove_segment(id);
    let places = if place == Place::Unplaced { &places[..1] } else { &places[..] };
    device.accounting.unpopulate(owner, places);
    if !growing {
        device.accounting.segment_gone(owner.small, oversize);
    }
    Ok(())
}

/// The free pages of a pool that can be given back alone, since their segments are in use otherwise: their blocks, and
/// how many bytes of each.
fn decommittable(device: &DeviceState, pool: PoolId) -> Vec<(BlockId, u64)> {
    device.heap.decommittable(pool, |place| placement::can_shrink(place, &device.gpu.info, &device.limits.options))
}

/// Decommits the whole pages of free blocks; an error does not keep the others.
fn decommit_all(device: &mut DeviceState, free: Vec<(BlockId, u64)>) -> Result<()> {
    if free.is_empty() {
        return Ok(());
    }
    device.gpu.wait_for_work()?;
    let mut first = Ok(());
    for (block, _) in free {
        let decommitted = decommit_block(device, block);
        first = first.and(decommitted);
    }
    first
}

fn decommit_block(device: &mut DeviceState, mut block: BlockId) -> Result<()> {
    // What is left of the block is below: the next run lies in it.
    for run in device.heap.ordinary_pages(block).into_iter().rev() {
        block = decommit(device, block, run)?;
    }
    Ok(())
}

/// Gives pages of a free block back that no stream uses any more: discards them. The address space stays, and is
/// populated as if it were new before it is used again. Answers the block that is left below them.
fn decommit(device: &mut DeviceState, block: BlockId, pages: ops::Range<u64>) -> Result<BlockId> {
    let free = device.heap.blocks[block];
    let id = free.segment;
    let segment = device.heap.segment(id);
    let (place, start, bytes) = (segment.place, segment.base.offset(pages.start * PAGE), pages::bytes(&pages));
    // As before a whole segment goes.
    device.tracer.segment(Action::SegmentUnmap, &device.heap, id, start.0, bytes);
    if let Err(failed) = device.gpu.discard_unused(Range { ptr: start, bytes }) {
        if failed.discarded {
            device.heap.segment_mut(id).flags.unpopulated.insert(pages);
            device.heap.blocks[block].may_have_flags = true;
        }
        device.tracer.segment(Action::SegmentMap, &device.heap, id, start.0, bytes);
        return Err(failed.error.into());
    }
    device.accounting.places.discarded += bytes;
    device.heap.segment_mut(id).flags.unpopulated.remove(pages.clone());
    let below = device.heap.decommit(block, &pages);
    device.accounting.unpopulate(device.owner(free.list), &[(place, bytes)]);
    Ok(below)
}

/// Light reclamation: when the device is nearly full, wholly free segments on it are given back before it is populated
/// further for a request, then the free pages of others. Where CUDA does not take some back, the request does without.
pub(super) fn reclaim_light(device: &mut DeviceState, bytes: u64, request: &Request) {
    let before = device.accounting.populated().device;
    if let Err(error) = give_back_on_device(device, bytes, request) {
        tracing::warn!(device = device.gpu.index, %error, "cached memory could not be given back");
    }
    let given_back = before - device.accounting.populated().device;
    if given_back > 0 {
        device.accounting.reclaimed_lightly(given_back);
        tracing::debug!(device = device.gpu.index, bytes = given_back, "cached memory was given back");
    }
}

fn give_back_on_device(device: &mut DeviceState, bytes: u64, request: &Request) -> Result<()> {
    let limit = device.limits.budget.device_limit();
    let keep = device.evictions.pressure.margin(limit, device.limits.keep_free());
    let wanted = device.accounting.populated().device.saturating_add(bytes).saturating_add(keep);
    if wanted <= limit || !device.limits.default_policy().needs_managed() || device.capturing() {
        return Ok(());
    }
    let mut excess = (wanted - limit).min(bytes);
    let on_device: Vec<_> = device
        .heap
        .releasable(PoolId::DEFAULT)
        .into_iter()
        .map(|(id, _)| (id, device.heap.segment(id).populated_in(Place::Device)))
        .filter(|&(_, bytes)| bytes > 0)
        .collect();
    let mut first = Ok(());
    for (id, bytes) in on_device {
        if excess == 0 {
            break;
        }
        match release_segment(device, id) {
            Ok(()) => excess = excess.saturating_sub(bytes),
            Err(error) => first = first.and(Err(error)),
        }
    }
    if excess == 0 {
        return first;
    }
    let mut pages = decommittable(device, PoolId::DEFAULT);
    // Those of the request's own list would only be populated again for it.
    pages.retain(|&(block, bytes)| {
        let taken = excess > 0 && device.heap.blocks[block].list != request.list;
        excess = excess.saturating_sub(if taken { bytes } else { 0 });
        taken
    });
    first.and(decommit_all(device, pages))
}

/// `max_split_size_mb`: gives oversize segments back until the request would fit in their place. Answers
/// whether enough was given back.
///
/// # Errors
/// The driver's.
pub(super) fn release_oversize(device: &mut DeviceState, request: &Request) -> Result<bool> {
    let max_split = device.limits.native.max_split_size;
    if max_split == u64::MAX {
        return Ok(false);
    }
    let wanted = request.rounded.max(max_split);
    let mut oversize = device.heap.oversize_segments(request.list, max_split);
    oversize.sort_by_key(|&(_, bytes)| bytes);
    let chosen = match oversize.iter().position(|&(_, bytes)| bytes >= wanted) {
        Some(one) => vec![oversize[one]],
        None => {
            let mut released = 0;
            oversize
                .into_iter()
                .rev()
                .take_while(|&(_, bytes)| {
                    let more = released < wanted;
                    released += bytes;
                    more
                })
                .collect()
        }
    };
    let enough = chosen.iter().map(|&(_, bytes)| bytes).sum::<u64>() >= wanted;
    release_all(device, chosen)?;
    Ok(enough)
}

/// `garbage_collection_threshold`: gives back large segments that were free for long, when the process uses more than that
/// share of what it is allowed. As in `native`, only where the program set a fraction.
pub(super) fn collect_garbage(device: &mut DeviceState) {
    let threshold = device.limits.native.garbage_collection_threshold;
    let budget = &device.limits.budget;
    if threshold <= 0.0 || !budget.fraction_is_set() || device.capturing() {
        return;
    }
    let populated = device.accounting.populated();
    let allowed = budget.allowed().unwrap_or_else(|| budget.capacity(populated, None).capacity);
    let start = (threshold * allowed as f64) as u64;
    let mut excess = populated.total().saturating_sub(start);
    let heap = &device.heap;
    let mut candidates: Vec<(SegmentId, u64, u64)> = heap
        .releasable(PoolId::DEFAULT)
        .into_iter()
        .filter(|&(id, _)| !heap.pools[heap.segment(id).list].small)
        .map(|(id, bytes)| {
            let segment = heap.segment(id);
            (id, bytes, heap.pools[segment.list].requests - segment.free_since)
        })
        .collect();
    // Those of at least the average age go first; then the average of the rest decides.
    while excess > 0 && !candidates.is_empty() {
        let average = candidates.iter().map(|&(_, _, age)| age).sum::<u64>() / candidates.len() as u64;
        let (old, young): (Vec<_>, Vec<_>) = candidates.into_iter().partition(|&(_, _, age)| age >= average);
        for (id, bytes, _) in old {
            match release_segment(device, id) {
                Ok(()) => excess = excess.saturating_sub(bytes),
                // The request may do without.
                Err(error) => {
                    tracing::warn!(device = device.gpu.index, %error, "cached memory could not be given back")
                }
            }
        }
        candidates = young;
    }
}
