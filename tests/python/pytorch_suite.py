#!/usr/bin/env python3
"""Runs a test file of PyTorch's own twice, with `native` and with `uvm`, and compares test by test.

On the simulated device (`cargo xtask test pytorch`, or by hand with the Python of an environment that holds the patched
wheel, or a stock one with the plug-in); pytorch_gpu.py is for a real GPU:

    TORCH_UVM_SIM_LIB=DIR python tests/python/pytorch_suite.py PATH_TO_PYTORCH_SOURCE [-k SUBSTRING]
        [--suite cudagraph_trees]

Every test that passes with `native` must pass with `uvm`, but for those in pytorch_exceptions.json; otherwise the exit
status is 1. It is 1 as well if a test was not run because the deadline came. The outcomes go to
target/pytorch-tests.json as `{"tests": {name: {"native": …, "uvm": …}}, …}` with `passed`, `failed`, `skipped`,
`error` (the process crashed or did not end in time) or `not run`, and what failed to target/pytorch-tests.log.

Kernels do nothing on the simulated device, so many tests fail with both backends: those that look at results. What is
left is what concerns an allocator.

Each backend has nurseries (pytorch_nursery.py), and every test runs in a fork of one: a crash, a hang or a setting left
behind by one test costs that test only, and both backends see every test under the same conditions.
"""

from __future__ import annotations

import argparse
import ast
import collections
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))

import simulated
from nursery import Client

BACKENDS = ("native", "uvm")
EXCEPTIONS = HERE / "pytorch_exceptions.json"
#: What the tests compile lies here.
WORK = ROOT / "target"
MOST_EXCEPTIONS = 10
#: No exception on the simulated device may be about what an allocator is there for.
NEVER_EXCEPTED = re.compile(r"graph|pool|stream|stat|snapshot", re.IGNORECASE)
#: Tests that compile an extension may take this long, in seconds, and are started first.
COMPILING_TIMEOUT = 400.0
#: What such a test says.
COMPILES = re.compile(r"load_inline|get_dummy_allocator")
#: Seconds in which a nursery must be ready, or have listed its tests.
START_TIMEOUT = 180.0


@dataclass(frozen=True)
class Suite:
    """A test file of PyTorch's."""

    #: Where it is in PyTorch's source.
    file: str
    #: Importing these is what takes the time, beside what the file itself imports from torch.
    ahead: tuple[str, ...]
    #: For its processes.
    variables: dict[str, str] = field(default_factory=dict)


SUITES = {
    "cuda": Suite(
        "test/test_cuda.py",
        ("numpy", "psutil", "torch.testing._internal.common_utils", "torch.testing._internal.common_device_type"),
    ),
    "cudagraph_trees": Suite(
        "test/inductor/test_cudagraph_trees.py",
        ("numpy", "functorch", "torch._inductor.compile_fx", "torch._inductor.cudagraph_trees"),
        # In each of these short-lived processes a pool of compiling ones would take longer to start than it saves.
        {"TORCHINDUCTOR_COMPILE_THREADS": "1"},
    ),
}


def tests_that_say(pattern: re.Pattern[str], source: str) -> set[str]:
    """The test methods, by name, whose text (decorators included) holds the pattern."""
    methods = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    lines = source.splitlines()

    def text(method: ast.FunctionDef) -> str:
        first = min([method.lineno, *(decorator.lineno for decorator in method.decorator_list)])
        return "\n".join(lines[first - 1 : method.end_lineno])

    return {method.name for method in methods if method.name.startswith("test") and pattern.search(text(method))}


def is_among(name: str, methods: set[str]) -> bool:
    """Whether `Class.test` is one of the methods, or one of their parametrised forms (`test_…_float32`)."""
    test = name.rpartition(".")[2]
    return any(test == method or test.startswith(f"{method}_") for method in methods)


# ---------------------------------------------------------------------------------------------------------------------
# Processes


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
            for pattern in ("cuda_runtime/lib/libcudart.so.*", "cu13/lib/libcudart.so.*"):
                for library in Path(location).glob(pattern):
                    link(lib / "libcudart.so", library)


