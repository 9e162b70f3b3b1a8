//! The machine's interface: copies, streams, events, capture and graphs.

use crate::capture::Graph;
use crate::error::{Code, SimResult, Step, fail};
use crate::event::Recorded;
use crate::fault::EntryPoint;
use crate::machine::Machine;
use crate::state::{DONE, Inner, Session, thread_number};
use crate::stream::{Key, Mark};
use crate::types::*;
use crate::work::{Side, Source, Work};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use torch_uvm::driver::{CaptureMode, DeviceIndex, DevicePtr, Event, Stream};

/// Larger pageable sources are copied when the stream gets there, and waited for: CUDA's staging buffers are no larger either.
const STAGE_AT_MOST: u64 = 64 << 20;

/// A stream held up by [`Machine::hold`].
pub struct Hold {
    released: Arc<AtomicBool>,
    inner: Arc<Inner>,
}

impl Hold {
    /// Lets the stream go on.
    pub fn release(self) {}
}

impl Drop for Hold {
    fn drop(&mut self) {
        // Under the lock: whoever is about to wait has either seen the flag, or will be woken.
        self.inner.peek(|_| self.released.store(true, Ordering::Relaxed));
        self.inner.wake();
    }
}

impl Machine {
    // ---- copies and other work ----------------------------------------------------------------------------------

    /// `cuMemcpy`: on the legacy stream of `device`, and waits.
    pub fn memcpy(&self, device: DeviceIndex, dst: u64, src: u64, bytes: u64, kind: CopyKind) -> SimResult<()> {
        self.inner.call(EntryPoint::Memcpy, |s| {
            s.check_device(device)?;
            s.unsafe_call()?;
            let key = s.legacy_keys[device as usize];
            let rows = Rows { width: bytes, height: 1, dst_pitch: bytes, src_pitch: bytes };
            s.copy(key, dst, src, rows, kind)?;
            s.wait_for_stream(key)
        })
    }

    /// `cuMemcpyAsync`. Pageable sources are read before it returns (up to 64 MiB; larger ones wait for the stream), a
    /// pageable destination has been written when it returns, pinned and device memory is read when the stream gets there.
    /// A captured copy reads and writes everything when the graph runs.
    pub fn memcpy_async(
        &self,
        device: DeviceIndex,
        dst: u64,
        src: u64,
        bytes: u64,
        kind: CopyKind,
        stream: Stream,
    ) -> SimResult<()> {
        let rows = Rows { width: bytes, height: 1, dst_pitch: bytes, src_pitch: bytes };
        self.memcpy_2d_async(device, dst, src, rows, kind, stream)
    }

    /// `cuMemcpy2DAsync`, with the same rules.
    pub fn memcpy_2d_async(
        &self,
        device: DeviceIndex,
        dst: u64,
        src: u64,
        rows: Rows,
        kind: CopyKind,
        stream: Stream,
    ) -> SimResult<()> {
        self.inner.call(EntryPoint::MemcpyAsync, |s| {
            let key = s.stream_key(device, stream)?;
            s.copy(key, dst, src, rows, kind)
        })
    }

    /// `cuMemsetD8` (`width` 1), `cuMemsetD16` (2) and `cuMemsetD32` (4): `count` elements, on the legacy stream. The host does not
    /// wait for device memory to be set.
    pub fn memset(&self, device: DeviceIndex, dst: u64, value: u32, width: u8, count: u64) -> SimResult<()> {
        self.inner.call(EntryPoint::Memset, |s| {
            s.check_device(device)?;
            s.unsafe_call()?;
            let key = s.legacy_keys[device as usize];
            s.set(key, dst, value, width, count)
        })
    }

    /// `cuMemsetD8Async` (`width` 1), `cuMemsetD16Async` (2) and `cuMemsetD32Async` (4): `count` elements.
    pub fn memset_async(
        &self,
        device: DeviceIndex,
        dst: u64,
        value: u32,
        width: u8,
        count: u64,
        stream: Stream,
    ) -> SimResult<()> {
        self.inner.call(EntryPoint::MemsetAsync, |s| {
            let key = s.stream_key(device, stream)?;
            s.set(key, dst, value, width, count)
        })
    }

    /// `cuLaunchKernel`: does nothing when it runs, except that the accesses fault, migrate and cost like real ones.
    pub fn launch_kernel(&self, device: DeviceIndex, stream: Stream, accesses: Vec<Access>) -> SimResult<()> {
        self.inner.call(EntryPoint::LaunchKernel, |s| {
            let key = s.stream_key(device, stream)?;
            s.clock_ns += s.costs().launch;
            s.enqueue(key, Work::Kernel { accesses }).map(drop)
        })
    }

