//! New memory for a request: a growing segment is populated further, or a segment is made. The accounting changes only
//! when CUDA has agreed.

use super::refusal::Refusal;
use super::state::DeviceState;
use super::{eviction, reclaim, residency};
use crate::driver::{DevicePtr, Range};
use crate::gpu::Gpu;
use crate::heap::{Growth, NewSegment, Request};
use crate::history::Action;
use crate::ids::{BlockId, PoolId, SegmentId};
use crate::place::Place;
use crate::placement::{self, Plan, Policy};
use crate::segments::{Memory, population_step, range_bytes};
use crate::sizes::{REQUEST_LIMIT, SMALL_STEP};

/// Puts a free block that fits the request into its list: grows a segment, or makes one.
///
/// # Errors
/// The limit that is met; the driver's.
pub(super) fn new_memory(device: &mut DeviceState, request: &Request) -> Result<(), Refusal> {
    if request.rounded >= REQUEST_LIMIT {
        let capacity = device.limits.budget.capacity(device.accounting.populated(), None);
        return Err(Refusal::Exceeded(capacity));
    }
    let native = &device.limits.native;
    let step = population_step(request.rounded, request.rounded, 0, native);
    let pool = device.heap.pools[request.list].pool;
    // A private pool lives as long as its graphs and is brought back to checkpoints segment by segment; what PyTorch
    // knows of it, it knows of segments like `native`'s.
    let fixed = (pool != PoolId::DEFAULT && !native.expandable_segments) || request.rounded >= native.max_split_size;
    if let Some(custom) = device.heap.pools[pool].custom {
        let plan = Plan { memory: Memory::Custom(custom), place: Place::Unplaced };
        return fixed_segment(device, request, plan, step);
    }
    let policy = device.policy(request.list);
    make_room(device, request, policy, step);
    let plan = policy.plan(device.accounting.populated().device, step, device.limits.budget.device_limit());
    if plan.memory == Memory::Device || fixed {
        fixed_segment(device, request, plan, step)?;
    } else {
        grow_for(device, request, plan.place, step)?;
    }
    if policy.overflowed(plan.place) {
        let (clock, limit) = (device.accounting.clock(), device.limits.budget.device_limit());
        device.evictions.policy.overflowed(clock, limit);
    }
    Ok(())
}

/// Sees that the device has room for `step` bytes, by the rules of the placement.
fn make_room(device: &mut DeviceState, request: &Request, policy: Policy, step: u64) {
    if policy.populates_device() {
        reclaim::reclaim_light(device, step, request);
    }
    if policy.evicts() {
        eviction::note_pressure(device, step);
        let limit = device.limits.budget.device_limit();
        let excess = device.accounting.populated().device.saturating_add(step).saturating_sub(limit);
        // What will not fit on the device whatever is evicted is placed in host memory at once.
        if excess > 0 && step <= limit {
            eviction::evict(device, excess, request.stream);
        }
    }
}

/// Populates a growing segment for the request, `step` bytes of it where no segment has begun.
fn grow_for(device: &mut DeviceState, request: &Request, place: Place, step: u64) -> Result<(), Refusal> {
    let growth = device.heap.growth_for(request, place);
    let (step, missing) = match &growth {
        Some(Growth { missing, offset, available, .. }) => {
            let step = population_step(request.rounded, *missing, *offset, &device.limits.native);
            (step.min(*available), *missing)
        }
        None => (step, request.rounded),
    };
    let mut populate = |bytes| match growth {
        Some(Growth { segment, decommitted: None, .. }) => extend(device, segment, bytes, request),
        Some(Growth { decommitted: Some(block), .. }) => recommit(device, block, bytes, request),
        None => growing_segment(device, request, place, bytes),
    };
    // Close to a limit the step may be too much where the request itself is not.
    let least = missing.next_multiple_of(SMALL_STEP);
    match populate(step) {
        Err(Refusal::Exceeded(_) | Refusal::NoMemory) if least < step => populate(least),
        populated => populated,
    }
}

/// Whether the limits allow `bytes` more in `place`.
fn admit(device: &mut DeviceState, place: Place, bytes: u64) -> Result<(), Refusal> {
    device.limits.admit(&device.gpu, device.accounting.populated(), place, bytes)
}

/// Populates a range ahead of its use, in the order of the requesting stream where that is legal. One that was
/// discarded is populated whatever the options say now.
fn populate(
    device: &mut DeviceState,
    range: Range,
    place: Place,
    discarded: bool,
    request: &Request,
) -> crate::driver::Result<()> {
    let Gpu { index, info, .. } = &device.gpu;
    let to = if discarded {
        placement::home(place, *index, info)
    } else {
        placement::population(place, *index, info, &device.limits.options, request.bytes)
    };
    let Some(to) = to else { return Ok(()) };
    let order = device.gpu.order(request.stream)?;
    device.gpu.prefetch(range, to, order)
}

