//! What the allocator asks of PyTorch: a port, as [`Driver`](crate::driver::Driver) is the one to CUDA.

use crate::driver::{DeviceIndex, DevicePtr, Stream};
use crate::history::TraceEntry;
use crate::ids::MempoolId;
use crate::segments::CustomAllocator;

/// Whether allocations on a stream belong to a pool at this moment.
pub type StreamFilter = Box<dyn Fn(Stream) -> bool + Send>;

/// What the allocator asks of PyTorch.
pub trait Hooks: Send + Sync + 'static {
    /// Runs the registered free-memory callbacks; answers whether one freed something. Called without any lock.
    fn free_memory_callbacks(&self) -> bool;
    /// `c10::getApproximateTime()`, for the trace. Called under a device's lock.
    fn approximate_time(&self) -> i64;
    /// Asks a MemPool's own allocator for a segment. Called under a device's lock.
    fn custom_alloc(&self, allocator: CustomAllocator, bytes: u64) -> Option<DevicePtr>;
    /// Gives a segment back to it. False: that allocator cannot be reached now, and the driver frees. Called under a
    /// device's lock.
    fn custom_free(&self, allocator: CustomAllocator, ptr: DevicePtr) -> bool;
    /// A pool is gone: it does not need its own allocator any more. Called under a device's lock.
    fn pool_forgotten(&self, device: DeviceIndex, id: MempoolId);
    /// Tells the trace trackers, after `Allocator::set_tracing`. Called under a device's lock.
    fn trace(&self, entry: &TraceEntry);
}
