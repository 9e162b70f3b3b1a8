//! The machine's interface: virtual memory management, that is addresses and physical memory taken apart and put together
//! by the program. PyTorch's expandable segments are made of it.
//!
//! A chunk's bytes lie in a file, which is mapped wherever the chunk is. Its memory is in the books of its place until nothing
//! refers to the chunk any more: no handle, no mapping, no open file descriptor, no other process that has imported it.

use crate::error::{Code, SimResult, Step, fail};
use crate::fault::EntryPoint;
use crate::ipc::{Exported, is_closed};
use crate::machine::Machine;
use crate::managed::{PAGE, Place};
use crate::memory::{self, Zone};
use crate::profile::{Costs, GIB, PerTier};
use crate::state::{Allocation, Body, State};
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use torch_uvm::driver::{Chunk, DeviceIndex, DevicePtr, Location, Range};

/// Physical memory of `cuMemCreate`, this process's or another's.
pub(crate) struct ChunkState {
    at: Location,
    pub bytes: u64,
    bytes_in: BytesIn,
    /// Whether it was made to be exported.
    shareable: bool,
    /// How many mappings it has.
    mappings: u64,
    /// How many times `cuMemRelease` is to be called: once, and once more for each time it was imported or retained here.
    held: u64,
    /// The other ends of the file descriptors that it was exported as.
    exported: Vec<OwnedFd>,
}

/// Where the bytes are.
enum BytesIn {
    /// At this address of the zone of its place, whose own mapping stays without access: a range of the zone's file.
    Zone(u64),
    /// In another process's file, from this offset on. The file descriptor by which it came keeps the memory over there.
    File { file: File, offset: u64, _keeps: OwnedFd },
}

/// Reserved addresses, and the range of the zone that they were cut from.
#[derive(Clone, Copy)]
pub(crate) struct Reservation {
    pub bytes: u64,
    zone: Range,
}

fn check_size(bytes: u64) -> Step<()> {
    if bytes == 0 || !bytes.is_multiple_of(PAGE) {
        return Err(fail(Code::INVALID_VALUE, format!("{bytes} bytes are not a multiple of 2 MiB")));
    }
    Ok(())
}

fn is_host(at: Location) -> bool {
    !matches!(at, Location::Device(_))
}

impl Machine {
    /// `cuMemGetAllocationGranularity`, the minimum: also the unit of addresses.
    pub fn chunk_granularity(&self, at: Location) -> SimResult<u64> {
        self.inner.call(EntryPoint::ChunkGranularity, |s| {
            s.check_chunk_location(at, false)?;
            Ok(PAGE)
        })
    }

    /// `cuMemAddressReserve`. With an alignment of 0, addresses are aligned to 2 MiB.
    pub fn address_reserve(&self, bytes: u64, alignment: u64) -> SimResult<DevicePtr> {
        self.inner.call(EntryPoint::AddressReserve, |s| {
            check_size(bytes)?;
            if alignment != 0 && !alignment.is_power_of_two() {
                return Err(fail(Code::INVALID_VALUE, format!("an alignment of {alignment} is no power of two")));
            }
            let more = alignment.saturating_sub(PAGE);
            let whole = s.zones.managed.rounded(bytes.checked_add(more).ok_or(Code::OUT_OF_MEMORY)?)?;
            let start = s.zones.managed.reserve(whole)?;
            let address = memory::round_up(start, alignment.max(PAGE)).ok_or(Code::UNKNOWN)?;
            let zone = Range { ptr: DevicePtr(start), bytes: whole };
            s.reservations.insert(address, Reservation { bytes, zone });
            Ok(DevicePtr(address))
        })
    }

