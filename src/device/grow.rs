//! Memory from CUDA and back to it: growing and making segments, giving cached ones back, running out.
//!
//! All of it may run while some stream captures, so it runs in relaxed capture mode (see [`Driver`]). Whatever
//! fails half-way is undone before the error is reported: the books change only when CUDA has agreed.

use super::{DeviceState, Request};
use crate::blocks::{Block, BlockId, BlockState, ListId};
use crate::budget::{Exceeded, MemoryInfo};
use crate::driver::{CaptureMode, DevicePtr, Driver, DriverError, ErrorKind, Range, Stream};
use crate::error::{Error, Limit, OutOfMemory, Result};
use crate::history::{Action, Context};
use crate::options::AccessPattern;
use crate::pages::{self, Marks, PAGE};
use crate::placement;
use crate::pools::{DEFAULT_POOL, MempoolId, PoolId};
use crate::segments::{Memory, Place, SMALL_STEP, Segment, SegmentId, population_step, range_bytes};
use crate::stats::StatArray;
use std::sync::Arc;

/// Requests from here on are refused without asking anyone (c10's limit: one exbibyte).
pub const REQUEST_LIMIT: u64 = 1 << 60;

/// Where a growing segment can be populated further for a request.
#[derive(Clone, Copy)]
struct Growth {
    segment: SegmentId,
    /// In this hole; else at its end.
    hole: Option<BlockId>,
    /// How many bytes the request needs there.
    missing: u64,
    /// Where, in bytes from the segment's start.
    offset: u64,
    /// How many bytes can be populated there.
    room: u64,
}

/// Memory, or why there is none.
type Obtained = std::result::Result<BlockId, Exceeded>;

/// Relaxed capture mode for this thread, until dropped.
pub(super) struct Relaxed {
    driver: Arc<dyn Driver>,
    before: CaptureMode,
}

impl Relaxed {
    pub(super) fn enter(driver: &Arc<dyn Driver>) -> Result<Self> {
        let before = driver.exchange_capture_mode(CaptureMode::Relaxed)?;
        Ok(Self { driver: Arc::clone(driver), before })
    }
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        if let Err(error) = self.driver.exchange_capture_mode(self.before) {
            tracing::error!(%error, "the thread's stream capture mode could not be restored");
        }
    }
}

impl DeviceState {
    /// Serves a request that the cache could not: from new memory, if need be after giving cached memory back.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when a limit is met all the same; the driver's.
    pub fn allocate_new(&mut self, bytes: u64, stream: Stream, mut context: Option<Context>) -> Result<DevicePtr> {
        // Others may have changed everything while the lock was not held.
        let request = match self.allocate_cached(bytes, stream, &mut context)? {
            Ok(ptr) => return Ok(ptr),
            Err(request) => request,
        };
        let relaxed = Relaxed::enter(&self.driver)?;
        let obtained = self.obtain(&request, &context);
        drop(relaxed);
        match obtained? {
            Ok(block) => self.hand_out(block, &request, context),
            Err(exceeded) => Err(self.out_of_memory(&request, exceeded, context)),
        }
    }

    /// A request that no machine can serve: counted and reported, and nothing is given back for it.
    pub fn refuse(&mut self, bytes: u64, stream: Stream, context: Option<Context>) -> Error {
        let list = self.pools.list_for(PoolId::DEFAULT, REQUEST_LIMIT, stream);
        let request = Request { bytes, rounded: bytes.min(u64::MAX - SMALL_STEP), stream, list };
        let exceeded = self.budget.capacity(&self.populated, None);
        self.out_of_memory(&request, exceeded, context)
    }

    fn obtain(&mut self, request: &Request, context: &Option<Context>) -> Result<Obtained> {
        self.collect_garbage(context);
        let Err(mut exceeded) = self.new_memory(request, context)? else {
            return Ok(self.best_fit(request).ok_or(self.nothing_left()));
        };
        if !self.capturing() {
            // What CUDA does not take back is only told where the rest is not enough.
            let mut released = Ok(());
            match self.release_oversize(request, context) {
                Ok(false) => {}
                Ok(true) => {
                    if self.new_memory(request, context)?.is_ok() {
                        return Ok(self.best_fit(request).ok_or(self.nothing_left()));
                    }
                }
                Err(error) => released = Err(error),
            }
            let before = self.populated.total();
            released = released.and(self.release_cached(DEFAULT_POOL, context));
            let given_back = before - self.populated.total();
            self.places.hard_reclamations += 1;
            self.places.reclaimed += given_back;
            tracing::debug!(device = self.device, bytes = given_back, "all caches were given back at a limit");
            self.stats.num_alloc_retries += 1;
            // Waiting for events may have freed enough in partly used segments.
            if let Some(block) = self.best_fit(request) {
                return Ok(Ok(block));
            }
            match self.new_memory(request, context)? {
                Ok(()) => return Ok(self.best_fit(request).ok_or(self.nothing_left())),
                Err(again) => exceeded = again,
            }
            if let Some(block) = self.borrow(request) {
                return Ok(Ok(block));
            }
            return released.map(|()| Err(exceeded));
        }
        Ok(self.borrow(request).ok_or(exceeded))
    }

