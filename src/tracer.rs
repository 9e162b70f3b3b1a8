//! What is told of an allocator's doings: the memory history, the trace trackers, and the stacks of live allocations.

use crate::driver::{DeviceIndex, Stream};
use crate::heap::Heap;
use crate::history::{Action, Context, History, Labels, Recording, TraceEntry, user_metadata};
use crate::hooks::Hooks;
use crate::ids::{BlockId, DEFAULT_POOL, SegmentId};
use rustc_hash::FxHashMap;
use std::sync::Arc;

/// The tracer of one device.
pub struct Tracer {
    device: DeviceIndex,
    hooks: Arc<dyn Hooks>,
    history: History,
    /// Whether [`Hooks::trace`] wants entries.
    tracked: bool,
    /// `history.enabled() || tracked`: one test on the hot path.
    tracing: bool,
    /// The stacks of live allocations.
    contexts: FxHashMap<BlockId, Context>,
    /// The compiled functions that are running, innermost last.
    compile_contexts: Vec<Arc<str>>,
    /// The stack of the call that segments are made or given back for.
    cause: Option<Context>,
}

impl Tracer {
    /// Nobody wants to hear of anything yet.
    pub fn new(device: DeviceIndex, hooks: Arc<dyn Hooks>) -> Self {
        Self {
            device,
            hooks,
            history: History::default(),
            tracked: false,
            tracing: false,
            contexts: FxHashMap::default(),
            compile_contexts: Vec::new(),
            cause: None,
        }
    }

    /// Whether anybody wants to hear of what happens.
    #[inline]
    pub fn tracing(&self) -> bool {
        self.tracing
    }

    /// Whether the history is kept.
    pub fn recording(&self) -> bool {
        self.history.enabled()
    }

    /// Starts or stops the history.
    pub fn record(&mut self, recording: Recording) {
        self.history.configure(recording);
        self.tracing = self.history.enabled() || self.tracked;
    }

    /// Whether [`Hooks::trace`] is told of everything.
    pub fn track(&mut self, on: bool) {
        self.tracked = on;
        self.tracing = self.history.enabled() || self.tracked;
    }

    /// From now on, until [`Tracer::end_cause`], segments come and go because of this call.
    pub fn begin_cause(&mut self, context: Option<Context>) {
        self.cause = context;
    }

    /// The call is over.
    pub fn end_cause(&mut self) {
        self.cause = None;
    }

    /// The stack that a new segment keeps: `state` asks for the stacks of live allocations only, and a segment is none.
    pub fn segment_context(&self) -> Option<Context> {
        self.cause.clone().filter(|_| self.history.keeps_context())
    }

    /// A block was handed out. Answers whether a stack is kept for it.
    #[cold]
    pub fn allocated(&mut self, heap: &Heap, block: BlockId, context: Option<Context>) -> bool {
        self.block(Action::Alloc, heap, block, context.clone());
        let Some(context) = context else { return false };
        self.contexts.insert(block, context);
        true
    }

    /// The stack of a block is not needed any more.
    pub fn forget(&mut self, block: BlockId) {
        self.contexts.remove(&block);
    }

    /// The stack that made a live allocation, where one was gathered.
    pub fn context_of(&self, block: BlockId) -> Option<Context> {
        self.contexts.get(&block).cloned()
    }

    /// Something happened to a block.
    #[cold]
    pub fn block(&mut self, action: Action, heap: &Heap, id: BlockId, context: Option<Context>) {
        let context = context.or_else(|| self.context_of(id));
        self.about(action, heap, id, context, self.labels());
    }

    /// The program says something about a live allocation.
    pub fn annotate(&mut self, heap: &Heap, id: BlockId, metadata: &str) {
        let labels = Labels { user_metadata: Some(metadata.into()), ..self.labels() };
        self.about(Action::Annotate, heap, id, None, labels);
    }

    fn about(&mut self, action: Action, heap: &Heap, id: BlockId, context: Option<Context>, labels: Labels) {
        let block = heap.blocks[id];
        let list = &heap.pools[block.list];
        let entry = TraceEntry {
            action,
            device: self.device,
            address: block.address,
            bytes: block.requested,
            stream: list.stream,
            time: 0,
            mempool: heap.pools[list.pool].id,
            context,
            labels,
        };
        self.push(entry);
    }

    /// Something happened to a part of a segment.
    pub fn segment(&mut self, action: Action, heap: &Heap, id: SegmentId, address: u64, bytes: u64) {
        let segment = heap.segment(id);
        let list = &heap.pools[segment.list];
        let entry = TraceEntry {
            action,
            device: self.device,
            address,
            bytes,
            stream: list.stream,
            time: 0,
            mempool: heap.pools[list.pool].id,
            context: self.cause.clone().or_else(|| segment.context.clone()),
            labels: self.labels(),
        };
        self.push(entry);
    }

    /// Something happened that is about no memory of ours.
    pub fn event(&mut self, action: Action, address: u64, bytes: u64, stream: Stream, context: Option<Context>) {
        let entry = TraceEntry {
            action,
            device: self.device,
            address,
            bytes,
            stream,
            time: 0,
            mempool: DEFAULT_POOL,
            context,
            labels: self.labels(),
        };
        self.push(entry);
    }

    fn labels(&self) -> Labels {
        Labels { compile_context: self.compile_contexts.last().cloned(), user_metadata: user_metadata() }
    }

    /// Keeps an entry and tells the trackers.
    fn push(&mut self, mut entry: TraceEntry) {
        if !self.tracing {
            return;
        }
        entry.time = self.hooks.approximate_time();
        if !self.history.keeps_context() {
            entry.context = None;
        }
        if self.tracked {
            self.hooks.trace(&entry);
        }
        self.history.push(entry);
    }

    /// A compiled function begins; its name goes into the trace.
    pub fn push_compile_context(&mut self, name: &str) {
        self.compile_contexts.push(name.into());
    }

    /// The compiled function that began last has ended.
    pub fn pop_compile_context(&mut self) {
        self.compile_contexts.pop();
    }

    /// The recorded history, oldest first.
    pub fn entries(&self) -> Vec<TraceEntry> {
        self.history.entries()
    }
}
