"""Which weights of a model stream and which stay: decides, moves nothing.

A unit is what is fetched at once: an element of a ModuleList or Sequential, or a module that has parameters and lies in
none. Units are found here, and those that stay on the device are chosen here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import nn

from .extents import Extent, bytes_of, extents_of

MIB = 1 << 20
#: Units smaller than this stay on the device: a copy of them costs more than their memory is worth.
SMALLEST = MIB
#: Where parameters begin in a slot and in host memory: multiples of what the allocator rounds to.
ALIGNMENT = 512
#: Elements of these are units.
CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
#: Modules that read few rows of their weight: it is cheaper to read those rows where they lie than to copy all of them.
READ_BY_ROWS = (nn.Embedding, nn.EmbeddingBag)


@dataclass
class Group:
    """Weights that are in one place and, where they stream, are fetched together."""

    name: str
    #: The modules whose forward uses them; none where nothing is to be fetched for them.
    modules: list[nn.Module]
    extents: list[Extent]
    #: Bytes in a slot.
    bytes: int = 0

    def __post_init__(self) -> None:
        self.bytes = sum(aligned(extent.nbytes) for extent in self.extents)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters in its extents."""
        return [parameter for extent in self.extents for parameter in extent.weights()]


@dataclass
class Groups:
    """A model's parameters, each in one group. Those whose memory is held outside the model are in none."""

    #: In the order of the modules: may stream.
    units: list[Group] = field(default_factory=list)
    #: Small ones: stay on the device.
    small: list[Group] = field(default_factory=list)
    #: Of modules that hold other units, and tables that are read by rows: on the device if there is room, else read
    #: where they lie.
    others: list[Group] = field(default_factory=list)


@dataclass(frozen=True)
class Choice:
    """What stays on the device."""

    #: Indices into `Groups.units`.
    resident: frozenset[int]
    #: Indices into `Groups.others`.
    others: frozenset[int]
    #: Bytes of one slot; 0 where nothing streams.
    slot_bytes: int
    #: Slots to be made.
    slots: int


