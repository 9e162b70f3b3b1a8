//! What every caching allocator owes its program: rounding, best fit, splitting, merging, giving back, statistics.

use crate::world::{GIB, MIB, World};
use std::sync::Arc;
use torch_uvm::driver::DevicePtr;
use torch_uvm::error::Error;
use torch_uvm::history::{self, Action, Actions, Context, RecordContext, Recording};
use torch_uvm::ids::DEFAULT_POOL;
use torch_uvm::options::NativeOptions;
use torch_uvm_sim::{Config, PointerKind};

#[test]
fn freed_memory_is_handed_out_again() {
    let world = World::small();
    let first = world.empty(1000, 0).unwrap();
    assert_eq!(world.allocator.allocation(first).unwrap().block_bytes, 1024);
    world.allocator.free(first, None).unwrap();
    assert_eq!(world.empty(1024, 0).unwrap(), first);
    world.allocator.free(first, None).unwrap();
    world.finish();
}

#[test]
fn streams_do_not_share_free_blocks() {
    let world = World::small();
    let first = world.empty(512, 0).unwrap();
    world.allocator.free(first, None).unwrap();
    let other = world.empty(512, 1).unwrap();
    assert_ne!(first, other);
    world.allocator.free(other, None).unwrap();
    world.finish();
}

#[test]
fn segments_grow_in_place_by_natives_steps() {
    let world = World::small();
    let small = world.empty(512, 0).unwrap();
    assert_eq!(world.reserved(), 2 * MIB);
    let medium = world.empty(2 * MIB, 0).unwrap();
    assert_eq!(world.reserved(), 22 * MIB);
    let large = world.empty(40 * MIB + 512, 0).unwrap();
    // The 18 MiB that the 20 MiB step left are used before anything is populated.
    assert_eq!(large, medium.offset(2 * MIB));
    assert_eq!(world.reserved(), 2 * MIB + (2 + 42) * MIB);
    assert_eq!(world.segments().len(), 2, "one range for each size class");
    for ptr in [small, medium, large] {
        world.allocator.free(ptr, None).unwrap();
    }
    world.finish();
}

#[test]
fn changing_shapes_tile_into_one_range() {
    let world = World::small();
    for step in 0..20 {
        let bytes = (60 + step) * MIB;
        let ptr = world.empty(bytes, 0).unwrap();
        world.allocator.free(ptr, None).unwrap();
    }
    assert_eq!(world.reserved(), 80 * MIB, "native would hold a segment for each shape");
    world.finish();
}

#[test]
fn the_end_of_a_growing_segment_is_taken_last() {
    let world = World::small();
    let [hole, between] = [64, 2].map(|mib| world.empty(mib * MIB, 0).unwrap());
    world.allocator.free(hole, None).unwrap();
    let end = between.offset(2 * MIB);
    assert_eq!(world.reserved(), (64 + 20 - 4) * MIB, "the step has left 14 MiB at the end");
    let small = world.empty(10 * MIB, 0).unwrap();
    assert_eq!(small, hole, "the end fits better, but there a large request can grow");
    let large = world.empty(70 * MIB, 0).unwrap();
    assert_eq!((large, world.reserved()), (end, (64 + 2 + 70) * MIB));
    world.allocator.free(large, None).unwrap();
    let [exact, last] = [70, 54].map(|mib| world.empty(mib * MIB, 0).unwrap());
    assert_eq!((exact, last), (end, hole.offset(10 * MIB)), "what fits exactly is taken wherever it is");
    for ptr in [between, small, exact, last] {
        world.allocator.free(ptr, None).unwrap();
    }
    world.finish();
}

#[test]
fn neighbours_merge_whatever_the_order_of_frees() {
    let world = World::small();
    let blocks: Vec<DevicePtr> = (0..8).map(|_| world.empty(2 * MIB + 512, 0).unwrap()).collect();
    for index in [3, 1, 2, 7, 5, 0, 6, 4] {
        world.allocator.free(blocks[index], None).unwrap();
        world.check();
    }
    let snapshot = world.allocator.snapshot(DEFAULT_POOL, true);
    assert_eq!(snapshot.segments.len(), 1);
    assert_eq!(snapshot.segments[0].blocks.len(), 1);
    world.finish();
}

