//! Rust types to bridge types and back, field by field.

use super::ffi;
use crate::allocator;
use crate::error::{Error, Result};
use crate::history::{self, Context};
use crate::ids::MempoolId;
use crate::options::NativeOptions;
use crate::stats;
use cxx::SharedPtr;
use std::sync::Arc;

/// What is inside a [`Context`] that came over the bridge.
struct StackContext(SharedPtr<ffi::StackContext>);

// SAFETY: a std::shared_ptr counts atomically, and the c10::GatheredContext that it leads to is never looked into here;
// c10 itself copies and drops it on any thread.
unsafe impl Send for StackContext {}
// SAFETY: as above; only the pointer is copied through a shared reference.
unsafe impl Sync for StackContext {}

pub(super) fn context(context: SharedPtr<ffi::StackContext>) -> Option<Context> {
    (!context.is_null()).then(|| Context(Arc::new(StackContext(context))))
}

pub(super) fn stack(context: Option<&Context>) -> SharedPtr<ffi::StackContext> {
    context
        .and_then(|context| context.0.downcast_ref::<StackContext>())
        .map_or_else(SharedPtr::null, |inside| inside.0.clone())
}

pub(super) fn native_options(native: &ffi::NativeSettings) -> NativeOptions {
    NativeOptions {
        max_split_size: native.max_split_size,
        max_non_split_rounding_size: native.max_non_split_rounding_size,
        garbage_collection_threshold: native.garbage_collection_threshold,
        roundup_power2_divisions: native.roundup_power2_divisions,
        expandable_segments: native.expandable_segments,
        large_segment_size: native.large_segment_size,
        throw_on_oom: native.throw_on_oom,
    }
}

pub(super) fn record_context(level: ffi::RecordContext) -> Result<history::RecordContext> {
    match level {
        ffi::RecordContext::Never => Ok(history::RecordContext::Never),
        ffi::RecordContext::State => Ok(history::RecordContext::State),
        ffi::RecordContext::Alloc => Ok(history::RecordContext::Alloc),
        ffi::RecordContext::All => Ok(history::RecordContext::All),
        // A C++ enum can hold other numbers.
        other => Err(Error::InvalidArgument(format!("when: {} is not a RecordContext", other.repr))),
    }
}

fn stat(from: &stats::Stat) -> ffi::Stat {
    ffi::Stat { current: from.current, peak: from.peak, allocated: from.allocated, freed: from.freed }
}

fn stat_array(from: &stats::StatArray) -> ffi::StatArray {
    ffi::StatArray {
        aggregate: stat(&from.aggregate),
        small_pool: stat(&from.small_pool),
        large_pool: stat(&from.large_pool),
    }
}

pub(super) fn device_stats(from: &stats::DeviceStats, pools: &[(MempoolId, stats::StatArray)]) -> ffi::DeviceStats {
    ffi::DeviceStats {
        allocation: stat_array(&from.allocation),
        segment: stat_array(&from.segment),
        active: stat_array(&from.active),
        inactive_split: stat_array(&from.inactive_split),
        allocated_bytes: stat_array(&from.allocated_bytes),
        reserved_bytes: stat_array(&from.reserved_bytes),
        active_bytes: stat_array(&from.active_bytes),
        inactive_split_bytes: stat_array(&from.inactive_split_bytes),
        requested_bytes: stat_array(&from.requested_bytes),
        num_alloc_retries: from.num_alloc_retries,
        num_ooms: from.num_ooms,
        oversize_allocations: stat(&from.oversize_allocations),
        oversize_segments: stat(&from.oversize_segments),
        num_sync_all_streams: from.num_sync_all_streams,
        num_device_alloc: from.num_device_alloc,
        num_device_free: from.num_device_free,
        num_oom_rejections: from.num_oom_rejections,
        pool_reserved_bytes: pools
            .iter()
            .map(|(id, bytes)| ffi::PoolReserved { pool: pool_id(*id), bytes: stat_array(bytes) })
            .collect(),
    }
}

pub(super) fn pool_id(id: MempoolId) -> ffi::PoolId {
    ffi::PoolId { first: id.0, second: id.1 }
}

pub(super) fn recording(from: &ffi::Recording) -> Result<history::Recording> {
    let skip = from.skip.iter().try_fold(history::Actions::default(), |skip, action| {
        history::Action::ALL
            .into_iter()
            .find(|&ours| self::action(ours) == *action)
            .map(|ours| skip.with(ours))
            .ok_or_else(|| Error::InvalidArgument(format!("skip_actions: {} is not an action", action.repr)))
    })?;
    Ok(history::Recording {
        enabled: from.enabled,
        capacity: from.capacity,
        level: record_context(from.level)?,
        clear: from.clear,
        skip,
    })
}

pub(super) fn snapshot(from: allocator::Snapshot) -> ffi::Snapshot {
    ffi::Snapshot {
        segments: from.segments.iter().map(segment).collect(),
        traces: from
            .traces
            .iter()
            .map(|entries| ffi::DeviceTrace { entries: entries.iter().map(trace_entry).collect() })
            .collect(),
    }
}

fn segment(from: &allocator::SegmentInfo) -> ffi::SegmentInfo {
    ffi::SegmentInfo {
        device: from.device,
        address: from.address,
        total_bytes: from.total_bytes,
        requested_bytes: from.requested_bytes,
        allocated_bytes: from.allocated_bytes,
        active_bytes: from.active_bytes,
        stream: from.stream.0,
        is_large: from.is_large,
        is_expandable: from.is_expandable,
        pool: pool_id(from.mempool),
        context: stack(from.context.as_ref()),
        blocks: from.blocks.iter().map(block).collect(),
    }
}

fn block(from: &allocator::BlockInfo) -> ffi::BlockInfo {
    ffi::BlockInfo {
        bytes: from.bytes,
        requested_bytes: from.requested_bytes,
        allocated: from.allocated,
        active: from.active,
        context: stack(from.context.as_ref()),
    }
}

fn owned(text: Option<&str>) -> String {
    text.unwrap_or_default().to_owned()
}

fn action(action: history::Action) -> ffi::Action {
    match action {
        history::Action::Alloc => ffi::Action::Alloc,
        history::Action::FreeRequested => ffi::Action::FreeRequested,
        history::Action::FreeCompleted => ffi::Action::FreeCompleted,
        history::Action::SegmentAlloc => ffi::Action::SegmentAlloc,
        history::Action::SegmentFree => ffi::Action::SegmentFree,
        history::Action::SegmentMap => ffi::Action::SegmentMap,
        history::Action::SegmentUnmap => ffi::Action::SegmentUnmap,
        history::Action::Snapshot => ffi::Action::Snapshot,
        history::Action::OutOfMemory => ffi::Action::OutOfMemory,
        history::Action::Annotate => ffi::Action::Annotate,
    }
}

pub(super) fn trace_entry(from: &history::TraceEntry) -> ffi::TraceEntry {
    ffi::TraceEntry {
        action: action(from.action),
        device: from.device,
        address: from.address,
        bytes: from.bytes,
        stream: from.stream.0,
        time: from.time,
        pool: pool_id(from.mempool),
        context: stack(from.context.as_ref()),
        compile_context: owned(from.labels.compile_context.as_deref()),
        user_metadata: owned(from.labels.user_metadata.as_deref()),
    }
}
