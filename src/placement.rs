//! Where memory goes: decides from the access pattern and the pressure, and calls nothing.

use crate::driver::{Advice, DeviceIndex, DeviceInfo, Location};
use crate::error::{Error, Result};
use crate::options::{AccessPattern, Options};
use crate::place::Place;
use crate::segments::Memory;

/// How a new segment is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plan {
    /// What it is made of.
    pub memory: Memory,
    /// Where it is meant to live.
    pub place: Place,
}

/// What a placement means: everything that another access pattern decides otherwise is asked here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Policy(pub AccessPattern);

impl Policy {
    /// Whether it needs managed memory, and so a device with concurrent managed access.
    pub fn needs_managed(self) -> bool {
        self.0 != AccessPattern::Device
    }

    /// Whether its memory cannot exceed the device's, whatever the oversubscription ratio says.
    pub fn bounded_by_device(self) -> bool {
        self.0 == AccessPattern::Device
    }

    /// Whether it fills the device up to its limit, and live memory is evicted to the host beyond that.
    pub fn evicts(self) -> bool {
        self.0 == AccessPattern::GpuFirst
    }

    /// Whether new memory populates the device, so that cached memory there is given back first where it is short.
    pub fn populates_device(self) -> bool {
        matches!(self.0, AccessPattern::GpuFirst | AccessPattern::Device)
    }

    /// Where memory that was placed at `place` belongs when it is handed out again.
    pub fn wanted(self, place: Place) -> Place {
        if self.evicts() && place == Place::Host { Place::Device } else { place }
    }

    /// Whether memory at `place` is there for lack of room.
    pub fn overflowed(self, place: Place) -> bool {
        self.evicts() && place == Place::Host
    }

    /// The placement of a new segment, or the one that an existing segment must have to grow by `bytes`.
    ///
    /// `resident` is what this process has populated on the device, `device_limit` the soft limit on it, in bytes.
    pub fn plan(self, resident: u64, bytes: u64, device_limit: u64) -> Plan {
        let managed = |place| Plan { memory: Memory::Managed, place };
        match self.0 {
            AccessPattern::Device => Plan { memory: Memory::Device, place: Place::Device },
            AccessPattern::Balanced => managed(Place::Unplaced),
            AccessPattern::CpuFirst => managed(Place::Host),
            // A preferred location on the GPU switches the driver's thrashing protection off, so it is only given
            // while there is room.
            AccessPattern::GpuFirst if resident.saturating_add(bytes) <= device_limit => managed(Place::Device),
            AccessPattern::GpuFirst => managed(Place::Host),
        }
    }
}

/// Whether a device can place memory so.
///
/// # Errors
/// [`Error::NotSupported`], with what works instead.
pub fn check_supported(info: &DeviceInfo, device: DeviceIndex, pattern: AccessPattern) -> Result<()> {
    if !Policy(pattern).needs_managed() || (info.managed_memory && info.concurrent_managed_access) {
        return Ok(());
    }
    Err(Error::NotSupported(format!(
        "use_uvm:True needs a device with concurrent managed access; device {device} ({}) has none (as under Windows, WSL \
         and on Tegra). Allowed here: uvm_access_pattern:device, or use_uvm:False",
        info.name
    )))
}

/// The host memory nearest to the device. Only hardware-coherent machines (GH200) have GPU memory as NUMA nodes of the
/// host, and so need to say which node is meant.
fn host(info: &DeviceInfo) -> Location {
    match info.host_numa_node {
        Some(node) if info.host_page_tables => Location::HostNuma(node),
        _ => Location::Host,
    }
}

/// The advice for managed memory of a place, to be given on the whole address range before it is populated (advice on a
/// populated range maps pages, which costs).
pub fn advice(place: Place, device: DeviceIndex, info: &DeviceInfo) -> Vec<Advice> {
    match place {
        Place::Device => {
            let mut advice = vec![Advice::SetPreferredLocation(Location::Device(device))];
            if info.host_page_tables {
                // The CPU then reads over the link instead of pulling pages back.
                advice.push(Advice::SetAccessedBy(Location::Host));
            }
            advice
        }
        Place::Host => {
            vec![Advice::SetPreferredLocation(host(info)), Advice::SetAccessedBy(Location::Device(device))]
        }
        Place::Unplaced => vec![Advice::SetAccessedBy(Location::Device(device))],
    }
}

/// The advice that turns managed memory of the other place into memory of this one.
pub fn change_of_advice(place: Place, device: DeviceIndex, info: &DeviceInfo) -> Vec<Advice> {
    let mut change = advice(place, device, info);
    match place {
        Place::Device => change.push(Advice::UnsetAccessedBy(Location::Device(device))),
        Place::Host if info.host_page_tables => change.push(Advice::UnsetAccessedBy(Location::Host)),
        Place::Host | Place::Unplaced => {}
    }
    change
}

