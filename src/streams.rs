//! Recorded uses on other streams, their events, and the frees that wait for them.
//!
//! A block that was recorded on other streams (`record_stream`) is not reusable when the program frees it, but when
//! the work queued there until then has completed: an event is recorded on each of those streams at the free. While any
//! stream captures, events may not be recorded for this purpose nor queried, so such frees are deferred until
//! no capture is underway.
//!
//! An event that CUDA refuses (its stream was destroyed) concerns one block only: that stays unavailable, and nobody
//! else hears of it. It is tried again when memory is given back or runs out, not at each request.
//!
//! This module knows which blocks wait for what; it does not know what becomes of a block that has finished waiting.

use crate::driver::{DeviceIndex, Driver, DriverError, Event, Result, Stream, captures};
use crate::ids::BlockId;
use rustc_hash::FxHashMap;
use std::collections::VecDeque;

/// A stream of a device: the handles of the legacy default stream are the same on all devices.
pub type StreamOn = (DeviceIndex, Stream);

#[derive(Clone, Copy)]
struct Use {
    stream: StreamOn,
    /// Recorded only while the stream captured: then the graph orders it, and no event is needed after.
    captured: bool,
}

/// Which blocks wait for which streams.
#[derive(Default)]
pub struct Waits {
    uses: FxHashMap<BlockId, Vec<Use>>,
    /// Freed blocks whose events are still to be recorded, since something captures.
    deferred: VecDeque<BlockId>,
    /// Freed blocks of which CUDA refused an event.
    refused: Vec<BlockId>,
    /// Events in the order they were recorded on each stream.
    pending: FxHashMap<StreamOn, VecDeque<(Event, BlockId)>>,
    /// How many pending events each block waits for.
    outstanding: FxHashMap<BlockId, u32>,
    /// Events ready to be used again.
    idle_events: FxHashMap<DeviceIndex, Vec<Event>>,
}

impl Waits {
    /// Whether no free may be over: the hot path then asks nothing of CUDA.
    #[inline]
    pub fn is_idle(&self) -> bool {
        self.pending.is_empty() && self.deferred.is_empty()
    }

    /// Notes that a live block is used on another stream; `captured`: by work that goes into a graph.
    pub fn record_use(&mut self, block: BlockId, stream: StreamOn, captured: bool) {
        let uses = self.uses.entry(block).or_default();
        match uses.iter_mut().find(|u| u.stream == stream) {
            Some(known) => known.captured &= captured,
            None => uses.push(Use { stream, captured }),
        }
    }

    /// The streams a block is known to be used on.
    pub fn uses(&self, block: BlockId) -> Vec<StreamOn> {
        self.uses.get(&block).map(|uses| uses.iter().map(|u| u.stream).collect()).unwrap_or_default()
    }

    /// Forgets the uses of a block that is not waited for after all.
    pub fn forget(&mut self, block: BlockId) {
        self.uses.remove(&block);
    }

    /// A block with uses was freed while a capture is underway: its events are recorded afterwards.
    pub fn defer(&mut self, block: BlockId) {
        self.deferred.push_back(block);
    }

    /// A block with uses was freed: records its events. Answers whether there is anything to wait for.
    ///
    /// A stream may capture although its user's device knows of none: it is another device's, or the program captures
    /// by itself. An event recorded there would be part of the graph and never complete, so the block is deferred.
    ///
    /// Uses whose event CUDA refuses are kept, and the block stays unavailable until the events can be recorded.
    pub fn freed(&mut self, driver: &dyn Driver, block: BlockId) -> bool {
        let mut uses = self.uses.remove(&block).unwrap_or_default();
        while let Some(next) = uses.last().copied() {
            match self.record_event(driver, block, next.stream) {
                Ok(true) => {
                    uses.pop();
                    continue;
                }
                Ok(false) => self.deferred.push_back(block),
                Err(error) => {
                    let (device, stream) = next.stream;
                    tracing::warn!(device, ?stream, %error, "a free waits until its event can be recorded");
                    self.refused.push(block);
                }
            }
            self.uses.insert(block, uses);
            return true;
        }
        self.outstanding.contains_key(&block)
    }

