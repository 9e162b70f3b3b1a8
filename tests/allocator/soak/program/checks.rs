//! Looking at every byte that matters, and at the allocator's figures.

use super::Program;
use super::tensor::{Copied, SLOT, SLOTS, Tensor};
use std::collections::BTreeSet;
use torch_uvm::driver::{DeviceIndex, DevicePtr, Stream};
use torch_uvm::ids::DEFAULT_POOL;
use torch_uvm_sim::CopyKind;

impl Program {
    /// Copies some of a tensor to a slot in the order of a stream: whoever gets the memory too early is seen there.
    pub(super) fn copy_late(&mut self, tensor: &Tensor, device: DeviceIndex, stream: Stream) {
        if self.copied.len() as u64 == SLOTS {
            self.look_at_copies();
        }
        let slot = self.copied.len() as u64;
        let copied = self.copy_to(slot, tensor, device, stream);
        self.copied.push(copied);
    }

    pub(super) fn copy_to(&mut self, slot: u64, tensor: &Tensor, device: DeviceIndex, stream: Stream) -> Copied {
        let (offset, bytes) = tensor.sample(&mut self.random);
        let (to, from) = (self.sink + slot * SLOT, tensor.ptr.0 + offset);
        self.world.machine.memcpy_async(device, to, from, bytes, CopyKind::Default, stream).expect("late copy");
        Copied { slot, tensor: *tensor, offset, bytes }
    }

    /// Makes a stream wait for what another has queued so far.
    pub(super) fn order(&self, before: (DeviceIndex, Stream), after: (DeviceIndex, Stream)) {
        let machine = &self.world.machine;
        let event = machine.event_create(before.0, false).expect("event");
        machine.event_record(before.0, event, before.1).expect("record");
        machine.stream_wait_event(after.0, after.1, event).expect("wait");
        machine.event_destroy(before.0, event).expect("destroy");
    }

    pub(super) fn read(&self, at: u64, bytes: u64) -> Vec<u8> {
        let mut host = vec![0_u8; bytes as usize];
        self.world.machine.read(0, DevicePtr(at), &mut host).expect("read");
        host
    }

    /// Looks at a tensor's bytes, after its stream's work.
    pub(super) fn verify(&self, tensor: &Tensor) {
        self.world.machine.stream_synchronize(tensor.device, tensor.stream).expect("synchronize");
        for (offset, length) in tensor.chunks() {
            tensor.check(offset, &self.read(tensor.ptr.0 + offset, length), "in memory");
        }
    }

    /// Waits for all work.
    pub(super) fn barrier(&mut self) {
        self.look_at_copies();
        let launched = self.graphs.iter().filter(|graph| graph.launched);
        for copied in launched.flat_map(|graph| &graph.copied) {
            self.look_at(copied);
        }
        for graph in &mut self.graphs {
            graph.launched = false;
        }
    }

    pub(super) fn look_at_copies(&mut self) {
        let mine = self.streams.iter().zip(0..).flat_map(|(streams, device)| streams.iter().map(move |&s| (device, s)));
        // And those of other programs, whose tensors this one has taken.
        let theirs = self.copied.iter().map(|copied| (copied.tensor.device, copied.tensor.stream));
        for (device, stream) in mine.chain(theirs).collect::<BTreeSet<_>>() {
            self.world.machine.stream_synchronize(device, stream).expect("synchronize");
        }
        for tensor in &mut self.live {
            tensor.elsewhere = false;
        }
        let seen = self.read(self.sink, (self.copied.len() as u64 * SLOT).max(1));
        for Copied { slot, tensor, offset, bytes } in std::mem::take(&mut self.copied) {
            let seen = &seen[(slot * SLOT) as usize..][..bytes as usize];
            tensor.check(offset, seen, "in a late copy: the memory was reused before it was made");
        }
    }

    pub(super) fn look_at(&self, copied: &Copied) {
        let seen = self.read(self.sink + copied.slot * SLOT, copied.bytes);
        copied.tensor.check(copied.offset, &seen, "in a graph's copy");
    }

