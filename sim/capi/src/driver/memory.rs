//! Device, managed and pinned memory; copies; managed-memory hints; pools; handles for other processes.

use std::ffi::{c_int, c_uint, c_void};
use std::ptr;

use torch_uvm_sim::{CopyKind, DevicePtr, PointerInfo, PointerKind, Rows};

use crate::context;
use crate::entry::entry_points;
use crate::errors::code;
use crate::machine::{Handle, machine};
use crate::ops::{self};
use crate::outcome::{Outcome, put, put_optional};

type Pointer = *mut c_void;
type ConstPointer = *const c_void;

/// `CUDA_MEMCPY2D`.
#[repr(C)]
pub struct Memcpy2D {
    from_x: usize,
    from_y: usize,
    from_type: c_uint,
    from_host: ConstPointer,
    from_device: u64,
    from_array: Pointer,
    from_pitch: usize,
    to_x: usize,
    to_y: usize,
    to_type: c_uint,
    to_host: Pointer,
    to_device: u64,
    to_array: Pointer,
    to_pitch: usize,
    width: usize,
    height: usize,
}

fn copy_2d(parms: *const Memcpy2D, on: Handle) -> Outcome {
    // SAFETY: null or valid by the contract of `cuMemcpy2D`.
    let parms = unsafe { parms.as_ref() }.ok_or(code::INVALID_VALUE)?;
    // 1 host, 2 device, 3 array, 4 unified (in the device field).
    let base = |kind, host: u64, device| match kind {
        1 => Ok(host),
        2 | 4 => Ok(device),
        3 => Err(code::NOT_SUPPORTED),
        _ => Err(code::INVALID_VALUE),
    };
    // A pitch of 0 stands for the width, where there is one row.
    let pitch = |pitch: usize| if pitch == 0 { parms.width } else { pitch };
    let (from_pitch, to_pitch) = (pitch(parms.from_pitch), pitch(parms.to_pitch));
    let from = base(parms.from_type, parms.from_host as u64, parms.from_device)?;
    let to = base(parms.to_type, parms.to_host as u64, parms.to_device)?;
    let rows = Rows {
        width: parms.width as u64,
        height: parms.height as u64,
        dst_pitch: to_pitch as u64,
        src_pitch: from_pitch as u64,
    };
    let from = from + (parms.from_y * from_pitch + parms.from_x) as u64;
    let to = to + (parms.to_y * to_pitch + parms.to_x) as u64;
    ops::copy_rows_async(to, from, rows, CopyKind::Default, on)
}

/// `cuPointerGetAttribute` of an address that the machine may or may not know.
///
/// # Safety
/// `data` is null or valid for the attribute's type.
unsafe fn pointer_attribute(data: Pointer, attribute: c_int, pointer: u64, info: &PointerInfo) -> Outcome {
    if data.is_null() {
        Err(code::INVALID_VALUE)?;
    }
    let known = info.kind != PointerKind::Unregistered;
    let on_host = matches!(info.kind, PointerKind::PinnedHost | PointerKind::RegisteredHost);
    // SAFETY: valid for the attribute's type by this function's contract.
    unsafe {
        match attribute {
            1 if known => put(data.cast(), context::primary(info.device)?), // CONTEXT
            2 if known => put(data.cast(), if on_host { 1u32 } else { 2 }), // MEMORY_TYPE
            3 if known => put(data.cast(), pointer),                        // DEVICE_POINTER
            4 if known && info.kind != PointerKind::Device => put(data.cast(), pointer), // HOST_POINTER
            6 => put(data.cast(), c_uint::from(false)),                     // SYNC_MEMOPS
            7 if known => put(data.cast(), info.id),                        // BUFFER_ID
            8 => put(data.cast::<u8>(), u8::from(info.kind == PointerKind::Managed)), // IS_MANAGED
            9 if known => put(data.cast(), info.device),                    // DEVICE_ORDINAL
            10 => put(data.cast::<u8>(), u8::from(info.kind == PointerKind::Device)), // IS_LEGACY_CUDA_IPC_CAPABLE
            11 if known => put(data.cast(), info.base),                     // RANGE_START_ADDR
            12 if known => put(data.cast(), info.bytes as usize),           // RANGE_SIZE
            13 => put(data.cast::<u8>(), u8::from(known)),                  // MAPPED
            14 => put(data.cast(), 0u64),                                   // ALLOWED_HANDLE_TYPES
            15 => put(data.cast::<u8>(), 0),                                // IS_GPU_DIRECT_RDMA_CAPABLE
            16 if known => put(data.cast(), 3u32),                          // ACCESS_FLAGS: read and write
            17 if known => put(data.cast::<Pointer>(), ptr::null_mut()),    // MEMPOOL_HANDLE
            18 if known => put(data.cast(), info.bytes as usize),           // MAPPING_SIZE
            19 if known => put(data.cast(), info.base),                     // MAPPING_BASE_ADDR
            20 if known => put(data.cast(), info.id),                       // MEMORY_BLOCK_ID
            _ => Err(code::INVALID_VALUE)?,
        }
    }
}

