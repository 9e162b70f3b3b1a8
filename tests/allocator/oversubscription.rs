//! More than the device has: held, every byte looked at, and what each limit ends in.

use crate::world::{MIB, World, out_of_memory};
use torch_uvm::driver::DevicePtr;
use torch_uvm::error::{Error, Limit, OutOfMemory};
use torch_uvm::ids::DEFAULT_POOL;
use torch_uvm_sim::{Config, CopyKind, Machine, Profile};

const DEVICE: u64 = 64 * MIB;
const RESERVE: u64 = 32 * MIB;

/// Memory whose bytes are its own: those of `text` from a place that only it begins at.
struct Held {
    ptr: DevicePtr,
    bytes: u64,
    stream: usize,
    from: usize,
}

/// A program that fills memory and looks at all of it.
struct Filler<'a> {
    world: &'a World,
    /// What memory is filled with, over and over; its length has no divisor in common with that of anything else.
    text: Vec<u8>,
    held: Vec<Held>,
    next: usize,
}

impl<'a> Filler<'a> {
    fn new(world: &'a World) -> Self {
        let mut state = 1_u32;
        let mut byte = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        Self { world, text: (0..1_048_573).map(|_| byte()).collect(), held: Vec::new(), next: 0 }
    }

    /// What stands in `held`, piece by piece: where, and what.
    fn pieces(&self, held: &Held) -> impl Iterator<Item = (u64, &[u8])> {
        let (mut offset, mut from) = (0, held.from);
        let bytes = held.bytes;
        std::iter::from_fn(move || {
            let length = (self.text.len() - from).min((bytes - offset) as usize);
            let piece = (offset, &self.text[from..from + length]);
            (offset, from) = (offset + length as u64, 0);
            (length > 0).then_some(piece)
        })
    }

    fn fill(&self, held: &Held) {
        for (offset, piece) in self.pieces(held) {
            let (to, from) = (held.ptr.0 + offset, piece.as_ptr() as u64);
            let stream = self.world.streams[held.stream];
            let copied =
                self.world.machine.memcpy_async(0, to, from, piece.len() as u64, CopyKind::HostToDevice, stream);
            copied.expect("copy to the device");
        }
    }

    /// Allocates and fills.
    fn hold(&mut self, bytes: u64, stream: usize) -> Result<(), Error> {
        let ptr = self.world.empty(bytes, stream)?;
        self.next += 1;
        let held = Held { ptr, bytes, stream, from: (self.next * 104_729) % self.text.len() };
        self.fill(&held);
        // What is only queued is not missing yet from what others see.
        self.world.machine.stream_synchronize(0, self.world.streams[stream]).unwrap();
        self.held.push(held);
        Ok(())
    }

    /// Holds more until it is refused.
    fn hold_all(&mut self, bytes: u64, stream: usize) -> OutOfMemory {
        loop {
            match self.hold(bytes, stream) {
                Ok(()) => {}
                Err(Error::OutOfMemory(error)) => return *error,
                Err(other) => panic!("{other}"),
            }
            assert!(self.bytes() < 64 << 30, "there seems to be no limit");
        }
    }

    fn bytes(&self) -> u64 {
        self.held.iter().map(|held| held.bytes).sum()
    }

    /// Looks at every byte.
    fn verify(&self) {
        self.world.machine.device_synchronize(0).unwrap();
        for held in &self.held {
            let mut seen = vec![0_u8; held.bytes as usize];
            self.world.machine.read(0, held.ptr, &mut seen).unwrap();
            for (offset, piece) in self.pieces(held) {
                assert!(&seen[offset as usize..][..piece.len()] == piece, "bytes of {:?} are not its own", held.ptr);
            }
        }
        self.world.check();
        let rounded: u64 = self.held.iter().map(|held| held.bytes.next_multiple_of(512)).sum();
        assert_eq!(self.world.allocated(), rounded);
    }

    fn free(&mut self, which: impl Fn(usize) -> bool) {
        let mut index = 0;
        self.held.retain(|held| {
            index += 1;
            let goes = which(index - 1);
            if goes {
                self.world.allocator.free(held.ptr, None).unwrap();
            }
            !goes
        });
    }

    fn free_all(&mut self) {
        self.free(|_| true);
    }
}

fn machine(profile: Profile) -> Config {
    Config::new(profile).device_memory(DEVICE).host_memory(512 * MIB)
}

