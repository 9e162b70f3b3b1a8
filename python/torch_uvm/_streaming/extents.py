"""Which weights of a model share memory, with each other and with tensors outside the model.

Two weights can share memory without being one Parameter: they were tied through `.data`, or they are views of one flat
buffer. A buffer can be a view of a weight. Such tensors move as one piece, an *extent*, so that what is written through
one of them is still seen through the others. The sharing is found by storage, not by object.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from .internals import use_count

#: The largest element of any type, in bytes: where an extent begins in its storage is a multiple of it.
_LARGEST_ELEMENT = 16


@dataclass(eq=False)
class Extent:
    """Memory that moves as one piece: that of one tensor, or that in which several tensors overlap."""

    #: Different tensors, weights and buffers.
    tensors: list[torch.Tensor]
    names: list[str]
    #: Where each tensor begins, in bytes from the extent's begin.
    offsets: list[int]
    #: Bytes that it takes in a new place.
    nbytes: int
    #: Whether a tensor outside the model shares the storage.
    held_outside: bool = False

    @property
    def shared(self) -> bool:
        """Whether more than one tensor lies in it. The layout is kept then; a single tensor's gaps are closed."""
        return len(self.tensors) > 1

    def weights(self) -> list[nn.Parameter]:
        """The parameters in it."""
        return [tensor for tensor in self.tensors if isinstance(tensor, nn.Parameter)]

    def views(self, place: torch.Tensor, start: int = 0) -> list[torch.Tensor]:
        """Its tensors in another place: `place` is a tensor of bytes, in which the extent begins at byte `start`."""
        found = []
        for tensor, offset in zip(self.tensors, self.offsets):
            itemsize = tensor.element_size()
            typed = place[: place.numel() // itemsize * itemsize].view(tensor.dtype)
            stride = tensor.stride() if self.shared else strides(tensor)
            found.append(torch.as_strided(typed, tensor.shape, stride, (start + offset) // itemsize))
        return found

    def copy_to(self, place: torch.Tensor, start: int = 0) -> None:
        """Copies its contents into a tensor of bytes, from byte `start` on."""
        if self.shared:
            place[start : start + self.nbytes].copy_(self._bytes())
        else:
            self.views(place, start)[0].copy_(self.tensors[0].data)

    def on(self, device: torch.device) -> list[torch.Tensor]:
        """Copies of its tensors in new memory of a device, which share that memory as they do now."""
        if not self.shared:
            return [torch.empty_like(self.tensors[0].data, device=device).copy_(self.tensors[0].data)]
        place = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        self.copy_to(place)
        return self.views(place)

    def _bytes(self) -> torch.Tensor:
        """Its memory as it lies now."""
        first = self.tensors[0]
        begin = first.storage_offset() * first.element_size() - self.offsets[0]
        empty = torch.empty(0, dtype=torch.uint8, device=first.device)
        return empty.set_(first.untyped_storage(), begin, (self.nbytes,), (1,))


def strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """A tensor's strides where they cover memory without gaps, else those of a contiguous tensor."""
    return tuple(torch.empty_like(tensor, device="meta").stride())


def bytes_of(tensor: torch.Tensor) -> int:
    """Bytes of its elements."""
    return tensor.numel() * tensor.element_size()


def streamable(tensor: torch.Tensor) -> bool:
    """Whether a tensor is an ordinary parameter or buffer. Others (quantised, distributed) stay as they are."""
    plain = type(tensor) is nn.Parameter or (type(tensor) is torch.Tensor and not isinstance(tensor, nn.Parameter))
    return (
        plain and type(tensor.data) is torch.Tensor and tensor.layout == torch.strided and tensor.device.type != "meta"
    )


@dataclass
class _InStorage:
    """The tensors of a model that lie in one storage."""

    storage: torch.UntypedStorage
    tensors: list[tuple[str, torch.Tensor]] = field(default_factory=list)

    def held_outside(self) -> bool:
        """Whether anything but these tensors shares the storage."""
        known = {id(tensor) for _, tensor in self.tensors}
        for _, tensor in self.tensors:
            if tensor._base is not None and _base_references(tensor) <= _references_without_holder():
                known.add(id(tensor._base))
        return use_count(self.storage) > len(known) + _counts_of_storage_objects()


def extents_of(model: nn.Module) -> list[Extent]:
    """The memory of a model's ordinary parameters and buffers, each tensor in one extent."""
    return extents_of_tensors([*model.named_parameters(), *model.named_buffers()])


def extents_of_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> list[Extent]:
    """The memory of different tensors with their names, without those that are not ordinary ones."""
    storages: dict[int, _InStorage] = {}
    found: list[Extent] = []
    for name, tensor in named:
        if not streamable(tensor):
            continue
        if not tensor.numel():
            found.append(Extent([tensor], [name], [0], 0))
            continue
        storage = tensor.untyped_storage()
        storages.setdefault(storage._cdata, _InStorage(storage)).tensors.append((name, tensor))
    for together in storages.values():
        held = together.held_outside()
        for overlapping in _overlapping(together.tensors):
            extent = _extent(overlapping, together.storage.nbytes())
            extent.held_outside = held
            found.append(extent)
    return found


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Its first byte in its storage, and the one after its last."""
    first = tensor.storage_offset()
    last = first + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return int(first * tensor.element_size()), int((last + 1) * tensor.element_size())


def _overlapping(tensors: list[tuple[str, torch.Tensor]]) -> list[list[tuple[str, torch.Tensor]]]:
    """Divides the tensors of a storage so that no two of different groups share a byte."""
    groups: list[list[tuple[str, torch.Tensor]]] = []
    end = 0
    for named in sorted(tensors, key=lambda named: _span(named[1])):
        begin, after = _span(named[1])
        if groups and begin < end:
            groups[-1].append(named)
        else:
            groups.append([named])
        end = max(end, after)
    return groups


def _extent(named: list[tuple[str, torch.Tensor]], storage_bytes: int) -> Extent:
    tensors = [tensor for _, tensor in named]
    names = [name for name, _ in named]
    if len(tensors) == 1:
        return Extent(tensors, names, [0], bytes_of(tensors[0]))
    spans = [_span(tensor) for tensor in tensors]
    begin = min(first for first, _ in spans) // _LARGEST_ELEMENT * _LARGEST_ELEMENT
    end = max(after for _, after in spans)
    return Extent(tensors, names, [first - begin for first, _ in spans], min(end, storage_bytes) - begin)


@functools.cache
def _counts_of_storage_objects() -> int:
    """How much a storage's Python object adds to the count of its owners. PyTorch's versions may differ."""
    tensor = torch.empty(1)
    return use_count(tensor.untyped_storage()) - 1


@functools.cache
def _references_without_holder() -> int:
    """The references to the base of a view where only the view keeps it. PyTorch's versions differ here too."""
    return _base_references(torch.empty(2)[1:])


def _base_references(view: torch.Tensor) -> int:
    return sys.getrefcount(view._base)
