//! The machine's interface: virtual memory management, that is addresses and physical memory taken apart and put together
//! by the program. PyTorch's expandable segments are made of it.

use crate::error::{Code, SimResult, Step, fail};
use crate::fault::EntryPoint;
use crate::ipc::Exported;
use crate::machine::Machine;
use crate::managed::PAGE;
use crate::memory;
use crate::state::{Allocation, Body, State};
use crate::types::PhysicalId;
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use torch_uvm::driver::DeviceIndex;

/// Physical memory of `cuMemCreate`, this process's or another's.
pub(crate) struct PhysicalHandle {
    pub device: DeviceIndex,
    pub bytes: u64,
    bytes_in: BytesIn,
    /// Whether it was made to be exported.
    shareable: bool,
    /// How many mappings it has.
    mappings: u64,
    /// How many times `cuMemRelease` is to be called: once, and once more for each time it was imported or retained here.
    held: u64,
}

/// Where the bytes are.
enum BytesIn {
    /// At this address of the device zone, whose own mapping stays without access: a range of the zone's file.
    Zone(u64),
    /// In another process's file, from this offset on.
    File(File, u64),
}

fn check_size(bytes: u64) -> Step<()> {
    if bytes == 0 || !bytes.is_multiple_of(PAGE) {
        return Err(fail(Code::INVALID_VALUE, format!("{bytes} bytes are not a multiple of 2 MiB")));
    }
    Ok(())
}

impl Machine {
    /// The unit of [`Machine::physical_create`] and [`Machine::map`] (`cuMemGetAllocationGranularity`).
    pub const GRANULARITY: u64 = PAGE;

    /// `cuMemAddressReserve`. Addresses are aligned to 2 MiB; more is not to be had.
    pub fn address_reserve(&self, bytes: u64, align: u64) -> SimResult<u64> {
        self.inner.call(EntryPoint::AddressReserve, |s| {
            check_size(bytes)?;
            if align > PAGE {
                return Err(fail(Code::NOT_SUPPORTED, format!("an alignment of {align} bytes: 2 MiB at most")));
            }
            let bytes = s.zones.managed.rounded(bytes)?;
            let address = s.zones.managed.reserve(bytes)?;
            s.reservations.insert(address, bytes);
            Ok(address)
        })
    }

    /// `cuMemAddressFree`: the whole reservation, with nothing mapped in it.
    pub fn address_free(&self, address: u64, bytes: u64) -> SimResult<()> {
        self.inner.call(EntryPoint::AddressFree, |s| {
            if s.reservations.get(&address) != Some(&bytes) {
                return Err(fail(Code::INVALID_VALUE, format!("{bytes} bytes at {address:#x} are no reservation")));
            }
            if s.allocations.range(address..address + bytes).next().is_some() {
                return Err(fail(Code::INVALID_VALUE, "memory is still mapped in the reservation"));
            }
            s.reservations.remove(&address);
            s.zones.managed.give(address, bytes);
            Ok(())
        })
    }

    /// `cuMemCreate`, of device memory. Only what is made `shareable` can be exported.
    pub fn physical_create(&self, device: DeviceIndex, bytes: u64, shareable: bool) -> SimResult<PhysicalId> {
        self.inner.call(EntryPoint::PhysicalCreate, |s| {
            s.check_device(device)?;
            check_size(bytes)?;
            let bytes = s.zones.device.rounded(bytes)?;
            if !s.physical.take_plain(device as usize, bytes) {
                let free = s.physical.device_free(device as usize);
                return Err(fail(Code::OUT_OF_MEMORY, format!("{bytes} bytes on device {device}: {free} are free")));
            }
            let home = match s.zones.device.reserve(bytes) {
                Ok(home) if s.zones.device.file_of(home).is_some() => home,
                Ok(home) => {
                    s.zones.device.give(home, bytes);
                    s.physical.give_plain(device as usize, bytes);
                    return Err(fail(Code::NOT_SUPPORTED, "the host has no anonymous files (memfd_create)"));
                }
                Err(error) => {
                    s.physical.give_plain(device as usize, bytes);
                    return Err(error);
                }
            };
            Ok(s.add_physical(device, bytes, BytesIn::Zone(home), shareable))
        })
    }

