//! What `_record_memory_history` asked to be remembered.

use crate::driver::{DeviceIndex, Stream};
use crate::pools::MempoolId;
use std::any::Any;
use std::collections::VecDeque;
use std::sync::Arc;

/// The stack context that PyTorch gathered for an allocation (`c10::GatheredContext`). The allocator only keeps and
/// returns it; the bridge knows what is inside.
#[derive(Clone)]
pub struct Context(pub Arc<dyn Any + Send + Sync>);

/// How much context to keep (`c10::cuda::CUDACachingAllocator::RecordContext`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum RecordContext {
    /// None.
    #[default]
    Never,
    /// Stacks of live allocations.
    State,
    /// And of allocations in the trace.
    Alloc,
    /// And of frees.
    All,
}

/// What happened (`TraceEntry::Action`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// An allocation was handed out; the size is the requested one.
    Alloc,
    /// The program freed an allocation.
    FreeRequested,
    /// Its block became reusable, all recorded uses having completed.
    FreeCompleted,
    /// A segment of fixed size was allocated.
    SegmentAlloc,
    /// A segment of fixed size was freed.
    SegmentFree,
    /// A growing segment was populated further.
    SegmentMap,
    /// The populated part of a growing segment was freed.
    SegmentUnmap,
    /// A snapshot was taken; the size is the active bytes.
    Snapshot,
    /// An allocation failed; the address is the device's free bytes.
    OutOfMemory,
}

/// One entry of the memory history.
#[derive(Clone)]
pub struct TraceEntry {
    /// What happened.
    pub action: Action,
    /// On which device.
    pub device: DeviceIndex,
    /// Where; for [`Action::OutOfMemory`] the device's free bytes.
    pub address: u64,
    /// Bytes.
    pub bytes: u64,
    /// The stream of the block or segment.
    pub stream: Stream,
    /// `c10::getApproximateTime()`; zero where no clock was needed.
    pub time: i64,
    /// The pool of the block; `(0, 0)` is the default pool.
    pub mempool: MempoolId,
    /// The stack, where the level asks for it.
    pub context: Option<Context>,
}

/// A bounded trace: keeps the newest `capacity` entries.
#[derive(Default)]
pub struct History {
    enabled: bool,
    level: RecordContext,
    capacity: usize,
    entries: VecDeque<TraceEntry>,
}

impl History {
    /// Starts or stops recording. Stopping forgets what was recorded, as `native` does.
    pub fn configure(&mut self, enabled: bool, capacity: usize, level: RecordContext, clear: bool) {
        self.enabled = enabled;
        self.level = if enabled { level } else { RecordContext::Never };
        self.capacity = capacity.max(1);
        if !enabled || clear {
            self.entries.clear();
        }
        while self.entries.len() > self.capacity {
            self.entries.pop_front();
        }
    }

    /// Whether entries are kept.
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// Whether entries keep their context.
    pub fn keeps_context(&self) -> bool {
        self.level >= RecordContext::Alloc
    }

    /// Adds an entry, forgetting the oldest beyond the capacity.
    pub fn push(&mut self, entry: TraceEntry) {
        if !self.enabled {
            return;
        }
        if self.entries.len() == self.capacity {
            self.entries.pop_front();
        }
        self.entries.push_back(entry);
    }

    /// The entries, oldest first.
    pub fn entries(&self) -> Vec<TraceEntry> {
        self.entries.iter().cloned().collect()
    }
}
