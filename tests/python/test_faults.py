"""Every call that the allocator makes of CUDA fails once, at different times: the program gets an error or does not
notice, contents stay whole, the books balance, and everything is given back in the end. (The Rust tests do the same
at every single call; here it goes through PyTorch.)"""

from __future__ import annotations

import ctypes
import gc

import pytest
import torch
from contents import MIB, block, check, filled
from on_device import on_device
from test_statistics import check_agreement
from under_test import torch_uvm

CALLS = {
    "cuMemAllocManaged": "OUT_OF_MEMORY",
    "cuMemAdvise": "UNKNOWN",
    "cuMemPrefetchAsync": "UNKNOWN",
    "cuMemFree": "UNKNOWN",
    "cuEventCreate": "OUT_OF_MEMORY",
    "cuEventRecord": "UNKNOWN",
    "cuEventQuery": "UNKNOWN",
    "cuEventSynchronize": "UNKNOWN",
    "cuStreamSynchronize": "UNKNOWN",
    "cuStreamIsCapturing": "UNKNOWN",
    "cuThreadExchangeStreamCaptureMode": "UNKNOWN",
    "cuMemGetInfo": "UNKNOWN",
}


def use_everything(seed: int) -> None:
    """Small and large tensors, a second stream, a capture that needs memory, the cache emptied while blocks wait."""
    sizes = (1000, 300_000, 3 * MIB, 22 * MIB)
    tensors = [filled(seed + index, count) for index, count in enumerate(sizes)]
    side = torch.cuda.Stream()
    source, kept = filled(seed + 10, 5 * MIB), block(5 * MIB)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        kept.copy_(source, non_blocking=True)
    source.record_stream(side)
    del source
    intruder = filled(seed + 11, 5 * MIB)
    graph, capturing = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(capturing):
        # Room for the random generator's seed: PyTorch does not survive it if that allocation fails.
        room = block(512)
    with torch.cuda.graph(graph, stream=capturing):
        result = torch.empty_like(intruder)
        result.copy_(intruder)
    graph.replay()
    torch.cuda.synchronize()
    for index, tensor in enumerate(tensors):
        check(tensor, seed + index, f"tensor {index}")
    check(kept, seed + 10, "the copy on the side stream")
    check(intruder, seed + 11, "the tensor allocated meanwhile")
    check(result, seed + 11, "the graph's result")
    del tensors[::2], room
    for _ in range(2):
        waiting = block(3 * MIB)
        with torch.cuda.stream(side):
            kept[: 3 * MIB].copy_(waiting, non_blocking=True)
        waiting.record_stream(side)
        del waiting
        torch.cuda.empty_cache()
        assert torch_uvm.memory_info().free > 0


@pytest.mark.parametrize("call", list(CALLS))
@on_device(uvm_only=True, timeout=300, init=False)
def test_a_call_that_fails_once(call: str) -> None:
    """The first, the second, the fourth call of its kind."""
    import os

    from nursery import in_fork

    # One fork for each time, since calls are counted from the beginning.
    for number in (1, 2, 4):
        os.environ["TORCH_UVM_SIM_FAIL"] = f"{call}@{number}={CALLS[call]}"
        ended = in_fork(one_fault, 60, abrupt=True)
        if ended.status != 0:
            raise AssertionError(f"{os.environ['TORCH_UVM_SIM_FAIL']}: {ended.ending}\n{ended.output}")


def one_fault() -> None:
    """Runs into the planted fault, and then on."""
    torch.cuda.init()
    kept, errors = None, 0
    for attempt in range(3):
        try:
            if kept is None:
                kept = filled(1, 3 * MIB)
            use_everything(100 * attempt)
        except RuntimeError as error:
            print(f"attempt {attempt}: {type(error).__name__}: {error}")
            assert "INTERNAL ASSERT" not in str(error), error
            errors += 1
            torch.cuda.synchronize()  # what the side stream still writes to has been freed
        gc.collect()
        check_agreement(f"after attempt {attempt}")
    assert errors <= 1, "the fault was passed, and the program failed again"
    assert kept is not None
    check(kept, 1, "the tensor that was there throughout")
    del kept
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    check_agreement("at the end")
    assert torch.cuda.memory_allocated() == 0, "blocks leaked"
    assert torch.cuda.memory_reserved() == 0, "segments leaked"
    assert faults_hit() == 1, "the program never made the call that was to fail"


def faults_hit() -> int:
    """How many calls of this process the simulator has failed because a fault was planted."""
    count = ctypes.CDLL(None).uvmsim_faults_hit
    count.restype = ctypes.c_uint64
    return int(count())
