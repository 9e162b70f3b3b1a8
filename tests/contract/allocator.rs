//! The allocator itself on every machine, a real GPU included: what the simulated device says of it is only worth
//! something if a GPU says the same.

use std::sync::Arc;

use torch_uvm::allocator::{Allocator, CustomAllocator, Hooks};
use torch_uvm::driver::{CaptureMode, DeviceIndex, DevicePtr};
use torch_uvm::error::{Error, Limit};
use torch_uvm::history::TraceEntry;
use torch_uvm::ids::{DEFAULT_POOL, MempoolId};

use super::machine::{Capture, DEVICE, MANAGED_BUDGET, Machine, MachineExt};

const MIB: u64 = 1 << 20;

/// PyTorch has nothing to say here.
struct NoHooks;

impl Hooks for NoHooks {
    fn free_memory_callbacks(&self) -> bool {
        false
    }
    fn approximate_time(&self) -> i64 {
        0
    }
    fn custom_alloc(&self, _: CustomAllocator, _: u64) -> Option<DevicePtr> {
        None
    }
    fn custom_free(&self, _: CustomAllocator, _: DevicePtr) -> bool {
        false
    }
    fn pool_forgotten(&self, _: DeviceIndex, _: MempoolId) {}
    fn trace(&self, _: &TraceEntry) {}
}

/// An allocator whose capacity is half of what the suite may hold.
fn allocator(machine: &dyn Machine, conf: &str) -> Allocator {
    let total = machine.driver().device_info(DEVICE).unwrap().total_memory;
    // Half a byte more: the capacity is rounded down.
    let ratio = ((MANAGED_BUDGET / 2) as f64 + 0.5) / total as f64;
    let conf = format!("use_uvm:True,uvm_oversubscription_ratio:{ratio},{conf}");
    let allocator = Allocator::new(machine.shared_driver(), Arc::new(NoHooks), conf.parse().unwrap());
    allocator.init(1).unwrap();
    allocator
}

/// Nothing is left of an allocator whose allocations were freed.
fn finish(allocator: &Allocator) {
    allocator.empty_cache(DEFAULT_POOL, None).unwrap();
    allocator.check().unwrap();
    assert_eq!(allocator.device_stats(DEVICE).unwrap().reserved_bytes.aggregate.current, 0);
}

/// Every placement gives memory that holds bytes, before and after it was cached.
pub fn every_placement_serves_memory(machine: &dyn Machine) {
    for conf in [
        "uvm_access_pattern:gpu_first",
        "uvm_access_pattern:gpu_first,uvm_device_limit_mb:16",
        "uvm_access_pattern:balanced",
        "uvm_access_pattern:cpu_first",
        "uvm_access_pattern:device",
        "uvm_prefetch:False",
    ] {
        let allocator = allocator(machine, conf);
        let stream = machine.driver().stream_create(DEVICE).unwrap();
        for round in 0..2 {
            let sizes = [1, 4096, MIB, 3 * MIB, 12 * MIB + 1, 30 * MIB];
            let blocks: Vec<_> =
                sizes.map(|bytes| (allocator.allocate(DEVICE, bytes, stream, None).unwrap(), bytes)).into();
            machine.driver().stream_synchronize(DEVICE, stream).unwrap();
            for &(ptr, bytes) in &blocks {
                machine.write(ptr, &machine.pattern(bytes, round));
            }
            for &(ptr, bytes) in &blocks {
                machine.assert_bytes(ptr, &machine.pattern(bytes, round), conf);
                allocator.free(ptr, None).unwrap();
            }
            allocator.check().unwrap();
        }
        finish(&allocator);
        machine.driver().stream_destroy(DEVICE, stream).unwrap();
    }
}

