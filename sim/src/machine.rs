//! The machine: its interface, one method an entry point.
//!
//! Handles, pointers and error codes are CUDA's (`cudaError_t` and `CUresult` share the numbers). Every method takes
//! the device that is current for the caller; for a created stream the stream's own device counts, for the default
//! streams (0 or 1: legacy, 2: per-thread) the device says whose. Any thread may call anything at any time.

use crate::error::{Code, SimError, SimResult};
use crate::fault::{EntryPoint, Fault};
use crate::profile::{Config, Profile};
use crate::types::*;
use std::collections::BTreeMap;
use std::sync::Arc;
use torch_uvm::driver::{
    Advice, CaptureMode, DeviceIndex, DeviceInfo, DeviceMemory, DevicePtr, Event, HostMemory, IpcHandle, Location,
    Range, Stream,
};

/// A simulated CUDA machine: devices, host memory, streams. Cheap to clone; clones are the same machine.
#[derive(Clone)]
pub struct Machine {
    inner: Arc<Config>,
}

fn pending<T>(call: EntryPoint) -> SimResult<T> {
    Err(SimError { code: Code::NOT_SUPPORTED, call: call.driver_name(), detail: "not written yet".into() })
}

impl Machine {
    /// Builds a machine.
    #[must_use]
    pub fn new(config: Config) -> Machine {
        Machine { inner: Arc::new(config) }
    }

    // ---- what it is ---------------------------------------------------------------------------------------------

