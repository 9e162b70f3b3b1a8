//! The machines that can be simulated: the one home of all their figures.
//!
//! Sizes and attributes are the makers'; speeds are measured on an H100 where there is a measurement, and
//! carried over by the ratio of the links elsewhere. Ratios are to be trusted more than absolute figures.

use crate::error::Code;
use crate::fault::{EntryPoint, Fault, Which};
use std::fmt;
use torch_uvm::driver::DeviceInfo;

/// One KiB, MiB, GiB in bytes.
pub const KIB: u64 = 1 << 10;
/// One MiB in bytes.
pub const MIB: u64 = 1 << 20;
/// One GiB in bytes.
pub const GIB: u64 = 1 << 30;

/// What a call on chunks costs by the chunk's place: a fixed part, and a part for each GiB.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PerTier {
    /// Of device memory.
    pub device: (u64, u64),
    /// Of host memory.
    pub host: (u64, u64),
}

/// What things cost. Speeds in bytes a nanosecond (GB/s), times in nanoseconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Costs {
    /// A copy inside device memory.
    pub device_copy: f64,
    /// A write of device memory (memset).
    pub device_write: f64,
    /// A pinned copy, host to device.
    pub copy_h2d: f64,
    /// A pinned copy, device to host.
    pub copy_d2h: f64,
    /// A prefetch of populated pages to the device.
    pub prefetch_h2d: f64,
    /// A prefetch of populated pages to the host; eviction.
    pub prefetch_d2h: f64,
    /// Zero-filling fresh pages on the device by a prefetch.
    pub populate_prefetch: f64,
    /// Zero-filling fresh pages on the device by faults of a kernel.
    pub populate_fault: f64,
    /// Moving host pages by faults of a kernel.
    pub migrate_fault: f64,
    /// Access of host pages across the link, without moving them.
    pub remote: f64,
    /// Zero-filling fresh pages in host memory.
    pub populate_host: f64,
    /// Writing to pages that were discarded and not prefetched since.
    pub write_discarded: f64,
    /// `cuMemAlloc`: a fixed part, and a part for each GiB.
    pub alloc_device: (u64, u64),
    /// `cuMemAllocManaged`, of any size.
    pub alloc_managed: u64,
    /// `cuMemFree` of managed memory: a fixed part, a part for each GiB on the device, for each GiB in the host.
    pub free_managed: (u64, u64, u64),
    /// `cuMemFree` of device memory.
    pub free_device: u64,
    /// `cuMemCreate`: the driver zeroes host memory.
    pub chunk_create: PerTier,
    /// `cuMemMap` and `cuMemSetAccess` together.
    pub chunk_access: PerTier,
    /// `cuMemUnmap` and `cuMemRelease` together.
    pub chunk_unmap: PerTier,
    /// The host's time for a prefetch call.
    pub prefetch_call: u64,
    /// The host's time for an advise call, and for each GiB that it maps.
    pub advise_call: (u64, u64),
    /// The host's time for discarding a GiB.
    pub discard_per_gib: u64,
    /// The host's time for launching anything.
    pub launch: u64,
    /// The host's time for any other call.
    pub call: u64,
}

impl Costs {
    /// Measured on an H100 80GB HBM3, PCIe Gen5, driver 580.
    fn h100() -> Self {
        Costs {
            device_copy: 2837.0,
            device_write: 3097.0,
            copy_h2d: 54.9,
            copy_d2h: 55.2,
            prefetch_h2d: 48.8,
            prefetch_d2h: 10.2,
            populate_prefetch: 230.0,
            populate_fault: 12.9,
            migrate_fault: 7.4,
            remote: 51.0,
            populate_host: 10.0,
            write_discarded: 0.168,
            alloc_device: (50_000, 145_000),
            alloc_managed: 10_000,
            free_managed: (10_000, 6_000_000, 30_000_000),
            free_device: 50_000,
            // These three fit what an H200 took for 2, 20, 128 and 512 MiB within 15 %.
            chunk_create: PerTier { device: (6_000, 66_000), host: (400_000, 167_000_000) },
            chunk_access: PerTier { device: (26_000, 0), host: (26_000, 11_000_000) },
            chunk_unmap: PerTier { device: (24_000, 270_000), host: (30_000, 22_000_000) },
            prefetch_call: 17_000,
            advise_call: (4_000, 22_000_000),
            discard_per_gib: 3_900_000,
            launch: 3_000,
            call: 300,
        }
    }

