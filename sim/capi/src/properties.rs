//! Device properties and attributes, in the layouts of CUDA 12 and 13.
//!
//! What a profile does not say (texture limits, block sizes) is what Hopper answers.
#![allow(non_snake_case)] // CUDA's own field names, so that a reader can search for them.

use std::ffi::{c_char, c_int, c_uint};
use std::mem;

use crate::machine::Chip;

/// `cudaDeviceProp` of CUDA 12.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Properties12 {
    pub name: [c_char; 256],
    pub uuid: [u8; 16],
    pub luid: [c_char; 8],
    pub luidDeviceNodeMask: c_uint,
    pub totalGlobalMem: usize,
    pub sharedMemPerBlock: usize,
    pub regsPerBlock: c_int,
    pub warpSize: c_int,
    pub memPitch: usize,
    pub maxThreadsPerBlock: c_int,
    pub maxThreadsDim: [c_int; 3],
    pub maxGridSize: [c_int; 3],
    pub clockRate: c_int,
    pub totalConstMem: usize,
    pub major: c_int,
    pub minor: c_int,
    pub textureAlignment: usize,
    pub texturePitchAlignment: usize,
    pub deviceOverlap: c_int,
    pub multiProcessorCount: c_int,
    pub kernelExecTimeoutEnabled: c_int,
    pub integrated: c_int,
    pub canMapHostMemory: c_int,
    pub computeMode: c_int,
    pub maxTexture1D: c_int,
    pub maxTexture1DMipmap: c_int,
    pub maxTexture1DLinear: c_int,
    pub maxTexture2D: [c_int; 2],
    pub maxTexture2DMipmap: [c_int; 2],
    pub maxTexture2DLinear: [c_int; 3],
    pub maxTexture2DGather: [c_int; 2],
    pub maxTexture3D: [c_int; 3],
    pub maxTexture3DAlt: [c_int; 3],
    pub maxTextureCubemap: c_int,
    pub maxTexture1DLayered: [c_int; 2],
    pub maxTexture2DLayered: [c_int; 3],
    pub maxTextureCubemapLayered: [c_int; 2],
    pub maxSurface1D: c_int,
    pub maxSurface2D: [c_int; 2],
    pub maxSurface3D: [c_int; 3],
    pub maxSurface1DLayered: [c_int; 2],
    pub maxSurface2DLayered: [c_int; 3],
    pub maxSurfaceCubemap: c_int,
    pub maxSurfaceCubemapLayered: [c_int; 2],
    pub surfaceAlignment: usize,
    pub concurrentKernels: c_int,
    pub ECCEnabled: c_int,
    pub pciBusID: c_int,
    pub pciDeviceID: c_int,
    pub pciDomainID: c_int,
    pub tccDriver: c_int,
    pub asyncEngineCount: c_int,
    pub unifiedAddressing: c_int,
    pub memoryClockRate: c_int,
    pub memoryBusWidth: c_int,
    pub l2CacheSize: c_int,
    pub persistingL2CacheMaxSize: c_int,
    pub maxThreadsPerMultiProcessor: c_int,
    pub streamPrioritiesSupported: c_int,
    pub globalL1CacheSupported: c_int,
    pub localL1CacheSupported: c_int,
    pub sharedMemPerMultiprocessor: usize,
    pub regsPerMultiprocessor: c_int,
    pub managedMemory: c_int,
    pub isMultiGpuBoard: c_int,
    pub multiGpuBoardGroupID: c_int,
    pub hostNativeAtomicSupported: c_int,
    pub singleToDoublePrecisionPerfRatio: c_int,
    pub pageableMemoryAccess: c_int,
    pub concurrentManagedAccess: c_int,
    pub computePreemptionSupported: c_int,
    pub canUseHostPointerForRegisteredMem: c_int,
    pub cooperativeLaunch: c_int,
    pub cooperativeMultiDeviceLaunch: c_int,
    pub sharedMemPerBlockOptin: usize,
    pub pageableMemoryAccessUsesHostPageTables: c_int,
    pub directManagedMemAccessFromHost: c_int,
    pub maxBlocksPerMultiProcessor: c_int,
    pub accessPolicyMaxWindowSize: c_int,
    pub reservedSharedMemPerBlock: usize,
    pub hostRegisterSupported: c_int,
    pub sparseCudaArraySupported: c_int,
    pub hostRegisterReadOnlySupported: c_int,
    pub timelineSemaphoreInteropSupported: c_int,
    pub memoryPoolsSupported: c_int,
    pub gpuDirectRDMASupported: c_int,
    pub gpuDirectRDMAFlushWritesOptions: c_uint,
    pub gpuDirectRDMAWritesOrdering: c_int,
    pub memoryPoolSupportedHandleTypes: c_uint,
    pub deferredMappingCudaArraySupported: c_int,
    pub ipcEventSupported: c_int,
    pub clusterLaunch: c_int,
    pub unifiedFunctionPointers: c_int,
    pub reserved2: [c_int; 2],
    pub reserved1: [c_int; 1],
    pub reserved: [c_int; 60],
}