    /// CUDA, or a MemPool's own allocator, had no memory. Also what it would mean if memory just made could not be found in
    /// its list: out of memory, not a crash.
    fn nothing_left(&self) -> Exceeded {
        Exceeded { limit: Limit::Device, capacity: self.budget.capacity(&self.populated, None).capacity }
    }

    /// Sorts a driver error into "no memory", which caches may mend, and the rest.
    fn shortage<T>(&self, error: DriverError) -> Result<std::result::Result<T, Exceeded>> {
        match error.kind {
            ErrorKind::OutOfMemory => Ok(Err(self.nothing_left())),
            _ => Err(error.into()),
        }
    }

    /// A free block of a pool that lends to others before they run out (`use_on_oom`).
    fn borrow(&mut self, request: &Request) -> Option<BlockId> {
        if self.pools[request.list].pool != PoolId::DEFAULT {
            return None;
        }
        let lenders: Vec<PoolId> = self.pools.ids().filter(|&pool| self.pools[pool].use_on_oom).collect();
        lenders.into_iter().find_map(|pool| {
            let list = self.pools.list_for(pool, request.rounded, request.stream);
            self.best_fit(&Request { list, ..*request })
        })
    }

    /// Puts a free block that fits the request into its list: grows a segment, or makes one.
    fn new_memory(
        &mut self,
        request: &Request,
        context: &Option<Context>,
    ) -> Result<std::result::Result<(), Exceeded>> {
        if request.rounded >= REQUEST_LIMIT {
            return Ok(Err(self.budget.capacity(&self.populated, None)));
        }
        let custom = self.pools[self.pools[request.list].pool].custom;
        let step = population_step(request.rounded, request.rounded, 0, &self.native);
        let pattern = self.pools[self.pools[request.list].pool].placement.unwrap_or(self.options.access_pattern);
        if let Some(custom) = custom {
            return self.fixed_segment(request, Memory::Custom(custom), Place::Unplaced, step, context);
        }
        let limit = self.budget.device_limit();
        match pattern {
            AccessPattern::GpuFirst => {
                self.relieve(step, request, context);
                self.note_pressure(step);
                let excess = self.populated.device.saturating_add(step).saturating_sub(limit);
                // What will not fit on the device whatever moves out is placed in host memory at once.
                if excess > 0 && step <= limit {
                    self.make_room(excess, request.stream);
                }
            }
            AccessPattern::Device => self.relieve(step, request, context),
            AccessPattern::Balanced | AccessPattern::CpuFirst => {}
        }
        let plan = placement::plan(pattern, self.populated.device, step, limit);
        // A private pool lives as long as its graphs and is brought back to checkpoints segment by segment; what PyTorch knows
        // of it, it knows of segments like `native`'s.
        let private = self.pools[request.list].pool != PoolId::DEFAULT && !self.native.expandable_segments;
        if plan.memory == Memory::Device || private || request.rounded >= self.native.max_split_size {
            let made = self.fixed_segment(request, plan.memory, plan.place, step, context)?;
            return Ok(made.inspect(|()| self.note_overflow(pattern, plan.place)));
        }
        let grows = match (self.hole_that_fits(request, plan.place), self.segment_with_room(request, plan.place)) {
            (Some(hole), Some(end)) => Some(if hole.missing <= end.missing { hole } else { end }),
            (hole, end) => hole.or(end),
        };
        let (step, missing) = match &grows {
            Some(Growth { missing, offset, room, .. }) => {
                (population_step(request.rounded, *missing, *offset, &self.native).min(*room), *missing)
            }
            None => (step, request.rounded),
        };
        let populate = |state: &mut Self, bytes| match grows {
            Some(Growth { segment, hole: None, .. }) => state.grow(segment, bytes, request, context),
            Some(Growth { hole: Some(hole), .. }) => state.fill_hole(hole, bytes, request, context),
            None => state.growing_segment(request, plan.place, bytes, context),
        };
        // Close to a limit the step may be too much where the request itself is not.
        let least = missing.next_multiple_of(SMALL_STEP);
        let populated = match populate(self, step)? {
            Err(_) if least < step => populate(self, least)?,
            populated => populated,
        };
        Ok(populated.inspect(|()| self.note_overflow(pattern, plan.place)))
    }

    /// Notes that new memory was placed somewhere: in the host because there was no room on the device?
    fn note_overflow(&mut self, pattern: AccessPattern, place: Place) {
        if pattern == AccessPattern::GpuFirst && place == Place::Host {
            self.movers.grew(self.clock, self.budget.device_limit());
        }
    }

    /// The growing segment of the request's list that lacks least at its end.
    fn segment_with_room(&self, request: &Request, place: Place) -> Option<Growth> {
        self.growing
            .get(&request.list)?
            .iter()
            .map(|&id| {
                let segment = self.segment(id);
                let last = &self.blocks[segment.last];
                let tail = if last.state == BlockState::Free { last.bytes } else { 0 };
                let missing = request.rounded.saturating_sub(tail);
                Growth { segment: id, hole: None, missing, offset: segment.filled, room: segment.room() }
            })
            .filter(|growth| self.segment(growth.segment).place == place)
            .filter(|growth| growth.missing > 0 && growth.missing <= growth.room)
            .min_by_key(|growth| growth.missing)
    }

