//! What came to pass in a program.

use super::ops::{Op, WEIGHTS};
use std::collections::BTreeMap;
use std::fmt;

/// How often what came to pass.
#[derive(Default)]
pub struct Counts {
    pub(super) operations: u64,
    pub(super) done: BTreeMap<Op, u64>,
    pub(super) out_of_memory: u64,
    pub(super) faults: u64,
    /// How often the allocator moved live memory out, and gave cached memory back for want of room.
    pub(super) moves_out: u64,
    pub(super) reclamations: u64,
}

impl Counts {
    /// What a program that was alone should have done, and never did.
    pub fn missing(&self) -> Vec<String> {
        let expected = WEIGHTS.iter().map(|&(_, op)| op).filter(|op| !matches!(op, Op::Give | Op::Take));
        let mut missing: Vec<String> =
            expected.filter(|op| !self.done.contains_key(op)).map(|op| format!("{op:?}")).collect();
        for (what, count) in [
            ("OutOfMemory", self.out_of_memory),
            ("Fault", self.faults),
            ("Reclamation", self.reclamations),
            ("MoveOut", self.moves_out),
        ] {
            if count == 0 {
                missing.push(what.into());
            }
        }
        missing
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} operations, out of memory {} times, {} planted faults struck, {} reclamations, {} moves out;",
            self.operations, self.out_of_memory, self.faults, self.reclamations, self.moves_out
        )?;
        self.done.iter().try_for_each(|(op, count)| write!(f, " {op:?} {count}"))
    }
}
