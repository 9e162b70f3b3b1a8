//! Entry points looked up by name and version.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr;
use std::sync::OnceLock;

use crate::entry::entry_points;
use crate::errors::code;
use crate::log;
use crate::outcome::{Failure, Outcome, put, put_optional};

/// Names that mean different things by the CUDA version that is asked for, newest first. Where a name is not here, the
/// exported `_v2` is what every header since CUDA 4 means by it, and otherwise the name itself.
const VERSIONED: &[(&str, c_int, &str)] = &[
    ("cuGetProcAddress", 12_000, "cuGetProcAddress_v2"),
    ("cuGetProcAddress", 0, "cuGetProcAddress"),
    ("cuMemAdvise", 12_020, "cuMemAdvise_v2"),
    ("cuMemAdvise", 0, "cuMemAdvise"),
    ("cuMemPrefetchAsync", 12_020, "cuMemPrefetchAsync_v2"),
    ("cuMemPrefetchAsync", 0, "cuMemPrefetchAsync"),
    ("cuStreamGetCaptureInfo", 12_030, "cuStreamGetCaptureInfo_v3"),
    ("cuStreamGetCaptureInfo", 11_030, "cuStreamGetCaptureInfo_v2"),
    ("cuStreamGetCaptureInfo", 0, "cuStreamGetCaptureInfo"),
    ("cuStreamUpdateCaptureDependencies", 12_030, "cuStreamUpdateCaptureDependencies_v2"),
    ("cuStreamUpdateCaptureDependencies", 0, "cuStreamUpdateCaptureDependencies"),
    ("cuGraphNodeGetDependencies", 12_030, "cuGraphNodeGetDependencies_v2"),
    ("cuGraphNodeGetDependencies", 0, "cuGraphNodeGetDependencies"),
    ("cuGraphNodeGetDependentNodes", 12_030, "cuGraphNodeGetDependentNodes_v2"),
    ("cuGraphNodeGetDependentNodes", 0, "cuGraphNodeGetDependentNodes"),
    ("cuGraphInstantiate", 12_000, "cuGraphInstantiateWithFlags"),
    ("cuGraphInstantiate", 0, "cuGraphInstantiate_v2"),
    ("cuGraphGetEdges", 12_030, "cuGraphGetEdges_v2"),
    ("cuGraphGetEdges", 0, "cuGraphGetEdges"),
    ("cuStreamGetCtx", 12_050, "cuStreamGetCtx_v2"),
    ("cuStreamGetCtx", 0, "cuStreamGetCtx"),
    ("cuCtxCreate", 13_000, "cuCtxCreate_v4"),
    ("cuCtxCreate", 11_040, "cuCtxCreate_v3"),
    ("cuCtxCreate", 0, "cuCtxCreate_v2"),
    ("cuCtxSynchronize", 13_000, "cuCtxSynchronize_v2"),
    ("cuCtxSynchronize", 0, "cuCtxSynchronize"),
    ("cuCtxGetDevice", 13_000, "cuCtxGetDevice_v2"),
    ("cuCtxGetDevice", 0, "cuCtxGetDevice"),
    ("cuEventElapsedTime", 12_080, "cuEventElapsedTime_v2"),
    ("cuEventElapsedTime", 0, "cuEventElapsedTime"),
    ("cuDeviceGetUuid", 11_040, "cuDeviceGetUuid_v2"),
    ("cuDeviceGetUuid", 0, "cuDeviceGetUuid"),
    ("cuStreamWriteValue32", 11_070, "cuStreamWriteValue32_v2"),
    ("cuStreamWriteValue32", 0, "cuStreamWriteValue32"),
];

/// This library itself, whoever loaded it and how.
fn own_handle() -> *mut c_void {
    static OWN: OnceLock<usize> = OnceLock::new();
    let address = *OWN.get_or_init(|| {
        // SAFETY: all zeros is a valid `Dl_info`.
        let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
        // SAFETY: any address may be asked about; the answer names the file this code was loaded from.
        unsafe {
            if libc::dladdr(own_handle as *const c_void, &raw mut info) == 0 {
                return 0;
            }
            libc::dlopen(info.dli_fname, libc::RTLD_LAZY | libc::RTLD_NOLOAD) as usize
        }
    });
    address as *mut c_void
}

