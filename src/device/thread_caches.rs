//! The threads' caches of one device, as the device sees them ([`crate::thread_cache`] is how a thread sees its own).

use crate::driver::{DeviceIndex, Stream};
use crate::heap::Heap;
use crate::ids::{BlockId, ThreadId};
use crate::options::NativeOptions;
use crate::thread_cache::{self, Slot, ThreadCache};
use std::sync::Arc;

/// The caches of the threads that freed something on a device.
pub struct ThreadCaches {
    /// The allocator that this is a device of, as the threads' caches know it.
    allocator: u64,
    device: DeviceIndex,
    threads: Vec<Option<Arc<ThreadCache>>>,
    /// What is being taken out of them; kept to be reused.
    taken: Vec<Slot>,
    /// Whether the options' rounding is what the caches know.
    plain_rounding: bool,
}

/// What became of a block that a thread freed.
pub struct Kept {
    /// Its cache has it now.
    pub kept: bool,
    /// The block that had to leave for it.
    pub left: Option<Slot>,
}

/// Whether sizes are rounded to multiples of 512 bytes and to nothing else.
fn rounds_plainly(native: &NativeOptions) -> bool {
    native.roundup_power2_divisions.iter().all(|&divisions| divisions <= 1)
}

impl ThreadCaches {
    /// No thread has freed anything yet.
    pub fn new(allocator: u64, device: DeviceIndex, native: &NativeOptions) -> Self {
        let plain_rounding = rounds_plainly(native);
        Self { allocator, device, threads: Vec::new(), taken: Vec::new(), plain_rounding }
    }

    /// PyTorch's own settings, as they are now.
    pub fn set_native(&mut self, native: &NativeOptions) {
        self.plain_rounding = rounds_plainly(native);
    }

    /// Whether the caches round sizes as the options want it.
    #[inline]
    pub fn may_keep(&self) -> bool {
        self.plain_rounding
    }

    /// Leaves a freed block to this thread's next request of its size, if such requests are likely.
    pub fn keep(&mut self, heap: &mut Heap, block: BlockId, stream: Stream) -> Kept {
        let Self { allocator, device, threads, .. } = self;
        let freed = heap.blocks[block];
        let slot = |id: ThreadId| {
            heap.blocks[block].thread = id;
            Slot {
                address: freed.address,
                bytes: freed.bytes,
                requested: freed.requested,
                stream,
                block,
                parked: true,
                rounds: 0,
                requested_again: 0,
                requested_before: 0,
            }
        };
        let register = |cache: &Arc<ThreadCache>| {
            let index = threads.iter().position(Option::is_none).unwrap_or(threads.len());
            let id = ThreadId::new(index)?;
            if index == threads.len() {
                threads.push(None);
            }
            threads[index] = Some(Arc::clone(cache));
            Some(id)
        };
        let (kept, left) = thread_cache::park(*allocator, *device, slot, register);
        Kept { kept, left }
    }

    /// The cache of the thread that asks, where it has one.
    #[inline]
    pub fn mine(&self) -> Option<ThreadId> {
        thread_cache::mine(self.allocator, self.device)
    }

    /// Takes the cached blocks out of one thread's cache.
    #[inline]
    pub fn take_from(&mut self, thread: ThreadId) -> Vec<Slot> {
        let mut taken = std::mem::take(&mut self.taken);
        if let Some(Some(cache)) = self.threads.get(thread.index()) {
            cache.take(false, &mut taken);
        }
        taken
    }

    /// Takes blocks out of all threads' caches: the cached ones, or those in use as well.
    pub fn take(&mut self, all: bool) -> Vec<Slot> {
        let mut taken = std::mem::take(&mut self.taken);
        for thread in &mut self.threads {
            if let Some(cache) = thread {
                let ended = cache.is_abandoned();
                cache.take(all || ended, &mut taken);
                if ended {
                    *thread = None;
                }
            }
        }
        taken
    }

    /// What [`ThreadCaches::take`] gave was dealt with: its memory is used again.
    #[inline]
    pub fn dealt_with(&mut self, mut taken: Vec<Slot>) {
        taken.clear();
        self.taken = taken;
    }

    /// Takes one block out of the cache that it is in.
    pub fn take_one(&mut self, thread: ThreadId, address: u64) -> Option<Slot> {
        self.threads.get(thread.index()).and_then(Option::as_ref)?.take_one(address)
    }

    /// Takes one block out of the cache that it is in, if it is the program's.
    pub fn take_live(&mut self, thread: ThreadId, address: u64) -> Option<Slot> {
        self.threads.get(thread.index()).and_then(Option::as_ref)?.take_live(address)
    }

    /// Calls `merge` for every block that stays in a cache, and forgets what happened to it.
    pub fn merge(&self, mut merge: impl FnMut(&Slot)) {
        for cache in self.threads.iter().flatten() {
            cache.merge(&mut merge);
        }
    }

    /// Whether there is such a cache.
    pub fn exists(&self, thread: ThreadId) -> bool {
        self.threads.get(thread.index()).is_some_and(Option::is_some)
    }
}