    /// The hole in a growing segment of the request's list that would serve it, with the free memory on both sides, for
    /// the fewest bytes.
    fn hole_that_fits(&self, request: &Request, place: Place) -> Option<Growth> {
        let with_holes = self.growing.get(&request.list)?.iter().copied().filter(|&id| {
            let segment = self.segment(id);
            segment.vacant > 0 && segment.place == place
        });
        let free = |id: BlockId| match id {
            BlockId::NONE => 0,
            id if self.blocks[id].state == BlockState::Free => self.blocks[id].bytes,
            _ => 0,
        };
        with_holes
            .flat_map(|id| self.blocks_of(id).into_iter().map(move |block| (id, block)))
            .filter(|&(_, block)| self.blocks[block].state == BlockState::Vacant)
            .filter_map(|(segment, hole)| {
                let Block { address, bytes: room, prev, next, .. } = self.blocks[hole];
                // Populated from its start.
                let missing = request.rounded.saturating_sub(free(prev));
                let fits = missing > 0 && missing <= room + free(next);
                let offset = address - self.segment(segment).base.0;
                fits.then_some(Growth { segment, hole: Some(hole), missing: missing.min(room), offset, room })
            })
            .min_by_key(|growth| growth.missing)
    }

    /// Whether the limits allow `bytes` more in `place`.
    fn admit(&mut self, place: Place, bytes: u64) -> Result<std::result::Result<(), Exceeded>> {
        let mut host = None;
        if self.budget.needs_host(&self.populated, place, bytes) {
            let now = self.driver.host_memory()?;
            self.budget.observe(&self.populated, &now);
            host = Some(now);
        }
        Ok(self.budget.admit(&self.populated, place, bytes, host.as_ref()))
    }

    /// Populates the next `bytes` of a growing segment.
    fn grow(
        &mut self,
        id: SegmentId,
        bytes: u64,
        request: &Request,
        context: &Option<Context>,
    ) -> Result<std::result::Result<(), Exceeded>> {
        let segment = self.segment(id);
        let (place, last, list) = (segment.place, segment.last, segment.list);
        let start = segment.base.offset(segment.filled);
        let discarded = segment.discarded_end() > 0;
        if let Err(exceeded) = self.admit(place, bytes)? {
            return Ok(Err(exceeded));
        }
        if let Err(error) = self.populate(Range { ptr: start, bytes }, place, discarded, request) {
            return self.shortage(error);
        }
        self.segment_mut(id).filled += bytes;
        self.count_populated(place, bytes);
        if self.blocks[last].state == BlockState::Free {
            let free = &mut self.pools[list].free;
            free.remove(&mut self.blocks, last);
            self.blocks[last].bytes += bytes;
            free.insert(&mut self.blocks, last);
        } else {
            let tail = self.blocks.create(start.0, bytes, (id, true), list, (last, BlockId::NONE));
            self.segment_mut(id).last = tail;
            self.pools[list].free.insert(&mut self.blocks, tail);
        }
        self.count_reserved(list, bytes);
        let tail = self.segment(id).last;
        self.blocks[tail].has_marks |= self.is_marked(tail);
        self.trace_segment(Action::SegmentMap, id, start.0, bytes, context.clone());
        Ok(Ok(()))
    }

    /// Populates the first `bytes` of a hole.
    fn fill_hole(
        &mut self,
        hole: BlockId,
        bytes: u64,
        request: &Request,
        context: &Option<Context>,
    ) -> Result<std::result::Result<(), Exceeded>> {
        let Block { address, bytes: hole_bytes, segment: id, list, .. } = self.blocks[hole];
        let place = self.segment(id).place;
        if let Err(exceeded) = self.admit(place, bytes)? {
            return Ok(Err(exceeded));
        }
        if let Err(error) = self.populate(Range { ptr: DevicePtr(address), bytes }, place, true, request) {
            return self.shortage(error);
        }
        let filled = if bytes < hole_bytes { self.blocks.split_front(hole, bytes) } else { hole };
        self.blocks[filled].has_marks |= self.is_marked(filled);
        self.put_back(filled);
        self.segment_mut(id).vacant -= bytes;
        self.count_populated(place, bytes);
        self.count_reserved(list, bytes);
        self.trace_segment(Action::SegmentMap, id, address, bytes, context.clone());
        Ok(Ok(()))
    }

    /// Makes a growing segment and populates its first `bytes`.
    fn growing_segment(
        &mut self,
        request: &Request,
        place: Place,
        bytes: u64,
        context: &Option<Context>,
    ) -> Result<std::result::Result<(), Exceeded>> {
        if let Err(exceeded) = self.admit(place, bytes)? {
            return Ok(Err(exceeded));
        }
        let shrinks = placement::can_shrink(place, &self.info, &self.options);
        let range = range_bytes(request.rounded, shrinks.then_some(self.info.total_memory));
        let base = match self.managed_range(range, bytes, place, request) {
            Ok(base) => base,
            Err(error) => return self.shortage(error),
        };
        self.add_segment(request, base, (range, bytes), (true, Memory::Managed, place), context);
        Ok(Ok(()))
    }

