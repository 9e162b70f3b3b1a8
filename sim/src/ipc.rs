//! The machine's interface: device memory of other processes.
//!
//! Device memory lies in a file without a name; a handle says which process's, which of its descriptors, and where. The other
//! process maps the same bytes. Its machine knows nothing else of this one: memory is shared, books and streams are not.
//!
//! There are two kinds of handles: 64 bytes (`cuIpcGetMemHandle`), and a file that holds such 64 bytes, for memory without an
//! address (`cuMemExportToShareableHandle`).

use crate::error::{Code, Fail, SimResult, Step, fail};
use crate::fault::EntryPoint;
use crate::machine::Machine;
use crate::memory;
use crate::state::{Allocation, Body, Session};
use crate::types::PhysicalId;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use torch_uvm::driver::{DeviceIndex, DevicePtr, IpcHandle};

/// Mark an IPC handle of this simulator, and one of memory without an address.
const MAGIC: u64 = 0x4d49_532d_4d56_5554;
const PHYSICAL_MAGIC: u64 = 0x5948_502d_4d56_5554;

/// What a handle's eight words say.
#[derive(Clone, Copy)]
pub(crate) struct Exported {
    magic: u64,
    process: u32,
    /// Of an allocation; of memory without an address, the device.
    address: u64,
    id: u64,
    bytes: u64,
    pub rounded: u64,
    descriptor: i32,
    offset: u64,
}

impl Exported {
    pub fn of_physical(device: DeviceIndex, id: u64, bytes: u64, descriptor: i32, offset: u64) -> Exported {
        let (magic, process, address) = (PHYSICAL_MAGIC, std::process::id(), device as u64);
        Exported { magic, process, address, id, bytes, rounded: bytes, descriptor, offset }
    }

    /// The device and the number of memory without an address.
    pub fn physical(&self) -> Step<(DeviceIndex, PhysicalId)> {
        let device = DeviceIndex::try_from(self.address).ok().filter(|_| self.magic == PHYSICAL_MAGIC);
        Ok((device.ok_or_else(not_ours)?, PhysicalId(self.id)))
    }

    /// Whether this process has made it.
    pub fn is_own(&self) -> bool {
        self.process == std::process::id()
    }

    /// A file with the handle in it.
    pub fn into_file(self) -> Step<OwnedFd> {
        // SAFETY: a plain system call with a C string.
        let descriptor = unsafe { libc::memfd_create(c"torch-uvm-sim-handle".as_ptr(), libc::MFD_CLOEXEC) };
        let unsupported = |why| fail(Code::NOT_SUPPORTED, format!("the host gives no file for the handle: {why}"));
        if descriptor < 0 {
            return Err(unsupported(std::io::Error::last_os_error()));
        }
        // SAFETY: the descriptor is new and ours alone.
        let mut file = unsafe { File::from_raw_fd(descriptor) };
        file.write_all(&self.pack().0).map_err(unsupported)?;
        Ok(file.into())
    }

    /// The handle in a file of [`Exported::into_file`].
    pub fn from_file(descriptor: BorrowedFd<'_>) -> Step<Exported> {
        // SAFETY: the descriptor is borrowed, so it is open; it is not closed here.
        let file = ManuallyDrop::new(unsafe { File::from_raw_fd(descriptor.as_raw_fd()) });
        let mut handle = [0; 64];
        file.read_exact_at(&mut handle, 0).map_err(|_| not_ours())?;
        Exported::unpack(&IpcHandle(handle)).ok_or_else(not_ours)
    }

    /// The other process's file, and where in it the memory is.
    pub fn open(&self) -> Step<(File, u64)> {
        let path = format!("/proc/{}/fd/{}", self.process, self.descriptor);
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(|error| {
            let why = format!("the IPC handle's process gives no access to its memory ({path}: {error})");
            fail(Code::INVALID_VALUE, why)
        })?;
        Ok((file, self.offset))
    }

    fn pack(self) -> IpcHandle {
        let words = [
            self.magic,
            u64::from(self.process),
            self.address,
            self.id,
            self.bytes,
            self.rounded,
            self.descriptor as u64,
            self.offset,
        ];
        let mut handle = [0; 64];
        for (slot, word) in handle.chunks_exact_mut(8).zip(words) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        IpcHandle(handle)
    }

    fn unpack(handle: &IpcHandle) -> Option<Exported> {
        let mut words = [0; 8];
        for (word, slot) in words.iter_mut().zip(handle.0.chunks_exact(8)) {
            *word = u64::from_le_bytes(slot.try_into().ok()?);
        }
        let [magic @ (MAGIC | PHYSICAL_MAGIC), process, address, id, bytes, rounded, descriptor, offset] = words else {
            return None;
        };
        let (process, descriptor) = (process.try_into().ok()?, descriptor.try_into().ok()?);
        Some(Exported { magic, process, address, id, bytes, rounded, descriptor, offset })
    }
}

