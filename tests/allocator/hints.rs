//! Hints on live allocations, the books by place, and what becomes of moved pages when their memory is used again.

use crate::world::{GIB, MIB, Tensor, World};
use proptest::prelude::*;
use torch_uvm::driver::{Advice, CaptureMode, DevicePtr, Location, Range, Stream};
use torch_uvm::error::{Error, Result};
use torch_uvm::history::{Actions, RecordContext, Recording};
use torch_uvm::ids::DEFAULT_POOL;
use torch_uvm_sim::{Code, Config, CopyKind, EntryPoint, Fault, Profile, Schedule, Which};

const GPU: Location = Location::Device(0);

fn whole(tensor: &Tensor) -> Range {
    Range { ptr: tensor.ptr, bytes: tensor.bytes }
}

/// Populated on the device and in host memory, as the books have it.
fn books(world: &World) -> (u64, u64) {
    world.check();
    let stats = world.allocator.place_stats(0).unwrap();
    (stats.device.current, stats.host.current)
}

/// Where the bytes of a range really are: on the device, in host memory.
fn really(world: &World, range: Range) -> (u64, u64) {
    world.machine.device_synchronize(0).unwrap();
    let residency = world.machine.residency_of(range).unwrap();
    (residency.devices[0], residency.host)
}

fn prefetch(world: &World, tensor: &Tensor, to: Location) -> Result<()> {
    world.allocator.hints().prefetch(tensor.ptr, tensor.bytes, to, tensor.stream)
}

fn refused(result: Result<()>, text: &str) {
    match result {
        Err(error @ (Error::InvalidArgument(_) | Error::NotSupported(_))) => {
            assert!(error.to_string().contains(text), "{error}");
        }
        other => panic!("expected a refusal with {text:?}, got {other:?}"),
    }
}

/// Without hardware coherence: advice is easier to tell apart.
fn h100() -> Config {
    Config::new(Profile::h100()).device_memory(2 * GIB).host_memory(10 * GIB)
}

#[test]
fn a_prefetch_moves_live_memory_and_the_books_follow() {
    let mut world = World::small();
    let [kept, moved] = [20, 40].map(|mib| world.tensor(mib * MIB, 0).unwrap());
    assert_eq!(books(&world), (60 * MIB, 0));
    prefetch(&world, &moved, Location::Host).unwrap();
    assert_eq!((books(&world), really(&world, whole(&moved))), ((20 * MIB, 40 * MIB), (0, 40 * MIB)));
    assert_eq!(really(&world, whole(&kept)), (20 * MIB, 0));
    let info = world.allocator.memory_info(0).unwrap();
    assert_eq!((info.populated.device, info.populated.host, info.reserved), (20 * MIB, 40 * MIB, 60 * MIB));
    // Half of it comes back, from its middle: the address is one inside the allocation.
    world.allocator.hints().prefetch(moved.ptr.offset(10 * MIB), 20 * MIB, GPU, moved.stream).unwrap();
    assert_eq!((books(&world), really(&world, whole(&moved))), ((40 * MIB, 20 * MIB), (20 * MIB, 20 * MIB)));
    prefetch(&world, &moved, GPU).unwrap();
    let stats = world.allocator.place_stats(0).unwrap();
    assert_eq!((stats.moved_to_host, stats.moved_to_device, stats.prefetches), (40 * MIB, 40 * MIB, 3));
    assert_eq!((stats.device.peak, stats.host.peak), (60 * MIB, 40 * MIB));
    world.finish_with([kept, moved]);
}

#[test]
fn segments_are_told_by_place() {
    let mut world = World::new(Config::small_gh200(), "uvm_device_limit_mb:64");
    let [on_device, on_host] = [60, 30].map(|mib| world.tensor(mib * MIB, 0).unwrap());
    world.allocator.hints().prefetch(on_device.ptr, 10 * MIB, Location::Host, on_device.stream).unwrap();
    let segments = world.allocator.segment_places(0).unwrap();
    let mut figures: Vec<_> =
        segments.iter().map(|s| (s.filled, s.device, s.host, s.unplaced, s.small, s.growing, s.pool)).collect();
    figures.sort_unstable();
    assert_eq!(
        figures,
        [
            (30 * MIB, 0, 30 * MIB, 0, false, true, DEFAULT_POOL),
            (60 * MIB, 50 * MIB, 10 * MIB, 0, false, true, DEFAULT_POOL)
        ]
    );
    world.finish_with([on_device, on_host]);
}

