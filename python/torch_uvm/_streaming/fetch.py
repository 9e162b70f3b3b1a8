"""Copies units into slots before they are used, and says which slot holds a unit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

import torch

from .internals import in_backward
from .order import BACKWARD, FORWARD, START, Order
from .slots import Slot, Slots
from .units import Unit, Weight


@dataclass
class Counts:
    """What a fetcher has done. `torch_uvm.WeightStreamStatistics` says what each means."""

    fetches: int = 0
    bytes_copied: int = 0
    hits: int = 0
    misses: int = 0
    stale: int = 0
    written_back: int = 0


class Fetcher:
    """The units and the slots of one model. Any thread may call it."""

    def __init__(self, device: int, ahead: int, across_passes: bool) -> None:
        """Without units at first: `start` gives them."""
        self._device = device
        self._ahead = ahead
        self._across = across_passes
        self.lock = threading.RLock()
        self.units: list[Unit] = []
        #: None where nothing streams, before it has begun, and after its end.
        self.slots: Optional[Slots] = None
        self.counts = Counts()
        self._order = Order(0)
        # Of the pass that runs.
        self._depth = 0
        self._seen: set[int] = set()
        self._trained = False
        #: Counts demands.
        self._clock = 0

    def start(self, units: list[Unit], slots: Optional[Slots]) -> None:
        """Begins: these stream through these slots."""
        self.units, self.slots, self._order = units, slots, Order(len(units))

    def check_idle(self) -> None:
        """RuntimeError while a forward is running."""
        if any(unit.active for unit in self.units):
            raise RuntimeError("torch_uvm.stream_weights(): remove() while a forward of the model is running")

    def stop(self) -> None:
        """Ends: the slots are given back, and nothing is copied any more. No forward may be running."""
        with self.lock:
            slots, self.slots = self.slots, None
            if slots is None:
                return
            torch.cuda.current_stream(self._device).wait_stream(slots.copies)
            slots.drop_all()
            for unit in self.units:
                unit.host = torch.empty(0)  # pinned memory waits for the device before it goes

    # Passes, and forwards of units

    def begin_model(self) -> None:
        """A forward of the whole model begins."""
        with self.lock:
            self._depth += 1
            if self._depth == 1 and not in_backward() and self.slots is not None:
                self._begin_pass(self.slots, torch.cuda.current_stream(self._device))

    def end_model(self) -> None:
        """It has ended, however."""
        with self.lock:
            self._depth -= 1

    def _begin_pass(self, slots: Slots, stream: torch.cuda.Stream) -> None:
        """From here on weights may differ from before without their versions telling.

        Fused optimizers and whatever writes through `.data` leave a parameter's version as it is. So copies of the last
        pass are not used again, and new ones are ordered behind all that the program has enqueued.
        """
        self._seen.clear()
        self._order.note(START)
        if not self._across or self._trained:
            for slot in slots.all:
                if slot.unit is not None and not self.units[slot.unit].active:
                    self.counts.stale += slot.used == 0
                    self._invalidate(slot)
            slots.copies.wait_stream(stream)
        self._trained = False

    def begin_units(self, units: list[Unit]) -> None:
        """A forward begins that uses these units: the current stream waits until they are on the device."""
        stream = self._stream_of_caller()
        with self.lock:
            slots = self.slots
            if slots is None:
                return
            entered = []
            try:
                for unit in units:
                    if not self._depth and unit.number in self._seen and not in_backward():
                        self._begin_pass(slots, stream)
                    self._seen.add(unit.number)
                    self._trained |= torch.is_grad_enabled()
                    self._demand(slots, unit, FORWARD, stream)
                    unit.bind()
                    entered.append(unit)
                self._prefetch(slots, stream, units)
            except BaseException:
                self._unbind(entered)
                raise

    def end_units(self, units: list[Unit]) -> None:
        """The forward has ended, however."""
        with self.lock:
            self._unbind(units)
        if units and torch.is_autocast_enabled("cuda"):
            # It keeps a copy of each weight that it has converted, on the device.
            torch.clear_autocast_cache()

    def _unbind(self, units: list[Unit]) -> None:
        for unit in units:
            self.counts.written_back += unit.unbind()
        if self.slots is not None:
            self.slots.trim()

    def view_for_backward(
        self, unit: Unit, weight: Weight, view: Callable[[Slot], torch.Tensor]
    ) -> Optional[torch.Tensor]:
        """A view of the slot with a unit, for the backward pass; None where the weight is to be read where it is."""
        with self.lock:
            if self.slots is None or not weight.is_where_we_put_it():
                return None
            stream = self._stream_of_caller()
            found = view(self._demand(self.slots, unit, BACKWARD, stream))
            self._prefetch(self.slots, stream, [unit])
            return found

    # Copies

    def _demand(self, slots: Slots, unit: Unit, phase: str, stream: torch.cuda.Stream) -> Slot:
        """The slot with the unit, on which `stream` waits."""
        slots.record_last_uses()
        self._clock += 1
        new = self._order.note((unit.number, phase))
        slot = unit.slot
        if slot is not None and not unit.active and slot.versions != unit.versions_now():
            self.counts.stale += 1
            self._invalidate(slot)
            slot = None
        if slot is None:
            slot = slots.least_recently_used((unit.number, *self._upcoming()))
            if slot is None:
                slot = slots.least_recently_used(())
            if slot is None:
                slot = slots.replace(lambda slot: slot.unit is not None and self.units[slot.unit].active > 0)
            self._fetch(slots, unit, slot, stream)
            self.counts.misses += 1
        else:
            self.counts.hits += new
        slot.used = self._clock
        slot.ready_on(stream)
        return slot

    def _prefetch(self, slots: Slots, stream: torch.cuda.Stream, using: list[Unit]) -> None:
        """Begins to copy the units that will be used next, as far as there are slots."""
        upcoming = self._upcoming()
        keep = {*upcoming, *(unit.number for unit in using)}
        for number in upcoming:
            unit = self.units[number]
            if unit.slot is not None:
                if unit.active or unit.slot.versions == unit.versions_now():
                    continue
                self.counts.stale += 1
                self._invalidate(unit.slot)
            slot = slots.least_recently_used(keep)
            if slot is None:
                return
            self._fetch(slots, unit, slot, stream)

    def _upcoming(self) -> list[int]:
        return self._order.upcoming(self._ahead, self._across and not self._trained)

    def _fetch(self, slots: Slots, unit: Unit, slot: Slot, stream: torch.cuda.Stream) -> None:
        if slot.unit is not None:
            self._invalidate(slot)
        versions = unit.versions_now()
        if versions != unit.versions:
            # Written since the last time, by work that the program has enqueued.
            slots.copies.wait_stream(stream)
        unit.versions = versions
        slot.fill(unit.host, slots.copies)
        slot.unit, slot.versions, slot.used = unit.number, list(versions), 0
        unit.slot = slot
        self.counts.fetches += 1
        self.counts.bytes_copied += unit.bytes

    def _invalidate(self, slot: Slot) -> None:
        if slot.unit is not None:
            self.units[slot.unit].slot = None
        slot.unit = None

    def _stream_of_caller(self) -> torch.cuda.Stream:
        stream = torch.cuda.current_stream(self._device)
        with torch.cuda.device(self._device):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "torch_uvm.stream_weights(): a CUDA graph is being captured, and a graph cannot hold weights that "
                    "move between slots. Call remove() before the capture, or capture nothing of this model"
                )
        return stream
