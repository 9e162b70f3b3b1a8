//! Device, managed and pinned memory; copies; managed-memory hints; pools; handles for other processes.

use std::ffi::{c_int, c_uint, c_void};
use std::ptr;

use torch_uvm_sim::{CopyKind, DevicePtr, IpcHandle, PointerInfo, PointerKind, Rows};

use crate::context;
use crate::entry::{Outcome, entry_points, put, put_optional};
use crate::errors::code;
use crate::machine::{Handle, machine, stream};
use crate::ops::{self, MemLocation};
use crate::pools;
use crate::runtime::memory::{IpcMemHandle, batch, ranges};
use crate::runtime::pools::PoolProps;

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
    /// `cuMemGetInfo_v2`.
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        let memory = machine()?.device_memory(context::use_device())?;
        put_optional(free, memory.free as usize);
        put_optional(total, memory.total as usize);
        Ok(())
    }

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

    /// `cuMemAllocManaged`.
    fn cuMemAllocManaged(pointer: *mut u64, bytes: usize, flags: c_uint) {
        if pointer.is_null() || !(1..=2).contains(&flags) {
            Err(code::INVALID_VALUE)?;
        }
        put(pointer, machine()?.alloc_managed(context::use_device(), bytes as u64)?.0)
    }

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

    /// `cuMemFreeHost`.
    fn cuMemFreeHost(pointer: Pointer) { ops::host_free(pointer) }

    /// `cuMemHostRegister_v2`.
    fn cuMemHostRegister_v2(pointer: Pointer, bytes: usize, _flags: c_uint) {
        Ok(machine()?.host_register(context::use_device(), pointer as u64, bytes as u64)?)
    }

    /// `cuMemHostUnregister`.
    fn cuMemHostUnregister(pointer: Pointer) {
        Ok(machine()?.host_unregister(context::use_device(), pointer as u64)?)
    }

    /// `cuMemHostGetDevicePointer_v2`.
    fn cuMemHostGetDevicePointer_v2(device_pointer: *mut Pointer, pointer: Pointer, _flags: c_uint) {
        put(device_pointer, ops::host_device_pointer(pointer)?)
    }

    /// `cuMemHostGetFlags`.
    fn cuMemHostGetFlags(flags: *mut c_uint, pointer: Pointer) {
        ops::host_device_pointer(pointer)?;
        put(flags, 3)
    }

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

    /// `cuMemAdvise`: an ordinal.
    fn cuMemAdvise(pointer: u64, bytes: usize, advice: c_int, device: c_int) {
        ops::advise(pointer as ConstPointer, bytes, advice, MemLocation::from_ordinal(device))
    }

    /// `cuMemAdvise_v2`: a location.
    fn cuMemAdvise_v2(pointer: u64, bytes: usize, advice: c_int, to: MemLocation) {
        ops::advise(pointer as ConstPointer, bytes, advice, to)
    }

    /// `cuMemPrefetchAsync`: an ordinal.
    fn cuMemPrefetchAsync(pointer: u64, bytes: usize, device: c_int, on: Handle) {
        ops::prefetch(pointer as ConstPointer, bytes, MemLocation::from_ordinal(device), 0, on)
    }

    /// `cuMemPrefetchAsync_v2`: a location and flags.
    fn cuMemPrefetchAsync_v2(pointer: u64, bytes: usize, to: MemLocation, flags: c_uint, on: Handle) {
        ops::prefetch(pointer as ConstPointer, bytes, to, flags, on)
    }

    /// `cuMemPrefetchBatchAsync`.
    fn cuMemPrefetchBatchAsync(
        pointers: *const Pointer, bytes: *const usize, count: usize, places: *const MemLocation,
        place_indices: *const usize, place_count: usize, flags: u64, on: Handle,
    ) {
        for (range, to) in batch(pointers, bytes, count, places, place_indices, place_count, flags)? {
            machine()?.prefetch(context::use_device(), range, to, stream(on))?;
        }
        Ok(())
    }

    /// `cuMemDiscardBatchAsync`.
    fn cuMemDiscardBatchAsync(
        pointers: *const Pointer, bytes: *const usize, count: usize, flags: u64, on: Handle,
    ) { Ok(machine()?.discard(context::use_device(), &ranges(pointers, bytes, count, flags)?, stream(on))?) }

    /// `cuMemDiscardAndPrefetchBatchAsync`.
    fn cuMemDiscardAndPrefetchBatchAsync(
        pointers: *const Pointer, bytes: *const usize, count: usize, places: *const MemLocation,
        place_indices: *const usize, place_count: usize, flags: u64, on: Handle,
    ) {
        for (range, to) in batch(pointers, bytes, count, places, place_indices, place_count, flags)? {
            machine()?.discard_and_prefetch(context::use_device(), &[range], to, stream(on))?;
        }
        Ok(())
    }

    /// `cuMemRangeGetAttribute`.
    fn cuMemRangeGetAttribute(data: Pointer, data_bytes: usize, attribute: c_int, pointer: u64, bytes: usize) {
        ops::range_attribute(data, data_bytes, attribute, pointer as ConstPointer, bytes)
    }

    /// `cuMemRangeGetAttributes`.
    fn cuMemRangeGetAttributes(
        data: *const Pointer, data_bytes: *const usize, attributes: *const c_int, count: usize, pointer: u64,
        bytes: usize,
    ) {
        for at in 0..count {
            let (to, room) = (data.add(at).read(), data_bytes.add(at).read());
            ops::range_attribute(to, room, attributes.add(at).read(), pointer as ConstPointer, bytes)?;
        }
        Ok(())
    }

    /// `cuStreamAttachMemAsync`: attachment matters only without concurrent managed access.
    fn cuStreamAttachMemAsync(_on: Handle, pointer: u64, _bytes: usize, _flags: c_uint) {
        match machine()?.pointer_info(pointer)?.kind {
            PointerKind::Managed => Ok(()),
            _ => Err(code::INVALID_VALUE)?,
        }
    }

    /// `cuIpcGetMemHandle`.
    fn cuIpcGetMemHandle(handle: *mut [u8; 64], pointer: u64) {
        put(handle, machine()?.ipc_handle(context::use_device(), DevicePtr(pointer))?.0)
    }

    /// `cuIpcOpenMemHandle_v2`.
    fn cuIpcOpenMemHandle_v2(pointer: *mut u64, handle: IpcMemHandle, _flags: c_uint) {
        put(pointer, machine()?.ipc_open(context::use_device(), &IpcHandle(handle.bytes))?.0)
    }

    /// `cuIpcCloseMemHandle`.
    fn cuIpcCloseMemHandle(pointer: u64) { Ok(machine()?.ipc_close(context::use_device(), DevicePtr(pointer))?) }

    /// `cuMemAllocAsync`.
    fn cuMemAllocAsync(pointer: *mut Pointer, bytes: usize, _on: Handle) {
        put(pointer, pools::allocate(pools::current_pool(context::use_device())?, bytes)?)
    }

    /// `cuMemAllocFromPoolAsync`.
    fn cuMemAllocFromPoolAsync(pointer: *mut Pointer, bytes: usize, pool: Handle, _on: Handle) {
        put(pointer, pools::allocate(pool, bytes)?)
    }

    /// `cuMemFreeAsync`.
    fn cuMemFreeAsync(pointer: u64, _on: Handle) { pools::free(pointer as Pointer) }

    /// `cuDeviceGetDefaultMemPool`.
    fn cuDeviceGetDefaultMemPool(pool: *mut Handle, device: c_int) { put(pool, pools::default_pool(device)?) }

    /// `cuDeviceGetMemPool`.
    fn cuDeviceGetMemPool(pool: *mut Handle, device: c_int) { put(pool, pools::current_pool(device)?) }

    /// `cuDeviceSetMemPool`.
    fn cuDeviceSetMemPool(device: c_int, pool: Handle) { pools::set_current_pool(device, pool) }

    /// `cuMemPoolCreate`.
    fn cuMemPoolCreate(pool: *mut Handle, props: *const PoolProps) {
        let location = props.as_ref().ok_or(code::INVALID_VALUE)?.location;
        put(pool, pools::create(location.kind, location.id)?)
    }

    /// `cuMemPoolDestroy`.
    fn cuMemPoolDestroy(pool: Handle) { pools::destroy(pool) }

    /// `cuMemPoolTrimTo`.
    fn cuMemPoolTrimTo(pool: Handle, _keep: usize) { pools::trim(pool) }

    /// `cuMemPoolGetAttribute`.
    fn cuMemPoolGetAttribute(pool: Handle, attribute: c_int, value: Pointer) {
        pools::get_attribute(pool, attribute, value)
    }

    /// `cuMemPoolSetAttribute`.
    fn cuMemPoolSetAttribute(pool: Handle, attribute: c_int, value: Pointer) {
        pools::set_attribute(pool, attribute, value)
    }

    /// `cuMemPoolSetAccess`: every device of the machine reaches the pool.
    fn cuMemPoolSetAccess(pool: Handle, _access: ConstPointer, _count: usize) { pools::trim(pool) }

    /// `cuMemPoolGetAccess`.
    fn cuMemPoolGetAccess(flags: *mut c_uint, pool: Handle, _location: *const MemLocation) {
        pools::trim(pool)?;
        put(flags, 3)
    }
}
