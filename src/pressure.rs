//! How short of device memory a process is, and which live memory is evicted or promoted: decides, calls nothing.

use rustc_hash::FxHashMap;

/// The stages of a device that fills up.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum Stage {
    /// There is room.
    #[default]
    Ample,
    /// Less than the threshold is free: cached memory is given back before the device is populated further.
    Short,
    /// The limit is met: what lives long is evicted to host memory, or new memory is placed there.
    Full,
}

/// The stage, with hysteresis: one is left only when what is free rises well above where it began.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pressure {
    stage: Stage,
}

impl Pressure {
    /// The stage.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Where a device stands with `resident` bytes of `limit` populated and `more` wanted. `keep` is the threshold of
    /// the options, in bytes. Answers whether the stage has changed.
    pub fn observe(&mut self, limit: u64, resident: u64, more: u64, keep: u64) -> bool {
        let wanted = resident.saturating_add(more);
        let free = limit.saturating_sub(wanted);
        let stage = if wanted > limit || (self.stage == Stage::Full && free < keep / 2) {
            Stage::Full
        } else if free < keep || (self.stage > Stage::Ample && free < leave(limit, keep)) {
            Stage::Short
        } else {
            Stage::Ample
        };
        let changed = stage != self.stage;
        self.stage = stage;
        changed
    }

    /// How many bytes cached memory should leave free.
    pub fn margin(&self, limit: u64, keep: u64) -> u64 {
        if self.stage == Stage::Ample { keep } else { leave(limit, keep) }
    }

    /// How many bytes may come to the device without it being short again.
    pub fn headroom(limit: u64, resident: u64, keep: u64) -> u64 {
        limit.saturating_sub(resident).saturating_sub(leave(limit, keep))
    }
}

/// So many bytes must be free before the device is called ample again: half as much again as the threshold, but no more
/// than there can be.
fn leave(limit: u64, keep: u64) -> u64 {
    keep.saturating_add(keep / 2).min(limit.max(keep))
}

/// A live allocation on the device that may be evicted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Resident {
    /// Its first byte.
    pub address: u64,
    /// How many bytes the program had freed in all when it was handed out.
    pub born: u64,
    /// How many bytes of it lie on the device, in whole pages.
    pub bytes: u64,
}

/// Which live allocations are evicted from the device to host memory, and how much of each.
///
/// Programs that train or infer touch what lives long in turns, once a step: of such memory whatever is evicted is
/// needed again, and the least recently used is needed next. So what came first stays (weights), and what came last
/// goes (optimizer state, caches of keys and values); what lives short (activations) stays by all means.
///
/// The clock is the bytes that the program has freed, so that time passes where memory comes and goes, and stands still
/// while a model is loaded. An allocation lives long when twice the device limit was freed since: few activations see
/// that, and where they do, evicting them was premature and the age demanded grows. Less would do for inference, but in
/// training what should go, the optimizer's state, is only made at the end of the first step.
#[derive(Clone, Copy, Debug)]
pub struct EvictionPolicy {
    /// The age demanded, in device limits.
    limits: u64,
    /// Not before so many bytes were freed in all: the last search found too little, or more memory was placed in the
    /// host.
    not_before: u64,
}

impl Default for EvictionPolicy {
    fn default() -> Self {
        Self { limits: YOUNGEST, not_before: 0 }
    }
}

/// An eviction, for the question whether it was premature.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Eviction {
    /// How many bytes had been freed in all.
    at: u64,
    /// The age demanded then, as in [`EvictionPolicy`].
    limits: u64,
}

/// Allocations live long that are older than so many times the device limit, in bytes freed since.
const YOUNGEST: u64 = 2;
/// How far premature evictions raise that.
const OLDEST: u64 = YOUNGEST << 5;
/// After a search that found too little, this part of the device limit is freed before the next.
const PAUSE: u64 = 16;

impl EvictionPolicy {
    /// The age in bytes freed since from which allocations are long-lived.
    pub fn age(&self, limit: u64) -> u64 {
        limit.saturating_mul(self.limits)
    }

    /// Whether it is time to search.
    pub fn may_search(&self, clock: u64) -> bool {
        clock >= self.not_before
    }

    /// More memory was placed in the host because the device limit was met. What is new in the program may be what
    /// should go, and is too young to tell: nothing moves before it is old enough.
    pub fn overflowed(&mut self, clock: u64, limit: u64) {
        self.not_before = clock.saturating_add(self.age(limit));
    }

