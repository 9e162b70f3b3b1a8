"""Device memory that weights are copied into before they are used, and the stream that copies.

A slot is overwritten only when nobody holds its memory any more, and not before all work that was given it is done.
Both are known without waiting for the device: the first from the number of tensors that share its storage, the second
from events that the copying stream waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Optional

import torch

from .._pools import placement
from .internals import new_event, new_stream
from .owners import Owners


class Slot:
    """Some plain device memory and what it holds."""

    def __init__(self, size: int, device: int) -> None:
        """`size` bytes on a device. torch.cuda.OutOfMemoryError where there are not so many."""
        # Not a tensor of inference mode, whatever the caller runs in: it is written later in any mode.
        with torch.inference_mode(False), placement("device", device):
            self.buffer = torch.empty(size, dtype=torch.uint8, device=torch.device("cuda", device))
        self._owners = Owners(self.buffer)
        self.pointer = self.buffer.data_ptr()
        self._typed: dict[torch.dtype, torch.Tensor] = {}
        #: Number of the unit whose weights it holds; None for no valid contents.
        self.unit: Optional[int] = None
        #: The weights' versions when they were copied.
        self.versions: list[int] = []
        #: Recorded behind the copy into it.
        self.ready = new_event()
        #: When it was last asked for, on a clock that counts demands.
        self.used = 0
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._events: dict[int, tuple[torch.cuda.Stream, torch.cuda.Event]] = {}
        self._pending: list[torch.cuda.Event] = []

    def idle(self) -> bool:
        """Whether no tensor but our own shares its memory."""
        return self._owners.alone()

    def view(self, dtype: torch.dtype, shape: Iterable[int], stride: Iterable[int], offset: int) -> torch.Tensor:
        """A tensor in it; `offset` in elements."""
        typed = self._typed.get(dtype)
        if typed is None:
            with torch.inference_mode(False):
                whole = self.buffer.numel() // dtype.itemsize * dtype.itemsize
                typed = self._typed[dtype] = self.buffer[:whole].view(dtype)
            self._owners.one_more()
        return torch.as_strided(typed, shape, stride, offset)  # type: ignore[arg-type]

    def ready_on(self, stream: torch.cuda.Stream) -> None:
        """Makes `stream` wait until its contents are there. They are used on that stream from now on."""
        stream.wait_event(self.ready)
        self._streams[stream.cuda_stream] = stream

    def record_last_uses(self) -> None:
        """If nobody holds it any more, notes where the streams that used it are now: later work of theirs is no use."""
        if not self._streams or not self.idle():
            return
        for key, stream in self._streams.items():
            if key not in self._events:
                self._events[key] = stream, new_event()
            event = self._events[key][1]
            event.record(stream)
            self._pending.append(event)
        self._streams.clear()

    def fill(self, contents: torch.Tensor, copies: torch.cuda.Stream) -> None:
        """Copies bytes into it, behind everything that used it. It must be idle."""
        self.record_last_uses()
        for event in self._pending:
            copies.wait_event(event)
        self._pending.clear()
        with torch.cuda.stream(copies):
            self.buffer[: contents.numel()].copy_(contents, non_blocking=True)
        self.ready.record(copies)

    def leave_to_holders(self, copies: torch.cuda.Stream) -> None:
        """Leaves it to those who hold it: the allocator has it back when they are done, on all streams that used it."""
        self.buffer.record_stream(copies)
        for stream in self._streams.values():
            self.buffer.record_stream(stream)
        for stream, _ in self._events.values():
            self.buffer.record_stream(stream)


class Slots:
    """The slots of one model."""

    def __init__(self, count: int, size: int, device: int) -> None:
        """Makes them all. torch.cuda.OutOfMemoryError where there is too little memory."""
        self._count = count
        self._size = size
        self._device = device
        self.copies = new_stream(device)
        self.all = [Slot(size, device) for _ in range(count)]
        self._by_pointer = {slot.pointer: slot for slot in self.all}
        #: How many slots were made beyond the first ones, since others held those.
        self.replaced = 0

    def containing(self, tensor: torch.Tensor) -> Optional[Slot]:
        """The slot that a tensor lies in."""
        if not tensor.is_cuda or tensor.layout != torch.strided:
            return None
        try:
            pointer = tensor.untyped_storage().data_ptr()
        except (RuntimeError, NotImplementedError):  # a tensor subclass without a storage
            return None
        return self._by_pointer.get(pointer)

    def record_last_uses(self) -> None:
        """`Slot.record_last_uses` for all."""
        for slot in self.all:
            slot.record_last_uses()

    def least_recently_used(self, keep: Any) -> Optional[Slot]:
        """The idle slot that was used longest ago, of those whose unit is not in `keep`; None if there is none."""
        found: Optional[Slot] = None
        for slot in self.all:
            if slot.unit is not None and slot.unit in keep:
                continue
            if (found is None or slot.unit is None or slot.used < found.used) and slot.idle():
                found = slot
                if slot.unit is None:
                    break
        return found

    def replace(self, in_use: Callable[[Slot], bool]) -> Slot:
        """A new slot, in the place of one that somebody else holds. Where all are in use it is one more."""
        held = [slot for slot in self.all if not in_use(slot)]
        if held:
            self.drop(min(held, key=lambda slot: slot.used))
        slot = Slot(self._size, self._device)
        self.all.append(slot)
        self._by_pointer[slot.pointer] = slot
        self.replaced += 1
        return slot

    def trim(self) -> None:
        """Gives back idle slots beyond the number that was asked for."""
        while len(self.all) > self._count:
            slot = self.least_recently_used(())
            if slot is None:
                return
            self.drop(slot)

    def drop(self, slot: Slot) -> None:
        """Forgets a slot."""
        slot.leave_to_holders(self.copies)
        self.all.remove(slot)
        del self._by_pointer[slot.pointer]

    def drop_all(self) -> None:
        """Forgets all."""
        for slot in list(self.all):
            self.drop(slot)
