//! Devices, versions, errors.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use crate::context;
use crate::entry::{entry_points, last_error, put, put_optional};
use crate::errors::{self, Code, code};
use crate::machine::{Chip, DRIVER_VERSION, chip, described, machine};
use crate::properties::{self, Properties12, Properties13};

/// `cudaGetErrorName`.
#[unsafe(no_mangle)]
pub extern "C" fn cudaGetErrorName(code: Code) -> *const c_char {
    errors::runtime_name(code)
}

/// `cudaGetErrorString`.
#[unsafe(no_mangle)]
pub extern "C" fn cudaGetErrorString(code: Code) -> *const c_char {
    errors::runtime_text(code)
}

/// `cudaGetLastError`.
#[unsafe(no_mangle)]
pub extern "C" fn cudaGetLastError() -> Code {
    last_error(true)
}

/// `cudaPeekAtLastError`.
#[unsafe(no_mangle)]
pub extern "C" fn cudaPeekAtLastError() -> Code {
    last_error(false)
}

entry_points! { runtime;
    /// `cudaGetDeviceCount`.
    fn cudaGetDeviceCount(count: *mut c_int) { put(count, machine()?.device_count()?) }

    /// `cudaGetDevice`: one read of a thread-local, since PyTorch asks all the time.
    fn cudaGetDevice(device: *mut c_int) { put(device, context::current_device()) }

    /// `cudaSetDevice`.
    fn cudaSetDevice(device: c_int) {
        chip(device)?;
        context::set_device(device)
    }

    /// `cudaInitDevice`.
    fn cudaInitDevice(device: c_int, _device_flags: c_uint, _flags: c_uint) {
        chip(device)?;
        context::activate(device);
        Ok(())
    }

    /// `cudaSetDeviceFlags`: how the host waits changes nothing here.
    fn cudaSetDeviceFlags(_flags: c_uint) { machine().map(drop) }

    /// `cudaGetDeviceFlags`.
    fn cudaGetDeviceFlags(flags: *mut c_uint) { put(flags, 0) }

    /// `cudaSetValidDevices`.
    fn cudaSetValidDevices(_devices: *const c_int, _count: c_int) { machine().map(drop) }

    /// `cudaChooseDevice`: they are all alike.
    fn cudaChooseDevice(device: *mut c_int, _prop: *const c_void) {
        machine()?;
        put(device, 0)
    }

    /// `cudaDeviceGetAttribute`.
    fn cudaDeviceGetAttribute(value: *mut c_int, number: c_int, device: c_int) {
        put(value, properties::attribute(&described(device)?, number).ok_or(code::INVALID_VALUE)?)
    }

    /// `cudaGetDeviceProperties_v2` of CUDA 12.
    fn uvmsim_rt12_cudaGetDeviceProperties_v2(prop: *mut Properties12, device: c_int) {
        put(prop, properties::properties12(&described(device)?))
    }

    /// `cudaGetDeviceProperties` of CUDA 13.
    fn uvmsim_rt13_cudaGetDeviceProperties(prop: *mut Properties13, device: c_int) {
        put(prop, properties::properties13(&described(device)?))
    }

    /// `cudaRuntimeGetVersion` of CUDA 12.
    fn uvmsim_rt12_cudaRuntimeGetVersion(version: *mut c_int) { put(version, 12_040) }

    /// `cudaRuntimeGetVersion` of CUDA 13.
    fn uvmsim_rt13_cudaRuntimeGetVersion(version: *mut c_int) { put(version, 13_000) }

    /// `cudaDriverGetVersion`.
    fn cudaDriverGetVersion(version: *mut c_int) { put(version, DRIVER_VERSION) }

    /// `cudaDeviceGetPCIBusId`.
    fn cudaDeviceGetPCIBusId(text: *mut c_char, bytes: c_int, device: c_int) {
        write_text(text, bytes, &chip(device)?.pci_bus_id())
    }

    /// `cudaDeviceGetByPCIBusId`.
    fn cudaDeviceGetByPCIBusId(device: *mut c_int, text: *const c_char) { put(device, device_by_bus_id(text)?) }

    /// `cudaDeviceGetStreamPriorityRange`: CUDA's five priorities from Hopper's driver on, 0 the least.
    fn cudaDeviceGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) {
        put_optional(least, 0);
        put_optional(greatest, -5);
        Ok(())
    }

    /// `cudaDeviceSynchronize`.
    fn cudaDeviceSynchronize() {
        let device = context::use_device();
        Ok(machine()?.device_synchronize(device)?)
    }

    /// `cudaDeviceReset`: waits; memory is not taken from a program that still holds addresses.
    fn cudaDeviceReset() {
        let device = context::use_device();
        Ok(machine()?.device_synchronize(device)?)
    }

    /// `cudaThreadSynchronize`, the old name of `cudaDeviceSynchronize`.
    fn cudaThreadSynchronize() {
        let device = context::use_device();
        Ok(machine()?.device_synchronize(device)?)
    }

    /// `cudaThreadExit`, an old name of `cudaDeviceReset`.
    fn cudaThreadExit() { machine().map(drop) }

    /// `cudaDeviceGetLimit`.
    fn cudaDeviceGetLimit(value: *mut usize, limit: c_int) { put(value, device_limit(limit)?) }

    /// `cudaDeviceSetLimit`: accepted, since kernels do nothing.
    fn cudaDeviceSetLimit(limit: c_int, _value: usize) { device_limit(limit).map(drop) }

    /// `cudaDeviceGetCacheConfig`.
    fn cudaDeviceGetCacheConfig(config: *mut c_int) { put(config, 0) }

    /// `cudaDeviceSetCacheConfig`.
    fn cudaDeviceSetCacheConfig(_config: c_int) { machine().map(drop) }

    /// `cudaDeviceGetSharedMemConfig`.
    fn cudaDeviceGetSharedMemConfig(config: *mut c_int) { put(config, 1) }

    /// `cudaDeviceSetSharedMemConfig`.
    fn cudaDeviceSetSharedMemConfig(_config: c_int) { machine().map(drop) }

    /// `cudaCtxResetPersistingL2Cache`.
    fn cudaCtxResetPersistingL2Cache() { machine().map(drop) }

    /// `cudaDeviceFlushGPUDirectRDMAWrites`.
    fn cudaDeviceFlushGPUDirectRDMAWrites(_target: c_int, _scope: c_int) { machine().map(drop) }

    /// `cudaDeviceCanAccessPeer`.
    fn cudaDeviceCanAccessPeer(can: *mut c_int, device: c_int, peer: c_int) {
        put(can, c_int::from(machine()?.can_access_peer(device, peer)?))
    }

    /// `cudaDeviceEnablePeerAccess`.
    fn cudaDeviceEnablePeerAccess(peer: c_int, _flags: c_uint) {
        let device = context::use_device();
        Ok(machine()?.enable_peer(device, peer)?)
    }

    /// `cudaDeviceDisablePeerAccess`.
    fn cudaDeviceDisablePeerAccess(peer: c_int) {
        let device = context::use_device();
        Ok(machine()?.disable_peer(device, peer)?)
    }

    /// `cudaDeviceGetP2PAttribute`.
    fn cudaDeviceGetP2PAttribute(value: *mut c_int, attribute: c_int, device: c_int, peer: c_int) {
        put(value, peer_attribute(attribute, device, peer)?)
    }

    /// `cudaProfilerStart`: there is nothing to profile.
    fn cudaProfilerStart() { machine().map(drop) }

    /// `cudaProfilerStop`.
    fn cudaProfilerStop() { machine().map(drop) }
}

