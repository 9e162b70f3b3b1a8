#!/usr/bin/env python3
"""Runs PyTorch's own test/test_cuda.py on the simulated device, once with `native` and once with `use_uvm:True`.

Run by `cargo xtask test pytorch`, or by hand with the patched wheel's Python:

    TORCH_UVM_SIM_LIB=DIR python tests/python/pytorch_suite.py PATH_TO_PYTORCH_2.6.0_SOURCE [-k SUBSTRING]

Every test that passes with `native` must pass with `uvm`, but for those in pytorch_exceptions.json; otherwise the
exit status is 1. The outcomes go to target/pytorch-tests.json as `{"tests": {name: {"native": …, "uvm": …}}}` with
`passed`, `failed`, `skipped` or `error` (the process crashed or did not end in time), and what failed to
target/pytorch-tests.log.

Kernels do nothing on the simulated device, so many tests fail with both backends: those that look at results. What is
left is what concerns an allocator.

Each backend has a nursery (see nursery.py), and every test runs in a fork of it: a crash, a hang or a setting left
behind by one test costs that test only, and both backends see every test under the same conditions.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import sys
import threading
import traceback
import unittest
from pathlib import Path
from typing import Any, TextIO

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))

import simulated  # noqa: E402  (needs the path above)
from nursery import Client, in_fork, serve  # noqa: E402

CONFIGURATIONS = {"native": "", "uvm": "use_uvm:True"}
EXCEPTIONS = HERE / "pytorch_exceptions.json"
MOST_EXCEPTIONS = 10
#: No exception may be about what an allocator is there for.
NEVER_EXCEPTED = re.compile(r"graph|pool|stream|stat|snapshot", re.IGNORECASE)
#: Tests that compile an extension may take this long.
COMPILING = {"test_cpp_memory_snapshot_pickle": 400.0, "test_mempool_with_allocator": 400.0}
#: Importing these is what takes the time. They ask about the GPU while they are imported (see `nursery`).
IMPORTED_AHEAD = (
    "numpy",
    "psutil",
    "torch.cuda._memory_viz",
    "torch.testing._internal.common_utils",
    "torch.testing._internal.common_device_type",
    "torch.testing._internal.common_optimizers",
    "torch.testing._internal.autocast_test_lists",
    "torch.utils.checkpoint",
    "torch.utils.viz._cycles",
)


# ---------------------------------------------------------------------------------------------------------------------
# The nursery: a process that forks one child for each test it is told to run.


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


def load_test_module(code: Any, path: Path) -> Any:
    """Executes test_cuda.py: this is what initialises CUDA, so only a fork does it."""
    import types

    module = types.ModuleType("test_cuda")
    module.__file__ = str(path)
    sys.modules["test_cuda"] = module
    exec(code, module.__dict__)
    del module.load_tests  # refuses to load tests of any but the running script
    return module


def all_tests(suite: unittest.TestSuite) -> list[str]:
    """The names, `Class.test`, in a suite."""
    names: list[str] = []
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            names += all_tests(item)
        else:
            names.append(item.id().split(".", 1)[1])
    return names


def carry_out(request: str, code: Any, path: Path) -> dict[str, Any]:
    """Does, in a fork, what was asked: `?` the device's facts, `*` the list of tests, else the test of that name."""
    import torch

    if request == "?":
        return {
            "backend": torch.cuda.get_allocator_backend(),
            "devices": torch.cuda.device_count(),
            "capability": torch.cuda.get_device_capability(),
        }
    module = load_test_module(code, path)
    if request == "*":
        return {"tests": all_tests(unittest.defaultTestLoader.loadTestsFromModule(module))}
    result = Outcome()
    unittest.defaultTestLoader.loadTestsFromName(request, module).run(result)
    return {"outcome": result.outcome, "detail": result.detail}


