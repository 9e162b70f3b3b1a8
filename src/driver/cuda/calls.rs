//! [`Driver`] by the calls of the CUDA driver API, each with what the manual says of it.

use std::ffi::c_uint;
use std::os::fd::{BorrowedFd, OwnedFd};

use cudarc::driver::sys::{
    CUevent, CUevent_flags, CUipcMemHandle, CUmem_advise, CUmemAttach_flags, CUresult, CUstream, CUstream_flags,
    CUstreamCaptureMode, CUstreamCaptureStatus,
};

use super::{CudaDriver, call};
use crate::driver::host::HostMemoryFiles;
use crate::driver::{
    Advice, CaptureMode, Chunk, DeviceIndex, DeviceInfo, DeviceMemory, DevicePtr, Driver, DriverError, ErrorKind,
    Event, HostMemory, IpcHandle, Location, Range, Result, Stream,
};

fn cu_stream(stream: Stream) -> CUstream {
    stream.0 as CUstream
}

fn cu_event(event: Event) -> CUevent {
    event.0 as CUevent
}

fn capture_mode_to_cuda(mode: CaptureMode) -> c_uint {
    (match mode {
        CaptureMode::Global => CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL,
        CaptureMode::ThreadLocal => CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
        CaptureMode::Relaxed => CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED,
    }) as c_uint
}

/// The strictest mode stands for one that a newer driver might invent: it forbids most.
fn capture_mode_from_cuda(mode: c_uint) -> CaptureMode {
    [CaptureMode::ThreadLocal, CaptureMode::Relaxed]
        .into_iter()
        .find(|&known| capture_mode_to_cuda(known) == mode)
        .unwrap_or(CaptureMode::Global)
}

impl Driver for CudaDriver {
    fn device_count(&self) -> Result<DeviceIndex> {
        // From a c_int, so it fits.
        Ok(self.devices()?.list.len() as DeviceIndex)
    }

    fn device_info(&self, device: DeviceIndex) -> Result<DeviceInfo> {
        Ok(self.device(device, "cuDeviceGet")?.info.clone())
    }

    fn device_memory(&self, device: DeviceIndex) -> Result<DeviceMemory> {
        let _context = self.enter(device, "cuMemGetInfo")?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both are writable.
        unsafe { call!(self.api, cuMemGetInfo(&raw mut free, &raw mut total)) }?;
        Ok(DeviceMemory { free: free as u64, total: total as u64 })
    }

    fn host_memory(&self) -> Result<HostMemory> {
        // Where CUDA is not initialised yet it stays so: a process may ask and then fork.
        let devices = self.devices.get().map_or(&[][..], |devices| &devices.list);
        let gpu_nodes: Vec<i32> = devices.iter().filter_map(|device| device.memory_numa_node).collect();
        HostMemoryFiles::from_env().read(&gpu_nodes)
    }

    fn alloc_managed(&self, device: DeviceIndex, bytes: u64) -> Result<DevicePtr> {
        let _context = self.enter(device, "cuMemAllocManaged")?;
        let mut ptr = 0;
        // "If bytesize is 0, cuMemAllocManaged returns CUDA_ERROR_INVALID_VALUE." "If CU_MEM_ATTACH_GLOBAL is
        // specified, then this memory is accessible from any stream on any device."
        let flags = CUmemAttach_flags::CU_MEM_ATTACH_GLOBAL as c_uint;
        // SAFETY: `ptr` is writable.
        unsafe { call!(self.api, cuMemAllocManaged(&raw mut ptr, bytes as usize, flags)) }?;
        Ok(DevicePtr(ptr))
    }

    fn alloc_device(&self, device: DeviceIndex, bytes: u64) -> Result<DevicePtr> {
        let _context = self.enter(device, "cuMemAlloc")?;
        let mut ptr = 0;
        // "If bytesize is 0, cuMemAlloc() returns CUDA_ERROR_INVALID_VALUE."
        // SAFETY: `ptr` is writable.
        unsafe { call!(self.api, cuMemAlloc(&raw mut ptr, bytes as usize)) }?;
        Ok(DevicePtr(ptr))
    }