#[test]
fn only_wholly_free_segments_are_given_back() {
    let world = World::small();
    let kept = world.empty(512, 0).unwrap();
    let large = world.empty(100 * MIB, 0).unwrap();
    world.allocator.free(large, None).unwrap();
    world.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
    assert_eq!(world.reserved(), 2 * MIB);
    assert_eq!(world.segments().len(), 1);
    world.allocator.free(kept, None).unwrap();
    world.finish();
}

#[test]
fn statistics_are_natives() {
    let world = World::small();
    let a = world.empty(1000, 0).unwrap();
    let b = world.empty(3 * MIB, 0).unwrap();
    world.allocator.free(b, None).unwrap();
    let stats = world.allocator.device_stats(0).unwrap();
    assert_eq!(stats.allocation.aggregate.current, 1);
    assert_eq!(stats.allocation.aggregate.peak, 2);
    assert_eq!(stats.allocation.large_pool.freed, 1);
    assert_eq!(stats.allocated_bytes.small_pool.current, 1024);
    assert_eq!(stats.requested_bytes.aggregate.allocated, 1000 + 3 * MIB as i64);
    assert_eq!(stats.reserved_bytes.aggregate.current, 22 * MIB as i64);
    assert_eq!(stats.num_device_alloc, 2);
    assert_eq!(stats.segment.aggregate.current, 0, "growing segments are not counted, as native's expandable ones");
    world.allocator.reset_peak_stats(0).unwrap();
    world.allocator.reset_accumulated_stats(0).unwrap();
    let stats = world.allocator.device_stats(0).unwrap();
    assert_eq!(stats.allocation.aggregate.peak, 1);
    assert_eq!(stats.allocation.aggregate.allocated, 0);
    world.allocator.free(a, None).unwrap();
    world.finish();
}

#[test]
fn plain_device_memory_comes_in_segments_of_fixed_size_and_can_be_shared() {
    let world = World::new(Config::small_gh200(), "uvm_access_pattern:device");
    let a = world.empty(512, 0).unwrap();
    let b = world.empty(512, 0).unwrap();
    let c = world.empty(3 * MIB, 0).unwrap();
    let stats = world.allocator.device_stats(0).unwrap();
    assert_eq!(stats.segment.aggregate.current, 2);
    assert_eq!(stats.inactive_split.small_pool.current, 1);
    assert_eq!(stats.inactive_split_bytes.large_pool.current, 17 * MIB as i64);
    assert!(world.segments().iter().all(|&(_, _, kind)| kind == PointerKind::Device));
    let (_, offset) = world.allocator.ipc_handle(b).unwrap();
    assert_eq!(offset, 512);
    for ptr in [a, b, c] {
        world.allocator.free(ptr, None).unwrap();
    }
    let stats = world.allocator.device_stats(0).unwrap();
    assert_eq!(stats.inactive_split.aggregate.current, 0);
    assert_eq!(stats.inactive_split_bytes.aggregate.current, 0);
    world.finish();
}

#[test]
fn managed_memory_has_no_ipc_handles_and_says_so() {
    let world = World::small();
    let ptr = world.empty(512, 0).unwrap();
    let error = world.allocator.ipc_handle(ptr).unwrap_err();
    assert!(matches!(&error, Error::NotSupported(text) if text.contains("uvm_access_pattern:device")), "{error}");
    world.allocator.free(ptr, None).unwrap();
    world.finish();
}

#[test]
fn oversize_blocks_are_neither_split_nor_wasted() {
    let world = World::small();
    let native = NativeOptions { max_split_size: 40 * MIB, ..NativeOptions::default() };
    world.allocator.set_native_options(native);
    let big = world.empty(64 * MIB, 0).unwrap();
    let stats = world.allocator.device_stats(0).unwrap();
    assert_eq!(stats.oversize_allocations.current, 1);
    assert_eq!(stats.oversize_segments.current, 1);
    world.allocator.free(big, None).unwrap();
    let small = world.empty(10 * MIB, 0).unwrap();
    assert_ne!(small, big, "an oversize block serves oversize requests");
    let again = world.empty(60 * MIB, 0).unwrap();
    assert_eq!(again, big, "within max_non_split_rounding");
    assert_eq!(world.allocator.allocation(again).unwrap().block_bytes, 64 * MIB, "and whole");
    world.allocator.free(again, None).unwrap();
    let other = world.empty(40 * MIB, 0).unwrap();
    assert_ne!(other, big, "24 MiB would be wasted");
    for ptr in [small, other] {
        world.allocator.free(ptr, None).unwrap();
    }
    world.finish();
}