fn not_ours() -> Fail {
    fail(Code::INVALID_VALUE, "these bytes are not an IPC handle of the simulated device")
}

impl Machine {
    /// `cuIpcGetMemHandle`: of device allocations only; any address inside one will do.
    pub fn ipc_handle(&self, device: DeviceIndex, ptr: DevicePtr) -> SimResult<IpcHandle> {
        self.inner.call(EntryPoint::IpcHandle, |s| {
            s.check_device(device)?;
            let Some((address, &Allocation { body, id, bytes, rounded, .. })) = s.allocation_at(ptr.0) else {
                return Err(fail(Code::INVALID_VALUE, format!("{ptr:?} is not device memory")));
            };
            match body {
                Body::Device => {}
                Body::Managed => return Err(fail(Code::INVALID_VALUE, "CUDA gives no IPC handle for managed memory")),
                Body::Mapped { .. } | Body::Imported { .. } => {
                    return Err(fail(Code::INVALID_VALUE, "only memory of cuMemAlloc has an IPC handle"));
                }
            }
            let file = s.zones.holding(address).and_then(|zone| zone.file_of(address));
            let (descriptor, offset) = file.unwrap_or((-1, 0));
            let process = std::process::id();
            Ok(Exported { magic: MAGIC, process, address, id, bytes, rounded, descriptor, offset }.pack())
        })
    }

    /// `cuIpcOpenMemHandle`. Opened twice, a handle gives the same address, and must be closed twice. (A handle of this very
    /// process, which CUDA refuses, gives the allocation's own address.)
    pub fn ipc_open(&self, device: DeviceIndex, handle: &IpcHandle) -> SimResult<DevicePtr> {
        self.inner.call(EntryPoint::IpcOpen, |s| {
            s.check_device(device)?;
            let exported = Exported::unpack(handle).filter(|exported| exported.magic == MAGIC).ok_or_else(not_ours)?;
            if exported.is_own() {
                let live = s.allocations.get(&exported.address).is_some_and(|allocation| allocation.id == exported.id);
                if !live {
                    return Err(fail(Code::INVALID_VALUE, "the IPC handle's memory has been freed"));
                }
                *s.ipc_opened.entry(exported.address).or_insert(0) += 1;
                return Ok(DevicePtr(exported.address));
            }
            s.import(device, &exported).map(DevicePtr)
        })
    }

    /// `cuIpcCloseMemHandle`. The last one waits for all work and takes the memory away.
    pub fn ipc_close(&self, device: DeviceIndex, ptr: DevicePtr) -> SimResult<()> {
        self.inner.call(EntryPoint::IpcClose, |s| {
            s.check_device(device)?;
            if let Some(Body::Imported { opened, .. }) = s.allocations.get_mut(&ptr.0).map(|a| &mut a.body) {
                *opened -= 1;
                if *opened == 0 {
                    s.wait_for_all(None);
                    if let Some(allocation) = s.allocations.remove(&ptr.0) {
                        let reserved = s.zones.managed.rounded(allocation.rounded)?;
                        memory::unmap_file(ptr.0, reserved);
                        s.zones.managed.give(ptr.0, reserved);
                    }
                }
                return Ok(());
            }
            match s.ipc_opened.get_mut(&ptr.0) {
                Some(count) if *count > 1 => *count -= 1,
                Some(_) => drop(s.ipc_opened.remove(&ptr.0)),
                None => return Err(fail(Code::INVALID_VALUE, format!("{ptr:?} was not opened by an IPC handle"))),
            }
            Ok(())
        })
    }
}

impl Session<'_> {
    /// Maps another process's memory.
    fn import(&mut self, device: DeviceIndex, exported: &Exported) -> Step<u64> {
        let owner = (exported.process, exported.id);
        for (&address, allocation) in &mut self.allocations {
            if let Body::Imported { owner: other, opened } = &mut allocation.body
                && *other == owner
            {
                *opened += 1;
                return Ok(address);
            }
        }
        let (file, offset) = exported.open()?;
        let reserved = self.zones.managed.rounded(exported.rounded)?;
        let address = self.zones.managed.reserve(reserved)?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        if let Err(error) = memory::map_file(address, exported.rounded, file.as_raw_fd(), offset, access) {
            self.zones.managed.give(address, reserved);
            return Err(error);
        }
        let body = Body::Imported { owner, opened: 1 };
        let id = self.next_id();
        let Exported { bytes, rounded, .. } = *exported;
        self.allocations.insert(address, Allocation { device, bytes, rounded, body, id });
        Ok(address)
    }
}
