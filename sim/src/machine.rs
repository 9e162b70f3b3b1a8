//! The machine: its interface, one method an entry point. Here: devices, memory, managed memory, and what tests ask;
//! copies, streams, events and graphs are in `machine_streams.rs`.
//!
//! Handles, pointers and error codes are CUDA's (`cudaError_t` and `CUresult` share the numbers). Every method takes
//! the device that is current for the caller; for a created stream the stream's own device counts, for the default
//! streams (0 or 1: legacy, 2: per-thread) the device says whose. Any thread may call anything at any time.

use crate::error::{Code, SimResult, Step, fail};
use crate::fault::{EntryPoint, Fault};
use crate::managed::{Managed, Place};
use crate::profile::{Config, GIB, Profile};
use crate::report::Report;
use crate::state::{Allocation, Body, HostAllocation, Inner, Session, State};
use crate::types::*;
use crate::work::{Side, Work};
use std::collections::BTreeMap;
use std::sync::Arc;
use torch_uvm::driver::{
    Advice, CaptureMode, Chunk, DeviceIndex, DeviceInfo, DeviceMemory, DevicePtr, HostMemory, Location, Range, Stream,
};

/// A simulated CUDA machine: devices, host memory, streams. Cheap to clone; clones are the same machine. When the last
/// one goes, so does all its memory.
#[derive(Clone)]
pub struct Machine {
    pub(crate) inner: Arc<Inner>,
}

impl Machine {
    /// Builds a machine.
    #[must_use]
    pub fn new(config: Config) -> Machine {
        Machine { inner: Inner::new(config.clone().devices(config.devices)) }
    }

    // ---- what it is ---------------------------------------------------------------------------------------------

    /// How it was built.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// The kind of machine.
    #[must_use]
    pub fn profile(&self) -> &Profile {
        &self.config().profile
    }

    /// How many devices there are (`cuDeviceGetCount`).
    pub fn device_count(&self) -> SimResult<DeviceIndex> {
        self.inner.call(EntryPoint::DeviceCount, |s| Ok(s.config.devices))
    }

    /// The constant facts of a device.
    pub fn device_info(&self, device: DeviceIndex) -> SimResult<DeviceInfo> {
        self.inner.call(EntryPoint::DeviceInfo, |s| {
            s.check_device(device)?;
            Ok(s.config.profile.device_info())
        })
    }

    /// `cuMemGetInfo`.
    pub fn device_memory(&self, device: DeviceIndex) -> SimResult<DeviceMemory> {
        self.inner.call(EntryPoint::DeviceMemory, |s| {
            s.check_device(device)?;
            let total = s.physical.devices[device as usize].total;
            Ok(DeviceMemory { free: s.physical.device_free(device as usize), total })
        })
    }

    /// [`Machine::device_memory`] without being a call: not counted, never failing. `None` where there is no such device.
    #[must_use]
    pub fn device_memory_now(&self, device: DeviceIndex) -> Option<DeviceMemory> {
        let device = usize::try_from(device).ok()?;
        self.inner.peek(|s| {
            let total = s.physical.devices.get(device)?.total;
            Some(DeviceMemory { free: s.physical.device_free(device), total })
        })
    }

    /// Host memory, as `/proc/meminfo` of the simulated machine would show it (`MemTotal`, `MemAvailable`).
    pub fn host_memory(&self) -> SimResult<HostMemory> {
        self.inner.call(EntryPoint::HostMemory, |s| Ok(s.host_memory()))
    }

    /// Has `notify` called, without any lock of the machine's, after each call that changed the host memory available
    /// (and once at once). One listener a machine; a new one takes the old one's place. Calls from several threads may
    /// come out of order: [`Machine::host_memory_now`] is the truth.
    pub fn on_host_memory_change(&self, notify: impl Fn(HostMemory) + Send + Sync + 'static) {
        self.inner.listen(Arc::new(notify));
    }

    /// [`Machine::host_memory`] without being a call: not counted, never failing.
    #[must_use]
    pub fn host_memory_now(&self) -> HostMemory {
        self.inner.peek(|s| s.host_memory())
    }