    /// The same with a link `scale` times as fast as PCIe Gen5 (NVLink-C2C: 450 GB/s each way).
    fn with_link(scale: f64) -> Self {
        let mut costs = Costs::h100();
        for speed in [
            &mut costs.copy_h2d,
            &mut costs.copy_d2h,
            &mut costs.prefetch_h2d,
            &mut costs.prefetch_d2h,
            &mut costs.migrate_fault,
            &mut costs.remote,
        ] {
            *speed *= scale;
        }
        costs
    }
}

/// A kind of machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// The name by which it is chosen.
    pub key: &'static str,
    /// The GPU's marketing name.
    pub device_name: &'static str,
    /// Bytes of device memory, each device.
    pub device_memory: u64,
    /// Bytes of host memory the operating system sees.
    pub host_memory: u64,
    /// Compute capability.
    pub compute_capability: (i32, i32),
    /// Streaming multiprocessors.
    pub multiprocessors: i32,
    /// Core clock in kHz.
    pub clock_khz: i32,
    /// Memory clock in kHz.
    pub memory_clock_khz: i32,
    /// Memory bus width in bits.
    pub memory_bus_bits: i32,
    /// Bytes of level-2 cache.
    pub l2_bytes: i32,
    /// Largest shared memory of a block, opted in to.
    pub shared_memory_per_block_optin: i32,
    /// Shared memory of a multiprocessor.
    pub shared_memory_per_multiprocessor: i32,
    /// Most threads that live on a multiprocessor.
    pub threads_per_multiprocessor: i32,
    /// `CONCURRENT_MANAGED_ACCESS`.
    pub concurrent_managed_access: bool,
    /// The driver can discard managed memory (from CUDA 13.0); needs concurrent managed access.
    pub discard: bool,
    /// `PAGEABLE_MEMORY_ACCESS`.
    pub pageable_memory_access: bool,
    /// `PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES`.
    pub host_page_tables: bool,
    /// `DIRECT_MANAGED_MEM_ACCESS_FROM_HOST`.
    pub direct_host_access: bool,
    /// `HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED`: chunks of host memory.
    pub host_chunks: bool,
    /// `INTEGRATED`: one physical memory for device and host; `device_memory` and `host_memory` are the same bytes.
    pub integrated: bool,
    /// The page of the host's kernel, in bytes: the granularity in which the host maps memory. That of the machine that the
    /// simulator runs on where this is smaller.
    pub host_page: u64,
    /// `HOST_NUMA_ID`.
    pub host_numa_node: Option<i32>,
    /// How many NUMA nodes the host has.
    pub numa_nodes: i32,
    /// Bytes a second over the link, one way, for reports.
    pub link_bytes_per_second: u64,
    /// What things cost.
    pub costs: Costs,
}