    /// `cuMemRelease`: the memory is gone when its last mapping is, too.
    pub fn physical_release(&self, id: PhysicalId) -> SimResult<()> {
        self.inner.call(EntryPoint::PhysicalRelease, |s| {
            s.live_physical(id)?.held -= 1;
            s.drop_unused(id.0);
            Ok(())
        })
    }

    /// `cuMemRetainAllocationHandle`: the memory that is mapped at an address; to be released once more.
    pub fn physical_retain(&self, address: u64) -> SimResult<PhysicalId> {
        self.inner.call(EntryPoint::PhysicalRetain, |s| {
            let Some((_, Allocation { body: Body::Mapped { physical, .. }, .. })) = s.allocation_at(address) else {
                return Err(fail(Code::INVALID_VALUE, format!("nothing is mapped at {address:#x}")));
            };
            let physical = *physical;
            s.physical_handles.get_mut(&physical).ok_or(Code::UNKNOWN)?.held += 1;
            Ok(PhysicalId(physical))
        })
    }

    /// `cuMemGetAllocationPropertiesFromHandle`: the device, and whether it can be exported.
    pub fn physical_info(&self, id: PhysicalId) -> SimResult<(DeviceIndex, bool)> {
        self.inner.call(EntryPoint::PhysicalInfo, |s| {
            let handle = s.live_physical(id)?;
            Ok((handle.device, handle.shareable))
        })
    }

    /// `cuMemExportToShareableHandle`, as a file descriptor. What it is a descriptor of only says where the memory is: a process
    /// must import it while this one lives.
    pub fn physical_export(&self, id: PhysicalId) -> SimResult<OwnedFd> {
        self.inner.call(EntryPoint::PhysicalExport, |s| {
            let handle = s.live_physical(id)?;
            let (device, bytes) = (handle.device, handle.bytes);
            let BytesIn::Zone(home) = handle.bytes_in else {
                return Err(fail(Code::INVALID_VALUE, "the memory is another process's"));
            };
            if !handle.shareable {
                return Err(fail(Code::INVALID_VALUE, "the memory was not made to be exported"));
            }
            let (file, offset) = s.zones.device.file_of(home).ok_or(Code::UNKNOWN)?;
            Exported::of_physical(device, id.0, bytes, file, offset).into_file()
        })
    }

    /// `cuMemImportFromShareableHandle`, from a file descriptor, which stays the caller's. Memory of this very process is the same
    /// memory again, to be released once more.
    pub fn physical_import(&self, descriptor: BorrowedFd<'_>) -> SimResult<PhysicalId> {
        self.inner.call(EntryPoint::PhysicalImport, |s| {
            let exported = Exported::from_file(descriptor)?;
            let (device, id) = exported.physical()?;
            if exported.is_own() {
                s.live_physical(id)?.held += 1;
                return Ok(id);
            }
            s.check_device(device)?;
            let (file, offset) = exported.open()?;
            Ok(s.add_physical(device, exported.rounded, BytesIn::File(file, offset), false))
        })
    }

    /// `cuMemMap`: all of a handle's memory at a reserved address. Usable after [`Machine::set_access`].
    pub fn map(&self, address: u64, bytes: u64, id: PhysicalId) -> SimResult<()> {
        self.inner.call(EntryPoint::Map, |s| {
            let handle = s.live_physical(id)?;
            let (device, whole) = (handle.device, handle.bytes);
            if bytes != whole {
                return Err(fail(Code::INVALID_VALUE, format!("{bytes} bytes of a handle of {whole}: all are mapped")));
            }
            if !address.is_multiple_of(PAGE) || !s.is_reserved(address, bytes) {
                return Err(fail(Code::INVALID_VALUE, format!("{bytes} bytes at {address:#x} are not reserved")));
            }
            if s.allocations.range(..address + bytes).next_back().is_some_and(|(base, a)| base + a.rounded > address) {
                return Err(fail(Code::INVALID_VALUE, format!("something is mapped at {address:#x} already")));
            }
            let (file, offset) = match s.live_physical(id)?.bytes_in {
                BytesIn::Zone(home) => s.zones.device.file_of(home).ok_or(Code::UNKNOWN)?,
                BytesIn::File(ref file, offset) => (file.as_raw_fd(), offset),
            };
            memory::map_file(address, bytes, file, offset, libc::PROT_NONE)?;
            s.live_physical(id)?.mappings += 1;
            let body = Body::Mapped { physical: id.0, accessible: false };
            let id = s.next_id();
            s.allocations.insert(address, Allocation { device, bytes, rounded: bytes, body, id });
            Ok(())
        })
    }

