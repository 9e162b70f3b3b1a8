//! Which device a thread uses: the runtime's current device and the driver's stack of contexts, which are one thing.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{LazyLock, Mutex, PoisonError};

use crate::errors::code;
use crate::outcome::Outcome;

/// The most devices that a simulated machine has.
pub const MAX_DEVICES: usize = 64;

/// A `CUcontext`: never looked into, only compared.
pub type Context = *mut c_void;

/// Their addresses are the primary contexts' handles.
static PRIMARY: [u8; MAX_DEVICES] = [0; MAX_DEVICES];
static ACTIVE: [AtomicBool; MAX_DEVICES] = [const { AtomicBool::new(false) }; MAX_DEVICES];
static RETAINED: [AtomicUsize; MAX_DEVICES] = [const { AtomicUsize::new(0) }; MAX_DEVICES];

/// Contexts of `cuCtxCreate`: handle to device.
static CREATED: LazyLock<Mutex<HashMap<usize, i32>>> = LazyLock::new(Mutex::default);

thread_local! {
    /// The device of the top of `STACK`, or 0: `cudaGetDevice` reads nothing else.
    static DEVICE: Cell<i32> = const { Cell::new(0) };
    static STACK: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

fn index(device: i32) -> Outcome<usize> {
    Ok(usize::try_from(device).ok().filter(|index| *index < MAX_DEVICES).ok_or(code::INVALID_DEVICE)?)
}

/// The primary context of a device that exists.
pub fn primary(device: i32) -> Outcome<Context> {
    Ok((&raw const PRIMARY[index(device)?]).cast_mut().cast())
}

/// The device of a context.
pub fn device_of(context: Context) -> Outcome<i32> {
    let offset = (context as usize).wrapping_sub(PRIMARY.as_ptr() as usize);
    if offset < MAX_DEVICES {
        return Ok(offset as i32);
    }
    let created = CREATED.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(created.get(&(context as usize)).copied().ok_or(code::INVALID_CONTEXT)?)
}

/// `cudaGetDevice`.
pub fn current_device() -> i32 {
    DEVICE.get()
}

/// The current device, for a call that uses it: its primary context becomes active, as the runtime does lazily.
pub fn use_device() -> i32 {
    let device = DEVICE.get();
    STACK.with_borrow_mut(|stack| {
        if stack.is_empty() {
            // `primary` cannot fail: DEVICE holds a device that exists.
            stack.extend(primary(device).ok().map(|context| context as usize));
        }
    });
    activate(device);
    device
}

/// Marks the primary context of a device as active.
pub fn activate(device: i32) {
    if let Ok(index) = index(device) {
        ACTIVE[index].store(true, Relaxed);
    }
}

/// `cuDevicePrimaryCtxGetState`.
pub fn is_active(device: i32) -> Outcome<bool> {
    Ok(ACTIVE[index(device)?].load(Relaxed))
}

/// `cuDevicePrimaryCtxRetain`.
pub fn retain_primary(device: i32) -> Outcome<Context> {
    RETAINED[index(device)?].fetch_add(1, Relaxed);
    activate(device);
    primary(device)
}

/// `cuDevicePrimaryCtxRelease`. The context stays active: the runtime in this process holds it too.
pub fn release_primary(device: i32) -> Outcome {
    let count = &RETAINED[index(device)?];
    count.fetch_update(Relaxed, Relaxed, |count| count.checked_sub(1)).map_err(|_| code::INVALID_CONTEXT)?;
    Ok(())
}

fn refresh(stack: &[usize]) -> Outcome {
    let device = match stack.last() {
        Some(top) => device_of(*top as Context)?,
        None => 0,
    };
    DEVICE.set(device);
    Ok(())
}

/// `cudaSetDevice`: the device's primary context takes the place of the top of the stack, and is active from now on.
pub fn set_device(device: i32) -> Outcome {
    activate(device);
    set_current(primary(device)?)
}

/// `cuCtxGetCurrent`; null where there is none.
pub fn current() -> Context {
    STACK.with_borrow(|stack| stack.last().map_or(std::ptr::null_mut(), |top| *top as Context))
}

/// `cuCtxSetCurrent`; null takes the top away.
pub fn set_current(context: Context) -> Outcome {
    if !context.is_null() {
        device_of(context)?;
    }
    STACK.with_borrow_mut(|stack| {
        stack.pop();
        if !context.is_null() {
            stack.push(context as usize);
        }
        refresh(stack)
    })
}

/// `cuCtxPushCurrent`.
pub fn push(context: Context) -> Outcome {
    device_of(context)?;
    STACK.with_borrow_mut(|stack| {
        stack.push(context as usize);
        refresh(stack)
    })
}

/// `cuCtxPopCurrent`.
pub fn pop() -> Outcome<Context> {
    STACK.with_borrow_mut(|stack| {
        let top = stack.pop().ok_or(code::INVALID_CONTEXT)?;
        refresh(stack)?;
        Ok(top as Context)
    })
}

/// `cuCtxCreate`: a context of its own name that shares everything else with the primary one.
pub fn create(device: i32) -> Outcome<Context> {
    index(device)?;
    static NEXT: AtomicUsize = AtomicUsize::new(0x5100_0000_0000);
    let handle = NEXT.fetch_add(64, Relaxed);
    CREATED.lock().unwrap_or_else(PoisonError::into_inner).insert(handle, device);
    push(handle as Context)?;
    Ok(handle as Context)
}

/// `cuCtxDestroy`.
pub fn destroy(context: Context) -> Outcome {
    let known = CREATED.lock().unwrap_or_else(PoisonError::into_inner).remove(&(context as usize)).is_some();
    if !known {
        Err(code::INVALID_CONTEXT)?;
    }
    STACK.with_borrow_mut(|stack| {
        stack.retain(|entry| *entry != context as usize);
        refresh(stack)
    })
}