    // ---- memory -------------------------------------------------------------------------------------------------

    /// `cuMemAllocManaged`, attached globally.
    pub fn alloc_managed(&self, device: DeviceIndex, bytes: u64) -> SimResult<DevicePtr> {
        self.inner.call(EntryPoint::AllocManaged, |s| {
            s.unsafe_call()?;
            s.clock_ns += s.costs().alloc_managed;
            s.allocate(device, bytes, Body::Managed)
        })
    }

    /// `cuMemAlloc`.
    pub fn alloc_device(&self, device: DeviceIndex, bytes: u64) -> SimResult<DevicePtr> {
        self.inner.call(EntryPoint::AllocDevice, |s| {
            s.unsafe_call()?;
            let (fixed, per_gib) = s.costs().alloc_device;
            s.clock_ns += fixed + per_gib * (bytes / GIB);
            s.allocate(device, bytes, Body::Device)
        })
    }

    /// `cuMemFree` of device and managed memory. Waits for all work. Freeing 0 does nothing.
    pub fn free(&self, device: DeviceIndex, ptr: DevicePtr) -> SimResult<()> {
        self.inner.call(EntryPoint::Free, |s| {
            s.check_device(device)?;
            if ptr.0 == 0 {
                return Ok(());
            }
            s.unsafe_call()?;
            s.find_allocation(ptr)?;
            s.wait_for_all(None);
            // Another thread may have freed it while this one waited.
            s.find_allocation(ptr)?;
            s.release(ptr.0);
            Ok(())
        })
    }

    /// `cuMemHostAlloc`: pinned host memory.
    pub fn host_alloc(&self, device: DeviceIndex, bytes: u64) -> SimResult<u64> {
        self.inner.call(EntryPoint::HostAlloc, |s| {
            s.check_device(device)?;
            s.unsafe_call()?;
            if bytes == 0 {
                return Err(fail(Code::INVALID_VALUE, "0 bytes"));
            }
            let rounded = s.zones.pinned.rounded(bytes)?;
            if rounded > s.physical.host_available() {
                let left = s.physical.host_available();
                return Err(fail(Code::OUT_OF_MEMORY, format!("{bytes} bytes of host memory: {left} are available")));
            }
            let address = s.zones.pinned.take(rounded)?;
            s.physical.take_pinned(rounded);
            let (kind, id) = (PointerKind::PinnedHost, s.next_id());
            s.host_allocations.insert(address, HostAllocation { device, bytes, kind, zone: Some(rounded), id });
            Ok(address)
        })
    }

    /// `cuMemFreeHost`. Waits for all work. Freeing 0 does nothing.
    pub fn host_free(&self, device: DeviceIndex, ptr: u64) -> SimResult<()> {
        self.inner.call(EntryPoint::HostFree, |s| {
            s.check_device(device)?;
            if ptr == 0 {
                return Ok(());
            }
            s.unsafe_call()?;
            s.find_host(ptr, PointerKind::PinnedHost, Code::INVALID_VALUE)?;
            s.wait_for_all(None);
            s.find_host(ptr, PointerKind::PinnedHost, Code::INVALID_VALUE)?;
            if let Some(HostAllocation { zone: Some(rounded), .. }) = s.host_allocations.remove(&ptr) {
                s.zones.pinned.give(ptr, rounded);
                s.physical.host.pinned -= rounded;
            }
            Ok(())
        })
    }

