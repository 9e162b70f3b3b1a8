#!/usr/bin/env python3
"""The process that runs tests of one of PyTorch's own test files, each in a fork (see nursery.py, pytorch_suite.py).

    python tests/python/pytorch_nursery.py TEST_FILE --backend uvm --timeout 60 --import torch.testing…

Requests on stdin, as JSON lines: `["*"]` the names of the tests, `["Class.test", SECONDS]` that test, SECONDS at most.
The answers on stdout.

PyTorch's file is executed as it is, in every fork: that is what may initialise CUDA. Names that it imports from another
version of PyTorch's test helpers than the installed one are bridged (see `bridge_imports`).
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import os
import sys
import traceback
import types
import unittest
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from nursery import in_fork, serve

#: Names of PyTorch's test helpers that later versions know by another name.
RENAMED = {("torch.testing._internal.inductor_utils", "HAS_CUDA"): "HAS_CUDA_AND_TRITON"}


class Outcome(unittest.TestResult):
    """Collects the outcome of one test, subtests included."""

    def __init__(self) -> None:
        super().__init__()
        self.outcome = "passed"
        self.detail = ""

    def _note(self, outcome: str, detail: str) -> None:
        if self.outcome != "failed":
            self.outcome, self.detail = outcome, detail

    def addError(self, test: Any, err: Any) -> None:  # noqa: N802  (unittest's names)
        """An exception: the test failed (`error` is kept for processes that do not come back)."""
        self._note("failed", "".join(traceback.format_exception(*err)))

    def addFailure(self, test: Any, err: Any) -> None:  # noqa: N802
        """A failed assertion."""
        self._note("failed", "".join(traceback.format_exception(*err)))

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:  # noqa: N802
        """The end of a subtest: one that failed fails the test."""
        if err is not None:
            self._note("failed", f"{subtest}\n" + "".join(traceback.format_exception(*err)))

    def addSkip(self, test: Any, reason: str) -> None:  # noqa: N802
        """A skipped test, or a skipped class."""
        self._note("skipped", reason)

    def addUnexpectedSuccess(self, test: Any) -> None:  # noqa: N802
        """A test marked as failing passed."""
        self._note("failed", "unexpected success")


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch's test file beside another version of PyTorch


class Missing:
    """Stands for a name that the installed PyTorch lacks. As a decorator, or in a condition, it skips the test."""

    #: True while the test file is executed, when a call can only be that of a decorator.
    defining = True

    def __init__(self, name: str) -> None:
        self.reason = f"{name} is not in this PyTorch"

    def __call__(self, *arguments: Any, **_: Any) -> Any:
        if not Missing.defining:
            raise unittest.SkipTest(self.reason)
        if len(arguments) == 1 and isinstance(arguments[0], (type, types.FunctionType)):
            return unittest.skip(self.reason)(arguments[0])
        return self

    def __bool__(self) -> bool:
        if not Missing.defining:
            raise unittest.SkipTest(self.reason)
        return False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(self.reason)
        if not Missing.defining:
            raise unittest.SkipTest(self.reason)
        return self


def is_submodule(module: types.ModuleType, name: str) -> bool:
    """Whether `name` can be imported from a package without being an attribute of it yet."""
    return hasattr(module, "__path__") and importlib.util.find_spec(f"{module.__name__}.{name}") is not None


def bridge_imports(tree: ast.Module) -> list[str]:
    """Puts something in the place of every name of torch that the file imports at its top level and that is not there.

    A renamed name becomes what it is called now; a missing one a `Missing`. Answers the missing ones.
    """
    missing = []
    for statement in tree.body:
        if not isinstance(statement, ast.ImportFrom) or (statement.module or "").partition(".")[0] != "torch":
            continue
        try:
            module = importlib.import_module(str(statement.module))
        except ModuleNotFoundError:
            module = sys.modules[str(statement.module)] = types.ModuleType(str(statement.module))
        for name in (alias.name for alias in statement.names):
            if name == "*" or hasattr(module, name) or is_submodule(module, name):
                continue
            renamed = RENAMED.get((module.__name__, name))
            if renamed is None:
                missing.append(f"{module.__name__}.{name}")
                setattr(module, name, Missing(missing[-1]))
            else:
                setattr(module, name, getattr(module, renamed))
    return missing


class TestFile:
    """A test file of PyTorch's, read and compiled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tree = ast.parse(path.read_text(), str(path))
        self._code = compile(self._tree, str(path), "exec")

    def bridge(self) -> list[str]:
        """See `bridge_imports`; imports what the file imports."""
        return bridge_imports(self._tree)

    def load(self) -> types.ModuleType:
        """Executes the file: this is what initialises CUDA, so only a fork does it."""
        module = types.ModuleType(self.path.stem)
        module.__file__ = str(self.path)
        sys.modules[module.__name__] = module
        exec(self._code, module.__dict__)
        Missing.defining = False
        module.__dict__.pop("load_tests", None)  # refuses to load tests of any but the running script
        return module


# ---------------------------------------------------------------------------------------------------------------------
# The nursery


