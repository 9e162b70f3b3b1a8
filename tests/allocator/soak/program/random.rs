//! A program's choices, which follow from its seed.

use fastrand::Rng;

pub(super) struct Random(Rng);

/// A number that looks random and is always the same for the same number.
pub(super) fn mix(number: u64) -> u64 {
    Rng::with_seed(number).u64(..)
}

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(Rng::with_seed(seed))
    }

    /// Below `bound`, which is not 0.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.0.u64(..bound)
    }

    pub(super) fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    pub(super) fn between(&mut self, low: u64, high: u64) -> u64 {
        self.0.u64(low..high)
    }

    pub(super) fn of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len() as u64) as usize]
    }
}
