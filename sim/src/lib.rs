//! A simulated CUDA machine in host memory.
//!
//! One engine, [`Machine`], with two faces: [`SimDriver`] for Rust tests, and the crate `torch-uvm-sim-capi`, which stands in
//! for CUDA's own libraries. Copies and memsets move real bytes; kernels do nothing; streams run late; managed memory has
//! residency by 2 MiB page. See the repository's DESIGN on what it is for.

#![deny(unsafe_op_in_unsafe_fn)]
#![warn(missing_docs)]

mod capture;
pub mod driver;
pub mod error;
mod event;
pub mod fault;
mod ipc;
pub mod machine;
mod machine_streams;
mod managed;
mod memory;
mod physical;
pub mod profile;
mod state;
mod stream;
pub mod types;
mod virtual_memory;
mod work;

pub use driver::SimDriver;
pub use error::{Code, SimError, SimResult};
pub use fault::{EntryPoint, Fault, Which};
pub use machine::Machine;
pub use machine_streams::Hold;
pub use profile::{Config, ConfigError, Profile, Schedule, parse_faults, parse_size};
pub use torch_uvm::driver::{
    Advice, CaptureMode, DeviceIndex, DeviceInfo, DeviceMemory, DevicePtr, Event, HostMemory, IpcHandle, Location,
    Range, Stream,
};
pub use types::*;
