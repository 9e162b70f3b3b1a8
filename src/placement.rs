//! Where memory goes: decides from the access pattern and the pressure, and calls nothing.

use crate::driver::{Advice, DeviceIndex, DeviceInfo, Location};
use crate::options::{AccessPattern, Options};
use crate::segments::{Memory, Place};

/// How a new segment is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plan {
    /// What it is made of.
    pub memory: Memory,
    /// Where it is meant to live.
    pub place: Place,
}

/// The placement of a new segment, or the one that an existing segment must have to grow by `bytes`.
///
/// `resident` is what this process has populated on the device, `device_limit` the soft limit on it, in bytes.
pub fn plan(pattern: AccessPattern, resident: u64, bytes: u64, device_limit: u64) -> Plan {
    match pattern {
        AccessPattern::Device => Plan { memory: Memory::Device, place: Place::Device },
        AccessPattern::Balanced => Plan { memory: Memory::Managed, place: Place::Unplaced },
        AccessPattern::CpuFirst => Plan { memory: Memory::Managed, place: Place::Host },
        // A preferred location on the GPU switches the driver's thrashing protection off, so it is only given
        // while there is room.
        AccessPattern::GpuFirst if resident.saturating_add(bytes) <= device_limit => {
            Plan { memory: Memory::Managed, place: Place::Device }
        }
        AccessPattern::GpuFirst => Plan { memory: Memory::Managed, place: Place::Host },
    }
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

/// Whether the free end of a growing segment can be given back without the rest: by discarding it. Then what was discarded
/// must be populated before it is used again. Of memory that the host holds nothing would come back: the driver keeps its
/// pages, and only on the device it takes them for others.
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
            pageable_memory_access: host_page_tables,
            host_page_tables,
            direct_host_access: host_page_tables,
            discard: true,
            integrated: false,
            host_numa_node: Some(1),
        }
    }

    #[test]
    fn gpu_first_stops_at_the_limit() {
        let place = |resident, bytes| plan(AccessPattern::GpuFirst, resident, bytes, 100).place;
        assert_eq!(place(0, 100), Place::Device);
        assert_eq!(place(1, 100), Place::Host);
        assert_eq!(place(u64::MAX, 1), Place::Host);
        assert_eq!(plan(AccessPattern::CpuFirst, 0, 1, 100).place, Place::Host);
        assert_eq!(plan(AccessPattern::Balanced, 0, 1, 100).place, Place::Unplaced);
        assert_eq!(plan(AccessPattern::Device, 500, 1, 100).memory, Memory::Device);
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