/// Each way to place what is more than the device has.
const PLACEMENTS: &[&str] = &[
    "uvm_access_pattern:gpu_first",
    "uvm_access_pattern:gpu_first,uvm_device_limit_mb:40",
    "uvm_access_pattern:gpu_first,uvm_prefetch:False",
    "uvm_access_pattern:cpu_first",
    "uvm_access_pattern:balanced",
];

/// What the driver moves to the host although the books have it on the device: where it may fill the device, all that
/// others have there (here the world's own).
fn others(placement: &str) -> u64 {
    if placement.contains("balanced") { 4 * MIB } else { 0 }
}

fn holds_more_than_the_device(config: &Config) {
    let reserve = RESERVE / MIB;
    for placement in PLACEMENTS {
        for times in [1.5, 3.0, 5.0] {
            let conf = format!("{placement},uvm_oversubscription_ratio:{times},uvm_host_reserve_mb:{reserve}");
            let world = World::over(&Machine::new(config.clone()), &conf);
            let mut program = Filler::new(&world);
            let cap = (times * DEVICE as f64) as u64;
            // All of it, to the last byte of the cap; where nothing can be discarded, what is left over on the device
            // is not the host's.
            let shrinks = config.profile.discard && !placement.contains("prefetch:False");
            let most = if shrinks { cap } else { cap - 8 * MIB };
            while program.bytes() < most {
                program.hold(8 * MIB, 0).unwrap_or_else(|error| panic!("{conf}: {error}"));
            }
            program.verify();
            let error = program.hold_all(8 * MIB, 0);
            assert_eq!((error.limit, error.capacity), (Limit::Ratio, cap), "{conf}");
            assert!((most..=cap).contains(&program.bytes()), "{conf}");
            assert!(
                error.reserved <= cap && error.to_string().contains("uvm_oversubscription_ratio"),
                "{conf}: {error}"
            );

            let counters = world.machine.counters();
            if !placement.contains("balanced") && !placement.contains("prefetch:False") {
                let moved = (counters.device_faults, counters.evictions);
                assert_eq!(moved, (0, 0), "{conf}: memory lies where it was placed, and nothing thrashes");
            }

            // Half of it goes, and other sizes come.
            program.free(|index| index % 2 == 0);
            program.verify();
            for bytes in [3 * MIB, 8 * MIB, 5 * MIB + 1, 7 * MIB - 77] {
                program.hold(bytes, 0).unwrap_or_else(|error| panic!("{conf}: {error}"));
            }
            program.verify();
            assert_eq!(world.machine.counters().host_overcommitted, 0, "{conf}");
            program.free_all();
            world.finish();
        }
    }
}

#[test]
fn an_h100_holds_up_to_five_times_its_memory() {
    holds_more_than_the_device(&machine(Profile::h100()));
}

#[test]
fn a_gh200_holds_up_to_five_times_its_memory() {
    holds_more_than_the_device(&machine(Profile::gh200()));
}

#[test]
fn a_driver_that_cannot_discard_holds_up_to_five_times_the_devices_memory() {
    holds_more_than_the_device(&machine(Profile::gh200_egm()).discard(false));
}

#[test]
fn where_there_is_one_memory_all_of_it_is_held_and_no_more() {
    let config = Config::new(Profile::gb10()).device_memory(256 * MIB);
    for placement in PLACEMENTS {
        let world = World::over(&Machine::new(config.clone()), &format!("{placement},uvm_host_reserve_mb:32"));
        let mut program = Filler::new(&world);
        let before = world.allocator.memory_info(0).unwrap().capacity;
        let error = program.hold_all(8 * MIB, 0);
        assert_eq!((error.limit, error.capacity), (Limit::HostMemory, before), "{placement}");
        assert!(before - program.bytes() < 8 * MIB, "{placement}: {} of {before}", program.bytes());
        program.verify();
        assert_eq!(world.machine.counters().host_overcommitted, 0);
        program.free_all();
        world.finish();
    }
}

