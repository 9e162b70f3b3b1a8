//! A random program: what it does next comes from its seed, what it holds is checked as it goes.

use crate::world::{MIB, World};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Weak};
use torch_uvm::allocator::{CustomAllocator, PoolState};
use torch_uvm::driver::{Advice, CaptureMode, DeviceIndex, DevicePtr, DriverError, Location, Stream};
use torch_uvm::error::{Error, Limit, OutOfMemory, Result};
use torch_uvm::history::{Actions, RecordContext, Recording};
use torch_uvm::options::{AccessPattern, NativeOptions, Options};
use torch_uvm::pools::{DEFAULT_POOL, MempoolId};
use torch_uvm_sim::{Code, CopyKind, EntryPoint, Fault, GraphExecId, Which};

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

/// What a program may do next, and how often it does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Op {
    Allocate,
    Free,
    UseElsewhere,
    Rewrite,
    Verify,
    Synchronize,
    EmptyCache,
    Prefetch,
    Advise,
    Discard,
    OpenPool,
    ClosePool,
    ReleasePool,
    SetPool,
    Capture,
    Replay,
    DropGraph,
    Checkpoint,
    Restore,
    Options,
    NativeOptions,
    Fraction,
    TooMuch,
    Look,
    History,
    FreeTwice,
    Burst,
    AllocateAt,
    Hoard,
    Give,
    Take,
    Others,
}

const WEIGHTS: &[(u32, Op)] = &[
    (300, Op::Allocate),
    (290, Op::Free),
    (60, Op::UseElsewhere),
    (25, Op::Rewrite),
    (30, Op::Verify),
    (12, Op::Synchronize),
    (4, Op::EmptyCache),
    (30, Op::Prefetch),
    (10, Op::Advise),
    (10, Op::Discard),
    (6, Op::OpenPool),
    (12, Op::ClosePool),
    (4, Op::ReleasePool),
    (4, Op::SetPool),
    (3, Op::Capture),
    (6, Op::Replay),
    (2, Op::DropGraph),
    (3, Op::Checkpoint),
    (2, Op::Restore),
    (2, Op::Options),
    (2, Op::NativeOptions),
    (2, Op::Fraction),
    (3, Op::TooMuch),
    (10, Op::Look),
    (1, Op::History),
    (4, Op::FreeTwice),
    (8, Op::Burst),
    (6, Op::AllocateAt),
    (4, Op::Hoard),
    (8, Op::Give),
    (8, Op::Take),
    (1, Op::Others),
];

impl Op {
    /// Whether a program that is not alone does it: what stops all streams, or concerns the whole machine, it does not.
    fn shared(self) -> bool {
        !matches!(
            self,
            Op::Capture
                | Op::Replay
                | Op::DropGraph
                | Op::Checkpoint
                | Op::Restore
                | Op::FreeTwice
                | Op::AllocateAt
                | Op::Hoard
                | Op::Fraction
                | Op::Others
        )
    }
}

/// How often what came to pass.
#[derive(Default)]
pub struct Counts {
    operations: u64,
    done: BTreeMap<Op, u64>,
    out_of_memory: u64,
    faults: u64,
    /// How often the allocator moved live memory out, and gave cached memory back for want of room.
    moves_out: u64,
    reclamations: u64,
}

impl Counts {
    /// What a program that was alone should have done, and never did.
    pub fn missing(&self) -> Vec<String> {
        let expected = WEIGHTS.iter().map(|&(_, op)| op).filter(|op| !matches!(op, Op::Give | Op::Take));
        let mut missing: Vec<String> =
            expected.filter(|op| !self.done.contains_key(op)).map(|op| format!("{op:?}")).collect();
        for (what, count) in [
            ("OutOfMemory", self.out_of_memory),
            ("Fault", self.faults),
            ("Reclamation", self.reclamations),
            ("MoveOut", self.moves_out),
        ] {
            if count == 0 {
                missing.push(what.into());
            }
        }
        missing
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} operations, out of memory {} times, {} planted faults struck, {} reclamations, {} moves out;",
            self.operations, self.out_of_memory, self.faults, self.reclamations, self.moves_out
        )?;
        self.done.iter().try_for_each(|(op, count)| write!(f, " {op:?} {count}"))
    }
}

/// splitmix64.
struct Random(u64);

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// Below `bound`, which is not 0.
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low)
    }

    fn of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len() as u64) as usize]
    }
}

/// An allocation of the program. Its bytes are the words of its tag, all of them or those of a few chunks.
#[derive(Clone, Copy, Debug)]
pub struct Tensor {
    ptr: DevicePtr,
    bytes: u64,
    device: DeviceIndex,
    stream: Stream,
    tag: u32,
    /// All bytes were written, not only a few chunks.
    full: bool,
    /// The bytes are those of the tag once the stream's work is done.
    written: bool,
    /// Another stream may still be using it.
    elsewhere: bool,
    /// The private pool it was asked from.
    pool: Option<MempoolId>,
    /// The capture that made it: its bytes are written when that graph runs.
    graph: Option<u64>,
    /// It lives long: what the allocator may move out.
    keeps: bool,
}

const CHUNK: u64 = 512;

impl Tensor {
    /// The parts that are written and looked at, as offset and length.
    fn chunks(&self) -> impl Iterator<Item = (u64, u64)> + use<> {
        let Tensor { bytes, tag, full, .. } = *self;
        let count = if full || bytes <= 2 * CHUNK { 1 } else { 6 };
        (0..count).map(move |index| match (count, index) {
            (1, _) => (0, bytes),
            (_, 0) => (0, CHUNK),
            (_, 1) => ((bytes - CHUNK) & !3, CHUNK),
            _ => ((mix(u64::from(tag) << 8 | index) % (bytes - CHUNK)) & !3, CHUNK),
        })
    }