    /// Which of the allocations make room for `wanted` bytes: addresses, and bytes of each. None, where that is not
    /// enough.
    pub fn choose(&mut self, mut all: Vec<Resident>, clock: u64, limit: u64, wanted: u64) -> Vec<(u64, u64)> {
        all.retain(|one| clock.saturating_sub(one.born) >= self.age(limit));
        if all.iter().map(|one| one.bytes).sum::<u64>() < wanted {
            self.not_before = clock.saturating_add(limit / PAUSE);
            return Vec::new();
        }
        all.sort_unstable_by_key(|one| std::cmp::Reverse((one.born, one.address)));
        let mut missing = wanted;
        let take = |one: Resident| {
            let bytes = one.bytes.min(missing);
            missing -= bytes;
            (bytes > 0).then_some((one.address, bytes))
        };
        all.into_iter().map_while(take).collect()
    }

    /// An eviction now.
    pub fn evicted(&self, clock: u64) -> Eviction {
        Eviction { at: clock, limits: self.limits }
    }

    /// An evicted allocation is freed. Answers whether that was so soon that it had better stayed: then more age is
    /// asked for, once for all that was evicted at the same age.
    pub fn freed(&mut self, eviction: Eviction, clock: u64, limit: u64) -> bool {
        let premature = clock.saturating_sub(eviction.at) < self.age(limit);
        if premature && eviction.limits == self.limits {
            self.limits = (self.limits * 2).min(OLDEST);
        }
        premature
    }
}

/// When live memory that was evicted is promoted: comes back to the device.
///
/// It may at once, when the program has given memory back and the device is ample. But one that empties its cache in
/// each step needs the room again in the next: where what came back had to go again before it had lived long, it waits,
/// and each time twice as long as the last.
#[derive(Clone, Copy, Debug, Default)]
pub struct PromotionPolicy {
    /// How many quarters of the device limit are freed between an eviction and the next promotion.
    quarters: u64,
    /// When memory was last evicted, and last promoted, in bytes freed.
    out: Option<u64>,
    back: Option<u64>,
}

/// The wait between an eviction and a promotion is at most so many quarters of the device limit: as long as [`OLDEST`].
const LONGEST: u64 = 4 * OLDEST;

impl PromotionPolicy {
    /// Whether live memory may be promoted.
    pub fn may_promote(&self, clock: u64, limit: u64) -> bool {
        self.out.is_none_or(|out| clock.saturating_sub(out) >= (limit / 4).saturating_mul(self.quarters))
    }

    /// Live memory was promoted.
    pub fn promoted(&mut self, clock: u64) {
        self.back = Some(clock);
    }

    /// Live memory was evicted.
    pub fn evicted(&mut self, clock: u64, limit: u64) {
        if self.back.take().is_some_and(|back| clock.saturating_sub(back) < limit.saturating_mul(YOUNGEST)) {
            self.quarters = (self.quarters * 2).clamp(1, LONGEST);
        }
        self.out = Some(clock);
    }
}

/// What is known about evictions on one device.
#[derive(Default)]
pub struct Evictions {
    /// How short of device memory it is.
    pub pressure: Pressure,
    /// Which live memory is evicted.
    pub policy: EvictionPolicy,
    /// When it is promoted.
    pub promotion: PromotionPolicy,
    /// Evicted live allocations, by address.
    evicted: FxHashMap<u64, Eviction>,
}

impl Evictions {
    /// A live allocation was evicted, some of it or all.
    pub fn evicted(&mut self, address: u64, clock: u64) {
        self.evicted.entry(address).or_insert(self.policy.evicted(clock));
    }

    /// A live allocation is freed. Answers whether it was evicted too soon before.
    pub fn freed(&mut self, address: u64, clock: u64, limit: u64) -> bool {
        self.evicted.remove(&address).is_some_and(|eviction| self.policy.freed(eviction, clock, limit))
    }

    /// An allocation is not to be promoted: all of it is on the device again, or the program wants it elsewhere.
    pub fn forget(&mut self, address: u64) {
        self.evicted.remove(&address);
    }

