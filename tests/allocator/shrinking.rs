//! Growing segments that give their free pages back: what is discarded is never used without being populated again.

use crate::world::{GIB, MIB, World};
use torch_uvm::driver::{DevicePtr, Range};
use torch_uvm::error::Error;
use torch_uvm::history::Action;
use torch_uvm::ids::DEFAULT_POOL;
use torch_uvm::options::Options;
use torch_uvm_sim::{Code, Config, EntryPoint, Fault, Profile, Which};

/// A world in which stream 0's segment has `used` bytes in use and then `free` bytes free. The figures are multiples
/// of 2 MiB of at least 10 MiB.
fn with_free_end(world: &World, used: u64, free: u64) -> (DevicePtr, DevicePtr) {
    let held = world.empty(used, 0).unwrap();
    let end = world.empty(free, 0).unwrap();
    assert_eq!(end.0, held.0 + used, "one segment");
    world.allocator.free(end, None).unwrap();
    (held, end)
}

fn empty_cache(world: &World) {
    world.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
    world.check();
}

#[test]
fn empty_cache_gives_free_ends_back_and_they_grow_again_at_full_speed() {
    let mut world = World::small();
    let first = world.tensor(20 * MIB, 0).unwrap();
    let second = world.tensor(60 * MIB, 0).unwrap();
    world.free(second);
    // Nothing of this has run yet: the discard must come after it, and what is written next after the discard.
    empty_cache(&world);
    assert_eq!(world.reserved(), 20 * MIB);
    assert_eq!(world.machine.counters().discarded, 60 * MIB);
    let stats = world.allocator.device_stats(0).unwrap();
    assert_eq!((stats.num_device_alloc, stats.num_device_free), (2, 1));
    let again = world.tensor(40 * MIB, 0).unwrap();
    assert_eq!(again.ptr, second.ptr, "the address space stayed");
    let beyond = world.tensor(40 * MIB, 0).unwrap();
    assert_eq!(world.segments().len(), 1);
    for tensor in [first, again, beyond] {
        world.verify(&tensor);
        world.free(tensor);
    }
    assert_eq!(world.machine.counters().slow_discard_writes, 0);
    world.finish();
}

#[test]
fn free_pages_between_others_leave_a_hole_that_is_filled_again() {
    let mut world = World::small();
    let [first, second, third] = [20, 60, 20].map(|mib| world.tensor(mib * MIB, 0).unwrap());
    world.free(second);
    empty_cache(&world);
    assert_eq!((world.reserved(), world.machine.counters().discarded), (40 * MIB, 60 * MIB));
    let parts = |world: &World| -> Vec<(u64, u64)> {
        let snapshot = world.allocator.snapshot(DEFAULT_POOL, true);
        snapshot.segments.iter().map(|segment| (segment.address, segment.total_bytes)).collect()
    };
    assert_eq!(parts(&world), [(first.ptr.0, 20 * MIB), (third.ptr.0, 20 * MIB)], "as `native` shows it");
    // Only what is needed is populated; a small request takes a step.
    let a = world.tensor(30 * MIB, 0).unwrap();
    assert_eq!((a.ptr, world.reserved()), (second.ptr, 70 * MIB));
    world.check();
    let b = world.tensor(2 * MIB, 0).unwrap();
    assert_eq!((b.ptr.0, world.reserved()), (a.ptr.0 + 30 * MIB, 80 * MIB));
    // What does not fit in is put at the end.
    let c = world.tensor(40 * MIB, 0).unwrap();
    assert_eq!((c.ptr.0, world.reserved()), (third.ptr.0 + 20 * MIB, 120 * MIB));
    world.check();
    // With the free memory below it and all of the hole, this fits exactly.
    world.free(b);
    let d = world.tensor(30 * MIB, 0).unwrap();
    assert_eq!((d.ptr, world.reserved()), (b.ptr, 140 * MIB));
    assert_eq!(parts(&world), [(first.ptr.0, 140 * MIB)]);
    for tensor in [first, third, a, c, d] {
        world.verify(&tensor);
    }
    // Holes that meet are one, and one that meets the end is none.
    for tensor in [a, third] {
        world.free(tensor);
        empty_cache(&world);
    }
    world.free(d);
    empty_cache(&world);
    assert_eq!(world.reserved(), 60 * MIB);
    world.free(c);
    empty_cache(&world);
    assert_eq!(world.reserved(), 20 * MIB);
    let again = world.tensor(120 * MIB, 0).unwrap();
    assert_eq!(again.ptr, second.ptr);
    world.verify(&again);
    for tensor in [first, again] {
        world.free(tensor);
    }
    world.finish();
}

