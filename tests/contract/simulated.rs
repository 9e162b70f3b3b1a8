//! The simulated machines.

use std::sync::Arc;

use torch_uvm::driver::{CaptureMode, DevicePtr, Driver, Result, Stream};
use torch_uvm_sim::{CaptureStatus, Config, CopyKind, Profile, Schedule, SimDriver};

use super::machine::{Capture, DEVICE, Gate, Machine};

/// A simulated machine of its own for each test.
pub struct SimulatedMachine(SimDriver);

impl SimulatedMachine {
    /// A machine of this kind, whose work completes when the schedule says so.
    pub fn new(profile: Profile, schedule: Schedule) -> Self {
        Self(SimDriver::new(Config::new(profile).schedule(schedule)))
    }
}

impl Machine for SimulatedMachine {
    fn driver(&self) -> &dyn Driver {
        &self.0
    }

    fn shared_driver(&self) -> Arc<dyn Driver> {
        Arc::new(self.0.clone())
    }

    fn is_real(&self) -> bool {
        false
    }

    fn begin_capture(&self, stream: Stream, mode: CaptureMode) -> Result<()> {
        Ok(self.0.machine().begin_capture(DEVICE, stream, mode)?)
    }

    fn end_capture(&self, stream: Stream) -> Result<()> {
        let graph = self.0.machine().end_capture(DEVICE, stream)?;
        Ok(self.0.machine().graph_destroy(graph)?)
    }

    fn capture_status(&self, stream: Stream) -> Result<Capture> {
        Ok(match self.0.machine().capture_info(DEVICE, stream)?.status {
            CaptureStatus::None => Capture::None,
            CaptureStatus::Active => Capture::Active,
            CaptureStatus::Invalidated => Capture::Invalidated,
        })
    }

    fn queue_gate(&self, stream: Stream, gate: &Gate) {
        let gate = gate.clone();
        self.0.machine().launch_host_func(DEVICE, stream, Arc::new(move || gate.wait())).unwrap();
    }

    fn write(&self, ptr: DevicePtr, bytes: &[u8]) {
        let source = bytes.as_ptr() as u64;
        self.0.machine().memcpy(DEVICE, ptr.0, source, bytes.len() as u64, CopyKind::HostToDevice).unwrap();
    }

    fn read(&self, ptr: DevicePtr, bytes: &mut [u8]) {
        let destination = bytes.as_mut_ptr() as u64;
        self.0.machine().memcpy(DEVICE, destination, ptr.0, bytes.len() as u64, CopyKind::DeviceToHost).unwrap();
    }

    fn current_context(&self) -> Option<usize> {
        None
    }

    fn with_primary_context(&self, body: &mut dyn FnMut()) {
        body();
    }

    fn with_foreign_context(&self, _body: &mut dyn FnMut()) {}
}
