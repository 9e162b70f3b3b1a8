"""Weights that stream (`torch_uvm.stream`) and optimizer state in host memory (`torch_uvm.offload_optimizer`).

Modules here copy their weights, since copies are what the simulated device does; streams run late there, so a slot that
is overwritten too early, or read too early, shows as wrong bytes.
"""

from __future__ import annotations

import copy
import gc
import inspect
import io
import re
import sys
import tempfile
import threading
import types
import weakref
from typing import Any, Optional

import pytest
import torch
from contents import MIB, same
from on_device import on_device
from simulated import environment, run_python
from torch import nn
from torch.utils.checkpoint import checkpoint
from under_test import from_source, torch_uvm

from torch_uvm._order import BACKWARD, FORWARD, START, Order
from torch_uvm._pinned import pinned_bytes
from torch_uvm._plan import Group, Groups, choose, group

SIDE = 512
UNIT = SIDE * SIDE * 4


def contents(seed: int) -> torch.Tensor:
    """A weight of one MiB, different for each seed."""
    return torch.arange(SIDE * SIDE, dtype=torch.float32).view(SIDE, SIDE) + seed * 0.5


def check(found: torch.Tensor, seed: int, what: object = "") -> None:
    """Fails unless a tensor is `contents(seed)`."""
    expected = contents(seed)
    host = found.detach().cpu()
    if not torch.equal(host, expected):
        raise AssertionError(
            f"{what}: expected weight {seed}, found {host.flatten()[:3]} where {expected.flatten()[:3]}"
        )


class Through(torch.autograd.Function):
    """Saves a transposed view of a weight, and shows what the backward pass gets for it."""

    seen: list[torch.Tensor] = []

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight.t())
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (saved,) = ctx.saved_tensors
        Through.seen.append(copied(saved.t()))
        return grad.clone(), copied(saved.t())


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, made by the copy engine."""
    with torch.no_grad():
        return torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor)


class Layer(nn.Module):
    """Copies its weight into `read`, and passes its input through."""

    def __init__(self, seed: int, device: str = "cpu") -> None:
        super().__init__()
        self.weight = nn.Parameter(contents(seed).to(device))
        self.read: Optional[torch.Tensor] = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.read = copied(self.weight)
        return Through.apply(x, self.weight)


def stack(count: int, device: str = "cpu") -> nn.Sequential:
    """Layers with the weights 0, 1, …"""
    return nn.Sequential(*(Layer(seed, device) for seed in range(count)))


def ones(grad: bool = False) -> torch.Tensor:
    """A small input."""
    return torch.ones(4, device="cuda", requires_grad=grad)


def check_read(model: nn.Module, seeds: Optional[list[int]] = None) -> None:
    """What each layer's last forward has copied."""
    for index, layer in enumerate(model):
        check(layer.read, seeds[index] if seeds else index, f"layer {index}")


def copies_first(stream: Any) -> None:
    """Runs the copies that were enqueued, and of all else only what they wait for: one that waits for too little shows."""
    stream._slots.copies.synchronize()


# Pure decisions


def test_the_order_is_foretold() -> None:
    """Before the first pass as the model holds it, later as it was."""
    order = Order(5)
    order.note(START)
    same(order.upcoming(2, False), [0, 1])
    for unit in (0, 2, 4, 1):
        order.note((unit, FORWARD))
    for unit in (1, 4, 2, 0):
        order.note((unit, BACKWARD))
    order.note(START)
    same(order.upcoming(3, False), [0, 2, 4])
    order.note((0, FORWARD))
    same(order.upcoming(2, False), [2, 4])
    for unit in (2, 4, 1):
        order.note((unit, FORWARD))
    same(order.upcoming(2, False), [4, 2], "the backward pass")
    for unit in (1, 4, 2):
        order.note((unit, BACKWARD))
    same(order.upcoming(3, False), [0], "the end of the pass")
    same(order.upcoming(3, True), [0, 4, 1], "beyond it")
    assert not order.note((2, BACKWARD)), "the same once more"


def test_alternating_branches_are_foretold() -> None:
    """What follows depends on what was before."""
    order = Order(3)
    for _ in range(2):
        for unit in (0, 1, 0, 2):
            order.note((unit, FORWARD))
    same(order.upcoming(1, True), [0])
    order.note((0, FORWARD))
    same(order.upcoming(1, True), [1])
    order.note((1, FORWARD))
    order.note((0, FORWARD))
    same(order.upcoming(1, True), [2])


def groups_of(*sizes: int) -> Groups:
    """Units of so many MiB."""
    units = []
    for size in sizes:
        unit = Group("unit", [], [])
        unit.bytes = size * MIB
        units.append(unit)
    return Groups(units=units)


def test_what_stays() -> None:
    """Spread evenly; all of it, if it fits; nothing, if slots do not; large units rather than large slots."""
    choice = choose(groups_of(*[1] * 9), (3 + 3) * MIB, ahead=2)
    assert choice is not None
    same(sorted(choice.resident), [2, 5, 8])
    same((choice.slots, choice.slot_bytes), (3, MIB))
    whole = choose(groups_of(*[1] * 9), 9 * MIB, ahead=2)
    assert whole is not None
    same((len(whole.resident), whole.slots), (9, 0))
    same(choose(groups_of(*[1] * 9), 3 * MIB - 1, ahead=2), None)
    large = choose(groups_of(1, 1, 1, 1, 1, 8), 11 * MIB, ahead=2)
    assert large is not None
    same((sorted(large.resident), large.slot_bytes), ([5], MIB))


def test_units_of_a_model() -> None:
    """Blocks, and what stands alone; tables by rows and small ones apart; a tied table is the head's."""

    class Model(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.table = nn.Embedding(SIDE, SIDE)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(SIDE, SIDE), nn.LayerNorm(SIDE)) for _ in range(3))
            self.norm = nn.LayerNorm(SIDE)
            self.head = nn.Linear(SIDE, SIDE, bias=False)
            self.positions = nn.Parameter(torch.zeros(SIDE, SIDE))
            if tied:
                self.head.weight = self.table.weight

    for tied in (False, True):
        groups = group(Model(tied))
        names = [unit.name for unit in groups.units]
        expected = [f"blocks.{index}" for index in range(3)]
        same(names, [*expected, "head"], f"tied {tied}")
        same([other.name for other in groups.others], ["(model)"] if tied else ["(model)", "table"])
        assert any(small.name == "norm" for small in groups.small)
        total = sum(p.numel() for p in Model(tied).parameters())
        everything = [p for g in (*groups.units, *groups.small, *groups.others) for p in g.parameters]
        same(sum(p.numel() for p in everything), total)
        same(len(everything), len(set(everything)))


