//! Private pools: CUDA graphs and MemPools, and the checkpoints that CUDA graph trees make of them.

use super::{DeviceState, Request, Route};
use crate::allocator::StreamFilter;
use crate::blocks::{BlockId, BlockState};
use crate::driver::{DeviceIndex, DevicePtr, Stream};
use crate::error::{Error, Result};
use crate::history::Context;
use crate::options::AccessPattern;
use crate::pools::{MempoolId, PoolId};
use crate::segments::{CustomAllocator, SegmentId};
use crate::streams::StreamOn;

/// What a private pool held at one moment: enough to bring it back there.
#[derive(Clone, Debug)]
pub struct PoolState {
    id: MempoolId,
    device: DeviceIndex,
    segments: Vec<SegmentState>,
}

impl PoolState {
    /// The device that the pool belongs to.
    pub fn device(&self) -> DeviceIndex {
        self.device
    }
}

#[derive(Clone, Debug)]
struct SegmentState {
    base: DevicePtr,
    blocks: Vec<BlockStateAt>,
}

#[derive(Clone, Debug)]
struct BlockStateAt {
    address: u64,
    bytes: u64,
    requested: u64,
    allocated: bool,
    uses: Vec<StreamOn>,
}

/// What [`DeviceState::restore_pool`] did. An address may be in both.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Allocations that are no more.
    pub freed: Vec<u64>,
    /// Allocations that are, and that the caller owns now.
    pub created: Vec<u64>,
}

fn unknown_pool(id: MempoolId) -> Error {
    Error::InvalidArgument(format!("mempool ({}, {}) does not exist on this device", id.0, id.1))
}

impl DeviceState {
    fn pool(&self, id: MempoolId) -> Result<PoolId> {
        self.pools.find(id).filter(|&pool| pool != PoolId::DEFAULT).ok_or_else(|| unknown_pool(id))
    }

    /// Makes a pool, or holds it once more.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a pool that everybody has let go of, and for the default pool.
    pub fn ensure_pool(&mut self, id: MempoolId, custom: Option<CustomAllocator>) -> Result<PoolId> {
        match self.pools.find(id) {
            None => Ok(self.pools.create(id, custom)),
            Some(PoolId::DEFAULT) => Err(Error::InvalidArgument("mempool (0, 0) is the default pool".into())),
            Some(pool) => {
                let held = &mut self.pools[pool];
                if held.use_count == 0 {
                    return Err(Error::InvalidArgument(format!(
                        "mempool ({}, {}) has been released and cannot be used again",
                        id.0, id.1
                    )));
                }
                held.use_count += 1;
                held.custom = held.custom.or(custom);
                Ok(pool)
            }
        }
    }

    /// From now on requests on the streams that `filter` selects are served from this pool. `stream` is the caller's
    /// current one: where a graph is captured, it is captured on that.
    ///
    /// # Errors
    /// As [`DeviceState::ensure_pool`]; [`Error::InvalidArgument`] when this pool already is recorded to.
    pub fn begin_allocate_to_pool(
        &mut self,
        id: MempoolId,
        filter: StreamFilter,
        stream: Stream,
        custom: Option<CustomAllocator>,
    ) -> Result<()> {
        if self.routes.iter().any(|route| self.pools[route.pool].id == id) {
            return Err(Error::InvalidArgument(format!(
                "beginAllocateToPool: already recording to mempool ({}, {})",
                id.0, id.1
            )));
        }
        let pool = self.ensure_pool(id, custom)?;
        self.empty_threads();
        self.routes.push(Route { pool, filter, stream });
        Ok(())
    }

    /// Ends [`DeviceState::begin_allocate_to_pool`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when this pool is not recorded to.
    pub fn end_allocate_to_pool(&mut self, id: MempoolId) -> Result<()> {
        let index = self.routes.iter().position(|route| self.pools[route.pool].id == id).ok_or_else(|| {
            Error::InvalidArgument(format!(
                "endAllocateToPool: not currently recording to mempool ({}, {})",
                id.0, id.1
            ))
        })?;
        self.routes.remove(index);
        Ok(())
    }

