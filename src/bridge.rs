//! The bridge: the only door between C++ and Rust. It translates and decides nothing.
//!
//! How calls into Rust answer: `true` (or an address) is success; on `false` (or 0) the reason waits in
//! [`take_failure`], on the same thread. Results go to a place that C++ passes. So an allocation that succeeds builds
//! no string and no C++ exception. No entry unwinds into C++: a panic becomes a failure of kind `Internal`.

mod convert;
mod failure;
mod hooks;
mod log;
mod settings;

use crate::allocator::{Allocator, CustomAllocator};
use crate::driver::cuda::CudaDriver;
use crate::driver::{Advice, DeviceIndex, DevicePtr, Location, Stream};
use crate::error::{Error, Result};
use crate::history;
use crate::ids::MempoolId;
use crate::options::AccessPattern;
use cxx::{SharedPtr, UniquePtr};
use failure::{guarded, take_failure};
use hooks::PyTorch;
use parking_lot::Mutex;
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

    /// Where the process's memory stands; see `torch_uvm_memory_info_t`.
    struct MemoryInfo {
        capacity: u64,
        free: u64,
        populated_device: u64,
        populated_host: u64,
        populated_unplaced: u64,
        allocated: u64,
        reserved: u64,
        device_limit: u64,
        device_total: u64,
        device_free: u64,
        host_total: u64,
        host_available: u64,
        host_reserve: u64,
    }

    /// See `torch_uvm_place_stats_t`.
    struct PlaceStats {
        populated_device: u64,
        populated_device_peak: u64,
        populated_host: u64,
        populated_host_peak: u64,
        populated_unplaced: u64,
        populated_unplaced_peak: u64,
        moved_to_device: u64,
        moved_to_host: u64,
        discarded: u64,
        prefetches: u64,
        advices: u64,
        discards: u64,
        stage: u64,
        stage_changes: u64,
        light_reclamations: u64,
        hard_reclamations: u64,
        reclaimed: u64,
        moves_out: u64,
        moved_out: u64,
        regrets: u64,
    }

    /// See `torch_uvm_segment_t`.
    struct SegmentPlace {
        base: u64,
        range_bytes: u64,
        filled: u64,
        vacant: u64,
        discarded_end: u64,
        populated_device: u64,
        populated_host: u64,
        populated_unplaced: u64,
        pool_first: u64,
        pool_second: u64,
        memory: i32,
        place: i32,
        small: bool,
        growing: bool,
    }

    /// See `torch_uvm_place_sample_t`; the time is still approximate.
    struct PlaceSample {
        time: i64,
        device: u64,
        host: u64,
        unplaced: u64,
        allocated: u64,
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
        fn memory_info(device: i32, out: &mut MemoryInfo) -> bool;

        // Hints: a device's number, or a negative one for the host.
        fn prefetch(ptr: u64, bytes: u64, to: i32, stream: u64) -> bool;
        fn advise(ptr: u64, bytes: u64, advice: &[u8], location: i32) -> bool;
        fn discard(ptr: u64, bytes: u64, stream: u64) -> bool;

        // Statistics and history.
        fn place_stats(device: i32, out: &mut PlaceStats) -> bool;
        fn segment_places(device: i32, out: &mut Vec<SegmentPlace>) -> bool;
        fn place_samples(device: i32, out: &mut Vec<PlaceSample>) -> bool;
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

fn allocate_at(
    device: DeviceIndex,
    address: u64,
    bytes: u64,
    stream: u64,
    context: SharedPtr<ffi::StackContext>,
) -> u64 {
    with(|allocator| allocator.allocate_at(device, address, bytes, Stream(stream), convert::context(context)))
        .map_or(0, |ptr| ptr.0)
}

fn context_of(address: u64) -> SharedPtr<ffi::StackContext> {
    guarded(|| Ok(ALLOCATOR.get().and_then(|allocator| allocator.context_of(address))))
        .flatten()
        .map_or_else(SharedPtr::null, |context| convert::stack(Some(&context)))
}

fn annotate(ptr: u64, metadata: &[u8]) -> bool {
    with(|allocator| allocator.annotate(DevicePtr(ptr), &text(metadata))).is_some()
}

/// Text from C++, where strings are bytes.
fn text(bytes: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(bytes)
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

fn memory_info(device: DeviceIndex, out: &mut ffi::MemoryInfo) -> bool {
    answer(out, |allocator| allocator.memory_info(device), |info| convert::memory_info(&info))
}

fn location(device: DeviceIndex) -> Location {
    if device < 0 { Location::Host } else { Location::Device(device) }
}

fn prefetch(ptr: u64, bytes: u64, to: DeviceIndex, stream: u64) -> bool {
    with(|allocator| allocator.hints().prefetch(DevicePtr(ptr), bytes, location(to), Stream(stream))).is_some()
}

fn advise(ptr: u64, bytes: u64, advice: &[u8], device: DeviceIndex) -> bool {
    with(|allocator| {
        let name = text(advice);
        let advice = Advice::named(&name, location(device)).ok_or_else(|| {
            Error::InvalidArgument(format!("advice: '{name}' is not allowed: expected {}", Advice::EXPECTED))
        })?;
        allocator.hints().advise(DevicePtr(ptr), bytes, advice)
    })
    .is_some()
}

fn discard(ptr: u64, bytes: u64, stream: u64) -> bool {
    with(|allocator| allocator.hints().discard(DevicePtr(ptr), bytes, Stream(stream))).is_some()
}

fn place_stats(device: DeviceIndex, out: &mut ffi::PlaceStats) -> bool {
    answer(out, |allocator| allocator.place_stats(device), |stats| convert::place_stats(&stats))
}

fn segment_places(device: DeviceIndex, out: &mut Vec<ffi::SegmentPlace>) -> bool {
    answer(out, |allocator| allocator.segment_places(device), |all| all.iter().map(convert::segment_place).collect())
}

fn place_samples(device: DeviceIndex, out: &mut Vec<ffi::PlaceSample>) -> bool {
    answer(out, |allocator| allocator.place_samples(device), |all| all.iter().map(convert::place_sample).collect())
}

fn device_stats(device: DeviceIndex, out: &mut ffi::DeviceStats) -> bool {
    let both = |allocator: &Allocator| Ok((allocator.device_stats(device)?, allocator.pool_reserved(device)?));
    answer(out, both, |(stats, pools)| convert::device_stats(&stats, &pools))
}

fn reset_accumulated_stats(device: DeviceIndex) -> bool {
    with(|allocator| allocator.reset_accumulated_stats(device)).is_some()
}

fn reset_peak_stats(device: DeviceIndex) -> bool {
    with(|allocator| allocator.reset_peak_stats(device)).is_some()
}

fn set_history(recording: &ffi::Recording) -> bool {
    with(|allocator| {
        allocator.set_history(convert::recording(recording)?);
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

fn snapshot(pool: ffi::PoolId, with_traces: bool, out: &mut ffi::Snapshot) -> bool {
    answer(out, |allocator| Ok(allocator.snapshot(pool_id(pool), with_traces)), convert::snapshot)
}

fn push_compile_context(device: DeviceIndex, name: &[u8]) -> bool {
    with(|allocator| allocator.push_compile_context(device, &text(name))).is_some()
}

fn pop_compile_context(device: DeviceIndex) -> bool {
    with(|allocator| allocator.pop_compile_context(device)).is_some()
}

fn set_user_metadata(metadata: &[u8]) {
    // Nothing here fails but for a panic, and then the metadata stays as it was.
    let _ = guarded(|| {
        history::set_user_metadata(&text(metadata));
        Ok(())
    });
}

fn user_metadata() -> String {
    guarded(|| Ok(history::user_metadata())).flatten().as_deref().unwrap_or_default().to_owned()
}

fn begin_allocate_to_pool(
    device: DeviceIndex,
    pool: ffi::PoolId,
    filter: UniquePtr<ffi::StreamFilter>,
    stream: u64,
    custom: u64,
) -> bool {
    with(|allocator| {
        let filter = hooks::Filter(filter);
        let filter = Box::new(move |stream: Stream| filter.accepts(stream));
        allocator.pools(device).begin_allocate_to_pool(pool_id(pool), filter, Stream(stream), custom_allocator(custom))
    })
    .is_some()
}

fn end_allocate_to_pool(device: DeviceIndex, pool: ffi::PoolId) -> bool {
    with(|allocator| allocator.pools(device).end_allocate_to_pool(pool_id(pool))).is_some()
}

fn release_pool(device: DeviceIndex, pool: ffi::PoolId) -> bool {
    with(|allocator| allocator.pools(device).release_pool(pool_id(pool))).is_some()
}

fn ensure_pool(device: DeviceIndex, pool: ffi::PoolId, custom: u64) -> bool {
    with(|allocator| allocator.pools(device).ensure_pool(pool_id(pool), custom_allocator(custom))).is_some()
}

fn pool_use_count(device: DeviceIndex, pool: ffi::PoolId, count: &mut i32) -> bool {
    answer(count, |allocator| allocator.pools(device).pool_use_count(pool_id(pool)), |count| count)
}

fn set_use_on_oom(device: DeviceIndex, pool: ffi::PoolId, on: bool) -> bool {
    with(|allocator| allocator.pools(device).set_use_on_oom(pool_id(pool), on)).is_some()
}

fn set_no_split(device: DeviceIndex, pool: ffi::PoolId) -> bool {
    with(|allocator| allocator.pools(device).set_no_split(pool_id(pool), true)).is_some()
}

fn set_pool_placement(device: DeviceIndex, pool: ffi::PoolId, placement: &[u8]) -> bool {
    with(|allocator| {
        let name = text(placement);
        let pattern = AccessPattern::named(&name).ok_or_else(|| {
            Error::InvalidArgument(format!("placement: '{name}' is not allowed: expected {}", AccessPattern::EXPECTED))
        })?;
        allocator.pools(device).set_pool_placement(pool_id(pool), pattern)
    })
    .is_some()
}

fn check_pool_live_allocations(device: DeviceIndex, pool: ffi::PoolId, expected: &[u64], equal: &mut bool) -> bool {
    answer(
        equal,
        |allocator| allocator.pools(device).check_pool_live_allocations(pool_id(pool), expected),
        |equal| equal,
    )
}

/// What C++ keeps of a checkpointed pool. Empty where taking the checkpoint failed: a `Box` cannot be null.
pub(crate) struct Checkpoint(Option<Arc<crate::allocator::PoolState>>);

impl Checkpoint {
    fn valid(&self) -> bool {
        self.0.is_some()
    }
}

fn checkpoint(device: DeviceIndex, pool: ffi::PoolId) -> Box<Checkpoint> {
    let state = with(|allocator| allocator.pools(device).checkpoint_state(pool_id(pool)));
    Box::new(Checkpoint(state))
}

fn restore(
    device: DeviceIndex,
    state: &Checkpoint,
    context: SharedPtr<ffi::StackContext>,
    out: &mut ffi::Restored,
) -> bool {
    let restore = |allocator: &Allocator| match &state.0 {
        Some(state) => allocator.pools(device).restore_pool(state, convert::context(context)),
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
