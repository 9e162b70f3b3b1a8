//! The machine's state, the one lock around it, and the thread that runs host functions.

use crate::capture::{Capture, Exec, Graph};
use crate::chunks::{ChunkState, Reservation};
use crate::error::{Code, Fail, SimError, SimResult, Step, fail};
use crate::event::EventState;
use crate::fault::{EntryPoint, Faults};
use crate::memory::{self, Zone};
use crate::physical::Physical;
use crate::profile::{Config, Costs, GIB, Schedule};
use crate::stream::{Key, Mark, StreamState};
use crate::types::{HostFunc, PointerKind};
use parking_lot::{Condvar, Mutex, MutexGuard};
use rustc_hash::{FxHashMap, FxHashSet};
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak, mpsc};
use torch_uvm::driver::{CaptureMode, DeviceIndex, HostMemory};

thread_local! {
    static THREAD: Cell<u64> = const { Cell::new(0) };
    /// Whether this thread runs a host function of some machine.
    static IN_CALLBACK: Cell<bool> = const { Cell::new(false) };
}

/// A number for the calling thread that no other thread has had.
pub(crate) fn thread_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    THREAD.with(|number| {
        if number.get() == 0 {
            number.set(NEXT.fetch_add(1, Ordering::Relaxed));
        }
        number.get()
    })
}

/// What an allocation of the machine's address space is made of. Managed pages are in [`Physical`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Body {
    Device,
    Managed,
    /// A chunk mapped at a reserved address (`cuMemMap`): whether it is of host memory, and the places that have access.
    Mapped {
        chunk: u64,
        host: bool,
        access: u32,
    },
    /// Another process's device memory (`cuIpcOpenMemHandle`).
    Imported {
        owner: (u32, u64),
        opened: u64,
    },
}

/// A live allocation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Allocation {
    pub device: DeviceIndex,
    /// As asked for.
    pub bytes: u64,
    /// Of address space, and of device memory for plain allocations.
    pub rounded: u64,
    pub body: Body,
    pub id: u64,
}

/// Pinned or registered host memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostAllocation {
    pub device: DeviceIndex,
    pub bytes: u64,
    pub kind: PointerKind,
    /// The address space taken, where it is the machine's.
    pub zone: Option<u64>,
    pub id: u64,
}

/// The address space, by what is in it.
pub(crate) struct Zones {
    /// Managed memory, reserved addresses (`cuMemAddressReserve`) and memory of other processes, from 2 MiB up.
    pub managed: Zone,
    /// Managed memory below 2 MiB.
    pub managed_small: Zone,
    /// Device memory, from 2 MiB up and below.
    pub device: Zone,
    pub device_small: Zone,
    /// Pinned host memory.
    pub pinned: Zone,
    /// The bytes of chunks of host memory, which are mapped elsewhere.
    pub host_chunks: Zone,
}

impl Zones {
    fn new(machine_bytes: u64, host_page: u64) -> Zones {
        let page = host_page.max(memory::page());
        // Room for the whole machine several times over, so that freed addresses come back late.
        let room = (2 * machine_bytes).max(64 * GIB);
        Zones {
            managed: Zone::new(crate::managed::PAGE, page, room),
            managed_small: Zone::new(page, page, 4 * GIB),
            device: Zone::shared(crate::managed::PAGE, page, room),
            device_small: Zone::shared(page, page, 4 * GIB),
            pinned: Zone::new(page, page, 64 * GIB),
            host_chunks: Zone::shared(crate::managed::PAGE, page, room),
        }
    }

    /// Where an allocation takes its addresses.
    pub fn of(&mut self, bytes: u64, body: Body) -> &mut Zone {
        match (body, bytes >= crate::managed::PAGE) {
            (Body::Managed, true) => &mut self.managed,
            (Body::Managed, false) => &mut self.managed_small,
            (Body::Device, true) => &mut self.device,
            (Body::Device, false) => &mut self.device_small,
            (Body::Mapped { .. } | Body::Imported { .. }, _) => &mut self.managed,
        }
    }

    /// The zone that holds an address.
    pub fn holding(&self, address: u64) -> Option<&Zone> {
        let all =
            [&self.managed, &self.device, &self.device_small, &self.managed_small, &self.pinned, &self.host_chunks];
        all.into_iter().find(|zone| zone.contains(address))
    }
}

