//! The bridge: the only door between C++ and Rust. It translates and decides nothing.
//!
//! How calls into Rust answer: `true` (or an address) is success; on `false` (or 0) the reason waits in
//! [`take_failure`], on the same thread. Results go to a place that C++ passes. So an allocation that succeeds builds
//! no string and no C++ exception. No entry unwinds into C++: a panic becomes a failure of kind `Internal`.

mod convert;
mod failure;
mod hooks;
mod settings;

use crate::allocator::{Allocator, CustomAllocator};
use crate::driver::cuda::CudaDriver;
use crate::driver::{DeviceIndex, DevicePtr, Stream};
use crate::error::{Error, Result};
use crate::pools::MempoolId;
use cxx::{SharedPtr, UniquePtr};
use failure::{guarded, take_failure};
use hooks::PyTorch;
use parking_lot::Mutex;
use settings::{apply_settings, check_settings, wanted_by_environment};
use std::sync::{Arc, OnceLock};

#[cxx::bridge(namespace = "torch_uvm::bridge")]
pub(crate) mod ffi {
    /// What kind of failure, for C++ to choose the exception.
    enum FailureKind {
        /// A limit was met.
        OutOfMemory,
        /// Anything else that the caller can mend.
        Usage,
        /// CUDA failed.
        Cuda,
        /// A bug here.
        Internal,
    }

    /// Why a call failed. The figures belong to `OutOfMemory`, and are what its observers are told.
    struct Failure {
        kind: FailureKind,
        message: String,
        device: i32,
        requested: u64,
        allocated: u64,
        reserved: u64,
        /// The limit in force, or the device's memory.
        total: u64,
        free: u64,
    }

    /// `c10::MempoolId_t`.
    #[derive(Clone, Copy)]
    struct PoolId {
        first: u64,
        second: u64,
    }

    /// PyTorch's own settings that matter to the allocator; see `NativeOptions`.
    struct NativeSettings {
        max_split_size: u64,
        max_non_split_rounding_size: u64,
        garbage_collection_threshold: f64,
        roundup_power2_divisions: [u64; 16],
        expandable_segments: bool,
    }

    struct Stat {
        current: i64,
        peak: i64,
        allocated: i64,
        freed: i64,
    }

    struct StatArray {
        aggregate: Stat,
        small_pool: Stat,
        large_pool: Stat,
    }

    struct DeviceStats {
        allocation: StatArray,
        segment: StatArray,
        active: StatArray,
        inactive_split: StatArray,
        allocated_bytes: StatArray,
        reserved_bytes: StatArray,
        active_bytes: StatArray,
        inactive_split_bytes: StatArray,
        requested_bytes: StatArray,
        num_alloc_retries: i64,
        num_ooms: i64,
        oversize_allocations: Stat,
        oversize_segments: Stat,
        num_sync_all_streams: i64,
        num_device_alloc: i64,
        num_device_free: i64,
    }

    struct BlockInfo {
        bytes: u64,
        requested_bytes: u64,
        allocated: bool,
        active: bool,
        context: SharedPtr<StackContext>,
    }

    struct SegmentInfo {
        device: i32,
        address: u64,
        total_bytes: u64,
        requested_bytes: u64,
        allocated_bytes: u64,
        active_bytes: u64,
        stream: u64,
        is_large: bool,
        is_expandable: bool,
        pool: PoolId,
        context: SharedPtr<StackContext>,
        blocks: Vec<BlockInfo>,
    }

    /// `c10::cuda::CUDACachingAllocator::TraceEntry::Action`.
    enum Action {
        Alloc,
        FreeRequested,
        FreeCompleted,
        SegmentAlloc,
        SegmentFree,
        SegmentMap,
        SegmentUnmap,
        Snapshot,
        OutOfMemory,
    }

    struct TraceEntry {
        action: Action,
        device: i32,
        address: u64,
        bytes: u64,
        stream: u64,
        time: i64,
        pool: PoolId,
        context: SharedPtr<StackContext>,
    }

    struct DeviceTrace {
        entries: Vec<TraceEntry>,
    }

    struct Snapshot {
        segments: Vec<SegmentInfo>,
        traces: Vec<DeviceTrace>,
    }

    /// `c10::cuda::CUDACachingAllocator::RecordContext`.
    enum RecordContext {
        Never,
        State,
        Alloc,
        All,
    }

    /// A live allocation.
    struct Allocation {
        device: i32,
        block_bytes: u64,
    }

