"""What the tests of weights that stream share.

Modules here copy their weights, since copies are what the simulated device does; streams run late there, so a slot that
is overwritten too early, or read too early, shows as wrong bytes.
"""

from __future__ import annotations

from typing import Any, ClassVar, Optional

import torch
from torch import nn

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

    seen: ClassVar[list[torch.Tensor]] = []

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
    """Runs the copies that were enqueued, and of all else only what they wait for: if that is too little, it shows."""
    stream._fetcher.slots.copies.synchronize()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights and buffers, whatever is found twice too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers(remove_duplicate=False))}


def write(model: nn.Module, name: str, seed: int) -> None:
    """Writes a weight or buffer in place."""
    tensor = state(model)[name]
    values = contents(seed).flatten().to(tensor.dtype)
    with torch.no_grad():
        tensor.copy_(values[torch.arange(tensor.numel()) % values.numel()].view(tensor.shape))


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
