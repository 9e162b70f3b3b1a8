"""The Python package `torch_uvm` beside PyTorch: what it reports, and tensors that are put in a chosen place."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from contents import MIB, block, check, filled, same
from on_device import on_device
from simulated import environment, run_python
from under_test import from_source, torch_uvm

from torch_uvm import _tables

CPU_FIRST = "use_uvm:True,uvm_access_pattern:cpu_first"
PLACEMENTS = ("gpu_first", "balanced", "cpu_first", "device")
#: What counts the memory of each placement, as long as the device has room.
COUNTED = {
    "gpu_first": "populated_device",
    "balanced": "populated_unplaced",
    "cpu_first": "populated_host",
    "device": "populated_device",
}
PYTORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def growth(before: torch_uvm.MemoryInfo, after: torch_uvm.MemoryInfo) -> dict[str, int]:
    """By how much each kind of populated memory has grown, those that have not left out."""
    found = {name: getattr(after, name) - getattr(before, name) for name in sorted(set(COUNTED.values()))}
    return {name: bytes_ for name, bytes_ in found.items() if bytes_}


def refused(kind: type[Exception], call: object, *arguments: object, **more: object) -> str:
    """The text of the error that a call must end in."""
    assert callable(call)
    try:
        call(*arguments, **more)
    except kind as error:
        return str(error)
    raise AssertionError(f"{arguments} {more} were accepted")


@on_device(uvm_only=True)
def test_enabled() -> None:
    """As PyTorch says by another way."""
    assert torch_uvm.is_enabled()
    same(torch.cuda.get_allocator_backend(), "uvm")


def test_where_use_uvm_is_off() -> None:
    """`is_enabled` answers, all else is an error that says what to set. The source folder is as good as the package."""
    code = """
import torch, torch_uvm
assert not torch_uvm.is_enabled()
def enter():
    with torch_uvm.placement("cpu_first"):
        pass
for call in (torch_uvm.config, torch_uvm.memory_info, lambda: torch_uvm.MemPool("cpu_first"), enter):
    try:
        call()
    except RuntimeError as error:
        assert "PYTORCH_CUDA_ALLOC_CONF=use_uvm:True" in str(error), error
    else:
        raise AssertionError(call)
assert not torch.cuda.is_initialized()
"""
    ended = run_python(code, from_source(environment("", require=True)))
    assert ended.status == 0 and not ended.err, ended.text


@on_device(
    "use_uvm:True,uvm_oversubscription_ratio:2.5,uvm_access_pattern:balanced,uvm_prefetch:False,"
    "uvm_prefetch_threshold_mb:64,uvm_device_limit_mb:1000,uvm_stage1_threshold:0.25,uvm_stage1_min_bytes:4096",
    uvm_only=True,
    init=False,
)
def test_the_options() -> None:
    """All of them, typed; before CUDA is initialised and after."""
    expected = {
        "use_uvm": True,
        "uvm_oversubscription_ratio": 2.5,
        "uvm_access_pattern": "balanced",
        "uvm_prefetch": False,
        "uvm_prefetch_threshold_mb": 64,
        "uvm_device_limit_mb": 1000,
        "uvm_host_reserve_mb": None,
        "uvm_stage1_threshold": 0.25,
        "uvm_stage1_min_bytes": 4096,
    }
    for _ in range(2):
        found = torch_uvm.config()
        same(list(found), list(_tables.OPTIONS))
        for key, value in expected.items():
            same((found[key], type(found[key])), (value, type(value)), key)
        torch.cuda.init()


@on_device(uvm_only=True)
def test_the_options_after_a_change() -> None:
    """Settings made at run time show."""
    torch.cuda.memory._set_allocator_settings("uvm_device_limit_mb:512")
    same(torch_uvm.config()["uvm_device_limit_mb"], 512)
    same(torch_uvm.memory_info().device_limit, 512 * MIB)


@on_device("use_uvm:True,uvm_prefetch:sometimes", uvm_only=True, init=False)
def test_wrong_options() -> None:
    """`config` says what the first use of CUDA's memory says."""
    assert torch_uvm.is_enabled()
    text = refused(ValueError, torch_uvm.config)
    assert all(words in text for words in ("uvm_prefetch", "sometimes", "True or False")), text


