//! Device, managed and pinned memory; copies; managed-memory hints; handles for other processes.

use std::ffi::{c_int, c_uint, c_void};
use std::ptr;

use torch_uvm_sim::{CopyKind, PointerKind, Rows};

use crate::context;
use crate::entry::entry_points;
use crate::errors::code;
use crate::machine::{Handle, device_ptr, machine};
use crate::ops::{self};
use crate::outcome::{Outcome, put};
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
}
