"""Weights that share memory, with each other and with tensors outside the model."""

from __future__ import annotations

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
    ones,
    stack,
    state,
    write,
)
from torch import nn
from under_test import torch_uvm

from torch_uvm._streaming.pinned import pinned_bytes


@on_device(uvm_only=True)
def test_tied_weights() -> None:
    """Belong to one unit, which both uses fetch."""
    model = nn.Sequential(*stack(6))
    model[4].weight = model[1].weight
    with torch_uvm.stream_weights(model, device_bytes=3 * UNIT) as stream:
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
    stream = torch_uvm.stream_weights(model, ahead=1, device_bytes=4 * UNIT + 4096)
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
    with torch_uvm.stream_weights(model, device_bytes=3 * UNIT):
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
    with pytest.warns(UserWarning, match=r"0.weight, 1.weight, 2.weight, 3.weight and 2 more .*outside the model"):
        stream = torch_uvm.stream_weights(model, device_bytes=2 * UNIT, ahead=1)
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
    with pytest.raises(ValueError, match=r"2\.weight.*outside the model"):
        torch_uvm.stream_weights(model, device_bytes=3 * UNIT)
    same({parameter.device.type for parameter in model.parameters()}, {"cpu"})
    del other
    with torch_uvm.stream_weights(model, device_bytes=3 * UNIT):
        model(ones())
        check_read(model)
