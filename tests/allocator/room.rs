//! Beyond the device limit: what lives long moves out for what comes and goes, once, and nothing thrashes.

use crate::world::{GIB, MIB, Tensor, World};
use torch_uvm::driver::{CaptureMode, Location, Range};
use torch_uvm::ids::DEFAULT_POOL;
use torch_uvm::stats::PlaceStats;
use torch_uvm_sim::{Config, Profile};

fn config() -> Config {
    Config::new(Profile::h100()).device_memory(GIB).host_memory(10 * GIB)
}

fn on_host(world: &World, tensor: &Tensor) -> u64 {
    world.machine.device_synchronize(0).unwrap();
    world.machine.residency_of(Range { ptr: tensor.ptr, bytes: tensor.bytes }).unwrap().host
}

fn stats(world: &World) -> PlaceStats {
    world.check();
    world.allocator.place_stats(0).unwrap()
}

/// A forward and a backward pass: activations live until the way back, temporaries come and go. Answers how many bytes
/// of activations were in host memory when they were used last.
fn step(world: &mut World, layers: usize, activation: u64) -> u64 {
    let mut activations = Vec::new();
    for _ in 0..layers {
        let temporary = world.tensor(activation, 0).unwrap();
        activations.push(world.tensor(activation, 0).unwrap());
        world.verify(&temporary);
        world.free(temporary);
    }
    let mut remote = 0;
    while let Some(tensor) = activations.pop() {
        let gradient = world.tensor(activation, 0).unwrap();
        world.verify(&tensor);
        remote += on_host(world, &tensor);
        world.free(tensor);
        world.free(gradient);
    }
    world.check();
    remote
}

#[test]
fn a_training_loop_ends_with_activations_on_the_device_and_state_on_the_host() {
    let mut world = World::new(config(), "uvm_device_limit_mb:256,uvm_stage1_threshold:0");
    // 64 MiB of weights, 120 of activations and 12 of temporaries, 96 of optimizer state from the end of the first
    // step.
    let weights: Vec<_> = (0..4).map(|_| world.tensor(16 * MIB, 0).unwrap()).collect();
    let mut state = Vec::new();
    let mut moved = Vec::new();
    let mut remote = Vec::new();
    for number in 0..9 {
        remote.push(step(&mut world, 10, 12 * MIB));
        if number == 0 {
            state.extend((0..8).map(|_| world.tensor(12 * MIB, 0).unwrap()));
        }
        let stats = stats(&world);
        moved.push((stats.moved_to_host, stats.moved_to_device));
        for tensor in weights.iter().chain(&state) {
            world.verify(tensor);
        }
    }
    let last = stats(&world);
    assert!(last.moves_out > 0 && last.moved_out >= 36 * MIB, "{last:?}");
    assert_eq!(last.regrets, 0, "{last:?}");
    assert!(moved[4..].iter().all(|&then| then == moved[4]), "nothing moves once it has settled: {moved:?}");
    assert_eq!(remote[4..], [0; 5], "activations are on the device: {remote:?}");
    assert!(weights.iter().all(|tensor| on_host(&world, tensor) == 0), "weights came first and stay");
    assert!(state.iter().map(|tensor| on_host(&world, tensor)).sum::<u64>() >= 36 * MIB);
    assert!(last.device.peak <= 256 * MIB, "{last:?}");
    let counters = world.machine.counters();
    assert_eq!((counters.device_faults, counters.evictions), (0, 0), "{counters:?}");
    world.finish_with(weights.into_iter().chain(state));
}

#[test]
fn a_model_larger_than_the_device_is_not_shuffled_while_it_is_loaded() {
    let mut world = World::new(config(), "uvm_device_limit_mb:128");
    let weights: Vec<_> = (0..40).map(|_| world.tensor(16 * MIB, 0).unwrap()).collect();
    let stats = stats(&world);
    assert_eq!((stats.moved_to_host, stats.moved_to_device, stats.moves_out), (0, 0, 0));
    assert_eq!((stats.device.current, stats.host.current), (128 * MIB, 512 * MIB));
    assert!(weights[..8].iter().all(|tensor| on_host(&world, tensor) == 0));
    world.finish_with(weights);
}

/// A world whose device is full of two allocations of 60 MiB that live long.
fn full() -> (World, [Tensor; 2]) {
    let mut world = World::new(config(), "uvm_device_limit_mb:128,uvm_stage1_threshold:0");
    let old = [60, 60].map(|mib| world.tensor(mib * MIB, 0).unwrap());
    age(&world, 300 * MIB);
    (world, old)
}

