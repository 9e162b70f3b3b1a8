//! torch-uvm: a CUDA caching allocator for PyTorch whose memory is unified.
//!
//! Layers, each of which only knows those below it:
//! `bridge` (C++), [`allocator`], {[`pools`], [`segments`], [`streams`], [`placement`], [`budget`], [`stats`], [`history`]},
//! [`blocks`] (no CUDA in it), [`driver`].

#![deny(unsafe_op_in_unsafe_fn)]
#![warn(missing_docs)]

pub mod driver;
pub mod error;
pub mod history;
pub mod pools;
pub mod stats;
