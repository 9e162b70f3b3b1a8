"""What differs between the versions of PyTorch that the tests run under. The tests ask here, by name."""

from __future__ import annotations

import re

import torch

#: The running PyTorch, such as (2, 15).
PYTORCH = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])

#: `torch.cuda.MemPool` tells the allocator it was made with.
MEMPOOL_TELLS_ITS_ALLOCATOR = hasattr(torch.cuda.MemPool, "allocator")

#: `CUDAGraph.capture_end()` without a capture is an error and no more. PyTorch 2.15.0 builds its text from memory that
#: nobody wrote, and leaves CUDA's error to the next call, whatever that is.
UNBEGUN_CAPTURE_ENDS_WELL = PYTORCH < (2, 15)

#: Reading a snapshot imports `torch._dynamo`.
SNAPSHOTS_IMPORT_DYNAMO = PYTORCH >= (2, 9)


def unknown_key(key: str) -> str:
    """What PyTorch's error says about a key of the configuration that it does not know."""
    if PYTORCH < (2, 9):
        return f"Unrecognized CachingAllocator option: {key}"
    return f"Unrecognized key '{key}'"