# Forward


@on_device(uvm_only=True)
@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference_mode"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_forward(mode: str, device: str) -> None:
    """Each layer reads its own weight in each pass; each streamed weight is copied once a pass, most ahead of its use."""
    model = stack(10, device)
    context = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]
    with torch_uvm.stream(model, device_bytes=5 * UNIT) as stream:
        for _ in range(4):
            with context():
                model(ones())
            copies_first(stream)
            check_read(model)
        found = stream.statistics()
        same((found.units, found.streamed_units, found.slots), (10, 8, 3))
        same((found.resident_bytes, found.streamed_bytes, found.slot_bytes), (2 * UNIT, 8 * UNIT, UNIT))
        same((found.fetches, found.bytes_copied), (4 * 8, 4 * 8 * UNIT))
        same((found.misses, found.hits), (4, 4 * 7))
        same((found.replaced_slots, found.written_back), (0, 0))
    for index, layer in enumerate(model):
        check(layer.weight, index)
        assert "forward" not in layer.__dict__


@on_device(uvm_only=True)
def test_across_passes() -> None:
    """The first units of the next pass are copied at the end of one; not where gradients were recorded."""
    model = stack(8)
    with torch_uvm.stream(model, device_bytes=3 * UNIT, across_passes=True) as stream:
        for _ in range(4):
            with torch.no_grad():
                model(ones())
            check_read(model)
        same(stream.statistics().misses, 2, "the order is known after the second pass")
        with torch.no_grad():
            for seed, layer in enumerate(model, 20):
                layer.weight.copy_(contents(seed))
            model(ones())
        check_read(model, list(range(20, 28)))
    few = stack(4)  # most of which are still in slots when the next pass begins
    with torch_uvm.stream(few, device_bytes=3 * UNIT, across_passes=True):
        for first in (40, 50, 60):
            few(ones(True)).backward(ones())
            for seed, layer in enumerate(few, first):
                layer.weight.data.copy_(contents(seed))  # as a fused optimizer: its version stays
            few(ones())
            check_read(few, list(range(first, first + 4)))


@on_device(uvm_only=True)
def test_the_memory() -> None:
    """Slots and what stays are on the device, the rest in host memory; all of it comes back."""
    model = stack(16, "cuda")
    before = torch_uvm.memory_info()
    stream = torch_uvm.stream(model, device_bytes=6 * UNIT)
    attached = torch_uvm.memory_info()
    assert pinned_bytes() >= 13 * UNIT
    assert before.host_available - attached.host_available >= 13 * UNIT
    assert before.allocated - attached.allocated >= 10 * UNIT - 16 * 512
    stream.remove()
    gc.collect()
    after = torch_uvm.memory_info()
    same(pinned_bytes(), 0)
    same(after.host_available, before.host_available)
    same(after.allocated, before.allocated)


@on_device("use_uvm:True,uvm_device_limit_mb:32", uvm_only=True)
def test_what_is_left_under_the_limit() -> None:
    """`device_bytes=None` takes three quarters of it, whatever lay on the device before."""
    model = stack(40, "cuda")
    with torch_uvm.stream(model) as stream:
        found = stream.statistics()
        device = torch_uvm.memory_info().populated_device
        assert device <= 32 * MIB, device
        assert 4 * MIB <= found.resident_bytes + found.slots * found.slot_bytes <= 24 * MIB, found
        model(ones())
        check_read(model)


@on_device(uvm_only=True)
def test_another_order() -> None:
    """Is right at once, and foretold when it was seen."""
    layers = stack(9)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)
            self.order = list(range(9))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for index in self.order:
                x = self.layers[index](x)
            return x

    model = Model()
    with torch_uvm.stream(model, device_bytes=3 * UNIT) as stream:
        for order in ([0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 3, 5, 0], [4, 4, 4, 2, 7, 7, 1]):
            model.order = order
            for _ in range(3):
                misses = stream.statistics().misses
                for layer in layers:
                    layer.read = None
                model(ones())
                for index in order:
                    check(layers[index].read, index, order)
            same(stream.statistics().misses - misses, 1, f"order {order}, third time")


@on_device(uvm_only=True)
def test_without_the_models_own_forward() -> None:
    """Units that are called one by one: a unit that comes again begins a pass."""
    model = stack(6)
    with torch_uvm.stream(model, device_bytes=3 * UNIT):
        for seed in (0, 10, 20):
            for index, layer in enumerate(model):
                layer.weight.data.copy_(contents(seed + index))
            for layer in model:
                layer(ones())
            check_read(model, [seed + index for index in range(6)])


# Slots


@on_device(uvm_only=True)
def test_a_view_that_is_kept() -> None:
    """Its slot is left to it, and another one made."""
    model = stack(8)
    kept = []
    forward = Layer.forward

    def keeping(self: Layer, x: torch.Tensor) -> torch.Tensor:
        kept.append(self.weight.detach())
        return forward(self, x)

    with torch_uvm.stream(model, device_bytes=3 * UNIT) as stream, torch.no_grad():
        Layer.forward = keeping  # type: ignore[method-assign]
        stream.remove()
        stream = torch_uvm.stream(model, device_bytes=3 * UNIT)
        model(ones())
        check_read(model)
        same(len(kept), 8)
        for index, view in enumerate(kept):
            check(view, index, "kept")
        assert stream.statistics().replaced_slots >= 5
        kept.clear()
        Layer.forward = forward  # type: ignore[method-assign]
        for _ in range(2):
            model(ones())
            check_read(model)
        same(stream.statistics().slots, 3)
        stream.remove()


