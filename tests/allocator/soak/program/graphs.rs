//! CUDA graphs, and the checkpoints of their pools.

use super::Program;
use super::pools::Pool;
use super::tensor::{Copied, Tensor};
use crate::world::MIB;
use std::collections::BTreeSet;
use std::sync::Arc;
use torch_uvm::allocator::PoolState;
use torch_uvm::driver::{CaptureMode, DeviceIndex, Location, Stream};
use torch_uvm::ids::{DEFAULT_POOL, MempoolId};
use torch_uvm_sim::GraphExecId;

pub(super) struct Graph {
    pub(super) serial: u64,
    pub(super) device: DeviceIndex,
    pub(super) stream: Stream,
    pub(super) exec: GraphExecId,
    pub(super) pool: MempoolId,
    pub(super) copied: Vec<Copied>,
    /// It has run since somebody looked.
    pub(super) launched: bool,
    /// Its pool has been used for something else since: running it would destroy that.
    pub(super) dead: bool,
}

pub(super) struct Checkpoint {
    pub(super) state: Arc<PoolState>,
    pub(super) tensors: Vec<Tensor>,
    /// The graph that could be run then.
    pub(super) graph: Option<u64>,
}

impl Program {
    /// Captures a graph into a pool of its own, or into one that an earlier graph has used. Outputs are held on.
    pub(super) fn capture(&mut self) -> Option<()> {
        self.barrier();
        let device = self.device();
        let of_graphs = (0..self.pools.len()).find(|&index| {
            self.pools[index].of_graphs && self.pools[index].device == device && !self.pools[index].open
        });
        let mut pool = match of_graphs {
            Some(index) if self.random.one_in(2) || self.pools.len() > 6 => self.pools.remove(index),
            _ if self.pools.len() > 6 => return None,
            _ => {
                self.next_pool += 1;
                Pool { id: (0, self.next_pool), device, of_graphs: true, ..Pool::default() }
            }
        };
        for graph in self.graphs.iter_mut().filter(|graph| graph.pool == pool.id) {
            graph.dead = true;
        }
        // Nothing can be captured on the legacy stream.
        let streams = self.streams[device as usize][1..].to_vec();
        let first = self.random.below(streams.len() as u64) as usize;
        let (origin, other) = (streams[first], streams[(first + 1) % streams.len()]);
        let forks = self.random.one_in(2);
        let captured = move |stream| stream == origin || (forks && stream == other);
        let id = pool.id;
        let begin = |program: &Self| {
            program.world.allocator.pools(device).begin_allocate_to_pool(id, Box::new(captured), origin, None).unwrap();
        };
        begin(self);
        pool.holds += 1;
        let mode = *self.random.of(&[CaptureMode::Global, CaptureMode::ThreadLocal, CaptureMode::Relaxed]);
        self.world.machine.begin_capture(device, origin, mode).unwrap();
        if forks {
            self.order((device, origin), (device, other));
        }

        let mut inside: Vec<Tensor> = Vec::new();
        // Freed inside the capture while the other captured stream still uses them.
        let mut in_use: Vec<Tensor> = Vec::new();
        let mut copied = Vec::new();
        let serial = self.next_serial;
        self.next_serial += 1;
        for _ in 0..self.random.between(2, 24) {
            match self.random.below(10) {
                0..4 => {
                    let bytes = self.size().min(8 * MIB);
                    let stream = if forks && self.random.one_in(3) { other } else { origin };
                    let result = self.call(|program| program.world.allocator.allocate(device, bytes, stream, None));
                    let Some(ptr) = self.expect(result, &[]) else { continue };
                    let mut tensor = self.tensor(ptr, bytes, device, stream, Some(id));
                    let apart = |other: &Tensor| other.end() <= ptr.0 || tensor.end() <= other.ptr.0;
                    assert!(in_use.iter().all(apart), "{tensor:?} is still used inside the capture: {in_use:?}");
                    tensor.graph = Some(serial);
                    self.fill(&mut tensor);
                    inside.push(tensor);
                }
                4..7 if !inside.is_empty() => {
                    let tensor = inside.swap_remove(self.random.below(inside.len() as u64) as usize);
                    if tensor.elsewhere {
                        in_use.push(tensor);
                    }
                    self.free(tensor);
                }
                7 if forks && !inside.is_empty() => {
                    let index = self.random.below(inside.len() as u64) as usize;
                    let tensor = inside[index];
                    let on = if tensor.stream == origin { other } else { origin };
                    self.order((device, tensor.stream), (device, on));
                    if let Some(slot) = self.graph_slots.pop_first() {
                        copied.push(self.copy_to(slot, &tensor, device, on));
                    }
                    self.world.allocator.record_stream(tensor.ptr, device, on).unwrap();
                    inside[index].elsewhere = true;
                }
                8 => self.beside_a_capture(device, &captured),
                _ => {}
            }
        }
        if forks {
            self.order((device, other), (device, origin));
        }
        let graph = self.world.machine.end_capture(device, origin).expect("the capture was not spoilt");
        self.world.allocator.pools(device).end_allocate_to_pool(id).unwrap();
        let exec = self.world.machine.graph_instantiate(graph).unwrap();
        self.world.machine.graph_destroy(graph).unwrap();
        for mut tensor in inside {
            (tensor.written, tensor.elsewhere) = (false, false);
            self.live.push(tensor);
        }
        self.graphs.push(Graph {
            serial,
            device,
            stream: origin,
            exec,
            pool: id,
            copied,
            launched: false,
            dead: false,
        });
        self.pools.push(pool);
        Some(())
    }

