//! `record_stream` and the frees that wait: memory is never handed out while another stream may read it.

use crate::world::{MIB, World};
use torch_uvm::driver::CaptureMode;
use torch_uvm::ids::DEFAULT_POOL;
use torch_uvm_sim::{CaptureStatus, Code, Config, EntryPoint, Fault, Schedule, Which};

#[test]
fn a_block_used_elsewhere_waits_for_the_event() {
    let mut world = World::small();
    let tensor = world.tensor(4096, 0).unwrap();
    world.use_on(&tensor, 1);
    world.free(tensor);
    let stats = world.allocator.device_stats(0).unwrap();
    assert_eq!((stats.allocation.aggregate.current, stats.active.aggregate.current), (0, 1));
    let second = world.tensor(4096, 0).unwrap();
    assert_ne!(second.ptr, tensor.ptr, "reused before the event completed");
    world.check();
    world.machine.stream_synchronize(0, world.streams[1]).unwrap();
    let third = world.tensor(4096, 0).unwrap();
    assert_eq!(third.ptr, tensor.ptr, "reused once it has");
    world.finish_with([second, third]);
}

#[test]
fn early_reuse_would_be_seen_in_the_bytes() {
    // The same as a program would meet it: no address is looked at, only contents.
    let mut world = World::new(Config::small_gh200().schedule(Schedule::Late), "");
    for _ in 0..50 {
        let tensor = world.tensor(64 * 1024, 0).unwrap();
        world.use_on(&tensor, 1);
        world.use_on(&tensor, 2);
        world.free(tensor);
        let next = world.tensor(64 * 1024, 0).unwrap();
        world.free(next);
    }
    world.verify_copies();
    world.finish();
}

#[test]
fn a_use_on_its_own_stream_needs_no_event() {
    let world = World::small();
    let ptr = world.empty(4096, 0).unwrap();
    world.allocator.record_stream(ptr, 0, world.streams[0]).unwrap();
    world.allocator.free(ptr, None).unwrap();
    assert_eq!(world.empty(4096, 0).unwrap(), ptr);
    world.allocator.free(ptr, None).unwrap();
    assert_eq!(world.machine.calls().get(&EntryPoint::EventRecord), None);
    world.finish();
}

#[test]
fn the_hot_path_asks_nothing_of_cuda() {
    let world = World::small();
    let warm = world.empty(4096, 0).unwrap();
    world.allocator.free(warm, None).unwrap();
    world.machine.reset_counters();
    let before = world.machine.calls();
    for _ in 0..100 {
        let ptr = world.empty(4096, 0).unwrap();
        world.allocator.free(ptr, None).unwrap();
    }
    assert_eq!(world.machine.calls(), before);
    world.finish();
}

#[test]
fn frees_during_a_capture_wait_for_its_end() {
    let mut world = World::small();
    let tensor = world.tensor(4096, 0).unwrap();
    world.use_on(&tensor, 1);
    world.machine.device_synchronize(0).unwrap();
    world.begin_pool((0, 1), 2);
    world.machine.begin_capture(0, world.streams[2], CaptureMode::Global).unwrap();
    world.free(tensor);
    let meanwhile = world.empty(4096, 0).unwrap();
    assert_ne!(meanwhile, tensor.ptr);
    let captured = world.empty(4096, 2).unwrap();
    assert_eq!(
        world.machine.capture_info(0, world.streams[2]).unwrap().status,
        CaptureStatus::Active,
        "an allocation must not invalidate the capture"
    );
    let graph = world.machine.end_capture(0, world.streams[2]).unwrap();
    world.end_pool((0, 1));
    world.machine.device_synchronize(0).unwrap();
    // The deferred events are recorded at the next allocation, and complete when queried often enough.
    let mut found = Vec::new();
    for _ in 0..10 {
        found.push(world.empty(4096, 0).unwrap());
        world.machine.device_synchronize(0).unwrap();
    }
    assert!(found.contains(&tensor.ptr), "the deferred free was forgotten");
    for ptr in found.into_iter().chain([meanwhile, captured]) {
        world.allocator.free(ptr, None).unwrap();
    }
    world.machine.graph_destroy(graph).unwrap();
    world.allocator.pools(0).release_pool((0, 1)).unwrap();
    world.finish();
}

