//! Counting calls, and making chosen ones fail.

use crate::error::Code;
use std::collections::BTreeMap;

macro_rules! entry_points {
    ($($variant:ident: $method:literal, $driver:literal, [$($alias:literal),*];)*) => {
        /// An entry point of the machine. Each has three kinds of names: the method's (as in
        /// `torch_uvm::driver::Driver`), the CUDA driver's, and the CUDA runtime's.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum EntryPoint {
            $(#[doc = concat!("`", $method, "`, `", $driver, "`")] $variant),*
        }

        impl EntryPoint {
            /// All of them.
            pub const ALL: &'static [EntryPoint] = &[$(EntryPoint::$variant),*];

            /// The method's name, such as `alloc_managed`.
            #[must_use]
            pub fn method(self) -> &'static str {
                match self { $(EntryPoint::$variant => $method),* }
            }

            /// The CUDA driver's name, such as `cuMemAllocManaged`.
            #[must_use]
            pub fn driver_name(self) -> &'static str {
                match self { $(EntryPoint::$variant => $driver),* }
            }

            /// CUDA's names, the driver's first. Calls of each are counted as this entry point's.
            #[must_use]
            pub fn cuda_names(self) -> &'static [&'static str] {
                match self { $(EntryPoint::$variant => &[$driver $(, $alias)*]),* }
            }

            /// The entry point of any of its names.
            #[must_use]
            pub fn parse(name: &str) -> Option<EntryPoint> {
                match name { $($method | $driver $(| $alias)* => Some(EntryPoint::$variant),)* _ => None }
            }
        }
    };
}

