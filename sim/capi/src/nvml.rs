//! NVML, NVIDIA's management library: what PyTorch asks it, and what `nvidia-ml-py` does.
//!
//! NVML shows every device of the machine, whatever `CUDA_VISIBLE_DEVICES` says, and asking it initialises no CUDA:
//! PyTorch counts devices by it in processes that fork later.

use std::ffi::{CStr, c_char, c_int, c_uint};
use std::mem::size_of;

use torch_uvm_sim::{Config, DeviceMemory};

use crate::entry::{put, put_optional};
use crate::log;
use crate::machine::{self, DRIVER_VERSION};

/// `nvmlReturn_t`.
type Status = c_int;

const SUCCESS: Status = 0;
const INVALID_ARGUMENT: Status = 2;
const NOT_SUPPORTED: Status = 3;
const NOT_FOUND: Status = 6;
const INSUFFICIENT_SIZE: Status = 7;
const DRIVER_NOT_LOADED: Status = 9;
const UNKNOWN: Status = 999;

/// The first release of the driver that brought CUDA 13.0, which [`DRIVER_VERSION`] says.
const DRIVER_RELEASE: &str = "580.65.06";
/// NVML's own version: the driver's, after CUDA's major version.
const NVML_RELEASE: &str = "13.580.65.06";

/// An `nvmlDevice_t` is the device's place in the machine, and one, so that it is not null.
type Device = usize;

/// `nvmlPciInfo_t`, since NVML's third form of it.
#[repr(C)]
pub struct PciInfo {
    bus_id_legacy: [c_char; 16],
    domain: c_uint,
    bus: c_uint,
    device: c_uint,
    device_id: c_uint,
    subsystem_id: c_uint,
    bus_id: [c_char; 32],
}

/// `nvmlMemory_t`.
#[repr(C)]
pub struct Memory {
    total: u64,
    free: u64,
    used: u64,
}

/// `nvmlMemory_v2_t`.
#[repr(C)]
pub struct MemoryV2 {
    version: c_uint,
    total: u64,
    reserved: u64,
    free: u64,
    used: u64,
}

/// `nvmlUtilization_t`.
#[repr(C)]
pub struct Utilization {
    gpu: c_uint,
    memory: c_uint,
}

/// `nvmlProcessInfo_v1_t`.
#[repr(C)]
pub struct ProcessInfoV1 {
    pid: c_uint,
    used_bytes: u64,
}

/// `nvmlProcessInfo_t`, since its second form.
#[repr(C)]
pub struct ProcessInfo {
    pid: c_uint,
    used_bytes: u64,
    gpu_instance: c_uint,
    compute_instance: c_uint,
}

/// The machine, as the environment describes it: it need not have been started.
fn config() -> Result<Config, Status> {
    Config::from_env().map_err(|error| {
        log::once(&format!("NVML: {error}"));
        DRIVER_NOT_LOADED
    })
}

/// The place of a device.
fn place(device: Device) -> Result<i32, Status> {
    let place = device.checked_sub(1).and_then(|place| i32::try_from(place).ok());
    let devices = config()?.devices;
    place.filter(|place| *place < devices).ok_or(INVALID_ARGUMENT)
}

/// The device at the first place of which `matches` is true.
fn find(matches: impl Fn(i32) -> bool) -> Result<Device, Status> {
    (0..config()?.devices).find(|place| matches(*place)).map(|place| place as Device + 1).ok_or(NOT_FOUND)
}

/// A device's memory; where the CPU's is the same memory, NVML tells nothing.
fn memory(device: Device) -> Result<DeviceMemory, Status> {
    let (place, config) = (place(device)?, config()?);
    if config.profile.integrated {
        return Err(NOT_SUPPORTED);
    }
    let total = config.profile.device_memory;
    Ok(machine::memory_at(place).unwrap_or(DeviceMemory { free: total, total }))
}

/// This process's bytes on a device, if it uses it. Other processes' machines are not known here.
fn own_use(device: Device) -> Result<Option<u64>, Status> {
    Ok(machine::memory_at(place(device)?).map(|memory| memory.total - memory.free))
}

/// Fills a list of processes by NVML's rule: `count` says how many there is room for, and is told how many there are.
///
/// # Safety
/// `count` is null or valid; `list` is null or has `*count` elements.
unsafe fn put_process<T>(device: Device, count: *mut c_uint, list: *mut T, make: fn(u64) -> T) -> Result<(), Status> {
    if count.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    let found = own_use(device)?;
    // SAFETY: not null, and valid by this function's contract.
    let room = unsafe { count.replace(c_uint::from(found.is_some())) };
    let Some(bytes) = found else { return Ok(()) };
    if room == 0 || list.is_null() {
        return Err(INSUFFICIENT_SIZE);
    }
    // SAFETY: there is room for one.
    unsafe { list.write(make(bytes)) };
    Ok(())
}

