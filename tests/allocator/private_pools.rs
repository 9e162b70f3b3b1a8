//! Private pools: CUDA graphs, MemPools, checkpoints.

use crate::world::{MIB, World};
use std::collections::HashSet;
use torch_uvm::allocator::CustomAllocator;
use torch_uvm::driver::{CaptureMode, DevicePtr};
use torch_uvm::error::Error;
use torch_uvm::ids::{DEFAULT_POOL, MempoolId};
use torch_uvm::options::{AccessPattern, NativeOptions};
use torch_uvm_sim::{Config, PointerKind};

const GRAPH: MempoolId = (0, 7);
const OTHER: MempoolId = (0, 8);

fn in_pool(world: &World, id: MempoolId, sizes: &[u64]) -> Vec<DevicePtr> {
    world.begin_pool(id, 0);
    let ptrs = sizes.iter().map(|&bytes| world.empty(bytes, 0).unwrap()).collect();
    world.end_pool(id);
    ptrs
}

#[test]
fn a_pools_memory_stays_its_own() {
    let world = World::small();
    let a = in_pool(&world, GRAPH, &[4096])[0];
    world.allocator.free(a, None).unwrap();
    // Neither the default pool nor another graph gets the freed block: replays still write there.
    let outside = world.empty(4096, 0).unwrap();
    let other = in_pool(&world, OTHER, &[4096])[0];
    assert!(a != outside && a != other && outside != other);
    assert_eq!(in_pool(&world, GRAPH, &[4096])[0], a, "its own next capture does");
    assert_eq!(world.allocator.snapshot(GRAPH, true).segments.len(), 1);
    for ptr in [a, outside, other] {
        world.allocator.free(ptr, None).unwrap();
    }
    for id in [GRAPH, GRAPH, OTHER] {
        world.allocator.pools(0).release_pool(id).unwrap();
    }
    world.finish();
}

#[test]
fn the_innermost_of_nested_pools_serves() {
    let world = World::small();
    world.begin_pool(GRAPH, 0);
    world.begin_pool(OTHER, 0);
    let inner = world.empty(30 * MIB, 0).unwrap();
    world.end_pool(OTHER);
    let outer = world.empty(30 * MIB, 0).unwrap();
    world.end_pool(GRAPH);
    for (id, ptr) in [(OTHER, inner), (GRAPH, outer)] {
        let segments = world.allocator.snapshot(id, false).segments;
        assert_eq!(segments.iter().map(|segment| segment.address).collect::<Vec<_>>(), [ptr.0]);
        world.allocator.free(ptr, None).unwrap();
        world.allocator.pools(0).release_pool(id).unwrap();
    }
    world.finish();
}

#[test]
fn a_pool_in_use_is_not_given_back_and_a_released_one_is() {
    let world = World::small();
    let kept = in_pool(&world, GRAPH, &[30 * MIB])[0];
    world.allocator.free(kept, None).unwrap();
    world.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
    assert_eq!(world.reserved(), 30 * MIB, "a replay may still write there");
    assert_eq!(world.allocator.pools(0).pool_use_count(GRAPH).unwrap(), 1);
    world.allocator.pools(0).release_pool(GRAPH).unwrap();
    assert_eq!(world.allocator.pools(0).pool_use_count(GRAPH).unwrap(), 0);
    world.allocator.empty_cache(GRAPH, None).unwrap();
    assert_eq!(world.reserved(), 0);
    assert!(world.allocator.pools(0).pool_use_count(GRAPH).is_err(), "forgotten");
    world.finish();
}

#[test]
fn segments_of_private_pools_are_natives_unless_expandable_ones_are_asked_for() {
    for (expandable, segments) in [(false, 4), (true, 2)] {
        let world = World::small();
        let native = NativeOptions { expandable_segments: expandable, ..NativeOptions::default() };
        world.allocator.set_native_options(native);
        let ptrs = in_pool(&world, GRAPH, &[16, 20 * MIB, 20 * MIB, 20 * MIB]);
        let snapshot = world.allocator.snapshot(GRAPH, true);
        assert_eq!(snapshot.segments.len(), segments);
        assert!(snapshot.segments.iter().all(|segment| segment.is_expandable == expandable));
        for ptr in ptrs {
            world.allocator.free(ptr, None).unwrap();
        }
        world.allocator.pools(0).release_pool(GRAPH).unwrap();
        world.finish();
    }
}

