//! Stream capture: which calls are legal, and what becomes of the operations.
//!
//! The rules are the CUDA manual's (`cuThreadExchangeStreamCaptureMode`, `cuStreamBeginCapture`) and, where it is silent, what an
//! H100 did: an "unsafe" call that the calling thread may not make fails *and* spoils the captures that forbid it.

use crate::error::{Code, Fail, Step, fail};
use crate::event::Recorded;
use crate::state::{DONE, State, thread_number};
use crate::stream::{Key, Mark, StreamCapture};
use crate::types::{CaptureInfo, CaptureStatus, GraphId, GraphNode};
use crate::work::Work;
use std::sync::Arc;
use torch_uvm::driver::{CaptureMode, DeviceIndex, Event};

/// A node with what it does.
#[derive(Clone)]
pub(crate) struct Node {
    pub work: Work,
    pub node: GraphNode,
}

/// A graph: nodes in the order they were captured, which is an order they may run in.
#[derive(Clone, Default)]
pub(crate) struct Graph {
    pub nodes: Vec<Node>,
}

/// An instantiated graph.
pub(crate) struct Exec {
    graph: Arc<Graph>,
    /// Where its last launch ends: a graph never runs beside itself.
    last: Mark,
}

/// A capture that has not ended.
pub(crate) struct Capture {
    pub mode: CaptureMode,
    pub thread: u64,
    pub origin: Key,
    pub device: DeviceIndex,
    /// The handle that the graph will have; while the capture runs, it names what has been captured so far.
    pub graph: u64,
    pub streams: Vec<Key>,
    pub nodes: Vec<Node>,
    /// Nodes that the program has taken out of a stream's dependencies: nobody need join them.
    pub let_go: Vec<usize>,
    pub invalidated: bool,
}

impl State {
    // ---- legality -----------------------------------------------------------------------------------------------

    /// A potentially unsafe call: allowed unless a capture forbids it to this thread.
    pub fn unsafe_call(&mut self) -> Step<()> {
        if self.captures.is_empty() {
            return Ok(());
        }
        let me = thread_number();
        let mode = self.thread_modes.get(&me).copied().unwrap_or(CaptureMode::Global);
        let forbids = |capture: &Capture| {
            let mine = capture.thread == me && capture.mode != CaptureMode::Relaxed;
            match mode {
                CaptureMode::Relaxed => false,
                CaptureMode::ThreadLocal => mine,
                CaptureMode::Global => mine || capture.mode == CaptureMode::Global,
            }
        };
        self.forbid(Code::STREAM_CAPTURE_UNSUPPORTED, "the call is not allowed while a stream captures", forbids)
    }

    /// A call that waits for a whole device: never while a stream of it captures.
    pub fn forbid_for_device(&mut self, device: DeviceIndex) -> Step<()> {
        self.forbid(
            Code::STREAM_CAPTURE_UNSUPPORTED,
            "the device cannot be waited for while one of its streams captures",
            |capture| capture.device == device,
        )
    }

    /// Fails if a capture forbids the call, and spoils all that do; again if they are spoilt already (measured).
    fn forbid(&mut self, code: Code, why: &str, forbids: impl Fn(&Capture) -> bool) -> Step<()> {
        let mut result = Ok(());
        for capture in self.captures.values_mut().filter(|capture| forbids(capture)) {
            capture.invalidated = true;
            result = Err(fail(code, format!("{}: {why}", code.text())));
        }
        result
    }

    /// Fails if the stream captures, and spoils the capture: for calls that a capture cannot hold.
    pub fn forbid_on_capturing(&mut self, key: Key) -> Step<()> {
        let Some(id) = self.capture_of(key) else { return Ok(()) };
        Err(self.spoil(id, Code::STREAM_CAPTURE_UNSUPPORTED))
    }

    /// The legacy stream may not be used while a blocking stream of its device captures: it would have to wait for it.
    pub fn forbid_implicit(&mut self, key: Key) -> Step<()> {
        let mut result = Ok(());
        for id in self.implicit_captures(key) {
            result = Err(self.spoil(id, Code::STREAM_CAPTURE_IMPLICIT));
        }
        result
    }

    /// Whether [`State::forbid_implicit`] would fail.
    pub fn would_be_implicit(&self, key: Key) -> bool {
        !self.implicit_captures(key).is_empty()
    }

