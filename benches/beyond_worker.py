#!/usr/bin/env python3
"""The process of some of the measurements of beyond.py, which starts it with its task in TORCH_UVM_BEYOND (JSON).

    beyond_worker.py RESULT.json

It imports PyTorch, waits for a line (or the end) of its standard input, which is its turn on the GPU, measures, and
writes rows: what was measured, milliseconds of each pass, bytes that one pass brings over the link, and the digest of
the result.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional

import backends
import limits
import model as models
from limits import GIB, MIB

SEED = 7
#: Passes with large activations before a program that does nothing is timed: they free more than twice the largest
#: limit.
SETTLING = 6


class Rows:
    """What was measured."""

    def __init__(self, simulated: bool) -> None:
        self.simulated = simulated
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def add(
        self,
        experiment: str,
        name: str,
        milliseconds: list[float],
        *,
        batch: Optional[int] = None,
        limit: Optional[int] = None,
        link: Optional[int] = None,
        digest: Optional[str] = None,
        values: Optional[list[float]] = None,
        **more: Any,
    ) -> None:
        """`link` is bytes a pass over the link, `limit` the device limit in bytes; None for none."""
        row = {"experiment": experiment, "name": name, "batch": batch, "limit": limit, "ms": milliseconds}
        self.rows.append({**row, "link": link, "digest": digest, "values": values, **more})
        where = f" batch {batch}" if batch else ""
        where += f" limit {limit / GIB:.2f} GiB" if limit else ""
        print(f"{experiment} {name}{where}: {sorted(milliseconds)[len(milliseconds) // 2]:.2f} ms", flush=True)


def measure(work: Callable[[], Any], passes: int, before: Callable[[], Any] = lambda: None) -> list[float]:
    """Milliseconds of each pass, from an idle device until all is done. `before` is not timed."""
    times = []
    for _ in range(passes):
        before()
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def digest(*tensors: Tensor) -> str:
    """Of their bytes."""
    total = hashlib.sha256()
    for tensor in tensors:
        host = tensor.detach().contiguous().cpu()
        total.update(ctypes.string_at(host.data_ptr(), host.numel() * host.element_size()))
    return total.hexdigest()


def set_limit(limit: Optional[int]) -> None:
    """The device limit from now on, in bytes; None for one that does not matter here."""
    import torch_uvm

    torch_uvm.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    megabytes = (total if limit is None else limit) // MIB
    torch.cuda.memory._set_allocator_settings(f"uvm_device_limit_mb:{megabytes}")


# The forward pass of a stack of linear layers


class Stack:
    """Linear layers whose weights are the same in every process."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.layers, self.width = task["layers"], task["width"]
        self.layer_bytes = 2 * self.width * self.width
        self.bytes = self.layers * self.layer_bytes

    def weight(self, layer: int, out: Optional[Tensor] = None) -> Tensor:
        """One layer's weight, made on the device and copied to `out`."""
        generator = torch.Generator("cuda").manual_seed(SEED + layer)
        made = torch.empty(self.width, self.width, device="cuda", dtype=torch.bfloat16)
        made.normal_(0, 1 / math.sqrt(self.width), generator=generator)
        return made if out is None else out.copy_(made)

    def input(self, batch: int) -> Tensor:
        """Seeded."""
        generator = torch.Generator("cuda").manual_seed(SEED)
        return torch.randn(batch, self.width, device="cuda", generator=generator).bfloat16()

    def model(self) -> nn.Sequential:
        """In the memory that holds what is allocated now."""
        layers = []
        for index in range(self.layers):
            layer = nn.Linear(self.width, self.width, bias=False, device="cuda", dtype=torch.bfloat16)
            with torch.no_grad():
                self.weight(index, layer.weight)
            layers.append(layer.requires_grad_(False))
        return nn.Sequential(*layers)


