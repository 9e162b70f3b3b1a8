//! Address space and physical memory apart (`cuMemCreate`, `cuMemMap` …): what PyTorch's expandable segments use.

use std::ffi::{c_int, c_uint, c_void};
use std::os::fd::{BorrowedFd, IntoRawFd};
use std::slice;

use torch_uvm_sim::{Chunk, DevicePtr, Location, Range};

use crate::entry::entry_points;
use crate::errors::code;
use crate::machine::machine;
use crate::ops::MemLocation;
use crate::outcome::{Outcome, put};

/// `CUmemAllocationProp`.
#[repr(C)]
pub struct AllocationProp {
    allocation_type: c_int,
    handle_types: c_int,
    location: MemLocation,
    win32: *mut c_void,
    /// `CUmemAllocationProp::allocFlags`: compression, RDMA and usage, which are not looked at.
    flags: u64,
}

/// `CU_MEM_ALLOCATION_TYPE_PINNED`.
const PINNED: c_int = 1;

/// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`.
const POSIX_FILE_DESCRIPTOR: c_int = 1;

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct AccessDesc {
    location: MemLocation,
    flags: c_int,
}

/// `CU_MEM_ACCESS_FLAGS_PROT_READWRITE`.
const READ_WRITE: c_int = 3;

/// Where a chunk is to lie. `CU_MEM_LOCATION_TYPE_HOST_NUMA_CURRENT` (4) is none: "will result in CUDA_ERROR_INVALID_VALUE".
fn place(prop: &AllocationProp) -> Outcome<Location> {
    if prop.location.kind == 4 { Err(code::INVALID_VALUE)? } else { prop.location.parse() }
}

fn range(address: u64, bytes: usize) -> Range {
    Range { ptr: DevicePtr(address), bytes: bytes as u64 }
}

entry_points! { driver;
    /// `cuMemGetAllocationGranularity`: minimum and recommended are the same.
    fn cuMemGetAllocationGranularity(bytes: *mut usize, prop: *const AllocationProp, _option: c_int) {
        let at = place(prop.as_ref().ok_or(code::INVALID_VALUE)?)?;
        put(bytes, machine()?.chunk_granularity(at)? as usize)
    }

    /// `cuMemAddressReserve`; the wished-for address is passed over, as CUDA may.
    fn cuMemAddressReserve(address: *mut u64, bytes: usize, align: usize, _wished: u64, _flags: u64) {
        put(address, machine()?.address_reserve(bytes as u64, align as u64)?.0)
    }

    /// `cuMemAddressFree`.
    fn cuMemAddressFree(address: u64, bytes: usize) { Ok(machine()?.address_free(range(address, bytes))?) }

    /// `cuMemCreate`. Other processes may import it by file descriptor only.
    fn cuMemCreate(handle: *mut u64, bytes: usize, prop: *const AllocationProp, flags: u64) {
        let prop = prop.as_ref().filter(|_| flags == 0).ok_or(code::INVALID_VALUE)?;
        if prop.handle_types & !POSIX_FILE_DESCRIPTOR != 0 {
            Err(code::NOT_SUPPORTED)?;
        }
        let shareable = prop.handle_types == POSIX_FILE_DESCRIPTOR;
        put(handle, machine()?.chunk_create(place(prop)?, bytes as u64, shareable)?.0)
    }

    /// `cuMemRetainAllocationHandle`.
    fn cuMemRetainAllocationHandle(handle: *mut u64, address: *mut c_void) {
        put(handle, machine()?.chunk_retain(address as u64)?.0)
    }

    /// `cuMemGetAllocationPropertiesFromHandle`.
    fn cuMemGetAllocationPropertiesFromHandle(prop: *mut AllocationProp, handle: u64) {
        let (at, shareable) = machine()?.chunk_info(Chunk(handle))?;
        put(prop, AllocationProp {
            allocation_type: PINNED,
            handle_types: if shareable { POSIX_FILE_DESCRIPTOR } else { 0 },
            location: MemLocation::of(Some(at)),
            win32: std::ptr::null_mut(),
            flags: 0,
        })
    }

    /// `cuMemExportToShareableHandle`: a file descriptor, which is the caller's.
    fn cuMemExportToShareableHandle(to: *mut c_int, handle: u64, kind: c_int, flags: u64) {
        if to.is_null() || kind != POSIX_FILE_DESCRIPTOR || flags != 0 {
            Err(code::INVALID_VALUE)?;
        }
        put(to, machine()?.chunk_export(Chunk(handle))?.into_raw_fd())
    }

    /// `cuMemImportFromShareableHandle`: the pointer is the file descriptor.
    fn cuMemImportFromShareableHandle(handle: *mut u64, from: *mut c_void, kind: c_int) {
        let descriptor = c_int::try_from(from as isize).ok().filter(|descriptor| *descriptor >= 0);
        let descriptor = descriptor.filter(|_| kind == POSIX_FILE_DESCRIPTOR).ok_or(code::INVALID_VALUE)?;
        put(handle, machine()?.chunk_import(BorrowedFd::borrow_raw(descriptor))?.0)
    }

    /// `cuMemRelease`.
    fn cuMemRelease(handle: u64) { Ok(machine()?.chunk_release(Chunk(handle))?) }

    /// `cuMemMap`.
    fn cuMemMap(address: u64, bytes: usize, offset: usize, handle: u64, flags: u64) {
        if offset != 0 || flags != 0 {
            Err(code::INVALID_VALUE)?;
        }
        Ok(machine()?.chunk_map(range(address, bytes), Chunk(handle))?)
    }

    /// `cuMemUnmap`.
    fn cuMemUnmap(address: u64, bytes: usize) { Ok(machine()?.chunk_unmap(range(address, bytes))?) }

    /// `cuMemSetAccess`.
    fn cuMemSetAccess(address: u64, bytes: usize, list: *const AccessDesc, count: usize) {
        if list.is_null() || count == 0 {
            Err(code::INVALID_VALUE)?;
        }
        let mut by = Vec::with_capacity(count);
        for access in slice::from_raw_parts(list, count) {
            by.push((access.location.parse()?, access.flags == READ_WRITE));
        }
        Ok(machine()?.set_access(range(address, bytes), &by)?)
    }

    /// `cuMemGetAccess`.
    fn cuMemGetAccess(flags: *mut u64, location: *const MemLocation, address: u64) {
        let by = location.as_ref().ok_or(code::INVALID_VALUE)?.parse()?;
        put(flags, if machine()?.has_access(address, by)? { READ_WRITE as u64 } else { 0 })
    }

    /// `cuMulticastGetGranularity`: devices here have no multicast.
    fn cuMulticastGetGranularity(_bytes: *mut usize, _prop: *const AllocationProp, _option: c_uint) {
        Err(code::NOT_SUPPORTED)?
    }
}
