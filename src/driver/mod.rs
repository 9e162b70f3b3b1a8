//! Everything the allocator asks of CUDA, as one trait.
//!
//! The allocator never calls CUDA itself: it holds a [`Driver`]. There are two implementations, the real
//! one ([`cuda`], the CUDA driver API loaded at run time) and the simulated device of the `sim` crate. Both
//! join the same contract suite (`tests/driver_contract.rs`), which is the executable form of the
//! preconditions written here.
//!
//! Ranges are given in bytes, addresses are device addresses as `u64` newtypes, so that nothing in the
//! allocator can dereference them by accident.

pub mod cuda;
pub mod host;

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};

/// A device ordinal as PyTorch counts them (after `CUDA_VISIBLE_DEVICES`).
pub type DeviceIndex = i32;

/// An address in the unified address space. Zero is no address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct DevicePtr(pub u64);

impl DevicePtr {
    /// The address `bytes` further on.
    #[must_use]
    pub fn offset(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

impl fmt::Debug for DevicePtr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A `CUstream` (the same handle as `cudaStream_t`). Zero is the legacy default stream.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Stream(pub u64);

/// A `CUevent` made by [`Driver::event_create`]. Owned by whoever created it; no `Drop`, because
/// destroying it is a CUDA call that may fail.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Event(pub u64);

/// Physical memory without an address (`CUmemGenericAllocationHandle`), made by [`Driver::chunk_create`] or
/// [`Driver::chunk_import`]. Owned by whoever has it; no `Drop`, because releasing it is a CUDA call that may fail.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Chunk(pub u64);

/// An address range: `[ptr, ptr + bytes)`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    /// First byte.
    pub ptr: DevicePtr,
    /// Length in bytes; a driver call on an empty range is an error ([`ErrorKind::InvalidValue`]).
    pub bytes: u64,
}

/// Where memory may live or be reached from (`CUmemLocation`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Location {
    /// The memory of this GPU.
    Device(DeviceIndex),
    /// Host memory, no NUMA node in particular.
    Host,
    /// Host memory of this NUMA node (on GH200: the CPU's LPDDR, as against HBM exposed as a node).
    HostNuma(i32),
}

/// `cuMemAdvise`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Advice {
    /// Pages prefer to live at the location. On a device this overrides the driver's thrashing
    /// mitigation (CUDA manual, `cudaMemAdviseSetPreferredLocation`).
    SetPreferredLocation(Location),
    /// Undoes `SetPreferredLocation`.
    UnsetPreferredLocation,
    /// Keeps the pages mapped in this processor's page tables; no effect where it is also the
    /// preferred location.
    SetAccessedBy(Location),
    /// Undoes `SetAccessedBy`.
    UnsetAccessedBy(Location),
    /// The data is mostly read: read-only copies may be made.
    SetReadMostly,
    /// Undoes `SetReadMostly`.
    UnsetReadMostly,
}

impl Advice {
    /// What [`Advice::named`] knows.
    pub const EXPECTED: &str = "set_preferred_location, unset_preferred_location, set_accessed_by, unset_accessed_by, \
                                set_read_mostly or unset_read_mostly";

    /// The advice of a name (`cudaMemoryAdvise` without its prefix); `location` is for those that have one.
    pub fn named(name: &str, location: Location) -> Option<Self> {
        Some(match name {
            "set_preferred_location" => Self::SetPreferredLocation(location),
            "unset_preferred_location" => Self::UnsetPreferredLocation,
            "set_accessed_by" => Self::SetAccessedBy(location),
            "unset_accessed_by" => Self::UnsetAccessedBy(location),
            "set_read_mostly" => Self::SetReadMostly,
            "unset_read_mostly" => Self::UnsetReadMostly,
            _ => return None,
        })
    }
}

/// `CUstreamCaptureMode`: which calls are forbidden while some stream captures.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum CaptureMode {
    /// Potentially unsafe calls are forbidden while any thread captures in global mode.
    Global,
    /// Only this thread's captures count.
    ThreadLocal,
    /// Nothing is forbidden to this thread.
    Relaxed,
}