    /// `cuLaunchHostFunc`.
    pub fn launch_host_func(&self, device: DeviceIndex, stream: Stream, function: HostFunc) -> SimResult<()> {
        self.inner.call(EntryPoint::LaunchHostFunc, |s| {
            let key = s.stream_key(device, stream)?;
            s.clock_ns += s.costs().launch;
            s.enqueue(key, Work::Host(function)).map(drop)
        })
    }

    /// Copies bytes into memory of the machine, and waits: [`Machine::memcpy`] for tests.
    pub fn write(&self, device: DeviceIndex, to: DevicePtr, bytes: &[u8]) -> SimResult<()> {
        self.memcpy(device, to.0, bytes.as_ptr() as u64, bytes.len() as u64, CopyKind::Default)
    }

    /// Copies bytes out of memory of the machine, after what the legacy stream has queued.
    pub fn read(&self, device: DeviceIndex, from: DevicePtr, bytes: &mut [u8]) -> SimResult<()> {
        self.memcpy(device, bytes.as_mut_ptr() as u64, from.0, bytes.len() as u64, CopyKind::Default)
    }

    /// Holds a stream up: it gets no further than here until the hold is released (or dropped). For tests; on a real
    /// device a host function that waits would do the same. Not for capturing streams.
    pub fn hold(&self, device: DeviceIndex, stream: Stream) -> SimResult<Hold> {
        let released = Arc::new(AtomicBool::new(false));
        self.inner.call(EntryPoint::LaunchHostFunc, |s| {
            let key = s.stream_key(device, stream)?;
            s.enqueue(key, Work::Hold(Arc::clone(&released))).map(drop)
        })?;
        Ok(Hold { released, inner: Arc::clone(&self.inner) })
    }

    // ---- streams ------------------------------------------------------------------------------------------------

    /// `cuStreamCreateWithPriority`; the priority is kept between -5 and 0.
    pub fn stream_create(&self, device: DeviceIndex, non_blocking: bool, priority: i32) -> SimResult<Stream> {
        self.inner.call(EntryPoint::StreamCreate, |s| {
            s.check_device(device)?;
            let key = s.add_stream(device, !non_blocking, false, priority.clamp(-5, 0));
            s.stream(key)?.created = true;
            Ok(Stream(key))
        })
    }

    /// `cuStreamDestroy`; queued work still completes.
    pub fn stream_destroy(&self, device: DeviceIndex, stream: Stream) -> SimResult<()> {
        self.inner.call(EntryPoint::StreamDestroy, |s| {
            let key = s.stream_key(device, stream)?;
            if !s.stream(key)?.created {
                return Err(fail(Code::INVALID_HANDLE, "a default stream cannot be destroyed"));
            }
            s.forbid_on_capturing(key)?;
            let pending = s.active.contains(&key);
            let state = s.stream(key)?;
            state.destroyed = true;
            if !pending {
                s.streams.remove(&key);
            }
            Ok(())
        })
    }

    /// `cuStreamSynchronize`.
    pub fn stream_synchronize(&self, device: DeviceIndex, stream: Stream) -> SimResult<()> {
        self.inner.call(EntryPoint::StreamSynchronize, |s| {
            let key = s.stream_key(device, stream)?;
            s.forbid_on_capturing(key)?;
            s.forbid_implicit(key)?;
            s.unsafe_call()?;
            s.wait_for_stream(key)
        })
    }

    /// `cuStreamQuery`: whether all work is done (false is `CUDA_ERROR_NOT_READY`).
    pub fn stream_query(&self, device: DeviceIndex, stream: Stream) -> SimResult<bool> {
        self.inner.call(EntryPoint::StreamQuery, |s| {
            let key = s.stream_key(device, stream)?;
            s.forbid_on_capturing(key)?;
            s.forbid_implicit(key)?;
            s.unsafe_call()?;
            let mut done = s.poll_stream(key)?;
            if done && s.stream(key)?.legacy {
                // The legacy stream stands for all blocking streams.
                done = s.blocking_ends(key)?.into_iter().all(|mark| s.is_done(mark) || s.advance(mark));
            }
            s.unless_broken(done)
        })
    }

