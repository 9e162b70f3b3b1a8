//! What the runtime's and the driver's entry points share: memory, streams and graphs in the engine's words.

use std::ffi::{c_int, c_uint, c_void};

use torch_uvm_sim::{Advice, CaptureMode, CaptureStatus, CopyKind, Location, PointerInfo, PointerKind, Range, Rows};

use crate::context;
use crate::errors::code;
use crate::machine::{Handle, device_ptr, machine, stream};
use crate::outcome::Outcome;

/// `cudaMemLocation` and `CUmemLocation`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct MemLocation {
    pub kind: c_int,
    pub id: c_int,
}

impl MemLocation {
    pub fn parse(self) -> Outcome<Location> {
        Ok(match self.kind {
            1 => Location::Device(self.id),
            2 => Location::Host,
            3 => Location::HostNuma(self.id),
            // The host's node nearest to the calling thread.
            4 => Location::HostNuma(0),
            _ => Err(code::INVALID_VALUE)?,
        })
    }

    pub fn of(location: Option<Location>) -> MemLocation {
        match location {
            None => MemLocation { kind: 0, id: 0 },
            Some(Location::Device(id)) => MemLocation { kind: 1, id },
            Some(Location::Host) => MemLocation { kind: 2, id: 0 },
            Some(Location::HostNuma(id)) => MemLocation { kind: 3, id },
        }
    }

    /// From the number that CUDA 12's older forms take: an ordinal, or -1 for the host.
    pub fn from_ordinal(device: c_int) -> MemLocation {
        if device == -1 { MemLocation { kind: 2, id: 0 } } else { MemLocation { kind: 1, id: device } }
    }

    /// As that number; -2 (`cudaInvalidDeviceId`) where there is none or it has no number.
    pub fn ordinal(self) -> c_int {
        match self.kind {
            1 => self.id,
            2 => -1,
            _ => -2,
        }
    }
}

pub fn range<T>(pointer: *const T, bytes: usize) -> Range {
    Range { ptr: device_ptr(pointer), bytes: bytes as u64 }
}

/// `cudaMemAdvise` and `cuMemAdvise`, which share their numbers.
pub fn advise(pointer: *const c_void, bytes: usize, advice: c_int, to: MemLocation) -> Outcome {
    let advice = match advice {
        1 => Advice::SetReadMostly,
        2 => Advice::UnsetReadMostly,
        3 => Advice::SetPreferredLocation(to.parse()?),
        4 => Advice::UnsetPreferredLocation,
        5 => Advice::SetAccessedBy(to.parse()?),
        6 => Advice::UnsetAccessedBy(to.parse()?),
        _ => Err(code::INVALID_VALUE)?,
    };
    Ok(machine()?.advise(context::use_device(), range(pointer, bytes), advice)?)
}

pub fn prefetch(pointer: *const c_void, bytes: usize, to: MemLocation, flags: c_uint, on: Handle) -> Outcome {
    if flags != 0 {
        Err(code::INVALID_VALUE)?;
    }
    Ok(machine()?.prefetch(context::use_device(), range(pointer, bytes), to.parse()?, stream(on))?)
}

/// `cudaMemRangeGetAttribute` and `cuMemRangeGetAttribute`, which share their numbers.
///
/// # Safety
/// `data` is null or valid for `data_bytes`.
pub unsafe fn range_attribute(
    data: *mut c_void,
    data_bytes: usize,
    attribute: c_int,
    pointer: *const c_void,
    bytes: usize,
) -> Outcome {
    let advice = machine()?.range_advice(range(pointer, bytes))?;
    let preferred = MemLocation::of(advice.preferred);
    let prefetched = MemLocation::of(advice.last_prefetch);
    // Accessed-by fills the whole array, what is left over with -2; everything else is one integer.
    let mut values = match attribute {
        1 => vec![c_int::from(advice.read_mostly)],
        2 => vec![preferred.ordinal()],
        3 => advice.accessed_by.iter().map(|to| MemLocation::of(Some(*to)).ordinal()).collect(),
        4 => vec![prefetched.ordinal()],
        5 => vec![preferred.kind],
        6 => vec![preferred.id],
        7 => vec![prefetched.kind],
        8 => vec![prefetched.id],
        _ => Err(code::INVALID_VALUE)?,
    };
    let room = data_bytes / size_of::<c_int>();
    if data.is_null() || room == 0 || !data_bytes.is_multiple_of(size_of::<c_int>()) || (attribute != 3 && room != 1) {
        Err(code::INVALID_VALUE)?;
    }
    values.resize(room, -2);
    for (at, value) in values.into_iter().enumerate() {
        // SAFETY: `at < room`, and the caller's array has room for that many.
        unsafe { data.cast::<c_int>().add(at).write_unaligned(value) };
    }
    Ok(())
}