def answer_request(request: str, code: Any, path: Path, timeout: float) -> dict[str, Any]:
    """Has a fork carry out a request."""
    # Abrupt: a test that failed half-way may have left threads and captures behind that would hold up a proper end.
    allowed = COMPILING.get(request.rpartition(".")[2], timeout)
    ended = in_fork(lambda: carry_out(request, code, path), allowed, abrupt=True)
    reply = ended.reply or {"outcome": "error", "detail": f"{ended.ending}\n{ended.output[-6000:]}"}
    if reply.get("outcome") == "failed" and ended.output.strip():
        reply["detail"] += f"--- printed\n{ended.output[-3000:]}"
    return {**reply, "seconds": round(ended.seconds, 2)}


def nursery(test_file: Path, expected_backend: str, timeout: float) -> None:
    """Imports what takes long, then answers requests."""
    import importlib
    import importlib.util

    os.chdir(test_file.parent)
    sys.path[0] = str(test_file.parent)
    import torch
    import torch.utils._triton

    facts = answer_request("?", None, test_file, timeout)
    if facts.get("backend") != expected_backend:
        found = facts.get("backend", facts.get("detail"))
        raise SystemExit(f"the allocator backend is {found!r}, not {expected_backend!r}: is this the patched wheel?")
    # The helpers ask whether there is a GPU, and which, while they are imported. Asking CUDA would make every fork
    # unusable, so a fork has asked, and its answers are given.
    stand_ins = {
        (torch._C, "_cuda_getDeviceCount"): lambda: facts["devices"],
        (torch.cuda, "get_device_capability"): lambda device=None: tuple(facts["capability"]),
        (torch.utils._triton, "has_triton"): lambda: importlib.util.find_spec("triton") is not None,
    }
    originals = {(module, name): getattr(module, name) for module, name in stand_ins}
    for (module, name), stand_in in stand_ins.items():
        setattr(module, name, stand_in)
    for imported in IMPORTED_AHEAD:
        importlib.import_module(imported)
    for (module, name), original in originals.items():
        setattr(module, name, original)
    if torch.cuda.is_initialized() or torch.cuda._is_in_bad_fork():
        raise SystemExit("CUDA was initialised before the first fork")
    code = compile(test_file.read_text(), str(test_file), "exec")
    serve(lambda request: answer_request(request, code, test_file, timeout))


# ---------------------------------------------------------------------------------------------------------------------
# The runner


def make_cuda_home(home: Path) -> None:
    """Makes what tests that compile an extension take for CUDA's own installation.

    It is links to the headers and the runtime library of the packages that the wheel brings along. Tests that need more
    (nvcc) fail with both backends.
    """
    import importlib.util

    include, lib = home / "include", home / "lib64"
    include.mkdir(parents=True, exist_ok=True)
    lib.mkdir(exist_ok=True)

    # The one header that none of them has. It chooses between host and device code; only host code is compiled here.
    (include / "nv").mkdir(exist_ok=True)
    (include / "nv" / "target").write_text(
        "#pragma once\n#define NV_IF_ELSE_TARGET(condition, yes, no) no\n#define NV_IF_TARGET(condition, ...)\n"
    )

    def link(new: Path, old: Path) -> None:
        new.unlink(missing_ok=True)
        new.symlink_to(old)

    for package, folder in (("triton", "backends/nvidia/include"), ("nvidia", "*/include")):
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations or []) if spec else []:
            for header in Path(location).glob(f"{folder}/*"):
                if header.suffix in (".h", ".hpp") or header.name == "crt":
                    link(include / header.name, header)
            for library in Path(location).glob("cuda_runtime/lib/libcudart.so.*"):
                link(lib / "libcudart.so", library)


