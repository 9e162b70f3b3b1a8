//! The allocator of one device: everything under the device's lock.
//!
//! [`DeviceState::allocate_cached`] and [`DeviceState::free`] are the hot path: free lists, a few statistics, no
//! CUDA call unless frees wait for events. Everything that asks CUDA for memory or gives some back is in
//! `grow.rs`; pools of graphs and MemPools in `private.rs`; what a snapshot shows in `snapshot.rs`.

mod grow;
mod places;
mod private;
mod snapshot;

pub use grow::REQUEST_LIMIT;
pub use places::SegmentPlace;
pub(crate) use places::no_allocation;
pub use private::{PoolState, Restored};
pub use snapshot::{BlockInfo, SegmentInfo};

use crate::allocator::{Hooks, StreamFilter};
use crate::blocks::{Block, BlockId, BlockState, Blocks, FreeList, ListId, MIN_BLOCK};
use crate::budget::{Budget, Populated};
use crate::driver::{DeviceIndex, DeviceInfo, DevicePtr, Driver, IpcHandle, Stream, captures};
use crate::error::{Error, Result};
use crate::history::{Action, Context, History, Labels, PlaceHistory, Recording, TraceEntry, user_metadata};
use crate::options::{AccessPattern, NativeOptions, Options};
use crate::pools::{DEFAULT_POOL, List, MempoolId, PoolId, Pools};
use crate::pressure::{Move, Movers, Pressure, Returns};
use crate::segments::{Memory, Segment, SegmentId, population_step, round_size};
use crate::stats::{DeviceStats, PlaceStats, StatArray};
use crate::streams::Waits;
use crate::thread_cache::{self, Slot, ThreadCache, ThreadId};
use grow::Relaxed;
use rustc_hash::FxHashMap;
use std::sync::Arc;

/// What an allocation is asked to be.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Bytes as the program asked, at least 1.
    pub bytes: u64,
    /// Rounded: a multiple of 512.
    pub rounded: u64,
    /// The stream it will be used on.
    pub stream: Stream,
    /// The free list that serves it.
    pub list: ListId,
}

/// A live allocation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Allocation {
    /// On which device.
    pub device: DeviceIndex,
    /// Bytes of its block.
    pub block_bytes: u64,
    /// Bytes as the program asked.
    pub requested_bytes: u64,
    /// The stream it was allocated for.
    pub stream: Stream,
}

/// Requests on some streams are served from a private pool: a graph is captured, or a MemPool is in use.
struct Route {
    pool: PoolId,
    filter: StreamFilter,
    /// The stream that was current when the route began: a graph is captured on it, or nothing is.
    stream: Stream,
}

fn live_segment(segments: &mut [Option<Segment>], id: SegmentId) -> &mut Segment {
    segments[id.0 as usize].as_mut().expect("a SegmentId is only kept while its segment lives")
}

/// Whether sizes are rounded to multiples of 512 bytes and to nothing else.
fn rounds_plainly(native: &NativeOptions) -> bool {
    native.roundup_power2_divisions.iter().all(|&divisions| divisions <= 1)
}

/// PyTorch's settings as they are honoured. A `max_split_size` that no block reaches is none: programs that restore the
/// default (vLLM) set 17592186044415 MiB, of which PyTorch makes 2^64 - 2^20 bytes.
fn honoured(mut native: NativeOptions) -> NativeOptions {
    if native.max_split_size >= 1 << 48 {
        native.max_split_size = u64::MAX;
    }
    native
}

/// The smallest free block of at least `bytes` that `fits`. But the end of a growing segment is taken last: there a large
/// request grows in place, elsewhere it needs a hole of its size (wilderness preservation; Wilson, Johnstone, Neely and
/// Boles, Dynamic Storage Allocation, 1995, 3.3).
#[inline]
fn best_fit_of(free: &FreeList, blocks: &Blocks, bytes: u64, fits: impl Fn(&Block) -> bool) -> Option<BlockId> {
    let is_end = |block: &Block| block.growing && block.next == BlockId::NONE;
    let found = free.find(blocks, bytes, &fits)?;
    if !is_end(&blocks[found]) || blocks[found].bytes == bytes {
        return Some(found);
    }
    free.find(blocks, bytes, |block| fits(block) && !is_end(block)).or(Some(found))
}

/// Counts what a thread's cache did with a block.
fn merge_slot(slot: &Slot, blocks: &mut Blocks, pools: &Pools, stats: &mut DeviceStats, clock: &mut u64) {
    if slot.rounds == 0 {
        return;
    }
    let block = &mut blocks[slot.block];
    let small = pools[block.list].small;
    block.requested = slot.requested;
    *clock += slot.rounds * slot.bytes;
    block.born = *clock;
    for counts in [&mut stats.allocation, &mut stats.active] {
        counts.exchange(small, slot.rounds, slot.rounds);
    }
    for bytes in [&mut stats.allocated_bytes, &mut stats.active_bytes] {
        bytes.exchange(small, slot.rounds * slot.bytes, slot.rounds * slot.bytes);
    }
    stats.requested_bytes.exchange(small, slot.requested_again, slot.requested_before);
}

