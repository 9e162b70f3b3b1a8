"""Feature checks: PyTorch's features, each in a process per allocator, with the same seed.

A check fails by itself where a feature misbehaves, and it records digests (bit patterns of results) and facts (numbers
of the allocator that must not depend on which allocator it is); correctness.py compares both with those of `native`.
Everything is small: what is checked is that a feature works, not how fast.
"""

from __future__ import annotations

import pickle
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from bench import Bench, Skipped
from limits import GIB, MIB


@dataclass(frozen=True)
class Check:
    """One feature: what the worker asks of a workload, for a function."""

    title: str
    work: Callable[[Bench], None]
    #: Needs cuDNN, which the simulated device lacks.
    real_only: bool = False
    #: Compiles, and so imports the compiler early.
    compiled: bool = False
    bytes: int = 3 * GIB

    def need(self, quick: bool) -> int:
        """Bytes at most; checks are small anyway."""
        return self.bytes

    def preload(self) -> None:
        """Before the process's turn."""
        import torch.utils.checkpoint

        import model  # noqa: F401

        if self.compiled:
            import torch._dynamo  # noqa: F401

    def run(self, bench: Bench) -> None:
        """Under deterministic algorithms, seeded."""
        if self.real_only and bench.simulated:
            raise Skipped("the simulated device has no cuDNN")
        torch = bench.torch
        torch.use_deterministic_algorithms(True)
        torch.manual_seed(0)
        self.work(bench)


CHECKS: dict[str, Check] = {}


def check(title: str, **options: Any) -> Callable[[Callable[[Bench], None]], Callable[[Bench], None]]:
    """Registers a function under its own name."""

    def register(work: Callable[[Bench], None]) -> Callable[[Bench], None]:
        CHECKS[work.__name__] = Check(title, work, **options)
        return work

    return register


def _network(torch: Any, width: int = 256, dropout: float = 0.0) -> Any:
    layers = [torch.nn.Linear(width, 2 * width), torch.nn.GELU(), torch.nn.Dropout(dropout)]
    layers += [torch.nn.Linear(2 * width, width), torch.nn.LayerNorm(width), torch.nn.Linear(width, 1)]
    return torch.nn.Sequential(*layers).to("cuda")


def _out_of_memory(torch: Any, size: int) -> str:
    """The text of the error that an allocation of `size` bytes raises; empty if it succeeds."""
    try:
        torch.empty(size, dtype=torch.uint8, device="cuda")
    except torch.cuda.OutOfMemoryError as error:
        return str(error)
    return ""


def _filled(tensor: Any, value: int) -> bool:
    """Whether every byte is `value`: without the memory that a comparison, or a sum of bytes, would need."""
    return int(tensor.min()) == value == int(tensor.max())


