//! Physical chunks and the addresses they are mapped at, by CUDA's virtual memory management. The calls need no current context.

use std::ffi::{c_uint, c_void};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use cudarc::driver::sys::{
    CUmemAccess_flags, CUmemAccessDesc, CUmemAllocationGranularity_flags, CUmemAllocationHandleType,
    CUmemAllocationProp, CUmemAllocationProp_st__bindgen_ty_1, CUmemAllocationType, CUmemLocation, CUmemLocationType,
    CUresult,
};

use super::{CudaDriver, call};
use crate::driver::{Chunk, DevicePtr, DriverError, ErrorKind, Location, Range, Result};

/// How chunks go to other processes.
const FILE_DESCRIPTOR: CUmemAllocationHandleType = CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

impl CudaDriver {
    pub(super) fn granularity_of(&self, at: Location) -> Result<u64> {
        let properties = self.properties(at, false, "cuMemGetAllocationGranularity")?;
        let option = CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM as c_uint;
        let mut granularity = 0;
        // SAFETY: `granularity` is writable, the properties are readable.
        unsafe { call!(self.api, cuMemGetAllocationGranularity(&raw mut granularity, &raw const properties, option)) }?;
        Ok(granularity as u64)
    }

    pub(super) fn reserve(&self, bytes: u64, alignment: u64) -> Result<DevicePtr> {
        self.devices()?;
        let mut ptr = 0;
        // "If \p addr is 0, then the driver chooses the address"; "flags: Currently unused, must be zero".
        // SAFETY: `ptr` is writable.
        unsafe { call!(self.api, cuMemAddressReserve(&raw mut ptr, bytes as usize, alignment as usize, 0, 0)) }?;
        Ok(DevicePtr(ptr))
    }

    pub(super) fn free_reservation(&self, range: Range) -> Result<()> {
        // SAFETY: no pointers to host memory; CUDA checks that the range is a reservation.
        unsafe { call!(self.api, cuMemAddressFree(range.ptr.0, range.bytes as usize)) }
    }

    pub(super) fn create(&self, at: Location, bytes: u64, shareable: bool) -> Result<Chunk> {
        let properties = self.properties(at, shareable, "cuMemCreate")?;
        let mut handle = 0;
        // "flags: flags for future use, must be zero now."
        // SAFETY: `handle` is writable, the properties are readable.
        unsafe { call!(self.api, cuMemCreate(&raw mut handle, bytes as usize, &raw const properties, 0)) }?;
        Ok(Chunk(handle))
    }

    pub(super) fn release(&self, chunk: Chunk) -> Result<()> {
        // SAFETY: a chunk that the caller holds (trait Driver).
        unsafe { call!(self.api, cuMemRelease(chunk.0)) }
    }

    pub(super) fn map(&self, range: Range, chunk: Chunk) -> Result<()> {
        // "offset: […] Note: currently must be zero." "flags: flags for future use, must be zero now."
        // SAFETY: a chunk that the caller holds (trait Driver); CUDA checks that the range is reserved and free.
        unsafe { call!(self.api, cuMemMap(range.ptr.0, range.bytes as usize, 0, chunk.0, 0)) }
    }

    pub(super) fn unmap(&self, range: Range) -> Result<()> {
        // SAFETY: no pointers to host memory; CUDA checks that the range is whole mappings. Who still uses the memory is the
        // caller's affair (trait Driver).
        unsafe { call!(self.api, cuMemUnmap(range.ptr.0, range.bytes as usize)) }
    }

    pub(super) fn give_access(&self, range: Range, by: &[Location]) -> Result<()> {
        const CALL: &str = "cuMemSetAccess";
        let describe = |&location: &Location| -> Result<CUmemAccessDesc> {
            let location = match location {
                Location::Device(_) => self.chunk_location(location, CALL)?,
                // "When ::CUmemAccessDesc::CUmemLocation::type is ::CU_MEM_LOCATION_TYPE_HOST_NUMA, […] id is ignored."
                Location::Host | Location::HostNuma(_) => numa_node(0),
            };
            Ok(CUmemAccessDesc { location, flags: CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE })
        };
        let descriptions = by.iter().map(describe).collect::<Result<Vec<_>>>()?;
        // SAFETY: as many readable descriptions as it says; CUDA checks that the range is mapped.
        unsafe {
            call!(
                self.api,
                cuMemSetAccess(range.ptr.0, range.bytes as usize, descriptions.as_ptr(), descriptions.len())
            )
        }
    }

