//! Where pages are: the books by place, hints on live allocations, and what happens to pages that hints have moved when
//! their memory is used again.

use super::grow::Relaxed;
use super::{DeviceState, Request};
use crate::blocks::{Block, BlockId, BlockState};
use crate::driver::{Advice, DevicePtr, Driver, Location, Range, Stream, captures};
use crate::error::{Error, Result};
use crate::history::{Context, PlaceSample};
use crate::options::AccessPattern;
use crate::pages::{self, PAGE};
use crate::placement;
use crate::pools::{DEFAULT_POOL, MempoolId};
use crate::pressure::{Pressure, Resident, Stage};
use crate::segments::{Memory, Place, Segment, SegmentId};
use crate::stats::{PlaceStats, format_size};
use std::ops;
use std::sync::Arc;

/// `cudaStreamLegacy`, beside its usual name, 0.
const STREAM_LEGACY: Stream = Stream(1);

/// A segment and where its pages lie. Sizes in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentPlace {
    /// First byte.
    pub base: DevicePtr,
    /// Length of its address range.
    pub range_bytes: u64,
    /// From its start, what its blocks fill, holes included.
    pub filled: u64,
    /// How much of that is holes.
    pub vacant: u64,
    /// What is discarded beyond `filled`.
    pub discarded_end: u64,
    /// Populated on the device.
    pub device: u64,
    /// Populated in host memory.
    pub host: u64,
    /// Populated wherever the driver keeps it.
    pub unplaced: u64,
    /// What it is made of.
    pub memory: Memory,
    /// Where it is meant to live.
    pub place: Place,
    /// Of blocks of at most 1 MiB.
    pub small: bool,
    /// It grows.
    pub growing: bool,
    /// The pool it belongs to.
    pub pool: MempoolId,
}

impl DeviceState {
    /// What is populated where, and what moved.
    pub fn place_stats(&self) -> PlaceStats {
        self.places
    }

    /// How what is populated where has changed while the history was recorded, oldest first.
    pub fn place_samples(&self) -> Vec<PlaceSample> {
        self.samples.entries()
    }

    /// All segments by address, and where their pages lie.
    pub fn segment_places(&self) -> Vec<SegmentPlace> {
        let mut all: Vec<SegmentPlace> = self.segments.iter().flatten().map(|segment| self.place_of(segment)).collect();
        all.sort_by_key(|segment| segment.base);
        all
    }

    fn place_of(&self, segment: &Segment) -> SegmentPlace {
        let list = &self.pools[segment.list];
        SegmentPlace {
            base: segment.base,
            range_bytes: segment.range_bytes,
            filled: segment.filled,
            vacant: segment.vacant,
            discarded_end: segment.discarded_end(),
            device: segment.populated_in(Place::Device),
            host: segment.populated_in(Place::Host),
            unplaced: segment.populated_in(Place::Unplaced),
            memory: segment.memory,
            place: segment.place,
            small: list.small,
            growing: segment.growing,
            pool: self.pools[list.pool].id,
        }
    }

    /// Counts populated bytes in.
    pub(super) fn count_populated(&mut self, place: Place, bytes: u64) {
        self.populated.add(place, bytes);
        self.populated_changed();
    }

    /// Counts a segment's populated bytes out, wherever they lie.
    pub(super) fn count_gone(&mut self, id: SegmentId) {
        let segment = self.segment(id);
        let (place, home, away) = (segment.place, segment.populated_in(segment.place), segment.away());
        self.populated.sub(place, home);
        if away > 0 {
            self.populated.sub(place.other(), away);
        }
        self.populated_changed();
    }

    /// Counts populated bytes out.
    pub(super) fn count_unpopulated(&mut self, place: Place, bytes: u64) {
        self.populated.sub(place, bytes);
        self.populated_changed();
    }

    /// How much of the device limit stage 1 keeps free, in bytes.
    pub(super) fn keep_free(&self) -> u64 {
        let share = (self.options.stage1_threshold * self.budget.device_limit() as f64) as u64;
        share.max(self.options.stage1_min_bytes)
    }