/// Whether a device can place memory so.
///
/// # Errors
/// [`Error::NotSupported`], with what works instead.
pub fn check_supported(info: &DeviceInfo, device: DeviceIndex, pattern: AccessPattern) -> Result<()> {
    if pattern == AccessPattern::Device || (info.managed_memory && info.concurrent_managed_access) {
        return Ok(());
    }
    Err(Error::NotSupported(format!(
        "use_uvm:True needs a device with concurrent managed access; device {device} ({}) has none (as under Windows, WSL \
         and on Tegra). Allowed here: uvm_access_pattern:device, or use_uvm:False",
        info.name
    )))
}

/// Everything known about one device.
pub struct DeviceState {
    device: DeviceIndex,
    info: DeviceInfo,
    driver: Arc<dyn Driver>,
    hooks: Arc<dyn Hooks>,
    options: Options,
    native: NativeOptions,
    budget: Budget,
    populated: Populated,
    blocks: Blocks,
    pools: Pools,
    segments: Vec<Option<Segment>>,
    /// Growing segments by the free list they feed.
    growing: FxHashMap<ListId, Vec<SegmentId>>,
    /// Live allocations by address.
    live: FxHashMap<u64, BlockId>,
    /// The allocator that this is a device of, as the threads' caches know it.
    allocator: u64,
    /// The caches of the threads that freed something here.
    threads: Vec<Option<Arc<ThreadCache>>>,
    /// What is being taken out of them; kept to be reused.
    taken: Vec<Slot>,
    /// Whether the options' rounding is what the caches know.
    plain_rounding: bool,
    waits: Waits,
    routes: Vec<Route>,
    stats: DeviceStats,
    /// Reserved bytes of private pools; those of pools that are gone stay until statistics are reset.
    pool_reserved: FxHashMap<MempoolId, StatArray>,
    places: PlaceStats,
    pressure: Pressure,
    movers: Movers,
    returns: Returns,
    /// Bytes freed by the program in all: the clock by which allocations age.
    clock: u64,
    /// Live allocations that were moved out to make room, by address.
    moved: FxHashMap<u64, Move>,
    history: History,
    /// What was populated where, while the history is recorded.
    samples: PlaceHistory,
    /// The compiled functions that are running, innermost last.
    compile_contexts: Vec<Arc<str>>,
    /// Whether [`Hooks::trace`] wants entries.
    tracked: bool,
    /// `history.enabled() || tracked`: one test on the hot path.
    tracing: bool,
    contexts: FxHashMap<BlockId, Context>,
    /// Populates what a capturing stream cannot.
    side_stream: Option<Stream>,
    /// Address ranges that CUDA would not take back when they were half made.
    orphans: Vec<DevicePtr>,
    /// Blocks that have finished waiting; kept to be reused.
    done: Vec<BlockId>,
}

impl DeviceState {
    /// The state of a device from which nothing was allocated yet.
    pub fn new(
        allocator: u64,
        device: DeviceIndex,
        info: DeviceInfo,
        driver: Arc<dyn Driver>,
        hooks: Arc<dyn Hooks>,
        options: Options,
        native: NativeOptions,
    ) -> Self {
        Self {
            device,
            budget: Budget::new(&info, &options),
            info,
            driver,
            hooks,
            options,
            plain_rounding: rounds_plainly(&native),
            native: honoured(native),
            populated: Populated::default(),
            blocks: Blocks::default(),
            pools: Pools::default(),
            segments: Vec::new(),
            growing: FxHashMap::default(),
            live: FxHashMap::default(),
            allocator,
            threads: Vec::new(),
            taken: Vec::new(),
            waits: Waits::default(),
            routes: Vec::new(),
            stats: DeviceStats::default(),
            pool_reserved: FxHashMap::default(),
            places: PlaceStats::default(),
            pressure: Pressure::default(),
            movers: Movers::default(),
            returns: Returns::default(),
            clock: 0,
            moved: FxHashMap::default(),
            history: History::default(),
            samples: PlaceHistory::default(),
            compile_contexts: Vec::new(),
            tracked: false,
            tracing: false,
            contexts: FxHashMap::default(),
            side_stream: None,
            orphans: Vec::new(),
            done: Vec::new(),
        }
    }

    /// PyTorch's own settings, as they are now.
    pub fn set_native_options(&mut self, native: NativeOptions) {
        self.empty_threads();
        self.plain_rounding = rounds_plainly(&native);
        self.native = honoured(native);
    }

