"""What a snapshot's parts must be: one description, and the look at all of a snapshot by it.

Missing keys are no fault, since each version of PyTorch has others, and keys that are not known are not looked at.
What has passed has the types that are described here, and its numbers are within the bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

#: The key that our part of a snapshot has, and the version of that part.
KEY = "torch_uvm"
VERSION = 1
#: Where memory may be, in the order in which it is shown.
PLACES = ("device", "host", "unplaced")


class NotASnapshot(ValueError):
    """A file that is no memory snapshot of PyTorch's."""


class _Wrong(Exception):
    """What is wrong; the path to it grows on the way out."""

    def __init__(self, fault: str) -> None:
        super().__init__(fault)
        self.fault = fault
        self.path: list[str] = []


@dataclass
class Look:
    """One look at a snapshot."""

    #: How many parts it may have: each takes a byte of its file at least, so that more are the same ones again.
    most: int
    parts: int = 0
    #: The stacks that were looked at: many blocks share one. By `id`.
    stacks: set[int] = field(default_factory=set)

    def count(self, parts: int) -> None:
        """Takes note of some parts."""
        self.parts += parts
        if self.parts > self.most:
            raise _Wrong("has more parts than the file has bytes: it holds the same ones again and again")


class Kind:
    """What a part must be."""

    def look(self, value: object, look: Look) -> None:
        """Raises _Wrong where it is something else."""
        raise NotImplementedError


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number. Sizes and times are below 2**62, so that sums of a few fit 64 bits."""

    least: int = 0
    most: int = (1 << 62) - 1

    def look(self, value: object, look: Look) -> None:
        if not isinstance(value, int) or not self.least <= value <= self.most:
            among = f"a whole number from {self.least} to {self.most}" if self.least < self.most else str(self.least)
            raise _Wrong(f"is {brief(value)}: expected {among}")


@dataclass(frozen=True)
class Text(Kind):
    """A text; one of a few, where those are given."""

    allowed: tuple[str, ...] = ()

    def look(self, value: object, look: Look) -> None:
        if not isinstance(value, str):
            raise _Wrong(f"is {brief(value)}: expected a text")
        if self.allowed and value not in self.allowed:
            raise _Wrong(f"is {brief(value)}: expected one of: {', '.join(self.allowed)}")


@dataclass(frozen=True)
class Truth(Kind):
    """True or False."""

    def look(self, value: object, look: Look) -> None:
        if not isinstance(value, bool):
            raise _Wrong(f"is {brief(value)}: expected True or False")


@dataclass(frozen=True)
class Value(Kind):
    """Something to be shown: a text, a number, True, False or None."""

    def look(self, value: object, look: Look) -> None:
        finite = isinstance(value, (str, int, type(None))) or (isinstance(value, float) and math.isfinite(value))
        if not finite:
            raise _Wrong(f"is {brief(value)}: expected a text, a number, True, False or None")


@dataclass(frozen=True)
class Items(Kind):
    """A list."""

    kind: Kind
    most: int | None = None
    #: Many parts may have the same one: it is looked at once.
    shared: bool = False

    def look(self, value: object, look: Look) -> None:
        if not isinstance(value, list):
            raise _Wrong(f"is {brief(value)}: expected a list")
        if self.most is not None and len(value) > self.most:
            raise _Wrong(f"has {len(value)} items: expected at most {self.most}")
        if self.shared:
            if id(value) in look.stacks:
                return
            look.stacks.add(id(value))
        look.count(len(value))
        for index, item in enumerate(value):
            try:
                self.kind.look(item, look)
            except _Wrong as wrong:
                wrong.path.append(f"[{index}]")
                raise


@dataclass(frozen=True)
class Pool(Kind):
    """A pool's number: a pair of whole numbers."""

    def look(self, value: object, look: Look) -> None:
        whole = isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(one, int) for one in value)
        if not whole:
            raise _Wrong(f"is {brief(value)}: expected two whole numbers")