    /// `cuStreamWaitEvent`. An event never recorded is no wait.
    pub fn stream_wait_event(&self, device: DeviceIndex, stream: Stream, event: Event) -> SimResult<()> {
        self.inner.call(EntryPoint::StreamWaitEvent, |s| {
            let key = s.stream_key(device, stream)?;
            s.wait_event(key, event)
        })
    }

    /// Device, flags and priority of a stream.
    pub fn stream_info(&self, device: DeviceIndex, stream: Stream) -> SimResult<StreamInfo> {
        self.inner.call(EntryPoint::StreamInfo, |s| {
            let key = s.stream_key(device, stream)?;
            let state = s.stream(key)?;
            Ok(StreamInfo {
                device: state.device,
                non_blocking: !state.blocking,
                priority: state.priority,
                id: state.id,
            })
        })
    }

    /// `cuCtxSynchronize`.
    pub fn device_synchronize(&self, device: DeviceIndex) -> SimResult<()> {
        self.inner.call(EntryPoint::DeviceSynchronize, |s| {
            s.check_device(device)?;
            s.forbid_for_device(device)?;
            s.unsafe_call()?;
            s.wait_for_all(Some(device));
            s.unless_broken(())
        })
    }

    // ---- events -------------------------------------------------------------------------------------------------

    /// `cuEventCreate`.
    pub fn event_create(&self, device: DeviceIndex, timing: bool) -> SimResult<Event> {
        self.inner.call(EntryPoint::EventCreate, |s| {
            s.check_device(device)?;
            Ok(s.add_event(device, timing))
        })
    }

    /// `cuEventRecord`.
    pub fn event_record(&self, device: DeviceIndex, event: Event, stream: Stream) -> SimResult<()> {
        self.inner.call(EntryPoint::EventRecord, |s| {
            let key = s.stream_key(device, stream)?;
            s.record(event, key)
        })
    }

    /// `cuEventQuery` (false is `CUDA_ERROR_NOT_READY`). Asked often enough, it always comes to true.
    pub fn event_query(&self, device: DeviceIndex, event: Event) -> SimResult<bool> {
        self.inner.call(EntryPoint::EventQuery, |s| {
            s.check_device(device)?;
            s.forbid_captured(event)?;
            s.unsafe_call()?;
            let state = s.event(event)?;
            let (mark, polls) = (state.mark(), state.polls);
            let done = s.poll(mark, polls);
            s.event(event)?.polls = if done { 0 } else { polls + 1 };
            s.unless_broken(done)
        })
    }

    /// `cuEventSynchronize`.
    pub fn event_synchronize(&self, device: DeviceIndex, event: Event) -> SimResult<()> {
        self.inner.call(EntryPoint::EventSynchronize, |s| {
            s.check_device(device)?;
            s.forbid_captured(event)?;
            s.unsafe_call()?;
            let mark = s.event(event)?.mark();
            s.wait_for(mark);
            s.unless_broken(())
        })
    }

    /// `cuEventElapsedTime`, in milliseconds of the simulated clock.
    pub fn event_elapsed(&self, device: DeviceIndex, start: Event, end: Event) -> SimResult<f32> {
        self.inner.call(EntryPoint::EventElapsed, |s| {
            s.check_device(device)?;
            s.elapsed(start, end)
        })
    }

    /// `cuEventDestroy`.
    pub fn event_destroy(&self, device: DeviceIndex, event: Event) -> SimResult<()> {
        self.inner.call(EntryPoint::EventDestroy, |s| {
            s.check_device(device)?;
            s.event(event)?;
            s.events.remove(&event.0);
            Ok(())
        })
    }

    // ---- capture and graphs -------------------------------------------------------------------------------------

    /// `cuThreadExchangeStreamCaptureMode`.
    pub fn exchange_capture_mode(&self, mode: CaptureMode) -> SimResult<CaptureMode> {
        self.inner.call(EntryPoint::ExchangeCaptureMode, |s| {
            let old = match mode {
                CaptureMode::Global => s.thread_modes.remove(&thread_number()),
                _ => s.thread_modes.insert(thread_number(), mode),
            };
            Ok(old.unwrap_or(CaptureMode::Global))
        })
    }

    /// `cuStreamBeginCapture`.
    pub fn begin_capture(&self, device: DeviceIndex, stream: Stream, mode: CaptureMode) -> SimResult<()> {
        self.inner.call(EntryPoint::BeginCapture, |s| {
            let key = s.stream_key(device, stream)?;
            s.begin_capture(key, mode)
        })
    }

