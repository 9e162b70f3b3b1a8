//! An allocator on a simulated machine, and a program that fills and checks what it is given.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use torch_uvm::allocator::{Allocator, CustomAllocator, Hooks};
use torch_uvm::driver::{DeviceIndex, DevicePtr, Event, Range, Stream};
use torch_uvm::error::{Error, Result};
use torch_uvm::history::TraceEntry;
use torch_uvm::ids::{DEFAULT_POOL, MempoolId};
use torch_uvm::options::Options;
use torch_uvm::segments::Memory;
use torch_uvm_sim::{Config, CopyKind, Machine, PointerKind, SimDriver};

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// PyTorch's side, as far as the allocator knows it.
pub struct TestHooks {
    machine: Machine,
    /// Segments that the MemPools' own allocators gave.
    pub custom: Mutex<BTreeMap<u64, u64>>,
    pub trace: Mutex<Vec<TraceEntry>>,
    /// Private pools that are gone.
    pub forgotten: Mutex<Vec<MempoolId>>,
    /// Run by `free_memory_callbacks`.
    pub callback: Mutex<Option<Box<dyn FnMut() -> bool + Send>>>,
}

impl Hooks for TestHooks {
    fn free_memory_callbacks(&self) -> bool {
        self.callback.lock().as_mut().is_some_and(|callback| callback())
    }

    fn approximate_time(&self) -> i64 {
        self.machine.clock_ns() as i64
    }

    fn custom_alloc(&self, _allocator: CustomAllocator, bytes: u64) -> Option<DevicePtr> {
        let ptr = self.machine.alloc_device(0, bytes).ok()?;
        self.custom.lock().insert(ptr.0, bytes);
        Some(ptr)
    }

    fn custom_free(&self, _allocator: CustomAllocator, ptr: DevicePtr) -> bool {
        if self.machine.free(0, ptr).is_err() {
            return false;
        }
        self.custom.lock().remove(&ptr.0);
        true
    }

    fn pool_forgotten(&self, _device: DeviceIndex, id: MempoolId) {
        self.forgotten.lock().push(id);
    }

    fn trace(&self, entry: &TraceEntry) {
        self.trace.lock().push(entry.clone());
    }
}

/// An allocation of the program.
#[derive(Clone, Copy, Debug)]
pub struct Tensor {
    pub ptr: DevicePtr,
    pub bytes: u64,
    pub stream: Stream,
    /// Every byte of it.
    pub tag: u8,
}

/// A machine, an allocator on it, and a program.
pub struct World {
    pub machine: Machine,
    pub allocator: Arc<Allocator>,
    pub hooks: Arc<TestHooks>,
    pub streams: Vec<Stream>,
    /// Memory beside the allocator, to copy to: the first byte, how much of it is used, and what must be there.
    sink: (DevicePtr, u64),
    copied: Vec<(u64, u64, u8)>,
    next_tag: u8,
}

const SINK_BYTES: u64 = 8 * MIB;
const COPY_BYTES: u64 = 512;

impl World {
    pub fn new(config: Config, conf: &str) -> Self {
        Self::with_sink(Machine::new(config), conf, SINK_BYTES)
    }

    /// One more process on a machine, beside others or not. It takes next to nothing of the device for itself, and has
    /// no use for [`World::use_on`].
    pub fn over(machine: &Machine, conf: &str) -> Self {
        Self::with_sink(machine.clone(), conf, 512)
    }

    fn with_sink(machine: Machine, conf: &str, sink_bytes: u64) -> Self {
        let options: Options = format!("use_uvm:True,{conf}").parse().expect("options");
        let hooks = Arc::new(TestHooks {
            machine: machine.clone(),
            custom: Mutex::default(),
            trace: Mutex::default(),
            forgotten: Mutex::default(),
            callback: Mutex::default(),
        });
        let driver = Arc::new(SimDriver::over(machine.clone()));
        let allocator = Arc::new(Allocator::new(driver, hooks.clone(), options));
        let devices = machine.device_count().expect("device_count");
        allocator.init(devices).expect("init");
        let streams = (0..3).map(|_| machine.stream_create(0, true, 0).expect("stream")).collect();
        let sink = (machine.alloc_device(0, sink_bytes).expect("sink"), 0);
        Self { machine, allocator, hooks, streams, sink, copied: Vec::new(), next_tag: 1 }
    }

