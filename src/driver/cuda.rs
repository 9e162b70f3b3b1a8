//! The real driver: the CUDA driver API, loaded at run time.
//!
//! One binary serves CUDA 12 and 13: the driver is asked at run time what it has. Nothing is initialised before the
//! first call that needs it, because a process that forks after `cuInit` cannot use CUDA in its child.
//!
//! Contexts: the primary context of a device (the one that the CUDA runtime, and so PyTorch, uses) is retained at the
//! device's first use and kept for the life of the process; giving it back at exit would race with the driver's own
//! exit handlers.

mod api;

use std::ffi::{CStr, c_int, c_uint};
use std::sync::OnceLock;

use cudarc::driver::sys::{
    CUcontext, CUdevice, CUdevice_attribute as Attribute, CUevent, CUevent_flags, CUipcMemHandle, CUmem_advise,
    CUmemAttach_flags, CUmemLocation, CUmemLocationType, CUresult, CUstream, CUstream_flags, CUstreamCaptureMode,
    CUstreamCaptureStatus,
};
use parking_lot::Mutex;

use self::api::Api;
use super::host::HostMemoryFiles;
use super::{
    Advice, CaptureMode, DeviceIndex, DeviceInfo, DeviceMemory, DevicePtr, Driver, DriverError, ErrorKind, Event,
    HostMemory, IpcHandle, Location, Range, Result, Stream,
};

/// "CU_DEVICE_CPU: Device that represents the CPU", for the calls that take a device number.
const CU_DEVICE_CPU: CUdevice = -1;

/// The first driver with `cuMemAdvise_v2` and `cuMemPrefetchAsync_v2`, as `cuDriverGetVersion` counts.
const CUDA_12_2: c_int = 12020;

/// The first driver with `cuMemDiscardBatchAsync`.
const CUDA_13_0: c_int = 13000;

/// Calls an entry point and checks its result: `call!(api, cuMemFree(ptr))`.
macro_rules! call {
    ($api:expr, $name:ident($($arg:expr),* $(,)?)) => {
        $api.check(stringify!($name), ($api.$name)($($arg),*))
    };
}

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
    list: Vec<Device>,
}

struct Device {
    handle: CUdevice,
    info: DeviceInfo,
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
                return Ok(Devices { has_locations, list: Vec::new() });
            }
            code => self.api.check("cuInit", code)?,
        }
        let mut count = 0;
        // SAFETY: `count` is writable.
        unsafe { call!(self.api, cuDeviceGetCount(&raw mut count)) }?;
        let has_discard = version >= CUDA_13_0 && self.api.cuMemDiscardBatchAsync.is_some();
        let list = (0..count).map(|ordinal| self.find_device(ordinal, has_discard)).collect::<Result<_>>()?;
        Ok(Devices { has_locations, list })
    }

    fn find_device(&self, ordinal: DeviceIndex, has_discard: bool) -> Result<Device> {
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
            pageable_memory_access: attribute(Attribute::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS)? != 0,
            host_page_tables: attribute(Attribute::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES)?
                != 0,
            direct_host_access: attribute(Attribute::CU_DEVICE_ATTRIBUTE_DIRECT_MANAGED_MEM_ACCESS_FROM_HOST)? != 0,
            // "All devices in the system must have a non-zero value for the device attribute
            // CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS otherwise the API will return an error."
            discard: has_discard && concurrent_managed_access,
            integrated: attribute(Attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED)? != 0,
            host_numa_node,
        };
        Ok(Device { handle, info, memory_numa_node, context: OnceLock::new() })
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

fn cu_stream(stream: Stream) -> CUstream {
    stream.0 as CUstream
}

fn cu_event(event: Event) -> CUevent {
    event.0 as CUevent
}

fn capture_mode_to_cuda(mode: CaptureMode) -> c_uint {
    (match mode {
        CaptureMode::Global => CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL,
        CaptureMode::ThreadLocal => CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
        CaptureMode::Relaxed => CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED,
    }) as c_uint
}

/// The strictest mode stands for one that a newer driver might invent: it forbids most.
fn capture_mode_from_cuda(mode: c_uint) -> CaptureMode {
    [CaptureMode::ThreadLocal, CaptureMode::Relaxed]
        .into_iter()
        .find(|&known| capture_mode_to_cuda(known) == mode)
        .unwrap_or(CaptureMode::Global)
}

impl Driver for CudaDriver {
    fn device_count(&self) -> Result<DeviceIndex> {
        // From a c_int, so it fits.
        Ok(self.devices()?.list.len() as DeviceIndex)
    }

    fn device_info(&self, device: DeviceIndex) -> Result<DeviceInfo> {
        Ok(self.device(device, "cuDeviceGet")?.info.clone())
    }