    /// The segment that an allocation lies in.
    struct BaseAllocation {
        address: u64,
        bytes: u64,
    }

    /// An allocation as another process opens it.
    struct SharedAllocation {
        handle: [u8; 64],
        offset: u64,
    }

    /// What restoring a checkpoint did to the pool's allocations.
    struct Restored {
        freed: Vec<u64>,
        created: Vec<u64>,
    }

    extern "Rust" {
        // Failures.
        fn take_failure() -> Failure;

        // Settings.
        fn wanted_by_environment() -> bool;
        fn check_settings(conf: &[u8], active: bool) -> bool;
        fn apply_settings(conf: &[u8], native: &NativeSettings) -> bool;

        // Life.
        fn init(device_count: i32, native: &NativeSettings) -> bool;
        fn initialized() -> bool;

        // The hot path. Without a context: no history is recorded.
        fn allocate(device: i32, bytes: u64, stream: u64) -> u64;
        fn allocate_with_context(device: i32, bytes: u64, stream: u64, context: SharedPtr<StackContext>) -> u64;
        fn free(ptr: u64) -> bool;
        fn free_with_context(ptr: u64, context: SharedPtr<StackContext>) -> bool;

        // Allocations.
        fn allocation(ptr: u64, out: &mut Allocation) -> bool;
        fn record_stream(ptr: u64, device: i32, stream: u64) -> bool;
        fn base_allocation(ptr: u64, out: &mut BaseAllocation) -> bool;
        fn ipc_handle(ptr: u64, out: &mut SharedAllocation) -> bool;

        // Caches and limits.
        fn empty_cache(pool: PoolId, context: SharedPtr<StackContext>) -> bool;
        fn cache_info(device: i32, largest: &mut u64) -> bool;
        fn memory_fraction(device: i32, fraction: &mut f64) -> bool;
        fn set_memory_fraction(device: i32, fraction: f64) -> bool;

        // Statistics and history.
        fn device_stats(device: i32, out: &mut DeviceStats) -> bool;
        fn reset_accumulated_stats(device: i32) -> bool;
        fn reset_peak_stats(device: i32) -> bool;
        fn set_history(enabled: bool, capacity: usize, level: RecordContext, clear: bool) -> bool;
        fn history_enabled() -> bool;
        fn set_tracing(on: bool) -> bool;
        fn snapshot(pool: PoolId, out: &mut Snapshot) -> bool;

        // Private pools. `custom`: the CUDAAllocator of a MemPool, or 0.
        fn begin_allocate_to_pool(device: i32, pool: PoolId, filter: UniquePtr<StreamFilter>, custom: u64) -> bool;
        fn end_allocate_to_pool(device: i32, pool: PoolId) -> bool;
        fn release_pool(device: i32, pool: PoolId) -> bool;
        fn ensure_pool(device: i32, pool: PoolId, custom: u64) -> bool;
        fn pool_use_count(device: i32, pool: PoolId, count: &mut i32) -> bool;
        fn check_pool_live_allocations(device: i32, pool: PoolId, expected: &[u64], equal: &mut bool) -> bool;

        /// A checkpointed private pool.
        type Checkpoint;
        /// Whether there is a state in it; if not, the reason waits in `take_failure`.
        fn valid(self: &Checkpoint) -> bool;
        fn checkpoint(device: i32, pool: PoolId) -> Box<Checkpoint>;
        fn restore(device: i32, state: &Checkpoint, context: SharedPtr<StackContext>, out: &mut Restored) -> bool;
    }

    unsafe extern "C++" {
        include!("torch_uvm/bridge_types.h");

        /// A `std::shared_ptr<c10::GatheredContext>`.
        type StackContext;
        /// A `std::function<bool(cudaStream_t)>`.
        type StreamFilter;

        /// Whether allocations on the stream go to the pool that this filter was given with.
        fn accepts(self: &StreamFilter, stream: u64) -> bool;

        /// Runs FreeCudaMemoryCallbacksRegistry; whether anything was freed.
        fn run_free_memory_callbacks() -> bool;
        /// `c10::getApproximateTime`.
        fn approximate_time() -> i64;
        /// Memory from a MemPool's own allocator, or 0.
        fn custom_alloc(allocator: u64, bytes: u64) -> u64;
        /// Gives it back; false where that allocator is not reachable now.
        fn custom_free(allocator: u64, ptr: u64) -> bool;
        /// Tells the AllocatorTraceTrackers.
        fn trace(entry: &TraceEntry);
    }