    /// Our options, as they are now. The fraction set by the program stays.
    pub fn set_options(&mut self, options: Options) {
        let fraction = self.budget.fraction_is_set().then(|| self.budget.fraction());
        self.budget = Budget::new(&self.info, &options);
        if let Some(fraction) = fraction {
            self.budget.set_fraction(fraction);
        }
        self.options = options;
    }

    /// The limits.
    pub fn budget_mut(&mut self) -> &mut Budget {
        &mut self.budget
    }

    /// The fraction set by `set_per_process_memory_fraction`.
    pub fn fraction(&self) -> f64 {
        self.budget.fraction()
    }

    /// The statistics.
    pub fn stats(&self) -> &DeviceStats {
        &self.stats
    }

    /// The bytes reserved in each private pool.
    pub fn pool_reserved(&self) -> impl Iterator<Item = (MempoolId, StatArray)> {
        self.pool_reserved.iter().map(|(&id, &bytes)| (id, bytes))
    }

    /// Starts the accumulated statistics anew.
    pub fn reset_accumulated_stats(&mut self) {
        self.stats.reset_accumulated();
        self.places.reset_accumulated();
        self.reset_pool_stats(StatArray::reset_accumulated);
    }

    /// Starts the peaks anew.
    pub fn reset_peak_stats(&mut self) {
        self.stats.reset_peak();
        self.places.reset_peak();
        self.reset_pool_stats(StatArray::reset_peak);
    }

    fn reset_pool_stats(&mut self, reset: fn(&mut StatArray)) {
        let Self { pool_reserved, pools, .. } = self;
        pool_reserved.retain(|&id, _| pools.find(id).is_some());
        pool_reserved.values_mut().for_each(reset);
    }

    /// Serves a request from the cache, if it can. First completes what frees wait for, if anything.
    ///
    /// # Errors
    /// The driver's, while asking about events.
    #[inline]
    pub fn allocate_cached(
        &mut self,
        bytes: u64,
        stream: Stream,
        context: &mut Option<Context>,
    ) -> Result<std::result::Result<DevicePtr, Request>> {
        if !self.waits.is_idle() && !self.capturing() {
            self.process_events()?;
        }
        // What this thread has parked, it did not ask for. What others have, they may be about to ask for again: it is
        // taken from them only where it would show, as a peak that was none or as more memory.
        if let Some(mine) = thread_cache::mine(self.allocator, self.device) {
            self.take_from(mine);
        }
        let request = self.request(bytes, stream);
        let mut found = self.best_fit(&request);
        if found.is_none_or(|block| self.raises_a_peak(block, &request)) && self.take_from_threads(false) {
            found = self.best_fit(&request);
        }
        Ok(match found {
            Some(block) => Ok(self.hand_out(block, &request, context.take())?),
            None => Err(request),
        })
    }

    /// What a request for `bytes` on `stream` is now.
    #[inline]
    fn request(&mut self, bytes: u64, stream: Stream) -> Request {
        let rounded = round_size(bytes, &self.native);
        let pool = if self.routes.is_empty() { PoolId::DEFAULT } else { self.routed_pool(stream) };
        Request { bytes, rounded, stream, list: self.pools.list_for(pool, rounded, stream) }
    }

    #[cold]
    fn routed_pool(&self, stream: Stream) -> PoolId {
        // The innermost of nested pools.
        self.routes.iter().rev().find(|route| (route.filter)(stream)).map_or(PoolId::DEFAULT, |route| route.pool)
    }

    /// Whether a CUDA graph is being captured on this device, so that nothing is given back or moved and frees are not
    /// waited for. A MemPool in use is no capture, although PyTorch announces both in the same way: CUDA is asked about
    /// the stream. (PyTorch's own allocator is told from 2.13 on; before, it took a MemPool for a capture.)
    #[inline]
    fn capturing(&self) -> bool {
        !self.routes.is_empty() && self.routes_capture()
    }

    #[cold]
    fn routes_capture(&self) -> bool {
        // A stream that CUDA knows nothing of, such as one that the program has destroyed, captures nothing.
        self.routes.iter().any(|route| captures(&*self.driver, self.device, route.stream).unwrap_or(false))
    }

    /// The best fitting free block of the request's list, still in it.
    #[inline]
    fn best_fit(&mut self, request: &Request) -> Option<BlockId> {
        let max_split = self.native.max_split_size;
        let list = &mut self.pools[request.list];
        list.requests += 1;
        if max_split == u64::MAX {
            return best_fit_of(&list.free, &self.blocks, request.rounded, |_| true);
        }
        // Oversize blocks are segments of their own: neither split for small requests, nor wasted on much smaller ones. What
        // would be made anew for the request is never too large for it.
        let made = population_step(request.rounded, request.rounded, 0, &self.native);
        let ceiling = request.rounded.saturating_add(self.native.max_non_split_rounding_size);
        let oversize = request.rounded >= max_split;
        best_fit_of(&list.free, &self.blocks, request.rounded, |block| {
            if oversize {
                !block.growing && (block.bytes < ceiling || block.bytes <= made)
            } else {
                block.growing || block.bytes < max_split || block.bytes <= made
            }
        })
    }