def aligned(count: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def group(model: nn.Module, largest: Optional[int] = None, extents: Optional[list[Extent]] = None) -> Groups:
    """Divides a model's parameters, with the buffers that share memory with them.

    An element of a container that has more than `largest` bytes is divided further, where its modules allow it.
    `extents` are the model's, if they are known already.
    """
    extents = extents_of(model) if extents is None else extents
    extent_of = {
        tensor: extent
        for extent in extents
        if extent.weights() and not extent.held_outside
        for tensor in extent.tensors
    }
    users: dict[Extent, list[int]] = {}
    named: list[tuple[str, nn.Module, str]] = []
    for name, module, kind, tensors in _divide(model, "", False, largest, set()):
        used = {extent_of[tensor]: None for tensor in tensors if tensor in extent_of}
        if not used:
            continue
        for extent in used:
            users.setdefault(extent, []).append(len(named))
        named.append((name, module, kind))
    # Shared memory belongs to those that would stream it: a table that is also a head is the head's.
    shared: dict[tuple[int, ...], list[Extent]] = {}
    groups = Groups()
    for extent, used_by in users.items():
        streaming = [index for index in used_by if named[index][2] == "unit"]
        if extent.shared and largest is not None and extent.nbytes > 2 * largest:
            # Such as a buffer that all weights are views of. Slots for it would not fit.
            groups.others.append(Group(" & ".join(extent.names), [], [extent]))
        else:
            shared.setdefault(tuple(streaming or used_by), []).append(extent)
    for indices in sorted(shared):
        members = [named[index] for index in indices]
        found = Group(
            " & ".join(name or "(model)" for name, _, _ in members), [m for _, m, _ in members], shared[indices]
        )
        if found.bytes < SMALLEST:
            groups.small.append(found)
        elif members[0][2] == "unit":
            groups.units.append(found)
        else:
            groups.others.append(found)
    return groups


def _divide(
    module: nn.Module, name: str, is_element: bool, largest: Optional[int], seen: set[nn.Module]
) -> Iterator[tuple[str, nn.Module, str, list[torch.Tensor]]]:
    """(name, module, kind, parameters and buffers) of each unit, in order. The kind is `unit` or `other`."""
    if module in seen:
        return
    seen.add(module)
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    children = [(child_name, child) for child_name, child in module.named_children()]
    with_parameters = [child for _, child in children if next(child.parameters(), None) is not None]
    is_container = isinstance(module, CONTAINERS)
    is_list = isinstance(module, (nn.ModuleList, nn.ModuleDict))  # they have no forward
    if (is_element and not is_list) or not with_parameters:
        size = sum(bytes_of(parameter) for parameter in module.parameters())
        if not with_parameters or largest is None or size <= largest:
            seen.update(module.modules())
            rows = isinstance(module, READ_BY_ROWS)
            yield name, module, "other" if rows else "unit", [*module.parameters(), *module.buffers()]
            return
    if own:
        # Its forward holds those of its children: it would keep a slot all the while.
        yield name, module, "other", own
    for child_name, child in children:
        yield from _divide(child, f"{name}.{child_name}" if name else child_name, is_container, largest, seen)


def choose(groups: Groups, device_bytes: int, ahead: int) -> Optional[Choice]:
    """What stays within `device_bytes`, slots included, so that the fewest bytes stream. None where that cannot be.

    A slot holds the largest unit that streams, so a few large units are better kept. Of the others those that stay are
    spread evenly: while one of them computes, the next one that streams is copied.
    """
    units = groups.units
    budget = device_bytes - sum(small.bytes for small in groups.small)
    total = sum(unit.bytes for unit in units)
    if budget >= total:
        return _with_others(groups, frozenset(range(len(units))), budget - total, 0, 0)
    best: Optional[tuple[int, frozenset[int], int]] = None
    for slot in sorted({unit.bytes for unit in units}):
        must = [index for index, unit in enumerate(units) if unit.bytes > slot]
        left = budget - (ahead + 1) * slot - sum(units[index].bytes for index in must)
        if left < 0:
            continue
        resident = frozenset(must) | _spread(units, left, frozenset(must))
        streamed = total - sum(units[index].bytes for index in resident)
        if best is None or streamed < best[0]:
            best = streamed, resident, slot
    if best is None:
        return None
    streamed, resident, slot = best
    left = budget - (ahead + 1) * slot - (total - streamed)
    return _with_others(groups, resident, left, slot, ahead + 1)


def _spread(units: list[Group], budget: int, apart: frozenset[int]) -> frozenset[int]:
    """Units of at most `budget` bytes in all, as evenly among the rest as their sizes allow; none of `apart`."""
    candidates = [index for index in range(len(units)) if index not in apart]
    total = sum(units[index].bytes for index in candidates)
    chosen = set()
    left, owed = budget, 0
    for index in candidates:
        size = units[index].bytes
        owed += size * budget
        if owed >= size * total and size <= left:
            owed -= size * total
            left -= size
            chosen.add(index)
    for index in candidates:  # what the sizes have left over
        if index not in chosen and units[index].bytes <= left:
            left -= units[index].bytes
            chosen.add(index)
    return frozenset(chosen)


def _with_others(groups: Groups, resident: frozenset[int], left: int, slot: int, slots: int) -> Choice:
    """Adds what of `others` fits, the smallest first."""
    others = set()
    for index in sorted(range(len(groups.others)), key=lambda index: groups.others[index].bytes):
        if groups.others[index].bytes <= left:
            left -= groups.others[index].bytes
            others.add(index)
    return Choice(resident, frozenset(others), slot, slots)


def bytes_needed(groups: Groups, ahead: int) -> int:
    """The least `device_bytes` with which `choose` finds something that stays."""
    sizes = [unit.bytes for unit in groups.units]
    streaming = [(ahead + 1) * slot + sum(size for size in sizes if size > slot) for slot in set(sizes)]
    return sum(small.bytes for small in groups.small) + min([sum(sizes), *streaming])
