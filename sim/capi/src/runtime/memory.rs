//! Device, managed and pinned memory; copies; managed-memory hints; handles for other processes.

use std::ffi::{c_int, c_uint, c_void};
use std::{ptr, slice};

use torch_uvm_sim::{CopyKind, IpcHandle, Location, PointerKind, Range, Rows};

use crate::context;
use crate::entry::{Outcome, entry_points, put, put_optional};
use crate::errors::code;
use crate::machine::{Handle, device_ptr, machine, stream};
use crate::ops::{self, MemLocation};
use crate::runtime::launch::symbol;

type Pointer = *mut c_void;
type ConstPointer = *const c_void;

/// `cudaPointerAttributes`.
#[repr(C)]
pub struct PointerAttributes {
    kind: c_int,
    device: c_int,
    device_pointer: Pointer,
    host_pointer: Pointer,
    /// CUDA 13 has eight of these; writing only what CUDA 12 has leaves them as they were.
    reserved: (),
}

/// `cudaPitchedPtr`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct PitchedPtr {
    pointer: Pointer,
    pitch: usize,
    width: usize,
    height: usize,
}

/// `cudaExtent`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Extent {
    width: usize,
    height: usize,
    depth: usize,
}

/// `cudaPos`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Pos {
    x: usize,
    y: usize,
    z: usize,
}

/// `cudaMemcpy3DParms`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Memcpy3DParms {
    from_array: Pointer,
    from_pos: Pos,
    from: PitchedPtr,
    to_array: Pointer,
    to_pos: Pos,
    to: PitchedPtr,
    extent: Extent,
    kind: c_int,
}

/// The alignment of pitched rows, as on every GPU since Kepler.
const PITCH: usize = 512;

fn rows(width: usize, height: usize, to_pitch: usize, from_pitch: usize) -> Rows {
    Rows { width: width as u64, height: height as u64, dst_pitch: to_pitch as u64, src_pitch: from_pitch as u64 }
}

fn allocate(bytes: usize) -> Outcome<Pointer> {
    if bytes == 0 {
        // CUDA answers success and no address.
        return Ok(ptr::null_mut());
    }
    Ok(machine()?.alloc_device(context::use_device(), bytes as u64)?.0 as Pointer)
}

fn allocate_host(bytes: usize) -> Outcome<Pointer> {
    if bytes == 0 {
        return Ok(ptr::null_mut());
    }
    Ok(machine()?.host_alloc(context::use_device(), bytes as u64)? as Pointer)
}

fn copy_3d(parms: &Memcpy3DParms, on: Handle) -> Outcome {
    if !parms.from_array.is_null() || !parms.to_array.is_null() {
        Err(code::NOT_SUPPORTED)?; // CUDA arrays
    }
    let address = |base: &PitchedPtr, at: &Pos, slice: usize| {
        base.pointer as u64 + ((at.z + slice) * base.pitch * base.height + at.y * base.pitch + at.x) as u64
    };
    let Extent { width, height, depth } = parms.extent;
    for slice in 0..depth {
        ops::copy_rows_async(
            address(&parms.to, &parms.to_pos, slice),
            address(&parms.from, &parms.from_pos, slice),
            rows(width, height, parms.to.pitch, parms.from.pitch),
            ops::copy_kind(parms.kind)?,
            on,
        )?;
    }
    Ok(())
}

fn fill_3d(to: PitchedPtr, value: c_int, extent: Extent, on: Handle) -> Outcome {
    for slice in 0..extent.depth {
        let at = to.pointer as u64 + (slice * to.pitch * to.height) as u64;
        ops::fill_rows_async(at, to.pitch, u32::from(value as u8), 1, extent.width, extent.height, on)?;
    }
    Ok(())
}