    /// Finds out how short of device memory it is when `more` bytes are wanted there.
    pub(super) fn note_pressure(&mut self, more: u64) {
        if self.options.access_pattern != AccessPattern::GpuFirst {
            return;
        }
        let limit = self.budget.device_limit();
        if self.pressure.observe(limit, self.populated.device, more, self.keep_free()) {
            let stage = self.pressure.stage();
            self.places.stage = stage as u64;
            self.places.stage_changes += 1;
            tracing::debug!(device = self.device, ?stage, populated = self.populated.device, limit, "stage changed");
        }
    }

    /// Moves live memory to the host until `bytes` more fit under the device limit: the youngest of what lives long
    /// ([`Movers`](crate::pressure::Movers)). Answers whether they do; where there is not enough to move, nothing moves. Not
    /// while anything is captured: a graph knows nothing of moves. Where the driver refuses a move, what has moved stays
    /// out, and the request does without the rest.
    pub(super) fn make_room(&mut self, bytes: u64, stream: Stream) -> bool {
        self.try_to_make_room(bytes, stream).unwrap_or_else(|error| {
            tracing::warn!(device = self.device, %error, "live memory could not be moved out");
            false
        })
    }

    fn try_to_make_room(&mut self, bytes: u64, stream: Stream) -> Result<bool> {
        let may = self.options.prefetch && self.movers.may_search(self.clock) && !self.capturing();
        if !may || self.captures_now(stream)? {
            return Ok(false);
        }
        let wanted = bytes.next_multiple_of(PAGE);
        let (clock, limit) = (self.clock, self.budget.device_limit());
        let residents = self.residents();
        let chosen = self.movers.choose(residents, clock, limit, wanted);
        let pages = chosen.iter().map(|&(_, bytes)| bytes / PAGE).sum();
        if chosen.is_empty() || self.room_for(Place::Host, pages)? < pages {
            return Ok(false);
        }
        self.returns.moved_out(clock, limit);
        for (address, bytes) in chosen {
            self.move_out(self.find(DevicePtr(address))?, bytes / PAGE, stream)?;
        }
        self.places.hard_reclamations += 1;
        self.places.reclaimed += wanted;
        Ok(true)
    }

    /// Brings live memory that was moved out back to the device, what is oldest first, as far as the device stays ample
    /// ([`Returns`](crate::pressure::Returns)). The work that uses it meanwhile is not waited for, nor has it to wait.
    ///
    /// # Errors
    /// The driver's. What has come back stays.
    pub(super) fn bring_back(&mut self) -> Result<()> {
        let (clock, limit) = (self.clock, self.budget.device_limit());
        let ample = self.pressure.stage() == Stage::Ample && self.options.access_pattern == AccessPattern::GpuFirst;
        if self.moved.is_empty() || !ample || !self.options.prefetch || !self.returns.may_return(clock, limit) {
            return Ok(());
        }
        let mut room = Pressure::room(limit, self.populated.device, self.keep_free()) / PAGE;
        let mut away: Vec<_> = self.moved.keys().filter_map(|address| self.live.get(address).copied()).collect();
        away.sort_unstable_by_key(|&block| (self.blocks[block].born, self.blocks[block].address));
        let side = self.side_stream()?;
        for block in away {
            let Block { address, segment: id, .. } = self.blocks[block];
            let mut left = false;
            for run in self.movable(block, Place::Host) {
                let back = run.start..run.end.min(run.start + room);
                left |= back.end < run.end;
                if back.is_empty() {
                    break;
                }
                room -= back.end - back.start;
                let bytes = self.relocate(id, back, Place::Device, false, (side, false))?;
                self.returns.returned(clock);
                tracing::debug!(
                    device = self.device,
                    address = format_args!("{address:#x}"),
                    bytes,
                    "live memory came back"
                );
            }
            if !left {
                self.moved.remove(&address);
            }
            self.blocks[block].has_marks = self.is_marked(block);
        }
        self.note_pressure(0);
        Ok(())
    }

