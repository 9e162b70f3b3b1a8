"""Pinned host memory that is a CPU tensor and a CUDA tensor at once.

Copies between it and the device run on a copy engine beside kernels, and the CPU goes on at once. From managed memory
they do not: on an H100 they come to the link's speed too, but nothing computes meanwhile (docs/measured.md).
"""

from __future__ import annotations

import mmap
import weakref
from typing import Any, Optional

import torch

from .._format import format_bytes
from .._report import memory_info
from .internals import register_host_memory, unregister_host_memory

_pinned = 0


def pinned_bytes() -> int:
    """How much memory this process has pinned through `Pinned`, in bytes."""
    return _pinned


class Pinned:
    """Page-locked bytes of the host, until the last tensor in them is gone."""

    def __init__(self, count: int, device: int) -> None:
        """`count` bytes, at least 1, reached by a device.

        Raises:
            torch.cuda.OutOfMemoryError: the host has not so much left beside its reserve (`uvm_host_reserve_mb`).
                Pinned memory cannot be swapped out: past that the kernel would end processes.
            RuntimeError: CUDA does not pin it.
        """
        info = memory_info(device)
        left = max(0, info.host_available - info.host_reserve)
        if count > left:
            raise torch.cuda.OutOfMemoryError(
                f"torch_uvm: {format_bytes(count)} of host memory cannot be pinned: "
                f"{format_bytes(info.host_available)} are available and {format_bytes(info.host_reserve)} of them are "
                "left to everyone else (uvm_host_reserve_mb)"
            )
        # Shared between processes that are forked: a private page would be copied when one of them writes to it, and
        # the device would go on with the other copy.
        self._memory = mmap.mmap(-1, count)
        #: As a CPU tensor.
        self.cpu = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._device = device
        self._registered = _Registered(self.cpu, device)

    def cuda(self, offset: int = 0, count: Optional[int] = None) -> torch.Tensor:
        """Its bytes from `offset` on, as a CUDA tensor: the GPU reads and writes them where they lie.

        Each has a storage of its own: to code that looks for weights that share memory, two of them do not.
        """
        count = self.cpu.numel() - offset if count is None else count
        device = torch.device("cuda", self._device)
        if not count:
            return torch.empty(0, dtype=torch.uint8, device=device)
        return torch.as_tensor(_Lease(self._registered, offset, count), device=device)


class _Registered:
    """Registers memory with CUDA, as long as it lives."""

    def __init__(self, cpu: torch.Tensor, device: int) -> None:
        global _pinned
        self.pointer, count = cpu.data_ptr(), cpu.numel()
        with torch.cuda.device(device):
            register_host_memory(self.pointer, count)
        _pinned += count
        weakref.finalize(self, _unpin, self.pointer, device, cpu).atexit = False


class _Lease:
    """What a CUDA tensor holds as long as it, or a view of it, lives."""

    def __init__(self, registered: _Registered, offset: int, count: int) -> None:
        self._registered = registered
        #: See the CUDA Array Interface, version 3, of Numba's documentation.
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (count,),
            "typestr": "|u1",
            "data": (registered.pointer + offset, False),
            "version": 3,
        }


def _unpin(pointer: int, device: int, cpu: torch.Tensor) -> None:
    """Gives the memory back to the host, once no work uses it. `cpu` keeps it until then."""
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        unregister_host_memory(pointer)
    global _pinned
    _pinned -= cpu.numel()
