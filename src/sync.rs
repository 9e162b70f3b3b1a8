//! What threads share in [`crate::thread_cache`]: the real things, or with `--cfg loom` loom's, whose tests go through every
//! order in which threads can take turns.

#[cfg(not(loom))]
pub use parking_lot::Mutex;
#[cfg(not(loom))]
pub use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

#[cfg(loom)]
pub use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// loom's, with the interface of parking_lot's.
#[cfg(loom)]
#[derive(Default)]
pub struct Mutex<T>(loom::sync::Mutex<T>);

#[cfg(loom)]
impl<T> Mutex<T> {
    /// Waits for the lock. Panics where a thread panicked with it: the model has failed by then.
    pub fn lock(&self) -> loom::sync::MutexGuard<'_, T> {
        self.0.lock().expect("no thread of a model panics")
    }
}
