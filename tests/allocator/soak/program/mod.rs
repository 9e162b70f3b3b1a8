//! A random program: what it does next comes from its seed, what it holds is checked as it goes.

mod calls;
mod checks;
mod counts;
mod graphs;
mod hints;
mod memory;
mod ops;
mod pools;
mod random;
mod settings;
mod tensor;

use crate::world::{MIB, World};
use counts::Counts;
use graphs::Graph;
use ops::{Op, WEIGHTS};
use parking_lot::Mutex;
use pools::Pool;
use random::Random;
use settings::recording;
use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use tensor::{Copied, GRAPH_SLOTS, SLOT, SLOTS, Tensor};
use torch_uvm::driver::{DeviceIndex, Stream};
use torch_uvm::ids::DEFAULT_POOL;
use torch_uvm::options::Options;

/// What a program's world is like.
#[derive(Default)]
pub struct Traits {
    /// Others take host memory and give it back.
    pub host_shrinks: bool,
    /// One of several programs that use the same allocator at the same time, and where they hand tensors to each other.
    pub shared: Option<(u64, Exchange)>,
}

/// Tensors on their way from one thread to another.
#[derive(Clone, Default)]
pub struct Exchange(Arc<Mutex<Vec<Tensor>>>);

impl Exchange {
    pub fn is_empty(&self) -> bool {
        self.0.lock().is_empty()
    }
}

/// Says where the program was when a test failed.
struct Position {
    name: &'static str,
    seed: u64,
    operation: u64,
    op: Op,
}

impl Drop for Position {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "soak::{0}: seed {1}, operation {2}, {3:?}. The same again: \
                 TORCH_UVM_SOAK={1}:{2} cargo test --test allocator soak::{0}",
                self.name, self.seed, self.operation, self.op
            );
        }
    }
}

pub struct Program {
    world: Arc<World>,
    random: Random,
    traits: Traits,
    position: Position,
    counts: Counts,
    devices: DeviceIndex,
    /// By device. The first is the legacy default stream where the program is alone.
    streams: Vec<Vec<Stream>>,
    live: Vec<Tensor>,
    /// Freed by a free-memory callback.
    hoard: Arc<Mutex<Vec<Tensor>>>,
    /// Freed lately.
    freed: Vec<Tensor>,
    pools: Vec<Pool>,
    next_pool: u64,
    graphs: Vec<Graph>,
    next_serial: u64,
    /// Pinned memory that late copies go to; then that of graphs.
    sink: u64,
    copied: Vec<Copied>,
    graph_slots: BTreeSet<u64>,
    next_tag: u32,
    /// How many bytes the program would like to hold, by device.
    wanted: Vec<u64>,
    original: Options,
}

impl Program {
    pub fn new(world: Arc<World>, name: &'static str, seed: u64, traits: Traits) -> Self {
        let machine = &world.machine;
        let devices = machine.device_count().unwrap();
        let created = |device| (0..3).map(move |_| machine.stream_create(device, true, 0).unwrap());
        let legacy = traits.shared.is_none().then_some(Stream(0));
        let streams = (0..devices).map(|device| legacy.into_iter().chain(created(device)).collect()).collect();
        let sink = machine.host_alloc(0, (SLOTS + GRAPH_SLOTS) * SLOT).unwrap();
        let hoard: Arc<Mutex<Vec<Tensor>>> = Arc::default();
        if traits.shared.is_none() {
            let (allocator, hoard) = (Arc::downgrade(&world.allocator), Arc::clone(&hoard));
            *world.hooks.callback.lock() = Some(Box::new(move || give_up(&allocator, &hoard)));
        }
        Self {
            random: Random::new(seed),
            position: Position { name, seed, operation: 0, op: Op::Look },
            counts: Counts::default(),
            devices,
            streams,
            live: Vec::new(),
            hoard,
            freed: Vec::new(),
            pools: Vec::new(),
            next_pool: 1 + traits.shared.as_ref().map_or(0, |(thread, _)| thread << 32),
            graphs: Vec::new(),
            next_serial: 1,
            sink,
            copied: Vec::new(),
            graph_slots: (SLOTS..SLOTS + GRAPH_SLOTS).collect(),
            next_tag: 0,
            wanted: vec![64 * MIB; devices as usize],
            original: world.allocator.options(),
            traits,
            world,
        }
    }

