//! Address space and physical memory apart (`cuMemCreate`, `cuMemMap` …): what PyTorch's expandable segments use.

use std::ffi::{c_int, c_uint, c_void};
use std::os::fd::{BorrowedFd, IntoRawFd};
use std::slice;

use torch_uvm_sim::{Machine, PhysicalId};

use crate::entry::entry_points;
use crate::errors::code;
use crate::machine::machine;
use crate::ops::MemLocation;
use crate::outcome::put;

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

/// `CU_MEM_LOCATION_TYPE_DEVICE`.
const DEVICE: c_int = 1;

entry_points! { driver;
    /// `cuMemGetAllocationGranularity`.
    fn cuMemGetAllocationGranularity(bytes: *mut usize, prop: *const AllocationProp, _option: c_int) {
        machine()?;
        prop.as_ref().filter(|prop| prop.location.kind == DEVICE).ok_or(code::INVALID_VALUE)?;
        put(bytes, Machine::GRANULARITY as usize)
    }

    /// `cuMemAddressReserve`; the wished-for address is passed over, as CUDA may.
    fn cuMemAddressReserve(address: *mut u64, bytes: usize, align: usize, _wished: u64, _flags: u64) {
        put(address, machine()?.address_reserve(bytes as u64, align as u64)?)
    }

    /// `cuMemAddressFree`.
    fn cuMemAddressFree(address: u64, bytes: usize) { Ok(machine()?.address_free(address, bytes as u64)?) }

    /// `cuMemCreate`, of device memory. Other processes may import it by file descriptor only.
    fn cuMemCreate(handle: *mut u64, bytes: usize, prop: *const AllocationProp, flags: u64) {
        let prop = prop.as_ref().filter(|_| flags == 0).ok_or(code::INVALID_VALUE)?;
        if prop.location.kind != DEVICE || prop.handle_types & !POSIX_FILE_DESCRIPTOR != 0 {
            Err(code::NOT_SUPPORTED)?;
        }
        let shareable = prop.handle_types == POSIX_FILE_DESCRIPTOR;
        put(handle, machine()?.physical_create(prop.location.id, bytes as u64, shareable)?.0)
    }

    /// `cuMemRetainAllocationHandle`.
    fn cuMemRetainAllocationHandle(handle: *mut u64, address: *mut c_void) {
        put(handle, machine()?.physical_retain(address as u64)?.0)
    }

    /// `cuMemGetAllocationPropertiesFromHandle`.
    fn cuMemGetAllocationPropertiesFromHandle(prop: *mut AllocationProp, handle: u64) {
        let (device, shareable) = machine()?.physical_info(PhysicalId(handle))?;
        put(prop, AllocationProp {
            allocation_type: PINNED,
            handle_types: if shareable { POSIX_FILE_DESCRIPTOR } else { 0 },
            location: MemLocation { kind: DEVICE, id: device },
            win32: std::ptr::null_mut(),
            flags: 0,
        })
    }

    /// `cuMemExportToShareableHandle`: a file descriptor, which is the caller's.
    fn cuMemExportToShareableHandle(to: *mut c_int, handle: u64, kind: c_int, flags: u64) {
        if to.is_null() || kind != POSIX_FILE_DESCRIPTOR || flags != 0 {
            Err(code::INVALID_VALUE)?;
        }
        put(to, machine()?.physical_export(PhysicalId(handle))?.into_raw_fd())
    }

    /// `cuMemImportFromShareableHandle`: the pointer is the file descriptor.
    fn cuMemImportFromShareableHandle(handle: *mut u64, from: *mut c_void, kind: c_int) {
        let descriptor = c_int::try_from(from as isize).ok().filter(|descriptor| *descriptor >= 0);
        let descriptor = descriptor.filter(|_| kind == POSIX_FILE_DESCRIPTOR).ok_or(code::INVALID_VALUE)?;
        put(handle, machine()?.physical_import(BorrowedFd::borrow_raw(descriptor))?.0)
    }

    /// `cuMemRelease`.
    fn cuMemRelease(handle: u64) { Ok(machine()?.physical_release(PhysicalId(handle))?) }

    /// `cuMemMap`.
    fn cuMemMap(address: u64, bytes: usize, offset: usize, handle: u64, flags: u64) {
        if offset != 0 || flags != 0 {
            Err(code::INVALID_VALUE)?;
        }
        Ok(machine()?.map(address, bytes as u64, PhysicalId(handle))?)
    }

    /// `cuMemUnmap`.
    fn cuMemUnmap(address: u64, bytes: usize) { Ok(machine()?.unmap(address, bytes as u64)?) }

    /// `cuMemSetAccess`.
    fn cuMemSetAccess(address: u64, bytes: usize, list: *const AccessDesc, count: usize) {
        if list.is_null() || count == 0 {
            Err(code::INVALID_VALUE)?;
        }
        for access in slice::from_raw_parts(list, count) {
            if access.location.kind != DEVICE {
                Err(code::NOT_SUPPORTED)?;
            }
            machine()?.set_access(address, bytes as u64, access.location.id, access.flags == READ_WRITE)?;
        }
        Ok(())
    }

    /// `cuMemGetAccess`: reading and writing, for what is mapped.
    fn cuMemGetAccess(flags: *mut u64, _location: *const MemLocation, address: u64) {
        machine()?.address_range(torch_uvm_sim::DevicePtr(address))?;
        put(flags, READ_WRITE as u64)
    }

    /// `cuMulticastGetGranularity`: devices here have no multicast.
    fn cuMulticastGetGranularity(_bytes: *mut usize, _prop: *const AllocationProp, _option: c_uint) {
        Err(code::NOT_SUPPORTED)?
    }
}