@on_device(uvm_only=True, init=False)
def test_memory_info() -> None:
    """The figures fit together and follow allocations; asking initialises CUDA."""
    before = torch_uvm.memory_info()
    assert torch.cuda.is_initialized()
    same(before.device_total, 2 << 30)
    same((before.allocated, before.reserved), (0, 0))
    assert before.device_total < before.capacity <= before.device_total + before.host_total - before.host_reserve
    assert 0 < before.free <= before.capacity and 0 < before.device_limit <= before.device_total
    tensors = [filled(seed, size) for seed, size in enumerate((100 * MIB, MIB, 1000))]
    after = torch_uvm.memory_info()
    same(after.allocated, torch.cuda.memory_allocated())
    same(after.reserved, torch.cuda.memory_reserved())
    same(after.populated_device + after.populated_host + after.populated_unplaced, after.reserved)
    same(growth(before, after), {"populated_device": after.reserved})
    # The driver takes the device's memory in larger steps than it is populated in: the rest counts as not free.
    assert after.reserved <= before.free - after.free < after.reserved + 64 * MIB, (before, after)
    for seed, tensor in enumerate(tensors):
        check(tensor, seed)
    lines = str(after).splitlines()
    assert "capacity" in lines[0] and "2.00 GiB" in str(after) and len(lines) == 4, str(after)
    if PYTORCH >= (2, 11):
        same(tuple(torch.accelerator.get_memory_info()), (after.free, after.capacity))


@on_device(uvm_only=True, devices=2)
def test_memory_info_of_a_device() -> None:
    """Named in every way that PyTorch knows; wrong ones are errors."""
    tensor = block(30 * MIB, device="cuda:1")
    for device in (1, "cuda:1", torch.device("cuda", 1)):
        same(torch_uvm.memory_info(device).allocated, 30 * MIB)
    for device in (None, 0, "cuda", torch.device("cuda:0")):
        same(torch_uvm.memory_info(device).allocated, 0)
    with torch.cuda.device(1):
        same(torch_uvm.memory_info().allocated, 30 * MIB)
        same(torch_uvm.memory_info("cuda").allocated, 30 * MIB)
    assert "'cpu'" in refused(ValueError, torch_uvm.memory_info, "cpu")
    for device in (2, -1, "cuda:7"):
        assert "2 CUDA device" in refused(RuntimeError, torch_uvm.memory_info, device)
    del tensor


@pytest.mark.parametrize("placement", PLACEMENTS)
@on_device(uvm_only=True)
def test_a_pools_placement(placement: str) -> None:
    """The pool's memory, small and large, is where it was asked to be, and what lies outside is not."""
    pool = torch_uvm.MemPool(placement)
    same(pool.placement, placement)
    assert isinstance(pool, torch.cuda.MemPool)
    before = torch_uvm.memory_info()
    with torch.cuda.use_mem_pool(pool):
        tensors = [filled(1, 100 * MIB), filled(2, 5000)]
    grown = growth(before, torch_uvm.memory_info())
    same(set(grown), {COUNTED[placement]})
    assert grown[COUNTED[placement]] >= 100 * MIB, grown
    before = torch_uvm.memory_info()
    tensors.append(filled(3, 100 * MIB))
    same(set(growth(before, torch_uvm.memory_info())), {"populated_device"}, "gpu_first outside the pool")
    for seed, tensor in enumerate(tensors, 1):
        check(tensor, seed)


@on_device(CPU_FIRST, uvm_only=True)
def test_a_pool_on_the_gpu_beside_cpu_first() -> None:
    """The pool's placement goes before the option's."""
    pool = torch_uvm.MemPool("gpu_first")
    before = torch_uvm.memory_info()
    with torch.cuda.use_mem_pool(pool):
        inside = filled(1, 100 * MIB)
    same(set(growth(before, torch_uvm.memory_info())), {"populated_device"})
    before = torch_uvm.memory_info()
    outside = filled(2, 100 * MIB)
    same(set(growth(before, torch_uvm.memory_info())), {"populated_host"})
    check(inside, 1)
    check(outside, 2)


@on_device(uvm_only=True)
def test_a_pool_larger_than_the_device() -> None:
    """What a pool in host memory is for."""
    pool = torch_uvm.MemPool("cpu_first")
    with torch.cuda.use_mem_pool(pool):
        tensors = [block(1000 * MIB) for _ in range(4)]
    info = torch_uvm.memory_info()
    assert info.populated_host >= 4000 * MIB > info.device_total, info
    del tensors