@on_device(uvm_only=True)
def test_a_view_that_is_kept_for_a_while() -> None:
    """Its last use counts, not the end of the forward that it was made in."""
    kept: list[torch.Tensor] = []

    class Keeping(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept.append(self.weight.detach())
            return x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Keeping(seed) for seed in range(8))

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            late = []
            for layer in self.layers:
                layer(x)
                if len(kept) > 1:
                    late.append(copied(kept.pop(0)))
            return late

    model = Model()
    with torch_uvm.stream(model, device_bytes=3 * UNIT) as stream, torch.no_grad():
        for _ in range(3):
            late = model(ones())
            copies_first(stream)
            same(len(late), 7)
            for index, read in enumerate(late):
                check(read, index)
            kept.clear()


@on_device(uvm_only=True)
def test_other_streams() -> None:
    """A forward on a stream of the program's own, then on another: slots wait for both."""
    model = stack(8)
    streams = [torch.cuda.Stream() for _ in range(3)]
    with torch_uvm.stream(model, device_bytes=3 * UNIT), torch.no_grad():
        for number in range(6):
            side = streams[number % 3]
            with torch.cuda.stream(side):
                model(ones())
            reads = [layer.read for layer in model]
            with torch.cuda.stream(streams[(number + 1) % 3]):
                model(ones())
            torch.cuda.synchronize()
            for index, read in enumerate(reads):
                check(read, index, f"round {number}")
            check_read(model)


@on_device(uvm_only=True)
def test_threads() -> None:
    """Two threads run the same model at the same time."""
    model = stack(8)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
                for _ in range(5):
                    x = ones()
                    for index, layer in enumerate(model):
                        layer(x)
                        check(layer.read, index)
        except BaseException as error:
            failures.append(error)

    with torch_uvm.stream(model, device_bytes=3 * UNIT) as stream:
        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        assert stream.statistics().slots <= 4
        with torch.no_grad():
            model(ones())
        check_read(model)


@on_device(uvm_only=True)
@pytest.mark.parametrize("kind", ["ValueError", "KeyboardInterrupt"])
def test_a_forward_that_fails(kind: str) -> None:
    """Leaves weights in host memory and hooks as they were."""
    model = stack(6)
    error = {"ValueError": ValueError, "KeyboardInterrupt": KeyboardInterrupt}[kind]
    with torch_uvm.stream(model, device_bytes=3 * UNIT):
        addresses = [layer.weight.data_ptr() for layer in model]
        fails = True

        def failing(self: Layer, x: torch.Tensor) -> torch.Tensor:
            if fails and self is model[3]:
                raise error("on purpose")
            return original(self, x)

        original, Layer.forward = Layer.forward, failing  # type: ignore[method-assign]
        with pytest.raises(error, match="on purpose"):
            model(ones(True))
        same([layer.weight.data_ptr() for layer in model], addresses)
        with pytest.raises(RuntimeError):  # none are left
            torch._C._autograd._pop_saved_tensors_default_hooks()
        fails = False
        model(ones(True))
        check_read(model)


# Changes


@on_device(uvm_only=True)
def test_state_dict() -> None:
    """Saved and loaded while streaming, into the model and into another one."""
    model = stack(8)
    with torch_uvm.stream(model, device_bytes=4 * UNIT):
        model(ones())
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, map_location="cpu")
        for index in range(8):
            check(loaded[f"{index}.weight"], index)
        model.load_state_dict({f"{index}.weight": contents(30 + index) for index in range(8)})
        model(ones())
        check_read(model, list(range(30, 38)))


@on_device(uvm_only=True)
@pytest.mark.parametrize("trained", [False, True])
def test_changes_between_passes(trained: bool) -> None:
    """Those that PyTorch counts and those that it does not, as fused optimizers make them."""
    model = stack(8)
    with torch_uvm.stream(model, device_bytes=3 * UNIT) as stream:
        for seed in (10, 30, 50):
            with torch.set_grad_enabled(trained):
                y = model(ones(trained))
            if trained:
                y.backward(ones())
            made = [contents(seed + index).cuda() for index in range(8)]
            for layer, weight in zip(model, made):
                layer.weight.data.copy_(weight)  # later than this program goes on
            model(ones(True))
            copies_first(stream)
            check_read(model, [seed + index for index in range(8)])


@on_device(uvm_only=True)
@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_changes_within_a_pass(ahead: int) -> None:
    """Of a unit that is on its way already: the next one, one later."""
    layers = stack(6)
    made = [contents(60 + index).cuda() for index in range(6)]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for index, layer in enumerate(self.layers):
                if index + ahead < len(self.layers):
                    with torch.no_grad():
                        self.layers[index + ahead].weight.copy_(made[index + ahead])
                x = layer(x)
            return x

    model = Model()
    with torch_uvm.stream(model, device_bytes=3 * UNIT) as stream:
        model(ones())
        copies_first(stream)
        check_read(layers, [index if index < ahead else 60 + index for index in range(6)])
        assert ahead == 2 or stream.statistics().stale > 0


