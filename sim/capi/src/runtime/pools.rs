//! Stream-ordered allocation.

use std::ffi::{c_int, c_uint, c_void};

use crate::context;
use crate::entry::{entry_points, put};
use crate::errors::code;
use crate::machine::Handle;
use crate::ops::MemLocation;
use crate::pools;

/// The part of `cudaMemPoolProps` and `CUmemPoolProps` that is looked at.
#[repr(C)]
pub struct PoolProps {
    pub allocation_type: c_int,
    pub handle_types: c_int,
    pub location: MemLocation,
}

entry_points! { runtime;
    /// `cudaMallocAsync`.
    fn cudaMallocAsync(pointer: *mut *mut c_void, bytes: usize, _on: Handle) {
        put(pointer, pools::allocate(pools::current_pool(context::use_device())?, bytes)?)
    }

    /// `cudaMallocFromPoolAsync`.
    fn cudaMallocFromPoolAsync(pointer: *mut *mut c_void, bytes: usize, pool: Handle, _on: Handle) {
        put(pointer, pools::allocate(pool, bytes)?)
    }

    /// `cudaFreeAsync`.
    fn cudaFreeAsync(pointer: *mut c_void, _on: Handle) { pools::free(pointer) }

    /// `cudaDeviceGetDefaultMemPool`.
    fn cudaDeviceGetDefaultMemPool(pool: *mut Handle, device: c_int) { put(pool, pools::default_pool(device)?) }

    /// `cudaDeviceGetMemPool`.
    fn cudaDeviceGetMemPool(pool: *mut Handle, device: c_int) { put(pool, pools::current_pool(device)?) }

    /// `cudaDeviceSetMemPool`.
    fn cudaDeviceSetMemPool(device: c_int, pool: Handle) { pools::set_current_pool(device, pool) }

    /// `cudaMemPoolCreate`.
    fn cudaMemPoolCreate(pool: *mut Handle, props: *const PoolProps) {
        let location = props.as_ref().ok_or(code::INVALID_VALUE)?.location;
        put(pool, pools::create(location.kind, location.id)?)
    }

    /// `cudaMemPoolDestroy`.
    fn cudaMemPoolDestroy(pool: Handle) { pools::destroy(pool) }

    /// `cudaMemPoolTrimTo`.
    fn cudaMemPoolTrimTo(pool: Handle, _keep: usize) { pools::trim(pool) }

    /// `cudaMemPoolGetAttribute`.
    fn cudaMemPoolGetAttribute(pool: Handle, attribute: c_int, value: *mut c_void) {
        pools::get_attribute(pool, attribute, value)
    }

    /// `cudaMemPoolSetAttribute`.
    fn cudaMemPoolSetAttribute(pool: Handle, attribute: c_int, value: *mut c_void) {
        pools::set_attribute(pool, attribute, value)
    }

    /// `cudaMemPoolSetAccess`: every device of the machine reaches the pool.
    fn cudaMemPoolSetAccess(pool: Handle, _access: *const c_void, _count: usize) { pools::trim(pool) }

    /// `cudaMemPoolGetAccess`: reading and writing (3).
    fn cudaMemPoolGetAccess(flags: *mut c_uint, pool: Handle, _location: *const MemLocation) {
        pools::trim(pool)?;
        put(flags, 3)
    }
}