    /// The live allocations that may move out: of the default pool and of MemPools (a graph's memory is used where it was
    /// captured), with whole pages on the device about which the program has not said anything.
    fn residents(&mut self) -> Vec<Resident> {
        let of_program = |id: MempoolId| id == DEFAULT_POOL || id.0 != 0;
        self.merge_threads();
        let large: Vec<BlockId> =
            self.live.values().copied().filter(|&block| self.blocks[block].bytes >= PAGE).collect();
        let mut found = Vec::new();
        for block in large {
            // What a thread has parked is not live.
            if self.blocks[block].thread.is_some() && !self.take_live(block) {
                continue;
            }
            let Block { address, born, segment, list, .. } = self.blocks[block];
            if !of_program(self.pools[self.pools[list].pool].id) {
                continue;
            }
            let on_device: u64 = self.movable(block, Place::Device).iter().map(pages::bytes).sum();
            if on_device > 0 && self.segment(segment).memory == Memory::Managed {
                found.push(Resident { address, born, bytes: on_device });
            }
        }
        found
    }

    /// The whole pages inside a block that lie in a place, and have the allocator's advice.
    fn movable(&self, block: BlockId, place: Place) -> Vec<ops::Range<u64>> {
        let Block { address, bytes, segment, .. } = self.blocks[block];
        let segment = self.segment(segment);
        pages::runs(pages::inside(address - segment.base.0, bytes), |page| {
            Self::lies(segment, page) == place && !segment.marks.advised.contains(page)
        })
    }

    /// Moves the last `count` movable pages of a live block to the host, where the GPU reaches them.
    fn move_out(&mut self, block: BlockId, count: u64, stream: Stream) -> Result<()> {
        let Block { address, segment: id, born, .. } = self.blocks[block];
        let mut missing = count;
        self.blocks[block].has_marks = true;
        for run in self.movable(block, Place::Device).into_iter().rev() {
            let run = run.start.max(run.end.saturating_sub(missing))..run.end;
            if run.is_empty() {
                break;
            }
            missing -= run.end - run.start;
            self.places.moved_out += self.relocate(id, run, Place::Host, false, (stream, false))?;
        }
        self.places.moves_out += 1;
        self.moved.entry(address).or_insert(self.movers.moved(self.clock));
        let (device, bytes, age) = (self.device, count * PAGE, self.clock - born);
        tracing::debug!(device, address = format_args!("{address:#x}"), bytes, age, "live memory was moved out");
        Ok(())
    }

    /// The program has freed a block with marks: perhaps one that was moved out.
    #[cold]
    pub(super) fn moved_is_freed(&mut self, block: BlockId) {
        let Some(moved) = self.moved.remove(&self.blocks[block].address) else { return };
        if self.movers.freed(moved, self.clock, self.budget.device_limit()) {
            self.places.regrets += 1;
            let age = self.movers.age(self.budget.device_limit());
            tracing::debug!(device = self.device, age, "memory was freed soon after it had been moved out");
        }
    }

    fn populated_changed(&mut self) {
        self.places.levels(&self.populated);
        if self.history.enabled() {
            let sample = PlaceSample {
                time: self.hooks.approximate_time(),
                populated: self.populated,
                allocated: self.stats.allocated_bytes.aggregate.current.unsigned_abs(),
            };
            self.samples.push(sample);
        }
    }

    /// Writes down that pages lie at `to` now, and how many bytes of them did not before.
    fn count_moved(&mut self, id: SegmentId, pages: ops::Range<u64>, to: Place) -> u64 {
        let segment = self.segment_mut(id);
        let place = segment.place;
        if place == Place::Unplaced {
            return 0;
        }
        let moved =
            PAGE * if to == place { segment.marks.away.remove(pages) } else { segment.marks.away.insert(pages) };
        if moved > 0 {
            self.populated.sub(to.other(), moved);
            self.populated.add(to, moved);
            match to {
                Place::Device => self.places.moved_to_device += moved,
                _ => self.places.moved_to_host += moved,
            }
            self.populated_changed();
        }
        moved
    }

    /// Where a page lies.
    fn lies(segment: &Segment, page: u64) -> Place {
        if segment.marks.away.contains(page) { segment.place.other() } else { segment.place }
    }

    fn range_of(&self, id: SegmentId, pages: &ops::Range<u64>) -> Range {
        Range { ptr: self.segment(id).base.offset(pages.start * PAGE), bytes: pages::bytes(pages) }
    }

