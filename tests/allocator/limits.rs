//! Capacity, placement and what programs are told of them.

use crate::world::{GIB, MIB, World, out_of_memory};
use torch_uvm::driver::{DevicePtr, Location, Range};
use torch_uvm::error::{Error, Limit};
use torch_uvm::options::{NativeOptions, Options};
use torch_uvm_sim::{Config, Profile};

fn fill(world: &World, bytes: u64) -> (Vec<DevicePtr>, torch_uvm::error::OutOfMemory) {
    let mut held = Vec::new();
    loop {
        match world.empty(bytes, 0) {
            Ok(ptr) => held.push(ptr),
            Err(Error::OutOfMemory(oom)) => return (held, *oom),
            Err(error) => panic!("{error}"),
        }
        world.check();
    }
}

fn free_all(world: &World, held: Vec<DevicePtr>) {
    for ptr in held {
        world.allocator.free(ptr, None).unwrap();
    }
}

#[test]
fn the_ratio_is_a_hard_cap() {
    let world = World::new(Config::small_gh200(), "uvm_oversubscription_ratio:1.5");
    let (held, oom) = fill(&world, 256 * MIB);
    assert_eq!(held.len(), 12);
    assert_eq!((oom.limit, oom.capacity), (Limit::Ratio, 3 * GIB));
    assert!(oom.to_string().contains("uvm_oversubscription_ratio"), "{oom}");
    assert_eq!(world.reserved(), 3 * GIB);
    let stats = world.allocator.device_stats(0).unwrap();
    assert_eq!((stats.num_ooms, stats.num_alloc_retries), (1, 1));
    free_all(&world, held);
    world.finish();
}

#[test]
fn the_host_is_a_hard_cap_less_its_reserve() {
    let world = World::new(Config::small_gh200(), "uvm_host_reserve_mb:3072");
    let (held, oom) = fill(&world, 512 * MIB);
    assert_eq!(oom.limit, Limit::HostMemory, "{oom:?} {}", held.len());
    assert_eq!(oom.host_reserve, 3 * GIB);
    // 2 GiB + 10 GiB less the reserve, less what rounding and the headroom of the device leave unused.
    let total = held.len() as u64 * 512 * MIB;
    assert!((8 * GIB..=9 * GIB).contains(&total), "{total}");
    assert!(oom.to_string().contains("uvm_host_reserve_mb"), "{oom}");
    world.machine.device_synchronize(0).unwrap();
    assert_eq!(world.machine.counters().host_overcommitted, 0);
    free_all(&world, held);
    world.finish();
}

#[test]
fn a_shrinking_host_ends_in_an_error() {
    let world = World::new(Config::small_gh200(), "uvm_access_pattern:cpu_first");
    let mut held = vec![world.empty(3 * GIB, 0).unwrap()];
    world.machine.set_others_host_memory(9 * GIB);
    let oom = out_of_memory(world.empty(GIB, 0));
    assert_eq!(oom.limit, Limit::HostMemory);
    world.machine.set_others_host_memory(0);
    held.push(world.empty(GIB, 0).unwrap());
    free_all(&world, held);
    world.finish();
}

#[test]
fn the_fraction_is_of_the_devices_memory_and_native_in_its_bytes() {
    let world = World::small();
    world.allocator.set_memory_fraction(0, 0.5).unwrap();
    let half = world.empty(GIB - 2 * MIB, 0).unwrap();
    let oom = out_of_memory(world.empty(4 * MIB, 0));
    assert_eq!((oom.limit, oom.allowed), (Limit::Fraction, Some(GIB)));
    world.allocator.set_memory_fraction(0, 1.0).unwrap();
    let more = world.empty(3 * GIB, 0).unwrap();
    free_all(&world, vec![half, more]);
    for bad in [-0.1, 1.1, f64::NAN] {
        assert!(matches!(world.allocator.set_memory_fraction(0, bad), Err(Error::InvalidArgument(_))));
    }
    world.finish();
}

