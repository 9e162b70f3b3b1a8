"""Who holds memory: the number of those who share a tensor's storage says whether its bytes may be overwritten."""

from __future__ import annotations

import torch


def use_count(storage: torch.UntypedStorage) -> int:
    """How many own a storage: tensors, saved ones too, and the storage's Python object."""
    return int(torch._C._storage_Use_Count(storage._cdata))


class Owners:
    """The storage of a tensor of ours, and how many of its owners are our own."""

    __slots__ = ("_ours", "_storage")

    def __init__(self, tensor: torch.Tensor) -> None:
        """All who share the tensor's storage now are ours: the tensor, and those that it is a view of."""
        self._storage = tensor.untyped_storage()  # kept: its own reference is then always among those counted
        self._ours = self._count()

    def _count(self) -> int:
        return use_count(self._storage)

    def one_more(self) -> None:
        """Another tensor of ours shares it."""
        self._ours += 1

    def alone(self) -> bool:
        """Whether nobody but us shares it."""
        return self._count() == self._ours