/// Copies a text with its final zero.
///
/// # Safety
/// `to` is null or valid for `bytes`.
unsafe fn put_text(to: *mut c_char, bytes: c_uint, text: &str) -> Result<(), Status> {
    if to.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    if bytes as usize <= text.len() {
        return Err(INSUFFICIENT_SIZE);
    }
    for (at, byte) in text.bytes().chain([0]).enumerate() {
        // SAFETY: the text and its final zero fit into `bytes`.
        unsafe { to.add(at).write(byte as c_char) };
    }
    Ok(())
}

/// # Safety
/// `text` is null or a C string.
unsafe fn read_text(text: *const c_char) -> Result<String, Status> {
    if text.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    // SAFETY: a C string by this function's contract.
    Ok(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// Stores an answer.
///
/// # Safety
/// `to` is null or valid for writing a `T`.
unsafe fn answer<T>(to: *mut T, value: T) -> Result<(), Status> {
    // SAFETY: this function's contract.
    unsafe { put(to, value) }.map_err(|_| INVALID_ARGUMENT)
}

/// Bus, device and function of a PCI bus id of either length (`0000:01:00.0`, `00000000:01:00.0`), without the domain.
fn bus_address(bus_id: &str) -> String {
    bus_id.split_once(':').map_or(bus_id, |(_, address)| address).to_ascii_uppercase()
}

/// A fixed array of a text and zeros.
fn padded<const N: usize>(text: &str) -> [c_char; N] {
    let mut array = [0; N];
    for (to, byte) in array.iter_mut().take(N - 1).zip(text.bytes()) {
        *to = byte as c_char;
    }
    array
}

fn run(name: &str, body: impl FnOnce() -> Result<(), Status>) -> Status {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)) {
        Ok(Ok(())) => SUCCESS,
        Ok(Err(status)) => status,
        Err(_) => {
            log::line(&format!("{name} panicked: a defect of the simulator"));
            UNKNOWN
        }
    }
}

macro_rules! nvml {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// The arguments are as the NVML manual asks.
        #[unsafe(no_mangle)]
        #[allow(unused_unsafe)] // not every body does something unsafe
        pub unsafe extern "C" fn $name($($arg: $type),*) -> Status {
            // SAFETY: the caller keeps the manual's contract.
            run(stringify!($name), || unsafe { $body })
        }
    )*};
}