/// What the allocator needs to know of a device. Constant for the life of the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Marketing name, for messages.
    pub name: String,
    /// Bytes of device memory (`cuDeviceTotalMem`).
    pub total_memory: u64,
    /// `CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY`.
    pub managed_memory: bool,
    /// `CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS`: without it there is no oversubscription and prefetch fails.
    pub concurrent_managed_access: bool,
    /// `CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES`: address translation shared with the CPU (ATS):
    /// the hardware-coherent machines (GH200, GB200, GB10).
    pub host_page_tables: bool,
    /// [`Driver::discard`] works: the driver is one of CUDA 13.0 or newer, and the device has concurrent managed
    /// access.
    pub discard: bool,
    /// `CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED` (102): the device has chunks ([`Driver::chunk_create`]).
    pub chunks: bool,
    /// `CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED` (141): the device reaches chunks of host memory.
    pub host_chunks: bool,
    /// `CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED` (103): chunks can be exported.
    pub shareable_chunks: bool,
    /// `CU_DEVICE_ATTRIBUTE_INTEGRATED`: the device shares one physical memory with the CPU (GB10).
    pub integrated: bool,
    /// `CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID`: the NUMA node closest to the device; `None` where the driver gives none (-1).
    pub host_numa_node: Option<i32>,
}

impl DeviceInfo {
    /// Where chunks of the host's memory that this device reaches lie; `None` without [`DeviceInfo::host_chunks`]. "On systems
    /// where NUMA is not available ::CUmemAllocationProp::CUmemLocation::id must be set to 0" (`cuMemCreate`).
    #[must_use]
    pub fn host_chunk_location(&self) -> Option<Location> {
        self.host_chunks.then(|| Location::HostNuma(self.host_numa_node.unwrap_or(0)))
    }
}

/// Bytes of device memory as the driver counts them (`cuMemGetInfo`), all processes together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Free bytes. Falls in steps of 128 MiB as managed memory is populated (the driver takes its chunks in batches),
    /// and does not rise when managed pages leave the device (it keeps them).
    pub free: u64,
    /// All bytes.
    pub total: u64,
}

/// Bytes of host memory that this process can still have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMemory {
    /// What the machine, or the tightest cgroup limit, has at all.
    pub total: u64,
    /// What is left: the smaller of `MemAvailable` and each cgroup's limit less its usage.
    pub available: u64,
}

/// An opaque handle by which another process opens this device memory (`CUipcMemHandle`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IpcHandle(pub [u8; 64]);

/// What kind of failure a driver call met: the few that the allocator treats differently, and the rest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ErrorKind {
    /// `CUDA_ERROR_OUT_OF_MEMORY`: the allocator gives memory back and tries again.
    OutOfMemory,
    /// `CUDA_ERROR_INVALID_VALUE`, `CUDA_ERROR_INVALID_DEVICE`, `CUDA_ERROR_INVALID_HANDLE`: the caller broke a precondition.
    InvalidValue,
    /// `CUDA_ERROR_NOT_SUPPORTED`: this device or driver cannot do it.
    NotSupported,
    /// `CUDA_ERROR_STREAM_CAPTURE_*`: illegal while a stream captures.
    StreamCapture,
    /// The driver library could not be loaded, or lacks an entry point.
    Unavailable,
    /// Everything else, sticky errors included.
    Other,
}

/// A failed driver call.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{call} failed: {name} ({code}): {message}")]
pub struct DriverError {
    /// What the allocator should make of it.
    pub kind: ErrorKind,
    /// The entry point, as CUDA names it.
    pub call: &'static str,
    /// The `CUresult` as a number; -1 where there was none.
    pub code: i32,
    /// The `CUresult` by name, such as `CUDA_ERROR_OUT_OF_MEMORY`.
    pub name: String,
    /// What CUDA says about it, or what we know.
    pub message: String,
}

/// The result of a driver call.
pub type Result<T> = std::result::Result<T, DriverError>;

