//! Which pool serves a request: the default one, or that of a graph that is captured or of a MemPool in use.

use crate::driver::{ErrorKind, Result, Stream};
use crate::gpu::Gpu;
use crate::hooks::StreamFilter;
use crate::ids::PoolId;

/// Requests on some streams are served from a private pool.
struct Route {
    pool: PoolId,
    filter: StreamFilter,
    /// The stream that was current when the route began: a graph is captured on it, or nothing is.
    stream: Stream,
}

/// All of them, the innermost last.
#[derive(Default)]
pub struct Routes(Vec<Route>);

impl Routes {
    /// Whether the default pool serves everything.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The pool that serves requests on a stream.
    #[inline]
    pub fn pool_for(&self, stream: Stream) -> PoolId {
        if self.is_empty() { PoolId::DEFAULT } else { self.innermost(stream) }
    }

    #[cold]
    fn innermost(&self, stream: Stream) -> PoolId {
        self.0.iter().rev().find(|route| (route.filter)(stream)).map_or(PoolId::DEFAULT, |route| route.pool)
    }

    /// Whether a CUDA graph is being captured, so that nothing is given back or moved and frees are not waited for. A
    /// MemPool in use is no capture, although PyTorch announces both in the same way: CUDA is asked about the stream.
    /// (PyTorch's own allocator is told from 2.13 on; before, it took a MemPool for a capture.)
    ///
    /// # Errors
    /// The driver's, but for a stream that it knows nothing of, such as one that the program has destroyed: that
    /// captures nothing.
    #[inline]
    pub fn capturing(&self, gpu: &Gpu) -> Result<bool> {
        if self.is_empty() { Ok(false) } else { self.any_captures(gpu) }
    }

    #[cold]
    fn any_captures(&self, gpu: &Gpu) -> Result<bool> {
        for route in &self.0 {
            match gpu.captures(route.stream) {
                Ok(false) => {}
                Ok(true) => return Ok(true),
                Err(error) if error.kind == ErrorKind::InvalidValue => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// Whether a pool serves somebody.
    pub fn leads_to(&self, pool: PoolId) -> bool {
        self.0.iter().any(|route| route.pool == pool)
    }

    /// From now on a pool serves the streams that `filter` selects.
    pub fn begin(&mut self, pool: PoolId, filter: StreamFilter, stream: Stream) {
        self.0.push(Route { pool, filter, stream });
    }

    /// It does so no more. False: it did not.
    pub fn end(&mut self, pool: PoolId) -> bool {
        let index = self.0.iter().position(|route| route.pool == pool);
        index.map(|index| self.0.remove(index)).is_some()
    }
}
