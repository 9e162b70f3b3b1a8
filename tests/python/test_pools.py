"""torch.cuda.MemPool, with and without an allocator of its own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import simulated
import torch
import versions
from contents import MIB, block, check, filled, same
from on_device import on_device
from versions import needs

OWN_ALLOCATOR = r"""
#include <cstddef>
#include <cstdio>
// Declared by hand: the test machine needs no CUDA headers.
extern "C" int cudaMalloc(void**, std::size_t);
extern "C" int cudaFree(void*);
extern "C" {
int allocations = 0;
int frees = 0;
std::size_t largest = 0;
void* pool_alloc(std::size_t size, int, void*) {
  void* pointer = nullptr;
  if (cudaMalloc(&pointer, size) != 0) return nullptr;
  ++allocations;
  if (size > largest) largest = size;
  return pointer;
}
void pool_free(void* pointer, std::size_t, int, void*) {
  ++frees;
  cudaFree(pointer);
}
}
"""


@pytest.fixture(scope="session")
def own_allocator(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library with an allocation and a free function over cudaMalloc, which count their calls."""
    directory = tmp_path_factory.mktemp("own_allocator")
    source, library = directory / "own.cpp", directory / "libown.so"
    source.write_text(OWN_ALLOCATOR)
    runtime = Path(str(simulated.library_directory())) / "libcudart.so.12"
    command = [os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-o", str(library), str(source), str(runtime)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return str(library)


def pool_of(tensor: torch.Tensor) -> tuple[int, int]:
    """The id of the pool that a tensor's segment belongs to."""
    for segment in torch.cuda.memory_snapshot():
        if segment["address"] <= tensor.data_ptr() < segment["address"] + segment["total_size"]:
            return tuple(segment["segment_pool_id"])
    raise AssertionError("the tensor lies in no segment")


@on_device()
def test_tensors_go_to_the_pool() -> None:
    """Inside `use_mem_pool`, and only there; contents stay apart."""
    pool = torch.cuda.MemPool()
    before = filled(1, 3 * MIB)
    with torch.cuda.use_mem_pool(pool):
        inside = filled(2, 3 * MIB)
    after = filled(3, 3 * MIB)
    same(pool_of(inside), tuple(pool.id))
    same(pool_of(before), (0, 0))
    same(pool_of(after), (0, 0))
    for seed, tensor in enumerate((before, inside, after), 1):
        check(tensor, seed)


@on_device()
def test_the_pool_does_not_lend_its_blocks() -> None:
    """A block freed in the pool waits for the pool's next request."""
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        tensor = block(3 * MIB)
    address = tensor.data_ptr()
    del tensor
    assert block(3 * MIB).data_ptr() != address, "the default pool got the pool's block"
    with torch.cuda.use_mem_pool(pool):
        same(block(3 * MIB).data_ptr(), address, "the pool's next tensor")


@on_device()
def test_two_pools_are_apart() -> None:
    """Each has its own id, segments and blocks."""
    pools = [torch.cuda.MemPool() for _ in range(3)]
    tensors = []
    for seed, pool in enumerate(pools):
        with torch.cuda.use_mem_pool(pool):
            tensors.append(filled(seed, 2 * MIB))
    same(len({tuple(pool.id) for pool in pools}), 3)
    for seed, (pool, tensor) in enumerate(zip(pools, tensors)):
        same(pool_of(tensor), tuple(pool.id))
        check(tensor, seed)


@on_device()
def test_use_counts() -> None:
    """The MemPool object holds one reference, `use_mem_pool` another."""
    pool = torch.cuda.MemPool()
    same(pool.use_count(), 1)
    with torch.cuda.use_mem_pool(pool):
        tensor = block(MIB)
        same(pool.use_count(), 2)
    same(pool.use_count(), 1)
    del tensor


@on_device()
def test_a_deleted_pool_gives_its_memory_back() -> None:
    """The pool's end empties it."""
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        tensor = block(30 * MIB)
    assert torch.cuda.memory_reserved() >= 30 * MIB
    del tensor
    del pool
    torch.cuda.empty_cache()
    same(torch.cuda.memory_reserved(), 0)


@on_device()
def test_a_tensor_outlives_its_pool() -> None:
    """The tensor's memory stays until the tensor is gone."""
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        tensor = filled(5, 3 * MIB)
    del pool
    torch.cuda.empty_cache()
    others = [filled(seed, 3 * MIB) for seed in range(10, 20)]
    check(tensor, 5)
    for seed, other in enumerate(others, 10):
        check(other, seed)
    del tensor, others, other
    torch.cuda.empty_cache()
    same(torch.cuda.memory_reserved(), 0)


@on_device()
def test_a_graph_can_use_a_pools_memory() -> None:
    """A capture into a MemPool's pool."""
    pool = torch.cuda.MemPool()
    given = filled(0, 2 * MIB)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool.id):
        result = torch.empty_like(given)
        result.copy_(given)
    same(pool_of(result), tuple(pool.id))
    graph.replay()
    check(result, 0)
    graph.reset()  # a pool must outlive its graphs


