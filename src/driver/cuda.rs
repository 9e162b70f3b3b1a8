//! The real driver: the CUDA driver API, loaded at run time.
//!
//! One binary serves CUDA 12 and 13: the driver is asked at run time what it has. Nothing is initialised before the
//! first call that needs it, because a process that forks after `cuInit` cannot use CUDA in its child.
//!
//! Contexts: the primary context of a device (the one that the CUDA runtime, and so PyTorch, uses) is retained at the
//! device's first use and kept for the life of the process; giving it back at exit would race with the driver's own
//! exit handlers.

mod api;
mod calls;
mod chunks;

use std::ffi::{CStr, c_int, c_uint};
use std::sync::OnceLock;

use cudarc::driver::sys::{
    CUcontext, CUdevice, CUdevice_attribute as Attribute, CUmemLocation, CUmemLocationType, CUresult,
};
use parking_lot::Mutex;

use self::api::Api;
use super::{DeviceIndex, DeviceInfo, DriverError, ErrorKind, Location, Result};

/// "CU_DEVICE_CPU: Device that represents the CPU", for the calls that take a device number.
const CU_DEVICE_CPU: CUdevice = -1;

/// The first driver with `cuMemAdvise_v2`, `cuMemPrefetchAsync_v2` and chunks on NUMA nodes of the host, as `cuDriverGetVersion` counts.
const CUDA_12_2: c_int = 12020;

/// The first driver with `cuMemDiscardBatchAsync`.
const CUDA_13_0: c_int = 13000;

/// Calls an entry point and checks its result: `call!(api, cuMemFree(ptr))`.
macro_rules! call {
    ($api:expr, $name:ident($($arg:expr),* $(,)?)) => {
        $api.check(stringify!($name), ($api.$name)($($arg),*))
    };
}

use call;

/// The CUDA driver API.
pub struct CudaDriver {
    api: Api,
    /// Nothing newer than this version of CUDA is used.
    newest: c_int,
    /// Filled by the first call that needs a device.
    devices: OnceLock<Devices>,
    /// Held while `devices` or a device's context is made, so that each is made once.
    initialising: Mutex<()>,
}

struct Devices {
    /// Whether the calls that take a location are there.
    has_locations: bool,
    /// Whether a device reaches chunks of host memory.
    has_host_chunks: bool,
    list: Vec<Device>,
}

/// What only newer drivers have.
struct Newer {
    discard: bool,
    host_chunks: bool,
}

struct Device {
    handle: CUdevice,
    info: DeviceInfo,
    /// Whether chunks can be made for GPUDirect RDMA.
    rdma_chunks: bool,
    /// The NUMA node that is this GPU's memory, where the operating system sees it as one (GH200 in NUMA mode).
    memory_numa_node: Option<i32>,
    /// The address of the primary context, retained at first use. A number, because a pointer is not `Sync`.
    context: OnceLock<usize>,
}

impl CudaDriver {
    /// Loads `libcuda.so.1`. Initialises nothing yet.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unavailable`] where the library or one of its entry points is missing.
    pub fn load() -> Result<Self> {
        Self::load_at_most(c_int::MAX)
    }

    /// As [`CudaDriver::load`], using nothing that a driver of this version of CUDA lacks (1000 × major + 10 ×
    /// minor): so that the older forms of calls can be tested on a newer driver.
    ///
    /// # Errors
    ///
    /// As [`CudaDriver::load`].
    pub fn load_at_most(version: i32) -> Result<Self> {
        Ok(Self { api: Api::load()?, newest: version, devices: OnceLock::new(), initialising: Mutex::new(()) })
    }

    /// The version of CUDA that the driver supports, as 1000 × major + 10 × minor.
    ///
    /// # Errors
    ///
    /// What `cuDriverGetVersion` says.
    pub fn version(&self) -> Result<i32> {
        let mut version = 0;
        // SAFETY: `version` is writable.
        unsafe { call!(self.api, cuDriverGetVersion(&raw mut version)) }?;
        Ok(version)
    }

    /// All devices; initialises CUDA at the first call. A failure is not kept: the next call tries again.
    fn devices(&self) -> Result<&Devices> {
        if let Some(devices) = self.devices.get() {
            return Ok(devices);
        }
        let _guard = self.initialising.lock();
        if let Some(devices) = self.devices.get() {
            return Ok(devices);
        }
        let devices = self.find_devices()?;
        Ok(self.devices.get_or_init(|| devices))
    }

