//! From a request to a block: from the cache, which is the hot path (free lists, a few statistics, no CUDA call unless
//! frees wait for events), or from new memory, if need be after giving cached memory back.

use super::refusal::Refusal;
use super::state::DeviceState;
use super::{figures, grow, ready, reclaim, residency};
use crate::driver::{DevicePtr, Stream};
use crate::error::{Error, Result};
use crate::heap::Request;
use crate::history::Context;
use crate::ids::{BlockId, DEFAULT_POOL, PoolId};
use crate::segments::round_size;
use crate::sizes::{MIN_BLOCK, REQUEST_LIMIT, SMALL_STEP};

/// What the cache has for a request.
pub enum Served {
    /// A block.
    Block(DevicePtr),
    /// Nothing.
    Nothing(Request),
}

impl DeviceState {
    /// Serves a request from the cache, if it can. First completes what frees wait for, if anything.
    ///
    /// # Errors
    /// The driver's, while asking about events.
    #[inline]
    pub fn allocate_cached(&mut self, bytes: u64, stream: Stream, context: &mut Option<Context>) -> Result<Served> {
        if !self.waits.is_idle() && !self.capturing() {
            self.process_events()?;
        }
        // What this thread has cached, it did not ask for. What others have, they may be about to ask for again: it is
        // taken from them only where it would show, as a peak that was none or as more memory.
        if let Some(mine) = self.caches.mine() {
            self.take_from_thread(mine);
        }
        let request = self.request(bytes, stream);
        let mut found = self.best_fit(&request);
        if found.is_none_or(|block| self.raises_a_peak(block, &request)) && self.take_from_caches(false) {
            found = self.best_fit(&request);
        }
        Ok(match found {
            Some(block) => Served::Block(self.hand_out(block, &request, context.take())?),
            None => Served::Nothing(request),
        })
    }

    /// What a request for `bytes` on `stream` is now.
    #[inline]
    fn request(&mut self, bytes: u64, stream: Stream) -> Request {
        let rounded = round_size(bytes, &self.limits.native);
        let pool = self.routes.pool_for(stream);
        Request { bytes, rounded, stream, list: self.heap.pools.list_for(pool, rounded, stream) }
    }

    #[inline]
    fn best_fit(&mut self, request: &Request) -> Option<BlockId> {
        self.heap.best_fit(request, &self.limits.native)
    }

    /// Whether a statistic would be higher than ever if the request were served from this block.
    #[inline]
    fn raises_a_peak(&self, block: BlockId, request: &Request) -> bool {
        let split = self.heap.should_split(block, request, &self.limits.native);
        let bytes = if split { request.rounded } else { self.heap.blocks[block].bytes };
        self.accounting.raises_a_peak(self.heap.pools[request.list].small, bytes, request.bytes)
    }

    /// Hands a free block out: whole, or its front.
    ///
    /// # Errors
    /// The driver's, where pages must be moved or populated first; the block is free then as before.
    #[inline]
    fn hand_out(&mut self, block: BlockId, request: &Request, context: Option<Context>) -> Result<DevicePtr> {
        let split = self.heap.should_split(block, request, &self.limits.native);
        if self.heap.blocks[block].may_have_flags {
            return self.hand_out_flagged(block, request, split, context);
        }
        Ok(self.hand_out_as_is(block, request, split, context))
    }

    /// As [`DeviceState::hand_out`], of a block with pages about which something is special.
    #[cold]
    fn hand_out_flagged(
        &mut self,
        block: BlockId,
        request: &Request,
        split: bool,
        context: Option<Context>,
    ) -> Result<DevicePtr> {
        let bytes = if split { request.rounded } else { self.heap.blocks[block].bytes };
        ready::make_ready(self, block, bytes, request.stream)?;
        let ptr = self.hand_out_as_is(block, request, split, context);
        let block = self.heap.find(ptr)?;
        residency::note_flags(self, block);
        Ok(ptr)
    }

    /// As [`DeviceState::hand_out`], but exactly the request's bytes, whatever the options say of splitting now.
    pub(super) fn hand_out_exactly(
        &mut self,
        block: BlockId,
        request: &Request,
        context: Option<Context>,
    ) -> DevicePtr {
        let split = self.heap.blocks[block].bytes > request.rounded;
        self.hand_out_as_is(block, request, split, context)
    }

    #[inline]
    fn hand_out_as_is(&mut self, free: BlockId, request: &Request, split: bool, context: Option<Context>) -> DevicePtr {
        let taken = self.heap.take(free, request.rounded, split);
        self.accounting.taken(&taken, request.rounded);
        let block = taken.block;
        let address = self.heap.allocate(block, request.bytes, self.accounting.clock());
        let bytes = self.heap.blocks[block].bytes;
        self.accounting.allocated(taken.small, bytes, request.bytes);
        if bytes >= self.limits.native.max_split_size {
            self.accounting.stats.oversize_allocations.increase(1);
            self.heap.blocks[block].oversize = true;
        }
        if context.is_some() || self.tracer.tracing() {
            self.heap.blocks[block].has_context = self.tracer.allocated(&self.heap, block, context);
        }
        DevicePtr(address)
    }

