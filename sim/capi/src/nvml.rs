//! NVML, NVIDIA's management library: what PyTorch asks it, and what `nvidia-ml-py` does.
//!
//! NVML shows every device of the machine, whatever `CUDA_VISIBLE_DEVICES` says, and asking it initialises no CUDA:
//! PyTorch counts devices by it in processes that fork later.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::mem::size_of;

use torch_uvm_sim::{Config, DeviceMemory};

use crate::log;
use crate::machine::{self, DRIVER_VERSION};
use crate::outcome::{put, put_optional};

/// `nvmlReturn_t`.
type Status = c_int;

const SUCCESS: Status = 0;
const INVALID_ARGUMENT: Status = 2;
const NOT_SUPPORTED: Status = 3;
const NOT_FOUND: Status = 6;
const INSUFFICIENT_SIZE: Status = 7;
const DRIVER_NOT_LOADED: Status = 9;
const ARGUMENT_VERSION_MISMATCH: Status = 25;
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

/// `nvmlPciInfoExt_v1_t`.
#[repr(C)]
pub struct PciInfoExt {
    version: c_uint,
    domain: c_uint,
    bus: c_uint,
    device: c_uint,
    device_id: c_uint,
    subsystem_id: c_uint,
    base_class: c_uint,
    sub_class: c_uint,
    bus_id: [c_char; 32],
}

/// `nvmlGpuFabricInfo_t`.
#[repr(C)]
pub struct FabricInfo {
    cluster: [u8; 16],
    status: Status,
    clique: c_uint,
    state: u8,
}

/// `nvmlGpuFabricInfo_v2_t`.
#[repr(C)]
pub struct FabricInfoV2 {
    version: c_uint,
    cluster: [u8; 16],
    status: Status,
    clique: c_uint,
    state: u8,
    health_mask: c_uint,
}

/// `nvmlGpuFabricInfo_v3_t`.
#[repr(C)]
pub struct FabricInfoV3 {
    v2: FabricInfoV2,
    health_summary: u8,
}

/// `NVML_GPU_FABRIC_STATE_NOT_SUPPORTED`: what the driver says of a device that no NVSwitch connects to others.
const NO_FABRIC: u8 = 0;

/// `nvmlTemperature_v1_t`.
#[repr(C)]
pub struct Temperature {
    version: c_uint,
    sensor: c_uint,
    degrees: c_int,
}

/// `NVML_TEMPERATURE_GPU`, the only sensor.
const GPU_SENSOR: c_uint = 0;
/// A device that draws no power (`nvmlDeviceGetPowerUsage`) is as warm as its room.
const ROOM_TEMPERATURE: c_uint = 20;

/// `nvmlFieldValue_t`.
#[repr(C)]
pub struct FieldValue {
    field: c_uint,
    scope: c_uint,
    timestamp: i64,
    latency: i64,
    kind: c_uint,
    status: Status,
    value: u64,
}

/// `nvmlConfComputeSystemState_t`.
#[repr(C)]
pub struct ConfComputeState {
    environment: c_uint,
    feature: c_uint,
    developer_tools: c_uint,
}