@on_device(uvm_only=True, devices=2)
def test_a_pool_on_another_device() -> None:
    """Without making that the current one; the current one is as before."""
    pool = torch_uvm.MemPool("cpu_first", device="cuda:1")
    same(torch.cuda.current_device(), 0)
    before = torch_uvm.memory_info(1)
    with torch.cuda.use_mem_pool(pool, device=1):
        tensor = filled(1, 100 * MIB, device="cuda:1")
    same(set(growth(before, torch_uvm.memory_info(1))), {"populated_host"})
    check(tensor, 1)


@on_device(uvm_only=True)
def test_wrong_pools() -> None:
    """Errors that name what was given and what is allowed."""
    for call in (torch_uvm.MemPool, lambda where: torch_uvm.placement(where).__enter__()):
        text = refused(ValueError, call, "sideways")
        assert "'sideways'" in text and "gpu_first, balanced, cpu_first" in text, text
    text = refused(ValueError, torch_uvm.MemPool, "device", allocator=object())
    assert "allocator" in text and "placement" in text, text
    assert "'cpu'" in refused(ValueError, torch_uvm.MemPool, "device", device="cpu")
    refused(TypeError, torch_uvm.MemPool, "device", no_such_argument=1)


@on_device(uvm_only=True)
def test_a_graph_in_a_placed_pool() -> None:
    """The documented way to place a graph's memory."""
    pool = torch_uvm.MemPool("cpu_first")
    given = filled(0, 30 * MIB)
    before = torch_uvm.memory_info()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool.id):
        result = torch.empty_like(given)
        result.copy_(given)
    grown = growth(before, torch_uvm.memory_info())
    # PyTorch may keep a random generator's state for the graph, outside its pool.
    assert grown.pop("populated_host") >= 30 * MIB and sum(grown.values()) <= 2 * MIB, grown
    graph.replay()
    check(result, 0)
    del result
    graph.reset()


@pytest.mark.parametrize("placement", PLACEMENTS)
@on_device(uvm_only=True)
def test_placement(placement: str) -> None:
    """Inside it counts, after it not."""
    before = torch_uvm.memory_info()
    with torch_uvm.placement(placement):
        inside = filled(1, 100 * MIB)
    same(set(growth(before, torch_uvm.memory_info())), {COUNTED[placement]})
    before = torch_uvm.memory_info()
    outside = filled(2, 100 * MIB)
    same(set(growth(before, torch_uvm.memory_info())), {"populated_device"})
    check(inside, 1)
    check(outside, 2)


@on_device(uvm_only=True)
def test_placements_memory_is_used_again() -> None:
    """By the next block of the same kind; `empty_cache` gives it back, PyTorch's alone does not."""
    for seed in range(5):
        with torch_uvm.placement("cpu_first"):
            tensor = filled(seed, 100 * MIB)
        check(tensor, seed)
        del tensor
        assert torch_uvm.memory_info().populated_host < 200 * MIB, "the memory of the first was not used again"
    torch.cuda.empty_cache()
    assert torch_uvm.memory_info().populated_host >= 100 * MIB, "a pool that is held keeps its memory"
    with torch_uvm.placement("cpu_first"):
        kept = filled(9, 3 * MIB)
    torch_uvm.empty_cache()
    check(kept, 9)
    del kept
    torch_uvm.empty_cache()
    same(torch.cuda.memory_reserved(), 0)
    with torch_uvm.placement("cpu_first"):
        check(filled(1, 3 * MIB), 1)


@on_device(uvm_only=True)
def test_nested_placements() -> None:
    """The innermost one holds, in every order, also one of the same kind; afterwards the outer one again."""
    for outer in PLACEMENTS:
        for inner in PLACEMENTS:
            with torch_uvm.placement(outer):
                with torch_uvm.placement(inner):
                    with torch_uvm.placement(outer):
                        before = torch_uvm.memory_info()
                        first = block(30 * MIB)
                        same(set(growth(before, torch_uvm.memory_info())), {COUNTED[outer]}, f"{outer} in {inner}")
                    before = torch_uvm.memory_info()
                    second = block(30 * MIB)
                    same(set(growth(before, torch_uvm.memory_info())), {COUNTED[inner]}, f"{inner} in {outer}")
                before = torch_uvm.memory_info()
                third = block(30 * MIB)
                same(set(growth(before, torch_uvm.memory_info())), {COUNTED[outer]}, f"{outer} around {inner}")
            del first, second, third
            torch_uvm.empty_cache()
            same(torch.cuda.memory_reserved(), 0)


