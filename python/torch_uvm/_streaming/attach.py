"""Moves the weights of a model to where they are while they stream, and back."""

from __future__ import annotations

import warnings
from typing import Optional

import torch
from torch import nn

from .._pools import empty_cache, placement
from .budget import Budget
from .extents import Extent, extents_of
from .pinned import Pinned
from .plan import Group, aligned
from .slots import Slots
from .units import Unit, Weight

_GIB = 1 << 30
#: What may share memory with a model's weights from outside.
_HOLDERS = "a tensor outside the model (a flat buffer, a view, a state_dict, another model, a graph of a forward pass)"


class Attachment:
    """Where the weights of one model are. What it has done at any time can be undone, errors included."""

    def __init__(self, device: int) -> None:
        self._index = device
        self._device = torch.device("cuda", device)
        #: Each extent that lies in host memory, with its weights.
        self._hosted: list[tuple[Extent, list[Weight]]] = []
        #: How it was before: where extents with weights lay, and the buffers of each module.
        self._origins: list[tuple[Extent, torch.device]] = []
        self._buffers: list[tuple[nn.Module, dict[str, Optional[torch.Tensor]]]] = []
        self.candidates = 0
        self.resident_bytes = 0
        self.remote_bytes = 0

    def move(
        self, model: nn.Module, extents: list[Extent], budget: Budget
    ) -> tuple[list[Unit], Optional[Slots], dict[nn.Module, list[Unit]]]:
        """Moves everything. Answers the units that stream, their slots, and which units a module's forward uses."""
        self._origins = [(extent, extent.tensors[0].device) for extent in extents if extent.weights()]
        self._buffers = [(module, dict(module._buffers)) for module in model.modules()]
        groups = budget.groups()
        self._move_buffers(model, extents)
        self.resident_bytes += sum(extent.nbytes for extent in extents if extent.held_outside)
        self.candidates = len(groups.units)
        choice = budget.choice(groups) if budget.known else None
        # One after the other, so that never more than one unit is on the device beside what stays there. Where it is
        # not known yet what may stay, everything goes to the host first: only then does memory_info say what others
        # hold.
        hosts: dict[int, tuple[torch.Tensor, list[Weight]]] = {}
        for index, found in enumerate(groups.units):
            if choice is None or index not in choice.resident:
                hosts[index] = self._to_host(found)
        for index, other in enumerate(groups.others):
            if choice is None or index not in choice.others:
                self._to_host(other)
        empty_cache()
        if choice is None:
            choice = budget.choice(groups)
        slots = Slots(choice.slots, choice.slot_bytes, self._index) if choice.slots else None
        for small in groups.small:
            self._to_device(small, move=False)
        for index, other in enumerate(groups.others):
            if index in choice.others:
                self._to_device(other)
            else:
                self.remote_bytes += other.bytes
        units: list[Unit] = []
        used_by: dict[nn.Module, list[Unit]] = {}
        for index, found in enumerate(groups.units):
            if index in choice.resident:
                hosts.pop(index, None)
                self._to_device(found)
                continue
            unit = Unit(len(units), found.name, *hosts.pop(index))
            units.append(unit)
            for module in found.modules:
                used_by.setdefault(module, []).append(unit)
        empty_cache()
        return units, slots, used_by

    def _move_buffers(self, model: nn.Module, extents: list[Extent]) -> None:
        """Moves buffers to the device. Those that share memory with weights are moved with these."""
        moved: dict[torch.Tensor, torch.Tensor] = {}
        with torch.no_grad():
            for extent in extents:
                if not extent.weights() and not extent.tensors[0].is_cuda:
                    moved.update(zip(extent.tensors, extent.on(self._device)))
        with_weights = {tensor for extent in extents if extent.weights() for tensor in extent.tensors}
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_cuda and buffer not in with_weights:
                    if buffer not in moved:
                        moved[buffer] = buffer.to(self._device)
                    module._buffers[name] = moved[buffer]

    def _to_host(self, found: Group) -> tuple[torch.Tensor, list[Weight]]:
        """Moves a group's weights into one piece of pinned memory; answers it as a CPU tensor, to copy from."""
        with torch.inference_mode(False), torch.no_grad():
            host = Pinned(found.bytes, self._index)
            weights: list[Weight] = []
            start = 0
            for extent in found.extents:
                cuda = host.cuda(start, extent.nbytes)
                if extent.tensors[0].is_cuda:
                    extent.copy_to(cuda)
                else:
                    extent.copy_to(host.cpu, start)
                views = extent.views(cuda)
                of_extent = [
                    Weight(tensor, view, (start + offset) // tensor.element_size())
                    for tensor, view, offset in zip(extent.tensors, views, extent.offsets)
                ]
                self._hosted.append((extent, of_extent))
                weights += of_extent
                _repoint(extent, views)
                start += aligned(extent.nbytes)
        return host.cpu, weights

    def _to_device(self, found: Group, move: bool = True) -> None:
        """Moves a group's weights into plain device memory; without `move` those that are not on the device."""
        with torch.inference_mode(False), torch.no_grad(), placement("device", self._index):
            for extent in found.extents:
                if move or not extent.tensors[0].is_cuda:
                    _repoint(extent, extent.on(self._device))
        self.resident_bytes += found.bytes

    def keep(self) -> None:
        """All is well: how it was before is forgotten, and the model is not held any more."""
        self._origins.clear()
        self._buffers.clear()

    def undo(self) -> None:
        """Moves everything to where it was before. What the device has no memory for stays in host memory."""
        for module, own in self._buffers:
            module._buffers.update(own)
        try:
            with torch.inference_mode(False), torch.no_grad():
                for extent, device in self._origins:
                    if device.type == "cpu" and extent.tensors[0].is_cuda:
                        _repoint(extent, extent.on(device))
            self.to_ordinary_memory()
        except torch.cuda.OutOfMemoryError:
            pass
        self.keep()

    def to_ordinary_memory(self) -> None:
        """Moves what lies in pinned memory into memory of the default placement, one extent after the other.

        torch.cuda.OutOfMemoryError where there is too little; calling it again goes on.
        """
        released = 0
        with torch.inference_mode(False), torch.no_grad():
            while self._hosted:
                extent, weights = self._hosted[-1]
                ours = [weight.tensor.data_ptr() == weight.pointer for weight in weights]
                if any(ours):
                    moved = _on_device(extent, weights)
                    for weight, data, is_ours in zip(weights, moved, ours):
                        if is_ours:
                            _repoint_tensor(weight.tensor, data)
                for weight in weights:
                    weight.release_host()
                self._hosted.pop()
                released += extent.nbytes
                if released > _GIB:  # so that the weights are not there twice
                    empty_cache()
                    released = 0


def movable_extents(model: nn.Module, stacklevel: int) -> list[Extent]:
    """A model's extents, after a word about those that cannot move because a tensor outside the model shares their
    memory.

    On the GPU they stay where they are: their memory would not become free. Those on the CPU would have to be moved.
    `stacklevel` is the caller's, for the warning.

    Raises:
        ValueError: there are such extents on the CPU.
    """
    extents = extents_of(model)
    held = [extent for extent in extents if extent.weights() and extent.held_outside]
    refused = [name for extent in held if not extent.tensors[0].is_cuda for name in extent.names]
    if refused:
        raise ValueError(
            f"model: the memory of {_some(refused)} on the CPU is shared with {_HOLDERS}: what is written through one "
            "would not be seen through the other. Delete that tensor, or move the model to the GPU first"
        )
    staying = [name for extent in held for name in extent.names]
    if staying:
        warnings.warn(
            f"torch_uvm.stream_weights(): the memory of {_some(staying)} is shared with {_HOLDERS}. It stays where it "
            "is and does not stream",
            stacklevel=stacklevel + 1,
        )
    return extents


def _some(names: list[str]) -> str:
    """The first few names."""
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _on_device(extent: Extent, weights: list[Weight]) -> list[torch.Tensor]:
    """Copies of an extent's tensors, from host memory, in memory of the default placement."""
    there = Extent([weight.host for weight in weights], extent.names, extent.offsets, extent.nbytes)
    device = weights[0].host.device
    try:
        return there.on(device)
    except torch.cuda.OutOfMemoryError:
        empty_cache()  # what weights before this one have left in the host's pools
        return there.on(device)


def _repoint(extent: Extent, views: list[torch.Tensor]) -> None:
    """Gives an extent another place."""
    for tensor, data in zip(extent.tensors, views):
        _repoint_tensor(tensor, data)


def _repoint_tensor(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Gives a tensor another place, and its gradient the same device."""
    grad = tensor.grad if tensor.is_leaf else None
    if grad is not None:
        tensor.grad = None
    tensor.data = data
    if grad is not None:
        tensor.grad = grad if grad.device == data.device else grad.to(data.device)