    /// `cuMemAddressFree`: the whole reservation, with nothing mapped in it.
    pub fn address_free(&self, range: Range) -> SimResult<()> {
        self.inner.call(EntryPoint::AddressFree, |s| {
            let address = range.ptr.0;
            let Some(reservation) = s.reservations.get(&address).copied().filter(|r| r.bytes == range.bytes) else {
                let why = format!("{} bytes at {address:#x} are no reservation", range.bytes);
                return Err(fail(Code::INVALID_VALUE, why));
            };
            if s.allocations.range(address..address + range.bytes).next().is_some() {
                return Err(fail(Code::INVALID_VALUE, "memory is still mapped in the reservation"));
            }
            s.reservations.remove(&address);
            s.zones.managed.give(reservation.zone.ptr.0, reservation.zone.bytes);
            Ok(())
        })
    }

    /// `cuMemCreate`. Only what is made `shareable` can be exported.
    pub fn chunk_create(&self, at: Location, bytes: u64, shareable: bool) -> SimResult<Chunk> {
        self.inner.call(EntryPoint::ChunkCreate, |s| {
            s.check_chunk_location(at, shareable)?;
            check_size(bytes)?;
            s.take_chunk(at, bytes)?;
            let home = match s.chunk_zone(at).reserve(bytes) {
                Ok(home) if s.chunk_zone(at).file_of(home).is_some() => home,
                Ok(home) => {
                    s.chunk_zone(at).give(home, bytes);
                    s.give_chunk(at, bytes);
                    return Err(fail(Code::NOT_SUPPORTED, "the host has no anonymous files (memfd_create)"));
                }
                Err(error) => {
                    s.give_chunk(at, bytes);
                    return Err(error);
                }
            };
            s.spend(|costs| costs.chunk_create, at, bytes);
            Ok(s.add_chunk(at, bytes, BytesIn::Zone(home), shareable))
        })
    }

    /// `cuMemRelease`: the memory is gone when nothing else refers to it.
    pub fn chunk_release(&self, chunk: Chunk) -> SimResult<()> {
        self.inner.call(EntryPoint::ChunkRelease, |s| {
            s.live_chunk(chunk)?.held -= 1;
            s.drop_unused(chunk.0);
            Ok(())
        })
    }

    /// `cuMemRetainAllocationHandle`: the chunk that is mapped at an address; to be released once more.
    pub fn chunk_retain(&self, address: u64) -> SimResult<Chunk> {
        self.inner.call(EntryPoint::ChunkRetain, |s| {
            let Some((_, Allocation { body: Body::Mapped { chunk, .. }, .. })) = s.allocation_at(address) else {
                return Err(fail(Code::INVALID_VALUE, format!("nothing is mapped at {address:#x}")));
            };
            let chunk = *chunk;
            s.chunks.get_mut(&chunk).ok_or(Code::UNKNOWN)?.held += 1;
            Ok(Chunk(chunk))
        })
    }

    /// `cuMemGetAllocationPropertiesFromHandle`: the location, and whether it can be exported.
    pub fn chunk_info(&self, chunk: Chunk) -> SimResult<(Location, bool)> {
        self.inner.call(EntryPoint::ChunkInfo, |s| {
            let state = s.live_chunk(chunk)?;
            Ok((state.at, state.shareable))
        })
    }

    /// `cuMemExportToShareableHandle`, as a file descriptor: while it is open anywhere, the memory stays. It says where the memory
    /// is; a process must import it while this one lives.
    pub fn chunk_export(&self, chunk: Chunk) -> SimResult<OwnedFd> {
        self.inner.call(EntryPoint::ChunkExport, |s| {
            let state = s.live_chunk(chunk)?;
            let (at, bytes) = (state.at, state.bytes);
            let BytesIn::Zone(home) = state.bytes_in else {
                return Err(fail(Code::INVALID_VALUE, "the memory is another process's"));
            };
            if !state.shareable {
                return Err(fail(Code::INVALID_VALUE, "the memory was not made to be exported"));
            }
            let (file, offset) = s.chunk_zone(at).file_of(home).ok_or(Code::UNKNOWN)?;
            let (theirs, ours) = Exported::of_chunk(at, chunk.0, bytes, file, offset).into_descriptor()?;
            let exported = &mut s.live_chunk(chunk)?.exported;
            exported.retain(|end| !is_closed(end));
            exported.push(ours);
            Ok(theirs)
        })
    }

