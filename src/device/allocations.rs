//! What is known about live allocations.

use super::state::DeviceState;
use crate::driver::{DeviceIndex, DevicePtr, IpcHandle, Stream};
use crate::error::{Error, Result};
use crate::history::Context;
use crate::segments::Memory;

/// A live allocation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Allocation {
    /// On which device.
    pub device: DeviceIndex,
    /// Bytes of its block.
    pub block_bytes: u64,
    /// Bytes as the program asked.
    pub requested_bytes: u64,
    /// The stream it was allocated for.
    pub stream: Stream,
}

/// Whether this address is a live allocation of this device. From now on only the heap knows of it: whoever asks is
/// about to do what no thread's cache knows of.
pub(crate) fn owns(device: &mut DeviceState, ptr: DevicePtr) -> bool {
    let Some(block) = device.heap.live_at(ptr) else { return false };
    !device.heap.blocks[block].thread.is_some() || device.take_from_cache(block)
}

/// Whether an address lies in one of this device's segments.
pub(crate) fn holds(device: &DeviceState, ptr: DevicePtr) -> bool {
    device.heap.holds(ptr)
}

/// What is known about a live allocation.
///
/// # Errors
/// [`Error::InvalidPointer`].
pub(crate) fn allocation(device: &DeviceState, ptr: DevicePtr) -> Result<Allocation> {
    let block = &device.heap.blocks[device.heap.find(ptr)?];
    Ok(Allocation {
        device: device.gpu.index,
        block_bytes: block.bytes,
        requested_bytes: block.requested,
        stream: device.heap.pools[block.list].stream,
    })
}

/// The segment of a live allocation: its first byte and the bytes that its blocks fill.
///
/// # Errors
/// [`Error::InvalidPointer`].
pub(crate) fn base_allocation(device: &DeviceState, ptr: DevicePtr) -> Result<(DevicePtr, u64)> {
    let segment = device.heap.segment(device.heap.blocks[device.heap.find(ptr)?].segment);
    Ok((segment.base, segment.filled))
}

/// The IPC handle of an allocation's segment, and the allocation's offset in it in bytes.
///
/// # Errors
/// [`Error::NotSupported`] for managed memory; [`Error::InvalidPointer`]; the driver's.
pub(crate) fn ipc_handle(device: &DeviceState, ptr: DevicePtr) -> Result<(IpcHandle, u64)> {
    let segment = device.heap.segment(device.heap.blocks[device.heap.find(ptr)?].segment);
    if segment.memory == Memory::Managed {
        return Err(Error::NotSupported(
            "managed memory cannot be shared between processes: CUDA gives no IPC handles for it. \
             Memory placed by uvm_access_pattern:device can be"
                .into(),
        ));
    }
    let handle = device.gpu.driver().ipc_handle(device.gpu.index, segment.base)?;
    Ok((handle, ptr.0 - segment.base.0))
}

/// Notes something about a live allocation in the trace.
///
/// # Errors
/// [`Error::InvalidPointer`].
pub(crate) fn annotate(device: &mut DeviceState, ptr: DevicePtr, metadata: &str) -> Result<()> {
    let id = device.heap.find(ptr)?;
    device.tracer.annotate(&device.heap, id, metadata);
    Ok(())
}

/// The stack that made the live allocation which this address lies in, where one was gathered.
pub(crate) fn context_of(device: &DeviceState, address: u64) -> Option<Context> {
    let block = device.heap.live_at(DevicePtr(address)).or_else(|| device.heap.allocated_around(address))?;
    device.tracer.context_of(block)
}
