//! Memory, for both APIs: pinned memory, managed-memory hints, handles for other processes.

use std::ffi::{c_int, c_uint, c_void};
use std::slice;

use torch_uvm_sim::{DevicePtr, IpcHandle, Location, PointerKind, Range};

use crate::context;
use crate::entry::entry_points;
use crate::errors::code;
use crate::machine::{Handle, machine, stream};
use crate::ops::{self, MemLocation};
use crate::outcome::{Outcome, put, put_optional};

type Pointer = *mut c_void;

/// `cudaIpcMemHandle_t`, and `cudaIpcEventHandle_t`, which looks the same.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct IpcMemHandle {
    pub bytes: [u8; 64],
}

/// The ranges of a batch.
///
/// # Safety
/// Both arrays have `count` elements.
pub unsafe fn ranges(pointers: *const Pointer, bytes: *const usize, count: usize, flags: u64) -> Outcome<Vec<Range>> {
    if pointers.is_null() || bytes.is_null() || count == 0 || flags != 0 {
        Err(code::INVALID_VALUE)?;
    }
    // SAFETY: arrays of that length by this function's contract.
    let (pointers, bytes) = unsafe { (slice::from_raw_parts(pointers, count), slice::from_raw_parts(bytes, count)) };
    Ok(pointers.iter().zip(bytes).map(|(pointer, bytes)| ops::range(*pointer, *bytes)).collect())
}

/// The ranges of a batch, each with its location: the one whose index is the last not beyond the range's own.
///
/// # Safety
/// The arrays have as many elements as their counts say.
pub unsafe fn batch(
    pointers: *const Pointer,
    bytes: *const usize,
    count: usize,
    places: *const MemLocation,
    place_indices: *const usize,
    place_count: usize,
    flags: u64,
) -> Outcome<Vec<(Range, Location)>> {
    // SAFETY: this function's contract includes that one's.
    let ranges = unsafe { ranges(pointers, bytes, count, flags) }?;
    if places.is_null() || place_indices.is_null() || place_count == 0 || place_count > count {
        Err(code::INVALID_VALUE)?;
    }
    // SAFETY: arrays of that length by this function's contract.
    let (places, from) =
        unsafe { (slice::from_raw_parts(places, place_count), slice::from_raw_parts(place_indices, place_count)) };
    let mut all = Vec::with_capacity(count);
    for (at, range) in ranges.into_iter().enumerate() {
        let place = from.iter().rposition(|first| *first <= at).ok_or(code::INVALID_VALUE)?;
        all.push((range, places[place].parse()?));
    }
    Ok(all)
}