#[test]
fn device_and_host_memory_together_are_a_hard_cap() {
    for placement in PLACEMENTS {
        let config = Config::new(Profile::h100()).device_memory(DEVICE).host_memory(256 * MIB);
        let world = World::over(
            &Machine::new(config),
            &format!("{placement},uvm_oversubscription_ratio:100,uvm_host_reserve_mb:32"),
        );
        let mut program = Filler::new(&world);
        let error = program.hold_all(8 * MIB, 0);
        assert_eq!(error.limit, Limit::HostMemory, "{placement}");
        let all = DEVICE + 256 * MIB - RESERVE;
        assert!((all - others(placement)..=all).contains(&error.capacity), "{placement}: {error:?}");
        assert_eq!(error.host_reserve, RESERVE);
        // Of the device's memory the limit may be used, and by cpu_first nothing.
        let on_device =
            [("cpu_first", 0), ("limit_mb:40", 40 * MIB)].into_iter().find(|&(key, _)| placement.contains(key));
        let most = 256 * MIB - RESERVE + on_device.map_or(DEVICE, |(_, bytes)| bytes);
        assert!((most - 16 * MIB..=most).contains(&program.bytes()), "{placement}: {} of {most}", program.bytes());
        let text = error.to_string();
        assert!(text.contains("32.00 MiB is kept free (uvm_host_reserve_mb)"), "{text}");
        program.verify();
        let counters = world.machine.counters();
        assert_eq!(counters.host_overcommitted, 0, "{placement}");

        // Caches go before the error: what one stream has freed, another gets. Host memory goes by whole segments.
        let retries = world.allocator.device_stats(0).unwrap().num_alloc_retries;
        let shrinks = placement == &"uvm_access_pattern:gpu_first";
        program.free(|index| index >= 4 || !shrinks);
        let error = program.hold_all(8 * MIB, 1);
        assert_eq!(error.limit, Limit::HostMemory, "{placement}");
        assert!(world.allocator.device_stats(0).unwrap().num_alloc_retries > retries);
        assert!(error.reserved - error.allocated < 24 * MIB, "{placement}: caches were kept: {error:?}");
        program.verify();
        program.free_all();
        world.finish();
    }
}

#[test]
fn host_memory_that_shrinks_ends_growth_and_nothing_else() {
    for placement in PLACEMENTS {
        let config = Config::new(Profile::gh200()).device_memory(DEVICE).host_memory(512 * MIB);
        let world = World::over(&Machine::new(config), &format!("{placement},uvm_host_reserve_mb:32"));
        let mut program = Filler::new(&world);
        while program.bytes() < 3 * DEVICE {
            program.hold(8 * MIB, 0).unwrap();
        }
        program.verify();
        for left in [100 * MIB, RESERVE, MIB, 0] {
            // What we hold is ours; of the rest, others take all but so much.
            world.machine.set_others_host_memory(0);
            let available = world.machine.host_memory_now().available;
            world.machine.set_others_host_memory(available - left);
            let held = program.bytes();
            let error = program.hold_all(8 * MIB, 0);
            assert_eq!(error.limit, Limit::HostMemory, "{placement}, {left} left: {error}");
            assert_eq!(error.host_reserve, RESERVE);
            assert!(error.to_string().contains("uvm_host_reserve_mb"), "{error}");
            // The device's headroom is no host memory.
            let grown = program.bytes() - held;
            assert!(grown <= left.saturating_sub(RESERVE) + DEVICE, "{placement}, {left} left: grew by {grown}");
            world.machine.device_synchronize(0).unwrap();
            let available = world.machine.host_memory_now().available;
            let kept = left.min(RESERVE).saturating_sub(others(placement));
            assert!(available >= kept, "{placement}, {left} left: {available} of the reserve {error:?}");
            let info = world.allocator.memory_info(0).unwrap();
            assert!(info.capacity >= info.populated.total(), "{placement}: {info:?}");
            // cpu_first leaves the device's memory free.
            let unused = if placement.contains("cpu_first") { DEVICE } else { DEVICE - info.device_limit };
            assert!(info.free < unused + 8 * MIB, "{placement}: {info:?}");
            program.verify();
            // What is held already can be freed and used again all the same.
            program.free(|index| index == 3);
            program.hold(8 * MIB, 0).unwrap_or_else(|error| panic!("{placement}, {left} left: {error}"));
            program.verify();
            assert_eq!(world.machine.counters().host_overcommitted, 0, "{placement}, {left} left");
        }
        world.machine.set_others_host_memory(0);
        for _ in 0..4 {
            program.hold(8 * MIB, 1).unwrap_or_else(|error| panic!("{placement}, all of it is back: {error}"));
        }
        program.verify();
        program.free_all();
        world.finish();
    }
}

