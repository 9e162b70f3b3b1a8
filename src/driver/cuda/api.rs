//! The entry points of the CUDA driver library that the allocator uses, looked up at run time.
//!
//! The types are cudarc's bindings (`cudarc::driver::sys`); the functions are looked up here, for three reasons.
//! cudarc's own loader panics where the library or a symbol is missing, and a user without a driver must get an
//! error. It tries `libcuda.so` first, while the runtime library under PyTorch opens `libcuda.so.1`: two different
//! files where the toolkit's stub or a simulated device is on the path. And its functions return an enum, so that a
//! `CUresult` which a newer driver invented would be undefined behaviour; here it is a number.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::mem::ManuallyDrop;

use cudarc::driver::sys::{
    CUcontext, CUdevice, CUdevice_attribute, CUdeviceptr, CUevent, CUipcMemHandle, CUmem_advise, CUmemAccessDesc,
    CUmemAllocationProp, CUmemGenericAllocationHandle, CUmemLocation, CUresult, CUstream,
};
use libloading::Library;

use crate::driver::{DriverError, ErrorKind, Result};

/// What the CUDA runtime opens, and PyTorch: the driver's own name, never the toolkit's stub.
const LIBRARY: &str = "libcuda.so.1";

/// `CUDA_SUCCESS`.
const SUCCESS: c_uint = CUresult::CUDA_SUCCESS as c_uint;

/// Declares [`Api`]: a field per entry point, named as the manual names the call, with the symbol behind it (the
/// manual's names are macros for the newest `_v2` form). Entry points after `optional` may be missing.
macro_rules! entry_points {
    (
        required { $($name:ident = $symbol:literal ($($arg:ty),* $(,)?);)* }
        optional { $($opt_name:ident = $opt_symbol:literal ($($opt_arg:ty),* $(,)?);)* }
    ) => {
        /// The driver library with its entry points. Calling one is `unsafe`: pointers must be valid for what the
        /// manual says the call writes; handles that CUDA checks itself may be anything.
        #[allow(non_snake_case)]
        pub(super) struct Api {
            $(pub(super) $name: unsafe extern "C" fn($($arg),*) -> c_uint,)*
            $(pub(super) $opt_name: Option<unsafe extern "C" fn($($opt_arg),*) -> c_uint>,)*
            /// Never unloaded: the driver has threads and exit handlers of its own, and other users in this process.
            _library: ManuallyDrop<Library>,
        }

        impl Api {
            /// Opens the library and looks every entry point up. Calls nothing in it yet.
            fn look_up(library: Library) -> Result<Self> {
                Ok(Self {
                    $($name: {
                        // SAFETY: the symbol is CUDA's, and the type is its documented signature.
                        let symbol = unsafe { library.get(concat!($symbol, "\0").as_bytes()) };
                        *symbol.map_err(|error| unavailable(
                            stringify!($name),
                            format!("{LIBRARY} has no {}: {error}. The NVIDIA driver is too old or incomplete", $symbol),
                        ))?
                    },)*
                    $($opt_name: {
                        // SAFETY: as above.
                        unsafe { library.get(concat!($opt_symbol, "\0").as_bytes()) }.ok().map(|symbol| *symbol)
                    },)*
                    _library: ManuallyDrop::new(library),
                })
            }
        }
    };
}

