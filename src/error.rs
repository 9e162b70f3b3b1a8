//! What can go wrong, in the terms of whoever called the allocator.

use crate::driver::{DeviceIndex, DevicePtr, DriverError};
use crate::sizes::format_size;
use std::fmt;

/// Which limit stopped an allocation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Limit {
    /// `uvm_oversubscription_ratio` times the device's memory.
    Ratio,
    /// Device memory plus the host memory that is left, less `uvm_host_reserve_mb`.
    HostMemory,
    /// `torch.cuda.set_per_process_memory_fraction`.
    Fraction,
    /// CUDA itself had no memory (device placement, or a MemPool's own allocator).
    Device,
}

/// Everything an out-of-memory message says. All figures in bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OutOfMemory {
    /// The device asked.
    pub device: DeviceIndex,
    /// What was asked, rounded as the allocator would have reserved it.
    pub requested: u64,
    /// The device's own memory.
    pub device_total: u64,
    /// What CUDA calls free on the device.
    pub device_free: u64,
    /// The capacity in force: the cap on populated bytes.
    pub capacity: u64,
    /// The limit that was met.
    pub limit: Limit,
    /// It was refused before CUDA was asked, and `throw_on_cudamalloc_oom` wants observers to be told.
    pub rejected: bool,
    /// The per-process limit in bytes, where one is set.
    pub allowed: Option<u64>,
    /// Host memory left, and the reserve kept from it.
    pub host_available: u64,
    /// `uvm_host_reserve_mb` as bytes.
    pub host_reserve: u64,
    /// Populated bytes on the device and in host memory.
    pub populated_device: u64,
    /// Populated bytes placed in host memory.
    pub populated_host: u64,
    /// Bytes in live allocations.
    pub allocated: u64,
    /// Bytes held (`reserved_bytes`).
    pub reserved: u64,
    /// Cached bytes in private pools (CUDA graphs, MemPools).
    pub private_pools: u64,
}

impl fmt::Display for OutOfMemory {
    // The first sentences are `native`'s, word for word: programs match them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "CUDA out of memory. Tried to allocate {}. GPU {} has a total capacity of {} of which {} is free. ",
            format_size(self.requested),
            self.device,
            format_size(self.device_total),
            format_size(self.device_free),
        )?;
        match self.limit {
            Limit::Ratio => write!(
                f,
                "The unified memory limit is {} (uvm_oversubscription_ratio times the device's memory). ",
                format_size(self.capacity)
            )?,
            Limit::HostMemory => write!(
                f,
                "The unified memory limit is {}: the device's memory and the host's, of which {} is available and {} is kept \
                 free (uvm_host_reserve_mb). ",
                format_size(self.capacity),
                format_size(self.host_available),
                format_size(self.host_reserve)
            )?,
            Limit::Fraction => write!(
                f,
                "{} allowed by set_per_process_memory_fraction; the unified memory limit is {}. ",
                format_size(self.allowed.unwrap_or(self.capacity)),
                format_size(self.capacity)
            )?,
            Limit::Device => write!(f, "CUDA has no memory left for this placement. ")?,
        }
        write!(
            f,
            "Of the allocated memory {} is allocated by PyTorch, ",
            format_size(self.allocated + self.private_pools)
        )?;
        if self.private_pools > 0 {
            write!(f, "with {} allocated in private pools (e.g., CUDA Graphs), ", format_size(self.private_pools))?;
        }
        write!(
            f,
            "and {} is reserved by PyTorch but unallocated. {} is populated on the GPU and {} in host memory.",
            format_size(self.reserved.saturating_sub(self.allocated + self.private_pools)),
            format_size(self.populated_device),
            format_size(self.populated_host),
        )
    }
}

/// An allocator call that could not do what was asked. The allocator's accounting balances after any of them.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum Error {
    /// A limit was met after all caches were given back.
    #[error("{0}")]
    OutOfMemory(Box<OutOfMemory>),
    /// This address is not a live allocation of this allocator.
    #[error("invalid device pointer: {0:?}")]
    InvalidPointer(DevicePtr),
    /// A bad argument; the text names it, its value and what is allowed.
    #[error("{0}")]
    InvalidArgument(String),
    /// This cannot be done, here or at all; the text says why.
    #[error("{0}")]
    NotSupported(String),
    /// CUDA failed in a way that is not the caller's to mend.
    #[error("{0}")]
    Driver(#[from] DriverError),
    /// A broken promise inside the allocator: a bug.
    #[error("internal error in torch-uvm: {0}. Please report it")]
    Internal(String),
}

/// The result of an allocator call.
pub type Result<T> = std::result::Result<T, Error>;