/// Where memory of a place is meant to be, if anywhere.
pub fn home(place: Place, device: DeviceIndex, info: &DeviceInfo) -> Option<Location> {
    match place {
        Place::Device => Some(Location::Device(device)),
        Place::Host => Some(host(info)),
        Place::Unplaced => None,
    }
}

/// Whether the free end of a growing segment can be given back without the rest: by discarding it. Then what was
/// discarded must be populated before it is used again. Of memory that the host holds nothing would come back: the
/// driver keeps its pages, and only on the device it takes them for others.
pub fn can_shrink(place: Place, info: &DeviceInfo, options: &Options) -> bool {
    info.discard
        && !info.integrated
        && place == Place::Device
        && options.prefetch
        && options.prefetch_threshold.is_none()
}

/// Where to populate a range ahead of its use, if at all. `request` is the program's request in bytes.
pub fn population(
    place: Place,
    device: DeviceIndex,
    info: &DeviceInfo,
    options: &Options,
    request: u64,
) -> Option<Location> {
    if !options.prefetch || options.prefetch_threshold.is_some_and(|threshold| request >= threshold) {
        return None;
    }
    home(place, device, info)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(host_page_tables: bool) -> DeviceInfo {
        DeviceInfo {
            name: "test".into(),
            total_memory: 1 << 30,
            managed_memory: true,
            concurrent_managed_access: true,
            host_page_tables,
            discard: true,
            chunks: true,
            host_chunks: true,
            shareable_chunks: true,
            integrated: false,
            host_numa_node: Some(1),
        }
    }

    #[test]
    fn gpu_first_stops_at_the_limit() {
        let place = |resident, bytes| Policy(AccessPattern::GpuFirst).plan(resident, bytes, 100).place;
        assert_eq!(place(0, 100), Place::Device);
        assert_eq!(place(1, 100), Place::Host);
        assert_eq!(place(u64::MAX, 1), Place::Host);
        assert_eq!(Policy(AccessPattern::CpuFirst).plan(0, 1, 100).place, Place::Host);
        assert_eq!(Policy(AccessPattern::Balanced).plan(0, 1, 100).place, Place::Unplaced);
        assert_eq!(Policy(AccessPattern::Device).plan(500, 1, 100).memory, Memory::Device);
    }

    #[test]
    fn the_cpu_reaches_gpu_memory_only_where_hardware_lets_it() {
        let preferred = Advice::SetPreferredLocation(Location::Device(0));
        assert_eq!(advice(Place::Device, 0, &info(false)), [preferred]);
        assert_eq!(advice(Place::Device, 0, &info(true)), [preferred, Advice::SetAccessedBy(Location::Host)]);
    }

    #[test]
    fn host_memory_is_reached_by_the_gpu_and_named_by_node_where_that_matters() {
        let reached = Advice::SetAccessedBy(Location::Device(0));
        assert_eq!(advice(Place::Host, 0, &info(false)), [Advice::SetPreferredLocation(Location::Host), reached]);
        assert_eq!(advice(Place::Host, 0, &info(true)), [Advice::SetPreferredLocation(Location::HostNuma(1)), reached]);
        assert_eq!(advice(Place::Unplaced, 0, &info(true)), [reached]);
    }

    #[test]
    fn population_obeys_the_options() {
        let at = |options: &Options, bytes| population(Place::Device, 0, &info(false), options, bytes);
        let options = Options::default();
        assert_eq!(at(&options, 1), Some(Location::Device(0)));
        let threshold = Options { prefetch_threshold: Some(100), ..Options::default() };
        assert_eq!(at(&threshold, 99), Some(Location::Device(0)));
        assert_eq!(at(&threshold, 100), None);
        let off = Options { prefetch: false, ..Options::default() };
        assert_eq!(at(&off, 1), None);
        assert_eq!(population(Place::Unplaced, 0, &info(false), &options, 1), None);
        // What would not be populated again must not be discarded.
        let shrinks = |place, options: &Options| can_shrink(place, &info(false), options);
        assert!(shrinks(Place::Device, &options));
        assert!(!shrinks(Place::Device, &threshold) && !shrinks(Place::Device, &off));
        assert!(!shrinks(Place::Host, &options) && !shrinks(Place::Unplaced, &options));
        for lacking in [DeviceInfo { discard: false, ..info(false) }, DeviceInfo { integrated: true, ..info(false) }] {
            assert!(!can_shrink(Place::Device, &lacking, &options));
        }
    }
}
