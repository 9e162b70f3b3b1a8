//! The heap against a model: a set of ranges. There is no driver here.

use super::*;
use crate::pages::PAGE;
use crate::place::Place;
use crate::segments::Memory;
use proptest::prelude::*;
use std::collections::BTreeMap;

const MIB: u64 = 1 << 20;
const RANGE: u64 = 64 * MIB;

#[derive(Clone, Debug)]
enum Op {
    Allocate(u64),
    Free(prop::sample::Index),
    Extend(u64),
    Segment(bool),
    Decommit(prop::sample::Index),
    Recommit(prop::sample::Index),
    Release(prop::sample::Index),
}

fn op() -> impl Strategy<Value = Op> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        8 => prop_oneof![1..=2000_u64, 1..=12 * MIB].prop_map(Op::Allocate),
        6 => index().prop_map(Op::Free),
        2 => (1..=8_u64).prop_map(|pages| Op::Extend(pages * PAGE)),
        1 => any::<bool>().prop_map(Op::Segment),
        2 => index().prop_map(Op::Decommit),
        2 => index().prop_map(Op::Recommit),
        1 => index().prop_map(Op::Release),
    ]
}

/// A heap whose one list is the large one of the default pool, as the layers above drive it.
struct Model {
    heap: Heap,
    list: ListId,
    native: NativeOptions,
    next_base: u64,
    /// Live allocations: address to bytes of the block.
    live: BTreeMap<u64, u64>,
    /// Populated bytes in all.
    populated: u64,
}

impl Model {
    fn new(max_split_size: u64) -> Self {
        let mut heap = Heap::default();
        let list = heap.pools.list_for(PoolId::DEFAULT, 2 * MIB, Stream(0));
        let native = NativeOptions { max_split_size, ..NativeOptions::default() };
        Self { heap, list, native, next_base: RANGE, live: BTreeMap::new(), populated: 0 }
    }

    fn segment(&mut self, growing: bool, populated: u64) {
        let base = DevicePtr(self.next_base);
        self.next_base += 2 * RANGE;
        self.heap.add_segment(NewSegment {
            list: self.list,
            base,
            range_bytes: if growing { RANGE } else { populated },
            populated,
            growing,
            memory: Memory::Managed,
            place: Place::Device,
            oversize: false,
            context: None,
        });
        self.populated += populated;
    }

    fn allocate(&mut self, bytes: u64) {
        let rounded = bytes.next_multiple_of(MIN_BLOCK);
        let request = Request { bytes, rounded, stream: Stream(0), list: self.list };
        let Some(free) = self.heap.best_fit(&request, &self.native) else { return };
        let found = self.heap.blocks[free].bytes;
        assert!(found >= rounded);
        let split = self.heap.should_split(free, &request, &self.native);
        let taken = self.heap.take(free, rounded, split);
        let address = self.heap.allocate(taken.block, bytes, 0);
        let got = self.heap.blocks[taken.block].bytes;
        assert_eq!(got, if split { rounded } else { found });
        let overlaps = self.live.range(..address + got).next_back().is_some_and(|(start, held)| start + held > address);
        assert!(!overlaps, "handed out twice");
        self.live.insert(address, got);
    }

    fn free(&mut self, index: &prop::sample::Index) {
        if self.live.is_empty() {
            return;
        }
        let address = *index.get(&self.live.keys().copied().collect::<Vec<_>>());
        self.live.remove(&address);
        let block = self.heap.remove_live(address).expect("it is live");
        self.heap.blocks[block].requested = 0;
        let returned = self.heap.put_back(block);
        assert!(returned.merged <= 2 && returned.bytes > returned.merged_bytes);
    }

    fn extend(&mut self, bytes: u64) {
        let mut growing = self.heap.growing_of(PoolId::DEFAULT);
        let id = growing.find(|&id| self.heap.segment(id).growable() >= bytes);
        drop(growing);
        if let Some(id) = id {
            self.heap.extend(id, bytes);
            self.populated += bytes;
        }
    }

    fn decommit(&mut self, index: &prop::sample::Index) {
        let free = self.heap.decommittable(PoolId::DEFAULT, |place| place == Place::Device);
        if !free.is_empty() {
            let (mut block, bytes) = *index.get(&free);
            for run in self.heap.ordinary_pages(block).into_iter().rev() {
                block = self.heap.decommit(block, &run);
            }
            self.populated -= bytes;
        }
    }

    fn recommit(&mut self, index: &prop::sample::Index) {
        let decommitted: Vec<BlockId> = self.blocks(BlockState::Decommitted);
        if !decommitted.is_empty() {
            let block = *index.get(&decommitted);
            let filled = self.heap.recommit(block, PAGE);
            self.heap.put_back(filled);
            self.populated += PAGE;
        }
    }

