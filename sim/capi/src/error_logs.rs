//! Error logs: programs that want to be told why a call failed.

use std::ffi::c_void;

use crate::entry::entry_points;
use crate::listeners::{self, LogsCallback};
use crate::machine::Handle;
use crate::outcome::put;

entry_points! { both;
    /// `cuLogsRegisterCallback`.
    fn cuLogsRegisterCallback = cudaLogsRegisterCallback: (
        callback: LogsCallback, data: *mut c_void, handle: *mut Handle,
    ) { put(handle, listeners::register(callback, data)? as Handle) }

    /// `cuLogsUnregisterCallback`.
    fn cuLogsUnregisterCallback = cudaLogsUnregisterCallback: (handle: Handle) { listeners::unregister(handle as usize) }
}