@on_device()
def test_the_pools_snapshot() -> None:
    """`MemPool.snapshot()` shows the pool's segments and no others."""
    pool = torch.cuda.MemPool()
    other = block(3 * MIB)
    with torch.cuda.use_mem_pool(pool):
        tensor = block(5 * MIB)
    found = pool.snapshot()
    same({tuple(segment["segment_pool_id"]) for segment in found}, {tuple(pool.id)})
    same(sum(segment["allocated_size"] for segment in found), 5 * MIB)
    del tensor, other


@on_device()
def test_an_allocator_of_its_own(own_allocator: str) -> None:
    """The pool's segments come from the given functions, and go back to them."""
    library = ctypes.CDLL(own_allocator)
    allocations, frees = (ctypes.c_int.in_dll(library, name) for name in ("allocations", "frees"))
    allocator = torch.cuda.memory.CUDAPluggableAllocator(own_allocator, "pool_alloc", "pool_free")
    pool = torch.cuda.MemPool(allocator.allocator())
    if versions.MEMPOOL_TELLS_ITS_ALLOCATOR:
        same(pool.allocator, allocator.allocator())
    outside = filled(1, 3 * MIB)
    same(allocations.value, 0, "calls for ordinary tensors")
    with torch.cuda.use_mem_pool(pool):
        first = filled(2, 3 * MIB)
        same(allocations.value, 1)
        second = filled(3, 3 * MIB)
        small = [filled(seed, 100_000) for seed in range(10, 15)]
    same(pool_of(first), tuple(pool.id))
    for seed, tensor in enumerate((outside, first, second), 1):
        check(tensor, seed)
    for seed, tensor in enumerate(small, 10):
        check(tensor, seed)
    del first, second, small, tensor
    del pool
    torch.cuda.empty_cache()
    same(frees.value, allocations.value, "segments given back")
    assert allocations.value > 1
    check(outside, 1)


@on_device()
def test_when_its_allocator_has_no_memory(own_allocator: str) -> None:
    """The pool's functions give device memory: more than there is of it is OutOfMemoryError, and the pool goes on."""
    allocator = torch.cuda.memory.CUDAPluggableAllocator(own_allocator, "pool_alloc", "pool_free")
    pool = torch.cuda.MemPool(allocator.allocator())
    with torch.cuda.use_mem_pool(pool):
        try:
            block(3000 * MIB)
        except torch.cuda.OutOfMemoryError as error:
            assert "out of memory" in str(error), error
        else:
            raise AssertionError("3000 MiB of device memory on a device of 2 GiB")
        tensor = filled(1, 3 * MIB)
    check(tensor, 1)


