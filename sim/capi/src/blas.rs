//! cuBLAS, as kernels are: each routine takes its place in the stream and does nothing.
//!
//! NVIDIA's library does not start on this driver (it asks for tables that are documented nowhere), and without it no
//! linear layer runs. Preloaded, these entry points go before those of the real library, which stays loaded for
//! everything that takes no handle of ours. All that take one are here: the real library must not see it.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use crate::errors::code;
use crate::machine::{Handle, machine};
use crate::ops::launch;
use crate::outcome::{Outcome, put, put_optional};

/// `cublasStatus_t`.
type Status = c_int;

const SUCCESS: Status = 0;
const NOT_INITIALIZED: Status = 1;
const INVALID_VALUE: Status = 7;
const EXECUTION_FAILED: Status = 13;
/// What `cublasGetVersion` answers: that of CUDA 12.4.
const VERSION: c_int = 120_405;

/// What a handle remembers.
#[derive(Default)]
struct Settings {
    stream: usize,
    math_mode: c_int,
    pointer_mode: c_int,
    atomics_mode: c_int,
    multiprocessors: c_int,
}

#[derive(Default)]
struct Handles {
    live: HashMap<usize, Settings>,
    next: usize,
}

static HANDLES: LazyLock<Mutex<Handles>> = LazyLock::new(Mutex::default);

fn handles() -> MutexGuard<'static, Handles> {
    HANDLES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs an entry point by the rules that all of them keep (`crate::entry`), and gives its failure as cuBLAS's.
fn run(name: &str, body: impl FnOnce() -> Outcome) -> Status {
    match crate::entry::driver(name, body) {
        code::SUCCESS => SUCCESS,
        code::NOT_INITIALIZED | code::NO_DEVICE | code::INVALID_HANDLE => NOT_INITIALIZED,
        code::INVALID_VALUE => INVALID_VALUE,
        _ => EXECUTION_FAILED,
    }
}

/// Uses a handle's settings.
fn with<T>(handle: Handle, use_them: impl FnOnce(&mut Settings) -> T) -> Outcome<T> {
    Ok(handles().live.get_mut(&(handle as usize)).map(use_them).ok_or(code::INVALID_HANDLE)?)
}