    /// Where a program that hints at `place` means. Memory that the driver places is populated on the device.
    fn location(&self, place: Place) -> Location {
        placement::home(place, self.device, &self.info).unwrap_or(Location::Device(self.device))
    }

    /// Whether a stream captures, so that nothing of ours can be queued on it.
    pub(super) fn captures_now(&self, stream: Stream) -> crate::driver::Result<bool> {
        captures(&*self.driver, self.device, stream)
    }

    /// Queues `work` on the side stream in the order of another stream, which does not capture: after what is queued there,
    /// and before what comes next.
    fn beside(
        &mut self,
        stream: Stream,
        work: impl FnOnce(&dyn Driver, Stream) -> crate::driver::Result<()>,
    ) -> crate::driver::Result<()> {
        let side = self.side_stream()?;
        let (driver, device) = (Arc::clone(&self.driver), self.device);
        let event = driver.event_create(device)?;
        let done = driver
            .event_record(device, event, stream)
            .and_then(|()| driver.stream_wait_event(device, side, event))
            .and_then(|()| work(&*driver, side))
            .and_then(|()| {
                let ordered = driver
                    .event_record(device, event, side)
                    .and_then(|()| driver.stream_wait_event(device, stream, event));
                // Without the event, what was queued must be over.
                ordered.or_else(|_| driver.stream_synchronize(device, side))
            });
        if let Err(error) = driver.event_destroy(device, event) {
            tracing::warn!(device, %error, "an event is lost");
        }
        done
    }

    /// Moves pages to a place, or populates them there, in the order of a stream. With `discard` their contents are dropped
    /// first, which is cheaper than carrying them over the link; a stream that captures can only wait for a move beside it.
    ///
    /// The books are the caller's, but for pages that were discarded and could not be populated.
    fn carry(
        &mut self,
        id: SegmentId,
        pages: ops::Range<u64>,
        to: Place,
        discard: bool,
        (stream, captures): (Stream, bool),
    ) -> crate::driver::Result<()> {
        let (range, to, device) = (self.range_of(id, &pages), self.location(to), self.device);
        let driver = Arc::clone(&self.driver);
        if captures {
            let side = self.side_stream()?;
            driver.prefetch(device, range, to, side)?;
            driver.stream_synchronize(device, side)?;
        } else if !discard {
            driver.prefetch(device, range, to, stream)?;
        } else {
            let mut discarded = false;
            let mut both = |driver: &dyn Driver, on: Stream| {
                driver.discard(device, range, on)?;
                discarded = true;
                driver.prefetch(device, range, to, on)
            };
            // Nothing can be discarded on the legacy default stream, which is PyTorch's usual one.
            let done = if stream == Stream(0) || stream == STREAM_LEGACY {
                self.beside(stream, &mut both)
            } else {
                both(&*driver, stream)
            };
            if let Err(error) = done {
                if discarded {
                    self.segment_mut(id).marks.raw.insert(pages);
                }
                return Err(error);
            }
            self.places.discarded += range.bytes;
        }
        self.segment_mut(id).marks.raw.remove(pages);
        Ok(())
    }

    /// Moves pages to a place, whose advice they get, as [`DeviceState::carry`] does; the books follow. Answers how many bytes
    /// did not lie there before.
    fn relocate(
        &mut self,
        id: SegmentId,
        pages: ops::Range<u64>,
        to: Place,
        discard: bool,
        on: (Stream, bool),
    ) -> crate::driver::Result<u64> {
        self.readvise(id, pages.clone(), to)?;
        self.carry(id, pages.clone(), to, discard, on)?;
        Ok(self.count_moved(id, pages, to))
    }