impl Profile {
    /// The names that [`Profile::by_name`] knows.
    pub const NAMES: &'static [&'static str] =
        &["h100", "h100-no-host-chunks", "gh200", "gh200-egm", "gb10", "rtx4090-wsl"];

    /// The profile of this name.
    ///
    /// # Errors
    /// Names what is allowed.
    pub fn by_name(name: &str) -> Result<Profile, ConfigError> {
        match name.trim().to_ascii_lowercase().as_str() {
            "h100" => Ok(Profile::h100()),
            "h100-no-host-chunks" => Ok(Profile::h100_no_host_chunks()),
            "gh200" => Ok(Profile::gh200()),
            "gh200-egm" => Ok(Profile::gh200_egm()),
            "gb10" => Ok(Profile::gb10()),
            "rtx4090-wsl" => Ok(Profile::rtx4090_wsl()),
            _ => Err(ConfigError::new("device", name, format!("one of {}", Profile::NAMES.join(", ")))),
        }
    }

    /// An H100 in an x86-64 server, on PCIe Gen5.
    #[must_use]
    pub fn h100() -> Profile {
        Profile {
            key: "h100",
            device_name: "NVIDIA H100 80GB HBM3",
            device_memory: 81_089 * MIB,
            host_memory: 256 * GIB,
            compute_capability: (9, 0),
            multiprocessors: 132,
            clock_khz: 1_980_000,
            memory_clock_khz: 2_619_000,
            memory_bus_bits: 5120,
            l2_bytes: 50 << 20,
            shared_memory_per_block_optin: 227 << 10,
            shared_memory_per_multiprocessor: 228 << 10,
            threads_per_multiprocessor: 2048,
            concurrent_managed_access: true,
            discard: true,
            pageable_memory_access: false,
            host_page_tables: false,
            direct_host_access: false,
            host_chunks: true,
            integrated: false,
            host_page: 4 * KIB,
            host_numa_node: Some(0),
            numa_nodes: 1,
            link_bytes_per_second: 64_000_000_000,
            costs: Costs::h100(),
        }
    }

    /// The same with a driver that has no chunks of host memory (attribute 141 is 0).
    #[must_use]
    pub fn h100_no_host_chunks() -> Profile {
        Profile { key: "h100-no-host-chunks", host_chunks: false, ..Profile::h100() }
    }

    /// An RTX 4090 under WSL: no concurrent managed access. That it has chunks of host memory is not measured.
    #[must_use]
    pub fn rtx4090_wsl() -> Profile {
        Profile {
            key: "rtx4090-wsl",
            device_name: "NVIDIA GeForce RTX 4090",
            device_memory: 24_564 * MIB,
            host_memory: 32 * GIB,
            compute_capability: (8, 9),
            multiprocessors: 128,
            clock_khz: 2_520_000,
            memory_clock_khz: 10_501_000,
            memory_bus_bits: 384,
            l2_bytes: 72 << 20,
            shared_memory_per_block_optin: 99 << 10,
            shared_memory_per_multiprocessor: 100 << 10,
            threads_per_multiprocessor: 1536,
            concurrent_managed_access: false,
            discard: false,
            link_bytes_per_second: 32_000_000_000,
            costs: Costs::with_link(0.5),
            ..Profile::h100()
        }
    }

    /// A GH200 with 96 GiB of HBM and 480 GiB of LPDDR, coherent over NVLink-C2C.
    #[must_use]
    pub fn gh200() -> Profile {
        Profile {
            key: "gh200",
            device_name: "NVIDIA GH200 480GB",
            device_memory: 96 * GIB,
            host_memory: 480 * GIB,
            memory_bus_bits: 6144,
            pageable_memory_access: true,
            host_page_tables: true,
            direct_host_access: true,
            // node 0 is the CPU's LPDDR, node 1 the HBM
            numa_nodes: 2,
            link_bytes_per_second: 450_000_000_000,
            costs: Costs::with_link(7.0),
            ..Profile::h100()
        }
    }

    /// A GH200 whose firmware has handed most LPDDR to the GPU (EGM): the system sees about 102 of its 480 GiB.
    #[must_use]
    pub fn gh200_egm() -> Profile {
        Profile { key: "gh200-egm", host_memory: 102 * GIB, ..Profile::gh200() }
    }

    /// A GB10 (DGX Spark): one LPDDR memory for CPU and GPU.
    #[must_use]
    pub fn gb10() -> Profile {
        let mut costs = Costs::with_link(4.0);
        costs.device_copy = 120.0;
        costs.device_write = 240.0;
        costs.populate_prefetch = 100.0;
        Profile {
            key: "gb10",
            device_name: "NVIDIA GB10",
            device_memory: 122_560 * MIB,
            host_memory: 122_560 * MIB,
            compute_capability: (12, 1),
            multiprocessors: 48,
            clock_khz: 2_418_000,
            memory_clock_khz: 8_533_000,
            memory_bus_bits: 256,
            l2_bytes: 24 << 20,
            shared_memory_per_block_optin: 99 << 10,
            shared_memory_per_multiprocessor: 100 << 10,
            threads_per_multiprocessor: 1536,
            pageable_memory_access: true,
            host_page_tables: true,
            direct_host_access: true,
            integrated: true,
            link_bytes_per_second: 300_000_000_000,
            costs,
            ..Profile::h100()
        }
    }

    /// The facts as the allocator asks for them.
    #[must_use]
    pub fn device_info(&self) -> DeviceInfo {
        DeviceInfo {
            name: self.device_name.to_owned(),
            total_memory: self.device_memory,
            managed_memory: true,
            concurrent_managed_access: self.concurrent_managed_access,
            discard: self.discard && self.concurrent_managed_access,
            host_page_tables: self.host_page_tables,
            chunks: true,
            host_chunks: self.host_chunks,
            shareable_chunks: true,
            integrated: self.integrated,
            host_numa_node: self.host_numa_node,
        }
    }
}

/// When queued operations complete by themselves. Whatever synchronises completes them in any schedule.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Schedule {
    /// At once: the easiest machine. Useful for benchmarks.
    Eager,
    /// As late as possible: only what synchronises makes progress; a query answers "not ready" a few times first.
    Late,
    /// At each call a few operations of randomly chosen streams may complete; the same seed gives the same order
    /// to a single-threaded program.
    Seeded(u64),
}