    /// `cuMemImportFromShareableHandle`, from a file descriptor, which stays the caller's. Memory of this very process is the same
    /// chunk again, to be released once more.
    pub fn chunk_import(&self, descriptor: BorrowedFd<'_>) -> SimResult<Chunk> {
        self.inner.call(EntryPoint::ChunkImport, |s| {
            let exported = Exported::from_descriptor(descriptor)?;
            let (at, chunk) = exported.chunk()?;
            if exported.is_own() {
                let state = s.chunks.get_mut(&chunk.0).ok_or_else(|| unknown(chunk))?;
                state.held += 1;
                s.lingering.remove(&chunk.0);
                return Ok(chunk);
            }
            s.check_chunk_location(at, true)?;
            let (file, offset) = exported.open()?;
            let keeps = descriptor.try_clone_to_owned().map_err(|error| fail(Code::UNKNOWN, error.to_string()))?;
            let bytes_in = BytesIn::File { file, offset, _keeps: keeps };
            Ok(s.add_chunk(at, exported.rounded, bytes_in, false))
        })
    }

    /// `cuMemMap`: a whole chunk at reserved addresses. Usable after [`Machine::set_access`].
    pub fn chunk_map(&self, range: Range, chunk: Chunk) -> SimResult<()> {
        self.inner.call(EntryPoint::ChunkMap, |s| {
            let Range { ptr: DevicePtr(address), bytes } = range;
            let whole = s.live_chunk(chunk)?.bytes;
            if bytes != whole {
                return Err(fail(Code::INVALID_VALUE, format!("{bytes} bytes of a chunk of {whole}: all are mapped")));
            }
            if !address.is_multiple_of(PAGE) || !s.is_reserved(range) {
                return Err(fail(Code::INVALID_VALUE, format!("{bytes} bytes at {address:#x} are not reserved")));
            }
            if s.allocations.range(..address + bytes).next_back().is_some_and(|(base, a)| base + a.rounded > address) {
                return Err(fail(Code::INVALID_VALUE, format!("something is mapped at {address:#x} already")));
            }
            let at = s.live_chunk(chunk)?.at;
            let (file, offset) = match s.live_chunk(chunk)?.bytes_in {
                BytesIn::Zone(home) => s.chunk_zone(at).file_of(home).ok_or(Code::UNKNOWN)?,
                BytesIn::File { ref file, offset, .. } => (file.as_raw_fd(), offset),
            };
            memory::map_file(address, bytes, file, offset, libc::PROT_NONE)?;
            s.live_chunk(chunk)?.mappings += 1;
            let device = if let Location::Device(device) = at { device } else { 0 };
            let body = Body::Mapped { chunk: chunk.0, host: is_host(at), access: 0 };
            let id = s.next_id();
            s.allocations.insert(address, Allocation { device, bytes, rounded: bytes, body, id });
            Ok(())
        })
    }

    /// `cuMemUnmap`: whole mappings. Does not wait for work: what still uses the memory meets an illegal address.
    pub fn chunk_unmap(&self, range: Range) -> SimResult<()> {
        self.inner.call(EntryPoint::ChunkUnmap, |s| {
            for (base, allocation) in s.mappings(range)? {
                s.allocations.remove(&base);
                memory::unmap_file(base, allocation.rounded);
                if let Body::Mapped { chunk, .. } = allocation.body {
                    if let Some(state) = s.chunks.get_mut(&chunk) {
                        state.mappings -= 1;
                        let at = state.at;
                        s.spend(|costs| costs.chunk_unmap, at, allocation.rounded);
                    }
                    s.drop_unused(chunk);
                }
            }
            Ok(())
        })
    }