/// Everything that changes.
pub(crate) struct State {
    pub config: Config,
    pub zones: Zones,
    pub allocations: BTreeMap<u64, Allocation>,
    pub host_allocations: BTreeMap<u64, HostAllocation>,
    pub physical: Physical,
    pub streams: FxHashMap<Key, StreamState>,
    pub legacy_keys: Vec<Key>,
    pub thread_streams: FxHashMap<(u64, DeviceIndex), Key>,
    /// Streams whose queues are not empty.
    pub active: Vec<Key>,
    /// Operations in all queues.
    pub pending: usize,
    pub events: FxHashMap<u64, EventState>,
    pub captures: BTreeMap<u64, Capture>,
    /// Threads whose capture mode is not the global one.
    pub thread_modes: FxHashMap<u64, CaptureMode>,
    pub graphs: BTreeMap<u64, Arc<Graph>>,
    pub execs: BTreeMap<u64, Exec>,
    pub faults: Faults,
    pub peers: FxHashSet<(DeviceIndex, DeviceIndex)>,
    /// Own allocations opened by their IPC handles, and how often.
    pub ipc_opened: FxHashMap<u64, u64>,
    /// Reserved address ranges.
    pub reservations: BTreeMap<u64, Reservation>,
    /// Physical memory of `cuMemCreate`.
    pub chunks: BTreeMap<u64, ChunkState>,
    /// Those of them that only open file descriptors keep.
    pub lingering: BTreeSet<u64>,
    /// An illegal address was met: nothing works any more.
    pub broken: Option<(Code, String)>,
    pub clock_ns: u64,
    /// When the last operation of any stream was done, by the simulated clock.
    pub last_done_ns: u64,
    /// Operations are booked only, and move no bytes: [`crate::Machine::run_down`].
    pub running_down: bool,
    last_id: u64,
    random: u64,
    callbacks: Option<mpsc::Sender<(Key, HostFunc)>>,
    inner: Weak<Inner>,
    notified: HostMemory,
}

impl State {
    fn new(config: Config, inner: Weak<Inner>) -> State {
        let seed = if let Schedule::Seeded(seed) = config.schedule { seed } else { 0 };
        let physical = Physical::new(&config);
        let machine = config.profile.device_memory * config.devices as u64 + config.profile.host_memory;
        let mut state = State {
            zones: Zones::new(machine, config.profile.host_page),
            allocations: BTreeMap::new(),
            host_allocations: BTreeMap::new(),
            physical,
            streams: FxHashMap::default(),
            legacy_keys: Vec::new(),
            thread_streams: FxHashMap::default(),
            active: Vec::new(),
            pending: 0,
            events: FxHashMap::default(),
            captures: BTreeMap::new(),
            thread_modes: FxHashMap::default(),
            graphs: BTreeMap::new(),
            execs: BTreeMap::new(),
            faults: Faults::default(),
            peers: FxHashSet::default(),
            ipc_opened: FxHashMap::default(),
            reservations: BTreeMap::new(),
            chunks: BTreeMap::new(),
            lingering: BTreeSet::new(),
            broken: None,
            clock_ns: 0,
            last_done_ns: 0,
            running_down: false,
            last_id: 0,
            random: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x2545_F491_4F6C_DD1D,
            callbacks: None,
            inner,
            notified: HostMemory { total: 0, available: 0 },
            config,
        };
        for fault in state.config.faults.clone() {
            state.faults.plant(fault);
        }
        for device in 0..state.config.devices {
            let key = state.add_stream(device, true, true, 0);
            state.legacy_keys.push(key);
        }
        state
    }

    /// A number that nothing else in this machine has had.
    pub fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    /// A number below `bound`, from the seed (splitmix64).
    pub fn random(&mut self, bound: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % bound.max(1)
    }

    fn count_failure(&mut self, code: Code) {
        if code == Code::OUT_OF_MEMORY {
            self.physical.counters.out_of_memory += 1;
        }
    }

    pub fn costs(&self) -> &Costs {
        &self.config.profile.costs
    }

    pub fn check_device(&self, device: DeviceIndex) -> Step<()> {
        if (0..self.config.devices).contains(&device) {
            return Ok(());
        }
        Err(fail(Code::INVALID_DEVICE, format!("there is no device {device}: there are {}", self.config.devices)))
    }

    /// The live allocation that holds an address.
    pub fn allocation_at(&self, address: u64) -> Option<(u64, &Allocation)> {
        let (&base, allocation) = self.allocations.range(..=address).next_back()?;
        (address < base + allocation.rounded).then_some((base, allocation))
    }

    /// The pinned or registered memory that holds an address.
    pub fn host_allocation_at(&self, address: u64) -> Option<(u64, &HostAllocation)> {
        let (&base, host) = self.host_allocations.range(..=address).next_back()?;
        (address < base + host.zone.unwrap_or(host.bytes)).then_some((base, host))
    }

    /// Whether an address is the machine's, live or freed.
    pub fn in_zones(&self, address: u64) -> bool {
        self.zones.holding(address).is_some()
    }

    pub fn host_memory(&self) -> HostMemory {
        HostMemory { total: self.physical.host.total, available: self.physical.host_available() }
    }