#[test]
fn a_released_pool_lives_on_while_its_outputs_do() {
    let mut world = World::small();
    world.begin_pool(GRAPH, 0);
    let output = world.tensor(4096, 0).unwrap();
    world.end_pool(GRAPH);
    world.allocator.pools(0).release_pool(GRAPH).unwrap();
    world.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
    world.verify(&output);
    world.free(output);
    world.finish();
}

#[test]
fn pools_are_counted_and_misuse_is_refused() {
    let world = World::small();
    let invalid = |result: torch_uvm::error::Result<()>| {
        assert!(matches!(&result, Err(Error::InvalidArgument(_))), "{result:?}");
    };
    invalid(world.allocator.pools(0).end_allocate_to_pool(GRAPH));
    invalid(world.allocator.pools(0).release_pool(GRAPH));
    invalid(world.allocator.pools(0).pool_use_count(GRAPH).map(|_| ()));
    invalid(world.allocator.pools(0).ensure_pool(DEFAULT_POOL, None));
    world.allocator.pools(0).ensure_pool(GRAPH, None).unwrap();
    world.begin_pool(GRAPH, 0);
    invalid(world.allocator.pools(0).begin_allocate_to_pool(GRAPH, Box::new(|_| true), world.streams[0], None));
    assert_eq!(world.allocator.pools(0).pool_use_count(GRAPH).unwrap(), 2, "a refused begin holds nothing");
    world.end_pool(GRAPH);
    let held = in_pool(&world, GRAPH, &[30 * MIB])[0];
    for _ in 0..3 {
        world.allocator.pools(0).release_pool(GRAPH).unwrap();
    }
    invalid(world.allocator.pools(0).release_pool(GRAPH));
    invalid(world.allocator.pools(0).begin_allocate_to_pool(GRAPH, Box::new(|_| true), world.streams[0], None));
    world.allocator.free(held, None).unwrap();
    world.finish();
}

#[test]
fn a_mempools_own_allocator_makes_and_frees_its_segments() {
    let world = World::small();
    let mine = Some(CustomAllocator(42));
    world.allocator.pools(0).begin_allocate_to_pool((3, 0), Box::new(|_| true), world.streams[0], mine).unwrap();
    let ptrs: Vec<DevicePtr> = (0..3).map(|_| world.empty(MIB, 0).unwrap()).collect();
    world.end_pool((3, 0));
    assert_eq!(world.hooks.custom.lock().values().copied().collect::<Vec<_>>(), [2 * MIB, 2 * MIB]);
    assert_eq!(world.allocator.snapshot((3, 0), true).segments.len(), 2);
    for ptr in ptrs {
        world.allocator.free(ptr, None).unwrap();
    }
    world.allocator.pools(0).release_pool((3, 0)).unwrap();
    world.allocator.empty_cache((3, 0), None).unwrap();
    assert!(world.hooks.custom.lock().is_empty());
    assert_eq!(*world.hooks.forgotten.lock(), [(3, 0)], "nobody needs the allocator any more");
    world.finish();
}

