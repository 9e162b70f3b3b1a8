"""Several threads."""

from __future__ import annotations

import random
import threading

import torch
from contents import MIB, check, filled, same
from on_device import on_device


def in_threads(count: int, work: object) -> None:
    """Runs `work(index)` in threads and raises what the first of them raised."""
    failures: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@on_device()
def test_threads_on_one_stream() -> None:
    """Each keeps its own tensors; none gets another's memory."""

    def work(index: int) -> None:
        choice = random.Random(index)
        live: dict[int, torch.Tensor] = {}
        for step in range(150):
            seed = index * 1000 + step
            if live and choice.random() < 0.5:
                victim = choice.choice(list(live))
                check(live.pop(victim), victim)
            else:
                live[seed] = filled(seed, choice.choice((500, 40_000, 700_000, 2 * MIB)))
        for seed, tensor in live.items():
            check(tensor, seed)

    in_threads(6, work)
    same(torch.cuda.memory_allocated(), 0)


@on_device()
def test_a_stream_for_each_thread() -> None:
    """Tensors are handed from thread to thread with record_stream."""
    barrier = threading.Barrier(4)
    handed: list[tuple[int, torch.Tensor, torch.cuda.Stream] | None] = [None] * 4

    def work(index: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for step in range(15):
                seed = 100 * step + index
                tensor = filled(seed, 300_000)
                handed[index] = (seed, tensor, stream)
                del tensor
                barrier.wait()
                given_seed, given, owner = handed[(index + 1) % 4]
                barrier.wait()
                handed[index] = None
                stream.wait_stream(owner)
                given.record_stream(stream)
                copy = torch.empty_like(given)
                copy.copy_(given, non_blocking=True)
                del given
                others = [filled(5000 + seed + other, 300_000) for other in range(3)]
                check(copy, given_seed)
                for other, tensor in enumerate(others):
                    check(tensor, 5000 + seed + other)
                del others, copy, tensor
                barrier.wait()

    in_threads(4, work)


@on_device()
def test_statistics_and_snapshots_while_threads_allocate() -> None:
    """Reading never fails, and what is read is consistent in itself."""
    from test_statistics import sums

    stop = threading.Event()

    def work(index: int) -> None:
        if index == 0:
            try:
                for _ in range(30):
                    sums(torch.cuda.memory_snapshot())
                    stats = torch.cuda.memory_stats()
                    for name in ("allocated_bytes", "reserved_bytes", "active_bytes"):
                        assert 0 <= stats[f"{name}.all.current"] <= stats[f"{name}.all.peak"]
                    torch.cuda.empty_cache()
            finally:
                stop.set()
            return
        choice = random.Random(index)
        while not stop.is_set():
            seed = choice.randrange(1 << 20)
            check(filled(seed, choice.choice((1000, 200_000, 2 * MIB))), seed)

    in_threads(4, work)


@on_device()
def test_tensors_freed_by_another_thread() -> None:
    """A block may be freed anywhere."""
    tensors = [filled(seed, 50_000) for seed in range(100)]

    def work(index: int) -> None:
        for seed in range(index, 100, 4):
            check(tensors[seed], seed)
            tensors[seed] = None

    in_threads(4, work)
    same(torch.cuda.memory_allocated(), 0)


@on_device()
def test_a_tensor_freed_while_the_interpreter_ends() -> None:
    """Tensors in globals, caches and threads are destroyed after everything else: that must not crash."""
    import builtins

    builtins.left_behind = [filled(seed, 3 * MIB) for seed in range(3)]  # type: ignore[attr-defined]
    builtins.left_stream = torch.cuda.Stream()  # type: ignore[attr-defined]
    for tensor in builtins.left_behind:  # type: ignore[attr-defined]
        tensor.record_stream(builtins.left_stream)  # type: ignore[attr-defined]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = torch.empty_like(tensor)
    builtins.left_graph = (graph, result)  # type: ignore[attr-defined]