    /// Whether the rest of a block is worth a block of its own.
    #[inline]
    fn should_split(&self, block: BlockId, request: &Request) -> bool {
        let Block { bytes, list, growing, .. } = self.blocks[block];
        let rest = bytes - request.rounded;
        let list = &self.pools[list];
        if rest == 0 || list.no_split {
            return false;
        }
        if list.small || growing {
            rest >= MIN_BLOCK
        } else {
            request.rounded < self.native.max_split_size && rest > crate::segments::SMALL_LIMIT
        }
    }

    /// Whether a statistic would be higher than ever if the request were served from this block.
    #[inline]
    fn raises_a_peak(&self, block: BlockId, request: &Request) -> bool {
        let bytes = if self.should_split(block, request) { request.rounded } else { self.blocks[block].bytes };
        let small = self.pools[request.list].small;
        let stats = &self.stats;
        stats.allocated_bytes.would_peak(small, bytes)
            || stats.active_bytes.would_peak(small, bytes)
            || stats.requested_bytes.would_peak(small, request.bytes)
            || stats.allocation.would_peak(small, 1)
            || stats.active.would_peak(small, 1)
    }

    /// Makes a free block the program's, less what is worth a block of its own.
    ///
    /// # Errors
    /// The driver's, where pages must be moved or populated first; the block is free then as before.
    #[inline]
    fn hand_out(&mut self, block: BlockId, request: &Request, context: Option<Context>) -> Result<DevicePtr> {
        let split = self.should_split(block, request);
        if self.blocks[block].has_marks {
            return self.hand_out_marked(block, request, split, context);
        }
        Ok(self.hand_out_part(block, request, split, context))
    }

    /// As [`DeviceState::hand_out`], but exactly the request's bytes, whatever the options say of splitting now.
    fn hand_out_exactly(&mut self, block: BlockId, request: &Request, context: Option<Context>) -> DevicePtr {
        let split = self.blocks[block].bytes > request.rounded;
        self.hand_out_part(block, request, split, context)
    }

    #[inline]
    fn hand_out_part(&mut self, free: BlockId, request: &Request, split: bool, context: Option<Context>) -> DevicePtr {
        let List { free: list, small, .. } = &mut self.pools[self.blocks[free].list];
        let small = *small;
        let was_split = self.blocks.is_split(free);
        let before = self.blocks[free].bytes;
        let block = if split {
            // The front is handed out; what remains most often stays where it is in the list.
            let front = self.blocks.split_front(free, request.rounded);
            list.resized(&mut self.blocks, free, before);
            front
        } else {
            list.remove(&mut self.blocks, free);
            free
        };
        if !self.blocks[block].growing {
            let inactive = (&mut self.stats.inactive_split, &mut self.stats.inactive_split_bytes);
            match (split, was_split) {
                (true, true) => inactive.1.decrease(small, request.rounded),
                (true, false) => {
                    inactive.0.increase(small, 1);
                    inactive.1.increase(small, before - request.rounded);
                }
                (false, true) => {
                    inactive.0.decrease(small, 1);
                    inactive.1.decrease(small, before);
                }
                (false, false) => {}
            }
        }

        self.occupy(block, request, context)
    }

    /// Makes a block that is in no free list the program's.
    #[inline]
    fn occupy(&mut self, block: BlockId, request: &Request, context: Option<Context>) -> DevicePtr {
        let taken = &mut self.blocks[block];
        taken.born = self.clock;
        taken.state = BlockState::Allocated;
        taken.requested = request.bytes;
        let (address, bytes, list) = (taken.address, taken.bytes, taken.list);
        let small = self.pools[list].small;
        self.live.insert(address, block);
        let stats = &mut self.stats;
        stats.allocation.increase(small, 1);
        stats.allocated_bytes.increase(small, bytes);
        stats.active.increase(small, 1);
        stats.active_bytes.increase(small, bytes);
        stats.requested_bytes.increase(small, request.bytes);
        if bytes >= self.native.max_split_size {
            stats.oversize_allocations.increase(1);
            self.blocks[block].oversize = true;
        }
        if context.is_some() || self.tracing {
            self.remember_allocation(block, context);
        }
        DevicePtr(address)
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
        let fits = |block: &Block| {
            address >= block.address
                && (address - block.address).is_multiple_of(MIN_BLOCK)
                && (address - block.address).checked_add(request.rounded).is_some_and(|end| end <= block.bytes)
        };
        let list = &mut self.pools[request.list];
        list.requests += 1;
        let found = list.free.iter(&self.blocks).find(|&id| fits(&self.blocks[id]));
        let Some(block) = found else {
            return Err(Error::InvalidArgument(format!(
                "no {} bytes are free at {address:#x} for the pool and stream that asked: expected an address inside \
                 memory that the allocator holds and nobody uses, a multiple of {MIN_BLOCK} bytes from its start",
                request.rounded
            )));
        };
        self.populate_all_raw(self.blocks[block].segment, stream)?;
        let before = address - self.blocks[block].address;
        if before == 0 {
            return Ok(self.hand_out_exactly(block, &request, context));
        }
        // The bytes in front are handed out and given back: blocks are only ever cut at their front.
        let front = Request { bytes: before, rounded: before, ..request };
        let front = self.hand_out_exactly(block, &front, context.clone());
        let rest = self.blocks[self.find(front)?].next;
        let ptr = self.hand_out_exactly(rest, &request, context.clone());
        self.free(front, &mut context.clone());
        self.settle();
        Ok(ptr)
    }

