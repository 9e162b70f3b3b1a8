//! Which free list serves a request: small or large, by stream, of the default pool or a private one.

use crate::driver::Stream;
use crate::free_list::FreeList;
use crate::ids::{DEFAULT_POOL, ListId, MempoolId, PoolId};
use crate::options::AccessPattern;
use crate::segments::CustomAllocator;
use crate::sizes::SMALL_LIMIT;
use rustc_hash::FxHashMap;

/// No pool has this index.
const NOTHING_RECENT: (PoolId, Stream, [ListId; 2]) = (PoolId(u32::MAX), Stream(0), [ListId(u32::MAX); 2]);

/// One pool: the default one, a CUDA graph's, or a `torch.cuda.MemPool`.
pub struct Pool {
    /// PyTorch's name for it.
    pub id: MempoolId,
    /// How many graphs and MemPools hold it. At 0 its segments may be given back ("freeable").
    pub use_count: i32,
    /// How many segments it holds. A freeable pool without any is forgotten.
    pub segments: u32,
    /// The allocator that the program gave it for its segments.
    pub custom: Option<CustomAllocator>,
    /// Where its segments are placed, if not where the options say.
    pub placement: Option<AccessPattern>,
    /// Other pools may take its free blocks before they run out of memory.
    pub use_on_oom: bool,
    no_split: bool,
    lists: FxHashMap<Stream, [ListId; 2]>,
}

/// A free list and whose it is.
pub struct List {
    /// The free blocks.
    pub free: FreeList,
    /// The pool it belongs to.
    pub pool: PoolId,
    /// Blocks of at most 1 MiB.
    pub small: bool,
    /// The stream that its blocks were allocated for.
    pub stream: Stream,
    /// How often a block was asked of it: the clock of garbage collection.
    pub requests: u64,
    /// Its blocks are handed out whole. The pool's, kept where the hot path looks.
    pub no_split: bool,
}

/// All pools and free lists of one device.
pub struct Pools {
    pools: Vec<Option<Pool>>,
    by_id: FxHashMap<MempoolId, PoolId>,
    lists: Vec<List>,
    unused_lists: Vec<ListId>,
    /// The lists found last: most requests come from one stream.
    recent: (PoolId, Stream, [ListId; 2]),
}

impl Default for Pools {
    fn default() -> Self {
        let mut pools = Self {
            pools: Vec::new(),
            by_id: FxHashMap::default(),
            lists: Vec::new(),
            unused_lists: Vec::new(),
            recent: NOTHING_RECENT,
        };
        pools.create(DEFAULT_POOL, None);
        pools
    }
}

impl std::ops::Index<PoolId> for Pools {
    type Output = Pool;
    fn index(&self, id: PoolId) -> &Pool {
        self.pools[id.0 as usize].as_ref().expect("a PoolId is only kept while its pool lives")
    }
}

impl std::ops::IndexMut<PoolId> for Pools {
    fn index_mut(&mut self, id: PoolId) -> &mut Pool {
        self.pools[id.0 as usize].as_mut().expect("a PoolId is only kept while its pool lives")
    }
}

impl std::ops::Index<ListId> for Pools {
    type Output = List;
    #[inline]
    fn index(&self, id: ListId) -> &List {
        &self.lists[id.0 as usize]
    }
}

impl std::ops::IndexMut<ListId> for Pools {
    #[inline]
    fn index_mut(&mut self, id: ListId) -> &mut List {
        &mut self.lists[id.0 as usize]
    }
}

impl Pools {
    /// Makes a private pool, held once.
    pub fn create(&mut self, id: MempoolId, custom: Option<CustomAllocator>) -> PoolId {
        let pool = Pool {
            id,
            use_count: 1,
            segments: 0,
            custom,
            placement: None,
            use_on_oom: false,
            no_split: false,
            lists: FxHashMap::default(),
        };
        let index = match self.pools.iter().position(Option::is_none) {
            Some(index) => {
                self.pools[index] = Some(pool);
                index
            }
            None => {
                self.pools.push(Some(pool));
                self.pools.len() - 1
            }
        };
        let pool = PoolId(index as u32);
        self.by_id.insert(id, pool);
        pool
    }

    /// Forgets a pool that holds no segments, so that its lists are empty.
    pub fn forget(&mut self, id: PoolId) {
        if let Some(pool) = self.pools[id.0 as usize].take() {
            debug_assert_eq!(pool.segments, 0);
            self.by_id.remove(&pool.id);
            self.unused_lists.extend(pool.lists.into_values().flatten());
            self.recent = NOTHING_RECENT;
        }
    }

    /// The pool of this name.
    pub fn find(&self, id: MempoolId) -> Option<PoolId> {
        self.by_id.get(&id).copied()
    }

    /// All pools.
    pub fn ids(&self) -> impl Iterator<Item = PoolId> + '_ {
        self.pools.iter().enumerate().filter(|(_, pool)| pool.is_some()).map(|(index, _)| PoolId(index as u32))
    }

    /// All free lists of a pool.
    pub fn lists_of(&self, pool: PoolId) -> impl Iterator<Item = ListId> + '_ {
        self[pool].lists.values().flatten().copied()
    }

    /// The free list that serves a request of `bytes` (rounded) on `stream`.
    #[inline]
    pub fn list_for(&mut self, pool: PoolId, bytes: u64, stream: Stream) -> ListId {
        if (self.recent.0, self.recent.1) != (pool, stream) {
            let known = self[pool].lists.get(&stream).copied();
            let lists = known.unwrap_or_else(|| self.create_lists(pool, stream));
            self.recent = (pool, stream, lists);
        }
        self.recent.2[usize::from(bytes <= SMALL_LIMIT)]
    }

    /// Whether a pool's blocks are handed out whole.
    pub fn set_no_split(&mut self, pool: PoolId, on: bool) {
        let lists: Vec<ListId> = self.lists_of(pool).collect();
        for list in lists {
            self[list].no_split = on;
        }
        self[pool].no_split = on;
    }

    #[cold]
    fn create_lists(&mut self, pool: PoolId, stream: Stream) -> [ListId; 2] {
        let lists = [false, true].map(|small| {
            let no_split = self[pool].no_split;
            let list = List { free: FreeList::default(), pool, small, stream, requests: 0, no_split };
            match self.unused_lists.pop() {
                Some(id) => {
                    self[id] = list;
                    id
                }
                None => {
                    self.lists.push(list);
                    ListId(self.lists.len() as u32 - 1)
                }
            }
        });
        self[pool].lists.insert(stream, lists);
        lists
    }
}