    /// Makes a segment that is populated whole and does not grow.
    fn fixed_segment(
        &mut self,
        request: &Request,
        memory: Memory,
        place: Place,
        bytes: u64,
        context: &Option<Context>,
    ) -> Result<std::result::Result<(), Exceeded>> {
        if let Err(exceeded) = self.admit(place, bytes)? {
            return Ok(Err(exceeded));
        }
        let made = match memory {
            Memory::Managed => self.managed_range(bytes, bytes, place, request),
            Memory::Device => self.driver.alloc_device(self.device, bytes),
            Memory::Custom(custom) => match self.hooks.custom_alloc(custom, bytes) {
                Some(base) => Ok(base),
                None => return Ok(Err(self.nothing_left())),
            },
        };
        let base = match made {
            Ok(base) => base,
            Err(error) => return self.shortage(error),
        };
        self.add_segment(request, base, (bytes, bytes), (false, memory, place), context);
        Ok(Ok(()))
    }

    /// Managed address space with its advice, the first `populate` bytes populated; all of it or nothing.
    fn managed_range(
        &mut self,
        bytes: u64,
        populate: u64,
        place: Place,
        request: &Request,
    ) -> crate::driver::Result<DevicePtr> {
        let base = self.driver.alloc_managed(self.device, bytes)?;
        let range = Range { ptr: base, bytes };
        let prepared = placement::advice(place, self.device, &self.info)
            .into_iter()
            .try_for_each(|advice| self.driver.advise(self.device, range, advice))
            .and_then(|()| self.populate(Range { ptr: base, bytes: populate }, place, false, request));
        if let Err(error) = prepared {
            self.abandon(base);
            return Err(error);
        }
        Ok(base)
    }

    /// Populates a range ahead of its use, in the order of the requesting stream where that is legal. One that was
    /// discarded is populated whatever the options say now.
    fn populate(
        &mut self,
        range: Range,
        place: Place,
        discarded: bool,
        request: &Request,
    ) -> crate::driver::Result<()> {
        let to = if discarded {
            placement::home(place, self.device, &self.info)
        } else {
            placement::population(place, self.device, &self.info, &self.options, request.bytes)
        };
        let Some(to) = to else {
            return Ok(());
        };
        let driver = Arc::clone(&self.driver);
        if !self.captures_now(request.stream)? {
            return driver.prefetch(self.device, range, to, request.stream);
        }
        let side = self.side_stream()?;
        driver.prefetch(self.device, range, to, side)?;
        driver.stream_synchronize(self.device, side)
    }

    /// The stream for what cannot run on the program's.
    pub(super) fn side_stream(&mut self) -> crate::driver::Result<Stream> {
        match self.side_stream {
            Some(side) => Ok(side),
            None => Ok(*self.side_stream.insert(self.driver.stream_create(self.device)?)),
        }
    }

    /// Gives an unused address range back. One that CUDA will not take now is tried again later.
    fn abandon(&mut self, base: DevicePtr) {
        if let Err(error) = self.driver.free(self.device, base) {
            tracing::warn!(device = self.device, ?base, %error, "an unused range is kept until CUDA takes it back");
            self.orphans.push(base);
        }
    }

    fn add_segment(
        &mut self,
        request: &Request,
        base: DevicePtr,
        (range_bytes, populated): (u64, u64),
        (growing, memory, place): (bool, Memory, Place),
        context: &Option<Context>,
    ) {
        let list = request.list;
        let slot = self.segments.iter().position(Option::is_none).unwrap_or_else(|| {
            self.segments.push(None);
            self.segments.len() - 1
        });
        let id = SegmentId(slot as u32);
        let oversize = !growing && populated >= self.native.max_split_size;
        let block = self.blocks.create(base.0, populated, (id, growing), list, (BlockId::NONE, BlockId::NONE));
        self.segments[slot] = Some(Segment {
            base,
            range_bytes,
            filled: populated,
            vacant: 0,
            discarded: 0,
            growing,
            memory,
            place,
            oversize,
            list,
            last: block,
            free_since: self.pools[list].requests,
            marks: Marks::default(),
            // `state` asks for the stacks of live allocations only, and a segment is none.
            context: context.clone().filter(|_| self.history.keeps_context()),
        });
        self.blocks[block].has_marks = self.is_marked(block);
        self.pools[list].free.insert(&mut self.blocks, block);
        let pool = self.pools[list].pool;
        self.pools[pool].segments += 1;
        self.count_populated(place, populated);
        self.count_reserved(list, populated);
        if growing {
            self.growing.entry(list).or_default().push(id);
        } else {
            self.stats.segment.increase(self.pools[list].small, 1);
            if oversize {
                self.stats.oversize_segments.increase(1);
            }
        }
        let action = if growing { Action::SegmentMap } else { Action::SegmentAlloc };
        self.trace_segment(action, id, base.0, populated, context.clone());
    }

    fn count_reserved(&mut self, list: ListId, bytes: u64) {
        let small = self.pools[list].small;
        self.stats.reserved_bytes.increase(small, bytes);
        if let Some(of_pool) = self.reserved_by_pool(list) {
            of_pool.increase(small, bytes);
        }
        self.stats.num_device_alloc += 1;
    }

