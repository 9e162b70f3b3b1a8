//! The allocator's options: our keys in `PYTORCH_CUDA_ALLOC_CONF` (`use_uvm`, `uvm_…`), and those of PyTorch's own
//! settings that we honour ([`NativeOptions`]). How they are found in a settings string is in
//! [`settings_string`](crate::settings_string).

use crate::error::{Error, Result};
use crate::sizes::LARGE_STEP;
use std::fmt;
use std::str::FromStr;

const MIB: u64 = 1 << 20;

/// Where the default pool's memory is placed (`uvm_access_pattern`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum AccessPattern {
    /// On the GPU while resident bytes stay under the device limit, in host memory reachable from the GPU beyond it.
    #[default]
    GpuFirst,
    /// Wherever it is used: the driver decides.
    Balanced,
    /// In host memory, reachable from the GPU.
    CpuFirst,
    /// Plain device memory: no oversubscription, and IPC works.
    Device,
}

impl AccessPattern {
    const ALL: [Self; 4] = [Self::GpuFirst, Self::Balanced, Self::CpuFirst, Self::Device];

    /// What may be asked for, in words.
    pub const EXPECTED: &'static str = "gpu_first, balanced, cpu_first or device";

    /// The pattern of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|pattern| pattern.name() == name)
    }

    /// The name as the option's value.
    pub fn name(self) -> &'static str {
        match self {
            Self::GpuFirst => "gpu_first",
            Self::Balanced => "balanced",
            Self::CpuFirst => "cpu_first",
            Self::Device => "device",
        }
    }
}

/// Our own options. [`Options::default`] is what holds where a key is not given.
#[derive(Clone, PartialEq, Debug)]
pub struct Options {
    /// `use_uvm`: this allocator is the process's CUDA allocator.
    pub enabled: bool,
    /// `uvm_oversubscription_ratio`: the capacity is at most this many times the device's memory. Positive and finite.
    pub oversubscription_ratio: f64,
    /// `uvm_access_pattern`: the default pool's placement.
    pub access_pattern: AccessPattern,
    /// `uvm_prefetch`: populate memory ahead of its use.
    pub prefetch: bool,
    /// `uvm_prefetch_threshold_mb` in bytes: allocations of at least this size are not prefetched. `None`: all are.
    pub prefetch_threshold: Option<u64>,
    /// `uvm_device_limit_mb` in bytes: soft limit on what this process keeps on the GPU. `None`: the device's memory
    /// less a headroom.
    pub device_limit: Option<u64>,
    /// `uvm_host_reserve_mb` in bytes: host memory left to everyone else. `None`: the larger of 2048 MiB and 5 %.
    pub host_reserve: Option<u64>,
    /// `uvm_stage1_threshold`: when free device memory falls under this share (0 to 1), cached blocks are given back
    /// before the pool grows.
    pub stage1_threshold: f64,
    /// `uvm_stage1_min_bytes`: the same, as a number of bytes. 0: off.
    pub stage1_min_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            enabled: false,
            oversubscription_ratio: 5.0,
            access_pattern: AccessPattern::GpuFirst,
            prefetch: true,
            prefetch_threshold: None,
            device_limit: None,
            host_reserve: None,
            stage1_threshold: 0.10,
            stage1_min_bytes: 0,
        }
    }
}

impl Options {
    /// All our keys.
    pub const KEYS: [&'static str; 9] = [
        "use_uvm",
        "uvm_oversubscription_ratio",
        "uvm_access_pattern",
        "uvm_prefetch",
        "uvm_prefetch_threshold_mb",
        "uvm_device_limit_mb",
        "uvm_host_reserve_mb",
        "uvm_stage1_threshold",
        "uvm_stage1_min_bytes",
    ];

    /// Sets one option.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`]: names the key, the value and what is allowed. The options are then as they were.
    pub fn set(&mut self, key: &str, value: &str) -> Result<()> {
        match key {
            "use_uvm" => self.enabled = boolean(key, value)?,
            "uvm_oversubscription_ratio" => {
                self.oversubscription_ratio =
                    number(key, value, "a positive finite number", |ratio| ratio > 0.0 && ratio.is_finite())?;
            }
            "uvm_access_pattern" => {
                self.access_pattern =
                    AccessPattern::named(value).ok_or_else(|| refused(key, value, AccessPattern::EXPECTED))?;
            }
            "uvm_prefetch" => self.prefetch = boolean(key, value)?,
            "uvm_prefetch_threshold_mb" => {
                let bytes = mebibytes(key, value, "a whole number of MiB, or 0 for no threshold")?;
                self.prefetch_threshold = (bytes > 0).then_some(bytes);
            }
            "uvm_device_limit_mb" => {
                let allowed = "a whole number of MiB, at least 1";
                let bytes = mebibytes(key, value, allowed)?;
                if bytes == 0 {
                    return Err(refused(key, value, allowed));
                }
                self.device_limit = Some(bytes);
            }
            "uvm_host_reserve_mb" => self.host_reserve = Some(mebibytes(key, value, "a whole number of MiB")?),
            "uvm_stage1_threshold" => {
                self.stage1_threshold =
                    number(key, value, "a number from 0 to 1", |share| (0.0..=1.0).contains(&share))?;
            }
            "uvm_stage1_min_bytes" => self.stage1_min_bytes = whole(key, value, "a whole number of bytes")?,
            _ => {
                return Err(Error::InvalidArgument(format!(
                    "{key}: unknown option (value '{value}'): the options of the uvm allocator are {}",
                    Self::KEYS.join(", ")
                )));
            }
        }
        Ok(())
    }
}