    /// A GH200 with 2 GiB + 10 GiB.
    pub fn small() -> Self {
        Self::new(Config::small_gh200(), "")
    }

    /// Allocates without touching.
    pub fn empty(&self, bytes: u64, stream: usize) -> Result<DevicePtr> {
        self.allocator.allocate(0, bytes, self.streams[stream], None)
    }

    /// Allocates and fills on the stream.
    pub fn tensor(&mut self, bytes: u64, stream: usize) -> Result<Tensor> {
        let ptr = self.empty(bytes, stream)?;
        self.next_tag = self.next_tag.wrapping_add(1).max(1);
        let tensor = Tensor { ptr, bytes, stream: self.streams[stream], tag: self.next_tag };
        self.machine
            .memset_async(0, ptr.0, u32::from(tensor.tag), 1, bytes, tensor.stream)
            .expect("memset of a fresh allocation");
        Ok(tensor)
    }

    /// Gives a tensor back.
    pub fn free(&self, tensor: Tensor) {
        self.allocator.free(tensor.ptr, None).expect("free of a live tensor");
    }

    /// Uses a tensor on another stream, late: copies its first and last bytes to the sink. `finish` checks
    /// that the copies saw the tensor's bytes and nobody else's.
    pub fn use_on(&mut self, tensor: &Tensor, stream: usize) {
        let stream = self.streams[stream];
        let event: Event = self.machine.event_create(0, false).expect("event");
        self.machine.event_record(0, event, tensor.stream).expect("record");
        self.machine.stream_wait_event(0, stream, event).expect("wait");
        self.machine.event_destroy(0, event).expect("destroy");
        let bytes = tensor.bytes.min(COPY_BYTES);
        for start in [tensor.ptr.0, tensor.ptr.0 + tensor.bytes - bytes] {
            assert!(self.sink.1 + bytes <= SINK_BYTES, "the test uses too many copies");
            let to = self.sink.0.0 + self.sink.1;
            self.sink.1 += COPY_BYTES;
            self.machine.memcpy_async(0, to, start, bytes, CopyKind::DeviceToDevice, stream).expect("copy");
            self.copied.push((to, bytes, tensor.tag));
        }
        self.allocator.record_stream(tensor.ptr, 0, stream).expect("record_stream");
    }

    /// How many uses the sink still takes.
    pub fn uses_left(&self) -> u64 {
        (SINK_BYTES - self.sink.1) / (2 * COPY_BYTES)
    }

    fn read(&self, at: u64, bytes: u64) -> Vec<u8> {
        let mut host = vec![0_u8; bytes as usize];
        self.machine.memcpy(0, host.as_mut_ptr() as u64, at, bytes, CopyKind::DeviceToHost).expect("read");
        host
    }

    /// Checks every byte of a tensor, after its stream's work.
    pub fn verify(&self, tensor: &Tensor) {
        self.machine.stream_synchronize(0, tensor.stream).expect("synchronize");
        let wrong = self.read(tensor.ptr.0, tensor.bytes).iter().filter(|&&byte| byte != tensor.tag).count();
        assert_eq!(wrong, 0, "{wrong} bytes of {tensor:?} were overwritten");
    }

    /// Checks and frees the tensors that are left, and finishes.
    pub fn finish_with(self, tensors: impl IntoIterator<Item = Tensor>) {
        for tensor in tensors {
            self.verify(&tensor);
            self.free(tensor);
        }
        self.finish();
    }

    /// Checks all copies made by `use_on`.
    pub fn verify_copies(&mut self) {
        self.machine.device_synchronize(0).expect("synchronize");
        for (at, bytes, tag) in std::mem::take(&mut self.copied) {
            let seen = self.read(at, bytes);
            assert!(
                seen.iter().all(|&byte| byte == tag),
                "memory was reused before another stream had read it: {:#x} instead of {tag:#x}",
                seen[0]
            );
        }
        self.sink.1 = 0;
    }

