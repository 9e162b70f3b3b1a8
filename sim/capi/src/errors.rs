//! Error numbers, their names and their texts.
//!
//! The runtime and the driver share their numbers (since CUDA 10.1); only the names differ.

use std::ffi::{CStr, c_char, c_int};

/// An error number as both APIs return it: `cudaError_t` and `CUresult`.
pub type Code = c_int;

/// The numbers that this library itself returns.
pub mod code {
    use super::Code;

    pub const SUCCESS: Code = 0;
    pub const INVALID_VALUE: Code = 1;
    pub const OUT_OF_MEMORY: Code = 2;
    pub const NOT_INITIALIZED: Code = 3;
    pub const NO_DEVICE: Code = 100;
    pub const INVALID_DEVICE: Code = 101;
    pub const INVALID_CONTEXT: Code = 201;
    pub const OPERATING_SYSTEM: Code = 304;
    pub const INVALID_HANDLE: Code = 400;
    pub const INVALID_PITCH: Code = 12;
    pub const INVALID_SYMBOL: Code = 13;
    pub const INVALID_MEMCPY_DIRECTION: Code = 21;
    pub const NOT_FOUND: Code = 500;
    pub const NOT_READY: Code = 600;
    pub const NOT_SUPPORTED: Code = 801;
    pub const UNSUPPORTED_LIMIT: Code = 215;
    pub const INVALID_DEVICE_FUNCTION: Code = 98;
    pub const MISSING_CONFIGURATION: Code = 52;
    pub const UNKNOWN: Code = 999;
}

struct Entry {
    code: Code,
    runtime: &'static CStr,
    /// Empty where the driver has no such error.
    driver: &'static CStr,
    text: &'static CStr,
}

const fn entry(code: Code, runtime: &'static CStr, driver: &'static CStr, text: &'static CStr) -> Entry {
    Entry { code, runtime, driver, text }
}