impl FromStr for Options {
    type Err = Error;

    /// Reads what [`fmt::Display`] writes: our keys only, and nothing between them but commas.
    fn from_str(printed: &str) -> Result<Self> {
        let mut options = Self::default();
        for item in printed.split(',').filter(|item| !item.is_empty()) {
            let (key, value) = item.split_once(':').unwrap_or((item, ""));
            options.set(key, value)?;
        }
        Ok(options)
    }
}

impl fmt::Display for Options {
    /// The options as a settings string; [`Options::from_str`] reads it back.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "use_uvm:{},uvm_oversubscription_ratio:{},uvm_access_pattern:{},uvm_prefetch:{},\
             uvm_prefetch_threshold_mb:{}",
            python_bool(self.enabled),
            self.oversubscription_ratio,
            self.access_pattern.name(),
            python_bool(self.prefetch),
            self.prefetch_threshold.unwrap_or(0) / MIB,
        )?;
        if let Some(bytes) = self.device_limit {
            write!(f, ",uvm_device_limit_mb:{}", bytes / MIB)?;
        }
        if let Some(bytes) = self.host_reserve {
            write!(f, ",uvm_host_reserve_mb:{}", bytes / MIB)?;
        }
        write!(f, ",uvm_stage1_threshold:{},uvm_stage1_min_bytes:{}", self.stage1_threshold, self.stage1_min_bytes)
    }
}

/// PyTorch's own settings that this allocator honours, as PyTorch has parsed and checked them.
#[derive(Clone, PartialEq, Debug)]
pub struct NativeOptions {
    /// `max_split_size_mb` in bytes: larger blocks are not split. [`u64::MAX`]: off.
    pub max_split_size: u64,
    /// `max_non_split_rounding_mb` in bytes: how much larger than the request an unsplit block may be.
    pub max_non_split_rounding_size: u64,
    /// `garbage_collection_threshold`: share of the allowed memory above which old cached blocks are freed. 0: off.
    pub garbage_collection_threshold: f64,
    /// `roundup_power2_divisions` for sizes from 1 MiB (or less) to 32 GiB (or more), by powers of two. 0 and 1: off.
    pub roundup_power2_divisions: [u64; 16],
    /// `expandable_segments`: managed segments grow with and without it; with it, those of private pools do too.
    pub expandable_segments: bool,
    /// `large_segment_size_mb` in bytes: how much the large pool takes at a time.
    pub large_segment_size: u64,
    /// `throw_on_cudamalloc_oom`: observers of allocations that are refused before CUDA is asked want to be told.
    pub throw_on_oom: bool,
}

impl Default for NativeOptions {
    fn default() -> Self {
        Self {
            max_split_size: u64::MAX,
            max_non_split_rounding_size: 20 * MIB,
            garbage_collection_threshold: 0.0,
            roundup_power2_divisions: [0; 16],
            expandable_segments: false,
            large_segment_size: LARGE_STEP,
            throw_on_oom: false,
        }
    }
}

fn refused(key: &str, value: &str, allowed: &str) -> Error {
    Error::InvalidArgument(format!("{key}: '{value}' is not allowed: expected {allowed}"))
}

fn boolean(key: &str, value: &str) -> Result<bool> {
    match value {
        "True" => Ok(true),
        "False" => Ok(false),
        _ => Err(refused(key, value, "True or False")),
    }
}

fn python_bool(value: bool) -> &'static str {
    if value { "True" } else { "False" }
}

fn number(key: &str, value: &str, allowed: &str, is_allowed: impl Fn(f64) -> bool) -> Result<f64> {
    value.parse().ok().filter(|number| is_allowed(*number)).ok_or_else(|| refused(key, value, allowed))
}

fn whole(key: &str, value: &str, allowed: &str) -> Result<u64> {
    value.parse().map_err(|_| refused(key, value, allowed))
}

