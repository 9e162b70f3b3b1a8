"""What the library answers, as Python has it."""

from __future__ import annotations

from dataclasses import dataclass

from . import _tables
from ._format import format_bytes


class MemoryInfo(_tables.MemoryInfo):
    """One device's memory as the allocator sees it at this moment. All numbers are bytes."""

    def __str__(self) -> str:
        size = format_bytes
        unplaced = f", {size(self.populated_unplaced)} where the driver keeps it" if self.populated_unplaced else ""
        return (
            f"capacity {size(self.capacity)}, free {size(self.free)}\n"
            f"reserved {size(self.reserved)}, of it allocated {size(self.allocated)}; "
            f"{size(self.populated_device)} on the device, {size(self.populated_host)} in host memory{unplaced}\n"
            f"device: {size(self.device_free)} free of {size(self.device_total)}, limit {size(self.device_limit)}\n"
            f"host: {size(self.host_available)} available of {size(self.host_total)}, reserve "
            f"{size(self.host_reserve)}"
        )


class PlaceStats(_tables.PlaceStats):
    """What is populated where on one device, and what moved. Numbers are bytes, unless they are counts.

    The books know what this process was asked to do; what the driver moves by itself at a page fault they do not see.
    """


@dataclass(frozen=True)
class SegmentPlace(_tables.SegmentPlace):
    """A segment, and where its pages lie. Sizes in bytes."""

    pool: tuple[int, int]
    """The pool it belongs to; (0, 0) is the default pool."""


PlaceSample = _tables.PlaceSample
