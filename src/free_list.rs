//! Free lists: best fit in constant time. Pure data structures, no CUDA.
//!
//! A [`FreeList`] finds the smallest free block that fits: one bin for each multiple of 512 bytes up to 1 MiB, then 64
//! bins to a power of two, with a bitmap over the bins (two-level segregated fit, Masmano et al., ECRTS 2004).

use crate::blocks::{Block, Blocks};
use crate::ids::BlockId;
use crate::sizes::MIN_BLOCK;

/// Sizes up to here have a bin each.
const EXACT_LIMIT: u64 = 1 << 20;
const EXACT_BINS: usize = (EXACT_LIMIT / MIN_BLOCK) as usize;
/// Bins to a power of two above that.
const SUB_BINS_LOG2: u32 = 6;
/// Sizes of 2^48 bytes and more share the last bins; no machine has such a block.
const TOP_LOG2: u32 = 48;
const BINS: usize = EXACT_BINS + ((TOP_LOG2 - 20) << SUB_BINS_LOG2) as usize;
const WORDS: usize = BINS.div_ceil(64);

/// The bin of a size: monotonic, so that every block in a higher bin is larger.
#[inline]
fn bin_of(bytes: u64) -> usize {
    if bytes <= EXACT_LIMIT {
        return (bytes / MIN_BLOCK - 1) as usize;
    }
    let bytes = bytes - 1; // an exact power of two belongs to the octave below, as EXACT_LIMIT itself does
    let log2 = bytes.ilog2();
    if log2 >= TOP_LOG2 {
        return BINS - 1;
    }
    let sub = (bytes >> (log2 - SUB_BINS_LOG2)) & ((1 << SUB_BINS_LOG2) - 1);
    EXACT_BINS + (((log2 - 20) << SUB_BINS_LOG2) as usize) + sub as usize
}

/// The free blocks of one pool, size class and stream.
pub struct FreeList {
    heads: Box<[BlockId; BINS]>,
    bitmap: [u64; WORDS],
    /// One bit for each word of `bitmap` that is not zero.
    summary: u64,
    blocks: usize,
    bytes: u64,
}

const _: () = assert!(WORDS <= 64, "the summary is one word");

impl Default for FreeList {
    fn default() -> Self {
        Self { heads: Box::new([BlockId::NONE; BINS]), bitmap: [0; WORDS], summary: 0, blocks: 0, bytes: 0 }
    }
}

impl FreeList {
    /// How many blocks are in it.
    pub fn len(&self) -> usize {
        self.blocks
    }

    /// Whether no block is in it.
    pub fn is_empty(&self) -> bool {
        self.blocks == 0
    }

    /// How many bytes they have together.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Adds a free block. Blocks of the same size are taken again last in, first out.
    #[inline]
    pub fn insert(&mut self, blocks: &mut Blocks, id: BlockId) {
        let size = blocks[id].bytes;
        let bin = bin_of(size);
        let mut before = BlockId::NONE;
        let mut after = self.heads[bin];
        if bin >= EXACT_BINS {
            // Bins of several sizes are kept sorted, smallest first.
            while after.is_some() && blocks[after].bytes < size {
                before = after;
                after = blocks[after].bin_next;
            }
        }
        blocks[id].bin_prev = before;
        blocks[id].bin_next = after;
        if after.is_some() {
            blocks[after].bin_prev = id;
        }
        if before.is_some() {
            blocks[before].bin_next = id;
        } else {
            self.heads[bin] = id;
        }
        self.bitmap[bin / 64] |= 1 << (bin % 64);
        self.summary |= 1 << (bin / 64);
        self.blocks += 1;
        self.bytes += size;
    }

    /// A block in this list has changed its size, from `before` bytes. Most stay in their bin, at their place in it.
    #[inline]
    pub fn resized(&mut self, blocks: &mut Blocks, id: BlockId, before: u64) {
        let Block { bin_prev, bin_next, bytes, .. } = blocks[id];
        let in_order = bin_of(bytes) == bin_of(before)
            && (!bin_prev.is_some() || blocks[bin_prev].bytes <= bytes)
            && (!bin_next.is_some() || blocks[bin_next].bytes >= bytes);
        if in_order {
            self.bytes = self.bytes + bytes - before;
        } else {
            self.unlink(blocks, id, before);
            self.insert(blocks, id);
        }
    }

