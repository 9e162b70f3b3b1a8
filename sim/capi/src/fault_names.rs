//! Tests that a planted fault strikes the function of the name that it was planted by.

use std::ffi::{CString, c_int};

use torch_uvm_sim::{Code, EntryPoint, Fault, Which};

use crate::context;
use crate::machine::machine;

/// A function of the C API, called with more arguments than it takes, which C's calling convention allows.
type Function = unsafe extern "C" fn(u64, u64, u64, u64, u64, u64, u64, u64) -> c_int;

/// What `cuGetProcAddress` and the stand-ins make of a name: the newest form without a suffix is `_v2`, and what CUDA 12 and 13
/// mean differently exists twice.
fn functions(name: &str) -> Vec<Function> {
    let symbols = [name.to_owned(), format!("{name}_v2"), format!("uvmsim_rt12_{name}"), format!("uvmsim_rt13_{name}")];
    let found = symbols.into_iter().filter_map(|symbol| {
        let symbol = CString::new(symbol).unwrap();
        // SAFETY: a C string, and the default scope, in which the test's own functions are (build.rs exports them).
        let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, symbol.as_ptr()) };
        // SAFETY: a function of this crate, which takes integers and pointers and returns a status.
        (!address.is_null()).then(|| unsafe { std::mem::transmute::<*mut libc::c_void, Function>(address) })
    });
    found.collect()
}

#[test]
fn a_fault_strikes_every_function_of_its_names() {
    let machine = machine().unwrap();
    context::set_device(0).unwrap();
    let mut wrong = Vec::new();
    for &entry_point in EntryPoint::ALL.iter().filter(|entry_point| **entry_point != EntryPoint::HostMemory) {
        for name in entry_point.cuda_names() {
            // Pointers to ones, unless the function looks at its arguments before the engine is called.
            let (mut ones, mut zeros) = ([1u32; 1024], [0u32; 1024]);
            let mut arguments = [ones.as_mut_ptr() as u64; 8];
            for &(place, argument) in ARGUMENTS.iter().filter(|(of, ..)| of == name).flat_map(|(_, some)| *some) {
                arguments[place] = match argument {
                    CONTEXT => context::current() as u64,
                    ZEROS => zeros.as_mut_ptr() as u64,
                    number => number,
                };
            }
            let functions = functions(name);
            if functions.is_empty() {
                wrong.push(format!("{name} does not exist"));
            }
            for function in functions {
                let before = machine.faults_hit();
                machine.inject(Fault { call: Some(entry_point), which: Which::Nth(1), code: Code::LAUNCH_TIMEOUT });
                let [a, b, c, d, e, f, g, h] = arguments;
                // SAFETY: pointers to room enough, or numbers where numbers are meant; the engine is not reached.
                let answer = unsafe { function(a, b, c, d, e, f, g, h) };
                machine.clear_faults();
                if (answer, machine.faults_hit() - before) != (Code::LAUNCH_TIMEOUT.0, 1) {
                    wrong.push(format!("{name} ({}): {answer}", entry_point.method()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Stand for the current context, and for a pointer to zeros.
const CONTEXT: u64 = u64::MAX;
const ZEROS: u64 = u64::MAX - 1;

/// Arguments that must be what they are in CUDA, by their places: contexts, counts, flags, kinds and file descriptors.
const ARGUMENTS: &[(&str, &[(usize, u64)])] = &[
    ("cuDeviceGetAttribute", &[(1, 1), (2, 0)]),
    ("cudaDeviceGetAttribute", &[(1, 1), (2, 0)]),
    ("cudaGetDeviceProperties", &[(1, 0)]),
    ("cudaGetDeviceProperties_v2", &[(1, 0)]),
    ("cuMemAllocManaged", &[(2, 1)]),
    ("cudaMallocManaged", &[(2, 1)]),
    ("cuMemAdvise", &[(2, 1)]),
    ("cuMemAdvise_v2", &[(2, 1)]),
    ("cudaMemAdvise", &[(2, 1)]),
    ("cudaMemAdvise_v2", &[(2, 1)]),
    ("cuMemPrefetchAsync", &[(2, 1), (3, 0)]),
    ("cuMemPrefetchAsync_v2", &[(2, 1), (3, 0)]),
    ("cudaMemPrefetchAsync", &[(2, 1), (3, 0)]),
    ("cudaMemPrefetchAsync_v2", &[(2, 1), (3, 0)]),
    ("cuMemDiscardBatchAsync", &[(2, 1), (3, 0)]),
    ("cudaMemDiscardBatchAsync", &[(2, 1), (3, 0)]),
    ("cuMemDiscardAndPrefetchBatchAsync", &[(2, 1), (4, ZEROS), (5, 1), (6, 0)]),
    ("cudaMemDiscardAndPrefetchBatchAsync", &[(2, 1), (4, ZEROS), (5, 1), (6, 0)]),
    ("cudaMemcpy", &[(3, 4)]),
    ("cudaMemcpyAsync", &[(3, 4)]),
    ("cudaMemcpy2DAsync", &[(6, 4)]),
    ("cudaStreamAddCallback", &[(3, 0)]),
    ("cuStreamCreate", &[(1, 0)]),
    ("cuStreamCreateWithPriority", &[(1, 0)]),
    ("cudaStreamCreateWithFlags", &[(1, 0)]),
    ("cudaStreamCreateWithPriority", &[(1, 0)]),
    ("cuCtxSynchronize", &[(0, CONTEXT)]),
    ("cuEventCreate", &[(1, 0)]),
    ("cudaEventCreateWithFlags", &[(1, 0)]),
    ("cuStreamBeginCapture", &[(1, 0)]),
    ("cuStreamBeginCapture_v2", &[(1, 0)]),
    ("cudaStreamBeginCapture", &[(1, 0)]),
    ("cuStreamUpdateCaptureDependencies", &[(0, 0), (2, 0), (3, 0), (4, 0)]),
    ("cudaStreamUpdateCaptureDependencies", &[(0, 0), (2, 0), (3, 0), (4, 0)]),
    ("cuMemCreate", &[(3, 0)]),
    ("cuMemExportToShareableHandle", &[(2, 1), (3, 0)]),
    ("cuMemImportFromShareableHandle", &[(1, 0), (2, 1)]),
    ("cuMemMap", &[(2, 0), (4, 0)]),
    ("cuMemSetAccess", &[(3, 1)]),
    ("cuCtxEnablePeerAccess", &[(0, CONTEXT)]),
    ("cuCtxDisablePeerAccess", &[(0, CONTEXT)]),
];