    fn free(&self, device: DeviceIndex, ptr: DevicePtr) -> Result<()> {
        let _context = self.enter(device, "cuMemFree")?;
        // "Frees the memory space pointed to by dptr, which must have been returned by a previous call to one of the
        // following memory allocation APIs - cuMemAlloc() […] cuMemAllocManaged()": CUDA checks it, and answers
        // CUDA_ERROR_INVALID_VALUE.
        // SAFETY: no pointers; whoever still used the memory is the caller's affair (trait Driver).
        unsafe { call!(self.api, cuMemFree(ptr.0)) }
    }

    fn advise(&self, device: DeviceIndex, range: Range, advice: Advice) -> Result<()> {
        let (kind, location) = match advice {
            Advice::SetPreferredLocation(at) => (CUmem_advise::CU_MEM_ADVISE_SET_PREFERRED_LOCATION, Some(at)),
            Advice::UnsetPreferredLocation => (CUmem_advise::CU_MEM_ADVISE_UNSET_PREFERRED_LOCATION, None),
            Advice::SetAccessedBy(by) => (CUmem_advise::CU_MEM_ADVISE_SET_ACCESSED_BY, Some(by)),
            Advice::UnsetAccessedBy(by) => (CUmem_advise::CU_MEM_ADVISE_UNSET_ACCESSED_BY, Some(by)),
            Advice::SetReadMostly => (CUmem_advise::CU_MEM_ADVISE_SET_READ_MOSTLY, None),
            Advice::UnsetReadMostly => (CUmem_advise::CU_MEM_ADVISE_UNSET_READ_MOSTLY, None),
        };
        // "The location argument is ignored for this advice", says the manual of each kind without one.
        let location = location.unwrap_or(Location::Device(device));
        let _context = self.enter(device, "cuMemAdvise")?;
        let (ptr, bytes) = (range.ptr.0, range.bytes as usize);
        match (self.api.cuMemAdvise_v2, self.api.cuMemAdvise) {
            (Some(advise), _) if self.devices()?.has_locations => {
                let location = self.location(location, "cuMemAdvise")?;
                // SAFETY: no pointers to host memory; CUDA checks the range ("The memory range must refer to managed
                // memory").
                self.api.check("cuMemAdvise", unsafe { advise(ptr, bytes, kind, location) })
            }
            (_, Some(advise)) => {
                let location = self.device_or_cpu(location, "cuMemAdvise")?;
                // SAFETY: as above.
                self.api.check("cuMemAdvise", unsafe { advise(ptr, bytes, kind, location) })
            }
            _ => Err(no_managed_calls("cuMemAdvise")),
        }
    }

    fn prefetch(&self, device: DeviceIndex, range: Range, to: Location, stream: Stream) -> Result<()> {
        let _context = self.enter(device, "cuMemPrefetchAsync")?;
        let (ptr, bytes, stream) = (range.ptr.0, range.bytes as usize, cu_stream(stream));
        match (self.api.cuMemPrefetchAsync_v2, self.api.cuMemPrefetchAsync) {
            (Some(prefetch), _) if self.devices()?.has_locations => {
                let to = self.location(to, "cuMemPrefetchAsync")?;
                // "flags: flags for future use, must be zero now."
                // SAFETY: no pointers to host memory; CUDA checks the range ("The memory range must refer to managed
                // memory") and its size.
                self.api.check("cuMemPrefetchAsync", unsafe { prefetch(ptr, bytes, to, 0, stream) })
            }
            (_, Some(prefetch)) => {
                let to = self.device_or_cpu(to, "cuMemPrefetchAsync")?;
                // SAFETY: as above.
                self.api.check("cuMemPrefetchAsync", unsafe { prefetch(ptr, bytes, to, stream) })
            }
            _ => Err(no_managed_calls("cuMemPrefetchAsync")),
        }
    }

    fn discard(&self, device: DeviceIndex, range: Range, stream: Stream) -> Result<()> {
        const CALL: &str = "cuMemDiscardBatchAsync";
        let supported = self.device(device, CALL)?.info.discard;
        let Some(discard) = self.api.cuMemDiscardBatchAsync.filter(|_| supported) else {
            return Err(DriverError {
                kind: ErrorKind::NotSupported,
                call: CALL,
                code: CUresult::CUDA_ERROR_NOT_SUPPORTED as i32,
                name: "CUDA_ERROR_NOT_SUPPORTED".to_owned(),
                message: format!(
                    "discarding managed memory needs a driver of CUDA 13.0 or newer, and concurrent managed access; \
                     device {device} lacks one of them"
                ),
            });
        };
        let _context = self.enter(device, CALL)?;
        let (mut ptr, mut bytes) = (range.ptr.0, range.bytes as usize);
        // "flags: Flags reserved for future use. Must be zero." "hStream: […] Must not be legacy NULL stream."
        // SAFETY: arrays of one element each, readable; CUDA checks the range.
        self.api.check(CALL, unsafe { discard(&raw mut ptr, &raw mut bytes, 1, 0, cu_stream(stream)) })
    }