    fn alone(&self) -> bool {
        self.traits.shared.is_none()
    }

    /// Does the next thing, whatever it is.
    pub fn step(&mut self) {
        let total: u32 = WEIGHTS.iter().map(|&(weight, _)| weight).sum();
        let mut at = self.random.below(u64::from(total)) as u32;
        let &(_, op) = WEIGHTS
            .iter()
            .find(|&&(weight, _)| {
                let here = at < weight;
                at = at.wrapping_sub(weight);
                here
            })
            .expect("the weights add up");
        self.counts.operations += 1;
        self.position.operation += 1;
        self.position.op = op;
        if (self.alone() || op.shared()) && self.act(op).is_some() {
            *self.counts.done.entry(op).or_default() += 1;
        }
        let operation = self.counts.operations;
        if operation.is_multiple_of(512) {
            self.barrier();
        }
        if operation.is_multiple_of(128) {
            self.check();
        }
        if operation.is_multiple_of(1000) {
            // From next to nothing to far more than there is.
            for device in 0..self.devices as usize {
                let doublings = if self.random.one_in(4) { 9 } else { self.random.below(8) };
                self.wanted[device] = MIB << doublings;
            }
        }
    }

    /// `None` where there was nothing to do it with, or it failed as it may.
    fn act(&mut self, op: Op) -> Option<()> {
        match op {
            Op::Allocate => self.allocate(),
            Op::Free => self.free_one(),
            Op::UseElsewhere => self.use_elsewhere(),
            Op::Rewrite => self.rewrite(),
            Op::Verify => {
                let index = self.pick(|tensor| tensor.written)?;
                self.verify(&self.live[index].clone());
                Some(())
            }
            Op::Synchronize => {
                let device = self.device();
                let stream = *self.random.of(&self.streams[device as usize]);
                self.world.machine.stream_synchronize(device, stream).unwrap();
                Some(())
            }
            Op::EmptyCache => self.empty_cache(),
            Op::Prefetch => self.prefetch(),
            Op::Advise => self.advise(),
            Op::Discard => self.discard(),
            Op::OpenPool => self.open_pool(),
            Op::ClosePool => self.close_pool(),
            Op::ReleasePool => self.release_pool(),
            Op::SetPool => self.set_pool(),
            Op::Capture => self.capture(),
            Op::Replay => self.replay(),
            Op::DropGraph => self.drop_graph(),
            Op::Checkpoint => self.checkpoint(),
            Op::Restore => self.restore(),
            Op::Options => self.change_options(),
            Op::NativeOptions => self.change_native_options(),
            Op::Fraction => {
                let fraction = if !self.random.one_in(4) { 1.0 } else { self.random.between(20, 100) as f64 / 100.0 };
                let device = self.device();
                self.world.allocator.set_memory_fraction(device, fraction).unwrap();
                Some(())
            }
            Op::TooMuch => self.ask_too_much(),
            Op::Look => self.look(),
            Op::History => self.history(),
            Op::FreeTwice => self.free_twice(),
            Op::Burst => self.burst(),
            Op::AllocateAt => self.allocate_at(),
            Op::Hoard => {
                let index = self.pick(|tensor| tensor.pool.is_none())?;
                let tensor = self.live.swap_remove(index);
                self.hoard.lock().push(tensor);
                Some(())
            }
            Op::Give => {
                let (_, exchange) = self.traits.shared.clone()?;
                let index = self.pick(|tensor| !tensor.elsewhere)?;
                let tensor = self.live.swap_remove(index);
                exchange.0.lock().push(tensor);
                Some(())
            }
            Op::Take => {
                let (_, exchange) = self.traits.shared.clone()?;
                let tensor = exchange.0.lock().pop()?;
                self.live.push(tensor);
                Some(())
            }
            Op::Others => self.others(),
        }
    }