#[test]
fn a_pool_may_be_placed_elsewhere_than_the_options_say() {
    for (pattern, kind, place) in [
        (AccessPattern::CpuFirst, PointerKind::Managed, (0, 30 * MIB, 0)),
        (AccessPattern::Balanced, PointerKind::Managed, (0, 0, 30 * MIB)),
        (AccessPattern::GpuFirst, PointerKind::Managed, (30 * MIB, 0, 0)),
        (AccessPattern::Device, PointerKind::Device, (30 * MIB, 0, 0)),
    ] {
        let world = World::small();
        world.allocator.pools(0).ensure_pool(GRAPH, None).unwrap();
        world.allocator.pools(0).set_pool_placement(GRAPH, pattern).unwrap();
        let ptr = in_pool(&world, GRAPH, &[30 * MIB])[0];
        let populated = world.allocator.memory_info(0).unwrap().populated;
        assert_eq!((populated.device, populated.host, populated.unplaced), place, "{pattern:?}");
        assert_eq!(world.segments()[0].2, kind, "{pattern:?}");
        assert_eq!(world.allocator.ipc_handle(ptr).is_ok(), pattern == AccessPattern::Device);
        let default = world.empty(30 * MIB, 0).unwrap();
        assert_eq!(world.allocator.memory_info(0).unwrap().populated.device, place.0 + 30 * MIB, "the others stay");
        for ptr in [ptr, default] {
            world.allocator.free(ptr, None).unwrap();
        }
        world.allocator.pools(0).release_pool(GRAPH).unwrap();
        world.allocator.pools(0).release_pool(GRAPH).unwrap();
        world.finish();
    }
    let world = World::small();
    for nobodys in [GRAPH, DEFAULT_POOL] {
        let refused = world.allocator.pools(0).set_pool_placement(nobodys, AccessPattern::CpuFirst);
        assert!(matches!(refused, Err(Error::InvalidArgument(_))), "{refused:?}");
    }
    world.finish();
}

#[test]
fn reserved_bytes_are_counted_by_private_pool() {
    let world = World::small();
    let of = |id| world.allocator.pool_reserved(0).unwrap().into_iter().find(|pool| pool.0 == id).map(|pool| pool.1);
    let default = world.empty(30 * MIB, 0).unwrap();
    let ptrs = in_pool(&world, GRAPH, &[512, 30 * MIB]);
    let reserved = of(GRAPH).unwrap();
    assert_eq!(reserved.small_pool.current as u64, 2 * MIB);
    assert_eq!(reserved.large_pool.current as u64, 30 * MIB);
    assert_eq!(reserved.aggregate.peak as u64, 32 * MIB);
    assert_eq!(of(DEFAULT_POOL), None);
    for ptr in ptrs.into_iter().chain([default]) {
        world.allocator.free(ptr, None).unwrap();
    }
    world.allocator.pools(0).release_pool(GRAPH).unwrap();
    world.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
    let gone = of(GRAPH).expect("a pool that is gone is remembered");
    assert_eq!((gone.aggregate.current, gone.aggregate.peak as u64), (0, 32 * MIB));
    world.allocator.reset_peak_stats(0).unwrap();
    assert_eq!(of(GRAPH), None, "until a reset");
    world.finish();
}

#[test]
fn no_split_and_use_on_oom() {
    let world = World::new(torch_uvm_sim::Config::small_gh200(), "uvm_oversubscription_ratio:0.01");
    let lent = in_pool(&world, (4, 0), &[15 * MIB])[0];
    world.allocator.pools(0).set_no_split((4, 0), true).unwrap();
    world.allocator.free(lent, None).unwrap();
    crate::world::out_of_memory(world.empty(10 * MIB, 0));
    world.allocator.pools(0).set_use_on_oom((4, 0), true).unwrap();
    let borrowed = world.empty(10 * MIB, 0).unwrap();
    assert_eq!(borrowed, lent);
    assert_eq!(world.allocator.allocation(borrowed).unwrap().block_bytes, 16 * MIB, "whole, as it was populated");
    world.allocator.free(borrowed, None).unwrap();
    world.allocator.pools(0).release_pool((4, 0)).unwrap();
    world.finish();
}