    fn stream_create(&self, device: DeviceIndex) -> Result<Stream> {
        let _context = self.enter(device, "cuStreamCreate")?;
        let mut stream = std::ptr::null_mut();
        // "CU_STREAM_NON_BLOCKING: Stream does not synchronize with stream 0 (the NULL stream)"
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        // SAFETY: `stream` is writable.
        unsafe { call!(self.api, cuStreamCreate(&raw mut stream, flags)) }?;
        Ok(Stream(stream as u64))
    }

    fn stream_destroy(&self, device: DeviceIndex, stream: Stream) -> Result<()> {
        let _context = self.enter(device, "cuStreamDestroy")?;
        // "In case the device is still doing work in the stream hStream when cuStreamDestroy() is called, the function
        // will return immediately and the resources […] will be released automatically once the device has completed".
        // SAFETY: a stream made by `stream_create` and not destroyed since (trait Driver).
        unsafe { call!(self.api, cuStreamDestroy(cu_stream(stream))) }
    }

    fn stream_synchronize(&self, device: DeviceIndex, stream: Stream) -> Result<()> {
        let _context = self.enter(device, "cuStreamSynchronize")?;
        // SAFETY: a live stream (trait Driver).
        unsafe { call!(self.api, cuStreamSynchronize(cu_stream(stream))) }
    }

