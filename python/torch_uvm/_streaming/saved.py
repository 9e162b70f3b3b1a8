"""What autograd keeps instead of a weight that lies in a slot, and how it is made again for the backward pass.

A forward that records gradients saves tensors. A view of a slot would keep the slot, so saved-tensor hooks save which
weight it was and how it was seen.
"""

from __future__ import annotations

import weakref
from typing import Any, Optional, Union, cast

import torch

from .fetch import Fetcher
from .internals import (
    TELLS_SAVED_TENSOR_HOOKS,
    Pack,
    Unpack,
    innermost_saved_tensor_hooks,
    pop_saved_tensor_hooks,
    push_saved_tensor_hooks,
)
from .slots import Slot, Slots
from .units import Unit, Weight


class SavedWeight:
    """Which weight, and how it was seen."""

    __slots__ = ("dtype", "offset", "shape", "stride", "unit", "version", "weight")

    def __init__(self, unit: Unit, weight: Weight, version: int, tensor: torch.Tensor) -> None:
        self.unit = unit
        self.weight = weight
        self.version = version
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self.stride = tensor.stride()
        #: From the weight's first byte, in elements of the tensor's type.
        self.offset = int(tensor.storage_offset()) - weight.first_byte() // tensor.element_size()

    def load(self, fetcher: Fetcher) -> torch.Tensor:
        """The weight once more. RuntimeError where it was changed in place since."""
        tensor = self.weight.tensor
        if tensor._version != self.version:
            raise RuntimeError(_modified(self.weight.host, self.version, tensor._version))
        view = fetcher.view_for_backward(self.unit, self.weight, self._in_slot)
        if view is not None:
            return view
        data = tensor.detach()
        if data.dtype != self.dtype:
            data = data.view(self.dtype)
        return torch.as_strided(data, self.shape, self.stride, data.storage_offset() + self.offset)

    def _in_slot(self, slot: Slot) -> torch.Tensor:
        offset = self.weight.first_byte() // self.dtype.itemsize + self.offset
        return slot.view(self.dtype, self.shape, self.stride, offset)


class SavedCast:
    """The same for a tensor of another type that was made of a weight, as autocast does: it is made again."""

    __slots__ = ("dtype", "offset", "saved", "shape", "stride")

    def __init__(self, saved: SavedWeight, base: torch.Tensor, tensor: torch.Tensor) -> None:
        #: The weight itself, and what was made of it.
        self.saved = saved
        self.dtype = base.dtype
        self.shape = tensor.shape
        self.stride = tensor.stride()
        self.offset = tensor.storage_offset()

    def load(self, fetcher: Fetcher) -> torch.Tensor:
        """The tensor, from the weight."""
        return torch.as_strided(self.saved.load(fetcher).to(self.dtype), self.shape, self.stride, self.offset)


class _SavedOther:
    """Any other tensor that autograd saves, and its version: hooks switch PyTorch's own check off."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        # Without the graph: a tensor saved by the function that made it would keep itself alive.
        self.tensor = tensor.detach()
        self.version = tensor._version

    def load(self) -> torch.Tensor:
        """The tensor. RuntimeError where it was changed in place since."""
        if self.tensor._version != self.version:
            raise RuntimeError(_modified(self.tensor, self.version, self.tensor._version))
        return self.tensor


def save(fetcher: Fetcher, tensor: torch.Tensor) -> Union[SavedWeight, SavedCast, None]:
    """What to keep instead of a tensor in a slot, or of one that is a weight in another type; None for any other."""
    slots = fetcher.slots
    if slots is None:
        return None
    slot = slots.containing(tensor)
    if slot is None:
        return _save_cast(fetcher, slots, tensor)
    if slot.unit is None:
        return None
    unit = fetcher.units[slot.unit]
    first = int(tensor.storage_offset()) * tensor.element_size()
    for number, weight in enumerate(unit.weights):
        if weight.spans(first):
            version = weight.tensor._version if weight.bound else slot.versions[number]
            return SavedWeight(unit, weight, version, tensor)
    return None


def _save_cast(fetcher: Fetcher, slots: Slots, tensor: torch.Tensor) -> Optional[SavedCast]:
    base = tensor._base if tensor._is_view() else tensor
    made_by = None if base is None else base.grad_fn
    if base is None or made_by is None or made_by.name() != "ToCopyBackward0" or base._version:
        return None
    parameter = getattr(made_by.next_functions[0][0], "variable", None)
    if parameter is None or not base.is_cuda or base.stride() != parameter.stride() or base.storage_offset():
        return None
    saved = save(fetcher, parameter.detach()) if slots.containing(parameter) is not None else None
    return SavedCast(saved, base, tensor) if isinstance(saved, SavedWeight) else None


def _modified(tensor: torch.Tensor, saved: int, now: int) -> str:
    """As PyTorch says it."""
    return (
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{tensor.type()} {list(tensor.shape)}] is at version {now}; expected version {saved} instead"
    )


class Hooks:
    """The saved-tensor hooks of one forward. PyTorch asks only the innermost hooks, so these ask those around them."""

    __slots__ = ("__weakref__", "_fetcher", "_outer")

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self._outer: Optional[tuple[Pack, Unpack]]
        if TELLS_SAVED_TENSOR_HOOKS:
            self._outer = innermost_saved_tensor_hooks()
        else:  # PyTorch 2.6
            unknown = _OuterUnknown(self)
            self._outer = unknown.pack, unknown.unpack

    def pack(self, tensor: torch.Tensor) -> Any:
        """Keeps no view of a slot."""
        saved = save(self._fetcher, tensor)
        if saved is not None:
            return saved
        if self._outer is not None:
            return (self._outer[0](tensor),)
        return _SavedOther(tensor)

    def unpack(self, saved: Any) -> torch.Tensor:
        """The tensor again."""
        if isinstance(saved, (SavedWeight, SavedCast)):
            return saved.load(self._fetcher)
        if isinstance(saved, _SavedOther):
            return saved.load()
        assert self._outer is not None
        return self._outer[1](saved[0])


class _SavedByOuter(torch.autograd.Function):
    """Saves a tensor as the hooks around ours want it: for versions of PyTorch that do not say which these are."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tensor)
        return anchor.view_as(anchor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None]:
        return None, None


class _OuterUnknown:
    """The hooks around ours, asked by taking ours away for a moment."""

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = weakref.ref(hooks)
        self._anchor = torch.empty(0, requires_grad=True)

    def pack(self, tensor: torch.Tensor) -> Any:
        """A node that keeps it; PyTorch checks its version where there are no hooks."""
        hooks = self._hooks()
        assert hooks is not None  # they have called this
        pop_saved_tensor_hooks()
        try:
            with torch.enable_grad():
                return cast(Any, _SavedByOuter).apply(self._anchor, tensor.detach())
        finally:
            push_saved_tensor_hooks(hooks.pack, hooks.unpack)

    @staticmethod
    def unpack(saved: Any) -> torch.Tensor:
        """The tensor again."""
        return cast(torch.Tensor, saved.grad_fn.saved_tensors[0])
