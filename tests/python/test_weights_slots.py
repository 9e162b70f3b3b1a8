"""Slots that somebody else holds."""

from __future__ import annotations

import torch
from contents import same
from on_device import on_device
from streamed import (
    UNIT,
    Layer,
    check,
    check_read,
    copied,
    copies_first,
    ones,
    stack,
)
from torch import nn
from under_test import torch_uvm


@on_device(uvm_only=True)
def test_a_view_that_is_kept() -> None:
    """Its slot is left to it, and another one made."""
    model = stack(8)
    kept = []
    forward = Layer.forward

    def keeping(self: Layer, x: torch.Tensor) -> torch.Tensor:
        kept.append(self.weight.detach())
        return forward(self, x)

    with torch_uvm.stream_weights(model, device_bytes=3 * UNIT) as stream, torch.no_grad():
        Layer.forward = keeping  # type: ignore[method-assign]
        stream.remove()
        stream = torch_uvm.stream_weights(model, device_bytes=3 * UNIT)
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
    with torch_uvm.stream_weights(model, device_bytes=3 * UNIT) as stream, torch.no_grad():
        for _ in range(3):
            late = model(ones())
            copies_first(stream)
            same(len(late), 7)
            for index, read in enumerate(late):
                check(read, index)
            kept.clear()
