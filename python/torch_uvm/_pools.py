"""Chosen tensors in a chosen place."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, get_args

import torch

from ._report import Device, device_index, enabled_library
from ._tables import Placement


class MemPool(torch.cuda.MemPool):
    """A `torch.cuda.MemPool` whose memory is placed as asked, whatever `uvm_access_pattern` says.

        pool = torch_uvm.MemPool("cpu_first")
        with torch.cuda.use_mem_pool(pool):
            table = torch.empty(rows, columns, device="cuda")  # in host memory, used by the GPU where it lies

    Placement: `gpu_first` on the GPU up to the device limit and then in host memory, `balanced` wherever the driver
    moves it, `cpu_first` in host memory, `device` plain device memory (it can be shared with other processes, and does
    not oversubscribe).

    It is for one device: on any other, `use_mem_pool` places memory as `uvm_access_pattern` says.

    Args:
        placement: one of the above.
        device: the pool's device; the current one if None.
        kwargs: what `torch.cuda.MemPool` of the running PyTorch takes (`use_on_oom`, `no_split`).

    Raises:
        RuntimeError: `use_uvm` is off.
        ValueError: the placement is none of the above, the device is not a CUDA device, or there is an `allocator` in
            `kwargs`: memory that another allocator gives is placed by that one.
    """

    def __init__(self, placement: Placement, *, device: Device = None, **kwargs: Any) -> None:
        _check_placement(placement)
        library = enabled_library("MemPool()")
        if kwargs.get("allocator") is not None:
            raise ValueError(
                f"allocator: {kwargs['allocator']!r} is not allowed beside placement: the memory of another allocator "
                "is placed by that one. Use torch.cuda.MemPool"
            )
        index = device_index(device)
        with torch.cuda.device(index):  # the pool is made there, and given back there
            super().__init__(**kwargs)
        first, second = self.id
        library.set_pool_placement(index, (first, second), placement)
        self._placement = placement

    @property
    def placement(self) -> Placement:
        """Where its memory is placed."""
        return self._placement


@contextlib.contextmanager
def placement(where: Placement, device: Device = None) -> Iterator[None]:
    """Inside, what this thread allocates on the device (the current one, if None) is placed as asked.

        with torch_uvm.placement("cpu_first"):
            state = torch.zeros_like(weights)

    The placements are those of `MemPool`, and the memory comes from pools that are kept: the next `placement` of the
    same kind on the same device uses again what the tensors of this one have freed. `torch_uvm.empty_cache()` gives
    that memory back.

    - Tensors stay where they were placed after the block's end, and inside it tensors from outside stay where they are.
    - Other threads are not affected, and the backward pass runs in other threads: gradients that it makes are placed
      as everything else. (PyTorch 2.6 and 2.7 route the allocations of all threads of the process, and cannot tell two
      that do this at the same time apart.)
    - Nesting works: the innermost placement holds. So it does together with `torch.cuda.use_mem_pool`: a placement
      inside a pool's block places, and a pool inside a placement's block takes what is allocated. (PyTorch's own
      allocator takes the outermost of nested pools up to 2.9, and the innermost since 2.11.)
    - Not during the capture of a CUDA graph, whose memory must be kept as long as the graph: capture into
      `torch.cuda.graph(graph, pool=torch_uvm.MemPool(…).id)`.

    Raises:
        RuntimeError: `use_uvm` is off, or the current stream is capturing.
        ValueError: the placement is none of `MemPool`'s, or the device is not a CUDA device.
    """
    _check_placement(where)
    enabled_library("placement()")
    index = device_index(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "torch_uvm.placement() cannot be entered while a CUDA graph is captured: the memory must live as long as "
            "the graph. Capture with torch.cuda.graph(graph, pool=torch_uvm.MemPool(…).id)"
        )
    key = (index, where)
    pool = _take(key)
    try:
        with _routed(pool, index):
            yield
    finally:
        _idle_pools[key].append(pool)


def empty_cache() -> None:
    """`torch.cuda.empty_cache()`, which also gives back what the pools of `placement` hold and nobody uses.

    As with every MemPool, PyTorch's function alone keeps a pool's memory for the pool. Tensors made inside `placement`
    stay as they are.
    """
    for pools in list(_idle_pools.values()):
        pools.clear()
    torch.cuda.empty_cache()


#: The pools of `placement` that nobody is inside of, by device and placement. A pool serves one block at a time: the
#: allocator routes to it once only.
_idle_pools: dict[tuple[int, str], list[MemPool]] = {}


def _take(key: tuple[int, Placement]) -> MemPool:
    """An idle pool, or a new one."""
    try:
        return _idle_pools.setdefault(key, []).pop()
    except IndexError:
        return MemPool(key[1], device=key[0])


class _Thread(threading.local):
    """The placements that a thread is inside of."""

    def __init__(self) -> None:
        self.routes: dict[int, list[_Route]] = {}


_thread = _Thread()


class _Route:
    """A pool that allocations of this thread go to, when it is its turn."""

    def __init__(self, pool: MemPool, device: int) -> None:
        self._pool = pool
        self._device = device
        self._context: Any = None

    def begin(self) -> None:
        context = torch.cuda.use_mem_pool(self._pool, device=self._device)
        context.__enter__()
        self._context = context

    def end(self) -> None:
        context, self._context = self._context, None
        if context is not None:
            context.__exit__(None, None, None)


@contextlib.contextmanager
def _routed(pool: MemPool, device: int) -> Iterator[None]:
    """Routes to this pool, and to no other of this thread's placements.

    The allocator takes the pool that was begun last, and forgets a pool that ends, in whatever order they end. So when
    the last placement ends, the one before it is begun again.
    """
    routes = _thread.routes.setdefault(device, [])
    if routes:
        routes[-1].end()
    route = _Route(pool, device)
    routes.append(route)
    try:
        route.begin()
        yield
    finally:
        # Usually the last one; not where generators hold blocks open in another order.
        was_last = routes[-1] is route
        routes.remove(route)
        route.end()
        if was_last and routes:
            routes[-1].begin()


def _check_placement(placement: str) -> None:
    *others, last = get_args(Placement)
    if placement not in (*others, last):
        raise ValueError(f"placement: {placement!r} is not allowed: expected {', '.join(others)} or {last}")
