//! The machine as the allocator's [`Driver`].

use crate::machine::Machine;
use crate::profile::Config;
use crate::types::CaptureStatus;
use torch_uvm::driver::{
    Advice, CaptureMode, DeviceIndex, DeviceInfo, DeviceMemory, DevicePtr, Driver, Event, HostMemory, IpcHandle,
    Location, Range, Result, Stream,
};

/// A [`Driver`] over a [`Machine`].
#[derive(Clone)]
pub struct SimDriver {
    machine: Machine,
}

impl SimDriver {
    /// A driver over a machine of its own.
    #[must_use]
    pub fn new(config: Config) -> SimDriver {
        SimDriver { machine: Machine::new(config) }
    }

    /// A driver over this machine.
    #[must_use]
    pub fn over(machine: Machine) -> SimDriver {
        SimDriver { machine }
    }

    /// The machine: to launch work on it, to plant faults, to look inside.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }
}

impl Driver for SimDriver {
    fn device_count(&self) -> Result<DeviceIndex> {
        Ok(self.machine.device_count()?)
    }

    fn device_info(&self, device: DeviceIndex) -> Result<DeviceInfo> {
        Ok(self.machine.device_info(device)?)
    }

    fn device_memory(&self, device: DeviceIndex) -> Result<DeviceMemory> {
        Ok(self.machine.device_memory(device)?)
    }

    fn host_memory(&self) -> Result<HostMemory> {
        Ok(self.machine.host_memory()?)
    }

    fn alloc_managed(&self, device: DeviceIndex, bytes: u64) -> Result<DevicePtr> {
        Ok(self.machine.alloc_managed(device, bytes)?)
    }

    fn alloc_device(&self, device: DeviceIndex, bytes: u64) -> Result<DevicePtr> {
        Ok(self.machine.alloc_device(device, bytes)?)
    }

    fn free(&self, device: DeviceIndex, ptr: DevicePtr) -> Result<()> {
        Ok(self.machine.free(device, ptr)?)
    }

    fn advise(&self, device: DeviceIndex, range: Range, advice: Advice) -> Result<()> {
        Ok(self.machine.advise(device, range, advice)?)
    }

    fn prefetch(&self, device: DeviceIndex, range: Range, to: Location, stream: Stream) -> Result<()> {
        Ok(self.machine.prefetch(device, range, to, stream)?)
    }

    fn discard(&self, device: DeviceIndex, range: Range, stream: Stream) -> Result<()> {
        Ok(self.machine.discard(device, &[range], stream)?)
    }

    fn stream_create(&self, device: DeviceIndex) -> Result<Stream> {
        Ok(self.machine.stream_create(device, true, 0)?)
    }

    fn stream_destroy(&self, device: DeviceIndex, stream: Stream) -> Result<()> {
        Ok(self.machine.stream_destroy(device, stream)?)
    }

    fn stream_synchronize(&self, device: DeviceIndex, stream: Stream) -> Result<()> {
        Ok(self.machine.stream_synchronize(device, stream)?)
    }

    fn stream_is_capturing(&self, device: DeviceIndex, stream: Stream) -> Result<bool> {
        Ok(self.machine.stream_is_capturing(device, stream)? != CaptureStatus::None)
    }

    fn device_synchronize(&self, device: DeviceIndex) -> Result<()> {
        Ok(self.machine.device_synchronize(device)?)
    }

    fn event_create(&self, device: DeviceIndex) -> Result<Event> {
        Ok(self.machine.event_create(device, false)?)
    }

    fn event_record(&self, device: DeviceIndex, event: Event, stream: Stream) -> Result<()> {
        Ok(self.machine.event_record(device, event, stream)?)
    }

    fn stream_wait_event(&self, device: DeviceIndex, stream: Stream, event: Event) -> Result<()> {
        Ok(self.machine.stream_wait_event(device, stream, event)?)
    }

    fn event_query(&self, device: DeviceIndex, event: Event) -> Result<bool> {
        Ok(self.machine.event_query(device, event)?)
    }

    fn event_synchronize(&self, device: DeviceIndex, event: Event) -> Result<()> {
        Ok(self.machine.event_synchronize(device, event)?)
    }

    fn event_destroy(&self, device: DeviceIndex, event: Event) -> Result<()> {
        Ok(self.machine.event_destroy(device, event)?)
    }

    fn exchange_capture_mode(&self, mode: CaptureMode) -> Result<CaptureMode> {
        Ok(self.machine.exchange_capture_mode(mode)?)
    }

    fn ipc_handle(&self, device: DeviceIndex, ptr: DevicePtr) -> Result<IpcHandle> {
        Ok(self.machine.ipc_handle(device, ptr)?)
    }
}