    /// Serves a request that the cache could not: from new memory, if need be after giving cached memory back.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when a limit is met all the same; the driver's.
    pub fn allocate_new(&mut self, bytes: u64, stream: Stream, mut context: Option<Context>) -> Result<DevicePtr> {
        // Others may have changed everything while the lock was not held.
        let request = match self.allocate_cached(bytes, stream, &mut context)? {
            Served::Block(ptr) => return Ok(ptr),
            Served::Nothing(request) => request,
        };
        let relaxed = self.gpu.relaxed()?;
        self.tracer.begin_cause(context.clone());
        let found = reclaim_and_retry(self, &request);
        self.tracer.end_cause();
        drop(relaxed);
        match found {
            Ok(block) => self.hand_out(block, &request, context),
            Err(Refusal::Failed(error)) => Err(error),
            Err(refusal) => Err(figures::out_of_memory(self, &request, &refusal, context)),
        }
    }

    /// A request that no machine can serve: counted and reported, and nothing is given back for it.
    pub fn refuse(&mut self, bytes: u64, stream: Stream, context: Option<Context>) -> Error {
        let list = self.heap.pools.list_for(PoolId::DEFAULT, REQUEST_LIMIT, stream);
        let request = Request { bytes, rounded: bytes.min(u64::MAX - SMALL_STEP), stream, list };
        let refusal = Refusal::Exceeded(self.limits.budget.capacity(self.accounting.populated(), None));
        figures::out_of_memory(self, &request, &refusal, context)
    }

    /// Hands out exactly the bytes at `address`, which must be free in a block of the pool and stream that serve the
    /// request.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where they are not; the driver's, while asking about events.
    pub fn allocate_at(
        &mut self,
        address: u64,
        bytes: u64,
        stream: Stream,
        context: Option<Context>,
    ) -> Result<DevicePtr> {
        if !self.waits.is_idle() && !self.capturing() {
            self.process_events()?;
        }
        let request = self.request(bytes, stream);
        let Some(block) = self.heap.free_around(request.list, address, request.rounded) else {
            return Err(Error::InvalidArgument(format!(
                "no {} bytes are free at {address:#x} for the pool and stream that asked: expected an address inside \
                 memory that the allocator holds and nobody uses, a multiple of {MIN_BLOCK} bytes from its start",
                request.rounded
            )));
        };
        ready::populate_all(self, self.heap.blocks[block].segment, stream)?;
        let before = address - self.heap.blocks[block].address;
        if before == 0 {
            return Ok(self.hand_out_exactly(block, &request, context));
        }
        // The bytes in front are handed out and given back: blocks are only ever cut at their front.
        let front = Request { bytes: before, rounded: before, ..request };
        let front = self.hand_out_exactly(block, &front, context.clone());
        let rest = self.heap.blocks[self.heap.find(front)?].next;
        let ptr = self.hand_out_exactly(rest, &request, context.clone());
        self.free(front, &mut context.clone());
        self.flush_thread_caches();
        Ok(ptr)
    }
}

/// A block of new memory. Where there is none, what is cached is given back first.
fn reclaim_and_retry(device: &mut DeviceState, request: &Request) -> std::result::Result<BlockId, Refusal> {
    reclaim::collect_garbage(device);
    let mut refusal = match new_block(device, request) {
        Err(refusal @ (Refusal::Exceeded(_) | Refusal::NoMemory)) => refusal,
        done => return done,
    };
    if device.routes.capturing(&device.gpu).map_err(|error| Refusal::Failed(error.into()))? {
        return lent_block(device, request).ok_or(refusal);
    }
    // What CUDA does not take back is only told where the rest is not enough.
    let mut released = Ok(());
    match reclaim::release_oversize(device, request) {
        Ok(false) => {}
        Ok(true) => match new_block(device, request) {
            Err(Refusal::Exceeded(_) | Refusal::NoMemory) => {}
            done => return done,
        },
        Err(error) => released = Err(error),
    }
    let before = device.accounting.populated().total();
    released = released.and(reclaim::release_cached(device, DEFAULT_POOL));
    let given_back = before - device.accounting.populated().total();
    device.accounting.reclaimed_hard(given_back);
    tracing::debug!(device = device.gpu.index, bytes = given_back, "all caches were given back at a limit");
    device.accounting.stats.num_alloc_retries += 1;
    // Waiting for events may have freed enough in partly used segments.
    if let Some(block) = device.best_fit(request) {
        return Ok(block);
    }
    match new_block(device, request) {
        Err(again @ (Refusal::Exceeded(_) | Refusal::NoMemory)) => refusal = again,
        done => return done,
    }
    if let Some(block) = lent_block(device, request) {
        return Ok(block);
    }
    released.map_err(Refusal::Failed)?;
    Err(refusal)
}

/// A free block that fits the request, of memory that was populated for it.
fn new_block(device: &mut DeviceState, request: &Request) -> std::result::Result<BlockId, Refusal> {
    grow::new_memory(device, request)?;
    device.best_fit(request).ok_or(Refusal::NoMemory)
}

/// A free block of a pool that lends to others before they run out (`use_on_oom`).
fn lent_block(device: &mut DeviceState, request: &Request) -> Option<BlockId> {
    if device.heap.pools[request.list].pool != PoolId::DEFAULT {
        return None;
    }
    let lenders: Vec<PoolId> = device.heap.pools.ids().filter(|&pool| device.heap.pools[pool].use_on_oom).collect();
    lenders.into_iter().find_map(|pool| {
        let list = device.heap.pools.list_for(pool, request.rounded, request.stream);
        device.best_fit(&Request { list, ..*request })
    })
}