    /// Gives pages the advice of the place that they lie or will lie in, where they have another.
    fn readvise(&mut self, id: SegmentId, pages: ops::Range<u64>, to: Place) -> crate::driver::Result<()> {
        let segment = self.segment(id);
        let other = to != segment.place;
        let programs = segment.marks.advised.runs(pages.clone(), true);
        if !programs.is_empty() {
            let mut undo = vec![Advice::UnsetReadMostly, Advice::UnsetPreferredLocation];
            undo.push(Advice::UnsetAccessedBy(Location::Host));
            undo.extend(
                (0..self.driver.device_count()?).map(|device| Advice::UnsetAccessedBy(Location::Device(device))),
            );
            undo.extend(placement::advice(to, self.device, &self.info));
            for run in programs {
                self.advise_pages(id, &run, &undo)?;
                let marks = &mut self.segment_mut(id).marks;
                marks.advised.remove(run.clone());
                if other {
                    marks.resettled.insert(run);
                } else {
                    marks.resettled.remove(run);
                }
            }
        }
        let stale = self.segment(id).marks.resettled.runs(pages, !other);
        if !stale.is_empty() {
            let change = placement::change_of_advice(to, self.device, &self.info);
            for run in stale {
                self.advise_pages(id, &run, &change)?;
                let resettled = &mut self.segment_mut(id).marks.resettled;
                if other {
                    resettled.insert(run)
                } else {
                    resettled.remove(run)
                };
            }
        }
        Ok(())
    }

    fn advise_pages(&self, id: SegmentId, pages: &ops::Range<u64>, all: &[Advice]) -> crate::driver::Result<()> {
        let range = self.range_of(id, pages);
        all.iter().try_for_each(|&advice| self.driver.advise(self.device, range, advice))
    }

    /// Where the pages of a segment belong when their memory is handed out again.
    fn wanted(&self, segment: &Segment) -> Place {
        let pool = &self.pools[self.pools[segment.list].pool];
        match (segment.place, pool.placement.unwrap_or(self.options.access_pattern)) {
            (Place::Host, AccessPattern::GpuFirst) => Place::Device,
            (place, _) => place,
        }
    }

    /// How many of `pages` pages may go to a place now.
    fn room_for(&mut self, to: Place, pages: u64) -> Result<u64> {
        match to {
            Place::Device => Ok(pages.min(self.budget.device_limit().saturating_sub(self.populated.device) / PAGE)),
            Place::Unplaced => Ok(0),
            Place::Host => {
                let host = self.driver.host_memory()?;
                self.budget.observe(&self.populated, &host);
                let fits = self.budget.admit_to_host(&self.populated, pages * PAGE, &host).is_ok();
                Ok(if fits { pages } else { 0 })
            }
        }
    }

    /// As [`DeviceState::hand_out`], of a block with pages about which something is special.
    #[cold]
    pub(super) fn hand_out_marked(
        &mut self,
        block: BlockId,
        request: &Request,
        split: bool,
        context: Option<Context>,
    ) -> Result<DevicePtr> {
        let bytes = if split { request.rounded } else { self.blocks[block].bytes };
        self.make_ready(block, bytes, request.stream)?;
        let ptr = self.hand_out_part(block, request, split, context);
        let block = self.find(ptr)?;
        self.blocks[block].has_marks = self.is_marked(block);
        Ok(ptr)
    }

    /// Whether something is special about pages that a block lies in, or they may have to move when it is used again.
    pub(super) fn is_marked(&self, block: BlockId) -> bool {
        let Block { address, bytes, segment, .. } = self.blocks[block];
        let segment = self.segment(segment);
        self.wanted(segment) != segment.place || segment.marks.any(pages::touched(address - segment.base.0, bytes))
    }