/// Copies a text into a buffer of `bytes`, with its final zero.
///
/// # Safety
/// `to` is null or valid for `bytes`.
pub unsafe fn write_text(to: *mut c_char, bytes: c_int, text: &str) -> crate::entry::Outcome {
    if to.is_null() || usize::try_from(bytes).map_or(true, |bytes| bytes <= text.len()) {
        Err(code::INVALID_VALUE)?;
    }
    for (at, byte) in text.bytes().chain([0]).enumerate() {
        // SAFETY: the text and its final zero fit into `bytes`.
        unsafe { to.add(at).write(byte as c_char) };
    }
    Ok(())
}

/// The device of a PCI bus id such as `0000:01:00.0`.
///
/// # Safety
/// `text` is null or a C string.
pub unsafe fn device_by_bus_id(text: *const c_char) -> crate::entry::Outcome<c_int> {
    if text.is_null() {
        Err(code::INVALID_VALUE)?;
    }
    // SAFETY: a C string by this function's contract.
    let wanted = unsafe { CStr::from_ptr(text) }.to_string_lossy().to_ascii_uppercase();
    for device in 0..machine()?.device_count()? {
        let own: Chip = chip(device)?;
        // With and without the domain.
        if !wanted.is_empty() && own.pci_bus_id().ends_with(&wanted) {
            return Ok(device);
        }
    }
    Err(code::INVALID_DEVICE)?
}

/// `cudaDeviceGetLimit` and `cuCtxGetLimit`.
pub fn device_limit(limit: c_int) -> crate::entry::Outcome<usize> {
    Ok(match limit {
        0 => 1024,    // stack size
        1 => 1 << 20, // printf FIFO size
        2 => 8 << 20, // malloc heap size
        3 => 2,       // device runtime synchronisation depth
        4 => 2048,    // device runtime pending launches
        5 => 64,      // maximum L2 fetch granularity
        6 => 0,       // persisting L2 cache size
        _ => Err(code::UNSUPPORTED_LIMIT)?,
    })
}

/// `cudaDeviceGetP2PAttribute` and `cuDeviceGetP2PAttribute`.
pub fn peer_attribute(attribute: c_int, device: c_int, peer: c_int) -> crate::entry::Outcome<c_int> {
    if device == peer {
        Err(code::INVALID_DEVICE)?;
    }
    let reachable = c_int::from(machine()?.can_access_peer(device, peer)?);
    Ok(match attribute {
        1 => 0,             // performance rank: the best
        2..=4 => reachable, // access, native atomics, CUDA array access
        _ => Err(code::INVALID_VALUE)?,
    })
}