    #[cold]
    fn remember_allocation(&mut self, block: BlockId, context: Option<Context>) {
        self.trace_block(Action::Alloc, block, context.clone());
        if let Some(context) = context {
            self.blocks[block].has_context = true;
            self.contexts.insert(block, context);
        }
    }

    /// Whether this address is a live allocation of this device. From now on only the books know of it: whoever asks is
    /// about to do what no thread's cache knows of.
    pub fn owns(&mut self, ptr: DevicePtr) -> bool {
        let Some(&block) = self.live.get(&ptr.0) else { return false };
        !self.blocks[block].thread.is_some() || self.reclaim(block)
    }

    /// What is known about a live allocation.
    ///
    /// # Errors
    /// [`Error::InvalidPointer`].
    pub fn allocation(&self, ptr: DevicePtr) -> Result<Allocation> {
        let block = &self.blocks[self.find(ptr)?];
        Ok(Allocation {
            device: self.device,
            block_bytes: block.bytes,
            requested_bytes: block.requested,
            stream: self.pools[block.list].stream,
        })
    }

    fn find(&self, ptr: DevicePtr) -> Result<BlockId> {
        self.live.get(&ptr.0).copied().ok_or(Error::InvalidPointer(ptr))
    }

    /// The program gives an allocation back. Answers false where it is not one of this device; the context is only taken
    /// where it is.
    ///
    /// A driver error while recording events does not fail the free: destructors cannot throw. The block stays
    /// unavailable until its events can be recorded.
    #[inline]
    pub fn free(&mut self, ptr: DevicePtr, context: &mut Option<Context>) -> bool {
        let Some(block) = self.live.remove(&ptr.0) else { return false };
        if self.blocks[block].thread.is_some() && !self.reclaim(block) {
            return false;
        }
        let context = context.take();
        if context.is_none() && self.may_park(block) && self.park(block) {
            return true;
        }
        self.end_allocation(block);
        let has_uses = self.blocks[block].has_uses;
        if self.tracing {
            self.trace_block(Action::FreeRequested, block, context.clone());
        }
        if !has_uses || !self.must_wait(block) {
            self.free_block(block, context);
        }
        true
    }

    /// Whether a freed block could serve this thread's next request without anybody noticing: nothing but its size and
    /// stream decides who gets it, and nobody wants to hear of it.
    fn may_park(&self, block: BlockId) -> bool {
        let Block { bytes, list, has_uses, has_context, oversize, has_marks, .. } = self.blocks[block];
        self.plain_rounding
            && !self.tracing
            && self.routes.is_empty()
            && !(has_uses || has_context || oversize || has_marks)
            && bytes < self.native.max_split_size
            && self.pools[list].pool == PoolId::DEFAULT
    }

    /// Leaves a freed block to this thread's next request of its size, if such requests are likely.
    fn park(&mut self, block: BlockId) -> bool {
        let Self { allocator, device, threads, blocks, pools, .. } = self;
        let Block { address, bytes, requested, list, .. } = blocks[block];
        let stream = pools[list].stream;
        let slot = |id: ThreadId| {
            blocks[block].thread = id;
            Slot {
                address,
                bytes,
                requested,
                stream,
                block,
                parked: true,
                rounds: 0,
                requested_again: 0,
                requested_before: 0,
            }
        };
        let register = |cache: &Arc<ThreadCache>| {
            let index = threads.iter().position(Option::is_none).unwrap_or(threads.len());
            let id = ThreadId::new(index)?;
            if index == threads.len() {
                threads.push(None);
            }
            threads[index] = Some(Arc::clone(cache));
            Some(id)
        };
        let (parked, left) = thread_cache::park(*allocator, *device, slot, register);
        if parked {
            self.live.insert(address, block);
        }
        if let Some(left) = left {
            self.leave_thread(&left);
        }
        parked
    }

    /// Brings the books up to date: what threads have parked is free, and what their caches did is counted.
    #[inline]
    pub fn settle(&mut self) {
        self.take_from_threads(false);
        self.merge_threads();
    }

