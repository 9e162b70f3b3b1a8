//! Kernels: registration, attributes, occupancy, launches. A kernel does nothing, in its place in the stream.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::{Mutex, PoisonError};

use crate::context;
use crate::entry::entry_points;
use crate::errors::{Code, code};
use crate::machine::{Handle, machine};
use crate::ops::launch;
use crate::outcome::{Outcome, put, put_optional};

/// `dim3`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Dim3 {
    x: c_uint,
    y: c_uint,
    z: c_uint,
}

/// `cudaLaunchConfig_t`.
#[repr(C)]
pub struct LaunchConfig {
    grid: Dim3,
    block: Dim3,
    shared_bytes: usize,
    stream: Handle,
    attributes: *mut c_void,
    attribute_count: c_uint,
}

/// `cudaFuncAttributes`.
#[repr(C)]
pub struct FuncAttributes {
    shared_bytes: usize,
    const_bytes: usize,
    local_bytes: usize,
    max_threads_per_block: c_int,
    registers: c_int,
    ptx_version: c_int,
    binary_version: c_int,
    cache_mode_ca: c_int,
    max_dynamic_shared_bytes: c_int,
    preferred_carveout: c_int,
    cluster_dim_must_be_set: c_int,
    required_cluster_width: c_int,
    required_cluster_height: c_int,
    required_cluster_depth: c_int,
    cluster_scheduling_policy: c_int,
    non_portable_cluster_size_allowed: c_int,
    reserved: [c_int; 16],
}

/// `__cudaRegisterFatBinary`: the handle is the address of the image.
#[unsafe(no_mangle)]
pub extern "C" fn __cudaRegisterFatBinary(image: *mut c_void) -> *mut *mut c_void {
    image.cast()
}

/// `__cudaRegisterFatBinaryEnd`.
#[unsafe(no_mangle)]
pub extern "C" fn __cudaRegisterFatBinaryEnd(_handle: *mut *mut c_void) {}

/// `__cudaUnregisterFatBinary`.
#[unsafe(no_mangle)]
pub extern "C" fn __cudaUnregisterFatBinary(_handle: *mut *mut c_void) {}

/// `__cudaInitModule`.
#[unsafe(no_mangle)]
pub extern "C" fn __cudaInitModule(_handle: *mut *mut c_void) -> c_char {
    1
}

/// `__cudaRegisterFunction`: libtorch registers some hundred thousand kernels when it is loaded, and none is ever looked up.
#[unsafe(no_mangle)]
pub extern "C" fn __cudaRegisterFunction(
    _handle: *mut *mut c_void,
    _stub: *const c_char,
    _device_stub: *mut c_char,
    _name: *const c_char,
    _thread_limit: c_int,
    _tid: *mut c_void,
    _bid: *mut c_void,
    _block: *mut c_void,
    _grid: *mut c_void,
    _warp: *mut c_int,
) {
}

/// The device's copies of `__device__` and `__constant__` variables: host stub to size, and the address once asked for.
static VARIABLES: Mutex<Option<HashMap<usize, Variable>>> = Mutex::new(None);

#[derive(Clone, Copy)]
struct Variable {
    bytes: usize,
    address: u64,
}

/// `__cudaRegisterVar`.
#[unsafe(no_mangle)]
pub extern "C" fn __cudaRegisterVar(
    _handle: *mut *mut c_void,
    stub: *mut c_char,
    _address: *mut c_char,
    _name: *const c_char,
    _external: c_int,
    bytes: usize,
    _constant: c_int,
    _global: c_int,
) {
    let mut variables = VARIABLES.lock().unwrap_or_else(PoisonError::into_inner);
    variables.get_or_insert_default().insert(stub as usize, Variable { bytes, address: 0 });
}

