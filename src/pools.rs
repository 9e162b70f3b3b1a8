//! Which free list serves a request.

/// `c10::MempoolId_t`: (0, n) for pools made by graphs, (n, 0) for user pools; (0, 0) is the default pool.
pub type MempoolId = (u64, u64);
