//! Modules, libraries, functions, launches: a function is a name, a kernel does nothing.

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use crate::context;
use crate::entry::entry_points;
use crate::errors::code;
use crate::machine::{Handle, machine};
use crate::ops::launch;
use crate::outcome::{Outcome, put};

/// Modules and libraries alike: their functions' names, by handle.
#[derive(Default)]
struct Modules {
    functions: HashMap<usize, Vec<&'static str>>,
    next: usize,
}

static MODULES: LazyLock<Mutex<Modules>> = LazyLock::new(Mutex::default);

fn modules() -> MutexGuard<'static, Modules> {
    MODULES.lock().unwrap_or_else(PoisonError::into_inner)
}

fn load(image: *const c_void) -> Outcome<Handle> {
    machine()?;
    if image.is_null() {
        Err(code::INVALID_VALUE)?;
    }
    let mut modules = modules();
    modules.next += 1;
    let handle = 0x5300_0000_0000 + modules.next * 64;
    modules.functions.insert(handle, Vec::new());
    Ok(handle as Handle)
}

fn unload(module: Handle) -> Outcome {
    modules().functions.remove(&(module as usize)).ok_or(code::INVALID_HANDLE)?;
    Ok(())
}

/// A function of that name, whether or not the image has it: images are not read.
///
/// # Safety
/// `name` is null or a C string.
unsafe fn function(module: Handle, name: *const c_char) -> Outcome<Handle> {
    if name.is_null() {
        Err(code::INVALID_VALUE)?;
    }
    // SAFETY: a C string by this function's contract.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
    let mut modules = modules();
    let functions = modules.functions.get_mut(&(module as usize)).ok_or(code::INVALID_HANDLE)?;
    let known = functions.iter().find(|known| **known == name).copied();
    // Kept for ever: a function's handle is the address of its name, and may outlive its module.
    let name = known.unwrap_or_else(|| Box::leak(name.into_owned().into_boxed_str()));
    if known.is_none() {
        functions.push(name);
    }
    Ok(name.as_ptr().cast_mut().cast())
}

/// `CUlaunchConfig`.
#[repr(C)]
pub struct LaunchConfig {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared_bytes: c_uint,
    stream: Handle,
    attributes: *mut c_void,
    attribute_count: c_uint,
}

