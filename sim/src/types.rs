//! The words of the machine's interface that are not the allocator's own (`torch_uvm::driver`).

use serde::Serialize;
use std::sync::Arc;
use torch_uvm::driver::{Chunk, DeviceIndex, DevicePtr, Event, Location, Range, Stream};

/// The handle of the legacy default stream (`cudaStreamLegacy`; 0 means it too).
pub const STREAM_LEGACY: Stream = Stream(1);
/// The handle of the calling thread's default stream (`cudaStreamPerThread`).
pub const STREAM_PER_THREAD: Stream = Stream(2);

/// What a pointer points to (`cudaMemoryType`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PointerKind {
    /// Ordinary host memory that CUDA knows nothing of.
    Unregistered,
    /// Host memory of [`crate::Machine::host_alloc`].
    PinnedHost,
    /// Host memory given to [`crate::Machine::host_register`].
    RegisteredHost,
    /// Plain device memory.
    Device,
    /// Managed memory.
    Managed,
}

/// What is known of a pointer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PointerInfo {
    /// What it points to.
    pub kind: PointerKind,
    /// The device in whose context the allocation was made; -1 for unregistered memory.
    pub device: DeviceIndex,
    /// First byte of the allocation; the pointer itself for unregistered memory.
    pub base: u64,
    /// Bytes asked for; 0 for unregistered memory.
    pub bytes: u64,
    /// A number no other allocation has had (`CU_POINTER_ATTRIBUTE_BUFFER_ID`); 0 for unregistered memory.
    pub id: u64,
}

/// The direction of a copy (`cudaMemcpyKind`). The simulator trusts the pointers, not the kind, except that a
/// device direction on host memory is an error where CUDA makes it one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum CopyKind {
    /// Host to host.
    HostToHost,
    /// Host to device.
    HostToDevice,
    /// Device to host.
    DeviceToHost,
    /// Device to device, peers included.
    DeviceToDevice,
    /// From the pointers (unified addressing).
    Default,
}

/// A rectangle to copy: `height` rows of `width` bytes, each row `pitch` bytes after the one before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rows {
    /// Bytes of a row.
    pub width: u64,
    /// How many rows.
    pub height: u64,
    /// Distance of rows at the destination.
    pub dst_pitch: u64,
    /// Distance of rows at the source.
    pub src_pitch: u64,
}

/// Memory that a kernel reads or writes, so that a test may stand in for one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Access {
    /// The bytes.
    pub range: Range,
    /// Whether they are written.
    pub write: bool,
}

/// A function that a stream calls on the machine's callback thread, without any lock of the machine's. It must not
/// call anything that waits for the GPU. Kept by graphs, so it may run many times.
pub type HostFunc = Arc<dyn Fn() + Send + Sync>;

/// What is known of a stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StreamInfo {
    /// Its device.
    pub device: DeviceIndex,
    /// Whether it stands apart from the legacy stream.
    pub non_blocking: bool,
    /// Its priority, 0 or negative (more urgent).
    pub priority: i32,
    /// A number no other stream has had.
    pub id: u64,
}

/// A captured graph. Its number is less than 2^47, like an address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GraphId(pub u64);

impl GraphId {
    /// Every graph's number is a multiple of this.
    pub const ALIGN: u64 = 0x40;
}

/// An instantiated graph.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GraphExecId(pub u64);

/// What a node of a graph does (`cudaGraphNodeType`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum NodeKind {
    /// A kernel.
    Kernel,
    /// A copy.
    Memcpy,
    /// A memset.
    Memset,
    /// A host function.
    Host,
}

/// A node of a graph: nodes are numbered by their place in the list, which is an order they may run in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GraphNode {
    /// What it does.
    pub kind: NodeKind,
    /// The nodes that must run before it.
    pub dependencies: Vec<usize>,
}

/// `cudaStreamCaptureStatus`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum CaptureStatus {
    /// The stream does not capture.
    None,
    /// It captures.
    Active,
    /// It captures, but something has spoiled it: only ending the capture helps.
    Invalidated,
}

/// What is known of a stream's capture.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CaptureInfo {
    /// How it stands.
    pub status: CaptureStatus,
    /// A number no other capture has had; 0 where the stream does not capture.
    pub id: u64,
    /// The nodes captured so far, of all streams that joined.
    pub nodes: usize,
    /// The graph that is being made: [`crate::Machine::graph_nodes`] knows it, and ending the capture gives it. `None` where
    /// the stream does not capture, or the capture is spoilt.
    pub graph: Option<GraphId>,
    /// The nodes that the stream's next one will depend on.
    pub dependencies: Vec<usize>,
}

/// Advice in force on a managed range (`cuMemRangeGetAttribute`): what holds for *all* of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RangeAdvice {
    /// Whether all pages are read-mostly.
    pub read_mostly: bool,
    /// The preferred location, where all pages have the same.
    pub preferred: Option<Location>,
    /// Those who have all pages mapped.
    pub accessed_by: Vec<Location>,
    /// Where all pages were last prefetched to.
    pub last_prefetch: Option<Location>,
}

