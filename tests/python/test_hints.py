"""torch_uvm's hints, statistics by place, and the names that programs look for in torch.cuda."""

from __future__ import annotations

import pytest
import simulated
import torch
import under_test  # noqa: F401  (finds the package)
from contents import MIB, check, filled, same
from on_device import about_uvm, on_device

LIMITED = "use_uvm:True,uvm_device_limit_mb:128"


def places() -> tuple[int, int]:
    """MiB on the device and in host memory."""
    import torch_uvm

    stats = torch_uvm.statistics()
    return stats.populated_device // MIB, stats.populated_host // MIB


@on_device(uvm_only=True)
def test_a_tensor_moves_and_keeps_its_contents() -> None:
    """To the host and back, whole and in part, on a stream of the program's."""
    import torch_uvm

    kept, moved = filled(1, 20 * MIB), filled(2, 40 * MIB)
    same(places(), (60, 0))
    torch_uvm.prefetch(moved, "cpu")
    same(places(), (20, 40))
    torch_uvm.prefetch(moved[10 * MIB : 20 * MIB], 0, stream=torch.cuda.Stream())
    same(places(), (30, 30))
    for device in (torch.device("cuda"), "cuda:0"):
        torch_uvm.prefetch(moved, device)
    same(places(), (60, 0))
    stats = torch_uvm.statistics()
    same((stats.prefetches, stats.moved_to_host, stats.moved_to_device), (4, 40 * MIB, 40 * MIB))
    same((stats.populated_device_peak, stats.populated_host_peak), (60 * MIB, 40 * MIB))
    check(kept, 1)
    check(moved, 2)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_accumulated_memory_stats()
    stats = torch_uvm.statistics()
    same((stats.prefetches, stats.moved_to_host, stats.populated_host_peak), (0, 0, 0))
    same(stats.populated_device, 60 * MIB)


@on_device(uvm_only=True)
def test_strided_tensors_stand_for_their_span() -> None:
    """A column of a matrix: from its first to its last element."""
    import torch_uvm

    matrix = torch.zeros(1024, 10240, dtype=torch.uint8, device="cuda")  # 10 MiB
    torch_uvm.prefetch(matrix[:, :4], "cpu")
    same(places()[1], 8)  # the last page is not wholly inside the span
    torch_uvm.prefetch(matrix.t(), "cuda")
    same(places()[1], 0)
    torch_uvm.prefetch(matrix[:0], "cpu")  # nothing to do
    same(places()[1], 0)


@on_device(uvm_only=True)
def test_freed_memory_comes_home() -> None:
    """What was moved out serves the next tensor from the device, discarded and not carried."""
    import torch_uvm

    tensor = filled(1, 40 * MIB)
    torch_uvm.prefetch(tensor, "cpu")
    address = tensor.data_ptr()
    del tensor
    same(places(), (0, 40))
    again = filled(2, 40 * MIB)
    same(again.data_ptr(), address)
    same(places(), (40, 0))
    same(torch_uvm.statistics().discarded, 40 * MIB)
    check(again, 2)


@on_device(uvm_only=True)
def test_advice_and_discard() -> None:
    """Each advice is taken; discarded memory can be written and read again."""
    import torch_uvm

    tensor = filled(1, 20 * MIB)
    for advice in ("set_preferred_location", "set_accessed_by", "unset_accessed_by"):
        torch_uvm.advise(tensor, advice, "cpu")
    for advice in ("unset_preferred_location", "set_read_mostly", "unset_read_mostly"):
        torch_uvm.advise(tensor, advice)
    torch_uvm.advise(tensor, "set_accessed_by", 0)
    check(tensor, 1)
    torch_uvm.discard(tensor)
    torch_uvm.discard(tensor, stream=torch.cuda.Stream())
    torch.cuda.synchronize()
    stats = torch_uvm.statistics()
    same((stats.advices, stats.discards, stats.discarded), (7, 2, 40 * MIB))
    del tensor
    check(filled(3, 20 * MIB), 3)


def refused(kind: type[Exception], text: str, call, *arguments: object, **named: object) -> None:
    with pytest.raises(kind, match=text):
        call(*arguments, **named)