    /// What a program may do while some streams are captured.
    pub(super) fn beside_a_capture(&mut self, device: DeviceIndex, captured: &impl Fn(Stream) -> bool) {
        match self.random.below(4) {
            0 => {
                // Not on the captured streams: nothing is queued there that is not captured.
                if let Some(index) = self.pick(|tensor| !captured(tensor.stream)) {
                    let tensor = self.live.swap_remove(index);
                    self.free(tensor);
                }
            }
            1 => {
                let device = self.device();
                let stream = self.stream(device);
                if !captured(stream) {
                    let bytes = self.size();
                    let tensor = self.new_tensor(device, bytes, stream);
                    self.live.extend(tensor);
                }
            }
            2 => {
                let before = self.reserved();
                let result = self.world.allocator.empty_cache(DEFAULT_POOL, None);
                self.expect(result, &[]);
                let mine = || self.world.allocator.device_stats(device).unwrap().reserved_bytes.aggregate.current;
                assert!(self.reserved() <= before && mine() <= before, "a capture keeps everything where it is");
            }
            _ => {
                if let Some(index) = self.pick(|tensor| tensor.device == device && tensor.bytes >= 2 * MIB) {
                    let tensor = self.live[index];
                    let stream = self.streams[device as usize][0];
                    let to = *self.random.of(&[Location::Host, Location::Device(device)]);
                    let result = self
                        .call(|program| program.world.allocator.hints().prefetch(tensor.ptr, tensor.bytes, to, stream));
                    self.expect(result, &["do not fit into host memory", "hints are for"]);
                }
            }
        }
    }

    pub(super) fn replay(&mut self) -> Option<()> {
        let runnable: Vec<usize> = (0..self.graphs.len()).filter(|&index| !self.graphs[index].dead).collect();
        if runnable.is_empty() {
            return None;
        }
        let index = *self.random.of(&runnable);
        // Whoever reads what the graph is about to write is done.
        self.barrier();
        let Graph { device, stream, exec, serial, .. } = self.graphs[index];
        self.world.machine.graph_launch(device, exec, stream).unwrap();
        self.graphs[index].launched = true;
        for tensor in self.live.iter_mut().filter(|tensor| tensor.graph == Some(serial)) {
            // Those of the other captured stream too: it was joined. The program waits for the graph's stream.
            tensor.written = true;
        }
        self.world.machine.stream_synchronize(device, stream).unwrap();
        Some(())
    }