    impl SharedPtr<StackContext> {}
    impl UniquePtr<StreamFilter> {}
}

static ALLOCATOR: OnceLock<Allocator> = OnceLock::new();
/// Held while the allocator is made, and while settings change.
static SETTINGS: Mutex<settings::Settings> = Mutex::new(settings::Settings::new());

/// Calls the allocator, which must be there.
fn with<T>(work: impl FnOnce(&Allocator) -> Result<T>) -> Option<T> {
    guarded(|| match ALLOCATOR.get() {
        Some(allocator) => work(allocator),
        None => Err(Error::InvalidArgument("the uvm allocator is not initialized: did you call init?".to_owned())),
    })
}

/// Calls the allocator and puts its answer where C++ wants it.
fn answer<T, U>(out: &mut U, work: impl FnOnce(&Allocator) -> Result<T>, convert: impl FnOnce(T) -> U) -> bool {
    // The conversion is inside the guard: it may panic as anything else may.
    with(|allocator| work(allocator).map(convert)).map(|value| *out = value).is_some()
}

fn init(device_count: i32, native: &ffi::NativeSettings) -> bool {
    guarded(|| {
        let mut settings = SETTINGS.lock();
        if ALLOCATOR.get().is_none() {
            let options = settings.options()?.clone();
            let driver = CudaDriver::load()?;
            let allocator = Allocator::new(Arc::new(driver), Arc::new(PyTorch), options);
            allocator.set_native_options(convert::native_options(native));
            // Cannot be set already: the lock is held and it was empty.
            let _ = ALLOCATOR.set(allocator);
        }
        drop(settings);
        match ALLOCATOR.get() {
            Some(allocator) => allocator.init(device_count),
            None => Err(Error::Internal("the allocator is gone".to_owned())),
        }
    })
    .is_some()
}

fn initialized() -> bool {
    ALLOCATOR.get().is_some_and(Allocator::initialized)
}

fn allocate(device: DeviceIndex, bytes: u64, stream: u64) -> u64 {
    with(|allocator| allocator.allocate(device, bytes, Stream(stream), None)).map_or(0, |ptr| ptr.0)
}

fn allocate_with_context(device: DeviceIndex, bytes: u64, stream: u64, context: SharedPtr<ffi::StackContext>) -> u64 {
    with(|allocator| allocator.allocate(device, bytes, Stream(stream), convert::context(context)))
        .map_or(0, |ptr| ptr.0)
}

fn free(ptr: u64) -> bool {
    with(|allocator| allocator.free(DevicePtr(ptr), None)).is_some()
}

fn free_with_context(ptr: u64, context: SharedPtr<ffi::StackContext>) -> bool {
    with(|allocator| allocator.free(DevicePtr(ptr), convert::context(context))).is_some()
}

fn allocation(ptr: u64, out: &mut ffi::Allocation) -> bool {
    answer(
        out,
        |allocator| allocator.allocation(DevicePtr(ptr)),
        |found| ffi::Allocation { device: found.device, block_bytes: found.block_bytes },
    )
}

fn record_stream(ptr: u64, device: DeviceIndex, stream: u64) -> bool {
    with(|allocator| allocator.record_stream(DevicePtr(ptr), device, Stream(stream))).is_some()
}

fn base_allocation(ptr: u64, out: &mut ffi::BaseAllocation) -> bool {
    answer(
        out,
        |allocator| allocator.base_allocation(DevicePtr(ptr)),
        |(base, bytes)| ffi::BaseAllocation { address: base.0, bytes },
    )
}

fn ipc_handle(ptr: u64, out: &mut ffi::SharedAllocation) -> bool {
    answer(
        out,
        |allocator| allocator.ipc_handle(DevicePtr(ptr)),
        |(handle, offset)| ffi::SharedAllocation { handle: handle.0, offset },
    )
}

fn empty_cache(pool: ffi::PoolId, context: SharedPtr<ffi::StackContext>) -> bool {
    with(|allocator| allocator.empty_cache(pool_id(pool), convert::context(context))).is_some()
}

fn cache_info(device: DeviceIndex, largest: &mut u64) -> bool {
    answer(largest, |allocator| allocator.cache_info(device), |bytes| bytes)
}

