//! Private pools.

use super::Program;
use super::graphs::Checkpoint;
use torch_uvm::allocator::CustomAllocator;
use torch_uvm::driver::{DeviceIndex, Stream};
use torch_uvm::ids::MempoolId;
use torch_uvm::options::AccessPattern;

#[derive(Default)]
pub(super) struct Pool {
    pub(super) id: MempoolId,
    pub(super) device: DeviceIndex,
    /// How often the program holds it.
    pub(super) holds: i32,
    pub(super) open: bool,
    /// Of CUDA graphs, not a MemPool.
    pub(super) of_graphs: bool,
    pub(super) checkpoint: Option<Checkpoint>,
}

impl Program {
    /// The pool that a request on a stream is served from: that which was opened last.
    pub(super) fn pool_of(&self, device: DeviceIndex) -> Option<MempoolId> {
        // All open pools take every stream of the program's.
        self.pools.iter().rev().find(|pool| pool.open && pool.device == device).map(|pool| pool.id)
    }

    pub(super) fn filter(&self, device: DeviceIndex) -> Box<dyn Fn(Stream) -> bool + Send> {
        let mine = self.streams[device as usize].clone();
        Box::new(move |stream| mine.contains(&stream))
    }

    /// Opens a MemPool, a new one or one that the program still holds.
    pub(super) fn open_pool(&mut self) -> Option<()> {
        let device = self.device();
        let closed = (0..self.pools.len()).find(|&index| {
            !self.pools[index].open && !self.pools[index].of_graphs && self.pools[index].device == device
        });
        let allocator = &self.world.allocator;
        let index = match closed {
            Some(index) if self.random.one_in(2) || self.pools.len() > 6 => index,
            _ if self.pools.len() > 6 => return None,
            _ => {
                let id = (self.next_pool, 0);
                self.next_pool += 1;
                let custom = (device == 0 && self.random.one_in(6)).then_some(CustomAllocator(7));
                allocator.pools(device).ensure_pool(id, custom).unwrap();
                if custom.is_none() && self.random.one_in(2) {
                    let patterns = [
                        AccessPattern::CpuFirst,
                        AccessPattern::Device,
                        AccessPattern::Balanced,
                        AccessPattern::GpuFirst,
                    ];
                    allocator.pools(device).set_pool_placement(id, *self.random.of(&patterns)).unwrap();
                }
                self.pools.push(Pool { id, device, holds: 1, ..Pool::default() });
                self.pools.len() - 1
            }
        };
        // The last of those that are open serves.
        let mut pool = self.pools.remove(index);
        let current = self.streams[device as usize][0];
        self.world.allocator.pools(device).begin_allocate_to_pool(pool.id, self.filter(device), current, None).unwrap();
        pool.open = true;
        pool.holds += 1;
        self.pools.push(pool);
        Some(())
    }

    pub(super) fn close_pool(&mut self) -> Option<()> {
        let open: Vec<usize> = (0..self.pools.len()).filter(|&index| self.pools[index].open).collect();
        if open.is_empty() {
            return None;
        }
        let pool = &mut self.pools[*self.random.of(&open)];
        pool.open = false;
        self.world.allocator.pools(pool.device).end_allocate_to_pool(pool.id).unwrap();
        Some(())
    }

    /// Lets go of a pool for good. What was allocated from it lives on.
    pub(super) fn release_pool(&mut self) -> Option<()> {
        let closed: Vec<usize> = (0..self.pools.len()).filter(|&index| !self.pools[index].open).collect();
        if closed.is_empty() {
            return None;
        }
        let pool = self.pools.remove(*self.random.of(&closed));
        self.drop_graphs(pool.id);
        for _ in 0..pool.holds {
            self.world.allocator.pools(pool.device).release_pool(pool.id).unwrap();
        }
        assert!(self.world.allocator.pools(pool.device).release_pool(pool.id).is_err());
        if self.random.one_in(2) {
            let result = self.call(|program| program.world.allocator.empty_cache(pool.id, None));
            self.expect(result, &[]);
        }
        Some(())
    }

    pub(super) fn set_pool(&mut self) -> Option<()> {
        let mempools: Vec<usize> = (0..self.pools.len()).filter(|&index| !self.pools[index].of_graphs).collect();
        if mempools.is_empty() {
            return None;
        }
        let Pool { device, id, .. } = self.pools[*self.random.of(&mempools)];
        let on = self.random.one_in(2);
        if self.random.one_in(2) {
            self.world.allocator.pools(device).set_use_on_oom(id, on).unwrap();
        } else {
            self.world.allocator.pools(device).set_no_split(id, on).unwrap();
        }
        Some(())
    }
}