@on_device(uvm_only=True)
def test_a_forward_that_changes_its_weight() -> None:
    """In place: it is copied back. By assignment: it stays where the forward has put it."""

    class Changing(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.weight.copy_(contents(int(x)))
            return x

    class Assigning(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.read = copied(self.weight)
            if int(x) == 7:
                self.weight.data = contents(8).cuda()
            return x

    model = nn.Sequential(Changing(0), Changing(1), Assigning(2), Layer(3), Layer(4))
    x = torch.tensor(7)
    with torch_uvm.stream(model, device_bytes=3 * UNIT) as stream, torch.no_grad():
        model(x)
        for index, seed in enumerate((7, 7, 8, 3, 4)):
            check(model[index].weight, seed)
        same(stream.statistics().written_back, 2)
        model(torch.tensor(9))
        for index, seed in enumerate((9, 9, 8, 3, 4)):
            check(model[index].weight, seed)
        check(model[2].read, 8)


@on_device(uvm_only=True)
def test_a_model_that_is_moved() -> None:
    """Weights that the program has put elsewhere are used there."""
    model = stack(6)
    with torch_uvm.stream(model, device_bytes=3 * UNIT) as stream, torch.no_grad():
        model(ones())
        model[2].weight.data = contents(70).cuda()
        model(ones())
        check_read(model, [0, 1, 70, 3, 4, 5])
        same(model[2].weight.shape, (SIDE, SIDE))
        model.cpu()
        fetches = stream.statistics().fetches
        assert fetches
        model(torch.ones(4))
        check_read(model, [0, 1, 70, 3, 4, 5])
    assert not model[0].weight.is_cuda


# Backward


@on_device(uvm_only=True)
@pytest.mark.parametrize("gradients", ["device", "host"])
def test_backward(gradients: str) -> None:
    """It gets each weight again, from slots that held others meanwhile; gradients go where they shall."""
    model = stack(10)
    with torch_uvm.stream(model, device_bytes=5 * UNIT, gradients=gradients) as stream:
        for number in range(3):
            Through.seen.clear()
            before = pinned_bytes()
            model(ones(True)).backward(ones())
            for index, seen in enumerate(reversed(Through.seen)):
                check(seen, index, f"pass {number}")
            for index, layer in enumerate(model):
                check(layer.weight.grad, index, "gradient")
            if number == 0:
                moved = pinned_bytes() - before
                assert moved >= 8 * UNIT if gradients == "host" else moved == 0, moved
            model.zero_grad()
        found = stream.statistics()
        same((found.misses, found.replaced_slots), (3, 0))
        # What the forward pass used last is still there when the backward pass begins.
        same(found.fetches, 3 * (8 + 8 - 3))


@on_device(uvm_only=True)
def test_memory_of_gradients_is_used_again() -> None:
    """Step after step, where nobody holds the last ones: pinning it takes longer than a step."""
    model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(5)]).cuda()
    places = []
    with torch_uvm.stream(model, ahead=1, device_bytes=9 * MIB, gradients="host") as stream:
        same(stream.statistics().streamed_units, 5)
        for _ in range(3):
            model(torch.ones(2, 1024, device="cuda")).backward(torch.ones(2, 1024, device="cuda"))
            places.append([parameter.grad.data_ptr() for parameter in model.parameters()])
            model.zero_grad()
    same(places[1:], [places[0]] * 2)


@on_device(uvm_only=True)
def test_gradients_add_up() -> None:
    """In host memory too, and what somebody still holds is not overwritten."""
    model = stack(5)
    with torch_uvm.stream(model, device_bytes=3 * UNIT, gradients="host"):
        model(ones(True)).backward(ones())
        held = [layer.weight.grad for layer in model]
        first = [grad.data_ptr() for grad in held]
        model(ones(True)).backward(ones())  # added in place, by a kernel
        same([layer.weight.grad.data_ptr() for layer in model], first)
        model.zero_grad()
        for layer in model:
            layer.weight.data.copy_(contents(90))
        model(ones(True)).backward(ones())
        for index, grad in enumerate(held):
            check(grad, index, "held")
        for layer in model:
            check(layer.weight.grad, 90)


@on_device(uvm_only=True)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    """Around units: their forwards run again in the backward pass."""
    model = stack(8)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            return x

    whole = Model()
    with torch_uvm.stream(whole, device_bytes=3 * UNIT) as stream:
        for _ in range(3):
            Through.seen.clear()
            misses = stream.statistics().misses
            for layer in model:
                layer.weight.grad = None
            whole(ones(True)).backward(ones())
            check_read(model)
            for index, seen in enumerate(reversed(Through.seen)):
                check(seen, index)
            for index, layer in enumerate(model):
                check(layer.weight.grad, index)
        same(stream.statistics().misses - misses, 1)


@on_device(uvm_only=True)
def test_hooks_around_are_asked() -> None:
    """Saved-tensor hooks of the program see everything but the weights."""
    model = stack(4)
    seen: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        seen.append(tensor)
        return "packed", tensor

    def unpack(saved: tuple[str, torch.Tensor]) -> torch.Tensor:
        same(saved[0], "packed")
        return saved[1]

    class Squares(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) ** 2

    model = nn.Sequential(*model, Squares(5))
    with torch_uvm.stream(model, device_bytes=3 * UNIT):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            y = model(ones(True))
        same([tuple(tensor.shape) for tensor in seen], [(4,)])
        y.backward(ones())
        check(model[4].weight.grad, 5)


@on_device(uvm_only=True)
def test_changes_before_the_backward_pass() -> None:
    """PyTorch's error for weights and for anything else that was changed in place."""

    class Product(Layer):
        between: Optional[torch.Tensor] = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.between = super().forward(x)
            return self.between.exp() * self.between

    for changed in ("weight", "activation"):
        model = nn.Sequential(*stack(4), Product(5))
        with torch_uvm.stream(model, device_bytes=3 * UNIT):
            y = model(ones(True))
            with torch.no_grad():
                if changed == "weight":
                    model[1].weight.copy_(contents(80))
                else:
                    model[4].between.add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.backward(ones())


@on_device(uvm_only=True)
def test_autocast_keeps_no_copies() -> None:
    """Neither its cache nor the graph holds weights in another type: they are made again."""
    model = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(12)))
    with torch_uvm.stream(model, device_bytes=3 * UNIT):
        x = torch.ones(1, SIDE, device="cuda", requires_grad=True)
        model(x).sum().backward()  # what libraries allocate once
        for _ in range(2):
            before = torch.cuda.memory_allocated()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                y = model(x)
                held = torch.cuda.memory_allocated() - before
            assert held < UNIT, f"{held} bytes, of {12 * UNIT // 2}"
            y.sum().backward()
            same(model[0].weight.grad.dtype, torch.float32)
            del y
            model.zero_grad()


@on_device(uvm_only=True)
def test_graphs_outlive_the_stream() -> None:
    """A backward pass after remove() reads the weights where they are."""
    model = stack(6)
    stream = torch_uvm.stream(model, device_bytes=3 * UNIT)
    y = model(ones(True))
    stream.remove()
    stream.remove()
    Through.seen.clear()
    y.backward(ones())
    for index, seen in enumerate(reversed(Through.seen)):
        check(seen, index)


# Models


