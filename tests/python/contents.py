"""Seeded contents for tensors, and checks that they are still there. Only copies are used: kernels do nothing here."""

from __future__ import annotations

import torch

MIB = 1 << 20


# Words of randomness, and two odd numbers that make every seed's and every row's words different.
_WORDS = torch.randint(-(2**62), 2**62, (1 << 13,), dtype=torch.int64, generator=torch.Generator().manual_seed(1))
_OF_SEED, _OF_ROW = 0x9E3779B97F4A7C1, 0x1F83D9ABFB41BD6B


def pattern(seed: int, count: int) -> torch.Tensor:
    """`count` bytes in host memory, the same for the same seed and different for any other, wherever one looks."""
    of_seed = (seed * _OF_SEED + 2**63) % 2**64 - 2**63  # as 64-bit words wrap around
    rows = torch.arange(count // (8 * _WORDS.numel()) + 1, dtype=torch.int64)
    words = _WORDS + of_seed + (rows * _OF_ROW).unsqueeze(1)
    return words.flatten().view(torch.uint8)[:count]


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
    found, expected = tensor.cpu(), pattern(seed, tensor.numel())
    if not torch.equal(found, expected):
        wrong = (found != expected).nonzero()
        raise AssertionError(f"{what}: {wrong.shape[0]} of {tensor.numel()} bytes differ, the first at {int(wrong[0])}")


def same(found: object, expected: object, what: str = "") -> None:
    """Fails with both values unless they are equal."""
    if found != expected:
        raise AssertionError(f"{what + ': ' if what else ''}found {found!r}, expected {expected!r}")
