//! Free memory is made ready before it is used again: pages that lie elsewhere come home, what is not populated is.

use super::state::DeviceState;
use super::{eviction, residency};
use crate::driver::Stream;
use crate::error::Result;
use crate::gpu::Order;
use crate::ids::{BlockId, SegmentId};
use crate::pages::{self, PAGE};
use crate::place::Place;
use crate::segments::Memory;
use std::ops;

/// Makes the first `bytes` of a free block fit to be handed out: pages that were moved away come home, where there is
/// room, and have the advice of where they lie again; what was discarded is populated.
///
/// # Errors
/// The driver's. What was not done is done the next time.
pub(super) fn make_ready(device: &mut DeviceState, block: BlockId, bytes: u64, stream: Stream) -> Result<()> {
    let free = device.heap.blocks[block];
    let id = free.segment;
    let segment = device.heap.segment(id);
    if segment.memory != Memory::Managed {
        return Ok(());
    }
    let offset = free.address - segment.base.0;
    let touched = pages::touched(offset, bytes);
    // The contents of these are nobody's. A page at the edge may be shared with a neighbour that is in use.
    let whole = pages::inside(offset, free.bytes);
    let whole = whole.start.max(touched.start)..whole.end.min(touched.end).max(whole.start);
    let wanted = device.policy(segment.list).wanted(segment.place);
    let strays = match wanted {
        Place::Unplaced => Vec::new(),
        wanted => pages::runs(whole.clone(), |page| residency::lies(segment, page) != wanted),
    };
    let segment_in_host = segment.place == Place::Host;
    let astray = strays.iter().map(|run| run.end - run.start).sum();
    let flags = &segment.flags;
    let rests = !flags.any(touched.clone())
        || !flags.unpopulated.any(touched.clone())
            && !flags.advised.any(whole.clone())
            && whole.clone().all(|page| flags.nonresident.contains(page) == flags.advice_swapped.contains(page));
    if astray == 0 && rests {
        return Ok(());
    }
    let mut room = if astray == 0 { 0 } else { residency::capacity_for(device, wanted, astray)? };
    let _relaxed = device.gpu.relaxed()?;
    if room < astray && wanted == Place::Device && eviction::evict(device, (astray - room) * PAGE, stream) {
        room = residency::capacity_for(device, wanted, astray)?;
    }
    if segment_in_host && room < astray {
        // It was placed there whole because it did not fit.
        room = 0;
    }
    if room == 0 && rests {
        return Ok(());
    }
    let order = device.gpu.order(stream)?;
    // Into host memory, discarding is no cheaper than moving; where there is one memory, nothing is carried. CUDA
    // allows a discard beside a capture (docs/driver-contract.md), but there it has not been tried in this order.
    let info = &device.gpu.info;
    let discard = wanted == Place::Device && info.discard && !info.integrated && !device.capturing();
    for run in strays {
        let run = run.start..run.end.min(run.start + room);
        if run.is_empty() {
            break;
        }
        room -= run.end - run.start;
        residency::relocate(device, id, run, wanted, discard, order)?;
    }
    for nonresident in [false, true] {
        let segment = device.heap.segment(id);
        let lie = if nonresident { segment.place.other() } else { segment.place };
        for run in segment.flags.nonresident.runs(whole.clone(), nonresident) {
            residency::readvise(device, id, run, lie)?;
        }
        populate(device, id, touched.clone(), nonresident, order)?;
    }
    Ok(())
}

/// Populates what is discarded of some pages, of those that lie elsewhere than their segment's place says or of those
/// that do not.
fn populate(
    device: &mut DeviceState,
    id: SegmentId,
    pages: ops::Range<u64>,
    nonresident: bool,
    order: Order,
) -> crate::driver::Result<()> {
    let segment = device.heap.segment(id);
    let flags = &segment.flags;
    if flags.unpopulated.is_empty() {
        return Ok(());
    }
    let lie = if nonresident { segment.place.other() } else { segment.place };
    let wanted = |page| flags.unpopulated.contains(page) && flags.nonresident.contains(page) == nonresident;
    let runs = pages::runs(pages, wanted);
    runs.into_iter().try_for_each(|run| residency::migrate(device, id, run, lie, false, order))
}

/// Populates all that is discarded in a segment whose contents must not change.
///
/// # Errors
/// The driver's.
pub(super) fn populate_all(device: &mut DeviceState, id: SegmentId, stream: Stream) -> Result<()> {
    let segment = device.heap.segment(id);
    if segment.flags.unpopulated.is_empty() {
        return Ok(());
    }
    let all = 0..segment.range_bytes / PAGE;
    let _relaxed = device.gpu.relaxed()?;
    let order = device.gpu.order(stream)?;
    populate(device, id, all.clone(), false, order)?;
    Ok(populate(device, id, all, true, order)?)
}
