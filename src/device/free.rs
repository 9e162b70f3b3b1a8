//! From the program's free to a block in its free list: by way of the freeing thread's cache, or of the events of
//! streams that still use it.

use super::state::DeviceState;
use crate::accounting::Accounting;
use crate::blocks::{Block, BlockState};
use crate::driver::{DeviceIndex, DevicePtr, Stream};
use crate::error::Result;
use crate::heap::Heap;
use crate::history::{Action, Context};
use crate::ids::{BlockId, PoolId, ThreadId};
use crate::thread_cache::Slot;

/// Counts what a thread's cache did with a block.
fn count_rounds(slot: &Slot, heap: &mut Heap, accounting: &mut Accounting) {
    if slot.rounds == 0 {
        return;
    }
    let block = &mut heap.blocks[slot.block];
    let small = heap.pools[block.list].small;
    block.requested = slot.requested;
    accounting.rounds(small, slot);
    block.born = accounting.clock();
}

impl DeviceState {
    /// The program gives an allocation back. Answers false where it is not one of this device; the context is only
    /// taken where it is.
    ///
    /// A driver error while recording events does not fail the free: destructors cannot throw. The block stays
    /// unavailable until its events can be recorded.
    #[inline]
    pub fn free(&mut self, ptr: DevicePtr, context: &mut Option<Context>) -> bool {
        let Some(block) = self.heap.remove_live(ptr.0) else { return false };
        if self.heap.blocks[block].thread.is_some() && !self.take_from_cache(block) {
            return false;
        }
        let context = context.take();
        if context.is_none() && self.may_cache(block) && self.cache(block) {
            return true;
        }
        self.mark_freed(block);
        let has_uses = self.heap.blocks[block].has_uses;
        if self.tracer.tracing() {
            self.tracer.block(Action::FreeRequested, &self.heap, block, context.clone());
        }
        if !has_uses || !self.must_wait(block) {
            self.free_block(block, context);
        }
        true
    }

    /// Whether a freed block could serve this thread's next request without anybody noticing: nothing but its size and
    /// stream decides who gets it, and nobody wants to hear of it.
    fn may_cache(&self, block: BlockId) -> bool {
        let Block { bytes, list, has_uses, has_context, oversize, may_have_flags, .. } = self.heap.blocks[block];
        self.caches.may_keep()
            && !self.tracer.tracing()
            && self.routes.is_empty()
            && !(has_uses || has_context || oversize || may_have_flags)
            && bytes < self.limits.native.max_split_size
            && self.heap.pools[list].pool == PoolId::DEFAULT
    }

    /// Leaves a freed block to this thread's next request of its size, if such requests are likely.
    fn cache(&mut self, block: BlockId) -> bool {
        let Block { address, list, .. } = self.heap.blocks[block];
        let stream = self.heap.pools[list].stream;
        let kept = self.caches.keep(&mut self.heap, block, stream);
        if kept.kept {
            self.heap.keep_live(address, block);
        }
        if let Some(left) = kept.left {
            self.return_to_heap(&left);
        }
        kept.kept
    }

    /// Counts an allocation out. Its block is not free yet.
    #[inline]
    pub(super) fn mark_freed(&mut self, block: BlockId) {
        if self.heap.blocks[block].may_have_flags {
            self.evicted_is_freed(block);
        }
        let freed = &mut self.heap.blocks[block];
        let small = self.heap.pools[freed.list].small;
        self.accounting.freed(small, freed.bytes);
        if freed.oversize {
            freed.oversize = false;
            self.accounting.stats.oversize_allocations.decrease(1);
        }
        freed.state = BlockState::Pending;
    }

    /// The program has freed a block with flags on its pages: perhaps one that was evicted.
    #[cold]
    fn evicted_is_freed(&mut self, block: BlockId) {
        let (clock, limit) = (self.accounting.clock(), self.limits.budget.device_limit());
        if self.evictions.freed(self.heap.blocks[block].address, clock, limit) {
            self.accounting.places.regrets += 1;
            let age = self.evictions.policy.age(limit);
            tracing::debug!(device = self.gpu.index, age, "memory was freed soon after it had been evicted");
        }
    }

    /// Whether a freed block that was recorded on other streams has to wait.
    #[cold]
    fn must_wait(&mut self, block: BlockId) -> bool {
        if self.capturing() {
            self.waits.defer(block);
            return true;
        }
        self.waits.freed(self.gpu.driver(), block)
    }

    /// Frees a block that nothing uses any more, whole.
    pub(super) fn free_block(&mut self, block: BlockId, context: Option<Context>) {
        self.retire(block, context);
        let returned = self.heap.put_back(block);
        self.accounting.returned(&returned);
    }