entry_points! { driver;
    /// `cuModuleLoadData`.
    fn cuModuleLoadData(module: *mut Handle, image: *const c_void) { put(module, load(image)?) }

    /// `cuModuleLoadDataEx`.
    fn cuModuleLoadDataEx(
        module: *mut Handle, image: *const c_void, _count: c_uint, _options: *mut c_int, _values: *mut *mut c_void,
    ) { put(module, load(image)?) }

    /// `cuModuleLoadFatBinary`.
    fn cuModuleLoadFatBinary(module: *mut Handle, image: *const c_void) { put(module, load(image)?) }

    /// `cuModuleUnload`.
    fn cuModuleUnload(module: Handle) { unload(module) }

    /// `cuModuleGetLoadingMode`: lazy.
    fn cuModuleGetLoadingMode(mode: *mut c_int) { put(mode, 2) }

    /// `cuModuleGetFunction`.
    fn cuModuleGetFunction(to: *mut Handle, module: Handle, name: *const c_char) { put(to, function(module, name)?) }

    /// `cuLibraryLoadData`.
    fn cuLibraryLoadData(
        library: *mut Handle, image: *const c_void, _jit: *mut c_int, _jit_values: *mut *mut c_void,
        _jit_count: c_uint, _options: *mut c_int, _values: *mut *mut c_void, _count: c_uint,
    ) { put(library, load(image)?) }

    /// `cuLibraryUnload`.
    fn cuLibraryUnload(library: Handle) { unload(library) }

    /// `cuLibraryGetModule`.
    fn cuLibraryGetModule(module: *mut Handle, library: Handle) { put(module, library) }

    /// `cuLibraryGetKernel`.
    fn cuLibraryGetKernel(to: *mut Handle, library: Handle, name: *const c_char) { put(to, function(library, name)?) }

    /// `cuKernelGetFunction`.
    fn cuKernelGetFunction(to: *mut Handle, kernel: Handle) { put(to, kernel) }

    /// `cuFuncGetAttribute`: a small kernel's.
    fn cuFuncGetAttribute(value: *mut c_int, attribute: c_int, _function: Handle) {
        put(value, function_attribute(attribute)?)
    }

    /// `cuKernelGetAttribute`.
    fn cuKernelGetAttribute(value: *mut c_int, attribute: c_int, _kernel: Handle, _device: c_int) {
        put(value, function_attribute(attribute)?)
    }

    /// `cuFuncSetAttribute`.
    fn cuFuncSetAttribute(_function: Handle, _attribute: c_int, _value: c_int) { machine().map(drop) }

    /// `cuKernelSetAttribute`.
    fn cuKernelSetAttribute(_attribute: c_int, _value: c_int, _kernel: Handle, _device: c_int) {
        machine().map(drop)
    }

    /// `cuFuncSetCacheConfig`.
    fn cuFuncSetCacheConfig(_function: Handle, _config: c_int) { machine().map(drop) }

    /// `cuFuncLoad`.
    fn cuFuncLoad(_function: Handle) { machine().map(drop) }

    /// `cuOccupancyMaxActiveBlocksPerMultiprocessor`.
    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks: *mut c_int, _function: Handle, _block_size: c_int, _shared_bytes: usize,
    ) { put(blocks, 2) }

    /// `cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags`.
    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        blocks: *mut c_int, _function: Handle, _block_size: c_int, _shared_bytes: usize, _flags: c_uint,
    ) { put(blocks, 2) }

    /// `cuOccupancyMaxActiveClusters`.
    fn cuOccupancyMaxActiveClusters(clusters: *mut c_int, _function: Handle, _config: *const LaunchConfig) {
        put(clusters, 8)
    }

    /// `cuLaunchKernel`.
    fn cuLaunchKernel(
        function: Handle, _grid_x: c_uint, _grid_y: c_uint, _grid_z: c_uint, _block_x: c_uint, _block_y: c_uint,
        _block_z: c_uint, _shared_bytes: c_uint, on: Handle, _args: *mut *mut c_void, _extra: *mut *mut c_void,
    ) { launch_function(function, on) }

    /// `cuLaunchCooperativeKernel`.
    fn cuLaunchCooperativeKernel(
        function: Handle, _grid_x: c_uint, _grid_y: c_uint, _grid_z: c_uint, _block_x: c_uint, _block_y: c_uint,
        _block_z: c_uint, _shared_bytes: c_uint, on: Handle, _args: *mut *mut c_void,
    ) { launch_function(function, on) }

    /// `cuLaunchKernelEx`.
    fn cuLaunchKernelEx(
        config: *const LaunchConfig, function: Handle, _args: *mut *mut c_void, _extra: *mut *mut c_void,
    ) { launch_function(function, config.as_ref().ok_or(code::INVALID_VALUE)?.stream) }
}

fn launch_function(function: Handle, on: Handle) -> Outcome {
    if function.is_null() || context::current().is_null() {
        Err(code::INVALID_HANDLE)?;
    }
    launch(on)
}

fn function_attribute(attribute: c_int) -> Outcome<c_int> {
    Ok(match attribute {
        0 => 1024,     // MAX_THREADS_PER_BLOCK
        4 => 32,       // NUM_REGS
        5 | 6 => 90,   // PTX_VERSION, BINARY_VERSION
        8 => 48 << 10, // MAX_DYNAMIC_SHARED_SIZE_BYTES
        9 => -1,       // PREFERRED_SHARED_MEMORY_CARVEOUT
        1..=3 | 7 | 10..=15 => 0,
        _ => Err(code::INVALID_VALUE)?,
    })
}