@needs("MemPool(use_on_oom=True)")
@on_device()
def test_a_pool_that_serves_when_memory_is_out() -> None:
    """What is free in such a pool serves a request from outside, before that would fail; no other pool does so."""
    torch.cuda.set_per_process_memory_fraction(0.25)

    def outside(pool: torch.cuda.MemPool) -> torch.Tensor | None:
        """Lets a pool hold 400 of the 512 MiB that are allowed, all free, and asks for 300 MiB outside of it."""
        with torch.cuda.use_mem_pool(pool):
            tensor = filled(1, 400 * MIB)
        for _ in range(2):
            try:
                found = filled(2, 300 * MIB)
            except torch.cuda.OutOfMemoryError:
                tensor = None  # the next time, the pool's memory is free
            else:
                assert tensor is None, "the pool's memory was handed out while it was in use"
                same(pool_of(found), tuple(pool.id))
                check(found, 2)
                return found
        return None

    pool = torch.cuda.MemPool()
    same(outside(pool), None, "from a pool that serves nobody else")
    del pool
    torch.cuda.empty_cache()
    pool = torch.cuda.MemPool(use_on_oom=True)
    assert outside(pool) is not None, "the pool did not serve"
    del pool
    torch.cuda.empty_cache()
    same(torch.cuda.memory_reserved(), 0)


@needs("MemPool(no_split=True)")
@on_device()
def test_a_pool_that_does_not_split() -> None:
    """Every allocation has a segment of its own, and a segment that is free again is handed out whole."""
    pool, ordinary = torch.cuda.MemPool(no_split=True), torch.cuda.MemPool()
    tensors = []
    for one in (pool, ordinary):
        with torch.cuda.use_mem_pool(one):
            tensors += [filled(seed, 3 * MIB) for seed in range(3)]
    same([len(segment["blocks"]) for segment in pool.snapshot()], [1, 1, 1])
    assert len(ordinary.snapshot()) < 3, ordinary.snapshot()
    for seed, tensor in enumerate(tensors):
        check(tensor, seed % 3)
    addresses = {tensor.data_ptr() for tensor in tensors[:3]}
    del tensors, tensor
    with torch.cuda.use_mem_pool(pool):
        again = filled(5, 2 * MIB)
    assert again.data_ptr() in addresses, "not handed out again"
    same([len(segment["blocks"]) for segment in pool.snapshot()], [1, 1, 1])
    check(again, 5)


@needs("MemPool.snapshot(include_traces=False)")
@on_device()
def test_a_pools_snapshot_without_traces() -> None:
    """The same segments, and no history."""
    torch.cuda.memory._record_memory_history(stacks="python")
    pool = torch.cuda.MemPool()
    outside = block(3 * MIB)
    with torch.cuda.use_mem_pool(pool):
        inside = block(5 * MIB)
    for chosen, tensor in ((pool.id, inside), ((0, 0), outside)):
        with_traces = torch._C._cuda_memorySnapshot((*chosen, True))
        without = torch._C._cuda_memorySnapshot((*chosen, False))
        assert "alloc" in [entry["action"] for entry in with_traces["device_traces"][0]], with_traces["device_traces"]
        same(sum(len(traces) for traces in without["device_traces"]), 0, "entries")
        found = [[segment["address"] for segment in one["segments"]] for one in (with_traces, without)]
        same(*found)
        assert any(
            segment["address"] <= tensor.data_ptr() < segment["address"] + segment["total_size"]
            for segment in without["segments"]
        ), without["segments"]
    same([tuple(segment["segment_pool_id"]) for segment in pool.snapshot(include_traces=False)], [tuple(pool.id)])
    torch.cuda.memory._record_memory_history(enabled=None)


@needs("reserved_bytes_by_private_pools")
@on_device()
def test_statistics_of_each_pool() -> None:
    """`reserved_bytes_by_private_pools`: what each pool has reserved, now and at most."""

    def reserved(pool: torch.cuda.MemPool, what: str) -> int:
        return torch.cuda.memory_stats()["reserved_bytes_by_private_pools.{}_{}.all.{}".format(*pool.id, what)]

    first, second = torch.cuda.MemPool(), torch.cuda.MemPool()
    outside = block(3 * MIB)
    with torch.cuda.use_mem_pool(first):
        tensors = [block(5 * MIB), block(100)]
    with torch.cuda.use_mem_pool(second):
        tensors.append(block(30 * MIB))
    for pool in (first, second):
        same(reserved(pool, "current"), sum(segment["total_size"] for segment in pool.snapshot()))
        assert reserved(pool, "current") > 0
    assert reserved(second, "current") >= 30 * MIB
    before = reserved(first, "current"), torch.cuda.memory_reserved()
    del tensors
    third = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(third):
        kept = block(7 * MIB)
    same(reserved(first, "current"), before[0], "another pool's memory")
    same(reserved(third, "current"), torch.cuda.memory_reserved() - before[1])
    same(reserved(third, "peak"), reserved(third, "current"))
    del outside, kept


