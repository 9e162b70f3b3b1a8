//! The bridge: the only door between C++ and Rust. It translates and decides nothing.
//!
//! How calls into Rust answer: `true` (or an address) is success; on `false` (or 0) the reason waits in
//! [`take_failure`], on the same thread. Results go to a place that C++ passes. So an allocation that succeeds builds
//! no string and no C++ exception. No entry unwinds into C++: a panic becomes a failure of kind `Internal`.

mod allocations;
mod convert;
mod failure;
mod figures;
mod hooks;
mod log;
mod pools;
mod settings;

use crate::allocator::Allocator;
use crate::driver::cuda::CudaDriver;
use crate::error::{Error, Result};
use crate::ids::MempoolId;
use allocations::{
    advise, allocate, allocate_at, allocate_with_context, allocation, annotate, base_allocation, cache_info,
    context_of, discard, empty_cache, free, free_with_context, ipc_handle, memory_fraction, prefetch, record_stream,
    set_memory_fraction,
};
use failure::{guarded, take_failure};
use figures::{
    description, device_stats, history_enabled, memory_info, pop_compile_context, push_compile_context,
    reset_accumulated_stats, reset_peak_stats, rows, set_history, set_tracing, set_user_metadata, snapshot,
    user_metadata,
};
use hooks::PyTorch;
use parking_lot::Mutex;
use pools::{
    Checkpoint, begin_allocate_to_pool, check_pool_live_allocations, checkpoint, end_allocate_to_pool, ensure_pool,
    pool_use_count, release_pool, restore, set_no_split, set_pool_placement, set_use_on_oom,
};
use settings::{apply_settings, check_settings, environment, has_ours, options, without_ours};
use std::borrow::Cow;
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
        /// Refused before CUDA was asked, and `throw_on_cudamalloc_oom` wants observers to be told.
        rejected: bool,
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
        large_segment_size: u64,
        throw_on_oom: bool,
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
        num_oom_rejections: i64,
        pool_reserved_bytes: Vec<PoolReserved>,
    }

    /// What a private pool has reserved.
    struct PoolReserved {
        pool: PoolId,
        bytes: StatArray,
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
        Annotate,
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
        compile_context: String,
        user_metadata: String,
    }

    /// What `recordHistory` was asked for.
    struct Recording {
        enabled: bool,
        capacity: usize,
        level: RecordContext,
        clear: bool,
        skip: Vec<Action>,
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

    /// What the environment's settings ask for.
    struct Environment {
        /// A key of ours is among them.
        has_ours: bool,
        /// They choose this allocator.
        wanted: bool,
        /// Ours are right.
        valid: bool,
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
        fn environment() -> Environment;
        fn check_settings(conf: &[u8], active: bool) -> bool;
        fn apply_settings(conf: &[u8], native: &NativeSettings) -> bool;
        fn has_ours(conf: &[u8]) -> bool;
        fn without_ours(conf: &[u8]) -> String;
        fn options(out: &mut String) -> bool;

        // Life.
        fn init(device_count: i32, native: &NativeSettings) -> bool;
        fn initialized() -> bool;

        // The hot path. Without a context: no history is recorded.
        fn allocate(device: i32, bytes: u64, stream: u64) -> u64;
        fn allocate_with_context(device: i32, bytes: u64, stream: u64, context: SharedPtr<StackContext>) -> u64;
        fn free(ptr: u64) -> bool;
        fn free_with_context(ptr: u64, context: SharedPtr<StackContext>) -> bool;
        fn allocate_at(device: i32, address: u64, bytes: u64, stream: u64, context: SharedPtr<StackContext>) -> u64;

        // Allocations.
        fn allocation(ptr: u64, out: &mut Allocation) -> bool;
        fn record_stream(ptr: u64, device: i32, stream: u64) -> bool;
        fn base_allocation(ptr: u64, out: &mut BaseAllocation) -> bool;
        fn ipc_handle(ptr: u64, out: &mut SharedAllocation) -> bool;
        /// Null where no stack is known.
        fn context_of(address: u64) -> SharedPtr<StackContext>;
        fn annotate(ptr: u64, metadata: &[u8]) -> bool;

        // Caches and limits.
        fn empty_cache(pool: PoolId, context: SharedPtr<StackContext>) -> bool;
        fn cache_info(device: i32, largest: &mut u64) -> bool;
        fn memory_fraction(device: i32, fraction: &mut f64) -> bool;
        fn set_memory_fraction(device: i32, fraction: f64) -> bool;
        /// What `getMemoryInfo` answers.
        fn memory_info(device: i32, free: &mut u64, total: &mut u64) -> bool;

        // Hints: a device's number, or a negative one for the host.
        fn prefetch(ptr: u64, bytes: u64, to: i32, stream: u64) -> bool;
        fn advise(ptr: u64, bytes: u64, advice: &[u8], location: i32) -> bool;
        fn discard(ptr: u64, bytes: u64, stream: u64) -> bool;

        // Statistics and history.
        /// The tables' columns, the options and the placements, as JSON.
        fn description() -> String;
        /// The numbers of a table, row by row.
        fn rows(table: &[u8], device: i32, out: &mut Vec<u64>) -> bool;
        fn device_stats(device: i32, out: &mut DeviceStats) -> bool;
        fn reset_accumulated_stats(device: i32) -> bool;
        fn reset_peak_stats(device: i32) -> bool;
        fn set_history(recording: &Recording) -> bool;
        fn history_enabled() -> bool;
        fn set_tracing(on: bool) -> bool;
        fn snapshot(pool: PoolId, with_traces: bool, out: &mut Snapshot) -> bool;
        fn push_compile_context(device: i32, name: &[u8]) -> bool;
        fn pop_compile_context(device: i32) -> bool;
        /// This thread's.
        fn set_user_metadata(metadata: &[u8]);
        fn user_metadata() -> String;

        // Private pools. `stream`: the caller's current one. `custom`: the CUDAAllocator of a MemPool, or 0.
        fn begin_allocate_to_pool(
            device: i32,
            pool: PoolId,
            filter: UniquePtr<StreamFilter>,
            stream: u64,
            custom: u64,
        ) -> bool;
        fn end_allocate_to_pool(device: i32, pool: PoolId) -> bool;
        fn release_pool(device: i32, pool: PoolId) -> bool;
        fn ensure_pool(device: i32, pool: PoolId, custom: u64) -> bool;
        fn pool_use_count(device: i32, pool: PoolId, count: &mut i32) -> bool;
        fn set_use_on_oom(device: i32, pool: PoolId, on: bool) -> bool;
        fn set_no_split(device: i32, pool: PoolId) -> bool;
        fn set_pool_placement(device: i32, pool: PoolId, placement: &[u8]) -> bool;
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

        /// Cuts a settings string into tokens, as PyTorch does.
        fn settings_tokens(conf: &[u8]) -> Vec<String>;
        /// Runs FreeCudaMemoryCallbacksRegistry; whether anything was freed.
        fn run_free_memory_callbacks() -> bool;
        /// `c10::getApproximateTime`.
        fn approximate_time() -> i64;
        /// Approximate times as microseconds since 1970.
        fn unix_microseconds(times: &[i64]) -> Vec<i64>;
        /// Memory from a MemPool's own allocator, or 0.
        fn custom_alloc(allocator: u64, bytes: u64) -> u64;
        /// Gives it back; false where that allocator is not reachable now.
        fn custom_free(allocator: u64, ptr: u64) -> bool;
        /// A pool is gone, and does not need its own allocator any more.
        fn pool_forgotten(device: i32, pool: PoolId);
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
            log::start()?;
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

/// Text from C++, where strings are bytes.
fn text(bytes: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

fn pool_id(pool: ffi::PoolId) -> MempoolId {
    (pool.first, pool.second)
}
