//! A simulated CUDA machine in host memory.
//!
//! One engine, [`Machine`], with two faces: [`SimDriver`] for Rust tests, and the crate `torch-uvm-sim-capi`, which stands in
//! for CUDA's own libraries.
//!
//! | is simulated | how |
//! |---|---|
//! | memory | real addresses with real bytes; reserved, not committed; freed memory has no access (`memory`) |
//! | streams | queues that run late, so that memory reused too early is really corrupted (`stream`, [`Schedule`]) |
//! | copies, memsets, host functions | done when the stream gets there (`work`) |
//! | kernels | do nothing; a test may say what one touches ([`Access`]) |
//! | capture and graphs | legality as measured on real devices (`capture`) |
//! | chunks | memory of devices and of the host without an address, mapped where the program wants it (`chunks`) |
//! | managed memory | where each 2 MiB page is, advice, prefetch, discard, eviction, the books (`managed`, `physical`) |
//! | time | a clock moved on by the costs of the [`Profile`], not by the host's |
//! | what happened | counters, and what moved for which cause: [`Machine::report`] |
//! | failure | any call can be made to fail ([`Fault`]); a failed call has changed nothing |
//!
//! What it cannot see: plain loads and stores of the CPU (a test says [`Machine::host_touch`]), and what other processes'
//! machines do (they share bytes through IPC handles, not books).
//!
//! ```
//! use torch_uvm_sim::{Config, Location, Machine, Range, Stream};
//!
//! let machine = Machine::new(Config::small_gh200());
//! let ptr = machine.alloc_managed(0, 16 << 30)?;
//! machine.prefetch(0, Range { ptr, bytes: 1 << 30 }, Location::Device(0), Stream(0))?;
//! machine.device_synchronize(0)?;
//! assert_eq!(machine.residency().devices, [1 << 30]);
//! assert_eq!(machine.device_memory(0)?.free, 1 << 30);
//! # Ok::<(), torch_uvm_sim::SimError>(())
//! ```

#![deny(unsafe_op_in_unsafe_fn)]
#![warn(missing_docs)]

mod capture;
mod chunks;
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
pub mod report;
mod state;
mod stream;
pub mod types;
mod work;

pub use driver::SimDriver;
pub use error::{Code, SimError, SimResult};
pub use fault::{EntryPoint, Fault, Which};
pub use machine::Machine;
pub use machine_streams::Hold;
pub use profile::{Config, ConfigError, Profile, Schedule, parse_faults, parse_size};
pub use report::Report;
pub use torch_uvm::driver::{
    Advice, CaptureMode, Chunk, DeviceIndex, DeviceInfo, DeviceMemory, DevicePtr, Event, HostMemory, IpcHandle,
    Location, Range, Stream,
};
pub use types::*;