@on_device(uvm_only=True, devices=2)
def test_bad_hints_are_errors_that_say_why() -> None:
    """And nothing has moved."""
    import torch_uvm

    tensor = filled(1, 20 * MIB)
    refused(ValueError, "on cpu is not allowed", torch_uvm.prefetch, torch.zeros(4), "cpu")
    refused(ValueError, "a list is not allowed", torch_uvm.discard, [1])
    refused(ValueError, "layout torch.sparse_coo", torch_uvm.prefetch, torch.eye(3).to_sparse(), "cpu")
    for device in ("gpu", -1, 1.5, "meta", True):
        refused(ValueError, "expected 'cpu' or a CUDA device", torch_uvm.prefetch, tensor, device)
    refused(ValueError, "is not there", torch_uvm.prefetch, tensor, 7)
    refused(RuntimeError, "cuda:1 is not allowed", torch_uvm.prefetch, tensor, 1)
    refused(ValueError, "expected one of set_preferred_location", torch_uvm.advise, tensor, "set_everything")
    refused(ValueError, "expected 'cpu' or a CUDA device", torch_uvm.advise, tensor, "set_accessed_by")
    refused(ValueError, "for set_read_mostly: expected none", torch_uvm.advise, tensor, "set_read_mostly", "cpu")
    refused(RuntimeError, "no whole page", torch_uvm.discard, tensor[: 2 * MIB - 1])
    refused(RuntimeError, "empty tensor", torch_uvm.discard, tensor[:0])
    refused(ValueError, "stream: one of cuda:1", torch_uvm.prefetch, tensor, "cpu", torch.cuda.Stream(1))
    same(places(), (20, 0))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        refused(RuntimeError, "capturing a CUDA graph", torch_uvm.prefetch, tensor, "cpu")
    pool = torch_uvm.MemPool("device")
    with torch.cuda.use_mem_pool(pool):
        plain = torch.zeros(MIB, device="cuda")
    refused(RuntimeError, "plain device memory", torch_uvm.prefetch, plain, "cpu")
    check(tensor, 1)


@on_device("", uvm_only=False)
def test_without_the_allocator_hints_are_errors() -> None:
    """And torch.cuda does not have the names that programs look for."""
    if not has_package():
        return
    import torch_uvm

    refused(RuntimeError, "use_uvm:True", torch_uvm.prefetch, torch.zeros(4, device="cuda"), "cpu")
    refused(RuntimeError, "use_uvm:True", torch_uvm.statistics)
    assert not hasattr(torch.cuda, "prefetch_to_device")
    assert "uvm_stage" not in torch.cuda.memory_stats()


def has_package() -> bool:
    """Whether the package is there at all: a patched PyTorch does without."""
    import importlib.util

    return importlib.util.find_spec("torch_uvm") is not None


@on_device(uvm_only=True)
def test_the_names_that_programs_look_for() -> None:
    """torch.cuda.memory_advise, prefetch_to_device, and the keys of memory_stats, as they are called on GH200."""
    import torch_uvm

    torch_uvm.activate()
    tensor = filled(1, 20 * MIB)
    torch.cuda.memory_advise(tensor, "set_preferred_location", device="cpu")
    torch.cuda.memory_advise(tensor, "set_accessed_by", device=0)
    torch.cuda.memory_advise(tensor, "set_read_mostly", device=0)
    torch.cuda.memory_advise(tensor, "unset_read_mostly")
    torch.cuda.prefetch_to_device(tensor, "cpu")
    stats = torch.cuda.memory_stats()
    same([stats[key] for key in ("uvm_stage", "uvm_light_reclamations", "uvm_hard_reclamations")], [0, 0, 0])
    same([stats[key] for key in ("uvm.stage", "uvm.light_reclamations", "uvm.hard_reclamations")], [0, 0, 0])
    same(stats["uvm.populated_bytes.host.current"], 20 * MIB)
    same(stats["uvm.populated_bytes.device.peak"], 20 * MIB)
    same(stats["uvm.moved_bytes.to_host"], 20 * MIB)
    torch.cuda.prefetch_to_device(tensor, 0)
    same(torch.cuda.memory_stats()["uvm.populated_bytes.device.current"], 20 * MIB)
    assert "allocated_bytes.all.current" in stats
    check(tensor, 1)


