//! Those who want to be told why a call failed (`cuLogsRegisterCallback`): PyTorch puts it into its errors.

use std::ffi::{c_char, c_int, c_void};
use std::sync::{Mutex, PoisonError};

use crate::errors::code;
use crate::outcome::Outcome;

/// `CUlogsCallback` and `cudaLogsCallback_t`: the data given at registration, the level, a text and its length.
pub type LogsCallback = Option<unsafe extern "C" fn(*mut c_void, c_int, *mut c_char, usize)>;

/// `CU_LOG_LEVEL_ERROR`.
const ERROR: c_int = 0;

#[derive(Clone, Copy)]
struct Listener {
    handle: usize,
    callback: unsafe extern "C" fn(*mut c_void, c_int, *mut c_char, usize),
    /// The caller's pointer, which is only handed back.
    data: usize,
}

struct Listeners {
    live: Vec<Listener>,
    last: usize,
}

static LISTENERS: Mutex<Listeners> = Mutex::new(Listeners { live: Vec::new(), last: 0 });

/// Tells all who listen about a call that failed, on the thread that made it.
pub fn tell(text: &str) {
    let listeners = LISTENERS.lock().unwrap_or_else(PoisonError::into_inner).live.clone();
    if listeners.is_empty() {
        return;
    }
    let mut message: Vec<c_char> = text.bytes().chain([0]).map(|byte| byte as c_char).collect();
    for Listener { callback, data, .. } in listeners {
        // SAFETY: the program registered the function for this; the text is valid during the call, with its final zero.
        unsafe { callback(data as *mut c_void, ERROR, message.as_mut_ptr(), text.len()) };
    }
}

/// One more listener; its number.
pub fn register(callback: LogsCallback, data: *mut c_void) -> Outcome<usize> {
    let callback = callback.ok_or(code::INVALID_VALUE)?;
    let mut listeners = LISTENERS.lock().unwrap_or_else(PoisonError::into_inner);
    listeners.last += 1;
    let handle = listeners.last;
    listeners.live.push(Listener { handle, callback, data: data as usize });
    Ok(handle)
}

/// One listener less.
pub fn unregister(handle: usize) -> Outcome {
    let mut listeners = LISTENERS.lock().unwrap_or_else(PoisonError::into_inner);
    let at = listeners.live.iter().position(|listener| listener.handle == handle).ok_or(code::INVALID_VALUE)?;
    listeners.live.remove(at);
    Ok(())
}
