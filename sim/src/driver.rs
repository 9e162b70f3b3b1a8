//! The machine as the allocator's [`Driver`].

use crate::error::{Code, SimError};
use crate::fault::EntryPoint;
use crate::machine::Machine;
use crate::profile::Config;
use crate::types::CaptureStatus;
use std::os::fd::{BorrowedFd, OwnedFd};
use torch_uvm::driver::{
    Advice, CaptureMode, Chunk, DeviceIndex, DeviceInfo, DeviceMemory, DevicePtr, Driver, Event, HostMemory, IpcHandle,
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

/// The trait takes no host memory without a node, which cannot be shared.
fn on_a_node(call: EntryPoint, at: Location) -> Result<Location> {
    if at == Location::Host {
        let detail = "chunks of host memory lie on a NUMA node".to_owned();
        return Err(SimError { code: Code::INVALID_VALUE, call: call.driver_name(), detail }.into());
    }
    Ok(at)
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

    fn chunk_granularity(&self, at: Location) -> Result<u64> {
        Ok(self.machine.chunk_granularity(on_a_node(EntryPoint::ChunkGranularity, at)?)?)
    }

    fn address_reserve(&self, bytes: u64, alignment: u64) -> Result<DevicePtr> {
        Ok(self.machine.address_reserve(bytes, alignment)?)
    }

    fn address_free(&self, range: Range) -> Result<()> {
        Ok(self.machine.address_free(range)?)
    }

    fn chunk_create(&self, at: Location, bytes: u64, shareable: bool) -> Result<Chunk> {
        Ok(self.machine.chunk_create(on_a_node(EntryPoint::ChunkCreate, at)?, bytes, shareable)?)
    }

    fn chunk_release(&self, chunk: Chunk) -> Result<()> {
        Ok(self.machine.chunk_release(chunk)?)
    }

    fn chunk_map(&self, range: Range, chunk: Chunk) -> Result<()> {
        Ok(self.machine.chunk_map(range, chunk)?)
    }

    fn chunk_unmap(&self, range: Range) -> Result<()> {
        Ok(self.machine.chunk_unmap(range)?)
    }

    fn set_access(&self, range: Range, by: &[Location]) -> Result<()> {
        let by: Vec<_> = by.iter().map(|&location| (location, true)).collect();
        Ok(self.machine.set_access(range, &by)?)
    }

    fn chunk_export(&self, chunk: Chunk) -> Result<OwnedFd> {
        Ok(self.machine.chunk_export(chunk)?)
    }

    fn chunk_import(&self, descriptor: BorrowedFd<'_>) -> Result<Chunk> {
        Ok(self.machine.chunk_import(descriptor)?)
    }
}
