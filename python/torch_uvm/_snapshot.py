"""Memory snapshots: writing them with what our allocator knows besides, and reading them for a report.

A snapshot is PyTorch's: the pickle of `torch.cuda.memory._snapshot()`, which PyTorch's own visualiser opens.
`dump_snapshot` adds one key, "torch_uvm", whose value is made of dicts, lists, strings and numbers only:

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
import stat
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from . import _library
from ._library import Library
from ._schema import KEY, PLACES, VERSION, NotASnapshot, check
from ._unpickle import NotData, loads

if TYPE_CHECKING:
    FileName = Union[str, "os.PathLike[str]"]

#: The newest protocol of pickle that PyTorch's visualiser reads.
PROTOCOL = 4
#: The largest file that is read, in bytes: what is read takes some ten times as much, and a pipe may have no end.
MOST_BYTES = 2 << 30
PART_BYTES = 16 << 20
#: What memory of a segment may be: in use, freed by the program and waiting for streams, cached.
STATES = ("allocated", "waiting", "free")
#: What the functions that only take the stack down are called.
UNWINDING = ("torch::unwind", "torch::CapturedTraceback", "torch::cuda::", "torch_uvm_", "c10::")
#: Letters of a name or a path, and frames of a stack, that are shown.
MOST_LETTERS, MOST_FRAMES = 300, 150
STATE_OF = {"active_allocated": "allocated", "active_awaiting_free": "waiting", "active_pending_free": "waiting"}


def dump_snapshot(filename: FileName = "dump_snapshot.pickle") -> None:
    """Writes a snapshot of PyTorch's CUDA memory as `torch.cuda.memory._dump_snapshot` does, with the places of memory.

    `python -m torch_uvm report` makes a page of it, and PyTorch's visualiser opens it. It tells what happened over time
    where `torch.cuda.memory._record_memory_history()` was called before. With another allocator than ours it is
    PyTorch's snapshot.

    Raises:
        OSError: the file cannot be written.
    """
    import torch

    snapshot = torch.cuda.memory._snapshot()
    library = _library.running()
    if library is not None and library.enabled() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        snapshot[KEY] = _places(library)
    with open(filename, "wb") as file:
        pickle.dump(snapshot, file, protocol=PROTOCOL)


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


def load(path: FileName) -> dict[str, Any]:
    """Reads a snapshot's file, which may come from anybody, in memory and time in proportion to its length.

    Nothing in it is run. What this returns has the types that `_schema` describes.

    Raises:
        OSError: the file cannot be read.
        NotASnapshot: it is something else; says what is wrong, and where.
    """
    with open(path, "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
            raise OSError(None, "it is no file")
        # In parts: a large number of bytes would be allocated before there is one.
        parts: list[bytes] = []
        while sum(map(len, parts)) <= MOST_BYTES and (part := file.read(PART_BYTES)):
            parts.append(part)
    data = b"".join(parts)
    if len(data) > MOST_BYTES:
        raise NotASnapshot(f"it is larger than {MOST_BYTES >> 30} GiB")
    try:
        found = loads(data)
    except NotData as error:
        raise NotASnapshot(str(error)) from error
    return check(found, len(data))


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
    #: The stack of the largest of its allocations, innermost first, as the snapshot has it.
    frames: list[dict[str, Any]] = field(default_factory=list)
    size: int = 0
    count: int = 0
    largest: int = 0
    by_place: dict[str, int] = field(default_factory=dict)

    @property
    def stack(self) -> list[str]:
        """The frames as texts."""
        return [_frame(frame) for frame in self.frames[:MOST_FRAMES]]


class _Owners:
    """The owners of a device's live memory, while they are gathered.

    Many blocks may share a stack and many stacks a frame, so that each stack is named once.
    """

    def __init__(self) -> None:
        self._by_name: dict[str, Owner] = {}
        self._by_stack: dict[int, Owner] = {}

    def add(self, block: dict[str, Any], size: int, place: str) -> None:
        """Books a live block on its owner."""
        frames = block.get("frames", [])
        owner = self._by_stack.get(id(frames))
        if owner is None:
            name = owner_name(frames)
            owner = self._by_name.setdefault(name, Owner(name))
            if frames:  # what the block does not have is a list that does not last
                self._by_stack[id(frames)] = owner
        owner.size += size
        owner.count += 1
        if place:
            owner.by_place[place] = owner.by_place.get(place, 0) + size
        if size > owner.largest:
            owner.largest = size
            owner.frames = frames

    def sorted(self) -> list[Owner]:
        """The largest first."""
        return sorted(self._by_name.values(), key=lambda owner: (-owner.size, owner.name))


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

    def part(self, key: str) -> dict[str, Any]:
        """A dict of our part of the snapshot; empty where there is none."""
        part: dict[str, Any] = (self.ours or {}).get(key, {})
        return part

    @property
    def allocated(self) -> int:
        """Bytes in live blocks."""
        return sum(segment.total("allocated") for segment in self.segments)

    @property
    def reserved(self) -> int:
        """Bytes that the segments hold."""
        return sum(piece.size for segment in self.segments for piece in segment.pieces)


def devices(snapshot: dict[str, Any]) -> list[Device]:
    """The devices that a snapshot says something of. It is one that `load` has read."""
    ours = {one["device"]: one for one in snapshot.get(KEY, {}).get("devices", [])}
    theirs: dict[int, list[dict[str, Any]]] = {}
    for segment in snapshot["segments"]:
        theirs.setdefault(segment.get("device", 0), []).append(segment)
    traces = snapshot["device_traces"]
    used = {index for index, trace in enumerate(traces) if trace}
    found = []
    for index in sorted({*theirs, *ours, *used}):
        segments, owners = _segments(theirs.get(index, []), ours.get(index))
        trace = traces[index] if index < len(traces) else []
        places, history = _samples(ours.get(index)), _history(trace, theirs.get(index, []))
        _from_the_first([timeline for timeline in (places, history) if timeline])
        found.append(Device(index, segments, owners, places, history, ours.get(index)))
    return found


def _segments(theirs: list[dict[str, Any]], ours: dict[str, Any] | None) -> tuple[list[Segment], list[Owner]]:
    """Segments and owners of a device, the largest first.

    Where our part says so, PyTorch's segments are parts of a range.
    """
    ranges = sorted((_range(one) for one in (ours or {}).get("segments", [])), key=lambda one: one.address)
    starts = [one.address for one in ranges]
    others: list[Segment] = []
    owners = _Owners()
    for found in theirs:
        address = found.get("address", 0)
        at = bisect_right(starts, address) - 1
        if at >= 0 and address < ranges[at].address + ranges[at].size:
            segment = ranges[at]
        else:
            segment = Segment(address, found.get("total_size", 0), "", 0, "", False)
            others.append(segment)
        segment.kind = found.get("segment_type", "")
        segment.stream = found.get("stream", 0)
        segment.growing = found.get("is_expandable", False)
        segment.pool = ", ".join(map(str, found.get("segment_pool_id", ())))
        for block in found.get("blocks", []):
            size = block.get("size", 0)
            state = STATE_OF.get(block.get("state", ""), "free")
            segment.pieces.append(Piece(block.get("address", address) - segment.address, size, state))
            if state != "free":
                owners.add(block, size, segment.where)
    for segment in ranges:
        segment.pieces.sort(key=lambda piece: piece.offset)
    found_segments = [*ranges, *others]
    found_segments.sort(key=lambda one: (-sum(piece.size for piece in one.pieces), one.address))
    return found_segments, owners.sorted()


def _range(ours: dict[str, Any]) -> Segment:
    """A segment as our part of the snapshot has it."""
    return Segment(
        address=ours.get("base", 0),
        size=ours.get("range_bytes", 0),
        kind="small" if ours.get("small") else "large",
        stream=0,
        pool=", ".join(map(str, ours.get("pool", ()))),
        growing=ours.get("growing", False),
        place=ours.get("place", ""),
        memory=ours.get("memory", ""),
        populated={place: ours.get(f"populated_{place}", 0) for place in PLACES},
        holes=ours.get("vacant", 0),
    )


def owner_name(frames: list[dict[str, Any]]) -> str:
    """The innermost Python frame of a stack that is not PyTorch's; else the innermost of Python.

    Threads of the backward pass have none: then the operation.
    """
    python = [frame for frame in frames if frame.get("filename", "").endswith(".py")]
    own = (frame for frame in python if not _is_pytorch(_end(frame["filename"])))
    if python:
        return _frame(next(own, python[0]))
    names = [_start(frame.get("name", "")) for frame in frames]
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
    return f"{_end(frame.get('filename', '??'))}:{frame.get('line', 0)} {_start(frame.get('name', '??'))}"


def _start(name: str) -> str:
    """A name, or what can be read of one that many frames may share; that of a C++ template may have any length."""
    return name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 1] + "…"


def _end(path: str) -> str:
    """A path, or the end of one that is longer than any that a file has."""
    return path if len(path) <= MOST_LETTERS else "…" + path[1 - MOST_LETTERS :]


def _samples(ours: dict[str, Any] | None) -> Timeline | None:
    """The timeline by place, in seconds since 1970; None where nothing was recorded."""
    samples = (ours or {}).get("samples", [])
    if not samples:
        return None
    return Timeline(
        [one.get("time_us", 0) / 1e6 for one in samples],
        {name: [one.get(name, 0) for one in samples] for name in (*PLACES, "allocated")},
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
        "reserved": sum(segment.get("total_size", 0) for segment in segments),
        "allocated": sum(segment.get("allocated_size", 0) for segment in segments),
    }
    for entry, name, sign in events:
        level[name] -= sign * entry.get("size", 0)
    seconds: list[float] = []
    series: dict[str, list[int]] = {"reserved": [], "allocated": []}
    for entry, name, sign in events:
        level[name] += sign * entry.get("size", 0)
        seconds.append(entry.get("time_us", 0) / 1e6)
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
    """The same with at most about `most` points: the highest values of each stretch of time, so no peak is lost."""
    count = len(timeline.seconds)
    if count <= most:
        return timeline
    step = -(-count // most)
    starts = range(0, count, step)
    return Timeline(
        [timeline.seconds[start] for start in starts],
        {name: [max(values[start : start + step]) for start in starts] for name, values in timeline.series.items()},
    )


def number_of(value: object) -> int:
    """A figure of our part of the snapshot as a whole number; 0 where it is none."""
    return value if isinstance(value, int) else 0


def file_size(path: FileName) -> int:
    """The bytes of a file."""
    return Path(path).stat().st_size
