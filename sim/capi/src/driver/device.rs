//! Initialisation, devices, contexts, errors.

use std::ffi::{c_char, c_int, c_uint, c_void};

use torch_uvm_sim::Machine;

use crate::context::{self, Context};
use crate::devices::{device_by_bus_id, peer_attribute, write_text};
use crate::entry::entry_points;
use crate::errors::{self, Code, code};
use crate::machine::{chip, described, machine};
use crate::outcome::{Outcome, put, put_optional};
use crate::process::is_used;
use crate::properties;

/// The machine, for a caller that must have called `cuInit`, or the runtime, which does so by itself.
fn initialized() -> Outcome<&'static Machine> {
    if !is_used() {
        Err(code::NOT_INITIALIZED)?;
    }
    machine()
}

/// `CUdevprop`, of CUDA 1.
#[repr(C)]
pub struct DevProp {
    max_threads_per_block: c_int,
    max_threads_dim: [c_int; 3],
    max_grid_size: [c_int; 3],
    shared_bytes_per_block: c_int,
    constant_bytes: c_int,
    warp_size: c_int,
    max_pitch: c_int,
    registers_per_block: c_int,
    clock_rate: c_int,
    texture_alignment: c_int,
}

entry_points! { driver;
    /// `cuInit`.
    fn cuInit(flags: c_uint) {
        if flags != 0 {
            Err(code::INVALID_VALUE)?;
        }
        machine().map(drop)
    }

    /// `cuGetErrorName`.
    fn cuGetErrorName(error: Code, text: *mut *const c_char) {
        put(text, errors::driver_name(error).unwrap_or(std::ptr::null()))?;
        errors::driver_name(error).map(drop).ok_or(code::INVALID_VALUE.into())
    }

    /// `cuGetErrorString`.
    fn cuGetErrorString(error: Code, text: *mut *const c_char) {
        put(text, errors::driver_text(error).unwrap_or(std::ptr::null()))?;
        errors::driver_text(error).map(drop).ok_or(code::INVALID_VALUE.into())
    }

    /// `cuDeviceGet`: a handle is its ordinal.
    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) {
        initialized()?;
        chip(ordinal)?;
        put(device, ordinal)
    }

    /// `cuDeviceGetCount`.
    fn cuDeviceGetCount(count: *mut c_int) { put(count, initialized()?.device_count()?) }

    /// `cuDeviceGetName`: cut off where the buffer ends.
    fn cuDeviceGetName(name: *mut c_char, bytes: c_int, device: c_int) {
        initialized()?;
        let full = chip(device)?.profile.device_name;
        let room = usize::try_from(bytes).ok().and_then(|bytes| bytes.checked_sub(1)).ok_or(code::INVALID_VALUE)?;
        write_text(name, bytes, &full[..full.len().min(room)])
    }

    /// `cuDeviceGetUuid`.
    fn cuDeviceGetUuid(uuid: *mut [u8; 16], device: c_int) {
        initialized()?;
        put(uuid, chip(device)?.uuid())
    }

    /// `cuDeviceGetUuid_v2`.
    fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int) {
        initialized()?;
        put(uuid, chip(device)?.uuid())
    }

    /// `cuDeviceTotalMem_v2`.
    fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) {
        initialized()?;
        put(bytes, chip(device)?.profile.device_memory as usize)
    }

    /// `cuDeviceGetAttribute`.
    fn cuDeviceGetAttribute(value: *mut c_int, number: c_int, device: c_int) {
        initialized()?;
        put(value, properties::attribute(&described(device)?, number).ok_or(code::INVALID_VALUE)?)
    }

    /// `cuDeviceComputeCapability`.
    fn cuDeviceComputeCapability(major: *mut c_int, minor: *mut c_int, device: c_int) {
        initialized()?;
        let capability = chip(device)?.profile.compute_capability;
        put(major, capability.0)?;
        put(minor, capability.1)
    }

    /// `cuDeviceGetProperties`.
    fn cuDeviceGetProperties(prop: *mut DevProp, device: c_int) {
        initialized()?;
        let chip = chip(device)?;
        let value = |number| properties::attribute(&chip, number).unwrap_or(0);
        put(prop, DevProp {
            max_threads_per_block: value(1),
            max_threads_dim: [2, 3, 4].map(value),
            max_grid_size: [5, 6, 7].map(value),
            shared_bytes_per_block: value(8),
            constant_bytes: value(9),
            warp_size: value(10),
            max_pitch: value(11),
            registers_per_block: value(12),
            clock_rate: value(13),
            texture_alignment: value(14),
        })
    }

    /// `cuDeviceGetPCIBusId`.
    fn cuDeviceGetPCIBusId(text: *mut c_char, bytes: c_int, device: c_int) {
        initialized()?;
        write_text(text, bytes, &chip(device)?.pci_bus_id())
    }

    /// `cuDeviceGetByPCIBusId`.
    fn cuDeviceGetByPCIBusId(device: *mut c_int, text: *const c_char) {
        initialized()?;
        put(device, device_by_bus_id(text)?)
    }

    /// `cuDeviceGetExecAffinitySupport`.
    fn cuDeviceGetExecAffinitySupport(supported: *mut c_int, _kind: c_int, device: c_int) {
        initialized()?;
        chip(device)?;
        put(supported, 0)
    }

    /// `cuDeviceCanAccessPeer`.
    fn cuDeviceCanAccessPeer(can: *mut c_int, device: c_int, peer: c_int) {
        put(can, c_int::from(initialized()?.can_access_peer(device, peer)?))
    }

    /// `cuDeviceGetP2PAttribute`.
    fn cuDeviceGetP2PAttribute(value: *mut c_int, attribute: c_int, device: c_int, peer: c_int) {
        initialized()?;
        put(value, peer_attribute(attribute, device, peer)?)
    }

    /// `cuCtxEnablePeerAccess`.
    fn cuCtxEnablePeerAccess(peer: Context, _flags: c_uint) {
        Ok(initialized()?.enable_peer(context::use_device(), context::device_of(peer)?)?)
    }

    /// `cuCtxDisablePeerAccess`.
    fn cuCtxDisablePeerAccess(peer: Context) {
        Ok(initialized()?.disable_peer(context::use_device(), context::device_of(peer)?)?)
    }

    /// `cuDevicePrimaryCtxRetain`.
    fn cuDevicePrimaryCtxRetain(to: *mut Context, device: c_int) {
        initialized()?;
        chip(device)?;
        put(to, context::retain_primary(device)?)
    }

    /// `cuDevicePrimaryCtxRelease_v2`.
    fn cuDevicePrimaryCtxRelease_v2(device: c_int) {
        initialized()?;
        context::release_primary(device)
    }

    /// `cuDevicePrimaryCtxReset_v2`: waits; memory is not taken from a program that still holds addresses.
    fn cuDevicePrimaryCtxReset_v2(device: c_int) { Ok(initialized()?.device_synchronize(device)?) }

    /// `cuDevicePrimaryCtxSetFlags_v2`.
    fn cuDevicePrimaryCtxSetFlags_v2(device: c_int, _flags: c_uint) {
        initialized()?;
        chip(device).map(drop)
    }

    /// `cuDevicePrimaryCtxGetState`.
    fn cuDevicePrimaryCtxGetState(device: c_int, flags: *mut c_uint, active: *mut c_int) {
        initialized()?;
        chip(device)?;
        put_optional(flags, 0);
        put_optional(active, c_int::from(context::is_active(device)?));
        Ok(())
    }

    /// `cuCtxCreate_v2`.
    fn cuCtxCreate_v2(to: *mut Context, _flags: c_uint, device: c_int) {
        initialized()?;
        chip(device)?;
        put(to, context::create(device)?)
    }

    /// `cuCtxCreate_v3`.
    fn cuCtxCreate_v3(to: *mut Context, _affinity: *mut c_void, _count: c_int, _flags: c_uint, device: c_int) {
        initialized()?;
        chip(device)?;
        put(to, context::create(device)?)
    }

    /// `cuCtxCreate_v4`.
    fn cuCtxCreate_v4(to: *mut Context, _params: *mut c_void, _flags: c_uint, device: c_int) {
        initialized()?;
        chip(device)?;
        put(to, context::create(device)?)
    }

    /// `cuCtxDestroy_v2`.
    fn cuCtxDestroy_v2(what: Context) { context::destroy(what) }

    /// `cuCtxPushCurrent_v2`.
    fn cuCtxPushCurrent_v2(what: Context) {
        initialized()?;
        context::push(what)
    }

    /// `cuCtxPopCurrent_v2`.
    fn cuCtxPopCurrent_v2(to: *mut Context) {
        initialized()?;
        put_optional(to, context::pop()?);
        Ok(())
    }

    /// `cuCtxSetCurrent`.
    fn cuCtxSetCurrent(what: Context) {
        initialized()?;
        context::set_current(what)
    }

    /// `cuCtxGetCurrent`.
    fn cuCtxGetCurrent(to: *mut Context) {
        initialized()?;
        put(to, context::current())
    }

    /// `cuCtxGetDevice`.
    fn cuCtxGetDevice(device: *mut c_int) {
        initialized()?;
        if context::current().is_null() {
            Err(code::INVALID_CONTEXT)?;
        }
        put(device, context::current_device())
    }

    /// `cuCtxGetDevice_v2`.
    fn cuCtxGetDevice_v2(device: *mut c_int, what: Context) {
        initialized()?;
        put(device, if what.is_null() { context::current_device() } else { context::device_of(what)? })
    }

    /// `cuCtxGetId`.
    fn cuCtxGetId(what: Context, id: *mut u64) {
        initialized()?;
        let what = if what.is_null() { context::current() } else { what };
        context::device_of(what)?;
        put(id, what as u64)
    }

    /// `cuCtxSetFlags`.
    fn cuCtxSetFlags(_flags: c_uint) { initialized().map(drop) }

    /// `cuCtxGetApiVersion`.
    fn cuCtxGetApiVersion(_what: Context, version: *mut c_uint) { put(version, 3020) }

    /// `cuCtxSynchronize`.
    fn cuCtxSynchronize() {
        let machine = initialized()?;
        if context::current().is_null() {
            Err(code::INVALID_CONTEXT)?;
        }
        Ok(machine.device_synchronize(context::use_device())?)
    }

    /// `cuCtxSynchronize_v2`.
    fn cuCtxSynchronize_v2(what: Context) {
        let machine = initialized()?;
        let device = if what.is_null() { context::current_device() } else { context::device_of(what)? };
        Ok(machine.device_synchronize(device)?)
    }

    /// `cuCtxSetCacheConfig`.
    fn cuCtxSetCacheConfig(_config: c_int) { initialized().map(drop) }

    /// `cuCtxSetSharedMemConfig`.
    fn cuCtxSetSharedMemConfig(_config: c_int) { initialized().map(drop) }

    /// `cuCtxResetPersistingL2Cache`.
    fn cuCtxResetPersistingL2Cache() { initialized().map(drop) }

    /// `cuProfilerStart`: there is nothing to profile.
    fn cuProfilerStart() { initialized().map(drop) }

    /// `cuProfilerStop`.
    fn cuProfilerStop() { initialized().map(drop) }
}
