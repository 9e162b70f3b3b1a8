"""Unified memory for PyTorch's CUDA caching allocator.

The environment variable chooses the allocator, and nothing in a program changes:

    export PYTORCH_CUDA_ALLOC_CONF='use_uvm:True,uvm_oversubscription_ratio:5.0,uvm_access_pattern:gpu_first'

PyTorch loads this package by itself, at the end of `import torch`. What is here is for programs that want to know more
(`is_enabled`, `config`, `memory_info`, `statistics`, `dump_snapshot`), to put chosen tensors in a chosen place
(`placement`, `MemPool`), to say where they should be when (`prefetch`, `advise`, `discard`), or to keep weights and
optimizer state in host memory (`stream_weights`, `offload_optimizer`).
`python -m torch_uvm doctor` says what a machine is and what will work on it, `report` makes a page of a memory
snapshot, and `simulate` runs a program on a machine without a GPU and says where its memory was.

Every process that imports PyTorch imports this module, with or without `use_uvm`: so it imports nothing before it is
asked.
"""

from __future__ import annotations

TYPE_CHECKING = False  # what type checkers take for true; `typing` itself would have to be imported
if TYPE_CHECKING:
    from typing import Any

    from ._activate import activate
    from ._hints import advise, discard, prefetch
    from ._offload import offload_optimizer
    from ._pools import MemPool, empty_cache, placement
    from ._records import MemoryInfo, PlaceStats
    from ._report import config, is_enabled, memory_info, statistics
    from ._snapshot import dump_snapshot
    from ._streaming.api import WeightStream, WeightStreamStatistics, stream, stream_weights

    __version__: str

__all__ = [
    "MemPool",
    "MemoryInfo",
    "PlaceStats",
    "WeightStream",
    "WeightStreamStatistics",
    "__version__",
    "activate",
    "advise",
    "config",
    "discard",
    "dump_snapshot",
    "empty_cache",
    "is_enabled",
    "memory_info",
    "offload_optimizer",
    "placement",
    "prefetch",
    "statistics",
    "stream",
    "stream_weights",
]

_HOMES = {
    "MemPool": "_pools",
    "MemoryInfo": "_records",
    "PlaceStats": "_records",
    "WeightStream": "_streaming.api",
    "WeightStreamStatistics": "_streaming.api",
    "__version__": "_version",
    "activate": "_activate",
    "advise": "_hints",
    "config": "_report",
    "discard": "_hints",
    "dump_snapshot": "_snapshot",
    "empty_cache": "_pools",
    "is_enabled": "_report",
    "memory_info": "_report",
    "offload_optimizer": "_offload",
    "placement": "_pools",
    "prefetch": "_hints",
    "statistics": "_report",
    "stream": "_streaming.api",  # the first name of stream_weights
    "stream_weights": "_streaming.api",
}


def __getattr__(name: str) -> Any:
    """Imports the module that a public name lives in when it is first asked for."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
