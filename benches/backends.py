"""The allocators that the benches compare: how a process of each is started and what it does before it allocates.

At the top of this file nothing imports torch: the driver chooses backends, the worker prepares one.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional

import limits

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT / "tests" / "python"))

import simulated

#: Names the compiled managed.cpp to the worker.
MANAGED_LIBRARY = "TORCH_UVM_BENCH_MANAGED"
UVM = f"use_uvm:True,uvm_oversubscription_ratio:{limits.RATIO}"


@dataclass(frozen=True)
class Backend:
    """One allocator."""

    name: str
    #: The column's heading.
    title: str
    #: PYTORCH_CUDA_ALLOC_CONF.
    conf: str = ""
    #: What torch.cuda.get_allocator_backend() must answer.
    reported: str = "native"
    #: Somebody else's: that it cannot do something is a note, not a failure of the run.
    foreign: bool = False
    #: For the table's notes.
    note: str = ""

    @property
    def ratio(self) -> float:
        """The share of the device's memory that `uvm` may take; 0 for the others, which take what a workload needs."""
        return limits.RATIO if self.reported == "uvm" else 0.0


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("native", "native"),
        Backend("expandable", "native, expandable segments", "expandable_segments:True"),
        Backend(
            "mempool",
            "native in a MemPool of cudaMallocManaged",
            foreign=True,
            note="the pool serves the main thread only: not the backward pass, not compiled graphs, not other threads",
        ),
        Backend("uvm", "uvm", UVM, "uvm"),
        Backend("uvm_device", "uvm, plain device memory", f"{UVM},uvm_access_pattern:device", "uvm"),
        Backend(
            "rmm",
            "RMM pool over managed memory",
            reported="pluggable",
            foreign=True,
            note="a pluggable allocator: no CUDA graphs, no statistics",
        ),
    )
}
#: Those that run where none are named.
DEFAULT = ("native", "expandable", "mempool", "uvm", "rmm")


def environment(backend: Backend, **extra: str) -> dict[str, str]:
    """The variables of a process of `backend`: on the simulated device where TORCH_UVM_SIM_LIB is set."""
    # A full-size machine: the workloads are sized for real ones. Streams run at once, since nothing is tested here.
    return simulated.environment(backend.conf, device="h100", hbm=None, host=None, schedule="eager", **extra)


def on_simulated_device() -> bool:
    """Whether this process (or one that it starts) runs on the simulated device."""
    return "TORCH_UVM_SIM_DEVICE" in os.environ or simulated.library_directory() is not None


def compile_managed(folder: Path, cxx: str) -> Path:
    """Compiles managed.cpp into `folder` and returns the library. RuntimeError where the compiler fails."""
    library = folder / "libmanaged.so"
    command = [cxx, "-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-fvisibility=hidden"]
    command += [str(HERE / "managed.cpp"), "-o", str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{cxx}: {error}") from error
    if done.returncode != 0:
        raise RuntimeError(f"{cxx} could not compile managed.cpp:\n{done.stderr}")
    return library


@dataclass
class Prepared:
    """A backend in this process."""

    #: What the workload's own allocations are made under.
    allocations: Callable[[], AbstractContextManager] = nullcontext
    #: The pool of graphs that the workload captures; None for one of their own.
    graph_pool: Optional[tuple] = None
    #: Kept alive to the end of the process.
    kept: list = field(default_factory=list)


def managed_allocator(torch: Any, need: int) -> tuple[Any, ctypes.CDLL]:
    """A pluggable allocator of at most `need` bytes of managed memory, and its library."""
    path = os.environ[MANAGED_LIBRARY]
    library, runtime = ctypes.CDLL(path), limits.cuda_runtime(torch)
    library.managed_setup.restype = None
    library.managed_live.restype = library.managed_calls.restype = ctypes.c_size_t
    functions = (runtime.cudaMallocManaged, runtime.cudaFree, runtime.cudaThreadExchangeStreamCaptureMode)
    pointers = [ctypes.cast(function, ctypes.c_void_p) for function in functions]
    library.managed_setup(*pointers, ctypes.c_size_t(need))
    return torch.cuda.memory.CUDAPluggableAllocator(path, "managed_alloc", "managed_free"), library


def prepare(torch: Any, backend: Backend, need: int) -> Prepared:
    """Puts `backend` in place, before anything is allocated, for a workload that needs `need` bytes.

    RuntimeError where the process has another allocator than `backend`; limits.TooMuch where the card has too little
    free memory.
    """
    limits.check(*limits.memory_info(limits.cuda_runtime(torch)), need, ratio=backend.ratio)
    prepared = Prepared()
    if backend.name == "rmm":
        import rmm
        from rmm.allocators.torch import rmm_torch_allocator

        rmm.reinitialize(
            pool_allocator=True,
            managed_memory=True,
            initial_pool_size=min(need, limits.GIB),
            maximum_pool_size=need // 256 * 256,
        )
        torch.cuda.memory.change_current_allocator(rmm_torch_allocator)
    torch.cuda.init()
    found = torch.cuda.get_allocator_backend()
    if found != backend.reported:
        raise RuntimeError(
            f"the allocator backend is {found!r}, not {backend.reported!r}: "
            "is torch-uvm (or a patched PyTorch) installed?"
        )
    if backend.name == "mempool":
        allocator, library = managed_allocator(torch, need)
        pool = torch.cuda.MemPool(allocator.allocator())
        prepared.kept += [allocator, library, pool]
        prepared.allocations = lambda: torch.cuda.use_mem_pool(pool)
        prepared.graph_pool = pool.id
    return prepared