    fn release(&mut self, index: &prop::sample::Index) {
        let releasable = self.heap.releasable(PoolId::DEFAULT);
        if !releasable.is_empty() {
            let (id, bytes) = *index.get(&releasable);
            assert!(!self.heap.in_use(id) && self.heap.live_in(id).is_empty());
            self.heap.remove_segment(id);
            self.populated -= bytes;
        }
    }

    fn blocks(&self, state: BlockState) -> Vec<BlockId> {
        let all = self.heap.segments().flat_map(|(id, _)| self.heap.blocks_of(id));
        all.filter(|&block| self.heap.blocks[block].state == state).collect()
    }

    fn check(&self) {
        let heap = &self.heap;
        let mut populated = 0;
        for (id, segment) in heap.segments() {
            let mut next = segment.base.0;
            let mut before = BlockState::Allocated;
            for block in heap.blocks_of(id).into_iter().map(|block| &heap.blocks[block]) {
                assert_eq!((block.address, block.segment), (next, id));
                let merged =
                    !matches!(block.state, BlockState::Free | BlockState::Decommitted) || block.state != before;
                assert!(merged, "free neighbours are one block");
                (next, before) = (next + block.bytes, block.state);
            }
            assert_eq!(next, segment.base.0 + segment.filled);
            assert_ne!(before, BlockState::Decommitted, "a segment ends in memory");
            populated += segment.populated();
            assert_eq!(heap.is_listed_as_growing(id), segment.growing);
        }
        assert_eq!(populated, self.populated);
        let free = self.blocks(BlockState::Free);
        let free_bytes: u64 = free.iter().map(|&block| heap.blocks[block].bytes).sum();
        let list = &heap.pools[self.list].free;
        assert_eq!((list.len(), list.bytes()), (free.len(), free_bytes));
        assert_eq!(free_bytes + self.live.values().sum::<u64>(), populated, "no byte is lost");
        let known = heap.live().map(|block| (heap.blocks[block].address, heap.blocks[block].bytes));
        assert_eq!(known.collect::<BTreeMap<_, _>>(), self.live);
        for (&address, &bytes) in &self.live {
            assert_eq!(heap.allocated_around(address + bytes - 1), heap.live_at(DevicePtr(address)));
        }
        assert_eq!(heap.largest_free(), free.iter().map(|&block| heap.blocks[block].bytes).max().unwrap_or(0));
    }
}

proptest! {
    #[test]
    fn no_byte_is_lost_or_handed_out_twice(
        ops in prop::collection::vec(op(), 1..120),
        max_split in prop_oneof![Just(u64::MAX), Just(20 * MIB)],
    ) {
        let mut model = Model::new(max_split);
        for op in &ops {
            match op {
                Op::Allocate(bytes) => model.allocate(*bytes),
                Op::Free(index) => model.free(index),
                Op::Extend(bytes) => model.extend(*bytes),
                Op::Segment(growing) => model.segment(*growing, if *growing { 20 * MIB } else { 6 * MIB }),
                Op::Decommit(index) => model.decommit(index),
                Op::Recommit(index) => model.recommit(index),
                Op::Release(index) => model.release(index),
            }
            model.check();
        }
    }
}

#[test]
fn the_growth_for_a_request_is_where_it_lacks_least() {
    let mut model = Model::new(u64::MAX);
    model.segment(true, 20 * MIB);
    let request = |mib: u64| Request { bytes: mib * MIB, rounded: mib * MIB, stream: Stream(0), list: model.list };
    let growth = model.heap.growth_for(&request(24), Place::Device).expect("at the end");
    assert_eq!(
        (growth.decommitted, growth.missing, growth.offset, growth.available),
        (None, 4 * MIB, 20 * MIB, 44 * MIB)
    );
    assert!(model.heap.growth_for(&request(65), Place::Device).is_none(), "larger than the range");
    assert!(model.heap.growth_for(&request(24), Place::Host).is_none(), "memory of another place");
    // A hole of 4 MiB between two allocations, with nothing free around it.
    model.allocate(4 * MIB);
    model.allocate(4 * MIB);
    model.allocate(12 * MIB);
    let hole = model.heap.live_at(DevicePtr(RANGE + 4 * MIB)).expect("the second");
    model.heap.remove_live(RANGE + 4 * MIB);
    model.heap.put_back(hole);
    model.heap.decommit(hole, &(2..4));
    let request = |mib: u64| Request { bytes: mib * MIB, rounded: mib * MIB, stream: Stream(0), list: model.list };
    let growth = model.heap.growth_for(&request(3), Place::Device).expect("the hole or the end");
    assert_eq!((growth.missing, growth.available), (3 * MIB, 4 * MIB));
    assert_eq!(growth.offset, 4 * MIB);
}
