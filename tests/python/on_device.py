"""Tests whose body runs in a process of its own on the simulated device.

    @on_device(devices=2)
    def test_something() -> None:
        import torch
        ...

pytest itself never touches CUDA. A decorated test is run in a fork of a nursery (nursery.py) that has loaded PyTorch
with the test's allocator; it fails if it raises, crashes, hangs, or does not end with status 0. The body may take
parameters (`pytest.mark.parametrize`) of types that JSON knows, and `conf` may name them in braces.

Which allocator a process has is decided when PyTorch is loaded, so each backend has a nursery. The other options, and
the simulated machine, are read from the environment when CUDA is first used: the fork sets them before.
(test_backend.py and test_bad_input.py start whole processes too.)

`--backend native` runs the tests with PyTorch's own allocator, without those that are about `uvm_…` options
(`uvm_only=True`, and `about_uvm` for those that start processes themselves): that is how the tests are tested, and the
simulated device, with whatever PyTorch is installed.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import simulated
from nursery import Client, in_fork, serve

backend = "uvm"
_nurseries: dict[str, Client] = {}


def for_backend(conf: str) -> str:
    """A configuration without our keys, where `--backend native` asks for that."""
    if backend == "uvm":
        return conf
    return ",".join(item for item in conf.split(",") if item and not item.startswith(("use_uvm", "uvm_")))


def _nursery(name: str) -> Client:
    """The nursery of a backend, started if there is none."""
    if name not in _nurseries:
        variables = simulated.environment("use_uvm:True" if name == "uvm" else "", require=True)
        command = [sys.executable, str(Path(__file__).resolve())]
        _nurseries[name] = Client(f"the tests with {name}", command, variables)
    return _nurseries[name]


def close_nurseries() -> None:
    """Ends all nurseries."""
    while _nurseries:
        _nurseries.popitem()[1].close()


def on_device(
    conf: str = simulated.UVM, *, timeout: float = 60, uvm_only: bool = False, init: bool = True, **machine: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a test run on a simulated device. `machine` is what `simulated.environment` takes.

    With `init`, PyTorch has initialised CUDA when the body begins.
    """

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(body)
        def test(**arguments: Any) -> None:
            import pytest

            if uvm_only and backend != "uvm":
                pytest.skip("about the uvm allocator only")
            chosen = for_backend(conf.format(**arguments) if arguments else conf)
            expected = "uvm" if "use_uvm:True" in chosen else "native"
            request = {
                "file": body.__code__.co_filename,
                "test": body.__qualname__,
                "arguments": arguments,
                "timeout": timeout,
                "backend": expected,
                "init": init,
                "variables": simulated.environment(chosen, require=True, **machine),
            }
            ended = _nursery(expected).ask(request)
            if ended["status"] != 0:
                pytest.fail(f"{ended['ending']}\n{ended['output']}", pytrace=False)

        test.body = body  # type: ignore[attr-defined]
        return test

    return decorate


def about_uvm(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that starts processes itself, and is about the uvm allocator only."""

    @functools.wraps(test)
    def only_with_uvm(*arguments: Any, **named: Any) -> None:
        import pytest

        if backend != "uvm":
            pytest.skip("about the uvm allocator only")
        test(*arguments, **named)

    return only_with_uvm


def _carry_out(request: dict[str, Any]) -> None:
    """In the fork: loads the test's file and runs its body."""
    import torch

    wanted = request["variables"]
    for variable in list(os.environ):
        if variable.startswith(simulated.CHOSEN) and variable not in wanted:
            del os.environ[variable]
    os.environ.update({name: value for name, value in wanted.items() if name.startswith(simulated.CHOSEN)})
    found = torch.cuda.get_allocator_backend()
    if found != request["backend"]:
        raise RuntimeError(
            f"the allocator backend is {found!r}, not {request['backend']!r}: is this the patched wheel, or is "
            "torch-uvm installed?"
        )
    if request["init"]:
        torch.cuda.init()  # without it, there are no statistics
    specification = importlib.util.spec_from_file_location("test_file", request["file"])
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    getattr(module, request["test"]).body(**request["arguments"])


def _main() -> None:
    """The nursery."""
    import pytest  # noqa: F401  (the test files import it)
    import torch
    import versions

    if versions.SNAPSHOTS_IMPORT_DYNAMO:
        import torch._dynamo  # noqa: F401  (seconds, once rather than in every test with a snapshot)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        ended = in_fork(lambda: _carry_out(request), request["timeout"])
        return {"status": ended.status, "ending": ended.ending, "output": ended.output}

    serve(answer)


if __name__ == "__main__":
    _main()