#[test]
fn unknown_and_stale_pointers_are_refused() {
    let world = World::small();
    let ptr = world.empty(512, 0).unwrap();
    for bad in [DevicePtr(0), DevicePtr(0xdead_0000), ptr.offset(512)] {
        assert_eq!(world.allocator.free(bad, None), Err(Error::InvalidPointer(bad)));
    }
    world.allocator.free(ptr, None).unwrap();
    assert_eq!(world.allocator.free(ptr, None), Err(Error::InvalidPointer(ptr)));
    assert_eq!(world.allocator.record_stream(ptr, 0, world.streams[1]), Err(Error::InvalidPointer(ptr)));
    world.finish();
}

#[test]
fn absurd_sizes_are_out_of_memory_and_cost_nothing() {
    let world = World::small();
    for bytes in [1 << 40, (1 << 60) - 1, 1 << 60, (1 << 63) - 1, 1 << 63, (1 << 63) + 1, u64::MAX - 511, u64::MAX] {
        let oom = crate::world::out_of_memory(world.empty(bytes, 0));
        assert!(oom.to_string().starts_with("CUDA out of memory. Tried to allocate "), "{oom}");
        world.check();
    }
    assert_eq!(world.allocator.device_stats(0).unwrap().num_ooms, 8);
    assert!(matches!(world.empty(0, 0), Err(Error::InvalidArgument(_))));
    assert!(matches!(world.allocator.allocate(7, 512, world.streams[0], None), Err(Error::InvalidArgument(_))));
    assert!(matches!(world.allocator.allocate(-1, 512, world.streams[0], None), Err(Error::InvalidArgument(_))));
    world.finish();
}

fn recording(level: RecordContext) -> Recording {
    Recording { enabled: true, capacity: 100, level, clear: true, skip: Actions::default() }
}

#[test]
fn history_and_snapshot_tell_what_happened() {
    let world = World::small();
    let stack = || Some(Context(Arc::new("here".to_string())));
    world.allocator.set_history(recording(RecordContext::All));
    let ptr = world.allocator.allocate(0, 1000, world.streams[0], stack()).unwrap();
    world.allocator.free(ptr, None).unwrap();
    let kept = world.allocator.allocate(0, 600, world.streams[0], stack()).unwrap();
    let snapshot = world.allocator.snapshot(DEFAULT_POOL, true);
    let actions: Vec<Action> = snapshot.traces[0].iter().map(|entry| entry.action).collect();
    assert_eq!(
        actions,
        [Action::SegmentMap, Action::Alloc, Action::FreeRequested, Action::FreeCompleted, Action::Alloc]
    );
    assert!(snapshot.traces[0].iter().all(|entry| entry.context.is_some()));
    assert_eq!(snapshot.traces[0][1].bytes, 1000);
    let blocks = &snapshot.segments[0].blocks;
    assert_eq!((blocks[0].bytes, blocks[0].requested_bytes, blocks[0].allocated), (1024, 600, true));
    assert!(blocks[0].context.is_some());
    assert_eq!((blocks[1].bytes, blocks[1].active), (2 * MIB - 1024, false));
    world.allocator.set_history(Recording { enabled: false, ..recording(RecordContext::Never) });
    world.allocator.free(kept, None).unwrap();
    assert!(world.allocator.snapshot(DEFAULT_POOL, true).traces[0].is_empty());
    world.finish();
}

#[test]
fn segments_keep_their_stack_only_where_the_trace_does() {
    for (level, kept) in [(RecordContext::State, false), (RecordContext::Alloc, true)] {
        let world = World::small();
        world.allocator.set_history(recording(level));
        let stack = Some(Context(Arc::new("here".to_string())));
        let ptr = world.allocator.allocate(0, 1000, world.streams[0], stack).unwrap();
        let snapshot = world.allocator.snapshot(DEFAULT_POOL, true);
        assert_eq!(snapshot.segments[0].context.is_some(), kept);
        assert!(snapshot.segments[0].blocks[0].context.is_some());
        world.allocator.free(ptr, None).unwrap();
        world.finish();
    }
}