entry_points! {
    required {
        cuInit = "cuInit"(c_uint);
        cuDriverGetVersion = "cuDriverGetVersion"(*mut c_int);
        cuGetErrorName = "cuGetErrorName"(c_uint, *mut *const c_char);
        cuGetErrorString = "cuGetErrorString"(c_uint, *mut *const c_char);
        cuDeviceGetCount = "cuDeviceGetCount"(*mut c_int);
        cuDeviceGet = "cuDeviceGet"(*mut CUdevice, c_int);
        cuDeviceGetName = "cuDeviceGetName"(*mut c_char, c_int, CUdevice);
        cuDeviceTotalMem = "cuDeviceTotalMem_v2"(*mut usize, CUdevice);
        cuDeviceGetAttribute = "cuDeviceGetAttribute"(*mut c_int, CUdevice_attribute, CUdevice);
        cuDevicePrimaryCtxRetain = "cuDevicePrimaryCtxRetain"(*mut CUcontext, CUdevice);
        cuCtxGetCurrent = "cuCtxGetCurrent"(*mut CUcontext);
        cuCtxSetCurrent = "cuCtxSetCurrent"(CUcontext);
        cuCtxSynchronize = "cuCtxSynchronize"();
        cuMemGetInfo = "cuMemGetInfo_v2"(*mut usize, *mut usize);
        cuMemAllocManaged = "cuMemAllocManaged"(*mut CUdeviceptr, usize, c_uint);
        cuMemAlloc = "cuMemAlloc_v2"(*mut CUdeviceptr, usize);
        cuMemFree = "cuMemFree_v2"(CUdeviceptr);
        cuIpcGetMemHandle = "cuIpcGetMemHandle"(*mut CUipcMemHandle, CUdeviceptr);
        cuMemGetAllocationGranularity =
            "cuMemGetAllocationGranularity"(*mut usize, *const CUmemAllocationProp, c_uint);
        cuMemAddressReserve = "cuMemAddressReserve"(*mut CUdeviceptr, usize, usize, CUdeviceptr, c_ulonglong);
        cuMemAddressFree = "cuMemAddressFree"(CUdeviceptr, usize);
        cuMemCreate =
            "cuMemCreate"(*mut CUmemGenericAllocationHandle, usize, *const CUmemAllocationProp, c_ulonglong);
        cuMemRelease = "cuMemRelease"(CUmemGenericAllocationHandle);
        cuMemMap = "cuMemMap"(CUdeviceptr, usize, usize, CUmemGenericAllocationHandle, c_ulonglong);
        cuMemUnmap = "cuMemUnmap"(CUdeviceptr, usize);
        cuMemSetAccess = "cuMemSetAccess"(CUdeviceptr, usize, *const CUmemAccessDesc, usize);
        cuMemExportToShareableHandle =
            "cuMemExportToShareableHandle"(*mut c_void, CUmemGenericAllocationHandle, c_uint, c_ulonglong);
        cuMemImportFromShareableHandle =
            "cuMemImportFromShareableHandle"(*mut CUmemGenericAllocationHandle, *mut c_void, c_uint);
        cuStreamCreate = "cuStreamCreate"(*mut CUstream, c_uint);
        cuStreamDestroy = "cuStreamDestroy_v2"(CUstream);
        cuStreamSynchronize = "cuStreamSynchronize"(CUstream);
        cuStreamIsCapturing = "cuStreamIsCapturing"(CUstream, *mut c_uint);
        cuThreadExchangeStreamCaptureMode = "cuThreadExchangeStreamCaptureMode"(*mut c_uint);
        cuEventCreate = "cuEventCreate"(*mut CUevent, c_uint);
        cuEventRecord = "cuEventRecord"(CUevent, CUstream);
        cuStreamWaitEvent = "cuStreamWaitEvent"(CUstream, CUevent, c_uint);
        cuEventQuery = "cuEventQuery"(CUevent);
        cuEventSynchronize = "cuEventSynchronize"(CUevent);
        cuEventDestroy = "cuEventDestroy_v2"(CUevent);
    }
    optional {
        // The forms with a device number: CUDA 8 to 12.
        cuMemAdvise = "cuMemAdvise"(CUdeviceptr, usize, CUmem_advise, CUdevice);
        cuMemPrefetchAsync = "cuMemPrefetchAsync"(CUdeviceptr, usize, CUdevice, CUstream);
        // The forms with a location: from CUDA 12.2, the only ones of CUDA 13.
        cuMemAdvise_v2 = "cuMemAdvise_v2"(CUdeviceptr, usize, CUmem_advise, CUmemLocation);
        cuMemPrefetchAsync_v2 = "cuMemPrefetchAsync_v2"(CUdeviceptr, usize, CUmemLocation, c_uint, CUstream);
        // From CUDA 13.0.
        cuMemDiscardBatchAsync = "cuMemDiscardBatchAsync"(*mut CUdeviceptr, *mut usize, usize, c_ulonglong, CUstream);
    }
}

impl Api {
    /// Opens `libcuda.so.1`.
    pub(super) fn load() -> Result<Self> {
        // SAFETY: opening NVIDIA's driver runs its initialisers, which every CUDA program runs.
        let library = unsafe { Library::new(LIBRARY) }.map_err(|error| {
            unavailable("dlopen", format!("the NVIDIA driver library {LIBRARY} could not be loaded: {error}"))
        })?;
        Self::look_up(library)
    }

