//! Random programs against a model: no overlap, conservation of bytes, no early reuse.

use crate::world::{MIB, Tensor, World};
use proptest::prelude::*;
use std::collections::BTreeMap;
use torch_uvm::error::Error;
use torch_uvm::ids::{DEFAULT_POOL, MempoolId};
use torch_uvm_sim::{Config, Schedule};

#[derive(Clone, Debug)]
enum Op {
    Allocate { bytes: u64, stream: usize },
    Free(prop::sample::Index),
    UseOn { tensor: prop::sample::Index, stream: usize },
    Verify(prop::sample::Index),
    Synchronize(usize),
    EmptyCache,
    BeginPool { pool: u64, stream: usize },
    EndPool(u64),
    ReleasePool(u64),
    Fraction(f64),
    Snapshot,
}

fn op() -> impl Strategy<Value = Op> {
    let bytes = prop_oneof![4 => 1_u64..8192, 3 => 8192_u64..2 * MIB, 2 => 2 * MIB..12 * MIB, 1 => 12 * MIB..40 * MIB];
    prop_oneof![
        20 => (bytes, 0..3_usize).prop_map(|(bytes, stream)| Op::Allocate { bytes, stream }),
        14 => any::<prop::sample::Index>().prop_map(Op::Free),
        6 => (any::<prop::sample::Index>(), 0..3_usize).prop_map(|(tensor, stream)| Op::UseOn { tensor, stream }),
        2 => any::<prop::sample::Index>().prop_map(Op::Verify),
        2 => (0..3_usize).prop_map(Op::Synchronize),
        3 => Just(Op::EmptyCache),
        2 => (1..3_u64, 0..3_usize).prop_map(|(pool, stream)| Op::BeginPool { pool, stream }),
        3 => (1..3_u64).prop_map(Op::EndPool),
        1 => (1..3_u64).prop_map(Op::ReleasePool),
        1 => prop_oneof![Just(1.0), 0.3..1.0].prop_map(Op::Fraction),
        1 => Just(Op::Snapshot),
    ]
}

#[derive(Default)]
struct Model {
    live: Vec<Tensor>,
    /// Uses of private pools: (begun now, held).
    pools: BTreeMap<u64, (bool, i32)>,
}

fn mempool(pool: u64) -> MempoolId {
    (0, pool)
}

fn check_conservation(world: &World, model: &Model) {
    world.check();
    let stats = world.allocator.device_stats(0).unwrap();
    assert_eq!(stats.allocation.aggregate.current as usize, model.live.len());
    let requested: u64 = model.live.iter().map(|tensor| tensor.bytes).sum();
    let reported = stats.requested_bytes.aggregate.current as u64;
    assert!(reported >= requested, "frees that wait are still active");
    let mut ranges: Vec<(u64, u64)> = model.live.iter().map(|t| (t.ptr.0, t.ptr.0 + t.bytes)).collect();
    ranges.sort_unstable();
    assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0), "live allocations overlap");
}

fn run(conf: &str, schedule: Schedule, ops: Vec<Op>) {
    let config = Config::small_gh200().device_memory(96 * MIB).host_memory(2500 * MIB).schedule(schedule);
    let mut world = World::new(config, conf);
    let mut model = Model::default();
    for (step, op) in ops.into_iter().enumerate() {
        match op {
            Op::Allocate { bytes, stream } => match world.tensor(bytes, stream) {
                Ok(tensor) => model.live.push(tensor),
                Err(Error::OutOfMemory(_)) => {}
                Err(error) => panic!("{error}"),
            },
            Op::Free(index) if !model.live.is_empty() => {
                let tensor = model.live.swap_remove(index.index(model.live.len()));
                world.free(tensor);
            }
            Op::UseOn { tensor, stream } if !model.live.is_empty() && world.uses_left() > 0 => {
                let tensor = *tensor.get(&model.live);
                world.use_on(&tensor, stream);
            }
            Op::Verify(index) if !model.live.is_empty() => world.verify(index.get(&model.live)),
            Op::Synchronize(stream) => world.machine.stream_synchronize(0, world.streams[stream]).unwrap(),
            Op::EmptyCache => {
                world.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
            }
            Op::BeginPool { pool, stream } => {
                let entry = model.pools.entry(pool).or_default();
                if !entry.0 {
                    let wanted = world.streams[stream];
                    let begun = world.allocator.pools(0).begin_allocate_to_pool(
                        mempool(pool),
                        Box::new(move |stream| stream == wanted),
                        wanted,
                        None,
                    );
                    // A pool that everybody let go of, but that still has segments, cannot be revived.
                    if begun.is_ok() {
                        *entry = (true, entry.1 + 1);
                    } else {
                        assert_eq!(entry.1, 0);
                    }
                }
            }
            Op::EndPool(pool) => {
                if let Some((begun @ true, _)) = model.pools.get_mut(&pool) {
                    world.end_pool(mempool(pool));
                    *begun = false;
                }
            }
            Op::ReleasePool(pool) => {
                if let Some((false, held @ 1..)) = model.pools.get_mut(&pool) {
                    world.allocator.pools(0).release_pool(mempool(pool)).unwrap();
                    *held -= 1;
                }
            }
            Op::Fraction(fraction) => world.allocator.set_memory_fraction(0, fraction).unwrap(),
            Op::Snapshot => {
                let snapshot = world.allocator.snapshot(DEFAULT_POOL, true);
                let total: u64 = snapshot.segments.iter().map(|segment| segment.total_bytes).sum();
                assert_eq!(total, world.reserved());
                let allocated: u64 = snapshot.segments.iter().map(|segment| segment.allocated_bytes).sum();
                assert_eq!(allocated, world.allocated());
            }
            Op::Free(_) | Op::UseOn { .. } | Op::Verify(_) => {}
        }
        // Not after each: looking at the books settles what was freed last.
        if step % 4 == 3 {
            check_conservation(&world, &model);
        }
    }
    world.verify_copies();
    for tensor in std::mem::take(&mut model.live) {
        world.verify(&tensor);
        world.free(tensor);
    }
    for (pool, (begun, held)) in model.pools {
        if begun {
            world.end_pool(mempool(pool));
        }
        for _ in 0..held {
            world.allocator.pools(0).release_pool(mempool(pool)).unwrap();
        }
    }
    assert_eq!(world.machine.counters().host_overcommitted, 0);
    world.finish();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn random_programs_late(ops in prop::collection::vec(op(), 1..120)) {
        run("", Schedule::Late, ops);
    }

    #[test]
    fn random_programs_in_any_order(seed in any::<u64>(), ops in prop::collection::vec(op(), 1..120)) {
        run("uvm_device_limit_mb:48,uvm_oversubscription_ratio:2.0", Schedule::Seeded(seed), ops);
    }

    #[test]
    fn random_programs_on_plain_device_memory(ops in prop::collection::vec(op(), 1..120)) {
        run("uvm_access_pattern:device", Schedule::Late, ops);
    }
}