    fn device(&mut self) -> DeviceIndex {
        // Most of it on one device.
        if self.random.one_in(4) { self.random.below(self.devices as u64) as DeviceIndex } else { 0 }
    }

    fn stream(&mut self, device: DeviceIndex) -> Stream {
        *self.random.of(&self.streams[device as usize])
    }

    /// One of the live tensors that will do.
    fn pick(&mut self, fits: impl Fn(&Tensor) -> bool) -> Option<usize> {
        if self.live.is_empty() {
            return None;
        }
        let start = self.random.below(self.live.len() as u64) as usize;
        (start..self.live.len()).chain(0..start).find(|&index| fits(&self.live[index]))
    }

    fn size(&mut self) -> u64 {
        let random = &mut self.random;
        let bytes = match random.below(100) {
            0..60 => random.between(1, 16 << 10),
            60..84 => random.between(16 << 10, MIB + 1),
            84..96 => random.between(MIB, 10 * MIB),
            96..99 => random.between(10 * MIB, 24 * MIB),
            _ => random.between(24 * MIB, 80 * MIB),
        };
        if random.one_in(3) { bytes.next_power_of_two() } else { bytes }
    }

    /// Gives everything back, and looks at every byte of it first.
    pub fn finish(mut self) -> Counts {
        self.position.op = Op::Free;
        self.world.machine.set_others_host_memory(0);
        while self.close_pool().is_some() {}
        if let Some((_, exchange)) = self.traits.shared.clone() {
            self.live.append(&mut exchange.0.lock());
        }
        self.barrier();
        for tensor in std::mem::take(&mut self.live) {
            if tensor.written {
                self.verify(&tensor);
            }
            self.world.allocator.free(tensor.ptr, None).unwrap();
        }
        if self.alone() {
            self.world.hooks.callback.lock().take();
            give_up(&Arc::downgrade(&self.world.allocator), &self.hoard);
            self.world.allocator.set_history(recording(false));
            self.world.allocator.set_tracing(false);
            self.world.allocator.set_options(self.original.clone()).unwrap();
        }
        while self.release_pool().is_some() {}
        assert!(self.graphs.is_empty() && self.pools.is_empty());
        self.barrier();
        self.world.machine.host_free(0, self.sink).unwrap();
        if self.alone() {
            self.world.allocator.empty_cache(DEFAULT_POOL, None).unwrap();
            for device in 0..self.devices {
                let stats = self.world.allocator.device_stats(device).unwrap();
                let now = [stats.allocated_bytes, stats.active_bytes, stats.requested_bytes, stats.reserved_bytes];
                assert_eq!(now.map(|stat| stat.aggregate.current), [0; 4], "device {device}");
                let places = self.world.allocator.place_stats(device).unwrap();
                self.counts.moves_out += places.moves_out;
                self.counts.reclamations += places.light_reclamations + places.hard_reclamations;
            }
            self.world.machine.check_books().unwrap();
        }
        std::mem::take(&mut self.counts)
    }
}

/// Frees what is hoarded; whether there was any.
fn give_up(allocator: &Weak<torch_uvm::allocator::Allocator>, hoard: &Mutex<Vec<Tensor>>) -> bool {
    let Some(allocator) = allocator.upgrade() else { return false };
    let hoarded = std::mem::take(&mut *hoard.lock());
    for tensor in &hoarded {
        allocator.free(tensor.ptr, None).expect("free of a hoarded tensor");
    }
    !hoarded.is_empty()
}
