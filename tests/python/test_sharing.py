"""Tensors shared with other processes: CUDA has no handles for managed memory, and the error must say so."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from contents import MIB, check, filled, same
from on_device import on_device

RECEIVER = """
import pickle, sys
import torch
from contents import check
rebuild, arguments, seed = pickle.load(sys.stdin.buffer)
tensor = rebuild(*arguments)
check(tensor, seed, "in the other process")
tensor.copy_(torch.flip(tensor.cpu(), (0,)))
torch.cuda.synchronize()
print("received")
"""


def send(tensor: torch.Tensor, seed: int) -> None:
    """Has another process open a tensor, check it, and turn it around."""
    import pickle

    import torch.multiprocessing  # noqa: F401
    from torch.multiprocessing.reductions import reduce_tensor

    packed = pickle.dumps((*reduce_tensor(tensor), seed))
    path = os.pathsep.join([os.path.dirname(os.path.abspath(__file__)), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}
    done = subprocess.run(
        [sys.executable, "-c", RECEIVER], input=packed, env=environment, capture_output=True, timeout=100
    )
    if done.returncode != 0 or b"received" not in done.stdout:
        raise AssertionError(f"the other process ended with {done.returncode}: {done.stderr.decode(errors='replace')}")


@on_device(uvm_only=True)
def test_managed_memory_says_why_not() -> None:
    """The error names managed memory and the placement that can be shared; the tensor stays whole."""
    tensor = filled(1, 3 * MIB)
    try:
        tensor.untyped_storage()._share_cuda_()
    except RuntimeError as error:
        text = str(error)
        assert "managed" in text and "uvm_access_pattern:device" in text, text
    else:
        raise AssertionError("a handle for managed memory was given out")
    check(tensor, 1)
    check(filled(2, 3 * MIB), 2)


@on_device("use_uvm:True,uvm_access_pattern:device")
def test_device_placement_can_be_shared() -> None:
    """A block in the middle of a segment reaches the other process whole, and what that writes comes back."""
    others = [filled(seed, 3 * MIB) for seed in range(10, 12)]
    tensor = filled(1, 3 * MIB)
    send(tensor, 1)
    same(torch.equal(tensor.cpu(), torch.flip(filled(1, 3 * MIB).cpu(), (0,))), True, "what the other process wrote")
    for seed, other in enumerate(others, 10):
        check(other, seed, "a neighbour")


@on_device("use_uvm:True,uvm_access_pattern:device")
def test_two_tensors_of_one_segment_are_shared() -> None:
    """The second handle of the same segment works as the first did."""
    for seed in (1, 2, 3):
        send(filled(seed, 600_000), seed)