    /// The books balance, and agree with the driver.
    pub fn check(&self) {
        if let Err(problem) = self.allocator.check() {
            panic!("the books do not balance: {problem}");
        }
        for device in 0..self.machine.device_count().expect("device_count") {
            self.compare_with_cuda(device);
        }
    }

    /// What `memory_info` takes for memory of others is not memory that this allocator has: nothing counts twice
    /// against what `cuMemGetInfo` says.
    fn compare_with_cuda(&self, device: DeviceIndex) {
        let allocator = &self.allocator;
        let moves = allocator.place_stats(device).expect("place_stats");
        // What is on its way to the host is in host memory for the books, and on the device for CUDA. Where the program
        // has given advice, the driver moves pages that the books do not see.
        let settled = moves.moved_to_host + moves.advices + moves.prefetches == 0;
        let (Ok(info), true) = (allocator.memory_info(device), settled) else { return };
        let places = allocator.segment_places(device).expect("segment_places");
        let integrated = self.machine.profile().integrated;
        let ours = places.iter().map(|segment| match segment.memory {
            Memory::Managed => {
                let range = Range { ptr: segment.base, bytes: segment.range_bytes };
                let lies = self.machine.residency_of(range).expect("our own range");
                lies.devices[device as usize] + if integrated { lies.host } else { 0 }
            }
            Memory::Device | Memory::Custom(_) => segment.range_bytes,
        });
        let ours: u64 = ours.sum();
        let now = self.machine.device_memory_now(device).expect("a device");
        let others = (now.total - now.free).checked_sub(ours).expect("we have more than is used");
        // Options that change at run time may leave more populated than is allowed.
        let told = info.capacity.saturating_sub(info.populated.total() + info.free);
        assert!(told <= others, "{told} bytes are told to be others', who have {others}: {info:?}");
    }

    /// Gives everything back and checks that CUDA has it all again.
    pub fn finish(mut self) {
        self.give_everything_back();
        assert_eq!(self.segments(), [], "segments were not given back");
        let counters = self.machine.counters();
        // A prefetch that finds no room leaves pages discarded, and CUDA does not say so.
        let slow = counters.slow_discard_writes.saturating_sub(counters.prefetch_skipped);
        assert_eq!(slow, 0, "discarded memory was used before it was populated");
    }

    /// The process ends, others go on.
    pub fn leave(mut self) {
        self.give_everything_back();
        self.machine.free(0, self.sink.0).expect("free of the sink");
    }

    fn give_everything_back(&mut self) {
        self.verify_copies();
        self.allocator.empty_cache(DEFAULT_POOL, None).expect("empty_cache");
        self.check();
        let stats = self.allocator.device_stats(0).expect("stats");
        assert_eq!(stats.allocated_bytes.aggregate.current, 0, "the test still holds allocations");
        assert_eq!(stats.reserved_bytes.aggregate.current, 0, "bytes are still reserved");
    }

    /// What the machine has allocated, beside the sink.
    pub fn segments(&self) -> Vec<(DevicePtr, u64, PointerKind)> {
        let mut all = self.machine.live().allocations;
        all.retain(|&(ptr, _, _)| ptr != self.sink.0);
        all
    }

    pub fn reserved(&self) -> u64 {
        self.allocator.device_stats(0).expect("stats").reserved_bytes.aggregate.current as u64
    }

    pub fn allocated(&self) -> u64 {
        self.allocator.device_stats(0).expect("stats").allocated_bytes.aggregate.current as u64
    }

    /// From now on everything on this stream is served from the pool.
    pub fn begin_pool(&self, id: MempoolId, stream: usize) {
        let wanted = self.streams[stream];
        self.allocator
            .pools(0)
            .begin_allocate_to_pool(id, Box::new(move |stream| stream == wanted), wanted, None)
            .expect("begin_allocate_to_pool");
    }

    pub fn end_pool(&self, id: MempoolId) {
        self.allocator.pools(0).end_allocate_to_pool(id).expect("end_allocate_to_pool");
    }
}

/// The out-of-memory error of a request.
pub fn out_of_memory(result: Result<DevicePtr>) -> torch_uvm::error::OutOfMemory {
    match result {
        Err(Error::OutOfMemory(oom)) => *oom,
        other => panic!("expected OutOfMemory, got {other:?}"),
    }
}
