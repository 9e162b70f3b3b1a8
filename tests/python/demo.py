#!/usr/bin/env python3
"""A PyTorch program on unified memory, step by step: what `cargo xtask demo` runs.

It holds more memory than the allocator may keep on the GPU, and checks every byte it wrote. Nothing in it needs a
kernel's result, so it does the same on the simulated device, where kernels do nothing, as on a real GPU.

    PYTORCH_CUDA_ALLOC_CONF=use_uvm:True,uvm_oversubscription_ratio:5.0,uvm_access_pattern:gpu_first python demo.py

On a real GPU the program never holds more than a quarter of what the card has free: it starts itself again with a
`uvm_device_limit_mb` well below that, and holds more than this limit instead of more than the card.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MIB = 1 << 20
GIB = 1 << 30
CONFIGURATION = "PYTORCH_CUDA_ALLOC_CONF"
DEFAULT = "use_uvm:True,uvm_oversubscription_ratio:5.0,uvm_access_pattern:gpu_first"


class Failed(Exception):
    """The program saw something that must not be."""


def check(condition: bool, what: str) -> None:
    """Stops the program unless `condition` holds. (An `assert` would vanish under `python -O`.)"""
    if not condition:
        raise Failed(what)


@contextmanager
def step(title: str) -> Iterator[None]:
    """One step of the program: says what it does and that it went well."""
    print(f"\n* {title}", flush=True)
    yield
    print("  ok", flush=True)


def size(count: float) -> str:
    """A number of bytes for people."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