    /// Takes a block out that is in this list.
    #[inline]
    pub fn remove(&mut self, blocks: &mut Blocks, id: BlockId) {
        self.unlink(blocks, id, blocks[id].bytes);
    }

    /// Takes a block out that was listed with `bytes`.
    fn unlink(&mut self, blocks: &mut Blocks, id: BlockId, bytes: u64) {
        let Block { bin_prev, bin_next, .. } = blocks[id];
        if bin_next.is_some() {
            blocks[bin_next].bin_prev = bin_prev;
        }
        if bin_prev.is_some() {
            blocks[bin_prev].bin_next = bin_next;
        } else {
            let bin = bin_of(bytes);
            debug_assert_eq!(self.heads[bin], id);
            self.heads[bin] = bin_next;
            if !bin_next.is_some() {
                self.bitmap[bin / 64] &= !(1 << (bin % 64));
                if self.bitmap[bin / 64] == 0 {
                    self.summary &= !(1 << (bin / 64));
                }
            }
        }
        self.blocks -= 1;
        self.bytes -= bytes;
    }

    /// The first bin at or above `bin` that is not empty.
    #[inline]
    fn next_bin(&self, bin: usize) -> Option<usize> {
        if bin >= BINS {
            return None;
        }
        let word = bin / 64;
        let rest = self.bitmap[word] & (u64::MAX << (bin % 64));
        if rest != 0 {
            return Some(word * 64 + rest.trailing_zeros() as usize);
        }
        let words = if word + 1 < 64 { self.summary & (u64::MAX << (word + 1)) } else { 0 };
        if words == 0 {
            return None;
        }
        let word = words.trailing_zeros() as usize;
        Some(word * 64 + self.bitmap[word].trailing_zeros() as usize)
    }

    /// The smallest block of at least `bytes`, left in the list.
    #[inline]
    pub fn best_fit(&self, blocks: &Blocks, bytes: u64) -> Option<BlockId> {
        self.find(blocks, bytes, |_| true)
    }

    /// The smallest block of at least `bytes` that `accept` takes, left in the list.
    #[inline]
    pub fn find(&self, blocks: &Blocks, bytes: u64, accept: impl Fn(&Block) -> bool) -> Option<BlockId> {
        let mut bin = self.next_bin(bin_of(bytes))?;
        loop {
            let mut id = self.heads[bin];
            while id.is_some() {
                let block = &blocks[id];
                if block.bytes >= bytes && accept(block) {
                    return Some(id);
                }
                id = block.bin_next;
            }
            bin = self.next_bin(bin + 1)?;
        }
    }

    /// The size of the largest block in the list, in bytes.
    pub fn largest(&self, blocks: &Blocks) -> u64 {
        let mut largest = 0;
        if self.summary != 0 {
            let word = 63 - self.summary.leading_zeros() as usize;
            let bin = word * 64 + 63 - self.bitmap[word].leading_zeros() as usize;
            let mut id = self.heads[bin];
            while id.is_some() {
                largest = largest.max(blocks[id].bytes);
                id = blocks[id].bin_next;
            }
        }
        largest
    }

