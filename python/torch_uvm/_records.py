"""What the library answers, and its C structures: apart, because making these types takes milliseconds."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields

from ._library import size


@dataclass(frozen=True)
class MemoryInfo:
    """One device's memory as the allocator sees it at this moment. All numbers are bytes."""

    capacity: int
    """Hard cap on what this process may populate, on the device and beside it."""
    free: int
    """`capacity` less what is populated and what others hold: what `torch.accelerator.get_memory_info` answers."""
    populated_device: int
    """Populated by this process and meant to live on the GPU."""
    populated_host: int
    """Populated by this process in host memory."""
    populated_unplaced: int
    """Populated by this process, wherever the driver moves it (`balanced`)."""
    allocated: int
    """In live allocations."""
    reserved: int
    """Populated in all, cached memory included."""
    device_limit: int
    """Soft limit on `populated_device`."""
    device_total: int
    """The device's memory, as CUDA says."""
    device_free: int
    """Of it free for everyone, as CUDA says. It rises only when managed memory is freed, not when it moves out."""
    host_total: int
    """The machine's memory, or its cgroup's limit where that is less."""
    host_available: int
    """Of it available now."""
    host_reserve: int
    """Of it left to everyone else."""

    def __str__(self) -> str:
        unplaced = f", {size(self.populated_unplaced)} where the driver keeps it" if self.populated_unplaced else ""
        return (
            f"capacity {size(self.capacity)}, free {size(self.free)}\n"
            f"reserved {size(self.reserved)}, of it allocated {size(self.allocated)}; "
            f"{size(self.populated_device)} on the device, {size(self.populated_host)} in host memory{unplaced}\n"
            f"device: {size(self.device_free)} free of {size(self.device_total)}, limit {size(self.device_limit)}\n"
            f"host: {size(self.host_available)} available of {size(self.host_total)}, reserve "
            f"{size(self.host_reserve)}"
        )


#: How many numbers `torch_uvm_memory_info_t` has: the fields of MemoryInfo in their order, 64 bits each.
MEMORY_INFO_NUMBERS = len(fields(MemoryInfo))


@dataclass(frozen=True)
class PlaceStats:
    """What is populated where on one device, and what moved. Numbers are bytes, unless they are counts.

    The books know what this process was asked to do; what the driver moves by itself at a page fault they do not see. The
    fields are those of `torch_uvm_place_stats_t`, in its order.
    """

    populated_device: int
    """Populated on the GPU."""
    populated_device_peak: int
    """The most of it since peaks were reset (`torch.cuda.reset_peak_memory_stats`)."""
    populated_host: int
    """Populated in host memory."""
    populated_host_peak: int
    """The most of it since peaks were reset."""
    populated_unplaced: int
    """Populated wherever the driver moves it (`balanced`)."""
    populated_unplaced_peak: int
    """The most of it since peaks were reset."""
    moved_to_device: int
    """Bytes, in use or cached, that hints and the allocator moved to the device."""
    moved_to_host: int
    """The same to the host."""
    discarded: int
    """Bytes whose contents were dropped, by hints and by the allocator."""
    prefetches: int
    """Count of hints: `prefetch`."""
    advices: int
    """Count of hints: `advise`."""
    discards: int
    """Count of hints: `discard`."""
    stage: int
    """0: there is room on the device. 1: it is nearly full, cached memory is given back first. 2: the device limit is met."""
    stage_changes: int
    """How often that changed."""
    light_reclamations: int
    """How often cached memory was given back because the device was nearly full."""
    hard_reclamations: int
    """How often live memory was moved out, or all caches were given back."""
    reclaimed: int
    """Bytes that those gave."""
    moves_out: int
    """Count of live allocations that were moved to the host to make room."""
    moved_out: int
    """Bytes of them."""
    regrets: int
    """Count of those that were freed soon after."""


@dataclass(frozen=True)
class SegmentPlace:
    """A segment, and where its pages lie. Sizes in bytes."""

    base: int
    """Address of the first byte."""
    range_bytes: int
    """Address space."""
    filled: int
    """From its start, what blocks fill, holes included."""
    vacant: int
    """Of that, holes: memory that was given back."""
    discarded_end: int
    """Given back beyond `filled`."""
    populated_device: int
    """Populated on the GPU."""
    populated_host: int
    """Populated in host memory."""
    populated_unplaced: int
    """Populated wherever the driver moves it."""
    place: str
    """Where it is meant to live: `device`, `host`, or `unplaced`. Its pages may have been moved."""
    memory: str
    """`managed`, `device` (plain device memory), or `custom` (a MemPool's own allocator)."""
    small: bool
    """Of blocks of at most 1 MiB."""
    growing: bool
    """Populated from its start as blocks need it."""
    pool: tuple[int, int]
    """The pool it belongs to; (0, 0) is the default pool."""


@dataclass(frozen=True)
class PlaceSample:
    """What was populated where at one moment. Sizes in bytes."""

    time_us: int
    """Microseconds since 1970, as in snapshots."""
    device: int
    """On the GPU."""
    host: int
    """In host memory."""
    unplaced: int
    """Wherever the driver moves it."""
    allocated: int
    """In live allocations."""


class SegmentStruct(ctypes.Structure):
    """`torch_uvm_segment_t`."""

    _NUMBERS = (
        "base",
        "range_bytes",
        "filled",
        "vacant",
        "discarded_end",
        "populated_device",
        "populated_host",
        "populated_unplaced",
        "pool_first",
        "pool_second",
    )
    _SMALL = ("memory", "place", "is_small", "growing")
    _fields_ = [(name, ctypes.c_uint64) for name in _NUMBERS] + [(name, ctypes.c_int32) for name in _SMALL]

    def record(self) -> SegmentPlace:
        """As Python has it."""
        return SegmentPlace(
            **{name: getattr(self, name) for name in self._NUMBERS if not name.startswith("pool")},
            place=("device", "host", "unplaced")[self.place],
            memory=("managed", "device", "custom")[self.memory],
            small=bool(self.is_small),
            growing=bool(self.growing),
            pool=(self.pool_first, self.pool_second),
        )


class SampleStruct(ctypes.Structure):
    """`torch_uvm_place_sample_t`."""

    _fields_ = [("time_us", ctypes.c_int64)] + [
        (name, ctypes.c_uint64) for name in ("device", "host", "unplaced", "allocated")
    ]

    def record(self) -> PlaceSample:
        """As Python has it."""
        return PlaceSample(self.time_us, self.device, self.host, self.unplaced, self.allocated)