/// `cudaDeviceProp` of CUDA 13: without what was deprecated, with NUMA facts.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Properties13 {
    pub name: [c_char; 256],
    pub uuid: [u8; 16],
    pub luid: [c_char; 8],
    pub luidDeviceNodeMask: c_uint,
    pub totalGlobalMem: usize,
    pub sharedMemPerBlock: usize,
    pub regsPerBlock: c_int,
    pub warpSize: c_int,
    pub memPitch: usize,
    pub maxThreadsPerBlock: c_int,
    pub maxThreadsDim: [c_int; 3],
    pub maxGridSize: [c_int; 3],
    pub totalConstMem: usize,
    pub major: c_int,
    pub minor: c_int,
    pub textureAlignment: usize,
    pub texturePitchAlignment: usize,
    pub multiProcessorCount: c_int,
    pub integrated: c_int,
    pub canMapHostMemory: c_int,
    pub maxTexture1D: c_int,
    pub maxTexture1DMipmap: c_int,
    pub maxTexture2D: [c_int; 2],
    pub maxTexture2DMipmap: [c_int; 2],
    pub maxTexture2DLinear: [c_int; 3],
    pub maxTexture2DGather: [c_int; 2],
    pub maxTexture3D: [c_int; 3],
    pub maxTexture3DAlt: [c_int; 3],
    pub maxTextureCubemap: c_int,
    pub maxTexture1DLayered: [c_int; 2],
    pub maxTexture2DLayered: [c_int; 3],
    pub maxTextureCubemapLayered: [c_int; 2],
    pub maxSurface1D: c_int,
    pub maxSurface2D: [c_int; 2],
    pub maxSurface3D: [c_int; 3],
    pub maxSurface1DLayered: [c_int; 2],
    pub maxSurface2DLayered: [c_int; 3],
    pub maxSurfaceCubemap: c_int,
    pub maxSurfaceCubemapLayered: [c_int; 2],
    pub surfaceAlignment: usize,
    pub concurrentKernels: c_int,
    pub ECCEnabled: c_int,
    pub pciBusID: c_int,
    pub pciDeviceID: c_int,
    pub pciDomainID: c_int,
    pub tccDriver: c_int,
    pub asyncEngineCount: c_int,
    pub unifiedAddressing: c_int,
    pub memoryBusWidth: c_int,
    pub l2CacheSize: c_int,
    pub persistingL2CacheMaxSize: c_int,
    pub maxThreadsPerMultiProcessor: c_int,
    pub streamPrioritiesSupported: c_int,
    pub globalL1CacheSupported: c_int,
    pub localL1CacheSupported: c_int,
    pub sharedMemPerMultiprocessor: usize,
    pub regsPerMultiprocessor: c_int,
    pub managedMemory: c_int,
    pub isMultiGpuBoard: c_int,
    pub multiGpuBoardGroupID: c_int,
    pub hostNativeAtomicSupported: c_int,
    pub pageableMemoryAccess: c_int,
    pub concurrentManagedAccess: c_int,
    pub computePreemptionSupported: c_int,
    pub canUseHostPointerForRegisteredMem: c_int,
    pub cooperativeLaunch: c_int,
    pub sharedMemPerBlockOptin: usize,
    pub pageableMemoryAccessUsesHostPageTables: c_int,
    pub directManagedMemAccessFromHost: c_int,
    pub maxBlocksPerMultiProcessor: c_int,
    pub accessPolicyMaxWindowSize: c_int,
    pub reservedSharedMemPerBlock: usize,
    pub hostRegisterSupported: c_int,
    pub sparseCudaArraySupported: c_int,
    pub hostRegisterReadOnlySupported: c_int,
    pub timelineSemaphoreInteropSupported: c_int,
    pub memoryPoolsSupported: c_int,
    pub gpuDirectRDMASupported: c_int,
    pub gpuDirectRDMAFlushWritesOptions: c_uint,
    pub gpuDirectRDMAWritesOrdering: c_int,
    pub memoryPoolSupportedHandleTypes: c_uint,
    pub deferredMappingCudaArraySupported: c_int,
    pub ipcEventSupported: c_int,
    pub clusterLaunch: c_int,
    pub unifiedFunctionPointers: c_int,
    pub deviceNumaConfig: c_int,
    pub deviceNumaId: c_int,
    pub mpsEnabled: c_int,
    pub hostNumaId: c_int,
    pub gpuPciDeviceID: c_uint,
    pub gpuPciSubsystemID: c_uint,
    pub hostNumaMultinodeIpcSupported: c_int,
    pub reserved: [c_int; 56],
}