    fn find_devices(&self) -> Result<Devices> {
        let version = self.version()?.min(self.newest);
        let has_locations =
            version >= CUDA_12_2 && self.api.cuMemAdvise_v2.is_some() && self.api.cuMemPrefetchAsync_v2.is_some();
        // "Initializes the driver API and must be called before any other function from the driver API [but
        // cuDriverGetVersion]. […] the Flags parameter must be 0."
        // SAFETY: no pointers.
        match unsafe { (self.api.cuInit)(0) } {
            // A machine with a driver and no GPU, or CUDA_VISIBLE_DEVICES empty: no devices is no failure.
            code if code == CUresult::CUDA_ERROR_NO_DEVICE as c_uint => {
                return Ok(Devices { has_locations, has_host_chunks: false, list: Vec::new() });
            }
            code => self.api.check("cuInit", code)?,
        }
        let mut count = 0;
        // SAFETY: `count` is writable.
        unsafe { call!(self.api, cuDeviceGetCount(&raw mut count)) }?;
        let has_discard = version >= CUDA_13_0 && self.api.cuMemDiscardBatchAsync.is_some();
        let has = Newer { discard: has_discard, host_chunks: version >= CUDA_12_2 };
        let list = (0..count).map(|ordinal| self.find_device(ordinal, &has)).collect::<Result<Vec<_>>>()?;
        let has_host_chunks = list.iter().any(|device| device.info.host_chunks);
        Ok(Devices { has_locations, has_host_chunks, list })
    }

    fn find_device(&self, ordinal: DeviceIndex, has: &Newer) -> Result<Device> {
        let mut handle = 0;
        // SAFETY: `handle` is writable.
        unsafe { call!(self.api, cuDeviceGet(&raw mut handle, ordinal)) }?;

        let mut name = [0; 256];
        // "len: Maximum length of string to store in name"; CUDA terminates it.
        // SAFETY: `name` is writable for its length.
        unsafe { call!(self.api, cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, handle)) }?;
        // SAFETY: terminated within the array, at the latest by the zero that we put back at its end.
        let name = unsafe {
            name[name.len() - 1] = 0;
            CStr::from_ptr(name.as_ptr())
        };

        let mut total = 0;
        // SAFETY: `total` is writable.
        unsafe { call!(self.api, cuDeviceTotalMem(&raw mut total, handle)) }?;

        let attribute = |attribute| -> Result<c_int> {
            let mut value = 0;
            // SAFETY: `value` is writable.
            unsafe { call!(self.api, cuDeviceGetAttribute(&raw mut value, attribute, handle)) }?;
            Ok(value)
        };
        // A driver older than the attribute answers CUDA_ERROR_INVALID_VALUE: then there is no such thing.
        let newer_attribute = |id| attribute(id).ok();
        let flag = |id| newer_attribute(id).is_some_and(|value| value != 0);

        // "CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID: NUMA ID of the host node closest to the device. Returns -1 when system
        // does not support NUMA."
        let host_numa_node = newer_attribute(Attribute::CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID).filter(|&node| node >= 0);
        // "CU_DEVICE_ATTRIBUTE_NUMA_CONFIG: NUMA configuration of a device: value is of type CUdeviceNumaConfig enum",
        // of which 1 is "device is a NUMA node, and CU_DEVICE_ATTRIBUTE_NUMA_ID contains its NUMA ID".
        let memory_numa_node = newer_attribute(Attribute::CU_DEVICE_ATTRIBUTE_NUMA_CONFIG)
            .filter(|&config| config == 1)
            .and_then(|_| newer_attribute(Attribute::CU_DEVICE_ATTRIBUTE_NUMA_ID))
            .filter(|&node| node >= 0);

