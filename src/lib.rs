//! torch-uvm: a CUDA caching allocator for PyTorch whose memory is unified.
//!
//! Layers, each of which only knows those below it:
//! `bridge` (C++), [`allocator`], [`device`], {[`pools`], [`segments`], [`streams`], [`placement`], [`budget`],
//! [`stats`], [`history`], [`thread_cache`]}, [`blocks`] (no CUDA in it), [`driver`].

#![deny(unsafe_op_in_unsafe_fn)]
#![warn(missing_docs)]

pub mod allocator;
pub mod blocks;
#[cfg(feature = "bridge")]
mod bridge;
pub mod budget;
pub mod device;
pub mod driver;
pub mod error;
pub mod history;
pub mod options;
pub mod pages;
pub mod placement;
pub mod pools;
pub mod pressure;
pub mod segments;
pub mod settings_string;
pub mod stats;
pub mod streams;
pub mod thread_cache;