@on_device(uvm_only=True)
def test_tied_weights() -> None:
    """Belong to one unit, which both uses fetch."""
    model = nn.Sequential(*stack(6))
    model[4].weight = model[1].weight
    with torch_uvm.stream(model, device_bytes=3 * UNIT) as stream:
        same(stream.statistics().streamed_bytes, 5 * UNIT)
        for _ in range(2):
            model(ones(True)).backward(ones())
            check_read(model, [0, 1, 2, 3, 1, 5])
        assert model[4].weight is model[1].weight
    assert model[4].weight is model[1].weight


def tied_through_data(device: str) -> nn.Module:
    """Two weights of different layers in the same memory, without being one Parameter."""
    model = stack(6, device)
    model[4].weight.data = model[1].weight.data
    return model


def overlapping(device: str) -> nn.Module:
    """Pairs of weights that share half of their rows."""
    model = stack(6, device)
    for above, below in ((2, 3), (0, 5)):
        both = torch.cat([contents(above), contents(below)[SIDE // 2 :]]).to(device)
        model[above].weight.data, model[below].weight.data = both[:SIDE], both[SIDE // 2 :]
    return model


def a_view_as_buffer(device: str) -> nn.Module:
    """A buffer that is a view of the weight of another layer; another one that is part of it, in another type."""
    model = stack(6, device)
    model[3].register_buffer("shared", model[1].weight.detach()[:])
    model[0].register_buffer("part", model[1].weight.data[7:9].view(torch.int32))
    return model


def a_flat_buffer(device: str) -> nn.Module:
    """All weights are views of one buffer of the model."""
    model = views_of_a_flat_tensor(device)
    model.register_buffer("flat", torch.empty(0, device=device).set_(model[0].weight.untyped_storage()))
    return model


def views_of_a_flat_tensor(device: str) -> nn.Module:
    """As `torch.nn.utils.vector_to_parameters` leaves them: one storage, in which no two weights share a byte."""
    model = stack(6, device)
    flat = torch.cat([contents(seed).flatten() for seed in range(6)]).to(device)
    for layer, part in zip(model, flat.split(SIDE * SIDE)):
        layer.weight.data = part.view(SIDE, SIDE)
    return model


def small_and_shared(device: str) -> nn.Module:
    """Weights that are too small to stream, and buffers, of which some share memory."""
    model = stack(5, device)
    model.extend(nn.LayerNorm(4).to(device) for _ in range(2))
    model[6].weight.data = model[5].weight.data
    model[0].register_buffer("first", torch.arange(4.0).to(device))
    model[1].register_buffer("second", model[0].first[1:3])
    model[2].register_buffer("third", model[0].first)
    return model


SHARING = {
    make.__name__: make
    for make in (
        tied_through_data,
        overlapping,
        a_view_as_buffer,
        a_flat_buffer,
        views_of_a_flat_tensor,
        small_and_shared,
    )
}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights and buffers, whatever is found twice too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers(remove_duplicate=False))}


def write(model: nn.Module, name: str, seed: int) -> None:
    """Writes a weight or buffer in place."""
    tensor = state(model)[name]
    values = contents(seed).flatten().to(tensor.dtype)
    with torch.no_grad():
        tensor.copy_(values[torch.arange(tensor.numel()) % values.numel()].view(tensor.shape))


def check_alike(model: nn.Module, reference: nn.Module, what: str) -> None:
    """Fails unless all weights and buffers hold what those of a model on the CPU hold."""
    found = state(model)
    for name, expected in state(reference).items():
        assert torch.equal(found[name].detach().cpu(), expected.detach()), f"{what}: {name}"


@on_device(uvm_only=True)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", sorted(SHARING))
def test_weights_that_share_memory(kind: str, device: str) -> None:
    """Share it while they stream and after that: what is written through one is read through the others."""
    reference, model = SHARING[kind]("cpu"), SHARING[kind](device)
    layers = [layer for layer in model if isinstance(layer, Layer)]
    before = pinned_bytes()
    stream = torch_uvm.stream(model, ahead=1, device_bytes=4 * UNIT + 4096)
    same(stream.statistics().streamed_units > 0, kind != "a_flat_buffer")
    check_alike(model, reference, "moved")
    seed = 100
    for when in ("while streaming", "afterwards"):
        for name in state(reference):
            seed += 1
            for changed in (reference, model):
                write(changed, name, seed)
            check_alike(model, reference, f"{when}, {name} was written")
            y = ones(name.endswith("weight"))
            for layer in layers:
                y = layer(y)
            for index, layer in enumerate(layers):
                assert torch.equal(layer.read.cpu(), reference[index].weight.detach()), f"{when}, {name}: {index}"
        stream.remove()
    del stream
    same(pinned_bytes(), before)


@on_device(uvm_only=True)
def test_a_forward_that_changes_a_shared_weight() -> None:
    """The other name sees it, within the forward and afterwards."""

    class Changing(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.weight.copy_(contents(50))
            self.read = copied(self.other)
            return x

    model = nn.Sequential(*stack(5), Changing(5))
    model[5].register_buffer("other", model[5].weight.detach()[:])
    model[1].weight.data = model[5].weight.data
    with torch_uvm.stream(model, device_bytes=3 * UNIT):
        model(ones())
        check_read(model, [0, 5, 2, 3, 4, 50])
        check(model[5].other, 50)
        model(ones())
        check_read(model, [0, 50, 2, 3, 4, 50])
    check(model[1].weight, 50)
    check(model[5].other, 50)


@on_device(uvm_only=True)
def test_memory_that_is_shared_outside() -> None:
    """On the GPU such weights stay where they are, with a warning that names them; on the CPU they are refused."""
    model = views_of_a_flat_tensor("cuda")
    model.extend([Layer(6, "cuda"), Layer(7, "cuda"), Layer(8, "cuda")])
    flat = torch.empty(0, device="cuda").set_(model[0].weight.untyped_storage())  # as an optimizer keeps it
    with pytest.warns(UserWarning, match="0.weight, 1.weight, 2.weight, 3.weight and 2 more .*outside the model"):
        stream = torch_uvm.stream(model, device_bytes=2 * UNIT, ahead=1)
    same(stream.statistics().resident_bytes, 6 * UNIT)
    for seed in (20, 30):
        for index, part in enumerate(flat.split(SIDE * SIDE)):
            part.view(SIDE, SIDE).copy_(contents(seed + index))
        model(ones(True)).backward(ones())
        check_read(model, [*range(seed, seed + 6), 6, 7, 8])
        write(model, "1.weight", seed + 50)
        check(flat.split(SIDE * SIDE)[1].view(SIDE, SIDE), seed + 50)
        stream.remove()
    model = stack(4)
    other = model[2].weight.detach()[3:]
    with pytest.raises(ValueError, match="2.weight.*outside the model"):
        torch_uvm.stream(model, device_bytes=3 * UNIT)
    same({parameter.device.type for parameter in model.parameters()}, {"cpu"})
    del other
    with torch_uvm.stream(model, device_bytes=3 * UNIT):
        model(ones())
        check_read(model)


@on_device(uvm_only=True)
def test_small_other_and_strange_parameters() -> None:
    """Small ones stay, tables are read where they lie or stay, layouts are kept, buffers come along."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(contents(1).t())
            self.b = nn.Parameter(contents(2).view(SIDE, 64, 2, 4).to(memory_format=torch.channels_last))
            self.c = nn.Parameter(torch.arange(5, dtype=torch.float64))
            self.e = nn.Parameter(torch.empty(0))
            self.register_buffer("d", torch.arange(7))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            same((self.a.stride(), self.b.stride()), ((1, SIDE), (512, 1, 256, 64)))
            self.read = [copied(self.a.t()), copied(self.b.permute(0, 2, 3, 1)), copied(self.c), self.d]
            return x

    table = nn.Embedding(SIDE, SIDE)
    blocks = nn.ModuleList(Block() for _ in range(4))
    model = nn.ModuleDict({"table": table, "blocks": blocks, "norm": nn.LayerNorm(8)})
    with torch_uvm.stream(model, device_bytes=7 * UNIT) as stream, torch.no_grad():
        found = stream.statistics()
        same((found.units, found.remote_bytes), (4, UNIT))
        for _ in range(2):
            for block in blocks:
                block(ones())
                a, b, c, d = block.read
                check(a, 1)
                check(b.cpu().permute(0, 3, 1, 2).contiguous().view(SIDE, SIDE), 2)
                same(c.tolist(), [0.0, 1.0, 2.0, 3.0, 4.0])
                assert d.is_cuda
    assert all(parameter.is_cuda for parameter in model.parameters())


@on_device(uvm_only=True)
def test_copies_and_pickles() -> None:
    """Of a model that streams do not stream."""
    module = types.ModuleType(Layer.__module__)  # by whose name a pickle finds the class
    vars(module).update(globals())
    sys.modules[Layer.__module__] = module
    model = stack(5)
    with torch_uvm.stream(model, device_bytes=3 * UNIT) as stream:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        fetches = stream.statistics().fetches
        for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            other[2].weight.data.copy_(contents(40))
            other(ones())
            check_read(other, [0, 1, 40, 3, 4])
        same(stream.statistics().fetches, fetches)
        model(ones())
        check_read(model)


@on_device(uvm_only=True, timeout=120)
@pytest.mark.parametrize("how", ["blocks", "in place", "whole"])
def test_compiled(how: str) -> None:
    """Blocks that torch.compile has wrapped, and models around units."""

    class Own(nn.Linear):  # torch.compile does not begin at the forward of one of PyTorch's modules
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight) * 2

    model = nn.Sequential(*(Own(SIDE, SIDE, bias=False) for _ in range(5)))
    counted: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        counted.append(len(graph.graph.nodes))
        return graph.forward

    run: Any = model
    if how == "blocks":
        model = run = nn.Sequential(*(torch.compile(layer, backend=backend) for layer in model))
    elif how == "in place":
        for layer in model:
            layer.compile(backend=backend)
    stream = torch_uvm.stream(model, device_bytes=3 * UNIT)
    if how == "whole":
        run = torch.compile(model, backend=backend)
    for _ in range(3):
        run(torch.ones(4, SIDE, device="cuda", requires_grad=True)).sum().backward()
    found = stream.statistics()
    same(found.streamed_units, 5)
    assert found.fetches >= 3 * (5 + 2), found
    same(len(counted) > 0, True, "something was compiled")
    assert max(counted) <= 6, f"{counted} nodes: our own functions were compiled too"
    stream.remove()


class Linear(nn.Module):
    """A unit of two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(contents(1))
        self.bias = nn.Parameter(torch.ones(SIDE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def linears() -> nn.Sequential:
    """Five of them."""
    return nn.Sequential(*(Linear() for _ in range(5)))


def a_row() -> torch.Tensor:
    """An input for them."""
    return torch.ones(2, SIDE, device="cuda")


def a_square() -> torch.Tensor:
    """Another one."""
    return torch.empty(SIDE, SIDE, device="cuda")


@on_device(uvm_only=True)
def test_each_weight_has_its_own_storage() -> None:
    """What looks for weights that share memory, such as safetensors' save_model, finds what it found before."""
    model = linears()
    with torch_uvm.stream(model, device_bytes=4 * UNIT) as stream:
        assert stream.statistics().streamed_units
        for name, parameter in model.named_parameters():
            storage = parameter.untyped_storage()
            same((storage.data_ptr(), storage.nbytes()), (parameter.data_ptr(), parameter.numel() * 4), name)
        try:
            import safetensors.torch
        except ImportError:
            return
        with tempfile.TemporaryDirectory() as folder:
            safetensors.torch.save_model(model, f"{folder}/model.safetensors")
            loaded = safetensors.torch.load_file(f"{folder}/model.safetensors")
        for name, parameter in model.named_parameters():
            assert torch.equal(loaded[name], parameter.detach().cpu()), name


def functional(model: nn.Module) -> Any:
    """The model as a function of its parameters, as `torch.func` wants it."""
    parameters = dict(model.named_parameters())
    return parameters, lambda given: torch.func.functional_call(model, given, (a_row(),)).sum()


TRANSFORMS = {
    "grad of parameters": lambda model: len(torch.func.grad(functional(model)[1])(functional(model)[0])),
    "grad of inputs": lambda model: torch.func.grad(lambda x: model(x).sum())(a_row()).shape,
    "jvp": lambda model: torch.func.jvp(model, (a_row(),), (a_row(),))[1].shape,
    "vmap": lambda model: torch.func.vmap(model)(a_row()).shape,
    "hessian": lambda model: torch.func.hessian(lambda x: model(x).sum())(a_row()).shape,
    "no saved-tensor hooks": lambda model: without_hooks(model),
}


def without_hooks(model: nn.Module) -> torch.Size:
    """A forward where PyTorch forbids saved-tensor hooks."""
    with torch.autograd.graph.disable_saved_tensors_hooks("none"):
        return model(a_row()).shape


@on_device(uvm_only=True)
@pytest.mark.parametrize("what", sorted(TRANSFORMS))
def test_transforms(what: str) -> None:
    """torch.func's read the weights where they lie, and write no slot."""
    model = linears()
    expected = TRANSFORMS[what](model.cuda())
    with torch_uvm.stream(model, device_bytes=4 * UNIT) as stream:
        same(TRANSFORMS[what](model), expected)
        same(stream.statistics().fetches, 0)
        model(a_row())
        assert stream.statistics().fetches > 0


def exported(model: nn.Module) -> Any:
    """As torch.export does it by default since 2.7."""
    return torch.export.export(model, (a_square(),), strict=False).module()


def made_fx(model: nn.Module) -> Any:
    """A graph of ATen's operators."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(model)(a_square())


TRACERS = {
    "trace": lambda model: torch.jit.trace(model, (a_square(),), check_trace=False),
    "export": exported,
    "make_fx": made_fx,
}


@on_device(uvm_only=True, timeout=120)
@pytest.mark.parametrize("what", sorted(TRACERS))
def test_tracers(what: str) -> None:
    """See the model's own forward. What they make holds no slot: it reads the weights where they lie, later changes too."""

    class Copying(nn.Module):
        """Its forward is one that the simulated device computes."""

        def __init__(self, seed: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(contents(seed), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.copy_(self.weight)

    model: Any = nn.Sequential(*(Copying(seed) for seed in range(5)))
    x = a_square()
    with torch_uvm.stream(model, device_bytes=3 * UNIT) as stream:
        made = TRACERS[what](model)
        same(stream.statistics().fetches, 0)
        write(model, "4.weight", 44)
        check(made(x), 44)
        model(x)
        assert stream.statistics().fetches > 0


@on_device(uvm_only=True, timeout=120)
def test_strict_export() -> None:
    """Works or says why not, and what to do."""
    model = linears()
    with torch_uvm.stream(model, device_bytes=4 * UNIT):
        try:
            torch.export.export(model, (a_row(),), strict=True)
        except Exception as error:
            assert re.search(r"torch_uvm\.stream\(\).*strict=False", str(error)), error


@on_device(uvm_only=True)
def test_script() -> None:
    """It reads source code: an error that says what to do."""
    model = linears()
    with torch_uvm.stream(model, device_bytes=4 * UNIT):
        with pytest.raises(AttributeError, match=r"torch.jit.script cannot .* call remove\(\) first"):
            torch.jit.script(model)
        with pytest.raises(AttributeError, match=r"torch.jit.script cannot .* call remove\(\) first"):
            torch.jit.script(model[1])
    same(torch.jit.script(model)(a_row()).shape, (2, SIDE))


@on_device(uvm_only=True)
def test_the_forward_that_stands_in() -> None:
    """Looks like the module's own to code that inspects it."""
    model = linears()
    signature, code = inspect.signature(model[0].forward), model[0].forward.__code__
    with torch_uvm.stream(model, device_bytes=4 * UNIT):
        forward = model[0].forward
        same((inspect.signature(forward), forward.__code__, forward.__name__), (signature, code, "forward"))
        assert forward.__self__ is model[0] and forward.__func__ is Linear.forward
        with pytest.raises(AttributeError):
            forward.something


@on_device(uvm_only=True)
@pytest.mark.parametrize("gradients", ["device", "host"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_model_that_is_dropped(gradients: str, trained: bool) -> None:
    """Without remove(): its host memory is free at once, and not when cycles are collected."""
    gc.collect()
    gc.disable()
    before = pinned_bytes()
    model: Any = linears()
    stream: Any = torch_uvm.stream(model, device_bytes=4 * UNIT, gradients=gradients)
    assert pinned_bytes() > before
    y = model(a_row())
    if trained:
        y.sum().backward()
    twin: Any = copy.deepcopy(model)
    dropped = weakref.ref(model), weakref.ref(twin), weakref.ref(stream)
    del model, stream, twin, y
    same([reference() for reference in dropped], [None] * 3)
    same(pinned_bytes(), before)


@on_device(uvm_only=True)
def test_no_capture() -> None:
    """A graph would replay slots that hold something else by then."""
    model = stack(5)
    with torch_uvm.stream(model, device_bytes=3 * UNIT), torch.no_grad():
        model(ones())
        graph = torch.cuda.CUDAGraph()
        x = ones()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            graph.capture_begin()
            with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
                model(x)
            graph.capture_end()
        model(ones())
        check_read(model)


# The beginning and the end


@on_device(uvm_only=True)
def test_what_is_refused() -> None:
    """With the name, the value and what is allowed; the model stays as it was."""
    model = stack(6)
    before = pinned_bytes()
    for arguments, text in (
        ({"ahead": 0}, "ahead: 0 is not allowed: expected a whole number of units, at least 1"),
        ({"device_bytes": -1}, "device_bytes: -1 is not allowed"),
        ({"gradients": "disk"}, "gradients: 'disk' is not allowed: expected device or host"),
        ({"device_bytes": 3 * UNIT - 1}, "device_bytes: 3.00 MiB of device memory is too little"),
    ):
        with pytest.raises(ValueError, match=text):
            torch_uvm.stream(model, **arguments)
    with pytest.raises(ValueError, match="'meta'"):
        torch_uvm.stream(nn.Linear(4, 4, device="meta"))
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(parameter.is_cuda for parameter in model.parameters())
    same(pinned_bytes(), before)
    with torch_uvm.stream(model, device_bytes=3 * UNIT):
        with pytest.raises(RuntimeError, match="streams already"):
            torch_uvm.stream(model[1:], device_bytes=3 * UNIT)


@on_device("use_uvm:True,uvm_device_limit_mb:{limit}", uvm_only=True)
@pytest.mark.parametrize("limit", [2, 8])
def test_how_much_would_do(limit: int) -> None:
    """The error says it: with so much it works, and with 1 MiB less it does not."""
    model = stack(6)
    model.append(nn.Sequential(*stack(3)))
    with pytest.raises(ValueError, match="device_bytes: .* is too little") as refused:
        torch_uvm.stream(model, device_bytes=5)
    needed = int(re.search(r"(\d+) MiB would do", str(refused.value))[1])  # type: ignore[index]
    same(needed, 3)
    with pytest.raises(ValueError, match="too little"):
        torch_uvm.stream(model, device_bytes=(needed - 1) * MIB)
    torch_uvm.stream(model, device_bytes=needed * MIB).remove()
    model.to("cpu")
    if limit == 8:
        torch_uvm.stream(model).remove()
        return
    with pytest.raises(RuntimeError, match="too little") as too_low:
        torch_uvm.stream(model)
    enough = int(re.search(r"uvm_device_limit_mb to (\d+) or more", str(too_low.value))[1])  # type: ignore[index]
    same(enough, 4)
    torch.cuda.memory._set_allocator_settings(f"uvm_device_limit_mb:{enough}")
    torch_uvm.stream(model).remove()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@on_device("use_uvm:True,uvm_host_reserve_mb:10220", uvm_only=True)
def test_too_little_memory(device: str) -> None:
    """In the host, in the middle of it: everything is where it was, and the books balance."""
    model = stack(30, device)
    before = torch_uvm.memory_info()
    with pytest.raises(torch.cuda.OutOfMemoryError, match="uvm_host_reserve_mb"):
        torch_uvm.stream(model, device_bytes=3 * MIB)
    gc.collect()
    same(pinned_bytes(), 0)
    torch_uvm.empty_cache()
    same({parameter.device.type for parameter in model.parameters()}, {device})
    for index, layer in enumerate(model):
        check(layer.weight, index)
    assert not any("forward" in module.__dict__ for module in model.modules())
    after = torch_uvm.memory_info()
    same(after.allocated, before.allocated)
    same(after.populated_host, before.populated_host)


def test_where_use_uvm_is_off() -> None:
    """An error that says what to set."""
    code = """
import torch, torch_uvm
for call in (lambda: torch_uvm.stream(torch.nn.Linear(2, 2)), lambda: torch_uvm.offload_optimizer(None)):
    try:
        call()
    except RuntimeError as error:
        assert "PYTORCH_CUDA_ALLOC_CONF=use_uvm:True" in str(error), error
    else:
        raise AssertionError(call)
"""
    ended = run_python(code, from_source(environment("", require=True)))
    assert ended.status == 0, ended.text


# Optimizer state


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of tensors that are no scalars."""
    values = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(value.numel() * value.element_size() for value in values if value.dim())


def with_gradients() -> nn.Module:
    """A model of 8 MiB with gradients."""
    model = stack(8, "cuda")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


@on_device(uvm_only=True)
@pytest.mark.parametrize("name", ["fused", "foreach", "plain", "momentum", "adagrad"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_offloaded_state(name: str, when: str) -> None:
    """Lies in host memory, whether it is made later or was there; no more of it on the device."""
    model = with_gradients()
    make = {
        "fused": lambda p: torch.optim.AdamW(p, fused=True),
        "foreach": lambda p: torch.optim.Adam(p, foreach=True),
        "plain": lambda p: torch.optim.AdamW(p, foreach=False),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adagrad": lambda p: torch.optim.Adagrad(p),
    }[name]
    optimizer = make(model.parameters())
    start = torch_uvm.memory_info()
    if when == "after":
        optimizer.step()
    handle = torch_uvm.offload_optimizer(optimizer)
    for _ in range(3):
        optimizer.step()
    torch_uvm.empty_cache()
    after = torch_uvm.memory_info()
    expected = state_bytes(optimizer)
    assert expected >= 8 * UNIT
    assert after.populated_host - start.populated_host >= expected, (start, after)
    addresses = [
        value.data_ptr() for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    ]
    optimizer.step()
    found = [
        value.data_ptr() for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    ]
    same(found, addresses, "state that moves again")
    handle.remove()
    assert "_init_group" not in optimizer.__dict__


@on_device(uvm_only=True)
def test_offloaded_state_is_kept() -> None:
    """Through the move and through load_state_dict, byte for byte."""
    model = with_gradients()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer.step()
    for index, parameter in enumerate(model.parameters()):
        optimizer.state[parameter]["exp_avg"].copy_(contents(index))
    with torch_uvm.offload_optimizer(optimizer):
        for index, parameter in enumerate(model.parameters()):
            check(optimizer.state[parameter]["exp_avg"], index)
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            state["exp_avg"].copy_(contents(77))
        before = torch_uvm.memory_info()
        optimizer.load_state_dict(saved)
        for parameter in model.parameters():
            check(optimizer.state[parameter]["exp_avg"], 77)
        assert torch_uvm.memory_info().populated_host >= before.populated_host
        optimizer.step()


@on_device(uvm_only=True)
def test_training_with_everything() -> None:
    """Weights, gradients and state in host memory; a step that PyTorch does not count is seen by the next pass."""
    model = stack(8)
    with torch_uvm.stream(model, device_bytes=4 * UNIT, gradients="host"):
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        torch_uvm.offload_optimizer(optimizer)
        for number in range(3):
            model(ones(True)).backward(ones())
            optimizer.step()
            for index, layer in enumerate(model):
                layer.weight.data.copy_(contents(100 * number + index))  # what the kernel would have written
            optimizer.zero_grad()
            with torch.no_grad():
                model(ones())
            check_read(model, [100 * number + index for index in range(8)])