        let concurrent_managed_access = attribute(Attribute::CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS)? != 0;
        let info = DeviceInfo {
            name: name.to_string_lossy().into_owned(),
            total_memory: total as u64,
            managed_memory: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY)? != 0,
            concurrent_managed_access,
            host_page_tables: attribute(Attribute::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES)?
                != 0,
            // "All devices in the system must have a non-zero value for the device attribute
            // CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS otherwise the API will return an error."
            discard: has.discard && concurrent_managed_access,
            chunks: flag(Attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED),
            host_chunks: has.host_chunks
                && flag(Attribute::CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED),
            shareable_chunks: flag(Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED),
            integrated: attribute(Attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED)? != 0,
            host_numa_node,
        };
        let rdma_chunks = flag(Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED);
        Ok(Device { handle, info, rdma_chunks, memory_numa_node, context: OnceLock::new() })
    }

    /// The device with this ordinal. Checked here and not left to CUDA: in the older calls -1 means the CPU.
    fn device(&self, ordinal: DeviceIndex, call: &'static str) -> Result<&Device> {
        let devices = &self.devices()?.list;
        usize::try_from(ordinal).ok().and_then(|index| devices.get(index)).ok_or_else(|| DriverError {
            kind: ErrorKind::InvalidValue,
            call,
            code: CUresult::CUDA_ERROR_INVALID_DEVICE as i32,
            name: "CUDA_ERROR_INVALID_DEVICE".to_owned(),
            message: format!("there is no device {ordinal}: this process sees {} device(s)", devices.len()),
        })
    }

    /// The device's primary context.
    fn context(&self, device: &Device) -> Result<CUcontext> {
        if let Some(&context) = device.context.get() {
            return Ok(context as CUcontext);
        }
        let _guard = self.initialising.lock();
        if let Some(&context) = device.context.get() {
            return Ok(context as CUcontext);
        }
        let mut context = std::ptr::null_mut();
        // "the primary context will be active and available to the user until the user releases it": which this never
        // does, as the module says.
        // SAFETY: `context` is writable.
        unsafe { call!(self.api, cuDevicePrimaryCtxRetain(&raw mut context, device.handle)) }?;
        device.context.get_or_init(|| context as usize);
        Ok(context)
    }

    /// Makes the device's primary context current, where it is not, until the guard goes.
    fn enter(&self, ordinal: DeviceIndex, call: &'static str) -> Result<ContextGuard<'_>> {
        let context = self.context(self.device(ordinal, call)?)?;
        let mut current = std::ptr::null_mut();
        // "If no context is bound to the calling CPU thread then *pctx is set to NULL and CUDA_SUCCESS is returned."
        // SAFETY: `current` is writable.
        unsafe { call!(self.api, cuCtxGetCurrent(&raw mut current)) }?;
        if current == context {
            return Ok(ContextGuard { api: &self.api, restore: None });
        }
        // "If there exists a CUDA context stack on the calling CPU thread, this will replace the top of that stack":
        // the guard's second call puts back what was there.
        // SAFETY: a context that this process has retained.
        unsafe { call!(self.api, cuCtxSetCurrent(context)) }?;
        Ok(ContextGuard { api: &self.api, restore: Some(current) })
    }

    fn location(&self, location: Location, call: &'static str) -> Result<CUmemLocation> {
        let (type_, id) = match location {
            Location::Device(ordinal) => {
                self.device(ordinal, call)?;
                (CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, ordinal)
            }
            // "CU_MEM_LOCATION_TYPE_HOST: Location is host, id is ignored"
            Location::Host => (CUmemLocationType::CU_MEM_LOCATION_TYPE_HOST, 0),
            Location::HostNuma(node) => (CUmemLocationType::CU_MEM_LOCATION_TYPE_HOST_NUMA, node),
        };
        Ok(CUmemLocation { type_, id })
    }

    /// The location as the calls with a device number have it.
    fn device_or_cpu(&self, location: Location, call: &'static str) -> Result<CUdevice> {
        match location {
            Location::Device(ordinal) => Ok(self.device(ordinal, call)?.handle),
            Location::Host => Ok(CU_DEVICE_CPU),
            Location::HostNuma(node) => Err(DriverError {
                kind: ErrorKind::NotSupported,
                call,
                code: CUresult::CUDA_ERROR_NOT_SUPPORTED as i32,
                name: "CUDA_ERROR_NOT_SUPPORTED".to_owned(),
                message: format!("host NUMA node {node} as a location needs a driver of CUDA 12.2 or newer"),
            }),
        }
    }
}

/// Restores the caller's current context when it goes.
struct ContextGuard<'a> {
    api: &'a Api,
    restore: Option<CUcontext>,
}

impl Drop for ContextGuard<'_> {
    fn drop(&mut self) {
        let Some(previous) = self.restore else { return };
        // "If ctx is NULL then this will be equivalent to popping the top of the calling CPU thread's CUDA context
        // stack": a thread that had none has none again.
        // SAFETY: the context that was current when the guard was made, or NULL.
        if let Err(error) = unsafe { call!(self.api, cuCtxSetCurrent(previous)) } {
            // The call that the guard stood around has done its work: to fail it now would be a lie. This happens
            // only where someone destroyed the caller's context meanwhile.
            tracing::error!(%error, "the caller's CUDA context could not be made current again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_gets_an_error_and_no_panic() {
        match CudaDriver::load() {
            // The test also runs where there is a driver.
            Ok(driver) => drop(driver.version()),
            Err(error) => {
                assert_eq!(error.kind, ErrorKind::Unavailable);
                assert!(error.to_string().contains("libcuda.so.1"), "{error}");
            }
        }
    }
}