    pub(super) fn drop_graph(&mut self) -> Option<()> {
        if self.graphs.is_empty() {
            return None;
        }
        let index = self.random.below(self.graphs.len() as u64) as usize;
        self.barrier();
        self.forget_graph(index);
        Some(())
    }

    pub(super) fn drop_graphs(&mut self, pool: MempoolId) {
        if self.graphs.iter().any(|graph| graph.pool == pool) {
            self.barrier();
        }
        while let Some(index) = self.graphs.iter().position(|graph| graph.pool == pool) {
            self.forget_graph(index);
        }
    }

    pub(super) fn forget_graph(&mut self, index: usize) {
        let graph = self.graphs.swap_remove(index);
        self.world.machine.graph_exec_destroy(graph.exec).unwrap();
        self.graph_slots.extend(graph.copied.iter().map(|copied| copied.slot));
    }

    pub(super) fn runnable_graph(&self, pool: MempoolId) -> Option<u64> {
        self.graphs.iter().find(|graph| graph.pool == pool && !graph.dead).map(|graph| graph.serial)
    }

    pub(super) fn in_pool(&self, pool: MempoolId) -> Vec<Tensor> {
        self.live.iter().copied().filter(|tensor| tensor.pool == Some(pool)).collect()
    }

    pub(super) fn checkpoint(&mut self) -> Option<()> {
        let pools: Vec<usize> = (0..self.pools.len()).filter(|&index| self.pools[index].of_graphs).collect();
        if pools.is_empty() {
            return None;
        }
        let index = *self.random.of(&pools);
        let Pool { device, id, .. } = self.pools[index];
        let result = self.call(|program| program.world.allocator.pools(device).checkpoint_state(id));
        let state = self.expect(result, &["waits for another stream"])?;
        let tensors = self.in_pool(id);
        let addresses: Vec<u64> = tensors.iter().map(|tensor| tensor.ptr.0).collect();
        assert!(self.world.allocator.pools(device).check_pool_live_allocations(id, &addresses).unwrap());
        self.pools[index].checkpoint = Some(Checkpoint { state, tensors, graph: self.runnable_graph(id) });
        Some(())
    }

    pub(super) fn restore(&mut self) -> Option<()> {
        let index = self.pools.iter().position(|pool| pool.checkpoint.is_some())?;
        // Uses of what is replaced are over.
        self.barrier();
        let Pool { device, id, .. } = self.pools[index];
        let state = Arc::clone(&self.pools[index].checkpoint.as_ref()?.state);
        let result = self.call(|program| program.world.allocator.pools(device).restore_pool(&state, None));
        let restored = self.expect(result, &["waits for another stream"])?;
        let Checkpoint { tensors: then, graph, .. } = self.pools[index].checkpoint.take()?;
        let addresses = |tensors: &[Tensor]| tensors.iter().map(|tensor| tensor.ptr.0).collect::<BTreeSet<u64>>();
        let now = self.in_pool(id);
        assert_eq!(restored.freed.iter().copied().collect::<BTreeSet<u64>>(), addresses(&now));
        assert_eq!(restored.created.iter().copied().collect::<BTreeSet<u64>>(), addresses(&then));
        if self.runnable_graph(id) != graph {
            // What it would write is somebody else's again.
            self.graphs.iter_mut().filter(|graph| graph.pool == id).for_each(|graph| graph.dead = true);
        }
        let runnable = self.runnable_graph(id);
        self.live.retain(|tensor| tensor.pool != Some(id));
        for mut tensor in then {
            match now.iter().find(|other| (other.ptr, other.tag) == (tensor.ptr, tensor.tag)) {
                // It was there all the time, and still has its bytes.
                Some(same) => tensor = *same,
                None => {
                    tensor.written = false;
                    tensor.elsewhere = false;
                    if tensor.graph != runnable {
                        tensor.graph = None;
                    }
                }
            }
            if tensor.graph.is_none() && !tensor.written {
                self.fill(&mut tensor);
            }
            self.live.push(tensor);
        }
        Some(())
    }
}
