//! Threads that allocate and free at the same time: their caches must never show.

use crate::world::{MIB, World};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use torch_uvm::driver::DevicePtr;
use torch_uvm::error::Error;
use torch_uvm::history::{Actions, RecordContext, Recording};
use torch_uvm::options::NativeOptions;

/// So often that the thread's cache parks the next block of this size that it frees.
fn warm_up(world: &World, bytes: u64) {
    for _ in 0..40 {
        world.allocator.free(world.empty(bytes, 0).unwrap(), None).unwrap();
    }
}

fn allocations(world: &World) -> (i64, i64, i64, i64) {
    let stat = world.allocator.device_stats(0).unwrap().allocation.aggregate;
    (stat.current, stat.peak, stat.allocated, stat.freed)
}

#[test]
fn every_allocation_and_free_is_counted_once() {
    let world = World::small();
    let mut held = Vec::new();
    for round in 0..100_u64 {
        held.push(world.empty(1000 + round % 3, 0).unwrap());
        if round % 3 > 0 {
            world.allocator.free(held.pop().unwrap(), None).unwrap();
        }
    }
    let live = held.len() as i64;
    assert_eq!(allocations(&world), (live, live, 100, 100 - live));
    let stats = world.allocator.device_stats(0).unwrap();
    assert_eq!(stats.allocated_bytes.aggregate.current, 1024 * live);
    assert_eq!(stats.allocated_bytes.aggregate.allocated, 1024 * 100);
    assert_eq!(stats.active_bytes.small_pool.freed, 1024 * (100 - live));
    assert_eq!(stats.requested_bytes.aggregate.current, 1000 * live);
    let requested: u64 = (0..100).map(|round| 1000 + round % 3).sum();
    assert_eq!(stats.requested_bytes.aggregate.allocated as u64, requested);
    for ptr in held {
        world.allocator.free(ptr, None).unwrap();
    }
    world.finish();
}

#[test]
fn a_block_parked_by_one_thread_serves_every_other() {
    let world = World::small();
    warm_up(&world, 30 * MIB);
    let reserved = world.reserved();
    warm_up(&world, 30 * MIB);
    thread::scope(|scope| {
        scope.spawn(|| {
            let ptr = world.empty(29 * MIB, 0).unwrap();
            assert_eq!(world.reserved(), reserved, "no more memory is taken while another thread has some parked");
            assert_eq!(world.allocator.device_stats(0).unwrap().allocated_bytes.aggregate.peak, 30 * MIB as i64);
            world.allocator.free(ptr, None).unwrap();
        });
    });
    // What a thread that has ended left behind is not lost either.
    world.allocator.free(world.empty(28 * MIB, 0).unwrap(), None).unwrap();
    assert_eq!(world.reserved(), reserved);
    world.finish();
}

#[test]
fn parked_blocks_do_not_count_in_peaks() {
    let world = World::small();
    warm_up(&world, 1000);
    let other = || {
        let ptr = world.empty(1000, 0).unwrap();
        world.allocator.free(ptr, None).unwrap();
    };
    thread::scope(|scope| {
        scope.spawn(other);
    });
    assert_eq!(allocations(&world), (0, 1, 41, 41));
    let stats = world.allocator.device_stats(0).unwrap();
    assert_eq!(stats.allocated_bytes.small_pool.peak, 1024);
    assert_eq!(stats.active_bytes.small_pool.peak, 1024);
    assert_eq!(stats.requested_bytes.small_pool.peak, 1000);
    world.finish();
}

#[test]
fn a_thread_keeps_what_it_parked_while_others_find_enough() {
    let world = World::small();
    // A peak that the rest of the program stays under.
    let many: Vec<_> = (0..8).map(|_| world.empty(1000, 0).unwrap()).collect();
    many.into_iter().for_each(|ptr| world.allocator.free(ptr, None).unwrap());
    warm_up(&world, 1000);
    let parked = world.empty(1000, 0).unwrap();
    world.allocator.free(parked, None).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let ptr = world.empty(1000, 0).unwrap();
            assert_ne!(ptr, parked, "threads that take from each other are no faster than with one lock");
            world.allocator.free(ptr, None).unwrap();
        });
    });
    assert_eq!(world.empty(1000, 0).unwrap(), parked);
    world.allocator.free(parked, None).unwrap();
    world.finish();
}

