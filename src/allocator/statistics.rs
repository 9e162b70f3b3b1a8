//! The statistics of each device.

use super::{Allocator, flushed};
use crate::device::SegmentPlace;
use crate::device::snapshot;
use crate::driver::DeviceIndex;
use crate::error::Result;
use crate::history::PlaceSample;
use crate::ids::MempoolId;
use crate::stats::{DeviceStats, PlaceStats, StatArray};

impl Allocator {
    /// What is populated where on a device, and what moved.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::error::Error::InvalidArgument) for a bad device.
    pub fn place_stats(&self, device: DeviceIndex) -> Result<PlaceStats> {
        Ok(flushed(self.device(device)?).accounting().places)
    }

    /// How what is populated where has changed while the memory history was recorded, oldest first.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::error::Error::InvalidArgument) for a bad device.
    pub fn place_samples(&self, device: DeviceIndex) -> Result<Vec<PlaceSample>> {
        Ok(flushed(self.device(device)?).accounting().samples())
    }

    /// The segments of a device by address, and where their pages lie.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::error::Error::InvalidArgument) for a bad device.
    pub fn segment_places(&self, device: DeviceIndex) -> Result<Vec<SegmentPlace>> {
        Ok(snapshot::segment_places(&flushed(self.device(device)?)))
    }

    /// The statistics of a device.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::error::Error::InvalidArgument) for a bad device.
    pub fn device_stats(&self, device: DeviceIndex) -> Result<DeviceStats> {
        Ok(flushed(self.device(device)?).accounting().stats)
    }

    /// The bytes reserved in each private pool of a device; those of pools that are gone stay, at 0, until a reset.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::error::Error::InvalidArgument) for a bad device.
    pub fn pool_reserved(&self, device: DeviceIndex) -> Result<Vec<(MempoolId, StatArray)>> {
        Ok(flushed(self.device(device)?).accounting().pool_reserved().collect())
    }

    /// Starts the accumulated statistics anew.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::error::Error::InvalidArgument) for a bad device.
    pub fn reset_accumulated_stats(&self, device: DeviceIndex) -> Result<()> {
        flushed(self.device(device)?).reset_accumulated_stats();
        Ok(())
    }

    /// Starts the peaks anew.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::error::Error::InvalidArgument) for a bad device.
    pub fn reset_peak_stats(&self, device: DeviceIndex) -> Result<()> {
        flushed(self.device(device)?).reset_peak_stats();
        Ok(())
    }
}