/// Populates the next `bytes` of a growing segment.
fn extend(device: &mut DeviceState, id: SegmentId, bytes: u64, request: &Request) -> Result<(), Refusal> {
    let segment = device.heap.segment(id);
    let (place, list) = (segment.place, segment.list);
    let start = segment.base.offset(segment.filled);
    let discarded = segment.discarded_end() > 0;
    admit(device, place, bytes)?;
    populate(device, Range { ptr: start, bytes }, place, discarded, request)?;
    let tail = device.heap.extend(id, bytes);
    device.accounting.populate(device.owner(list), place, bytes);
    device.heap.blocks[tail].may_have_flags |= residency::is_flagged(device, tail);
    device.tracer.segment(Action::SegmentMap, &device.heap, id, start.0, bytes);
    Ok(())
}

/// Populates the first `bytes` of a decommitted block.
fn recommit(device: &mut DeviceState, block: BlockId, bytes: u64, request: &Request) -> Result<(), Refusal> {
    let decommitted = device.heap.blocks[block];
    let (address, id) = (decommitted.address, decommitted.segment);
    let place = device.heap.segment(id).place;
    admit(device, place, bytes)?;
    populate(device, Range { ptr: DevicePtr(address), bytes }, place, true, request)?;
    let filled = device.heap.recommit(block, bytes);
    device.heap.blocks[filled].may_have_flags |= residency::is_flagged(device, filled);
    let returned = device.heap.put_back(filled);
    device.accounting.returned(&returned);
    device.accounting.populate(device.owner(decommitted.list), place, bytes);
    device.tracer.segment(Action::SegmentMap, &device.heap, id, address, bytes);
    Ok(())
}

/// Makes a growing segment and populates its first `bytes`.
fn growing_segment(device: &mut DeviceState, request: &Request, place: Place, bytes: u64) -> Result<(), Refusal> {
    admit(device, place, bytes)?;
    let shrinks = placement::can_shrink(place, &device.gpu.info, &device.limits.options);
    let range = range_bytes(request.rounded, shrinks.then_some(device.gpu.info.total_memory));
    let base = managed_range(device, range, bytes, place, request)?;
    add_segment(
        device,
        NewSegment {
            list: request.list,
            base,
            range_bytes: range,
            populated: bytes,
            growing: true,
            memory: Memory::Managed,
            place,
            oversize: false,
            context: device.tracer.segment_context(),
        },
    );
    Ok(())
}

/// Makes a segment that is populated whole and does not grow.
fn fixed_segment(device: &mut DeviceState, request: &Request, plan: Plan, bytes: u64) -> Result<(), Refusal> {
    let Plan { memory, place } = plan;
    admit(device, place, bytes)?;
    let base = match memory {
        Memory::Managed => managed_range(device, bytes, bytes, place, request)?,
        Memory::Device => device.gpu.allocate(bytes)?,
        Memory::Custom(custom) => device.hooks.custom_alloc(custom, bytes).ok_or(Refusal::NoMemory)?,
    };
    add_segment(
        device,
        NewSegment {
            list: request.list,
            base,
            range_bytes: bytes,
            populated: bytes,
            growing: false,
            memory,
            place,
            oversize: bytes >= device.limits.native.max_split_size,
            context: device.tracer.segment_context(),
        },
    );
    Ok(())
}

/// Managed address space with its advice, the first `populated` bytes populated; all of it or nothing.
fn managed_range(
    device: &mut DeviceState,
    bytes: u64,
    populated: u64,
    place: Place,
    request: &Request,
) -> crate::driver::Result<DevicePtr> {
    let advice = placement::advice(place, device.gpu.index, &device.gpu.info);
    let base = device.gpu.reserve(bytes, advice)?;
    if let Err(error) = populate(device, Range { ptr: base, bytes: populated }, place, false, request) {
        device.gpu.abandon(base);
        return Err(error);
    }
    Ok(base)
}

fn add_segment(device: &mut DeviceState, new: NewSegment) {
    let NewSegment { list, base, populated, growing, place, oversize, .. } = new;
    let (id, block) = device.heap.add_segment(new);
    device.heap.blocks[block].may_have_flags = residency::is_flagged(device, block);
    let owner = device.owner(list);
    device.accounting.populate(owner, place, populated);
    if !growing {
        device.accounting.segment_made(owner.small, oversize);
    }
    let action = if growing { Action::SegmentMap } else { Action::SegmentAlloc };
    device.tracer.segment(action, &device.heap, id, base.0, populated);
}
