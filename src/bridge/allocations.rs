//! Entries of the bridge: allocations, caches and hints.

use super::{ALLOCATOR, answer, convert, ffi, guarded, pool_id, text, with};
use crate::driver::{Advice, DeviceIndex, DevicePtr, Location, Stream};
use crate::error::Error;
use cxx::SharedPtr;

pub(super) fn allocate(device: DeviceIndex, bytes: u64, stream: u64) -> u64 {
    with(|allocator| allocator.allocate(device, bytes, Stream(stream), None)).map_or(0, |ptr| ptr.0)
}

pub(super) fn allocate_with_context(
    device: DeviceIndex,
    bytes: u64,
    stream: u64,
    context: SharedPtr<ffi::StackContext>,
) -> u64 {
    with(|allocator| allocator.allocate(device, bytes, Stream(stream), convert::context(context)))
        .map_or(0, |ptr| ptr.0)
}

pub(super) fn free(ptr: u64) -> bool {
    with(|allocator| allocator.free(DevicePtr(ptr), None)).is_some()
}

pub(super) fn free_with_context(ptr: u64, context: SharedPtr<ffi::StackContext>) -> bool {
    with(|allocator| allocator.free(DevicePtr(ptr), convert::context(context))).is_some()
}

pub(super) fn allocation(ptr: u64, out: &mut ffi::Allocation) -> bool {
    answer(
        out,
        |allocator| allocator.allocation(DevicePtr(ptr)),
        |found| ffi::Allocation { device: found.device, block_bytes: found.block_bytes },
    )
}

pub(super) fn record_stream(ptr: u64, device: DeviceIndex, stream: u64) -> bool {
    with(|allocator| allocator.record_stream(DevicePtr(ptr), device, Stream(stream))).is_some()
}

pub(super) fn base_allocation(ptr: u64, out: &mut ffi::BaseAllocation) -> bool {
    answer(
        out,
        |allocator| allocator.base_allocation(DevicePtr(ptr)),
        |(base, bytes)| ffi::BaseAllocation { address: base.0, bytes },
    )
}

pub(super) fn ipc_handle(ptr: u64, out: &mut ffi::SharedAllocation) -> bool {
    answer(
        out,
        |allocator| allocator.ipc_handle(DevicePtr(ptr)),
        |(handle, offset)| ffi::SharedAllocation { handle: handle.0, offset },
    )
}

pub(super) fn allocate_at(
    device: DeviceIndex,
    address: u64,
    bytes: u64,
    stream: u64,
    context: SharedPtr<ffi::StackContext>,
) -> u64 {
    with(|allocator| allocator.allocate_at(device, address, bytes, Stream(stream), convert::context(context)))
        .map_or(0, |ptr| ptr.0)
}

pub(super) fn context_of(address: u64) -> SharedPtr<ffi::StackContext> {
    guarded(|| Ok(ALLOCATOR.get().and_then(|allocator| allocator.context_of(address))))
        .flatten()
        .map_or_else(SharedPtr::null, |context| convert::stack(Some(&context)))
}

pub(super) fn annotate(ptr: u64, metadata: &[u8]) -> bool {
    with(|allocator| allocator.annotate(DevicePtr(ptr), &text(metadata))).is_some()
}

pub(super) fn empty_cache(pool: ffi::PoolId, context: SharedPtr<ffi::StackContext>) -> bool {
    with(|allocator| allocator.empty_cache(pool_id(pool), convert::context(context))).is_some()
}

pub(super) fn cache_info(device: DeviceIndex, largest: &mut u64) -> bool {
    answer(largest, |allocator| allocator.cache_info(device), |bytes| bytes)
}

pub(super) fn memory_fraction(device: DeviceIndex, fraction: &mut f64) -> bool {
    answer(fraction, |allocator| allocator.memory_fraction(device), |fraction| fraction)
}

pub(super) fn set_memory_fraction(device: DeviceIndex, fraction: f64) -> bool {
    with(|allocator| allocator.set_memory_fraction(device, fraction)).is_some()
}

fn location(device: DeviceIndex) -> Location {
    if device < 0 { Location::Host } else { Location::Device(device) }
}

pub(super) fn prefetch(ptr: u64, bytes: u64, to: DeviceIndex, stream: u64) -> bool {
    with(|allocator| allocator.hints().prefetch(DevicePtr(ptr), bytes, location(to), Stream(stream))).is_some()
}

pub(super) fn advise(ptr: u64, bytes: u64, advice: &[u8], device: DeviceIndex) -> bool {
    with(|allocator| {
        let name = text(advice);
        let advice = Advice::named(&name, location(device)).ok_or_else(|| {
            Error::InvalidArgument(format!("advice: '{name}' is not allowed: expected {}", Advice::EXPECTED))
        })?;
        allocator.hints().advise(DevicePtr(ptr), bytes, advice)
    })
    .is_some()
}

pub(super) fn discard(ptr: u64, bytes: u64, stream: u64) -> bool {
    with(|allocator| allocator.hints().discard(DevicePtr(ptr), bytes, Stream(stream))).is_some()
}