@dataclass(frozen=True)
class Fields(Kind):
    """A dict with these keys, or some of them."""

    known: dict[str, Kind]
    #: Those that must be there.
    needed: tuple[str, ...] = ()

    def look(self, value: object, look: Look) -> None:
        if not isinstance(value, dict):
            raise _Wrong(f"is {brief(value)}: expected a dict")
        for key in self.needed:
            if key not in value:
                raise _Wrong(f"has no {key!r}")
        for key, kind in self.known.items():
            if key not in value:
                continue
            try:
                kind.look(value[key], look)
            except _Wrong as wrong:
                wrong.path.append(f".{key}")
                raise


@dataclass(frozen=True)
class Values(Kind):
    """A dict of any keys, all of whose values are shown."""

    most: int = 1000

    def look(self, value: object, look: Look) -> None:
        if not isinstance(value, dict):
            raise _Wrong(f"is {brief(value)}: expected a dict")
        if len(value) > self.most:
            raise _Wrong(f"has {len(value)} items: expected at most {self.most}")
        for key, item in value.items():
            try:
                Value().look(item, look)
            except _Wrong as wrong:
                wrong.path.append(f"[{brief(key)}]")
                raise


_SIZE = Whole()
#: PyTorch counts devices in a signed byte.
_DEVICE = Whole(0, 127)
_DEVICES = 128
_ADDRESS = Whole(0, (1 << 64) - 1)
_STREAM = Whole(-(1 << 63), (1 << 64) - 1)
_FRAME = Fields({"filename": Text(), "line": Whole(-(1 << 63), (1 << 63) - 1), "name": Text()})
_BLOCK = Fields({"address": _ADDRESS, "size": _SIZE, "state": Text(), "frames": Items(_FRAME, shared=True)})
_SEGMENT = Fields(
    {
        "device": _DEVICE,
        "address": _ADDRESS,
        "total_size": _SIZE,
        "allocated_size": _SIZE,
        "segment_type": Text(),
        "stream": _STREAM,
        "segment_pool_id": Pool(),
        "is_expandable": Truth(),
        "blocks": Items(_BLOCK),
    }
)
_EVENT = Fields({"action": Text(), "size": _SIZE, "time_us": _SIZE})
_OUR_SEGMENT = Fields(
    {
        "base": _ADDRESS,
        "range_bytes": _SIZE,
        "vacant": _SIZE,
        "place": Text(PLACES),
        "memory": Text(),
        **{f"populated_{place}": _SIZE for place in PLACES},
        "small": Truth(),
        "growing": Truth(),
        "pool": Pool(),
    }
)
_OUR_DEVICE = Fields(
    {
        "device": _DEVICE,
        "name": Text(),
        "memory_info": Values(),
        "statistics": Values(),
        "place_stats": Values(),
        "segments": Items(_OUR_SEGMENT),
        "samples": Items(Fields({"time_us": _SIZE, "allocated": _SIZE, **dict.fromkeys(PLACES, _SIZE)})),
    },
    needed=("device",),
)
_OURS = Fields(
    {"version": Whole(VERSION, VERSION), "torch": Text(), "config": Values(), "devices": Items(_OUR_DEVICE, _DEVICES)}
)
_SNAPSHOT = Fields(
    {
        "segments": Items(_SEGMENT),
        "device_traces": Items(Items(_EVENT), _DEVICES),
        "allocator_settings": Fields({"PYTORCH_CUDA_ALLOC_CONF": Text()}),
        KEY: _OURS,
    }
)


def check(found: object, file_bytes: int) -> dict[str, Any]:
    """A snapshot that has passed the look. `file_bytes` bounds how many parts it may have.

    Raises:
        NotASnapshot: says what is wrong, and where.
    """
    if not isinstance(found, dict) or not all(
        isinstance(found.get(key), list) for key in ("segments", "device_traces")
    ):
        raise NotASnapshot("it holds no 'segments' and 'device_traces': torch.cuda.memory._dump_snapshot writes them")
    try:
        _SNAPSHOT.look(found, Look(file_bytes))
    except _Wrong as wrong:
        path = "".join(reversed(wrong.path)).lstrip(".")
        raise NotASnapshot(f"{path} {wrong.fault}") from None
    return found


def brief(value: object) -> str:
    """A value in a few words. Containers are not written out: what they hold may be without an end."""
    if value is None or isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, (str, bytes)):
        return ascii(value[:60]) + ("…" if len(value) > 60 else "")
    return f"a {type(value).__name__}"