fn memory_fraction(device: DeviceIndex, fraction: &mut f64) -> bool {
    answer(fraction, |allocator| allocator.memory_fraction(device), |fraction| fraction)
}

fn set_memory_fraction(device: DeviceIndex, fraction: f64) -> bool {
    with(|allocator| allocator.set_memory_fraction(device, fraction)).is_some()
}

fn device_stats(device: DeviceIndex, out: &mut ffi::DeviceStats) -> bool {
    answer(out, |allocator| allocator.device_stats(device), |stats| convert::device_stats(&stats))
}

fn reset_accumulated_stats(device: DeviceIndex) -> bool {
    with(|allocator| allocator.reset_accumulated_stats(device)).is_some()
}

fn reset_peak_stats(device: DeviceIndex) -> bool {
    with(|allocator| allocator.reset_peak_stats(device)).is_some()
}

fn set_history(enabled: bool, capacity: usize, level: ffi::RecordContext, clear: bool) -> bool {
    with(|allocator| {
        allocator.set_history(enabled, capacity, convert::record_context(level)?, clear);
        Ok(())
    })
    .is_some()
}

fn history_enabled() -> bool {
    ALLOCATOR.get().is_some_and(Allocator::history_enabled)
}

fn set_tracing(on: bool) -> bool {
    with(|allocator| {
        allocator.set_tracing(on);
        Ok(())
    })
    .is_some()
}

fn snapshot(pool: ffi::PoolId, out: &mut ffi::Snapshot) -> bool {
    answer(out, |allocator| allocator.snapshot(pool_id(pool)), convert::snapshot)
}

fn begin_allocate_to_pool(
    device: DeviceIndex,
    pool: ffi::PoolId,
    filter: UniquePtr<ffi::StreamFilter>,
    custom: u64,
) -> bool {
    with(|allocator| {
        let filter = hooks::Filter(filter);
        let filter = Box::new(move |stream: Stream| filter.accepts(stream));
        allocator.begin_allocate_to_pool(device, pool_id(pool), filter, custom_allocator(custom))
    })
    .is_some()
}

fn end_allocate_to_pool(device: DeviceIndex, pool: ffi::PoolId) -> bool {
    with(|allocator| allocator.end_allocate_to_pool(device, pool_id(pool))).is_some()
}

fn release_pool(device: DeviceIndex, pool: ffi::PoolId) -> bool {
    with(|allocator| allocator.release_pool(device, pool_id(pool))).is_some()
}

fn ensure_pool(device: DeviceIndex, pool: ffi::PoolId, custom: u64) -> bool {
    with(|allocator| allocator.ensure_pool(device, pool_id(pool), custom_allocator(custom))).is_some()
}

fn pool_use_count(device: DeviceIndex, pool: ffi::PoolId, count: &mut i32) -> bool {
    answer(count, |allocator| allocator.pool_use_count(device, pool_id(pool)), |count| count)
}

fn check_pool_live_allocations(device: DeviceIndex, pool: ffi::PoolId, expected: &[u64], equal: &mut bool) -> bool {
    answer(equal, |allocator| allocator.check_pool_live_allocations(device, pool_id(pool), expected), |equal| equal)
}

/// What C++ keeps of a checkpointed pool. Empty where taking the checkpoint failed: a `Box` cannot be null.
pub(crate) struct Checkpoint(Option<Arc<crate::allocator::PoolState>>);

impl Checkpoint {
    fn valid(&self) -> bool {
        self.0.is_some()
    }
}

fn checkpoint(device: DeviceIndex, pool: ffi::PoolId) -> Box<Checkpoint> {
    let state = with(|allocator| allocator.checkpoint_state(device, pool_id(pool)));
    Box::new(Checkpoint(state))
}

fn restore(
    device: DeviceIndex,
    state: &Checkpoint,
    context: SharedPtr<ffi::StackContext>,
    out: &mut ffi::Restored,
) -> bool {
    let restore = |allocator: &Allocator| match &state.0 {
        Some(state) => allocator.restore_pool(device, state, convert::context(context)),
        None => Err(Error::Internal("an empty checkpoint was restored".to_owned())),
    };
    answer(out, restore, |restored| ffi::Restored { freed: restored.freed, created: restored.created })
}

fn pool_id(pool: ffi::PoolId) -> MempoolId {
    (pool.first, pool.second)
}

fn custom_allocator(address: u64) -> Option<CustomAllocator> {
    (address != 0).then_some(CustomAllocator(address))
}