    /// `cuMemHostRegister`: pins the caller's own memory.
    pub fn host_register(&self, device: DeviceIndex, ptr: u64, bytes: u64) -> SimResult<()> {
        self.inner.call(EntryPoint::HostRegister, |s| {
            s.check_device(device)?;
            s.unsafe_call()?;
            let end = ptr.checked_add(bytes).filter(|_| ptr != 0 && bytes != 0);
            let Some(end) = end.filter(|_| !s.in_zones(ptr)) else {
                return Err(fail(Code::INVALID_VALUE, format!("{bytes} bytes at {ptr:#x} cannot be registered")));
            };
            if s.host_allocations.range(..end).next_back().is_some_and(|(&base, host)| base + host.bytes > ptr) {
                return Err(Code::HOST_MEMORY_ALREADY_REGISTERED.into());
            }
            let (kind, id) = (PointerKind::RegisteredHost, s.next_id());
            s.host_allocations.insert(ptr, HostAllocation { device, bytes, kind, zone: None, id });
            // Locked in memory from now on; before, it is memory that the machine knows nothing of.
            s.physical.take_pinned(bytes);
            Ok(())
        })
    }

    /// `cuMemHostUnregister`. Waits for all work.
    pub fn host_unregister(&self, device: DeviceIndex, ptr: u64) -> SimResult<()> {
        self.inner.call(EntryPoint::HostUnregister, |s| {
            s.check_device(device)?;
            s.unsafe_call()?;
            s.find_host(ptr, PointerKind::RegisteredHost, Code::HOST_MEMORY_NOT_REGISTERED)?;
            s.wait_for_all(None);
            if let Some(host) = s.host_allocations.remove(&ptr) {
                s.physical.host.pinned -= host.bytes;
            }
            Ok(())
        })
    }

    /// `cuPointerGetAttributes`; never fails for an unknown pointer (it is unregistered memory).
    pub fn pointer_info(&self, ptr: u64) -> SimResult<PointerInfo> {
        self.inner.call(EntryPoint::PointerInfo, |s| {
            if let Some((base, &Allocation { device, bytes, body, id, .. })) = s.allocation_at(ptr) {
                return Ok(PointerInfo { kind: body.pointer_kind(), device, base, bytes, id });
            }
            if let Some((base, &HostAllocation { device, bytes, kind, id, .. })) = s.host_allocation_at(ptr) {
                return Ok(PointerInfo { kind, device, base, bytes, id });
            }
            Ok(PointerInfo { kind: PointerKind::Unregistered, device: -1, base: ptr, bytes: 0, id: 0 })
        })
    }

    /// `cuMemGetAddressRange`: base and size of a device or managed allocation.
    pub fn address_range(&self, ptr: DevicePtr) -> SimResult<Range> {
        self.inner.call(EntryPoint::AddressRange, |s| match s.allocation_at(ptr.0) {
            Some((base, allocation)) => Ok(Range { ptr: DevicePtr(base), bytes: allocation.bytes }),
            None => Err(fail(Code::NOT_FOUND, format!("{ptr:?} is not device memory"))),
        })
    }

    /// `cuDeviceCanAccessPeer`.
    pub fn can_access_peer(&self, device: DeviceIndex, peer: DeviceIndex) -> SimResult<bool> {
        self.inner.call(EntryPoint::CanAccessPeer, |s| {
            s.check_device(device)?;
            s.check_device(peer)?;
            Ok(device != peer)
        })
    }

    /// `cuCtxEnablePeerAccess`.
    pub fn enable_peer(&self, device: DeviceIndex, peer: DeviceIndex) -> SimResult<()> {
        self.inner.call(EntryPoint::EnablePeer, |s| {
            s.check_device(device)?;
            s.check_device(peer)?;
            if device == peer {
                return Err(fail(Code::INVALID_DEVICE, "a device is not its own peer"));
            }
            if s.peers.insert((device, peer)) { Ok(()) } else { Err(Code::PEER_ACCESS_ALREADY_ENABLED.into()) }
        })
    }

    /// `cuCtxDisablePeerAccess`.
    pub fn disable_peer(&self, device: DeviceIndex, peer: DeviceIndex) -> SimResult<()> {
        self.inner.call(EntryPoint::DisablePeer, |s| {
            s.check_device(device)?;
            s.check_device(peer)?;
            if s.peers.remove(&(device, peer)) { Ok(()) } else { Err(Code::PEER_ACCESS_NOT_ENABLED.into()) }
        })
    }

    // ---- managed memory -----------------------------------------------------------------------------------------