#[test]
fn uses_recorded_in_a_capture_need_no_event_after_it() {
    let world = World::small();
    let ptr = world.empty(4096, 0).unwrap();
    world.begin_pool((0, 1), 2);
    world.machine.begin_capture(0, world.streams[2], CaptureMode::Global).unwrap();
    world.allocator.record_stream(ptr, 0, world.streams[2]).unwrap();
    world.allocator.free(ptr, None).unwrap();
    let graph = world.machine.end_capture(0, world.streams[2]).unwrap();
    world.machine.graph_destroy(graph).unwrap();
    world.end_pool((0, 1));
    assert_eq!(world.empty(4096, 0).unwrap(), ptr);
    assert_eq!(world.machine.calls().get(&EntryPoint::EventRecord), None);
    world.allocator.free(ptr, None).unwrap();
    world.allocator.pools(0).release_pool((0, 1)).unwrap();
    world.finish();
}

#[test]
fn uses_recorded_while_a_mempool_is_in_use_are_waited_for() {
    // A MemPool in use is no capture; `native` takes it for one here and reuses the block too early.
    let mut world = World::small();
    let tensor = world.tensor(64 * 1024, 0).unwrap();
    world.begin_pool((1, 0), 2);
    world.use_on(&tensor, 1);
    world.free(tensor);
    world.end_pool((1, 0));
    let next = world.tensor(64 * 1024, 0).unwrap();
    assert_ne!(next.ptr, tensor.ptr);
    world.verify_copies();
    world.free(next);
    world.allocator.pools(0).release_pool((1, 0)).unwrap();
    world.finish();
}

#[test]
fn growth_on_a_capturing_stream_populates_beside_it() {
    let mut world = World::small();
    world.begin_pool((0, 1), 0);
    world.machine.begin_capture(0, world.streams[0], CaptureMode::Global).unwrap();
    let tensor = world.tensor(50 * MIB, 0).unwrap();
    let outside = world.tensor(50 * MIB, 1).unwrap();
    assert_eq!(world.machine.capture_info(0, world.streams[0]).unwrap().status, CaptureStatus::Active);
    let graph = world.machine.end_capture(0, world.streams[0]).unwrap();
    world.end_pool((0, 1));
    let exec = world.machine.graph_instantiate(graph).unwrap();
    world.machine.graph_launch(0, exec, world.streams[0]).unwrap();
    world.verify(&tensor);
    world.verify(&outside);
    assert_eq!(world.machine.counters().device_faults, 0, "what is populated does not fault");
    world.free(tensor);
    world.free(outside);
    world.machine.graph_exec_destroy(exec).unwrap();
    world.machine.graph_destroy(graph).unwrap();
    world.allocator.pools(0).release_pool((0, 1)).unwrap();
    world.finish();
}

#[test]
fn empty_cache_waits_for_events() {
    let mut world = World::small();
    let tensor = world.tensor(30 * MIB, 0).unwrap();
    world.use_on(&tensor, 1);
    world.free(tensor);
    world.allocator.empty_cache((0, 0), None).unwrap();
    assert_eq!(world.reserved(), 0);
    assert_eq!(world.allocator.device_stats(0).unwrap().num_sync_all_streams, 1);
    world.finish();
}

#[test]
fn a_capture_is_not_spoilt_by_another_devices_memory() {
    let world = World::new(Config::small_gh200().devices(2), "");
    let there = world.machine.stream_create(1, true, 0).unwrap();
    let elsewhere = world.machine.stream_create(1, true, 0).unwrap();
    // Cached memory, and a free that waits.
    world.allocator.free(world.allocator.allocate(1, 30 * MIB, there, None).unwrap(), None).unwrap();
    let waits = world.allocator.allocate(1, 3 * MIB, there, None).unwrap();
    world.machine.memset_async(1, waits.0, 1, 1, 3 * MIB, elsewhere).unwrap();
    world.allocator.record_stream(waits, 1, elsewhere).unwrap();
    world.allocator.free(waits, None).unwrap();

    world.machine.begin_capture(0, world.streams[0], CaptureMode::Global).unwrap();
    let ptr = world.allocator.allocate(1, 3 * MIB, there, None).expect("events are asked about");
    world.allocator.free(ptr, None).unwrap();
    world.allocator.empty_cache(DEFAULT_POOL, None).expect("events are waited for, and memory goes");
    assert_eq!(world.allocator.device_stats(1).unwrap().reserved_bytes.aggregate.current, 0);
    let graph = world.machine.end_capture(0, world.streams[0]).expect("the capture was not spoilt");
    world.machine.graph_destroy(graph).unwrap();
    world.finish();
}