fn mebibytes(key: &str, value: &str, allowed: &str) -> Result<u64> {
    whole(key, value, allowed)?.checked_mul(MIB).ok_or_else(|| refused(key, value, allowed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(printed: &str) -> String {
        match printed.parse::<Options>() {
            Err(Error::InvalidArgument(message)) => message,
            other => panic!("{printed}: expected an error, got {other:?}"),
        }
    }

    #[test]
    fn every_key_is_read() {
        let options: Options = "use_uvm:True,uvm_oversubscription_ratio:2.5,uvm_access_pattern:cpu_first,\
             uvm_prefetch:False,uvm_prefetch_threshold_mb:2048,uvm_device_limit_mb:512,uvm_host_reserve_mb:0,\
             uvm_stage1_threshold:0.15,uvm_stage1_min_bytes:10737418240"
            .parse()
            .unwrap();
        assert_eq!(
            options,
            Options {
                enabled: true,
                oversubscription_ratio: 2.5,
                access_pattern: AccessPattern::CpuFirst,
                prefetch: false,
                prefetch_threshold: Some(2048 * MIB),
                device_limit: Some(512 * MIB),
                host_reserve: Some(0),
                stage1_threshold: 0.15,
                stage1_min_bytes: 10_737_418_240,
            }
        );
    }

    #[test]
    fn a_bad_value_is_named_with_what_is_allowed() {
        for value in ["abc", "0", "-1", "NaN", "inf", "-inf", "", "1e999", "5.0x"] {
            assert_eq!(
                message(&format!("uvm_oversubscription_ratio:{value}")),
                format!("uvm_oversubscription_ratio: '{value}' is not allowed: expected a positive finite number")
            );
        }
        assert_eq!(message("use_uvm:maybe"), "use_uvm: 'maybe' is not allowed: expected True or False");
        assert_eq!(message("use_uvm"), "use_uvm: '' is not allowed: expected True or False");
        assert_eq!(message("use_uvm:True:True"), "use_uvm: 'True:True' is not allowed: expected True or False");
        assert_eq!(message("uvm_prefetch:true"), "uvm_prefetch: 'true' is not allowed: expected True or False");
        assert_eq!(
            message("uvm_access_pattern:gpu"),
            "uvm_access_pattern: 'gpu' is not allowed: expected gpu_first, balanced, cpu_first or device"
        );
        assert_eq!(
            message("uvm_device_limit_mb:0"),
            "uvm_device_limit_mb: '0' is not allowed: expected a whole number of MiB, at least 1"
        );
        assert!(message("uvm_host_reserve_mb:-1").contains("'-1' is not allowed"));
        assert!(message("uvm_host_reserve_mb:18446744073709551615").contains("is not allowed"), "bytes beyond 2^64");
        assert!(message("uvm_stage1_threshold:1.5").contains("expected a number from 0 to 1"));
        assert!(message("uvm_stage1_min_bytes:1.5").contains("expected a whole number of bytes"));
    }

    #[test]
    fn an_unknown_key_lists_the_known_ones() {
        let message = message("uvm_oversubscription:5");
        assert!(message.starts_with("uvm_oversubscription: unknown option (value '5')"), "{message}");
        assert!(Options::KEYS.iter().all(|key| message.contains(key)), "{message}");
    }

    #[test]
    fn a_failed_set_changes_nothing() {
        let mut options = Options::default();
        assert!(options.set("uvm_device_limit_mb", "0").is_err());
        assert!(options.set("uvm_stage1_threshold", "NaN").is_err());
        assert_eq!(options, Options::default());
    }

    prop_compose! {
        fn any_options()(
            enabled: bool,
            oversubscription_ratio in prop::num::f64::POSITIVE.prop_filter("finite", |r| r.is_finite() && *r > 0.0),
            access_pattern in prop::sample::select(&AccessPattern::ALL),
            prefetch: bool,
            prefetch_threshold in prop::option::of(1..1_u64 << 44),
            device_limit in prop::option::of(1..1_u64 << 44),
            host_reserve in prop::option::of(0..1_u64 << 44),
            stage1_threshold in 0.0..=1.0,
            stage1_min_bytes: u64,
        ) -> Options {
            let bytes = |mib: Option<u64>| mib.map(|mib| mib * MIB);
            Options {
                enabled,
                oversubscription_ratio,
                access_pattern,
                prefetch,
                prefetch_threshold: bytes(prefetch_threshold),
                device_limit: bytes(device_limit),
                host_reserve: bytes(host_reserve),
                stage1_threshold,
                stage1_min_bytes,
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(options in any_options()) {
            prop_assert_eq!(options.to_string().parse::<Options>().unwrap(), options);
        }
    }
}
