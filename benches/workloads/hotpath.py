"""Allocate and free in loops written in C++ (hotpath.cpp): no Python and no GPU work is timed."""

from __future__ import annotations

import os

import hotpath_loops
from bench import Bench, Figure
from limits import GIB

TITLE = "hot path"
FIGURES = {name: Figure(loop.title, "ns") for name, loop in hotpath_loops.LOOPS.items()}
#: Nanoseconds are measured: nothing runs beside it.
ALONE = True


def need(quick: bool) -> int:
    """Bytes at most: 20,000 blocks of 466 KB on average, and what the free lists hold beside them."""
    return GIB // 2 if quick else 14 * GIB


def preload() -> None:
    """Nothing."""


def run(bench: Bench) -> None:
    """Every loop a few times; with --quick only those that hold little."""
    loops = hotpath_loops.load(os.environ[hotpath_loops.LIBRARY])
    names = [name for name, loop in hotpath_loops.LOOPS.items() if loop.small or not bench.quick]
    with bench.allocations():
        for name in names:
            for sample in range(1 if bench.quick else 3):
                bench.sample(name, hotpath_loops.LOOPS[name].run(loops, sample, 100 if bench.quick else 1))
    bench.end_of_measurement()