#[test]
fn a_free_waits_while_a_stream_that_used_the_memory_captures() {
    let world = World::new(Config::small_gh200().devices(2), "");
    let there = world.machine.stream_create(1, true, 0).unwrap();
    let pair = [(); 2].map(|()| world.allocator.allocate(1, 3 * MIB, there, None).unwrap());
    world.allocator.record_stream(pair[0], 0, world.streams[0]).unwrap();
    // Device 1 knows nothing of this capture.
    world.machine.begin_capture(0, world.streams[0], CaptureMode::Global).unwrap();
    world.allocator.free(pair[0], None).unwrap();
    let other = world.allocator.allocate(1, 3 * MIB, there, None).unwrap();
    assert_ne!(other, pair[0], "nobody knows whether it is still used");
    world.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
    world.check();
    let graph = world.machine.end_capture(0, world.streams[0]).expect("the capture was not spoilt");
    world.machine.graph_destroy(graph).unwrap();
    world.machine.device_synchronize(0).unwrap();
    for ptr in [pair[1], other] {
        world.allocator.free(ptr, None).unwrap();
    }
    world.finish();
}

/// A stream of the program's that is destroyed while the allocator knows of uses on it (`torch.cuda.ExternalStream`).
fn destroyed_stream(world: &World, ptr: torch_uvm::driver::DevicePtr) {
    let external = world.machine.stream_create(0, true, 0).unwrap();
    world.allocator.record_stream(ptr, 0, external).unwrap();
    world.machine.stream_destroy(0, external).unwrap();
}

#[test]
fn a_destroyed_stream_keeps_its_block_and_nothing_else() {
    let world = World::small();
    let lost = world.empty(30 * MIB, 0).unwrap();
    destroyed_stream(&world, lost);
    world.allocator.free(lost, None).unwrap();
    // Other frees go on to be waited for, on the same stream and on others.
    for stream in [0, 1] {
        let ptr = world.empty(40 * MIB, stream).unwrap();
        world.allocator.record_stream(ptr, 0, world.streams[2]).unwrap();
        world.allocator.free(ptr, None).unwrap();
        world.machine.device_synchronize(0).unwrap();
        let again = world.empty(40 * MIB, stream).unwrap();
        assert_eq!(again, ptr, "the free before it was seen to be over");
        world.allocator.free(again, None).unwrap();
    }
    world.allocator.empty_cache(DEFAULT_POOL, None).expect("the others go");
    world.check();
    assert_eq!(world.reserved(), 30 * MIB, "only that block stays");
    assert_ne!(world.empty(30 * MIB, 0).unwrap(), lost);
}

#[test]
fn a_destroyed_stream_costs_other_allocations_no_call() {
    let world = World::small();
    let lost = world.empty(4096, 0).unwrap();
    destroyed_stream(&world, lost);
    world.allocator.free(lost, None).unwrap();
    for ptr in [8192, 8192].map(|bytes| world.empty(bytes, 0).unwrap()) {
        world.allocator.free(ptr, None).unwrap();
    }
    let before = world.machine.calls();
    for _ in 0..10 {
        let ptrs = [(); 3].map(|()| world.empty(8192, 0).unwrap());
        ptrs.iter().for_each(|&ptr| world.allocator.free(ptr, None).unwrap());
    }
    assert_eq!(world.machine.calls(), before, "the block that cannot be had is not asked about each time");
}

#[test]
fn a_request_beyond_the_cap_survives_a_destroyed_stream() {
    let config = Config::small_gh200().device_memory(256 * MIB).host_memory(4096 * MIB);
    let world = World::new(config, "uvm_access_pattern:device");
    let lost = world.empty(20 * MIB, 0).unwrap();
    destroyed_stream(&world, lost);
    world.allocator.free(lost, None).unwrap();
    let cached = world.empty(150 * MIB, 1).unwrap();
    world.allocator.free(cached, None).unwrap();
    let ptr = world.empty(120 * MIB, 0).expect("what is cached elsewhere serves it");
    world.allocator.free(ptr, None).unwrap();
    world.check();
}