    /// Lets go of a pool once. When nobody holds it, its segments may be given back as they become free.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an unknown pool or one that nobody holds.
    pub fn release_pool(&mut self, id: MempoolId) -> Result<()> {
        let pool = self.pool(id)?;
        let held = &mut self.pools[pool];
        if held.use_count == 0 {
            return Err(Error::InvalidArgument(format!("mempool ({}, {}) has already been released", id.0, id.1)));
        }
        held.use_count -= 1;
        Ok(())
    }

    /// How many hold the pool.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an unknown pool.
    pub fn pool_use_count(&self, id: MempoolId) -> Result<i32> {
        Ok(self.pools[self.pool(id)?].use_count)
    }

    /// Whether others may take this pool's free blocks before they run out of memory.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an unknown pool.
    pub fn set_use_on_oom(&mut self, id: MempoolId, on: bool) -> Result<()> {
        let pool = self.pool(id)?;
        self.pools[pool].use_on_oom = on;
        Ok(())
    }

    /// Whether this pool's blocks are handed out whole.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an unknown pool.
    pub fn set_no_split(&mut self, id: MempoolId, on: bool) -> Result<()> {
        let pool = self.pool(id)?;
        self.pools.set_no_split(pool, on);
        Ok(())
    }

    /// Where what the pool takes from CUDA from now on is placed.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an unknown pool; [`Error::NotSupported`] for managed memory on a device that has
    /// none worth the name.
    pub fn set_placement(&mut self, id: MempoolId, pattern: AccessPattern) -> Result<()> {
        let pool = self.pool(id)?;
        super::check_supported(&self.info, self.device, pattern)?;
        self.pools[pool].placement = Some(pattern);
        Ok(())
    }

    /// Whether the live allocations of the pool are exactly these addresses.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an unknown pool.
    pub fn check_pool_live_allocations(&self, id: MempoolId, expected: &[u64]) -> Result<bool> {
        let pool = self.pool(id)?;
        let in_pool = |block: BlockId| self.pools[self.blocks[block].list].pool == pool;
        let live = self.live.values().filter(|&&block| in_pool(block)).count();
        Ok(live == expected.len()
            && expected.iter().all(|address| self.live.get(address).is_some_and(|&block| in_pool(block))))
    }

    fn segments_of(&self, pool: PoolId) -> Vec<SegmentId> {
        (0..self.segments.len() as u32)
            .map(SegmentId)
            .filter(|id| {
                self.segments[id.0 as usize].as_ref().is_some_and(|segment| self.pools[segment.list].pool == pool)
            })
            .collect()
    }

    /// The blocks of a segment in address order.
    pub(super) fn blocks_of(&self, segment: SegmentId) -> Vec<BlockId> {
        let mut blocks = Vec::new();
        let mut block = self.segment(segment).last;
        while block.is_some() {
            blocks.push(block);
            block = self.blocks[block].prev;
        }
        blocks.reverse();
        blocks
    }

    fn pool_waits(&self, pool: PoolId) -> bool {
        self.waits.any(|block| self.pools[self.blocks[block].list].pool == pool)
    }

    /// What the pool holds now.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an unknown or released pool, or one with frees that wait for events; the driver's.
    pub fn checkpoint_state(&mut self, id: MempoolId) -> Result<PoolState> {
        let pool = self.pool(id)?;
        if self.pools[pool].use_count == 0 {
            return Err(Error::InvalidArgument(format!(
                "mempool ({}, {}) has been released and cannot be checkpointed",
                id.0, id.1
            )));
        }
        if !self.capturing() {
            self.process_events()?;
        }
        if self.pool_waits(pool) {
            return Err(Error::InvalidArgument(
                "a private pool can only be checkpointed when no freed block in it waits for another stream".into(),
            ));
        }
        let segments = self
            .segments_of(pool)
            .into_iter()
            .map(|id| SegmentState {
                base: self.segment(id).base,
                blocks: self
                    .blocks_of(id)
                    .into_iter()
                    .map(|block| BlockStateAt {
                        address: self.blocks[block].address,
                        bytes: self.blocks[block].bytes,
                        requested: self.blocks[block].requested,
                        allocated: self.blocks[block].state == BlockState::Allocated,
                        uses: self.waits.uses(block),
                    })
                    .collect(),
            })
            .collect();
        Ok(PoolState { id, device: self.device, segments })
    }

