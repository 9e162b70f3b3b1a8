"""Weights that the program changes, saves, loads or moves while they stream."""

from __future__ import annotations

import io

import pytest
import torch
from contents import same
from on_device import on_device
from streamed import (
    SIDE,
    UNIT,
    Layer,
    check,
    check_read,
    contents,
    copied,
    copies_first,
    ones,
    stack,
)
from torch import nn
from under_test import torch_uvm


@on_device(uvm_only=True)
def test_state_dict() -> None:
    """Saved and loaded while streaming, into the model and into another one."""
    model = stack(8)
    with torch_uvm.stream_weights(model, device_bytes=4 * UNIT):
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
    with torch_uvm.stream_weights(model, device_bytes=3 * UNIT) as stream:
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
    with torch_uvm.stream_weights(model, device_bytes=3 * UNIT) as stream:
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
    with torch_uvm.stream_weights(model, device_bytes=3 * UNIT) as stream, torch.no_grad():
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
    with torch_uvm.stream_weights(model, device_bytes=3 * UNIT) as stream, torch.no_grad():
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
