"""How much there is, what happens at the limit, and the options that decide it.

The simulated machine has 2 GiB of device memory and 10 GiB of host memory, unless a test says otherwise.
"""

from __future__ import annotations

import re

import pytest
import torch
from contents import MIB, block, check, filled, same
from on_device import on_device
from versions import needs

GIB = 1 << 30


def hoard(each: int = 128 * MIB) -> tuple[list[torch.Tensor], str]:
    """Allocates until the allocator refuses; what was got, and the error's text."""
    tensors: list[torch.Tensor] = []
    while True:
        try:
            tensors.append(block(each))
        except torch.cuda.OutOfMemoryError as error:
            return tensors, str(error)
        assert len(tensors) * each < 64 * GIB, "there seems to be no limit"


def between(found: int, low: int, high: int) -> None:
    """Fails unless `low <= found <= high`, in words that can be read."""
    if not low <= found <= high:
        raise AssertionError(f"{found / GIB:.3f} GiB is not between {low / GIB:.3f} and {high / GIB:.3f} GiB")


@on_device(uvm_only=True)
def test_more_than_the_device_holds() -> None:
    """Half as much again as the device's memory, every byte read back."""
    tensors = [filled(seed, 256 * MIB) for seed in range(12)]
    same(torch.cuda.memory_allocated(), 3 * GIB)
    for seed, tensor in enumerate(tensors):
        check(tensor, seed, f"tensor {seed}")


@pytest.mark.parametrize("pattern", ["gpu_first", "balanced", "cpu_first"])
@on_device("use_uvm:True,uvm_access_pattern:{pattern},uvm_host_reserve_mb:64", hbm="128MiB", host="1GiB", uvm_only=True)
def test_up_to_five_times_the_device(pattern: str) -> None:
    """1.5, 3 and 5 times the device's memory, one after the other: every byte read back each time; then the cap."""
    tensors: list[torch.Tensor] = []
    for times in (1.5, 3.0, 5.0):
        while len(tensors) * 8 * MIB < times * 128 * MIB:
            tensors.append(filled(len(tensors), 8 * MIB))
        same(torch.cuda.memory_allocated(), int(times * 128) * MIB)
        for seed, tensor in enumerate(tensors):
            check(tensor, seed, f"tensor {seed} at {times} times the device, {pattern}")
    _, text = hoard(8 * MIB)
    assert "uvm_oversubscription_ratio" in text, text
    for seed, tensor in enumerate(tensors):
        check(tensor, seed, f"tensor {seed} after the error, {pattern}")
    tensors.clear()
    del tensor
    torch.cuda.empty_cache()
    same(torch.cuda.memory_reserved(), 0)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.5, 3.0])
@on_device("use_uvm:True,uvm_oversubscription_ratio:{ratio}", uvm_only=True)
def test_the_ratio_is_a_hard_cap(ratio: float) -> None:
    """Allocation stops at the ratio times the device's memory."""
    tensors, text = hoard()
    limit = int(ratio * 2 * GIB)
    between(len(tensors) * 128 * MIB, limit - 256 * MIB, limit)
    assert "uvm_oversubscription_ratio" in text, text
    between(torch.cuda.memory_reserved(), 0, limit)


@on_device("use_uvm:True,uvm_oversubscription_ratio:100,uvm_host_reserve_mb:4096", uvm_only=True)
def test_the_host_reserve() -> None:
    """Device and host memory together, less the reserve: 2 + 10 - 4 GiB; the error names the option."""
    tensors, text = hoard()
    between(len(tensors) * 128 * MIB, 6 * GIB, 8 * GIB)
    assert "uvm_host_reserve_mb" in text, text


@on_device("use_uvm:True,uvm_oversubscription_ratio:100", host="4GiB", uvm_only=True)
def test_the_default_reserve() -> None:
    """The larger of 2048 MiB and 5 % is left to others: 2 + 4 - 2 GiB."""
    tensors, text = hoard()
    between(len(tensors) * 128 * MIB, 3 * GIB, 4 * GIB)
    assert "uvm_host_reserve_mb" in text, text


@on_device()
def test_the_error_says_what_matters() -> None:
    """What was asked, what is held, and which limit was met."""
    torch.cuda.set_per_process_memory_fraction(0.25)
    kept = block(100 * MIB)
    try:
        block(1024 * MIB)
    except torch.cuda.OutOfMemoryError as error:
        text = str(error)
    else:
        raise AssertionError("1 GiB under a limit of 512 MiB")
    assert text.startswith(
        "CUDA out of memory. Tried to allocate 1024.00 MiB. GPU 0 has a total capacity of 2.00 GiB"
    ), text
    assert re.search(r"Of the allocated memory 100\.00 MiB is allocated by PyTorch", text), text
    assert "512.00 MiB allowed" in text, text
    assert isinstance(torch.cuda.OutOfMemoryError("x"), RuntimeError)
    del kept


