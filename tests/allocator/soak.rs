//! A soak: a million random operations in all, over everything that the allocator does, with every byte that matters
//! looked at.
//!
//! Each test is one program (several, in `threads`) with a seed of its own, and the same seed is the same program: only `threads` runs
//! differently each time. The variable `TORCH_UVM_SOAK` chooses another seed, or another seed and length, for all of
//! them: `7` or `7:10000000`. A failure says with which seed and after how many operations it comes again.

mod program;

use crate::world::{MIB, World};
use program::{Exchange, Program, Traits};
use std::sync::Arc;
use std::thread;
use torch_uvm_sim::{Config, Profile, Schedule};

/// How long each test's program is.
const OPERATIONS: u64 = 150_000;

const VARIABLE: &str = "TORCH_UVM_SOAK";

/// The seed and the number of operations, from the value of the variable.
fn chosen(value: Option<&str>, seed: u64, operations: u64) -> Option<(u64, u64)> {
    match value {
        None => Some((seed, operations)),
        Some(value) => match value.split_once(':') {
            None => Some((value.parse().ok()?, operations)),
            Some((seed, operations)) => Some((seed.parse().ok()?, operations.parse().ok()?)),
        },
    }
}

fn from_env(seed: u64, operations: u64) -> (u64, u64) {
    let value = std::env::var(VARIABLE).ok();
    chosen(value.as_deref(), seed, operations)
        .unwrap_or_else(|| panic!("{VARIABLE}={value:?} cannot be used; allowed: SEED or SEED:OPERATIONS"))
}

/// Two devices of 64 MiB: everything that the programs hold is more.
fn small(profile: Profile) -> Config {
    Config::new(profile).device_memory(64 * MIB).host_memory(1024 * MIB).devices(2)
}

fn soak(name: &'static str, seed: u64, config: Config, conf: &str, traits: Traits) {
    let (seed, operations) = from_env(seed, OPERATIONS);
    let config = match config.schedule {
        Schedule::Seeded(_) => config.schedule(Schedule::Seeded(seed)),
        _ => config,
    };
    let discards = config.profile.discard;
    let world = Arc::new(World::new(config, &format!("uvm_host_reserve_mb:16,{conf}")));
    let mut program = Program::new(Arc::clone(&world), name, seed, traits);
    for _ in 0..operations {
        program.step();
    }
    let counts = program.finish();
    let mut missing = counts.missing();
    missing.retain(|what| match what.as_str() {
        "Discard" => discards,
        "MoveOut" => conf.contains("device_limit"),
        _ => true,
    });
    assert!(operations < OPERATIONS || missing.is_empty(), "{missing:?} never happened: {counts}");
    println!("soak::{name}, seed {seed}: {counts}");
    Arc::into_inner(world).expect("the program has ended").finish();
}

#[test]
fn gpu_first_late() {
    soak("gpu_first_late", 1, small(Profile::gh200()), "", Traits::default());
}

#[test]
fn gpu_first_in_any_order_under_a_device_limit() {
    let config = small(Profile::gh200()).schedule(Schedule::Seeded(0));
    let conf = "uvm_device_limit_mb:24,uvm_oversubscription_ratio:3.0";
    soak("gpu_first_in_any_order_under_a_device_limit", 2, config, conf, Traits::default());
}

#[test]
fn host_memory_comes_and_goes() {
    let config = small(Profile::h100()).host_memory(256 * MIB);
    let traits = Traits { host_shrinks: true, ..Traits::default() };
    soak("host_memory_comes_and_goes", 3, config, "uvm_device_limit_mb:32", traits);
}

#[test]
fn cpu_first() {
    let config = small(Profile::gh200()).schedule(Schedule::Seeded(0));
    soak("cpu_first", 4, config, "uvm_access_pattern:cpu_first,uvm_oversubscription_ratio:3.0", Traits::default());
}

#[test]
fn balanced_where_nothing_can_be_discarded() {
    let config = small(Profile::h100()).discard(false);
    let conf = "uvm_access_pattern:balanced,uvm_oversubscription_ratio:4.0";
    soak("balanced_where_nothing_can_be_discarded", 5, config, conf, Traits::default());
}

#[test]
fn plain_device_memory() {
    let conf = "uvm_access_pattern:device";
    soak("plain_device_memory", 6, small(Profile::h100()), conf, Traits::default());
}

#[test]
fn one_memory_for_all() {
    let config = Config::new(Profile::gb10()).device_memory(256 * MIB).schedule(Schedule::Seeded(0));
    soak("one_memory_for_all", 7, config, "", Traits::default());
}

#[test]
fn threads() {
    const THREADS: u64 = 3;
    let (seed, operations) = from_env(8, OPERATIONS);
    let config = small(Profile::gh200()).devices(1);
    let world = Arc::new(World::new(config, "uvm_host_reserve_mb:16,uvm_oversubscription_ratio:4.0"));
    let exchange = Exchange::default();
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (world, exchange) = (Arc::clone(&world), exchange.clone());
            scope.spawn(move || {
                let traits = Traits { shared: Some((thread, exchange)), ..Traits::default() };
                let mut program = Program::new(world, "threads", seed + thread, traits);
                for _ in 0..operations / THREADS {
                    program.step();
                }
                println!("soak::threads, seed {}: {}", seed + thread, program.finish());
            });
        }
    });
    world.check();
    assert!(exchange.is_empty());
    Arc::into_inner(world).expect("the threads have ended").finish();
}

#[test]
fn seeds_and_lengths_are_read() {
    assert_eq!(chosen(None, 1, 2), Some((1, 2)));
    assert_eq!(chosen(Some("7"), 1, 2), Some((7, 2)));
    assert_eq!(chosen(Some("7:900"), 1, 2), Some((7, 900)));
    for bad in ["", "x", "7:", ":7", "7:8:9", "-1"] {
        assert_eq!(chosen(Some(bad), 1, 2), None, "{bad:?}");
    }
}
