//! Everything known about one device, as parts that know nothing of each other. What happens to them together is in the
//! modules beside this one.

use super::limits::Limits;
use super::routes::Routes;
use super::thread_caches::ThreadCaches;
use crate::accounting::{Accounting, Owner};
use crate::driver::{DeviceIndex, DeviceInfo, Driver};
use crate::gpu::Gpu;
use crate::heap::Heap;
use crate::hooks::Hooks;
use crate::ids::{BlockId, ListId, PoolId};
use crate::options::{NativeOptions, Options};
use crate::placement::Policy;
use crate::pressure::Evictions;
use crate::streams::Waits;
use crate::tracer::Tracer;
use std::sync::Arc;

/// One device: under its lock.
pub struct DeviceState {
    /// Blocks, segments, pools: what is in use, what is free.
    pub(super) heap: Heap,
    /// Statistics.
    pub(super) accounting: Accounting,
    /// Memory history and trackers.
    pub(super) tracer: Tracer,
    /// The device, and the driver.
    pub(super) gpu: Gpu,
    /// Options and limits.
    pub(super) limits: Limits,
    /// Frees that wait for streams.
    pub(super) waits: Waits,
    /// Which pool serves which stream.
    pub(super) routes: Routes,
    /// The blocks that threads freed last.
    pub(super) caches: ThreadCaches,
    /// Live memory that was evicted from the device.
    pub(super) evictions: Evictions,
    /// PyTorch.
    pub(super) hooks: Arc<dyn Hooks>,
    /// Blocks that have finished waiting; kept to be reused.
    pub(super) done: Vec<BlockId>,
}

impl DeviceState {
    /// The state of a device from which nothing was allocated yet. `allocator` is what the threads' caches call the
    /// allocator that it belongs to.
    pub fn new(
        allocator: u64,
        index: DeviceIndex,
        info: DeviceInfo,
        driver: Arc<dyn Driver>,
        hooks: Arc<dyn Hooks>,
        options: Options,
        native: NativeOptions,
    ) -> Self {
        Self {
            heap: Heap::default(),
            accounting: Accounting::new(Arc::clone(&hooks)),
            tracer: Tracer::new(index, Arc::clone(&hooks)),
            caches: ThreadCaches::new(allocator, index, &native),
            limits: Limits::new(&info, options, native),
            gpu: Gpu::new(index, info, driver),
            waits: Waits::default(),
            routes: Routes::default(),
            evictions: Evictions::default(),
            hooks,
            done: Vec::new(),
        }
    }

    /// The statistics.
    pub fn accounting(&self) -> &Accounting {
        &self.accounting
    }

    /// Memory history and trackers.
    pub fn tracer(&mut self) -> &mut Tracer {
        &mut self.tracer
    }

    /// The limits.
    pub fn limits(&mut self) -> &mut Limits {
        &mut self.limits
    }

    /// PyTorch's own settings, as they are now.
    pub fn set_native_options(&mut self, native: NativeOptions) {
        self.empty_thread_caches();
        self.caches.set_native(&native);
        self.limits.set_native(native);
    }

    /// Our options, as they are now. The fraction set by the program stays.
    pub fn set_options(&mut self, options: Options) {
        self.limits.set_options(&self.gpu.info, options);
    }

    /// Starts the accumulated statistics anew.
    pub fn reset_accumulated_stats(&mut self) {
        let pools = &self.heap.pools;
        self.accounting.reset_accumulated(|id| pools.find(id).is_some());
    }

    /// Starts the peaks anew.
    pub fn reset_peak_stats(&mut self) {
        let pools = &self.heap.pools;
        self.accounting.reset_peaks(|id| pools.find(id).is_some());
    }

    /// Whether a CUDA graph is being captured on this device; where CUDA does not say, it is assumed.
    #[inline]
    pub(super) fn capturing(&self) -> bool {
        self.routes.capturing(&self.gpu).unwrap_or(true)
    }

    /// Whose figures the memory of a list belongs to.
    pub(super) fn owner(&self, list: ListId) -> Owner {
        let list = &self.heap.pools[list];
        let private = (list.pool != PoolId::DEFAULT).then(|| self.heap.pools[list.pool].id);
        Owner { small: list.small, private }
    }

    /// The placement that a list's new memory has.
    pub(super) fn policy(&self, list: ListId) -> Policy {
        let pools = &self.heap.pools;
        self.limits.policy(&pools[pools[list].pool])
    }
}
