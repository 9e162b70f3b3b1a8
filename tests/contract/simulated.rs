//! The simulated machines.

use std::sync::Arc;

use torch_uvm::driver::{CaptureMode, DevicePtr, Driver, Range, Result, Stream};
use torch_uvm_sim::{Access, CaptureStatus, Config, CopyKind, PointerKind, Profile, Schedule, SimDriver};

use super::machine::{Capture, DEVICE, Gate, Machine};

/// A simulated machine of its own for each test.
pub struct SimulatedMachine(SimDriver);

impl SimulatedMachine {
    /// A machine of this kind, whose work completes when the schedule says so.
    pub fn new(profile: Profile, schedule: Schedule) -> Self {
        Self(SimDriver::new(Config::new(profile).schedule(schedule)))
    }

    /// The same with several devices.
    pub fn with_devices(profile: Profile, devices: i32) -> Self {
        Self(SimDriver::new(Config::new(profile).devices(devices)))
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

    fn try_write(&self, ptr: DevicePtr, bytes: &[u8]) -> Result<()> {
        let source = bytes.as_ptr() as u64;
        Ok(self.0.machine().memcpy(DEVICE, ptr.0, source, bytes.len() as u64, CopyKind::HostToDevice)?)
    }

    fn read(&self, ptr: DevicePtr, bytes: &mut [u8]) {
        let destination = bytes.as_mut_ptr() as u64;
        self.0.machine().memcpy(DEVICE, destination, ptr.0, bytes.len() as u64, CopyKind::DeviceToHost).unwrap();
    }

    fn copy(&self, to: DevicePtr, from: DevicePtr, bytes: u64) {
        self.0.machine().memcpy(DEVICE, to.0, from.0, bytes, CopyKind::Default).unwrap();
    }

    fn set(&self, ptr: DevicePtr, value: u8, bytes: u64) {
        self.0.machine().memset(DEVICE, ptr.0, value.into(), 1, bytes).unwrap();
        self.0.machine().device_synchronize(DEVICE).unwrap();
    }

    fn add_one(&self, ptr: DevicePtr, words: u32) -> bool {
        let range = Range { ptr, bytes: 4 * u64::from(words) };
        self.0.machine().launch_kernel(DEVICE, Stream(0), vec![Access { range, write: true }]).unwrap();
        self.0.machine().device_synchronize(DEVICE).unwrap();
        false
    }

    fn queue_kernel(&self, stream: Stream, range: Range) {
        self.0.machine().launch_kernel(DEVICE, stream, vec![Access { range, write: true }]).unwrap();
    }

    fn pointer_attributes(&self, ptr: DevicePtr) -> Vec<(&'static str, Result<i64>)> {
        let info = self.0.machine().pointer_info(ptr.0).unwrap();
        let on_host = info.kind == PointerKind::PinnedHost;
        vec![
            ("MEMORY_TYPE", Ok(if on_host { 1 } else { 2 })),
            ("DEVICE_POINTER", Ok(ptr.0 as i64)),
            ("DEVICE_ORDINAL", Ok(info.device.into())),
            ("IS_MANAGED", Ok((info.kind == PointerKind::Managed).into())),
        ]
    }

    fn current_context(&self) -> Option<usize> {
        None
    }

    fn with_primary_context(&self, body: &mut dyn FnMut()) {
        body();
    }

    fn with_foreign_context(&self, _body: &mut dyn FnMut()) {}
}