    /// Makes the first `bytes` of a free block fit to be handed out: pages that were moved away come home, where there is
    /// room, and have the advice of where they lie again; what was discarded is populated.
    ///
    /// # Errors
    /// The driver's. What was not done is done the next time.
    fn make_ready(&mut self, block: BlockId, bytes: u64, stream: Stream) -> Result<()> {
        let Block { address, bytes: all, segment: id, .. } = self.blocks[block];
        let segment = self.segment(id);
        if segment.memory != Memory::Managed {
            return Ok(());
        }
        let offset = address - segment.base.0;
        let touched = pages::touched(offset, bytes);
        // The contents of these are nobody's. A page at the edge may be shared with a neighbour that is in use.
        let free = pages::inside(offset, all);
        let free = free.start.max(touched.start)..free.end.min(touched.end).max(free.start);
        let wanted = self.wanted(segment);
        let strays = match wanted {
            Place::Unplaced => Vec::new(),
            wanted => pages::runs(free.clone(), |page| Self::lies(segment, page) != wanted),
        };
        let segment_in_host = segment.place == Place::Host;
        let astray = strays.iter().map(|run| run.end - run.start).sum();
        let marks = &segment.marks;
        let rests = !marks.any(touched.clone())
            || !marks.raw.any(touched.clone())
                && !marks.advised.any(free.clone())
                && free.clone().all(|page| marks.away.contains(page) == marks.resettled.contains(page));
        if astray == 0 && rests {
            return Ok(());
        }
        let mut room = if astray == 0 { 0 } else { self.room_for(wanted, astray)? };
        let _relaxed = Relaxed::enter(&self.driver)?;
        if room < astray && wanted == Place::Device && self.make_room((astray - room) * PAGE, stream) {
            room = self.room_for(wanted, astray)?;
        }
        if segment_in_host && room < astray {
            // It was placed there whole because it did not fit.
            room = 0;
        }
        if room == 0 && rests {
            return Ok(());
        }
        let on = (stream, self.captures_now(stream)?);
        // Into host memory, discarding is no cheaper than moving; where there is one memory, nothing is carried. CUDA
        // allows a discard beside a capture (docs/driver-contract.md), but there it has not been tried in this order.
        let discard = wanted == Place::Device && self.info.discard && !self.info.integrated && !self.capturing();
        for run in strays {
            let run = run.start..run.end.min(run.start + room);
            if run.is_empty() {
                break;
            }
            room -= run.end - run.start;
            self.relocate(id, run, wanted, discard, on)?;
        }
        for away in [false, true] {
            let place = self.segment(id).place;
            let lie = if away { place.other() } else { place };
            for run in self.segment(id).marks.away.runs(free.clone(), away) {
                self.readvise(id, run, lie)?;
            }
            self.populate_raw(id, touched.clone(), away, lie, on)?;
        }
        Ok(())
    }

    /// Populates what is discarded of some pages, of those that are away or of those that are not.
    fn populate_raw(
        &mut self,
        id: SegmentId,
        pages: ops::Range<u64>,
        away: bool,
        lie: Place,
        on: (Stream, bool),
    ) -> crate::driver::Result<()> {
        let marks = &self.segment(id).marks;
        if marks.raw.is_empty() {
            return Ok(());
        }
        let raw = pages::runs(pages, |page| marks.raw.contains(page) && marks.away.contains(page) == away);
        raw.into_iter().try_for_each(|run| self.carry(id, run, lie, false, on))
    }

    /// Populates all that is discarded in a segment whose contents must not change.
    pub(super) fn populate_all_raw(&mut self, id: SegmentId, stream: Stream) -> Result<()> {
        let segment = self.segment(id);
        if segment.marks.raw.is_empty() {
            return Ok(());
        }
        let (all, place) = (0..segment.range_bytes / PAGE, segment.place);
        let _relaxed = Relaxed::enter(&self.driver)?;
        let on = (stream, self.captures_now(stream)?);
        self.populate_raw(id, all.clone(), false, place, on)?;
        Ok(self.populate_raw(id, all, true, place.other(), on)?)
    }

    /// Whether an address lies in one of this device's segments.
    pub fn holds(&self, ptr: DevicePtr) -> bool {
        self.segments
            .iter()
            .flatten()
            .any(|segment| (segment.base.0..segment.base.0 + segment.range_bytes).contains(&ptr.0))
    }

    /// The managed allocation that a hint is about, and the range in it: to the end of its last page, where that is
    /// all that follows.
    fn hinted(&mut self, what: &str, ptr: DevicePtr, bytes: u64) -> Result<(BlockId, Range)> {
        if bytes == 0 {
            return Err(Error::InvalidArgument(format!("{what}: a range of 0 bytes: expected at least 1")));
        }
        let found = self.live.get(&ptr.0).copied().or_else(|| self.allocated_around(ptr.0));
        let block = found.ok_or_else(|| no_allocation(what, ptr))?;
        if self.blocks[block].thread.is_some() && !self.reclaim(block) {
            return Err(no_allocation(what, ptr));
        }
        let Block { address, bytes: block_bytes, requested, segment, state, .. } = self.blocks[block];
        debug_assert_eq!(state, BlockState::Allocated);
        let (start, end) = (ptr.0 - address, (ptr.0 - address).saturating_add(bytes));
        if end > block_bytes {
            return Err(Error::InvalidArgument(format!(
                "{what}: {bytes} bytes at {ptr:?} end beyond their allocation, which has {requested} bytes at {address:#x}: \
                 expected a range inside one allocation"
            )));
        }
        match self.segment(segment).memory {
            Memory::Managed => {}
            Memory::Device => {
                return Err(Error::NotSupported(format!(
                    "{what}: the memory at {ptr:?} is plain device memory (placement 'device'), which stays where it is: \
                     hints are for managed memory"
                )));
            }
            Memory::Custom(_) => {
                return Err(Error::NotSupported(format!(
                    "{what}: the memory at {ptr:?} comes from a MemPool's own allocator: hints are for memory of the uvm \
                     allocator"
                )));
            }
        }
        // What rounding added is nobody else's.
        let end = if end >= requested { block_bytes } else { end };
        Ok((block, Range { ptr, bytes: end - start }))
    }

