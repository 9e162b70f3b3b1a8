//! torch-uvm: a CUDA caching allocator for PyTorch whose memory is unified.
//!
//! Layers, each of which only knows those below it; `tests/architecture.rs` sees to that:
//! `bridge` (C++); [`allocator`], the process; [`device`], what happens under one device's lock; the parts of a device, which
//! know nothing of each other or of it: [`heap`] (no CUDA in it), [`accounting`], [`tracer`], [`gpu`] (the conversation
//! with the driver), [`streams`], [`thread_cache`], [`pressure`], [`placement`], [`budget`]; data: [`blocks`],
//! [`free_list`], [`pools`], [`segments`], [`pages`], [`options`], [`stats`], [`history`], and [`hooks`], the port to
//! PyTorch; [`ids`], [`sizes`], [`place`], [`error`]; [`driver`], the port to CUDA.

#![deny(unsafe_op_in_unsafe_fn)]
#![warn(missing_docs)]

pub mod accounting;
pub mod allocator;
pub mod blocks;
#[cfg(feature = "bridge")]
mod bridge;
pub mod budget;
pub mod column;
pub mod device;
pub mod driver;
pub mod error;
pub mod free_list;
pub mod gpu;
pub mod heap;
pub mod history;
pub mod hooks;
pub mod ids;
pub mod options;
pub mod pages;
pub mod place;
pub mod placement;
pub mod pools;
pub mod pressure;
pub mod segments;
pub mod settings_string;
pub mod sizes;
pub mod stats;
pub mod streams;
mod sync;
pub mod tables;
pub mod thread_cache;
pub mod tracer;