class Nurseries:
    """The nursery processes of a run: started when they are needed, kept until the end."""

    def __init__(self, arguments: argparse.Namespace, log: TextIO) -> None:
        self._arguments = arguments
        self._log = log
        self._idle: dict[str, list[Client]] = collections.defaultdict(list)
        self._lock = threading.Lock()
        self._started = 0

    def take(self, backend: str) -> Client:
        """One for a test of this backend. To be given back."""
        with self._lock:
            return self._idle[backend].pop() if self._idle[backend] else self._start(backend)

    def give_back(self, backend: str, client: Client) -> None:
        """For the next one who asks."""
        with self._lock:
            self._idle[backend].append(client)

    def close(self) -> None:
        """Ends them."""
        for clients in self._idle.values():
            for client in clients:
                client.close()

    def _start(self, backend: str) -> Client:
        arguments = self._arguments
        suite = SUITES[arguments.suite]
        command = [sys.executable, str(HERE / "pytorch_nursery.py"), str(arguments.source / suite.file)]
        command += ["--backend", backend, "--timeout", str(START_TIMEOUT)]
        command += [argument for name in suite.ahead for argument in ("--import", name)]
        self._started += 1
        variables = {
            **suite.variables,
            # Tests compile different extensions under one name.
            "TORCH_EXTENSIONS_DIR": str(WORK / "torch-extensions" / f"{backend}-{self._started}"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
        }
        environment = simulated.environment(
            "use_uvm:True" if backend == "uvm" else "",
            device=arguments.device,
            hbm=arguments.hbm,
            host=arguments.host,
            devices=arguments.devices,
            schedule=arguments.schedule,
            require=True,
            CUDA_HOME=str(WORK / "cuda-home"),
            **variables,
        )
        return Client(f"the tests with {backend}", command, environment, self._log)


# ---------------------------------------------------------------------------------------------------------------------
# Running

Answers = dict[str, dict[str, Any]]
NOT_RUN = {"outcome": "not run", "detail": "the deadline came first", "seconds": 0.0}


@dataclass
class Work:
    """Tests of one backend, `jobs` of them at a time."""

    backend: str
    tests: list[str]
    jobs: int


class Run:
    """A run of a suite: what is left of its time, and how it answers."""

    def __init__(self, arguments: argparse.Namespace, log: TextIO) -> None:
        self.nurseries = Nurseries(arguments, log)
        self.source = (arguments.source / SUITES[arguments.suite].file).read_text()
        self._compiling = tests_that_say(COMPILES, self.source)
        self._arguments = arguments
        self._log = log
        self._started = time.monotonic()
        self._progress = threading.Lock()

    def end(self, part: float) -> float:
        """The time (monotonic) at which this part of the deadline has passed."""
        return self._started + float(self._arguments.deadline) * part

    def together(self, works: list[Work], answers: dict[str, Answers], until: float) -> None:
        """Does all of the works side by side; adds to `answers[backend]` each test's answer."""
        failures: list[BaseException] = []
        threads = []
        for work in works:
            # From the start, so that who looks on sees what has not been run.
            answers[work.backend].update((name, NOT_RUN) for name in work.tests)
            queue = collections.deque(sorted(work.tests, key=lambda name: not is_among(name, self._compiling)))
            for _ in range(min(work.jobs, len(work.tests))):
                parameters = (work, queue, answers[work.backend], until, failures)
                threads.append(threading.Thread(target=self._run_queue, args=parameters))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def _run_queue(
        self, work: Work, queue: collections.deque[str], answers: Answers, until: float, failures: list[BaseException]
    ) -> None:
        try:
            client = self.nurseries.take(work.backend)
            while not failures and time.monotonic() < until:
                try:
                    name = queue.popleft()
                except IndexError:
                    break
                allowed = COMPILING_TIMEOUT if is_among(name, self._compiling) else self._arguments.timeout
                left = until - time.monotonic()
                answer = client.ask([name, min(allowed, left)])
                if answer["late"] and left < allowed:
                    break  # it stays `not run`
                with self._progress:
                    answers[name] = answer
                    self._tell(name, work.backend, answer)
            self.nurseries.give_back(work.backend, client)
        except BaseException as failure:
            failures.append(failure)

    def _tell(self, name: str, backend: str, answer: dict[str, Any]) -> None:
        if answer["outcome"] in ("failed", "error"):
            ending = f"{answer['outcome']} after {answer['seconds']} s"
            self._log.write(f"==== {name} [{backend}] {ending}\n{answer['detail']}\n")
            self._log.flush()

    def say(self, text: str) -> None:
        """Prints a line with the time so far."""
        print(f"{time.monotonic() - self._started:6.1f} s  {text}", file=sys.stderr, flush=True)


def run_simulated(run: Run, names: list[str], outcomes: dict[str, Answers], arguments: argparse.Namespace) -> None:
    """Runs the tests with all backends side by side: each process has a simulated device of its own."""
    each = max(1, arguments.jobs // len(outcomes))
    run.together([Work(backend, names, each) for backend in outcomes], outcomes, run.end(1))


def steady(run: Run, suspects: list[str], outcomes: dict[str, Answers]) -> dict[str, list[str]]:
    """Runs the suspects again, thrice; answers how they fared with uvm.

    One that does not always pass with native proves nothing about uvm (a test that looks at what a kernel should have
    written can pass by luck): its native outcome becomes the bad one. One that passes with uvm this time still counts
    as failed: its cause may be a race.
    """
    again: dict[str, list[str]] = {name: [] for name in suspects}
    for _ in range(3):
        answers: dict[str, Answers] = {backend: {} for backend in BACKENDS}
        works = [Work(backend, suspects, 1) for backend in BACKENDS]
        run.together(works, answers, run.end(1))
        for name in suspects:
            if answers["native"][name]["outcome"] not in ("passed", "not run"):
                outcomes["native"][name] = answers["native"][name]
            again[name].append(answers["uvm"][name]["outcome"])
    return again


# ---------------------------------------------------------------------------------------------------------------------
# The report


def count(outcomes: Iterable[str]) -> str:
    """`3 passed, 1 failed, …`, without what there is none of."""
    counts = collections.Counter(outcomes)
    kinds = ("passed", "failed", "skipped", "error", "not run")
    return ", ".join(f"{counts[kind]} {kind}" for kind in kinds if counts[kind]) or "none"


def read_exceptions(path: Path, where: str, suite: str) -> dict[str, str]:
    """The committed list of `where` (simulated or gpu) and this suite: `{test: reason}`. All are held to the rules."""
    lists: dict[str, dict[str, dict[str, str]]] = json.loads(path.read_text())
    every = [(name, reason) for suites in lists.values() for tests in suites.values() for name, reason in tests.items()]
    problems = [f"{key} is neither simulated nor gpu" for key in lists if key not in ("simulated", "gpu")]
    problems += [f"no suite {key}" for suites in lists.values() for key in suites if key not in SUITES]
    problems += [f"{name} has no reason" for name, reason in every if not str(reason).strip()]
    # The method's name: every class of cudagraph_trees is about graphs, and so is every test in it.
    simulated_ones = [name for tests in lists.get("simulated", {}).values() for name in tests]
    never = [name for name in simulated_ones if NEVER_EXCEPTED.search(name.rpartition(".")[2])]
    problems += [f"{name} is about what an allocator is for" for name in never]
    if len(every) > MOST_EXCEPTIONS:
        problems.append(f"{len(every)} entries, at most {MOST_EXCEPTIONS} are allowed")
    if problems:
        raise SystemExit(f"{path}: {'; '.join(problems)}")
    return lists.get(where, {}).get(suite, {})


def last_line(answer: dict[str, Any]) -> str:
    """The line of a failure that says most: the exception's."""
    lines = str(answer["detail"]).partition("--- printed")[0].strip().splitlines() or [""]
    return next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)), lines[-1])[:300]


