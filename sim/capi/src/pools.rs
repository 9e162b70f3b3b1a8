//! Stream-ordered allocation (`cudaMallocAsync`, `cuMemAllocAsync`), for both APIs.
//!
//! Simple rather than fast: a pool keeps nothing, so what is reserved is what is used, and freeing waits for the work
//! that may still use the memory, as the engine's free does.

use std::collections::HashMap;
use std::ffi::{c_int, c_uint, c_void};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use torch_uvm_sim::DevicePtr;

use crate::context::{self, MAX_DEVICES};
use crate::entry::entry_points;
use crate::errors::code;
use crate::machine::{Handle, chip, device_ptr, machine};
use crate::ops::MemLocation;
use crate::outcome::{Outcome, put};

/// The part of `cudaMemPoolProps` and `CUmemPoolProps` that is looked at.
#[repr(C)]
pub struct PoolProps {
    allocation_type: c_int,
    handle_types: c_int,
    location: MemLocation,
}

#[derive(Default)]
struct Pool {
    device: i32,
    release_threshold: u64,
    used: u64,
    used_high: u64,
    /// Reuse by event dependencies, opportunistic reuse, internal dependencies: remembered, without effect.
    reuse: [c_int; 3],
}

#[derive(Default)]
struct Pools {
    /// By handle.
    pools: HashMap<usize, Pool>,
    /// Allocation to its pool and size.
    allocations: HashMap<u64, (usize, u64)>,
    /// The pool `cudaDeviceSetMemPool` has chosen, by device.
    chosen: HashMap<i32, usize>,
    next: usize,
}

static POOLS: LazyLock<Mutex<Pools>> = LazyLock::new(Mutex::default);
/// The addresses are the default pools' handles.
static DEFAULTS: [u8; MAX_DEVICES] = [0; MAX_DEVICES];

fn pools() -> MutexGuard<'static, Pools> {
    POOLS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn new_pool(device: i32) -> Pool {
    Pool { device, reuse: [1; 3], ..Pool::default() }
}

/// `cudaDeviceGetDefaultMemPool`.
pub fn default_pool(device: i32) -> Outcome<Handle> {
    chip(device)?;
    let handle = &raw const DEFAULTS[device as usize] as usize;
    pools().pools.entry(handle).or_insert_with(|| new_pool(device));
    Ok(handle as Handle)
}

/// `cudaDeviceGetMemPool`.
pub fn current_pool(device: i32) -> Outcome<Handle> {
    let default = default_pool(device)?;
    Ok(pools().chosen.get(&device).map_or(default, |handle| *handle as Handle))
}

/// `cudaDeviceSetMemPool`.
pub fn set_current_pool(device: i32, pool: Handle) -> Outcome {
    chip(device)?;
    let mut pools = pools();
    if !pools.pools.contains_key(&(pool as usize)) {
        Err(code::INVALID_VALUE)?;
    }
    pools.chosen.insert(device, pool as usize);
    Ok(())
}

/// `cudaMemPoolCreate`, for device memory; `kind` and `id` are the location's.
pub fn create(kind: c_int, id: c_int) -> Outcome<Handle> {
    if kind != 1 {
        Err(code::NOT_SUPPORTED)?;
    }
    chip(id)?;
    let mut pools = pools();
    pools.next += 1;
    let handle = 0x5200_0000_0000 + pools.next * 64;
    pools.pools.insert(handle, new_pool(id));
    Ok(handle as Handle)
}

/// `cudaMemPoolDestroy`; what was allocated from it lives on.
pub fn destroy(pool: Handle) -> Outcome {
    let mut pools = pools();
    pools.pools.remove(&(pool as usize)).ok_or(code::INVALID_VALUE)?;
    pools.chosen.retain(|_, handle| *handle != pool as usize);
    Ok(())
}

/// `cudaMallocFromPoolAsync`.
pub fn allocate(pool: Handle, bytes: usize) -> Outcome<*mut c_void> {
    let device = pools().pools.get(&(pool as usize)).ok_or(code::INVALID_VALUE)?.device;
    if bytes == 0 {
        return Ok(std::ptr::null_mut());
    }
    let DevicePtr(address) = machine()?.alloc_device(device, bytes as u64)?;
    let mut pools = pools();
    pools.allocations.insert(address, (pool as usize, bytes as u64));
    if let Some(pool) = pools.pools.get_mut(&(pool as usize)) {
        pool.used += bytes as u64;
        pool.used_high = pool.used_high.max(pool.used);
    }
    Ok(address as *mut c_void)
}

/// `cudaFreeAsync`, of any allocation.
pub fn free(pointer: *mut c_void) -> Outcome {
    if pointer.is_null() {
        return Ok(());
    }
    machine()?.free(context::use_device(), device_ptr(pointer))?;
    let mut pools = pools();
    if let Some((pool, bytes)) = pools.allocations.remove(&(pointer as u64))
        && let Some(pool) = pools.pools.get_mut(&pool)
    {
        pool.used -= bytes;
    }
    Ok(())
}

