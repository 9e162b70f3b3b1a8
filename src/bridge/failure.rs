//! How a failed call tells C++ why.

use super::ffi;
use crate::error::{Error, Result};
use std::any::Any;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    /// The reason of this thread's last failed call.
    static LAST: RefCell<Option<Error>> = const { RefCell::new(None) };
}

/// Runs an entry of the bridge. On failure, panics included, keeps the reason for [`take_failure`].
pub(super) fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Option<T> {
    // Unwind safety: after a panic the allocator's books may be wrong, which the failure's text says; its locks do not
    // poison, and nothing becomes unsound in the sense of the language.
    let error = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(value)) => return Some(value),
        Ok(Err(error)) => error,
        Err(panic) => Error::Internal(panic_text(panic.as_ref())),
    };
    keep(error);
    None
}

#[cold]
fn keep(error: Error) {
    // While a thread ends, its storage may be gone already; then `take_failure` answers in general terms.
    let _ = LAST.try_with(|last| *last.borrow_mut() = Some(error));
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("a panic without a message").to_owned()
}

/// Why this thread's last failed call failed; each reason can be had once.
pub(super) fn take_failure() -> ffi::Failure {
    let error = LAST.try_with(|last| last.borrow_mut().take()).ok().flatten();
    failure(&error.unwrap_or_else(|| Error::Internal("a call failed without a reason".to_owned())))
}

fn failure(error: &Error) -> ffi::Failure {
    let kind = match error {
        Error::OutOfMemory(_) => ffi::FailureKind::OutOfMemory,
        Error::InvalidPointer(_) | Error::InvalidArgument(_) | Error::NotSupported(_) => ffi::FailureKind::Usage,
        Error::Driver(_) => ffi::FailureKind::Cuda,
        Error::Internal(_) => ffi::FailureKind::Internal,
    };
    let mut failure = ffi::Failure {
        kind,
        message: error.to_string(),
        device: 0,
        requested: 0,
        allocated: 0,
        reserved: 0,
        total: 0,
        free: 0,
        rejected: false,
    };
    if let Error::OutOfMemory(figures) = error {
        failure.device = figures.device;
        failure.requested = figures.requested;
        failure.allocated = figures.allocated;
        failure.reserved = figures.reserved;
        failure.total = figures.allowed.unwrap_or(figures.device_total);
        failure.free = figures.device_free;
        failure.rejected = figures.rejected;
    }
    failure
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_a_failure_and_is_told_once() {
        assert!(guarded(|| -> Result<()> { panic!("boom {}", 1) }).is_none());
        let failure = take_failure();
        assert!(
            failure.kind == ffi::FailureKind::Internal && failure.message.contains("boom 1"),
            "{}",
            failure.message
        );
        assert!(take_failure().message.contains("without a reason"));
    }
}