#[test]
fn caches_are_given_back_before_a_limit_is_met() {
    let world = World::new(Config::small_gh200(), "uvm_oversubscription_ratio:0.5");
    let a = world.empty(700 * MIB, 0).unwrap();
    world.allocator.free(a, None).unwrap();
    // Another stream cannot use the cached block, so it has to go.
    let b = world.empty(700 * MIB, 1).unwrap();
    assert_eq!(world.allocator.device_stats(0).unwrap().num_alloc_retries, 1);
    // What waits for an event is waited for.
    world.allocator.record_stream(b, 0, world.streams[2]).unwrap();
    world.allocator.free(b, None).unwrap();
    let c = world.empty(700 * MIB, 0).unwrap();
    world.allocator.free(c, None).unwrap();
    world.finish();
}

#[test]
fn the_last_bytes_of_the_cap_are_used() {
    // The large pool grows by 20 MiB; at the cap it takes what is left.
    let world = World::new(Config::small_gh200().device_memory(GIB), "uvm_oversubscription_ratio:0.0234375");
    let held: Vec<_> = (0..4).map(|_| world.empty(6 * MIB, 0).unwrap()).collect();
    assert_eq!(world.reserved(), 24 * MIB);
    assert_eq!(out_of_memory(world.empty(6 * MIB, 0)).limit, Limit::Ratio);
    free_all(&world, held);
    world.finish();
}

#[test]
fn gpu_first_fills_the_device_then_the_host_and_nothing_thrashes() {
    let config = Config::small_gh200().device_memory(256 * MIB);
    let mut world = World::new(config, "uvm_device_limit_mb:128");
    let tensors: Vec<_> = (0..12).map(|_| world.tensor(32 * MIB, 0).unwrap()).collect();
    world.machine.device_synchronize(0).unwrap();
    let residency = world.machine.residency();
    assert!(residency.devices[0] <= 128 * MIB, "{residency:?}");
    assert!(residency.host >= 256 * MIB, "{residency:?}");
    let counters = world.machine.counters();
    assert_eq!((counters.device_faults, counters.evictions, counters.migrations), (0, 0, 0), "{counters:?}");
    for tensor in &tensors {
        world.verify(tensor);
    }
    for tensor in tensors {
        world.free(tensor);
    }
    world.finish();
}

fn placed(conf: &str) -> (World, DevicePtr, torch_uvm_sim::RangeAdvice, torch_uvm_sim::Residency) {
    let world = World::new(Config::small_gh200(), conf);
    let ptr = world.empty(64 * MIB, 0).unwrap();
    world.machine.device_synchronize(0).unwrap();
    let range = Range { ptr, bytes: 64 * MIB };
    let advice = world.machine.range_advice(range).unwrap();
    let residency = world.machine.residency_of(range).unwrap();
    (world, ptr, advice, residency)
}

#[test]
fn each_pattern_places_and_populates_as_documented() {
    let (world, ptr, advice, residency) = placed("uvm_access_pattern:gpu_first");
    assert_eq!(advice.preferred, Some(Location::Device(0)));
    assert_eq!(advice.accessed_by, [Location::Host], "on a hardware-coherent machine");
    assert_eq!(residency.devices[0], 64 * MIB);
    free_all(&world, vec![ptr]);
    world.finish();

    let (world, ptr, advice, residency) = placed("uvm_access_pattern:cpu_first");
    assert!(matches!(advice.preferred, Some(Location::HostNuma(_) | Location::Host)), "{advice:?}");
    assert_eq!(advice.accessed_by, [Location::Device(0)]);
    assert_eq!(residency.host, 64 * MIB);
    free_all(&world, vec![ptr]);
    world.finish();

    let (world, ptr, advice, residency) = placed("uvm_access_pattern:balanced");
    assert_eq!((advice.preferred, advice.accessed_by), (None, vec![Location::Device(0)]));
    assert_eq!(residency.nowhere, 64 * MIB, "the driver decides, at first use");
    free_all(&world, vec![ptr]);
    world.finish();

    let (world, ptr, _, residency) = placed("uvm_prefetch:False");
    assert_eq!(residency.nowhere, 64 * MIB);
    free_all(&world, vec![ptr]);
    world.finish();

    let (world, ptr, _, residency) = placed("uvm_prefetch_threshold_mb:64");
    assert_eq!(residency.nowhere, 64 * MIB);
    free_all(&world, vec![ptr]);
    world.finish();
}