#[test]
fn a_segment_of_nothing_but_holes_and_free_memory_goes_whole() {
    let world = World::small();
    let [first, second, third] = [20, 60, 20].map(|mib| world.empty(mib * MIB, 0).unwrap());
    world.allocator.free(second, None).unwrap();
    empty_cache(&world);
    for ptr in [first, third] {
        world.allocator.free(ptr, None).unwrap();
    }
    world.check();
    world.machine.inject(Fault { call: Some(EntryPoint::Free), which: Which::Nth(1), code: Code::INVALID_CONTEXT });
    assert!(matches!(world.allocator.empty_cache(DEFAULT_POOL, None), Err(Error::Driver(_))));
    assert_eq!(world.machine.faults_hit(), 1);
    world.check();
    assert_eq!(world.reserved(), 40 * MIB, "kept as it was");
    world.finish();
}

#[test]
fn only_whole_pages_go() {
    let world = World::small();
    let held = world.empty(3 * MIB, 0).unwrap();
    assert_eq!(world.reserved(), 20 * MIB);
    empty_cache(&world);
    assert_eq!(world.reserved(), 4 * MIB);
    empty_cache(&world);
    assert_eq!(world.machine.counters().discarded, 16 * MIB, "the second time there was nothing to do");
    // The rest of the last page and a new one are one block.
    let across = world.empty(3 * MIB, 0).unwrap();
    assert_eq!(across.0, held.0 + 3 * MIB);
    for ptr in [held, across] {
        world.allocator.free(ptr, None).unwrap();
    }
    world.finish();
}

#[test]
fn nothing_is_discarded_that_would_not_be_populated_again() {
    for (discard, conf) in [
        (false, ""),
        (true, "uvm_access_pattern:balanced"),
        (true, "uvm_access_pattern:cpu_first"),
        (true, "uvm_prefetch:False"),
        (true, "uvm_prefetch_threshold_mb:64"),
    ] {
        let world = World::new(Config::small_gh200().discard(discard), conf);
        let (held, _) = with_free_end(&world, 20 * MIB, 60 * MIB);
        empty_cache(&world);
        assert_eq!((world.reserved(), world.machine.counters().discarded), (80 * MIB, 0), "{discard} '{conf}'");
        world.allocator.free(held, None).unwrap();
        world.finish();
    }
}

#[test]
fn what_was_discarded_is_populated_whatever_the_options_say_now() {
    let mut world = World::small();
    let (held, end) = with_free_end(&world, 20 * MIB, 60 * MIB);
    empty_cache(&world);
    let options = Options { prefetch: false, ..world.allocator.options() };
    world.allocator.set_options(options).unwrap();
    let again = world.tensor(60 * MIB, 0).unwrap();
    assert_eq!(again.ptr, end);
    world.verify(&again);
    assert_eq!(world.machine.counters().slow_discard_writes, 0);
    world.free(again);
    empty_cache(&world);
    assert_eq!(world.reserved(), 80 * MIB, "now nothing would be populated again");
    world.allocator.free(held, None).unwrap();
    world.finish();
}

#[test]
fn free_pages_go_before_a_limit_is_met() {
    let world = World::new(Config::small_gh200(), "uvm_oversubscription_ratio:0.5");
    let (held, _) = with_free_end(&world, 100 * MIB, 400 * MIB);
    // Another stream cannot use them.
    let other = world.empty(700 * MIB, 1).unwrap();
    assert_eq!(world.reserved(), 800 * MIB);
    assert_eq!(world.allocator.device_stats(0).unwrap().num_alloc_retries, 1);
    for ptr in [held, other] {
        world.allocator.free(ptr, None).unwrap();
    }
    world.finish();
}

#[test]
fn free_pages_go_when_the_device_is_nearly_full() {
    let world = World::new(Config::small_gh200(), "uvm_device_limit_mb:1024,uvm_stage1_threshold:0.1");
    let (held, _) = with_free_end(&world, 100 * MIB, 300 * MIB);
    let other = world.empty(600 * MIB, 1).unwrap();
    assert_eq!(world.allocator.memory_info(0).unwrap().populated.device, 700 * MIB);
    // Those of the request's own list would only be populated again for it.
    world.allocator.free(world.empty(100 * MIB, 0).unwrap(), None).unwrap();
    world.machine.reset_counters();
    let larger = world.empty(200 * MIB, 0).unwrap();
    assert_eq!(world.machine.counters().discarded, 0);
    assert_eq!(world.allocator.memory_info(0).unwrap().populated.device, 900 * MIB);
    for ptr in [held, other, larger] {
        world.allocator.free(ptr, None).unwrap();
    }
    world.finish();
}

