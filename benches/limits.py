"""How much GPU memory a bench may take.

Managed memory beyond what a card has free can hang the card, not only the process. So every process of the benches
asks CUDA what is free before it allocates anything and refuses if it might need more than a quarter of that; the
driver runs one process at a time; and `uvm` runs with a capacity below a quarter of the device.

Nothing here imports torch.
"""

from __future__ import annotations

import ctypes
from typing import Any

MIB, GIB = 1 << 20, 1 << 30
#: No workload may need more, on any card.
MOST = 16 * GIB
#: `uvm_oversubscription_ratio` in every bench: the capacity as a share of the device's memory.
RATIO = 0.2


class TooMuch(RuntimeError):
    """The card has too little free memory for this workload; nothing was allocated."""


def check(free: int, total: int, need: int, *, ratio: float = 0.0) -> None:
    """TooMuch if a process that needs `need` bytes may not run on a card with `free` of `total` bytes free.

    `ratio` is the oversubscription ratio of a process that runs with `uvm`, whose capacity counts as its need.
    """
    if need > MOST:
        raise TooMuch(f"needs {need / GIB:.1f} GiB; no bench may take more than {MOST / GIB:.0f} GiB")
    need = max(need, int(ratio * total))
    if need > free // 4:
        raise TooMuch(
            f"may take {need / GIB:.1f} GiB, more than a quarter of the {free / GIB:.1f} GiB that the card has free"
        )


def cuda_runtime(torch: Any) -> ctypes.CDLL:
    """The CUDA runtime that PyTorch has loaded. OSError where it cannot be found."""
    return ctypes.CDLL(f"libcudart.so.{torch.version.cuda.partition('.')[0]}")


def memory_info(runtime: ctypes.CDLL) -> tuple[int, int]:
    """(free, total) in bytes, without initialising PyTorch's CUDA state. RuntimeError where CUDA refuses."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    status = runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    if status != 0:
        raise RuntimeError(f"cudaMemGetInfo answered {status}")
    return free.value, total.value
