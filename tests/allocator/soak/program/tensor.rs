//! What a program holds, and which bytes are in it.

use super::random::{Random, mix};
use torch_uvm::driver::{DeviceIndex, DevicePtr, Stream};
use torch_uvm::ids::MempoolId;

/// An allocation of the program. Its bytes are the words of its tag, all of them or those of a few chunks.
#[derive(Clone, Copy, Debug)]
pub struct Tensor {
    pub(super) ptr: DevicePtr,
    pub(super) bytes: u64,
    pub(super) device: DeviceIndex,
    pub(super) stream: Stream,
    pub(super) tag: u32,
    /// All bytes were written, not only a few chunks.
    pub(super) full: bool,
    /// The bytes are those of the tag once the stream's work is done.
    pub(super) written: bool,
    /// Another stream may still be using it.
    pub(super) elsewhere: bool,
    /// The private pool it was asked from.
    pub(super) pool: Option<MempoolId>,
    /// The capture that made it: its bytes are written when that graph runs.
    pub(super) graph: Option<u64>,
    /// It lives long: what the allocator may move out.
    pub(super) keeps: bool,
}

pub(super) const CHUNK: u64 = 512;

impl Tensor {
    /// The parts that are written and looked at, as offset and length.
    pub(super) fn chunks(&self) -> impl Iterator<Item = (u64, u64)> + use<> {
        let Tensor { bytes, tag, full, .. } = *self;
        let count = if full || bytes <= 2 * CHUNK { 1 } else { 6 };
        (0..count).map(move |index| match (count, index) {
            (1, _) => (0, bytes),
            (_, 0) => (0, CHUNK),
            (_, 1) => ((bytes - CHUNK) & !3, CHUNK),
            _ => ((mix(u64::from(tag) << 8 | index) % (bytes - CHUNK)) & !3, CHUNK),
        })
    }

    /// A part to be looked at later, at most `SLOT` bytes of it, as offset and length.
    pub(super) fn sample(&self, random: &mut Random) -> (u64, u64) {
        let chunks: Vec<_> = self.chunks().collect();
        let &(offset, length) = random.of(&chunks);
        let bytes = length.min(SLOT);
        (offset + (random.below(length - bytes + 1) & !3), bytes)
    }

    /// The byte at an offset.
    pub(super) fn byte(&self, offset: u64) -> u8 {
        // The last bytes of a size that is not a multiple of 4 are no word.
        let word = if offset < self.bytes & !3 { offset % 4 } else { 0 };
        self.tag.to_le_bytes()[word as usize]
    }

    pub(super) fn check(&self, offset: u64, seen: &[u8], what: &str) {
        let word = self.tag.to_le_bytes();
        if offset.is_multiple_of(4) && seen.len().is_multiple_of(4) && seen.chunks_exact(4).all(|four| four == word) {
            return;
        }
        let wrong = (offset..).zip(seen).find(|&(at, &byte)| byte != self.byte(at));
        if let Some((at, byte)) = wrong {
            panic!("byte {at} of {self:x?} is {byte:#x} {what}");
        }
    }

    pub(super) fn end(&self) -> u64 {
        self.ptr.0 + self.bytes
    }
}

/// What a late copy takes, in bytes.
pub(super) const SLOT: u64 = 256;
/// How many late copies there may be between two looks at them.
pub(super) const SLOTS: u64 = 2048;
/// Slots that graphs copy to.
pub(super) const GRAPH_SLOTS: u64 = 512;

/// A bytes that were copied to a slot, and whose they must be.
pub(super) struct Copied {
    pub(super) slot: u64,
    pub(super) tensor: Tensor,
    pub(super) offset: u64,
    pub(super) bytes: u64,
}