@on_device()
def test_statistics_with_pools() -> None:
    """The books balance with pools too."""
    from test_statistics import check_agreement

    pools = [torch.cuda.MemPool() for _ in range(2)]
    tensors = []
    for pool in pools:
        with torch.cuda.use_mem_pool(pool):
            tensors += [block(size) for size in (1000, MIB, 5 * MIB)]
    check_agreement("with tensors in pools")
    del tensors[::2]
    check_agreement("with some freed")
    tensors.clear()
    pools.clear()
    del pool
    torch.cuda.empty_cache()
    check_agreement("at the end")
    same(torch.cuda.memory_reserved(), 0)


def in_another_thread(work: Callable[[], object]) -> None:
    """Runs `work` where no pool is in use."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@on_device()
def test_a_pool_in_use_stops_no_reclaiming() -> None:
    """A pool in use is no capture: frees that waited for a stream are over when it is, in the pool and in threads that
    are in none, and `empty_cache` gives back what nobody holds."""
    if torch.cuda.get_allocator_backend() == "native" and not versions.NATIVE_KNOWS_CAPTURES_FROM_POOLS:
        return
    side, pool = torch.cuda.Stream(), torch.cuda.MemPool()

    def come_and_go() -> None:
        for _ in range(12):
            tensor = block(64 * MIB)
            tensor.record_stream(side)
            del tensor
            torch.cuda.synchronize()

    with torch.cuda.use_mem_pool(pool):
        come_and_go()
        same(torch.cuda.memory_reserved(), 64 * MIB, "in the pool")
        in_another_thread(come_and_go)
        others = 64 * MIB if versions.MEMPOOL_SERVES_ONE_THREAD else 0
        same(torch.cuda.memory_reserved(), 64 * MIB + others, "with a thread that is in no pool")
        in_another_thread(torch.cuda.empty_cache)
        same(torch.cuda.memory_reserved(), 64 * MIB, "the pool keeps its own")


@on_device("use_uvm:True,uvm_access_pattern:device")
def test_a_request_in_a_pool_gets_the_memory_of_other_caches() -> None:
    """Unused memory of the default pool goes back to CUDA before a request in a pool fails."""
    if torch.cuda.get_allocator_backend() == "native" and not versions.NATIVE_KNOWS_CAPTURES_FROM_POOLS:
        return
    cached = block(1200 * MIB)
    del cached
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        tensor = filled(1, 1100 * MIB)
    check(tensor, 1)


@needs("max_split_size_mb as vLLM sets it")
@on_device()
def test_small_max_split_size_in_a_pool() -> None:
    """As vLLM sets it around loading: 20 MiB, the size of a segment for all requests under 10 MiB, and then what it
    takes for the default."""
    pool = torch.cuda.MemPool()
    for mebibytes in (20, 17592186044415):
        torch.cuda.memory._set_allocator_settings(f"max_split_size_mb:{mebibytes}")
        with torch.cuda.use_mem_pool(pool):
            tensors = [filled(seed, size * MIB) for seed, size in enumerate((1, 4, 19, 20, 40))]
        for seed, tensor in enumerate(tensors):
            check(tensor, seed)


@needs("torch.accelerator.get_memory_info")
@on_device(uvm_only=True)
def test_its_allocators_memory_counts_once(own_allocator: str) -> None:
    """What the pool's functions gave is populated, and not memory of others as well."""
    allocator = torch.cuda.memory.CUDAPluggableAllocator(own_allocator, "pool_alloc", "pool_free")
    pool = torch.cuda.MemPool(allocator.allocator())
    before = torch.accelerator.get_memory_info()[0]
    with torch.cuda.use_mem_pool(pool):
        tensor = filled(1, 200 * MIB)
    torch.cuda.synchronize()
    same(before - torch.accelerator.get_memory_info()[0], 200 * MIB)
    check(tensor, 1)