#[test]
fn moved_pages_come_home_when_their_memory_is_used_again() {
    for stream in [0, usize::MAX] {
        let mut world = World::small();
        if stream == usize::MAX {
            // PyTorch's usual stream, on which nothing can be discarded.
            world.streams[0] = Stream(0);
        }
        let stream = 0;
        let keeper = world.tensor(20 * MIB, stream).unwrap();
        let moved = world.tensor(40 * MIB, stream).unwrap();
        prefetch(&world, &moved, Location::Host).unwrap();
        world.verify(&moved);
        world.free(moved);
        assert_eq!(books(&world), (20 * MIB, 40 * MIB), "cached, and still there");
        world.machine.reset_counters();
        // Part of it: the rest stays where it is.
        let part = world.tensor(10 * MIB, stream).unwrap();
        assert_eq!(part.ptr, moved.ptr);
        assert_eq!((books(&world), really(&world, whole(&part))), ((30 * MIB, 30 * MIB), (10 * MIB, 0)));
        let rest = world.tensor(30 * MIB, stream).unwrap();
        assert_eq!((books(&world), really(&world, whole(&rest))), ((60 * MIB, 0), (30 * MIB, 0)));
        let counters = world.machine.counters();
        assert_eq!((counters.bytes_h2d, counters.device_faults), (0, 0), "nothing of it was worth carrying");
        assert_eq!((counters.discarded, counters.slow_discard_writes), (40 * MIB, 0));
        for tensor in [keeper, part, rest] {
            world.verify(&tensor);
            world.free(tensor);
        }
        world.finish();
    }
}

#[test]
fn where_nothing_can_be_discarded_moved_pages_are_carried_home() {
    // A driver before CUDA 13.
    let mut profile = Profile::gh200();
    profile.discard = false;
    let mut world = World::new(Config::new(profile).device_memory(2 * GIB).host_memory(10 * GIB), "");
    let moved = world.tensor(40 * MIB, 0).unwrap();
    refused(world.allocator.hints().discard(moved.ptr, moved.bytes, moved.stream), "CUDA 13.0");
    prefetch(&world, &moved, Location::Host).unwrap();
    world.free(moved);
    let again = world.tensor(40 * MIB, 0).unwrap();
    assert_eq!((books(&world), really(&world, whole(&again))), ((40 * MIB, 0), (40 * MIB, 0)));
    world.verify(&again);
    world.free(again);
    world.finish();
}

#[test]
fn moved_pages_stay_where_the_device_has_no_room() {
    let mut world = World::new(h100(), "uvm_device_limit_mb:64");
    let moved = world.tensor(40 * MIB, 0).unwrap();
    prefetch(&world, &moved, Location::Host).unwrap();
    let filler = world.tensor(50 * MIB, 0).unwrap();
    assert_eq!(really(&world, whole(&filler)), (50 * MIB, 0), "the room was made");
    world.free(moved);
    let again = world.tensor(40 * MIB, 0).unwrap();
    assert_eq!(again.ptr, moved.ptr);
    // 14 MiB were left.
    assert_eq!((books(&world), really(&world, whole(&again))), ((64 * MIB, 26 * MIB), (14 * MIB, 26 * MIB)));
    let stays = world.machine.range_advice(Range { ptr: again.ptr.offset(14 * MIB), bytes: 26 * MIB }).unwrap();
    assert_eq!(
        (stays.preferred, stays.accessed_by),
        (Some(Location::Host), vec![GPU]),
        "it is not pulled in by faults"
    );
    let home = world.machine.range_advice(Range { ptr: again.ptr, bytes: 14 * MIB }).unwrap();
    assert_eq!((home.preferred, home.accessed_by), (Some(GPU), vec![]));
    world.verify(&again);
    assert_eq!(world.machine.counters().device_faults, 0);
    world.free(filler);
    world.free(again);
    // The filler's memory is cached; without it there is room.
    world.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
    let again = world.tensor(40 * MIB, 0).unwrap();
    let advice = world.machine.range_advice(whole(&again)).unwrap();
    assert_eq!((books(&world), advice.preferred, advice.accessed_by), ((40 * MIB, 0), Some(GPU), vec![]));
    world.verify(&again);
    world.free(again);
    world.finish();
}

