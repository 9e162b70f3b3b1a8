"""`torch.cuda.memory_stats` and what is built on it."""

from __future__ import annotations

import gc

import torch
from contents import MIB, block, same
from on_device import on_device


def sums(snapshot: list[dict]) -> dict[str, int]:
    """What the statistics must say, from the snapshot's blocks."""
    # As with native's expandable segments, `segment` counts those that do not grow.
    fixed = sum(not segment["is_expandable"] for segment in snapshot)
    totals = {"segments": fixed, "reserved": 0, "allocated": 0, "active": 0, "requested": 0, "live": 0}
    for segment in snapshot:
        totals["reserved"] += segment["total_size"]
        same(sum(one["size"] for one in segment["blocks"]), segment["total_size"], "the blocks fill their segment")
        for one in segment["blocks"]:
            if one["state"] == "active_allocated":
                totals["allocated"] += one["size"]
                totals["live"] += 1
            if one["state"].startswith("active"):
                totals["active"] += one["size"]
                totals["requested"] += one["requested_size"]
    return totals


def check_agreement(when: str) -> None:
    """The statistics, the snapshot and the short functions tell the same."""
    stats, found = torch.cuda.memory_stats(), sums(torch.cuda.memory_snapshot())
    for key, statistic in (
        ("segments", "segment.all.current"),
        ("reserved", "reserved_bytes.all.current"),
        ("allocated", "allocated_bytes.all.current"),
        ("active", "active_bytes.all.current"),
        ("requested", "requested_bytes.all.current"),
        ("live", "allocation.all.current"),
    ):
        same(stats[statistic], found[key], f"{when}: {statistic}")
    same(torch.cuda.memory_allocated(), found["allocated"], when)
    same(torch.cuda.memory_reserved(), found["reserved"], when)
    for statistic in ("allocation", "allocated_bytes", "reserved_bytes", "active_bytes", "segment", "requested_bytes"):
        for kind in ("current", "peak", "allocated", "freed"):
            both = stats[f"{statistic}.small_pool.{kind}"] + stats[f"{statistic}.large_pool.{kind}"]
            if kind != "peak":  # the pools need not peak together
                same(both, stats[f"{statistic}.all.{kind}"], f"{when}: {statistic} by pool, {kind}")
        everything = stats[f"{statistic}.all.allocated"] - stats[f"{statistic}.all.freed"]
        same(everything, stats[f"{statistic}.all.current"], f"{when}: {statistic}, what came less what went")


@on_device()
def test_statistics_agree_with_the_snapshot() -> None:
    """Through allocation, freeing, splitting and emptying the cache."""
    check_agreement("at the start")
    same(torch.cuda.memory_allocated(), 0)
    tensors = [block(size) for size in (1, 512, 513, 100_000, MIB, MIB + 1, 3 * MIB, 10 * MIB, 64 * MIB)]
    check_agreement("with tensors")
    del tensors[::2]
    check_agreement("with every other one freed")
    tensors += [block(2 * MIB) for _ in range(5)]
    check_agreement("with others in their place")
    tensors.clear()
    check_agreement("with all freed")
    same(torch.cuda.memory_allocated(), 0)
    assert torch.cuda.memory_reserved() > 0, "nothing was cached"
    torch.cuda.empty_cache()
    check_agreement("with an empty cache")
    same(torch.cuda.memory_reserved(), 0)
    same(torch.cuda.memory_snapshot(), [])


@on_device()
def test_sizes_are_rounded_to_512_bytes() -> None:
    """`allocated` counts rounded bytes, `requested` what was asked."""
    for asked, rounded in ((1, 512), (512, 512), (513, 1024), (MIB, MIB), (5 * MIB + 1, 5 * MIB + 512)):
        before = torch.cuda.memory_stats()
        tensor = block(asked)
        after = torch.cuda.memory_stats()
        for statistic, expected in (("allocated_bytes", rounded), ("requested_bytes", asked), ("allocation", 1)):
            key = f"{statistic}.all.current"
            same(after[key] - before[key], expected, f"{key} for {asked} bytes")
        del tensor


@on_device()
def test_nothing_is_allocated_for_nothing() -> None:
    """An empty tensor has no block."""
    tensor = block(0)
    same(torch.cuda.memory_stats()["allocation.all.current"], 0)
    same(tensor.data_ptr(), 0)


@on_device()
def test_peaks_and_their_reset() -> None:
    """Peaks stay until they are reset, and then start from the level."""
    kept = block(4 * MIB)
    tensor = block(30 * MIB)
    del tensor
    same(torch.cuda.max_memory_allocated(), 34 * MIB)
    assert torch.cuda.max_memory_reserved() >= 34 * MIB
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    same(torch.cuda.max_memory_allocated(), 4 * MIB)
    same(torch.cuda.max_memory_reserved(), torch.cuda.memory_reserved())
    tensor = block(6 * MIB)
    same(torch.cuda.max_memory_allocated(), 10 * MIB)
    del tensor, kept
    same(torch.cuda.max_memory_allocated(), 10 * MIB)