#[test]
fn a_second_free_is_an_error_wherever_the_block_is() {
    let world = World::small();
    warm_up(&world, 1000);
    let ptr = world.empty(1000, 0).unwrap();
    world.allocator.free(ptr, None).unwrap();
    assert_eq!(world.allocator.free(ptr, None), Err(Error::InvalidPointer(ptr)));
    world.check();
    warm_up(&world, 1000);
    let ptr = world.empty(1000, 0).unwrap();
    thread::scope(|scope| {
        let other = || {
            world.allocator.free(ptr, None).unwrap();
            assert_eq!(world.allocator.free(ptr, None), Err(Error::InvalidPointer(ptr)));
        };
        scope.spawn(other);
    });
    assert_eq!(world.allocator.free(ptr, None), Err(Error::InvalidPointer(ptr)));
    warm_up(&world, 1000);
    let ptr = world.empty(1000, 0).unwrap();
    world.allocator.free(ptr, None).unwrap();
    assert_eq!(world.allocator.record_stream(ptr, 0, world.streams[1]), Err(Error::InvalidPointer(ptr)));
    assert!(world.allocator.allocation(ptr).is_err());
    world.finish();
}

#[test]
fn uses_on_other_streams_are_waited_for() {
    let mut world = World::small();
    warm_up(&world, 1000);
    let tensor = world.tensor(1000, 0).unwrap();
    world.use_on(&tensor, 1);
    world.free(tensor);
    let next = world.tensor(1000, 0).unwrap();
    assert_ne!(next.ptr, tensor.ptr, "the other stream still reads it");
    world.free(next);
    world.finish();
}

#[test]
fn nothing_is_parked_while_somebody_must_hear_of_it() {
    let world = World::small();
    warm_up(&world, 1000);
    let recording =
        Recording { enabled: true, capacity: 100, level: RecordContext::Never, clear: true, skip: Actions::default() };
    world.allocator.set_history(recording);
    warm_up(&world, 1000);
    let trace = world.allocator.snapshot((0, 0), true).traces.remove(0);
    assert_eq!(trace.len(), 100, "40 times allocated, freed, and free: the newest hundred of them");
    world.allocator.set_history(Recording { enabled: false, ..recording });

    warm_up(&world, 1000);
    world.begin_pool((0, 7), 0);
    let captured = world.empty(1000, 0).unwrap();
    world.end_pool((0, 7));
    let outside = world.empty(1000, 0).unwrap();
    let pools: Vec<_> = world.allocator.snapshot((0, 7), false).segments;
    assert!(pools.iter().any(|segment| segment.address == captured.0), "a capture is served from its pool");
    for ptr in [captured, outside] {
        world.allocator.free(ptr, None).unwrap();
    }
    world.allocator.pools(0).release_pool((0, 7)).unwrap();

    let native = NativeOptions { roundup_power2_divisions: [4; 16], ..NativeOptions::default() };
    warm_up(&world, 5000);
    world.allocator.set_native_options(native);
    let ptr = world.empty(5000, 0).unwrap();
    assert_eq!(world.allocator.allocation(ptr).unwrap().block_bytes, 5 * 1024);
    world.allocator.free(ptr, None).unwrap();
    world.finish();
}

#[test]
fn threads_that_free_each_others_blocks_leave_balanced_books() {
    const THREADS: usize = 4;
    let world = World::small();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let (senders, receivers): (Vec<_>, Vec<_>) = (0..THREADS).map(|_| mpsc::channel::<DevicePtr>()).unzip();
        let mut workers = Vec::new();
        for (index, receiver) in receivers.into_iter().enumerate() {
            let next = senders[(index + 1) % THREADS].clone();
            let world = &world;
            workers.push(scope.spawn(move || {
                let sizes = [1000, 4096, 1000, 3 * MIB, 1000, 70_000];
                let mut mine = Vec::new();
                for round in 0..3000_usize {
                    let ptr = world.empty(sizes[round % sizes.len()], 0).unwrap();
                    match (round + index) % 7 {
                        0 => next.send(ptr).unwrap(),
                        1 => mine.push(ptr),
                        _ => world.allocator.free(ptr, None).unwrap(),
                    }
                    if mine.len() > 5 {
                        mine.drain(..).for_each(|ptr| world.allocator.free(ptr, None).unwrap());
                    }
                    receiver.try_iter().for_each(|ptr| world.allocator.free(ptr, None).unwrap());
                }
                drop(next);
                mine.into_iter().for_each(|ptr| world.allocator.free(ptr, None).unwrap());
                receiver
            }));
        }
        drop(senders);
        // Meanwhile somebody looks, and asks for everything back.
        let watcher = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                world.check();
                world.allocator.empty_cache((0, 0), None).unwrap();
            }
        });
        let receivers: Vec<_> = workers.into_iter().map(|worker| worker.join().unwrap()).collect();
        for receiver in receivers {
            receiver.try_iter().for_each(|ptr| world.allocator.free(ptr, None).unwrap());
        }
        done.store(true, Ordering::Relaxed);
        watcher.join().unwrap();
    });
    let (current, _, allocated, freed) = allocations(&world);
    assert_eq!((current, allocated, freed), (0, 3000 * THREADS as i64, 3000 * THREADS as i64));
    world.finish();
}