    /// `cuMemSetAccess`: reading and writing for each location, or nothing. The others keep what they have.
    pub fn set_access(&self, range: Range, by: &[(Location, bool)]) -> SimResult<()> {
        self.inner.call(EntryPoint::SetAccess, |s| {
            if by.is_empty() {
                return Err(fail(Code::INVALID_VALUE, "access for nobody"));
            }
            let mappings = s.mappings(range)?;
            for &(location, _) in by {
                match location {
                    Location::Device(device) => s.check_device(device)?,
                    Location::Host | Location::HostNuma(_) => {
                        if mappings.iter().any(|(_, a)| matches!(a.body, Body::Mapped { host: false, .. })) {
                            return Err(fail(Code::INVALID_VALUE, "the CPU reaches chunks of host memory only"));
                        }
                    }
                }
            }
            for (base, allocation) in mappings {
                let Body::Mapped { chunk, host, mut access } = allocation.body else { continue };
                for &(location, read_write) in by {
                    let bit = Place::of(location).bit();
                    access = if read_write { access | bit } else { access & !bit };
                }
                let protection = if access == 0 { libc::PROT_NONE } else { libc::PROT_READ | libc::PROT_WRITE };
                memory::protect(base, allocation.rounded, protection)?;
                if let Some(allocation) = s.allocations.get_mut(&base) {
                    allocation.body = Body::Mapped { chunk, host, access };
                }
                let at = if host { Location::Host } else { Location::Device(allocation.device) };
                s.spend(|costs| costs.chunk_access, at, allocation.rounded);
            }
            Ok(())
        })
    }

    /// `cuMemGetAccess`: whether a location may read and write what is mapped at an address.
    pub fn has_access(&self, address: u64, by: Location) -> SimResult<bool> {
        self.inner.call(EntryPoint::GetAccess, |s| match s.allocation_at(address) {
            Some((_, Allocation { body: Body::Mapped { access, .. }, .. })) => Ok(access & Place::of(by).bit() != 0),
            _ => Err(fail(Code::INVALID_VALUE, format!("nothing is mapped at {address:#x}"))),
        })
    }
}

fn unknown(chunk: Chunk) -> crate::error::Fail {
    fail(Code::INVALID_VALUE, format!("{:#x} is no chunk", chunk.0))
}

impl State {
    /// Where chunks may lie.
    fn check_chunk_location(&self, at: Location, shareable: bool) -> Step<()> {
        let profile = &self.config.profile;
        let unsupported = || fail(Code::NOT_SUPPORTED, "the device or the driver has no chunks of host memory");
        match at {
            Location::Device(device) => self.check_device(device),
            Location::Host | Location::HostNuma(_) if !profile.host_chunks => Err(unsupported()),
            Location::Host if shareable => Err(fail(Code::INVALID_VALUE, "HOST allocations are not IPC capable")),
            Location::Host => Ok(()),
            // Nodes beyond the first are devices' memory.
            Location::HostNuma(0) => Ok(()),
            Location::HostNuma(node) => Err(fail(Code::INVALID_VALUE, format!("{node} is no NUMA node of the host"))),
        }
    }

    /// The zone in which chunks of a place have their bytes.
    fn chunk_zone(&mut self, at: Location) -> &mut Zone {
        if is_host(at) { &mut self.zones.host_chunks } else { &mut self.zones.device }
    }

    /// Takes a chunk's memory from its place.
    fn take_chunk(&mut self, at: Location, bytes: u64) -> Step<()> {
        let left = match at {
            Location::Device(device) => {
                if self.physical.take_plain(device as usize, bytes) {
                    return Ok(());
                }
                self.physical.device_free(device as usize)
            }
            Location::Host | Location::HostNuma(_) => {
                let left = self.physical.host_available();
                if bytes <= left {
                    self.physical.take_pinned(bytes);
                    return Ok(());
                }
                left
            }
        };
        Err(fail(Code::OUT_OF_MEMORY, format!("{bytes} bytes at {at:?}: {left} are left")))
    }

    fn give_chunk(&mut self, at: Location, bytes: u64) {
        match at {
            Location::Device(device) => self.physical.give_plain(device as usize, bytes),
            Location::Host | Location::HostNuma(_) => self.physical.host.pinned -= bytes,
        }
    }

    fn spend(&mut self, cost: impl FnOnce(&Costs) -> PerTier, at: Location, bytes: u64) {
        let cost = cost(self.costs());
        let (fixed, per_gib) = if is_host(at) { cost.host } else { cost.device };
        self.clock_ns += fixed + (per_gib as f64 * bytes as f64 / GIB as f64) as u64;
    }

