//! What happened on a machine, as one text that other programs read: `python -m torch_uvm simulate`, and tests.

use crate::fault::EntryPoint;
use crate::profile::{Profile, Schedule};
use crate::types::{Counters, Peaks, Populated, Traffic};
use serde::Serialize;
use std::collections::BTreeMap;
use torch_uvm::driver::DeviceIndex;

/// All that [`crate::Machine::report`] tells, since the machine began or since [`crate::Machine::reset_counters`].
#[derive(Clone, PartialEq, Debug)]
pub struct Report {
    /// The kind of machine.
    pub profile: Profile,
    /// How many devices it has.
    pub devices: DeviceIndex,
    /// When its operations complete.
    pub schedule: Schedule,
    /// How often things happened.
    pub counters: Counters,
    /// What crossed links, by its cause.
    pub traffic: Traffic,
    /// How fresh pages got their memory.
    pub populated: Populated,
    /// The most memory in use.
    pub peaks: Peaks,
    /// How often each entry point was called.
    pub calls: BTreeMap<EntryPoint, u64>,
    /// Operations that are queued and have not run: what they would do is in none of the figures.
    pub pending_operations: usize,
    /// The simulated time that the program has spent in calls and in waiting, in nanoseconds.
    pub host_ns: u64,
    /// When the last operation was done by the same clock.
    pub device_ns: u64,
}

impl Report {
    /// The same for programs that read JSON. Sizes are bytes, times nanoseconds.
    #[must_use]
    pub fn json(&self) -> impl Serialize + use<> {
        let profile = &self.profile;
        Json {
            machine: MachineJson {
                device: profile.key,
                device_name: profile.device_name,
                devices: self.devices,
                device_memory: profile.device_memory,
                host_memory: profile.host_memory,
                integrated: profile.integrated,
                link_bytes_per_second: profile.link_bytes_per_second,
                schedule: match self.schedule {
                    Schedule::Eager => "eager".to_owned(),
                    Schedule::Late => "late".to_owned(),
                    Schedule::Seeded(seed) => seed.to_string(),
                },
            },
            peaks: self.peaks.clone(),
            counters: self.counters,
            traffic: self.traffic,
            populated: self.populated,
            clock: ClockJson { host_ns: self.host_ns, device_ns: self.device_ns },
            pending_operations: self.pending_operations,
            calls: self.calls.iter().map(|(call, count)| (call.driver_name(), *count)).collect(),
        }
    }
}

#[derive(Serialize)]
struct Json {
    machine: MachineJson,
    peaks: Peaks,
    counters: Counters,
    traffic: Traffic,
    populated: Populated,
    clock: ClockJson,
    pending_operations: usize,
    calls: BTreeMap<&'static str, u64>,
}

#[derive(Serialize)]
struct MachineJson {
    device: &'static str,
    device_name: &'static str,
    devices: DeviceIndex,
    device_memory: u64,
    host_memory: u64,
    integrated: bool,
    link_bytes_per_second: u64,
    schedule: String,
}

#[derive(Serialize)]
struct ClockJson {
    host_ns: u64,
    device_ns: u64,
}