    /// False: the stream captures.
    fn record_event(&mut self, driver: &dyn Driver, block: BlockId, on: StreamOn) -> Result<bool> {
        let (device, stream) = on;
        if captures(driver, device, stream)? {
            return Ok(false);
        }
        let idle = self.idle_events.entry(device).or_default();
        let event = match idle.pop() {
            Some(event) => event,
            None => driver.event_create(device)?,
        };
        if let Err(error) = driver.event_record(device, event, stream) {
            idle.push(event);
            return Err(error);
        }
        self.pending.entry(on).or_default().push_back((event, block));
        *self.outstanding.entry(block).or_insert(0) += 1;
        Ok(true)
    }

    /// From now on events that CUDA refused are tried again, once.
    pub fn retry_refused(&mut self) {
        self.deferred.extend(self.refused.drain(..));
    }

    /// Records the events of deferred frees. Blocks that have nothing to wait for are pushed to `done`.
    pub fn record_deferred(&mut self, driver: &dyn Driver, done: &mut Vec<BlockId>) {
        for _ in 0..self.deferred.len() {
            let Some(block) = self.deferred.pop_front() else { break };
            if let Some(uses) = self.uses.get_mut(&block) {
                // Streams recorded in a capture joined it before it ended: what they did has been replayed in order.
                // Whether it has ended, they say themselves.
                uses.retain(|u| !u.captured || captures(driver, u.stream.0, u.stream.1) != Ok(false));
            }
            if !self.freed(driver, block) {
                done.push(block);
            }
        }
    }

    /// Asks which events have completed, oldest first on each stream; blocks that wait for nothing more are
    /// pushed to `done`.
    pub fn poll(&mut self, driver: &dyn Driver, done: &mut Vec<BlockId>) {
        let streams: Vec<StreamOn> = self.pending.keys().copied().collect();
        for on in streams {
            while let Some(&(event, _)) = self.pending.get(&on).and_then(VecDeque::front) {
                match driver.event_query(on.0, event) {
                    Ok(true) => self.completed(on, 0, done),
                    Ok(false) => break,
                    Err(error) => self.failed(driver, on, 0, &error),
                }
            }
        }
    }

    /// Waits for the events of all blocks that `which` selects; they are pushed to `done`.
    pub fn synchronize(&mut self, driver: &dyn Driver, which: impl Fn(BlockId) -> bool, done: &mut Vec<BlockId>) {
        let streams: Vec<StreamOn> = self.pending.keys().copied().collect();
        for on in streams {
            let mut index = 0;
            while let Some(&(event, block)) = self.pending.get(&on).and_then(|queue| queue.get(index)) {
                if !which(block) {
                    index += 1;
                    continue;
                }
                match driver.event_synchronize(on.0, event) {
                    Ok(()) => self.completed(on, index, done),
                    Err(error) => self.failed(driver, on, index, &error),
                }
            }
        }
    }

    /// Takes an event out of its stream's queue. Answers it, its block, and whether that waits for no other.
    fn take(&mut self, on: StreamOn, index: usize) -> Option<(Event, BlockId, bool)> {
        let queue = self.pending.get_mut(&on)?;
        let (event, block) = queue.remove(index)?;
        if queue.is_empty() {
            self.pending.remove(&on);
        }
        let count = self.outstanding.get_mut(&block)?;
        *count -= 1;
        let last = *count == 0;
        if last {
            self.outstanding.remove(&block);
        }
        Some((event, block, last))
    }

    fn completed(&mut self, on: StreamOn, index: usize, done: &mut Vec<BlockId>) {
        let Some((event, block, last)) = self.take(on, index) else { return };
        self.idle_events.entry(on.0).or_default().push(event);
        // A block with a use that could not be recorded yet waits for that.
        if last && !self.uses.contains_key(&block) {
            done.push(block);
        }
    }

    /// CUDA does not say whether an event has completed: another one is recorded later.
    fn failed(&mut self, driver: &dyn Driver, on: StreamOn, index: usize, error: &DriverError) {
        let Some((event, block, _)) = self.take(on, index) else { return };
        let (device, stream) = on;
        tracing::warn!(device, ?stream, %error, "a free waits until its event can be recorded again");
        if let Err(error) = driver.event_destroy(device, event) {
            tracing::warn!(device, %error, "an event is lost");
        }
        let uses = self.uses.entry(block).or_default();
        // Else the block is deferred or refused already.
        if uses.is_empty() {
            self.refused.push(block);
        }
        uses.push(Use { stream: on, captured: false });
    }

    /// Whether any block that `which` selects waits for an event or has one still to be recorded.
    pub fn any(&self, which: impl Fn(BlockId) -> bool) -> bool {
        self.outstanding.keys().chain(&self.deferred).chain(&self.refused).any(|&block| which(block))
    }
}
