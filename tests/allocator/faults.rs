//! Every driver call failing once at each place it is made: the right error, books balanced, nothing lost.

use crate::world::{MIB, World};
use torch_uvm::driver::{CaptureMode, DevicePtr};
use torch_uvm::error::{Error, Result};
use torch_uvm::ids::DEFAULT_POOL;
use torch_uvm_sim::{Code, Config, Fault, Which};

/// A program that goes through every part of the allocator that calls the driver. Errors are passed on, whatever was
/// allocated is left in `held`.
fn program(world: &World, held: &mut Vec<DevicePtr>) -> Result<()> {
    let keep = |held: &mut Vec<DevicePtr>, bytes, stream| -> Result<DevicePtr> {
        let ptr = world.empty(bytes, stream)?;
        held.push(ptr);
        Ok(ptr)
    };
    let give = |held: &mut Vec<DevicePtr>, ptr: DevicePtr| {
        held.retain(|&other| other != ptr);
        world.allocator.free(ptr, None)
    };
    keep(held, 512, 0)?;
    // What keeps the segment when its end goes.
    keep(held, 3 * MIB, 0)?;
    let large = keep(held, 30 * MIB, 0)?;
    let shared = keep(held, 3 * MIB, 1)?;
    // Deferred frees: events on two streams.
    world.allocator.record_stream(shared, 0, world.streams[0])?;
    world.allocator.record_stream(shared, 0, world.streams[2])?;
    give(held, shared)?;
    keep(held, 3 * MIB, 1)?;
    keep(held, 40 * MIB, 1)?;
    // A private pool that grows, populated beside the capture.
    world.begin_pool((0, 1), 2);
    let captured = keep(held, 4 * MIB, 2).and_then(|ptr| {
        world.allocator.record_stream(ptr, 0, world.streams[0])?;
        give(held, ptr)
    });
    world.end_pool((0, 1));
    world.allocator.pools(0).release_pool((0, 1))?;
    captured?;
    give(held, large)?;
    world.allocator.empty_cache(DEFAULT_POOL, None)?;
    // Beyond the cap: caches are given back, then it is out of memory.
    match world.empty(200 * MIB, 0) {
        Err(Error::OutOfMemory(_)) => {}
        Ok(ptr) => held.push(ptr),
        Err(other) => return Err(other),
    }
    world.allocator.memory_info(0)?;
    world.allocator.cache_info(0)?;
    Ok(())
}

fn world(conf: &str) -> World {
    World::new(Config::small_gh200().device_memory(160 * MIB).host_memory(4096 * MIB), conf)
}

fn every_call_fails_once(conf: &str, code: Code) -> u64 {
    let mut nth = 0;
    loop {
        nth += 1;
        let world = world(conf);
        world.machine.inject(Fault { call: None, which: Which::Nth(nth), code });
        let mut held = Vec::new();
        let result = program(&world, &mut held);
        let hit = world.machine.faults_hit() > 0;
        world.machine.clear_faults();
        world.check();
        match &result {
            Ok(()) => {}
            Err(Error::Driver(error)) => assert_eq!(error.code, code.0, "{error}"),
            Err(Error::OutOfMemory(_)) => assert_eq!(code, Code::OUT_OF_MEMORY, "{result:?}"),
            Err(other) => panic!("call {nth} failing with {}: {other}", code.name()),
        }
        // The allocator goes on as if nothing had been.
        let again = world.empty(MIB, 0).unwrap_or_else(|error| panic!("after call {nth}: {error}"));
        world.allocator.free(again, None).unwrap();
        for ptr in held {
            world.allocator.free(ptr, None).unwrap();
        }
        // A pool that the program had no time to let go of.
        while world.allocator.pools(0).release_pool((0, 1)).is_ok() {}
        world.machine.device_synchronize(0).unwrap();
        world.finish();
        if !hit {
            return nth - 1;
        }
    }
}

#[test]
fn every_driver_call_may_fail_once_without_loss() {
    for (conf, least) in [("", 50), ("uvm_access_pattern:device", 25), ("uvm_access_pattern:cpu_first", 50)] {
        for code in [Code::OUT_OF_MEMORY, Code::NOT_SUPPORTED, Code::INVALID_CONTEXT] {
            let calls = every_call_fails_once(conf, code);
            assert!(calls >= least, "the program only made {calls} driver calls with '{conf}'");
        }
    }
}

#[test]
fn out_of_memory_from_cuda_gives_caches_back_first() {
    use torch_uvm_sim::EntryPoint;
    let world = world("uvm_access_pattern:device");
    let cached = world.empty(20 * MIB, 0).unwrap();
    world.allocator.free(cached, None).unwrap();
    world.machine.inject(Fault {
        call: Some(EntryPoint::AllocDevice),
        which: Which::Nth(1),
        code: Code::OUT_OF_MEMORY,
    });
    let ptr = world.empty(30 * MIB, 0).unwrap();
    assert_eq!(world.machine.faults_hit(), 1);
    assert_eq!(world.reserved(), 30 * MIB, "the cached segment went");
    world.allocator.free(ptr, None).unwrap();
    world.finish();
}

