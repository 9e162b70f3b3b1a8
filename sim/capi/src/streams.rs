//! Streams and events, for both APIs.

use std::ffi::{c_int, c_uint, c_void};
use std::ptr::null_mut;

use torch_uvm_sim::StreamInfo;

use crate::context::{self, Context};
use crate::entry::entry_points;
use crate::errors::code;
use crate::host_functions::{self, HostFunction, StreamCallback};
use crate::machine::{Handle, event, machine, stream};
use crate::memory::IpcMemHandle;
use crate::ops;
use crate::outcome::{Outcome, put};

/// `cudaStreamNonBlocking`.
const NON_BLOCKING: c_uint = 1;
/// `cudaEventDisableTiming`.
const DISABLE_TIMING: c_uint = 2;
/// `cudaEventInterprocess`.
const INTERPROCESS: c_uint = 4;

pub fn create_stream(flags: c_uint, priority: c_int) -> Outcome<Handle> {
    if flags & !NON_BLOCKING != 0 {
        Err(code::INVALID_VALUE)?;
    }
    Ok(machine()?.stream_create(context::use_device(), flags == NON_BLOCKING, priority)?.0 as Handle)
}

pub fn stream_info(on: Handle) -> Outcome<StreamInfo> {
    Ok(machine()?.stream_info(context::current_device(), stream(on))?)
}

pub fn stream_flags(on: Handle) -> Outcome<c_uint> {
    Ok(c_uint::from(stream_info(on)?.non_blocking))
}

pub fn destroy_stream(on: Handle) -> Outcome {
    Ok(machine()?.stream_destroy(context::current_device(), stream(on))?)
}

pub fn query_stream(on: Handle) -> Outcome {
    ready(machine()?.stream_query(context::use_device(), stream(on))?)
}

pub fn stream_wait_event(on: Handle, what: Handle) -> Outcome {
    Ok(machine()?.stream_wait_event(context::use_device(), stream(on), event(what))?)
}

pub fn create_event(flags: c_uint) -> Outcome<Handle> {
    // Between processes an event cannot carry times: CUDA's own rule.
    if flags & !7 != 0 || flags & (INTERPROCESS | DISABLE_TIMING) == INTERPROCESS {
        Err(code::INVALID_VALUE)?;
    }
    Ok(machine()?.event_create(context::use_device(), flags & DISABLE_TIMING == 0)?.0 as Handle)
}

pub fn record_event(what: Handle, on: Handle) -> Outcome {
    Ok(machine()?.event_record(context::use_device(), event(what), stream(on))?)
}

pub fn query_event(what: Handle) -> Outcome {
    ready(machine()?.event_query(context::current_device(), event(what))?)
}

pub fn synchronize_event(what: Handle) -> Outcome {
    Ok(machine()?.event_synchronize(context::current_device(), event(what))?)
}

pub fn elapsed(start: Handle, end: Handle) -> Outcome<f32> {
    Ok(machine()?.event_elapsed(context::current_device(), event(start), event(end))?)
}

pub fn destroy_event(what: Handle) -> Outcome {
    Ok(machine()?.event_destroy(context::current_device(), event(what))?)
}

/// Marks a handle of `export_event`.
const EVENT_HANDLE: [u8; 16] = *b"torch-uvm-event\0";

/// `cudaIpcGetEventHandle`. Processes share no streams here, so the event is waited for when its handle is made: what
/// another process opens has completed. (Recorded anew afterwards, it does not tell the others.)
pub fn export_event(what: Handle) -> Outcome<[u8; 64]> {
    synchronize_event(what)?;
    let mut handle = [0; 64];
    handle[..16].copy_from_slice(&EVENT_HANDLE);
    Ok(handle)
}

/// `cudaIpcOpenEventHandle`: an event that has completed.
pub fn import_event(handle: &[u8; 64]) -> Outcome<Handle> {
    if handle[..16] != EVENT_HANDLE {
        Err(code::INVALID_VALUE)?;
    }
    create_event(INTERPROCESS | DISABLE_TIMING)
}

fn ready(done: bool) -> Outcome {
    if done { Ok(()) } else { Err(code::NOT_READY)? }
}

