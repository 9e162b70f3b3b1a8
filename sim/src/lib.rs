//! A simulated CUDA machine in host memory.
//!
//! One engine, [`Machine`], with two faces: [`SimDriver`] for Rust tests, and the crate `torch-uvm-sim-capi`, which stands in
//! for CUDA's own libraries. Copies and memsets move real bytes; kernels do nothing; streams run late; managed memory has
//! residency by 2 MiB page. See the repository's DESIGN on what it is for.

#![deny(unsafe_op_in_unsafe_fn)]
#![warn(missing_docs)]

pub mod driver;
pub mod error;
pub mod fault;
pub mod machine;
pub mod profile;
pub mod types;

pub use driver::SimDriver;
pub use error::{Code, SimError, SimResult};
pub use fault::{EntryPoint, Fault, Which};
pub use machine::Machine;
pub use profile::{Config, ConfigError, Profile, Schedule};
pub use torch_uvm::driver::{
    Advice, CaptureMode, DeviceIndex, DeviceInfo, DeviceMemory, DevicePtr, Event, HostMemory, IpcHandle, Location,
    Range, Stream,
};
pub use types::*;