    /// `cuMemAdvise`.
    pub fn advise(&self, device: DeviceIndex, range: Range, advice: Advice) -> SimResult<()> {
        self.inner.call(EntryPoint::Advise, |s| {
            s.check_device(device)?;
            let base = s.managed_base(range)?;
            match advice {
                Advice::SetAccessedBy(Location::HostNuma(node)) | Advice::UnsetAccessedBy(Location::HostNuma(node)) => {
                    return Err(fail(Code::INVALID_VALUE, format!("accessed-by takes no NUMA node (here {node})")));
                }
                Advice::SetPreferredLocation(location)
                | Advice::SetAccessedBy(location)
                | Advice::UnsetAccessedBy(location) => s.check_location(location)?,
                Advice::UnsetPreferredLocation | Advice::SetReadMostly | Advice::UnsetReadMostly => {}
            }
            s.unsafe_call()?;
            let span = Managed::span(range.ptr.0 - base, range.bytes);
            let (call, per_gib) = s.costs().advise_call;
            s.clock_ns += call;
            if let Advice::SetAccessedBy(_) = advice {
                s.clock_ns += (per_gib as f64 * range.bytes as f64 / GIB as f64) as u64;
            }
            if let Some(managed) = s.physical.managed.get_mut(&base) {
                managed.advise(span.clone(), advice);
            }
            if advice == Advice::UnsetReadMostly {
                s.physical.end_copies(base, span);
            }
            Ok(())
        })
    }

    /// `cuMemPrefetchAsync`.
    pub fn prefetch(&self, device: DeviceIndex, range: Range, to: Location, stream: Stream) -> SimResult<()> {
        self.inner.call(EntryPoint::Prefetch, |s| {
            s.check_device(device)?;
            let base = s.managed_base(range)?;
            s.check_location(to)?;
            let key = s.stream_key(device, stream)?;
            // Plainly legal on any stream that does not capture, whatever captures elsewhere (measured).
            s.forbid_on_capturing(key)?;
            s.enqueue(key, Work::Prefetch { range, to })?;
            let span = Managed::span(range.ptr.0 - base, range.bytes);
            if let Some(managed) = s.physical.managed.get_mut(&base) {
                managed.note_prefetch(span, to);
            }
            s.clock_ns += s.costs().prefetch_call;
            Ok(())
        })
    }

    /// `cuMemDiscardBatchAsync`.
    pub fn discard(&self, device: DeviceIndex, ranges: &[Range], stream: Stream) -> SimResult<()> {
        self.inner.call(EntryPoint::Discard, |s| s.discard(device, ranges, None, stream))
    }

    /// `cuMemDiscardAndPrefetchBatchAsync`, all ranges to one place.
    pub fn discard_and_prefetch(
        &self,
        device: DeviceIndex,
        ranges: &[Range],
        to: Location,
        stream: Stream,
    ) -> SimResult<()> {
        self.inner.call(EntryPoint::DiscardAndPrefetch, |s| s.discard(device, ranges, Some(to), stream))
    }

    /// `cuMemRangeGetAttribute`: the advice in force on all of the range.
    pub fn range_advice(&self, range: Range) -> SimResult<RangeAdvice> {
        self.inner.call(EntryPoint::RangeAttribute, |s| {
            let base = s.managed_base(range)?;
            let span = Managed::span(range.ptr.0 - base, range.bytes);
            s.physical.managed.get(&base).map(|managed| managed.advice(span)).ok_or(Code::INVALID_VALUE.into())
        })
    }

    // ---- for tests and reports: no entry points, never fail by a fault ------------------------------------------

    /// Plants a fault.
    pub fn inject(&self, fault: Fault) {
        self.inner.peek(|s| s.faults.plant(fault));
    }

    /// Takes all planted faults away.
    pub fn clear_faults(&self) {
        self.inner.peek(|s| s.faults.clear());
    }

    /// How many calls planted faults have failed.
    #[must_use]
    pub fn faults_hit(&self) -> u64 {
        self.inner.peek(|s| s.faults.hits())
    }

