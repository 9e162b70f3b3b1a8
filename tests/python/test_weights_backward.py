"""Backward passes of models whose weights stream, and where gradients are."""

from __future__ import annotations

from typing import Optional

import pytest
import torch
from contents import MIB, same
from on_device import on_device
from streamed import (
    SIDE,
    UNIT,
    Layer,
    Through,
    check,
    check_read,
    contents,
    ones,
    stack,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from under_test import torch_uvm

from torch_uvm._streaming.pinned import pinned_bytes


@on_device(uvm_only=True)
@pytest.mark.parametrize("gradients", ["device", "host"])
def test_backward(gradients: str) -> None:
    """It gets each weight again, from slots that held others meanwhile; gradients go where they shall."""
    model = stack(10)
    with torch_uvm.stream_weights(model, device_bytes=5 * UNIT, gradients=gradients) as stream:
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
    with torch_uvm.stream_weights(model, ahead=1, device_bytes=9 * MIB, gradients="host") as stream:
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
    with torch_uvm.stream_weights(model, device_bytes=3 * UNIT, gradients="host"):
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
    with torch_uvm.stream_weights(whole, device_bytes=3 * UNIT) as stream:
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
    with torch_uvm.stream_weights(model, device_bytes=3 * UNIT):
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
        with torch_uvm.stream_weights(model, device_bytes=3 * UNIT):
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
    with torch_uvm.stream_weights(model, device_bytes=3 * UNIT):
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
    stream = torch_uvm.stream_weights(model, device_bytes=3 * UNIT)
    y = model(ones(True))
    stream.remove()
    stream.remove()
    Through.seen.clear()
    y.backward(ones())
    for index, seen in enumerate(reversed(Through.seen)):
        check(seen, index)
