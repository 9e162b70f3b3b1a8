//! The machine's interface: device memory of other processes.
//!
//! Device memory lies in a file without a name; a handle says which process's, which of its descriptors, and where. The other
//! process maps the same bytes. Its machine knows nothing else of this one: memory is shared, books and streams are not.
//!
//! There are two kinds of handles: 64 bytes (`cuIpcGetMemHandle`), and for chunks (`cuMemExportToShareableHandle`) a socket from
//! which such 64 bytes can be read, again and again. The exporter has the socket's other end, and so sees whether the last file
//! descriptor of it, in whatever process, has been closed.

use crate::error::{Code, Fail, SimResult, Step, fail};
use crate::fault::EntryPoint;
use crate::machine::Machine;
use crate::memory;
use crate::state::{Allocation, Body, Session};
use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use torch_uvm::driver::{Chunk, DeviceIndex, DevicePtr, IpcHandle, Location};

/// Mark an IPC handle of this simulator, and one of a chunk.
const MAGIC: u64 = 0x4d49_532d_4d56_5554;
const CHUNK_MAGIC: u64 = 0x5948_502d_4d56_5554;

/// In place of a device: host memory.
const HOST: u64 = u64::MAX;

/// What a handle's eight words say.
#[derive(Clone, Copy)]
pub(crate) struct Exported {
    magic: u64,
    process: u32,
    /// Of an allocation; of a chunk, its device, or [`HOST`].
    address: u64,
    id: u64,
    bytes: u64,
    pub rounded: u64,
    descriptor: i32,
    offset: u64,
}

impl Exported {
    pub fn of_chunk(at: Location, id: u64, bytes: u64, descriptor: i32, offset: u64) -> Exported {
        let address = if let Location::Device(device) = at { device as u64 } else { HOST };
        let (magic, process) = (CHUNK_MAGIC, std::process::id());
        Exported { magic, process, address, id, bytes, rounded: bytes, descriptor, offset }
    }

    /// The place and the number of a chunk.
    pub fn chunk(&self) -> Step<(Location, Chunk)> {
        let device = |address: u64| DeviceIndex::try_from(address).map_err(|_| not_ours());
        match self.address {
            _ if self.magic != CHUNK_MAGIC => Err(not_ours()),
            HOST => Ok((Location::HostNuma(0), Chunk(self.id))),
            address => Ok((Location::Device(device(address)?), Chunk(self.id))),
        }
    }

    /// Whether this process has made it.
    pub fn is_own(&self) -> bool {
        self.process == std::process::id()
    }

    /// A file descriptor with the handle in it, and the other end, by which [`is_closed`] tells whether it is still open.
    pub fn into_descriptor(self) -> Step<(OwnedFd, OwnedFd)> {
        let unsupported = |why| fail(Code::NOT_SUPPORTED, format!("the host gives no socket for the handle: {why}"));
        let mut ends = [-1; 2];
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        // SAFETY: a plain system call, with room for two descriptors.
        if unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) } < 0 {
            return Err(unsupported(std::io::Error::last_os_error()));
        }
        // SAFETY: the descriptors are new and ours alone.
        let [theirs, ours] = ends.map(|end| unsafe { OwnedFd::from_raw_fd(end) });
        let handle = self.pack().0;
        // SAFETY: the handle is readable for its length.
        let sent = unsafe {
            libc::send(ours.as_raw_fd(), handle.as_ptr().cast(), handle.len(), libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
        };
        if usize::try_from(sent) != Ok(handle.len()) {
            return Err(unsupported(std::io::Error::last_os_error()));
        }
        Ok((theirs, ours))
    }

    /// The handle in a file descriptor of [`Exported::into_descriptor`], which still has it afterwards.
    pub fn from_descriptor(descriptor: BorrowedFd<'_>) -> Step<Exported> {
        let mut handle = [0u8; 64];
        // SAFETY: the buffer is writable for its length.
        let received = unsafe {
            let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
            libc::recv(descriptor.as_raw_fd(), handle.as_mut_ptr().cast(), handle.len(), flags)
        };
        if usize::try_from(received) != Ok(handle.len()) {
            return Err(not_ours());
        }
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
        let [magic @ (MAGIC | CHUNK_MAGIC), process, address, id, bytes, rounded, descriptor, offset] = words else {
            return None;
        };
        let (process, descriptor) = (process.try_into().ok()?, descriptor.try_into().ok()?);
        Some(Exported { magic, process, address, id, bytes, rounded, descriptor, offset })
    }
}

/// Whether the last descriptor of the other end has been closed, in all processes.
pub(crate) fn is_closed(end: &OwnedFd) -> bool {
    let mut poll = libc::pollfd { fd: end.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one descriptor to look at; it does not wait.
    unsafe { libc::poll(&raw mut poll, 1, 0) };
    poll.revents & libc::POLLHUP != 0
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
