//! Entries of the bridge: private pools.

use super::{answer, convert, ffi, hooks, pool_id, text, with};
use crate::allocator::{Allocator, CustomAllocator, PoolState};
use crate::driver::{DeviceIndex, Stream};
use crate::error::Error;
use crate::options::AccessPattern;
use cxx::{SharedPtr, UniquePtr};
use std::sync::Arc;

pub(super) fn begin_allocate_to_pool(
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

pub(super) fn end_allocate_to_pool(device: DeviceIndex, pool: ffi::PoolId) -> bool {
    with(|allocator| allocator.pools(device).end_allocate_to_pool(pool_id(pool))).is_some()
}

pub(super) fn release_pool(device: DeviceIndex, pool: ffi::PoolId) -> bool {
    with(|allocator| allocator.pools(device).release_pool(pool_id(pool))).is_some()
}

pub(super) fn ensure_pool(device: DeviceIndex, pool: ffi::PoolId, custom: u64) -> bool {
    with(|allocator| allocator.pools(device).ensure_pool(pool_id(pool), custom_allocator(custom))).is_some()
}

pub(super) fn pool_use_count(device: DeviceIndex, pool: ffi::PoolId, count: &mut i32) -> bool {
    answer(count, |allocator| allocator.pools(device).pool_use_count(pool_id(pool)), |count| count)
}

pub(super) fn set_use_on_oom(device: DeviceIndex, pool: ffi::PoolId, on: bool) -> bool {
    with(|allocator| allocator.pools(device).set_use_on_oom(pool_id(pool), on)).is_some()
}

pub(super) fn set_no_split(device: DeviceIndex, pool: ffi::PoolId) -> bool {
    with(|allocator| allocator.pools(device).set_no_split(pool_id(pool), true)).is_some()
}

pub(super) fn set_pool_placement(device: DeviceIndex, pool: ffi::PoolId, placement: &[u8]) -> bool {
    with(|allocator| {
        let name = text(placement);
        let pattern = AccessPattern::named(&name).ok_or_else(|| {
            Error::InvalidArgument(format!(
                "placement: '{name}' is not allowed: expected {}",
                AccessPattern::expected()
            ))
        })?;
        allocator.pools(device).set_pool_placement(pool_id(pool), pattern)
    })
    .is_some()
}

pub(super) fn check_pool_live_allocations(
    device: DeviceIndex,
    pool: ffi::PoolId,
    expected: &[u64],
    equal: &mut bool,
) -> bool {
    answer(
        equal,
        |allocator| allocator.pools(device).check_pool_live_allocations(pool_id(pool), expected),
        |equal| equal,
    )
}

/// What C++ keeps of a checkpointed pool. Empty where taking the checkpoint failed: a `Box` cannot be null.
pub(crate) struct Checkpoint(Option<Arc<PoolState>>);

impl Checkpoint {
    pub(super) fn valid(&self) -> bool {
        self.0.is_some()
    }
}

pub(super) fn checkpoint(device: DeviceIndex, pool: ffi::PoolId) -> Box<Checkpoint> {
    let state = with(|allocator| allocator.pools(device).checkpoint_state(pool_id(pool)));
    Box::new(Checkpoint(state))
}

pub(super) fn restore(
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

fn custom_allocator(address: u64) -> Option<CustomAllocator> {
    (address != 0).then_some(CustomAllocator(address))
}