entry_points! {
    DeviceCount: "device_count", "cuDeviceGetCount", ["cudaGetDeviceCount"];
    DeviceInfo: "device_info", "cuDeviceGetAttribute",
        ["cudaDeviceGetAttribute", "cudaGetDeviceProperties", "cudaGetDeviceProperties_v2"];
    DeviceMemory: "device_memory", "cuMemGetInfo", ["cuMemGetInfo_v2", "cudaMemGetInfo"];
    HostMemory: "host_memory", "/proc/meminfo", ["meminfo"];
    AllocManaged: "alloc_managed", "cuMemAllocManaged", ["cudaMallocManaged"];
    AllocDevice: "alloc_device", "cuMemAlloc", ["cuMemAlloc_v2", "cudaMalloc"];
    Free: "free", "cuMemFree", ["cuMemFree_v2", "cudaFree"];
    Advise: "advise", "cuMemAdvise", ["cuMemAdvise_v2", "cudaMemAdvise", "cudaMemAdvise_v2"];
    Prefetch: "prefetch", "cuMemPrefetchAsync",
        ["cuMemPrefetchAsync_v2", "cudaMemPrefetchAsync", "cudaMemPrefetchAsync_v2"];
    Discard: "discard", "cuMemDiscardBatchAsync", ["cudaMemDiscardBatchAsync"];
    DiscardAndPrefetch: "discard_and_prefetch", "cuMemDiscardAndPrefetchBatchAsync",
        ["cudaMemDiscardAndPrefetchBatchAsync"];
    RangeAttribute: "range_attribute", "cuMemRangeGetAttribute", ["cudaMemRangeGetAttribute"];
    PointerInfo: "pointer_info", "cuPointerGetAttribute", ["cuPointerGetAttributes", "cudaPointerGetAttributes"];
    AddressRange: "address_range", "cuMemGetAddressRange", ["cuMemGetAddressRange_v2"];
    HostAlloc: "host_alloc", "cuMemHostAlloc", ["cudaHostAlloc", "cudaMallocHost"];
    HostFree: "host_free", "cuMemFreeHost", ["cudaFreeHost"];
    HostRegister: "host_register", "cuMemHostRegister", ["cuMemHostRegister_v2", "cudaHostRegister"];
    HostUnregister: "host_unregister", "cuMemHostUnregister", ["cudaHostUnregister"];
    Memcpy: "memcpy", "cuMemcpy", ["cudaMemcpy", "cuMemcpyDtoH_v2", "cuMemcpyHtoD_v2", "cuMemcpyDtoD_v2"];
    MemcpyAsync: "memcpy_async", "cuMemcpyAsync",
        ["cudaMemcpyAsync", "cudaMemcpyPeerAsync", "cuMemcpyDtoHAsync_v2", "cuMemcpyHtoDAsync_v2",
         "cuMemcpyDtoDAsync_v2", "cudaMemcpy2DAsync"];
    Memset: "memset", "cuMemsetD8", ["cuMemsetD8_v2", "cuMemsetD16_v2", "cuMemsetD32_v2", "cudaMemset"];
    MemsetAsync: "memset_async", "cuMemsetD8Async", ["cuMemsetD16Async", "cuMemsetD32Async", "cudaMemsetAsync"];
    LaunchKernel: "launch_kernel", "cuLaunchKernel", ["cudaLaunchKernel", "cudaLaunchKernelExC"];
    LaunchHostFunc: "launch_host_func", "cuLaunchHostFunc", ["cudaLaunchHostFunc", "cudaStreamAddCallback"];
    StreamCreate: "stream_create", "cuStreamCreateWithPriority",
        ["cuStreamCreate", "cudaStreamCreate", "cudaStreamCreateWithFlags", "cudaStreamCreateWithPriority"];
    StreamDestroy: "stream_destroy", "cuStreamDestroy", ["cuStreamDestroy_v2", "cudaStreamDestroy"];
    StreamSynchronize: "stream_synchronize", "cuStreamSynchronize", ["cudaStreamSynchronize"];
    StreamQuery: "stream_query", "cuStreamQuery", ["cudaStreamQuery"];
    StreamWaitEvent: "stream_wait_event", "cuStreamWaitEvent", ["cudaStreamWaitEvent"];
    StreamIsCapturing: "stream_is_capturing", "cuStreamIsCapturing", ["cudaStreamIsCapturing"];
    StreamInfo: "stream_info", "cuStreamGetFlags",
        ["cuStreamGetPriority", "cudaStreamGetFlags", "cudaStreamGetPriority", "cudaStreamGetDevice"];
    DeviceSynchronize: "device_synchronize", "cuCtxSynchronize", ["cudaDeviceSynchronize"];
    EventCreate: "event_create", "cuEventCreate", ["cudaEventCreate", "cudaEventCreateWithFlags"];
    EventRecord: "event_record", "cuEventRecord", ["cuEventRecordWithFlags", "cudaEventRecord", "cudaEventRecordWithFlags"];
    EventQuery: "event_query", "cuEventQuery", ["cudaEventQuery"];
    EventSynchronize: "event_synchronize", "cuEventSynchronize", ["cudaEventSynchronize"];
    EventElapsed: "event_elapsed", "cuEventElapsedTime", ["cudaEventElapsedTime"];
    EventDestroy: "event_destroy", "cuEventDestroy", ["cuEventDestroy_v2", "cudaEventDestroy"];
    ExchangeCaptureMode: "exchange_capture_mode", "cuThreadExchangeStreamCaptureMode",
        ["cudaThreadExchangeStreamCaptureMode"];
    BeginCapture: "begin_capture", "cuStreamBeginCapture", ["cuStreamBeginCapture_v2", "cudaStreamBeginCapture"];
    EndCapture: "end_capture", "cuStreamEndCapture", ["cudaStreamEndCapture"];
    CaptureInfo: "capture_info", "cuStreamGetCaptureInfo",
        ["cuStreamGetCaptureInfo_v2", "cudaStreamGetCaptureInfo", "cudaStreamGetCaptureInfo_v2"];
    UpdateCaptureDependencies: "update_capture_dependencies", "cuStreamUpdateCaptureDependencies",
        ["cudaStreamUpdateCaptureDependencies"];
    GraphCreate: "graph_create", "cuGraphCreate", ["cudaGraphCreate"];
    GraphDestroy: "graph_destroy", "cuGraphDestroy", ["cudaGraphDestroy"];
    GraphNodes: "graph_nodes", "cuGraphGetNodes", ["cudaGraphGetNodes"];
    GraphInstantiate: "graph_instantiate", "cuGraphInstantiate",
        ["cuGraphInstantiateWithFlags", "cudaGraphInstantiate", "cudaGraphInstantiateWithFlags"];
    GraphExecDestroy: "graph_exec_destroy", "cuGraphExecDestroy", ["cudaGraphExecDestroy"];
    GraphLaunch: "graph_launch", "cuGraphLaunch", ["cudaGraphLaunch"];
    IpcHandle: "ipc_handle", "cuIpcGetMemHandle", ["cudaIpcGetMemHandle"];
    IpcOpen: "ipc_open", "cuIpcOpenMemHandle", ["cuIpcOpenMemHandle_v2", "cudaIpcOpenMemHandle"];
    IpcClose: "ipc_close", "cuIpcCloseMemHandle", ["cudaIpcCloseMemHandle"];
    ChunkGranularity: "chunk_granularity", "cuMemGetAllocationGranularity", [];
    AddressReserve: "address_reserve", "cuMemAddressReserve", [];
    AddressFree: "address_free", "cuMemAddressFree", [];
    ChunkCreate: "chunk_create", "cuMemCreate", [];
    ChunkRelease: "chunk_release", "cuMemRelease", [];
    ChunkRetain: "chunk_retain", "cuMemRetainAllocationHandle", [];
    ChunkInfo: "chunk_info", "cuMemGetAllocationPropertiesFromHandle", [];
    ChunkExport: "chunk_export", "cuMemExportToShareableHandle", [];
    ChunkImport: "chunk_import", "cuMemImportFromShareableHandle", [];
    ChunkMap: "chunk_map", "cuMemMap", [];
    ChunkUnmap: "chunk_unmap", "cuMemUnmap", [];
    SetAccess: "set_access", "cuMemSetAccess", [];
    GetAccess: "get_access", "cuMemGetAccess", [];
    CanAccessPeer: "can_access_peer", "cuDeviceCanAccessPeer", ["cudaDeviceCanAccessPeer"];
    EnablePeer: "enable_peer", "cuCtxEnablePeerAccess", ["cudaDeviceEnablePeerAccess"];
    DisablePeer: "disable_peer", "cuCtxDisablePeerAccess", ["cudaDeviceDisablePeerAccess"];
}