// The sizes that the headers of CUDA 12.4 and 13.0 give.
const _: () = assert!(mem::size_of::<Properties12>() == 1032);
const _: () = assert!(mem::size_of::<Properties13>() == 1008);

/// Fields that both layouts have.
macro_rules! common {
    ($p:ident, $chip:ident) => {
        let name = $chip.profile.device_name.as_bytes();
        for (to, from) in $p.name.iter_mut().take(255).zip(name) {
            *to = *from as c_char;
        }
        $p.uuid = $chip.uuid();
        $p.totalGlobalMem = $chip.profile.device_memory as usize;
        common!(@attributes $p, $chip,
            sharedMemPerBlock = 8, regsPerBlock = 12, warpSize = 10, memPitch = 11, maxThreadsPerBlock = 1,
            totalConstMem = 9, major = 75, minor = 76, textureAlignment = 14, texturePitchAlignment = 51,
            multiProcessorCount = 16, integrated = 18, canMapHostMemory = 19, maxTexture1D = 21, maxTexture1DMipmap = 77,
            maxTextureCubemap = 52, maxSurface1D = 55, maxSurfaceCubemap = 66, surfaceAlignment = 30,
            concurrentKernels = 31, ECCEnabled = 32, pciBusID = 33, pciDeviceID = 34, pciDomainID = 50, tccDriver = 35,
            asyncEngineCount = 40, unifiedAddressing = 41, memoryBusWidth = 37, l2CacheSize = 38,
            persistingL2CacheMaxSize = 108, maxThreadsPerMultiProcessor = 39, streamPrioritiesSupported = 78,
            globalL1CacheSupported = 79, localL1CacheSupported = 80, sharedMemPerMultiprocessor = 81,
            regsPerMultiprocessor = 82, managedMemory = 83, isMultiGpuBoard = 84, multiGpuBoardGroupID = 85,
            hostNativeAtomicSupported = 86, pageableMemoryAccess = 88, concurrentManagedAccess = 89,
            computePreemptionSupported = 90, canUseHostPointerForRegisteredMem = 91, cooperativeLaunch = 95,
            sharedMemPerBlockOptin = 97, pageableMemoryAccessUsesHostPageTables = 100,
            directManagedMemAccessFromHost = 101, maxBlocksPerMultiProcessor = 106, accessPolicyMaxWindowSize = 109,
            reservedSharedMemPerBlock = 111, hostRegisterSupported = 99, sparseCudaArraySupported = 112,
            hostRegisterReadOnlySupported = 113, timelineSemaphoreInteropSupported = 114, memoryPoolsSupported = 115,
            gpuDirectRDMASupported = 116, gpuDirectRDMAFlushWritesOptions = 117, gpuDirectRDMAWritesOrdering = 118,
            memoryPoolSupportedHandleTypes = 119, clusterLaunch = 120, deferredMappingCudaArraySupported = 121,
            ipcEventSupported = 125, unifiedFunctionPointers = 129);
        common!(@lists $p, $chip,
            maxThreadsDim = [2, 3, 4], maxGridSize = [5, 6, 7], maxTexture2D = [22, 23], maxTexture2DMipmap = [73, 74],
            maxTexture2DLinear = [70, 71, 72], maxTexture2DGather = [45, 46], maxTexture3D = [24, 25, 26],
            maxTexture1DLayered = [42, 43], maxTexture2DLayered = [27, 28, 29], maxTextureCubemapLayered = [53, 54],
            maxSurface2D = [56, 57], maxSurface3D = [58, 59, 60], maxSurface1DLayered = [61, 62],
            maxSurface2DLayered = [63, 64, 65], maxSurfaceCubemapLayered = [67, 68]);
    };
    (@attributes $p:ident, $chip:ident, $($field:ident = $number:literal),*) => {
        $( $p.$field = attribute($chip, $number).unwrap_or(0) as _; )*
    };
    (@lists $p:ident, $chip:ident, $($field:ident = [$($number:literal),*]),*) => {
        $( $p.$field = [$(attribute($chip, $number).unwrap_or(0)),*]; )*
    };
}