/// A value in the configuration that cannot be used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConfigError {
    /// The key, such as `TORCH_UVM_SIM_HBM`.
    pub key: String,
    /// What was given.
    pub value: String,
    /// What would do.
    pub allowed: String,
}

impl ConfigError {
    fn new(key: &str, value: &str, allowed: impl Into<String>) -> Self {
        ConfigError { key: key.to_owned(), value: value.to_owned(), allowed: allowed.into() }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={:?} cannot be used; allowed: {}", self.key, self.value, self.allowed)
    }
}

impl std::error::Error for ConfigError {}

/// Which machine to simulate, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The kind of machine, with any sizes changed.
    pub profile: Profile,
    /// How many such GPUs it has (at least 1). They share the host memory.
    pub devices: i32,
    /// When operations complete.
    pub schedule: Schedule,
    /// In [`Schedule::Late`], how often a query of pending work answers "not ready" before it completes.
    pub late_polls: u32,
    /// Faults planted from the start.
    pub faults: Vec<Fault>,
}

impl Config {
    /// The longest list of devices: residency masks have a bit for each.
    pub const MAX_DEVICES: i32 = 16;

    /// One device of this profile, as late as possible.
    #[must_use]
    pub fn new(profile: Profile) -> Config {
        Config { profile, devices: 1, schedule: Schedule::Late, late_polls: 3, faults: Vec::new() }
    }

    /// The machine most tests use: a GH200 with 2 GiB of HBM and 10 GiB of host memory.
    #[must_use]
    pub fn small_gh200() -> Config {
        Config::new(Profile::gh200()).device_memory(2 * GIB).host_memory(10 * GIB)
    }

    /// Sets the device memory (of an integrated machine: all memory).
    #[must_use]
    pub fn device_memory(mut self, bytes: u64) -> Config {
        self.profile.device_memory = bytes;
        if self.profile.integrated {
            self.profile.host_memory = bytes;
        }
        self
    }

    /// Sets the host memory (of an integrated machine: all memory).
    #[must_use]
    pub fn host_memory(mut self, bytes: u64) -> Config {
        self.profile.host_memory = bytes;
        if self.profile.integrated {
            self.profile.device_memory = bytes;
        }
        self
    }

    /// Sets the number of devices, kept between 1 and [`Config::MAX_DEVICES`].
    #[must_use]
    pub fn devices(mut self, devices: i32) -> Config {
        self.devices = devices.clamp(1, Config::MAX_DEVICES);
        self
    }

    /// Sets when operations complete.
    #[must_use]
    pub fn schedule(mut self, schedule: Schedule) -> Config {
        self.schedule = schedule;
        self
    }

    /// Switches concurrent managed access on or off (off: as on Windows, WSL and Tegra).
    #[must_use]
    pub fn concurrent_managed_access(mut self, on: bool) -> Config {
        self.profile.concurrent_managed_access = on;
        self
    }

    /// Sets the page of the host's kernel, in bytes: a power of two.
    #[must_use]
    pub fn host_page(mut self, bytes: u64) -> Config {
        self.profile.host_page = bytes;
        self
    }

    /// Switches discarding on or off (off: as with drivers before CUDA 13.0).
    #[must_use]
    pub fn discard(mut self, on: bool) -> Config {
        self.profile.discard = on;
        self
    }

    /// Switches chunks of host memory on or off.
    #[must_use]
    pub fn host_chunks(mut self, on: bool) -> Config {
        self.profile.host_chunks = on;
        self
    }