nvml! {
    /// `nvmlInit`.
    fn nvmlInit() { config().map(drop) }

    /// `nvmlInit_v2`.
    fn nvmlInit_v2() { config().map(drop) }

    /// `nvmlInitWithFlags`.
    fn nvmlInitWithFlags(_flags: c_uint) { config().map(drop) }

    /// `nvmlShutdown`.
    fn nvmlShutdown() { Ok(()) }

    /// `nvmlSystemGetDriverVersion`.
    fn nvmlSystemGetDriverVersion(to: *mut c_char, bytes: c_uint) { put_text(to, bytes, DRIVER_RELEASE) }

    /// `nvmlSystemGetNVMLVersion`.
    fn nvmlSystemGetNVMLVersion(to: *mut c_char, bytes: c_uint) { put_text(to, bytes, NVML_RELEASE) }

    /// `nvmlSystemGetCudaDriverVersion`.
    fn nvmlSystemGetCudaDriverVersion(version: *mut c_int) { answer(version, DRIVER_VERSION) }

    /// `nvmlSystemGetCudaDriverVersion_v2`.
    fn nvmlSystemGetCudaDriverVersion_v2(version: *mut c_int) { answer(version, DRIVER_VERSION) }

    /// `nvmlDeviceGetCount`.
    fn nvmlDeviceGetCount(count: *mut c_uint) { answer(count, config()?.devices as c_uint) }

    /// `nvmlDeviceGetCount_v2`.
    fn nvmlDeviceGetCount_v2(count: *mut c_uint) { answer(count, config()?.devices as c_uint) }

    /// `nvmlDeviceGetHandleByIndex`.
    fn nvmlDeviceGetHandleByIndex(index: c_uint, device: *mut Device) { by_index(index, device) }

    /// `nvmlDeviceGetHandleByIndex_v2`.
    fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, device: *mut Device) { by_index(index, device) }

    /// `nvmlDeviceGetHandleByPciBusId`.
    fn nvmlDeviceGetHandleByPciBusId(bus_id: *const c_char, device: *mut Device) { by_bus_id(bus_id, device) }

    /// `nvmlDeviceGetHandleByPciBusId_v2`.
    fn nvmlDeviceGetHandleByPciBusId_v2(bus_id: *const c_char, device: *mut Device) { by_bus_id(bus_id, device) }

    /// `nvmlDeviceGetHandleByUUID`.
    fn nvmlDeviceGetHandleByUUID(uuid: *const c_char, device: *mut Device) {
        let uuid = read_text(uuid)?;
        answer(device, find(|place| uuid == uuid_of(place))?)
    }

    /// `nvmlDeviceGetIndex`.
    fn nvmlDeviceGetIndex(device: Device, index: *mut c_uint) { answer(index, place(device)? as c_uint) }

    /// `nvmlDeviceGetMinorNumber`.
    fn nvmlDeviceGetMinorNumber(device: Device, minor: *mut c_uint) { answer(minor, place(device)? as c_uint) }

    /// `nvmlDeviceGetName`.
    fn nvmlDeviceGetName(device: Device, to: *mut c_char, bytes: c_uint) {
        place(device)?;
        put_text(to, bytes, config()?.profile.device_name)
    }

    /// `nvmlDeviceGetUUID`.
    fn nvmlDeviceGetUUID(device: Device, to: *mut c_char, bytes: c_uint) {
        put_text(to, bytes, &uuid_of(place(device)?))
    }

    /// `nvmlDeviceGetPciInfo_v3`.
    fn nvmlDeviceGetPciInfo_v3(device: Device, info: *mut PciInfo) {
        let place = place(device)?;
        let bus_id = machine::bus_id_at(place);
        answer(info, PciInfo {
            bus_id_legacy: padded(&bus_id),
            domain: 0,
            bus: machine::bus_at(place) as c_uint,
            device: 0,
            device_id: 0,
            subsystem_id: 0,
            bus_id: padded(&format!("0000{bus_id}")),
        })
    }

    /// `nvmlDeviceGetCudaComputeCapability`.
    fn nvmlDeviceGetCudaComputeCapability(device: Device, major: *mut c_int, minor: *mut c_int) {
        place(device)?;
        let capability = config()?.profile.compute_capability;
        put_optional(major, capability.0);
        put_optional(minor, capability.1);
        Ok(())
    }

    /// `nvmlDeviceGetMemoryInfo`.
    fn nvmlDeviceGetMemoryInfo(device: Device, to: *mut Memory) {
        let DeviceMemory { total, free } = memory(device)?;
        answer(to, Memory { total, free, used: total - free })
    }

    /// `nvmlDeviceGetMemoryInfo_v2`.
    fn nvmlDeviceGetMemoryInfo_v2(device: Device, to: *mut MemoryV2) {
        let DeviceMemory { total, free } = memory(device)?;
        let version = (size_of::<MemoryV2>() | 2 << 24) as c_uint;
        if to.as_ref().is_none_or(|to| to.version != version) {
            return Err(INVALID_ARGUMENT);
        }
        answer(to, MemoryV2 { version, total, reserved: 0, free, used: total - free })
    }

    /// `nvmlDeviceGetUtilizationRates`: kernels do nothing.
    fn nvmlDeviceGetUtilizationRates(device: Device, to: *mut Utilization) {
        place(device)?;
        answer(to, Utilization { gpu: 0, memory: 0 })
    }

    /// `nvmlDeviceGetNumaNodeId`: the device's memory is no NUMA node of the host here (`cudaDevAttrNumaConfig`).
    fn nvmlDeviceGetNumaNodeId(device: Device, _node: *mut c_uint) {
        place(device)?;
        Err(NOT_SUPPORTED)
    }

    /// `nvmlDeviceGetMigMode`: not divided, now or after a reset.
    fn nvmlDeviceGetMigMode(device: Device, current: *mut c_uint, pending: *mut c_uint) {
        place(device)?;
        answer(current, 0)?;
        answer(pending, 0)
    }

    /// `nvmlDeviceGetVirtualizationMode`: none.
    fn nvmlDeviceGetVirtualizationMode(device: Device, mode: *mut c_uint) {
        place(device)?;
        answer(mode, 0)
    }

    /// `nvmlDeviceGetComputeRunningProcesses`, its first form.
    fn nvmlDeviceGetComputeRunningProcesses(device: Device, count: *mut c_uint, list: *mut ProcessInfoV1) {
        put_process(device, count, list, |used_bytes| ProcessInfoV1 { pid: std::process::id(), used_bytes })
    }

    /// `nvmlDeviceGetComputeRunningProcesses_v2`.
    fn nvmlDeviceGetComputeRunningProcesses_v2(device: Device, count: *mut c_uint, list: *mut ProcessInfo) {
        put_process(device, count, list, ProcessInfo::own)
    }

    /// `nvmlDeviceGetComputeRunningProcesses_v3`.
    fn nvmlDeviceGetComputeRunningProcesses_v3(device: Device, count: *mut c_uint, list: *mut ProcessInfo) {
        put_process(device, count, list, ProcessInfo::own)
    }

    /// `nvmlDeviceGetP2PStatus`: 0 where the devices reach each other, 1 (chipset not supported) where not.
    fn nvmlDeviceGetP2PStatus(device: Device, peer: Device, _index: c_int, status: *mut c_int) {
        answer(status, c_int::from(place(device)? == place(peer)?))
    }
}