    /// Counts what the threads' caches did; the blocks stay there.
    fn merge_threads(&mut self) {
        let Self { threads, blocks, pools, stats, clock, .. } = self;
        for cache in threads.iter().flatten() {
            cache.merge(|slot| merge_slot(slot, blocks, pools, stats, clock));
        }
    }

    /// Takes every block out of the threads' caches.
    fn empty_threads(&mut self) {
        self.take_from_threads(true);
    }

    /// Takes the parked blocks out of one thread's cache.
    #[inline]
    fn take_from(&mut self, thread: ThreadId) {
        let Some(Some(cache)) = self.threads.get(thread.index()) else { return };
        let mut taken = std::mem::take(&mut self.taken);
        cache.take(false, &mut taken);
        self.taken = taken;
        self.all_taken_leave();
    }

    /// Takes blocks out of the threads' caches: the parked ones, or all. Answers whether there were any.
    fn take_from_threads(&mut self, all: bool) -> bool {
        let mut taken = std::mem::take(&mut self.taken);
        for thread in &mut self.threads {
            if let Some(cache) = thread {
                let ended = cache.is_abandoned();
                cache.take(all || ended, &mut taken);
                if ended {
                    *thread = None;
                }
            }
        }
        self.taken = taken;
        self.all_taken_leave()
    }

    fn all_taken_leave(&mut self) -> bool {
        let mut taken = std::mem::take(&mut self.taken);
        let any = !taken.is_empty();
        for slot in taken.drain(..) {
            self.leave_thread(&slot);
        }
        self.taken = taken;
        any
    }

    /// Takes a block that the program names out of the cache it is in. False: the program has freed it already.
    #[cold]
    fn reclaim(&mut self, block: BlockId) -> bool {
        let Block { address, thread, .. } = self.blocks[block];
        let cache = self.threads.get(thread.index()).and_then(Option::as_ref);
        let slot = cache.and_then(|cache| cache.take_one(address));
        slot.is_none_or(|slot| {
            self.leave_thread(&slot);
            !slot.parked
        })
    }

    /// Takes a block out of the cache it is in, if it is the program's. No block is freed by that.
    fn take_live(&mut self, block: BlockId) -> bool {
        let Block { address, thread, .. } = self.blocks[block];
        let cache = self.threads.get(thread.index()).and_then(Option::as_ref);
        let slot = cache.and_then(|cache| cache.take_live(address));
        slot.inspect(|slot| self.leave_thread(slot)).is_some()
    }

    /// A block has left its thread's cache: the books learn what happened to it there.
    fn leave_thread(&mut self, slot: &Slot) {
        let Self { blocks, pools, stats, clock, .. } = self;
        merge_slot(slot, blocks, pools, stats, clock);
        blocks[slot.block].thread = ThreadId::NONE;
        if slot.parked {
            self.live.remove(&slot.address);
            self.end_allocation(slot.block);
            self.free_block(slot.block, None);
        }
    }

    /// Counts an allocation out. Its block is not free yet.
    #[inline]
    fn end_allocation(&mut self, block: BlockId) {
        if self.blocks[block].has_marks {
            self.moved_is_freed(block);
        }
        let Self { blocks, pools, stats, clock, .. } = self;
        let freed = &mut blocks[block];
        *clock += freed.bytes;
        let small = pools[freed.list].small;
        stats.allocation.decrease(small, 1);
        stats.allocated_bytes.decrease(small, freed.bytes);
        if freed.oversize {
            freed.oversize = false;
            stats.oversize_allocations.decrease(1);
        }
        freed.state = BlockState::Pending;
    }

    /// Whether a freed block that was recorded on other streams has to wait.
    #[cold]
    fn must_wait(&mut self, block: BlockId) -> bool {
        if self.capturing() {
            self.waits.defer(block);
            return true;
        }
        self.waits.freed(&*self.driver, block)
    }

    /// Frees a block that nothing uses any more, whole.
    fn free_block(&mut self, block: BlockId, context: Option<Context>) {
        self.retire(block, context);
        self.put_back(block);
    }

    /// Ends the use of a block: it is free, but not yet in a free list.
    #[inline]
    fn retire(&mut self, block: BlockId, context: Option<Context>) {
        if self.tracing {
            self.trace_block(Action::FreeCompleted, block, context);
        }
        let Self { blocks, pools, stats, contexts, waits, .. } = self;
        let freed = &mut blocks[block];
        let small = pools[freed.list].small;
        stats.active.decrease(small, 1);
        stats.active_bytes.decrease(small, freed.bytes);
        stats.requested_bytes.decrease(small, freed.requested);
        freed.requested = 0;
        if freed.has_context {
            freed.has_context = false;
            contexts.remove(&block);
        }
        if freed.has_uses {
            freed.has_uses = false;
            waits.forget(block);
        }
    }

