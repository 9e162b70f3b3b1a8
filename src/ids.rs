//! The names of things: indices into a device's tables, and PyTorch's names for pools.

/// Index of a block in its arena.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct BlockId(pub(crate) u32);

impl BlockId {
    /// No block.
    pub const NONE: Self = Self(u32::MAX);

    /// Whether this is a block at all.
    #[inline]
    pub fn is_some(self) -> bool {
        self != Self::NONE
    }
}

/// Index of a free list: one for each pool, size class and stream.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct ListId(pub u32);

/// Index of a segment on its device.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct SegmentId(pub u32);

/// Index of a pool on its device.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PoolId(pub(crate) u32);

impl PoolId {
    /// The pool of everything that asked for none.
    pub const DEFAULT: Self = Self(0);
}

/// `c10::MempoolId_t`: (0, n) for pools made by graphs, (n, 0) for user pools; (0, 0) is the default pool.
pub type MempoolId = (u64, u64);

/// The default pool.
pub const DEFAULT_POOL: MempoolId = (0, 0);

/// Index of a thread's cache among its device's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ThreadId(u16);

impl ThreadId {
    /// No thread.
    pub const NONE: Self = Self(u16::MAX);

    /// The cache at this place, where such an index exists.
    pub fn new(index: usize) -> Option<Self> {
        u16::try_from(index).ok().map(Self).filter(|&id| id != Self::NONE)
    }

    /// Its place.
    pub fn index(self) -> usize {
        self.0.into()
    }

    /// Whether this is a cache at all.
    #[inline]
    pub fn is_some(self) -> bool {
        self != Self::NONE
    }
}