@on_device()
def test_accumulated_statistics_and_their_reset() -> None:
    """`allocated` and `freed` count everything since the last reset; levels are not touched by it."""
    tensors = [block(2 * MIB) for _ in range(4)]
    del tensors[2:]
    stats = torch.cuda.memory_stats()
    same((stats["allocation.all.allocated"], stats["allocation.all.freed"]), (4, 2))
    same((stats["allocated_bytes.all.allocated"], stats["allocated_bytes.all.freed"]), (8 * MIB, 4 * MIB))
    torch.cuda.reset_accumulated_memory_stats()
    stats = torch.cuda.memory_stats()
    same((stats["allocation.all.allocated"], stats["allocation.all.freed"]), (0, 0))
    same(stats["allocation.all.current"], 2)
    del tensors
    same(torch.cuda.memory_stats()["allocation.all.freed"], 2)


@on_device()
def test_retries_and_out_of_memory_are_counted() -> None:
    """`num_ooms`, and `num_alloc_retries` where the cache had to be given back first."""
    torch.cuda.set_per_process_memory_fraction(0.25)  # 512 MiB
    tensor = block(400 * MIB)
    del tensor
    tensor = block(450 * MIB)
    stats = torch.cuda.memory_stats()
    same(stats["num_ooms"], 0)
    try:
        block(450 * MIB)
    except torch.cuda.OutOfMemoryError:
        pass
    else:
        raise AssertionError("900 MiB under a limit of 512 MiB")
    stats = torch.cuda.memory_stats()
    same(stats["num_ooms"], 1)
    assert stats["num_alloc_retries"] >= 1, stats["num_alloc_retries"]
    check_agreement("after an error")
    del tensor


@on_device()
def test_device_calls_are_counted() -> None:
    """`num_device_alloc` and `num_device_free` follow the segments."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_stats()
    tensor = block(40 * MIB)
    middle = torch.cuda.memory_stats()
    assert middle["num_device_alloc"] > before["num_device_alloc"]
    del tensor
    torch.cuda.empty_cache()
    assert torch.cuda.memory_stats()["num_device_free"] > middle["num_device_free"]


@on_device()
def test_the_summary_can_be_printed() -> None:
    """`memory_summary` reads every statistic there is."""
    tensor = block(3 * MIB)
    text = torch.cuda.memory_summary()
    assert "Allocated memory" in text and "3072 KiB" in text, text
    assert "Allocated memory" in torch.cuda.memory_summary(abbreviated=True)
    nested = torch.cuda.memory_stats_as_nested_dict()
    same(nested["allocated_bytes"]["all"]["current"], tensor.numel())


@on_device()
def test_raw_allocations_are_counted_alike() -> None:
    """`caching_allocator_alloc`, which other libraries use."""
    address = torch.cuda.caching_allocator_alloc(5 * MIB)
    same(torch.cuda.memory_allocated(), 5 * MIB)
    check_agreement("with a raw allocation")
    torch.cuda.caching_allocator_delete(address)
    same(torch.cuda.memory_allocated(), 0)


@on_device()
def test_the_generic_functions_agree() -> None:
    """`torch.accelerator` and the older names see the same allocator."""
    same(str(torch.accelerator.current_accelerator()), "cuda")
    tensor = block(MIB)
    same(torch.cuda.memory_cached(), torch.cuda.memory_reserved())
    free, total = torch.cuda.mem_get_info()
    assert 0 < free <= total == torch.cuda.get_device_properties(0).total_memory == 2048 * MIB
    del tensor
    torch.accelerator.synchronize()


@on_device(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
def test_without_caching() -> None:
    """PYTORCH_NO_CUDA_MEMORY_CACHING: every block comes from CUDA and goes back to it."""
    from contents import check, filled

    free_before = torch.cuda.mem_get_info()[0]
    tensors = [filled(seed, 3 * MIB) for seed in range(4)]
    for seed, tensor in enumerate(tensors):
        check(tensor, seed)
    same(torch.cuda.memory_reserved(), 0)
    del tensors, tensor
    gc.collect()
    torch.cuda.synchronize()
    same(torch.cuda.mem_get_info()[0], free_before, "free memory afterwards")


@on_device()
def test_caching_can_be_switched_off_and_on() -> None:
    """`caching_allocator_enable`: blocks of either kind can be freed under either setting."""
    from contents import check, filled

    cached = filled(1, 2 * MIB)
    torch.cuda.caching_allocator_enable(False)
    same(torch._C._cuda_isHistoryEnabled() if hasattr(torch._C, "_cuda_isHistoryEnabled") else False, False)
    plain = filled(2, 2 * MIB)
    same(torch.cuda.memory_allocated(), 2 * MIB)
    torch.cuda.caching_allocator_enable(True)
    check(cached, 1)
    check(plain, 2)
    del plain, cached
    same(torch.cuda.memory_allocated(), 0)