    /// How often each entry point was called, since the start or the last [`Machine::reset_counters`].
    #[must_use]
    pub fn calls(&self) -> BTreeMap<EntryPoint, u64> {
        self.inner.peek(|s| s.faults.counts())
    }

    /// Sets the counts of calls, the [`Counters`], [`Traffic`] and [`Populated`] to zero; the [`Peaks`] begin with what is in
    /// use.
    pub fn reset_counters(&self) {
        self.inner.peek(|s| {
            s.faults.reset_counts();
            s.physical.reset_counters();
        });
    }

    /// What has happened.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.inner.peek(|s| s.physical.counters)
    }

    /// What has crossed links, by its cause.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        self.inner.peek(|s| s.physical.traffic)
    }

    /// How fresh pages got their memory.
    #[must_use]
    pub fn populated(&self) -> Populated {
        self.inner.peek(|s| s.physical.populated)
    }

    /// The most memory in use.
    #[must_use]
    pub fn peaks(&self) -> Peaks {
        self.inner.peek(|s| s.physical.peaks.clone())
    }

    /// All of what happened, for a report.
    #[must_use]
    pub fn report(&self) -> Report {
        self.inner.peek(|s| Report {
            profile: s.config.profile.clone(),
            devices: s.config.devices,
            schedule: s.config.schedule,
            counters: s.physical.counters,
            traffic: s.physical.traffic,
            populated: s.physical.populated,
            peaks: s.physical.peaks.clone(),
            calls: s.faults.counts(),
            pending_operations: s.pending,
            host_ns: s.clock_ns,
            device_ns: s.last_done_ns,
        })
    }

    /// Runs what is queued, without moving bytes and without calling host functions: only where pages are and what that
    /// costs is kept in the books. For the end of a process, where the memory that copies point to may be gone. What
    /// waits for a host function that runs at present stays queued.
    pub fn run_down(&self) {
        self.inner.peek(|s| {
            s.running_down = true;
            for mark in s.ends(None) {
                s.advance(mark);
            }
            s.running_down = false;
        });
    }

    /// Where all managed memory is. Looks at every page: not for hot paths.
    #[must_use]
    pub fn residency(&self) -> Residency {
        self.inner.peek(|s| {
            let mut sum = Residency { devices: vec![0; s.config.devices as usize], ..Residency::default() };
            for managed in s.physical.managed.values() {
                managed.add_residency(0..managed.pages.len(), &mut sum);
            }
            sum
        })
    }

    /// Where the bytes of the pages of this managed range are; `None` if it is not managed memory.
    #[must_use]
    pub fn residency_of(&self, range: Range) -> Option<Residency> {
        self.inner.peek(|s| {
            let base = s.managed_base(range).ok()?;
            let mut sum = Residency { devices: vec![0; s.config.devices as usize], ..Residency::default() };
            s.physical.managed.get(&base)?.add_residency(Managed::span(range.ptr.0 - base, range.bytes), &mut sum);
            Some(sum)
        })
    }

    /// Stands in for the CPU touching managed memory: the simulator does not see plain loads and stores.
    pub fn host_touch(&self, range: Range, write: bool) {
        self.inner.peek(|s| {
            let Ok(base) = s.managed_base(range) else { return };
            let spent = s.physical.access(base, range.ptr.0 - base, range.bytes, Place::HOST, write);
            s.clock_ns += spent as u64;
        });
    }

    /// Sets how much device memory other processes hold.
    pub fn set_others_device_memory(&self, device: DeviceIndex, bytes: u64) {
        self.inner.peek(|s| {
            if let Some(books) = s.physical.devices.get_mut(device as usize) {
                books.others = bytes;
            }
        });
    }

    /// Sets how much host memory other processes hold.
    pub fn set_others_host_memory(&self, bytes: u64) {
        self.inner.peek(|s| s.physical.host.others = bytes);
    }

    /// The simulated clock, in nanoseconds: the host's time spent in calls and in waiting.
    #[must_use]
    pub fn clock_ns(&self) -> u64 {
        self.inner.peek(|s| s.clock_ns)
    }

    /// What is still alive.
    #[must_use]
    pub fn live(&self) -> Live {
        self.inner.peek(|s| {
            let created = s.streams.iter().filter(|(_, stream)| stream.created && !stream.destroyed);
            let mut live = Live {
                allocations: s
                    .allocations
                    .iter()
                    .map(|(&p, a)| (DevicePtr(p), a.bytes, a.body.pointer_kind()))
                    .collect(),
                host: s.host_allocations.iter().map(|(&p, h)| (p, h.bytes, h.kind)).collect(),
                streams: created.map(|(&key, _)| Stream(key)).collect(),
                events: s.events.keys().map(|&event| torch_uvm::driver::Event(event)).collect(),
                chunks: s.chunks.iter().map(|(&id, chunk)| (Chunk(id), chunk.bytes)).collect(),
                reservations: s.reservations.iter().map(|(&base, reserved)| (base, reserved.bytes)).collect(),
                graphs: s.graphs.keys().map(|&graph| GraphId(graph)).collect(),
                execs: s.execs.keys().map(|&exec| GraphExecId(exec)).collect(),
                captures: s.captures.len(),
                pending_operations: s.pending,
            };
            live.streams.sort_unstable();
            live.events.sort_unstable();
            live
        })
    }

    /// Whether the books of physical memory balance; what is wrong if not. Looks at every page.
    ///
    /// # Errors
    /// A bug in the simulator.
    pub fn check_books(&self) -> Result<(), String> {
        self.inner.peek(|s| s.physical.check())
    }

    /// Puts the device in the state an illegal address leaves: from now on every call fails with `code`.
    pub fn break_device(&self, code: Code) {
        self.inner.peek(|s| s.broken = Some((code, code.text().to_owned())));
    }

    /// The calling thread's capture mode, without changing it.
    #[must_use]
    pub fn capture_mode(&self) -> CaptureMode {
        let thread = crate::state::thread_number();
        self.inner.peek(|s| s.thread_modes.get(&thread).copied().unwrap_or(CaptureMode::Global))
    }
}