    /// Puts a retired block into its free list, merged with its free neighbours.
    fn put_back(&mut self, block: BlockId) {
        let Self { blocks, pools, stats, segments, .. } = self;
        let freed = &mut blocks[block];
        let list = freed.list;
        let (segment, growing) = (freed.segment, freed.growing);
        let (prev, next) = (freed.prev, freed.next);
        freed.state = BlockState::Free;
        let List { free, small, requests, .. } = &mut pools[list];
        let small = *small;
        let is_free = |id: BlockId, blocks: &Blocks| id.is_some() && blocks[id].state == BlockState::Free;
        // How many free blocks, of how many bytes, the block now is one with.
        let (merged, gone, gone_bytes) = match (is_free(prev, blocks), is_free(next, blocks)) {
            (false, false) => {
                free.insert(blocks, block);
                (block, 0, 0)
            }
            (false, true) => {
                let before = blocks.merge_up(block, next);
                free.resized(blocks, next, before);
                (next, 1, before)
            }
            (true, upper) => {
                let mut upper_bytes = 0;
                if upper {
                    free.remove(blocks, next);
                    upper_bytes = blocks[next].bytes;
                    blocks.merge_down(next, block);
                }
                let before = blocks.merge_down(block, prev);
                free.resized(blocks, prev, before);
                if !blocks[prev].next.is_some() {
                    live_segment(segments, segment).last = prev;
                }
                (prev, 1 + u64::from(upper), before + upper_bytes)
            }
        };
        let split = blocks.is_split(merged);
        if !split {
            live_segment(segments, segment).free_since = *requests;
        }
        if !growing {
            stats.inactive_split.decrease(small, gone);
            stats.inactive_split_bytes.decrease(small, gone_bytes);
            if split {
                stats.inactive_split.increase(small, 1);
                stats.inactive_split_bytes.increase(small, blocks[merged].bytes);
            }
        }
    }

    /// The segment of a live allocation: its first byte and the bytes that its blocks fill.
    ///
    /// # Errors
    /// [`Error::InvalidPointer`].
    pub fn base_allocation(&self, ptr: DevicePtr) -> Result<(DevicePtr, u64)> {
        let segment = self.segment(self.blocks[self.find(ptr)?].segment);
        Ok((segment.base, segment.filled))
    }

    /// The IPC handle of an allocation's segment, and the allocation's offset in it in bytes.
    ///
    /// # Errors
    /// [`Error::NotSupported`] for managed memory; [`Error::InvalidPointer`]; the driver's.
    pub fn ipc_handle(&self, ptr: DevicePtr) -> Result<(IpcHandle, u64)> {
        let segment = self.segment(self.blocks[self.find(ptr)?].segment);
        if segment.memory == Memory::Managed {
            return Err(Error::NotSupported(
                "managed memory cannot be shared between processes: CUDA gives no IPC handles for it. \
                 Memory placed by uvm_access_pattern:device can be"
                    .into(),
            ));
        }
        let handle = self.driver.ipc_handle(self.device, segment.base)?;
        Ok((handle, ptr.0 - segment.base.0))
    }

    /// Notes a use on another stream.
    ///
    /// # Errors
    /// [`Error::InvalidPointer`].
    pub fn record_stream(&mut self, ptr: DevicePtr, device: DeviceIndex, stream: Stream) -> Result<()> {
        let block = self.find(ptr)?;
        // Uses on the allocation's own stream are ordered by the stream itself.
        if (device, stream) != (self.device, self.pools[self.blocks[block].list].stream) {
            // Only what really is captured needs no event afterwards; where CUDA does not say so, the event is recorded.
            let captured = !self.routes.is_empty() && self.driver.stream_is_capturing(device, stream).unwrap_or(false);
            self.waits.record_use(block, (device, stream), captured);
            self.blocks[block].has_uses = true;
        }
        Ok(())
    }

    /// Frees what has finished waiting.
    #[cold]
    fn process_events(&mut self) -> Result<()> {
        // Another device, or another thread, may be capturing.
        let _relaxed = Relaxed::enter(&self.driver)?;
        let mut done = std::mem::take(&mut self.done);
        self.waits.record_deferred(&*self.driver, &mut done);
        self.waits.poll(&*self.driver, &mut done);
        self.free_done(done);
        Ok(())
    }

    /// Waits for everything that frees wait for, in one pool or in all.
    fn synchronize_events(&mut self, pool: Option<PoolId>) {
        self.stats.num_sync_all_streams += 1;
        let mut done = std::mem::take(&mut self.done);
        let Self { waits, driver, blocks, pools, .. } = self;
        waits.retry_refused();
        waits.record_deferred(&**driver, &mut done);
        let which = |block: BlockId| pool.is_none_or(|pool| pools[blocks[block].list].pool == pool);
        waits.synchronize(&**driver, which, &mut done);
        self.free_done(done);
    }

    fn free_done(&mut self, mut done: Vec<BlockId>) {
        for block in done.drain(..) {
            self.free_block(block, None);
        }
        self.done = done;
    }

