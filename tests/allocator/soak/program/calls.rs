//! Calls of the allocator, some of them with a fault in what it calls, and what may come of them.

use super::Program;
use torch_uvm::driver::{CaptureMode, DriverError};
use torch_uvm::error::{Error, Limit, OutOfMemory, Result};
use torch_uvm_sim::{Code, EntryPoint, Fault, Which};

/// Who else calls it: where programs run side by side, the faults of what only the allocator calls meet nobody else.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Callers {
    AllocatorOnly,
    ProgramsToo,
}

/// Everything that the allocator calls.
const CALLED: &[(EntryPoint, Callers)] = &[
    (EntryPoint::AllocManaged, Callers::AllocatorOnly),
    (EntryPoint::AllocDevice, Callers::AllocatorOnly),
    (EntryPoint::Free, Callers::AllocatorOnly),
    (EntryPoint::Advise, Callers::AllocatorOnly),
    (EntryPoint::Prefetch, Callers::AllocatorOnly),
    (EntryPoint::Discard, Callers::AllocatorOnly),
    (EntryPoint::HostMemory, Callers::AllocatorOnly),
    (EntryPoint::DeviceMemory, Callers::AllocatorOnly),
    (EntryPoint::StreamCreate, Callers::ProgramsToo),
    (EntryPoint::StreamSynchronize, Callers::ProgramsToo),
    (EntryPoint::StreamIsCapturing, Callers::ProgramsToo),
    (EntryPoint::EventCreate, Callers::ProgramsToo),
    (EntryPoint::EventRecord, Callers::ProgramsToo),
    (EntryPoint::EventQuery, Callers::ProgramsToo),
    (EntryPoint::EventSynchronize, Callers::ProgramsToo),
    (EntryPoint::EventDestroy, Callers::ProgramsToo),
    (EntryPoint::StreamWaitEvent, Callers::ProgramsToo),
    (EntryPoint::ExchangeCaptureMode, Callers::ProgramsToo),
];

const CODES: &[Code] = &[Code::OUT_OF_MEMORY, Code::NOT_SUPPORTED, Code::INVALID_CONTEXT, Code::UNKNOWN];

/// Whether an error is that of a planted fault.
fn planted(error: &DriverError) -> bool {
    error.to_string().contains("(planted)")
}

impl Program {
    /// Runs a call of the allocator, now and then with a fault in one of the driver calls that it makes.
    pub(super) fn call<T>(&mut self, call: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if !self.random.one_in(24) {
            return call(self);
        }
        let own = !self.alone();
        let calls = CALLED.iter().filter(|&&(_, callers)| !own || callers == Callers::AllocatorOnly);
        let calls: Vec<EntryPoint> = calls.map(|&(call, _)| call).collect();
        let which = Which::Nth(if self.random.one_in(2) { 1 } else { self.random.between(1, 8) });
        let target = (own || !self.random.one_in(4)).then(|| *self.random.of(&calls));
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
    pub(super) fn expect<T>(&mut self, result: Result<T>, allowed: &[&str]) -> Option<T> {
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
    pub(super) fn out_of_memory(&mut self, error: &OutOfMemory) {
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
}