#[test]
fn a_request_of_a_capture_gets_its_pages_home_beside_it() {
    let mut world = World::small();
    let moved = world.tensor(40 * MIB, 1).unwrap();
    prefetch(&world, &moved, Location::Host).unwrap();
    world.free(moved);
    let stream = world.streams[1];
    world.machine.begin_capture(0, stream, CaptureMode::Global).unwrap();
    let again = world.empty(40 * MIB, 1).unwrap();
    refused(world.allocator.hints().prefetch(again, MIB, Location::Host, stream), "capturing");
    refused(world.allocator.hints().discard(again, 2 * MIB, stream), "capturing");
    // Not of the stream that captures.
    world.allocator.hints().prefetch(again, 40 * MIB, Location::Host, world.streams[0]).unwrap();
    world.allocator.hints().advise(again, 40 * MIB, Advice::SetAccessedBy(GPU)).unwrap();
    let graph = world.machine.end_capture(0, stream).expect("the capture was not spoilt");
    world.machine.graph_destroy(graph).unwrap();
    assert_eq!(again, moved.ptr);
    world.allocator.hints().prefetch(again, 40 * MIB, GPU, world.streams[0]).unwrap();
    assert_eq!(really(&world, Range { ptr: again, bytes: 40 * MIB }), (40 * MIB, 0));
    world.allocator.free(again, None).unwrap();
    world.finish();
}

#[test]
fn only_whole_pages_inside_count() {
    let mut world = World::small();
    // Three tensors on two pages of one segment.
    let tensors = [1536, 1536, 1024].map(|kib| world.tensor(kib * 1024, 0).unwrap());
    let [first, middle, _] = tensors;
    assert_eq!(middle.ptr.0, first.ptr.0 + first.bytes);
    prefetch(&world, &middle, Location::Host).unwrap();
    assert_eq!(books(&world), (22 * MIB, 0), "no whole page; its neighbours moved too");
    refused(world.allocator.hints().discard(middle.ptr, middle.bytes, middle.stream), "no whole page");
    prefetch(&world, &middle, GPU).unwrap();
    for tensor in tensors {
        world.verify(&tensor);
    }
    // What rounding added at an allocation's end belongs to its last page.
    let odd = world.tensor(4 * MIB - 300, 1).unwrap();
    prefetch(&world, &odd, Location::Host).unwrap();
    assert_eq!(world.allocator.place_stats(0).unwrap().host.current, 4 * MIB);
    world.verify(&odd);
    for tensor in tensors.into_iter().chain([odd]) {
        world.free(tensor);
    }
    world.finish();
}

#[test]
fn bad_hints_are_refused_and_change_nothing() {
    let mut world = World::small();
    let a = world.tensor(4 * MIB, 0).unwrap();
    let b = world.tensor(4 * MIB, 0).unwrap();
    let before = world.allocator.place_stats(0).unwrap();
    let hints = |ptr: DevicePtr, bytes, text: &str| {
        refused(world.allocator.hints().prefetch(ptr, bytes, Location::Host, world.streams[0]), text);
        refused(world.allocator.hints().advise(ptr, bytes, Advice::SetReadMostly), text);
        refused(world.allocator.hints().discard(ptr, bytes, world.streams[0]), text);
    };
    hints(a.ptr, 8 * MIB, "inside one allocation");
    hints(a.ptr, u64::MAX, "inside one allocation");
    hints(a.ptr, 0, "0 bytes");
    hints(DevicePtr(4096), 512, "no live allocation");
    hints(b.ptr.offset(10 * MIB), 512, "no live allocation");
    refused(
        world.allocator.hints().prefetch(a.ptr, 512, Location::Device(1), world.streams[0]),
        "cuda:1 is not allowed",
    );
    let plain = World::new(Config::small_gh200(), "uvm_access_pattern:device");
    let ptr = plain.empty(4 * MIB, 0).unwrap();
    refused(plain.allocator.hints().prefetch(ptr, 4 * MIB, Location::Host, plain.streams[0]), "plain device memory");
    plain.allocator.free(ptr, None).unwrap();
    plain.finish();
    assert_eq!(world.allocator.place_stats(0).unwrap(), before);
    for tensor in [a, b] {
        world.free(tensor);
    }
    hints(a.ptr, 512, "no live allocation");
    world.finish();
}