#[test]
fn live_allocations_of_a_pool_are_checked_exactly() {
    let world = World::small();
    let outside = world.empty(512, 0).unwrap();
    let ptrs = in_pool(&world, GRAPH, &[512, 3 * MIB]);
    let check = |expected: &[u64]| world.allocator.pools(0).check_pool_live_allocations(GRAPH, expected).unwrap();
    assert!(check(&[ptrs[0].0, ptrs[1].0]));
    assert!(!check(&[ptrs[0].0]));
    assert!(!check(&[ptrs[0].0, outside.0]));
    assert!(!check(&[ptrs[0].0, ptrs[1].0, outside.0]));
    assert!(world.allocator.pools(0).check_pool_live_allocations(OTHER, &[]).is_err());
    for ptr in ptrs.into_iter().chain([outside]) {
        world.allocator.free(ptr, None).unwrap();
    }
    world.allocator.pools(0).release_pool(GRAPH).unwrap();
    world.finish();
}

#[test]
fn a_checkpoint_brings_back_the_same_addresses() {
    let world = World::small();
    let before = in_pool(&world, GRAPH, &[1000, 5000, 512, 3 * MIB, 30 * MIB]);
    for index in [1, 3] {
        world.allocator.free(before[index], None).unwrap();
    }
    let segments = |world: &World| -> Vec<Vec<(u64, u64, bool)>> {
        let snapshot = world.allocator.snapshot(GRAPH, true);
        let blocks = |s: &torch_uvm::allocator::SegmentInfo| {
            s.blocks.iter().map(|b| (b.bytes, b.requested_bytes, b.allocated)).collect()
        };
        snapshot.segments.iter().map(blocks).collect()
    };
    let (then, stats) = (segments(&world), world.allocator.device_stats(0).unwrap());
    let state = world.allocator.pools(0).checkpoint_state(GRAPH).unwrap();

    // The program goes on: frees, allocates, and the options change.
    world.allocator.free(before[0], None).unwrap();
    let after = in_pool(&world, GRAPH, &[2000, 800, 2 * MIB]);
    world.allocator.set_native_options(NativeOptions { max_split_size: 21 * MIB, ..NativeOptions::default() });

    let restored = world.allocator.pools(0).restore_pool(&state, None).unwrap();
    world.check();
    let freed: HashSet<u64> = restored.freed.into_iter().collect();
    let live_then = [before[0].0, before[2].0, before[4].0];
    assert_eq!(freed, [before[2].0, before[4].0, after[0].0, after[1].0, after[2].0].into());
    assert_eq!(restored.created.iter().copied().collect::<HashSet<u64>>(), live_then.into());
    assert_eq!(segments(&world), then);
    let now = world.allocator.device_stats(0).unwrap();
    assert_eq!(now.allocated_bytes.aggregate.current, stats.allocated_bytes.aggregate.current);
    assert_eq!(now.requested_bytes.aggregate.current, stats.requested_bytes.aggregate.current);
    assert!(world.allocator.pools(0).check_pool_live_allocations(GRAPH, &live_then).unwrap());

    for address in live_then {
        world.allocator.free(DevicePtr(address), None).unwrap();
    }
    world.allocator.pools(0).release_pool(GRAPH).unwrap();
    world.allocator.pools(0).release_pool(GRAPH).unwrap();
    world.finish();
}

#[test]
fn a_checkpoint_that_does_not_fit_changes_nothing() {
    let world = World::small();
    let ptrs = in_pool(&world, GRAPH, &[512]);
    let state = world.allocator.pools(0).checkpoint_state(GRAPH).unwrap();
    assert!(world.allocator.pools(1).restore_pool(&state, None).is_err());
    world.allocator.free(ptrs[0], None).unwrap();
    world.allocator.pools(0).release_pool(GRAPH).unwrap();
    assert!(world.allocator.pools(0).restore_pool(&state, None).is_err());
    assert!(world.allocator.pools(0).checkpoint_state(GRAPH).is_err());
    world.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
    // A new pool of the same name does not have the segment.
    let again = in_pool(&world, GRAPH, &[3 * MIB]);
    assert!(world.allocator.pools(0).restore_pool(&state, None).is_err());
    assert!(world.allocator.allocation(again[0]).is_ok());
    world.allocator.free(again[0], None).unwrap();
    world.allocator.pools(0).release_pool(GRAPH).unwrap();
    world.finish();
}