    /// Ends the use of a block: it is free, but not yet in a free list.
    #[inline]
    fn retire(&mut self, block: BlockId, context: Option<Context>) {
        if self.tracer.tracing() {
            self.tracer.block(Action::FreeCompleted, &self.heap, block, context);
        }
        let freed = &mut self.heap.blocks[block];
        let small = self.heap.pools[freed.list].small;
        self.accounting.retired(small, freed.bytes, freed.requested);
        freed.requested = 0;
        if freed.has_context {
            freed.has_context = false;
            self.tracer.forget(block);
        }
        if freed.has_uses {
            freed.has_uses = false;
            self.waits.forget(block);
        }
    }

    /// Notes a use on another stream.
    ///
    /// # Errors
    /// [`Error::InvalidPointer`](crate::error::Error::InvalidPointer).
    pub fn record_stream(&mut self, ptr: DevicePtr, device: DeviceIndex, stream: Stream) -> Result<()> {
        let block = self.heap.find(ptr)?;
        // Uses on the allocation's own stream are ordered by the stream itself.
        if (device, stream) != (self.gpu.index, self.heap.pools[self.heap.blocks[block].list].stream) {
            // Only what really is captured needs no event afterwards; where CUDA does not say so, the event is
            // recorded.
            let captured =
                !self.routes.is_empty() && self.gpu.driver().stream_is_capturing(device, stream).unwrap_or(false);
            self.waits.record_use(block, (device, stream), captured);
            self.heap.blocks[block].has_uses = true;
        }
        Ok(())
    }

    /// Frees what has finished waiting.
    #[cold]
    pub(super) fn process_events(&mut self) -> Result<()> {
        // Another device, or another thread, may be capturing.
        let _relaxed = self.gpu.relaxed()?;
        let mut done = std::mem::take(&mut self.done);
        self.waits.record_deferred(self.gpu.driver(), &mut done);
        self.waits.poll(self.gpu.driver(), &mut done);
        self.free_done(done);
        Ok(())
    }

    /// Waits for everything that frees wait for, in one pool or in all.
    pub(super) fn synchronize_events(&mut self, pool: Option<PoolId>) {
        self.accounting.stats.num_sync_all_streams += 1;
        let mut done = std::mem::take(&mut self.done);
        let Self { waits, gpu, heap, .. } = self;
        waits.retry_refused();
        waits.record_deferred(gpu.driver(), &mut done);
        waits.synchronize(gpu.driver(), |block| pool.is_none_or(|pool| heap.pool_of(block) == pool), &mut done);
        self.free_done(done);
    }

    fn free_done(&mut self, mut done: Vec<BlockId>) {
        for block in done.drain(..) {
            self.free_block(block, None);
        }
        self.done = done;
    }

    /// Brings the accounting up to date: what threads have cached is free, and what their caches did is counted.
    #[inline]
    pub fn flush_thread_caches(&mut self) {
        self.take_from_caches(false);
        self.count_cached_rounds();
    }

    /// Counts what the threads' caches did; the blocks stay there.
    pub(super) fn count_cached_rounds(&mut self) {
        let Self { caches, heap, accounting, .. } = self;
        caches.merge(|slot| count_rounds(slot, heap, accounting));
    }

    /// Takes every block out of the threads' caches.
    pub(super) fn empty_thread_caches(&mut self) {
        self.take_from_caches(true);
    }

    /// Takes the cached blocks out of one thread's cache.
    #[inline]
    pub(super) fn take_from_thread(&mut self, thread: ThreadId) {
        let taken = self.caches.take_from(thread);
        self.return_all(taken);
    }

    /// Takes blocks out of the threads' caches: the cached ones, or all. Answers whether there were any.
    pub(super) fn take_from_caches(&mut self, all: bool) -> bool {
        let taken = self.caches.take(all);
        self.return_all(taken)
    }

    #[inline]
    fn return_all(&mut self, taken: Vec<Slot>) -> bool {
        let any = !taken.is_empty();
        for slot in &taken {
            self.return_to_heap(slot);
        }
        self.caches.dealt_with(taken);
        any
    }

    /// Takes a block that the program names out of the cache it is in. False: the program has freed it already.
    #[cold]
    pub(super) fn take_from_cache(&mut self, block: BlockId) -> bool {
        let Block { address, thread, .. } = self.heap.blocks[block];
        let slot = self.caches.take_one(thread, address);
        slot.is_none_or(|slot| {
            self.return_to_heap(&slot);
            !slot.parked
        })
    }

    /// Takes a block out of the cache it is in, if it is the program's. No block is freed by that.
    pub(super) fn take_live(&mut self, block: BlockId) -> bool {
        let Block { address, thread, .. } = self.heap.blocks[block];
        let slot = self.caches.take_live(thread, address);
        slot.inspect(|slot| self.return_to_heap(slot)).is_some()
    }

    /// A block has left its thread's cache: the accounting learns what happened to it there.
    fn return_to_heap(&mut self, slot: &Slot) {
        count_rounds(slot, &mut self.heap, &mut self.accounting);
        self.heap.blocks[slot.block].thread = ThreadId::NONE;
        if slot.parked {
            self.heap.remove_live(slot.address);
            self.mark_freed(slot.block);
            self.free_block(slot.block, None);
        }
    }
}