@on_device(uvm_only=True)
def test_placements_and_pools() -> None:
    """Of a placement and `use_mem_pool` the innermost holds too, whatever PyTorch's own allocator does."""
    pool = torch_uvm.MemPool("cpu_first")

    def placed(size: int = 30 * MIB) -> str:
        before = torch_uvm.memory_info()
        tensors.append(block(size))
        (where,) = growth(before, torch_uvm.memory_info())
        return where

    tensors: list[torch.Tensor] = []
    with torch.cuda.use_mem_pool(pool):
        with torch_uvm.placement("device"):
            same(placed(), COUNTED["device"], "a placement in a pool")
        same(placed(), COUNTED["cpu_first"], "the pool again")
    with torch_uvm.placement("device"):
        with torch.cuda.use_mem_pool(pool):
            same(placed(), COUNTED["cpu_first"], "a pool in a placement")
        same(placed(), COUNTED["device"], "the placement again")


@on_device(uvm_only=True)
def test_placements_that_end_in_another_order() -> None:
    """As generators may make them: the one entered last and not left holds."""
    first, second = torch_uvm.placement("cpu_first"), torch_uvm.placement("balanced")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    before = torch_uvm.memory_info()
    tensors = [block(30 * MIB)]
    same(set(growth(before, torch_uvm.memory_info())), {"populated_unplaced"})
    second.__exit__(None, None, None)
    before = torch_uvm.memory_info()
    tensors.append(block(30 * MIB))
    same(set(growth(before, torch_uvm.memory_info())), {"populated_device"})


@on_device(uvm_only=True)
def test_an_error_inside_placement() -> None:
    """It goes on its way, and the placement ends."""
    for _ in range(3):
        try:
            with torch_uvm.placement("cpu_first"):
                raise KeyError("the program's own")
        except KeyError:
            pass
    before = torch_uvm.memory_info()
    tensor = block(30 * MIB)
    same(set(growth(before, torch_uvm.memory_info())), {"populated_device"})
    del tensor


@on_device(uvm_only=True, devices=2)
def test_placement_on_another_device() -> None:
    """Each device for itself, at the same time too."""
    before = [torch_uvm.memory_info(device) for device in range(2)]
    with torch_uvm.placement("cpu_first", device=1), torch_uvm.placement("balanced"):
        tensors = [filled(device, 30 * MIB, device=f"cuda:{device}") for device in range(2)]
    after = [torch_uvm.memory_info(device) for device in range(2)]
    same(set(growth(before[0], after[0])), {"populated_unplaced"})
    same(set(growth(before[1], after[1])), {"populated_host"})
    for device, tensor in enumerate(tensors):
        check(tensor, device)


@on_device(uvm_only=True)
def test_placement_while_capturing() -> None:
    """An error that says what to do; the capture goes on."""
    given = filled(0, MIB)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        text = refused(RuntimeError, torch_uvm.placement("cpu_first").__enter__)
        result = torch.empty_like(given)
        result.copy_(given)
    assert "torch.cuda.graph" in text, text
    graph.replay()
    check(result, 0)


@pytest.mark.skipif(PYTORCH < (2, 8), reason="PyTorch 2.6 and 2.7 route the allocations of all threads")
@on_device(uvm_only=True)
def test_placement_is_the_threads_own() -> None:
    """Threads side by side, each with a placement or none."""
    barrier = threading.Barrier(3)
    failures: list[BaseException] = []

    def work(placement: str | None, seed: int) -> None:
        try:
            for round_ in range(20):
                where = torch_uvm.placement(placement) if placement else contextlib.nullcontext()
                with where:
                    barrier.wait(30)
                    tensor = filled(seed, 3 * MIB)
                    barrier.wait(30)
                pools = [
                    tuple(segment["segment_pool_id"])
                    for segment in torch.cuda.memory_snapshot()
                    if segment["address"] <= tensor.data_ptr() < segment["address"] + segment["total_size"]
                ]
                same(len(pools), 1)
                same(pools[0] == (0, 0), placement is None, f"round {round_} with {placement}")
                check(tensor, seed)
                del tensor
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [
        threading.Thread(target=work, args=(placement, seed))
        for seed, placement in enumerate(("cpu_first", "cpu_first", None))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