    fn implicit_captures(&self, key: Key) -> Vec<u64> {
        if self.captures.is_empty() {
            return Vec::new();
        }
        let Some(legacy) = self.streams.get(&key).filter(|stream| stream.legacy) else { return Vec::new() };
        let blocking = self.streams.values().filter(|stream| stream.blocking && stream.device == legacy.device);
        blocking.filter_map(|stream| stream.capture.as_ref()).map(|capture| capture.id).collect()
    }

    /// The capture a stream takes part in.
    pub fn capture_of(&self, key: Key) -> Option<u64> {
        if self.captures.is_empty() {
            return None;
        }
        self.streams.get(&key)?.capture.as_ref().map(|capture| capture.id)
    }

    /// Spoils a capture and gives the error for it.
    fn spoil(&mut self, id: u64, code: Code) -> Fail {
        if let Some(capture) = self.captures.get_mut(&id) {
            capture.invalidated = true;
        }
        code.into()
    }

    /// An event that is part of a capture may not be asked about or waited for; trying spoils the capture.
    pub fn forbid_captured(&mut self, event: Event) -> Step<()> {
        match self.event(event)?.recorded {
            Recorded::Capture { id, .. } => {
                self.spoil(id, Code::CAPTURED_EVENT);
                Err(Code::CAPTURED_EVENT.into())
            }
            _ => Ok(()),
        }
    }

    // ---- operations ---------------------------------------------------------------------------------------------

    /// An operation on a stream: queued, or made a node of the stream's capture. The mark is `None` for a node.
    pub fn enqueue(&mut self, key: Key, work: Work) -> Step<Option<Mark>> {
        if let Some(id) = self.capture_of(key) {
            let Some(kind) = work.node_kind() else { return Err(self.spoil(id, Code::STREAM_CAPTURE_UNSUPPORTED)) };
            let nodes = self.captured_nodes(key, id)?;
            let capture = self.captures.get_mut(&id).ok_or(Code::UNKNOWN)?;
            capture.nodes.push(Node { work, node: GraphNode { kind, dependencies: nodes } });
            let last = capture.nodes.len() - 1;
            if let Some(capture) = &mut self.stream(key)?.capture {
                capture.nodes = vec![last];
            }
            return Ok(None);
        }
        self.forbid_implicit(key)?;
        self.submit(key, work, Vec::new()).map(Some)
    }

    /// The nodes that the next one on a stream depends on; an error if the capture is spoilt.
    fn captured_nodes(&mut self, key: Key, id: u64) -> Step<Vec<usize>> {
        if self.captures.get(&id).is_none_or(|capture| capture.invalidated) {
            return Err(Code::STREAM_CAPTURE_INVALIDATED.into());
        }
        Ok(self.stream(key)?.capture.as_ref().map(|capture| capture.nodes.clone()).unwrap_or_default())
    }

    /// `cuEventRecord`.
    pub fn record(&mut self, event: Event, key: Key) -> Step<()> {
        let device = self.event(event)?.device;
        if device != self.stream(key)?.device {
            return Err(fail(Code::INVALID_HANDLE, "the event and the stream belong to different devices"));
        }
        let recorded = match self.capture_of(key) {
            Some(id) => Recorded::Capture { id, nodes: self.captured_nodes(key, id)? },
            None => {
                self.forbid_implicit(key)?;
                // The record is written down first: a machine that is eager completes it within `submit`.
                let seq = self.end_of(key).seq + 1;
                self.event(event)?.recorded = Recorded::Stream(Mark { key, seq });
                Recorded::Stream(self.submit(key, Work::Record { event: event.0 }, Vec::new())?)
            }
        };
        let state = self.event(event)?;
        state.recorded = recorded;
        state.polls = 0;
        Ok(())
    }

    /// `cuStreamWaitEvent`.
    pub fn wait_event(&mut self, key: Key, event: Event) -> Step<()> {
        let recorded = self.event(event)?.recorded.clone();
        let mine = self.capture_of(key);
        match (recorded, mine) {
            (Recorded::Never, _) => Ok(()),
            (Recorded::Stream(_), Some(id)) => Err(self.spoil(id, Code::STREAM_CAPTURE_ISOLATION)),
            (Recorded::Stream(mark), None) => {
                self.forbid_implicit(key)?;
                let wait = mark.key != key && !self.is_done(mark);
                if wait {
                    self.submit(key, Work::Wait, vec![mark])?;
                }
                Ok(())
            }
            (Recorded::Capture { id, .. }, _) if !self.captures.contains_key(&id) => Err(Code::CAPTURED_EVENT.into()),
            (Recorded::Capture { id, .. }, Some(other)) if other != id => {
                self.spoil(id, Code::STREAM_CAPTURE_MERGE);
                Err(self.spoil(other, Code::STREAM_CAPTURE_MERGE))
            }
            (Recorded::Capture { id, nodes }, mine) => self.join(key, id, nodes, mine.is_some()),
        }
    }