    /// The machine that these variables describe; others are passed over. With none of them: a GH200, seed 0.
    ///
    /// | key | value |
    /// |---|---|
    /// | `TORCH_UVM_SIM_DEVICE` | one of [`Profile::NAMES`] |
    /// | `TORCH_UVM_SIM_HBM` | device memory, such as `2GiB` |
    /// | `TORCH_UVM_SIM_HOST` | host memory, such as `10GiB` |
    /// | `TORCH_UVM_SIM_DEVICES` | number of devices, 1 to 16 |
    /// | `TORCH_UVM_SIM_SEED` | a number, `late` or `eager` |
    /// | `TORCH_UVM_SIM_CONCURRENT` | `0` switches concurrent managed access off |
    /// | `TORCH_UVM_SIM_PAGE` | the page of the host's kernel, `4KiB` to `64KiB` |
    /// | `TORCH_UVM_SIM_FAIL` | calls that fail: `cudaMallocManaged@3=OUT_OF_MEMORY,cuMemAdvise=1`, see [`parse_faults`] |
    ///
    /// # Errors
    /// A bad value is an error that names the key, the value and what is allowed.
    pub fn from_vars<K, V>(vars: impl IntoIterator<Item = (K, V)>) -> Result<Config, ConfigError>
    where
        K: AsRef<str>,
        V: AsRef<str>,
    {
        let mut config = Config::new(Profile::gh200()).schedule(Schedule::Seeded(0));
        // Applied after the profile is known, whatever the order of the keys.
        let (mut hbm, mut host, mut concurrent, mut page) = (None, None, None, None);
        for (key, value) in vars {
            let (key, value) = (key.as_ref(), value.as_ref().trim());
            match key {
                "TORCH_UVM_SIM_DEVICE" => {
                    config.profile = Profile::by_name(value).map_err(|e| ConfigError::new(key, value, e.allowed))?;
                }
                "TORCH_UVM_SIM_HBM" => hbm = Some(memory(key, value)?),
                "TORCH_UVM_SIM_HOST" => host = Some(memory(key, value)?),
                "TORCH_UVM_SIM_DEVICES" => {
                    config.devices = value
                        .parse()
                        .ok()
                        .filter(|n| (1..=Config::MAX_DEVICES).contains(n))
                        .ok_or_else(|| ConfigError::new(key, value, "a number from 1 to 16"))?;
                }
                "TORCH_UVM_SIM_SEED" => {
                    config.schedule = match value {
                        "late" => Schedule::Late,
                        "eager" => Schedule::Eager,
                        seed => Schedule::Seeded(
                            seed.parse().map_err(|_| ConfigError::new(key, value, "a number, late or eager"))?,
                        ),
                    };
                }
                "TORCH_UVM_SIM_CONCURRENT" => {
                    concurrent = match value {
                        "0" => Some(false),
                        "1" => Some(true),
                        _ => return Err(ConfigError::new(key, value, "0 or 1")),
                    };
                }
                "TORCH_UVM_SIM_PAGE" => {
                    let allowed = "a power of two from 4KiB to 64KiB";
                    let bytes = parse_size(value).filter(|n| n.is_power_of_two() && (4 * KIB..=64 * KIB).contains(n));
                    page = Some(bytes.ok_or_else(|| ConfigError::new(key, value, allowed))?);
                }
                "TORCH_UVM_SIM_FAIL" => config.faults = parse_faults(key, value)?,
                _ => {}
            }
        }
        if let Some(on) = concurrent {
            config = config.concurrent_managed_access(on);
        }
        if let Some(bytes) = page {
            config = config.host_page(bytes);
        }
        if let Some(bytes) = hbm {
            config = config.device_memory(bytes);
        }
        if let Some(bytes) = host {
            config = config.host_memory(bytes);
        }
        Ok(config)
    }

    /// [`Config::from_vars`] with the process's environment.
    ///
    /// # Errors
    /// As [`Config::from_vars`].
    pub fn from_env() -> Result<Config, ConfigError> {
        let vars = std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
        Config::from_vars(vars)
    }
}

/// The faults of a list such as `cudaMallocManaged@3=OUT_OF_MEMORY,cuMemAdvise=1,cuEventQuery@5+=UNKNOWN`: an entry point by
/// any of its names (`any`: all of them); `@n` for the n-th call only, `@n+` for that and all later ones, nothing for every
/// call; the error by name or number.
///
/// # Errors
/// Names what is allowed.
pub fn parse_faults(key: &str, value: &str) -> Result<Vec<Fault>, ConfigError> {
    let parse = |text: &str| -> Option<Fault> {
        let (call, code) = text.split_once('=')?;
        let (name, which) = match call.split_once('@') {
            None => (call, Which::Every),
            Some((name, count)) => match count.strip_suffix('+') {
                Some(from) => (name, Which::From(from.parse().ok()?)),
                None => (name, Which::Nth(count.parse().ok()?)),
            },
        };
        let call = if name == "any" { None } else { Some(EntryPoint::parse(name)?) };
        Some(Fault { call, which, code: Code::parse(code)? })
    };
    let allowed = "a list of NAME[@n[+]]=ERROR such as cudaMallocManaged@3=OUT_OF_MEMORY";
    let entries = value.split(',').map(str::trim).filter(|text| !text.is_empty());
    entries.map(|text| parse(text).ok_or_else(|| ConfigError::new(key, text, allowed))).collect()
}