    /// `cuStreamEndCapture`. From the stream and thread that began it, it ends the capture whether or not it gives a graph.
    pub fn end_capture(&self, device: DeviceIndex, stream: Stream) -> SimResult<GraphId> {
        self.inner.call(EntryPoint::EndCapture, |s| {
            let key = s.stream_key(device, stream)?;
            s.end_capture(key).map(GraphId)
        })
    }

    /// `cuStreamIsCapturing`.
    pub fn stream_is_capturing(&self, device: DeviceIndex, stream: Stream) -> SimResult<CaptureStatus> {
        self.inner.call(EntryPoint::StreamIsCapturing, |s| Ok(s.capture_info_of(device, stream)?.status))
    }

    /// `cuStreamGetCaptureInfo`.
    pub fn capture_info(&self, device: DeviceIndex, stream: Stream) -> SimResult<CaptureInfo> {
        self.inner.call(EntryPoint::CaptureInfo, |s| s.capture_info_of(device, stream))
    }

    /// `cuStreamUpdateCaptureDependencies`: the stream's next node depends on these nodes of its capture (by their place in
    /// [`Machine::graph_nodes`]), and, unless `instead`, on those it would depend on anyway.
    pub fn update_capture_dependencies(
        &self,
        device: DeviceIndex,
        stream: Stream,
        nodes: &[usize],
        instead: bool,
    ) -> SimResult<()> {
        self.inner.call(EntryPoint::UpdateCaptureDependencies, |s| {
            let key = s.stream_key(device, stream)?;
            s.update_dependencies(key, nodes, instead)
        })
    }

    /// `cuGraphCreate`: an empty graph.
    pub fn graph_create(&self) -> SimResult<GraphId> {
        self.inner.call(EntryPoint::GraphCreate, |s| Ok(GraphId(s.add_graph(Graph::default()))))
    }

    /// `cuGraphDestroy`; graphs instantiated from it live on.
    pub fn graph_destroy(&self, graph: GraphId) -> SimResult<()> {
        self.inner.call(EntryPoint::GraphDestroy, |s| {
            s.graphs.remove(&graph.0).map(drop).ok_or_else(|| fail(Code::INVALID_VALUE, "this is not a graph"))
        })
    }

    /// `cuGraphGetNodes`. Of a graph that is still being captured ([`CaptureInfo::graph`]): those there are so far.
    pub fn graph_nodes(&self, graph: GraphId) -> SimResult<Vec<GraphNode>> {
        self.inner
            .call(EntryPoint::GraphNodes, |s| Ok(s.nodes_of(graph.0)?.iter().map(|node| node.node.clone()).collect()))
    }

    /// `cuGraphInstantiate`.
    pub fn graph_instantiate(&self, graph: GraphId) -> SimResult<GraphExecId> {
        self.inner.call(EntryPoint::GraphInstantiate, |s| {
            let graph = s.graphs.get(&graph.0).ok_or_else(|| fail(Code::INVALID_VALUE, "this is not a graph"))?;
            let graph = Arc::clone(graph);
            Ok(GraphExecId(s.add_exec(graph)))
        })
    }

    /// `cuGraphExecDestroy`; launches already queued still run.
    pub fn graph_exec_destroy(&self, exec: GraphExecId) -> SimResult<()> {
        self.inner.call(EntryPoint::GraphExecDestroy, |s| {
            s.execs.remove(&exec.0).map(drop).ok_or_else(|| fail(Code::INVALID_VALUE, "this is not a graph"))
        })
    }

    /// `cuGraphLaunch`. Into a capturing stream: its nodes become part of that graph.
    pub fn graph_launch(&self, device: DeviceIndex, exec: GraphExecId, stream: Stream) -> SimResult<()> {
        self.inner.call(EntryPoint::GraphLaunch, |s| {
            let key = s.stream_key(device, stream)?;
            s.clock_ns += s.costs().launch;
            s.launch_graph(key, exec.0)
        })
    }
}

impl crate::event::EventState {
    /// What must be complete for the event to be.
    fn mark(&self) -> Mark {
        match self.recorded {
            Recorded::Stream(mark) => mark,
            Recorded::Never | Recorded::Capture { .. } => DONE,
        }
    }
}

