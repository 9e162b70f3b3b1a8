//! What the body of an entry point gives, and how it stores its answers. Everything else here builds on it.

use torch_uvm_sim::SimError;

use crate::errors::{Code, code};

/// Why an entry point fails: the number that CUDA returns, and for the log what the engine says.
#[derive(Debug)]
pub struct Failure {
    pub code: Code,
    pub detail: Option<String>,
    /// Whether the log has been told already.
    pub told: bool,
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
