//! How much there is, how much is populated where, and which limit a request meets.

use crate::driver::{DeviceInfo, DeviceMemory, HostMemory};
use crate::error::Limit;
use crate::options::Options;
use crate::place::{Place, Populated};
use crate::placement::Policy;

const MIB: u64 = 1 << 20;

/// Where a process's memory stands on one device. All figures in bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemoryInfo {
    /// The cap on populated bytes: what programs are told is the total.
    pub capacity: u64,
    /// The capacity less what is populated and what others hold: what programs are told is free.
    pub free: u64,
    /// What is populated, by place.
    pub populated: Populated,
    /// In live allocations.
    pub allocated: u64,
    /// Populated in all, cached memory included.
    pub reserved: u64,
    /// The soft limit on what is kept on the device.
    pub device_limit: u64,
    /// Host memory kept for everyone else.
    pub host_reserve: u64,
    /// The device as CUDA sees it.
    pub device: DeviceMemory,
    /// The host as the machine and its cgroups have it.
    pub host: HostMemory,
}

/// A request that does not fit, and the limit it met.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Exceeded {
    /// The limit.
    pub limit: Limit,
    /// The cap on populated bytes in force.
    pub capacity: u64,
}

/// The limits of one device.
#[derive(Clone, Debug)]
pub struct Budget {
    ratio_cap: u64,
    device_memory: u64,
    device_limit: u64,
    host_reserve: Option<u64>,
    integrated: bool,
    /// Plain device memory cannot exceed the device, whatever the ratio says.
    device_only: bool,
    /// `set_per_process_memory_fraction`; 1 is no limit.
    fraction: Option<f64>,
    /// Host memory that was available when this process had last populated none of it, in bytes.
    host_baseline: Option<u64>,
}

impl Budget {
    /// The limits that the options set for a device.
    pub fn new(info: &DeviceInfo, options: &Options) -> Self {
        let device_memory = info.total_memory;
        // What CUDA's context, cuBLAS's and cuDNN's workspaces take beside the allocator.
        let headroom = (device_memory / 16).min(1024 * MIB);
        Self {
            // As f64 the product is exact enough: the cap is not a multiple of anything.
            ratio_cap: (options.oversubscription_ratio * device_memory as f64) as u64,
            device_memory,
            device_limit: options.device_limit.unwrap_or(device_memory - headroom),
            host_reserve: options.host_reserve,
            integrated: info.integrated,
            device_only: Policy(options.access_pattern).bounded_by_device(),
            fraction: None,
            host_baseline: None,
        }
    }

    /// The soft limit on bytes kept on the device.
    pub fn device_limit(&self) -> u64 {
        self.device_limit
    }

    /// The fraction set by `set_per_process_memory_fraction`.
    pub fn fraction(&self) -> f64 {
        self.fraction.unwrap_or(1.0)
    }

    /// Whether the program set a fraction at all.
    pub fn fraction_is_set(&self) -> bool {
        self.fraction.is_some()
    }

    /// Sets it; the caller has checked that it lies in [0, 1].
    pub fn set_fraction(&mut self, fraction: f64) {
        self.fraction = Some(fraction);
    }

    /// The per-process limit in bytes. As PyTorch documents it, a fraction of the *device's* memory, so that a program
    /// that divides bytes by the device's total gets the bytes it meant; 1 lifts the limit.
    pub fn allowed(&self) -> Option<u64> {
        self.fraction.filter(|&fraction| fraction < 1.0).map(|fraction| (fraction * self.device_memory as f64) as u64)
    }

    /// Host memory kept for everyone else, in bytes.
    pub fn host_reserve(&self, host: &HostMemory) -> u64 {
        self.host_reserve.unwrap_or((2048 * MIB).max(host.total / 20))
    }

    /// Whether the answer of [`Budget::admit`] can depend on host memory: then it must be read first.
    pub fn needs_host(&self, populated: &Populated, place: Place, bytes: u64) -> bool {
        self.integrated
            || place == Place::Host
            || (!self.device_only && populated.total().saturating_add(bytes) > self.device_memory)
    }

