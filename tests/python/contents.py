"""Seeded contents for tensors, and checks that they are still there. Only copies are used: kernels do nothing here."""

from __future__ import annotations

import torch

MIB = 1 << 20


def pattern(seed: int, count: int) -> torch.Tensor:
    """`count` bytes in host memory, the same for the same seed and different for any other."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)


def block(count: int, device: str | torch.device = "cuda") -> torch.Tensor:
    """A tensor of `count` bytes with no contents yet."""
    return torch.empty(count, dtype=torch.uint8, device=device)


def filled(seed: int, count: int, device: str | torch.device = "cuda") -> torch.Tensor:
    """A tensor on the device with the pattern of this seed."""
    tensor = block(count, device)
    tensor.copy_(pattern(seed, count))
    return tensor


def check(tensor: torch.Tensor, seed: int, what: str = "tensor") -> None:
    """Fails unless the tensor holds the pattern of this seed."""
    wrong = (tensor.cpu() != pattern(seed, tensor.numel())).nonzero()
    if wrong.numel():
        raise AssertionError(f"{what}: {wrong.shape[0]} of {tensor.numel()} bytes differ, the first at {int(wrong[0])}")


def same(found: object, expected: object, what: str = "") -> None:
    """Fails with both values unless they are equal."""
    if found != expected:
        raise AssertionError(f"{what + ': ' if what else ''}found {found!r}, expected {expected!r}")
