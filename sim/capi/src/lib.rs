//! The simulated device as CUDA's own libraries.
//!
//! This library exports the entry points of the CUDA runtime (`cuda*`), of the driver (`cu*`) and of its management library
//! (`nvml*`), unversioned, over one [`torch_uvm_sim::Machine`]. The stand-ins of `stubs/` carry the SONAMEs
//! `libcudart.so.12`, `libcudart.so.13`, `libcuda.so.1` and `libnvidia-ml.so.1` and need this library: preloaded, they take
//! the place of the libraries that a wheel or the driver brings along.
//! README.md says how it is built and used.
//!
//! An entry point that nothing needs yet returns `CUDA_ERROR_NOT_SUPPORTED` and says so in the log (`unsupported`):
//! none pretends.

#![deny(unsafe_op_in_unsafe_fn)]
#![allow(non_snake_case)] // the entry points' names are CUDA's
#![allow(clippy::missing_safety_doc, clippy::too_many_arguments)]

mod blas;
mod context;
mod devices;
mod driver;
mod entry;
mod error_logs;
mod errors;
#[cfg(test)]
mod fault_names;
mod graphs;
mod host_functions;
mod listeners;
mod log;
mod machine;
mod memory;
mod nvml;
mod ops;
mod outcome;
mod pools;
mod process;
mod properties;
mod report;
mod runtime;
mod streams;
mod unsupported;

/// Runs when the library is loaded, before any thread exists.
extern "C" fn on_load() {
    machine::prepare(report::start);
    process::watch_forks();
}

#[used]
#[unsafe(link_section = ".init_array")]
static ON_LOAD: extern "C" fn() = on_load;