@on_device(LIMITED, uvm_only=True)
def test_segments_and_samples_by_place() -> None:
    """What the report draws."""
    import time

    import torch_uvm
    from torch_uvm import _library

    library = _library.running()
    assert library is not None
    same(library.place_samples(0), [])
    torch.cuda.memory._record_memory_history()
    first, second = filled(1, 100 * MIB), filled(2, 60 * MIB)
    small = torch.zeros(16, device="cuda")
    torch_uvm.prefetch(first[: 40 * MIB], "cpu")
    samples = library.place_samples(0)
    same(
        [(sample.device // MIB, sample.host // MIB) for sample in samples], [(100, 0), (100, 60), (102, 60), (62, 100)]
    )
    assert abs(samples[-1].time_us / 1e6 - time.time()) < 60
    same(samples[-1].allocated // MIB, 160)
    segments = {segment.base: segment for segment in library.segments(0)}
    same(len(segments), 3)
    of_first = segments[first.data_ptr()]
    same((of_first.place, of_first.memory, of_first.growing, of_first.small), ("device", "managed", True, False))
    same((of_first.populated_device // MIB, of_first.populated_host // MIB), (60, 40))
    same((of_first.filled // MIB, of_first.vacant, of_first.pool), (100, 0, (0, 0)))
    same(segments[second.data_ptr()].place, "host")
    assert segments[small.data_ptr()].small
    torch.cuda.memory._record_memory_history(None)
    same(library.place_samples(0), [])


@on_device("use_uvm:True,uvm_device_limit_mb:256,uvm_stage1_threshold:0", uvm_only=True, timeout=120)
def test_what_comes_and_goes_ends_on_the_device() -> None:
    """Weights and activations stay there, optimizer state moves to the host, and then nothing moves."""
    import torch_uvm

    torch_uvm.activate()  # a patched PyTorch, to which the package need not be installed, has not done it
    weights = [filled(seed, 16 * MIB) for seed in range(4)]
    state: list[torch.Tensor] = []
    moved = []
    for step in range(8):
        activations = []
        for _ in range(10):
            temporary = torch.empty(12 * MIB, dtype=torch.uint8, device="cuda")
            activations.append(torch.empty_like(temporary))
            del temporary
        while activations:
            gradient = torch.empty_like(activations[-1])
            activations.pop()
            del gradient
        if step == 0:
            state = [filled(seed, 12 * MIB) for seed in range(10, 18)]
        stats = torch_uvm.statistics()
        moved.append((stats.moved_to_host, stats.moved_to_device))
    assert stats.moves_out > 0 and stats.regrets == 0, stats
    assert stats.populated_device_peak <= 256 * MIB, stats
    same(moved[4:], [moved[4]] * 4)
    same(torch.cuda.memory_stats()["uvm_hard_reclamations"], stats.hard_reclamations)
    for seed, tensor in enumerate(weights):
        check(tensor, seed)
    for seed, tensor in enumerate(state, 10):
        check(tensor, seed)


OVERFLOWING = """
import torch
held = [torch.zeros(100 << 20, dtype=torch.uint8, device="cuda") for _ in range(2)]
torch.cuda.synchronize()
"""


@about_uvm
def test_events_are_written_where_they_are_asked_for() -> None:
    """To stderr, at the level and of the modules that TORCH_UVM_LOG names; a bad value is an error that says so."""
    told = {
        wanted: simulated.run_python(OVERFLOWING, simulated.environment(LIMITED, require=True, TORCH_UVM_LOG=wanted))
        for wanted in ("", "debug", "warn", "off,torch_uvm::device=debug", "torch_uvm::driver=debug", "loud")
    }
    for wanted in ("debug", "off,torch_uvm::device=debug"):
        assert told[wanted].status == 0 and "stage changed" in told[wanted].err, told[wanted].text
    for wanted in ("", "warn", "torch_uvm::driver=debug"):
        assert told[wanted].status == 0 and "stage changed" not in told[wanted].err, told[wanted].text
    assert told["loud"].status != 0 and "TORCH_UVM_LOG: 'loud' is not allowed" in told["loud"].err, told["loud"].text