/// Lets so many bytes come and go.
fn age(world: &World, bytes: u64) {
    for _ in 0..bytes / MIB {
        world.allocator.free(world.empty(MIB, 1).unwrap(), None).unwrap();
    }
    world.check();
}

#[test]
fn what_came_last_moves_and_only_as_much_as_is_needed() {
    let (mut world, old) = full();
    let new = world.tensor(30 * MIB, 0).unwrap();
    let stats = stats(&world);
    assert_eq!((stats.moves_out, stats.hard_reclamations, stats.stage), (1, 1, 2));
    assert_eq!((on_host(&world, &new), on_host(&world, &old[0])), (0, 0));
    assert_eq!(on_host(&world, &old[1]), stats.moved_out);
    let advice = world.machine.range_advice(Range { ptr: old[1].ptr.offset(58 * MIB), bytes: 2 * MIB }).unwrap();
    assert_eq!((advice.preferred, advice.accessed_by), (Some(Location::Host), vec![Location::Device(0)]));
    for tensor in old.into_iter().chain([new]) {
        world.verify(&tensor);
        world.free(tensor);
    }
    // Its memory is used again: at home, with the advice of its segment.
    let again = world.tensor(60 * MIB, 0).unwrap();
    let advice = world.machine.range_advice(Range { ptr: again.ptr, bytes: again.bytes }).unwrap();
    assert_eq!((on_host(&world, &again), advice.preferred), (0, Some(Location::Device(0))));
    world.verify(&again);
    world.free(again);
    world.finish();
}

#[test]
fn what_moved_out_comes_back_where_the_room_lasts() {
    let (mut world, old) = full();
    let new = world.tensor(30 * MIB, 0).unwrap();
    let out = stats(&world).moved_out;
    assert_eq!(on_host(&world, &old[1]), out);
    assert!(out > 0);
    world.free(new);
    assert_eq!(on_host(&world, &old[1]), out, "cached memory has the device");
    world.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
    assert_eq!((on_host(&world, &old[1]), stats(&world).moved_to_device), (0, out));
    let advice = world.machine.range_advice(Range { ptr: old[1].ptr, bytes: old[1].bytes }).unwrap();
    assert_eq!(advice.preferred, Some(Location::Device(0)));
    // A program that empties its cache in each step and needs the room again in the next.
    let mut moves = Vec::new();
    for _ in 0..40 {
        world.allocator.free(world.empty(30 * MIB, 0).unwrap(), None).unwrap();
        world.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
        moves.push(stats(&world).moves_out);
    }
    assert!(moves[9] >= 3 && moves[39] <= moves[9] + 3, "it comes back ever more rarely: {moves:?}");
    world.finish_with(old);
}

#[test]
fn what_the_program_has_sent_to_the_host_does_not_come_back() {
    let (mut world, old) = full();
    let new = world.tensor(30 * MIB, 0).unwrap();
    world.allocator.hints().prefetch(old[1].ptr, old[1].bytes, Location::Host, old[1].stream).unwrap();
    world.free(new);
    world.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
    assert_eq!((on_host(&world, &old[1]), stats(&world).moved_to_device), (60 * MIB, 0));
    world.finish_with(old);
}

#[test]
fn only_as_much_comes_back_as_leaves_the_device_ample() {
    let mut world = World::new(config(), "uvm_device_limit_mb:128,uvm_stage1_min_bytes:16777216");
    let old = [50, 50].map(|mib| world.tensor(mib * MIB, 0).unwrap());
    age(&world, 300 * MIB);
    let (kept, new) = (world.tensor(20 * MIB, 0).unwrap(), world.tensor(30 * MIB, 2).unwrap());
    let out = on_host(&world, &old[1]);
    assert!(out >= 20 * MIB, "{out}");
    world.free(new);
    world.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
    let after = stats(&world);
    assert_eq!(after.stage, 0, "{after:?}");
    assert!(on_host(&world, &old[1]) > 0 && after.moved_to_device > 0, "{after:?}");
    assert!(after.device.current <= 104 * MIB && after.device.current > 100 * MIB, "{after:?}");
    world.finish_with(old.into_iter().chain([kept]));
}

