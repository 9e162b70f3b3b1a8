//! How short of device memory a process is, and who makes room: decides, calls nothing.

/// The stages of a device that fills up.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum Stage {
    /// There is room.
    #[default]
    Ample,
    /// Less than the threshold is free: cached memory is given back before the device is populated further.
    Short,
    /// The limit is met: what lives long moves out, or new memory is placed in host memory.
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

    /// Where a device stands with `resident` bytes of `limit` populated and `more` wanted. `keep` is the threshold of the
    /// options, in bytes. Answers whether the stage has changed.
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
}

/// So many bytes must be free before the device is called ample again: half as much again as the threshold, but no more than
/// there can be.
fn leave(limit: u64, keep: u64) -> u64 {
    keep.saturating_add(keep / 2).min(limit.max(keep))
}

/// A live allocation on the device that may move out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Resident {
    /// Its first byte.
    pub address: u64,
    /// How many bytes the program had freed in all when it was handed out.
    pub born: u64,
    /// How many bytes of it lie on the device, in whole pages.
    pub bytes: u64,
}

/// Which live allocations move out, and how much of each.
///
/// Programs that train or infer touch what lives long in turns, once a step: of such memory whatever is moved out is needed
/// again, and the least recently used is needed next. So what came first stays (weights), and what came last goes
/// (optimizer state, caches of keys and values); what lives short (activations) stays by all means.
///
/// The clock is the bytes that the program has freed, so that time passes where memory comes and goes, and stands still while
/// a model is loaded. An allocation lives long when twice the device limit was freed since: few activations see that, and where
/// they do, moving them is regretted and the age demanded grows.
#[derive(Clone, Copy, Debug)]
pub struct Movers {
    factor: u64,
    /// Not before so many bytes were freed in all: the last search found too little, or more memory was placed in the host.
    not_before: u64,
}

impl Default for Movers {
    fn default() -> Self {
        Self { factor: AGE, not_before: 0 }
    }
}

/// Allocations live long that are older than so many times the device limit, in bytes freed since.
const AGE: u64 = 2;
/// How far regrets raise that.
const OLDEST: u64 = AGE << 5;
/// After a search that found too little, this part of the device limit is freed before the next.
const PAUSE: u64 = 16;

impl Movers {
    /// The age in bytes freed since from which allocations are long-lived.
    pub fn age(&self, limit: u64) -> u64 {
        limit.saturating_mul(self.factor)
    }

    /// Whether it is time to search.
    pub fn may_search(&self, clock: u64) -> bool {
        clock >= self.not_before
    }

    /// More memory was placed in the host because the device limit was met. What is new in the program may be what should
    /// go, and is too young to tell: nothing moves before it is old enough.
    pub fn grew(&mut self, clock: u64, limit: u64) {
        self.not_before = clock.saturating_add(self.age(limit));
    }

    /// Which of the allocations make room for `wanted` bytes: addresses, and bytes of each. None, where that is not enough.
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

    /// An allocation that was moved out when `moved` bytes had been freed is freed now. Answers whether that was so
    /// soon that it had better stayed: then more age is asked for.
    pub fn freed(&mut self, moved: u64, clock: u64, limit: u64) -> bool {
        let regretted = clock.saturating_sub(moved) < self.age(limit);
        if regretted {
            self.factor = (self.factor * 2).min(OLDEST);
        }
        regretted
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
        let mut movers = Movers::default();
        // The activation at 3 is too young; the weights at 1 stay as long as others are enough.
        assert_eq!(movers.choose(all.clone(), 1000, 100, 35), [(2, 30), (4, 5)]);
        assert_eq!(movers.choose(all.clone(), 1000, 100, 80), [(2, 30), (4, 10), (1, 40)]);
        assert_eq!(movers.choose(all.clone(), 1000, 100, 81), [], "half of the room is no room");
        assert!(!movers.may_search(1005) && movers.may_search(1006));
        assert_eq!(movers.choose(all, 1000, 400, 40), [(1, 40)], "what is long depends on the limit");
    }

    #[test]
    fn nothing_moves_before_what_is_new_is_known() {
        let mut movers = Movers::default();
        movers.grew(1000, 100);
        assert!(!movers.may_search(1199) && movers.may_search(1200));
    }

    #[test]
    fn a_move_that_was_regretted_raises_the_age() {
        let mut movers = Movers::default();
        assert!(!movers.freed(1000, 1200, 100), "it was out for long");
        assert_eq!(movers.age(100), 200);
        assert!(movers.freed(1000, 1199, 100));
        assert_eq!(movers.age(100), 400);
        for _ in 0..100 {
            movers.freed(0, 0, 100);
        }
        assert_eq!(movers.age(100), 6400, "bounded");
    }
}