    pub(super) fn export(&self, chunk: Chunk) -> Result<OwnedFd> {
        let mut descriptor = -1;
        let to = (&raw mut descriptor).cast::<c_void>();
        // "shareableHandle: Pointer to the location in which to store the requested handle type", here an int; "flags: Reserved,
        // must be zero".
        // SAFETY: a chunk that the caller holds (trait Driver); the location is writable.
        unsafe { call!(self.api, cuMemExportToShareableHandle(to, chunk.0, FILE_DESCRIPTOR.0, 0)) }?;
        // SAFETY: a new file descriptor, which is the caller's.
        Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
    }

    pub(super) fn import(&self, descriptor: BorrowedFd<'_>) -> Result<Chunk> {
        self.devices()?;
        // The file descriptor itself is the pointer, and CUDA takes 0 for no pointer (CUDA_ERROR_INVALID_VALUE on an H200,
        // driver 580.159). A clone is never 0: the standard library makes it 3 or more.
        let clone;
        let descriptor = if descriptor.as_raw_fd() == 0 {
            clone = descriptor.try_clone_to_owned().map_err(|error| DriverError {
                kind: ErrorKind::Other,
                call: "cuMemImportFromShareableHandle",
                code: -1,
                name: "fcntl".to_owned(),
                message: format!("file descriptor 0 could not be duplicated: {error}"),
            })?;
            clone.as_fd()
        } else {
            descriptor
        };
        let from = descriptor.as_raw_fd() as usize as *mut c_void;
        let mut handle = 0;
        // SAFETY: `handle` is writable; the descriptor is open, and CUDA checks what it is of.
        unsafe { call!(self.api, cuMemImportFromShareableHandle(&raw mut handle, from, FILE_DESCRIPTOR.0)) }?;
        Ok(Chunk(handle))
    }

    /// What a chunk is asked for with.
    fn properties(&self, at: Location, shareable: bool, call: &'static str) -> Result<CUmemAllocationProp> {
        let none = CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE;
        // "Device supports specifying the GPUDirect RDMA flag with ::cuMemCreate": without the flag, network cards cannot reach
        // the memory. PyTorch's expandable segments set it too.
        let rdma = match at {
            Location::Device(ordinal) => self.device(ordinal, call)?.rdma_chunks,
            Location::Host | Location::HostNuma(_) => false,
        };
        Ok(CUmemAllocationProp {
            type_: CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
            requestedHandleTypes: if shareable { FILE_DESCRIPTOR } else { none },
            location: self.chunk_location(at, call)?,
            win32HandleMetaData: std::ptr::null_mut(),
            allocFlags: CUmemAllocationProp_st__bindgen_ty_1 {
                compressionType: 0,
                gpuDirectRDMACapable: u8::from(rdma),
                usage: 0,
                reserved: [0; 4],
            },
        })
    }

    /// A location of chunks. The primary context of a device is made, as for every use of it.
    fn chunk_location(&self, location: Location, call: &'static str) -> Result<CUmemLocation> {
        match location {
            Location::Device(ordinal) => {
                self.context(self.device(ordinal, call)?)?;
                Ok(CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: ordinal })
            }
            Location::HostNuma(node) if self.devices()?.has_host_chunks => Ok(numa_node(node)),
            Location::HostNuma(_) => Err(DriverError {
                kind: ErrorKind::NotSupported,
                call,
                code: CUresult::CUDA_ERROR_NOT_SUPPORTED as i32,
                name: "CUDA_ERROR_NOT_SUPPORTED".to_owned(),
                message: "chunks of host memory need a driver of CUDA 12.2 or newer, and a device that supports them"
                    .to_owned(),
            }),
            Location::Host => Err(DriverError {
                kind: ErrorKind::InvalidValue,
                call,
                code: CUresult::CUDA_ERROR_INVALID_VALUE as i32,
                name: "CUDA_ERROR_INVALID_VALUE".to_owned(),
                message: "chunks of host memory lie on a NUMA node".to_owned(),
            }),
        }
    }
}

fn numa_node(node: i32) -> CUmemLocation {
    CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_HOST_NUMA, id: node }
}