    fn stream_is_capturing(&self, device: DeviceIndex, stream: Stream) -> Result<bool> {
        let _context = self.enter(device, "cuStreamIsCapturing")?;
        let mut status = 0;
        // "if this is called on CU_STREAM_LEGACY (the "null stream") while a blocking stream in the same context is
        // capturing, it will return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT": an error here too, of kind StreamCapture.
        // SAFETY: `status` is writable; a live stream (trait Driver).
        unsafe { call!(self.api, cuStreamIsCapturing(cu_stream(stream), &raw mut status)) }?;
        Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE as c_uint)
    }

    fn device_synchronize(&self, device: DeviceIndex) -> Result<()> {
        let _context = self.enter(device, "cuCtxSynchronize")?;
        // SAFETY: no pointers.
        unsafe { call!(self.api, cuCtxSynchronize()) }
    }

    fn event_create(&self, device: DeviceIndex) -> Result<Event> {
        let _context = self.enter(device, "cuEventCreate")?;
        let mut event = std::ptr::null_mut();
        // "Events created with [CU_EVENT_DISABLE_TIMING] […] will provide the best performance when used with
        // cuStreamWaitEvent() and cuEventQuery()."
        let flags = CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint;
        // SAFETY: `event` is writable.
        unsafe { call!(self.api, cuEventCreate(&raw mut event, flags)) }?;
        Ok(Event(event as u64))
    }

    fn event_record(&self, device: DeviceIndex, event: Event, stream: Stream) -> Result<()> {
        // "hEvent and hStream must be from the same context": both are the device's (trait Driver).
        let _context = self.enter(device, "cuEventRecord")?;
        // SAFETY: a live event and a live stream (trait Driver).
        unsafe { call!(self.api, cuEventRecord(cu_event(event), cu_stream(stream))) }
    }

    fn stream_wait_event(&self, device: DeviceIndex, stream: Stream, event: Event) -> Result<()> {
        let _context = self.enter(device, "cuStreamWaitEvent")?;
        // "CU_EVENT_WAIT_DEFAULT: Default event wait flag", 0.
        // SAFETY: a live stream and a live event (trait Driver).
        unsafe { call!(self.api, cuStreamWaitEvent(cu_stream(stream), cu_event(event), 0)) }
    }

    fn event_query(&self, device: DeviceIndex, event: Event) -> Result<bool> {
        let _context = self.enter(device, "cuEventQuery")?;
        // "Returns CUDA_SUCCESS if all captured work has been completed, or CUDA_ERROR_NOT_READY if any captured work
        // is incomplete." "Before the first call to cuEventRecord(), an event represents an empty set of work".
        // SAFETY: a live event (trait Driver).
        match unsafe { (self.api.cuEventQuery)(cu_event(event)) } {
            code if code == CUresult::CUDA_ERROR_NOT_READY as c_uint => Ok(false),
            code => self.api.check("cuEventQuery", code).map(|()| true),
        }
    }

    fn event_synchronize(&self, device: DeviceIndex, event: Event) -> Result<()> {
        let _context = self.enter(device, "cuEventSynchronize")?;
        // SAFETY: a live event (trait Driver).
        unsafe { call!(self.api, cuEventSynchronize(cu_event(event))) }
    }

    fn event_destroy(&self, device: DeviceIndex, event: Event) -> Result<()> {
        let _context = self.enter(device, "cuEventDestroy")?;
        // "An event may be destroyed before it is complete […]. In this case, the call does not block on completion of
        // the event, and any associated resources will automatically be released asynchronously at completion."
        // SAFETY: a live event (trait Driver).
        unsafe { call!(self.api, cuEventDestroy(cu_event(event))) }
    }

    fn exchange_capture_mode(&self, mode: CaptureMode) -> Result<CaptureMode> {
        let mut mode = capture_mode_to_cuda(mode);
        // "Sets the calling thread's stream capture interaction mode to the value contained in *mode, and overwrites
        // *mode with the previous mode for the thread." Needs no context.
        // SAFETY: `mode` is readable and writable.
        unsafe { call!(self.api, cuThreadExchangeStreamCaptureMode(&raw mut mode)) }?;
        Ok(capture_mode_from_cuda(mode))
    }

    fn ipc_handle(&self, device: DeviceIndex, ptr: DevicePtr) -> Result<IpcHandle> {
        let _context = self.enter(device, "cuIpcGetMemHandle")?;
        let mut handle = CUipcMemHandle { reserved: [0; 64] };
        // "Takes a pointer to the base of an existing device memory allocation created with cuMemAlloc".
        // SAFETY: `handle` is writable; CUDA checks the address.
        unsafe { call!(self.api, cuIpcGetMemHandle(&raw mut handle, ptr.0)) }?;
        Ok(IpcHandle(handle.reserved.map(|byte| byte as u8)))
    }

    fn chunk_granularity(&self, at: Location) -> Result<u64> {
        self.granularity_of(at)
    }

    fn address_reserve(&self, bytes: u64, alignment: u64) -> Result<DevicePtr> {
        self.reserve(bytes, alignment)
    }

    fn address_free(&self, range: Range) -> Result<()> {
        self.free_reservation(range)
    }

    fn chunk_create(&self, at: Location, bytes: u64, shareable: bool) -> Result<Chunk> {
        self.create(at, bytes, shareable)
    }

    fn chunk_release(&self, chunk: Chunk) -> Result<()> {
        self.release(chunk)
    }

    fn chunk_map(&self, range: Range, chunk: Chunk) -> Result<()> {
        self.map(range, chunk)
    }

    fn chunk_unmap(&self, range: Range) -> Result<()> {
        self.unmap(range)
    }

    fn set_access(&self, range: Range, by: &[Location]) -> Result<()> {
        self.give_access(range, by)
    }

    fn chunk_export(&self, chunk: Chunk) -> Result<OwnedFd> {
        self.export(chunk)
    }

    fn chunk_import(&self, descriptor: BorrowedFd<'_>) -> Result<Chunk> {
        self.import(descriptor)
    }
}

/// A driver library with neither form of a managed-memory call.
fn no_managed_calls(call: &'static str) -> DriverError {
    DriverError {
        kind: ErrorKind::Unavailable,
        call,
        code: -1,
        name: "driver unavailable".to_owned(),
        message: format!("the NVIDIA driver library has neither {call} nor {call}_v2"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capture_modes_survive_the_way_to_cuda_and_back() {
        for mode in [CaptureMode::Global, CaptureMode::ThreadLocal, CaptureMode::Relaxed] {
            assert_eq!(capture_mode_from_cuda(capture_mode_to_cuda(mode)), mode);
        }
        assert_eq!(capture_mode_from_cuda(77), CaptureMode::Global);
    }
}
