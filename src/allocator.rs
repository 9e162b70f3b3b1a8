//! The allocator of a process: its devices, each behind one lock.

mod hints;
mod private_pools;
mod statistics;

pub use hints::Hints;
pub use private_pools::PrivatePools;

pub use crate::device::{Allocation, BlockInfo, PoolState, Restored, SegmentInfo, SegmentPlace, Snapshot};
pub use crate::hooks::{Hooks, StreamFilter};
pub use crate::segments::CustomAllocator;

use crate::budget::MemoryInfo;
use crate::device::allocate::Served;
use crate::device::state::DeviceState;
use crate::device::{allocations, check, figures, reclaim, snapshot};
use crate::driver::{DeviceIndex, DevicePtr, Driver, IpcHandle, Stream};
use crate::error::{Error, Result};
use crate::history::{Context, Recording};
use crate::ids::MempoolId;
use crate::options::{NativeOptions, Options};
use crate::placement::check_supported;
use crate::sizes::REQUEST_LIMIT;
use crate::thread_cache;
use parking_lot::{Mutex, MutexGuard};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

/// A device's state for anything but allocating and freeing: what the threads' caches did is counted.
fn flushed(state: &Mutex<DeviceState>) -> MutexGuard<'_, DeviceState> {
    let mut state = state.lock();
    state.flush_thread_caches();
    state
}

/// One object a process.
pub struct Allocator {
    /// As the threads' caches know it.
    id: u64,
    driver: Arc<dyn Driver>,
    hooks: Arc<dyn Hooks>,
    settings: Mutex<(Options, NativeOptions)>,
    devices: OnceLock<Box<[Mutex<DeviceState>]>>,
    /// The device of the last free: most programs use one at a time.
    last_device: AtomicUsize,
    history_enabled: AtomicBool,
}