/// A MemPool, as `torch.cuda.use_mem_pool` makes it: no stream captures.
const USERS: MempoolId = (5, 0);

#[test]
fn a_mempool_in_use_stops_no_waiting_free() {
    // In the pool, and on a stream that is in none.
    for stream in [0, 1] {
        let world = World::small();
        world.begin_pool(USERS, 0);
        for _ in 0..12 {
            let ptr = world.empty(64 * MIB, stream).unwrap();
            world.allocator.record_stream(ptr, 0, world.streams[2]).unwrap();
            world.allocator.free(ptr, None).unwrap();
            world.machine.device_synchronize(0).unwrap();
        }
        assert_eq!(world.reserved(), 64 * MIB, "each free was over before the next request");
        world.end_pool(USERS);
        world.allocator.pools(0).release_pool(USERS).unwrap();
        world.finish();
    }
}

#[test]
fn a_mempool_in_use_keeps_no_other_cache() {
    let world = World::small();
    world.begin_pool(USERS, 0);
    let inside = world.empty(30 * MIB, 0).unwrap();
    for stream in [1, 2] {
        let cached = world.empty(30 * MIB, stream).unwrap();
        world.allocator.record_stream(cached, 0, world.streams[3 - stream]).unwrap();
        world.allocator.free(cached, None).unwrap();
    }
    world.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
    assert_eq!(world.reserved(), 30 * MIB);
    world.end_pool(USERS);
    world.allocator.free(inside, None).unwrap();
    world.allocator.pools(0).release_pool(USERS).unwrap();
    world.finish();
}

#[test]
fn a_request_in_a_mempool_gets_what_other_caches_hold() {
    let config = || Config::small_gh200().device_memory(256 * MIB).host_memory(4096 * MIB);
    for conf in [
        "uvm_access_pattern:device",
        "uvm_oversubscription_ratio:1",
        "uvm_oversubscription_ratio:1,uvm_access_pattern:cpu_first",
    ] {
        let world = World::new(config(), conf);
        let cached = world.empty(160 * MIB, 1).unwrap();
        world.allocator.free(cached, None).unwrap();
        world.begin_pool(USERS, 0);
        let inside = world.empty(120 * MIB, 0).expect("the cache is given back first");
        world.end_pool(USERS);
        world.allocator.free(inside, None).unwrap();
        world.allocator.pools(0).release_pool(USERS).unwrap();
        world.finish();
    }
}

#[test]
fn garbage_is_collected_while_a_mempool_is_in_use() {
    let world = World::small();
    let native = NativeOptions { garbage_collection_threshold: 0.1, ..NativeOptions::default() };
    world.allocator.set_native_options(native);
    world.allocator.set_memory_fraction(0, 0.5).unwrap();
    let cached = world.empty(600 * MIB, 1).unwrap();
    world.allocator.free(cached, None).unwrap();
    world.begin_pool(USERS, 0);
    let inside = world.empty(30 * MIB, 0).unwrap();
    assert_eq!(world.reserved(), 30 * MIB, "what was cached for long is above the threshold");
    world.end_pool(USERS);
    world.allocator.free(inside, None).unwrap();
    world.allocator.pools(0).release_pool(USERS).unwrap();
    world.finish();
}

#[test]
fn a_capture_that_is_underway_keeps_everything_where_it_is() {
    let world = World::small();
    let cached = world.empty(30 * MIB, 1).unwrap();
    world.allocator.free(cached, None).unwrap();
    world.begin_pool(GRAPH, 0);
    world.machine.begin_capture(0, world.streams[0], CaptureMode::Relaxed).unwrap();
    world.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
    assert_eq!(world.reserved(), 30 * MIB, "a capture is underway");
    let graph = world.machine.end_capture(0, world.streams[0]).unwrap();
    world.machine.graph_destroy(graph).unwrap();
    world.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
    assert_eq!(world.reserved(), 0, "the pool is still used, but nothing is captured");
    world.end_pool(GRAPH);
    world.allocator.pools(0).release_pool(GRAPH).unwrap();
    world.finish();
}