#[test]
fn the_cpu_is_not_mapped_where_hardware_is_not_coherent() {
    let config = Config::new(Profile::h100()).device_memory(2 * GIB).host_memory(10 * GIB);
    let world = World::new(config, "");
    let ptr = world.empty(64 * MIB, 0).unwrap();
    let advice = world.machine.range_advice(Range { ptr, bytes: 64 * MIB }).unwrap();
    assert_eq!(advice.accessed_by, []);
    free_all(&world, vec![ptr]);
    world.finish();
}

#[test]
fn device_placement_ends_at_the_device() {
    let world = World::new(Config::small_gh200(), "uvm_access_pattern:device");
    let (held, oom) = fill(&world, 256 * MIB);
    assert!(held.len() <= 8);
    assert!(matches!(oom.limit, Limit::Device | Limit::Ratio), "{oom:?}");
    free_all(&world, held);
    world.finish();
}

#[test]
fn programs_are_told_the_capacity() {
    let world = World::new(Config::small_gh200(), "uvm_oversubscription_ratio:2.0");
    let told = || world.allocator.memory_info(0).map(|info| (info.free, info.capacity)).unwrap();
    let (free, total) = told();
    assert_eq!(total, 4 * GIB);
    assert!(free <= total && free > 3 * GIB);
    let ptr = world.empty(512 * MIB, 0).unwrap();
    world.machine.device_synchronize(0).unwrap();
    assert_eq!(told(), (free - 512 * MIB, total), "a difference is the allocation's");
    assert!(world.allocator.cache_info(0).unwrap() >= free - 512 * MIB);
    free_all(&world, vec![ptr]);
    world.finish();
}

#[test]
fn where_memory_stands_is_told_by_place() {
    let world = World::new(Config::small_gh200(), "uvm_device_limit_mb:256,uvm_host_reserve_mb:100");
    let held = [world.empty(200 * MIB, 0).unwrap(), world.empty(300 * MIB, 0).unwrap()];
    world.allocator.free(world.empty(40 * MIB, 1).unwrap(), None).unwrap();
    let info = world.allocator.memory_info(0).unwrap();
    assert_eq!((info.populated.device, info.populated.host, info.populated.unplaced), (240 * MIB, 300 * MIB, 0));
    assert_eq!((info.allocated, info.reserved), (500 * MIB, 540 * MIB));
    assert_eq!((info.device_limit, info.host_reserve), (256 * MIB, 100 * MIB));
    assert_eq!(info.device.total, 2 * GIB);
    assert!(info.host.available <= info.host.total && info.free + info.reserved <= info.capacity);
    free_all(&world, held.to_vec());
    world.finish();
}

#[test]
fn a_refusal_before_cuda_is_asked_is_counted_where_that_is_wanted() {
    for (wanted, counted) in [(false, 0), (true, 1)] {
        let world = World::new(Config::small_gh200(), "uvm_oversubscription_ratio:0.25");
        world.allocator.set_native_options(NativeOptions { throw_on_oom: wanted, ..NativeOptions::default() });
        assert_eq!(out_of_memory(world.empty(GIB, 0)).rejected, wanted);
        let stats = world.allocator.device_stats(0).unwrap();
        assert_eq!((stats.num_ooms, stats.num_oom_rejections), (1, counted));
        world.finish();
    }
}

#[test]
fn large_segments_are_as_large_as_pytorch_is_told() {
    let world = World::small();
    world.allocator.set_native_options(NativeOptions { large_segment_size: 64 * MIB, ..NativeOptions::default() });
    let held = [world.empty(3 * MIB, 0).unwrap(), world.empty(512, 0).unwrap(), world.empty(30 * MIB, 1).unwrap()];
    assert_eq!(world.reserved(), (64 + 2 + 30) * MIB);
    free_all(&world, held.to_vec());
    world.finish();
}

