//! Why there is no new memory for a request.

use crate::budget::Exceeded;
use crate::driver::{DriverError, ErrorKind};
use crate::error::Error;

/// Why there is no new memory: giving caches back may help against the first two.
#[derive(Debug)]
pub enum Refusal {
    /// A limit of ours is met.
    Exceeded(Exceeded),
    /// CUDA, or a MemPool's own allocator, has none. Also what it would mean if memory just made could not be found in
    /// its list: out of memory, not a crash.
    NoMemory,
    /// Something else is wrong.
    Failed(Error),
}

impl From<DriverError> for Refusal {
    fn from(error: DriverError) -> Self {
        match error.kind {
            ErrorKind::OutOfMemory => Self::NoMemory,
            _ => Self::Failed(error.into()),
        }
    }
}