/// `cudaMemcpyKind`.
pub fn copy_kind(kind: c_int) -> Outcome<CopyKind> {
    Ok(match kind {
        0 => CopyKind::HostToHost,
        1 => CopyKind::HostToDevice,
        2 => CopyKind::DeviceToHost,
        3 => CopyKind::DeviceToDevice,
        4 => CopyKind::Default,
        _ => Err(code::INVALID_MEMCPY_DIRECTION)?,
    })
}

pub fn copy(to: *mut c_void, from: *const c_void, bytes: usize, kind: CopyKind) -> Outcome {
    if bytes == 0 {
        return Ok(());
    }
    Ok(machine()?.memcpy(context::use_device(), to as u64, from as u64, bytes as u64, kind)?)
}

pub fn copy_async(to: *mut c_void, from: *const c_void, bytes: usize, kind: CopyKind, on: Handle) -> Outcome {
    if bytes == 0 {
        return Ok(());
    }
    Ok(machine()?.memcpy_async(context::use_device(), to as u64, from as u64, bytes as u64, kind, stream(on))?)
}

pub fn copy_rows_async(to: u64, from: u64, rows: Rows, kind: CopyKind, on: Handle) -> Outcome {
    if rows.width == 0 || rows.height == 0 {
        return Ok(());
    }
    if rows.width > rows.dst_pitch || rows.width > rows.src_pitch {
        Err(code::INVALID_PITCH)?;
    }
    Ok(machine()?.memcpy_2d_async(context::use_device(), to, from, rows, kind, stream(on))?)
}

pub fn fill(to: u64, value: u32, width: u8, count: usize) -> Outcome {
    if count == 0 {
        return Ok(());
    }
    Ok(machine()?.memset(context::use_device(), to, value, width, count as u64)?)
}

pub fn fill_async(to: u64, value: u32, width: u8, count: usize, on: Handle) -> Outcome {
    if count == 0 {
        return Ok(());
    }
    Ok(machine()?.memset_async(context::use_device(), to, value, width, count as u64, stream(on))?)
}

/// A rectangle, row by row.
pub fn fill_rows_async(
    to: u64,
    pitch: usize,
    value: u32,
    width: u8,
    columns: usize,
    rows: usize,
    on: Handle,
) -> Outcome {
    if columns * usize::from(width) > pitch && rows > 1 {
        Err(code::INVALID_PITCH)?;
    }
    for row in 0..rows {
        fill_async(to + (row * pitch) as u64, value, width, columns, on)?;
    }
    Ok(())
}

/// Puts a kernel that does nothing on a stream. What memory it would touch is not known.
pub fn launch(on: Handle) -> Outcome {
    let device = context::use_device();
    Ok(machine()?.launch_kernel(device, stream(on), Vec::new())?)
}

/// Waits, for calls that are synchronous by their manual.
pub fn wait(on: Handle) -> Outcome {
    Ok(machine()?.stream_synchronize(context::use_device(), stream(on))?)
}

/// Frees pinned host memory; null is nothing.
pub fn host_free(pointer: *mut c_void) -> Outcome {
    if pointer.is_null() {
        return Ok(());
    }
    Ok(machine()?.host_free(context::use_device(), pointer as u64)?)
}

/// The device's address of pinned host memory: the same, with unified addressing.
pub fn host_device_pointer(pointer: *mut c_void) -> Outcome<*mut c_void> {
    match machine()?.pointer_info(pointer as u64)?.kind {
        PointerKind::Unregistered => Err(code::INVALID_VALUE)?,
        _ => Ok(pointer),
    }
}

/// `cudaMemoryType`, which is also how `CUmemorytype` counts, less array and unified.
pub fn memory_type(info: &PointerInfo) -> c_int {
    match info.kind {
        PointerKind::Unregistered => 0,
        PointerKind::PinnedHost | PointerKind::RegisteredHost => 1,
        PointerKind::Device => 2,
        PointerKind::Managed => 3,
    }
}

/// `cudaStreamCaptureMode`.
pub fn capture_mode(mode: c_int) -> Outcome<CaptureMode> {
    Ok(match mode {
        0 => CaptureMode::Global,
        1 => CaptureMode::ThreadLocal,
        2 => CaptureMode::Relaxed,
        _ => Err(code::INVALID_VALUE)?,
    })
}

pub fn capture_mode_number(mode: CaptureMode) -> c_int {
    match mode {
        CaptureMode::Global => 0,
        CaptureMode::ThreadLocal => 1,
        CaptureMode::Relaxed => 2,
    }
}

/// `cudaStreamCaptureStatus`.
pub fn capture_status_number(status: CaptureStatus) -> c_int {
    match status {
        CaptureStatus::None => 0,
        CaptureStatus::Active => 1,
        CaptureStatus::Invalidated => 2,
    }
}
