//! C functions that a stream calls.

use std::ffi::{c_uint, c_void};
use std::sync::Arc;

use crate::context;
use crate::errors::{Code, code};
use crate::machine::{Handle, machine, stream};
use crate::outcome::Outcome;

/// `cudaHostFn_t` and `CUhostFn`.
pub type HostFunction = Option<unsafe extern "C" fn(*mut c_void)>;

/// `cudaStreamCallback_t` and `CUstreamCallback`.
pub type StreamCallback = Option<unsafe extern "C" fn(Handle, Code, *mut c_void)>;

/// A pointer that the caller has said another thread may have.
struct Shared(*mut c_void);
// SAFETY: CUDA's contract for host functions: their data is for whatever thread the driver calls them on.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn get(&self) -> *mut c_void {
        self.0
    }
}

/// `cudaLaunchHostFunc` and `cuLaunchHostFunc`.
pub fn launch(on: Handle, function: HostFunction, data: *mut c_void) -> Outcome {
    let function = function.ok_or(code::INVALID_VALUE)?;
    let data = Shared(data);
    // SAFETY: the caller of cudaLaunchHostFunc promises that this call is sound when the stream gets to it.
    let call = Arc::new(move || unsafe { function(data.get()) });
    Ok(machine()?.launch_host_func(context::use_device(), stream(on), call)?)
}

/// `cudaStreamAddCallback` and `cuStreamAddCallback`; the status passed is success, since work here does not fail.
pub fn add_callback(on: Handle, callback: StreamCallback, data: *mut c_void, flags: c_uint) -> Outcome {
    let callback = callback.filter(|_| flags == 0).ok_or(code::INVALID_VALUE)?;
    let (data, handle) = (Shared(data), Shared(on));
    // SAFETY: as in `launch`.
    let call = Arc::new(move || unsafe { callback(handle.get(), code::SUCCESS, data.get()) });
    Ok(machine()?.launch_host_func(context::use_device(), stream(on), call)?)
}
