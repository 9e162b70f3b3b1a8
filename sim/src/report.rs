//! What happened on a machine, as one text that other programs read: `python -m torch_uvm simulate`, and tests.

use crate::fault::EntryPoint;
use crate::profile::{Profile, Schedule};
use crate::types::{Counters, Filled, Moved, Peak, Peaks, Populated, Traffic};
use std::collections::BTreeMap;
use std::fmt::Write;
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
    /// The members of a JSON object, without its braces, so that more can be put beside them. Sizes are bytes, times
    /// nanoseconds.
    #[must_use]
    pub fn json_members(&self) -> String {
        let profile = &self.profile;
        let schedule = match self.schedule {
            Schedule::Eager => "eager".to_owned(),
            Schedule::Late => "late".to_owned(),
            Schedule::Seeded(seed) => seed.to_string(),
        };
        let machine = object(&[
            ("device", text(profile.key)),
            ("device_name", text(profile.device_name)),
            ("devices", self.devices.to_string()),
            ("device_memory", profile.device_memory.to_string()),
            ("host_memory", profile.host_memory.to_string()),
            ("integrated", profile.integrated.to_string()),
            ("link_bytes_per_second", profile.link_bytes_per_second.to_string()),
            ("schedule", text(&schedule)),
        ]);
        let devices: Vec<_> = self.peaks.devices.iter().map(peak).collect();
        let peaks = object(&[
            ("devices", format!("[{}]", devices.join(", "))),
            ("host", peak(&self.peaks.host)),
            ("all", self.peaks.all.to_string()),
        ]);
        let Traffic { copies, faults, prefetches, evictions, remote } = &self.traffic;
        let causes = [
            ("copies", copies),
            ("faults", faults),
            ("prefetches", prefetches),
            ("evictions", evictions),
            ("remote", remote),
        ];
        let traffic = object(&causes.map(|(name, moves)| (name, moved(moves))));
        let Populated { prefetches, faults } = &self.populated;
        let populated = object(&[("prefetches", filled(prefetches)), ("faults", filled(faults))]);
        let calls: Vec<_> = self.calls.iter().map(|(call, count)| (call.driver_name(), count.to_string())).collect();
        let clock = object(&[("host_ns", self.host_ns.to_string()), ("device_ns", self.device_ns.to_string())]);
        members(&[
            ("machine", machine),
            ("peaks", peaks),
            ("counters", counters(&self.counters)),
            ("traffic", traffic),
            ("populated", populated),
            ("clock", clock),
            ("pending_operations", self.pending_operations.to_string()),
            ("calls", object(&calls)),
        ])
    }
}

/// Names a type's fields, all of them, with their values.
macro_rules! numbers {
    ($type:ident, $value:expr, $($field:ident),*) => {{
        let $type { $($field),* } = $value;
        object(&[$((stringify!($field), $field.to_string())),*])
    }};
}

fn counters(counters: &Counters) -> String {
    numbers!(
        Counters,
        counters,
        device_faults,
        host_faults,
        migrations,
        evictions,
        bytes_h2d,
        bytes_d2h,
        bytes_d2d,
        bytes_remote,
        populated_device,
        populated_host,
        discarded,
        slow_discard_writes,
        host_overcommitted,
        prefetch_skipped,
        operations,
        out_of_memory
    )
}

fn moved(moved: &Moved) -> String {
    numbers!(Moved, moved, count, bytes_h2d, bytes_d2h, bytes_d2d, nanoseconds)
}

fn filled(filled: &Filled) -> String {
    numbers!(Filled, filled, bytes_device, bytes_host, nanoseconds)
}

fn peak(peak: &Peak) -> String {
    numbers!(Peak, peak, managed, plain, total)
}

fn members(fields: &[(&str, String)]) -> String {
    let fields: Vec<_> = fields.iter().map(|(name, value)| format!("{}: {value}", text(name))).collect();
    fields.join(", ")
}

fn object(fields: &[(&str, String)]) -> String {
    format!("{{{}}}", members(fields))
}

/// A JSON string.
#[must_use]
pub fn text(text: &str) -> String {
    let mut quoted = String::from('"');
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            // The surrogates and everything beyond are allowed as they are; control characters are not.
            control if control < ' ' => {
                let _ = write!(quoted, "\\u{:04x}", control as u32);
            }
            _ => quoted.push(character),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_quoted() {
        assert_eq!(text("a\"b\\c\n\u{1}é"), r#""a\"b\\c\u000a\u0001é""#);
    }

    #[test]
    fn objects_are_joined() {
        assert_eq!(object(&[]), "{}");
        assert_eq!(object(&[("a", "1".into()), ("b", object(&[]))]), r#"{"a": 1, "b": {}}"#);
    }
}
