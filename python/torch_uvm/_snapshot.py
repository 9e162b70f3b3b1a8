"""Memory snapshots: writing them with what our allocator knows besides, and reading them for a report.

A snapshot is PyTorch's: the pickle of `torch.cuda.memory._snapshot()`, which PyTorch's own visualiser opens. `dump_snapshot`
adds one key, "torch_uvm", whose value is made of dicts, lists, strings and numbers only:

    version   1
    torch     PyTorch's version
    config    the options (torch_uvm.config())
    devices   a list, each: device, name, memory_info (bytes), statistics (torch.cuda.memory_stats()), place_stats,
              segments (ranges of addresses, what is populated of them and where), samples (bytes by place over time)
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from . import _library
from ._library import Library

if TYPE_CHECKING:
    FileName = Union[str, "os.PathLike[str]"]

#: The key that our part of a snapshot has.
KEY = "torch_uvm"
VERSION = 1
#: Where memory may be, in the order in which it is shown.
PLACES = ("device", "host", "unplaced")
#: What memory of a segment may be: in use, freed by the program and waiting for streams, cached.
STATES = ("allocated", "waiting", "free")
#: What the functions that only take the stack down are called.
UNWINDING = ("torch::unwind", "torch::CapturedTraceback", "torch::cuda::", "torch_uvm_", "c10::")
STATE_OF = {"active_allocated": "allocated", "active_awaiting_free": "waiting", "active_pending_free": "waiting"}


def dump_snapshot(filename: FileName = "dump_snapshot.pickle") -> None:
    """Writes a snapshot of PyTorch's CUDA memory, as `torch.cuda.memory._dump_snapshot` does, with the places of memory.

    `python -m torch_uvm report` makes a page of it, and PyTorch's visualiser opens it. What happened over time is in it where
    `torch.cuda.memory._record_memory_history()` was called before. With another allocator than ours it is PyTorch's snapshot.

    Raises:
        OSError: the file cannot be written.
    """
    import torch

    snapshot = torch.cuda.memory._snapshot()
    library = _library.running()
    if library is not None and library.enabled() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        snapshot[KEY] = _places(library)
    with open(filename, "wb") as file:
        pickle.dump(snapshot, file)


def _places(library: Library) -> dict[str, Any]:
    import torch

    from ._report import config

    used = [torch.cuda.memory_stats(device) for device in range(torch.cuda.device_count())]
    current = torch.cuda.current_device()
    return {
        "version": VERSION,
        "torch": str(torch.__version__),  # its own type is not data
        "config": config(),
        "devices": [
            {
                "device": device,
                "name": torch.cuda.get_device_name(device),
                "memory_info": dataclasses.asdict(library.memory_info(device)),
                "statistics": dict(statistics),
                "place_stats": dataclasses.asdict(library.place_stats(device)),
                "segments": [dataclasses.asdict(segment) for segment in library.segments(device)],
                "samples": [dataclasses.asdict(sample) for sample in library.place_samples(device)],
            }
            for device, statistics in enumerate(used)
            # A device that was never used must not get a context for the sake of a snapshot.
            if device == current or statistics.get("reserved_bytes.all.peak", 0)
        ],
    }


class NotASnapshot(ValueError):
    """A file that is no memory snapshot of PyTorch's."""


class _DataOnly(pickle.Unpickler):
    """Reads pickles of built-in containers, numbers and strings, which is all that a snapshot holds; nothing can be called."""

    def find_class(self, module: str, name: str) -> Any:
        raise NotASnapshot(f"it asks for {module}.{name}, and a snapshot holds nothing but data")


def load(path: FileName) -> dict[str, Any]:
    """Reads a snapshot's file. Nothing in it is run.

    Raises:
        OSError: the file cannot be read.
        NotASnapshot: it is something else.
    """
    with open(path, "rb") as file:
        try:
            found = _DataOnly(file).load()
        except NotASnapshot:
            raise
        except Exception as error:  # pickle raises nearly anything for what is no pickle
            raise NotASnapshot(f"it is not a pickle that can be read: {error}") from error
    if not isinstance(found, dict) or not all(
        isinstance(found.get(key), list) for key in ("segments", "device_traces")
    ):
        raise NotASnapshot("it holds no 'segments' and 'device_traces': torch.cuda.memory._dump_snapshot writes them")
    return found


@dataclass(frozen=True)
class Piece:
    """A part of a segment that is all in one state. Bytes."""

    offset: int
    size: int
    state: str


@dataclass
class Segment:
    """A range of addresses and what is in it. Sizes are bytes."""

    address: int
    #: Of address space; what is populated may be less.
    size: int
    #: What PyTorch calls it: small or large.
    kind: str
    stream: int
    pool: str
    growing: bool
    pieces: list[Piece] = field(default_factory=list)
    #: Where our allocator means it to be; empty where the snapshot does not tell.
    place: str = ""
    memory: str = ""
    #: Populated bytes by place.
    populated: dict[str, int] = field(default_factory=dict)
    #: Bytes between live blocks that have been given back.
    holes: int = 0

    @property
    def where(self) -> str:
        """Where its pages are: a place, `mixed`, or empty where the snapshot does not tell."""
        places = [place for place, count in self.populated.items() if count]
        return "mixed" if len(places) > 1 else places[0] if places else self.place

    def total(self, state: str) -> int:
        """The bytes in a state."""
        return sum(piece.size for piece in self.pieces if piece.state == state)


