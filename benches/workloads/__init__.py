"""The workloads of the benches.

A workload is a module with

- `TITLE`, and `FIGURES`: what it measures, by name (`bench.Figure`);
- `need(quick)`: the most GPU memory that it may take, in bytes (see `limits`);
- `run(bench)`: the work, in a process of its own;
- `preload()`: what it imports before its turn on the GPU.

`ALONE` (nothing else may run beside it), `PROGRAM` (it is a program of its own, not run by the worker), `BACKENDS` (it
makes sense for these only) and `PROCESSES` (how many in a round) are optional.
"""

from __future__ import annotations

from types import ModuleType

from . import changing_shapes, cold_start, decode_graph, first_touch, hotpath, reduce_overhead, train_step

WORKLOADS: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (train_step, changing_shapes, decode_graph, reduce_overhead, first_touch, hotpath, cold_start)
}