    fn device_memory(&self, device: DeviceIndex) -> Result<DeviceMemory> {
        let _context = self.enter(device, "cuMemGetInfo")?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both are writable.
        unsafe { call!(self.api, cuMemGetInfo(&raw mut free, &raw mut total)) }?;
        Ok(DeviceMemory { free: free as u64, total: total as u64 })
    }

    fn host_memory(&self) -> Result<HostMemory> {
        // Where CUDA is not initialised yet it stays so: a process may ask and then fork.
        let devices = self.devices.get().map_or(&[][..], |devices| &devices.list);
        let gpu_nodes: Vec<i32> = devices.iter().filter_map(|device| device.memory_numa_node).collect();
        HostMemoryFiles::from_env().read(&gpu_nodes)
    }

    fn alloc_managed(&self, device: DeviceIndex, bytes: u64) -> Result<DevicePtr> {
        let _context = self.enter(device, "cuMemAllocManaged")?;
        let mut ptr = 0;
        // "If bytesize is 0, cuMemAllocManaged returns CUDA_ERROR_INVALID_VALUE." "If CU_MEM_ATTACH_GLOBAL is
        // specified, then this memory is accessible from any stream on any device."
        let flags = CUmemAttach_flags::CU_MEM_ATTACH_GLOBAL as c_uint;
        // SAFETY: `ptr` is writable.
        unsafe { call!(self.api, cuMemAllocManaged(&raw mut ptr, bytes as usize, flags)) }?;
        Ok(DevicePtr(ptr))
    }

    fn alloc_device(&self, device: DeviceIndex, bytes: u64) -> Result<DevicePtr> {
        let _context = self.enter(device, "cuMemAlloc")?;
        let mut ptr = 0;
        // "If bytesize is 0, cuMemAlloc() returns CUDA_ERROR_INVALID_VALUE."
        // SAFETY: `ptr` is writable.
        unsafe { call!(self.api, cuMemAlloc(&raw mut ptr, bytes as usize)) }?;
        Ok(DevicePtr(ptr))
    }

    fn free(&self, device: DeviceIndex, ptr: DevicePtr) -> Result<()> {
        let _context = self.enter(device, "cuMemFree")?;
        // "Frees the memory space pointed to by dptr, which must have been returned by a previous call to one of the
        // following memory allocation APIs - cuMemAlloc() […] cuMemAllocManaged()": CUDA checks it, and answers
        // CUDA_ERROR_INVALID_VALUE.
        // SAFETY: no pointers; whoever still used the memory is the caller's affair (trait Driver).
        unsafe { call!(self.api, cuMemFree(ptr.0)) }
    }

    fn advise(&self, device: DeviceIndex, range: Range, advice: Advice) -> Result<()> {
        let (kind, location) = match advice {
            Advice::SetPreferredLocation(at) => (CUmem_advise::CU_MEM_ADVISE_SET_PREFERRED_LOCATION, Some(at)),
            Advice::UnsetPreferredLocation => (CUmem_advise::CU_MEM_ADVISE_UNSET_PREFERRED_LOCATION, None),
            Advice::SetAccessedBy(by) => (CUmem_advise::CU_MEM_ADVISE_SET_ACCESSED_BY, Some(by)),
            Advice::UnsetAccessedBy(by) => (CUmem_advise::CU_MEM_ADVISE_UNSET_ACCESSED_BY, Some(by)),
            Advice::SetReadMostly => (CUmem_advise::CU_MEM_ADVISE_SET_READ_MOSTLY, None),
            Advice::UnsetReadMostly => (CUmem_advise::CU_MEM_ADVISE_UNSET_READ_MOSTLY, None),
        };
        // "The location argument is ignored for this advice", says the manual of each kind without one.
        let location = location.unwrap_or(Location::Device(device));
        let _context = self.enter(device, "cuMemAdvise")?;
        let (ptr, bytes) = (range.ptr.0, range.bytes as usize);
        match (self.api.cuMemAdvise_v2, self.api.cuMemAdvise) {
            (Some(advise), _) if self.devices()?.has_locations => {
                let location = self.location(location, "cuMemAdvise")?;
                // SAFETY: no pointers to host memory; CUDA checks the range ("The memory range must refer to managed
                // memory").
                self.api.check("cuMemAdvise", unsafe { advise(ptr, bytes, kind, location) })
            }
            (_, Some(advise)) => {
                let location = self.device_or_cpu(location, "cuMemAdvise")?;
                // SAFETY: as above.
                self.api.check("cuMemAdvise", unsafe { advise(ptr, bytes, kind, location) })
            }
            _ => Err(no_managed_calls("cuMemAdvise")),
        }
    }