    /// Takes note of what the host had before this process took any of it.
    pub fn observe(&mut self, populated: &Populated, host: &HostMemory) {
        if self.host_baseline.is_none() || self.own_on_host(populated) == 0 {
            self.host_baseline = Some(host.available);
        }
    }

    fn own_on_host(&self, populated: &Populated) -> u64 {
        // Where there is one physical memory, everything populated is host memory too.
        if self.integrated { populated.total() } else { populated.on_host(self.device_memory) }
    }

    /// The cap on populated bytes: min(ratio × device memory, device memory + host memory left − reserve), where
    /// what this process itself has populated in host memory is not "gone". Population runs late (a prefetch is queued,
    /// `balanced` waits for the first touch), so bytes may be counted as ours while the host still shows them available: together
    /// they are never taken for more than there was at first.
    pub fn capacity(&self, populated: &Populated, host: Option<&HostMemory>) -> Exceeded {
        let ratio = if self.device_only { self.ratio_cap.min(self.device_memory) } else { self.ratio_cap };
        let Some(host) = host else { return Exceeded { limit: Limit::Ratio, capacity: ratio } };
        let device = if self.integrated { 0 } else { self.device_memory };
        // Where less than the reserve is left, the deficit does not take what is populated already.
        let physical = device.saturating_add(self.host_share(populated, host)).max(populated.total());
        if physical < ratio && !self.device_only {
            Exceeded { limit: Limit::HostMemory, capacity: physical }
        } else {
            Exceeded { limit: Limit::Ratio, capacity: ratio }
        }
    }

    /// Host memory that this process may populate in all, in bytes.
    fn host_share(&self, populated: &Populated, host: &HostMemory) -> u64 {
        let ours = host.available.saturating_add(self.own_on_host(populated));
        ours.min(self.host_baseline.unwrap_or(u64::MAX)).saturating_sub(self.host_reserve(host))
    }

    /// Whether `bytes` that are populated on the device may go to host memory.
    ///
    /// # Errors
    /// The limit that is met: the host's memory less its reserve.
    pub fn admit_to_host(&self, populated: &Populated, bytes: u64, host: &HostMemory) -> Result<(), Exceeded> {
        // Where there is one physical memory, nothing is taken of it that was not taken before.
        if !self.integrated && bytes > self.host_share(populated, host).saturating_sub(self.own_on_host(populated)) {
            return Err(Exceeded { limit: Limit::HostMemory, capacity: self.capacity(populated, Some(host)).capacity });
        }
        Ok(())
    }

