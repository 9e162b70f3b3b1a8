//! The allocator of one device: everything under the device's lock.
//!
//! `DeviceState` is made of parts that know nothing of each other: the [heap](crate::heap), the
//! [accounting](crate::accounting), the [tracer](crate::tracer), the [conversation with the driver](crate::gpu), what
//! [waits](crate::streams), the threads' caches, the limits, the [evictions](crate::pressure). What happens to them
//! together is told in one module a question:
//!
//! | module | question |
//! |---|---|
//! | `allocate` | how is a request served? The hot path |
//! | `free` | what becomes of a freed block? |
//! | `allocations` | what is known about a live allocation? |
//! | `grow` | where does new memory come from? |
//! | `reclaim` | when does cached memory go back to CUDA? |
//! | `residency` | where do pages lie, and how do they get elsewhere? |
//! | `eviction` | when does live memory leave the device, and come back? |
//! | `ready` | what is done to free memory before it is used again? |
//! | `hints` | what do the program's hints do? |
//! | `limits`, `figures` | what limits a device, and what are programs told? |
//! | `private_pools`, `routes` | pools of graphs and MemPools, checkpoints; which pool serves a request? |
//! | `snapshot`, `check` | what does a snapshot show; does everything balance? |

pub(crate) mod allocate;
pub(crate) mod allocations;
pub(crate) mod check;
mod eviction;
pub(crate) mod figures;
mod free;
mod grow;
pub(crate) mod hints;
pub(crate) mod limits;
pub(crate) mod private_pools;
mod ready;
pub(crate) mod reclaim;
mod refusal;
mod residency;
mod routes;
pub(crate) mod snapshot;
pub(crate) mod state;
mod thread_caches;

pub use allocations::Allocation;
pub use private_pools::{PoolState, Restored};
pub use snapshot::{BlockInfo, SegmentInfo, SegmentPlace, Snapshot};
