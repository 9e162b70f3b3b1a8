//! Streams and events.

use std::ffi::{c_int, c_uint, c_void};
use std::ptr::null_mut;

use crate::context::{self, Context};
use crate::entry::{entry_points, put};
use crate::errors::code;
use crate::host_functions::{self, HostFunction};
use crate::machine::Handle;
use crate::ops;
use crate::runtime::memory::IpcMemHandle;
use crate::runtime::streams::{self, StreamCallback};

entry_points! { driver;
    /// `cuStreamCreate`.
    fn cuStreamCreate(on: *mut Handle, flags: c_uint) { put(on, streams::create_stream(flags, 0)?) }

    /// `cuStreamCreateWithPriority`.
    fn cuStreamCreateWithPriority(on: *mut Handle, flags: c_uint, priority: c_int) {
        put(on, streams::create_stream(flags, priority)?)
    }

    /// `cuStreamDestroy_v2`.
    fn cuStreamDestroy_v2(on: Handle) { streams::destroy_stream(on) }

    /// `cuStreamGetPriority`.
    fn cuStreamGetPriority(on: Handle, priority: *mut c_int) { put(priority, streams::stream_info(on)?.priority) }

    /// `cuStreamGetFlags`.
    fn cuStreamGetFlags(on: Handle, flags: *mut c_uint) { put(flags, streams::stream_flags(on)?) }

    /// `cuStreamGetId`.
    fn cuStreamGetId(on: Handle, id: *mut u64) { put(id, streams::stream_info(on)?.id) }

    /// `cuStreamGetDevice`.
    fn cuStreamGetDevice(on: Handle, device: *mut c_int) { put(device, streams::stream_info(on)?.device) }

    /// `cuStreamGetCtx`.
    fn cuStreamGetCtx(on: Handle, to: *mut Context) { put(to, context::primary(streams::stream_info(on)?.device)?) }

    /// `cuStreamGetCtx_v2`: no stream here is of a green context.
    fn cuStreamGetCtx_v2(on: Handle, to: *mut Context, green: *mut Handle) {
        put(to, context::primary(streams::stream_info(on)?.device)?)?;
        put(green, null_mut())
    }

    /// `cuStreamGetGreenCtx`.
    fn cuStreamGetGreenCtx(on: Handle, green: *mut Handle) {
        streams::stream_info(on)?;
        put(green, null_mut())
    }

    /// `cuStreamQuery`.
    fn cuStreamQuery(on: Handle) { streams::query_stream(on) }

    /// `cuStreamSynchronize`.
    fn cuStreamSynchronize(on: Handle) { ops::wait(on) }

    /// `cuStreamWaitEvent`.
    fn cuStreamWaitEvent(on: Handle, what: Handle, _flags: c_uint) { streams::stream_wait_event(on, what) }

    /// `cuStreamAddCallback`.
    fn cuStreamAddCallback(on: Handle, callback: StreamCallback, data: *mut c_void, flags: c_uint) {
        host_functions::add_callback(on, callback, data, flags)
    }

    /// `cuLaunchHostFunc`.
    fn cuLaunchHostFunc(on: Handle, function: HostFunction, data: *mut c_void) {
        host_functions::launch(on, function, data)
    }

    /// `cuLaunchHostFunc_v2`: how the stream waits for the function changes nothing here.
    fn cuLaunchHostFunc_v2(on: Handle, function: HostFunction, data: *mut c_void, _mode: c_uint) {
        host_functions::launch(on, function, data)
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

    /// `cuEventCreate`.
    fn cuEventCreate(what: *mut Handle, flags: c_uint) { put(what, streams::create_event(flags)?) }

    /// `cuEventRecord`.
    fn cuEventRecord(what: Handle, on: Handle) { streams::record_event(what, on) }

    /// `cuEventRecordWithFlags`.
    fn cuEventRecordWithFlags(what: Handle, on: Handle, _flags: c_uint) { streams::record_event(what, on) }

    /// `cuEventQuery`.
    fn cuEventQuery(what: Handle) { streams::query_event(what) }

    /// `cuEventSynchronize`.
    fn cuEventSynchronize(what: Handle) { streams::synchronize_event(what) }

    /// `cuEventElapsedTime`.
    fn cuEventElapsedTime(milliseconds: *mut f32, start: Handle, end: Handle) {
        put(milliseconds, streams::elapsed(start, end)?)
    }

    /// `cuEventElapsedTime_v2`.
    fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: Handle, end: Handle) {
        put(milliseconds, streams::elapsed(start, end)?)
    }

    /// `cuIpcGetEventHandle`.
    fn cuIpcGetEventHandle(handle: *mut [u8; 64], what: Handle) { put(handle, streams::export_event(what)?) }

    /// `cuIpcOpenEventHandle`.
    fn cuIpcOpenEventHandle(what: *mut Handle, handle: IpcMemHandle) {
        put(what, streams::import_event(&handle.bytes)?)
    }

    /// `cuEventDestroy_v2`.
    fn cuEventDestroy_v2(what: Handle) { streams::destroy_event(what) }
}
