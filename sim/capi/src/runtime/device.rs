//! Devices, versions, errors.

use std::ffi::{c_char, c_int, c_uint, c_void};

use crate::context;
use crate::devices::{device_by_bus_id, peer_attribute, write_text};
use crate::entry::{entry_points, last_error};
use crate::errors::{self, Code, code};
use crate::machine::{chip, described, machine};
use crate::outcome::put;
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

    /// `cudaDeviceGetPCIBusId`.
    fn cudaDeviceGetPCIBusId(text: *mut c_char, bytes: c_int, device: c_int) {
        write_text(text, bytes, &chip(device)?.pci_bus_id())
    }

    /// `cudaDeviceGetByPCIBusId`.
    fn cudaDeviceGetByPCIBusId(device: *mut c_int, text: *const c_char) { put(device, device_by_bus_id(text)?) }

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

    /// `cudaDeviceSetCacheConfig`.
    fn cudaDeviceSetCacheConfig(_config: c_int) { machine().map(drop) }

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