class Patterns:
    """Seeded contents: every seed gives other bytes, and the same bytes each time."""

    def __init__(self, torch: Any, largest: int, seed: int) -> None:
        self._torch = torch
        generator = torch.Generator().manual_seed(seed)
        self._base = torch.randint(-(2**62), 2**62, (largest // 8,), dtype=torch.int64, generator=generator)

    def make(self, seed: int, count: int) -> Any:
        """`count` bytes in host memory. An odd factor times the seed, added to each word, tells the tensors apart."""
        factor = (seed * 0x9E3779B97F4A7C1 + 2**63) % 2**64 - 2**63  # as 64-bit words wrap around
        return (self._base[: count // 8] + factor).view(self._torch.uint8)

    def verify(self, tensor: Any, seed: int, what: str) -> None:
        """Reads a tensor back from the device and compares it byte for byte."""
        read = tensor.cpu()
        wrong = (read != self.make(seed, read.numel())).nonzero()
        if wrong.numel():
            raise Failed(f"{what}: {wrong.shape[0]} of {read.numel()} bytes differ, the first at {int(wrong[0])}")


def plan(torch: Any, arguments: argparse.Namespace) -> tuple[int, int]:
    """How many bytes to hold, and the limit they exceed. On a real GPU this may start the program anew."""
    free, total = torch.cuda.mem_get_info()
    properties = torch.cuda.get_device_properties(0)
    simulated = "TORCH_UVM_SIM_DEVICE" in os.environ
    print(f"device: {properties.name}, {size(total)}, {size(free)} free" + (" (simulated)" if simulated else ""))
    configuration = os.environ.get(CONFIGURATION, "")
    given = [item.partition(":")[2] for item in configuration.split(",") if item.startswith("uvm_device_limit_mb:")]
    if simulated:
        limit = int(given[-1]) * MIB if given else total
        hold = arguments.hold_mb * MIB if arguments.hold_mb else int(1.6 * limit)
    else:
        if not given:
            limit = min(free // 8, 2 * GIB) // MIB
            check(limit >= 256, f"only {size(free)} are free on this GPU: too little for a demonstration")
            os.environ[CONFIGURATION] = f"{configuration},uvm_device_limit_mb:{limit}"
            print(
                f"starting again with uvm_device_limit_mb:{limit}, to stay under a quarter of what is free", flush=True
            )
            os.execv(sys.executable, [sys.executable, *sys.argv])
        limit = int(given[-1]) * MIB
        hold = arguments.hold_mb * MIB if arguments.hold_mb else int(1.25 * limit)
        # The other steps need some blocks of their own beside what is held.
        check(
            hold + 512 * MIB <= free // 4, f"{size(hold)} and 512 MiB are more than a quarter of the {size(free)} free"
        )
    check(hold > limit, f"{size(hold)} do not exceed the limit of {size(limit)}: nothing would be shown")
    return hold, limit


def hold_more_than_the_limit(torch: Any, patterns: Patterns, hold: int, each: int) -> list[Any]:
    """Tensors of `each` bytes, `hold` bytes together, every one filled and read back when all are there."""
    tensors = []
    for index in range(-(-hold // each)):
        tensor = torch.empty(each, dtype=torch.uint8, device="cuda")
        tensor.copy_(patterns.make(index, each))
        tensors.append(tensor)
    held = sum(tensor.numel() for tensor in tensors)
    print(f"  {len(tensors)} tensors filled, {size(held)} held; reading them back", flush=True)
    check(torch.cuda.memory_allocated() >= held, "memory_allocated() is less than what is held")
    for index, tensor in enumerate(tensors):
        patterns.verify(tensor, index, f"tensor {index}")
    return tensors


def use_two_streams(torch: Any, patterns: Patterns, count: int) -> None:
    """A block is freed while another stream still reads it: record_stream keeps it until that stream is done."""
    side = torch.cuda.Stream()
    source = torch.empty(count, dtype=torch.uint8, device="cuda")
    kept = torch.empty(count, dtype=torch.uint8, device="cuda")
    source.copy_(patterns.make(1001, count))
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # the copy is late, so that reuse would come first
        kept.copy_(source, non_blocking=True)
    source.record_stream(side)
    address = source.data_ptr()
    del source
    # The same size on the first stream, at once: it must not get the block that is still being read.
    intruder = torch.empty(count, dtype=torch.uint8, device="cuda")
    check(intruder.data_ptr() != address, "a block in use on another stream was handed out")
    intruder.copy_(patterns.make(1002, count))
    side.synchronize()
    patterns.verify(kept, 1001, "the copy made on the side stream")
    patterns.verify(intruder, 1002, "the tensor allocated meanwhile")
    again = torch.empty(count, dtype=torch.uint8, device="cuda")
    check(again.data_ptr() == address, "the block was not used again after the side stream had finished")
    print(
        f"  {size(count)} copied on a side stream while its source was freed; the block was used again only afterwards"
    )


def replay_a_graph(torch: Any, patterns: Patterns, count: int) -> None:
    """A CUDA graph of copies, with a tensor allocated inside the capture, replayed on new inputs."""
    given = torch.empty(count, dtype=torch.uint8, device="cuda")
    given.copy_(patterns.make(2000, count))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        between = torch.empty_like(given)
        between.copy_(given)
        result = torch.empty_like(given)
        result.copy_(between)
        del between
    for replay in range(3):
        given.copy_(patterns.make(2001 + replay, count))
        graph.replay()
        torch.cuda.synchronize()
        patterns.verify(result, 2001 + replay, f"replay {replay}")
    print("  captured once, replayed 3 times with new inputs")


def use_a_mempool(torch: Any, patterns: Patterns, count: int) -> None:
    """Tensors from a pool of their own: their segments carry the pool's id."""
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        inside = torch.empty(count, dtype=torch.uint8, device="cuda")
    outside = torch.empty(count, dtype=torch.uint8, device="cuda")
    inside.copy_(patterns.make(3000, count))
    outside.copy_(patterns.make(3001, count))

    def pool_of(tensor: Any) -> tuple[int, int]:
        for segment in torch.cuda.memory_snapshot():
            if segment["address"] <= tensor.data_ptr() < segment["address"] + segment["total_size"]:
                return tuple(segment["segment_pool_id"])
        raise Failed("a tensor lies in no segment of the snapshot")

    check(pool_of(inside) == tuple(pool.id), f"the pool's tensor is in pool {pool_of(inside)}, not {pool.id}")
    check(pool_of(outside) == (0, 0), f"the other tensor is in pool {pool_of(outside)}")
    patterns.verify(inside, 3000, "the tensor in the pool")
    patterns.verify(outside, 3001, "the tensor beside it")
    print(f"  pool {tuple(pool.id)} holds {size(count)}, apart from the default pool")


def meet_the_cap(torch: Any, simulated: bool) -> None:
    """Allocates until the allocator refuses, prints its words, and goes on working."""
    if not simulated:
        # Filling a real machine's memory would be no demonstration but an attack on whoever shares it: a cap close by.
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 128 * MIB) / total)
    each = (128 if simulated else 32) * MIB
    hoard = []
    try:
        while True:
            hoard.append(torch.empty(each, dtype=torch.uint8, device="cuda"))
            check(len(hoard) < 1 << 16, "there seems to be no cap")
    except torch.cuda.OutOfMemoryError as error:
        print(f"  refused after {size(len(hoard) * each)} more:\n  OutOfMemoryError: {error}")
        check("out of memory" in str(error), "the error does not say what it is")
    hoard.clear()
    if not simulated:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.empty(MIB, device="cuda")


def run(torch: Any, arguments: argparse.Namespace) -> None:
    """All steps."""
    backend = torch.cuda.get_allocator_backend()
    check(backend == "uvm", f"the allocator backend is {backend!r}, not 'uvm'")
    hold, limit = plan(torch, arguments)
    simulated = "TORCH_UVM_SIM_DEVICE" in os.environ
    each = arguments.tensor_mb * MIB
    patterns = Patterns(torch, each, arguments.seed)
    small = min(each, 32 * MIB)
    print(f"allocator: {backend}, {os.environ.get(CONFIGURATION, '')}")

    with step(f"hold {size(hold)}, more than the {size(limit)} that may lie on the GPU"):
        tensors = hold_more_than_the_limit(torch, patterns, hold, each)
    with step("use two streams, with record_stream"):
        use_two_streams(torch, patterns, small)
    with step("capture a CUDA graph and replay it"):
        replay_a_graph(torch, patterns, small)
    with step("use a MemPool"):
        use_a_mempool(torch, patterns, small)
    with step("meet the cap"):
        meet_the_cap(torch, simulated)
    with step("read everything again, after all that"):
        for index, tensor in enumerate(tensors):
            patterns.verify(tensor, index, f"tensor {index}")
    with step("empty the cache"):
        reserved = torch.cuda.memory_reserved()
        tensors.clear()
        del tensor
        torch.cuda.empty_cache()
        after = torch.cuda.memory_reserved()
        print(f"  reserved before {size(reserved)}, after {size(after)}")
        check(torch.cuda.memory_allocated() == 0, "something is still allocated")
        check(after <= reserved - hold, "empty_cache() did not give everything back")
    print("\n" + torch.cuda.memory_summary())
    print(f"allocator backend: {torch.cuda.get_allocator_backend()}; all checks passed")


def main() -> int:
    """Reads the arguments, sets the default configuration, runs; 1 if anything is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how_much = "how much to hold (default: 1.25 times the limit, 1.6 times on the simulated device)"
    parser.add_argument("--hold-mb", type=int, default=0, help=how_much)
    parser.add_argument("--tensor-mb", type=int, default=64, help="the size of each tensor (default 64)")
    parser.add_argument("--seed", type=int, default=20, help="seed of the contents (default 20)")
    arguments = parser.parse_args()
    if arguments.tensor_mb < 1 or arguments.hold_mb < 0:
        parser.error("--tensor-mb must be at least 1, --hold-mb at least 0")
    os.environ.setdefault(CONFIGURATION, DEFAULT)
    import torch  # reads the configuration, so not at the top

    try:
        run(torch, arguments)
    except Failed as failure:
        print(f"\nFAILED: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
