//! Hints on live allocations: prefetch, advise, discard. What they do to the neighbours on the first and the last page.

use super::state::DeviceState;
use super::{eviction, residency};
use crate::driver::{Advice, DevicePtr, Location, Range, Stream};
use crate::error::{Error, Result};
use crate::gpu::Order;
use crate::ids::{BlockId, SegmentId};
use crate::pages;
use crate::place::Place;
use crate::segments::Memory;
use crate::sizes::format_size;
use std::ops;

/// The error of a hint about memory that is nobody's here.
pub(crate) fn no_allocation(what: &str, ptr: DevicePtr) -> Error {
    Error::InvalidArgument(format!(
        "{what}: {ptr:?} lies in no live allocation of the uvm allocator: expected memory of a CUDA tensor that PyTorch \
         allocated"
    ))
}

/// The managed allocation that a hint is about, and the range in it: to the end of its last page, where that is
/// all that follows.
fn hinted(device: &mut DeviceState, what: &str, ptr: DevicePtr, bytes: u64) -> Result<(BlockId, Range)> {
    if bytes == 0 {
        return Err(Error::InvalidArgument(format!("{what}: a range of 0 bytes: expected at least 1")));
    }
    let found = device.heap.live_at(ptr).or_else(|| device.heap.allocated_around(ptr.0));
    let block = found.ok_or_else(|| no_allocation(what, ptr))?;
    if device.heap.blocks[block].thread.is_some() && !device.take_from_cache(block) {
        return Err(no_allocation(what, ptr));
    }
    let allocation = device.heap.blocks[block];
    let (start, requested) = (ptr.0 - allocation.address, allocation.requested);
    let end = start.saturating_add(bytes);
    if end > allocation.bytes {
        return Err(Error::InvalidArgument(format!(
            "{what}: {bytes} bytes at {ptr:?} end beyond their allocation, which has {requested} bytes at {:#x}: \
             expected a range inside one allocation",
            allocation.address
        )));
    }
    match device.heap.segment(allocation.segment).memory {
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
    let end = if end >= requested { allocation.bytes } else { end };
    Ok((block, Range { ptr, bytes: end - start }))
}

/// Refuses a stream that captures: a graph cannot hold hints.
fn must_not_capture(device: &DeviceState, what: &str, stream: Stream) -> Result<()> {
    if device.gpu.captures(stream)? {
        return Err(Error::NotSupported(format!(
            "{what}: the stream is capturing a CUDA graph, and CUDA cannot capture this: give the hint before or after \
             the capture, or on another stream"
        )));
    }
    Ok(())
}

/// Moves the pages that a range of a live allocation touches to the device or to the host, in the order of a stream.
/// Neighbours on the first and the last page move too. The accounting has the whole pages inside the range.
///
/// # Errors
/// [`Error::InvalidArgument`] for a range that is not inside one live allocation, another device than the
/// memory's, or more than the host can take; [`Error::NotSupported`] for memory that is not managed and a stream that
/// captures; the driver's. Nothing has changed then.
pub(crate) fn prefetch(
    device: &mut DeviceState,
    ptr: DevicePtr,
    bytes: u64,
    to: Location,
    stream: Stream,
) -> Result<()> {
    let (block, range) = hinted(device, "prefetch", ptr, bytes)?;
    let place = match to {
        Location::Device(index) if index == device.gpu.index => Place::Device,
        Location::Device(index) => {
            return Err(Error::InvalidArgument(format!(
                "prefetch: cuda:{index} is not allowed for memory of cuda:{}: expected that device, or cpu",
                device.gpu.index
            )));
        }
        Location::Host | Location::HostNuma(_) => Place::Host,
    };
    let _relaxed = device.gpu.relaxed()?;
    must_not_capture(device, "prefetch", stream)?;
    let id = device.heap.blocks[block].segment;
    let segment = device.heap.segment(id);
    let whole = pages::inside(range.ptr.0 - segment.base.0, range.bytes);
    let moving = pages::runs(whole.clone(), |page| residency::lies(segment, page) != place);
    let moving: u64 = moving.iter().map(pages::bytes).sum();
    if place == Place::Host && moving > 0 {
        must_fit_into_the_host(device, moving)?;
    }
    device.gpu.prefetch(range, residency::location(device, place), Order::on(stream))?;
    device.heap.segment_mut(id).flags.unpopulated.remove(whole.clone());
    residency::count_moved(device, id, whole, place);
    if place == Place::Host {
        // It is there because the program says so, and does not come back by itself.
        device.evictions.forget(device.heap.blocks[block].address);
    }
    device.heap.blocks[block].may_have_flags |= residency::is_flagged(device, block);
    device.accounting.places.prefetches += 1;
    eviction::note_pressure(device, 0);
    Ok(())
}

fn must_fit_into_the_host(device: &mut DeviceState, bytes: u64) -> Result<()> {
    let host = device.gpu.driver().host_memory()?;
    let (budget, populated) = (&mut device.limits.budget, device.accounting.populated());
    budget.observe(populated, &host);
    if budget.admit_to_host(populated, bytes, &host).is_err() {
        return Err(Error::InvalidArgument(format!(
            "prefetch: {} more do not fit into host memory, of which {} is available and {} is kept free \
             (uvm_host_reserve_mb)",
            format_size(bytes),
            format_size(host.available),
            format_size(budget.host_reserve(&host))
        )));
    }
    Ok(())
}

/// Gives the driver advice about the pages that a range of a live allocation touches, neighbours included. It holds
/// until the allocation is freed.
///
/// # Errors
/// As [`prefetch`], but for the stream.
pub(crate) fn advise(device: &mut DeviceState, ptr: DevicePtr, bytes: u64, advice: Advice) -> Result<()> {
    let (block, range) = hinted(device, "advise", ptr, bytes)?;
    let id = device.heap.blocks[block].segment;
    let touched = pages::touched(range.ptr.0 - device.heap.segment(id).base.0, range.bytes);
    let _relaxed = device.gpu.relaxed()?;
    device.gpu.advise(range, &[nearest(device, advice)])?;
    device.heap.segment_mut(id).flags.advised.insert(touched.clone());
    flag_blocks(device, id, &touched);
    device.accounting.places.advices += 1;
    Ok(())
}

/// The advice, with the node of the host that this allocator's memory goes to.
fn nearest(device: &DeviceState, advice: Advice) -> Advice {
    match advice {
        Advice::SetPreferredLocation(Location::Host) => {
            Advice::SetPreferredLocation(residency::location(device, Place::Host))
        }
        other => other,
    }
}

/// Notes at all blocks that lie in some pages that something is special about those.
fn flag_blocks(device: &mut DeviceState, id: SegmentId, pages: &ops::Range<u64>) {
    // What is flagged is in no thread's cache. Leaving one may free a block, and merge it with others.
    let cached = |device: &DeviceState| {
        let blocks = device.heap.blocks_in(id, pages);
        blocks.into_iter().find(|&block| device.heap.blocks[block].thread.is_some())
    };
    while let Some(block) = cached(device) {
        device.take_from_cache(block);
    }
    for block in device.heap.blocks_in(id, pages) {
        device.heap.blocks[block].may_have_flags = true;
    }
}

/// Drops the contents of the whole pages inside a range of a live allocation, in the order of a stream, and populates
/// them again: at home, where there is room, else where they lie.
///
/// # Errors
/// As [`prefetch`]; [`Error::InvalidArgument`] also where no whole page lies inside the range,
/// [`Error::NotSupported`] where the driver cannot discard. Where the driver fails half-way, contents may be lost.
pub(crate) fn discard(device: &mut DeviceState, ptr: DevicePtr, bytes: u64, stream: Stream) -> Result<()> {
    let (block, range) = hinted(device, "discard", ptr, bytes)?;
    if !device.gpu.info.discard {
        return Err(Error::NotSupported(
            "discard: this driver cannot discard memory: it needs CUDA 13.0 (driver 580) and concurrent managed access"
                .into(),
        ));
    }
    let (id, list) = (device.heap.blocks[block].segment, device.heap.blocks[block].list);
    let segment = device.heap.segment(id);
    let whole = pages::inside(range.ptr.0 - segment.base.0, range.bytes);
    if whole.is_empty() {
        return Err(Error::InvalidArgument(format!(
            "discard: no whole page of 2 MiB lies inside the {bytes} bytes at {ptr:?}, and only whole pages can be \
             discarded"
        )));
    }
    let _relaxed = device.gpu.relaxed()?;
    must_not_capture(device, "discard", stream)?;
    let (place, order) = (segment.place, Order::on(stream));
    let at_home = segment.flags.nonresident.runs(whole.clone(), false);
    let elsewhere = segment.flags.nonresident.runs(whole, true);
    if stream != device.heap.pools[list].stream {
        // Nobody else may have the memory before it is dropped.
        device.waits.record_use(block, (device.gpu.index, stream), false);
        device.heap.blocks[block].has_uses = true;
    }
    device.heap.blocks[block].may_have_flags = true;
    for run in at_home {
        residency::migrate(device, id, run, place, true, order)?;
    }
    for run in elsewhere {
        let room = residency::capacity_for(device, place, run.end - run.start)?.min(run.end - run.start);
        let (home, rest) = (run.start..run.start + room, run.start + room..run.end);
        for (pages, to) in [(home, place), (rest, place.other())] {
            if !pages.is_empty() {
                residency::migrate(device, id, pages.clone(), to, true, order)?;
                residency::count_moved(device, id, pages, to);
            }
        }
    }
    residency::note_flags(device, block);
    device.accounting.places.discards += 1;
    eviction::note_pressure(device, 0);
    Ok(())
}