/// Which calls a [`Fault`] hits. Calls are counted from 1, from the moment the fault is planted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Which {
    /// The n-th call from now, once.
    Nth(u64),
    /// The n-th call from now and all after it.
    From(u64),
    /// All of them.
    Every,
}

/// A planted failure. A call that fails by it has changed nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// The entry point; `None` for any.
    pub call: Option<EntryPoint>,
    /// Which of its calls.
    pub which: Which,
    /// The error to give.
    pub code: Code,
}

/// The planted faults and the counts.
#[derive(Default)]
pub(crate) struct Faults {
    counts: BTreeMap<EntryPoint, u64>,
    planted: Vec<(Fault, u64)>,
    hits: u64,
}

impl Faults {
    /// Counts a call; `Some` if it must fail.
    pub fn on_call(&mut self, call: EntryPoint) -> Option<Code> {
        *self.counts.entry(call).or_insert(0) += 1;
        if self.planted.is_empty() {
            return None;
        }
        let mut hit = None;
        for (fault, seen) in &mut self.planted {
            if fault.call.is_some_and(|wanted| wanted != call) {
                continue;
            }
            *seen += 1;
            let struck = match fault.which {
                Which::Nth(n) => *seen == n,
                Which::From(n) => *seen >= n,
                Which::Every => true,
            };
            if struck && hit.is_none() {
                hit = Some(fault.code);
            }
        }
        self.planted.retain(|(fault, seen)| !matches!(fault.which, Which::Nth(n) if *seen >= n));
        self.hits += u64::from(hit.is_some());
        hit
    }

    pub fn plant(&mut self, fault: Fault) {
        self.planted.push((fault, 0));
    }

    pub fn clear(&mut self) {
        self.planted.clear();
    }

    pub fn reset_counts(&mut self) {
        self.counts.clear();
        self.hits = 0;
    }

    pub fn counts(&self) -> BTreeMap<EntryPoint, u64> {
        self.counts.clone()
    }

    pub fn hits(&self) -> u64 {
        self.hits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_leads_back_to_its_entry_point() {
        for &call in EntryPoint::ALL {
            assert_eq!(EntryPoint::parse(call.method()), Some(call));
            assert_eq!(EntryPoint::parse(call.driver_name()), Some(call));
        }
        assert_eq!(EntryPoint::parse("cudaMallocManaged"), Some(EntryPoint::AllocManaged));
        assert_eq!(EntryPoint::parse("cudaMallocMango"), None);
    }

    #[test]
    fn the_nth_call_fails_once() {
        let mut faults = Faults::default();
        faults.plant(Fault { call: Some(EntryPoint::Free), which: Which::Nth(2), code: Code::UNKNOWN });
        assert_eq!(faults.on_call(EntryPoint::Free), None);
        assert_eq!(faults.on_call(EntryPoint::AllocDevice), None);
        assert_eq!(faults.on_call(EntryPoint::Free), Some(Code::UNKNOWN));
        assert_eq!(faults.on_call(EntryPoint::Free), None);
        assert_eq!((faults.hits(), faults.counts()[&EntryPoint::Free]), (1, 3));
    }
}