    /// Brings a pool back to a checkpoint: frees what it has allocated, then allocates what was allocated then, at the same
    /// addresses. Segments made or grown since then stay, free.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an unknown or released pool, one with frees that wait for events, or a checkpoint that does
    /// not fit it (a segment is gone); the driver's. Nothing has changed then.
    pub fn restore_pool(&mut self, state: &PoolState, context: Option<Context>) -> Result<Restored> {
        let pool = self.pool(state.id)?;
        if self.pools[pool].use_count == 0 {
            return Err(Error::InvalidArgument(format!(
                "mempool ({}, {}) has been released and cannot be restored",
                state.id.0, state.id.1
            )));
        }
        if self.pool_waits(pool) {
            return Err(Error::InvalidArgument(
                "a private pool can only be restored when no freed block in it waits for another stream".into(),
            ));
        }
        let segments = self.segments_of(pool);
        let mut targets = Vec::with_capacity(state.segments.len());
        for then in &state.segments {
            let found = segments.iter().copied().find(|&id| self.segment(id).base == then.base);
            match found {
                Some(id) => targets.push((id, then)),
                None => {
                    return Err(Error::InvalidArgument(format!(
                        "the checkpoint's segment at {:?} is not in the pool any more",
                        then.base
                    )));
                }
            }
        }

        // What is handed out again below keeps its contents, so nothing moves; but nothing is handed out discarded.
        for &id in &segments {
            let stream = self.pools[self.segment(id).list].stream;
            self.populate_all_raw(id, stream)?;
        }

        let mut restored = Restored::default();
        for &id in &segments {
            for address in self.live_addresses(id) {
                // Their uses belong to replays that are over.
                if let Some(&block) = self.live.get(&address) {
                    self.blocks[block].has_uses = false;
                    self.waits.forget(block);
                }
                self.free(DevicePtr(address), &mut context.clone());
                self.settle();
                restored.freed.push(address);
            }
        }
        for (id, then) in targets {
            self.restore_segment(id, then, &context, &mut restored);
        }
        Ok(restored)
    }

    fn live_addresses(&self, id: SegmentId) -> Vec<u64> {
        self.blocks_of(id)
            .into_iter()
            .filter(|&block| self.blocks[block].state == BlockState::Allocated)
            .map(|block| self.blocks[block].address)
            .collect()
    }

    /// Cuts a wholly free segment as it was: allocates every block up to the last live one in address order, then frees
    /// those that were free.
    fn restore_segment(
        &mut self,
        id: SegmentId,
        then: &SegmentState,
        context: &Option<Context>,
        restored: &mut Restored,
    ) {
        let Some(end) = then.blocks.iter().rposition(|block| block.allocated) else { return };
        let list = self.segment(id).list;
        let stream: Stream = self.pools[list].stream;
        let mut holes = Vec::new();
        for block in &then.blocks[..=end] {
            let free = self.segment(id).last;
            // A free block counts as a request for all of it, so that statistics go up and down by the same.
            let bytes = if block.allocated { block.requested } else { block.bytes };
            let request = Request { bytes, rounded: block.bytes, stream, list };
            let ptr = self.hand_out_exactly(free, &request, context.clone());
            debug_assert_eq!(ptr.0, block.address);
            if block.allocated {
                for &(device, stream) in &block.uses {
                    let known = self.record_stream(ptr, device, stream);
                    debug_assert!(known.is_ok());
                }
                restored.created.push(ptr.0);
            } else {
                holes.push(ptr);
            }
        }
        for hole in holes {
            self.free(hole, &mut context.clone());
            self.settle();
        }
    }
}