    /// A part to be looked at later, at most `SLOT` bytes of it, as offset and length.
    fn sample(&self, random: &mut Random) -> (u64, u64) {
        let chunks: Vec<_> = self.chunks().collect();
        let &(offset, length) = random.of(&chunks);
        let bytes = length.min(SLOT);
        (offset + (random.below(length - bytes + 1) & !3), bytes)
    }

    /// The byte at an offset.
    fn byte(&self, offset: u64) -> u8 {
        // The last bytes of a size that is not a multiple of 4 are no word.
        let word = if offset < self.bytes & !3 { offset % 4 } else { 0 };
        self.tag.to_le_bytes()[word as usize]
    }

    fn check(&self, offset: u64, seen: &[u8], what: &str) {
        let word = self.tag.to_le_bytes();
        if offset.is_multiple_of(4) && seen.len().is_multiple_of(4) && seen.chunks_exact(4).all(|four| four == word) {
            return;
        }
        let wrong = (offset..).zip(seen).find(|&(at, &byte)| byte != self.byte(at));
        if let Some((at, byte)) = wrong {
            panic!("byte {at} of {self:x?} is {byte:#x} {what}");
        }
    }

    fn end(&self) -> u64 {
        self.ptr.0 + self.bytes
    }
}

/// What a late copy takes, in bytes.
const SLOT: u64 = 256;
/// How many late copies there may be between two looks at them.
const SLOTS: u64 = 2048;
/// Slots that graphs copy to.
const GRAPH_SLOTS: u64 = 512;

/// A bytes that were copied to a slot, and whose they must be.
struct Copied {
    slot: u64,
    tensor: Tensor,
    offset: u64,
    bytes: u64,
}

struct Graph {
    serial: u64,
    device: DeviceIndex,
    stream: Stream,
    exec: GraphExecId,
    pool: MempoolId,
    copied: Vec<Copied>,
    /// It has run since somebody looked.
    launched: bool,
    /// Its pool has been used for something else since: running it would destroy that.
    dead: bool,
}

#[derive(Default)]
struct Pool {
    id: MempoolId,
    device: DeviceIndex,
    /// How often the program holds it.
    holds: i32,
    open: bool,
    /// Of CUDA graphs, not a MemPool.
    of_graphs: bool,
    checkpoint: Option<Checkpoint>,
}