/// Two processes on one machine.
fn two(conf: [&str; 2]) -> (Machine, World, World) {
    let machine = Machine::new(Config::new(Profile::gh200()).device_memory(DEVICE).host_memory(256 * MIB));
    let [first, second] = conf.map(|conf| World::over(&machine, &format!("{conf},uvm_host_reserve_mb:32")));
    (machine, first, second)
}

#[test]
fn two_processes_share_a_device_of_plain_memory() {
    let plain = "uvm_access_pattern:device";
    let (_, first, second) = two([plain, plain]);
    let (mut one, mut other) = (Filler::new(&first), Filler::new(&second));
    let error = one.hold_all(12 * MIB, 0);
    assert_eq!(error.limit, Limit::Ratio, "no process has more than the device: {error}");
    let error = out_of_memory(second.empty(12 * MIB, 0));
    assert_eq!((error.limit, error.reserved), (Limit::Device, 0));
    assert!(error.device_free < 12 * MIB && error.to_string().contains("CUDA has no memory left"), "{error}");
    second.check();
    let told = second.allocator.memory_info(0).unwrap();
    assert!(told.device.free < 12 * MIB, "{told:?}");
    one.verify();

    // What the first only caches, the second does not get; what it gives back, it does.
    one.free(|index| index % 2 == 0);
    assert_eq!(out_of_memory(second.empty(12 * MIB, 0)).limit, Limit::Device);
    first.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
    other.hold(12 * MIB, 0).unwrap();
    other.verify();
    one.verify();
    one.free_all();
    other.free_all();
    drop((one, other));
    second.leave();
    first.finish();
}

#[test]
fn two_processes_meet_the_hosts_end() {
    for placement in ["uvm_access_pattern:cpu_first", "uvm_device_limit_mb:20"] {
        let (machine, first, second) = two([placement, placement]);
        let (mut one, mut other) = (Filler::new(&first), Filler::new(&second));
        let error = one.hold_all(8 * MIB, 0);
        assert_eq!(error.limit, Limit::HostMemory, "{placement}: {error}");
        one.verify();
        // The second has its part of the device, and no host memory.
        let error = other.hold_all(8 * MIB, 0);
        assert_eq!(error.limit, Limit::HostMemory, "{placement}: {error}");
        assert!(other.bytes() <= 20 * MIB, "{placement}: {}", other.bytes());
        assert!(error.host_available < RESERVE + 8 * MIB, "{placement}: {error:?}");
        let available = error.to_string();
        assert!(available.contains("is available and 32.00 MiB is kept free"), "{available}");
        other.verify();

        // Segments in host memory go when nothing of them is in use.
        one.free_all();
        first.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
        one.hold(8 * MIB, 0).unwrap();
        one.verify();
        let before = other.bytes();
        let error = other.hold_all(8 * MIB, 0);
        assert_eq!(error.limit, Limit::HostMemory, "{placement}: {error}");
        assert!(other.bytes() > before + 64 * MIB, "{placement}: {} of {before} before", other.bytes());
        // Now the first is at the end, too.
        assert_eq!(out_of_memory(first.empty(24 * MIB, 1)).limit, Limit::HostMemory, "{placement}");
        one.verify();
        other.verify();
        assert_eq!(machine.counters().host_overcommitted, 0, "{placement}");
        assert!(machine.host_memory_now().available >= RESERVE, "{placement}: the reserve was taken");
        one.free_all();
        other.free_all();
        drop((one, other));
        second.leave();
        first.finish();
    }
}

#[test]
fn two_processes_may_both_want_the_device() {
    let (_, first, second) = two(["", ""]);
    let (mut one, mut other) = (Filler::new(&first), Filler::new(&second));
    let error = one.hold_all(8 * MIB, 0);
    assert_eq!(error.limit, Limit::HostMemory, "{error}");
    // The device is full of the first's memory, the host too: there is nowhere to move that to.
    let error = other.hold_all(8 * MIB, 0);
    assert!(matches!(error.limit, Limit::HostMemory | Limit::Device), "{error}");
    one.verify();
    other.verify();
    one.free_all();
    first.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
    other.hold(8 * MIB, 0).unwrap();
    other.verify();
    other.free_all();
    drop((one, other));
    second.leave();
    first.finish();
}