/// Every error that CUDA knows, by rising number.
#[rustfmt::skip]
static ERRORS: &[Entry] = &[
    entry(0, c"cudaSuccess", c"CUDA_SUCCESS", c"no error"),
    entry(1, c"cudaErrorInvalidValue", c"CUDA_ERROR_INVALID_VALUE", c"invalid argument"),
    entry(2, c"cudaErrorMemoryAllocation", c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory"),
    entry(3, c"cudaErrorInitializationError", c"CUDA_ERROR_NOT_INITIALIZED", c"initialization error"),
    entry(4, c"cudaErrorCudartUnloading", c"CUDA_ERROR_DEINITIALIZED", c"driver shutting down"),
    entry(5, c"cudaErrorProfilerDisabled", c"CUDA_ERROR_PROFILER_DISABLED", c"profiler disabled while using external profiling tool"),
    entry(6, c"cudaErrorProfilerNotInitialized", c"CUDA_ERROR_PROFILER_NOT_INITIALIZED", c"profiler not initialized: call cudaProfilerInitialize()"),
    entry(7, c"cudaErrorProfilerAlreadyStarted", c"CUDA_ERROR_PROFILER_ALREADY_STARTED", c"profiler already started"),
    entry(8, c"cudaErrorProfilerAlreadyStopped", c"CUDA_ERROR_PROFILER_ALREADY_STOPPED", c"profiler already stopped"),
    entry(9, c"cudaErrorInvalidConfiguration", c"", c"invalid configuration argument"),
    entry(12, c"cudaErrorInvalidPitchValue", c"", c"invalid pitch argument"),
    entry(13, c"cudaErrorInvalidSymbol", c"", c"invalid device symbol"),
    entry(16, c"cudaErrorInvalidHostPointer", c"", c"invalid host pointer"),
    entry(17, c"cudaErrorInvalidDevicePointer", c"", c"invalid device pointer"),
    entry(18, c"cudaErrorInvalidTexture", c"", c"invalid texture reference"),
    entry(19, c"cudaErrorInvalidTextureBinding", c"", c"texture is not bound to a pointer"),
    entry(20, c"cudaErrorInvalidChannelDescriptor", c"", c"invalid channel descriptor"),
    entry(21, c"cudaErrorInvalidMemcpyDirection", c"", c"invalid copy direction for memcpy"),
    entry(22, c"cudaErrorAddressOfConstant", c"", c"invalid address of constant"),
    entry(23, c"cudaErrorTextureFetchFailed", c"", c"fetch from texture failed"),
    entry(24, c"cudaErrorTextureNotBound", c"", c"cannot fetch from a texture that is not bound"),
    entry(25, c"cudaErrorSynchronizationError", c"", c"incorrect use of __syncthreads()"),
    entry(26, c"cudaErrorInvalidFilterSetting", c"", c"linear filtering not supported for non-float type"),
    entry(27, c"cudaErrorInvalidNormSetting", c"", c"read as normalized float not supported for 32-bit non float type"),
    entry(28, c"cudaErrorMixedDeviceExecution", c"", c"device emulation mode and device execution mode cannot be mixed"),
    entry(31, c"cudaErrorNotYetImplemented", c"", c"feature not yet implemented"),
    entry(32, c"cudaErrorMemoryValueTooLarge", c"", c"memory size or pointer value too large to fit in 32 bit"),
    entry(34, c"cudaErrorStubLibrary", c"CUDA_ERROR_STUB_LIBRARY", c"CUDA driver is a stub library"),
    entry(35, c"cudaErrorInsufficientDriver", c"", c"CUDA driver version is insufficient for CUDA runtime version"),
    entry(36, c"cudaErrorCallRequiresNewerDriver", c"", c"API call is not supported in the installed CUDA driver"),
    entry(37, c"cudaErrorInvalidSurface", c"", c"invalid surface reference"),
    entry(43, c"cudaErrorDuplicateVariableName", c"", c"duplicate global variable looked up by string name"),
    entry(44, c"cudaErrorDuplicateTextureName", c"", c"duplicate texture looked up by string name"),
    entry(45, c"cudaErrorDuplicateSurfaceName", c"", c"duplicate surface looked up by string name"),
    entry(46, c"cudaErrorDevicesUnavailable", c"CUDA_ERROR_DEVICE_UNAVAILABLE", c"CUDA-capable device(s) is/are busy or unavailable"),
    entry(49, c"cudaErrorIncompatibleDriverContext", c"", c"incompatible driver context"),
    entry(52, c"cudaErrorMissingConfiguration", c"", c"__global__ function call is not configured"),
    entry(53, c"cudaErrorPriorLaunchFailure", c"", c"unspecified launch failure in prior launch"),
    entry(65, c"cudaErrorLaunchMaxDepthExceeded", c"", c"launch would exceed maximum depth of nested launches"),
    entry(66, c"cudaErrorLaunchFileScopedTex", c"", c"launch failed because kernel uses unsupported, file-scoped textures (texture objects are supported)"),
    entry(67, c"cudaErrorLaunchFileScopedSurf", c"", c"launch failed because kernel uses unsupported, file-scoped surfaces (surface objects are supported)"),
    entry(68, c"cudaErrorSyncDepthExceeded", c"", c"cudaDeviceSynchronize failed because caller's grid depth exceeds cudaLimitDevRuntimeSyncDepth"),
    entry(69, c"cudaErrorLaunchPendingCountExceeded", c"", c"launch failed because launch would exceed cudaLimitDevRuntimePendingLaunchCount"),
    entry(98, c"cudaErrorInvalidDeviceFunction", c"", c"invalid device function"),
    entry(100, c"cudaErrorNoDevice", c"CUDA_ERROR_NO_DEVICE", c"no CUDA-capable device is detected"),
    entry(101, c"cudaErrorInvalidDevice", c"CUDA_ERROR_INVALID_DEVICE", c"invalid device ordinal"),
    entry(102, c"cudaErrorDeviceNotLicensed", c"CUDA_ERROR_DEVICE_NOT_LICENSED", c"device doesn't have valid Grid license"),
    entry(103, c"cudaErrorSoftwareValidityNotEstablished", c"", c"integrity checks failed"),
    entry(127, c"cudaErrorStartupFailure", c"", c"startup failure in cuda runtime"),
    entry(200, c"cudaErrorInvalidKernelImage", c"CUDA_ERROR_INVALID_IMAGE", c"device kernel image is invalid"),
    entry(201, c"cudaErrorDeviceUninitialized", c"CUDA_ERROR_INVALID_CONTEXT", c"invalid device context"),
    entry(205, c"cudaErrorMapBufferObjectFailed", c"CUDA_ERROR_MAP_FAILED", c"mapping of buffer object failed"),
    entry(206, c"cudaErrorUnmapBufferObjectFailed", c"CUDA_ERROR_UNMAP_FAILED", c"unmapping of buffer object failed"),
    entry(207, c"cudaErrorArrayIsMapped", c"CUDA_ERROR_ARRAY_IS_MAPPED", c"array is mapped"),
    entry(208, c"cudaErrorAlreadyMapped", c"CUDA_ERROR_ALREADY_MAPPED", c"resource already mapped"),
    entry(209, c"cudaErrorNoKernelImageForDevice", c"CUDA_ERROR_NO_BINARY_FOR_GPU", c"no kernel image is available for execution on the device"),
    entry(210, c"cudaErrorAlreadyAcquired", c"CUDA_ERROR_ALREADY_ACQUIRED", c"resource already acquired"),
    entry(211, c"cudaErrorNotMapped", c"CUDA_ERROR_NOT_MAPPED", c"resource not mapped"),
    entry(212, c"cudaErrorNotMappedAsArray", c"CUDA_ERROR_NOT_MAPPED_AS_ARRAY", c"resource not mapped as array"),
    entry(213, c"cudaErrorNotMappedAsPointer", c"CUDA_ERROR_NOT_MAPPED_AS_POINTER", c"resource not mapped as pointer"),
    entry(214, c"cudaErrorECCUncorrectable", c"CUDA_ERROR_ECC_UNCORRECTABLE", c"uncorrectable ECC error encountered"),
    entry(215, c"cudaErrorUnsupportedLimit", c"CUDA_ERROR_UNSUPPORTED_LIMIT", c"limit is not supported on this architecture"),
    entry(216, c"cudaErrorDeviceAlreadyInUse", c"CUDA_ERROR_CONTEXT_ALREADY_IN_USE", c"exclusive-thread device already in use by a different thread"),
    entry(217, c"cudaErrorPeerAccessUnsupported", c"CUDA_ERROR_PEER_ACCESS_UNSUPPORTED", c"peer access is not supported between these two devices"),
    entry(218, c"cudaErrorInvalidPtx", c"CUDA_ERROR_INVALID_PTX", c"a PTX JIT compilation failed"),
    entry(219, c"cudaErrorInvalidGraphicsContext", c"CUDA_ERROR_INVALID_GRAPHICS_CONTEXT", c"invalid OpenGL or DirectX context"),
    entry(220, c"cudaErrorNvlinkUncorrectable", c"CUDA_ERROR_NVLINK_UNCORRECTABLE", c"uncorrectable NVLink error detected during the execution"),
    entry(221, c"cudaErrorJitCompilerNotFound", c"CUDA_ERROR_JIT_COMPILER_NOT_FOUND", c"PTX JIT compiler library not found"),
    entry(222, c"cudaErrorUnsupportedPtxVersion", c"CUDA_ERROR_UNSUPPORTED_PTX_VERSION", c"the provided PTX was compiled with an unsupported toolchain."),
    entry(223, c"cudaErrorJitCompilationDisabled", c"CUDA_ERROR_JIT_COMPILATION_DISABLED", c"PTX JIT compilation was disabled"),
    entry(224, c"cudaErrorUnsupportedExecAffinity", c"CUDA_ERROR_UNSUPPORTED_EXEC_AFFINITY", c"the provided execution affinity is not supported"),
    entry(225, c"cudaErrorUnsupportedDevSideSync", c"CUDA_ERROR_UNSUPPORTED_DEVSIDE_SYNC", c"the provided PTX contains unsupported call to cudaDeviceSynchronize"),
    entry(300, c"cudaErrorInvalidSource", c"CUDA_ERROR_INVALID_SOURCE", c"device kernel image is invalid"),
    entry(301, c"cudaErrorFileNotFound", c"CUDA_ERROR_FILE_NOT_FOUND", c"file not found"),
    entry(302, c"cudaErrorSharedObjectSymbolNotFound", c"CUDA_ERROR_SHARED_OBJECT_SYMBOL_NOT_FOUND", c"shared object symbol not found"),
    entry(303, c"cudaErrorSharedObjectInitFailed", c"CUDA_ERROR_SHARED_OBJECT_INIT_FAILED", c"shared object initialization failed"),
    entry(304, c"cudaErrorOperatingSystem", c"CUDA_ERROR_OPERATING_SYSTEM", c"OS call failed or operation not supported on this OS"),
    entry(400, c"cudaErrorInvalidResourceHandle", c"CUDA_ERROR_INVALID_HANDLE", c"invalid resource handle"),
    entry(401, c"cudaErrorIllegalState", c"CUDA_ERROR_ILLEGAL_STATE", c"the operation cannot be performed in the present state"),
    entry(402, c"cudaErrorLossyQuery", c"CUDA_ERROR_LOSSY_QUERY", c"attempted introspection would be semantically lossy"),
    entry(500, c"cudaErrorSymbolNotFound", c"CUDA_ERROR_NOT_FOUND", c"named symbol not found"),
    entry(600, c"cudaErrorNotReady", c"CUDA_ERROR_NOT_READY", c"device not ready"),
    entry(700, c"cudaErrorIllegalAddress", c"CUDA_ERROR_ILLEGAL_ADDRESS", c"an illegal memory access was encountered"),
    entry(701, c"cudaErrorLaunchOutOfResources", c"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", c"too many resources requested for launch"),
    entry(702, c"cudaErrorLaunchTimeout", c"CUDA_ERROR_LAUNCH_TIMEOUT", c"the launch timed out and was terminated"),
    entry(703, c"cudaErrorLaunchIncompatibleTexturing", c"CUDA_ERROR_LAUNCH_INCOMPATIBLE_TEXTURING", c"launch uses incompatible texturing mode"),
    entry(704, c"cudaErrorPeerAccessAlreadyEnabled", c"CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED", c"peer access is already enabled"),
    entry(705, c"cudaErrorPeerAccessNotEnabled", c"CUDA_ERROR_PEER_ACCESS_NOT_ENABLED", c"peer access has not been enabled"),
    entry(708, c"cudaErrorSetOnActiveProcess", c"CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE", c"cannot set while device is active in this process"),
    entry(709, c"cudaErrorContextIsDestroyed", c"CUDA_ERROR_CONTEXT_IS_DESTROYED", c"context is destroyed"),
    entry(710, c"cudaErrorAssert", c"CUDA_ERROR_ASSERT", c"device-side assert triggered"),
    entry(711, c"cudaErrorTooManyPeers", c"CUDA_ERROR_TOO_MANY_PEERS", c"peer mapping resources exhausted"),
    entry(712, c"cudaErrorHostMemoryAlreadyRegistered", c"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", c"part or all of the requested memory range is already mapped"),
    entry(713, c"cudaErrorHostMemoryNotRegistered", c"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", c"pointer does not correspond to a registered memory region"),
    entry(714, c"cudaErrorHardwareStackError", c"CUDA_ERROR_HARDWARE_STACK_ERROR", c"hardware stack error"),
    entry(715, c"cudaErrorIllegalInstruction", c"CUDA_ERROR_ILLEGAL_INSTRUCTION", c"an illegal instruction was encountered"),
    entry(716, c"cudaErrorMisalignedAddress", c"CUDA_ERROR_MISALIGNED_ADDRESS", c"misaligned address"),
    entry(717, c"cudaErrorInvalidAddressSpace", c"CUDA_ERROR_INVALID_ADDRESS_SPACE", c"operation not supported on global/shared address space"),
    entry(718, c"cudaErrorInvalidPc", c"CUDA_ERROR_INVALID_PC", c"invalid program counter"),
    entry(719, c"cudaErrorLaunchFailure", c"CUDA_ERROR_LAUNCH_FAILED", c"unspecified launch failure"),
    entry(720, c"cudaErrorCooperativeLaunchTooLarge", c"CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE", c"too many blocks in cooperative launch"),
    entry(800, c"cudaErrorNotPermitted", c"CUDA_ERROR_NOT_PERMITTED", c"operation not permitted"),
    entry(801, c"cudaErrorNotSupported", c"CUDA_ERROR_NOT_SUPPORTED", c"operation not supported"),
    entry(802, c"cudaErrorSystemNotReady", c"CUDA_ERROR_SYSTEM_NOT_READY", c"system not yet initialized"),
    entry(803, c"cudaErrorSystemDriverMismatch", c"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", c"system has unsupported display driver / cuda driver combination"),
    entry(804, c"cudaErrorCompatNotSupportedOnDevice", c"CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE", c"forward compatibility was attempted on non supported HW"),
    entry(805, c"cudaErrorMpsConnectionFailed", c"CUDA_ERROR_MPS_CONNECTION_FAILED", c"MPS client failed to connect to the MPS control daemon or the MPS server"),
    entry(806, c"cudaErrorMpsRpcFailure", c"CUDA_ERROR_MPS_RPC_FAILURE", c"the remote procedural call between the MPS server and the MPS client failed"),
    entry(807, c"cudaErrorMpsServerNotReady", c"CUDA_ERROR_MPS_SERVER_NOT_READY", c"MPS server is not ready to accept new MPS client requests"),
    entry(808, c"cudaErrorMpsMaxClientsReached", c"CUDA_ERROR_MPS_MAX_CLIENTS_REACHED", c"the hardware resources required to create MPS client have been exhausted"),
    entry(809, c"cudaErrorMpsMaxConnectionsReached", c"CUDA_ERROR_MPS_MAX_CONNECTIONS_REACHED", c"the hardware resources required to support device connections have been exhausted"),
    entry(810, c"cudaErrorMpsClientTerminated", c"CUDA_ERROR_MPS_CLIENT_TERMINATED", c"the MPS client has been terminated by the server"),
    entry(811, c"cudaErrorCdpNotSupported", c"CUDA_ERROR_CDP_NOT_SUPPORTED", c"is using CUDA Dynamic Parallelism, but the current configuration, like MPS, does not support it"),
    entry(812, c"cudaErrorCdpVersionMismatch", c"CUDA_ERROR_CDP_VERSION_MISMATCH", c"unsupported interaction between different versions of CUDA Dynamic Parallelism"),
    entry(900, c"cudaErrorStreamCaptureUnsupported", c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", c"operation not permitted when stream is capturing"),
    entry(901, c"cudaErrorStreamCaptureInvalidated", c"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", c"operation failed due to a previous error during capture"),
    entry(902, c"cudaErrorStreamCaptureMerge", c"CUDA_ERROR_STREAM_CAPTURE_MERGE", c"operation would result in a merge of separate capture sequences"),
    entry(903, c"cudaErrorStreamCaptureUnmatched", c"CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", c"capture was not ended in the same stream as it began"),
    entry(904, c"cudaErrorStreamCaptureUnjoined", c"CUDA_ERROR_STREAM_CAPTURE_UNJOINED", c"capturing stream has unjoined work"),
    entry(905, c"cudaErrorStreamCaptureIsolation", c"CUDA_ERROR_STREAM_CAPTURE_ISOLATION", c"dependency created on uncaptured work in another stream"),
    entry(906, c"cudaErrorStreamCaptureImplicit", c"CUDA_ERROR_STREAM_CAPTURE_IMPLICIT", c"operation would make the legacy stream depend on a capturing blocking stream"),
    entry(907, c"cudaErrorCapturedEvent", c"CUDA_ERROR_CAPTURED_EVENT", c"operation not permitted on an event last recorded in a capturing stream"),
    entry(908, c"cudaErrorStreamCaptureWrongThread", c"CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD", c"attempt to terminate a thread-local capture sequence from another thread"),
    entry(909, c"cudaErrorTimeout", c"CUDA_ERROR_TIMEOUT", c"wait operation timed out"),
    entry(910, c"cudaErrorGraphExecUpdateFailure", c"CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE", c"the graph update was not performed because it included changes which violated constraints specific to instantiated graph update"),
    entry(911, c"cudaErrorExternalDevice", c"CUDA_ERROR_EXTERNAL_DEVICE", c"an async error has occured in external entity outside of CUDA"),
    entry(912, c"cudaErrorInvalidClusterSize", c"CUDA_ERROR_INVALID_CLUSTER_SIZE", c"a kernel launch error has occurred due to cluster misconfiguration"),
    entry(999, c"cudaErrorUnknown", c"CUDA_ERROR_UNKNOWN", c"unknown error"),
];

fn find(code: Code) -> Option<&'static Entry> {
    ERRORS.binary_search_by_key(&code, |entry| entry.code).ok().map(|index| &ERRORS[index])
}

/// `cudaGetErrorName`.
pub fn runtime_name(code: Code) -> *const c_char {
    find(code).map_or(c"unrecognized error code", |entry| entry.runtime).as_ptr()
}

/// `cudaGetErrorString`.
pub fn runtime_text(code: Code) -> *const c_char {
    find(code).map_or(c"unrecognized error code", |entry| entry.text).as_ptr()
}

/// `cuGetErrorName`; `None` where the driver has no such error.
pub fn driver_name(code: Code) -> Option<*const c_char> {
    find(code).filter(|entry| !entry.driver.is_empty()).map(|entry| entry.driver.as_ptr())
}

/// `cuGetErrorString`; `None` where the driver has no such error.
pub fn driver_text(code: Code) -> Option<*const c_char> {
    find(code).filter(|entry| !entry.driver.is_empty()).map(|entry| entry.text.as_ptr())
}