    /// Refuses a stream that captures: a graph cannot hold hints.
    fn must_not_capture(&self, what: &str, stream: Stream) -> Result<()> {
        if self.captures_now(stream)? {
            return Err(Error::NotSupported(format!(
                "{what}: the stream is capturing a CUDA graph, and CUDA cannot capture this: give the hint before or after \
                 the capture, or on another stream"
            )));
        }
        Ok(())
    }

    /// Moves the pages that a range of a live allocation touches to the device or to the host, in the order of a stream.
    /// Neighbours on the first and the last page move too. The books count the whole pages inside the range.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a range that is not inside one live allocation, another device than the
    /// memory's, or more than the host can take; [`Error::NotSupported`] for memory that is not managed and a stream that
    /// captures; the driver's. Nothing has changed then.
    pub fn prefetch(&mut self, ptr: DevicePtr, bytes: u64, to: Location, stream: Stream) -> Result<()> {
        let (block, range) = self.hinted("prefetch", ptr, bytes)?;
        let place = match to {
            Location::Device(device) if device == self.device => Place::Device,
            Location::Device(device) => {
                return Err(Error::InvalidArgument(format!(
                    "prefetch: cuda:{device} is not allowed for memory of cuda:{}: expected that device, or cpu",
                    self.device
                )));
            }
            Location::Host | Location::HostNuma(_) => Place::Host,
        };
        let _relaxed = Relaxed::enter(&self.driver)?;
        self.must_not_capture("prefetch", stream)?;
        let id = self.blocks[block].segment;
        let segment = self.segment(id);
        let whole = pages::inside(range.ptr.0 - segment.base.0, range.bytes);
        let moving = pages::runs(whole.clone(), |page| Self::lies(segment, page) != place);
        let moving: u64 = moving.iter().map(pages::bytes).sum();
        if place == Place::Host && moving > 0 {
            let host = self.driver.host_memory()?;
            self.budget.observe(&self.populated, &host);
            if self.budget.admit_to_host(&self.populated, moving, &host).is_err() {
                return Err(Error::InvalidArgument(format!(
                    "prefetch: {} more do not fit into host memory, of which {} is available and {} is kept free \
                     (uvm_host_reserve_mb)",
                    format_size(moving),
                    format_size(host.available),
                    format_size(self.budget.host_reserve(&host))
                )));
            }
        }
        self.driver.prefetch(self.device, range, self.location(place), stream)?;
        self.segment_mut(id).marks.raw.remove(whole.clone());
        self.count_moved(id, whole, place);
        if place == Place::Host {
            // It is there because the program says so, and does not come back by itself.
            self.moved.remove(&self.blocks[block].address);
        }
        self.blocks[block].has_marks |= self.is_marked(block);
        self.places.prefetches += 1;
        self.note_pressure(0);
        Ok(())
    }

    /// Gives the driver advice about the pages that a range of a live allocation touches, neighbours included. It holds
    /// until the allocation is freed.
    ///
    /// # Errors
    /// As [`DeviceState::prefetch`], but for the stream.
    pub fn advise(&mut self, ptr: DevicePtr, bytes: u64, advice: Advice) -> Result<()> {
        let (block, range) = self.hinted("advise", ptr, bytes)?;
        let id = self.blocks[block].segment;
        let offset = range.ptr.0 - self.segment(id).base.0;
        let _relaxed = Relaxed::enter(&self.driver)?;
        self.driver.advise(self.device, range, self.nearest(advice))?;
        self.segment_mut(id).marks.advised.insert(pages::touched(offset, range.bytes));
        self.mark_blocks(id, &pages::touched(offset, range.bytes));
        self.places.advices += 1;
        Ok(())
    }

