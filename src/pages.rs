//! Sets of a segment's 2 MiB pages: pure data structures, no CUDA.

use crate::sizes::SMALL_STEP;
use std::ops::Range;

/// The granule of all population, and of hints, in bytes.
pub const PAGE: u64 = SMALL_STEP;

/// The pages wholly inside `bytes` bytes that begin `offset` bytes after a segment's start.
pub fn inside(offset: u64, bytes: u64) -> Range<u64> {
    let (first, end) = (offset.div_ceil(PAGE), (offset + bytes) / PAGE);
    first..end.max(first)
}

/// The pages that some of these bytes lie in.
pub fn touched(offset: u64, bytes: u64) -> Range<u64> {
    offset / PAGE..(offset + bytes).div_ceil(PAGE)
}

/// How many bytes so many pages are.
pub fn bytes(pages: &Range<u64>) -> u64 {
    (pages.end - pages.start) * PAGE
}

/// A set of pages, by their numbers in a segment. Takes no memory while it is empty.
#[derive(Clone, Default, Debug)]
pub struct Pages {
    words: Vec<u64>,
    count: u64,
}

impl Pages {
    /// How many are in it.
    pub fn len(&self) -> u64 {
        self.count
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether this one is.
    pub fn contains(&self, page: u64) -> bool {
        self.words.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 != 0)
    }

    /// Adds pages; answers how many were new.
    pub fn insert(&mut self, pages: Range<u64>) -> u64 {
        let words = pages.end.div_ceil(64) as usize;
        if pages.is_empty() {
            return 0;
        }
        if self.words.len() < words {
            self.words.resize(words, 0);
        }
        let new = self.each_word(pages, |word, mask| {
            let new = mask & !*word;
            *word |= mask;
            new.count_ones()
        });
        self.count += new;
        new
    }

    /// Takes pages out; answers how many were in it.
    pub fn remove(&mut self, pages: Range<u64>) -> u64 {
        let gone = self.each_word(pages, |word, mask| {
            let gone = mask & *word;
            *word &= !mask;
            gone.count_ones()
        });
        self.count -= gone;
        if self.count == 0 {
            self.words = Vec::new();
        }
        gone
    }

    /// Adds pages, or takes them out.
    pub fn set(&mut self, pages: Range<u64>, within: bool) {
        if within {
            self.insert(pages);
        } else {
            self.remove(pages);
        }
    }

    /// Calls `work` for each word with bits for some of the pages, and a mask of those.
    fn each_word(&mut self, pages: Range<u64>, mut work: impl FnMut(&mut u64, u64) -> u32) -> u64 {
        let end = pages.end.min(self.words.len() as u64 * 64);
        let mut at = pages.start;
        let mut sum = 0;
        while at < end {
            let next = (at / 64 + 1) * 64;
            let mut mask = u64::MAX << (at % 64);
            if end < next {
                mask &= (1 << (end % 64)) - 1;
            }
            sum += u64::from(work(&mut self.words[(at / 64) as usize], mask));
            at = next;
        }
        sum
    }

    /// Whether any of these is in it.
    pub fn any(&self, pages: Range<u64>) -> bool {
        self.count > 0 && pages.into_iter().any(|page| self.contains(page))
    }

    /// The runs of neighbours among `pages` that are in it, or that are not, lowest first.
    pub fn runs(&self, pages: Range<u64>, within: bool) -> Vec<Range<u64>> {
        runs(pages, |page| self.contains(page) == within)
    }
}

/// The runs of neighbours among `pages` that `which` holds for, lowest first.
pub fn runs(pages: Range<u64>, which: impl Fn(u64) -> bool) -> Vec<Range<u64>> {
    let mut found: Vec<Range<u64>> = Vec::new();
    for page in pages.filter(|&page| which(page)) {
        match found.last_mut() {
            Some(run) if run.end == page => run.end += 1,
            _ => found.push(page..page + 1),
        }
    }
    found
}

/// What is special about some pages of a segment.
#[derive(Clone, Default, Debug)]
pub struct PageFlags {
    /// They lie elsewhere than their segment's place says: in host memory instead of on the device, or the other way
    /// round.
    pub nonresident: Pages,
    /// They were discarded and could not be populated again: writing to them would take seconds a GiB.
    pub unpopulated: Pages,
    /// Their advice is that of the other place.
    pub advice_swapped: Pages,
    /// Their advice is the program's.
    pub advised: Pages,
}

impl PageFlags {
    /// Whether anything at all is special about some of these pages.
    pub fn any(&self, pages: Range<u64>) -> bool {
        [&self.nonresident, &self.unpopulated, &self.advice_swapped, &self.advised]
            .into_iter()
            .any(|set| set.any(pages.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn only_whole_pages_are_inside() {
        assert_eq!(inside(0, 2 * PAGE), 0..2);
        assert_eq!(inside(512, 2 * PAGE), 1..2);
        assert!(inside(512, PAGE).is_empty());
        assert_eq!(touched(512, PAGE), 0..2);
        assert_eq!(touched(PAGE, 512), 1..2);
    }

    proptest! {
        #[test]
        fn it_is_a_set(ops in prop::collection::vec((any::<bool>(), 0_u64..200, 0_u64..150), 1..40)) {
            let (mut pages, mut model) = (Pages::default(), BTreeSet::new());
            for (add, start, length) in ops {
                let range = start..start + length;
                let before = model.len() as u64;
                if add {
                    let new = pages.insert(range.clone());
                    model.extend(range);
                    prop_assert_eq!(new, model.len() as u64 - before);
                } else {
                    let gone = pages.remove(range.clone());
                    model.retain(|page| !range.contains(page));
                    prop_assert_eq!(gone, before - model.len() as u64);
                }
                prop_assert_eq!(pages.len(), model.len() as u64);
                let listed: Vec<u64> = pages.runs(0..400, true).into_iter().flatten().collect();
                prop_assert!(listed.iter().eq(model.iter()));
                prop_assert_eq!(pages.runs(0..400, false).into_iter().flatten().count(), 400 - model.len());
            }
        }
    }
}