#[test]
fn stage_one_gives_cached_memory_back_before_the_device_is_full() {
    let world = World::new(Config::small_gh200(), "uvm_device_limit_mb:1024,uvm_stage1_min_bytes:536870912");
    let a = world.empty(400 * MIB, 0).unwrap();
    world.allocator.free(a, None).unwrap();
    let b = world.empty(400 * MIB, 1).unwrap();
    assert_eq!(world.reserved(), 400 * MIB, "the first was given back, the limit is 1024 MiB less 512");
    free_all(&world, vec![b]);
    world.finish();
}

#[test]
fn garbage_collection_gives_back_what_was_free_for_long() {
    let world = World::small();
    world.allocator.set_memory_fraction(0, 0.5).unwrap();
    let native = NativeOptions { garbage_collection_threshold: 0.5, ..NativeOptions::default() };
    world.allocator.set_native_options(native);
    let a = world.empty(600 * MIB, 0).unwrap();
    world.allocator.free(a, None).unwrap();
    let b = world.empty(100 * MIB, 1).unwrap();
    assert_eq!(world.reserved(), 100 * MIB);
    free_all(&world, vec![b]);
    world.finish();
}

#[test]
fn options_change_at_run_time_where_they_can() {
    let world = World::small();
    let ptr = world.empty(512 * MIB, 0).unwrap();
    let options = world.allocator.options();
    world.allocator.set_options(Options { oversubscription_ratio: 0.25, ..options.clone() }).unwrap();
    assert_eq!(out_of_memory(world.empty(64 * MIB, 0)).limit, Limit::Ratio);
    world.allocator.set_options(options.clone()).unwrap();
    let pattern = Options { access_pattern: torch_uvm::options::AccessPattern::CpuFirst, ..options.clone() };
    for refused in [pattern, Options { enabled: false, ..options }] {
        assert!(matches!(world.allocator.set_options(refused), Err(Error::InvalidArgument(_))));
    }
    free_all(&world, vec![ptr]);
    world.finish();
}

#[test]
fn what_is_ours_is_not_taken_for_memory_of_others() {
    let others = 100 * MIB;
    // A MemPool's own allocator, memory that the driver places, and one memory for both.
    for (profile, conf, own) in [
        (Profile::h100(), "", true),
        (Profile::h100(), "uvm_access_pattern:balanced", false),
        (Profile::h100(), "uvm_access_pattern:device", false),
        (Profile::gb10(), "uvm_device_limit_mb:256", false),
        (Profile::gb10(), "uvm_access_pattern:cpu_first", false),
    ] {
        let mut world = World::new(Config::new(profile).device_memory(4 * GIB), conf);
        world.machine.set_others_device_memory(0, others);
        let before = world.allocator.memory_info(0).unwrap();
        if own {
            let allocator = Some(torch_uvm::allocator::CustomAllocator(42));
            let stream = world.streams[0];
            world.allocator.pools(0).begin_allocate_to_pool((3, 0), Box::new(|_| true), stream, allocator).unwrap();
        }
        let tensors = [200, 300].map(|mib| world.tensor(mib * MIB, 0).unwrap());
        world.machine.device_synchronize(0).unwrap();
        let info = world.allocator.memory_info(0).unwrap();
        assert_eq!(info.populated.total(), 500 * MIB);
        // Others' memory may be hidden behind what may lie anywhere, but nothing counts twice.
        // At a fault the driver populates a little more than what was touched.
        assert!(before.free - info.free <= 512 * MIB, "{conf}: {before:?} {info:?}");
        world.check();
        if own {
            world.end_pool((3, 0));
        }
        for tensor in tensors {
            world.free(tensor);
        }
        if own {
            world.allocator.pools(0).release_pool((3, 0)).unwrap();
        }
        world.finish();
    }
}