    /// Hands a host function to the callback thread, which is started at the first one.
    pub fn start_callback(&mut self, key: Key, function: HostFunc) {
        let inner = self.inner.clone();
        let sender = self.callbacks.get_or_insert_with(|| spawn_callbacks(inner));
        if let Err(mpsc::SendError((key, function))) = sender.send((key, function)) {
            // No thread could be had: better here than never. The lock is held, so calls back must fail, not wait.
            let before = IN_CALLBACK.replace(true);
            function();
            IN_CALLBACK.set(before);
            self.callback_done(key);
        }
    }
}

fn spawn_callbacks(inner: Weak<Inner>) -> mpsc::Sender<(Key, HostFunc)> {
    let (sender, receiver) = mpsc::channel::<(Key, HostFunc)>();
    let run = move || {
        IN_CALLBACK.set(true);
        for (key, function) in receiver {
            // A panic in a test's function must not leave the stream waiting for ever.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| function()));
            drop(function);
            let Some(inner) = inner.upgrade() else { return };
            inner.state.lock().callback_done(key);
            inner.wake();
        }
    };
    // If no thread can be had, the receiver is dropped, and `start_callback` sees that.
    let _ = std::thread::Builder::new().name("torch-uvm-sim callbacks".to_owned()).spawn(run);
    sender
}

type Listener = Arc<dyn Fn(HostMemory) + Send + Sync>;

/// What clones of a machine share.
pub(crate) struct Inner {
    pub config: Config,
    pub state: Mutex<State>,
    callback_done: Condvar,
    listener: Mutex<Option<Listener>>,
}

impl Inner {
    pub fn new(config: Config) -> Arc<Inner> {
        Arc::new_cyclic(|inner| Inner {
            state: Mutex::new(State::new(config.clone(), inner.clone())),
            config,
            callback_done: Condvar::new(),
            listener: Mutex::new(None),
        })
    }

    /// A call of an entry point: counted, failed if a fault says so, and otherwise run under the lock.
    pub fn call<T>(&self, call: EntryPoint, body: impl FnOnce(&mut Session<'_>) -> Step<T>) -> SimResult<T> {
        let named = |error: Fail| SimError { code: error.code, call: call.driver_name(), detail: error.detail };
        if IN_CALLBACK.get() {
            return Err(named(fail(Code::NOT_PERMITTED, "CUDA may not be called from a host function")));
        }
        let mut session = self.session();
        if let Some(code) = session.faults.on_call(call) {
            session.count_failure(code);
            return Err(named(fail(code, format!("{} (planted)", code.text()))));
        }
        if let Some((code, detail)) = &session.broken
            && !matches!(call, EntryPoint::DeviceCount | EntryPoint::DeviceInfo | EntryPoint::PointerInfo)
        {
            return Err(named(fail(*code, detail.clone())));
        }
        session.clock_ns += self.config.profile.costs.call;
        session.tick();
        let result = body(&mut session).map_err(named);
        if let Err(error) = &result {
            session.count_failure(error.code);
        }
        session.finish();
        result
    }

    fn session(&self) -> Session<'_> {
        let mut session = Session { inner: self, guard: self.state.lock() };
        if !session.lingering.is_empty() {
            session.drop_closed();
        }
        session
    }

    /// Wakes those who wait for a host function or a hold.
    pub fn wake(&self) {
        self.callback_done.notify_all();
    }

    /// Looks at the state, or changes it, without being a call.
    pub fn peek<T>(&self, body: impl FnOnce(&mut State) -> T) -> T {
        let mut session = self.session();
        let result = body(&mut session);
        session.finish();
        result
    }

    pub fn listen(&self, listener: Listener) {
        let memory = self.state.lock().host_memory();
        *self.listener.lock() = Some(listener.clone());
        self.state.lock().notified = memory;
        listener(memory);
    }
}

/// The state, locked, and the means to wait.
pub(crate) struct Session<'a> {
    inner: &'a Inner,
    guard: MutexGuard<'a, State>,
}

impl Session<'_> {
    /// Lets go of the lock until a host function has returned.
    pub fn wait_for_callback(&mut self) {
        self.inner.callback_done.wait(&mut self.guard);
    }

    /// Unlocks, then tells the listener about host memory that has changed.
    fn finish(mut self) {
        let memory = self.guard.host_memory();
        if memory == self.guard.notified {
            return;
        }
        self.guard.notified = memory;
        let inner = self.inner;
        drop(self);
        let listener = inner.listener.lock().clone();
        if let Some(listener) = listener {
            listener(memory);
        }
    }
}

impl Deref for Session<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.guard
    }
}

impl DerefMut for Session<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.guard
    }
}

/// A mark that is complete from the start.
pub(crate) const DONE: Mark = Mark { key: 0, seq: 0 };