#[test]
fn a_segment_that_fails_half_way_leaves_nothing_even_if_it_cannot_be_freed() {
    use torch_uvm_sim::EntryPoint;
    let world = world("");
    for (earlier, call) in [EntryPoint::Advise, EntryPoint::Prefetch].into_iter().enumerate() {
        world.machine.inject(Fault { call: Some(call), which: Which::Nth(1), code: Code::INVALID_CONTEXT });
        world.machine.inject(Fault { call: Some(EntryPoint::Free), which: Which::Nth(1), code: Code::INVALID_CONTEXT });
        assert!(matches!(world.empty(30 * MIB, 0), Err(Error::Driver(_))));
        assert_eq!(world.machine.faults_hit(), 2 * (earlier as u64 + 1), "{call:?} and the free");
        world.check();
        assert_eq!(world.reserved(), 0);
        assert_eq!(world.segments().len(), 1, "CUDA would not take it back yet");
        world.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
        assert_eq!(world.segments(), []);
    }
    world.finish();
}

#[test]
fn an_event_that_cannot_be_recorded_keeps_its_block() {
    use torch_uvm_sim::EntryPoint;
    let mut world = world("");
    let tensor = world.tensor(4096, 0).unwrap();
    world.use_on(&tensor, 1);
    world.use_on(&tensor, 2);
    let fault = Fault { call: Some(EntryPoint::EventRecord), which: Which::Nth(2), code: Code::INVALID_CONTEXT };
    world.machine.inject(fault);
    world.free(tensor);
    assert_eq!(world.machine.faults_hit(), 1);
    world.check();
    let other = world.empty(4096, 0).unwrap();
    assert_ne!(other, tensor.ptr, "nothing says that the other streams are done");
    world.machine.device_synchronize(0).unwrap();
    world.allocator.free(other, None).unwrap();
    world.finish();
}

#[test]
fn the_capture_mode_is_restored_whatever_fails() {
    let world = world("");
    let mut hits = 0;
    for nth in 1..12 {
        world.machine.inject(Fault { call: None, which: Which::Nth(nth), code: Code::INVALID_CONTEXT });
        let result = world.empty(30 * MIB, 0);
        world.machine.clear_faults();
        hits = world.machine.faults_hit();
        let mode = world.machine.exchange_capture_mode(CaptureMode::Global).unwrap();
        if let Ok(ptr) = result {
            world.allocator.free(ptr, None).unwrap();
            world.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
        } else {
            // The exchange back may itself have been the call that failed; then nothing can be done but say so.
            assert_eq!(mode, CaptureMode::Global, "call {nth}");
        }
    }
    assert!(hits >= 6, "only {hits} of the calls were made");
    world.finish();
}

#[test]
fn memory_that_cuda_does_not_take_back_fails_no_request() {
    use torch_uvm::options::NativeOptions;
    use torch_uvm_sim::EntryPoint;
    // Light reclamation, garbage collection, and moving live memory out are done for a request that can do without
    // them.
    let cases = [
        ("uvm_device_limit_mb:192", EntryPoint::Free, 0.0),
        ("uvm_device_limit_mb:192", EntryPoint::Discard, 0.0),
        ("uvm_device_limit_mb:192,uvm_stage1_threshold:0", EntryPoint::Prefetch, 0.0),
        ("", EntryPoint::Free, 0.1),
    ];
    for (conf, call, garbage) in cases {
        let world = World::new(Config::small_gh200().device_memory(512 * MIB).host_memory(4096 * MIB), conf);
        if garbage > 0.0 {
            let native = NativeOptions { garbage_collection_threshold: garbage, ..NativeOptions::default() };
            world.allocator.set_native_options(native);
            world.allocator.set_memory_fraction(0, 0.9).unwrap();
        }
        let mut held = vec![world.empty(20 * MIB, 1).unwrap()];
        let old = world.empty(80 * MIB, 1).unwrap();
        for ptr in [1, 2].map(|stream| world.empty(30 * MIB, stream).unwrap()) {
            if call == EntryPoint::Prefetch {
                held.push(ptr);
            } else {
                world.allocator.free(ptr, None).unwrap();
            }
        }
        // Only what lives long moves out.
        for _ in 0..if call == EntryPoint::Prefetch { 400 } else { 0 } {
            world.allocator.free(world.empty(MIB, 2).unwrap(), None).unwrap();
        }
        held.push(old);
        let which = if call == EntryPoint::Prefetch { Which::Nth(1) } else { Which::Every };
        world.machine.inject(Fault { call: Some(call), which, code: Code::INVALID_CONTEXT });
        let served = world.empty(50 * MIB, 0);
        assert!(world.machine.faults_hit() > 0, "{conf} {call:?}");
        world.machine.clear_faults();
        held.push(served.unwrap_or_else(|error| panic!("{conf} {call:?}: {error}")));
        world.check();
        for ptr in held {
            world.allocator.free(ptr, None).unwrap();
        }
        world.machine.device_synchronize(0).unwrap();
        world.finish();
    }
}

#[test]
fn one_segment_that_cuda_does_not_take_back_keeps_no_other_from_serving() {
    use torch_uvm_sim::EntryPoint;
    let world = world("uvm_access_pattern:device");
    let cached = [30, 40, 50].map(|mib| world.empty(mib * MIB, 1).unwrap());
    for ptr in cached {
        world.allocator.free(ptr, None).unwrap();
    }
    let fault = Fault { call: Some(EntryPoint::Free), which: Which::Nth(1), code: Code::INVALID_CONTEXT };
    world.machine.inject(fault);
    let ptr = world.empty(60 * MIB, 0).expect("the others are enough");
    assert_eq!(world.machine.faults_hit(), 1);
    world.allocator.free(ptr, None).unwrap();
    world.finish();
}