    #[inline]
    fn segment(&self, id: SegmentId) -> &Segment {
        self.segments[id.0 as usize].as_ref().expect("a SegmentId is only kept while its segment lives")
    }

    #[inline]
    fn segment_mut(&mut self, id: SegmentId) -> &mut Segment {
        live_segment(&mut self.segments, id)
    }

    /// Starts or stops the history.
    pub fn set_history(&mut self, recording: Recording) {
        self.empty_threads();
        if !recording.enabled || recording.clear {
            self.samples.clear();
        }
        self.history.configure(recording);
        self.tracing = self.history.enabled() || self.tracked;
    }

    /// Whether the history is kept.
    pub fn history_enabled(&self) -> bool {
        self.history.enabled()
    }

    /// Whether [`Hooks::trace`] is told of everything.
    pub fn set_tracking(&mut self, on: bool) {
        self.empty_threads();
        self.tracked = on;
        self.tracing = self.history.enabled() || self.tracked;
    }

    #[cold]
    fn trace_block(&mut self, action: Action, id: BlockId, context: Option<Context>) {
        let context = context.or_else(|| self.contexts.get(&id).cloned());
        self.trace_about(action, id, context, self.labels());
    }

    fn trace_about(&mut self, action: Action, id: BlockId, context: Option<Context>, labels: Labels) {
        let block = self.blocks[id];
        let list = &self.pools[block.list];
        let entry = TraceEntry {
            action,
            device: self.device,
            address: block.address,
            bytes: block.requested,
            stream: list.stream,
            time: 0,
            mempool: self.pools[list.pool].id,
            context,
            labels,
        };
        self.trace(entry);
    }

    fn trace_segment(&mut self, action: Action, id: SegmentId, address: u64, bytes: u64, context: Option<Context>) {
        let segment = self.segment(id);
        let list = &self.pools[segment.list];
        let entry = TraceEntry {
            action,
            device: self.device,
            address,
            bytes,
            stream: list.stream,
            time: 0,
            mempool: self.pools[list.pool].id,
            context: context.or_else(|| segment.context.clone()),
            labels: self.labels(),
        };
        self.trace(entry);
    }

    fn trace_event(&mut self, action: Action, address: u64, bytes: u64, stream: Stream, context: Option<Context>) {
        let entry = TraceEntry {
            action,
            device: self.device,
            address,
            bytes,
            stream,
            time: 0,
            mempool: DEFAULT_POOL,
            context,
            labels: self.labels(),
        };
        self.trace(entry);
    }

    fn labels(&self) -> Labels {
        Labels { compile_context: self.compile_contexts.last().cloned(), user_metadata: user_metadata() }
    }

    /// A compiled function begins; its name goes into the trace.
    pub fn push_compile_context(&mut self, name: &str) {
        self.compile_contexts.push(name.into());
    }

    /// The compiled function that began last has ended.
    pub fn pop_compile_context(&mut self) {
        self.compile_contexts.pop();
    }

    /// Notes something about a live allocation in the trace.
    ///
    /// # Errors
    /// [`Error::InvalidPointer`].
    pub fn annotate(&mut self, ptr: DevicePtr, metadata: &str) -> Result<()> {
        let id = self.find(ptr)?;
        let labels = Labels { user_metadata: Some(metadata.into()), ..self.labels() };
        self.trace_about(Action::Annotate, id, None, labels);
        Ok(())
    }

    /// The stack that made the live allocation which this address lies in, where one was gathered.
    pub fn context_of(&self, address: u64) -> Option<Context> {
        let block = self.live.get(&address).copied().or_else(|| self.allocated_around(address))?;
        self.contexts.get(&block).cloned()
    }

    /// The live allocation that this address lies inside of.
    fn allocated_around(&self, address: u64) -> Option<BlockId> {
        let inside = |start: u64, bytes: u64| (start..start + bytes).contains(&address);
        let segment = self
            .segments
            .iter()
            .position(|segment| segment.as_ref().is_some_and(|segment| inside(segment.base.0, segment.filled)))?;
        self.blocks_of(SegmentId(segment as u32)).into_iter().find(|&id| {
            let block = &self.blocks[id];
            block.state == BlockState::Allocated && inside(block.address, block.bytes)
        })
    }

    /// Keeps an entry and tells the trackers.
    fn trace(&mut self, mut entry: TraceEntry) {
        if !self.tracing {
            return;
        }
        entry.time = self.hooks.approximate_time();
        if !self.history.keeps_context() {
            entry.context = None;
        }
        if self.tracked {
            self.hooks.trace(&entry);
        }
        self.history.push(entry);
    }

    /// Checks that the books balance.
    ///
    /// # Errors
    /// What does not, in words.
    pub fn check(&self) -> std::result::Result<(), String> {
        snapshot::check(self)
    }
}