#[test]
fn programs_are_told_that_discarded_memory_is_free() {
    let world = World::new(Config::small_gh200(), "uvm_oversubscription_ratio:2.0");
    let free = || {
        world.machine.device_synchronize(0).unwrap();
        world.allocator.memory_info(0).unwrap().free
    };
    let held = world.empty(128 * MIB, 0).unwrap();
    let before = free();
    let end = world.empty(512 * MIB, 0).unwrap();
    assert_eq!(free(), before - 512 * MIB);
    world.allocator.free(end, None).unwrap();
    empty_cache(&world);
    assert_eq!(free(), before, "although to CUDA it is not");
    let again = world.empty(512 * MIB, 0).unwrap();
    assert_eq!(free(), before - 512 * MIB);
    for ptr in [held, again] {
        world.allocator.free(ptr, None).unwrap();
    }
    world.finish();
}

#[test]
fn trackers_let_go_before_the_memory_goes() {
    let world = World::small();
    let (held, end) = with_free_end(&world, 20 * MIB, 60 * MIB);
    world.allocator.set_tracing(true);
    let fault = |code| Fault { call: Some(EntryPoint::Discard), which: Which::Nth(1), code };
    world.machine.inject(fault(Code::INVALID_CONTEXT));
    assert!(matches!(world.allocator.empty_cache(DEFAULT_POOL, None), Err(Error::Driver(_))));
    assert_eq!(world.machine.faults_hit(), 1);
    world.check();
    assert_eq!(world.reserved(), 80 * MIB, "a discard that fails changes nothing");
    empty_cache(&world);
    let seen: Vec<_> =
        world.hooks.trace.lock().iter().map(|entry| (entry.action, entry.address, entry.bytes)).collect();
    let entry = |action| (action, end.0, 60 * MIB);
    assert_eq!(seen, [Action::SegmentUnmap, Action::SegmentMap, Action::SegmentUnmap].map(entry));
    world.allocator.set_tracing(false);
    world.allocator.free(held, None).unwrap();
    world.finish();
}

#[test]
fn a_wait_that_fails_changes_nothing() {
    let world = World::small();
    let (held, _) = with_free_end(&world, 20 * MIB, 60 * MIB);
    let calls = [EntryPoint::AllocManaged, EntryPoint::Free, EntryPoint::StreamCreate, EntryPoint::StreamSynchronize];
    for (earlier, call) in calls.into_iter().enumerate() {
        world.machine.inject(Fault { call: Some(call), which: Which::Nth(1), code: Code::INVALID_CONTEXT });
        assert!(matches!(world.allocator.empty_cache(DEFAULT_POOL, None), Err(Error::Driver(_))), "{call:?}");
        assert_eq!(world.machine.faults_hit(), earlier as u64 + 1, "{call:?}");
        world.machine.clear_faults();
        world.check();
        assert_eq!(world.reserved(), 80 * MIB, "{call:?}");
    }
    empty_cache(&world);
    assert_eq!((world.reserved(), world.segments().len()), (20 * MIB, 1));
    world.allocator.free(held, None).unwrap();
    world.finish();
}

#[test]
fn memory_of_a_stream_that_is_no_more_goes_too() {
    let world = World::small();
    let (held, _) = with_free_end(&world, 20 * MIB, 60 * MIB);
    world.machine.stream_destroy(0, world.streams[0]).unwrap();
    empty_cache(&world);
    assert_eq!(world.reserved(), 20 * MIB);
    world.allocator.free(held, None).unwrap();
    world.finish();
}

#[test]
fn a_graphs_pool_keeps_its_free_end_while_it_is_held() {
    let world = World::small();
    let native = torch_uvm::options::NativeOptions { expandable_segments: true, ..Default::default() };
    world.allocator.set_native_options(native);
    world.begin_pool((0, 7), 0);
    let (held, _) = with_free_end(&world, 20 * MIB, 60 * MIB);
    world.end_pool((0, 7));
    empty_cache(&world);
    assert_eq!(world.reserved(), 80 * MIB, "a replay may still write there");
    world.allocator.pools(0).release_pool((0, 7)).unwrap();
    empty_cache(&world);
    assert_eq!(world.reserved(), 20 * MIB);
    world.allocator.free(held, None).unwrap();
    world.finish();
}

#[test]
fn free_memory_merges_across_what_used_to_be_many_segments() {
    for (discard, segments) in [(true, 1), (false, 10)] {
        let config = Config::new(Profile::h100()).discard(discard);
        let world = World::new(config, "");
        let held: Vec<_> = (0..20).map(|_| world.empty(200 * MIB, 0).unwrap()).collect();
        assert_eq!(world.segments().len(), segments);
        for ptr in held {
            world.allocator.free(ptr, None).unwrap();
        }
        if discard {
            let all = world.empty(4000 * MIB, 0).unwrap();
            assert_eq!(world.reserved(), 4000 * MIB);
            assert!(world.machine.range_advice(Range { ptr: all, bytes: GIB }).unwrap().preferred.is_some());
            world.allocator.free(all, None).unwrap();
        }
        world.finish();
    }
}
