//! What changes the allocator's settings and its surroundings.

use super::Program;
use crate::world::MIB;
use torch_uvm::history::{Actions, RecordContext, Recording};
use torch_uvm::options::{NativeOptions, Options};

impl Program {
    pub(super) fn change_options(&mut self) -> Option<()> {
        let random = &mut self.random;
        let original = self.original.clone();
        let options = Options {
            device_limit: if random.one_in(2) { original.device_limit } else { Some(random.between(4, 64) * MIB) },
            oversubscription_ratio: if random.one_in(2) {
                original.oversubscription_ratio
            } else {
                random.between(5, 50) as f64 / 10.0
            },
            prefetch: !random.one_in(6),
            prefetch_threshold: random.one_in(6).then_some(8 * MIB),
            stage1_threshold: if random.one_in(3) { 0.5 } else { original.stage1_threshold },
            ..original
        };
        self.world.allocator.set_options(options).unwrap();
        Some(())
    }

    pub(super) fn change_native_options(&mut self) -> Option<()> {
        let random = &mut self.random;
        let native = NativeOptions {
            max_split_size: *random.of(&[u64::MAX, u64::MAX, 21 * MIB, 40 * MIB]),
            garbage_collection_threshold: if random.one_in(3) { 0.4 } else { 0.0 },
            roundup_power2_divisions: [*random.of(&[0, 0, 1, 4]); 16],
            expandable_segments: random.one_in(3),
            throw_on_oom: random.one_in(4),
            ..NativeOptions::default()
        };
        self.world.allocator.set_native_options(native);
        Some(())
    }

    pub(super) fn history(&mut self) -> Option<()> {
        let enabled = self.random.one_in(3);
        self.world.allocator.set_history(recording(enabled));
        self.world.allocator.set_tracing(enabled && self.random.one_in(2));
        self.world.hooks.trace.lock().clear();
        Some(())
    }

    /// Others take host memory, or give it back.
    pub(super) fn others(&mut self) -> Option<()> {
        if !self.traits.host_shrinks {
            return Some(());
        }
        // What was promised is populated first.
        self.barrier();
        let machine = &self.world.machine;
        machine.set_others_host_memory(0);
        let available = machine.host_memory_now().available;
        let taken = if self.random.one_in(2) { 0 } else { self.random.below(available + 1) };
        machine.set_others_host_memory(taken);
        Some(())
    }
}

pub(super) fn recording(enabled: bool) -> Recording {
    Recording { enabled, capacity: 100, level: RecordContext::Never, clear: true, skip: Actions::default() }
}