/// `cudaGetDeviceProperties_v2` of CUDA 12.
pub fn properties12(chip: &Chip) -> Properties12 {
    // SAFETY: integers and arrays of integers, for which zero bytes are a value.
    let mut p: Properties12 = unsafe { mem::zeroed() };
    common!(p, chip);
    common!(@attributes p, chip, clockRate = 13, deviceOverlap = 15, kernelExecTimeoutEnabled = 17, computeMode = 20,
        maxTexture1DLinear = 69, memoryClockRate = 36, singleToDoublePrecisionPerfRatio = 87,
        cooperativeMultiDeviceLaunch = 96);
    p.maxTexture3DAlt = [47, 48, 49].map(|number| attribute(chip, number).unwrap_or(0));
    p
}

/// `cudaGetDeviceProperties` of CUDA 13.
pub fn properties13(chip: &Chip) -> Properties13 {
    // SAFETY: as in `properties12`.
    let mut p: Properties13 = unsafe { mem::zeroed() };
    common!(p, chip);
    common!(@attributes p, chip, deviceNumaConfig = 130, deviceNumaId = 131, mpsEnabled = 133, hostNumaId = 134);
    p
}

/// `cudaDeviceGetAttribute` and `cuDeviceGetAttribute`, which share their numbers; `None` where CUDA has none of it.
pub fn attribute(chip: &Chip, number: c_int) -> Option<c_int> {
    let flag = c_int::from;
    Some(match number {
        1 => 1024,                                             // MaxThreadsPerBlock
        2 | 3 => 1024,                                         // MaxBlockDimX, Y
        4 => 64,                                               // MaxBlockDimZ
        5 => i32::MAX,                                         // MaxGridDimX
        6 | 7 => 65535,                                        // MaxGridDimY, Z
        8 => 48 << 10,                                         // MaxSharedMemoryPerBlock
        9 => 64 << 10,                                         // TotalConstantMemory
        10 => 32,                                              // WarpSize
        11 => i32::MAX,                                        // MaxPitch
        12 | 82 => 65536,                                      // MaxRegistersPerBlock, PerMultiprocessor
        13 => chip.profile.clock_khz,                          // ClockRate
        14 | 30 => 512,                                        // TextureAlignment, SurfaceAlignment
        15 | 19 | 31 | 41 | 78 | 79 | 80 | 90 | 95 | 96 => 1, // overlap, map host, concurrent kernels, UVA, priorities …
        16 => chip.profile.multiprocessors,                   // MultiProcessorCount
        17 | 20 | 35 | 84 | 85 => 0,                          // KernelExecTimeout, ComputeMode, TCC, multi-GPU board
        18 => flag(chip.profile.integrated),                  // Integrated
        21 | 22 | 23 | 42 | 45 | 46 | 69 | 70 | 71 => 131_072, // texture extents, one and two dimensions
        24..=26 | 47..=49 => 16384,                           // texture extents, three dimensions
        27 | 28 | 52 | 53 | 55..=57 | 61 | 63 | 64 | 66 | 67 | 73 | 74 | 77 => 32768,
        58..=60 => 16384,                                    // surface extents, three dimensions
        29 | 43 | 62 | 65 => 2048,                           // layers
        54 | 68 => 2046,                                     // cube map layers
        72 => 2_097_120,                                     // MaxTexture2DLinearPitch
        32 => 1,                                             // EccEnabled
        33 => chip.pci_bus(),                                // PciBusId
        34 | 50 => 0,                                        // PciDeviceId, PciDomainId
        36 => chip.profile.memory_clock_khz,                 // MemoryClockRate
        37 => chip.profile.memory_bus_bits,                  // GlobalMemoryBusWidth
        38 => chip.profile.l2_bytes,                         // L2CacheSize
        39 => chip.profile.threads_per_multiprocessor,       // MaxThreadsPerMultiProcessor
        40 => 3,                                             // AsyncEngineCount
        51 => 32,                                            // TexturePitchAlignment
        75 => chip.profile.compute_capability.0,             // ComputeCapabilityMajor
        76 => chip.profile.compute_capability.1,             // ComputeCapabilityMinor
        81 => chip.profile.shared_memory_per_multiprocessor, // MaxSharedMemoryPerMultiprocessor
        83 => 1,                                             // ManagedMemory
        86 => flag(chip.profile.host_page_tables),           // HostNativeAtomicSupported
        87 => 2,                                             // SingleToDoublePrecisionPerfRatio
        88 => flag(chip.profile.pageable_memory_access),     // PageableMemoryAccess
        89 => flag(chip.profile.concurrent_managed_access),  // ConcurrentManagedAccess
        91 => flag(chip.profile.host_page_tables),           // CanUseHostPointerForRegisteredMem
        97 => chip.profile.shared_memory_per_block_optin,    // MaxSharedMemoryPerBlockOptin
        98 => 0,                                             // CanFlushRemoteWrites
        99 => 1,                                             // HostRegisterSupported
        100 => flag(chip.profile.host_page_tables),          // PageableMemoryAccessUsesHostPageTables
        101 => flag(chip.profile.direct_host_access),        // DirectManagedMemAccessFromHost
        102 => 1,                                            // VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        103 => 1,                                            // HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED
        106 => 32,                                           // MaxBlocksPerMultiprocessor
        108 | 109 => chip.profile.l2_bytes / 2,              // MaxPersistingL2CacheSize, MaxAccessPolicyWindowSize
        111 => 1024,                                         // ReservedSharedMemoryPerBlock
        113 | 114 => 0,                                      // HostRegisterReadOnly, TimelineSemaphoreInterop
        115 => 1,                                            // MemoryPoolsSupported
        116..=118 => 0,                                      // GPUDirect RDMA
        119 => 0,                                            // MemoryPoolSupportedHandleTypes
        120 => flag(chip.profile.compute_capability.0 >= 9), // ClusterLaunch
        125 => 1,                                            // IpcEventSupport
        126 => 4,                                            // MemSyncDomainCount
        129 => 0,                                            // UnifiedFunctionPointers
        130 => 0,                                            // NumaConfig: none
        131 => -1,                                           // NumaId
        132 => 0,                                            // MULTICAST_SUPPORTED
        133 => 0,                                            // MpsEnabled
        134 => chip.profile.host_numa_node.unwrap_or(-1),    // HostNumaId
        141 | 145 => flag(chip.profile.host_chunks),         // HOST_NUMA, HOST_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        44 | 92..=94 | 104 | 105 | 107 | 110 | 112 | 121..=124 | 127 | 128 | 135..=150 => 0,
        _ => return None,
    })
}