/// The cap refuses what CUDA would have given, and giving back makes room again.
pub fn the_cap_holds(machine: &dyn Machine) {
    let allocator = allocator(machine, "");
    let stream = machine.driver().stream_create(DEVICE).unwrap();
    let mut held = Vec::new();
    let limit = loop {
        match allocator.allocate(DEVICE, 32 * MIB, stream, None) {
            Ok(ptr) => held.push(ptr),
            Err(Error::OutOfMemory(oom)) => break oom.limit,
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!((limit, held.len() as u64), (Limit::Ratio, MANAGED_BUDGET / 2 / (32 * MIB)));
    let info = allocator.memory_info(DEVICE).unwrap();
    let (free, total) = (info.free, info.capacity);
    assert!(free < 32 * MIB && total <= MANAGED_BUDGET / 2, "free {free}, total {total}");
    for ptr in held {
        allocator.free(ptr, None).unwrap();
    }
    let other = machine.driver().stream_create(DEVICE).unwrap();
    let again = allocator.allocate(DEVICE, 64 * MIB, other, None).unwrap();
    allocator.free(again, None).unwrap();
    finish(&allocator);
}

/// A block that another stream still uses is not handed out; after that it is.
pub fn a_recorded_block_waits_for_its_stream(machine: &dyn Machine) {
    let allocator = allocator(machine, "");
    let stream = machine.driver().stream_create(DEVICE).unwrap();
    let used = allocator.allocate(DEVICE, 4096, stream, None).unwrap();
    let (busy, gate) = machine.gated_stream();
    allocator.record_stream(used, DEVICE, busy).unwrap();
    allocator.free(used, None).unwrap();
    let meanwhile = allocator.allocate(DEVICE, 4096, stream, None).unwrap();
    assert_ne!(meanwhile, used);
    gate.0.open();
    machine.driver().stream_synchronize(DEVICE, busy).unwrap();
    let after = allocator.allocate(DEVICE, 4096, stream, None).unwrap();
    assert_eq!(after, used);
    for ptr in [meanwhile, after] {
        allocator.free(ptr, None).unwrap();
    }
    finish(&allocator);
}

/// Allocating, growing and freeing while a stream captures leaves the capture whole.
pub fn a_capture_survives_allocations(machine: &dyn Machine) {
    let allocator = allocator(machine, "");
    let captured = machine.driver().stream_create(DEVICE).unwrap();
    let other = machine.driver().stream_create(DEVICE).unwrap();
    let before = allocator.allocate(DEVICE, 4096, other, None).unwrap();
    let pool = (0, 1);
    allocator
        .pools(DEVICE)
        .begin_allocate_to_pool(pool, Box::new(move |stream| stream == captured), captured, None)
        .unwrap();
    machine.begin_capture(captured, CaptureMode::Global).unwrap();
    let inside: Vec<_> =
        [512, 8 * MIB, 40 * MIB].map(|bytes| allocator.allocate(DEVICE, bytes, captured, None).unwrap()).into();
    let outside = allocator.allocate(DEVICE, 24 * MIB, other, None).unwrap();
    allocator.record_stream(before, DEVICE, captured).unwrap();
    allocator.free(before, None).unwrap();
    allocator.free(inside[1], None).unwrap();
    let again = allocator.allocate(DEVICE, 8 * MIB, captured, None).unwrap();
    assert_eq!(again, inside[1], "freed in the capture, used again in it");
    assert_eq!(machine.capture_status(captured).unwrap(), Capture::Active);
    machine.end_capture(captured).unwrap();
    allocator.pools(DEVICE).end_allocate_to_pool(pool).unwrap();
    for (index, &ptr) in inside.iter().enumerate() {
        machine.write(ptr, &machine.pattern(512, index as u8));
    }
    for (index, &ptr) in inside.iter().enumerate() {
        machine.assert_bytes(ptr, &machine.pattern(512, index as u8), "after the capture");
        allocator.free(ptr, None).unwrap();
    }
    allocator.free(outside, None).unwrap();
    allocator.pools(DEVICE).release_pool(pool).unwrap();
    finish(&allocator);
}
