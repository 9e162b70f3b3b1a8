//! Where memory stands, for programs that ask and for requests that fail.

use super::refusal::Refusal;
use super::state::DeviceState;
use crate::budget::{Exceeded, MemoryInfo};
use crate::error::{Error, Limit, OutOfMemory, Result};
use crate::heap::Request;
use crate::history::{Action, Context};
use crate::segments::population_step;

/// Where this process's memory stands, and how much more it may have.
///
/// # Errors
/// The driver's.
pub(crate) fn memory_info(state: &DeviceState) -> Result<MemoryInfo> {
    let (gpu, budget, populated) = (&state.gpu, &state.limits.budget, state.accounting.populated());
    let device = gpu.driver().device_memory(gpu.index)?;
    let host = gpu.driver().host_memory()?;
    let capacity = budget.capacity(populated, Some(&host)).capacity;
    // What the driver places, and what a MemPool's own allocator gave, may lie on the device: it is ours, and counts
    // once. What was discarded is not free to CUDA, but to us.
    let ours = populated.device + populated.unplaced + state.heap.decommitted();
    // Other processes, CUDA's context, the program's own cudaMalloc. Where there is one physical memory, they are
    // missing from what the host has available, and so from the capacity.
    let used = device.total - device.free.min(device.total);
    let others = if gpu.info.integrated { 0 } else { used.saturating_sub(ours) };
    Ok(MemoryInfo {
        capacity,
        free: capacity.saturating_sub(populated.total()).saturating_sub(others),
        populated: *populated,
        allocated: state.accounting.allocated_bytes(),
        reserved: state.accounting.reserved_bytes(),
        device_limit: budget.device_limit(),
        host_reserve: budget.host_reserve(&host),
        device,
        host,
    })
}

/// The largest block that could be had without giving anything back, in bytes.
///
/// # Errors
/// The driver's.
pub(crate) fn largest_available(state: &DeviceState) -> Result<u64> {
    Ok(state.heap.largest_free().max(memory_info(state)?.free))
}

/// Describes a request that could not be served, and counts it.
pub(super) fn out_of_memory(
    state: &mut DeviceState,
    request: &Request,
    refusal: &Refusal,
    context: Option<Context>,
) -> Error {
    let DeviceState { gpu, limits, accounting, heap, tracer, .. } = state;
    let populated = *accounting.populated();
    let exceeded = match refusal {
        Refusal::Exceeded(exceeded) => *exceeded,
        Refusal::NoMemory | Refusal::Failed(_) => {
            Exceeded { limit: Limit::Device, capacity: limits.budget.capacity(&populated, None).capacity }
        }
    };
    let memory = gpu.driver().device_memory(gpu.index);
    let host = gpu.driver().host_memory();
    let (device_free, device_total) = memory.map_or((0, gpu.info.total_memory), |memory| (memory.free, memory.total));
    accounting.stats.num_ooms += 1;
    // Every limit but CUDA's own is met before CUDA is asked.
    let rejected = limits.native.throw_on_oom && exceeded.limit != Limit::Device;
    accounting.stats.num_oom_rejections += i64::from(rejected);
    tracer.event(Action::OutOfMemory, device_free, request.rounded, request.stream, context);
    Error::OutOfMemory(Box::new(OutOfMemory {
        device: gpu.index,
        requested: population_step(request.rounded, request.rounded, 0, &limits.native),
        device_total,
        device_free,
        capacity: exceeded.capacity,
        limit: exceeded.limit,
        rejected,
        allowed: limits.budget.allowed(),
        host_available: host.as_ref().map_or(0, |host| host.available),
        host_reserve: host.as_ref().map_or(0, |host| limits.budget.host_reserve(host)),
        populated_device: populated.device,
        populated_host: populated.host,
        allocated: accounting.allocated_bytes(),
        reserved: accounting.reserved_bytes(),
        private_pools: heap.free_in_private_pools(),
    }))
}
