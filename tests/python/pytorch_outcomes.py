"""A pytest plug-in for PyTorch's own test files (`-p pytorch_outcomes`): writes each outcome down as soon as it is
known.

A line of JSON for each test that begins, `["begin", name]`, and for each outcome, `["end", name, outcome, seconds,
detail]`, to the file that TORCH_UVM_OUTCOMES names: what a process has learnt is not lost when it crashes or is ended.
Names that PyTorch's test helpers lack in the installed version are given to them first.
"""

from __future__ import annotations

import importlib
import json
import os
from typing import Any

#: Names that test files near a release ask for, and what stands for them where the release lacks them: another name of
#: the same module, or a value.
BRIDGED: dict[tuple[str, str], Any] = {
    ("torch.testing._internal.common_utils", "TEST_CUDAMALLOCASYNC"): False,
    ("torch.testing._internal.inductor_utils", "HAS_CUDA"): "HAS_CUDA_AND_TRITON",
}
#: Characters of a failure's text that are kept: its end says most.
DETAIL = 2000


def pytest_configure() -> None:
    """Bridges the names; settles this process's allocator; gives processes that tests start their configuration."""
    of_children = os.environ.get("TORCH_UVM_CONF_OF_CHILDREN")
    if of_children is not None:
        importlib.import_module("torch").cuda.init()
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = of_children
    for (module_name, name), stand_in in BRIDGED.items():
        module = importlib.import_module(module_name)
        if not hasattr(module, name):
            setattr(module, name, getattr(module, stand_in) if isinstance(stand_in, str) else stand_in)


def pytest_runtest_logstart(nodeid: str) -> None:
    """A test begins."""
    _write(["begin", _name(nodeid)])


def pytest_runtest_logreport(report: Any) -> None:
    """A phase of a test has ended; setting up and tearing down only count where they do not pass."""
    if report.when == "call" or report.outcome != "passed":
        detail = str(report.longrepr)[-DETAIL:] if report.outcome != "passed" else ""
        _write(["end", _name(report.nodeid), report.outcome, round(report.duration, 2), detail])


def _name(nodeid: str) -> str:
    """`Class.test`, as unittest has it."""
    return nodeid.split("::", 1)[1].replace("::", ".")


def _write(entry: list[Any]) -> None:
    with open(os.environ["TORCH_UVM_OUTCOMES"], "a") as outcomes:
        outcomes.write(json.dumps(entry) + "\n")