struct Checkpoint {
    state: Arc<PoolState>,
    tensors: Vec<Tensor>,
    /// The graph that could be run then.
    graph: Option<u64>,
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

/// Calls that only the allocator makes: where programs run side by side, nobody else meets their faults.
const ALLOCATORS_OWN: &[EntryPoint] = &[
    EntryPoint::AllocManaged,
    EntryPoint::AllocDevice,
    EntryPoint::Free,
    EntryPoint::Advise,
    EntryPoint::Prefetch,
    EntryPoint::Discard,
    EntryPoint::HostMemory,
    EntryPoint::DeviceMemory,
];

/// Everything that the allocator calls.
const CALLED: &[EntryPoint] = &[
    EntryPoint::AllocManaged,
    EntryPoint::AllocDevice,
    EntryPoint::Free,
    EntryPoint::Advise,
    EntryPoint::Prefetch,
    EntryPoint::Discard,
    EntryPoint::HostMemory,
    EntryPoint::DeviceMemory,
    EntryPoint::StreamCreate,
    EntryPoint::StreamSynchronize,
    EntryPoint::StreamIsCapturing,
    EntryPoint::EventCreate,
    EntryPoint::EventRecord,
    EntryPoint::EventQuery,
    EntryPoint::EventSynchronize,
    EntryPoint::EventDestroy,
    EntryPoint::StreamWaitEvent,
    EntryPoint::ExchangeCaptureMode,
];

const CODES: &[Code] = &[Code::OUT_OF_MEMORY, Code::NOT_SUPPORTED, Code::INVALID_CONTEXT, Code::UNKNOWN];

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

/// Whether an error is that of a planted fault.
fn planted(error: &DriverError) -> bool {
    error.to_string().contains("(planted)")
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
            random: Random(seed),
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

    /// Runs a call of the allocator, now and then with a fault in one of the driver calls that it makes.
    fn call<T>(&mut self, call: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if !self.random.one_in(24) {
            return call(self);
        }
        let (own, calls) = if self.alone() { (false, CALLED) } else { (true, ALLOCATORS_OWN) };
        let which = Which::Nth(if self.random.one_in(2) { 1 } else { self.random.between(1, 8) });
        let target = (own || !self.random.one_in(4)).then(|| *self.random.of(calls));
        let code = *self.random.of(CODES);
        let machine = self.world.machine.clone();
        let before = machine.faults_hit();
        machine.inject(Fault { call: target, which, code });
        let result = call(self);
        machine.clear_faults();
        if self.alone() {
            let hits = machine.faults_hit() - before;
            self.counts.faults += hits;
            // Where the call back to the thread's mode failed, there is nothing that the allocator could have done.
            machine.exchange_capture_mode(CaptureMode::Global).unwrap();
            self.world.check();
        } else if let Err(Error::Driver(error)) = &result {
            self.counts.faults += u64::from(planted(error));
        }
        result
    }

    /// What may come of a call: the error is one that was planted, or one of these.
    fn expect<T>(&mut self, result: Result<T>, allowed: &[&str]) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(Error::Driver(error)) if planted(&error) => None,
            Err(Error::OutOfMemory(error)) => {
                self.out_of_memory(&error);
                None
            }
            Err(error) => {
                let text = error.to_string();
                assert!(allowed.iter().any(|allowed| text.contains(allowed)), "unexpected: {error:?}");
                None
            }
        }
    }

    /// An error of this kind is told with figures that bear it out.
    fn out_of_memory(&mut self, error: &OutOfMemory) {
        self.counts.out_of_memory += 1;
        // Others go on meanwhile.
        if !self.alone() {
            return;
        }
        let wanted = error.reserved.saturating_add(error.requested);
        match error.limit {
            Limit::Ratio => assert!(wanted > error.capacity, "{error:?}"),
            Limit::Fraction => assert!(wanted > error.allowed.expect("a limit that is set"), "{error:?}"),
            Limit::HostMemory | Limit::Device => {}
        }
        assert!(error.allocated <= error.reserved, "{error:?}");
    }

    // ---- memory -------------------------------------------------------------------------------------------------

    /// The pool that a request on a stream is served from: that which was opened last.
    fn pool_of(&self, device: DeviceIndex) -> Option<MempoolId> {
        // All open pools take every stream of the program's.
        self.pools.iter().rev().find(|pool| pool.open && pool.device == device).map(|pool| pool.id)
    }

    fn allocate(&mut self) -> Option<()> {
        let device = self.device();
        let held: u64 = self.live.iter().filter(|tensor| tensor.device == device).map(|tensor| tensor.bytes).sum();
        if held > self.wanted[device as usize] || self.live.len() > 250 {
            return self.free_one();
        }
        let (bytes, stream) = (self.size(), self.stream(device));
        let tensor = self.new_tensor(device, bytes, stream)?;
        self.live.push(tensor);
        Some(())
    }

    fn new_tensor(&mut self, device: DeviceIndex, bytes: u64, stream: Stream) -> Option<Tensor> {
        let result = self.call(|program| program.world.allocator.allocate(device, bytes, stream, None));
        let ptr = self.expect(result, &[])?;
        let pool = self.pool_of(device);
        let mut tensor = self.tensor(ptr, bytes, device, stream, pool);
        self.fill(&mut tensor);
        Some(tensor)
    }

    fn tensor(
        &mut self,
        ptr: DevicePtr,
        bytes: u64,
        device: DeviceIndex,
        stream: Stream,
        pool: Option<MempoolId>,
    ) -> Tensor {
        assert!(ptr.0.is_multiple_of(512), "{ptr:?}");
        self.next_tag = self.next_tag.wrapping_add(1);
        let thread = self.traits.shared.as_ref().map_or(0, |&(thread, _)| thread as u32);
        Tensor {
            ptr,
            bytes,
            device,
            stream,
            // No byte of it is 0, and no two neighbours are alike.
            tag: 0x0101_0101 + (mix(u64::from(self.next_tag) << 8 | u64::from(thread)) as u32 & 0x7E7E_7E7E),
            full: bytes <= 64 << 10 || self.random.one_in(16),
            written: false,
            elsewhere: false,
            pool,
            graph: None,
            keeps: self.random.one_in(8),
        }
    }

    /// Writes a tensor's bytes on its stream.
    fn fill(&self, tensor: &mut Tensor) {
        let &mut Tensor { ptr, bytes, device, stream, tag, .. } = tensor;
        let machine = &self.world.machine;
        for (offset, length) in tensor.chunks() {
            let words = length / 4;
            if words > 0 {
                machine.memset_async(device, ptr.0 + offset, tag, 4, words, stream).expect("memset of words");
            }
            let rest = (offset + words * 4).max(bytes & !3)..offset + length;
            if !rest.is_empty() {
                let (at, count) = (ptr.0 + rest.start, rest.end - rest.start);
                machine.memset_async(device, at, tag & 0xFF, 1, count, stream).expect("memset of bytes");
            }
        }
        tensor.written = true;
    }

    fn free_one(&mut self) -> Option<()> {
        let all = self.random.one_in(64);
        let index = self.pick(|tensor| all || !tensor.keeps)?;
        let tensor = self.live.swap_remove(index);
        if tensor.written && self.random.one_in(2) {
            self.copy_late(&tensor, tensor.device, tensor.stream);
        }
        self.free(tensor);
        Some(())
    }

    fn free(&mut self, tensor: Tensor) {
        let result = self.call(|program| program.world.allocator.free(tensor.ptr, None));
        result.unwrap_or_else(|error| panic!("free of {tensor:?}: {error}"));
        if self.freed.len() == 16 {
            self.freed.remove(0);
        }
        self.freed.push(tensor);
    }

    /// Copies some of a tensor to a slot in the order of a stream: whoever gets the memory too early is seen there.
    fn copy_late(&mut self, tensor: &Tensor, device: DeviceIndex, stream: Stream) {
        if self.copied.len() as u64 == SLOTS {
            self.look_at_copies();
        }
        let slot = self.copied.len() as u64;
        let copied = self.copy_to(slot, tensor, device, stream);
        self.copied.push(copied);
    }

    fn copy_to(&mut self, slot: u64, tensor: &Tensor, device: DeviceIndex, stream: Stream) -> Copied {
        let (offset, bytes) = tensor.sample(&mut self.random);
        let (to, from) = (self.sink + slot * SLOT, tensor.ptr.0 + offset);
        self.world.machine.memcpy_async(device, to, from, bytes, CopyKind::Default, stream).expect("late copy");
        Copied { slot, tensor: *tensor, offset, bytes }
    }

    /// Makes a stream wait for what another has queued so far.
    fn order(&self, before: (DeviceIndex, Stream), after: (DeviceIndex, Stream)) {
        let machine = &self.world.machine;
        let event = machine.event_create(before.0, false).expect("event");
        machine.event_record(before.0, event, before.1).expect("record");
        machine.stream_wait_event(after.0, after.1, event).expect("wait");
        machine.event_destroy(before.0, event).expect("destroy");
    }

    fn use_elsewhere(&mut self) -> Option<()> {
        let index = self.pick(|tensor| tensor.written)?;
        let tensor = self.live[index];
        // Now and then on another device.
        let device = if self.random.one_in(8) { self.device() } else { tensor.device };
        let stream = self.stream(device);
        self.order((tensor.device, tensor.stream), (device, stream));
        self.copy_late(&tensor, device, stream);
        self.world.allocator.record_stream(tensor.ptr, device, stream).expect("record_stream");
        self.live[index].elsewhere = true;
        Some(())
    }

    fn rewrite(&mut self) -> Option<()> {
        let index = self.pick(|tensor| tensor.graph.is_none() && !tensor.elsewhere)?;
        let Tensor { ptr, bytes, device, stream, pool, .. } = self.live[index];
        let mut tensor = self.tensor(ptr, bytes, device, stream, pool);
        self.fill(&mut tensor);
        self.live[index] = tensor;
        Some(())
    }

    fn read(&self, at: u64, bytes: u64) -> Vec<u8> {
        let mut host = vec![0_u8; bytes as usize];
        self.world.machine.read(0, DevicePtr(at), &mut host).expect("read");
        host
    }

    /// Looks at a tensor's bytes, after its stream's work.
    fn verify(&self, tensor: &Tensor) {
        self.world.machine.stream_synchronize(tensor.device, tensor.stream).expect("synchronize");
        for (offset, length) in tensor.chunks() {
            tensor.check(offset, &self.read(tensor.ptr.0 + offset, length), "in memory");
        }
    }

    /// Waits for all work.
    fn barrier(&mut self) {
        self.look_at_copies();
        let launched = self.graphs.iter().filter(|graph| graph.launched);
        for copied in launched.flat_map(|graph| &graph.copied) {
            self.look_at(copied);
        }
        for graph in &mut self.graphs {
            graph.launched = false;
        }
    }

    fn look_at_copies(&mut self) {
        let mine = self.streams.iter().zip(0..).flat_map(|(streams, device)| streams.iter().map(move |&s| (device, s)));
        // And those of other programs, whose tensors this one has taken.
        let theirs = self.copied.iter().map(|copied| (copied.tensor.device, copied.tensor.stream));
        for (device, stream) in mine.chain(theirs).collect::<BTreeSet<_>>() {
            self.world.machine.stream_synchronize(device, stream).expect("synchronize");
        }
        for tensor in &mut self.live {
            tensor.elsewhere = false;
        }
        let seen = self.read(self.sink, (self.copied.len() as u64 * SLOT).max(1));
        for Copied { slot, tensor, offset, bytes } in std::mem::take(&mut self.copied) {
            let seen = &seen[(slot * SLOT) as usize..][..bytes as usize];
            tensor.check(offset, seen, "in a late copy: the memory was reused before it was made");
        }
    }

    fn look_at(&self, copied: &Copied) {
        let seen = self.read(self.sink + copied.slot * SLOT, copied.bytes);
        copied.tensor.check(copied.offset, &seen, "in a graph's copy");
    }

    /// Compares the books with the program's.
    fn check(&mut self) {
        self.world.check();
        if !self.alone() {
            return;
        }
        if self.random.one_in(16) {
            self.world.machine.check_books().unwrap();
        }
        let hoard = self.hoard.lock();
        let held = || self.live.iter().chain(hoard.iter());
        for device in 0..self.devices {
            let stats = self.world.allocator.device_stats(device).unwrap();
            let here = || held().filter(|tensor| tensor.device == device);
            assert_eq!(stats.allocation.aggregate.current, here().count() as i64, "device {device}");
            let requested: u64 = here().map(|tensor| tensor.bytes).sum();
            // Frees that wait are still active.
            assert!(stats.requested_bytes.aggregate.current as u64 >= requested, "device {device}");
        }
        let mut ranges: Vec<_> = held().map(|tensor| (tensor.ptr.0, tensor.end())).collect();
        ranges.sort_unstable();
        assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0), "live allocations overlap");
    }

    fn empty_cache(&mut self) -> Option<()> {
        let result = self.call(|program| program.world.allocator.empty_cache(DEFAULT_POOL, None));
        self.expect(result, &[])?;
        if self.alone() {
            self.nothing_is_cached();
        }
        Some(())
    }

    fn reserved(&self) -> i64 {
        let of = |device| self.world.allocator.device_stats(device).unwrap().reserved_bytes.aggregate.current;
        (0..self.devices).map(of).sum()
    }

    /// The default pool has no segment in which nothing is in use.
    fn nothing_is_cached(&self) {
        let snapshot = self.world.allocator.snapshot(DEFAULT_POOL, false).unwrap();
        for device in 0..self.devices {
            for place in self.world.allocator.segment_places(device).unwrap() {
                let within = place.base.0..place.base.0 + place.range_bytes;
                let active: u64 = snapshot
                    .segments
                    .iter()
                    .filter(|segment| within.contains(&segment.address))
                    .map(|segment| segment.active_bytes)
                    .sum();
                assert!(active > 0 || place.pool != DEFAULT_POOL, "{place:?} was kept");
            }
        }
    }

    fn ask_too_much(&mut self) -> Option<()> {
        let device = self.device();
        let stream = self.stream(device);
        let bytes = *self.random.of(&[2 << 30, 16 << 30, 1 << 60, u64::MAX]);
        let result = self.call(|program| program.world.allocator.allocate(device, bytes, stream, None));
        match &result {
            Ok(ptr) => panic!("{bytes} bytes at {ptr:?}"),
            Err(Error::OutOfMemory(_)) if bytes < 1 << 60 && self.alone() => {
                // Only one device was asked.
                if self.devices == 1 {
                    self.nothing_is_cached();
                }
            }
            Err(_) => {}
        }
        self.expect(result, &[]);
        Some(())
    }

    /// The same size again and again: what a thread's cache is for.
    fn burst(&mut self) -> Option<()> {
        let device = self.device();
        let stream = self.stream(device);
        // The large ones make time pass for what lives long.
        let large = self.random.one_in(3);
        let bytes = if large { self.random.between(2 * MIB, 8 * MIB) } else { self.size().min(2 * MIB) };
        for _ in 0..self.random.between(2, 24) {
            let mut tensor = self.new_tensor(device, bytes, stream)?;
            if self.random.one_in(8) {
                self.verify(&tensor);
            }
            if self.random.one_in(16) {
                tensor.elsewhere = false;
                self.live.push(tensor);
            } else {
                self.world.allocator.free(tensor.ptr, None).expect("free");
            }
        }
        Some(())
    }

    fn free_twice(&mut self) -> Option<()> {
        let gone = *self.freed.last()?;
        let at = gone.ptr.0;
        let taken = self.live.iter().chain(self.hoard.lock().iter()).any(|tensor| tensor.ptr.0 == at);
        if taken {
            return None;
        }
        assert_eq!(self.world.allocator.free(gone.ptr, None), Err(Error::InvalidPointer(gone.ptr)));
        assert!(self.world.allocator.record_stream(gone.ptr, 0, Stream(0)).is_err());
        Some(())
    }

    fn allocate_at(&mut self) -> Option<()> {
        if self.freed.is_empty() {
            return None;
        }
        let gone = *self.random.of(&self.freed);
        let bytes = if self.random.one_in(2) { gone.bytes } else { self.random.between(1, gone.bytes + 1) };
        let Tensor { device, stream, .. } = gone;
        let address = gone.ptr.0 + (self.random.below(3) * 512).min(gone.bytes - bytes) / 512 * 512;
        let result = self.call(|program| program.world.allocator.allocate_at(device, address, bytes, stream, None));
        let ptr = self.expect(result, &["are free at"])?;
        assert_eq!(ptr.0, address);
        let pool = self.pool_of(device);
        let mut tensor = self.tensor(ptr, bytes, device, stream, pool);
        self.fill(&mut tensor);
        self.live.push(tensor);
        Some(())
    }

    // ---- hints --------------------------------------------------------------------------------------------------

    fn prefetch(&mut self) -> Option<()> {
        let index = self.pick(|tensor| tensor.bytes >= MIB)?;
        let tensor = self.live[index];
        let start = self.random.below(tensor.bytes) * self.random.below(2);
        let bytes = 1 + self.random.below(tensor.bytes - start);
        let to = *self.random.of(&[Location::Host, Location::Device(tensor.device)]);
        let stream = self.stream(tensor.device);
        let at = tensor.ptr.offset(start);
        let result = self.call(|program| program.world.allocator.prefetch(at, bytes, to, stream));
        self.expect(result, &["do not fit into host memory", "hints are for"])
    }

    fn advise(&mut self) -> Option<()> {
        let index = self.pick(|_| true)?;
        let tensor = self.live[index];
        let gpu = Location::Device(tensor.device);
        let advice = *self.random.of(&[
            Advice::SetReadMostly,
            Advice::UnsetReadMostly,
            Advice::SetPreferredLocation(Location::Host),
            Advice::SetPreferredLocation(gpu),
            Advice::UnsetPreferredLocation,
            Advice::SetAccessedBy(gpu),
            Advice::UnsetAccessedBy(gpu),
        ]);
        let result = self.call(|program| program.world.allocator.advise(tensor.ptr, tensor.bytes, advice));
        self.expect(result, &["hints are for"])
    }

    fn discard(&mut self) -> Option<()> {
        let index = self.pick(|tensor| tensor.bytes >= 2 * MIB && tensor.graph.is_none() && !tensor.elsewhere)?;
        let mut tensor = self.live[index];
        let result = self.call(|program| program.world.allocator.discard(tensor.ptr, tensor.bytes, tensor.stream));
        if let Err(Error::Driver(_)) = &result {
            // What it holds may be lost, and writing to it may be slow now: until its memory is handed out again.
            self.live.swap_remove(index);
            self.free(tensor);
        }
        self.expect(result, &["no whole page", "hints are for", "cannot discard"])?;
        self.fill(&mut tensor);
        self.live[index] = tensor;
        Some(())
    }

    // ---- pools --------------------------------------------------------------------------------------------------

    fn filter(&self, device: DeviceIndex) -> Box<dyn Fn(Stream) -> bool + Send> {
        let mine = self.streams[device as usize].clone();
        Box::new(move |stream| mine.contains(&stream))
    }

    /// Opens a MemPool, a new one or one that the program still holds.
    fn open_pool(&mut self) -> Option<()> {
        let device = self.device();
        let closed = (0..self.pools.len()).find(|&index| {
            !self.pools[index].open && !self.pools[index].of_graphs && self.pools[index].device == device
        });
        let allocator = &self.world.allocator;
        let index = match closed {
            Some(index) if self.random.one_in(2) || self.pools.len() > 6 => index,
            _ if self.pools.len() > 6 => return None,
            _ => {
                let id = (self.next_pool, 0);
                self.next_pool += 1;
                let custom = (device == 0 && self.random.one_in(6)).then_some(CustomAllocator(7));
                allocator.ensure_pool(device, id, custom).unwrap();
                if custom.is_none() && self.random.one_in(2) {
                    let patterns = [
                        AccessPattern::CpuFirst,
                        AccessPattern::Device,
                        AccessPattern::Balanced,
                        AccessPattern::GpuFirst,
                    ];
                    allocator.set_pool_placement(device, id, *self.random.of(&patterns)).unwrap();
                }
                self.pools.push(Pool { id, device, holds: 1, ..Pool::default() });
                self.pools.len() - 1
            }
        };
        // The last of those that are open serves.
        let mut pool = self.pools.remove(index);
        let current = self.streams[device as usize][0];
        self.world.allocator.begin_allocate_to_pool(device, pool.id, self.filter(device), current, None).unwrap();
        pool.open = true;
        pool.holds += 1;
        self.pools.push(pool);
        Some(())
    }

    fn close_pool(&mut self) -> Option<()> {
        let open: Vec<usize> = (0..self.pools.len()).filter(|&index| self.pools[index].open).collect();
        if open.is_empty() {
            return None;
        }
        let pool = &mut self.pools[*self.random.of(&open)];
        pool.open = false;
        self.world.allocator.end_allocate_to_pool(pool.device, pool.id).unwrap();
        Some(())
    }

    /// Lets go of a pool for good. What was allocated from it lives on.
    fn release_pool(&mut self) -> Option<()> {
        let closed: Vec<usize> = (0..self.pools.len()).filter(|&index| !self.pools[index].open).collect();
        if closed.is_empty() {
            return None;
        }
        let pool = self.pools.remove(*self.random.of(&closed));
        self.drop_graphs(pool.id);
        for _ in 0..pool.holds {
            self.world.allocator.release_pool(pool.device, pool.id).unwrap();
        }
        assert!(self.world.allocator.release_pool(pool.device, pool.id).is_err());
        if self.random.one_in(2) {
            let result = self.call(|program| program.world.allocator.empty_cache(pool.id, None));
            self.expect(result, &[]);
        }
        Some(())
    }

    fn set_pool(&mut self) -> Option<()> {
        let mempools: Vec<usize> = (0..self.pools.len()).filter(|&index| !self.pools[index].of_graphs).collect();
        if mempools.is_empty() {
            return None;
        }
        let Pool { device, id, .. } = self.pools[*self.random.of(&mempools)];
        let on = self.random.one_in(2);
        if self.random.one_in(2) {
            self.world.allocator.set_use_on_oom(device, id, on).unwrap();
        } else {
            self.world.allocator.set_no_split(device, id, on).unwrap();
        }
        Some(())
    }

    // ---- graphs -------------------------------------------------------------------------------------------------

    /// Captures a graph into a pool of its own, or into one that an earlier graph has used. Outputs are held on.
    fn capture(&mut self) -> Option<()> {
        self.barrier();
        let device = self.device();
        let of_graphs = (0..self.pools.len()).find(|&index| {
            self.pools[index].of_graphs && self.pools[index].device == device && !self.pools[index].open
        });
        let mut pool = match of_graphs {
            Some(index) if self.random.one_in(2) || self.pools.len() > 6 => self.pools.remove(index),
            _ if self.pools.len() > 6 => return None,
            _ => {
                self.next_pool += 1;
                Pool { id: (0, self.next_pool), device, of_graphs: true, ..Pool::default() }
            }
        };
        for graph in self.graphs.iter_mut().filter(|graph| graph.pool == pool.id) {
            graph.dead = true;
        }
        // Nothing can be captured on the legacy stream.
        let streams = self.streams[device as usize][1..].to_vec();
        let first = self.random.below(streams.len() as u64) as usize;
        let (origin, other) = (streams[first], streams[(first + 1) % streams.len()]);
        let forks = self.random.one_in(2);
        let captured = move |stream| stream == origin || (forks && stream == other);
        let id = pool.id;
        let begin = |program: &Self| {
            program.world.allocator.begin_allocate_to_pool(device, id, Box::new(captured), origin, None).unwrap();
        };
        begin(self);
        pool.holds += 1;
        let mode = *self.random.of(&[CaptureMode::Global, CaptureMode::ThreadLocal, CaptureMode::Relaxed]);
        self.world.machine.begin_capture(device, origin, mode).unwrap();
        if forks {
            self.order((device, origin), (device, other));
        }

        let mut inside: Vec<Tensor> = Vec::new();
        // Freed inside the capture while the other captured stream still uses them.
        let mut in_use: Vec<Tensor> = Vec::new();
        let mut copied = Vec::new();
        let serial = self.next_serial;
        self.next_serial += 1;
        for _ in 0..self.random.between(2, 24) {
            match self.random.below(10) {
                0..4 => {
                    let bytes = self.size().min(8 * MIB);
                    let stream = if forks && self.random.one_in(3) { other } else { origin };
                    let result = self.call(|program| program.world.allocator.allocate(device, bytes, stream, None));
                    let Some(ptr) = self.expect(result, &[]) else { continue };
                    let mut tensor = self.tensor(ptr, bytes, device, stream, Some(id));
                    let apart = |other: &Tensor| other.end() <= ptr.0 || tensor.end() <= other.ptr.0;
                    assert!(in_use.iter().all(apart), "{tensor:?} is still used inside the capture: {in_use:?}");
                    tensor.graph = Some(serial);
                    self.fill(&mut tensor);
                    inside.push(tensor);
                }
                4..7 if !inside.is_empty() => {
                    let tensor = inside.swap_remove(self.random.below(inside.len() as u64) as usize);
                    if tensor.elsewhere {
                        in_use.push(tensor);
                    }
                    self.free(tensor);
                }
                7 if forks && !inside.is_empty() => {
                    let index = self.random.below(inside.len() as u64) as usize;
                    let tensor = inside[index];
                    let on = if tensor.stream == origin { other } else { origin };
                    self.order((device, tensor.stream), (device, on));
                    if let Some(slot) = self.graph_slots.pop_first() {
                        copied.push(self.copy_to(slot, &tensor, device, on));
                    }
                    self.world.allocator.record_stream(tensor.ptr, device, on).unwrap();
                    inside[index].elsewhere = true;
                }
                8 => self.beside_a_capture(device, &captured),
                _ => {}
            }
        }
        if forks {
            self.order((device, other), (device, origin));
        }
        let graph = self.world.machine.end_capture(device, origin).expect("the capture was not spoilt");
        self.world.allocator.end_allocate_to_pool(device, id).unwrap();
        let exec = self.world.machine.graph_instantiate(graph).unwrap();
        self.world.machine.graph_destroy(graph).unwrap();
        for mut tensor in inside {
            (tensor.written, tensor.elsewhere) = (false, false);
            self.live.push(tensor);
        }
        self.graphs.push(Graph {
            serial,
            device,
            stream: origin,
            exec,
            pool: id,
            copied,
            launched: false,
            dead: false,
        });
        self.pools.push(pool);
        Some(())
    }

    /// What a program may do while some streams are captured.
    fn beside_a_capture(&mut self, device: DeviceIndex, captured: &impl Fn(Stream) -> bool) {
        match self.random.below(4) {
            0 => {
                // Not on the captured streams: nothing is queued there that is not captured.
                if let Some(index) = self.pick(|tensor| !captured(tensor.stream)) {
                    let tensor = self.live.swap_remove(index);
                    self.free(tensor);
                }
            }
            1 => {
                let device = self.device();
                let stream = self.stream(device);
                if !captured(stream) {
                    let bytes = self.size();
                    let tensor = self.new_tensor(device, bytes, stream);
                    self.live.extend(tensor);
                }
            }
            2 => {
                let before = self.reserved();
                let result = self.world.allocator.empty_cache(DEFAULT_POOL, None);
                self.expect(result, &[]);
                let mine = || self.world.allocator.device_stats(device).unwrap().reserved_bytes.aggregate.current;
                assert!(self.reserved() <= before && mine() <= before, "a capture keeps everything where it is");
            }
            _ => {
                if let Some(index) = self.pick(|tensor| tensor.device == device && tensor.bytes >= 2 * MIB) {
                    let tensor = self.live[index];
                    let stream = self.streams[device as usize][0];
                    let to = *self.random.of(&[Location::Host, Location::Device(device)]);
                    let result =
                        self.call(|program| program.world.allocator.prefetch(tensor.ptr, tensor.bytes, to, stream));
                    self.expect(result, &["do not fit into host memory", "hints are for"]);
                }
            }
        }
    }

    fn replay(&mut self) -> Option<()> {
        let runnable: Vec<usize> = (0..self.graphs.len()).filter(|&index| !self.graphs[index].dead).collect();
        if runnable.is_empty() {
            return None;
        }
        let index = *self.random.of(&runnable);
        // Whoever reads what the graph is about to write is done.
        self.barrier();
        let Graph { device, stream, exec, serial, .. } = self.graphs[index];
        self.world.machine.graph_launch(device, exec, stream).unwrap();
        self.graphs[index].launched = true;
        for tensor in self.live.iter_mut().filter(|tensor| tensor.graph == Some(serial)) {
            // Those of the other captured stream too: it was joined. The program waits for the graph's stream.
            tensor.written = true;
        }
        self.world.machine.stream_synchronize(device, stream).unwrap();
        Some(())
    }

    fn drop_graph(&mut self) -> Option<()> {
        if self.graphs.is_empty() {
            return None;
        }
        let index = self.random.below(self.graphs.len() as u64) as usize;
        self.barrier();
        self.forget_graph(index);
        Some(())
    }

    fn drop_graphs(&mut self, pool: MempoolId) {
        if self.graphs.iter().any(|graph| graph.pool == pool) {
            self.barrier();
        }
        while let Some(index) = self.graphs.iter().position(|graph| graph.pool == pool) {
            self.forget_graph(index);
        }
    }

    fn forget_graph(&mut self, index: usize) {
        let graph = self.graphs.swap_remove(index);
        self.world.machine.graph_exec_destroy(graph.exec).unwrap();
        self.graph_slots.extend(graph.copied.iter().map(|copied| copied.slot));
    }

    fn runnable_graph(&self, pool: MempoolId) -> Option<u64> {
        self.graphs.iter().find(|graph| graph.pool == pool && !graph.dead).map(|graph| graph.serial)
    }

    fn in_pool(&self, pool: MempoolId) -> Vec<Tensor> {
        self.live.iter().copied().filter(|tensor| tensor.pool == Some(pool)).collect()
    }

    fn checkpoint(&mut self) -> Option<()> {
        let pools: Vec<usize> = (0..self.pools.len()).filter(|&index| self.pools[index].of_graphs).collect();
        if pools.is_empty() {
            return None;
        }
        let index = *self.random.of(&pools);
        let Pool { device, id, .. } = self.pools[index];
        let result = self.call(|program| program.world.allocator.checkpoint_state(device, id));
        let state = self.expect(result, &["waits for another stream"])?;
        let tensors = self.in_pool(id);
        let addresses: Vec<u64> = tensors.iter().map(|tensor| tensor.ptr.0).collect();
        assert!(self.world.allocator.check_pool_live_allocations(device, id, &addresses).unwrap());
        self.pools[index].checkpoint = Some(Checkpoint { state, tensors, graph: self.runnable_graph(id) });
        Some(())
    }

    fn restore(&mut self) -> Option<()> {
        let index = self.pools.iter().position(|pool| pool.checkpoint.is_some())?;
        // Uses of what is replaced are over.
        self.barrier();
        let Pool { device, id, .. } = self.pools[index];
        let state = Arc::clone(&self.pools[index].checkpoint.as_ref()?.state);
        let result = self.call(|program| program.world.allocator.restore_pool(device, &state, None));
        let restored = self.expect(result, &["waits for another stream"])?;
        let Checkpoint { tensors: then, graph, .. } = self.pools[index].checkpoint.take()?;
        let addresses = |tensors: &[Tensor]| tensors.iter().map(|tensor| tensor.ptr.0).collect::<BTreeSet<u64>>();
        let now = self.in_pool(id);
        assert_eq!(restored.freed.iter().copied().collect::<BTreeSet<u64>>(), addresses(&now));
        assert_eq!(restored.created.iter().copied().collect::<BTreeSet<u64>>(), addresses(&then));
        if self.runnable_graph(id) != graph {
            // What it would write is somebody else's again.
            self.graphs.iter_mut().filter(|graph| graph.pool == id).for_each(|graph| graph.dead = true);
        }
        let runnable = self.runnable_graph(id);
        self.live.retain(|tensor| tensor.pool != Some(id));
        for mut tensor in then {
            match now.iter().find(|other| (other.ptr, other.tag) == (tensor.ptr, tensor.tag)) {
                // It was there all the time, and still has its bytes.
                Some(same) => tensor = *same,
                None => {
                    tensor.written = false;
                    tensor.elsewhere = false;
                    if tensor.graph != runnable {
                        tensor.graph = None;
                    }
                }
            }
            if tensor.graph.is_none() && !tensor.written {
                self.fill(&mut tensor);
            }
            self.live.push(tensor);
        }
        Some(())
    }

    // ---- settings, figures, others ------------------------------------------------------------------------------

    fn change_options(&mut self) -> Option<()> {
        let random = &mut self.random;
        let original = self.original.clone();
        let options = Options {
            device_limit: if random.one_in(2) { original.device_limit } else { Some(random.between(4, 64) * MIB) },
            oversubscription_ratio: if random.one_in(2) {
                original.oversubscription_ratio
            } else {
                random.between(5, 50) as f64 / 10.0
            },
            prefetch: !random.one_in(6),
            prefetch_threshold: random.one_in(6).then_some(8 * MIB),
            stage1_threshold: if random.one_in(3) { 0.5 } else { original.stage1_threshold },
            ..original
        };
        self.world.allocator.set_options(options).unwrap();
        Some(())
    }

    fn change_native_options(&mut self) -> Option<()> {
        let random = &mut self.random;
        let native = NativeOptions {
            max_split_size: *random.of(&[u64::MAX, u64::MAX, 21 * MIB, 40 * MIB]),
            garbage_collection_threshold: if random.one_in(3) { 0.4 } else { 0.0 },
            roundup_power2_divisions: [*random.of(&[0, 0, 1, 4]); 16],
            expandable_segments: random.one_in(3),
            throw_on_oom: random.one_in(4),
            ..NativeOptions::default()
        };
        self.world.allocator.set_native_options(native);
        Some(())
    }

    fn look(&mut self) -> Option<()> {
        let device = self.device();
        match self.random.below(6) {
            4 => {
                let places = self.world.allocator.place_stats(device).unwrap();
                let segments = self.world.allocator.segment_places(device).unwrap();
                let sums = segments.iter().fold([0; 3], |[device, host, unplaced], segment| {
                    [device + segment.device, host + segment.host, unplaced + segment.unplaced]
                });
                if self.alone() {
                    assert_eq!(sums, [places.device, places.host, places.unplaced].map(|level| level.current));
                }
            }
            0 => {
                let result = self.call(|program| program.world.allocator.memory_info(device));
                let info = self.expect(result, &[])?;
                if self.alone() {
                    assert_eq!(info.reserved, info.populated.total());
                    assert!(info.allocated <= info.reserved && info.free <= info.capacity, "{info:?}");
                }
            }
            1 => {
                let result = self.call(|program| program.world.allocator.cache_info(device));
                self.expect(result, &[])?;
            }
            2 => {
                let snapshot = self.world.allocator.snapshot(DEFAULT_POOL, self.random.one_in(4)).unwrap();
                let reserved: u64 = snapshot.segments.iter().map(|segment| segment.total_bytes).sum();
                let allocated = snapshot.segments.iter().flat_map(|segment| &segment.blocks);
                let allocated = allocated.filter(|block| block.allocated).count();
                if self.alone() {
                    assert_eq!(reserved as i64, self.reserved());
                    assert_eq!(allocated, self.live.len() + self.hoard.lock().len());
                }
            }
            3 => {
                let index = self.pick(|_| true)?;
                let tensor = self.live[index];
                let known = self.world.allocator.allocation(tensor.ptr).unwrap();
                assert_eq!((known.device, known.requested_bytes), (tensor.device, tensor.bytes));
                assert!(known.block_bytes >= tensor.bytes);
                let (base, bytes) = self.world.allocator.base_allocation(tensor.ptr).unwrap();
                assert!(base <= tensor.ptr && tensor.end() <= base.0 + bytes);
            }
            _ => {
                for pool in &self.pools {
                    let held = self.world.allocator.pool_use_count(pool.device, pool.id).unwrap();
                    assert_eq!(held, pool.holds, "{:?}", pool.id);
                }
            }
        }
        Some(())
    }

    fn history(&mut self) -> Option<()> {
        let enabled = self.random.one_in(3);
        self.world.allocator.set_history(recording(enabled));
        self.world.allocator.set_tracing(enabled && self.random.one_in(2));
        self.world.hooks.trace.lock().clear();
        Some(())
    }

    /// Others take host memory, or give it back.
    fn others(&mut self) -> Option<()> {
        if !self.traits.host_shrinks {
            return Some(());
        }
        // What was promised is populated first.
        self.barrier();
        let machine = &self.world.machine;
        machine.set_others_host_memory(0);
        let available = machine.host_memory_now().available;
        let taken = if self.random.one_in(2) { 0 } else { self.random.below(available + 1) };
        machine.set_others_host_memory(taken);
        Some(())
    }

    // ---- the end ------------------------------------------------------------------------------------------------

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

fn recording(enabled: bool) -> Recording {
    Recording { enabled, capacity: 100, level: RecordContext::Never, clear: true, skip: Actions::default() }
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
