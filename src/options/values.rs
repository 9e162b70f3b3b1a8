//! The kinds of values that options have: how each is read, printed and held.

/// A kind of value.
pub trait Value {
    /// What is held of it.
    type Held;
    /// The type of the value in Python.
    const PYTHON_TYPE: &'static str;

    /// What may be written, in words.
    fn allowed() -> String;

    /// Reads it; `None` where it is not allowed.
    fn parse(text: &str) -> Option<Self::Held>;

    /// Prints it so that [`Value::parse`] reads it back; `None` where no number was set.
    fn print(held: &Self::Held) -> Option<String>;

    /// Any that can be printed and read back.
    #[cfg(test)]
    fn any() -> proptest::strategy::BoxedStrategy<Self::Held>;
}

#[cfg(test)]
use proptest::prelude::{Strategy, any, prop};

const MIB: u64 = 1 << 20;

/// On or off.
pub struct Switch;

impl Value for Switch {
    type Held = bool;
    const PYTHON_TYPE: &'static str = "bool";

    fn allowed() -> String {
        "True or False".to_owned()
    }

    fn parse(text: &str) -> Option<bool> {
        match text {
            "True" => Some(true),
            "False" => Some(false),
            _ => None,
        }
    }

    fn print(held: &bool) -> Option<String> {
        Some(if *held { "True" } else { "False" }.to_owned())
    }

    #[cfg(test)]
    fn any() -> proptest::strategy::BoxedStrategy<bool> {
        any::<bool>().boxed()
    }
}

/// How many times as much.
pub struct Ratio;

impl Value for Ratio {
    type Held = f64;
    const PYTHON_TYPE: &'static str = "float";

    fn allowed() -> String {
        "a positive finite number".to_owned()
    }

    fn parse(text: &str) -> Option<f64> {
        text.parse().ok().filter(|ratio: &f64| *ratio > 0.0 && ratio.is_finite())
    }

    fn print(held: &f64) -> Option<String> {
        Some(held.to_string())
    }

    #[cfg(test)]
    fn any() -> proptest::strategy::BoxedStrategy<f64> {
        prop::num::f64::POSITIVE.prop_filter("finite", |ratio| ratio.is_finite() && *ratio > 0.0).boxed()
    }
}

/// A part of a whole.
pub struct Share;

impl Value for Share {
    type Held = f64;
    const PYTHON_TYPE: &'static str = "float";

    fn allowed() -> String {
        "a number from 0 to 1".to_owned()
    }

    fn parse(text: &str) -> Option<f64> {
        text.parse().ok().filter(|share| (0.0..=1.0).contains(share))
    }

    fn print(held: &f64) -> Option<String> {
        Some(held.to_string())
    }

    #[cfg(test)]
    fn any() -> proptest::strategy::BoxedStrategy<f64> {
        (0.0..=1.0).boxed()
    }
}

/// A number of bytes.
pub struct Bytes;

impl Value for Bytes {
    type Held = u64;
    const PYTHON_TYPE: &'static str = "int";

    fn allowed() -> String {
        "a whole number of bytes".to_owned()
    }

    fn parse(text: &str) -> Option<u64> {
        text.parse().ok()
    }

    fn print(held: &u64) -> Option<String> {
        Some(held.to_string())
    }

    #[cfg(test)]
    fn any() -> proptest::strategy::BoxedStrategy<u64> {
        any::<u64>().boxed()
    }
}

/// A size in MiB, held in bytes. `None`: it follows from the machine.
pub struct Mib;

impl Value for Mib {
    type Held = Option<u64>;
    const PYTHON_TYPE: &'static str = "int";

    fn allowed() -> String {
        "a whole number of MiB".to_owned()
    }

    fn parse(text: &str) -> Option<Option<u64>> {
        mib(text).map(Some)
    }

    fn print(held: &Option<u64>) -> Option<String> {
        held.map(|bytes| (bytes / MIB).to_string())
    }

    #[cfg(test)]
    fn any() -> proptest::strategy::BoxedStrategy<Option<u64>> {
        any_mib(0)
    }
}