macro_rules! settings {
    ($($(#[$doc:meta])* fn $name:ident($handle:ident $(, $arg:ident: $type:ty)*) $body:block)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// The arguments are as the cuBLAS manual asks.
        #[unsafe(no_mangle)]
        #[allow(unused_unsafe)] // not every body does something unsafe
        unsafe extern "C" fn $name($handle: Handle $(, $arg: $type)*) -> Status {
            // SAFETY: the caller keeps the manual's contract.
            run(stringify!($name), || unsafe { $body })
        }
    )*};
}

settings! {
    /// `cublasCreate_v2`.
    fn cublasCreate_v2(to) {
        machine()?;
        let mut handles = handles();
        handles.next += 1;
        let handle = 0x5400_0000_0000 + handles.next * 64;
        handles.live.insert(handle, Settings::default());
        put(to.cast::<Handle>(), handle as Handle)
    }

    /// `cublasDestroy_v2`.
    fn cublasDestroy_v2(handle) {
        handles().live.remove(&(handle as usize)).ok_or(code::INVALID_HANDLE)?;
        Ok(())
    }

    /// `cublasGetVersion_v2`.
    fn cublasGetVersion_v2(_handle, version: *mut c_int) { put(version, VERSION) }

    /// `cublasSetStream_v2`.
    fn cublasSetStream_v2(handle, stream: Handle) { with(handle, |settings| settings.stream = stream as usize) }

    /// `cublasGetStream_v2`.
    fn cublasGetStream_v2(handle, stream: *mut Handle) {
        put(stream, with(handle, |settings| settings.stream)? as Handle)
    }

    /// `cublasSetWorkspace_v2`: nothing is written there.
    fn cublasSetWorkspace_v2(handle, _workspace: *mut c_void, _bytes: usize) { with(handle, |_| ()) }

    /// `cublasSetMathMode`.
    fn cublasSetMathMode(handle, mode: c_int) { with(handle, |settings| settings.math_mode = mode) }

    /// `cublasGetMathMode`.
    fn cublasGetMathMode(handle, mode: *mut c_int) { put(mode, with(handle, |settings| settings.math_mode)?) }

    /// `cublasSetPointerMode_v2`.
    fn cublasSetPointerMode_v2(handle, mode: c_int) { with(handle, |settings| settings.pointer_mode = mode) }

    /// `cublasGetPointerMode_v2`.
    fn cublasGetPointerMode_v2(handle, mode: *mut c_int) { put(mode, with(handle, |settings| settings.pointer_mode)?) }

    /// `cublasSetAtomicsMode`.
    fn cublasSetAtomicsMode(handle, mode: c_int) { with(handle, |settings| settings.atomics_mode = mode) }

    /// `cublasGetAtomicsMode`.
    fn cublasGetAtomicsMode(handle, mode: *mut c_int) { put(mode, with(handle, |settings| settings.atomics_mode)?) }

    /// `cublasSetSmCountTarget`.
    fn cublasSetSmCountTarget(handle, count: c_int) { with(handle, |settings| settings.multiprocessors = count) }

    /// `cublasGetSmCountTarget`.
    fn cublasGetSmCountTarget(handle, count: *mut c_int) {
        put(count, with(handle, |settings| settings.multiprocessors)?)
    }
}

/// Routines. Their handle comes first; the other arguments are not looked at, which in C's calling convention the caller
/// does not notice.
macro_rules! routines {
    ($($name:ident,)*) => {$(
        #[doc = concat!("`", stringify!($name), "`: does nothing, in its place in the stream.")]
        #[unsafe(no_mangle)]
        extern "C" fn $name(handle: Handle) -> Status {
            run(stringify!($name), || launch(with(handle, |settings| settings.stream)? as Handle))
        }
    )*};
}

routines! {
    cublasAsumEx, cublasAsumEx_64, cublasAxpyEx, cublasAxpyEx_64, cublasCaxpy_v2, cublasCaxpy_v2_64, cublasCcopy_v2,
    cublasCcopy_v2_64, cublasCdgmm, cublasCdgmm_64, cublasCdotc_v2, cublasCdotc_v2_64, cublasCdotu_v2,
    cublasCdotu_v2_64, cublasCgbmv_v2, cublasCgbmv_v2_64, cublasCgeam, cublasCgeam_64, cublasCgelsBatched,
    cublasCgemm3m, cublasCgemm3mBatched, cublasCgemm3mBatched_64, cublasCgemm3mEx, cublasCgemm3mEx_64,
    cublasCgemm3mStridedBatched, cublasCgemm3mStridedBatched_64, cublasCgemm3m_64, cublasCgemmBatched,
    cublasCgemmBatched_64, cublasCgemmEx, cublasCgemmEx_64, cublasCgemmStridedBatched, cublasCgemmStridedBatched_64,
    cublasCgemm_v2, cublasCgemm_v2_64, cublasCgemvBatched, cublasCgemvBatched_64, cublasCgemvStridedBatched,
    cublasCgemvStridedBatched_64, cublasCgemv_v2, cublasCgemv_v2_64, cublasCgeqrfBatched, cublasCgerc_v2,
    cublasCgerc_v2_64, cublasCgeru_v2, cublasCgeru_v2_64, cublasCgetrfBatched, cublasCgetriBatched,
    cublasCgetrsBatched, cublasChbmv_v2, cublasChbmv_v2_64, cublasChemm_v2, cublasChemm_v2_64, cublasChemv_v2,
    cublasChemv_v2_64, cublasCher2_v2, cublasCher2_v2_64, cublasCher2k_v2, cublasCher2k_v2_64, cublasCher_v2,
    cublasCher_v2_64, cublasCherk3mEx, cublasCherk3mEx_64, cublasCherkEx, cublasCherkEx_64, cublasCherk_v2,
    cublasCherk_v2_64, cublasCherkx, cublasCherkx_64, cublasChpmv_v2, cublasChpmv_v2_64, cublasChpr2_v2,
    cublasChpr2_v2_64, cublasChpr_v2, cublasChpr_v2_64, cublasCmatinvBatched, cublasCopyEx, cublasCopyEx_64,
    cublasCrot_v2, cublasCrot_v2_64, cublasCrotg_v2, cublasCscal_v2, cublasCscal_v2_64, cublasCsrot_v2,
    cublasCsrot_v2_64, cublasCsscal_v2, cublasCsscal_v2_64, cublasCswap_v2, cublasCswap_v2_64, cublasCsymm_v2,
    cublasCsymm_v2_64, cublasCsymv_v2, cublasCsymv_v2_64, cublasCsyr2_v2, cublasCsyr2_v2_64, cublasCsyr2k_v2,
    cublasCsyr2k_v2_64, cublasCsyr_v2, cublasCsyr_v2_64, cublasCsyrk3mEx, cublasCsyrk3mEx_64, cublasCsyrkEx,
    cublasCsyrkEx_64, cublasCsyrk_v2, cublasCsyrk_v2_64, cublasCsyrkx, cublasCsyrkx_64, cublasCtbmv_v2,
    cublasCtbmv_v2_64, cublasCtbsv_v2, cublasCtbsv_v2_64, cublasCtpmv_v2, cublasCtpmv_v2_64, cublasCtpsv_v2,
    cublasCtpsv_v2_64, cublasCtpttr, cublasCtrmm_v2, cublasCtrmm_v2_64, cublasCtrmv_v2, cublasCtrmv_v2_64,
    cublasCtrsmBatched, cublasCtrsmBatched_64, cublasCtrsm_v2, cublasCtrsm_v2_64, cublasCtrsv_v2, cublasCtrsv_v2_64,
    cublasCtrttp, cublasDasum_v2, cublasDasum_v2_64, cublasDaxpy_v2, cublasDaxpy_v2_64, cublasDcopy_v2,
    cublasDcopy_v2_64, cublasDdgmm, cublasDdgmm_64, cublasDdot_v2, cublasDdot_v2_64, cublasDgbmv_v2,
    cublasDgbmv_v2_64, cublasDgeam, cublasDgeam_64, cublasDgelsBatched, cublasDgemmBatched, cublasDgemmBatched_64,
    cublasDgemmGroupedBatched, cublasDgemmGroupedBatched_64, cublasDgemmStridedBatched, cublasDgemmStridedBatched_64,
    cublasDgemm_v2, cublasDgemm_v2_64, cublasDgemvBatched, cublasDgemvBatched_64, cublasDgemvStridedBatched,
    cublasDgemvStridedBatched_64, cublasDgemv_v2, cublasDgemv_v2_64, cublasDgeqrfBatched, cublasDger_v2,
    cublasDger_v2_64, cublasDgetrfBatched, cublasDgetriBatched, cublasDgetrsBatched, cublasDmatinvBatched,
    cublasDnrm2_v2, cublasDnrm2_v2_64, cublasDotEx, cublasDotEx_64, cublasDotcEx, cublasDotcEx_64, cublasDrot_v2,
    cublasDrot_v2_64, cublasDrotg_v2, cublasDrotm_v2, cublasDrotm_v2_64, cublasDrotmg_v2, cublasDsbmv_v2,
    cublasDsbmv_v2_64, cublasDscal_v2, cublasDscal_v2_64, cublasDspmv_v2, cublasDspmv_v2_64, cublasDspr2_v2,
    cublasDspr2_v2_64, cublasDspr_v2, cublasDspr_v2_64, cublasDswap_v2, cublasDswap_v2_64, cublasDsymm_v2,
    cublasDsymm_v2_64, cublasDsymv_v2, cublasDsymv_v2_64, cublasDsyr2_v2, cublasDsyr2_v2_64, cublasDsyr2k_v2,
    cublasDsyr2k_v2_64, cublasDsyr_v2, cublasDsyr_v2_64, cublasDsyrk_v2, cublasDsyrk_v2_64, cublasDsyrkx,
    cublasDsyrkx_64, cublasDtbmv_v2, cublasDtbmv_v2_64, cublasDtbsv_v2, cublasDtbsv_v2_64, cublasDtpmv_v2,
    cublasDtpmv_v2_64, cublasDtpsv_v2, cublasDtpsv_v2_64, cublasDtpttr, cublasDtrmm_v2, cublasDtrmm_v2_64,
    cublasDtrmv_v2, cublasDtrmv_v2_64, cublasDtrsmBatched, cublasDtrsmBatched_64, cublasDtrsm_v2, cublasDtrsm_v2_64,
    cublasDtrsv_v2, cublasDtrsv_v2_64, cublasDtrttp, cublasDzasum_v2, cublasDzasum_v2_64, cublasDznrm2_v2,
    cublasDznrm2_v2_64, cublasGemmBatchedEx, cublasGemmBatchedEx_64, cublasGemmEx, cublasGemmEx_64,
    cublasGemmStridedBatchedEx, cublasGemmStridedBatchedEx_64, cublasHSHgemvBatched, cublasHSHgemvBatched_64,
    cublasHSHgemvStridedBatched, cublasHSHgemvStridedBatched_64, cublasHSSgemvBatched, cublasHSSgemvBatched_64,
    cublasHSSgemvStridedBatched, cublasHSSgemvStridedBatched_64, cublasHgemm, cublasHgemmBatched,
    cublasHgemmBatched_64, cublasHgemmStridedBatched, cublasHgemmStridedBatched_64, cublasHgemm_64, cublasIamaxEx,
    cublasIamaxEx_64, cublasIaminEx, cublasIaminEx_64, cublasIcamax_v2, cublasIcamax_v2_64, cublasIcamin_v2,
    cublasIcamin_v2_64, cublasIdamax_v2, cublasIdamax_v2_64, cublasIdamin_v2, cublasIdamin_v2_64, cublasIsamax_v2,
    cublasIsamax_v2_64, cublasIsamin_v2, cublasIsamin_v2_64, cublasIzamax_v2, cublasIzamax_v2_64, cublasIzamin_v2,
    cublasIzamin_v2_64, cublasNrm2Ex, cublasNrm2Ex_64, cublasRotEx, cublasRotEx_64, cublasRotgEx, cublasRotmEx,
    cublasRotmEx_64, cublasRotmgEx, cublasSasum_v2, cublasSasum_v2_64, cublasSaxpy_v2, cublasSaxpy_v2_64,
    cublasScalEx, cublasScalEx_64, cublasScasum_v2, cublasScasum_v2_64, cublasScnrm2_v2, cublasScnrm2_v2_64,
    cublasScopy_v2, cublasScopy_v2_64, cublasSdgmm, cublasSdgmm_64, cublasSdot_v2, cublasSdot_v2_64, cublasSgbmv_v2,
    cublasSgbmv_v2_64, cublasSgeam, cublasSgeam_64, cublasSgelsBatched, cublasSgemmBatched, cublasSgemmBatched_64,
    cublasSgemmEx, cublasSgemmEx_64, cublasSgemmGroupedBatched, cublasSgemmGroupedBatched_64,
    cublasSgemmStridedBatched, cublasSgemmStridedBatched_64, cublasSgemm_v2, cublasSgemm_v2_64, cublasSgemvBatched,
    cublasSgemvBatched_64, cublasSgemvStridedBatched, cublasSgemvStridedBatched_64, cublasSgemv_v2,
    cublasSgemv_v2_64, cublasSgeqrfBatched, cublasSger_v2, cublasSger_v2_64, cublasSgetrfBatched,
    cublasSgetriBatched, cublasSgetrsBatched, cublasSmatinvBatched, cublasSnrm2_v2, cublasSnrm2_v2_64, cublasSrot_v2,
    cublasSrot_v2_64, cublasSrotg_v2, cublasSrotm_v2, cublasSrotm_v2_64, cublasSrotmg_v2, cublasSsbmv_v2,
    cublasSsbmv_v2_64, cublasSscal_v2, cublasSscal_v2_64, cublasSspmv_v2, cublasSspmv_v2_64, cublasSspr2_v2,
    cublasSspr2_v2_64, cublasSspr_v2, cublasSspr_v2_64, cublasSswap_v2, cublasSswap_v2_64, cublasSsymm_v2,
    cublasSsymm_v2_64, cublasSsymv_v2, cublasSsymv_v2_64, cublasSsyr2_v2, cublasSsyr2_v2_64, cublasSsyr2k_v2,
    cublasSsyr2k_v2_64, cublasSsyr_v2, cublasSsyr_v2_64, cublasSsyrk_v2, cublasSsyrk_v2_64, cublasSsyrkx,
    cublasSsyrkx_64, cublasStbmv_v2, cublasStbmv_v2_64, cublasStbsv_v2, cublasStbsv_v2_64, cublasStpmv_v2,
    cublasStpmv_v2_64, cublasStpsv_v2, cublasStpsv_v2_64, cublasStpttr, cublasStrmm_v2, cublasStrmm_v2_64,
    cublasStrmv_v2, cublasStrmv_v2_64, cublasStrsmBatched, cublasStrsmBatched_64, cublasStrsm_v2, cublasStrsm_v2_64,
    cublasStrsv_v2, cublasStrsv_v2_64, cublasStrttp, cublasSwapEx, cublasSwapEx_64, cublasTSSgemvBatched,
    cublasTSSgemvBatched_64, cublasTSSgemvStridedBatched, cublasTSSgemvStridedBatched_64, cublasTSTgemvBatched,
    cublasTSTgemvBatched_64, cublasTSTgemvStridedBatched, cublasTSTgemvStridedBatched_64, cublasUint8gemmBias,
    cublasZaxpy_v2, cublasZaxpy_v2_64, cublasZcopy_v2, cublasZcopy_v2_64, cublasZdgmm, cublasZdgmm_64,
    cublasZdotc_v2, cublasZdotc_v2_64, cublasZdotu_v2, cublasZdotu_v2_64, cublasZdrot_v2, cublasZdrot_v2_64,
    cublasZdscal_v2, cublasZdscal_v2_64, cublasZgbmv_v2, cublasZgbmv_v2_64, cublasZgeam, cublasZgeam_64,
    cublasZgelsBatched, cublasZgemm3m, cublasZgemm3m_64, cublasZgemmBatched, cublasZgemmBatched_64,
    cublasZgemmStridedBatched, cublasZgemmStridedBatched_64, cublasZgemm_v2, cublasZgemm_v2_64, cublasZgemvBatched,
    cublasZgemvBatched_64, cublasZgemvStridedBatched, cublasZgemvStridedBatched_64, cublasZgemv_v2,
    cublasZgemv_v2_64, cublasZgeqrfBatched, cublasZgerc_v2, cublasZgerc_v2_64, cublasZgeru_v2, cublasZgeru_v2_64,
    cublasZgetrfBatched, cublasZgetriBatched, cublasZgetrsBatched, cublasZhbmv_v2, cublasZhbmv_v2_64, cublasZhemm_v2,
    cublasZhemm_v2_64, cublasZhemv_v2, cublasZhemv_v2_64, cublasZher2_v2, cublasZher2_v2_64, cublasZher2k_v2,
    cublasZher2k_v2_64, cublasZher_v2, cublasZher_v2_64, cublasZherk_v2, cublasZherk_v2_64, cublasZherkx,
    cublasZherkx_64, cublasZhpmv_v2, cublasZhpmv_v2_64, cublasZhpr2_v2, cublasZhpr2_v2_64, cublasZhpr_v2,
    cublasZhpr_v2_64, cublasZmatinvBatched, cublasZrot_v2, cublasZrot_v2_64, cublasZrotg_v2, cublasZscal_v2,
    cublasZscal_v2_64, cublasZswap_v2, cublasZswap_v2_64, cublasZsymm_v2, cublasZsymm_v2_64, cublasZsymv_v2,
    cublasZsymv_v2_64, cublasZsyr2_v2, cublasZsyr2_v2_64, cublasZsyr2k_v2, cublasZsyr2k_v2_64, cublasZsyr_v2,
    cublasZsyr_v2_64, cublasZsyrk_v2, cublasZsyrk_v2_64, cublasZsyrkx, cublasZsyrkx_64, cublasZtbmv_v2,
    cublasZtbmv_v2_64, cublasZtbsv_v2, cublasZtbsv_v2_64, cublasZtpmv_v2, cublasZtpmv_v2_64, cublasZtpsv_v2,
    cublasZtpsv_v2_64, cublasZtpttr, cublasZtrmm_v2, cublasZtrmm_v2_64, cublasZtrmv_v2, cublasZtrmv_v2_64,
    cublasZtrsmBatched, cublasZtrsmBatched_64, cublasZtrsm_v2, cublasZtrsm_v2_64, cublasZtrsv_v2, cublasZtrsv_v2_64,
    cublasZtrttp,
}

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
pub struct HeuristicResult {
    algorithm: [u64; 8],
    workspace_bytes: usize,
    state: Status,
    waves: f32,
    reserved: [c_int; 4],
}

/// `cublasLtMatmul`: does nothing, in its place in the stream.
#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmul(
    _handle: Handle,
    _description: Handle,
    _alpha: *const c_void,
    _a: *const c_void,
    _a_layout: Handle,
    _b: *const c_void,
    _b_layout: Handle,
    _beta: *const c_void,
    _c: *const c_void,
    _c_layout: Handle,
    _d: *mut c_void,
    _d_layout: Handle,
    _algorithm: *const c_void,
    _workspace: *mut c_void,
    _workspace_bytes: usize,
    stream: Handle,
) -> Status {
    run("cublasLtMatmul", || launch(stream))
}