/// The address and size of a variable's copy on the device. One copy serves all devices: kernels, which would tell them
/// apart, do nothing.
pub fn symbol(stub: *const c_void) -> Outcome<(u64, usize)> {
    let mut variables = VARIABLES.lock().unwrap_or_else(PoisonError::into_inner);
    let variable = variables.get_or_insert_default().get_mut(&(stub as usize)).ok_or(code::INVALID_SYMBOL)?;
    if variable.address == 0 {
        variable.address = machine()?.alloc_device(context::use_device(), variable.bytes.max(1) as u64)?.0;
    }
    Ok((variable.address, variable.bytes))
}

thread_local! {
    /// What `<<<…>>>` has pushed and the stub not yet popped.
    static CONFIGURATIONS: RefCell<Vec<(Dim3, Dim3, usize, Handle)>> = const { RefCell::new(Vec::new()) };
}

/// `__cudaPushCallConfiguration`; the answer 0 means: go on with the launch.
#[unsafe(no_mangle)]
pub extern "C" fn __cudaPushCallConfiguration(grid: Dim3, block: Dim3, shared_bytes: usize, stream: Handle) -> c_uint {
    CONFIGURATIONS.with_borrow_mut(|stack| stack.push((grid, block, shared_bytes, stream)));
    0
}

/// An occupancy that the caller may divide by.
const BLOCKS_PER_MULTIPROCESSOR: c_int = 2;