class Copies:
    """The link's limit, by hand: pinned weights, copied two layers ahead into three buffers on a stream of their own.

    `resident` layers, spread evenly, stay on the device.
    """

    def __init__(self, stack: Stack, pinned: list[Tensor], resident: int) -> None:
        self._kept: dict[int, Tensor] = {}
        for index in range(stack.layers):
            if (index + 1) * resident // stack.layers > index * resident // stack.layers:
                self._kept[index] = pinned[index].cuda()
        self._pinned = pinned
        self._copied = [index for index in range(stack.layers) if index not in self._kept]
        count = min(3, len(self._copied))
        self._buffers = [torch.empty_like(pinned[0], device="cuda") for _ in range(count)]
        self._free = [torch.cuda.Event() for _ in range(count)]
        self._full = [torch.cuda.Event() for _ in range(count)]
        self._stream = torch.cuda.Stream()
        self.link = len(self._copied) * stack.layer_bytes

    def __call__(self, x: Tensor) -> Tensor:
        main = torch.cuda.current_stream()
        begun = 0

        def begin(upto: int) -> None:
            nonlocal begun
            while begun < min(upto, len(self._copied)):
                slot = begun % len(self._buffers)
                with torch.cuda.stream(self._stream):
                    self._stream.wait_event(self._free[slot])
                    self._buffers[slot].copy_(self._pinned[self._copied[begun]], non_blocking=True)
                    self._full[slot].record()
                begun += 1

        used = 0
        for index in range(len(self._pinned)):
            begin(used + 3)
            if index in self._kept:
                x = functional.linear(x, self._kept[index])
                continue
            slot = used % len(self._buffers)
            main.wait_event(self._full[slot])
            x = functional.linear(x, self._buffers[slot])
            self._free[slot].record()
            used += 1
        return x