/// `cublasLtMatmulAlgoGetHeuristic`: one algorithm, which needs no workspace. (PyTorch hands over its cuBLAS handle as
/// cuBLASLt's. Descriptions and layouts are plain memory that the real library fills; nobody reads them here.)
///
/// # Safety
/// `results` is null or has room for `wanted` results, `found` is null or valid.
#[unsafe(no_mangle)]
unsafe extern "C" fn cublasLtMatmulAlgoGetHeuristic(
    _handle: Handle,
    _description: Handle,
    _a_layout: Handle,
    _b_layout: Handle,
    _c_layout: Handle,
    _d_layout: Handle,
    _preference: Handle,
    wanted: c_int,
    results: *mut HeuristicResult,
    found: *mut c_int,
) -> Status {
    run("cublasLtMatmulAlgoGetHeuristic", || {
        if wanted < 1 {
            Err(code::INVALID_VALUE)?;
        }
        let result =
            HeuristicResult { algorithm: [0; 8], workspace_bytes: 0, state: SUCCESS, waves: 1.0, reserved: [0; 4] };
        // SAFETY: room for at least one result by this function's contract.
        unsafe {
            put(results, result)?;
            put_optional(found, 1);
        }
        Ok(())
    })
}

/// `cublasLtCreate`.
///
/// # Safety
/// `to` is null or valid.
#[unsafe(no_mangle)]
unsafe extern "C" fn cublasLtCreate(to: Handle) -> Status {
    // SAFETY: this function's contract is that of the one it calls.
    unsafe { cublasCreate_v2(to) }
}

/// `cublasLtDestroy`.
///
/// # Safety
/// As `cublasDestroy_v2`.
#[unsafe(no_mangle)]
unsafe extern "C" fn cublasLtDestroy(handle: Handle) -> Status {
    // SAFETY: this function's contract is that of the one it calls.
    unsafe { cublasDestroy_v2(handle) }
}