impl Body {
    fn pointer_kind(self) -> PointerKind {
        match self {
            Body::Managed => PointerKind::Managed,
            Body::Mapped { host: true, .. } => PointerKind::PinnedHost,
            Body::Device | Body::Mapped { .. } | Body::Imported { .. } => PointerKind::Device,
        }
    }
}

impl State {
    /// Makes an allocation.
    fn allocate(&mut self, device: DeviceIndex, bytes: u64, body: Body) -> Step<DevicePtr> {
        self.check_device(device)?;
        if bytes == 0 {
            return Err(fail(Code::INVALID_VALUE, "0 bytes"));
        }
        let rounded = self.zones.of(bytes, body).rounded(bytes)?;
        if body == Body::Device && !self.physical.take_plain(device as usize, rounded) {
            let free = self.physical.device_free(device as usize);
            return Err(fail(Code::OUT_OF_MEMORY, format!("{bytes} bytes on device {device}: {free} are free")));
        }
        let address = match self.zones.of(bytes, body).take(rounded) {
            Ok(address) => address,
            Err(error) => {
                if body == Body::Device {
                    self.physical.give_plain(device as usize, rounded);
                }
                return Err(error);
            }
        };
        if body == Body::Managed {
            self.physical.managed.insert(address, Managed::new(bytes, self.config.devices as usize));
        }
        let id = self.next_id();
        self.allocations.insert(address, Allocation { device, bytes, rounded, body, id });
        Ok(DevicePtr(address))
    }

