//! The private pools of a device, as programs see them: those of CUDA graphs and MemPools.

use super::{Allocator, flushed};
use crate::device::state::DeviceState;
use crate::device::{PoolState, Restored, private_pools};
use crate::driver::{DeviceIndex, Stream};
use crate::error::{Error, Result};
use crate::history::Context;
use crate::hooks::StreamFilter;
use crate::ids::MempoolId;
use crate::options::AccessPattern;
use crate::segments::CustomAllocator;
use parking_lot::MutexGuard;
use std::sync::Arc;

/// The private pools of one device.
#[derive(Clone, Copy)]
pub struct PrivatePools<'a> {
    pub(super) allocator: &'a Allocator,
    pub(super) device: DeviceIndex,
}

impl<'a> PrivatePools<'a> {
    fn state(&self) -> Result<MutexGuard<'a, DeviceState>> {
        Ok(flushed(self.allocator.device(self.device)?))
    }

    /// From now on requests on the streams that `filter` selects are served from this pool, which is made if need be
    /// and held once more. `stream` is the caller's current stream: if that captures, a CUDA graph is being captured,
    /// else only a MemPool is in use.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a bad device, a released pool, or one already recorded to.
    pub fn begin_allocate_to_pool(
        &self,
        id: MempoolId,
        filter: StreamFilter,
        stream: Stream,
        custom: Option<CustomAllocator>,
    ) -> Result<()> {
        private_pools::begin(&mut *self.state()?, id, filter, stream, custom)
    }

    /// Ends [`PrivatePools::begin_allocate_to_pool`]; the pool stays held.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a bad device or a pool not recorded to.
    pub fn end_allocate_to_pool(&self, id: MempoolId) -> Result<()> {
        private_pools::end(&mut *self.state()?, id)
    }

    /// Lets go of a pool once.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a bad device or pool.
    pub fn release_pool(&self, id: MempoolId) -> Result<()> {
        private_pools::release(&mut *self.state()?, id)
    }

    /// Makes a pool, or holds it once more.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a bad device or a released pool.
    pub fn ensure_pool(&self, id: MempoolId, custom: Option<CustomAllocator>) -> Result<()> {
        private_pools::ensure(&mut *self.state()?, id, custom).map(|_| ())
    }

    /// How many graphs and MemPools hold a pool.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a bad device or pool.
    pub fn pool_use_count(&self, id: MempoolId) -> Result<i32> {
        private_pools::use_count(&*self.state()?, id)
    }

    /// Whether others may take this pool's free blocks before they run out of memory.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a bad device or pool.
    pub fn set_use_on_oom(&self, id: MempoolId, on: bool) -> Result<()> {
        private_pools::set_use_on_oom(&mut *self.state()?, id, on)
    }

    /// Whether this pool's blocks are handed out whole.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a bad device or pool.
    pub fn set_no_split(&self, id: MempoolId, on: bool) -> Result<()> {
        private_pools::set_no_split(&mut *self.state()?, id, on)
    }

    /// Where what a pool takes from CUDA from now on is placed.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a bad device or pool; [`Error::NotSupported`] for managed memory on a device
    /// without concurrent managed access.
    pub fn set_pool_placement(&self, id: MempoolId, pattern: AccessPattern) -> Result<()> {
        private_pools::set_placement(&mut *self.state()?, id, pattern)
    }

    /// Whether the live allocations of a pool are exactly these addresses.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a bad device or pool.
    pub fn check_pool_live_allocations(&self, id: MempoolId, expected: &[u64]) -> Result<bool> {
        private_pools::live_allocations_are(&*self.state()?, id, expected)
    }

    /// What a pool holds now, to be brought back by [`PrivatePools::restore_pool`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a bad device or pool, or one with frees that wait for events; the driver's.
    pub fn checkpoint_state(&self, id: MempoolId) -> Result<Arc<PoolState>> {
        private_pools::checkpoint(&mut *self.state()?, id).map(Arc::new)
    }

    /// Brings a pool back to a checkpoint.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a bad device or pool, or a checkpoint that does not fit; nothing has changed
    /// then.
    pub fn restore_pool(&self, state: &PoolState, context: Option<Context>) -> Result<Restored> {
        if state.device() != self.device {
            return Err(Error::InvalidArgument(format!(
                "a checkpoint of device {} cannot be restored on device {}",
                state.device(),
                self.device
            )));
        }
        private_pools::restore(&mut *self.state()?, state, context)
    }
}