/// A [`Mib`] that is not 0.
pub struct MibAtLeastOne;

impl Value for MibAtLeastOne {
    type Held = Option<u64>;
    const PYTHON_TYPE: &'static str = Mib::PYTHON_TYPE;

    fn allowed() -> String {
        format!("{}, at least 1", Mib::allowed())
    }

    fn parse(text: &str) -> Option<Option<u64>> {
        mib(text).filter(|bytes| *bytes > 0).map(Some)
    }

    fn print(held: &Option<u64>) -> Option<String> {
        Mib::print(held)
    }

    #[cfg(test)]
    fn any() -> proptest::strategy::BoxedStrategy<Option<u64>> {
        any_mib(1)
    }
}

/// A threshold in MiB, held in bytes. 0, held as `None`, is off.
pub struct MibOrOff;

impl Value for MibOrOff {
    type Held = Option<u64>;
    const PYTHON_TYPE: &'static str = Mib::PYTHON_TYPE;

    fn allowed() -> String {
        format!("{}, or 0 for no threshold", Mib::allowed())
    }

    fn parse(text: &str) -> Option<Option<u64>> {
        mib(text).map(|bytes| (bytes > 0).then_some(bytes))
    }

    fn print(held: &Option<u64>) -> Option<String> {
        Mib::print(&Some(held.unwrap_or(0)))
    }

    #[cfg(test)]
    fn any() -> proptest::strategy::BoxedStrategy<Option<u64>> {
        any_mib(1)
    }
}

fn mib(text: &str) -> Option<u64> {
    text.parse::<u64>().ok()?.checked_mul(MIB)
}

#[cfg(test)]
fn any_mib(least: u64) -> proptest::strategy::BoxedStrategy<Option<u64>> {
    prop::option::of((least..1_u64 << 44).prop_map(|mib| mib * MIB)).boxed()
}

/// Makes [`AccessPattern`] of its rows: `Variant = "name", "the meaning";`.
macro_rules! access_patterns {
    ($($variant:ident = $name:literal, $meaning:literal;)*) => {
        /// Where memory is placed (`uvm_access_pattern`, and the placement of a pool).
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum AccessPattern {
            $(#[doc = concat!("`", $name, "`: ", $meaning, ".")] $variant,)*
        }

        impl AccessPattern {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The name as the option's value.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            /// What it means, in words.
            pub fn meaning(self) -> &'static str {
                match self {
                    $(Self::$variant => $meaning,)*
                }
            }
        }
    };
}

access_patterns! {
    GpuFirst = "gpu_first", "on the GPU up to the device limit, then in host memory that the GPU reaches";
    Balanced = "balanced", "the driver decides at first use";
    CpuFirst = "cpu_first", "in host memory";
    Device = "device", "plain device memory, no oversubscription, can be shared between processes";
}

impl AccessPattern {
    /// The pattern of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|pattern| pattern.name() == name)
    }

    /// What may be asked for, in words.
    pub fn expected() -> String {
        let names: Vec<_> = Self::ALL.iter().map(|pattern| pattern.name()).collect();
        match names.split_last() {
            Some((last, others)) => format!("{} or {last}", others.join(", ")),
            None => String::new(),
        }
    }

    /// All of them with their meanings, in words.
    pub fn meanings() -> String {
        Self::ALL
            .iter()
            .map(|pattern| format!("`{}`: {}", pattern.name(), pattern.meaning()))
            .collect::<Vec<_>>()
            .join(". ")
    }
}

/// An [`AccessPattern`] by its name.
pub struct Pattern;

impl Value for Pattern {
    type Held = AccessPattern;
    const PYTHON_TYPE: &'static str = "str";

    fn allowed() -> String {
        AccessPattern::expected()
    }

    fn parse(text: &str) -> Option<AccessPattern> {
        AccessPattern::named(text)
    }

    fn print(held: &AccessPattern) -> Option<String> {
        Some(held.name().to_owned())
    }

    #[cfg(test)]
    fn any() -> proptest::strategy::BoxedStrategy<AccessPattern> {
        prop::sample::select(AccessPattern::ALL).boxed()
    }
}