    /// The advice, with the node of the host that this allocator's memory goes to.
    fn nearest(&self, advice: Advice) -> Advice {
        match advice {
            Advice::SetPreferredLocation(Location::Host) => Advice::SetPreferredLocation(self.location(Place::Host)),
            other => other,
        }
    }

    /// Notes at all blocks that lie in some pages that something is special about those.
    fn mark_blocks(&mut self, id: SegmentId, pages: &ops::Range<u64>) {
        let base = self.segment(id).base.0;
        let within = |block: &Block| {
            block.address < base + pages.end * PAGE && block.address + block.bytes > base + pages.start * PAGE
        };
        // What is marked is in no thread's cache. Leaving one may free a block, and merge it with others.
        while let Some(&cached) =
            self.blocks_of(id).iter().find(|&&block| within(&self.blocks[block]) && self.blocks[block].thread.is_some())
        {
            self.reclaim(cached);
        }
        for block in self.blocks_of(id) {
            if within(&self.blocks[block]) {
                self.blocks[block].has_marks = true;
            }
        }
    }

    /// Drops the contents of the whole pages inside a range of a live allocation, in the order of a stream, and populates
    /// them again: at home, where there is room, else where they lie.
    ///
    /// # Errors
    /// As [`DeviceState::prefetch`]; [`Error::InvalidArgument`] also where no whole page lies inside the range,
    /// [`Error::NotSupported`] where the driver cannot discard. Where the driver fails half-way, contents may be lost.
    pub fn discard(&mut self, ptr: DevicePtr, bytes: u64, stream: Stream) -> Result<()> {
        let (block, range) = self.hinted("discard", ptr, bytes)?;
        if !self.info.discard {
            return Err(Error::NotSupported(
                "discard: this driver cannot discard memory: it needs CUDA 13.0 (driver 580) and concurrent managed access"
                    .into(),
            ));
        }
        let Block { segment: id, list, .. } = self.blocks[block];
        let segment = self.segment(id);
        let whole = pages::inside(range.ptr.0 - segment.base.0, range.bytes);
        if whole.is_empty() {
            return Err(Error::InvalidArgument(format!(
                "discard: no whole page of 2 MiB lies inside the {bytes} bytes at {ptr:?}, and only whole pages can be \
                 discarded"
            )));
        }
        let _relaxed = Relaxed::enter(&self.driver)?;
        self.must_not_capture("discard", stream)?;
        let (place, on_device) = (segment.place, segment.marks.away.runs(whole.clone(), false));
        let away = segment.marks.away.runs(whole, true);
        if stream != self.pools[list].stream {
            // Nobody else may have the memory before it is dropped.
            self.waits.record_use(block, (self.device, stream), false);
            self.blocks[block].has_uses = true;
        }
        self.blocks[block].has_marks = true;
        for run in on_device {
            self.carry(id, run, place, true, (stream, false))?;
        }
        for run in away {
            let home = self.room_for(place, run.end - run.start)?.min(run.end - run.start);
            let (at_home, rest) = (run.start..run.start + home, run.start + home..run.end);
            for (pages, to) in [(at_home, place), (rest, place.other())] {
                if !pages.is_empty() {
                    self.carry(id, pages.clone(), to, true, (stream, false))?;
                    self.count_moved(id, pages, to);
                }
            }
        }
        self.blocks[block].has_marks = self.is_marked(block);
        self.places.discards += 1;
        self.note_pressure(0);
        Ok(())
    }
}

/// The error of a hint about memory that is nobody's here.
pub(crate) fn no_allocation(what: &str, ptr: DevicePtr) -> Error {
    Error::InvalidArgument(format!(
        "{what}: {ptr:?} lies in no live allocation of the uvm allocator: expected memory of a CUDA tensor that PyTorch \
         allocated"
    ))
}
