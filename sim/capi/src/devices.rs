//! Devices, for both APIs.

use std::ffi::{CStr, c_char, c_int, c_uint};

use crate::entry::entry_points;
use crate::errors::code;
use crate::machine::{Chip, DRIVER_VERSION, chip, machine};
use crate::outcome::{Outcome, put, put_optional};

/// Copies a text into a buffer of `bytes`, with its final zero.
///
/// # Safety
/// `to` is null or valid for `bytes`.
pub unsafe fn write_text(to: *mut c_char, bytes: c_int, text: &str) -> Outcome {
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
pub unsafe fn device_by_bus_id(text: *const c_char) -> Outcome<c_int> {
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
pub fn device_limit(limit: c_int) -> Outcome<usize> {
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
pub fn peer_attribute(attribute: c_int, device: c_int, peer: c_int) -> Outcome<c_int> {
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

entry_points! { both;
    /// `cuDriverGetVersion`; needs no `cuInit`.
    fn cuDriverGetVersion = cudaDriverGetVersion: (version: *mut c_int) { put(version, DRIVER_VERSION) }

    /// `cuCtxGetFlags`.
    fn cuCtxGetFlags = cudaGetDeviceFlags: (flags: *mut c_uint) { put(flags, 0) }

    /// `cuCtxGetLimit`.
    fn cuCtxGetLimit = cudaDeviceGetLimit: (value: *mut usize, limit: c_int) { put(value, device_limit(limit)?) }

    /// `cuCtxSetLimit`: accepted, since kernels do nothing.
    fn cuCtxSetLimit = cudaDeviceSetLimit: (limit: c_int, _value: usize) { device_limit(limit).map(drop) }

    /// `cuCtxGetCacheConfig`.
    fn cuCtxGetCacheConfig = cudaDeviceGetCacheConfig: (config: *mut c_int) { put(config, 0) }

    /// `cuCtxGetSharedMemConfig`.
    fn cuCtxGetSharedMemConfig = cudaDeviceGetSharedMemConfig: (config: *mut c_int) { put(config, 1) }

    /// `cuCtxGetStreamPriorityRange`.
    fn cuCtxGetStreamPriorityRange = cudaDeviceGetStreamPriorityRange: (least: *mut c_int, greatest: *mut c_int) {
        put_optional(least, 0);
        put_optional(greatest, -5);
        Ok(())
    }
}