@on_device()
def test_the_program_goes_on_after_the_error() -> None:
    """The cache is given back before the error, live tensors stay whole, and what fits is served."""
    torch.cuda.set_per_process_memory_fraction(0.25)
    kept = filled(1, 100 * MIB)
    for _ in range(3):
        try:
            block(1024 * MIB)
        except torch.cuda.OutOfMemoryError:
            pass
        else:
            raise AssertionError("1 GiB under a limit of 512 MiB")
        tensor = filled(2, 30 * MIB)
        check(tensor, 2)
        check(kept, 1)
        del tensor
    del kept
    torch.cuda.empty_cache()
    same(torch.cuda.memory_reserved(), 0)


@on_device()
def test_the_cache_is_given_back_before_the_error() -> None:
    """Cached blocks of another size do not stand in the way."""
    torch.cuda.set_per_process_memory_fraction(0.25)
    for count in (400, 10, 450, 30, 500):
        tensors = [block(10 * MIB) for _ in range(count // 10 - 1)] + [filled(count, 10 * MIB)]
        check(tensors[-1], count)
        del tensors
        block(count * MIB)
    same(torch.cuda.memory_stats()["num_ooms"], 0)


@on_device()
def test_the_fraction_is_of_the_devices_memory() -> None:
    """A quarter of 2 GiB; 1.0 takes the limit away again."""
    torch.cuda.set_per_process_memory_fraction(0.25)
    same(torch.cuda.get_per_process_memory_fraction(), 0.25)
    tensors, text = hoard(32 * MIB)
    between(len(tensors) * 32 * MIB, 448 * MIB, 512 * MIB)
    assert "allowed" in text, text
    torch.cuda.set_per_process_memory_fraction(1.0)
    tensors += [block(32 * MIB) for _ in range(32)]


@on_device(uvm_only=True)
def test_a_fraction_of_one_is_no_limit() -> None:
    """PyTorch's default fraction is 1.0: unified memory still goes beyond the device."""
    torch.cuda.set_per_process_memory_fraction(1.0)
    tensors = [block(512 * MIB) for _ in range(6)]
    same(torch.cuda.memory_allocated(), 3 * GIB)
    del tensors


@pytest.mark.parametrize("pattern", ["gpu_first", "balanced", "cpu_first"])
@on_device("use_uvm:True,uvm_access_pattern:{pattern},uvm_oversubscription_ratio:2", uvm_only=True)
def test_each_pattern_holds_more_than_the_device(pattern: str) -> None:
    """Tensors, streams, graphs and the cap, with 2.5 GiB on a device of 2."""
    from test_statistics import check_agreement

    tensors = [filled(seed, 100 * MIB) for seed in range(25)]
    for seed, tensor in enumerate(tensors):
        check(tensor, seed)
    check_agreement(pattern)
    del tensors, tensor
    side = torch.cuda.Stream()
    source, kept = filled(1, 30 * MIB), block(30 * MIB)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        kept.copy_(source, non_blocking=True)
    source.record_stream(side)
    del source
    intruder = filled(2, 30 * MIB)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = torch.empty_like(intruder)
        result.copy_(intruder)
    graph.replay()
    side.synchronize()
    check(kept, 1)
    check(intruder, 2)
    check(result, 2)
    hoarded, text = hoard()
    assert "uvm_oversubscription_ratio" in text, text
    hoarded.clear()
    torch.cuda.empty_cache()
    check_agreement(f"{pattern}, at the end")


@on_device("use_uvm:True,uvm_access_pattern:gpu_first,uvm_prefetch:True", uvm_only=True)
def test_gpu_first_populates_the_device() -> None:
    """The device's free memory falls by what is populated there."""
    before = torch.cuda.mem_get_info()[0]
    tensor = block(512 * MIB)
    torch.cuda.synchronize()
    between(before - torch.cuda.mem_get_info()[0], 512 * MIB, 640 * MIB)
    del tensor


@on_device("use_uvm:True,uvm_access_pattern:cpu_first", uvm_only=True)
def test_cpu_first_leaves_the_device_alone() -> None:
    """The device's free memory stays as it is."""
    before = torch.cuda.mem_get_info()[0]
    tensor = filled(1, 512 * MIB)
    torch.cuda.synchronize()
    between(before - torch.cuda.mem_get_info()[0], 0, 64 * MIB)
    check(tensor, 1)


@on_device("use_uvm:True,uvm_prefetch:False", uvm_only=True)
def test_without_prefetch_nothing_is_populated_ahead() -> None:
    """Memory that is not written to takes no room on the device."""
    before = torch.cuda.mem_get_info()[0]
    tensor = block(512 * MIB)
    torch.cuda.synchronize()
    between(before - torch.cuda.mem_get_info()[0], 0, 64 * MIB)
    tensor.copy_(filled(1, 512 * MIB).cpu())
    check(tensor, 1)


@on_device("use_uvm:True,uvm_prefetch_threshold_mb:256", uvm_only=True)
def test_the_prefetch_threshold() -> None:
    """Allocations of at least this size are not prefetched, smaller ones are."""
    start = torch.cuda.mem_get_info()[0]
    large = block(512 * MIB)
    torch.cuda.synchronize()
    middle = torch.cuda.mem_get_info()[0]
    between(start - middle, 0, 64 * MIB)
    small = block(128 * MIB)
    torch.cuda.synchronize()
    between(middle - torch.cuda.mem_get_info()[0], 128 * MIB, 256 * MIB)
    del large, small


@on_device("use_uvm:True,uvm_device_limit_mb:512", uvm_only=True)
def test_the_device_limit() -> None:
    """Beyond it, memory is placed in the host's: the device keeps the rest free, and nothing is lost."""
    before = torch.cuda.mem_get_info()[0]
    tensors = [filled(seed, 128 * MIB) for seed in range(12)]
    torch.cuda.synchronize()
    between(before - torch.cuda.mem_get_info()[0], 256 * MIB, 768 * MIB)
    for seed, tensor in enumerate(tensors):
        check(tensor, seed)


@on_device("use_uvm:True,uvm_stage1_threshold:0.6", uvm_only=True)
def test_stage_one_gives_the_cache_back() -> None:
    """When less than 60 % of the device is free, cached blocks go before the pool grows."""
    _fill_and_grow(given_back=True)


@on_device("use_uvm:True,uvm_stage1_threshold:0", uvm_only=True)
def test_stage_one_can_be_off() -> None:
    """At threshold 0 the pool grows beside its cache."""
    _fill_and_grow(given_back=False)


@on_device("use_uvm:True,uvm_stage1_threshold:0,uvm_stage1_min_bytes:1610612736", uvm_only=True)
def test_stage_one_as_a_number_of_bytes() -> None:
    """The same with 1.5 GiB of 2 GiB as the mark."""
    _fill_and_grow(given_back=True)


def _fill_and_grow(given_back: bool) -> None:
    """Caches 1 GiB on a side stream, then asks for memory on the main stream, which that cache cannot serve."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        cached = block(1024 * MIB)
        del cached
    torch.cuda.synchronize()
    same(torch.cuda.memory_reserved() >= 1024 * MIB, True)
    tensor = filled(1, 64 * MIB)
    check(tensor, 1)
    same(torch.cuda.memory_reserved() < 1024 * MIB, given_back, "the cached GiB was given back")


@on_device("use_uvm:True,uvm_access_pattern:device")
def test_device_placement_ends_with_the_device() -> None:
    """Plain device memory: no oversubscription, an error at the device's limit, and work goes on after it."""
    tensors, text = hoard(64 * MIB)
    between(len(tensors) * 64 * MIB, 1 * GIB, 2 * GIB)
    assert "out of memory" in text, text
    tensors.clear()
    tensor = filled(1, 100 * MIB)
    check(tensor, 1)


@on_device()
def test_sizes_near_the_end_of_the_address_space() -> None:
    """No overflow, no crash: OutOfMemoryError or a plain error, and the allocator goes on."""
    for count in (2**40, 2**62, 2**63 - 1, 2**63 - 511, 2**63 - 512 * 4096):
        for allocate in (
            lambda count=count: block(count),
            lambda count=count: torch.cuda.caching_allocator_alloc(count),
        ):
            try:
                allocate()
            except RuntimeError:  # OutOfMemoryError is one
                pass
            else:
                raise AssertionError(f"{count} bytes were allocated")
            tensor = filled(3, MIB)
            check(tensor, 3)
    same(torch.cuda.memory_allocated(), MIB)


@on_device()
def test_an_impossible_size_names_itself() -> None:
    """PyTorch's own programs match this class."""
    try:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    except torch.cuda.OutOfMemoryError as error:
        assert "1048576.00 GiB" in str(error) or "1024.00 TiB" in str(error), error
    else:
        raise AssertionError("a pebibyte was allocated")


@on_device("use_uvm:True", uvm_only=True)
def test_settings_at_run_time() -> None:
    """`_set_allocator_settings` takes PyTorch's keys and ours; a bad one is an error and changes nothing."""
    tensor = filled(1, 3 * MIB)
    torch.cuda.memory._set_allocator_settings("max_split_size_mb:40")
    same(torch.cuda.memory_stats()["max_split_size"], 40 * MIB)
    for bad, words in (("uvm_prefetch:perhaps", ("uvm_prefetch", "perhaps")), ("uvm_colour:blue", ("uvm_colour",))):
        try:
            torch.cuda.memory._set_allocator_settings(bad)
        except (RuntimeError, ValueError) as error:
            assert all(word in str(error) for word in words), error
        else:
            raise AssertionError(f"{bad} was accepted")
    check(tensor, 1)
    check(filled(2, 3 * MIB), 2)
    same(torch.cuda.get_allocator_backend(), "uvm")


@needs("torch.accelerator.get_memory_info")
@on_device()
def test_memory_info_counts_what_is_allocated() -> None:
    """Asked around an allocation, it falls by what was reserved, and rises again; the total stays."""
    before = torch.accelerator.get_memory_info()
    tensor = block(512 * MIB)
    during = torch.accelerator.get_memory_info()
    same(during[1], before[1], "total")
    same(before[0] - during[0], torch.cuda.memory_reserved(), "the difference")
    del tensor
    torch.cuda.empty_cache()
    same(torch.accelerator.get_memory_info(), before)


@needs("torch.accelerator.get_memory_info")
@pytest.mark.parametrize(
    ("options", "capacity"), [("", 10), ("uvm_oversubscription_ratio:1.5", 3), ("uvm_host_reserve_mb:8192", 4)]
)
@on_device("use_uvm:True,{options}", uvm_only=True)
def test_memory_info_is_the_capacity(options: str, capacity: int) -> None:
    """GiB of capacity: what a program that fills "free" memory can have. (5.0 times 2 GiB, by default.)"""
    free, total = torch.accelerator.get_memory_info()
    same((free, total), (capacity * GIB, capacity * GIB))
    same(torch.cuda.mem_get_info()[1], 2 * GIB, "the device's own memory")
    tensors, text = hoard()
    assert "out of memory" in text
    between(len(tensors) * 128 * MIB, free - 256 * MIB, free)
    between(torch.accelerator.get_memory_info()[0], 0, 256 * MIB)


@needs("torch.accelerator.memory_stats")
@on_device()
def test_the_accelerator_sees_this_allocator() -> None:
    """`torch.accelerator` and `torch.cuda` say the same, and act on the same memory."""
    tensor = block(30 * MIB)
    for ask in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        same(getattr(torch.accelerator, ask)(), getattr(torch.cuda, ask)(), ask)
    same(torch.accelerator.memory_allocated(), 30 * MIB)
    del tensor
    torch.accelerator.reset_peak_memory_stats()
    same(torch.cuda.max_memory_allocated(), 0)
    torch.accelerator.empty_cache()
    same(torch.cuda.memory_reserved(), 0)


@needs("per_process_memory_fraction:…")
@on_device("use_uvm:True,per_process_memory_fraction:0.25", init=False)
def test_the_fraction_among_the_settings() -> None:
    """PyTorch's key is worth a call of `set_per_process_memory_fraction`: 512 MiB here."""
    block(1)
    same(torch.cuda.get_per_process_memory_fraction(), 0.25)
    tensors, _ = hoard(64 * MIB)
    between(len(tensors) * 64 * MIB, 384 * MIB, 512 * MIB)
    del tensors
    torch.cuda.set_per_process_memory_fraction(0.5)
    tensors, _ = hoard(64 * MIB)
    between(len(tensors) * 64 * MIB, 896 * MIB, 1024 * MIB)


@needs("throw_on_cudamalloc_oom:…", "num_oom_rejections")
@on_device(
    "use_uvm:True,uvm_oversubscription_ratio:1.0,throw_on_cudamalloc_oom:True,per_process_memory_fraction:1.0",
    init=False,
)
def test_early_refusals_are_counted() -> None:
    """`throw_on_cudamalloc_oom`: what would exceed the limit is refused before CUDA is asked, and counted apart."""
    kept = filled(1, 100 * MIB)
    try:
        block(3 * GIB)
    except torch.cuda.OutOfMemoryError as error:
        assert "out of memory" in str(error), error
    else:
        raise AssertionError("3 GiB where there are 2")
    same(torch.cuda.memory_stats()["num_oom_rejections"], 1)
    check(kept, 1)
    check(filled(2, 100 * MIB), 2)