entry_points! { runtime;
    /// `cudaMalloc`.
    fn cudaMalloc(pointer: *mut Pointer, bytes: usize) {
        if pointer.is_null() {
            Err(code::INVALID_VALUE)?;
        }
        put(pointer, allocate(bytes)?)
    }

    /// `cudaMallocManaged`.
    fn cudaMallocManaged(pointer: *mut Pointer, bytes: usize, flags: c_uint) {
        // 1: attached globally, 2: to the host only, which concurrent managed access makes the same.
        if pointer.is_null() || !(1..=2).contains(&flags) {
            Err(code::INVALID_VALUE)?;
        }
        put(pointer, machine()?.alloc_managed(context::use_device(), bytes as u64)?.0 as Pointer)
    }

    /// `cudaMallocPitch`.
    fn cudaMallocPitch(pointer: *mut Pointer, pitch: *mut usize, width: usize, height: usize) {
        let row = width.next_multiple_of(PITCH);
        put(pitch, row)?;
        put(pointer, allocate(row.checked_mul(height).ok_or(code::OUT_OF_MEMORY)?)?)
    }

    /// `cudaMalloc3D`.
    fn cudaMalloc3D(to: *mut PitchedPtr, extent: Extent) {
        let pitch = extent.width.next_multiple_of(PITCH);
        let bytes = pitch.checked_mul(extent.height).and_then(|slice| slice.checked_mul(extent.depth));
        let pointer = allocate(bytes.ok_or(code::OUT_OF_MEMORY)?)?;
        put(to, PitchedPtr { pointer, pitch, width: extent.width, height: extent.height })
    }

    /// `cudaFree`; of null it only sees to it that the device is initialised.
    fn cudaFree(pointer: Pointer) {
        let device = context::use_device();
        let machine = machine()?;
        if pointer.is_null() {
            return Ok(());
        }
        Ok(machine.free(device, device_ptr(pointer))?)
    }

    /// `cudaMallocHost`.
    fn cudaMallocHost(pointer: *mut Pointer, bytes: usize) { put(pointer, allocate_host(bytes)?) }

    /// `cudaHostAlloc`: all flags come to the same here.
    fn cudaHostAlloc(pointer: *mut Pointer, bytes: usize, _flags: c_uint) { put(pointer, allocate_host(bytes)?) }

    /// `cudaFreeHost`.
    fn cudaFreeHost(pointer: Pointer) { ops::host_free(pointer) }

    /// `cudaHostRegister`.
    fn cudaHostRegister(pointer: Pointer, bytes: usize, _flags: c_uint) {
        Ok(machine()?.host_register(context::use_device(), pointer as u64, bytes as u64)?)
    }

    /// `cudaHostUnregister`.
    fn cudaHostUnregister(pointer: Pointer) {
        Ok(machine()?.host_unregister(context::use_device(), pointer as u64)?)
    }

    /// `cudaHostGetDevicePointer`.
    fn cudaHostGetDevicePointer(device_pointer: *mut Pointer, pointer: Pointer, _flags: c_uint) {
        put(device_pointer, ops::host_device_pointer(pointer)?)
    }

    /// `cudaHostGetFlags`: portable and mapped, as all pinned memory is with unified addressing.
    fn cudaHostGetFlags(flags: *mut c_uint, pointer: Pointer) {
        ops::host_device_pointer(pointer)?;
        put(flags, 3)
    }

    /// `cudaMemGetInfo`.
    fn cudaMemGetInfo(free: *mut usize, total: *mut usize) {
        let memory = machine()?.device_memory(context::use_device())?;
        put_optional(free, memory.free as usize);
        put_optional(total, memory.total as usize);
        Ok(())
    }

    /// `cudaPointerGetAttributes`.
    fn cudaPointerGetAttributes(attributes: *mut PointerAttributes, pointer: ConstPointer) {
        let info = machine()?.pointer_info(pointer as u64)?;
        let (on_device, on_host) = match info.kind {
            PointerKind::Unregistered => (false, true),
            PointerKind::Device => (true, false),
            _ => (true, true),
        };
        let known = |there: bool| if there { pointer.cast_mut() } else { ptr::null_mut() };
        put(attributes, PointerAttributes {
            kind: ops::memory_type(&info),
            // -2 is cudaInvalidDeviceId: unregistered memory belongs to none.
            device: if info.device < 0 { -2 } else { info.device },
            device_pointer: known(on_device),
            host_pointer: known(on_host),
            reserved: (),
        })
    }

    /// `cudaMemcpy`.
    fn cudaMemcpy(to: Pointer, from: ConstPointer, bytes: usize, kind: c_int) {
        ops::copy(to, from, bytes, ops::copy_kind(kind)?)
    }

    /// `cudaMemcpyAsync`.
    fn cudaMemcpyAsync(to: Pointer, from: ConstPointer, bytes: usize, kind: c_int, on: Handle) {
        ops::copy_async(to, from, bytes, ops::copy_kind(kind)?, on)
    }

    /// `cudaMemcpyPeer`.
    fn cudaMemcpyPeer(to: Pointer, _to_device: c_int, from: ConstPointer, _from_device: c_int, bytes: usize) {
        ops::copy(to, from, bytes, CopyKind::DeviceToDevice)
    }

    /// `cudaMemcpyPeerAsync`.
    fn cudaMemcpyPeerAsync(
        to: Pointer, _to_device: c_int, from: ConstPointer, _from_device: c_int, bytes: usize, on: Handle,
    ) { ops::copy_async(to, from, bytes, CopyKind::DeviceToDevice, on) }

    /// `cudaMemcpy2D`.
    fn cudaMemcpy2D(
        to: Pointer, to_pitch: usize, from: ConstPointer, from_pitch: usize, width: usize, height: usize, kind: c_int,
    ) {
        let on = ptr::null_mut();
        let rows = rows(width, height, to_pitch, from_pitch);
        ops::copy_rows_async(to as u64, from as u64, rows, ops::copy_kind(kind)?, on)?;
        ops::wait(on)
    }

    /// `cudaMemcpy2DAsync`.
    fn cudaMemcpy2DAsync(
        to: Pointer, to_pitch: usize, from: ConstPointer, from_pitch: usize, width: usize, height: usize, kind: c_int,
        on: Handle,
    ) {
        let rows = rows(width, height, to_pitch, from_pitch);
        ops::copy_rows_async(to as u64, from as u64, rows, ops::copy_kind(kind)?, on)
    }

    /// `cudaMemcpy3D`.
    fn cudaMemcpy3D(parms: *const Memcpy3DParms) {
        copy_3d(parms.as_ref().ok_or(code::INVALID_VALUE)?, ptr::null_mut())?;
        ops::wait(ptr::null_mut())
    }

    /// `cudaMemcpy3DAsync`.
    fn cudaMemcpy3DAsync(parms: *const Memcpy3DParms, on: Handle) {
        copy_3d(parms.as_ref().ok_or(code::INVALID_VALUE)?, on)
    }

    /// `cudaMemcpyToSymbol`.
    fn cudaMemcpyToSymbol(to: ConstPointer, from: ConstPointer, bytes: usize, offset: usize, kind: c_int) {
        ops::copy((symbol(to)?.0 as Pointer).byte_add(offset), from, bytes, ops::copy_kind(kind)?)
    }

    /// `cudaMemcpyToSymbolAsync`.
    fn cudaMemcpyToSymbolAsync(
        to: ConstPointer, from: ConstPointer, bytes: usize, offset: usize, kind: c_int, on: Handle,
    ) { ops::copy_async((symbol(to)?.0 as Pointer).byte_add(offset), from, bytes, ops::copy_kind(kind)?, on) }

    /// `cudaMemcpyFromSymbol`.
    fn cudaMemcpyFromSymbol(to: Pointer, from: ConstPointer, bytes: usize, offset: usize, kind: c_int) {
        ops::copy(to, (symbol(from)?.0 as ConstPointer).byte_add(offset), bytes, ops::copy_kind(kind)?)
    }

    /// `cudaMemcpyFromSymbolAsync`.
    fn cudaMemcpyFromSymbolAsync(
        to: Pointer, from: ConstPointer, bytes: usize, offset: usize, kind: c_int, on: Handle,
    ) { ops::copy_async(to, (symbol(from)?.0 as ConstPointer).byte_add(offset), bytes, ops::copy_kind(kind)?, on) }

    /// `cudaMemset`.
    fn cudaMemset(to: Pointer, value: c_int, bytes: usize) {
        ops::fill(to as u64, u32::from(value as u8), 1, bytes)
    }

    /// `cudaMemsetAsync`.
    fn cudaMemsetAsync(to: Pointer, value: c_int, bytes: usize, on: Handle) {
        ops::fill_async(to as u64, u32::from(value as u8), 1, bytes, on)
    }

    /// `cudaMemset2D`.
    fn cudaMemset2D(to: Pointer, pitch: usize, value: c_int, width: usize, height: usize) {
        ops::fill_rows_async(to as u64, pitch, u32::from(value as u8), 1, width, height, ptr::null_mut())
    }

    /// `cudaMemset2DAsync`.
    fn cudaMemset2DAsync(to: Pointer, pitch: usize, value: c_int, width: usize, height: usize, on: Handle) {
        ops::fill_rows_async(to as u64, pitch, u32::from(value as u8), 1, width, height, on)
    }

    /// `cudaMemset3D`.
    fn cudaMemset3D(to: PitchedPtr, value: c_int, extent: Extent) { fill_3d(to, value, extent, ptr::null_mut()) }

    /// `cudaMemset3DAsync`.
    fn cudaMemset3DAsync(to: PitchedPtr, value: c_int, extent: Extent, on: Handle) { fill_3d(to, value, extent, on) }

    /// `cudaMemAdvise` of CUDA 12: an ordinal.
    fn uvmsim_rt12_cudaMemAdvise(pointer: ConstPointer, bytes: usize, advice: c_int, device: c_int) {
        ops::advise(pointer, bytes, advice, MemLocation::from_ordinal(device))
    }

    /// `cudaMemAdvise` of CUDA 13: a location.
    fn uvmsim_rt13_cudaMemAdvise(pointer: ConstPointer, bytes: usize, advice: c_int, to: MemLocation) {
        ops::advise(pointer, bytes, advice, to)
    }

    /// `cudaMemAdvise_v2`, CUDA 12's name of CUDA 13's form.
    fn cudaMemAdvise_v2(pointer: ConstPointer, bytes: usize, advice: c_int, to: MemLocation) {
        ops::advise(pointer, bytes, advice, to)
    }

    /// `cudaMemPrefetchAsync` of CUDA 12: an ordinal.
    fn uvmsim_rt12_cudaMemPrefetchAsync(pointer: ConstPointer, bytes: usize, device: c_int, on: Handle) {
        ops::prefetch(pointer, bytes, MemLocation::from_ordinal(device), 0, on)
    }

    /// `cudaMemPrefetchAsync` of CUDA 13: a location and flags.
    fn uvmsim_rt13_cudaMemPrefetchAsync(
        pointer: ConstPointer, bytes: usize, to: MemLocation, flags: c_uint, on: Handle,
    ) { ops::prefetch(pointer, bytes, to, flags, on) }

    /// `cudaMemPrefetchAsync_v2`, CUDA 12's name of CUDA 13's form.
    fn cudaMemPrefetchAsync_v2(pointer: ConstPointer, bytes: usize, to: MemLocation, flags: c_uint, on: Handle) {
        ops::prefetch(pointer, bytes, to, flags, on)
    }

    /// `cudaMemPrefetchBatchAsync`.
    fn cudaMemPrefetchBatchAsync(
        pointers: *const Pointer, bytes: *const usize, count: usize, places: *const MemLocation,
        place_indices: *const usize, place_count: usize, flags: u64, on: Handle,
    ) {
        for (range, to) in batch(pointers, bytes, count, places, place_indices, place_count, flags)? {
            machine()?.prefetch(context::use_device(), range, to, stream(on))?;
        }
        Ok(())
    }

    /// `cudaMemDiscardBatchAsync`.
    fn cudaMemDiscardBatchAsync(
        pointers: *const Pointer, bytes: *const usize, count: usize, flags: u64, on: Handle,
    ) { Ok(machine()?.discard(context::use_device(), &ranges(pointers, bytes, count, flags)?, stream(on))?) }

    /// `cudaMemDiscardAndPrefetchBatchAsync`.
    fn cudaMemDiscardAndPrefetchBatchAsync(
        pointers: *const Pointer, bytes: *const usize, count: usize, places: *const MemLocation,
        place_indices: *const usize, place_count: usize, flags: u64, on: Handle,
    ) {
        for (range, to) in batch(pointers, bytes, count, places, place_indices, place_count, flags)? {
            machine()?.discard_and_prefetch(context::use_device(), &[range], to, stream(on))?;
        }
        Ok(())
    }

    /// `cudaMemRangeGetAttribute`.
    fn cudaMemRangeGetAttribute(
        data: Pointer, data_bytes: usize, attribute: c_int, pointer: ConstPointer, bytes: usize,
    ) { ops::range_attribute(data, data_bytes, attribute, pointer, bytes) }

    /// `cudaMemRangeGetAttributes`.
    fn cudaMemRangeGetAttributes(
        data: *const Pointer, data_bytes: *const usize, attributes: *const c_int, count: usize,
        pointer: ConstPointer, bytes: usize,
    ) {
        for at in 0..count {
            let (to, room) = (data.add(at).read(), data_bytes.add(at).read());
            ops::range_attribute(to, room, attributes.add(at).read(), pointer, bytes)?;
        }
        Ok(())
    }

    /// `cudaStreamAttachMemAsync`: attachment matters only without concurrent managed access.
    fn cudaStreamAttachMemAsync(_on: Handle, pointer: Pointer, _bytes: usize, _flags: c_uint) {
        match machine()?.pointer_info(pointer as u64)?.kind {
            PointerKind::Managed => Ok(()),
            _ => Err(code::INVALID_VALUE)?,
        }
    }

    /// `cudaIpcGetMemHandle`.
    fn cudaIpcGetMemHandle(handle: *mut [u8; 64], pointer: Pointer) {
        put(handle, machine()?.ipc_handle(context::use_device(), device_ptr(pointer))?.0)
    }

    /// `cudaIpcOpenMemHandle`: the 64 bytes are passed by value, which C does by their address.
    fn cudaIpcOpenMemHandle(pointer: *mut Pointer, handle: IpcMemHandle, _flags: c_uint) {
        put(pointer, machine()?.ipc_open(context::use_device(), &IpcHandle(handle.bytes))?.0 as Pointer)
    }

    /// `cudaIpcCloseMemHandle`.
    fn cudaIpcCloseMemHandle(pointer: Pointer) {
        Ok(machine()?.ipc_close(context::use_device(), device_ptr(pointer))?)
    }
}

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