#[test]
fn skipped_actions_are_not_recorded_and_snapshots_may_leave_traces_out() {
    let world = World::small();
    let skip = Actions::default().with(Action::Alloc).with(Action::SegmentMap);
    world.allocator.set_history(Recording { skip, ..recording(RecordContext::Never) });
    world.allocator.free(world.empty(1000, 0).unwrap(), None).unwrap();
    assert!(world.allocator.snapshot(DEFAULT_POOL, false).traces[0].is_empty());
    let traces = world.allocator.snapshot(DEFAULT_POOL, true).traces;
    let actions: Vec<Action> = traces[0].iter().map(|entry| entry.action).collect();
    assert_eq!(actions, [Action::FreeRequested, Action::FreeCompleted, Action::Snapshot]);
    world.finish();
}

#[test]
fn the_trace_says_what_the_program_says_of_itself() {
    let world = World::small();
    let allocator = &world.allocator;
    allocator.set_history(recording(RecordContext::Never));
    allocator.push_compile_context(0, "outer").unwrap();
    allocator.push_compile_context(0, "inner").unwrap();
    let a = world.empty(1000, 0).unwrap();
    allocator.pop_compile_context(0).unwrap();
    history::set_user_metadata("phase one");
    assert_eq!(history::user_metadata().as_deref(), Some("phase one"));
    std::thread::spawn(|| assert_eq!(history::user_metadata(), None, "another thread's is its own")).join().unwrap();
    let b = world.empty(1000, 0).unwrap();
    allocator.annotate(b, "the second").unwrap();
    for _ in 0..3 {
        allocator.pop_compile_context(0).unwrap(); // one too many is no error
    }
    history::set_user_metadata("");
    let c = world.empty(1000, 0).unwrap();
    let traces = allocator.snapshot(DEFAULT_POOL, true).traces;
    let said: Vec<_> = traces[0]
        .iter()
        .filter(|entry| matches!(entry.action, Action::Alloc | Action::Annotate))
        .map(|entry| (entry.address, entry.labels.compile_context.as_deref(), entry.labels.user_metadata.as_deref()))
        .collect();
    assert_eq!(
        said,
        [
            (a.0, Some("inner"), None),
            (b.0, Some("outer"), Some("phase one")),
            (b.0, Some("outer"), Some("the second")),
            (c.0, None, None),
        ]
    );
    assert!(matches!(allocator.annotate(DevicePtr(b.0 + 512), "no allocation"), Err(Error::InvalidPointer(_))));
    for ptr in [a, b, c] {
        allocator.free(ptr, None).unwrap();
    }
    world.finish();
}

#[test]
fn the_stack_of_an_allocation_is_found_from_any_address_in_it() {
    let world = World::small();
    let stack = Some(Context(Arc::new("here".to_string())));
    let with = world.allocator.allocate(0, 5000, world.streams[0], stack).unwrap();
    let without = world.empty(5000, 0).unwrap();
    let known = |address| world.allocator.context_of(address).is_some();
    assert!(known(with.0) && known(with.0 + 4999));
    assert!(!known(without.0) && !known(with.0 - 1) && !known(with.0 + 5120));
    world.allocator.free(with, None).unwrap();
    assert!(!known(with.0), "gone");
    world.allocator.free(without, None).unwrap();
    world.finish();
}

#[test]
fn an_allocation_can_be_had_at_an_address_that_is_free() {
    for growing in [true, false] {
        let conf = if growing { "" } else { "uvm_access_pattern:device" };
        let world = World::new(Config::small_gh200(), conf);
        let at = |address, bytes| world.allocator.allocate_at(0, address, bytes, world.streams[0], None);
        let base = world.empty(20 * MIB, 0).unwrap();
        world.allocator.free(base, None).unwrap();
        let middle = at(base.0 + 4 * MIB, 2 * MIB).unwrap();
        assert_eq!(middle.0, base.0 + 4 * MIB);
        world.check();
        let start = at(base.0, MIB + 1).unwrap();
        assert_eq!(start.0, base.0);
        let after = world.empty(2 * MIB, 0).unwrap();
        assert_ne!(after, middle, "what was asked for by address is nobody else's");
        // In a fixed segment the last request gets all of the hole it went to: its rest is not worth a block.
        assert_eq!(world.allocated(), if growing { 5 * MIB + 512 } else { 6 * MIB });
        world.check();
        for (address, bytes) in [
            (middle.0, 2 * MIB),          // taken
            (base.0 + 3 * MIB, 2 * MIB),  // reaches into it
            (base.0 + 10 * MIB + 1, MIB), // not where blocks can begin
            (base.0 + 19 * MIB, 2 * MIB), // beyond the end
            (0x1000, 2 * MIB),            // nobody's
        ] {
            let refused = at(address, bytes);
            assert!(matches!(refused, Err(Error::InvalidArgument(_))), "{address:#x}: {refused:?}");
        }
        world.check();
        for ptr in [middle, start, after] {
            world.allocator.free(ptr, None).unwrap();
        }
        world.finish();
    }
}