    /// How it was built.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.inner
    }

    /// The kind of machine.
    #[must_use]
    pub fn profile(&self) -> &Profile {
        &self.config().profile
    }

    /// How many devices there are (`cuDeviceGetCount`).
    pub fn device_count(&self) -> SimResult<DeviceIndex> {
        pending(EntryPoint::DeviceCount)
    }

    /// The constant facts of a device.
    pub fn device_info(&self, _device: DeviceIndex) -> SimResult<DeviceInfo> {
        pending(EntryPoint::DeviceInfo)
    }

    /// `cuMemGetInfo`.
    pub fn device_memory(&self, _device: DeviceIndex) -> SimResult<DeviceMemory> {
        pending(EntryPoint::DeviceMemory)
    }

    /// Host memory, as `/proc/meminfo` of the simulated machine would show it (`MemTotal`, `MemAvailable`).
    pub fn host_memory(&self) -> SimResult<HostMemory> {
        pending(EntryPoint::HostMemory)
    }

    /// Has `notify` called, without any lock of the machine's, after each call that changed the host memory available
    /// (it is also called once at once). One listener a machine; a new one takes the old one's place.
    pub fn on_host_memory_change(&self, _notify: impl Fn(HostMemory) + Send + Sync + 'static) {}

    // ---- memory -------------------------------------------------------------------------------------------------

    /// `cuMemAllocManaged`, attached globally.
    pub fn alloc_managed(&self, _device: DeviceIndex, _bytes: u64) -> SimResult<DevicePtr> {
        pending(EntryPoint::AllocManaged)
    }

    /// `cuMemAlloc`.
    pub fn alloc_device(&self, _device: DeviceIndex, _bytes: u64) -> SimResult<DevicePtr> {
        pending(EntryPoint::AllocDevice)
    }

    /// `cuMemFree` of device and managed memory. Waits for all work. Freeing 0 does nothing.
    pub fn free(&self, _device: DeviceIndex, _ptr: DevicePtr) -> SimResult<()> {
        pending(EntryPoint::Free)
    }

    /// `cuMemHostAlloc`: pinned host memory.
    pub fn host_alloc(&self, _device: DeviceIndex, _bytes: u64) -> SimResult<u64> {
        pending(EntryPoint::HostAlloc)
    }

    /// `cuMemFreeHost`. Waits for all work.
    pub fn host_free(&self, _device: DeviceIndex, _ptr: u64) -> SimResult<()> {
        pending(EntryPoint::HostFree)
    }

    /// `cuMemHostRegister`: pins the caller's own memory.
    pub fn host_register(&self, _device: DeviceIndex, _ptr: u64, _bytes: u64) -> SimResult<()> {
        pending(EntryPoint::HostRegister)
    }

    /// `cuMemHostUnregister`. Waits for all work.
    pub fn host_unregister(&self, _device: DeviceIndex, _ptr: u64) -> SimResult<()> {
        pending(EntryPoint::HostUnregister)
    }

    /// `cuPointerGetAttributes`; never fails for an unknown pointer (it is unregistered memory).
    pub fn pointer_info(&self, _ptr: u64) -> SimResult<PointerInfo> {
        pending(EntryPoint::PointerInfo)
    }

    /// `cuMemGetAddressRange`: base and size of a device or managed allocation.
    pub fn address_range(&self, _ptr: DevicePtr) -> SimResult<Range> {
        pending(EntryPoint::AddressRange)
    }

    /// `cuIpcGetMemHandle`: device allocations only.
    pub fn ipc_handle(&self, _device: DeviceIndex, _ptr: DevicePtr) -> SimResult<IpcHandle> {
        pending(EntryPoint::IpcHandle)
    }

    /// `cuIpcOpenMemHandle`, in this process (CUDA itself refuses that; other processes are not simulated).
    pub fn ipc_open(&self, _device: DeviceIndex, _handle: &IpcHandle) -> SimResult<DevicePtr> {
        pending(EntryPoint::IpcOpen)
    }

    /// `cuIpcCloseMemHandle`.
    pub fn ipc_close(&self, _device: DeviceIndex, _ptr: DevicePtr) -> SimResult<()> {
        pending(EntryPoint::IpcClose)
    }

    /// `cuDeviceCanAccessPeer`.
    pub fn can_access_peer(&self, _device: DeviceIndex, _peer: DeviceIndex) -> SimResult<bool> {
        pending(EntryPoint::CanAccessPeer)
    }

    /// `cuCtxEnablePeerAccess`.
    pub fn enable_peer(&self, _device: DeviceIndex, _peer: DeviceIndex) -> SimResult<()> {
        pending(EntryPoint::EnablePeer)
    }

    /// `cuCtxDisablePeerAccess`.
    pub fn disable_peer(&self, _device: DeviceIndex, _peer: DeviceIndex) -> SimResult<()> {
        pending(EntryPoint::DisablePeer)
    }

    // ---- managed memory -----------------------------------------------------------------------------------------

    /// `cuMemAdvise`.
    pub fn advise(&self, _device: DeviceIndex, _range: Range, _advice: Advice) -> SimResult<()> {
        pending(EntryPoint::Advise)
    }

    /// `cuMemPrefetchAsync`.
    pub fn prefetch(&self, _device: DeviceIndex, _range: Range, _to: Location, _stream: Stream) -> SimResult<()> {
        pending(EntryPoint::Prefetch)
    }

    /// `cuMemDiscardBatchAsync`.
    pub fn discard(&self, _device: DeviceIndex, _ranges: &[Range], _stream: Stream) -> SimResult<()> {
        pending(EntryPoint::Discard)
    }

    /// `cuMemDiscardAndPrefetchBatchAsync`, all ranges to one place.
    pub fn discard_and_prefetch(
        &self,
        _device: DeviceIndex,
        _ranges: &[Range],
        _to: Location,
        _stream: Stream,
    ) -> SimResult<()> {
        pending(EntryPoint::DiscardAndPrefetch)
    }

    /// `cuMemRangeGetAttribute`: the advice in force on all of the range.
    pub fn range_advice(&self, _range: Range) -> SimResult<RangeAdvice> {
        pending(EntryPoint::RangeAttribute)
    }

    // ---- copies and other work ----------------------------------------------------------------------------------

    /// `cuMemcpy`: on the legacy stream of `device`, and waits.
    pub fn memcpy(&self, _device: DeviceIndex, _dst: u64, _src: u64, _bytes: u64, _kind: CopyKind) -> SimResult<()> {
        pending(EntryPoint::Memcpy)
    }

    /// `cuMemcpyAsync`. Pageable sources are read before it returns (up to 64 MiB; larger ones wait for the stream), a
    /// pageable destination has been written when it returns, pinned and device memory is read when the stream gets there.
    pub fn memcpy_async(
        &self,
        _device: DeviceIndex,
        _dst: u64,
        _src: u64,
        _bytes: u64,
        _kind: CopyKind,
        _stream: Stream,
    ) -> SimResult<()> {
        pending(EntryPoint::MemcpyAsync)
    }

    /// `cuMemcpy2DAsync`, with the same rules.
    pub fn memcpy_2d_async(
        &self,
        _device: DeviceIndex,
        _dst: u64,
        _src: u64,
        _rows: Rows,
        _kind: CopyKind,
        _stream: Stream,
    ) -> SimResult<()> {
        pending(EntryPoint::MemcpyAsync)
    }

    /// `cuMemsetD8`: on the legacy stream.
    pub fn memset(&self, _device: DeviceIndex, _dst: u64, _value: u8, _bytes: u64) -> SimResult<()> {
        pending(EntryPoint::Memset)
    }

    /// `cuMemsetD8Async` (`width` 1), `cuMemsetD16Async` (2) and `cuMemsetD32Async` (4): `count` elements.
    pub fn memset_async(
        &self,
        _device: DeviceIndex,
        _dst: u64,
        _value: u32,
        _width: u8,
        _count: u64,
        _stream: Stream,
    ) -> SimResult<()> {
        pending(EntryPoint::MemsetAsync)
    }

    /// `cuLaunchKernel`: does nothing when it runs, except that the accesses fault, migrate and cost like real ones.
    pub fn launch_kernel(&self, _device: DeviceIndex, _stream: Stream, _accesses: Vec<Access>) -> SimResult<()> {
        pending(EntryPoint::LaunchKernel)
    }

    /// `cuLaunchHostFunc`.
    pub fn launch_host_func(&self, _device: DeviceIndex, _stream: Stream, _function: HostFunc) -> SimResult<()> {
        pending(EntryPoint::LaunchHostFunc)
    }

    // ---- streams and events -------------------------------------------------------------------------------------

    /// `cuStreamCreateWithPriority`; the priority is kept between -5 and 0.
    pub fn stream_create(&self, _device: DeviceIndex, _non_blocking: bool, _priority: i32) -> SimResult<Stream> {
        pending(EntryPoint::StreamCreate)
    }

    /// `cuStreamDestroy`; queued work still completes.
    pub fn stream_destroy(&self, _device: DeviceIndex, _stream: Stream) -> SimResult<()> {
        pending(EntryPoint::StreamDestroy)
    }

    /// `cuStreamSynchronize`.
    pub fn stream_synchronize(&self, _device: DeviceIndex, _stream: Stream) -> SimResult<()> {
        pending(EntryPoint::StreamSynchronize)
    }

    /// `cuStreamQuery`: whether all work is done (false is `CUDA_ERROR_NOT_READY`).
    pub fn stream_query(&self, _device: DeviceIndex, _stream: Stream) -> SimResult<bool> {
        pending(EntryPoint::StreamQuery)
    }

    /// `cuStreamWaitEvent`. An event never recorded is no wait.
    pub fn stream_wait_event(&self, _device: DeviceIndex, _stream: Stream, _event: Event) -> SimResult<()> {
        pending(EntryPoint::StreamWaitEvent)
    }

    /// Device, flags and priority of a stream.
    pub fn stream_info(&self, _device: DeviceIndex, _stream: Stream) -> SimResult<StreamInfo> {
        pending(EntryPoint::StreamInfo)
    }

    /// `cuCtxSynchronize`.
    pub fn device_synchronize(&self, _device: DeviceIndex) -> SimResult<()> {
        pending(EntryPoint::DeviceSynchronize)
    }

    /// `cuEventCreate`.
    pub fn event_create(&self, _device: DeviceIndex, _timing: bool) -> SimResult<Event> {
        pending(EntryPoint::EventCreate)
    }

    /// `cuEventRecord`.
    pub fn event_record(&self, _device: DeviceIndex, _event: Event, _stream: Stream) -> SimResult<()> {
        pending(EntryPoint::EventRecord)
    }

    /// `cuEventQuery` (false is `CUDA_ERROR_NOT_READY`). Asked often enough, it always comes to true.
    pub fn event_query(&self, _device: DeviceIndex, _event: Event) -> SimResult<bool> {
        pending(EntryPoint::EventQuery)
    }

    /// `cuEventSynchronize`.
    pub fn event_synchronize(&self, _device: DeviceIndex, _event: Event) -> SimResult<()> {
        pending(EntryPoint::EventSynchronize)
    }

    /// `cuEventElapsedTime`, in milliseconds of the simulated clock.
    pub fn event_elapsed(&self, _device: DeviceIndex, _start: Event, _end: Event) -> SimResult<f32> {
        pending(EntryPoint::EventElapsed)
    }

    /// `cuEventDestroy`.
    pub fn event_destroy(&self, _device: DeviceIndex, _event: Event) -> SimResult<()> {
        pending(EntryPoint::EventDestroy)
    }

    // ---- capture and graphs -------------------------------------------------------------------------------------

    /// `cuThreadExchangeStreamCaptureMode`.
    pub fn exchange_capture_mode(&self, _mode: CaptureMode) -> SimResult<CaptureMode> {
        pending(EntryPoint::ExchangeCaptureMode)
    }

    /// `cuStreamBeginCapture`.
    pub fn begin_capture(&self, _device: DeviceIndex, _stream: Stream, _mode: CaptureMode) -> SimResult<()> {
        pending(EntryPoint::BeginCapture)
    }

    /// `cuStreamEndCapture`. Ends the capture whether or not it gives a graph.
    pub fn end_capture(&self, _device: DeviceIndex, _stream: Stream) -> SimResult<GraphId> {
        pending(EntryPoint::EndCapture)
    }

    /// `cuStreamIsCapturing` and `cuStreamGetCaptureInfo`.
    pub fn capture_info(&self, _device: DeviceIndex, _stream: Stream) -> SimResult<CaptureInfo> {
        pending(EntryPoint::CaptureInfo)
    }

    /// `cuGraphCreate`: an empty graph.
    pub fn graph_create(&self) -> SimResult<GraphId> {
        pending(EntryPoint::GraphCreate)
    }

    /// `cuGraphDestroy`; graphs instantiated from it live on.
    pub fn graph_destroy(&self, _graph: GraphId) -> SimResult<()> {
        pending(EntryPoint::GraphDestroy)
    }

    /// `cuGraphGetNodes`.
    pub fn graph_nodes(&self, _graph: GraphId) -> SimResult<Vec<GraphNode>> {
        pending(EntryPoint::GraphNodes)
    }

    /// `cuGraphInstantiate`.
    pub fn graph_instantiate(&self, _graph: GraphId) -> SimResult<GraphExecId> {
        pending(EntryPoint::GraphInstantiate)
    }

    /// `cuGraphExecDestroy`; launches already queued still run.
    pub fn graph_exec_destroy(&self, _exec: GraphExecId) -> SimResult<()> {
        pending(EntryPoint::GraphExecDestroy)
    }

    /// `cuGraphLaunch`. Into a capturing stream: its nodes become part of that graph.
    pub fn graph_launch(&self, _device: DeviceIndex, _exec: GraphExecId, _stream: Stream) -> SimResult<()> {
        pending(EntryPoint::GraphLaunch)
    }

    // ---- for tests and reports: no entry points, never fail by a fault ------------------------------------------

    /// Plants a fault.
    pub fn inject(&self, _fault: Fault) {}

    /// Takes all planted faults away.
    pub fn clear_faults(&self) {}

    /// How many calls planted faults have failed.
    #[must_use]
    pub fn faults_hit(&self) -> u64 {
        0
    }

    /// How often each entry point was called, since the start or the last [`Machine::reset_counters`].
    #[must_use]
    pub fn calls(&self) -> BTreeMap<EntryPoint, u64> {
        BTreeMap::new()
    }

    /// Sets the counts of calls and the [`Counters`] to zero.
    pub fn reset_counters(&self) {}

    /// What has happened.
    #[must_use]
    pub fn counters(&self) -> Counters {
        Counters::default()
    }

    /// Where all managed memory is.
    #[must_use]
    pub fn residency(&self) -> Residency {
        Residency::default()
    }

    /// Where the bytes of this managed range are; `None` if it is not managed memory.
    #[must_use]
    pub fn residency_of(&self, _range: Range) -> Option<Residency> {
        None
    }

    /// Stands in for the CPU touching managed memory: the simulator does not see plain loads and stores.
    pub fn host_touch(&self, _range: Range, _write: bool) {}

    /// Sets how much device memory other processes hold.
    pub fn set_others_device_memory(&self, _device: DeviceIndex, _bytes: u64) {}

    /// Sets how much host memory other processes hold.
    pub fn set_others_host_memory(&self, _bytes: u64) {}

    /// The simulated clock, in nanoseconds: the host's time spent in calls and in waiting.
    #[must_use]
    pub fn clock_ns(&self) -> u64 {
        0
    }

    /// What is still alive.
    #[must_use]
    pub fn live(&self) -> Live {
        Live::default()
    }

    /// Puts the device in the state an illegal address leaves: every call that launches or waits fails with `code`.
    pub fn break_device(&self, _code: Code) {}
}
