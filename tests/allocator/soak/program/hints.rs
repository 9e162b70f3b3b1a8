//! Prefetches, advice and discarding.

use super::Program;
use crate::world::MIB;
use torch_uvm::driver::{Advice, Location};
use torch_uvm::error::Error;

impl Program {
    pub(super) fn prefetch(&mut self) -> Option<()> {
        let index = self.pick(|tensor| tensor.bytes >= MIB)?;
        let tensor = self.live[index];
        let start = self.random.below(tensor.bytes) * self.random.below(2);
        let bytes = 1 + self.random.below(tensor.bytes - start);
        let to = *self.random.of(&[Location::Host, Location::Device(tensor.device)]);
        let stream = self.stream(tensor.device);
        let at = tensor.ptr.offset(start);
        let result = self.call(|program| program.world.allocator.hints().prefetch(at, bytes, to, stream));
        self.expect(result, &["do not fit into host memory", "hints are for"])
    }

    pub(super) fn advise(&mut self) -> Option<()> {
        let index = self.pick(|_| true)?;
        let tensor = self.live[index];
        let gpu = Location::Device(tensor.device);
        let advice = *self.random.of(&[
            Advice::SetReadMostly,
            Advice::UnsetReadMostly,
            Advice::SetPreferredLocation(Location::Host),
            Advice::SetPreferredLocation(gpu),
            Advice::UnsetPreferredLocation,
            Advice::SetAccessedBy(gpu),
            Advice::UnsetAccessedBy(gpu),
        ]);
        let result = self.call(|program| program.world.allocator.hints().advise(tensor.ptr, tensor.bytes, advice));
        self.expect(result, &["hints are for"])
    }

    pub(super) fn discard(&mut self) -> Option<()> {
        let index = self.pick(|tensor| tensor.bytes >= 2 * MIB && tensor.graph.is_none() && !tensor.elsewhere)?;
        let mut tensor = self.live[index];
        let result =
            self.call(|program| program.world.allocator.hints().discard(tensor.ptr, tensor.bytes, tensor.stream));
        if let Err(Error::Driver(_)) = &result {
            // What it holds may be lost, and writing to it may be slow now: until its memory is handed out again.
            self.live.swap_remove(index);
            self.free(tensor);
        }
        self.expect(result, &["no whole page", "hints are for", "cannot discard"])?;
        self.fill(&mut tensor);
        self.live[index] = tensor;
        Some(())
    }
}