@check("CUDA graphs")
def cuda_graphs(bench: Bench) -> None:
    """A whole training step captured and replayed with new inputs; a second graph in the first one's pool."""
    torch = bench.torch
    network = _network(torch)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    batches = [torch.randn(64, 256, device="cuda") for _ in range(8)]
    x = batches[0].clone()
    initial = [parameter.detach().clone() for parameter in network.parameters()]

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = network(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    def again() -> None:
        with torch.no_grad():
            for parameter, value in zip(network.parameters(), initial):
                parameter.copy_(value)

    eager = []
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for batch in batches:
            x.copy_(batch)
            eager.append(step().detach().clone())
    torch.cuda.current_stream().wait_stream(side)
    again()
    graph, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = step()
    with torch.cuda.graph(second, pool=graph.pool()):
        doubled = loss * 2
    losses = []
    for batch in batches:
        x.copy_(batch)
        graph.replay()
        second.replay()
        # Allocations between replays must not fall into the graphs' memory.
        torch.full((1 << 20,), 7.0, device="cuda")
        losses.append(loss.detach().clone())
    bench.check_values(lambda: torch.equal(doubled, loss * 2), "the second graph read another loss")
    bench.check_values(
        lambda: torch.allclose(torch.stack(losses), torch.stack(eager), rtol=1e-4), "replays differ from eager steps"
    )
    bench.digest("losses", *losses)
    bench.digest("weights", *network.parameters())
    reserved = torch.cuda.memory_reserved()
    del loss, doubled
    optimizer.zero_grad(set_to_none=True)
    graph.reset()
    second.reset()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    bench.check(torch.cuda.memory_reserved() < reserved, "the graphs' pool was not given back")


@check("CUDA graph trees (torch.compile, reduce-overhead)", compiled=True)
def cuda_graph_trees(bench: Bench) -> None:
    """Training through compiled forward and backward graphs, with two shapes that share one tree's memory."""
    import torch
    from torch._dynamo.utils import counters
    from torch._inductor import cudagraph_trees

    network = _network(torch)
    compiled = bench.reduce_overhead(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    inputs = {rows: torch.randn(rows, 256, device="cuda") for rows in (32, 64)}
    losses = []
    for turn in range(12):
        torch.compiler.cudagraph_mark_step_begin()
        rows = 32 if turn % 3 else 64
        loss = compiled(inputs[rows]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach().clone())
    bench.check(counters["inductor"]["cudagraph_skips"] == 0, "a compiled function runs without CUDA graphs")
    manager = cudagraph_trees.get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    bench.check(manager is not None and bool(manager.roots), "no graph tree was recorded")
    bench.check_values(lambda: torch.stack(losses).isfinite().all(), "a loss is not finite")
    bench.digest("losses", *losses)
    bench.digest("weights", *network.parameters())


@check("MemPool")
def mem_pool(bench: Bench) -> None:
    """Tensors made in a pool, its snapshot, and its memory when it is gone."""
    torch = bench.torch
    before = torch.cuda.memory_reserved()
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        inside = [torch.randn(1 << 20, device="cuda") for _ in range(4)]
    outside = torch.randn(1 << 20, device="cuda")
    segments = pool.snapshot()
    bench.check(bool(segments), "the pool's snapshot is empty")

    def holds(tensor: Any) -> bool:
        address = tensor.data_ptr()
        return any(part["address"] <= address < part["address"] + part["total_size"] for part in segments)

    bench.check(all(holds(tensor) for tensor in inside), "a tensor of the pool is not in its snapshot")
    bench.check(not holds(outside), "a tensor made outside the pool is in its snapshot")
    bench.digest("sum", sum(inside) + outside)
    del inside, outside
    bench.fact("use count", pool.use_count())
    del segments, pool
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    bench.check(torch.cuda.memory_reserved() <= before, "the pool's memory was not given back")


@check("snapshot in PyTorch's memory visualiser")
def snapshot(bench: Bench) -> None:
    """A recorded history, pickled and opened again, through what draws and lists in torch.cuda._memory_viz."""
    torch = bench.torch
    from torch.cuda import _memory_viz

    torch.cuda.memory._record_memory_history(max_entries=100_000)
    network = _network(torch)
    optimizer = torch.optim.Adam(network.parameters())
    for rows in (32, 64, 48):
        network(torch.randn(rows, 256, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    kept = torch.empty(40 * MIB, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "snapshot.pickle"
        torch.cuda.memory._dump_snapshot(str(path))
        taken = pickle.loads(path.read_bytes())
    torch.cuda.memory._record_memory_history(enabled=None)
    allocated = torch.cuda.memory_allocated()
    in_use = [
        block["size"]
        for segment in taken["segments"]
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    ]
    bench.check(sum(in_use) == allocated, f"the snapshot holds {sum(in_use)} bytes in use, the statistics {allocated}")
    events = [event for trace in taken["device_traces"] for event in trace]
    requests = [event for event in events if event["action"] in ("alloc", "free_requested", "free_completed")]
    bench.check(any(event["size"] >= 40 * MIB for event in requests), "the trace lacks an allocation")
    frames = [frame for event in requests if event["action"] == "alloc" for frame in event.get("frames", ())]
    bench.check(any(frame["filename"].endswith("checks.py") for frame in frames), "the trace lacks Python's stack")
    bench.fact("allocations and frees", len(requests))
    pages = {
        "segsum": _memory_viz.segsum(taken),
        "trace": _memory_viz.trace(taken),
        "trace_plot": _memory_viz.trace_plot(taken),
        "trace_plot, segments": _memory_viz.trace_plot(taken, plot_segments=True),
        "segment_plot": _memory_viz.segment_plot(taken),
        # The flame graphs' lines; the script that draws them would be downloaded.
        "segments": _memory_viz.segments(taken, format_flamegraph=lambda lines: lines),
        "memory": _memory_viz.memory(taken, format_flamegraph=lambda lines: lines),
    }
    for name, page in pages.items():
        bench.check(len(page) > 100, f"{name} shows nothing: {page!r}")
    del kept


@check("peak statistics")
def peak_statistics(bench: Bench) -> None:
    """Counts and bytes of allocations of known sizes, at their peak and after."""
    torch = bench.torch
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_accumulated_memory_stats()
    base = torch.cuda.memory_allocated()
    sizes = [512, 1000, 100_000, 32 * MIB, 64 * MIB, 7, 100 * MIB]
    held = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in sizes]
    del held[3:5]
    held.append(torch.empty(2 * MIB, dtype=torch.uint8, device="cuda"))
    del held
    stats = torch.cuda.memory_stats()
    peak = stats["allocated_bytes.all.peak"] - base
    bench.check(peak >= sum(sizes), f"the peak of {peak} bytes is less than was held, {sum(sizes)}")
    bench.check(
        stats["reserved_bytes.all.peak"] >= stats["allocated_bytes.all.peak"], "more was allocated than was reserved"
    )
    bench.check(torch.cuda.max_memory_allocated() - base == peak, "max_memory_allocated disagrees")
    bench.check(torch.cuda.memory_allocated() == base, "freed memory counts as allocated")
    for key in ("peak", "allocated", "freed", "current"):
        bench.fact(f"requested_bytes.all.{key}", stats[f"requested_bytes.all.{key}"] - (0 if key != "peak" else base))
        bench.fact(f"allocation.all.{key}", stats[f"allocation.all.{key}"])
    bench.fact("allocated_bytes.all.peak", peak)
    torch.cuda.reset_peak_memory_stats()
    bench.check(torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated(), "the peak was not reset")


@check("record_stream under pressure from another stream")
def record_stream(bench: Bench) -> None:
    """Tensors freed while a slow stream still reads them, and their size allocated and overwritten at once."""
    torch = bench.torch
    reader = torch.cuda.Stream()
    sums = []
    for turn in range(50):
        source = torch.full((1 << 18,), float(turn), device="cuda")
        reader.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(reader):
            torch.cuda._sleep(2_000_000)  # about a millisecond: the writer below comes first
            sums.append(source.sum())
        source.record_stream(reader)
        del source
        for _ in range(4):
            torch.full((1 << 18,), -1.0, device="cuda")
    torch.cuda.current_stream().wait_stream(reader)
    total = torch.stack(sums)
    expected = torch.arange(50, device="cuda", dtype=torch.float32) * (1 << 18)
    bench.check_values(lambda: torch.equal(total, expected), "a tensor was overwritten while another stream read it")
    bench.digest("sums", total)


@check("torch.utils.checkpoint")
def checkpoint(bench: Bench) -> None:
    """Gradients with and without recomputation, dropout included."""
    torch = bench.torch
    from torch.utils.checkpoint import checkpoint as recomputed

    network = torch.nn.ModuleList(_network(torch, dropout=0.2)[:4] for _ in range(4))
    x = torch.randn(64, 256, device="cuda", requires_grad=True)

    def gradients(through: Callable[[Any, Any], Any]) -> list[Any]:
        torch.manual_seed(7)
        network.zero_grad(set_to_none=True)
        x.grad = None
        y = x
        for part in network:
            y = y + through(part, y)
        y.square().mean().backward()
        return [x.grad, *(parameter.grad for parameter in network.parameters())]

    plain = gradients(lambda part, y: part(y))
    again = gradients(lambda part, y: recomputed(part, y, use_reentrant=False))
    old = gradients(lambda part, y: recomputed(part, y, use_reentrant=True))
    for name, other in (("non-reentrant", again), ("reentrant", old)):
        bench.check_values(
            lambda other=other: all(torch.equal(one, two) for one, two in zip(plain, other)),
            f"{name} recomputation gave other gradients",
        )
    bench.digest("gradients", *again)


@check("autocast (fp16 with GradScaler, bf16), convolutions", real_only=True)
def autocast(bench: Bench) -> None:
    """A small convolutional network, trained in both types."""
    torch = bench.torch
    x = torch.randn(16, 3, 32, 32, device="cuda")
    for dtype in (torch.float16, torch.bfloat16):
        torch.manual_seed(1)
        layers = [torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.BatchNorm2d(32), torch.nn.ReLU()]
        layers += [torch.nn.Conv2d(32, 64, 3, stride=2), torch.nn.ReLU(), torch.nn.Flatten()]
        network = torch.nn.Sequential(*layers, torch.nn.Linear(64 * 15 * 15, 10)).to("cuda")
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        losses = []
        for _ in range(5):
            with torch.autocast("cuda", dtype=dtype):
                loss = network(x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        bench.check_values(lambda losses=losses: torch.stack(losses).isfinite().all(), "a loss is not finite")
        bench.digest(f"losses, {dtype}", *losses)
        bench.digest(f"weights, {dtype}", *network.parameters())


@check("DataLoader with pinned memory")
def data_loader(bench: Bench) -> None:
    """Two worker processes, pinned batches, copies that do not block."""
    torch = bench.torch
    data = torch.arange(64 * 1000, dtype=torch.float32).view(64, 1000)
    torch.empty(1, device="cuda")  # CUDA is in use before the workers are forked
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(data), batch_size=8, num_workers=2, pin_memory=True, persistent_workers=True
    )
    for _ in range(2):
        copies = []
        for (batch,) in loader:
            bench.check(batch.is_pinned(), "a batch is not pinned")
            copies.append(batch.to("cuda", non_blocking=True))
        # Copies move bytes on the simulated device too.
        bench.check(torch.equal(torch.cat([copy.cpu() for copy in copies]), data), "what arrived differs")
    bench.digest("sum", torch.stack(copies).sum(0))


@check("set_per_process_memory_fraction", bytes=4 * GIB)
def memory_fraction(bench: Bench) -> None:
    """OutOfMemoryError at the fraction of the device's memory, and not below it or once it is lifted."""
    torch = bench.torch
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((GIB + 64 * MIB) / total)
    first = torch.empty(512 * MIB, dtype=torch.uint8, device="cuda").fill_(3)
    text = _out_of_memory(torch, 768 * MIB)
    bench.check("out of memory" in text, f"no OutOfMemoryError above the fraction: {text!r}")
    bench.check_values(lambda: _filled(first, 3), "the failed allocation touched another tensor")
    del first
    second = torch.empty(768 * MIB, dtype=torch.uint8, device="cuda").fill_(5)
    bench.check_values(lambda: _filled(second, 5), "memory is wrong after an OutOfMemoryError")
    torch.cuda.set_per_process_memory_fraction(1.0)
    bench.check(not _out_of_memory(torch, 1536 * MIB), "the fraction was lifted and still limits")
    bench.check("out of memory" in _out_of_memory(torch, 2 * total), "twice the device's memory was handed out")
    bench.fact("out of memory errors", torch.cuda.memory_stats()["num_ooms"])
    bench.fact("fraction", torch.cuda.get_per_process_memory_fraction())


@check("torch.accelerator's memory functions")
def accelerator(bench: Bench) -> None:
    """The same numbers as torch.cuda's."""
    torch = bench.torch
    api = getattr(torch, "accelerator", None)
    if api is None or not hasattr(api, "memory_stats"):
        raise Skipped(f"PyTorch {torch.__version__} has no torch.accelerator.memory_stats")
    kept = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in (1000, 3 * MIB, 50 * MIB)]
    torch.empty(80 * MIB, dtype=torch.uint8, device="cuda")

    def compare(when: str) -> None:
        for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
            one, other = getattr(api, name)(), getattr(torch.cuda, name)()
            bench.check(one == other, f"{when}: torch.accelerator.{name} is {one}, torch.cuda's {other}")
        ours, theirs = api.memory_stats(), torch.cuda.memory_stats()
        differing = [key for key in ours if key in theirs and ours[key] != theirs[key]]
        bench.check(not differing, f"{when}: memory_stats differ in {differing}")
        bench.check("allocated_bytes.all.current" in ours, f"{when}: memory_stats has {sorted(ours)[:5]}…")

    compare("at first")
    del kept[2]
    api.empty_cache()
    compare("after empty_cache")
    api.reset_peak_memory_stats()
    api.reset_accumulated_memory_stats()
    compare("after a reset")
    bench.check(api.max_memory_allocated() == api.memory_allocated(), "the peak was not reset")
    bench.fact("allocated", api.memory_allocated())
    if hasattr(api, "get_memory_info"):
        free, total = api.get_memory_info()
        bench.check(0 < free <= total, f"get_memory_info answers ({free}, {total})")
        more = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        less = free - api.get_memory_info()[0]
        # In whole steps of the driver or of a segment, and others may allocate meanwhile.
        bench.check(less >= 128 * MIB, f"256 MiB were allocated and free memory fell by {less / MIB:.0f} MiB")
        del more
