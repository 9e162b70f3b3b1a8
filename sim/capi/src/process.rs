//! Whether this process has used CUDA, and whether it may.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Whether this process has used the machine; and whether it is a child, forked by one that had.
static USED: AtomicBool = AtomicBool::new(false);
static ORPHANED: AtomicBool = AtomicBool::new(false);

/// Notes that this process uses CUDA.
pub fn use_cuda() {
    USED.store(true, Relaxed);
}

/// Whether CUDA is initialised in this process.
pub fn is_used() -> bool {
    USED.load(Relaxed)
}

/// Whether this process is a child that was forked after CUDA's first use.
pub fn is_orphaned() -> bool {
    ORPHANED.load(Relaxed)
}

/// From now on, children of a process that has used CUDA are told apart.
pub fn watch_forks() {
    extern "C" fn in_child() {
        // The engine's threads did not come along, and its locks may be held for ever.
        if USED.load(Relaxed) {
            ORPHANED.store(true, Relaxed);
        }
    }
    // SAFETY: the handler only touches atomics, which is allowed after fork.
    unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
}