entry_points! { runtime;
    /// `__cudaPopCallConfiguration`.
    fn __cudaPopCallConfiguration(grid: *mut Dim3, block: *mut Dim3, shared_bytes: *mut usize, stream: *mut Handle) {
        let top = CONFIGURATIONS.with_borrow_mut(Vec::pop).ok_or(code::MISSING_CONFIGURATION)?;
        put_optional(grid, top.0);
        put_optional(block, top.1);
        put_optional(shared_bytes, top.2);
        put_optional(stream, top.3);
        Ok(())
    }

    /// `cudaLaunchKernel`.
    fn cudaLaunchKernel(
        function: *const c_void, _grid: Dim3, _block: Dim3, _args: *mut *mut c_void, _shared_bytes: usize, on: Handle,
    ) { launch_stub(function, on) }

    /// `__cudaLaunchKernel`: how code compiled by CUDA 13 launches, by the kernel of `__cudaGetKernel`.
    fn __cudaLaunchKernel(
        kernel: Handle, _grid: Dim3, _block: Dim3, _args: *mut *mut c_void, _shared_bytes: usize, on: Handle,
    ) { launch_stub(kernel, on) }

    /// `__cudaLaunchKernel` for the per-thread default stream.
    fn __cudaLaunchKernel_ptsz(
        kernel: Handle, _grid: Dim3, _block: Dim3, _args: *mut *mut c_void, _shared_bytes: usize, on: Handle,
    ) { launch_stub(kernel, on) }

    /// `cudaLaunchKernel` for the per-thread default stream.
    fn cudaLaunchKernel_ptsz(
        function: *const c_void, _grid: Dim3, _block: Dim3, _args: *mut *mut c_void, _shared_bytes: usize, on: Handle,
    ) { launch_stub(function, on) }

    /// `cudaLaunchCooperativeKernel`.
    fn cudaLaunchCooperativeKernel(
        function: *const c_void, _grid: Dim3, _block: Dim3, _args: *mut *mut c_void, _shared_bytes: usize, on: Handle,
    ) { launch_stub(function, on) }

    /// `cudaLaunchKernelExC`.
    fn cudaLaunchKernelExC(config: *const LaunchConfig, function: *const c_void, _args: *mut *mut c_void) {
        let config = config.as_ref().ok_or(code::INVALID_VALUE)?;
        launch_stub(function, config.stream)
    }

    /// `cudaFuncGetAttributes`: a small kernel's.
    fn cudaFuncGetAttributes(attributes: *mut FuncAttributes, _function: *const c_void) {
        let capability = crate::machine::chip(context::current_device())?.profile.compute_capability;
        let version = capability.0 * 10 + capability.1;
        put(attributes, FuncAttributes {
            shared_bytes: 0,
            const_bytes: 0,
            local_bytes: 0,
            max_threads_per_block: 1024,
            registers: 32,
            ptx_version: version,
            binary_version: version,
            cache_mode_ca: 0,
            max_dynamic_shared_bytes: 48 << 10,
            preferred_carveout: -1,
            cluster_dim_must_be_set: 0,
            required_cluster_width: 0,
            required_cluster_height: 0,
            required_cluster_depth: 0,
            cluster_scheduling_policy: 0,
            non_portable_cluster_size_allowed: 0,
            reserved: [0; 16],
        })
    }

    /// `cudaFuncSetAttribute`: accepted, since kernels do nothing.
    fn cudaFuncSetAttribute(_function: *const c_void, _attribute: c_int, _value: c_int) { machine().map(drop) }

    /// `cudaFuncSetCacheConfig`.
    fn cudaFuncSetCacheConfig(_function: *const c_void, _config: c_int) { machine().map(drop) }

    /// `cudaFuncSetSharedMemConfig`.
    fn cudaFuncSetSharedMemConfig(_function: *const c_void, _config: c_int) { machine().map(drop) }

    /// `cudaOccupancyMaxActiveBlocksPerMultiprocessor`.
    fn cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks: *mut c_int, _function: *const c_void, _block_size: c_int, _shared_bytes: usize,
    ) { put(blocks, BLOCKS_PER_MULTIPROCESSOR) }

    /// `cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags`.
    fn cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        blocks: *mut c_int, _function: *const c_void, _block_size: c_int, _shared_bytes: usize, _flags: c_uint,
    ) { put(blocks, BLOCKS_PER_MULTIPROCESSOR) }

    /// `cudaOccupancyAvailableDynamicSMemPerBlock`.
    fn cudaOccupancyAvailableDynamicSMemPerBlock(
        bytes: *mut usize, _function: *const c_void, _blocks: c_int, _block_size: c_int,
    ) { put(bytes, 48 << 10) }

    /// `cudaOccupancyMaxActiveClusters`.
    fn cudaOccupancyMaxActiveClusters(clusters: *mut c_int, _function: *const c_void, _config: *const LaunchConfig) {
        put(clusters, 8)
    }

    /// `cudaOccupancyMaxPotentialClusterSize`.
    fn cudaOccupancyMaxPotentialClusterSize(size: *mut c_int, _function: *const c_void, _config: *const LaunchConfig) {
        put(size, 8)
    }

    /// `cudaGetSymbolAddress`.
    fn cudaGetSymbolAddress(address: *mut *mut c_void, stub: *const c_void) {
        put(address, symbol(stub)?.0 as *mut c_void)
    }

    /// `cudaGetSymbolSize`.
    fn cudaGetSymbolSize(bytes: *mut usize, stub: *const c_void) { put(bytes, symbol(stub)?.1) }

    /// `cudaGetFuncBySymbol`: the stub's address serves as the function's handle.
    fn cudaGetFuncBySymbol(function: *mut Handle, stub: *const c_void) { put(function, stub.cast_mut()) }

    /// `cudaGetKernel`.
    fn cudaGetKernel(kernel: *mut Handle, stub: *const c_void) { put(kernel, stub.cast_mut()) }
}

fn launch_stub(function: *const c_void, on: Handle) -> Outcome {
    if function.is_null() {
        Err(code::INVALID_DEVICE_FUNCTION)?;
    }
    launch(on)
}

/// `__cudaGetKernel`: as `cudaGetKernel`.
///
/// # Safety
/// `kernel` is null or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __cudaGetKernel(kernel: *mut Handle, stub: *const c_void) -> Code {
    // SAFETY: this function's contract is that of the one it calls.
    unsafe { cudaGetKernel(kernel, stub) }
}
