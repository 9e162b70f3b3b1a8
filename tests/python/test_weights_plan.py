"""Which weights stream, which stay and in which order they come: decisions, without a device."""

from __future__ import annotations

import torch
from contents import MIB, same
from streamed import (
    SIDE,
)
from torch import nn
from under_test import torch_uvm

from torch_uvm._streaming.order import BACKWARD, FORWARD, START, Order
from torch_uvm._streaming.plan import Group, Groups, choose, group


def test_the_first_names_are_still_there() -> None:
    """`stream` means something else in CUDA; programs that were written with it go on."""
    from torch_uvm import _stream

    assert torch_uvm.stream is torch_uvm.stream_weights is _stream.stream
    assert _stream.Stream is torch_uvm.WeightStream and _stream.StreamStatistics is torch_uvm.WeightStreamStatistics


def groups_of(*sizes: int) -> Groups:
    """Units of so many MiB."""
    units = []
    for size in sizes:
        unit = Group("unit", [], [])
        unit.bytes = size * MIB
        units.append(unit)
    return Groups(units=units)


def test_the_order_is_foretold() -> None:
    """Before the first pass as the model holds it, later as it was."""
    order = Order(5)
    order.note(START)
    same(order.upcoming(2, False), [0, 1])
    for unit in (0, 2, 4, 1):
        order.note((unit, FORWARD))
    for unit in (1, 4, 2, 0):
        order.note((unit, BACKWARD))
    order.note(START)
    same(order.upcoming(3, False), [0, 2, 4])
    order.note((0, FORWARD))
    same(order.upcoming(2, False), [2, 4])
    for unit in (2, 4, 1):
        order.note((unit, FORWARD))
    same(order.upcoming(2, False), [4, 2], "the backward pass")
    for unit in (1, 4, 2):
        order.note((unit, BACKWARD))
    same(order.upcoming(3, False), [0], "the end of the pass")
    same(order.upcoming(3, True), [0, 4, 1], "beyond it")
    assert not order.note((2, BACKWARD)), "the same once more"


def test_alternating_branches_are_foretold() -> None:
    """What follows depends on what was before."""
    order = Order(3)
    for _ in range(2):
        for unit in (0, 1, 0, 2):
            order.note((unit, FORWARD))
    same(order.upcoming(1, True), [0])
    order.note((0, FORWARD))
    same(order.upcoming(1, True), [1])
    order.note((1, FORWARD))
    order.note((0, FORWARD))
    same(order.upcoming(1, True), [2])


def test_what_stays() -> None:
    """Spread evenly; all of it, if it fits; nothing, if slots do not; large units rather than large slots."""
    choice = choose(groups_of(*[1] * 9), (3 + 3) * MIB, ahead=2)
    assert choice is not None
    same(sorted(choice.resident), [2, 5, 8])
    same((choice.slots, choice.slot_bytes), (3, MIB))
    whole = choose(groups_of(*[1] * 9), 9 * MIB, ahead=2)
    assert whole is not None
    same((len(whole.resident), whole.slots), (9, 0))
    same(choose(groups_of(*[1] * 9), 3 * MIB - 1, ahead=2), None)
    large = choose(groups_of(1, 1, 1, 1, 1, 8), 11 * MIB, ahead=2)
    assert large is not None
    same((sorted(large.resident), large.slot_bytes), ([5], MIB))


def test_units_of_a_model() -> None:
    """Blocks, and what stands alone; tables by rows and small ones apart; a tied table is the head's."""

    class Model(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.table = nn.Embedding(SIDE, SIDE)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(SIDE, SIDE), nn.LayerNorm(SIDE)) for _ in range(3))
            self.norm = nn.LayerNorm(SIDE)
            self.head = nn.Linear(SIDE, SIDE, bias=False)
            self.positions = nn.Parameter(torch.zeros(SIDE, SIDE))
            if tied:
                self.head.weight = self.table.weight

    for tied in (False, True):
        groups = group(Model(tied))
        names = [unit.name for unit in groups.units]
        expected = [f"blocks.{index}" for index in range(3)]
        same(names, [*expected, "head"], f"tied {tied}")
        same([other.name for other in groups.others], ["(model)"] if tied else ["(model)", "table"])
        assert any(small.name == "norm" for small in groups.small)
        total = sum(p.numel() for p in Model(tied).parameters())
        everything = [p for g in (*groups.units, *groups.small, *groups.others) for p in g.parameters]
        same(sum(p.numel() for p in everything), total)
        same(len(everything), len(set(everything)))