def start_nursery(backend: str, arguments: argparse.Namespace, log: TextIO) -> Client:
    """Starts a nursery of one backend on the simulated device."""
    variables = simulated.environment(
        CONFIGURATIONS[backend],
        device=arguments.device,
        hbm=arguments.hbm,
        host=arguments.host,
        devices=arguments.devices,
        schedule=arguments.schedule,
        require=True,
        # For tests that compile an extension. They remove it afterwards, so each backend has its own.
        CUDA_HOME=str(arguments.out.parent / "cuda-home"),
        TORCH_EXTENSIONS_DIR=str(arguments.out.parent / "torch-extensions" / backend),
        PATH=f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
    )
    command = [sys.executable, str(Path(__file__).resolve()), str(arguments.source), "--nursery", backend]
    return Client(f"the tests with {backend}", [*command, "--timeout", str(arguments.timeout)], variables, log)


def run_all(
    names: dict[str, list[str]], arguments: argparse.Namespace, log: TextIO
) -> dict[str, dict[str, dict[str, Any]]]:
    """Runs `names[backend]` for each backend, the backends side by side; answers by backend and name."""
    answers: dict[str, dict[str, dict[str, Any]]] = {backend: {} for backend in names}
    queues = {backend: collections.deque(tests) for backend, tests in names.items()}
    total = sum(map(len, names.values()))
    progress = threading.Lock()
    failures: list[BaseException] = []

    def work(backend: str) -> None:
        try:
            process = start_nursery(backend, arguments, log)
            while not failures:
                try:
                    name = queues[backend].popleft()
                except IndexError:
                    break
                answer = process.ask(name)
                with progress:
                    answers[backend][name] = answer
                    done = sum(map(len, answers.values()))
                    if answer["outcome"] in ("failed", "error"):
                        ending = f"{answer['outcome']} after {answer['seconds']} s"
                        log.write(f"==== {name} [{backend}] {ending}\n{answer['detail']}\n")
                        log.flush()
                    if done % 50 == 0 or done == total:
                        print(f"{done} of {total} runs done", file=sys.stderr, flush=True)
            process.close()
        except BaseException as failure:
            failures.append(failure)

    each = max(1, arguments.jobs // max(1, len(names)))
    threads = [threading.Thread(target=work, args=(backend,)) for backend in names for _ in range(each)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return answers


def read_exceptions(path: Path) -> dict[str, str]:
    """The committed list, `{test: reason}`, checked against its own rules."""
    exceptions: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    problems = [f"{name} has no reason" for name, reason in exceptions.items() if not str(reason).strip()]
    problems += [f"{name} is about what an allocator is for" for name in exceptions if NEVER_EXCEPTED.search(name)]
    if len(exceptions) > MOST_EXCEPTIONS:
        problems.append(f"{len(exceptions)} entries, at most {MOST_EXCEPTIONS} are allowed")
    if problems:
        raise SystemExit(f"{path}: {'; '.join(problems)}")
    return exceptions


def steady(
    suspects: list[str], outcomes: dict[str, dict[str, dict[str, Any]]], arguments: argparse.Namespace, log: TextIO
) -> list[str]:
    """Runs the suspects again, natively thrice; answers those that passed with uvm this time.

    One that does not always pass with native proves nothing about uvm (a test that looks at what a kernel should have
    written can pass by luck): its native outcome becomes the bad one. One that passes with uvm the second time still
    counts as failed: its cause may be a race.
    """
    again: list[str] = []
    for attempt in range(3):
        backends = ("native", "uvm") if attempt == 0 else ("native",)
        answers = run_all({backend: suspects for backend in backends}, arguments, log)
        for name in suspects:
            if answers["native"][name]["outcome"] != "passed":
                outcomes["native"][name] = answers["native"][name]
        if attempt == 0:
            again = [name for name in suspects if answers["uvm"][name]["outcome"] == "passed"]
    return again


def run_suite(arguments: argparse.Namespace) -> int:
    """The whole run: lists, runs, compares, reports."""
    exceptions = read_exceptions(EXCEPTIONS)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    backends = arguments.backends.split(",")
    make_cuda_home(arguments.out.parent / "cuda-home")
    for lock in (arguments.out.parent / "torch-extensions").glob("*/*/lock"):
        lock.unlink()  # of a process that was ended while it compiled: the next would wait for ever
    with open(arguments.out.with_suffix(".log"), "w") as log:
        first = start_nursery(backends[0], arguments, log)
        listing = first.ask("*")
        first.close()
        names = [name for name in listing.get("tests", []) if arguments.k in name]
        if not names:
            raise SystemExit(f"no tests: {listing.get('detail', '')}\n(asked for names with {arguments.k!r})")
        outcomes = run_all({backend: names for backend in backends}, arguments, log)
        worse, again = [], []
        if set(backends) == set(CONFIGURATIONS):
            passing = [name for name in names if outcomes["native"][name]["outcome"] == "passed"]
            suspects = [name for name in passing if outcomes["uvm"][name]["outcome"] != "passed"]
            if suspects:
                again = steady(suspects, outcomes, arguments, log)
            worse = [name for name in suspects if outcomes["native"][name]["outcome"] == "passed"]

    table = {name: {backend: outcomes[backend][name]["outcome"] for backend in backends} for name in sorted(names)}
    arguments.out.write_text(json.dumps({"tests": table}, indent=1) + "\n")
    for backend in backends:
        counts = collections.Counter(row[backend] for row in table.values())
        print(
            f"{backend:>6}: " + ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped", "error"))
        )
    unexplained = [name for name in worse if name not in exceptions]
    stale = [name for name in exceptions if name in table and name not in worse]
    for name in worse:
        note = f"excepted: {exceptions[name]}" if name in exceptions else "NOT EXCEPTED"
        luck = " (passed when run again)" if name in again else ""
        lines = outcomes["uvm"][name]["detail"].partition("--- printed")[0].strip().splitlines() or [""]
        reason = next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)), lines[-1])
        print(
            f"passes with native, {outcomes['uvm'][name]['outcome']} with uvm{luck}: {name}: {note}\n        {reason}"
        )
    for name in stale:
        print(f"stale entry in {EXCEPTIONS.name}, it no longer differs: {name}")
    print(f"{len(table)} tests; outcomes in {arguments.out}, failures in {arguments.out.with_suffix('.log')}")
    return 1 if unexplained else 0