fn allocate(bytes: usize) -> Outcome<u64> {
    Ok(machine()?.alloc_device(context::use_device(), bytes as u64)?.0)
}

fn allocate_host(bytes: usize) -> Outcome<Pointer> {
    Ok(machine()?.host_alloc(context::use_device(), bytes as u64)? as Pointer)
}

entry_points! { driver;
    /// `cuMemAlloc_v2`.
    fn cuMemAlloc_v2(pointer: *mut u64, bytes: usize) {
        if pointer.is_null() {
            Err(code::INVALID_VALUE)?;
        }
        put(pointer, allocate(bytes)?)
    }

    /// `cuMemAllocPitch_v2`.
    fn cuMemAllocPitch_v2(pointer: *mut u64, pitch: *mut usize, width: usize, height: usize, _element: c_uint) {
        let row = width.next_multiple_of(512);
        put(pitch, row)?;
        put(pointer, allocate(row.checked_mul(height).ok_or(code::OUT_OF_MEMORY)?)?)
    }

    /// `cuMemFree_v2`.
    fn cuMemFree_v2(pointer: u64) { Ok(machine()?.free(context::use_device(), DevicePtr(pointer))?) }

    /// `cuMemGetAddressRange_v2`.
    fn cuMemGetAddressRange_v2(base: *mut u64, bytes: *mut usize, pointer: u64) {
        let range = machine()?.address_range(DevicePtr(pointer))?;
        put_optional(base, range.ptr.0);
        put_optional(bytes, range.bytes as usize);
        Ok(())
    }

    /// `cuMemAllocHost_v2`.
    fn cuMemAllocHost_v2(pointer: *mut Pointer, bytes: usize) { put(pointer, allocate_host(bytes)?) }

    /// `cuMemHostAlloc`.
    fn cuMemHostAlloc(pointer: *mut Pointer, bytes: usize, _flags: c_uint) { put(pointer, allocate_host(bytes)?) }

    /// `cuPointerGetAttribute`.
    fn cuPointerGetAttribute(data: Pointer, attribute: c_int, pointer: u64) {
        pointer_attribute(data, attribute, pointer, &machine()?.pointer_info(pointer)?)
    }

    /// `cuPointerGetAttributes`: of an unknown pointer it succeeds, with zeros.
    fn cuPointerGetAttributes(count: c_uint, attributes: *const c_int, data: *const Pointer, pointer: u64) {
        if attributes.is_null() || data.is_null() {
            Err(code::INVALID_VALUE)?;
        }
        let info = machine()?.pointer_info(pointer)?;
        for at in 0..count as usize {
            let (attribute, to) = (attributes.add(at).read(), data.add(at).read());
            if pointer_attribute(to, attribute, pointer, &info).is_err() {
                match attribute {
                    1 | 3 | 4 | 7 | 11 | 12 | 14 | 17..=20 => put(to.cast(), 0u64)?,
                    9 => put(to.cast(), -2)?,
                    2 | 6 | 16 => put(to.cast(), 0u32)?,
                    _ => put(to.cast(), 0u8)?,
                }
            }
        }
        Ok(())
    }

    /// `cuPointerSetAttribute`: synchronous memory operations (6) are what some already are.
    fn cuPointerSetAttribute(_value: ConstPointer, attribute: c_int, _pointer: u64) {
        if attribute == 6 { Ok(()) } else { Err(code::INVALID_VALUE)? }
    }

    /// `cuMemcpy`.
    fn cuMemcpy(to: u64, from: u64, bytes: usize) {
        ops::copy(to as Pointer, from as ConstPointer, bytes, CopyKind::Default)
    }

    /// `cuMemcpyAsync`.
    fn cuMemcpyAsync(to: u64, from: u64, bytes: usize, on: Handle) {
        ops::copy_async(to as Pointer, from as ConstPointer, bytes, CopyKind::Default, on)
    }

    /// `cuMemcpyHtoD_v2`.
    fn cuMemcpyHtoD_v2(to: u64, from: ConstPointer, bytes: usize) {
        ops::copy(to as Pointer, from, bytes, CopyKind::HostToDevice)
    }

    /// `cuMemcpyHtoDAsync_v2`.
    fn cuMemcpyHtoDAsync_v2(to: u64, from: ConstPointer, bytes: usize, on: Handle) {
        ops::copy_async(to as Pointer, from, bytes, CopyKind::HostToDevice, on)
    }

    /// `cuMemcpyDtoH_v2`.
    fn cuMemcpyDtoH_v2(to: Pointer, from: u64, bytes: usize) {
        ops::copy(to, from as ConstPointer, bytes, CopyKind::DeviceToHost)
    }

    /// `cuMemcpyDtoHAsync_v2`.
    fn cuMemcpyDtoHAsync_v2(to: Pointer, from: u64, bytes: usize, on: Handle) {
        ops::copy_async(to, from as ConstPointer, bytes, CopyKind::DeviceToHost, on)
    }

    /// `cuMemcpyDtoD_v2`.
    fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: usize) {
        ops::copy(to as Pointer, from as ConstPointer, bytes, CopyKind::DeviceToDevice)
    }

    /// `cuMemcpyDtoDAsync_v2`.
    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, on: Handle) {
        ops::copy_async(to as Pointer, from as ConstPointer, bytes, CopyKind::DeviceToDevice, on)
    }

    /// `cuMemcpyPeer`.
    fn cuMemcpyPeer(to: u64, _to_context: Handle, from: u64, _from_context: Handle, bytes: usize) {
        ops::copy(to as Pointer, from as ConstPointer, bytes, CopyKind::DeviceToDevice)
    }

    /// `cuMemcpyPeerAsync`.
    fn cuMemcpyPeerAsync(to: u64, _to_context: Handle, from: u64, _from_context: Handle, bytes: usize, on: Handle) {
        ops::copy_async(to as Pointer, from as ConstPointer, bytes, CopyKind::DeviceToDevice, on)
    }

    /// `cuMemcpy2D_v2`.
    fn cuMemcpy2D_v2(parms: *const Memcpy2D) {
        copy_2d(parms, ptr::null_mut())?;
        ops::wait(ptr::null_mut())
    }

    /// `cuMemcpy2DUnaligned_v2`.
    fn cuMemcpy2DUnaligned_v2(parms: *const Memcpy2D) {
        copy_2d(parms, ptr::null_mut())?;
        ops::wait(ptr::null_mut())
    }

    /// `cuMemcpy2DAsync_v2`.
    fn cuMemcpy2DAsync_v2(parms: *const Memcpy2D, on: Handle) { copy_2d(parms, on) }

    /// `cuMemsetD8_v2`.
    fn cuMemsetD8_v2(to: u64, value: u8, count: usize) { ops::fill(to, value.into(), 1, count) }

    /// `cuMemsetD16_v2`.
    fn cuMemsetD16_v2(to: u64, value: u16, count: usize) { ops::fill(to, value.into(), 2, count) }

    /// `cuMemsetD32_v2`.
    fn cuMemsetD32_v2(to: u64, value: u32, count: usize) { ops::fill(to, value, 4, count) }

    /// `cuMemsetD8Async`.
    fn cuMemsetD8Async(to: u64, value: u8, count: usize, on: Handle) { ops::fill_async(to, value.into(), 1, count, on) }

    /// `cuMemsetD16Async`.
    fn cuMemsetD16Async(to: u64, value: u16, count: usize, on: Handle) {
        ops::fill_async(to, value.into(), 2, count, on)
    }

    /// `cuMemsetD32Async`.
    fn cuMemsetD32Async(to: u64, value: u32, count: usize, on: Handle) { ops::fill_async(to, value, 4, count, on) }

    /// `cuMemsetD2D8_v2`.
    fn cuMemsetD2D8_v2(to: u64, pitch: usize, value: u8, width: usize, height: usize) {
        ops::fill_rows_async(to, pitch, value.into(), 1, width, height, ptr::null_mut())
    }

    /// `cuMemsetD2D8Async`.
    fn cuMemsetD2D8Async(to: u64, pitch: usize, value: u8, width: usize, height: usize, on: Handle) {
        ops::fill_rows_async(to, pitch, value.into(), 1, width, height, on)
    }
}
