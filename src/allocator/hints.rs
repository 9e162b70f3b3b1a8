//! Hints about live allocations, as programs give them.

use super::{Allocator, flushed};
use crate::device::allocations;
use crate::device::hints;
use crate::device::state::DeviceState;
use crate::driver::{Advice, DevicePtr, Location, Stream};
use crate::error::Result;

/// Hints about live allocations, on whatever device.
#[derive(Clone, Copy)]
pub struct Hints<'a>(pub(super) &'a Allocator);

impl Hints<'_> {
    /// Runs `f` on the device that a hint's address belongs to: one inside an allocation will do.
    fn hint(&self, what: &str, ptr: DevicePtr, f: impl FnOnce(&mut DeviceState) -> Result<()>) -> Result<()> {
        for state in self.0.devices() {
            let mut state = flushed(state);
            if allocations::holds(&state, ptr) {
                return f(&mut state);
            }
        }
        Err(hints::no_allocation(what, ptr))
    }

    /// Moves the pages that a range inside one live allocation touches, in the order of a stream of its device. `to` is
    /// that device or the host. Neighbours on the first and the last page move too, which is harmless; the accounting
    /// has the whole pages inside the range. When the allocation is freed and its memory used again, the pages go back
    /// home, as far as the device limit allows.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::error::Error::InvalidArgument) for a range that is not inside one live
    /// allocation, another device, or more than the host can take;
    /// [`Error::NotSupported`](crate::error::Error::NotSupported) for memory that is not managed and a stream that
    /// captures; the driver's. Nothing has changed then.
    pub fn prefetch(&self, ptr: DevicePtr, bytes: u64, to: Location, stream: Stream) -> Result<()> {
        self.hint("prefetch", ptr, |state| hints::prefetch(state, ptr, bytes, to, stream))
    }

    /// Gives the driver advice about the pages that a range inside one live allocation touches, neighbours included.
    /// When the allocation is freed and its memory used again, the pages have the allocator's own advice again.
    ///
    /// # Errors
    /// As [`Hints::prefetch`], but for the stream.
    pub fn advise(&self, ptr: DevicePtr, bytes: u64, advice: Advice) -> Result<()> {
        self.hint("advise", ptr, |state| hints::advise(state, ptr, bytes, advice))
    }

    /// Drops the contents of the whole pages inside a range inside one live allocation, in the order of a stream of its
    /// device, and populates them again, so that writing to them is fast. What they hold then is indeterminate.
    ///
    /// # Errors
    /// As [`Hints::prefetch`]; [`Error::InvalidArgument`](crate::error::Error::InvalidArgument) also where no whole
    /// page lies inside the range, [`Error::NotSupported`](crate::error::Error::NotSupported) also where the driver
    /// cannot discard. Where the driver fails half-way, contents may be lost.
    pub fn discard(&self, ptr: DevicePtr, bytes: u64, stream: Stream) -> Result<()> {
        self.hint("discard", ptr, |state| hints::discard(state, ptr, bytes, stream))
    }
}