impl Allocator {
    /// An allocator without devices; CUDA is asked nothing yet.
    pub fn new(driver: Arc<dyn Driver>, hooks: Arc<dyn Hooks>, options: Options) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        Self {
            id: COUNT.fetch_add(1, Ordering::Relaxed),
            driver,
            hooks,
            settings: Mutex::new((options, NativeOptions::default())),
            devices: OnceLock::new(),
            last_device: AtomicUsize::new(0),
            history_enabled: AtomicBool::new(false),
        }
    }

    /// Takes the first `device_count` devices into use. Calling it again does nothing.
    ///
    /// # Errors
    /// [`Error::NotSupported`] for a device without what the access pattern needs; the driver's.
    pub fn init(&self, device_count: i32) -> Result<()> {
        if let Some(devices) = self.devices.get() {
            if device_count as usize <= devices.len() {
                return Ok(());
            }
            return Err(Error::InvalidArgument(format!(
                "the allocator was initialised for {} devices and cannot be extended to {device_count}",
                devices.len()
            )));
        }
        let (options, native) = self.settings.lock().clone();
        let devices: Box<[Mutex<DeviceState>]> = (0..device_count)
            .map(|device| {
                let info = self.driver.device_info(device)?;
                check_supported(&info, device, options.access_pattern)?;
                let state = DeviceState::new(
                    self.id,
                    device,
                    info,
                    Arc::clone(&self.driver),
                    Arc::clone(&self.hooks),
                    options.clone(),
                    native.clone(),
                );
                Ok(Mutex::new(state))
            })
            .collect::<Result<_>>()?;
        // Two threads may come here at once; the first one's devices stay, and nothing was allocated from the others.
        let _ = self.devices.set(devices);
        Ok(())
    }

    /// Whether [`Allocator::init`] has succeeded.
    pub fn initialized(&self) -> bool {
        self.devices.get().is_some()
    }

    #[inline]
    fn devices(&self) -> &[Mutex<DeviceState>] {
        self.devices.get().map_or(&[], |devices| devices)
    }

    #[inline]
    fn device(&self, device: DeviceIndex) -> Result<&Mutex<DeviceState>> {
        match self.devices().get(device as usize) {
            Some(state) => Ok(state),
            None => Err(self.no_such_device(device)),
        }
    }

    #[cold]
    fn no_such_device(&self, device: DeviceIndex) -> Error {
        Error::InvalidArgument(match self.devices().len() {
            0 => format!("allocator not initialized for device {device}: did you call init?"),
            count => format!("invalid device {device}: expected 0 to {}", count - 1),
        })
    }

    /// Allocates at least `bytes` (> 0) for use on `stream`; the block is 512-byte aligned.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::InvalidArgument`] for a bad device or zero bytes; the driver's.
    #[inline]
    pub fn allocate(
        &self,
        device: DeviceIndex,
        bytes: u64,
        stream: Stream,
        mut context: Option<Context>,
    ) -> Result<DevicePtr> {
        if context.is_none()
            && let Some(ptr) = thread_cache::allocate(self.id, device, bytes, stream)
        {
            return Ok(ptr);
        }
        let state = self.device(device)?;
        if bytes.wrapping_sub(1) >= REQUEST_LIMIT - 1 {
            return self.refuse(state, bytes, stream, context);
        }
        if let Served::Block(ptr) = state.lock().allocate_cached(bytes, stream, &mut context)? {
            return Ok(ptr);
        }
        self.allocate_new(state, bytes, stream, context)
    }

    #[cold]
    fn allocate_new(
        &self,
        state: &Mutex<DeviceState>,
        bytes: u64,
        stream: Stream,
        context: Option<Context>,
    ) -> Result<DevicePtr> {
        // Callbacks free tensors, which takes the lock.
        self.hooks.free_memory_callbacks();
        flushed(state).allocate_new(bytes, stream, context)
    }

    #[cold]
    fn refuse(
        &self,
        state: &Mutex<DeviceState>,
        bytes: u64,
        stream: Stream,
        context: Option<Context>,
    ) -> Result<DevicePtr> {
        if bytes == 0 {
            return Err(Error::InvalidArgument("an allocation of 0 bytes was asked for; expected at least 1".into()));
        }
        Err(flushed(state).refuse(bytes, stream, context))
    }

    /// The device of a live allocation.
    #[inline]
    fn owner(&self, ptr: DevicePtr, found: &mut impl FnMut(&mut DeviceState) -> bool) -> Result<()> {
        let devices = self.devices();
        let hint = self.last_device.load(Ordering::Relaxed);
        for index in (hint..devices.len()).chain(0..hint.min(devices.len())) {
            if found(&mut devices[index].lock()) {
                if index != hint {
                    self.last_device.store(index, Ordering::Relaxed);
                }
                return Ok(());
            }
        }
        Err(Error::InvalidPointer(ptr))
    }

    /// Runs `f` on the device that a live allocation belongs to, under its lock.
    fn with_owner<T>(&self, ptr: DevicePtr, mut f: impl FnMut(&mut DeviceState) -> Result<T>) -> Result<T> {
        let mut result = Err(Error::InvalidPointer(ptr));
        self.owner(ptr, &mut |state| {
            let owns = allocations::owns(state, ptr);
            if owns {
                result = f(state);
            }
            owns
        })?;
        result
    }

    /// Gives an allocation back.
    ///
    /// # Errors
    /// [`Error::InvalidPointer`].
    #[inline]
    pub fn free(&self, ptr: DevicePtr, mut context: Option<Context>) -> Result<()> {
        if context.is_none() && thread_cache::free(self.id, ptr) {
            return Ok(());
        }
        self.owner(ptr, &mut |state| state.free(ptr, &mut context))
    }

    /// What is known about a live allocation.
    ///
    /// # Errors
    /// [`Error::InvalidPointer`].
    pub fn allocation(&self, ptr: DevicePtr) -> Result<Allocation> {
        self.with_owner(ptr, |state| allocations::allocation(state, ptr))
    }

    /// Notes that a live allocation is used on a stream of `device` other than its own.
    ///
    /// # Errors
    /// [`Error::InvalidPointer`].
    pub fn record_stream(&self, ptr: DevicePtr, device: DeviceIndex, stream: Stream) -> Result<()> {
        self.with_owner(ptr, |state| state.record_stream(ptr, device, stream))
    }

    /// The segment of a live allocation: its first byte and how many bytes are populated.
    ///
    /// # Errors
    /// [`Error::InvalidPointer`].
    pub fn base_allocation(&self, ptr: DevicePtr) -> Result<(DevicePtr, u64)> {
        self.with_owner(ptr, |state| allocations::base_allocation(state, ptr))
    }

    /// A handle by which another process opens the segment of this allocation, and the allocation's offset in it in
    /// bytes.
    ///
    /// # Errors
    /// [`Error::NotSupported`] for managed memory, of which CUDA gives no handles; [`Error::InvalidPointer`]; the
    /// driver's.
    pub fn ipc_handle(&self, ptr: DevicePtr) -> Result<(IpcHandle, u64)> {
        self.with_owner(ptr, |state| allocations::ipc_handle(state, ptr))
    }

    /// Hints about live allocations.
    pub fn hints(&self) -> Hints<'_> {
        Hints(self)
    }

    /// The private pools of a device: those of CUDA graphs and MemPools.
    pub fn pools(&self, device: DeviceIndex) -> PrivatePools<'_> {
        PrivatePools { allocator: self, device }
    }

    /// Gives cached memory back to CUDA: everything that can be, or only that of one released pool. Waits for frees
    /// that wait for events. Nothing while a CUDA graph is captured.
    ///
    /// # Errors
    /// The driver's.
    pub fn empty_cache(&self, mempool: MempoolId, context: Option<Context>) -> Result<()> {
        let mut first = Ok(());
        for state in self.devices() {
            let released = reclaim::empty_cache(&mut flushed(state), mempool, context.clone());
            first = first.and(released);
        }
        first
    }

    /// The largest block that could be had, in bytes.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a bad device; the driver's.
    pub fn cache_info(&self, device: DeviceIndex) -> Result<u64> {
        figures::largest_available(&flushed(self.device(device)?))
    }

    /// The fraction of the device's memory that the process may populate; 1 where none was set.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a bad device.
    pub fn memory_fraction(&self, device: DeviceIndex) -> Result<f64> {
        Ok(flushed(self.device(device)?).limits().budget.fraction())
    }

    /// Limits what the process may populate to a fraction of the device's memory; 1 lifts the limit, the capacity
    /// stays.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a bad device or a fraction outside [0, 1].
    pub fn set_memory_fraction(&self, device: DeviceIndex, fraction: f64) -> Result<()> {
        if !(0.0..=1.0).contains(&fraction) {
            return Err(Error::InvalidArgument(format!("invalid fraction: {fraction}. Please set within (0, 1).")));
        }
        flushed(self.device(device)?).limits().budget.set_fraction(fraction);
        Ok(())
    }

    /// Starts or stops the memory history of all devices.
    pub fn set_history(&self, recording: Recording) {
        for state in self.devices() {
            snapshot::record(&mut flushed(state), recording);
        }
        self.history_enabled.store(recording.enabled, Ordering::Relaxed);
    }

    /// Whether the memory history is kept.
    pub fn history_enabled(&self) -> bool {
        self.history_enabled.load(Ordering::Relaxed)
    }

    /// Whether [`Hooks::trace`] is told of everything that happens.
    pub fn set_tracing(&self, on: bool) {
        for state in self.devices() {
            snapshot::track(&mut flushed(state), on);
        }
    }

    /// A compiled function begins on a device; its name goes into the trace.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a bad device.
    pub fn push_compile_context(&self, device: DeviceIndex, name: &str) -> Result<()> {
        flushed(self.device(device)?).tracer().push_compile_context(name);
        Ok(())
    }

    /// The compiled function that began last on a device has ended.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a bad device.
    pub fn pop_compile_context(&self, device: DeviceIndex) -> Result<()> {
        flushed(self.device(device)?).tracer().pop_compile_context();
        Ok(())
    }

    /// Notes something about a live allocation in the trace.
    ///
    /// # Errors
    /// [`Error::InvalidPointer`].
    pub fn annotate(&self, ptr: DevicePtr, metadata: &str) -> Result<()> {
        self.with_owner(ptr, |state| allocations::annotate(state, ptr, metadata))
    }

    /// The stack that made the live allocation which this address lies in, where one was gathered.
    pub fn context_of(&self, address: u64) -> Option<Context> {
        self.devices().iter().find_map(|state| allocations::context_of(&flushed(state), address))
    }

    /// Allocates exactly the bytes at `address`, which the allocator must hold and nobody use.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where they are not free, for a bad device or zero bytes; the driver's.
    pub fn allocate_at(
        &self,
        device: DeviceIndex,
        address: u64,
        bytes: u64,
        stream: Stream,
        context: Option<Context>,
    ) -> Result<DevicePtr> {
        let state = self.device(device)?;
        if bytes.wrapping_sub(1) >= REQUEST_LIMIT - 1 {
            return self.refuse(state, bytes, stream, context);
        }
        flushed(state).allocate_at(address, bytes, stream, context)
    }

    /// All segments, or one pool's, with the traces where they are asked for.
    pub fn snapshot(&self, mempool: MempoolId, with_traces: bool) -> Snapshot {
        let mut snapshot = Snapshot { segments: Vec::new(), traces: Vec::new() };
        for state in self.devices() {
            let mut state = flushed(state);
            // As `native`: the trace ends before the entry that marks this snapshot.
            snapshot.traces.push(if with_traces { state.tracer().entries() } else { Vec::new() });
            snapshot.segments.extend(snapshot::take(&mut state, mempool));
        }
        snapshot
    }

    /// Where this process's memory stands on a device, and how much more it may have.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a bad device; the driver's.
    pub fn memory_info(&self, device: DeviceIndex) -> Result<MemoryInfo> {
        figures::memory_info(&flushed(self.device(device)?))
    }

    /// PyTorch's own settings: at start, and whenever they change.
    pub fn set_native_options(&self, native: NativeOptions) {
        for state in self.devices() {
            flushed(state).set_native_options(native.clone());
        }
        self.settings.lock().1 = native;
    }

    /// Our options as they are.
    pub fn options(&self) -> Options {
        self.settings.lock().0.clone()
    }

    /// Changes our options at run time. What is allocated already stays where it is.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a key that cannot change at run time; nothing has changed then.
    pub fn set_options(&self, options: Options) -> Result<()> {
        let mut settings = self.settings.lock();
        let changed = |key: &str, from: String, to: String| {
            Error::InvalidArgument(format!(
                "{key}: '{to}' is not allowed: it is {from} since the start of the process and cannot change at run time"
            ))
        };
        if options.enabled != settings.0.enabled {
            let name = |on| if on { "True" } else { "False" }.to_string();
            return Err(changed("use_uvm", name(settings.0.enabled), name(options.enabled)));
        }
        if options.access_pattern != settings.0.access_pattern && self.initialized() {
            let (from, to) = (settings.0.access_pattern.name(), options.access_pattern.name());
            return Err(changed("uvm_access_pattern", from.into(), to.into()));
        }
        for state in self.devices() {
            flushed(state).set_options(options.clone());
        }
        settings.0 = options;
        Ok(())
    }

    /// Checks that the accounting of every device balances. For tests.
    ///
    /// # Errors
    /// What does not, in words.
    pub fn check(&self) -> std::result::Result<(), String> {
        self.devices().iter().try_for_each(|state| check::check(&flushed(state)))
    }
}