    fn prefetch(&self, device: DeviceIndex, range: Range, to: Location, stream: Stream) -> Result<()> {
        let _context = self.enter(device, "cuMemPrefetchAsync")?;
        let (ptr, bytes, stream) = (range.ptr.0, range.bytes as usize, cu_stream(stream));
        match (self.api.cuMemPrefetchAsync_v2, self.api.cuMemPrefetchAsync) {
            (Some(prefetch), _) if self.devices()?.has_locations => {
                let to = self.location(to, "cuMemPrefetchAsync")?;
                // "flags: flags for future use, must be zero now."
                // SAFETY: no pointers to host memory; CUDA checks the range ("The memory range must refer to managed
                // memory") and its size.
                self.api.check("cuMemPrefetchAsync", unsafe { prefetch(ptr, bytes, to, 0, stream) })
            }
            (_, Some(prefetch)) => {
                let to = self.device_or_cpu(to, "cuMemPrefetchAsync")?;
                // SAFETY: as above.
                self.api.check("cuMemPrefetchAsync", unsafe { prefetch(ptr, bytes, to, stream) })
            }
            _ => Err(no_managed_calls("cuMemPrefetchAsync")),
        }
    }

    fn discard(&self, device: DeviceIndex, range: Range, stream: Stream) -> Result<()> {
        const CALL: &str = "cuMemDiscardBatchAsync";
        let supported = self.device(device, CALL)?.info.discard;
        let Some(discard) = self.api.cuMemDiscardBatchAsync.filter(|_| supported) else {
            return Err(DriverError {
                kind: ErrorKind::NotSupported,
                call: CALL,
                code: CUresult::CUDA_ERROR_NOT_SUPPORTED as i32,
                name: "CUDA_ERROR_NOT_SUPPORTED".to_owned(),
                message: format!(
                    "discarding managed memory needs a driver of CUDA 13.0 or newer, and concurrent managed access; \
                     device {device} lacks one of them"
                ),
            });
        };
        let _context = self.enter(device, CALL)?;
        let (mut ptr, mut bytes) = (range.ptr.0, range.bytes as usize);
        // "flags: Flags reserved for future use. Must be zero." "hStream: […] Must not be legacy NULL stream."
        // SAFETY: arrays of one element each, readable; CUDA checks the range.
        self.api.check(CALL, unsafe { discard(&raw mut ptr, &raw mut bytes, 1, 0, cu_stream(stream)) })
    }

    fn stream_create(&self, device: DeviceIndex) -> Result<Stream> {
        let _context = self.enter(device, "cuStreamCreate")?;
        let mut stream = std::ptr::null_mut();
        // "CU_STREAM_NON_BLOCKING: Stream does not synchronize with stream 0 (the NULL stream)"
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        // SAFETY: `stream` is writable.
        unsafe { call!(self.api, cuStreamCreate(&raw mut stream, flags)) }?;
        Ok(Stream(stream as u64))
    }

    fn stream_destroy(&self, device: DeviceIndex, stream: Stream) -> Result<()> {
        let _context = self.enter(device, "cuStreamDestroy")?;
        // "In case the device is still doing work in the stream hStream when cuStreamDestroy() is called, the function
        // will return immediately and the resources […] will be released automatically once the device has completed".
        // SAFETY: a stream made by `stream_create` and not destroyed since (trait Driver).
        unsafe { call!(self.api, cuStreamDestroy(cu_stream(stream))) }
    }

    fn stream_synchronize(&self, device: DeviceIndex, stream: Stream) -> Result<()> {
        let _context = self.enter(device, "cuStreamSynchronize")?;
        // SAFETY: a live stream (trait Driver).
        unsafe { call!(self.api, cuStreamSynchronize(cu_stream(stream))) }
    }