@dataclass
class Owner:
    """Live memory that the same line of the program has allocated. Bytes."""

    name: str
    #: The stack of the largest of its allocations, innermost first.
    stack: list[str] = field(default_factory=list)
    size: int = 0
    count: int = 0
    largest: int = 0
    by_place: dict[str, int] = field(default_factory=dict)


@dataclass
class Timeline:
    """Bytes over time, all lists of the same length."""

    #: Seconds since the first record of the device.
    seconds: list[float]
    series: dict[str, list[int]]


@dataclass
class Device:
    """What a snapshot says of one device."""

    index: int
    segments: list[Segment]
    owners: list[Owner]
    #: What was populated where, at each change of that; None where the snapshot does not tell.
    places: Timeline | None
    #: What was reserved and allocated, from PyTorch's history; None where nothing was recorded.
    history: Timeline | None
    #: Our part of the snapshot; None where there is none.
    ours: dict[str, Any] | None

    @property
    def allocated(self) -> int:
        """Bytes in live blocks."""
        return sum(segment.total("allocated") for segment in self.segments)

    @property
    def reserved(self) -> int:
        """Bytes that the segments hold."""
        return sum(piece.size for segment in self.segments for piece in segment.pieces)


def devices(snapshot: dict[str, Any]) -> list[Device]:
    """The devices that a snapshot says something of."""
    ours = {_number(one.get("device")): one for one in _dicts(_dict(snapshot.get(KEY)).get("devices"))}
    theirs: dict[int, list[dict[str, Any]]] = {}
    for segment in _dicts(snapshot["segments"]):
        theirs.setdefault(_number(segment.get("device")), []).append(segment)
    traces = [_dicts(trace) for trace in snapshot["device_traces"]]
    used = {index for index, trace in enumerate(traces) if trace}
    found = []
    for index in sorted({*theirs, *ours, *used}):
        segments, owners = _segments(theirs.get(index, []), ours.get(index))
        trace = traces[index] if 0 <= index < len(traces) else []
        places, history = _samples(ours.get(index)), _history(trace, theirs.get(index, []))
        _from_the_first([timeline for timeline in (places, history) if timeline])
        found.append(Device(index, segments, owners, places, history, ours.get(index)))
    return found


def _segments(theirs: list[dict[str, Any]], ours: dict[str, Any] | None) -> tuple[list[Segment], list[Owner]]:
    """Segments and owners of a device, the largest first. Where our part says so, PyTorch's segments are parts of a range."""
    ranges = sorted((_range(one) for one in _dicts((ours or {}).get("segments"))), key=lambda one: one.address)
    starts = [one.address for one in ranges]
    others: list[Segment] = []
    owners: dict[str, Owner] = {}
    for found in theirs:
        address = _number(found.get("address"))
        at = bisect_right(starts, address) - 1
        if at >= 0 and address < ranges[at].address + ranges[at].size:
            segment = ranges[at]
        else:
            segment = Segment(address, _number(found.get("total_size")), "", 0, "", False)
            others.append(segment)
        pool = found.get("segment_pool_id")
        segment.kind = str(found.get("segment_type", ""))
        segment.stream = _number(found.get("stream"))
        segment.growing = bool(found.get("is_expandable"))
        segment.pool = ", ".join(map(str, pool)) if isinstance(pool, (tuple, list)) else ""
        for block in _dicts(found.get("blocks")):
            size = _number(block.get("size"))
            state = STATE_OF.get(str(block.get("state")), "free")
            start = _number(block.get("address", address)) - segment.address
            segment.pieces.append(Piece(start, size, state))
            if state != "free":
                _own(owners, block, size, segment.where)
    for segment in ranges:
        segment.pieces.sort(key=lambda piece: piece.offset)
    found_segments = [*ranges, *others]
    found_segments.sort(key=lambda one: (-sum(piece.size for piece in one.pieces), one.address))
    return found_segments, sorted(owners.values(), key=lambda owner: (-owner.size, owner.name))


def _range(ours: dict[str, Any]) -> Segment:
    """A segment as our part of the snapshot has it."""
    return Segment(
        address=_number(ours.get("base")),
        size=_number(ours.get("range_bytes")),
        kind="small" if ours.get("small") else "large",
        stream=0,
        pool=", ".join(map(str, ours["pool"])) if isinstance(ours.get("pool"), (tuple, list)) else "",
        growing=bool(ours.get("growing")),
        place=str(ours.get("place", "")),
        memory=str(ours.get("memory", "")),
        populated={place: _number(ours.get(f"populated_{place}")) for place in PLACES},
        holes=_number(ours.get("vacant")),
    )