def forward_native(task: dict[str, Any], rows: Rows) -> None:
    """PyTorch's allocator: everything resident, and copies by hand."""
    stack, passes = Stack(task), task["passes"]
    inputs = {batch: stack.input(batch) for batch in task["batches"]}
    with torch.no_grad():
        if "resident" in task["names"]:
            model = stack.model()
            for batch, x in inputs.items():
                measure(lambda: model(x), 2)
                times = measure(lambda: model(x), passes)
                rows.add("forward", "resident", times, batch=batch, digest=digest(model(x)))
            del model
            torch.cuda.empty_cache()
        if "copies" not in task["names"]:
            return
        pinned = []
        for index in range(stack.layers):
            host = torch.empty(stack.width, stack.width, dtype=torch.bfloat16, pin_memory=True)
            pinned.append(stack.weight(index, host))
        for experiment, limit in [("forward", task["limit"])] + [("sweep", limit) for limit in task["sweep"]]:
            left = limit - task["reserve"]
            resident = stack.layers if left >= stack.bytes else max(0, left // stack.layer_bytes - 3)
            copies = Copies(stack, pinned, resident)
            for batch, x in inputs.items():
                measure(lambda: copies(x), 1)
                times = measure(lambda: copies(x), passes)
                rows.add(
                    experiment, "copies", times, batch=batch, limit=limit, link=copies.link, digest=digest(copies(x))
                )
            del copies
            torch.cuda.empty_cache()


def forward_uvm(task: dict[str, Any], rows: Rows) -> None:
    """The allocator of this project: streaming, remote reads, automatic placement, and what CUDA does alone."""
    import torch_uvm

    stack, passes, names = Stack(task), task["passes"], task["names"]
    inputs = {batch: stack.input(batch) for batch in task["batches"]}
    few = max(1, min(2, passes))
    with torch.no_grad():
        set_limit(task["limit"])
        with torch_uvm.placement("cpu_first"):
            model = stack.model()
        if "remote" in names:
            for batch, x in inputs.items():
                measure(lambda: model(x), 1)
                times = measure(lambda: model(x), few)
                rows.add(
                    "forward",
                    "remote",
                    times,
                    batch=batch,
                    limit=task["limit"],
                    link=stack.bytes,
                    digest=digest(model(x)),
                )
        if "prefetch" in names:
            prefetched(stack, model, inputs, task, rows)
        if "stream" in names:
            streamed("forward", "stream", task["limit"], stack, model, inputs, task, rows)
            streamed(
                "forward", "stream across passes", task["limit"], stack, model, inputs, task, rows, across_passes=True
            )
            for limit in task["sweep"]:
                streamed("sweep", "stream", limit, stack, model, inputs, task, rows)
        del model
        if "naive" in names:
            naive(stack, inputs, task, rows)
        if "automatic" not in names:
            return
        for limit in task["sweep"]:
            set_limit(limit)
            model = stack.model()
            host = torch_uvm.memory_info().populated_host
            for batch, x in inputs.items():
                # What moves out for activations is known when so much was freed as an allocation needs to be called
                # old.
                settling = measure(lambda: model(x), 1 if batch == 1 else SETTLING)
                times = measure(lambda: model(x), few)
                row = {"batch": batch, "limit": limit, "link": host, "settling": settling}
                rows.add("sweep", "automatic", times, digest=digest(model(x)), **row)
            del model
            torch_uvm.empty_cache()


def streamed(
    experiment: str,
    name: str,
    limit: int,
    stack: Stack,
    model: nn.Module,
    inputs: dict[int, Tensor],
    task: dict[str, Any],
    rows: Rows,
    **options: Any,
) -> None:
    """torch_uvm.stream with what the limit leaves beside activations."""
    import torch_uvm

    set_limit(limit)
    with torch_uvm.stream(model, device_bytes=limit - task["reserve"], **options) as stream:
        for batch, x in inputs.items():
            measure(lambda: model(x), 2)
            before = stream.statistics()
            times = measure(lambda: model(x), task["passes"])
            after = stream.statistics()
            link = (after.bytes_copied - before.bytes_copied) // task["passes"]
            info = torch_uvm.memory_info()
            rows.add(
                experiment,
                name,
                times,
                batch=batch,
                limit=limit,
                link=link,
                digest=digest(model(x)),
                populated_device=info.populated_device,
                statistics=vars(after),
            )


def prefetched(stack: Stack, model: nn.Sequential, inputs: dict[int, Tensor], task: dict[str, Any], rows: Rows) -> None:
    """torch_uvm.prefetch two layers ahead on a stream of its own."""
    import torch_uvm

    prefetch = getattr(torch_uvm, "prefetch", None)
    if prefetch is None:
        rows.notes.append("prefetch: this torch_uvm has no prefetch()")
        return
    side = torch.cuda.Stream()
    weights = [layer.weight for layer in model]

    def run(x: Tensor) -> Tensor:
        ready = []
        main = torch.cuda.current_stream()
        done: list[torch.cuda.Event] = []
        for index, layer in enumerate(model):
            while len(ready) < min(index + 3, len(weights)):
                with torch.cuda.stream(side):
                    if len(done) >= 2:
                        side.wait_event(done[-2])
                    prefetch(weights[len(ready)], "cuda")
                    ready.append(side.record_event())
            main.wait_event(ready[index])
            x = layer(x)
            done.append(main.record_event())
        return x

    def back() -> None:
        for weight in weights:
            prefetch(weight, "cpu")

    for batch, x in inputs.items():
        try:
            measure(lambda: run(x), 1, back)
            times = measure(lambda: run(x), 2, back)
        except Exception as error:
            rows.notes.append(f"prefetch: {type(error).__name__}: {error}")
            return
        rows.add(
            "forward", "prefetch", times, batch=batch, limit=task["limit"], link=stack.bytes, digest=digest(model(x))
        )
    back()


def naive(stack: Stack, inputs: dict[int, Tensor], task: dict[str, Any], rows: Rows) -> None:
    """cudaMallocManaged and nothing else: weights that lie in host memory, which faults bring over."""
    from workloads.first_touch import Managed

    managed = Managed(torch)
    set_limit(None)
    with managed.memory(stack.bytes) as pointer:
        everything = managed.tensor(pointer, stack.bytes).view(torch.bfloat16)
        layers = list(everything.view(stack.layers, stack.width, stack.width).unbind())
        for index, layer in enumerate(layers):
            stack.weight(index, layer)

        def to_host() -> None:
            # As when a program has just loaded its weights. (That the CPU touches each page would take many seconds.)
            managed.prefetch(pointer, stack.bytes, to_host=True)

        def run(x: Tensor) -> Tensor:
            for layer in layers:
                x = functional.linear(x, layer)
            return x

        for batch, x in inputs.items():
            measure(lambda: run(x), 1)
            times = measure(lambda: run(x), max(1, min(2, task["passes"])), to_host)
            rows.add("forward", "naive", times, batch=batch, link=stack.bytes, digest=digest(run(x)))
        del everything, layers


# A training step


class Training:
    """A transformer under bf16 autocast with AdamW(fused=True), on seeded tokens."""

    def __init__(self, task: dict[str, Any], *, optimizer: bool = True) -> None:
        size = models.Size(*task["size"])
        self.sequences, self.length = task["sequences"], size.longest
        self.vocabulary = size.vocabulary
        self.model = models.build(size, SEED)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.trained = trained
        self.optimizer = torch.optim.AdamW(trained, lr=3e-4, fused=True) if optimizer else None
        self._random = torch.Generator("cuda").manual_seed(SEED)

    def loss(self) -> Tensor:
        """Forward and backward."""
        shape = (self.sequences, self.length + 1)
        tokens = torch.randint(0, self.vocabulary, shape, device="cuda", generator=self._random)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = self.model(tokens[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        return loss.detach()

    def step(self) -> Tensor:
        """One step; the loss, still on the GPU."""
        loss = self.loss()
        assert self.optimizer is not None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


class OnCpu:
    """AdamW on the CPU, as ZeRO-Offload does it: gradients there in pinned memory, weights back."""

    def __init__(self, trained: list[nn.Parameter]) -> None:
        self._trained = trained
        self._weights = [torch.empty_like(p, device="cpu", pin_memory=True).copy_(p.detach()) for p in trained]
        for weight in self._weights:
            weight.grad = torch.empty_like(weight, pin_memory=True)
        self._optimizer = torch.optim.AdamW(self._weights, lr=3e-4, fused=True)

    def step(self) -> None:
        """After a backward pass."""
        for weight, parameter in zip(self._weights, self._trained):
            assert weight.grad is not None and parameter.grad is not None
            weight.grad.copy_(parameter.grad, non_blocking=True)
            parameter.grad = None
        torch.cuda.synchronize()
        self._optimizer.step()
        with torch.no_grad():
            for weight, parameter in zip(self._weights, self._trained):
                parameter.copy_(weight, non_blocking=True)


def steps(
    name: str,
    step: Callable[[], Tensor],
    task: dict[str, Any],
    rows: Rows,
    limit: Optional[int] = None,
    before: Callable[[], Any] = lambda: None,
) -> None:
    """A few deterministic steps, whose losses are compared, then the timed ones. `before` each one is not timed."""
    losses = []
    with models.deterministic():
        for _ in range(task["checked"]):
            before()
            losses.append(step())
    times = measure(step, task["passes"], before)
    rows.add("train", name, times, limit=limit, digest=digest(*losses), values=[float(loss) for loss in losses])


def train_native(task: dict[str, Any], rows: Rows) -> None:
    """All on the device; with the optimizer on the CPU; and with its state in managed memory that faults bring over."""
    if "native" in task["names"]:
        training = Training(task)
        steps("native, all resident", training.step, task, rows)
        del training
        torch.cuda.empty_cache()
    if "cpu_offload" in task["names"]:
        training = Training(task, optimizer=False)
        cpu = OnCpu(training.trained)

        def step() -> Tensor:
            loss = training.loss()
            cpu.step()
            return loss

        steps("native, optimizer on the CPU", step, task, rows)
        del training, cpu, step
        torch.cuda.empty_cache()
    if "naive" in task["names"]:
        naive_training(task, rows)


def naive_training(task: dict[str, Any], rows: Rows) -> None:
    """AdamW's state in cudaMallocManaged memory and nothing else, as the driver leaves it where a device is too small.

    All else stays on the device, and what the state displaces costs nothing here: the driver would do worse.
    """
    from workloads.first_touch import Managed

    managed = Managed(torch)
    training = Training(task)
    optimizer = training.optimizer
    assert optimizer is not None
    size = 2 * sum(parameter.numel() * parameter.element_size() for parameter in training.trained)
    with managed.memory(size) as pointer:
        whole = managed.tensor(pointer, size).zero_()
        begin = 0
        for parameter in training.trained:
            # As AdamW makes it at its first step, capturable or fused.
            state: dict[str, Tensor] = {"step": torch.zeros((), dtype=torch.float32, device="cuda")}
            for key in ("exp_avg", "exp_avg_sq"):
                end = begin + parameter.numel() * parameter.element_size()
                state[key] = whole[begin:end].view(parameter.dtype).view(parameter.shape)
                begin = end
            optimizer.state[parameter] = state
        steps(
            "naive: optimizer's state by faults",
            training.step,
            task,
            rows,
            before=lambda: managed.prefetch(pointer, size, to_host=True),
        )
        del whole, state
        optimizer.state.clear()


def train_uvm(task: dict[str, Any], rows: Rows) -> None:
    """One name of the task, since what a run has placed where would show in the next one."""
    import torch_uvm

    name = task["names"][0]
    some = dict.fromkeys(("automatic", "plain", "offload"), task["some"])
    limit = {"uvm": None, **some}.get(name, task["little"])
    set_limit(limit)
    with torch_uvm.placement("device") if name == "plain" else nullcontext():
        training = Training(task)
    if name in ("offload", "stream"):
        torch_uvm.offload_optimizer(training.optimizer)
    stream = nullcontext()
    if name == "stream":
        stream = torch_uvm.stream(training.model, device_bytes=task["stream_bytes"], gradients="host")
    title = {
        "uvm": "uvm, all resident",
        "automatic": "uvm, automatic",
        "automatic_little": "uvm, automatic",
        "plain": "uvm, model in plain device memory",
        "offload": "uvm, offload_optimizer",
        "stream": "uvm, stream + offload_optimizer",
    }[name]
    with stream:
        steps(title, training.step, task, rows, limit)
        info = torch_uvm.memory_info()
        rows.rows[-1]["populated_device"] = info.populated_device
        rows.rows[-1]["populated_host"] = info.populated_host
        if name == "stream":
            rows.rows[-1]["statistics"] = vars(stream.statistics())


KINDS = {
    "forward_native": forward_native,
    "forward_uvm": forward_uvm,
    "train_native": train_native,
    "train_uvm": train_uvm,
}


@contextmanager
def reported(path: Path, rows: Rows) -> Iterator[None]:
    """Writes what there is, also where a later measurement fails."""
    try:
        yield
    finally:
        path.write_text(json.dumps({"rows": rows.rows, "notes": rows.notes}))


def main() -> None:
    """Does what the module's first lines say."""
    task = json.loads(os.environ["TORCH_UVM_BEYOND"])
    sys.stdin.readline()
    backend = backends.BACKENDS[task["backend"]]
    rows = Rows("TORCH_UVM_SIM_DEVICE" in os.environ)
    with reported(Path(sys.argv[1]), rows):
        try:
            backends.prepare(torch, backend, task["need"])
        except limits.TooMuch as reason:
            rows.notes.append(f"{task['kind']} not run: {reason}")
            return
        torch.backends.cuda.enable_cudnn_sdp(False)
        KINDS[task["kind"]](task, rows)
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