#[test]
fn trackers_hear_of_memory_before_it_goes() {
    let world = World::small();
    world.allocator.set_tracing(true);
    let ptr = world.empty(30 * MIB, 0).unwrap();
    world.allocator.free(ptr, None).unwrap();
    world.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
    let seen: Vec<_> = world.hooks.trace.lock().iter().map(|entry| (entry.action, entry.bytes)).collect();
    assert_eq!(
        seen,
        [
            (Action::SegmentMap, 30 * MIB),
            (Action::Alloc, 30 * MIB),
            (Action::FreeRequested, 30 * MIB),
            (Action::FreeCompleted, 30 * MIB),
            (Action::SegmentUnmap, 30 * MIB),
        ]
    );
    world.finish();
}

#[test]
fn free_memory_callbacks_run_before_cuda_is_asked() {
    let world = World::small();
    let held = world.empty(20 * MIB, 0).unwrap();
    let allocator = Arc::clone(&world.allocator);
    let mut held = Some(held);
    *world.hooks.callback.lock() = Some(Box::new(move || match held.take() {
        Some(ptr) => {
            allocator.free(ptr, None).unwrap();
            true
        }
        None => false,
    }));
    let ptr = world.empty(20 * MIB, 0).unwrap();
    assert_eq!(world.reserved(), 20 * MIB);
    *world.hooks.callback.lock() = None;
    world.allocator.free(ptr, None).unwrap();
    world.finish();
}

#[test]
fn devices_are_apart_and_frees_find_theirs() {
    let config = Config::small_gh200().devices(2);
    let world = World::new(config, "");
    let there = world.machine.stream_create(1, true, 0).unwrap();
    let a = world.empty(1 << 20, 0).unwrap();
    let b = world.allocator.allocate(1, 1 << 20, there, None).unwrap();
    assert_eq!(world.allocator.allocation(b).unwrap().device, 1);
    assert_eq!(world.allocator.device_stats(1).unwrap().allocation.aggregate.current, 1);
    for ptr in [b, a] {
        world.allocator.free(ptr, None).unwrap();
    }
    assert_eq!(world.allocator.device_stats(1).unwrap().allocation.aggregate.current, 0);
    world.finish();
}

#[test]
fn a_device_without_concurrent_managed_access_is_refused_unless_placement_is_device() {
    use torch_uvm::allocator::Allocator;
    use torch_uvm::options::Options;
    use torch_uvm_sim::SimDriver;
    let config = Config::small_gh200().concurrent_managed_access(false);
    let world = World::new(config.clone(), "uvm_access_pattern:device");
    let driver = Arc::new(SimDriver::new(config));
    let allocator = Allocator::new(driver, world.hooks.clone(), Options::default());
    let error = allocator.init(1).unwrap_err();
    assert!(matches!(&error, Error::NotSupported(text) if text.contains("concurrent managed access")), "{error}");
    assert!(!allocator.initialized());
    assert!(matches!(allocator.allocate(0, 1, world.streams[0], None), Err(Error::InvalidArgument(_))));
    world.finish();
}

