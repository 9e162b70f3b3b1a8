"""Who holds memory. Whether bytes may be overwritten is known from the number of those who share their storage."""

from __future__ import annotations

import torch

from .internals import use_count


class Owners:
    """The storage of a tensor of ours, and how many of its owners are our own."""

    __slots__ = ("_ours", "_storage")

    def __init__(self, tensor: torch.Tensor) -> None:
        """All who share the tensor's storage now are ours: the tensor, and those that it is a view of."""
        self._storage = tensor.untyped_storage()  # kept: its own reference is then always among those counted
        self._ours = use_count(self._storage)

    def one_more(self) -> None:
        """Another tensor of ours shares it."""
        self._ours += 1

    def alone(self) -> bool:
        """Whether nobody but us shares it."""
        return use_count(self._storage) == self._ours