fn memory(key: &str, value: &str) -> Result<u64, ConfigError> {
    let allowed = "a size of at least 64MiB such as 2GiB, 10GiB or a number of bytes, at most 16TiB";
    parse_size(value)
        .filter(|bytes| (64 * MIB..=16 << 40).contains(bytes))
        .ok_or_else(|| ConfigError::new(key, value, allowed))
}

/// A number of bytes from `2GiB`, `1.5G`, `512MiB`, `4096`. Units are powers of 1024, with or without the `iB`.
#[must_use]
pub fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let scale = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" | "kib" => KIB,
        "m" | "mb" | "mib" => MIB,
        "g" | "gb" | "gib" => GIB,
        "t" | "tb" | "tib" => GIB << 10,
        _ => return None,
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(scale);
    }
    let bytes = number.parse::<f64>().ok()? * scale as f64;
    (bytes.is_finite() && bytes < 1e18).then_some(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("2GiB"), Some(2 * GIB));
        assert_eq!(parse_size(" 1.5 g "), Some(GIB + GIB / 2));
        assert_eq!(parse_size("4096"), Some(4096));
        for bad in ["", "GiB", "2XiB", "-1", "1e3", "99999999999999T", "1..2G"] {
            assert_eq!(parse_size(bad), None, "{bad}");
        }
    }

    #[test]
    fn every_name_has_a_profile() {
        for name in Profile::NAMES {
            assert_eq!(&Profile::by_name(name).unwrap().key, name);
        }
    }

    #[test]
    fn variables() {
        let config = Config::from_vars([
            ("TORCH_UVM_SIM_CONCURRENT", "0"),
            ("TORCH_UVM_SIM_HBM", "2GiB"),
            ("TORCH_UVM_SIM_DEVICE", "gh200"),
            ("TORCH_UVM_SIM_HOST", "10GiB"),
            ("TORCH_UVM_SIM_DEVICES", "2"),
            ("TORCH_UVM_SIM_SEED", "7"),
            ("HOME", "/"),
        ])
        .unwrap();
        assert_eq!((config.profile.device_memory, config.profile.host_memory), (2 * GIB, 10 * GIB));
        assert_eq!((config.devices, config.schedule), (2, Schedule::Seeded(7)));
        assert!(!config.profile.concurrent_managed_access, "whatever the order of the keys");
    }

    #[test]
    fn faults() {
        let faults = parse_faults("", "cudaMallocManaged@3=OUT_OF_MEMORY, advise=1,any@5+=CUDA_ERROR_UNKNOWN").unwrap();
        assert_eq!(
            faults,
            [
                Fault { call: Some(EntryPoint::AllocManaged), which: Which::Nth(3), code: Code::OUT_OF_MEMORY },
                Fault { call: Some(EntryPoint::Advise), which: Which::Every, code: Code::INVALID_VALUE },
                Fault { call: None, which: Which::From(5), code: Code::UNKNOWN },
            ]
        );
        assert_eq!(parse_faults("", "").unwrap(), []);
    }

    #[test]
    fn bad_variables_name_the_key_the_value_and_what_is_allowed() {
        for (key, value, allowed) in [
            ("TORCH_UVM_SIM_DEVICE", "gh300", "gh200-egm"),
            ("TORCH_UVM_SIM_HBM", "two", "2GiB"),
            ("TORCH_UVM_SIM_HBM", "1KiB", "64MiB"),
            ("TORCH_UVM_SIM_HOST", "-1", "10GiB"),
            ("TORCH_UVM_SIM_DEVICES", "0", "1 to 16"),
            ("TORCH_UVM_SIM_SEED", "maybe", "late"),
            ("TORCH_UVM_SIM_CONCURRENT", "yes", "0 or 1"),
            ("TORCH_UVM_SIM_PAGE", "5000", "4KiB to 64KiB"),
            ("TORCH_UVM_SIM_FAIL", "cudaMango=2", "NAME[@n[+]]=ERROR"),
            ("TORCH_UVM_SIM_FAIL", "cudaMalloc@x=2", "NAME[@n[+]]=ERROR"),
            ("TORCH_UVM_SIM_FAIL", "cudaMalloc@1=12345", "NAME[@n[+]]=ERROR"),
        ] {
            let text = Config::from_vars([(key, value)]).unwrap_err().to_string();
            assert!(text.contains(key) && text.contains(value) && text.contains(allowed), "{text}");
        }
    }
}
