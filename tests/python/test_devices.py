"""Two simulated devices."""

from __future__ import annotations

import torch
from contents import MIB, block, check, filled, same
from on_device import on_device


@on_device(devices=2)
def test_each_device_has_its_own_books() -> None:
    """Statistics, caches and snapshots by device."""
    same(torch.cuda.device_count(), 2)
    first, second = filled(1, 3 * MIB, "cuda:0"), filled(2, 5 * MIB, "cuda:1")
    same(torch.cuda.memory_allocated(0), 3 * MIB)
    same(torch.cuda.memory_allocated(1), 5 * MIB)
    same(sorted(segment["device"] for segment in torch.cuda.memory_snapshot()), [0, 1])
    check(first, 1)
    check(second, 2)
    del second
    same(torch.cuda.memory_allocated(1), 0)
    same(torch.cuda.memory_allocated(0), 3 * MIB)
    torch.cuda.empty_cache()
    same(torch.cuda.memory_reserved(1), 0)
    check(first, 1)


@on_device(devices=2)
def test_the_current_device_decides() -> None:
    """A plain `cuda` tensor goes to the current device, and the current device stays as it was."""
    with torch.cuda.device(1):
        tensor = block(MIB)
        same(tensor.device.index, 1)
        other = block(MIB, "cuda:0")
        same(torch.cuda.current_device(), 1)
    same(torch.cuda.current_device(), 0)
    del tensor
    same(torch.cuda.current_device(), 0)
    same(other.device.index, 0)


@on_device(devices=2)
def test_copies_between_devices() -> None:
    """Peer copies there and back keep every byte."""
    for count in (1000, 5 * MIB):
        here = filled(1, count, "cuda:0")
        there = here.to("cuda:1")
        check(there, 1, "on the second device")
        del here
        back = there.to("cuda:0", non_blocking=True)
        check(back, 1, "back on the first")


@on_device(devices=2)
def test_record_stream_across_devices() -> None:
    """A block of one device used by a stream of the other waits for that stream."""
    side = torch.cuda.Stream("cuda:1")
    source, kept = filled(1, 5 * MIB, "cuda:0"), block(5 * MIB, "cuda:1")
    side.wait_stream(torch.cuda.current_stream(0))
    with torch.cuda.stream(side):
        kept.copy_(source, non_blocking=True)
    source.record_stream(side)
    address = source.data_ptr()
    del source
    intruders = [filled(seed, 5 * MIB, "cuda:0") for seed in range(2, 5)]
    assert address != intruders[0].data_ptr(), "handed out while the other device reads it"
    side.synchronize()
    check(kept, 1)
    for seed, intruder in enumerate(intruders, 2):
        check(intruder, seed)


@on_device(devices=2)
def test_a_limit_on_one_device_leaves_the_other_alone() -> None:
    """set_per_process_memory_fraction is by device."""
    torch.cuda.set_per_process_memory_fraction(0.125, 1)  # 256 MiB
    kept = block(400 * MIB, "cuda:0")
    try:
        block(400 * MIB, "cuda:1")
    except torch.cuda.OutOfMemoryError as error:
        assert "GPU 1" in str(error), error
    else:
        raise AssertionError("400 MiB under a limit of 256 MiB")
    del kept


@on_device(devices=2)
def test_graphs_on_the_second_device() -> None:
    """Private pools are by device."""
    with torch.cuda.device(1):
        given = filled(1, 3 * MIB, "cuda:1")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = torch.empty_like(given)
            result.copy_(given)
        given.copy_(filled(2, 3 * MIB, "cuda:1"))
        graph.replay()
    check(result, 2)
    private = [one for one in torch.cuda.memory_snapshot() if tuple(one["segment_pool_id"]) == graph.pool()]
    same({segment["device"] for segment in private}, {1})


@on_device(devices=2)
def test_freeing_under_another_current_device() -> None:
    """The block's own device is what counts."""
    tensor = filled(1, 3 * MIB, "cuda:1")
    address = tensor.data_ptr()
    with torch.cuda.device(0):
        del tensor
    same(block(3 * MIB, "cuda:1").data_ptr(), address)
    with torch.cuda.device(0):
        torch.cuda.empty_cache()
    same(torch.cuda.memory_reserved(1), 0)