/// `cudaMemPoolTrimTo`: there is nothing to trim.
pub fn trim(pool: Handle) -> Outcome {
    pools().pools.get(&(pool as usize)).map(drop).ok_or(code::INVALID_VALUE)?;
    Ok(())
}

/// `cudaMemPoolGetAttribute`.
///
/// # Safety
/// `value` is null or valid for the attribute's type.
pub unsafe fn get_attribute(pool: Handle, attribute: c_int, value: *mut c_void) -> Outcome {
    let pools = pools();
    let pool = pools.pools.get(&(pool as usize)).ok_or(code::INVALID_VALUE)?;
    // SAFETY: valid for the attribute's type by this function's contract: integers for 1 to 3, 64 bits for the rest.
    unsafe {
        match attribute {
            1..=3 => put(value.cast(), pool.reuse[attribute as usize - 1]),
            4 => put(value.cast(), pool.release_threshold),
            5 | 7 => put(value.cast(), pool.used),
            6 | 8 => put(value.cast(), pool.used_high),
            _ => Err(code::INVALID_VALUE)?,
        }
    }
}

/// `cudaMemPoolSetAttribute`.
///
/// # Safety
/// As [`get_attribute`].
pub unsafe fn set_attribute(pool: Handle, attribute: c_int, value: *const c_void) -> Outcome {
    if value.is_null() {
        Err(code::INVALID_VALUE)?;
    }
    let mut pools = pools();
    let pool = pools.pools.get_mut(&(pool as usize)).ok_or(code::INVALID_VALUE)?;
    // SAFETY: not null, and valid for the attribute's type by this function's contract.
    match attribute {
        1..=3 => pool.reuse[attribute as usize - 1] = unsafe { value.cast::<c_int>().read_unaligned() },
        4 => pool.release_threshold = unsafe { value.cast::<u64>().read_unaligned() },
        // The high-water marks can only be reset.
        6 | 8 if unsafe { value.cast::<u64>().read_unaligned() } == 0 => pool.used_high = pool.used,
        _ => Err(code::INVALID_VALUE)?,
    }
    Ok(())
}

entry_points! { both;
    /// `cuMemAllocAsync`.
    fn cuMemAllocAsync = cudaMallocAsync: (pointer: *mut *mut c_void, bytes: usize, _on: Handle) {
        put(pointer, allocate(current_pool(context::use_device())?, bytes)?)
    }

    /// `cuMemAllocFromPoolAsync`.
    fn cuMemAllocFromPoolAsync = cudaMallocFromPoolAsync: (pointer: *mut *mut c_void, bytes: usize, pool: Handle, _on: Handle) {
        put(pointer, allocate(pool, bytes)?)
    }

    /// `cuMemFreeAsync`.
    fn cuMemFreeAsync = cudaFreeAsync: (pointer: *mut c_void, _on: Handle) { free(pointer) }

    /// `cuDeviceGetDefaultMemPool`.
    fn cuDeviceGetDefaultMemPool = cudaDeviceGetDefaultMemPool: (pool: *mut Handle, device: c_int) { put(pool, default_pool(device)?) }

    /// `cuDeviceGetMemPool`.
    fn cuDeviceGetMemPool = cudaDeviceGetMemPool: (pool: *mut Handle, device: c_int) { put(pool, current_pool(device)?) }

    /// `cuDeviceSetMemPool`.
    fn cuDeviceSetMemPool = cudaDeviceSetMemPool: (device: c_int, pool: Handle) { set_current_pool(device, pool) }

    /// `cuMemPoolCreate`.
    fn cuMemPoolCreate = cudaMemPoolCreate: (pool: *mut Handle, props: *const PoolProps) {
        let location = props.as_ref().ok_or(code::INVALID_VALUE)?.location;
        put(pool, create(location.kind, location.id)?)
    }

    /// `cuMemPoolDestroy`.
    fn cuMemPoolDestroy = cudaMemPoolDestroy: (pool: Handle) { destroy(pool) }

    /// `cuMemPoolTrimTo`.
    fn cuMemPoolTrimTo = cudaMemPoolTrimTo: (pool: Handle, _keep: usize) { trim(pool) }

    /// `cuMemPoolGetAttribute`.
    fn cuMemPoolGetAttribute = cudaMemPoolGetAttribute: (pool: Handle, attribute: c_int, value: *mut c_void) {
        get_attribute(pool, attribute, value)
    }

    /// `cuMemPoolSetAttribute`.
    fn cuMemPoolSetAttribute = cudaMemPoolSetAttribute: (pool: Handle, attribute: c_int, value: *mut c_void) {
        set_attribute(pool, attribute, value)
    }

    /// `cuMemPoolSetAccess`: every device of the machine reaches the pool.
    fn cuMemPoolSetAccess = cudaMemPoolSetAccess: (pool: Handle, _access: *const c_void, _count: usize) { trim(pool) }

    /// `cuMemPoolGetAccess`.
    fn cuMemPoolGetAccess = cudaMemPoolGetAccess: (flags: *mut c_uint, pool: Handle, _location: *const MemLocation) {
        trim(pool)?;
        put(flags, 3)
    }
}