#[test]
fn four_threads_share_a_device() {
    let world = World::new(Config::small_gh200().schedule(torch_uvm_sim::Schedule::Eager), "");
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let (allocator, stream) = (Arc::clone(&world.allocator), world.streams[thread as usize % 3]);
            scope.spawn(move || {
                let mut live = Vec::new();
                for round in 0..2000_u64 {
                    live.push(
                        allocator.allocate(0, 512 + (round * 7919 * (thread + 1)) % (3 * MIB), stream, None).unwrap(),
                    );
                    if live.len() > 20 {
                        let index = (round as usize * 31) % live.len();
                        allocator.free(live.swap_remove(index), None).unwrap();
                    }
                }
                for ptr in live {
                    allocator.free(ptr, None).unwrap();
                }
            });
        }
    });
    assert!(world.reserved() < GIB);
    world.finish();
}

/// `max_split_size` in MiB.
fn splitting_up_to(world: &World, mib: u64) {
    splitting(world, mib * MIB, 20 * MIB);
}

fn splitting(world: &World, max_split_size: u64, large_segment_size: u64) {
    world.allocator.set_native_options(NativeOptions {
        max_split_size,
        large_segment_size,
        ..NativeOptions::default()
    });
}

#[test]
fn a_segment_made_for_a_request_serves_it_whatever_max_split_size_is() {
    for conf in ["", "uvm_access_pattern:device"] {
        for (max_split, large) in [(20, 20), (21, 20), (20, 64), (33, 64), (64, 64), (64, 20)] {
            let world = World::new(Config::small_gh200(), conf);
            splitting(&world, max_split * MIB, large * MIB);
            world.begin_pool((1, 0), 1);
            for kib in
                [1, 512, 1024, 1025, 4 << 10, 10 << 10, (10 << 10) + 1, 19 << 10, (20 << 10) - 1, 20 << 10, 40 << 10]
            {
                for stream in [0, 1] {
                    let ptrs = [(); 3].map(|()| {
                        let ptr = world.empty(kib << 10, stream);
                        ptr.unwrap_or_else(|error| panic!("{kib} KiB of at most {max_split} MiB, {conf}: {error}"))
                    });
                    let reserved = world.reserved();
                    ptrs.iter().for_each(|&ptr| world.allocator.free(ptr, None).unwrap());
                    let again = [(); 3].map(|()| world.empty(kib << 10, stream).unwrap());
                    assert_eq!(world.reserved(), reserved, "{kib} KiB of at most {max_split} MiB, {conf}");
                    again.iter().for_each(|&ptr| world.allocator.free(ptr, None).unwrap());
                }
                world.check();
            }
            world.end_pool((1, 0));
            world.allocator.pools(0).release_pool((1, 0)).unwrap();
            world.finish();
        }
    }
}

#[test]
fn a_max_split_size_that_no_block_has_is_off() {
    // vLLM sets 20 and then 17592186044415 MiB, of which PyTorch makes 2^64 - 2^20 bytes.
    let mut traces = Vec::new();
    for bytes in [u64::MAX, u64::MAX - MIB + 1, 1 << 48] {
        let world = World::small();
        splitting_up_to(&world, 20);
        splitting(&world, bytes, 20 * MIB);
        let big = world.empty(64 * MIB, 0).unwrap();
        let between = world.empty(2 * MIB, 0).unwrap();
        world.allocator.free(big, None).unwrap();
        let held = [10, 20, 90].map(|mib| world.empty(mib * MIB, 0).unwrap());
        traces.push((held.map(|ptr| ptr.0.wrapping_sub(between.0)), world.reserved()));
        assert_eq!(world.allocator.device_stats(0).unwrap().oversize_allocations.allocated, 0);
        held.iter().chain([&between]).for_each(|&ptr| world.allocator.free(ptr, None).unwrap());
        world.finish();
    }
    assert!(traces.iter().all(|trace| *trace == traces[0]), "{traces:?}");
}

#[test]
fn the_end_of_a_growing_segment_is_taken_last_with_a_max_split_size_too() {
    let world = World::small();
    splitting_up_to(&world, 200);
    let [hole, between] = [64, 2].map(|mib| world.empty(mib * MIB, 0).unwrap());
    world.allocator.free(hole, None).unwrap();
    let small = world.empty(10 * MIB, 0).unwrap();
    assert_eq!(small, hole, "the end fits better, but there a large request can grow");
    let large = world.empty(70 * MIB, 0).unwrap();
    assert_eq!((large, world.reserved()), (between.offset(2 * MIB), (64 + 2 + 70) * MIB));
    [between, small, large].iter().for_each(|&ptr| world.allocator.free(ptr, None).unwrap());
    world.finish();
}
