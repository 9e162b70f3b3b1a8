"""Forwards of models whose weights stream."""

from __future__ import annotations

import threading

import pytest
import torch
from contents import same
from on_device import on_device
from streamed import (
    UNIT,
    Layer,
    check,
    check_read,
    contents,
    copies_first,
    ones,
    stack,
)
from torch import nn
from under_test import torch_uvm


@on_device(uvm_only=True)
@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference_mode"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_forward(mode: str, device: str) -> None:
    """Each layer reads its own weight in each pass; each streamed one is copied once a pass, most of them ahead."""
    model = stack(10, device)
    context = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]
    with torch_uvm.stream_weights(model, device_bytes=5 * UNIT) as stream:
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
    with torch_uvm.stream_weights(model, device_bytes=3 * UNIT, across_passes=True) as stream:
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
    with torch_uvm.stream_weights(few, device_bytes=3 * UNIT, across_passes=True):
        for first in (40, 50, 60):
            few(ones(True)).backward(ones())
            for seed, layer in enumerate(few, first):
                layer.weight.data.copy_(contents(seed))  # as a fused optimizer: its version stays
            few(ones())
            check_read(few, list(range(first, first + 4)))


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
    with torch_uvm.stream_weights(model, device_bytes=3 * UNIT) as stream:
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
    with torch_uvm.stream_weights(model, device_bytes=3 * UNIT):
        for seed in (0, 10, 20):
            for index, layer in enumerate(model):
                layer.weight.data.copy_(contents(seed + index))
            for layer in model:
                layer(ones())
            check_read(model, [seed + index for index in range(6)])


@on_device(uvm_only=True)
def test_other_streams() -> None:
    """A forward on a stream of the program's own, then on another: slots wait for both."""
    model = stack(8)
    streams = [torch.cuda.Stream() for _ in range(3)]
    with torch_uvm.stream_weights(model, device_bytes=3 * UNIT), torch.no_grad():
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

    with torch_uvm.stream_weights(model, device_bytes=3 * UNIT) as stream:
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
    with torch_uvm.stream_weights(model, device_bytes=3 * UNIT):
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
