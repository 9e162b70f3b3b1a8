//! Live memory leaves the device when its limit is met (eviction), and comes back when there is room (promotion).
//! Which, and when, is decided in [`crate::pressure`].

use super::residency::{self, movable};
use super::state::DeviceState;
use crate::driver::{DevicePtr, Stream};
use crate::error::Result;
use crate::gpu::Order;
use crate::ids::{BlockId, DEFAULT_POOL, MempoolId};
use crate::pages::{self, PAGE};
use crate::place::Place;
use crate::pressure::{Pressure, Resident, Stage};
use crate::segments::Memory;

/// Finds out how short of device memory it is when `more` bytes are wanted there.
pub(super) fn note_pressure(device: &mut DeviceState, more: u64) {
    if !device.limits.default_policy().evicts() {
        return;
    }
    let (limit, keep) = (device.limits.budget.device_limit(), device.limits.keep_free());
    let populated = device.accounting.populated().device;
    let pressure = &mut device.evictions.pressure;
    if pressure.observe(limit, populated, more, keep) {
        let stage = pressure.stage();
        device.accounting.places.stage = stage as u64;
        device.accounting.places.stage_changes += 1;
        tracing::debug!(device = device.gpu.index, ?stage, populated, limit, "stage changed");
    }
}

/// Evicts live memory to the host until `bytes` more fit under the device limit: the youngest of what lives long
/// ([`EvictionPolicy`](crate::pressure::EvictionPolicy)). Answers whether they do; where there is not enough to evict,
/// nothing moves. Not while anything is captured: a graph knows nothing of moves. Where the driver refuses a move, what
/// has moved stays out, and the request does without the rest.
pub(super) fn evict(device: &mut DeviceState, bytes: u64, stream: Stream) -> bool {
    try_to_evict(device, bytes, stream).unwrap_or_else(|error| {
        tracing::warn!(device = device.gpu.index, %error, "live memory could not be evicted");
        false
    })
}

fn try_to_evict(device: &mut DeviceState, bytes: u64, stream: Stream) -> Result<bool> {
    let (clock, limit) = (device.accounting.clock(), device.limits.budget.device_limit());
    let may = device.limits.options.prefetch && device.evictions.policy.may_search(clock) && !device.capturing();
    if !may || device.gpu.captures(stream)? {
        return Ok(false);
    }
    let wanted = bytes.next_multiple_of(PAGE);
    let residents = residents(device);
    let chosen = device.evictions.policy.choose(residents, clock, limit, wanted);
    let pages = chosen.iter().map(|&(_, bytes)| bytes / PAGE).sum();
    if chosen.is_empty() || residency::capacity_for(device, Place::Host, pages)? < pages {
        return Ok(false);
    }
    device.evictions.promotion.evicted(clock, limit);
    for (address, bytes) in chosen {
        let block = device.heap.find(DevicePtr(address))?;
        evict_block(device, block, bytes / PAGE, stream)?;
    }
    device.accounting.reclaimed_hard(wanted);
    Ok(true)
}

/// The live allocations that may be evicted: of the default pool and of MemPools (a graph's memory is used where it was
/// captured), with whole pages on the device about which the program has not said anything.
fn residents(device: &mut DeviceState) -> Vec<Resident> {
    let of_program = |id: MempoolId| id == DEFAULT_POOL || id.0 != 0;
    device.count_cached_rounds();
    let heap = &device.heap;
    let large: Vec<BlockId> = heap.live().filter(|&block| heap.blocks[block].bytes >= PAGE).collect();
    let mut found = Vec::new();
    for block in large {
        // What a thread has cached is not live.
        if device.heap.blocks[block].thread.is_some() && !device.take_live(block) {
            continue;
        }
        let heap = &device.heap;
        if !of_program(heap.pools[heap.pool_of(block)].id) {
            continue;
        }
        let (address, born) = (heap.blocks[block].address, heap.blocks[block].born);
        let on_device: u64 = movable(device, block, Place::Device).iter().map(pages::bytes).sum();
        if on_device > 0 && heap.segment(heap.blocks[block].segment).memory == Memory::Managed {
            found.push(Resident { address, born, bytes: on_device });
        }
    }
    found
}

/// Evicts the last `count` movable pages of a live block to the host, where the GPU reaches them.
fn evict_block(device: &mut DeviceState, block: BlockId, count: u64, stream: Stream) -> Result<()> {
    let evicted = device.heap.blocks[block];
    let mut missing = count;
    device.heap.blocks[block].may_have_flags = true;
    for run in movable(device, block, Place::Device).into_iter().rev() {
        let run = run.start.max(run.end.saturating_sub(missing))..run.end;
        if run.is_empty() {
            break;
        }
        missing -= run.end - run.start;
        let moved = residency::relocate(device, evicted.segment, run, Place::Host, false, Order::on(stream))?;
        device.accounting.places.moved_out += moved;
    }
    device.accounting.places.moves_out += 1;
    let clock = device.accounting.clock();
    device.evictions.evicted(evicted.address, clock);
    let (address, bytes, age) = (evicted.address, count * PAGE, clock - evicted.born);
    tracing::debug!(
        device = device.gpu.index,
        address = format_args!("{address:#x}"),
        bytes,
        age,
        "live memory was evicted"
    );
    Ok(())
}

/// Promotes live memory that was evicted: brings it back to the device, what is oldest first, as far as the device
/// stays ample ([`PromotionPolicy`](crate::pressure::PromotionPolicy)). The work that uses it meanwhile is not waited
/// for, nor has it to wait.
///
/// # Errors
/// The driver's. What has come back stays.
pub(super) fn promote(device: &mut DeviceState) -> Result<()> {
    let (clock, limit) = (device.accounting.clock(), device.limits.budget.device_limit());
    let evictions = &device.evictions;
    let ample = evictions.pressure.stage() == Stage::Ample && device.limits.default_policy().evicts();
    if evictions.addresses().len() == 0
        || !ample
        || !device.limits.options.prefetch
        || !evictions.promotion.may_promote(clock, limit)
    {
        return Ok(());
    }
    let populated = device.accounting.populated().device;
    let mut headroom = Pressure::headroom(limit, populated, device.limits.keep_free()) / PAGE;
    let heap = &device.heap;
    let live = |address| heap.live_at(DevicePtr(address));
    let mut evicted: Vec<BlockId> = evictions.addresses().filter_map(live).collect();
    evicted.sort_unstable_by_key(|&block| (heap.blocks[block].born, heap.blocks[block].address));
    let side = device.gpu.side_stream()?;
    for block in evicted {
        let (address, id) = (device.heap.blocks[block].address, device.heap.blocks[block].segment);
        let mut left = false;
        for run in movable(device, block, Place::Host) {
            let back = run.start..run.end.min(run.start + headroom);
            left |= back.end < run.end;
            if back.is_empty() {
                break;
            }
            headroom -= back.end - back.start;
            let bytes = residency::relocate(device, id, back, Place::Device, false, Order::on(side))?;
            device.evictions.promotion.promoted(clock);
            let address = format_args!("{address:#x}");
            tracing::debug!(device = device.gpu.index, address, bytes, "live memory was promoted");
        }
        if !left {
            device.evictions.forget(address);
        }
        residency::note_flags(device, block);
    }
    note_pressure(device, 0);
    Ok(())
}