#[test]
fn a_pool_with_a_destroyed_stream_keeps_only_itself() {
    let world = World::small();
    for id in [(4, 0), (5, 0)] {
        world.begin_pool(id, 0);
        let ptr = world.empty(30 * MIB, 0).unwrap();
        if id == (4, 0) {
            destroyed_stream(&world, ptr);
        }
        world.allocator.free(ptr, None).unwrap();
        world.end_pool(id);
        world.allocator.pools(0).release_pool(id).unwrap();
    }
    for id in [(4, 0), (5, 0)] {
        world.allocator.empty_cache(id, None).unwrap();
    }
    assert_eq!(world.reserved(), 30 * MIB, "the other pool is gone");
    world.check();
}

#[test]
fn an_event_that_cannot_be_asked_about_keeps_its_block_alone() {
    for code in [Code::INVALID_HANDLE, Code::INVALID_CONTEXT] {
        let mut world = World::small();
        let tensors = [0, 1].map(|stream| world.tensor(40 * MIB, stream).unwrap());
        for tensor in tensors {
            world.use_on(&tensor, 2);
            world.free(tensor);
        }
        world.machine.device_synchronize(0).unwrap();
        world.machine.inject(Fault { call: Some(EntryPoint::EventQuery), which: Which::Nth(1), code });
        let first = world.empty(4096, 0).expect("it has nothing to do with that event");
        assert_eq!(world.machine.faults_hit(), 1);
        let found = [0, 1].map(|stream| world.empty(40 * MIB, stream).unwrap());
        assert_eq!(found.iter().zip(&tensors).filter(|(found, tensor)| **found == tensor.ptr).count(), 1);
        for ptr in found.into_iter().chain([first]) {
            world.allocator.free(ptr, None).unwrap();
        }
        world.finish();
    }
}

#[test]
fn one_devices_trouble_does_not_keep_anothers_cache() {
    let world = World::new(Config::small_gh200().devices(2), "");
    for device in [0, 1] {
        let stream = world.machine.stream_create(device, true, 0).unwrap();
        let ptr = world.allocator.allocate(device, 30 * MIB, stream, None).unwrap();
        world.allocator.free(ptr, None).unwrap();
    }
    world.machine.inject(Fault { call: Some(EntryPoint::Free), which: Which::Nth(1), code: Code::INVALID_CONTEXT });
    world.allocator.empty_cache(DEFAULT_POOL, None).expect_err("CUDA would not take it");
    let reserved = [0, 1].map(|device| world.allocator.device_stats(device).unwrap().reserved_bytes.aggregate.current);
    assert_eq!(reserved, [30 * MIB as i64, 0]);
    world.finish();
}

#[test]
fn a_use_in_a_capture_is_over_when_the_capture_is_whatever_cuda_says_of_it() {
    for code in [Code::INVALID_HANDLE, Code::INVALID_CONTEXT] {
        let world = World::small();
        world.begin_pool((0, 1), 0);
        world.machine.begin_capture(0, world.streams[0], CaptureMode::Global).unwrap();
        // The other stream joins the capture.
        let event = world.machine.event_create(0, false).unwrap();
        world.machine.event_record(0, event, world.streams[0]).unwrap();
        world.machine.stream_wait_event(0, world.streams[1], event).unwrap();
        let ptr = world.empty(4096, 0).unwrap();
        world.allocator.record_stream(ptr, 0, world.streams[1]).unwrap();
        world.allocator.free(ptr, None).unwrap();
        let asked = world.machine.calls();
        world.machine.inject(Fault { call: Some(EntryPoint::CaptureInfo), which: Which::Nth(1), code });
        world.machine.inject(Fault { call: Some(EntryPoint::StreamIsCapturing), which: Which::Nth(1), code });
        let next = world.empty(4096, 0).unwrap();
        assert!(world.machine.faults_hit() > 0, "{asked:?}");
        world.machine.clear_faults();
        assert_ne!(next, ptr, "the other stream still uses it in this capture");
        world.machine.event_record(0, event, world.streams[1]).unwrap();
        world.machine.stream_wait_event(0, world.streams[0], event).unwrap();
        let graph = world.machine.end_capture(0, world.streams[0]).unwrap();
        world.machine.graph_destroy(graph).unwrap();
        world.machine.event_destroy(0, event).unwrap();
        world.end_pool((0, 1));
        world.allocator.free(next, None).unwrap();
        world.allocator.pools(0).release_pool((0, 1)).unwrap();
        world.finish();
    }
}