    /// The evicted allocations.
    pub fn addresses(&self) -> impl ExactSizeIterator<Item = u64> + '_ {
        self.evicted.keys().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_is_left_later_than_it_is_entered() {
        let mut pressure = Pressure::default();
        let mut stages = |resident, more| {
            pressure.observe(100, resident, more, 20);
            pressure.stage()
        };
        assert_eq!(stages(80, 0), Stage::Ample);
        assert_eq!(stages(80, 1), Stage::Short);
        assert_eq!(stages(71, 0), Stage::Short, "not before 30 are free");
        assert_eq!(stages(70, 0), Stage::Ample);
        assert_eq!(stages(71, 0), Stage::Ample);
        assert_eq!(stages(90, 11), Stage::Full);
        assert_eq!(stages(91, 0), Stage::Full);
        assert_eq!(stages(90, 0), Stage::Short);
        assert_eq!(stages(95, 0), Stage::Short, "full only at the limit");
        assert_eq!(stages(0, 0), Stage::Ample);
        assert!(pressure.observe(100, 200, 0, 20) && !pressure.observe(100, 200, 0, 20));
    }

    #[test]
    fn more_is_kept_free_while_memory_is_short() {
        let mut pressure = Pressure::default();
        assert_eq!(pressure.margin(100, 20), 20);
        pressure.observe(100, 90, 0, 20);
        assert_eq!(pressure.margin(100, 20), 30);
        assert_eq!(
            (Pressure::headroom(100, 60, 20), Pressure::headroom(100, 70, 20), Pressure::headroom(100, 120, 20)),
            (10, 0, 0)
        );
        // A threshold that can hardly be reached can be left.
        pressure.observe(100, 50, 0, 90);
        assert_eq!((pressure.stage(), pressure.margin(100, 90)), (Stage::Short, 100));
        pressure.observe(100, 0, 0, 90);
        assert_eq!(pressure.stage(), Stage::Ample);
        // Without a threshold there are two stages.
        pressure.observe(100, 100, 0, 0);
        assert_eq!(pressure.stage(), Stage::Ample);
        pressure.observe(100, 100, 1, 0);
        assert_eq!(pressure.stage(), Stage::Full);
    }

    fn resident(address: u64, born: u64, bytes: u64) -> Resident {
        Resident { address, born, bytes }
    }

    #[test]
    fn the_youngest_of_the_long_lived_goes() {
        let all = vec![resident(1, 0, 40), resident(2, 500, 30), resident(3, 900, 30), resident(4, 400, 10)];
        let mut policy = EvictionPolicy::default();
        // The activation at 3 is too young; the weights at 1 stay as long as others are enough.
        assert_eq!(policy.choose(all.clone(), 1000, 100, 35), [(2, 30), (4, 5)]);
        assert_eq!(policy.choose(all.clone(), 1000, 100, 80), [(2, 30), (4, 10), (1, 40)]);
        assert_eq!(policy.choose(all.clone(), 1000, 100, 81), [], "half of the room is no room");
        assert!(!policy.may_search(1005) && policy.may_search(1006));
        assert_eq!(policy.choose(all, 1000, 400, 40), [(1, 40)], "what is long depends on the limit");
    }

    #[test]
    fn nothing_moves_before_what_is_new_is_known() {
        let mut policy = EvictionPolicy::default();
        policy.overflowed(1000, 100);
        assert!(!policy.may_search(1199) && policy.may_search(1200));
    }

    #[test]
    fn promotions_become_rarer_where_they_do_not_last() {
        let mut policy = PromotionPolicy::default();
        policy.evicted(1000, 100);
        assert!(policy.may_promote(1000, 100), "the first at once");
        policy.promoted(1000);
        policy.evicted(1200, 100);
        assert!(policy.may_promote(1200, 100), "it had been back for long");
        let mut waits = Vec::new();
        let mut clock = 2000;
        for _ in 0..12 {
            policy.promoted(clock);
            policy.evicted(clock + 10, 100);
            let wait = (0..).find(|wait| policy.may_promote(clock + 10 + wait, 100)).unwrap();
            waits.push(wait);
            clock += 10 + wait;
        }
        assert_eq!(waits, [25, 50, 100, 200, 400, 800, 1600, 3200, 6400, 6400, 6400, 6400]);
    }

    #[test]
    fn a_premature_eviction_raises_the_age() {
        let mut policy = EvictionPolicy::default();
        let early = policy.evicted(1000);
        assert!(!policy.freed(early, 1200, 100), "it was out for long");
        assert_eq!(policy.age(100), 200);
        assert!(policy.freed(early, 1199, 100));
        assert_eq!(policy.age(100), 400);
        assert!(policy.freed(early, 1199, 100), "what was moved with it says no more");
        assert_eq!(policy.age(100), 400);
        for _ in 0..100 {
            policy.freed(policy.evicted(0), 0, 100);
        }
        assert_eq!(policy.age(100), 6400, "bounded");
    }
}