fn exported(name: &str) -> Option<*mut c_void> {
    let name = CString::new(name).ok()?;
    // SAFETY: a valid handle (or null, which is the default scope) and a C string.
    let address = unsafe { libc::dlsym(own_handle(), name.as_ptr()) };
    (!address.is_null()).then_some(address)
}

/// The entry point that a header of CUDA `version` means by `name`.
fn find(name: &str, version: c_int) -> Option<*mut c_void> {
    // A caller of this library must not reach what is not the driver's.
    if !name.starts_with("cu") || name.starts_with("cuda") {
        return None;
    }
    if let Some((_, _, symbol)) = VERSIONED.iter().find(|(known, since, _)| *known == name && version >= *since) {
        return exported(symbol);
    }
    exported(&format!("{name}_v2")).or_else(|| exported(name))
}

/// # Safety
/// `name` is null or a C string, `to` and `status` are null or valid.
unsafe fn look_up(name: *const c_char, to: *mut *mut c_void, version: c_int, status: *mut c_int) -> Outcome {
    if name.is_null() || to.is_null() {
        Err(code::INVALID_VALUE)?;
    }
    // SAFETY: a C string by this function's contract.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
    let found = find(&name, version);
    // SAFETY: null or valid by this function's contract. 0: found, 1: no such symbol.
    unsafe {
        put(to, found.unwrap_or(ptr::null_mut()))?;
        put_optional(status, c_int::from(found.is_none()));
    }
    if found.is_none() {
        log::once(&format!("cuGetProcAddress: there is no {name}"));
        Err(Failure::told(code::NOT_FOUND))?;
    }
    Ok(())
}

entry_points! { driver;
    /// `cuGetProcAddress`, the form before CUDA 12.
    fn cuGetProcAddress(name: *const c_char, to: *mut *mut c_void, version: c_int, _flags: u64) {
        look_up(name, to, version, ptr::null_mut())
    }

    /// `cuGetProcAddress_v2`. The flag for per-thread default streams changes nothing.
    fn cuGetProcAddress_v2(
        name: *const c_char, to: *mut *mut c_void, version: c_int, _flags: u64, status: *mut c_int,
    ) { look_up(name, to, version, status) }
}

entry_points! { runtime;
    /// `cudaGetDriverEntryPoint`: as the runtime of CUDA 12.4 means it.
    fn cudaGetDriverEntryPoint(name: *const c_char, to: *mut *mut c_void, _flags: u64, status: *mut c_int) {
        look_up(name, to, 12_040, status)
    }

    /// `cudaGetDriverEntryPointByVersion`.
    fn cudaGetDriverEntryPointByVersion(
        name: *const c_char, to: *mut *mut c_void, version: u32, _flags: u64, status: *mut c_int,
    ) { look_up(name, to, c_int::try_from(version).map_err(|_| code::INVALID_VALUE)?, status) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unsupported;

    /// Whether a name that is exported does something.
    fn is_supported(name: &str) -> bool {
        exported(name).is_some()
            && ![unsupported::DRIVER, unsupported::RUNTIME].iter().any(|names| names.contains(&name))
    }

    #[test]
    fn no_name_leads_to_an_unsupported_form_beside_a_supported_one() {
        for unsupported in unsupported::DRIVER {
            let Some((name, _)) = unsupported.rsplit_once("_v") else { continue };
            let leads_there =
                [0, 12_000, 12_090, 13_000].iter().any(|version| find(name, *version) == exported(unsupported));
            assert!(!(leads_there && is_supported(name)), "{name} leads to {unsupported}");
        }
    }

    #[test]
    fn a_name_leads_to_the_form_of_the_version_asked_for() {
        assert_eq!(find("cuStreamGetCtx", 12_040), exported("cuStreamGetCtx"));
        assert_eq!(find("cuStreamGetCtx", 12_050), exported("cuStreamGetCtx_v2"));
        assert_eq!(find("cuMemAlloc", 12_000), exported("cuMemAlloc_v2"));
        assert_eq!(find("cudaMalloc", 12_000), None, "not the driver's");
    }
}
