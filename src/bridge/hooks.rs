//! What the allocator asks of PyTorch.

use super::{convert, ffi};
use crate::driver::{DeviceIndex, DevicePtr, Stream};
use crate::history::TraceEntry;
use crate::hooks::Hooks;
use crate::ids::MempoolId;
use crate::segments::CustomAllocator;
use cxx::UniquePtr;

/// PyTorch, through C++ functions that never throw.
pub(super) struct PyTorch;

impl Hooks for PyTorch {
    fn free_memory_callbacks(&self) -> bool {
        ffi::run_free_memory_callbacks()
    }

    fn approximate_time(&self) -> i64 {
        ffi::approximate_time()
    }

    fn custom_alloc(&self, allocator: CustomAllocator, bytes: u64) -> Option<DevicePtr> {
        let ptr = ffi::custom_alloc(allocator.0, bytes);
        (ptr != 0).then_some(DevicePtr(ptr))
    }

    fn custom_free(&self, allocator: CustomAllocator, ptr: DevicePtr) -> bool {
        ffi::custom_free(allocator.0, ptr.0)
    }

    fn pool_forgotten(&self, device: DeviceIndex, id: MempoolId) {
        ffi::pool_forgotten(device, convert::pool_id(id));
    }

    fn trace(&self, entry: &TraceEntry) {
        ffi::trace(&convert::trace_entry(entry));
    }
}

/// Which streams' allocations go to a private pool.
pub(super) struct Filter(pub UniquePtr<ffi::StreamFilter>);

// SAFETY: the std::function inside is only called and destroyed under the allocator's device lock, so by one thread at
// a time; PyTorch's own allocator calls the same functions from any thread that allocates.
unsafe impl Send for Filter {}

impl Filter {
    pub fn accepts(&self, stream: Stream) -> bool {
        self.0.as_ref().is_some_and(|filter| filter.accepts(stream.0))
    }
}
