"""The weights that stream, and the units in which they are copied."""

from __future__ import annotations

from typing import Optional

import torch

from .slots import Slot


class Weight:
    """A parameter that streams, or a buffer that shares memory with one."""

    __slots__ = ("bound", "host", "offset", "pointer", "tensor", "version")

    def __init__(self, tensor: torch.Tensor, host: torch.Tensor, offset: int) -> None:
        self.tensor = tensor
        #: Its place in host memory.
        self.host = host
        self.pointer = host.data_ptr()
        #: Where it begins in a slot, in elements.
        self.offset = offset
        #: The address that `tensor.data` has while it is in a slot, else 0; and the version that it then had.
        self.bound = 0
        self.version = 0

    def release_host(self) -> None:
        """The host memory is not needed any more; its shape and type are."""
        self.host = torch.empty_like(self.host, device="meta")
        self.pointer = -1

    def in_slot(self, slot: Slot) -> torch.Tensor:
        """Its view in a slot."""
        return slot.view(self.host.dtype, self.host.shape, self.host.stride(), self.offset)

    def first_byte(self) -> int:
        """Where it begins in a slot."""
        return self.offset * self.host.element_size()

    def spans(self, byte: int) -> bool:
        """Whether a byte of a slot is one of its own, or in its gaps."""
        last = sum((size - 1) * stride for size, stride in zip(self.host.shape, self.host.stride()))
        return self.first_byte() <= byte < self.first_byte() + (last + 1) * self.host.element_size()

    def is_where_we_put_it(self) -> bool:
        """Whether its data is in our host memory or in our slot. The program may have put it elsewhere."""
        return self.tensor.data_ptr() in (self.pointer, self.bound)


class Unit:
    """Weights that are copied together."""

    def __init__(self, number: int, name: str, host: torch.Tensor, weights: list[Weight]) -> None:
        self.number = number
        self.name = name
        #: All weights as bytes, laid out as in a slot: a CPU tensor over the memory that the weights are CUDA tensors
        #: in.
        self.host = host
        self.bytes = host.numel()
        self.weights = weights
        #: The slot that holds it.
        self.slot: Optional[Slot] = None
        #: How many forwards are using it now.
        self.active = 0
        #: The weights' versions when it was copied last.
        self.versions: list[int] = []

    def versions_now(self) -> list[int]:
        """The weights' versions."""
        return [weight.tensor._version for weight in self.weights]

    def bind(self) -> None:
        """Points its weights into its slot: a forward begins."""
        self.active += 1
        if self.active > 1:
            return
        assert self.slot is not None
        for weight in self.weights:
            tensor = weight.tensor
            if tensor.data_ptr() != weight.pointer:
                continue  # the program has put it elsewhere: it is used where it is
            view = weight.in_slot(self.slot)
            tensor.data = view
            weight.bound, weight.version = view.data_ptr(), tensor._version

    def unbind(self) -> int:
        """Points its weights into host memory again: a forward has ended. Answers how many it had changed in place."""
        if not self.active:
            return 0  # removed, or never entered
        self.active -= 1
        if self.active:
            return 0
        written = 0
        for number, weight in enumerate(self.weights):
            if not weight.bound:
                continue
            tensor, bound = weight.tensor, weight.bound
            weight.bound = 0
            if tensor.data_ptr() != bound:
                continue  # the forward has put it elsewhere
            version = tensor._version
            if version != weight.version and self.slot is not None:
                with torch.inference_mode(False), torch.no_grad():
                    weight.host.copy_(tensor.data, non_blocking=True)
                self.slot.versions[number] = version
                written += 1
            tensor.data = weight.host
        if self.slot is not None:
            self.slot.record_last_uses()
        return written