#[test]
fn the_host_is_not_overfilled_by_hints() {
    let mut world = World::new(Config::small_gh200(), "uvm_host_reserve_mb:0");
    let tensor = world.tensor(256 * MIB, 0).unwrap();
    world.machine.set_others_host_memory(10 * GIB - 100 * MIB);
    refused(prefetch(&world, &tensor, Location::Host), "uvm_host_reserve_mb");
    world.allocator.hints().prefetch(tensor.ptr, 64 * MIB, Location::Host, tensor.stream).unwrap();
    world.verify(&tensor);
    assert_eq!(world.machine.counters().host_overcommitted, 0);
    world.machine.set_others_host_memory(0);
    world.free(tensor);
    world.finish();
}

#[test]
fn advice_ends_with_the_allocation() {
    let mut world = World::new(h100(), "");
    let tensor = world.tensor(20 * MIB, 0).unwrap();
    let neighbour = world.tensor(20 * MIB, 0).unwrap();
    let own = world.machine.range_advice(whole(&tensor)).unwrap();
    for advice in [Advice::SetReadMostly, Advice::SetPreferredLocation(Location::Host), Advice::SetAccessedBy(GPU)] {
        world.allocator.hints().advise(tensor.ptr, tensor.bytes, advice).unwrap();
        world.check();
    }
    let advised = world.machine.range_advice(whole(&tensor)).unwrap();
    assert!(advised.read_mostly, "{advised:?}");
    assert_eq!((advised.preferred, &advised.accessed_by), (Some(Location::Host), &vec![GPU]));
    assert_eq!(world.machine.range_advice(whole(&neighbour)).unwrap(), own);
    assert_eq!(world.allocator.place_stats(0).unwrap().advices, 3);
    world.free(tensor);
    let again = world.tensor(20 * MIB, 0).unwrap();
    assert_eq!(again.ptr, tensor.ptr);
    let now = world.machine.range_advice(whole(&again)).unwrap();
    assert_eq!((now.read_mostly, now.preferred, now.accessed_by), (own.read_mostly, own.preferred, own.accessed_by));
    world.finish_with([again, neighbour]);
}

#[test]
fn advice_on_a_shared_page_reaches_neighbours_in_threads_caches() {
    let mut world = World::small();
    let tensors: Vec<_> = (0..8).map(|_| world.tensor(4096, 0).unwrap()).collect();
    // What this thread frees and takes again lies in its cache.
    let pair = world.empty(512, 0).unwrap();
    for _ in 0..100 {
        world.allocator.free(pair, None).unwrap();
        assert_eq!(world.empty(512, 0).unwrap(), pair);
    }
    world.allocator.hints().advise(tensors[0].ptr, 4096, Advice::SetReadMostly).unwrap();
    world.check();
    world.allocator.free(pair, None).unwrap();
    world.check();
    world.finish_with(tensors);
}

#[test]
fn a_discard_leaves_usable_memory_and_is_waited_for() {
    let mut world = World::small();
    let mut tensor = world.tensor(20 * MIB, 0).unwrap();
    prefetch(&world, &tensor, Location::Host).unwrap();
    world.allocator.hints().discard(tensor.ptr, tensor.bytes, tensor.stream).unwrap();
    assert_eq!((books(&world), really(&world, whole(&tensor))), ((20 * MIB, 0), (20 * MIB, 0)));
    let stats = world.allocator.place_stats(0).unwrap();
    assert_eq!((stats.discarded, stats.discards), (20 * MIB, 1));
    tensor.tag = 7;
    world.machine.memset_async(0, tensor.ptr.0, 7, 1, tensor.bytes, tensor.stream).unwrap();
    world.verify(&tensor);
    // On another stream, which is late: the next owner must not lose its contents to it.
    let hold = world.machine.hold(0, world.streams[1]).unwrap();
    world.allocator.hints().discard(tensor.ptr, tensor.bytes, world.streams[1]).unwrap();
    world.free(tensor);
    let next = world.tensor(20 * MIB, 0).unwrap();
    assert_ne!(next.ptr, tensor.ptr, "it waits for the discard");
    drop(hold);
    world.machine.device_synchronize(0).unwrap();
    world.verify(&next);
    world.free(next);
    world.finish();
}