    /// All blocks in the list, smallest bins first.
    pub fn iter<'a>(&'a self, blocks: &'a Blocks) -> impl Iterator<Item = BlockId> + 'a {
        let mut bin = self.next_bin(0);
        let mut id = bin.map_or(BlockId::NONE, |bin| self.heads[bin]);
        std::iter::from_fn(move || {
            while !id.is_some() {
                bin = self.next_bin(bin? + 1);
                id = self.heads[bin?];
            }
            let found = id;
            id = blocks[id].bin_next;
            Some(found)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{ListId, SegmentId};
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const SEGMENT: SegmentId = SegmentId(0);
    const LIST: ListId = ListId(0);

    #[test]
    fn bins_are_monotonic_and_cover_all_sizes() {
        let mut sizes: Vec<u64> = (9..62).flat_map(|log2| [(1 << log2) - 512, 1 << log2, (1 << log2) + 512]).collect();
        sizes.retain(|&size| size >= 512);
        sizes.sort_unstable();
        for pair in sizes.windows(2) {
            assert!(bin_of(pair[0]) <= bin_of(pair[1]), "{} {}", pair[0], pair[1]);
        }
        assert!(bin_of(u64::MAX - 511) < BINS);
        assert_eq!(bin_of(EXACT_LIMIT) + 1, bin_of(EXACT_LIMIT + 512));
    }

    #[derive(Debug, Clone)]
    enum Op {
        Insert(u64),
        Take(u64),
        Remove(prop::sample::Index),
        Resize(prop::sample::Index, u64),
    }

    fn size() -> impl Strategy<Value = u64> {
        prop_oneof![
            (1..=4096_u64).prop_map(|n| n * 512),
            (20..40_u32, 0..1024_u64).prop_map(|(log2, n)| (1 << log2) + n * 512),
        ]
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            3 => size().prop_map(Op::Insert),
            2 => size().prop_map(Op::Take),
            1 => any::<prop::sample::Index>().prop_map(Op::Remove),
            2 => (any::<prop::sample::Index>(), size()).prop_map(|(index, bytes)| Op::Resize(index, bytes)),
        ]
    }

    proptest! {
        /// Best fit is exact, against the ordered set that `native` uses.
        #[test]
        fn free_list_is_a_best_fit_set(ops in prop::collection::vec(op(), 1..300)) {
            let mut blocks = Blocks::default();
            let mut list = FreeList::default();
            let mut model: BTreeSet<(u64, u32)> = BTreeSet::new();
            for op in ops {
                match op {
                    Op::Insert(bytes) => {
                        let id = blocks.create(0x1000, bytes, (SEGMENT, true), LIST, (BlockId::NONE, BlockId::NONE));
                        list.insert(&mut blocks, id);
                        model.insert((bytes, id.0));
                    }
                    Op::Take(bytes) => {
                        let expected = model.range((bytes, 0)..).next().map(|&(bytes, _)| bytes);
                        let found = list.best_fit(&blocks, bytes);
                        prop_assert_eq!(found.map(|id| blocks[id].bytes), expected);
                        if let Some(id) = found {
                            model.remove(&(blocks[id].bytes, id.0));
                            list.remove(&mut blocks, id);
                            blocks.discard(id);
                        }
                    }
                    Op::Remove(index) if !model.is_empty() => {
                        let (bytes, raw) = *index.get(&model.iter().copied().collect::<Vec<_>>());
                        model.remove(&(bytes, raw));
                        list.remove(&mut blocks, BlockId(raw));
                        blocks.discard(BlockId(raw));
                    }
                    Op::Resize(index, bytes) if !model.is_empty() => {
                        let (before, raw) = *index.get(&model.iter().copied().collect::<Vec<_>>());
                        model.remove(&(before, raw));
                        model.insert((bytes, raw));
                        blocks[BlockId(raw)].bytes = bytes;
                        list.resized(&mut blocks, BlockId(raw), before);
                    }
                    Op::Remove(_) | Op::Resize(..) => {}
                }
                prop_assert_eq!(list.len(), model.len());
                prop_assert_eq!(list.bytes(), model.iter().map(|&(bytes, _)| bytes).sum::<u64>());
                prop_assert_eq!(list.largest(&blocks), model.last().map_or(0, |&(bytes, _)| bytes));
                let mut all: Vec<u32> = list.iter(&blocks).map(|id| id.0).collect();
                all.sort_unstable();
                let mut expected: Vec<u32> = model.iter().map(|&(_, id)| id).collect();
                expected.sort_unstable();
                prop_assert_eq!(all, expected);
            }
        }
    }
}