    /// Compares the books with the program's.
    pub(super) fn check(&mut self) {
        self.world.check();
        if !self.alone() {
            return;
        }
        if self.random.one_in(16) {
            self.world.machine.check_books().unwrap();
        }
        let hoard = self.hoard.lock();
        let held = || self.live.iter().chain(hoard.iter());
        for device in 0..self.devices {
            let stats = self.world.allocator.device_stats(device).unwrap();
            let here = || held().filter(|tensor| tensor.device == device);
            assert_eq!(stats.allocation.aggregate.current, here().count() as i64, "device {device}");
            let requested: u64 = here().map(|tensor| tensor.bytes).sum();
            // Frees that wait are still active.
            assert!(stats.requested_bytes.aggregate.current as u64 >= requested, "device {device}");
        }
        let mut ranges: Vec<_> = held().map(|tensor| (tensor.ptr.0, tensor.end())).collect();
        ranges.sort_unstable();
        assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0), "live allocations overlap");
    }

    pub(super) fn reserved(&self) -> i64 {
        let of = |device| self.world.allocator.device_stats(device).unwrap().reserved_bytes.aggregate.current;
        (0..self.devices).map(of).sum()
    }

    /// The default pool has no segment in which nothing is in use.
    pub(super) fn nothing_is_cached(&self) {
        let snapshot = self.world.allocator.snapshot(DEFAULT_POOL, false);
        for device in 0..self.devices {
            for place in self.world.allocator.segment_places(device).unwrap() {
                let within = place.base.0..place.base.0 + place.range_bytes;
                let active: u64 = snapshot
                    .segments
                    .iter()
                    .filter(|segment| within.contains(&segment.address))
                    .map(|segment| segment.active_bytes)
                    .sum();
                assert!(active > 0 || place.pool != DEFAULT_POOL, "{place:?} was kept");
            }
        }
    }

    pub(super) fn look(&mut self) -> Option<()> {
        let device = self.device();
        match self.random.below(6) {
            4 => {
                let places = self.world.allocator.place_stats(device).unwrap();
                let segments = self.world.allocator.segment_places(device).unwrap();
                let sums = segments.iter().fold([0; 3], |[device, host, unplaced], segment| {
                    [device + segment.device, host + segment.host, unplaced + segment.unplaced]
                });
                if self.alone() {
                    assert_eq!(sums, [places.device, places.host, places.unplaced].map(|level| level.current));
                }
            }
            0 => {
                let result = self.call(|program| program.world.allocator.memory_info(device));
                let info = self.expect(result, &[])?;
                if self.alone() {
                    assert_eq!(info.reserved, info.populated.total());
                    assert!(info.allocated <= info.reserved && info.free <= info.capacity, "{info:?}");
                }
            }
            1 => {
                let result = self.call(|program| program.world.allocator.cache_info(device));
                self.expect(result, &[])?;
            }
            2 => {
                let snapshot = self.world.allocator.snapshot(DEFAULT_POOL, self.random.one_in(4));
                let reserved: u64 = snapshot.segments.iter().map(|segment| segment.total_bytes).sum();
                let allocated = snapshot.segments.iter().flat_map(|segment| &segment.blocks);
                let allocated = allocated.filter(|block| block.allocated).count();
                if self.alone() {
                    assert_eq!(reserved as i64, self.reserved());
                    assert_eq!(allocated, self.live.len() + self.hoard.lock().len());
                }
            }
            3 => {
                let index = self.pick(|_| true)?;
                let tensor = self.live[index];
                let known = self.world.allocator.allocation(tensor.ptr).unwrap();
                assert_eq!((known.device, known.requested_bytes), (tensor.device, tensor.bytes));
                assert!(known.block_bytes >= tensor.bytes);
                let (base, bytes) = self.world.allocator.base_allocation(tensor.ptr).unwrap();
                assert!(base <= tensor.ptr && tensor.end() <= base.0 + bytes);
            }
            _ => {
                for pool in &self.pools {
                    let held = self.world.allocator.pools(pool.device).pool_use_count(pool.id).unwrap();
                    assert_eq!(held, pool.holds, "{:?}", pool.id);
                }
            }
        }
        Some(())
    }
}