#[test]
fn a_discard_on_the_legacy_stream_comes_between_what_is_queued_there() {
    let mut world = World::small();
    world.streams[0] = Stream(0);
    let mut tensor = world.tensor(20 * MIB, 0).unwrap();
    for tag in [3, 4, 5] {
        world.allocator.hints().discard(tensor.ptr, tensor.bytes, Stream(0)).unwrap();
        tensor.tag = tag;
        world.machine.memset_async(0, tensor.ptr.0, tag.into(), 1, tensor.bytes, Stream(0)).unwrap();
    }
    world.verify(&tensor);
    assert_eq!(world.machine.live().events, []);
    world.free(tensor);
    world.finish();
}

#[test]
fn what_could_not_be_populated_again_is_not_handed_out() {
    let mut world = World::small();
    let tensor = world.tensor(20 * MIB, 0).unwrap();
    let fault = || Fault { call: Some(EntryPoint::Prefetch), which: Which::Nth(1), code: Code::INVALID_CONTEXT };
    world.machine.inject(fault());
    assert!(matches!(world.allocator.hints().discard(tensor.ptr, tensor.bytes, tensor.stream), Err(Error::Driver(_))));
    assert_eq!(world.machine.faults_hit(), 1);
    world.check();
    world.free(tensor);
    world.machine.inject(fault());
    assert!(matches!(world.empty(20 * MIB, 0), Err(Error::Driver(_))), "it cannot be populated now");
    assert_eq!(world.machine.faults_hit(), 2);
    world.check();
    let again = world.tensor(20 * MIB, 0).unwrap();
    assert_eq!(again.ptr, tensor.ptr);
    world.verify(&again);
    world.free(again);
    world.finish();
}

#[test]
fn memory_that_moved_is_given_back() {
    let mut world = World::small();
    let [first, moved, last] = [20, 40, 20].map(|mib| world.tensor(mib * MIB, 0).unwrap());
    world.allocator.hints().prefetch(moved.ptr.offset(10 * MIB), 10 * MIB, Location::Host, moved.stream).unwrap();
    world.free(moved);
    world.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
    // The host would keep the pages of what is discarded.
    assert_eq!(books(&world), (40 * MIB, 10 * MIB), "the pages on the device went");
    for tensor in [first, last] {
        world.verify(&tensor);
    }
    // With the pages that stayed, and what was given back behind them.
    let again = world.tensor(30 * MIB, 0).unwrap();
    assert_eq!((again.ptr, books(&world)), (moved.ptr.offset(10 * MIB), (70 * MIB, 0)));
    world.verify(&again);
    for tensor in [first, again, last] {
        world.free(tensor);
    }
    world.finish();
}

#[test]
fn a_checkpoint_brings_moved_memory_back_with_its_contents() {
    let mut world = World::small();
    world.begin_pool((0, 1), 0);
    let tensor = world.tensor(40 * MIB, 0).unwrap();
    world.end_pool((0, 1));
    prefetch(&world, &tensor, Location::Host).unwrap();
    let state = world.allocator.pools(0).checkpoint_state((0, 1)).unwrap();
    let restored = world.allocator.pools(0).restore_pool(&state, None).unwrap();
    assert_eq!(restored.created, [tensor.ptr.0]);
    assert_eq!(books(&world), (0, 40 * MIB));
    world.verify(&tensor);
    world.free(tensor);
    world.allocator.pools(0).release_pool((0, 1)).unwrap();
    world.finish();
}

#[test]
fn changes_of_place_are_sampled_while_history_is_recorded() {
    let mut world = World::small();
    let recording = |enabled| Recording {
        enabled,
        capacity: 10,
        level: RecordContext::Never,
        clear: false,
        skip: Actions::default(),
    };
    let before = world.tensor(20 * MIB, 0).unwrap();
    assert_eq!(world.allocator.place_samples(0).unwrap(), []);
    world.allocator.set_history(recording(true));
    let tensor = world.tensor(40 * MIB, 0).unwrap();
    prefetch(&world, &tensor, Location::Host).unwrap();
    let samples = world.allocator.place_samples(0).unwrap();
    let levels: Vec<_> = samples.iter().map(|s| (s.populated.device, s.populated.host, s.allocated)).collect();
    assert_eq!(levels, [(60 * MIB, 0, 20 * MIB), (20 * MIB, 40 * MIB, 60 * MIB)]);
    assert!(samples[0].time <= samples[1].time);
    world.allocator.set_history(recording(false));
    assert_eq!(world.allocator.place_samples(0).unwrap(), []);
    for tensor in [before, tensor] {
        world.free(tensor);
    }
    world.finish();
}

