//! Entries of the bridge: what the allocator tells of itself.

use super::{ALLOCATOR, answer, convert, ffi, guarded, pool_id, text, with};
use crate::allocator::Allocator;
use crate::driver::DeviceIndex;
use crate::history;
use crate::tables::{self, Table};

pub(super) fn memory_info(device: DeviceIndex, free: &mut u64, total: &mut u64) -> bool {
    let info = with(|allocator| allocator.memory_info(device));
    info.map(|info| (*free, *total) = (info.free, info.capacity)).is_some()
}

pub(super) fn description() -> String {
    guarded(|| Ok(tables::description())).unwrap_or_default()
}

pub(super) fn rows(table: &[u8], device: DeviceIndex, out: &mut Vec<u64>) -> bool {
    let read =
        |allocator: &Allocator| tables::rows(Table::named(&text(table))?, allocator, device, ffi::unix_microseconds);
    answer(out, read, |numbers| numbers)
}

pub(super) fn device_stats(device: DeviceIndex, out: &mut ffi::DeviceStats) -> bool {
    let both = |allocator: &Allocator| Ok((allocator.device_stats(device)?, allocator.pool_reserved(device)?));
    answer(out, both, |(stats, pools)| convert::device_stats(&stats, &pools))
}

pub(super) fn reset_accumulated_stats(device: DeviceIndex) -> bool {
    with(|allocator| allocator.reset_accumulated_stats(device)).is_some()
}

pub(super) fn reset_peak_stats(device: DeviceIndex) -> bool {
    with(|allocator| allocator.reset_peak_stats(device)).is_some()
}

pub(super) fn set_history(recording: &ffi::Recording) -> bool {
    with(|allocator| {
        allocator.set_history(convert::recording(recording)?);
        Ok(())
    })
    .is_some()
}

pub(super) fn history_enabled() -> bool {
    ALLOCATOR.get().is_some_and(Allocator::history_enabled)
}

pub(super) fn set_tracing(on: bool) -> bool {
    with(|allocator| {
        allocator.set_tracing(on);
        Ok(())
    })
    .is_some()
}

pub(super) fn snapshot(pool: ffi::PoolId, with_traces: bool, out: &mut ffi::Snapshot) -> bool {
    answer(out, |allocator| Ok(allocator.snapshot(pool_id(pool), with_traces)), convert::snapshot)
}

pub(super) fn push_compile_context(device: DeviceIndex, name: &[u8]) -> bool {
    with(|allocator| allocator.push_compile_context(device, &text(name))).is_some()
}

pub(super) fn pop_compile_context(device: DeviceIndex) -> bool {
    with(|allocator| allocator.pop_compile_context(device)).is_some()
}

pub(super) fn set_user_metadata(metadata: &[u8]) {
    // Nothing here fails but for a panic, and then the metadata stays as it was.
    let _ = guarded(|| {
        history::set_user_metadata(&text(metadata));
        Ok(())
    });
}

pub(super) fn user_metadata() -> String {
    guarded(|| Ok(history::user_metadata())).flatten().as_deref().unwrap_or_default().to_owned()
}