    /// Whether `bytes` more, in `place`, may be populated. `host` is what [`crate::driver::Driver::host_memory`] says;
    /// it may be left out where [`Budget::needs_host`] is false.
    ///
    /// # Errors
    /// The limit that is met.
    pub fn admit(
        &self,
        populated: &Populated,
        place: Place,
        bytes: u64,
        host: Option<&HostMemory>,
    ) -> Result<(), Exceeded> {
        let cap = self.capacity(populated, host);
        let wanted = populated.total().saturating_add(bytes);
        if let Some(allowed) = self.allowed()
            && wanted > allowed
        {
            return Err(Exceeded { limit: Limit::Fraction, capacity: cap.capacity });
        }
        if wanted > cap.capacity {
            return Err(cap);
        }
        // Bytes placed in host memory need host memory, however empty the device is.
        if let (Place::Host, Some(host)) = (place, host)
            && bytes > self.host_share(populated, host).saturating_sub(self.own_on_host(populated))
        {
            return Err(Exceeded { limit: Limit::HostMemory, capacity: cap.capacity });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::AccessPattern;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    fn info(total_memory: u64, integrated: bool) -> DeviceInfo {
        DeviceInfo {
            name: "test".into(),
            total_memory,
            managed_memory: true,
            concurrent_managed_access: true,
            host_page_tables: true,
            discard: false,
            chunks: true,
            host_chunks: true,
            shareable_chunks: true,
            integrated,
            host_numa_node: None,
        }
    }

    fn budget(options: Options) -> Budget {
        Budget::new(&info(2 * GIB, false), &options)
    }

    fn host(total: u64, available: u64) -> HostMemory {
        HostMemory { total, available }
    }

    #[test]
    fn the_ratio_caps() {
        let budget = budget(Options { oversubscription_ratio: 1.5, ..Options::default() });
        let host = host(64 * GIB, 64 * GIB);
        let populated = Populated { device: 2 * GIB, ..Populated::default() };
        assert_eq!(budget.admit(&populated, Place::Device, GIB, Some(&host)), Ok(()));
        let exceeded = Exceeded { limit: Limit::Ratio, capacity: 3 * GIB };
        assert_eq!(budget.admit(&populated, Place::Device, GIB + 1, Some(&host)), Err(exceeded));
    }

    #[test]
    fn the_host_caps_less_its_reserve() {
        let budget = budget(Options::default());
        // 10 GiB in all: 2 on the device, 8 more of which 2 are kept back.
        let cap = budget.capacity(&Populated::default(), Some(&host(8 * GIB, 8 * GIB)));
        assert_eq!(cap, Exceeded { limit: Limit::HostMemory, capacity: 8 * GIB });
        // Populating in host memory lowers what is available, not the capacity.
        let populated = Populated { host: 3 * GIB, ..Populated::default() };
        assert_eq!(budget.capacity(&populated, Some(&host(8 * GIB, 5 * GIB))), cap);
        // What is queued but not yet there is not counted twice.
        let mut late = budget.clone();
        late.observe(&Populated::default(), &host(8 * GIB, 8 * GIB));
        assert_eq!(late.capacity(&populated, Some(&host(8 * GIB, 8 * GIB))), cap);
        // Someone else took the rest: nothing more goes in, though the device is empty.
        let squeezed = host(8 * GIB, GIB);
        assert_eq!(budget.admit(&populated, Place::Host, 512, Some(&squeezed)).unwrap_err().limit, Limit::HostMemory);
        assert_eq!(budget.admit(&populated, Place::Device, 512, Some(&squeezed)), Ok(()));
    }

    #[test]
    fn the_fraction_is_of_the_device() {
        let mut budget = budget(Options::default());
        budget.set_fraction(0.5);
        assert_eq!(budget.allowed(), Some(GIB));
        assert_eq!(budget.admit(&Populated::default(), Place::Device, GIB, None), Ok(()));
        let exceeded = budget.admit(&Populated::default(), Place::Device, GIB + 1, None).unwrap_err();
        assert_eq!(exceeded.limit, Limit::Fraction);
        budget.set_fraction(1.0);
        assert_eq!(budget.allowed(), None);
    }

    #[test]
    fn one_physical_memory_is_counted_once() {
        let budget = Budget::new(&info(119 * GIB, true), &Options::default());
        let populated = Populated { device: 20 * GIB, ..Populated::default() };
        let cap = budget.capacity(&populated, Some(&host(119 * GIB, 60 * GIB)));
        let reserve = 119 * GIB / 20;
        assert_eq!(cap, Exceeded { limit: Limit::HostMemory, capacity: 80 * GIB - reserve });
    }

    #[test]
    fn plain_device_memory_never_exceeds_the_device() {
        let budget = budget(Options { access_pattern: AccessPattern::Device, ..Options::default() });
        assert_eq!(budget.capacity(&Populated::default(), None).capacity, 2 * GIB);
    }

    proptest! {
        /// What is admitted never passes the cap, whatever the arguments.
        #[test]
        fn admitted_bytes_stay_under_the_cap(
            ratio in 0.01_f64..20.0,
            fraction in 0.0_f64..=1.0,
            (device, on_host, unplaced) in (0_u64..4 << 30, 0_u64..8 << 30, 0_u64..8 << 30),
            bytes in any::<u64>(),
            available in 0_u64..64 << 30,
        ) {
            let mut budget = budget(Options { oversubscription_ratio: ratio, ..Options::default() });
            budget.set_fraction(fraction);
            let populated = Populated { device, host: on_host, unplaced };
            let host = host(64 << 30, available);
            if budget.admit(&populated, Place::Device, bytes, Some(&host)).is_ok() {
                let wanted = populated.total() + bytes;
                prop_assert!(wanted <= (ratio * (2_u64 << 30) as f64) as u64);
                prop_assert!(fraction == 1.0 || wanted <= (fraction * (2_u64 << 30) as f64) as u64);
            }
        }
    }
}