def write_outcomes(
    arguments: argparse.Namespace, names: list[str], outcomes: dict[str, Answers], about: dict[str, Any]
) -> dict[str, dict[str, str]]:
    """Writes the outcomes as JSON; answers them as a table."""
    table = {
        name: {backend: outcomes[backend].get(name, NOT_RUN)["outcome"] for backend in outcomes}
        for name in sorted(names)
    }
    seconds = {backend: {name: answer["seconds"] for name, answer in outcomes[backend].items()} for backend in outcomes}
    arguments.out.write_text(json.dumps({**about, "tests": table, "seconds": seconds}, indent=1) + "\n")
    return table


def run_suite(arguments: argparse.Namespace) -> int:
    """The whole run: lists, runs, compares, reports."""
    exceptions = read_exceptions(EXCEPTIONS, "simulated", arguments.suite)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    backends = arguments.backends.split(",")
    about: dict[str, Any] = {"suite": arguments.suite}
    make_cuda_home(WORK / "cuda-home")
    for lock in (WORK / "torch-extensions").glob("*/*/lock"):
        lock.unlink()  # of a process that was ended while it compiled: the next would wait for ever
    outcomes: dict[str, Answers] = {backend: {} for backend in backends}
    again: dict[str, list[str]] = {}
    suspects: list[str] = []
    with open(arguments.out.with_suffix(".log"), "w") as log:
        run = Run(arguments, log)
        first = run.nurseries.take(backends[0])
        listing = first.ask(["*", START_TIMEOUT])
        about.update(first.ask(["?"]))
        about["facts"].pop("backend")
        run.nurseries.give_back(backends[0], first)
        names = [name for name in listing.get("tests", []) if arguments.k in name]
        if not names:
            raise SystemExit(f"no tests: {listing.get('detail', '')}\n(asked for names with {arguments.k!r})")
        run.say(f"{len(names)} tests")
        try:
            run_simulated(run, names, outcomes, arguments)
            if set(backends) == set(BACKENDS):
                passing = [name for name in names if outcomes["native"][name]["outcome"] == "passed"]
                suspects = [name for name in passing if outcomes["uvm"][name]["outcome"] not in ("passed", "not run")]
                again = steady(run, suspects, outcomes) if suspects else {}
        finally:
            # Whatever happened: what has been learnt so far.
            table = write_outcomes(arguments, names, outcomes, about)
        run.nurseries.close()

    print(f"{arguments.suite}, PyTorch {about['facts']['torch']}, {about['facts']['device']}")
    if about["missing"]:
        print(f"tests that use these are skipped, this PyTorch lacks them: {', '.join(about['missing'])}")
    for backend in backends:
        print(f"{backend:>6}: {count(row[backend] for row in table.values())}")
    worse = [name for name in suspects if outcomes["native"][name]["outcome"] == "passed"]
    unexplained = [name for name in worse if name not in exceptions]
    stale = [name for name in exceptions if table.get(name, {}).get("uvm") == "passed"]
    for name in worse:
        note = f"excepted: {exceptions[name]}" if name in exceptions else "NOT EXCEPTED"
        answer = outcomes["uvm"][name]
        print(
            f"passes with native, {answer['outcome']} with uvm (again: {', '.join(again[name])}): {name}: {note}\n"
            f"        {last_line(answer)}"
        )
    for name in stale:
        print(f"stale entry in {EXCEPTIONS.name}, it no longer differs: {name}")
    unfinished = [name for name, row in table.items() if "not run" in row.values()]
    print(f"{len(table)} tests; outcomes in {arguments.out}, failures in {arguments.out.with_suffix('.log')}")
    return 1 if unexplained or unfinished else 0