impl Session<'_> {
    fn unless_broken<T>(&self, value: T) -> Step<T> {
        match &self.broken {
            Some((code, detail)) => Err(fail(*code, detail.clone())),
            None => Ok(value),
        }
    }

    /// What can be asked about a stream's capture. Asking does not spoil the capture (CUDA manual, cuStreamIsCapturing).
    fn capture_info_of(&mut self, device: DeviceIndex, stream: Stream) -> Step<CaptureInfo> {
        let key = self.stream_key(device, stream)?;
        if self.would_be_implicit(key) {
            return Err(Code::STREAM_CAPTURE_IMPLICIT.into());
        }
        Ok(self.capture_info(key))
    }

    /// Waits for a stream; for the legacy one, for the blocking streams too.
    fn wait_for_stream(&mut self, key: Key) -> Step<()> {
        let mut marks = vec![self.end_of(key)];
        if self.stream(key)?.legacy {
            marks.extend(self.blocking_ends(key)?);
        }
        for mark in marks {
            self.wait_for(mark);
        }
        self.unless_broken(())
    }

    /// The ends of the blocking streams of a stream's device.
    fn blocking_ends(&mut self, key: Key) -> Step<Vec<Mark>> {
        let device = self.stream(key)?.device;
        let ends = self.ends(Some(device));
        Ok(ends.into_iter().filter(|mark| self.streams.get(&mark.key).is_some_and(|stream| stream.blocking)).collect())
    }

    fn copy(&mut self, key: Key, dst: u64, src: u64, rows: Rows, kind: CopyKind) -> Step<()> {
        if rows.width == 0 || rows.height == 0 {
            return Ok(());
        }
        if rows.height > 1 && (rows.dst_pitch < rows.width || rows.src_pitch < rows.width) {
            return Err(fail(Code::INVALID_VALUE, "a pitch is smaller than a row"));
        }
        let in_range = |pitch: u64| pitch.checked_mul(rows.height).is_some_and(|bytes| bytes < 1 << 47);
        if !in_range(rows.dst_pitch) || !in_range(rows.src_pitch) || !in_range(rows.width) {
            return Err(fail(Code::INVALID_VALUE, "the copy is larger than the address space"));
        }
        let (to, from) = self.sides(dst, src, &rows)?;
        // Host memory where the direction says device: CUDA refuses, where the GPU cannot reach it.
        let unreachable = |side: Side| side == Side::Pageable && !self.config.profile.pageable_memory_access;
        let (to_device, from_device) = match kind {
            CopyKind::HostToDevice => (true, false),
            CopyKind::DeviceToHost => (false, true),
            CopyKind::DeviceToDevice => (true, true),
            CopyKind::HostToHost | CopyKind::Default => (false, false),
        };
        if (to_device && unreachable(to)) || (from_device && unreachable(from)) {
            return Err(fail(Code::INVALID_VALUE, "the direction says device memory, the pointer is host memory"));
        }
        let capturing = self.capture_of(key).is_some();
        let bytes = rows.width * rows.height;
        let stage = from == Side::Pageable && !capturing && bytes <= STAGE_AT_MOST;
        let source = if stage { Source::Staged(staged(src, &rows)) } else { Source::Address(src) };
        self.clock_ns += self.costs().launch;
        let mark = self.enqueue(key, Work::Copy { dst, src: source, rows })?;
        let must_wait = to == Side::Pageable || (from == Side::Pageable && !stage);
        if let (Some(mark), true) = (mark, must_wait) {
            self.wait_for(mark);
            return self.unless_broken(());
        }
        Ok(())
    }

    fn set(&mut self, key: Key, dst: u64, value: u32, width: u8, count: u64) -> Step<()> {
        if !matches!(width, 1 | 2 | 4) || !dst.is_multiple_of(u64::from(width)) {
            return Err(fail(Code::INVALID_VALUE, format!("elements of {width} bytes at {dst:#x}")));
        }
        if count == 0 {
            return Ok(());
        }
        let bytes = count.checked_mul(u64::from(width)).ok_or(Code::INVALID_VALUE)?;
        if self.side(dst, bytes)? == Side::Pageable && !self.config.profile.pageable_memory_access {
            return Err(fail(Code::INVALID_VALUE, "memset of host memory that the device cannot reach"));
        }
        self.clock_ns += self.costs().launch;
        self.enqueue(key, Work::Set { dst, value, width, count }).map(drop)
    }
}

/// The bytes of pageable memory as they are now, rows packed.
fn staged(src: u64, rows: &Rows) -> Arc<[u8]> {
    let mut bytes = Vec::with_capacity((rows.width * rows.height) as usize);
    for row in 0..rows.height {
        // SAFETY: the caller vouches for his host memory, as with CUDA's copies.
        let row = unsafe { std::slice::from_raw_parts((src + row * rows.src_pitch) as *const u8, rows.width as usize) };
        bytes.extend_from_slice(row);
    }
    bytes.into()
}