    fn stream_is_capturing(&self, device: DeviceIndex, stream: Stream) -> Result<bool> {
        let _context = self.enter(device, "cuStreamIsCapturing")?;
        let mut status = 0;
        // "if this is called on CU_STREAM_LEGACY (the "null stream") while a blocking stream in the same context is
        // capturing, it will return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT": an error here too, of kind StreamCapture.
        // SAFETY: `status` is writable; a live stream (trait Driver).
        unsafe { call!(self.api, cuStreamIsCapturing(cu_stream(stream), &raw mut status)) }?;
        Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE as c_uint)
    }

    fn device_synchronize(&self, device: DeviceIndex) -> Result<()> {
        let _context = self.enter(device, "cuCtxSynchronize")?;
        // SAFETY: no pointers.
        unsafe { call!(self.api, cuCtxSynchronize()) }
    }

    fn event_create(&self, device: DeviceIndex) -> Result<Event> {
        let _context = self.enter(device, "cuEventCreate")?;
        let mut event = std::ptr::null_mut();
        // "Events created with [CU_EVENT_DISABLE_TIMING] […] will provide the best performance when used with
        // cuStreamWaitEvent() and cuEventQuery()."
        let flags = CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint;
        // SAFETY: `event` is writable.
        unsafe { call!(self.api, cuEventCreate(&raw mut event, flags)) }?;
        Ok(Event(event as u64))
    }

    fn event_record(&self, device: DeviceIndex, event: Event, stream: Stream) -> Result<()> {
        // "hEvent and hStream must be from the same context": both are the device's (trait Driver).
        let _context = self.enter(device, "cuEventRecord")?;
        // SAFETY: a live event and a live stream (trait Driver).
        unsafe { call!(self.api, cuEventRecord(cu_event(event), cu_stream(stream))) }
    }

    fn stream_wait_event(&self, device: DeviceIndex, stream: Stream, event: Event) -> Result<()> {
        let _context = self.enter(device, "cuStreamWaitEvent")?;
        // "CU_EVENT_WAIT_DEFAULT: Default event wait flag", 0.
        // SAFETY: a live stream and a live event (trait Driver).
        unsafe { call!(self.api, cuStreamWaitEvent(cu_stream(stream), cu_event(event), 0)) }
    }

    fn event_query(&self, device: DeviceIndex, event: Event) -> Result<bool> {
        let _context = self.enter(device, "cuEventQuery")?;
        // "Returns CUDA_SUCCESS if all captured work has been completed, or CUDA_ERROR_NOT_READY if any captured work
        // is incomplete." "Before the first call to cuEventRecord(), an event represents an empty set of work".
        // SAFETY: a live event (trait Driver).
        match unsafe { (self.api.cuEventQuery)(cu_event(event)) } {
            code if code == CUresult::CUDA_ERROR_NOT_READY as c_uint => Ok(false),
            code => self.api.check("cuEventQuery", code).map(|()| true),
        }
    }

    fn event_synchronize(&self, device: DeviceIndex, event: Event) -> Result<()> {
        let _context = self.enter(device, "cuEventSynchronize")?;
        // SAFETY: a live event (trait Driver).
        unsafe { call!(self.api, cuEventSynchronize(cu_event(event))) }
    }

    fn event_destroy(&self, device: DeviceIndex, event: Event) -> Result<()> {
        let _context = self.enter(device, "cuEventDestroy")?;
        // "An event may be destroyed before it is complete […]. In this case, the call does not block on completion of
        // the event, and any associated resources will automatically be released asynchronously at completion."
        // SAFETY: a live event (trait Driver).
        unsafe { call!(self.api, cuEventDestroy(cu_event(event))) }
    }

    fn exchange_capture_mode(&self, mode: CaptureMode) -> Result<CaptureMode> {
        let mut mode = capture_mode_to_cuda(mode);
        // "Sets the calling thread's stream capture interaction mode to the value contained in *mode, and overwrites
        // *mode with the previous mode for the thread." Needs no context.
        // SAFETY: `mode` is readable and writable.
        unsafe { call!(self.api, cuThreadExchangeStreamCaptureMode(&raw mut mode)) }?;
        Ok(capture_mode_from_cuda(mode))
    }

    fn ipc_handle(&self, device: DeviceIndex, ptr: DevicePtr) -> Result<IpcHandle> {
        let _context = self.enter(device, "cuIpcGetMemHandle")?;
        let mut handle = CUipcMemHandle { reserved: [0; 64] };
        // "Takes a pointer to the base of an existing device memory allocation created with cuMemAlloc".
        // SAFETY: `handle` is writable; CUDA checks the address.
        unsafe { call!(self.api, cuIpcGetMemHandle(&raw mut handle, ptr.0)) }?;
        Ok(IpcHandle(handle.reserved.map(|byte| byte as u8)))
    }
}

/// A driver library with neither form of a managed-memory call.
fn no_managed_calls(call: &'static str) -> DriverError {
    DriverError {
        kind: ErrorKind::Unavailable,
        call,
        code: -1,
        name: "driver unavailable".to_owned(),
        message: format!("the NVIDIA driver library has neither {call} nor {call}_v2"),
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

    #[test]
    fn capture_modes_survive_the_way_to_cuda_and_back() {
        for mode in [CaptureMode::Global, CaptureMode::ThreadLocal, CaptureMode::Relaxed] {
            assert_eq!(capture_mode_from_cuda(capture_mode_to_cuda(mode)), mode);
        }
        assert_eq!(capture_mode_from_cuda(77), CaptureMode::Global);
    }
}
