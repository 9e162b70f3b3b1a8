//! How an entry point is written, and what every one of them does: no panic crosses into C, the runtime's remember
//! their error for `cudaGetLastError`.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use torch_uvm_sim::SimError;

use crate::error_logs;
use crate::errors::{Code, code};
use crate::log;
use crate::report;

/// Why an entry point fails: the number that CUDA returns, and for the log what the engine says.
#[derive(Debug)]
pub struct Failure {
    pub code: Code,
    detail: Option<String>,
    /// Whether the log has been told already.
    told: bool,
}

impl Failure {
    /// A failure that the log knows of.
    pub fn told(code: Code) -> Self {
        Failure { code, detail: None, told: true }
    }
}

impl From<Code> for Failure {
    fn from(code: Code) -> Self {
        Failure { code, detail: None, told: false }
    }
}

impl From<SimError> for Failure {
    fn from(error: SimError) -> Self {
        Failure { code: error.code.0, detail: Some(error.to_string()), told: false }
    }
}

/// What the body of an entry point gives.
pub type Outcome<T = ()> = Result<T, Failure>;

thread_local! {
    static LAST_ERROR: Cell<Code> = const { Cell::new(code::SUCCESS) };
}

fn run(name: &str, body: impl FnOnce() -> Outcome) -> Code {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => {
            report::after(name);
            code::SUCCESS
        }
        Ok(Err(Failure { code, detail, told })) => {
            // "Not ready" is an answer, not a failure.
            if code != code::NOT_READY {
                let text = format!("{name} returns {code}: {}", detail.as_deref().unwrap_or("refused"));
                if !told {
                    log::line(&text);
                }
                error_logs::tell(&text);
            }
            code
        }
        Err(_) => {
            log::line(&format!("{name} panicked: a defect of the simulator"));
            code::UNKNOWN
        }
    }
}

/// Runs a runtime entry point.
pub fn runtime(name: &str, body: impl FnOnce() -> Outcome) -> Code {
    let code = run(name, body);
    if code != code::SUCCESS {
        LAST_ERROR.set(code);
    }
    code
}

/// Runs a driver entry point.
pub fn driver(name: &str, body: impl FnOnce() -> Outcome) -> Code {
    run(name, body)
}

/// `cudaGetLastError` (takes it) and `cudaPeekAtLastError` (leaves it).
pub fn last_error(take: bool) -> Code {
    if take { LAST_ERROR.replace(code::SUCCESS) } else { LAST_ERROR.get() }
}

/// Stores what an entry point answers; a null pointer is an invalid value.
///
/// # Safety
/// `to` is null or valid for writing a `T`.
pub unsafe fn put<T>(to: *mut T, value: T) -> Outcome {
    if to.is_null() {
        Err(code::INVALID_VALUE)?;
    }
    // SAFETY: not null, and valid by this function's contract. Unaligned because C callers cast.
    unsafe { to.write_unaligned(value) };
    Ok(())
}

/// Stores an answer that the caller may not want.
///
/// # Safety
/// As [`put`].
pub unsafe fn put_optional<T>(to: *mut T, value: T) {
    if !to.is_null() {
        // SAFETY: as in `put`.
        unsafe { to.write_unaligned(value) };
    }
}

/// Defines exported entry points. The first word says which API's rules hold (`runtime` or `driver`); the bodies are
/// closures that give an [`Outcome`].
///
/// Every body is `unsafe` in the same way: what C hands over is as the CUDA manual's entry of that name says.
macro_rules! entry_points {
    ($api:ident; $($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// The arguments are as the CUDA manual asks.
        #[unsafe(no_mangle)]
        #[allow(unused_unsafe)] // not every body does something unsafe
        pub unsafe extern "C" fn $name($($arg: $type),*) -> $crate::errors::Code {
            // SAFETY: the caller keeps the manual's contract; `put` and the engine check what can be checked.
            $crate::entry::$api(stringify!($name), || unsafe { $body })
        }
    )*};
}
pub(crate) use entry_points;