/// Whether a stream captures, so that nothing of ours can be queued on it.
///
/// # Errors
/// Those of [`Driver::stream_is_capturing`], but for the one that itself says that some stream captures: the legacy
/// stream may not even be asked then.
pub fn captures(driver: &dyn Driver, device: DeviceIndex, stream: Stream) -> Result<bool> {
    match driver.stream_is_capturing(device, stream) {
        Err(error) if error.kind == ErrorKind::StreamCapture => Ok(true),
        answer => answer,
    }
}

/// Everything the allocator asks of CUDA.
///
/// # Rules for all methods
///
/// - Any thread may call any method at any time. An implementation makes the primary context of `device`
///   current where CUDA needs one and restores the caller's current context before it returns.
/// - The device ordinal comes first; one that does not exist is [`ErrorKind::InvalidValue`].
/// - Streams and events must be live: CUDA does not check its own handles. Memory it does check.
/// - A method that fails has changed nothing that the caller must undo, but that an illegal call invalidates the
///   capture it would have spoilt.
/// - No method takes a lock that another method holds while it waits for the GPU.
///
/// # Capture
///
/// Each method says whether it is legal while a stream captures (measured, docs/driver-contract.md):
///
/// - "Always": also plainly, in a capture of any mode.
/// - "Relaxed": between [`Driver::exchange_capture_mode`]`(Relaxed)` and the exchange back, on the thread that made
///   it; also where the capture itself is relaxed, and on other threads than that of a thread-local capture. Elsewhere
///   it is [`ErrorKind::StreamCapture`] and invalidates the capture. A capture in global mode concerns all threads.
/// - "Never": the same error and the same damage in every mode and on every thread.
pub trait Driver: Send + Sync + 'static {
    /// How many devices there are; 0 on a machine with a driver and no GPU. While capturing: always.
    fn device_count(&self) -> Result<DeviceIndex>;

    /// The constant facts of a device. While capturing: always.
    fn device_info(&self, device: DeviceIndex) -> Result<DeviceInfo>;

    /// Free and total device memory. While capturing: always.
    fn device_memory(&self, device: DeviceIndex) -> Result<DeviceMemory>;

    /// Host memory that is left. Reads `/proc` and the cgroup: tens of microseconds, never on the hot path. Does not
    /// initialise CUDA.
    fn host_memory(&self) -> Result<HostMemory>;

    /// Reserves `bytes` (> 0) of managed address space, attached globally, in the context of `device`
    /// (`cuMemAllocManaged`). Holds no physical memory until populated; the address is at least 512-byte
    /// aligned, and 2 MiB aligned where `bytes` is at least 2 MiB. Does not wait. While capturing: relaxed.
    fn alloc_managed(&self, device: DeviceIndex, bytes: u64) -> Result<DevicePtr>;

    /// Allocates `bytes` (> 0) of plain device memory (`cuMemAlloc`), with the alignments of
    /// [`Driver::alloc_managed`]. Does not wait. While capturing: relaxed.
    fn alloc_device(&self, device: DeviceIndex, bytes: u64) -> Result<DevicePtr>;

    /// Frees what `alloc_managed` or `alloc_device` gave (`cuMemFree`): the address must be the first byte of a live
    /// allocation; address 0 is no error. Waits for all work on the device, whatever the stream, also for memory that
    /// was never populated. While capturing: relaxed.
    fn free(&self, device: DeviceIndex, ptr: DevicePtr) -> Result<()>;

    /// Gives advice on a managed range (`cuMemAdvise`). Acts on whole pages, at once and on the host's
    /// time; does not wait for the device. A NUMA node can be preferred, not "accessed by". While capturing: relaxed.
    fn advise(&self, device: DeviceIndex, range: Range, advice: Advice) -> Result<()>;

    /// Moves or populates a managed range (`cuMemPrefetchAsync`), ordered on `stream`. Needs
    /// `concurrent_managed_access`. Success says nothing about capacity: other managed pages may be evicted.
    /// While capturing: always on a stream that does not capture, never on one that does.
    fn prefetch(&self, device: DeviceIndex, range: Range, to: Location, stream: Stream) -> Result<()>;

    /// Drops the contents of a managed range (`cuMemDiscardBatchAsync`), ordered on `stream`, which may not be the
    /// legacy default stream. [`ErrorKind::NotSupported`] where [`DeviceInfo::discard`] is false. Concerns the 2 MiB
    /// pages that lie wholly inside the range. Until they are prefetched or written, reading them is indeterminate;
    /// writing without a prefetch first works, at a thousandth of the speed. The advice on them stays, and so does the
    /// driver's hold on their device memory: its free figure does not rise. Does not wait. While capturing: as
    /// [`Driver::prefetch`] (not measured yet; the allocator discards only while no capture that it knows of is
    /// underway).
    fn discard(&self, device: DeviceIndex, range: Range, stream: Stream) -> Result<()>;

    /// Makes a non-blocking stream on `device`. While capturing: always.
    fn stream_create(&self, device: DeviceIndex) -> Result<Stream>;

    /// Destroys a stream made by `stream_create`, which must not capture; work already queued still completes.
    /// While another stream captures: always.
    fn stream_destroy(&self, device: DeviceIndex, stream: Stream) -> Result<()>;

    /// Waits for all work on the stream. While capturing: relaxed on a stream that does not capture, never on one
    /// that does.
    fn stream_synchronize(&self, device: DeviceIndex, stream: Stream) -> Result<()>;

    /// Whether the stream captures at present. An invalidated capture counts as one. While capturing: always; but the
    /// legacy default stream gives [`ErrorKind::StreamCapture`] while a *blocking* stream captures (PyTorch's are not).
    fn stream_is_capturing(&self, device: DeviceIndex, stream: Stream) -> Result<bool>;

    /// Waits for all work on the device. While capturing: never.
    fn device_synchronize(&self, device: DeviceIndex) -> Result<()>;

    /// Makes an event without timing. While capturing: always.
    fn event_create(&self, device: DeviceIndex) -> Result<Event>;

    /// Records the event on a stream of the same device. On a capturing stream it becomes part of the graph,
    /// and may then not be queried. While capturing: always.
    fn event_record(&self, device: DeviceIndex, event: Event, stream: Stream) -> Result<()>;

    /// What is queued on the stream from now on waits for the event's last record; an event never recorded is no wait.
    /// Does not wait itself. While capturing: the wait becomes part of the graph on a capturing stream; an event last
    /// recorded in a capture draws the stream into it. The allocator only orders streams that do not capture.
    fn stream_wait_event(&self, device: DeviceIndex, stream: Stream, event: Event) -> Result<()>;

    /// Whether everything before the last record has completed. An event never recorded has completed.
    /// While capturing: relaxed; never for an event last recorded in a capture.
    fn event_query(&self, device: DeviceIndex, event: Event) -> Result<bool>;

    /// Waits until `event_query` would answer true. While capturing: as `event_query`.
    fn event_synchronize(&self, device: DeviceIndex, event: Event) -> Result<()>;

    /// Destroys an event; one that is still pending is released when it completes. While capturing: always.
    fn event_destroy(&self, device: DeviceIndex, event: Event) -> Result<()>;

    /// Swaps the calling thread's capture mode and returns the one before; a thread begins as global.
    fn exchange_capture_mode(&self, mode: CaptureMode) -> Result<CaptureMode>;

    /// A handle by which another process opens an allocation of `alloc_device`. CUDA asks for its first byte; from
    /// another the handle is that of the whole allocation all the same. Managed memory is
    /// [`ErrorKind::InvalidValue`] (CUDA gives none). While capturing: always.
    fn ipc_handle(&self, device: DeviceIndex, ptr: DevicePtr) -> Result<IpcHandle>;

    /// What the sizes and addresses of chunks at a location are multiples of (`cuMemGetAllocationGranularity`, the minimum):
    /// 2 MiB wherever it was asked. The location as in [`Driver::chunk_create`]. While capturing: always.
    fn chunk_granularity(&self, at: Location) -> Result<u64>;

    /// Reserves addresses (`cuMemAddressReserve`), which hold no memory and cannot be touched. `bytes` (> 0) is a multiple of the
    /// chunks' granularity; `alignment` is 0, for the driver's own, or a power of two. Does not wait. While capturing: always.
    fn address_reserve(&self, bytes: u64, alignment: u64) -> Result<DevicePtr>;

    /// Gives a reservation back (`cuMemAddressFree`), whole: "The size must match what was given to memAddressReserve and the ptr
    /// given must match what was returned". Nothing may be mapped in it. While capturing: always.
    fn address_free(&self, range: Range) -> Result<()>;

    /// Takes physical memory (`cuMemCreate`): of a device ([`DeviceInfo::chunks`]), or pinned memory of a NUMA node of the host
    /// ([`DeviceInfo::host_chunk_location`]). [`Location::Host`] is [`ErrorKind::InvalidValue`]: "HOST allocations are not IPC
    /// capable". `bytes` (> 0) is a multiple of the granularity. Only what is created `shareable`
    /// ([`DeviceInfo::shareable_chunks`]) can be exported. What it holds at first is indeterminate. Does not wait for the device;
    /// the driver zeroes host memory on the calling thread, at 6 GB/s. While capturing: always.
    ///
    /// A chunk's memory is given back "when all outstanding mappings to the memory are unmapped and when all outstanding
    /// references to the handle (including it's shareable counterparts) are also released" (`cuMemRelease`): while it is held,
    /// mapped, imported by another process, or a file descriptor of it is open.
    fn chunk_create(&self, at: Location, bytes: u64, shareable: bool) -> Result<Chunk>;

    /// Lets a chunk go (`cuMemRelease`), once for each time it was created or imported; it may still be mapped. "If \p handle is
    /// not a valid handle the behavior is undefined": the caller must hold it. Does not wait. While capturing: always.
    fn chunk_release(&self, chunk: Chunk) -> Result<()>;

    /// Puts a chunk at reserved addresses at which nothing is mapped (`cuMemMap`): the range is as long as the chunk, and begins
    /// at a multiple of the granularity. A chunk may be mapped more than once. "calling ::cuMemMap does not make the address
    /// accessible". Does not wait. While capturing: always.
    fn chunk_map(&self, range: Range, chunk: Chunk) -> Result<()>;

    /// Takes chunks from their addresses (`cuMemUnmap`), which stay reserved. "The range must be the entire contiguous address
    /// range that was mapped to": one whole mapping, or several that lie side by side. Does not wait, and does not check for
    /// work that uses the range: a kernel or copy that touches it afterwards ends the context (`CUDA_ERROR_ILLEGAL_ADDRESS`).
    /// While capturing: always; what a graph uses must stay mapped when it is launched.
    fn chunk_unmap(&self, range: Range) -> Result<()>;

    /// Lets processors read and write a range (`cuMemSetAccess`) which one or several whole mappings fill without a gap. Who had
    /// access keeps it; a new mapping has none, whatever was there before. [`Location::Host`] and [`Location::HostNuma`] are the
    /// CPU, of which only chunks of host memory can be reached: "Users cannot specify ::CU_MEM_LOCATION_TYPE_HOST_NUMA
    /// accessibility for allocations created on with other location types". Copies by the copy engines need the access of the
    /// device that makes them. Does not wait. While capturing: always.
    fn set_access(&self, range: Range, by: &[Location]) -> Result<()>;

    /// A file descriptor by which other processes import a chunk that was created shareable (`cuMemExportToShareableHandle`).
    /// While it is open, in whatever process, it keeps the chunk's memory. While capturing: always.
    fn chunk_export(&self, chunk: Chunk) -> Result<OwnedFd>;

    /// The chunk of a file descriptor (`cuMemImportFromShareableHandle`), which stays the caller's and may be closed then. To be
    /// released once for each import; what it has in its owner's process, access above all, it does not have here. While
    /// capturing: always.
    fn chunk_import(&self, descriptor: BorrowedFd<'_>) -> Result<Chunk>;
}
