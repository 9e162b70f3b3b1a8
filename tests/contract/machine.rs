//! What a contract test needs beyond [`Driver`]: the machine under the driver.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use torch_uvm::driver::{Advice, CaptureMode, DeviceIndex, DevicePtr, Driver, Location, Range, Result, Stream};

/// All tests use this device.
pub const DEVICE: DeviceIndex = 0;

/// 1 MiB.
pub const MIB: u64 = 1 << 20;

/// The most managed memory that one test may hold. Tests on a real GPU run one at a time, so this is also the most
/// that the suite holds: a program that asks a GPU for more managed memory than is free can hang it.
pub const MANAGED_BUDGET: u64 = 256 * MIB;

/// The state of a stream's capture.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Capture {
    /// The stream does not capture.
    None,
    /// It does.
    Active,
    /// An illegal call has spoilt the capture; it must still be ended.
    Invalidated,
}

/// A device with its driver, real or simulated.
pub trait Machine: Sync {
    /// The driver under test.
    fn driver(&self) -> &dyn Driver;

    /// The same driver, for an allocator to hold.
    fn shared_driver(&self) -> Arc<dyn Driver>;

    /// Whether this is a real GPU: then tests that would endanger it are left out.
    fn is_real(&self) -> bool;

    /// Whether the driver knows NUMA nodes as locations (from CUDA 12.2).
    fn has_numa_locations(&self) -> bool {
        true
    }

    /// Starts a capture on the stream.
    fn begin_capture(&self, stream: Stream, mode: CaptureMode) -> Result<()>;

    /// Ends it, and drops the graph. An invalidated capture gives the error that CUDA gives.
    fn end_capture(&self, stream: Stream) -> Result<()>;

    /// The stream's capture status.
    fn capture_status(&self, stream: Stream) -> Result<Capture>;

    /// Queues work on the stream that completes only when the gate is opened.
    fn queue_gate(&self, stream: Stream, gate: &Gate);

    /// Copies to device or managed memory or to a chunk, and waits.
    fn try_write(&self, ptr: DevicePtr, bytes: &[u8]) -> Result<()>;

    /// Copies from device or managed memory or from a chunk, and waits.
    fn read(&self, ptr: DevicePtr, bytes: &mut [u8]);

    /// Copies between addresses of the device's, and waits.
    fn copy(&self, to: DevicePtr, from: DevicePtr, bytes: u64);

    /// Sets bytes of device or managed memory or of a chunk, and waits.
    fn set(&self, ptr: DevicePtr, value: u8, bytes: u64);

    /// Runs a kernel that adds 1 to each of `words` 32-bit words, and waits. Whether kernels compute here: on simulated devices
    /// they only have to be allowed to use the memory.
    fn add_one(&self, ptr: DevicePtr, words: u32) -> bool;

    /// Queues a kernel that writes a range. Only on simulated machines.
    fn queue_kernel(&self, stream: Stream, range: Range);

    /// What the driver says of a pointer to device memory or to a chunk, by the attribute's name.
    fn pointer_attributes(&self, ptr: DevicePtr) -> Vec<(&'static str, Result<i64>)>;

    /// The calling thread's current context as a number, 0 for none; `None` where there is no such thing.
    fn current_context(&self) -> Option<usize>;

    /// Runs `body` with the device's primary context current, as it is under PyTorch.
    fn with_primary_context(&self, body: &mut dyn FnMut());

    /// Runs `body` with a context current that is not the device's primary one, where there is such a thing.
    fn with_foreign_context(&self, body: &mut dyn FnMut());
}

/// Work that takes exactly as long as a test wants.
#[derive(Clone, Default)]
pub struct Gate(Arc<(Mutex<GateState>, Condvar)>);

#[derive(Clone, Copy, PartialEq, Eq, Default)]
enum GateState {
    #[default]
    Closed,
    Open,
    /// Nobody opened it for too long.
    Expired,
}

impl Gate {
    /// Lets the work complete.
    pub fn open(&self) {
        *self.0.0.lock().unwrap() = GateState::Open;
        self.0.1.notify_all();
    }

    /// Whether the work still waits.
    pub fn is_closed(&self) -> bool {
        *self.0.0.lock().unwrap() == GateState::Closed
    }

    /// Waits until it is open, at most ten seconds: a failing test must not hang the device.
    pub fn wait(&self) {
        let state = self.0.0.lock().unwrap();
        let closed = |state: &mut GateState| *state == GateState::Closed;
        let (mut state, waited) = self.0.1.wait_timeout_while(state, Duration::from_secs(10), closed).unwrap();
        if waited.timed_out() {
            *state = GateState::Expired;
        }
    }
}

/// Opens a gate when it goes: a test that panics leaves no stream waiting.
pub struct OpenAtEnd(pub Gate);

impl Drop for OpenAtEnd {
    fn drop(&mut self) {
        self.0.open();
    }
}

/// Shorthands for the tests.
pub trait MachineExt: Machine {
    /// Copies to memory that can be written, and waits.
    fn write(&self, ptr: DevicePtr, bytes: &[u8]) {
        self.try_write(ptr, bytes).unwrap();
    }

    /// A managed allocation within the budget.
    fn managed(&self, bytes: u64) -> Range {
        assert!(bytes <= MANAGED_BUDGET);
        Range { ptr: self.driver().alloc_managed(DEVICE, bytes).unwrap(), bytes }
    }

    /// Populates on the device, and waits.
    fn prefetch_and_wait(&self, range: Range, to: Location) {
        let stream = self.driver().stream_create(DEVICE).unwrap();
        self.driver().prefetch(DEVICE, range, to, stream).unwrap();
        self.driver().stream_synchronize(DEVICE, stream).unwrap();
        self.driver().stream_destroy(DEVICE, stream).unwrap();
    }

    /// Frees an allocation.
    fn free(&self, ptr: DevicePtr) {
        self.driver().free(DEVICE, ptr).unwrap();
    }

    /// A new stream with a closed gate at its head.
    fn gated_stream(&self) -> (Stream, OpenAtEnd) {
        let stream = self.driver().stream_create(DEVICE).unwrap();
        let gate = Gate::default();
        self.queue_gate(stream, &gate);
        (stream, OpenAtEnd(gate))
    }

    /// Gives advice.
    fn advise(&self, range: Range, advice: Advice) -> Result<()> {
        self.driver().advise(DEVICE, range, advice)
    }

    /// Bytes that differ from place to place and from seed to seed.
    fn pattern(&self, bytes: u64, seed: u8) -> Vec<u8> {
        // A prime length, so that no two pages are alike; and repeated, because test builds are slow byte by byte.
        const UNIT: usize = 65_521;
        let unit: Vec<u8> = (0..UNIT).map(|at| (at as u8).wrapping_mul(31) ^ (at >> 8) as u8 ^ seed).collect();
        let mut pattern = unit.repeat((bytes as usize).div_ceil(UNIT));
        pattern.truncate(bytes as usize);
        pattern
    }

    /// Fails unless the memory holds the bytes.
    fn assert_bytes(&self, ptr: DevicePtr, expected: &[u8], when: &str) {
        let mut found = vec![0; expected.len()];
        self.read(ptr, &mut found);
        if found != expected {
            let at = found.iter().zip(expected).position(|(a, b)| a != b).unwrap_or_default();
            panic!("{when}: byte {at} is {:#x}, not {:#x}", found[at], expected[at]);
        }
    }
}

impl<M: Machine + ?Sized> MachineExt for M {}