#[test]
fn moves_that_are_regretted_are_counted_and_become_rarer() {
    let (mut world, [kept, old]) = full();
    let new = world.tensor(30 * MIB, 0).unwrap();
    world.free(old);
    let regretted = stats(&world);
    assert_eq!((regretted.moves_out, regretted.regrets), (1, 1));
    // What would have been old enough before is not now.
    let old = world.tensor(60 * MIB, 0).unwrap();
    age(&world, 100 * MIB);
    let more = world.tensor(40 * MIB, 2).unwrap();
    assert_eq!(stats(&world).moves_out, 1);
    world.finish_with([kept, new, old, more]);
}

#[test]
fn nothing_moves_while_a_graph_is_captured() {
    let (mut world, old) = full();
    let stream = world.streams[2];
    world.machine.begin_capture(0, stream, CaptureMode::Global).unwrap();
    world.begin_pool((0, 1), 2);
    let captured = world.empty(30 * MIB, 2).unwrap();
    world.end_pool((0, 1));
    let graph = world.machine.end_capture(0, stream).expect("the capture was not spoilt");
    world.machine.graph_destroy(graph).unwrap();
    assert_eq!(stats(&world).moves_out, 0);
    // Nor is a graph's own memory moved later.
    age(&world, 600 * MIB);
    let new = world.tensor(30 * MIB, 0).unwrap();
    assert_eq!(stats(&world).moves_out, 1);
    world.allocator.free(captured, None).unwrap();
    for tensor in old.into_iter().chain([new]) {
        world.verify(&tensor);
        world.free(tensor);
    }
    world.allocator.pools(0).release_pool((0, 1)).unwrap();
    world.finish();
}

#[test]
fn what_lives_long_moves_while_a_mempool_is_in_use() {
    let (mut world, old) = full();
    world.begin_pool((1, 0), 0);
    let new = world.tensor(30 * MIB, 0).unwrap();
    assert_eq!((stats(&world).moves_out, on_host(&world, &new)), (1, 0));
    world.end_pool((1, 0));
    for tensor in old.into_iter().chain([new]) {
        world.verify(&tensor);
        world.free(tensor);
    }
    world.allocator.pools(0).release_pool((1, 0)).unwrap();
    world.finish();
}

#[test]
fn the_programs_word_on_its_memory_holds() {
    let (mut world, old) = full();
    for tensor in &old {
        let here = torch_uvm::driver::Advice::SetPreferredLocation(Location::Device(0));
        world.allocator.hints().advise(tensor.ptr, tensor.bytes, here).unwrap();
    }
    let new = world.tensor(30 * MIB, 0).unwrap();
    assert_eq!((stats(&world).moves_out, on_host(&world, &new)), (0, 30 * MIB), "it was told to stay");
    world.finish_with(old.into_iter().chain([new]));
}

#[test]
fn live_memory_moves_only_where_the_host_has_room() {
    let (mut world, old) = full();
    world.machine.set_others_host_memory(9 * GIB);
    assert!(world.empty(30 * MIB, 0).is_err(), "neither place has room");
    assert_eq!(stats(&world).moves_out, 0);
    world.machine.set_others_host_memory(0);
    age(&world, 16 * MIB);
    let new = world.tensor(30 * MIB, 0).unwrap();
    assert_eq!(stats(&world).moves_out, 1);
    world.finish_with(old.into_iter().chain([new]));
}

#[test]
fn stages_are_counted() {
    let mut world = World::new(config(), "uvm_device_limit_mb:100,uvm_stage1_min_bytes:20971520");
    let stages = |world: &World| {
        let stats = stats(world);
        (stats.stage, stats.stage_changes, stats.light_reclamations, stats.hard_reclamations)
    };
    let first = world.tensor(70 * MIB, 0).unwrap();
    assert_eq!(stages(&world), (0, 0, 0, 0));
    let second = world.tensor(20 * MIB, 1).unwrap();
    assert_eq!(stages(&world), (1, 1, 0, 0), "10 MiB are free");
    world.free(second);
    // On another stream it cannot be reused: it is given back.
    let third = world.tensor(16 * MIB, 0).unwrap();
    assert_eq!(stages(&world), (1, 1, 1, 0));
    let fourth = world.tensor(30 * MIB, 0).unwrap();
    assert_eq!(stages(&world).0, 2, "it lies in host memory");
    for tensor in [first, third, fourth] {
        world.verify(&tensor);
        world.free(tensor);
    }
    world.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
    assert_eq!(stages(&world).0, 0);
    world.finish();
}