    fn add_chunk(&mut self, at: Location, bytes: u64, bytes_in: BytesIn, shareable: bool) -> Chunk {
        let id = 0x5050_0000_0000 + self.next_id() * 0x40;
        let state = ChunkState { at, bytes, bytes_in, shareable, mappings: 0, held: 1, exported: Vec::new() };
        self.chunks.insert(id, state);
        Chunk(id)
    }

    /// A chunk that was not released.
    fn live_chunk(&mut self, chunk: Chunk) -> Step<&mut ChunkState> {
        self.chunks.get_mut(&chunk.0).filter(|state| state.held > 0).ok_or_else(|| unknown(chunk))
    }

    /// Gives a chunk's memory back if nothing refers to it; one of which file descriptors are open lingers.
    fn drop_unused(&mut self, id: u64) {
        let Some(state) = self.chunks.get_mut(&id) else { return };
        if state.held > 0 || state.mappings > 0 {
            return;
        }
        state.exported.retain(|end| !is_closed(end));
        if !state.exported.is_empty() {
            self.lingering.insert(id);
            return;
        }
        self.lingering.remove(&id);
        // Another process's memory is in that process's books.
        if let Some(ChunkState { at, bytes, bytes_in: BytesIn::Zone(home), .. }) = self.chunks.remove(&id) {
            self.give_chunk(at, bytes);
            self.chunk_zone(at).give(home, bytes);
        }
    }

    /// Looks whether the last file descriptors of chunks that only they keep have been closed.
    pub fn drop_closed(&mut self) {
        for id in self.lingering.iter().copied().collect::<Vec<_>>() {
            self.drop_unused(id);
        }
    }

    fn is_reserved(&self, range: Range) -> bool {
        let reservation = self.reservations.range(..=range.ptr.0).next_back();
        let end = range.ptr.0.checked_add(range.bytes);
        reservation.is_some_and(|(base, reserved)| end.is_some_and(|end| end <= base + reserved.bytes))
    }

    /// The mappings that make up a range, exactly.
    fn mappings(&self, range: Range) -> Step<Vec<(u64, Allocation)>> {
        let Range { ptr: DevicePtr(address), bytes } = range;
        let bad = || fail(Code::INVALID_VALUE, format!("{bytes} bytes at {address:#x} are not whole mappings"));
        let end = address.checked_add(bytes).filter(|_| bytes > 0).ok_or_else(bad)?;
        let (mut at, mut found) = (address, Vec::new());
        while at < end {
            match self.allocations.get(&at) {
                Some(allocation) if matches!(allocation.body, Body::Mapped { .. }) => {
                    found.push((at, *allocation));
                    at += allocation.rounded;
                }
                _ => return Err(bad()),
            }
        }
        if at == end { Ok(found) } else { Err(bad()) }
    }

    /// Whether mappings that someone may use cover `[address, end)` without a gap: for `who`, where it says whose work it is.
    /// The device that a chunk lies on may copy from and to it for others.
    pub fn check_mapped(&self, address: u64, end: u64, who: Option<(DeviceIndex, Use)>) -> Step<()> {
        let mut at = address;
        while at < end || at == address {
            let Some((base, &Allocation { device, rounded, body: Body::Mapped { access, host, .. }, .. })) =
                self.allocation_at(at)
            else {
                return Err(fail(Code::INVALID_VALUE, format!("nothing is mapped at {at:#x}")));
            };
            let may = |device| access & Place::device(device).bit() != 0;
            let allowed = match who {
                None => access != 0,
                Some((by, Use::Kernel)) => may(by),
                Some((by, Use::Copy)) => may(by) || (!host && may(device)),
            };
            if !allowed {
                return Err(fail(Code::INVALID_VALUE, format!("there is no access to what is mapped at {at:#x}")));
            }
            at = base + rounded;
        }
        Ok(())
    }
}

/// What uses memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Use {
    Kernel,
    Copy,
}