/// Where the bytes of managed memory are. A read-mostly page with copies counts at each place.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Residency {
    /// Bytes without physical memory.
    pub nowhere: u64,
    /// Bytes in host memory.
    pub host: u64,
    /// Bytes on each device.
    pub devices: Vec<u64>,
}

/// What has happened, since the machine began or since [`crate::Machine::reset_counters`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Counters {
    /// Groups of faults served for devices (one for each 2 MiB page touched without being there).
    pub device_faults: u64,
    /// Faults served for the CPU.
    pub host_faults: u64,
    /// Pages moved from one place to another, for whatever reason.
    pub migrations: u64,
    /// Pages moved out because a device was full.
    pub evictions: u64,
    /// Bytes moved to devices, copies and migrations together.
    pub bytes_h2d: u64,
    /// Bytes moved to the host.
    pub bytes_d2h: u64,
    /// Bytes moved between devices.
    pub bytes_d2d: u64,
    /// Bytes reached across the link without being moved.
    pub bytes_remote: u64,
    /// Bytes zero-filled on devices.
    pub populated_device: u64,
    /// Bytes zero-filled in host memory.
    pub populated_host: u64,
    /// Bytes whose contents were discarded.
    pub discarded: u64,
    /// Bytes written to discarded pages that nobody had prefetched (hundreds of times slower than it should be).
    pub slow_discard_writes: u64,
    /// Bytes that were populated in host memory although none was left: a real machine would have killed a
    /// process here. A sound allocator keeps this at 0.
    pub host_overcommitted: u64,
    /// Bytes that a prefetch left where they were, because there was no room: CUDA reports no error.
    pub prefetch_skipped: u64,
    /// Operations run.
    pub operations: u64,
    /// Calls that were refused for want of memory.
    pub out_of_memory: u64,
}

/// What one cause has moved between places, and the time that took by the profile's [`Costs`](crate::profile::Costs).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Moved {
    /// How many copies, or pages (of 2 MiB, the last of an allocation may be smaller).
    pub count: u64,
    /// Bytes from the host to devices.
    pub bytes_h2d: u64,
    /// Bytes from devices to the host.
    pub bytes_d2h: u64,
    /// Bytes from device to device.
    pub bytes_d2d: u64,
    /// The sum of the times. What several streams did side by side is all counted.
    pub nanoseconds: u64,
}

/// What has crossed a link, by its cause.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Traffic {
    /// Copies that the program asked for, between host memory and a device's, or between devices. What a copy makes of
    /// managed pages that are elsewhere is counted below besides.
    pub copies: Moved,
    /// Pages moved because a processor used them.
    pub faults: Moved,
    /// Pages moved because they were prefetched.
    pub prefetches: Moved,
    /// Pages moved out because a device was full.
    pub evictions: Moved,
    /// Uses of pages that stayed where they were. `count` counts pages, once each time; the bytes are those that were used.
    pub remote: Moved,
}

/// Fresh pages zero-filled by one cause.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Filled {
    /// Bytes on devices.
    pub bytes_device: u64,
    /// Bytes in host memory.
    pub bytes_host: u64,
    /// The sum of the times.
    pub nanoseconds: u64,
}

/// How pages got their first memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Populated {
    /// By a prefetch.
    pub prefetches: Filled,
    /// By the first use: by faults.
    pub faults: Filled,
}

/// The most memory in use at one place, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Peak {
    /// Managed pages.
    pub managed: u64,
    /// Plain device memory; in the host, pinned memory.
    pub plain: u64,
    /// Both at the same time.
    pub total: u64,
}

/// The most memory in use, since the machine began or since [`crate::Machine::reset_counters`].
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Peaks {
    /// Of each device.
    pub devices: Vec<Peak>,
    /// Of the host. The program's pageable memory is not known here.
    pub host: Peak,
    /// Of all places at the same time, in bytes.
    pub all: u64,
}

/// What is still alive: for leak checks.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Live {
    /// Device and managed allocations, with the bytes asked for.
    pub allocations: Vec<(DevicePtr, u64, PointerKind)>,
    /// Pinned and registered host memory.
    pub host: Vec<(u64, u64, PointerKind)>,
    /// Created streams.
    pub streams: Vec<Stream>,
    /// Created events.
    pub events: Vec<Event>,
    /// Chunks that are held by a handle, a mapping or a file descriptor, with their bytes.
    pub chunks: Vec<(Chunk, u64)>,
    /// Reserved addresses, with their bytes.
    pub reservations: Vec<(u64, u64)>,
    /// Graphs.
    pub graphs: Vec<GraphId>,
    /// Instantiated graphs.
    pub execs: Vec<GraphExecId>,
    /// Captures that have not ended.
    pub captures: usize,
    /// Operations not yet run.
    pub pending_operations: usize,
}

impl Live {
    /// Whether nothing is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Live::default()
    }
}
