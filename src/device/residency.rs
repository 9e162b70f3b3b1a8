//! Where pages lie, and how they get elsewhere: advice, the move, the accounting.
//!
//! A segment has one place, and a set of pages that lie elsewhere ([`PageFlags`](crate::pages::PageFlags)).

use super::state::DeviceState;
use crate::driver::{Advice, Location, Range};
use crate::error::Result;
use crate::gpu::Order;
use crate::ids::{BlockId, SegmentId};
use crate::pages::{self, PAGE};
use crate::place::Place;
use crate::placement;
use crate::segments::Segment;
use std::ops;

/// Where a page lies.
pub(super) fn lies(segment: &Segment, page: u64) -> Place {
    if segment.flags.nonresident.contains(page) { segment.place.other() } else { segment.place }
}

/// The whole pages inside a block that lie in a place, and have the allocator's advice.
pub(super) fn movable(device: &DeviceState, block: BlockId, place: Place) -> Vec<ops::Range<u64>> {
    let block = &device.heap.blocks[block];
    let segment = device.heap.segment(block.segment);
    pages::runs(pages::inside(block.address - segment.base.0, block.bytes), |page| {
        lies(segment, page) == place && !segment.flags.advised.contains(page)
    })
}

/// Whether something is special about pages that a block lies in, or they may have to move when it is used again.
pub(super) fn is_flagged(device: &DeviceState, block: BlockId) -> bool {
    let block = &device.heap.blocks[block];
    let segment = device.heap.segment(block.segment);
    device.policy(block.list).wanted(segment.place) != segment.place
        || segment.flags.any(pages::touched(block.address - segment.base.0, block.bytes))
}

/// Notes at a block whether something is special about its pages.
pub(super) fn note_flags(device: &mut DeviceState, block: BlockId) {
    device.heap.blocks[block].may_have_flags = is_flagged(device, block);
}

/// Where memory of a place is. Memory that the driver places is populated on the device.
pub(super) fn location(device: &DeviceState, place: Place) -> Location {
    let gpu = &device.gpu;
    placement::home(place, gpu.index, &gpu.info).unwrap_or(Location::Device(gpu.index))
}

fn range_of(device: &DeviceState, id: SegmentId, pages: &ops::Range<u64>) -> Range {
    Range { ptr: device.heap.segment(id).base.offset(pages.start * PAGE), bytes: pages::bytes(pages) }
}

/// How many of `pages` pages may go to a place now.
pub(super) fn capacity_for(device: &mut DeviceState, to: Place, pages: u64) -> Result<u64> {
    let populated = device.accounting.populated();
    let budget = &mut device.limits.budget;
    match to {
        Place::Device => Ok(pages.min(budget.device_limit().saturating_sub(populated.device) / PAGE)),
        Place::Unplaced => Ok(0),
        Place::Host => {
            let host = device.gpu.driver().host_memory()?;
            budget.observe(populated, &host);
            let fits = budget.admit_to_host(populated, pages * PAGE, &host).is_ok();
            Ok(if fits { pages } else { 0 })
        }
    }
}

/// Writes down that pages lie at `to` now. Answers how many bytes of them did not before.
pub(super) fn count_moved(device: &mut DeviceState, id: SegmentId, pages: ops::Range<u64>, to: Place) -> u64 {
    let segment = device.heap.segment_mut(id);
    if segment.place == Place::Unplaced {
        return 0;
    }
    let nonresident = &mut segment.flags.nonresident;
    let moved = PAGE * if to == segment.place { nonresident.remove(pages) } else { nonresident.insert(pages) };
    if moved > 0 {
        device.accounting.moved(to, moved);
    }
    moved
}

/// Moves pages to a place, or populates them there, in the order of a stream. With `discard` their contents are dropped
/// first, which is cheaper than carrying them over the link; a stream that captures can only wait for a move beside it.
///
/// The accounting is the caller's, but for pages that were discarded and could not be populated.
pub(super) fn migrate(
    device: &mut DeviceState,
    id: SegmentId,
    pages: ops::Range<u64>,
    to: Place,
    discard: bool,
    order: Order,
) -> crate::driver::Result<()> {
    let (range, to) = (range_of(device, id, &pages), location(device, to));
    if order.captures || !discard {
        device.gpu.prefetch(range, to, order)?;
    } else {
        if let Err(failed) = device.gpu.discard_and_prefetch(range, to, order.stream) {
            if failed.discarded {
                device.heap.segment_mut(id).flags.unpopulated.insert(pages);
            }
            return Err(failed.error);
        }
        device.accounting.places.discarded += range.bytes;
    }
    device.heap.segment_mut(id).flags.unpopulated.remove(pages);
    Ok(())
}

/// Moves pages to a place, whose advice they get, as [`migrate`] does; the accounting follows. Answers how many bytes
/// did not lie there before.
pub(super) fn relocate(
    device: &mut DeviceState,
    id: SegmentId,
    pages: ops::Range<u64>,
    to: Place,
    discard: bool,
    order: Order,
) -> crate::driver::Result<u64> {
    readvise(device, id, pages.clone(), to)?;
    migrate(device, id, pages.clone(), to, discard, order)?;
    Ok(count_moved(device, id, pages, to))
}

/// Gives pages the advice of the place that they lie or will lie in, where they have another.
pub(super) fn readvise(
    device: &mut DeviceState,
    id: SegmentId,
    pages: ops::Range<u64>,
    to: Place,
) -> crate::driver::Result<()> {
    let segment = device.heap.segment(id);
    let swapped = to != segment.place;
    let (index, info) = (device.gpu.index, &device.gpu.info);
    let programs = segment.flags.advised.runs(pages.clone(), true);
    if !programs.is_empty() {
        let mut undo = vec![Advice::UnsetReadMostly, Advice::UnsetPreferredLocation];
        undo.push(Advice::UnsetAccessedBy(Location::Host));
        let devices = 0..device.gpu.driver().device_count()?;
        undo.extend(devices.map(|other| Advice::UnsetAccessedBy(Location::Device(other))));
        undo.extend(placement::advice(to, index, info));
        for run in programs {
            device.gpu.advise(range_of(device, id, &run), &undo)?;
            let flags = &mut device.heap.segment_mut(id).flags;
            flags.advised.remove(run.clone());
            flags.advice_swapped.set(run, swapped);
        }
    }
    let stale = device.heap.segment(id).flags.advice_swapped.runs(pages, !swapped);
    if !stale.is_empty() {
        let change = placement::change_of_advice(to, index, &device.gpu.info);
        for run in stale {
            device.gpu.advise(range_of(device, id, &run), &change)?;
            device.heap.segment_mut(id).flags.advice_swapped.set(run, swapped);
        }
    }
    Ok(())
}
