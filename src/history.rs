//! What `_record_memory_history` asked to be remembered.

use crate::driver::{DeviceIndex, Stream};
use crate::ids::MempoolId;
use crate::place::Populated;
use std::any::Any;
use std::cell::RefCell;
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
    /// The program annotated a live allocation; what it said is the entry's metadata.
    Annotate,
}

impl Action {
    /// Every one.
    pub const ALL: [Self; 10] = [
        Self::Alloc,
        Self::FreeRequested,
        Self::FreeCompleted,
        Self::SegmentAlloc,
        Self::SegmentFree,
        Self::SegmentMap,
        Self::SegmentUnmap,
        Self::Snapshot,
        Self::OutOfMemory,
        Self::Annotate,
    ];
}

/// A set of [`Action`]s.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Actions(u16);

impl Actions {
    /// With one more.
    #[must_use]
    pub fn with(self, action: Action) -> Self {
        Self(self.0 | 1 << action as u16)
    }

    /// Whether it is among them.
    pub fn contains(self, action: Action) -> bool {
        self.0 & (1 << action as u16) != 0
    }
}

/// What the program says of itself while it allocates; it goes into every trace entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels {
    /// The compiled function that is running (`pushCompileContext`), where one is.
    pub compile_context: Option<Arc<str>>,
    /// What `torch.cuda.memory._set_memory_metadata` was given last; for [`Action::Annotate`] the annotation.
    pub user_metadata: Option<Arc<str>>,
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
    /// What the program said of itself.
    pub labels: Labels,
}

thread_local! {
    static USER_METADATA: RefCell<Option<Arc<str>>> = const { RefCell::new(None) };
}

/// What every trace entry that this thread causes from now on says beside the rest, on whatever device; empty: nothing.
pub fn set_user_metadata(metadata: &str) {
    let metadata = (!metadata.is_empty()).then(|| metadata.into());
    // While a thread ends, its storage may be gone already: then nobody will read it either.
    let _ = USER_METADATA.try_with(|kept| *kept.borrow_mut() = metadata);
}

/// What this thread set last.
pub fn user_metadata() -> Option<Arc<str>> {
    USER_METADATA.try_with(|kept| kept.borrow().clone()).ok().flatten()
}

/// What was populated where at one moment. Sizes in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PlaceSample {
    /// `c10::getApproximateTime()`.
    pub time: i64,
    /// What was populated.
    pub populated: Populated,
    /// What was in live allocations.
    pub allocated: u64,
}

/// How many samples are kept.
const SAMPLES: usize = 1 << 16;

/// The newest [`PlaceSample`]s.
#[derive(Default)]
pub struct PlaceHistory(VecDeque<PlaceSample>);

impl PlaceHistory {
    /// Adds one, forgetting the oldest beyond 65,536.
    pub fn push(&mut self, sample: PlaceSample) {
        if self.0.len() == SAMPLES {
            self.0.pop_front();
        }
        self.0.push_back(sample);
    }

    /// Forgets them.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// All of them, oldest first.
    pub fn entries(&self) -> Vec<PlaceSample> {
        self.0.iter().copied().collect()
    }
}

/// What [`History::configure`] is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Recording {
    /// Whether to record at all. Stopping forgets what was recorded, as `native` does.
    pub enabled: bool,
    /// How many entries to keep.
    pub capacity: usize,
    /// How much context to keep.
    pub level: RecordContext,
    /// Forget what was recorded before.
    pub clear: bool,
    /// What not to record.
    pub skip: Actions,
}

/// A bounded trace: keeps the newest `capacity` entries.
#[derive(Default)]
pub struct History {
    enabled: bool,
    level: RecordContext,
    skip: Actions,
    capacity: usize,
    entries: VecDeque<TraceEntry>,
}

impl History {
    /// Starts or stops recording.
    pub fn configure(&mut self, recording: Recording) {
        let Recording { enabled, capacity, level, clear, skip } = recording;
        self.enabled = enabled;
        self.level = if enabled { level } else { RecordContext::Never };
        self.skip = skip;
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
        if !self.enabled || self.skip.contains(entry.action) {
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