def _own(owners: dict[str, Owner], block: dict[str, Any], size: int, place: str) -> None:
    """Books a live block on its owner."""
    frames = _dicts(block.get("frames"))
    name = owner_name(frames)
    owner = owners.setdefault(name, Owner(name))
    owner.size += size
    owner.count += 1
    if place:
        owner.by_place[place] = owner.by_place.get(place, 0) + size
    if size > owner.largest:
        owner.largest = size
        owner.stack = [_frame(frame) for frame in frames]


def owner_name(frames: list[dict[str, Any]]) -> str:
    """The innermost frame of a stack that is the program's own: Python, and not PyTorch's; else the innermost of Python.

    Threads of the backward pass have none: then the operation.
    """
    python = [frame for frame in frames if str(frame.get("filename", "")).endswith(".py")]
    own = [frame for frame in python if not _is_pytorch(str(frame.get("filename", "")))]
    if own or python:
        return _frame((own or python)[0])
    names = [str(frame.get("name", "")) for frame in frames]
    for pattern, remark in (
        (r"torch::autograd::generated::(\w+)::apply", "backward pass"),
        (r"at::_ops::(\w+)::", "C++"),
    ):
        for operation in filter(None, (re.match(pattern, name) for name in names)):
            return f"{operation[1]} ({remark}, no Python frame)"
    return next((name for name in names if name and not name.startswith(UNWINDING)), "no stack recorded")


def _is_pytorch(filename: str) -> bool:
    parts = filename.replace("\\", "/").split("/")
    return "torch" in parts[:-1] or "torch_uvm" in parts[:-1] or "torch/_dynamo" in filename


def _frame(frame: dict[str, Any]) -> str:
    return f"{frame.get('filename', '??')}:{frame.get('line', 0)} {frame.get('name', '??')}"


def _samples(ours: dict[str, Any] | None) -> Timeline | None:
    """The timeline by place, in seconds since 1970; None where nothing was recorded."""
    samples = _dicts((ours or {}).get("samples"))
    if not samples:
        return None
    return Timeline(
        [_number(one.get("time_us")) / 1e6 for one in samples],
        {name: [_number(one.get(name)) for one in samples] for name in (*PLACES, "allocated")},
    )


def _history(trace: list[dict[str, Any]], segments: list[dict[str, Any]]) -> Timeline | None:
    """What is reserved and allocated, from PyTorch's history, in seconds since 1970; None where nothing was recorded.

    The history may have lost its beginning, so it is followed back from what the snapshot shows at its end.
    """
    effects = {
        "alloc": ("allocated", 1),
        "free_requested": ("allocated", -1),
        "segment_alloc": ("reserved", 1),
        "segment_map": ("reserved", 1),
        "segment_free": ("reserved", -1),
        "segment_unmap": ("reserved", -1),
    }
    events = [(entry, *effects[entry["action"]]) for entry in trace if entry.get("action") in effects]
    if not events:
        return None
    level = {
        "reserved": sum(_number(segment.get("total_size")) for segment in segments),
        "allocated": sum(_number(segment.get("allocated_size")) for segment in segments),
    }
    for entry, name, sign in events:
        level[name] -= sign * _number(entry.get("size"))
    seconds: list[float] = []
    series: dict[str, list[int]] = {"reserved": [], "allocated": []}
    for entry, name, sign in events:
        level[name] += sign * _number(entry.get("size"))
        seconds.append(_number(entry.get("time_us")) / 1e6)
        for key, values in series.items():
            values.append(max(level[key], 0))
    return Timeline(seconds, series)


def _from_the_first(timelines: list[Timeline]) -> None:
    """Has all begin to count at the first record of any, and go on to the last."""
    first = min((timeline.seconds[0] for timeline in timelines), default=0)
    last = max((timeline.seconds[-1] for timeline in timelines), default=0)
    for timeline in timelines:
        if timeline.seconds[-1] < last:
            timeline.seconds.append(last)
            for values in timeline.series.values():
                values.append(values[-1])
        timeline.seconds = [second - first for second in timeline.seconds]


def thin(timeline: Timeline, most: int) -> Timeline:
    """The same with at most about `most` points: of each stretch of time the highest values, so that no peak is lost."""
    count = len(timeline.seconds)
    if count <= most:
        return timeline
    step = -(-count // most)
    starts = range(0, count, step)
    return Timeline(
        [timeline.seconds[start] for start in starts],
        {name: [max(values[start : start + step]) for start in starts] for name, values in timeline.series.items()},
    )


def _number(value: object) -> int:
    """A whole number; 0 for anything else, for a snapshot may hold anything."""
    return int(value) if isinstance(value, (int, float)) and abs(value) < 1 << 62 else 0


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _dicts(value: object) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def file_size(path: FileName) -> int:
    """The bytes of a file."""
    return Path(path).stat().st_size