/// `nvmlSystemConfComputeSettings_v1_t`.
#[repr(C)]
pub struct ConfComputeSettings {
    version: c_uint,
    environment: c_uint,
    feature: c_uint,
    developer_tools: c_uint,
    several_gpus: c_uint,
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

/// The version word that a caller has put at the beginning of a `T`: its size, and the form's number in the highest byte.
///
/// # Safety
/// `to` is null or valid for reading the word.
unsafe fn asked<T>(to: *const c_void, form: usize) -> Result<c_uint, Status> {
    // SAFETY: null or valid by this function's contract.
    let version = *unsafe { to.cast::<c_uint>().as_ref() }.ok_or(INVALID_ARGUMENT)?;
    if version as usize == size_of::<T>() | form << 24 { Ok(version) } else { Err(ARGUMENT_VERSION_MISMATCH) }
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

    /// `nvmlDeviceGetPciInfoExt`: a 3D controller (3, 2).
    fn nvmlDeviceGetPciInfoExt(device: Device, info: *mut PciInfoExt) {
        let place = place(device)?;
        let version = asked::<PciInfoExt>(info.cast(), 1)?;
        answer(info, PciInfoExt {
            version,
            domain: 0,
            bus: machine::bus_at(place) as c_uint,
            device: 0,
            device_id: 0,
            subsystem_id: 0,
            base_class: 3,
            sub_class: 2,
            bus_id: padded(&format!("0000{}", machine::bus_id_at(place))),
        })
    }

    /// `nvmlDeviceGetGpuFabricInfo`.
    fn nvmlDeviceGetGpuFabricInfo(device: Device, to: *mut FabricInfo) {
        place(device)?;
        answer(to, FabricInfo { cluster: [0; 16], status: SUCCESS, clique: 0, state: NO_FABRIC })
    }

    /// `nvmlDeviceGetGpuFabricInfoV`, its second and third form.
    fn nvmlDeviceGetGpuFabricInfoV(device: Device, to: *mut c_void) {
        place(device)?;
        let v2 = |version| FabricInfoV2 {
            version,
            cluster: [0; 16],
            status: SUCCESS,
            clique: 0,
            state: NO_FABRIC,
            health_mask: 0,
        };
        if let Ok(version) = asked::<FabricInfoV2>(to, 2) {
            return answer(to.cast(), v2(version));
        }
        let version = asked::<FabricInfoV3>(to, 3)?;
        answer(to.cast(), FabricInfoV3 { v2: v2(version), health_summary: 0 })
    }

    /// `nvmlDeviceGetClockInfo`, in MHz: the clocks of the properties, always. Graphics and multiprocessors (0, 1), memory (2).
    fn nvmlDeviceGetClockInfo(device: Device, kind: c_uint, clock: *mut c_uint) {
        place(device)?;
        let profile = config()?.profile;
        let khz = match kind {
            0 | 1 => profile.clock_khz,
            2 => profile.memory_clock_khz,
            3 => return Err(NOT_SUPPORTED), // The video engines, which a device need not have.
            _ => return Err(INVALID_ARGUMENT),
        };
        answer(clock, khz as c_uint / 1000)
    }

    /// `nvmlDeviceGetTemperature`, in degrees Celsius.
    fn nvmlDeviceGetTemperature(device: Device, sensor: c_uint, degrees: *mut c_uint) {
        place(device)?;
        if sensor != GPU_SENSOR {
            return Err(INVALID_ARGUMENT);
        }
        answer(degrees, ROOM_TEMPERATURE)
    }

    /// `nvmlDeviceGetTemperatureV`.
    fn nvmlDeviceGetTemperatureV(device: Device, to: *mut Temperature) {
        place(device)?;
        let version = asked::<Temperature>(to.cast(), 1)?;
        let sensor = to.as_ref().ok_or(INVALID_ARGUMENT)?.sensor;
        if sensor != GPU_SENSOR {
            return Err(INVALID_ARGUMENT);
        }
        answer(to, Temperature { version, sensor, degrees: ROOM_TEMPERATURE as c_int })
    }

    /// `nvmlDeviceGetPowerUsage`, in milliwatts: kernels do nothing.
    fn nvmlDeviceGetPowerUsage(device: Device, milliwatts: *mut c_uint) {
        place(device)?;
        answer(milliwatts, 0)
    }

    /// `nvmlDeviceGetFieldValues`: the call succeeds and each field says for itself that it is not supported, as NVML does.
    fn nvmlDeviceGetFieldValues(device: Device, count: c_int, values: *mut FieldValue) {
        place(device)?;
        let count = usize::try_from(count).ok().filter(|count| *count > 0 && !values.is_null());
        for at in 0..count.ok_or(INVALID_ARGUMENT)? {
            (*values.add(at)).status = NOT_SUPPORTED;
        }
        Ok(())
    }

    /// `nvmlSystemGetConfComputeState`: no confidential computing.
    fn nvmlSystemGetConfComputeState(to: *mut ConfComputeState) {
        answer(to, ConfComputeState { environment: 0, feature: 0, developer_tools: 0 })
    }

    /// `nvmlSystemGetConfComputeSettings`.
    fn nvmlSystemGetConfComputeSettings(to: *mut ConfComputeSettings) {
        let version = asked::<ConfComputeSettings>(to.cast(), 1)?;
        answer(to, ConfComputeSettings { version, environment: 0, feature: 0, developer_tools: 0, several_gpus: 0 })
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
        let version = asked::<MemoryV2>(to.cast(), 2)?;
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
        ARGUMENT_VERSION_MISMATCH => c"Argument Version Mismatch",
        _ => c"Unknown Error",
    };
    text.as_ptr()
}

/// What real drivers answer so, too: for a device without NVLink, for one whose PCIe link they do not tell (GB10), for one before
/// Blackwell (the platform). The arguments are not looked at, which in C's calling convention the caller does not notice.
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
    nvmlDeviceGetCurrPcieLinkGeneration, nvmlDeviceGetCurrPcieLinkWidth, nvmlDeviceGetNvLinkCapability,
    nvmlDeviceGetNvLinkRemoteDeviceType, nvmlDeviceGetNvLinkRemotePciInfo, nvmlDeviceGetNvLinkRemotePciInfo_v2,
    nvmlDeviceGetNvLinkState, nvmlDeviceGetPcieLinkMaxSpeed, nvmlDeviceGetPlatformInfo,
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
    fn structs_are_as_large_as_nvml_has_them() {
        assert_eq!((size_of::<FabricInfo>(), size_of::<FabricInfoV2>(), size_of::<FabricInfoV3>()), (28, 36, 40));
        assert_eq!((size_of::<PciInfoExt>(), size_of::<Temperature>(), size_of::<FieldValue>()), (64, 12, 40));
        assert_eq!((size_of::<ConfComputeState>(), size_of::<ConfComputeSettings>()), (12, 20));
    }

    #[test]
    fn texts_are_cut_and_ended() {
        assert_eq!(padded::<4>("abcdef"), [b'a' as c_char, b'b' as c_char, b'c' as c_char, 0]);
        assert_eq!(padded::<4>("a"), [b'a' as c_char, 0, 0, 0]);
    }
}