def main() -> None:
    """Reads the arguments; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", type=Path, help="the unpacked source of PyTorch 2.6.0 (its test/ folder is what is used)"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "target" / "pytorch-tests.json", help="where the outcomes go"
    )
    parser.add_argument("-k", default="", metavar="SUBSTRING", help="only tests whose name holds this")
    parser.add_argument("--backends", default="native,uvm", help="which backends, by commas (default native,uvm)")
    parser.add_argument("--jobs", type=int, default=2, help="tests at a time, both backends together (default 2)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds a test may take (default 60)")
    parser.add_argument("--device", default="gh200", help="profile of the simulated device (default gh200)")
    parser.add_argument("--hbm", default=None, help="its memory, such as 2GiB (default: the profile's)")
    parser.add_argument("--host", default=None, help="the host's memory, such as 10GiB (default: the profile's)")
    parser.add_argument("--schedule", default="late", help="when streams run: late, eager or a seed (default late)")
    parser.add_argument("--devices", type=int, default=1, help="how many simulated devices (default 1)")
    parser.add_argument("--nursery", metavar="BACKEND", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    test_file = (arguments.source / "test" / "test_cuda.py").resolve()
    if not test_file.is_file():
        parser.error(f"{arguments.source}: no test/test_cuda.py there; give the unpacked source of PyTorch 2.6.0")
    unknown = sorted(set(arguments.backends.split(",")) - set(CONFIGURATIONS))
    if unknown:
        parser.error(f"--backends: {', '.join(unknown)}; allowed are {', '.join(CONFIGURATIONS)}")
    if arguments.nursery:
        nursery(test_file, arguments.nursery, arguments.timeout)
    else:
        raise SystemExit(run_suite(arguments))


if __name__ == "__main__":
    main()