def main() -> None:
    """Reads the arguments; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the unpacked source of PyTorch (its test/ folder is what is used)")
    parser.add_argument("--suite", choices=SUITES, default="cuda", help="which test file (default cuda: test_cuda.py)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "target" / "pytorch-tests.json", help="where the outcomes go"
    )
    parser.add_argument("-k", default="", metavar="SUBSTRING", help="only tests whose name holds this")
    parser.add_argument("--backends", default="native,uvm", help="which backends, by commas (default native,uvm)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=2,
        help="tests at a time, on the simulated device both backends together (default 2)",
    )
    parser.add_argument("--timeout", type=float, default=60, help="seconds a test may take (default 60)")
    parser.add_argument(
        "--deadline", type=float, default=86400, help="seconds for everything; what is left then is `not run`"
    )
    parser.add_argument("--device", default="gh200", help="profile of the simulated device (default gh200)")
    parser.add_argument("--hbm", default=None, help="its memory, such as 2GiB (default: the profile's)")
    parser.add_argument("--host", default=None, help="the host's memory, such as 10GiB (default: the profile's)")
    parser.add_argument("--schedule", default="late", help="when streams run: late, eager or a seed (default late)")
    parser.add_argument("--devices", type=int, default=1, help="how many simulated devices (default 1)")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.source = arguments.source.resolve()
    if not (arguments.source / SUITES[arguments.suite].file).is_file():
        parser.error(f"{arguments.source}: no {SUITES[arguments.suite].file} there; give PyTorch's unpacked source")
    chosen = arguments.backends.split(",")
    if sorted(chosen) != sorted(set(chosen) & set(BACKENDS)):
        parser.error(f"--backends: {arguments.backends}; allowed are {' and '.join(BACKENDS)}, each at most once")
    if arguments.jobs < 1:
        parser.error(f"--jobs: {arguments.jobs}; at least one")
    raise SystemExit(run_suite(arguments))


if __name__ == "__main__":
    main()