    /// A stream waits for work of a capture: it takes part in it from now on.
    fn join(&mut self, key: Key, id: u64, nodes: Vec<usize>, already: bool) -> Step<()> {
        if self.captures.get(&id).is_none_or(|capture| capture.invalidated) {
            return Err(Code::STREAM_CAPTURE_INVALIDATED.into());
        }
        if self.stream(key)?.legacy {
            return Err(self.spoil(id, Code::STREAM_CAPTURE_IMPLICIT));
        }
        let stream = self.stream(key)?;
        let capture = stream.capture.get_or_insert(StreamCapture { id, nodes: Vec::new() });
        for node in nodes {
            if !capture.nodes.contains(&node) {
                capture.nodes.push(node);
            }
        }
        if !already && let Some(capture) = self.captures.get_mut(&id) {
            capture.streams.push(key);
        }
        Ok(())
    }

    // ---- begin, end ---------------------------------------------------------------------------------------------

    /// `cuStreamBeginCapture`.
    pub fn begin_capture(&mut self, key: Key, mode: CaptureMode) -> Step<()> {
        let stream = self.stream(key)?;
        if stream.legacy {
            return Err(fail(Code::STREAM_CAPTURE_UNSUPPORTED, "the legacy stream cannot be captured"));
        }
        if stream.capture.is_some() {
            return Err(fail(Code::ILLEGAL_STATE, "the stream already captures"));
        }
        let device = stream.device;
        let (id, graph) = (self.next_id(), self.graph_handle());
        self.stream(key)?.capture = Some(StreamCapture { id, nodes: Vec::new() });
        self.captures.insert(
            id,
            Capture {
                mode,
                thread: thread_number(),
                origin: key,
                device,
                graph,
                streams: vec![key],
                nodes: Vec::new(),
                let_go: Vec::new(),
                invalidated: false,
            },
        );
        Ok(())
    }

    /// `cuStreamEndCapture`: the handle of the graph.
    pub fn end_capture(&mut self, key: Key) -> Step<u64> {
        let Some(id) = self.capture_of(key) else {
            return Err(fail(Code::ILLEGAL_STATE, "the stream does not capture"));
        };
        let capture = self.captures.get(&id).ok_or(Code::UNKNOWN)?;
        if capture.mode != CaptureMode::Relaxed && capture.thread != thread_number() {
            return Err(Code::STREAM_CAPTURE_WRONG_THREAD.into());
        }
        if capture.origin != key {
            return Err(self.spoil(id, Code::STREAM_CAPTURE_UNMATCHED));
        }
        let joined = self.stream(key)?.capture.take().map(|capture| capture.nodes).unwrap_or_default();
        let Some(capture) = self.captures.remove(&id) else { return Err(Code::UNKNOWN.into()) };
        for stream in &capture.streams {
            if let Some(stream) = self.streams.get_mut(stream) {
                stream.capture = None;
            }
        }
        if capture.invalidated {
            return Err(Code::STREAM_CAPTURE_INVALIDATED.into());
        }
        let reached: Vec<usize> = joined.iter().chain(&capture.let_go).copied().collect();
        if !all_joined(&capture.nodes, &reached) {
            return Err(Code::STREAM_CAPTURE_UNJOINED.into());
        }
        self.graphs.insert(capture.graph, Arc::new(Graph { nodes: capture.nodes }));
        Ok(capture.graph)
    }

    /// `cuStreamUpdateCaptureDependencies`: what the stream's next node depends on, beside what it does already or instead.
    pub fn update_dependencies(&mut self, key: Key, nodes: &[usize], instead: bool) -> Step<()> {
        let Some(id) = self.capture_of(key) else {
            return Err(fail(Code::ILLEGAL_STATE, "the stream does not capture"));
        };
        let mut dependencies = self.captured_nodes(key, id)?;
        let capture = self.captures.get_mut(&id).ok_or(Code::UNKNOWN)?;
        if nodes.iter().any(|node| *node >= capture.nodes.len()) {
            return Err(fail(Code::INVALID_VALUE, "a node that the capture does not have"));
        }
        if instead {
            capture.let_go.append(&mut dependencies);
        }
        for node in nodes {
            if !dependencies.contains(node) {
                dependencies.push(*node);
            }
        }
        if let Some(capture) = &mut self.stream(key)?.capture {
            capture.nodes = dependencies;
        }
        Ok(())
    }