    /// Takes an allocation away. All work is done.
    fn release(&mut self, address: u64) {
        let Some(allocation) = self.allocations.remove(&address) else { return };
        match allocation.body {
            Body::Mapped { .. } | Body::Imported { .. } => {}
            Body::Device => {
                self.physical.give_plain(allocation.device as usize, allocation.rounded);
                self.clock_ns += self.costs().free_device;
            }
            Body::Managed => {
                let (on_devices, in_host) = self.physical.forget(address);
                let (fixed, device_gib, host_gib) = self.costs().free_managed;
                let part = |per_gib: u64, bytes: u64| (per_gib as f64 * bytes as f64 / GIB as f64) as u64;
                self.clock_ns += fixed + part(device_gib, on_devices) + part(host_gib, in_host);
            }
        }
        self.ipc_opened.remove(&address);
        self.zones.of(allocation.bytes, allocation.body).give(address, allocation.rounded);
    }

    /// The allocation of `cuMemAlloc` or `cuMemAllocManaged` that begins at an address.
    fn find_allocation(&self, ptr: DevicePtr) -> Step<Allocation> {
        let found = self.allocations.get(&ptr.0).copied();
        found.filter(|found| matches!(found.body, Body::Device | Body::Managed)).ok_or_else(|| {
            let why = match self.allocation_at(ptr.0) {
                Some((base, _)) if base == ptr.0 => format!("{ptr:?} was mapped or opened, not allocated"),
                Some((base, _)) => format!("{ptr:?} lies inside the allocation {base:#x}, not at its start"),
                None if self.in_zones(ptr.0) => format!("{ptr:?} is not live: freed before?"),
                None => format!("{ptr:?} is not an allocation of this machine"),
            };
            fail(Code::INVALID_VALUE, why)
        })
    }

    fn find_host(&self, ptr: u64, kind: PointerKind, code: Code) -> Step<()> {
        match self.host_allocations.get(&ptr) {
            Some(host) if host.kind == kind => Ok(()),
            _ => Err(fail(code, format!("{ptr:#x} is not the start of such host memory"))),
        }
    }

    /// The managed allocation that holds all of a range.
    fn managed_base(&self, range: Range) -> Step<u64> {
        if range.bytes == 0 {
            return Err(fail(Code::INVALID_VALUE, "the range is empty"));
        }
        match self.side(range.ptr.0, range.bytes)? {
            Side::Managed { base } => Ok(base),
            _ => Err(fail(Code::INVALID_VALUE, format!("{:?} is not managed memory", range.ptr))),
        }
    }

    /// A location that advice and prefetch take: without concurrent managed access, no device is one.
    fn check_location(&self, location: Location) -> Step<()> {
        if !self.config.profile.concurrent_managed_access {
            return Err(fail(Code::INVALID_DEVICE, "the device has no concurrent managed access"));
        }
        match location {
            Location::Device(device) => self.check_device(device),
            Location::Host => Ok(()),
            Location::HostNuma(node) if (0..self.config.profile.numa_nodes).contains(&node) => Ok(()),
            Location::HostNuma(node) => Err(fail(Code::INVALID_VALUE, format!("there is no NUMA node {node}"))),
        }
    }
}

impl Session<'_> {
    fn discard(&mut self, device: DeviceIndex, ranges: &[Range], to: Option<Location>, stream: Stream) -> Step<()> {
        self.check_device(device)?;
        if ranges.is_empty() {
            return Err(fail(Code::INVALID_VALUE, "no ranges"));
        }
        for &range in ranges {
            self.managed_base(range)?;
        }
        if !self.config.profile.device_info().discard {
            return Err(fail(Code::NOT_SUPPORTED, "the driver or the device cannot discard managed memory"));
        }
        self.check_location(to.unwrap_or(Location::Device(device)))?;
        let key = self.stream_key(device, stream)?;
        if self.stream(key)?.legacy {
            return Err(fail(Code::INVALID_VALUE, "discarding does not work on the legacy default stream"));
        }
        self.forbid_on_capturing(key)?;
        for &range in ranges {
            self.enqueue(key, Work::Discard { range, prefetch: to })?;
            let per_gib = self.costs().discard_per_gib;
            self.clock_ns += (per_gib as f64 * range.bytes as f64 / GIB as f64) as u64;
        }
        Ok(())
    }
}