entry_points! { both;
    /// `cuStreamCreateWithPriority`.
    fn cuStreamCreateWithPriority = cudaStreamCreateWithPriority: (on: *mut Handle, flags: c_uint, priority: c_int) {
        put(on, create_stream(flags, priority)?)
    }

    /// `cuStreamCreate`.
    fn cuStreamCreate = cudaStreamCreateWithFlags: (on: *mut Handle, flags: c_uint) { put(on, create_stream(flags, 0)?) }

    /// `cuStreamDestroy_v2`.
    fn cuStreamDestroy_v2 = cudaStreamDestroy: (on: Handle) { destroy_stream(on) }

    /// `cuStreamGetPriority`.
    fn cuStreamGetPriority = cudaStreamGetPriority: (on: Handle, priority: *mut c_int) { put(priority, stream_info(on)?.priority) }

    /// `cuStreamGetFlags`.
    fn cuStreamGetFlags = cudaStreamGetFlags: (on: Handle, flags: *mut c_uint) { put(flags, stream_flags(on)?) }

    /// `cuStreamGetId`.
    fn cuStreamGetId = cudaStreamGetId: (on: Handle, id: *mut u64) { put(id, stream_info(on)?.id) }

    /// `cuStreamGetDevice`.
    fn cuStreamGetDevice = cudaStreamGetDevice: (on: Handle, device: *mut c_int) { put(device, stream_info(on)?.device) }

    /// `cuStreamQuery`.
    fn cuStreamQuery = cudaStreamQuery: (on: Handle) { query_stream(on) }

    /// `cuStreamSynchronize`.
    fn cuStreamSynchronize = cudaStreamSynchronize: (on: Handle) { ops::wait(on) }

    /// `cuStreamWaitEvent`.
    fn cuStreamWaitEvent = cudaStreamWaitEvent: (on: Handle, what: Handle, _flags: c_uint) { stream_wait_event(on, what) }

    /// `cuStreamAddCallback`.
    fn cuStreamAddCallback = cudaStreamAddCallback: (on: Handle, callback: StreamCallback, data: *mut c_void, flags: c_uint) {
        host_functions::add_callback(on, callback, data, flags)
    }

    /// `cuLaunchHostFunc`.
    fn cuLaunchHostFunc = cudaLaunchHostFunc: (on: Handle, function: HostFunction, data: *mut c_void) {
        host_functions::launch(on, function, data)
    }

    /// `cuLaunchHostFunc_v2`: how the stream waits for the function changes nothing here.
    fn cuLaunchHostFunc_v2 = cudaLaunchHostFunc_v2: (on: Handle, function: HostFunction, data: *mut c_void, _mode: c_uint) {
        host_functions::launch(on, function, data)
    }

    /// `cuEventCreate`.
    fn cuEventCreate = cudaEventCreateWithFlags: (what: *mut Handle, flags: c_uint) { put(what, create_event(flags)?) }

    /// `cuEventRecord`.
    fn cuEventRecord = cudaEventRecord: (what: Handle, on: Handle) { record_event(what, on) }

    /// `cuEventRecordWithFlags`.
    fn cuEventRecordWithFlags = cudaEventRecordWithFlags: (what: Handle, on: Handle, _flags: c_uint) { record_event(what, on) }

    /// `cuEventQuery`.
    fn cuEventQuery = cudaEventQuery: (what: Handle) { query_event(what) }

    /// `cuEventSynchronize`.
    fn cuEventSynchronize = cudaEventSynchronize: (what: Handle) { synchronize_event(what) }

    /// `cuEventElapsedTime`.
    fn cuEventElapsedTime, cuEventElapsedTime_v2 = cudaEventElapsedTime, cudaEventElapsedTime_v2: (milliseconds: *mut f32, start: Handle, end: Handle) {
        put(milliseconds, elapsed(start, end)?)
    }

    /// `cuIpcGetEventHandle`.
    fn cuIpcGetEventHandle = cudaIpcGetEventHandle: (handle: *mut [u8; 64], what: Handle) { put(handle, export_event(what)?) }

    /// `cuIpcOpenEventHandle`.
    fn cuIpcOpenEventHandle = cudaIpcOpenEventHandle: (what: *mut Handle, handle: IpcMemHandle) {
        put(what, import_event(&handle.bytes)?)
    }

    /// `cuEventDestroy_v2`.
    fn cuEventDestroy_v2 = cudaEventDestroy: (what: Handle) { destroy_event(what) }
}

entry_points! { driver;
    /// `cuStreamGetCtx`.
    fn cuStreamGetCtx(on: Handle, to: *mut Context) { put(to, context::primary(stream_info(on)?.device)?) }

    /// `cuStreamGetCtx_v2`: no stream here is of a green context.
    fn cuStreamGetCtx_v2(on: Handle, to: *mut Context, green: *mut Handle) {
        put(to, context::primary(stream_info(on)?.device)?)?;
        put(green, null_mut())
    }

    /// `cuStreamGetGreenCtx`.
    fn cuStreamGetGreenCtx(on: Handle, green: *mut Handle) {
        stream_info(on)?;
        put(green, null_mut())
    }

    /// `cuStreamWriteValue32_v2`: a memset of one word, in stream order.
    fn cuStreamWriteValue32_v2(on: Handle, to: u64, value: u32, _flags: c_uint) {
        if to == 0 {
            Err(code::INVALID_VALUE)?;
        }
        ops::fill_async(to, value, 4, 1, on)
    }

    /// `cuStreamWriteValue32`, the form before CUDA 11.7.
    fn cuStreamWriteValue32(on: Handle, to: u64, value: u32, _flags: c_uint) {
        if to == 0 {
            Err(code::INVALID_VALUE)?;
        }
        ops::fill_async(to, value, 4, 1, on)
    }
}

entry_points! { runtime;
    /// `cudaStreamCreate`.
    fn cudaStreamCreate(on: *mut Handle) { put(on, create_stream(0, 0)?) }

    /// `cudaEventCreate`.
    fn cudaEventCreate(what: *mut Handle) { put(what, create_event(0)?) }
}