def all_tests(suite: unittest.TestSuite) -> list[str]:
    """The names, `Class.test`, in a suite."""
    names: list[str] = []
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            names += all_tests(item)
        else:
            names.append(item.id().split(".", 1)[1])
    return names


def facts() -> dict[str, Any]:
    """What PyTorch's helpers ask of CUDA while they are imported, and which allocator is in place."""
    import torch
    import torch.utils._triton

    return {
        "torch": torch.__version__,
        "backend": torch.cuda.get_allocator_backend(),
        "devices": torch.cuda.device_count(),
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "triton": torch.utils._triton.has_triton(),
    }


def carry_out(name: str, test_file: TestFile) -> dict[str, Any]:
    """Does, in a fork, what was asked: `*` the list of tests, else the test of that name."""
    module = test_file.load()
    if name == "*":
        return {"tests": all_tests(unittest.defaultTestLoader.loadTestsFromModule(module))}
    result = Outcome()
    try:
        unittest.defaultTestLoader.loadTestsFromName(name, module).run(result)
    except Exception:
        # PyTorch's TestCase ends the whole run where a test leaves CUDA unusable. There is but one test here.
        result.addError(None, sys.exc_info())
    return {"outcome": result.outcome, "detail": result.detail}


def answer_request(request: list[Any], test_file: TestFile) -> dict[str, Any]:
    """Has a fork carry out a request."""
    name, allowed = request
    # Abrupt: a test that failed half-way may have left threads and captures behind that would hold up a proper end.
    ended = in_fork(lambda: carry_out(name, test_file), allowed, abrupt=True)
    reply = ended.reply or {"outcome": "error", "detail": f"{ended.ending}\n{ended.output[-6000:]}"}
    if reply.get("outcome") == "failed" and ended.output.strip():
        reply["detail"] += f"--- printed\n{ended.output[-3000:]}"
    return {**reply, "seconds": round(ended.seconds, 2), "late": ended.status is None}


def import_ahead(names: list[str], found: dict[str, Any], test_file: TestFile) -> list[str]:
    """Imports what takes long, and what the test file imports from torch, without touching CUDA.

    The helpers ask whether there is a GPU, and which, while they are imported. Asking CUDA would make every fork
    unusable, so a fork has asked, and its answers (`found`) are given. Answers the names that are missing.
    """
    import torch
    import torch.utils._triton

    touched: list[str] = []

    def refuse() -> None:
        touched.append("".join(traceback.format_stack()[-6:-1]))
        raise RuntimeError("CUDA must not be initialised before the fork")

    stand_ins: dict[tuple[Any, str], Any] = {
        (torch._C, "_cuda_getDeviceCount"): lambda: found["devices"],
        (torch.cuda, "get_device_capability"): lambda device=None: tuple(found["capability"]),
        (torch.utils._triton, "has_triton"): lambda: found["triton"],
        (torch.cuda, "_lazy_init"): refuse,
    }
    originals = {(module, name): getattr(module, name) for module, name in stand_ins}
    for (module, name), stand_in in stand_ins.items():
        setattr(module, name, stand_in)
    for name in names:
        importlib.import_module(name)
    missing = test_file.bridge()
    for (module, name), original in originals.items():
        setattr(module, name, original)
    if touched:
        raise SystemExit(f"an import initialises CUDA:\n{touched[0]}")
    return missing


def main() -> None:
    """Reads the arguments; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("test_file", type=Path)
    parser.add_argument("--backend", required=True, help="the allocator that must be in place")
    parser.add_argument("--timeout", type=float, required=True, help="seconds for anything but a test")
    parser.add_argument("--import", dest="ahead", action="append", default=[], help="a module to import ahead")
    arguments = parser.parse_args()
    test_file = TestFile(arguments.test_file.resolve())
    os.chdir(test_file.path.parent)
    sys.path[0] = str(test_file.path.parent)

    import torch  # noqa: F401  (before the fork)

    asked = in_fork(facts, arguments.timeout, abrupt=True)
    found = asked.reply
    if found is None:
        raise SystemExit(f"PyTorch cannot be asked about the GPU: {asked.ending}\n{asked.output}")
    if found["backend"] != arguments.backend:
        raise SystemExit(
            f"the allocator backend is {found['backend']!r}, not {arguments.backend!r}: does this environment hold the "
            "patched wheel or the plug-in?"
        )
    missing = import_ahead(arguments.ahead, found, test_file)
    # Had an import initialised CUDA behind PyTorch's back, no fork could use it any more.
    again = in_fork(facts, arguments.timeout, abrupt=True)
    if again.reply != found:
        raise SystemExit(f"CUDA is unusable in forks after the imports: {again.reply}, {again.ending}\n{again.output}")
    if missing:
        print(f"not in this PyTorch: {', '.join(missing)}", file=sys.stderr)

    def answer(request: list[Any]) -> dict[str, Any]:
        if request[0] == "?":
            return {"facts": found, "missing": missing}
        return answer_request([request[0], request[1]], test_file)

    serve(answer)


if __name__ == "__main__":
    main()