entry_points! { both;
    /// `cuMemGetInfo_v2`.
    fn cuMemGetInfo_v2 = cudaMemGetInfo: (free: *mut usize, total: *mut usize) {
        let memory = machine()?.device_memory(context::use_device())?;
        put_optional(free, memory.free as usize);
        put_optional(total, memory.total as usize);
        Ok(())
    }

    /// `cuMemHostRegister_v2`.
    fn cuMemHostRegister_v2 = cudaHostRegister: (pointer: Pointer, bytes: usize, _flags: c_uint) {
        Ok(machine()?.host_register(context::use_device(), pointer as u64, bytes as u64)?)
    }

    /// `cuMemHostUnregister`.
    fn cuMemHostUnregister = cudaHostUnregister: (pointer: Pointer) {
        Ok(machine()?.host_unregister(context::use_device(), pointer as u64)?)
    }

    /// `cuMemFreeHost`.
    fn cuMemFreeHost = cudaFreeHost: (pointer: Pointer) { ops::host_free(pointer) }

    /// `cuMemHostGetDevicePointer_v2`.
    fn cuMemHostGetDevicePointer_v2 = cudaHostGetDevicePointer: (device_pointer: *mut Pointer, pointer: Pointer, _flags: c_uint) {
        put(device_pointer, ops::host_device_pointer(pointer)?)
    }

    /// `cuMemHostGetFlags`.
    fn cuMemHostGetFlags = cudaHostGetFlags: (flags: *mut c_uint, pointer: Pointer) {
        ops::host_device_pointer(pointer)?;
        put(flags, 3)
    }

    /// `cuMemAllocManaged`.
    fn cuMemAllocManaged = cudaMallocManaged: (pointer: *mut u64, bytes: usize, flags: c_uint) {
        if pointer.is_null() || !(1..=2).contains(&flags) {
            Err(code::INVALID_VALUE)?;
        }
        put(pointer, machine()?.alloc_managed(context::use_device(), bytes as u64)?.0)
    }

    /// `cuMemAdvise`: an ordinal.
    fn cuMemAdvise = uvmsim_rt12_cudaMemAdvise: (pointer: *const c_void, bytes: usize, advice: c_int, device: c_int) {
        ops::advise(pointer, bytes, advice, MemLocation::from_ordinal(device))
    }

    /// `cuMemAdvise_v2`: a location.
    fn cuMemAdvise_v2 = cudaMemAdvise_v2, uvmsim_rt13_cudaMemAdvise: (pointer: *const c_void, bytes: usize, advice: c_int, to: MemLocation) {
        ops::advise(pointer, bytes, advice, to)
    }

    /// `cuMemPrefetchAsync`: an ordinal.
    fn cuMemPrefetchAsync = uvmsim_rt12_cudaMemPrefetchAsync: (pointer: *const c_void, bytes: usize, device: c_int, on: Handle) {
        ops::prefetch(pointer, bytes, MemLocation::from_ordinal(device), 0, on)
    }

    /// `cuMemPrefetchAsync_v2`: a location and flags.
    fn cuMemPrefetchAsync_v2 = cudaMemPrefetchAsync_v2, uvmsim_rt13_cudaMemPrefetchAsync: (
        pointer: *const c_void, bytes: usize, to: MemLocation, flags: c_uint, on: Handle,
    ) { ops::prefetch(pointer, bytes, to, flags, on) }

    /// `cuMemPrefetchBatchAsync`.
    fn cuMemPrefetchBatchAsync = cudaMemPrefetchBatchAsync: (
        pointers: *const Pointer, bytes: *const usize, count: usize, places: *const MemLocation,
        place_indices: *const usize, place_count: usize, flags: u64, on: Handle,
    ) {
        for (range, to) in batch(pointers, bytes, count, places, place_indices, place_count, flags)? {
            machine()?.prefetch(context::use_device(), range, to, stream(on))?;
        }
        Ok(())
    }

    /// `cuMemDiscardBatchAsync`.
    fn cuMemDiscardBatchAsync = cudaMemDiscardBatchAsync: (
        pointers: *const Pointer, bytes: *const usize, count: usize, flags: u64, on: Handle,
    ) { Ok(machine()?.discard(context::use_device(), &ranges(pointers, bytes, count, flags)?, stream(on))?) }

    /// `cuMemDiscardAndPrefetchBatchAsync`.
    fn cuMemDiscardAndPrefetchBatchAsync = cudaMemDiscardAndPrefetchBatchAsync: (
        pointers: *const Pointer, bytes: *const usize, count: usize, places: *const MemLocation,
        place_indices: *const usize, place_count: usize, flags: u64, on: Handle,
    ) {
        for (range, to) in batch(pointers, bytes, count, places, place_indices, place_count, flags)? {
            machine()?.discard_and_prefetch(context::use_device(), &[range], to, stream(on))?;
        }
        Ok(())
    }

    /// `cuMemRangeGetAttribute`.
    fn cuMemRangeGetAttribute = cudaMemRangeGetAttribute: (
        data: Pointer, data_bytes: usize, attribute: c_int, pointer: *const c_void, bytes: usize,
    ) { ops::range_attribute(data, data_bytes, attribute, pointer, bytes) }

    /// `cuMemRangeGetAttributes`.
    fn cuMemRangeGetAttributes = cudaMemRangeGetAttributes: (
        data: *const Pointer, data_bytes: *const usize, attributes: *const c_int, count: usize,
        pointer: *const c_void, bytes: usize,
    ) {
        for at in 0..count {
            let (to, room) = (data.add(at).read(), data_bytes.add(at).read());
            ops::range_attribute(to, room, attributes.add(at).read(), pointer, bytes)?;
        }
        Ok(())
    }

    /// `cuStreamAttachMemAsync`: attachment matters only without concurrent managed access.
    fn cuStreamAttachMemAsync = cudaStreamAttachMemAsync: (_on: Handle, pointer: u64, _bytes: usize, _flags: c_uint) {
        match machine()?.pointer_info(pointer)?.kind {
            PointerKind::Managed => Ok(()),
            _ => Err(code::INVALID_VALUE)?,
        }
    }

    /// `cuIpcGetMemHandle`.
    fn cuIpcGetMemHandle = cudaIpcGetMemHandle: (handle: *mut [u8; 64], pointer: u64) {
        put(handle, machine()?.ipc_handle(context::use_device(), DevicePtr(pointer))?.0)
    }

    /// `cuIpcOpenMemHandle_v2`.
    fn cuIpcOpenMemHandle_v2 = cudaIpcOpenMemHandle: (pointer: *mut u64, handle: IpcMemHandle, _flags: c_uint) {
        put(pointer, machine()?.ipc_open(context::use_device(), &IpcHandle(handle.bytes))?.0)
    }

    /// `cuIpcCloseMemHandle`.
    fn cuIpcCloseMemHandle = cudaIpcCloseMemHandle: (pointer: u64) { Ok(machine()?.ipc_close(context::use_device(), DevicePtr(pointer))?) }
}