impl ProcessInfo {
    /// This process, on a device that is not divided.
    fn own(used_bytes: u64) -> ProcessInfo {
        let whole = c_uint::MAX;
        ProcessInfo { pid: std::process::id(), used_bytes, gpu_instance: whole, compute_instance: whole }
    }
}

/// # Safety
/// `device` is null or valid.
unsafe fn by_index(index: c_uint, device: *mut Device) -> Result<(), Status> {
    let device_of_index = index as Device + 1;
    place(device_of_index)?;
    // SAFETY: this function's contract.
    unsafe { answer(device, device_of_index) }
}

/// # Safety
/// `bus_id` is null or a C string, `device` is null or valid.
unsafe fn by_bus_id(bus_id: *const c_char, device: *mut Device) -> Result<(), Status> {
    // SAFETY: this function's contract.
    unsafe {
        let wanted = bus_address(&read_text(bus_id)?);
        answer(device, find(|place| bus_address(&machine::bus_id_at(place)) == wanted)?)
    }
}

fn uuid_of(place: i32) -> String {
    format!("GPU-{}", machine::uuid_text(place))
}

/// `nvmlErrorString`.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlErrorString(status: Status) -> *const c_char {
    let text = match status {
        SUCCESS => c"Success",
        INVALID_ARGUMENT => c"Invalid Argument",
        NOT_SUPPORTED => c"Not Supported",
        NOT_FOUND => c"Not Found",
        INSUFFICIENT_SIZE => c"Insufficient Size",
        DRIVER_NOT_LOADED => c"Driver Not Loaded",
        _ => c"Unknown Error",
    };
    text.as_ptr()
}

/// What is here to be found, but tells nothing: there are no links, no fabric, no sensors. The arguments are not looked at, which
/// in C's calling convention the caller does not notice.
macro_rules! not_supported {
    ($($name:ident,)*) => {$(
        #[doc = concat!("`", stringify!($name), "`: not supported.")]
        #[unsafe(no_mangle)]
        pub extern "C" fn $name() -> Status {
            NOT_SUPPORTED
        }
    )*};
}

not_supported! {
    nvmlDeviceGetClockInfo, nvmlDeviceGetCurrPcieLinkGeneration, nvmlDeviceGetCurrPcieLinkWidth,
    nvmlDeviceGetFieldValues, nvmlDeviceGetGpuFabricInfo, nvmlDeviceGetGpuFabricInfoV, nvmlDeviceGetNvLinkCapability,
    nvmlDeviceGetNvLinkRemoteDeviceType, nvmlDeviceGetNvLinkRemotePciInfo, nvmlDeviceGetNvLinkRemotePciInfo_v2,
    nvmlDeviceGetNvLinkState, nvmlDeviceGetPcieLinkMaxSpeed, nvmlDeviceGetPciInfoExt, nvmlDeviceGetPlatformInfo,
    nvmlDeviceGetPowerUsage, nvmlDeviceGetTemperature, nvmlDeviceGetTemperatureV, nvmlSystemGetConfComputeSettings,
    nvmlSystemGetConfComputeState,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bus_ids_of_both_lengths_are_one() {
        assert_eq!(bus_address("0000:0a:00.0"), "0A:00.0");
        assert_eq!(bus_address("00000000:0A:00.0"), "0A:00.0");
    }

    #[test]
    fn texts_are_cut_and_ended() {
        assert_eq!(padded::<4>("abcdef"), [b'a' as c_char, b'b' as c_char, b'c' as c_char, 0]);
        assert_eq!(padded::<4>("a"), [b'a' as c_char, 0, 0, 0]);
    }
}
