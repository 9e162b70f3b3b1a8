//! The allocator's options: our keys in `PYTORCH_CUDA_ALLOC_CONF` (`use_uvm`, `uvm_…`).
//!
//! Each option is one row of the table below. The options' types, their parser and their printer come from it, and so do
//! `torch_uvm.config()` and the table of the README ([`Options::table`]). How our keys are found among PyTorch's is in
//! [`settings_string`](crate::settings_string).

mod native;
mod values;

pub use native::NativeOptions;
pub use values::AccessPattern;

use crate::error::{Error, Result};
use std::fmt;
use std::str::FromStr;
use values::{Bytes, Mib, MibAtLeastOne, MibOrOff, Pattern, Ratio, Share, Switch, Value};

/// What is told of an option.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OptionInfo {
    /// Its key.
    pub key: &'static str,
    /// The type of its value in Python.
    pub python_type: &'static str,
    /// What holds where the key is not given, in words.
    pub default: &'static str,
    /// What it does, in words.
    pub meaning: String,
}

/// Makes [`Options`] of its rows: `key: field as kind of value = default, "the default in words", "the meaning";`.
macro_rules! options {
    ($($key:ident: $field:ident as $kind:ident = $default:expr, $shown:literal, $meaning:expr;)*) => {
        /// Our own options. [`Options::default`] is what holds where a key is not given.
        #[derive(Clone, PartialEq, Debug)]
        pub struct Options {
            $(#[doc = concat!("`", stringify!($key), "`. Default: ", $shown, ".")] pub $field: <$kind as Value>::Held,)*
        }

        impl Default for Options {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }

        impl Options {
            /// All our keys.
            pub const KEYS: &'static [&'static str] = &[$(stringify!($key),)*];

            /// What is told of each.
            pub fn table() -> Vec<OptionInfo> {
                vec![$(OptionInfo {
                    key: stringify!($key),
                    python_type: <$kind as Value>::PYTHON_TYPE,
                    default: $shown,
                    meaning: $meaning.into(),
                },)*]
            }

            /// Sets one option.
            ///
            /// # Errors
            /// [`Error::InvalidArgument`]: names the key, the value and what is allowed. The options are then as they were.
            pub fn set(&mut self, key: &str, value: &str) -> Result<()> {
                match key {
                    $(stringify!($key) => self.$field = parse::<$kind>(key, value)?,)*
                    _ => return Err(unknown(key, value)),
                }
                Ok(())
            }

            /// Each option and its value as text; `None` where the value follows from the machine.
            fn printed(&self) -> Vec<(&'static str, Option<String>)> {
                vec![$((stringify!($key), <$kind as Value>::print(&self.$field)),)*]
            }
        }

        #[cfg(test)]
        fn any_options() -> impl proptest::strategy::Strategy<Value = Options> {
            use proptest::prelude::*;
            // A tuple strategy takes ten at the most: each option goes over the one before.
            let options = Just(Options::default()).boxed();
            $(let options = (options, <$kind as Value>::any())
                .prop_map(|(options, value)| Options { $field: value, ..options }).boxed();)*
            options
        }
    };
}

options! {
    use_uvm: enabled as Switch = false, "`False`", "this backend";
    uvm_oversubscription_ratio: oversubscription_ratio as Ratio = 5.0, "`5.0`",
        "the capacity is at most this many times the device's memory, and at most the device's memory plus the host memory \
         that is left, less the reserve";
    uvm_access_pattern: access_pattern as Pattern = AccessPattern::GpuFirst, "`gpu_first`", AccessPattern::meanings();
    uvm_prefetch: prefetch as Switch = true, "`True`", "populate memory ahead of its use";
    uvm_prefetch_threshold_mb: prefetch_threshold as MibOrOff = None, "`0` (off)",
        "allocations of at least this size are not populated ahead";
    uvm_device_limit_mb: device_limit as MibAtLeastOne = None, "the device's memory less 1/16 (at most 1 GiB)",
        "soft limit on the bytes this process keeps on the GPU";
    uvm_host_reserve_mb: host_reserve as Mib = None, "the larger of 2048 and 5 %", "host memory left to everyone else";
    uvm_stage1_threshold: stage1_threshold as Share = 0.10, "`0.10`",
        "when less than this share of the device limit is free, cached memory is given back before the device is populated \
         further, until half as much again is free";
    uvm_stage1_min_bytes: stage1_min_bytes as Bytes = 0, "`0`", "the same, as a number of bytes";
}

impl fmt::Display for Options {
    /// The options as a settings string; [`Options::from_str`] reads it back.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = self.printed().into_iter().filter_map(|(key, value)| Some(format!("{key}:{}", value?)));
        f.write_str(&known.collect::<Vec<_>>().join(","))
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

fn parse<V: Value>(key: &str, value: &str) -> Result<V::Held> {
    V::parse(value)
        .ok_or_else(|| Error::InvalidArgument(format!("{key}: '{value}' is not allowed: expected {}", V::allowed())))
}

fn unknown(key: &str, value: &str) -> Error {
    Error::InvalidArgument(format!(
        "{key}: unknown option (value '{value}'): the options of the uvm allocator are {}",
        Options::KEYS.join(", ")
    ))
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
    fn each_option_is_read_and_printed() {
        let given = "use_uvm:True,uvm_oversubscription_ratio:2.5,uvm_access_pattern:cpu_first,uvm_prefetch:False,\
                     uvm_prefetch_threshold_mb:2048,uvm_device_limit_mb:512,uvm_host_reserve_mb:0,\
                     uvm_stage1_threshold:0.15,uvm_stage1_min_bytes:10737418240";
        let options: Options = given.parse().unwrap();
        let printed = options.to_string();
        assert!(given.split(',').all(|item| printed.split(',').any(|other| other == item)), "{printed}");
        let mib = 1 << 20;
        assert!(options.enabled && !options.prefetch && options.access_pattern == AccessPattern::CpuFirst);
        assert_eq!((options.oversubscription_ratio, options.stage1_threshold), (2.5, 0.15));
        assert_eq!((options.prefetch_threshold, options.device_limit), (Some(2048 * mib), Some(512 * mib)));
        assert_eq!((options.host_reserve, options.stage1_min_bytes), (Some(0), 10_737_418_240));
    }

    #[test]
    fn defaults_that_are_values_are_printed_so() {
        let printed = Options::default().printed();
        for (info, (key, value)) in Options::table().iter().zip(printed) {
            assert_eq!(info.key, key);
            let shown = info.default.strip_prefix('`').and_then(|text| text.split('`').next());
            match (shown, value) {
                (None, None) => {}
                (Some(shown), Some(value)) => {
                    let mut options = Options::default();
                    options.set(key, shown).unwrap();
                    assert_eq!(options, Options::default(), "{key}: {shown} is not {value}");
                }
                other => panic!("{key}: {other:?}"),
            }
        }
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
        let message_of_pattern = message("uvm_access_pattern:gpu");
        assert!(
            message_of_pattern.starts_with("uvm_access_pattern: 'gpu' is not allowed: expected gpu_first, balanced")
        );
        assert!(AccessPattern::ALL.iter().all(|pattern| message_of_pattern.contains(pattern.name())));
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

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(options in any_options()) {
            prop_assert_eq!(options.to_string().parse::<Options>().unwrap(), options);
        }
    }
}