    /// How a stream's capture stands.
    pub fn capture_info(&self, key: Key) -> CaptureInfo {
        let none = CaptureInfo { status: CaptureStatus::None, id: 0, nodes: 0, graph: None, dependencies: Vec::new() };
        let Some((id, capture)) = self.capture_of(key).and_then(|id| Some((id, self.captures.get(&id)?))) else {
            return none;
        };
        if capture.invalidated {
            return CaptureInfo { status: CaptureStatus::Invalidated, id, nodes: capture.nodes.len(), ..none };
        }
        let stream = self.streams.get(&key).and_then(|stream| stream.capture.as_ref());
        CaptureInfo {
            status: CaptureStatus::Active,
            id,
            nodes: capture.nodes.len(),
            graph: Some(GraphId(capture.graph)),
            dependencies: stream.map(|stream| stream.nodes.clone()).unwrap_or_default(),
        }
    }

    // ---- graphs -------------------------------------------------------------------------------------------------

    fn graph_handle(&mut self) -> u64 {
        0x4750_0000_0000 + self.next_id() * GraphId::ALIGN
    }

    pub fn add_graph(&mut self, graph: Graph) -> u64 {
        let handle = self.graph_handle();
        self.graphs.insert(handle, Arc::new(graph));
        handle
    }

    /// The nodes of a graph, or of one that is still being captured.
    pub fn nodes_of(&self, graph: u64) -> Step<&[Node]> {
        if let Some(graph) = self.graphs.get(&graph) {
            return Ok(&graph.nodes);
        }
        let capture = self.captures.values().find(|capture| capture.graph == graph);
        Ok(&capture.ok_or_else(|| fail(Code::INVALID_VALUE, "this is not a graph"))?.nodes)
    }

    pub fn add_exec(&mut self, graph: Arc<Graph>) -> u64 {
        let handle = 0x5850_0000_0000 + self.next_id() * 0x40;
        self.execs.insert(handle, Exec { graph, last: DONE });
        handle
    }

    /// Queues all nodes of a graph, in order; or makes them nodes of the stream's capture.
    pub fn launch_graph(&mut self, key: Key, exec: u64) -> Step<()> {
        let found = self.execs.get(&exec).ok_or_else(|| fail(Code::INVALID_VALUE, "this is not a graph"))?;
        let (graph, last) = (Arc::clone(&found.graph), found.last);
        if let Some(id) = self.capture_of(key) {
            let before = self.captured_nodes(key, id)?;
            let capture = self.captures.get_mut(&id).ok_or(Code::UNKNOWN)?;
            let first = capture.nodes.len();
            for node in &graph.nodes {
                let mut node = node.clone();
                node.node.dependencies = match node.node.dependencies.as_slice() {
                    [] => before.clone(),
                    inner => inner.iter().map(|index| first + index).collect(),
                };
                capture.nodes.push(node);
            }
            let leaves: Vec<usize> = leaves(&capture.nodes).into_iter().filter(|&index| index >= first).collect();
            if let (false, Some(capture)) = (leaves.is_empty(), &mut self.stream(key)?.capture) {
                capture.nodes = leaves;
            }
            return Ok(());
        }
        self.forbid_implicit(key)?;
        let mut after = if self.is_done(last) { Vec::new() } else { vec![last] };
        for node in &graph.nodes {
            let last = self.submit(key, node.work.clone(), std::mem::take(&mut after))?;
            if let Some(exec) = self.execs.get_mut(&exec) {
                exec.last = last;
            }
        }
        Ok(())
    }
}

/// The nodes that no other depends on.
fn leaves(nodes: &[Node]) -> Vec<usize> {
    let mut leaf = vec![true; nodes.len()];
    for node in nodes {
        for &dependency in &node.node.dependencies {
            leaf[dependency] = false;
        }
    }
    (0..nodes.len()).filter(|&index| leaf[index]).collect()
}

/// Whether all work leads to nodes that are reached: those at which the capturing stream ends, and those let go.
fn all_joined(nodes: &[Node], reached: &[usize]) -> bool {
    leaves(nodes).iter().all(|leaf| reached.contains(leaf))
}
