"""What differs between the versions of PyTorch that the tests run under. The tests ask here, by name.

Where PyTorch's Python shows whether it has something, that is looked at; where it does not, the version decides.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import pytest
import torch

#: The running PyTorch, such as (2, 15).
PYTORCH = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])


def _takes(function: Callable[..., object], parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters


#: `torch.cuda.MemPool` tells the allocator it was made with.
MEMPOOL_TELLS_ITS_ALLOCATOR = hasattr(torch.cuda.MemPool, "allocator")

#: `CUDAGraph.capture_end()` without a capture is an error and no more. PyTorch 2.15.0 builds its text from memory that
#: nobody wrote, and leaves CUDA's error to the next call, whatever that is.
UNBEGUN_CAPTURE_ENDS_WELL = PYTORCH < (2, 15)

#: PyTorch's own allocator goes on reclaiming while a MemPool is in use. Before, it took one for a capture.
NATIVE_KNOWS_CAPTURES_FROM_POOLS = PYTORCH >= (2, 13)

#: `use_mem_pool` serves the thread that enters it. Earlier it serves every thread whose current stream is the same.
MEMPOOL_SERVES_ONE_THREAD = hasattr(torch._C, "_cuda_beginAllocateCurrentThreadToPool")

#: Reading a snapshot imports `torch._dynamo`.
SNAPSHOTS_IMPORT_DYNAMO = PYTORCH >= (2, 9)

#: What later versions have: name to whether this one does.
LATER = {
    "MemPool(use_on_oom=True)": _takes(torch.cuda.MemPool.__init__, "use_on_oom"),
    "MemPool(no_split=True)": _takes(torch.cuda.MemPool.__init__, "no_split"),
    "MemPool.snapshot(include_traces=False)": _takes(torch.cuda.memory_snapshot, "include_traces"),
    "skip_actions": _takes(torch.cuda.memory._record_memory_history_impl, "skip_actions"),
    "compile_context": _takes(torch.cuda.memory._record_memory_history_impl, "compile_context"),
    "_set_memory_metadata": hasattr(torch.cuda.memory, "_set_memory_metadata"),
    "_memory_metadata_supported": hasattr(torch.cuda.memory, "_memory_metadata_supported"),
    "_annotate_tensor": hasattr(torch.cuda.memory, "_annotate_tensor"),
    "_allocation_traceback": hasattr(torch.cuda.memory, "_allocation_traceback"),
    "torch.accelerator.get_memory_info": hasattr(getattr(torch, "accelerator", None), "get_memory_info"),
    "torch.accelerator.memory_stats": hasattr(getattr(torch, "accelerator", None), "memory_stats"),
    "PYTORCH_ALLOC_CONF": PYTORCH >= (2, 10),
    "the reason why Dynamo leaves a function out": PYTORCH >= (2, 9),
    "per_process_memory_fraction:…": PYTORCH >= (2, 10),
    "max_split_size_mb as vLLM sets it": PYTORCH >= (2, 11),
    "throw_on_cudamalloc_oom:…": PYTORCH >= (2, 12),
    "num_oom_rejections": PYTORCH >= (2, 12),
    "reserved_bytes_by_private_pools": PYTORCH >= (2, 13),
}


def needs(*features: str) -> pytest.MarkDecorator:
    """Marks a test that needs what only later versions have (`LATER`)."""
    lacking = ", ".join(feature for feature in features if not LATER[feature])
    return pytest.mark.skipif(bool(lacking), reason=f"PyTorch {torch.__version__} does not have {lacking}")


def unknown_key(key: str) -> str:
    """What PyTorch's error says about a key of the configuration that it does not know."""
    if PYTORCH < (2, 10):
        return f"Unrecognized CachingAllocator option: {key}"
    return f"Unrecognized key '{key}'"
