//! Address space and physical memory apart (`cuMemCreate`, `cuMemMap` …): what PyTorch's expandable segments use.

use std::ffi::{c_int, c_uint};
use std::slice;

use torch_uvm_sim::{Machine, PhysicalId};

use crate::entry::{entry_points, put};
use crate::errors::code;
use crate::machine::machine;
use crate::ops::MemLocation;

/// The part of `CUmemAllocationProp` that is looked at.
#[repr(C)]
pub struct AllocationProp {
    allocation_type: c_int,
    handle_types: c_int,
    location: MemLocation,
}

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

    /// `cuMemCreate`, of device memory. Handles that other processes may import cannot be made of it.
    fn cuMemCreate(handle: *mut u64, bytes: usize, prop: *const AllocationProp, flags: u64) {
        let prop = prop.as_ref().filter(|_| flags == 0).ok_or(code::INVALID_VALUE)?;
        if prop.location.kind != DEVICE {
            Err(code::NOT_SUPPORTED)?;
        }
        put(handle, machine()?.physical_create(prop.location.id, bytes as u64)?.0)
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
