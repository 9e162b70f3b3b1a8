//! The conversation with the driver about one device: what every layer above asks of CUDA, and how it stays legal while
//! some stream captures. Whatever fails half-way is undone before the error is reported.

use crate::driver::{
    Advice, CaptureMode, DeviceIndex, DeviceInfo, DevicePtr, Driver, DriverError, Location, Range, Result, Stream,
    captures,
};
use crate::sizes::SMALL_STEP;
use std::sync::Arc;

/// `cudaStreamLegacy`, beside its usual name, 0.
const STREAM_LEGACY: Stream = Stream(1);

/// Relaxed capture mode for this thread, until dropped: nothing that it asks spoils a capture.
pub struct Relaxed {
    driver: Arc<dyn Driver>,
    before: CaptureMode,
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        if let Err(error) = self.driver.exchange_capture_mode(self.before) {
            tracing::error!(%error, "the thread's stream capture mode could not be restored");
        }
    }
}

/// Where work on memory is ordered.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    /// After what is queued on this stream, and before what comes next.
    pub stream: Stream,
    /// The stream captures: nothing of ours can be queued on it, and work beside it is waited for.
    pub captures: bool,
}

impl Order {
    /// The order of a stream that does not capture.
    pub fn on(stream: Stream) -> Self {
        Self { stream, captures: false }
    }
}

/// A discard that failed.
#[derive(Debug)]
pub struct DiscardError {
    /// The driver's error.
    pub error: DriverError,
    /// The contents are dropped already, and the memory is not populated.
    pub discarded: bool,
}

/// One device, and the driver.
pub struct Gpu {
    /// The device's number.
    pub index: DeviceIndex,
    /// What the device is.
    pub info: DeviceInfo,
    driver: Arc<dyn Driver>,
    /// For what cannot run on the program's streams.
    side_stream: Option<Stream>,
    /// Address ranges that CUDA would not take back when they were half made.
    orphans: Vec<DevicePtr>,
}

impl Gpu {
    /// A device that nothing was asked of yet.
    pub fn new(index: DeviceIndex, info: DeviceInfo, driver: Arc<dyn Driver>) -> Self {
        Self { index, info, driver, side_stream: None, orphans: Vec::new() }
    }

    /// The driver itself.
    #[inline]
    pub fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    /// Relaxed capture mode: for everything that may run while another device, or another thread, captures.
    pub fn relaxed(&self) -> Result<Relaxed> {
        let before = self.driver.exchange_capture_mode(CaptureMode::Relaxed)?;
        Ok(Relaxed { driver: Arc::clone(&self.driver), before })
    }

    /// Whether a stream captures, so that nothing of ours can be queued on it.
    pub fn captures(&self, stream: Stream) -> Result<bool> {
        captures(&*self.driver, self.index, stream)
    }

    /// The order of a stream, whether it captures or not.
    pub fn order(&self, stream: Stream) -> Result<Order> {
        Ok(Order { stream, captures: self.captures(stream)? })
    }

    /// The stream for what cannot run on the program's.
    pub fn side_stream(&mut self) -> Result<Stream> {
        match self.side_stream {
            Some(side) => Ok(side),
            None => Ok(*self.side_stream.insert(self.driver.stream_create(self.index)?)),
        }
    }

    /// Managed address space with its advice.
    pub fn reserve(&mut self, bytes: u64, advice: Vec<Advice>) -> Result<DevicePtr> {
        let base = self.driver.alloc_managed(self.index, bytes)?;
        if let Err(error) = self.advise(Range { ptr: base, bytes }, &advice) {
            self.abandon(base);
            return Err(error);
        }
        Ok(base)
    }

    /// Plain device memory.
    pub fn allocate(&self, bytes: u64) -> Result<DevicePtr> {
        self.driver.alloc_device(self.index, bytes)
    }

    /// Gives memory back whole.
    pub fn free(&self, base: DevicePtr) -> Result<()> {
        self.driver.free(self.index, base)
    }

    /// Gives an unused address range back. One that CUDA will not take now is tried again later.
    pub fn abandon(&mut self, base: DevicePtr) {
        if let Err(error) = self.free(base) {
            tracing::warn!(device = self.index, ?base, %error, "an unused range is kept until CUDA takes it back");
            self.orphans.push(base);
        }
    }

    /// Tries again to give back what CUDA would not take.
    pub fn retry_abandoned(&mut self) {
        for orphan in std::mem::take(&mut self.orphans) {
            self.abandon(orphan);
        }
    }

    /// Waits for all work on the device. Making and freeing an empty range takes microseconds, and waits also where
    /// some stream captures, which synchronising the device would spoil; and the program may have destroyed the streams
    /// that used cached memory.
    pub fn wait_for_work(&mut self) -> Result<()> {
        let empty = self.driver.alloc_managed(self.index, SMALL_STEP)?;
        let freed = self.free(empty);
        if freed.is_err() {
            self.orphans.push(empty);
        }
        freed
    }

    /// Gives advice about a managed range, one after the other.
    pub fn advise(&self, range: Range, all: &[Advice]) -> Result<()> {
        all.iter().try_for_each(|&advice| self.driver.advise(self.index, range, advice))
    }

    /// Moves or populates a managed range, contents and all. Beside a stream that captures it is waited for.
    pub fn prefetch(&mut self, range: Range, to: Location, order: Order) -> Result<()> {
        if !order.captures {
            return self.driver.prefetch(self.index, range, to, order.stream);
        }
        let side = self.side_stream()?;
        self.driver.prefetch(self.index, range, to, side)?;
        self.driver.stream_synchronize(self.index, side)
    }

    /// Drops the contents of a managed range and populates it, in the order of a stream that does not capture.
    pub fn discard_and_prefetch(
        &mut self,
        range: Range,
        to: Location,
        stream: Stream,
    ) -> std::result::Result<(), DiscardError> {
        let mut discarded = false;
        let index = self.index;
        let mut both = |driver: &dyn Driver, on: Stream| {
            driver.discard(index, range, on)?;
            discarded = true;
            driver.prefetch(index, range, to, on)
        };
        // Nothing can be discarded on the legacy default stream, which is PyTorch's usual one.
        let done = if stream == Stream(0) || stream == STREAM_LEGACY {
            self.run_on_side_stream(stream, &mut both)
        } else {
            both(&*self.driver, stream)
        };
        done.map_err(|error| DiscardError { error, discarded })
    }

    /// Drops the contents of a managed range that no stream uses any more, and waits: whatever stream populates and
    /// uses these bytes next comes after.
    pub fn discard_unused(&mut self, range: Range) -> std::result::Result<(), DiscardError> {
        let failed = |discarded| move |error| DiscardError { error, discarded };
        let side = self.side_stream().map_err(failed(false))?;
        self.driver.discard(self.index, range, side).map_err(failed(false))?;
        self.driver.stream_synchronize(self.index, side).map_err(failed(true))
    }

    /// Queues `work` on the side stream in the order of another stream, which does not capture: after what is queued
    /// there, and before what comes next.
    fn run_on_side_stream(
        &mut self,
        stream: Stream,
        work: impl FnOnce(&dyn Driver, Stream) -> Result<()>,
    ) -> Result<()> {
        let side = self.side_stream()?;
        let (driver, device) = (&*self.driver, self.index);
        let event = driver.event_create(device)?;
        let done = driver
            .event_record(device, event, stream)
            .and_then(|()| driver.stream_wait_event(device, side, event))
            .and_then(|()| work(driver, side))
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
}