    /// `cuMemUnmap`: whole mappings. Does not wait for work: what still uses the memory meets an illegal address.
    pub fn unmap(&self, address: u64, bytes: u64) -> SimResult<()> {
        self.inner.call(EntryPoint::Unmap, |s| {
            for (base, allocation) in s.mappings(address, bytes)? {
                s.allocations.remove(&base);
                memory::unmap_file(base, allocation.rounded);
                if let Body::Mapped { physical, .. } = allocation.body {
                    if let Some(handle) = s.physical_handles.get_mut(&physical) {
                        handle.mappings -= 1;
                    }
                    s.drop_unused(physical);
                }
            }
            Ok(())
        })
    }

    /// `cuMemSetAccess`: `read_write` for a device, or nothing. Devices are not told apart.
    pub fn set_access(&self, address: u64, bytes: u64, device: DeviceIndex, read_write: bool) -> SimResult<()> {
        self.inner.call(EntryPoint::SetAccess, |s| {
            s.check_device(device)?;
            let access = if read_write { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_NONE };
            for (base, allocation) in s.mappings(address, bytes)? {
                memory::protect(base, allocation.rounded, access)?;
                if let Some(Body::Mapped { accessible, .. }) = s.allocations.get_mut(&base).map(|a| &mut a.body) {
                    *accessible = read_write;
                }
            }
            Ok(())
        })
    }
}

impl State {
    fn add_physical(&mut self, device: DeviceIndex, bytes: u64, bytes_in: BytesIn, shareable: bool) -> PhysicalId {
        let id = 0x5050_0000_0000 + self.next_id() * 0x40;
        let handle = PhysicalHandle { device, bytes, bytes_in, shareable, mappings: 0, held: 1 };
        self.physical_handles.insert(id, handle);
        PhysicalId(id)
    }

    /// A handle that was not released.
    fn live_physical(&mut self, id: PhysicalId) -> Step<&mut PhysicalHandle> {
        let found = self.physical_handles.get_mut(&id.0).filter(|handle| handle.held > 0);
        found.ok_or_else(|| fail(Code::INVALID_VALUE, format!("{:#x} is not physical memory", id.0)))
    }

    fn drop_unused(&mut self, id: u64) {
        let Some(handle) = self.physical_handles.get(&id) else { return };
        if handle.held > 0 || handle.mappings > 0 {
            return;
        }
        // Another process's memory is in that process's books.
        if let Some(PhysicalHandle { device, bytes, bytes_in: BytesIn::Zone(home), .. }) =
            self.physical_handles.remove(&id)
        {
            self.physical.give_plain(device as usize, bytes);
            self.zones.device.give(home, bytes);
        }
    }

    fn is_reserved(&self, address: u64, bytes: u64) -> bool {
        let reservation = self.reservations.range(..=address).next_back();
        let end = address.checked_add(bytes);
        reservation.is_some_and(|(base, reserved)| end.is_some_and(|end| end <= base + reserved))
    }

    /// The mappings that make up a range, exactly.
    fn mappings(&self, address: u64, bytes: u64) -> Step<Vec<(u64, Allocation)>> {
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

    /// Whether mappings with access cover `[address, end)` without a gap.
    pub fn check_mapped(&self, address: u64, end: u64) -> Step<()> {
        let mut at = address;
        while at < end || at == address {
            match self.allocation_at(at) {
                Some((base, Allocation { rounded, body: Body::Mapped { accessible: true, .. }, .. })) => {
                    at = base + rounded
                }
                _ => return Err(fail(Code::INVALID_VALUE, format!("nothing is mapped with access at {at:#x}"))),
            }
        }
        Ok(())
    }
}