    /// Turns a `CUresult` into a result.
    pub(super) fn check(&self, call: &'static str, code: c_uint) -> Result<()> {
        if code == SUCCESS { Ok(()) } else { Err(self.error(call, code)) }
    }

    /// The error for a `CUresult` that is not success.
    #[cold]
    pub(super) fn error(&self, call: &'static str, code: c_uint) -> DriverError {
        DriverError {
            kind: kind_of(code),
            call,
            code: code.try_into().unwrap_or(-1),
            name: self.describe(self.cuGetErrorName, code).unwrap_or_else(|| "an unknown CUresult".to_owned()),
            message: self
                .describe(self.cuGetErrorString, code)
                .unwrap_or_else(|| "this driver says nothing about it".to_owned()),
        }
    }

    fn describe(
        &self,
        get: unsafe extern "C" fn(c_uint, *mut *const c_char) -> c_uint,
        code: c_uint,
    ) -> Option<String> {
        let mut text = std::ptr::null();
        // SAFETY: `text` is writable.
        let found = unsafe { get(code, &raw mut text) };
        // "Sets *pStr to the address of a NULL-terminated string […]. If the error code is not recognized,
        // CUDA_ERROR_INVALID_VALUE will be returned and *pStr will be set to the NULL address."
        if found != SUCCESS || text.is_null() {
            return None;
        }
        // SAFETY: the string is static and terminated (quoted above).
        Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    }
}

/// A driver that is missing, or lacks an entry point.
fn unavailable(call: &'static str, message: String) -> DriverError {
    DriverError { kind: ErrorKind::Unavailable, call, code: -1, name: "driver unavailable".to_owned(), message }
}

/// What the allocator should make of a `CUresult`.
fn kind_of(code: c_uint) -> ErrorKind {
    use CUresult as R;
    const fn n(result: CUresult) -> c_uint {
        result as c_uint
    }
    match code {
        c if c == n(R::CUDA_ERROR_OUT_OF_MEMORY) => ErrorKind::OutOfMemory,
        c if c == n(R::CUDA_ERROR_INVALID_VALUE)
            || c == n(R::CUDA_ERROR_INVALID_DEVICE)
            || c == n(R::CUDA_ERROR_INVALID_HANDLE) =>
        {
            ErrorKind::InvalidValue
        }
        c if c == n(R::CUDA_ERROR_NOT_SUPPORTED) => ErrorKind::NotSupported,
        // "The CUDA driver that the application has loaded is a stub library."
        c if c == n(R::CUDA_ERROR_STUB_LIBRARY) => ErrorKind::Unavailable,
        // The whole family: unsupported, invalidated, merge, unmatched, unjoined, isolation, implicit,
        // CUDA_ERROR_CAPTURED_EVENT, wrong thread.
        c if (n(R::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)..=n(R::CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD))
            .contains(&c) =>
        {
            ErrorKind::StreamCapture
        }
        _ => ErrorKind::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn a_library_without_an_entry_point_gives_an_error_that_names_it() {
        // The test program itself: a library that has none of them.
        let this: Library = libloading::os::unix::Library::this().into();
        let error = Api::look_up(this).err().expect("the test program is no CUDA driver");
        assert_eq!((error.kind, error.call), (ErrorKind::Unavailable, "cuInit"), "{error}");
    }

    #[test]
    fn every_result_the_allocator_treats_differently_has_its_kind() {
        for (code, kind) in [
            (1, ErrorKind::InvalidValue),
            (2, ErrorKind::OutOfMemory),
            (34, ErrorKind::Unavailable),
            (101, ErrorKind::InvalidValue),
            (201, ErrorKind::Other),
            (400, ErrorKind::InvalidValue),
            (700, ErrorKind::Other),
            (801, ErrorKind::NotSupported),
            (900, ErrorKind::StreamCapture),
            (906, ErrorKind::StreamCapture),
            (907, ErrorKind::StreamCapture),
            (908, ErrorKind::StreamCapture),
            (909, ErrorKind::Other),
            (4_000_000_000, ErrorKind::Other),
        ] {
            assert_eq!(kind_of(code), kind, "CUresult {code}");
        }
    }
}
