"""What a workload or a check is given: the device, the backend, and where its results go."""

from __future__ import annotations

import ctypes
import hashlib
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Callable, Optional

from backends import Backend, Prepared


class Failed(Exception):
    """A check does not hold."""


class Skipped(Exception):
    """This cannot be run here; the text says why."""


@dataclass(frozen=True)
class Figure:
    """One measured quantity of a workload."""

    title: str
    unit: str
    #: Where larger is better the table says so.
    larger_is_better: bool = False
    #: Shown without a ratio: it says something of the run, not of the allocator.
    informative: bool = False


class Bench:
    """One run of one workload in this process."""

    def __init__(
        self,
        torch: Any,
        backend: Backend,
        prepared: Prepared,
        *,
        quick: bool,
        simulated: bool,
        turn: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.torch = torch
        #: Around everything that is timed: waits until no other backend's process measures.
        self.turn = turn
        self.backend = backend
        #: Small sizes and few repetitions: to see that it runs.
        self.quick = quick
        #: Kernels do nothing there, so no value that a kernel wrote means anything.
        self.simulated = simulated
        self._prepared = prepared
        self.figures: dict[str, list[float]] = {}
        self.digests: dict[str, str] = {}
        self.facts: dict[str, Any] = {}
        self.notes: list[str] = []
        self.memory: dict[str, Optional[dict[str, int]]] = {}
        self._peaks_before: Optional[dict[str, int]] = None

    def allocations(self) -> AbstractContextManager:
        """Everything that a workload allocates itself, outside captures and compiled code, is allocated under this."""
        return self._prepared.allocations()

    @property
    def graph_pool(self) -> Optional[tuple]:
        """For `torch.cuda.graph(pool=…)`, outside `allocations()`."""
        return self._prepared.graph_pool

    def reduce_overhead(self, function: Callable) -> Callable:
        """`function` compiled with CUDA graph trees. The simulated device cannot load what Inductor compiles, so there
        PyTorch's own kernels are put into the graphs."""
        if self.simulated:
            return self.torch.compile(function, backend="cudagraphs", dynamic=False)
        return self.torch.compile(function, mode="reduce-overhead", dynamic=False)

    def sample(self, figure: str, value: float) -> None:
        """One measurement, in the figure's unit."""
        self.figures.setdefault(figure, []).append(value)

    def milliseconds(self, work: Callable[[], Any]) -> float:
        """How long `work` takes on the device, its launches included: from an idle device until all is done."""
        torch = self.torch
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with self.turn():
            start.record()
            work()
            end.record()
            end.synchronize()
        return start.elapsed_time(end)

    def seconds(self, work: Callable[[], Any]) -> float:
        """The same by the host's clock."""
        self.torch.cuda.synchronize()
        with self.turn():
            start = time.perf_counter()
            work()
            self.torch.cuda.synchronize()
            return time.perf_counter() - start

    def digest(self, name: str, *tensors: Any) -> None:
        """What must be the same, bit for bit, with every backend."""
        total = hashlib.sha256()
        for tensor in tensors:
            host = tensor.detach().contiguous().cpu()
            total.update(f"{host.dtype} {tuple(host.shape)}".encode())
            total.update(ctypes.string_at(host.data_ptr(), host.numel() * host.element_size()))
        self.digests[name] = total.hexdigest()

    def fact(self, name: str, value: Any) -> None:
        """A value (of JSON's types) that must be the same with every backend, on the simulated device too."""
        self.facts[name] = value

    def check(self, holds: bool, what: str) -> None:
        """Failed unless `holds`."""
        if not holds:
            raise Failed(what)

    def check_values(self, holds: Callable[[], Any], what: str) -> None:
        """The same for what depends on a kernel's result: not looked at on the simulated device."""
        if not self.simulated and not bool(holds()):
            raise Failed(what)

    def note(self, text: str) -> None:
        """Something that a reader of the table should know."""
        self.notes.append(text)

    def _peaks(self) -> Optional[dict[str, int]]:
        try:
            stats = self.torch.cuda.memory_stats()
        except RuntimeError:  # a pluggable allocator keeps none
            return None
        return {
            "reserved": stats["reserved_bytes.all.peak"],
            "allocated": stats["allocated_bytes.all.peak"],
            "requested": stats["requested_bytes.all.peak"],
        }

    def steady(self) -> None:
        """The warm-up is over: peaks are counted anew from here."""
        self.torch.cuda.synchronize()
        self._peaks_before = self._peaks()
        if self._peaks_before is not None:
            self.torch.cuda.reset_peak_memory_stats()

    def end_of_measurement(self) -> None:
        """Notes the peaks, in bytes: of the steady phase and of the whole process until now."""
        self.torch.cuda.synchronize()
        with self.turn():
            pass  # what the workload does from here on must not run beside the others' last measurements
        steady, before = self._peaks(), self._peaks_before
        self.memory["steady"] = steady
        if steady is None or before is None:
            self.memory["process"] = steady
        else:
            self.memory["process"] = {key: max(steady[key], before[key]) for key in steady}

    def result(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "figures": self.figures,
            "digests": self.digests,
            "facts": self.facts,
            "memory": self.memory,
            "notes": self.notes,
        }