    fn count_unreserved(&mut self, list: ListId, bytes: u64) {
        let small = self.pools[list].small;
        self.stats.reserved_bytes.decrease(small, bytes);
        if let Some(of_pool) = self.reserved_by_pool(list) {
            of_pool.decrease(small, bytes);
        }
        self.stats.num_device_free += 1;
    }

    /// The statistic of the private pool that a list belongs to; the default pool has none of its own.
    fn reserved_by_pool(&mut self, list: ListId) -> Option<&mut StatArray> {
        let pool = self.pools[list].pool;
        (pool != PoolId::DEFAULT).then(|| self.pool_reserved.entry(self.pools[pool].id).or_default())
    }

    /// Gives one wholly free segment back to CUDA.
    fn release_segment(&mut self, id: SegmentId, context: &Option<Context>) -> Result<()> {
        let Segment { base, list, growing, memory, oversize, .. } = *self.segment(id);
        let populated = self.segment(id).populated();
        let (freed, kept) = if growing {
            (Action::SegmentUnmap, Action::SegmentMap)
        } else {
            (Action::SegmentFree, Action::SegmentAlloc)
        };
        // All of it free, with holes or without.
        let blocks = self.blocks_of(id);
        let parts: Vec<(u64, u64)> = blocks
            .iter()
            .map(|&block| &self.blocks[block])
            .filter(|block| block.state == BlockState::Free)
            .map(|block| (block.address, block.bytes))
            .collect();
        // Trackers (NCCL's registrations) must let go of the memory before it goes.
        for &(address, bytes) in &parts {
            self.trace_segment(freed, id, address, bytes, context.clone());
        }
        if let Err(error) = self.give_back(memory, base) {
            for &(address, bytes) in &parts {
                self.trace_segment(kept, id, address, bytes, context.clone());
            }
            return Err(error.into());
        }
        for block in blocks.into_iter().rev() {
            if self.blocks[block].state == BlockState::Free {
                self.pools[list].free.remove(&mut self.blocks, block);
            }
            self.blocks.discard(block);
        }
        self.count_gone(id);
        let (small, pool) = (self.pools[list].small, self.pools[list].pool);
        self.pools[pool].segments -= 1;
        self.count_unreserved(list, populated);
        if growing {
            if let Some(ids) = self.growing.get_mut(&list) {
                ids.retain(|&other| other != id);
                if ids.is_empty() {
                    self.growing.remove(&list);
                }
            }
        } else {
            self.stats.segment.decrease(small, 1);
            if oversize {
                self.stats.oversize_segments.decrease(1);
            }
        }
        self.segments[id.0 as usize] = None;
        Ok(())
    }

    fn give_back(&self, memory: Memory, base: DevicePtr) -> crate::driver::Result<()> {
        match memory {
            Memory::Custom(custom) if self.hooks.custom_free(custom, base) => Ok(()),
            _ => self.driver.free(self.device, base),
        }
    }

    /// The wholly free segments of a pool, with their populated bytes.
    fn releasable(&self, pool: PoolId) -> Vec<(SegmentId, u64)> {
        let whole = self
            .pools
            .lists_of(pool)
            .flat_map(|list| self.pools[list].free.iter(&self.blocks))
            .filter(|&block| !self.blocks.is_split(block))
            .map(|block| self.blocks[block].segment);
        let with_holes = self.growing_of(pool).filter(|&id| self.segment(id).vacant > 0 && !self.in_use(id));
        whole.chain(with_holes).map(|id| (id, self.segment(id).populated())).collect()
    }