/// Goes through everything that hints make the driver do. Whatever was allocated is left in `held`.
fn program(world: &World, held: &mut Vec<DevicePtr>) -> Result<()> {
    for stream in [0, 1] {
        let on = world.streams[stream];
        let ptr = world.empty(20 * MIB, stream)?;
        held.push(ptr);
        world.allocator.hints().advise(ptr, 5 * MIB, Advice::SetReadMostly)?;
        world.allocator.hints().prefetch(ptr, 20 * MIB, Location::Host, on)?;
        world.allocator.hints().discard(ptr, 10 * MIB, on)?;
        world.allocator.free(ptr, None)?;
        held.retain(|&other| other != ptr);
        held.push(world.empty(20 * MIB, stream)?);
    }
    world.allocator.empty_cache(DEFAULT_POOL, None)
}

#[test]
fn every_driver_call_fails_once() {
    for code in [Code::INVALID_CONTEXT, Code::OUT_OF_MEMORY] {
        let mut nth = 0;
        loop {
            nth += 1;
            let mut world = World::small();
            world.streams[0] = Stream(0);
            world.machine.inject(Fault { call: None, which: Which::Nth(nth), code });
            let mut held = Vec::new();
            let result = program(&world, &mut held);
            let hit = world.machine.faults_hit() > 0;
            world.machine.clear_faults();
            world.check();
            match result {
                Ok(()) => {}
                Err(Error::Driver(error)) => assert_eq!(error.code, code.0, "call {nth}: {error}"),
                Err(Error::OutOfMemory(_)) => assert_eq!(code, Code::OUT_OF_MEMORY),
                Err(other) => panic!("call {nth}: {other}"),
            }
            for ptr in held {
                world.allocator.free(ptr, None).unwrap();
            }
            for stream in [0, 1] {
                let tensor = world.tensor(20 * MIB, stream).unwrap();
                world.check();
                world.verify(&tensor);
                world.free(tensor);
            }
            world.finish();
            if !hit {
                assert!(nth > 60, "only {nth} calls");
                break;
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    Allocate { bytes: u64, stream: usize },
    Free(prop::sample::Index),
    UseOn(prop::sample::Index, usize),
    Prefetch { tensor: prop::sample::Index, part: (u64, u64), host: bool, stream: usize },
    Advise(prop::sample::Index, u8),
    Discard { tensor: prop::sample::Index, stream: usize },
    Verify(prop::sample::Index),
    EmptyCache,
    Fail(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let bytes = prop_oneof![2 => 1_u64..8192, 2 => 8192_u64..2 * MIB, 4 => 2 * MIB..12 * MIB, 1 => 12 * MIB..30 * MIB];
    let tensor = any::<prop::sample::Index>;
    prop_oneof![
        16 => (bytes, 0..3_usize).prop_map(|(bytes, stream)| Op::Allocate { bytes, stream }),
        12 => tensor().prop_map(Op::Free),
        3 => (tensor(), 0..3_usize).prop_map(|(tensor, stream)| Op::UseOn(tensor, stream)),
        12 => (tensor(), (0_u64..100, 0_u64..100), any::<bool>(), 0..3_usize)
            .prop_map(|(tensor, part, host, stream)| Op::Prefetch { tensor, part, host, stream }),
        3 => (tensor(), any::<u8>()).prop_map(|(tensor, advice)| Op::Advise(tensor, advice)),
        4 => (tensor(), 0..3_usize).prop_map(|(tensor, stream)| Op::Discard { tensor, stream }),
        2 => tensor().prop_map(Op::Verify),
        3 => Just(Op::EmptyCache),
        1 => (1_u64..6).prop_map(Op::Fail),
    ]
}

/// What random programs may meet.
fn expected(error: &Error) -> bool {
    match error {
        Error::OutOfMemory(_) => true,
        Error::Driver(error) => error.code == Code::INVALID_CONTEXT.0,
        Error::InvalidArgument(text) => text.contains("no whole page") || text.contains("do not fit into host memory"),
        _ => false,
    }
}

fn run(conf: &str, schedule: Schedule, ops: Vec<Op>) {
    let config = Config::small_gh200().device_memory(96 * MIB).host_memory(2500 * MIB).schedule(schedule);
    let mut world = World::new(config, conf);
    let mut live: Vec<Tensor> = Vec::new();
    for op in ops {
        let result = match op {
            Op::Allocate { bytes, stream } => world.tensor(bytes, stream).map(|tensor| live.push(tensor)),
            Op::EmptyCache => world.allocator.empty_cache(DEFAULT_POOL, None),
            Op::Fail(nth) => {
                world.machine.inject(Fault { call: None, which: Which::Nth(nth), code: Code::INVALID_CONTEXT });
                // A program's own calls do not fail here: the faults are the allocator's.
                let result = world.empty(5 * MIB, 0).and_then(|ptr| {
                    let hinted = world.allocator.hints().prefetch(ptr, 5 * MIB, Location::Host, world.streams[0]);
                    world.machine.clear_faults();
                    world.allocator.free(ptr, None).unwrap();
                    hinted
                });
                world.machine.clear_faults();
                result
            }
            _ if live.is_empty() => Ok(()),
            Op::Free(index) => {
                let tensor = live.swap_remove(index.index(live.len()));
                world.free(tensor);
                Ok(())
            }
            Op::UseOn(index, stream) => {
                if world.uses_left() > 0 {
                    let tensor = *index.get(&live);
                    world.use_on(&tensor, stream);
                }
                Ok(())
            }
            Op::Prefetch { tensor, part, host, stream } => {
                let tensor = tensor.get(&live);
                let start = tensor.bytes * part.0 / 100;
                let bytes = ((tensor.bytes - start) * part.1 / 100).max(1);
                let to = if host { Location::Host } else { GPU };
                world.allocator.hints().prefetch(tensor.ptr.offset(start), bytes, to, world.streams[stream])
            }
            Op::Advise(index, which) => {
                let tensor = index.get(&live);
                let all = [
                    Advice::SetReadMostly,
                    Advice::UnsetReadMostly,
                    Advice::SetPreferredLocation(Location::Host),
                    Advice::UnsetPreferredLocation,
                    Advice::SetAccessedBy(GPU),
                ];
                world.allocator.hints().advise(tensor.ptr, tensor.bytes, all[which as usize % all.len()])
            }
            Op::Discard { tensor, stream } => {
                let index = tensor.index(live.len());
                let on = world.streams[stream];
                // After what was written, and before what is written next.
                world.machine.device_synchronize(0).unwrap();
                let result = world.allocator.hints().discard(live[index].ptr, live[index].bytes, on);
                world.machine.stream_synchronize(0, on).unwrap();
                let Tensor { ptr, bytes, tag, stream } = live[index];
                world.machine.memset_async(0, ptr.0, tag.into(), 1, bytes, stream).unwrap();
                result
            }
            Op::Verify(index) => {
                world.verify(index.get(&live));
                Ok(())
            }
        };
        if let Err(error) = result {
            assert!(expected(&error), "{error}");
        }
        world.check();
    }
    world.verify_copies();
    for tensor in live {
        world.verify(&tensor);
        world.free(tensor);
    }
    assert_eq!(world.machine.counters().host_overcommitted, 0);
    world.finish();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn random_hints_late(ops in prop::collection::vec(op(), 1..100)) {
        run("", Schedule::Late, ops);
    }

    #[test]
    fn random_hints_in_any_order_beyond_the_device(seed in any::<u64>(), ops in prop::collection::vec(op(), 1..100)) {
        run("uvm_device_limit_mb:48,uvm_oversubscription_ratio:3.0", Schedule::Seeded(seed), ops);
    }

    #[test]
    fn random_hints_on_memory_of_the_host(ops in prop::collection::vec(op(), 1..60)) {
        run("uvm_access_pattern:cpu_first", Schedule::Late, ops);
    }

    #[test]
    fn random_hints_where_the_driver_places(ops in prop::collection::vec(op(), 1..60)) {
        run("uvm_access_pattern:balanced", Schedule::Late, ops);
    }
}

#[test]
fn reading_through_the_host_sees_what_was_moved() {
    let mut world = World::small();
    let tensor = world.tensor(4 * MIB, 0).unwrap();
    prefetch(&world, &tensor, Location::Host).unwrap();
    let mut host = vec![0_u8; 16];
    world.machine.stream_synchronize(0, tensor.stream).unwrap();
    world.machine.memcpy(0, host.as_mut_ptr() as u64, tensor.ptr.0, 16, CopyKind::DeviceToHost).unwrap();
    assert!(host.iter().all(|&byte| byte == tensor.tag));
    world.free(tensor);
    world.finish();
}
