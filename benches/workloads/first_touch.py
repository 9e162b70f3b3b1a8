"""The first fill of a fresh tensor of 2 GiB: allocation, population and one write, in GB/s.

Beside the allocator itself, in the same process and taking turns with it, what CUDA alone gives: `bare_prefetch` is
cudaMallocManaged, cudaMemPrefetchAsync to the device and PyTorch's fill kernel; `bare_faults` is the same without the
prefetch.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from bench import Bench, Figure
from limits import GIB, MIB, cuda_runtime

TITLE = "first touch of 2 GiB"
FIGURES = {
    "fill": Figure("torch.empty and fill_", "GB/s", larger_is_better=True),
    "bare_prefetch": Figure("bare: managed, prefetch, fill", "GB/s", larger_is_better=True, informative=True),
    "bare_faults": Figure("bare: managed, fill by faults", "GB/s", larger_is_better=True, informative=True),
}
#: Of these backends the bare figures are taken in the same process.
BESIDE_BARE = ("native", "uvm")


def need(quick: bool) -> int:
    """Bytes at most: the allocator's and the bare ones are never there together, but a free may be late."""
    return GIB // 2 if quick else 5 * GIB


def preload() -> None:
    """Nothing."""


class _Location(ctypes.Structure):
    """cudaMemLocation."""

    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class Managed:
    """Bare managed memory through the CUDA runtime, as a tensor."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._runtime = cuda_runtime(torch)
        self._major = int(torch.version.cuda.partition(".")[0])

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._runtime, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name} answered {status}")

    @contextmanager
    def memory(self, size: int) -> Iterator[ctypes.c_void_p]:
        """`size` bytes of managed memory."""
        pointer = ctypes.c_void_p()
        self._call("cudaMallocManaged", ctypes.byref(pointer), ctypes.c_size_t(size), ctypes.c_uint(1))
        try:
            yield pointer
        finally:
            self._torch.cuda.synchronize()
            self._call("cudaFree", pointer)

    def prefetch(self, pointer: ctypes.c_void_p, size: int, *, to_host: bool = False) -> None:
        """To the current device, or to the host, on the current stream."""
        stream = ctypes.c_void_p(self._torch.cuda.current_stream().cuda_stream)
        device = -1 if to_host else self._torch.cuda.current_device()  # cudaCpuDeviceId
        if self._major >= 13:
            # cudaMemLocationTypeHost, cudaMemLocationTypeDevice
            location = _Location(2, 0) if to_host else _Location(1, device)
            self._call("cudaMemPrefetchAsync", pointer, ctypes.c_size_t(size), location, ctypes.c_uint(0), stream)
        else:
            self._call("cudaMemPrefetchAsync", pointer, ctypes.c_size_t(size), ctypes.c_int(device), stream)

    def tensor(self, pointer: ctypes.c_void_p, size: int) -> Any:
        """The memory as bytes, not owned by the tensor."""

        class Array:
            __cuda_array_interface__: ClassVar[dict[str, Any]] = {
                "shape": (size,),
                "typestr": "|u1",
                "data": (pointer.value, False),
                "version": 3,
                "strides": None,
            }

        return self._torch.as_tensor(Array(), device="cuda")


def run(bench: Bench) -> None:
    """Turns of each kind, the allocator's cache emptied in between."""
    torch = bench.torch
    size = 8 * MIB if bench.quick else 2 * GIB
    turns = 1 if bench.quick else 5
    managed = Managed(torch)

    def gigabytes_a_second(start: float) -> float:
        torch.cuda.synchronize()
        return size / 1e9 / (time.perf_counter() - start)

    with bench.allocations():
        torch.empty(MIB, dtype=torch.uint8, device="cuda").fill_(1)  # loads the kernel
        for _ in range(turns):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            with bench.turn():
                start = time.perf_counter()
                tensor = torch.empty(size, dtype=torch.uint8, device="cuda").fill_(1)
                bench.sample("fill", gigabytes_a_second(start))
            bench.check_values(lambda: int(tensor[-1]) == 1, "the tensor was not filled")
            del tensor
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            if bench.backend.name not in BESIDE_BARE:
                continue
            for figure in ("bare_prefetch", "bare_faults"):
                with bench.turn():
                    start = time.perf_counter()
                    with managed.memory(size) as pointer:
                        tensor = managed.tensor(pointer, size)
                        if figure == "bare_prefetch":
                            managed.prefetch(pointer, size)
                        tensor.fill_(1)
                        bench.sample(figure, gigabytes_a_second(start))
                        del tensor
    bench.end_of_measurement()