    /// The growing segments of a pool.
    fn growing_of(&self, pool: PoolId) -> impl Iterator<Item = SegmentId> + '_ {
        self.pools.lists_of(pool).filter_map(|list| self.growing.get(&list)).flatten().copied()
    }

    /// Whether the program, or a stream, still uses some of a segment.
    fn in_use(&self, id: SegmentId) -> bool {
        let used = |state| matches!(state, BlockState::Allocated | BlockState::Pending);
        self.blocks_of(id).into_iter().any(|block| used(self.blocks[block].state))
    }

    /// The free pages of a pool that can be given back alone, since their segments are in use otherwise: their blocks, and
    /// how many bytes of each.
    fn vacatable(&self, pool: PoolId) -> Vec<(BlockId, u64)> {
        self.growing_of(pool)
            .filter(|&id| placement::can_shrink(self.segment(id).place, &self.info, &self.options) && self.in_use(id))
            .flat_map(|id| self.blocks_of(id))
            .filter(|&block| self.blocks[block].state == BlockState::Free)
            .map(|block| (block, self.pages_at_home(block).iter().map(pages::bytes).sum()))
            .filter(|&(_, bytes)| bytes > 0)
            .collect()
    }

    /// The whole pages inside a block of a growing segment that lie where the segment's place says, and have its advice:
    /// runs of them, lowest first.
    fn pages_at_home(&self, block: BlockId) -> Vec<std::ops::Range<u64>> {
        let Block { address, bytes, segment, has_marks, .. } = self.blocks[block];
        let segment = self.segment(segment);
        let whole = pages::inside(address - segment.base.0, bytes);
        if !has_marks {
            return if whole.is_empty() { Vec::new() } else { vec![whole] };
        }
        let marks = &segment.marks;
        let special = |page| [&marks.away, &marks.resettled, &marks.advised].iter().any(|set| set.contains(page));
        pages::runs(whole, |page| !special(page))
    }

    /// Gives the whole pages of free blocks back; an error does not keep the others.
    fn vacate_all(&mut self, free: Vec<(BlockId, u64)>, context: &Option<Context>) -> Result<()> {
        if free.is_empty() {
            return Ok(());
        }
        self.wait_for_device()?;
        let mut first = Ok(());
        for (block, _) in free {
            let vacated = self.vacate_block(block, context);
            first = first.and(vacated);
        }
        first
    }

    fn vacate_block(&mut self, mut block: BlockId, context: &Option<Context>) -> Result<()> {
        // What is left of the block is below: the next run lies in it.
        for run in self.pages_at_home(block).into_iter().rev() {
            block = self.vacate(block, run, context)?;
        }
        Ok(())
    }

    /// Waits for all work on the device. Making and freeing an empty range takes microseconds, and waits also where some
    /// stream captures, which synchronising the device would spoil; and the program may have destroyed the streams that used
    /// cached memory.
    fn wait_for_device(&mut self) -> crate::driver::Result<()> {
        let empty = self.driver.alloc_managed(self.device, SMALL_STEP)?;
        let freed = self.driver.free(self.device, empty);
        if freed.is_err() {
            self.orphans.push(empty);
        }
        freed
    }

    /// Gives pages of a free block back that no stream uses any more: discards them. The address space stays, as a hole or
    /// beyond the segment's end, and is populated as if it were new before it is used again. Answers the block that is left
    /// below them.
    fn vacate(&mut self, block: BlockId, pages: std::ops::Range<u64>, context: &Option<Context>) -> Result<BlockId> {
        let Block { address, bytes: block_bytes, segment: id, list, .. } = self.blocks[block];
        let start = self.segment(id).base.offset(pages.start * PAGE);
        let (before, bytes) = (start.0 - address, pages::bytes(&pages));
        // As before a whole segment goes.
        self.trace_segment(Action::SegmentUnmap, id, start.0, bytes, context.clone());
        let mut queued = false;
        let discarded = self.side_stream().and_then(|side| {
            self.driver.discard(self.device, Range { ptr: start, bytes }, side)?;
            queued = true;
            // Whatever stream populates and uses these bytes next comes after.
            self.driver.stream_synchronize(self.device, side)
        });
        if let Err(error) = discarded {
            if queued {
                self.segment_mut(id).marks.raw.insert(pages);
                self.blocks[block].has_marks = true;
            }
            self.trace_segment(Action::SegmentMap, id, start.0, bytes, context.clone());
            return Err(error.into());
        }

        self.places.discarded += bytes;
        self.segment_mut(id).marks.raw.remove(pages);
        let free = &mut self.pools[list].free;
        free.remove(&mut self.blocks, block);
        let mut below = BlockId::NONE;
        if before > 0 {
            below = self.blocks.split_front(block, before);
            free.insert(&mut self.blocks, below);
        }
        let mut hole = block;
        if before + bytes < block_bytes {
            hole = self.blocks.split_front(block, bytes);
            free.insert(&mut self.blocks, block);
        }
        self.blocks[hole].state = BlockState::Vacant;
        let Block { prev, next, .. } = self.blocks[hole];
        let vacant = |id: BlockId, state: &Self| id.is_some() && state.blocks[id].state == BlockState::Vacant;
        if vacant(next, self) {
            self.blocks.merge_up(hole, next);
            hole = next;
        }
        if vacant(prev, self) {
            self.blocks.merge_down(hole, prev);
            hole = prev;
        }
        let Block { bytes: hole_bytes, prev, next, .. } = self.blocks[hole];
        let at_end = !next.is_some();
        if at_end {
            self.blocks.discard(hole);
        }
        let place = self.segment(id).place;
        let segment = self.segment_mut(id);
        segment.vacant += bytes;
        if at_end {
            segment.discarded = segment.discarded.max(segment.filled);
            segment.filled -= hole_bytes;
            segment.vacant -= hole_bytes;
            segment.last = prev;
        }
        self.count_unpopulated(place, bytes);
        self.count_unreserved(list, bytes);
        Ok(below)
    }

    /// Gives segments back one after the other; an error does not keep the others.
    fn release_all(&mut self, segments: Vec<(SegmentId, u64)>, context: &Option<Context>) -> Result<()> {
        let mut first = Ok(());
        for (id, _) in segments {
            let released = self.release_segment(id, context);
            first = first.and(released);
        }
        first
    }

    /// Gives what is free in a pool back: wholly free segments, and the free pages of others.
    fn release_free(&mut self, pool: PoolId, context: &Option<Context>) -> Result<()> {
        let released = self.release_all(self.releasable(pool), context);
        released.and(self.vacate_all(self.vacatable(pool), context))
    }

    /// Gives all wholly free segments back, and the free pages of others: those of the default pool and of pools that nobody
    /// holds, or only those of one such pool. Nothing while a CUDA graph is captured, as `native`: giving memory back waits
    /// for the device. Where the device is ample then, live memory that was moved out comes back.
    ///
    /// # Errors
    /// The driver's.
    pub fn release_cached(&mut self, mempool: MempoolId, context: &Option<Context>) -> Result<()> {
        let freeable: Vec<PoolId> = self
            .pools
            .ids()
            .filter(|&pool| pool != PoolId::DEFAULT && self.pools[pool].use_count == 0)
            .filter(|&pool| mempool == DEFAULT_POOL || self.pools[pool].id == mempool)
            .collect();
        if mempool != DEFAULT_POOL && freeable.is_empty() {
            return Ok(());
        }
        if self.capturing() {
            tracing::debug!(device = self.device, "cached memory is kept while a graph is captured");
            return Ok(());
        }
        // No stream of this device captures, but one of another may.
        let _relaxed = Relaxed::enter(&self.driver)?;
        let mut first = Ok(());
        if mempool == DEFAULT_POOL {
            self.synchronize_events(None);
            let released = self.release_free(PoolId::DEFAULT, context);
            first = first.and(released);
        }
        for pool in freeable {
            if mempool != DEFAULT_POOL {
                self.synchronize_events(Some(pool));
            }
            let released = self.release_free(pool, context);
            first = first.and(released);
            if self.pools[pool].segments == 0 {
                self.hooks.pool_forgotten(self.device, self.pools[pool].id);
                self.pools.forget(pool);
            }
        }
        for orphan in std::mem::take(&mut self.orphans) {
            self.abandon(orphan);
        }
        self.note_pressure(0);
        if mempool == DEFAULT_POOL {
            first = first.and(self.bring_back());
        }
        first
    }

    /// Stage 1 of reclamation: when the device is nearly full, wholly free segments on it are given back before it is
    /// populated further for a request, then the free pages of others.
    fn relieve(&mut self, bytes: u64, request: &Request, context: &Option<Context>) {
        let before = self.populated.device;
        if let Err(error) = self.give_back_on_device(bytes, request, context) {
            // The request may do without.
            tracing::warn!(device = self.device, %error, "cached memory could not be given back");
        }
        let given_back = before - self.populated.device;
        if given_back > 0 {
            self.places.light_reclamations += 1;
            self.places.reclaimed += given_back;
            tracing::debug!(device = self.device, bytes = given_back, "cached memory was given back");
        }
    }

    fn give_back_on_device(&mut self, bytes: u64, request: &Request, context: &Option<Context>) -> Result<()> {
        let limit = self.budget.device_limit();
        let keep = self.pressure.margin(limit, self.keep_free());
        let wanted = self.populated.device.saturating_add(bytes).saturating_add(keep);
        if wanted <= limit || self.options.access_pattern == AccessPattern::Device || self.capturing() {
            return Ok(());
        }
        let mut excess = (wanted - limit).min(bytes);
        let on_device: Vec<_> = self
            .releasable(PoolId::DEFAULT)
            .into_iter()
            .map(|(id, _)| (id, self.segment(id).populated_in(Place::Device)))
            .filter(|&(_, bytes)| bytes > 0)
            .collect();
        let mut first = Ok(());
        for (id, bytes) in on_device {
            if excess == 0 {
                break;
            }
            match self.release_segment(id, context) {
                Ok(()) => excess = excess.saturating_sub(bytes),
                Err(error) => first = first.and(Err(error)),
            }
        }
        if excess == 0 {
            return first;
        }
        let mut pages = self.vacatable(PoolId::DEFAULT);
        // Those of the request's own list would only be populated again for it.
        pages.retain(|&(block, bytes)| {
            let taken = excess > 0 && self.blocks[block].list != request.list;
            excess = excess.saturating_sub(if taken { bytes } else { 0 });
            taken
        });
        first.and(self.vacate_all(pages, context))
    }

    /// `max_split_size_mb`: gives oversize segments back until the request would fit in their place. Answers
    /// whether enough was given back.
    fn release_oversize(&mut self, request: &Request, context: &Option<Context>) -> Result<bool> {
        let max_split = self.native.max_split_size;
        if max_split == u64::MAX {
            return Ok(false);
        }
        let wanted = request.rounded.max(max_split);
        let mut oversize: Vec<_> = self.pools[request.list]
            .free
            .iter(&self.blocks)
            .filter(|&block| !self.blocks.is_split(block) && self.blocks[block].bytes >= max_split)
            .map(|block| (self.blocks[block].segment, self.blocks[block].bytes))
            .filter(|&(id, _)| !self.segment(id).growing)
            .collect();
        oversize.sort_by_key(|&(_, bytes)| bytes);
        let chosen = match oversize.iter().position(|&(_, bytes)| bytes >= wanted) {
            Some(one) => vec![oversize[one]],
            None => {
                let mut released = 0;
                oversize
                    .into_iter()
                    .rev()
                    .take_while(|&(_, bytes)| {
                        let more = released < wanted;
                        released += bytes;
                        more
                    })
                    .collect()
            }
        };
        let enough = chosen.iter().map(|&(_, bytes)| bytes).sum::<u64>() >= wanted;
        self.release_all(chosen, context)?;
        Ok(enough)
    }

    /// `garbage_collection_threshold`: gives back large segments that were free for long, when the process uses more than that
    /// share of what it is allowed. As in `native`, only where the program set a fraction.
    fn collect_garbage(&mut self, context: &Option<Context>) {
        let threshold = self.native.garbage_collection_threshold;
        if threshold <= 0.0 || !self.budget.fraction_is_set() || self.capturing() {
            return;
        }
        let allowed = self.budget.allowed().unwrap_or_else(|| self.budget.capacity(&self.populated, None).capacity);
        let start = (threshold * allowed as f64) as u64;
        let mut excess = self.populated.total().saturating_sub(start);
        let mut candidates: Vec<(SegmentId, u64, u64)> = self
            .releasable(PoolId::DEFAULT)
            .into_iter()
            .filter(|&(id, _)| !self.pools[self.segment(id).list].small)
            .map(|(id, bytes)| {
                let segment = self.segment(id);
                (id, bytes, self.pools[segment.list].requests - segment.free_since)
            })
            .collect();
        // Those of at least the average age go first; then the average of the rest decides.
        while excess > 0 && !candidates.is_empty() {
            let average = candidates.iter().map(|&(_, _, age)| age).sum::<u64>() / candidates.len() as u64;
            let (old, young): (Vec<_>, Vec<_>) = candidates.into_iter().partition(|&(_, _, age)| age >= average);
            for (id, bytes, _) in old {
                match self.release_segment(id, context) {
                    Ok(()) => excess = excess.saturating_sub(bytes),
                    // The request may do without.
                    Err(error) => {
                        tracing::warn!(device = self.device, %error, "cached memory could not be given back");
                    }
                }
            }
            candidates = young;
        }
    }

    /// Describes a request that could not be served, and counts it.
    fn out_of_memory(&mut self, request: &Request, exceeded: Exceeded, context: Option<Context>) -> Error {
        let requested = population_step(request.rounded, request.rounded, 0, &self.native);
        let memory = self.driver.device_memory(self.device);
        let host = self.driver.host_memory();
        let (device_free, device_total) =
            memory.map_or((0, self.info.total_memory), |memory| (memory.free, memory.total));
        self.stats.num_ooms += 1;
        // Every limit but CUDA's own is met before CUDA is asked.
        let rejected = self.native.throw_on_oom && exceeded.limit != Limit::Device;
        self.stats.num_oom_rejections += i64::from(rejected);
        self.trace_event(Action::OutOfMemory, device_free, request.rounded, request.stream, context);
        let private_pools = self
            .pools
            .ids()
            .filter(|&pool| pool != PoolId::DEFAULT)
            .flat_map(|pool| self.pools.lists_of(pool))
            .map(|list| self.pools[list].free.bytes())
            .sum();
        Error::OutOfMemory(Box::new(OutOfMemory {
            device: self.device,
            requested,
            device_total,
            device_free,
            capacity: exceeded.capacity,
            limit: exceeded.limit,
            rejected,
            allowed: self.budget.allowed(),
            host_available: host.as_ref().map_or(0, |host| host.available),
            host_reserve: host.as_ref().map_or(0, |host| self.budget.host_reserve(host)),
            populated_device: self.populated.device,
            populated_host: self.populated.host,
            allocated: self.stats.allocated_bytes.aggregate.current.unsigned_abs(),
            reserved: self.stats.reserved_bytes.aggregate.current.unsigned_abs(),
            private_pools,
        }))
    }

    /// Where this process's memory stands, and how much more it may have.
    ///
    /// # Errors
    /// The driver's.
    pub fn memory_info(&self) -> Result<MemoryInfo> {
        let device = self.driver.device_memory(self.device)?;
        let host = self.driver.host_memory()?;
        let capacity = self.budget.capacity(&self.populated, Some(&host)).capacity;
        // What was discarded is not free to CUDA, but to us.
        let discarded: u64 =
            self.segments.iter().flatten().map(|segment| segment.vacant + segment.discarded_end()).sum();
        // What the driver places, and what a MemPool's own allocator gave, may lie on the device: it is ours, and counts once.
        let ours = self.populated.device + self.populated.unplaced + discarded;
        // Other processes, CUDA's context, the program's own cudaMalloc. Where there is one physical memory, they are missing
        // from what the host has available, and so from the capacity.
        let used = device.total - device.free.min(device.total);
        let others = if self.info.integrated { 0 } else { used.saturating_sub(ours) };
        Ok(MemoryInfo {
            capacity,
            free: capacity.saturating_sub(self.populated.total()).saturating_sub(others),
            populated: self.populated,
            allocated: self.stats.allocated_bytes.aggregate.current.unsigned_abs(),
            reserved: self.stats.reserved_bytes.aggregate.current.unsigned_abs(),
            device_limit: self.budget.device_limit(),
            host_reserve: self.budget.host_reserve(&host),
            device,
            host,
        })
    }

    /// The largest block that could be had without giving anything back, in bytes.
    ///
    /// # Errors
    /// The driver's.
    pub fn largest_available(&self) -> Result<u64> {
        let free = self.memory_info()?.free;
        let cached = self
            .pools
            .ids()
            .flat_map(|pool| self.pools.lists_of(pool))
            .map(|list| self.pools[list].free.largest(&self.blocks));
        Ok(cached.max().unwrap_or(0).max(free))
    }
}
