#!/usr/bin/env python3
"""Runs a test file of PyTorch's own on this machine's GPU, with `native` and then with `uvm`, and compares test by
test.

    python tests/python/pytorch_gpu.py PATH_TO_PYTORCH/test test_cuda.py [inductor/test_cudagraph_trees.py …]

with the Python of an environment that holds PyTorch, torch-uvm, pytest, pytest-timeout and expecttest. The GPU must be
free. Every test that passes with `native` must pass with `uvm`, but for those in pytorch_exceptions.json; otherwise, or
if a test was not run before the deadline, the exit status is 1. (On the simulated device: pytorch_suite.py.)

The tests are dealt to `--jobs` pytest processes at a time. A process that crashes, or hangs in one test, is started
again with what it has not done. Managed memory that exceeds what a GPU has free can hang it for everybody: so all `uvm`
processes together stay under a quarter of the GPU's memory, by their oversubscription ratio. What fails beside others
is run once more in a process of its own, with that quarter for itself: some tests look at what tests before them have
left.

`--only FILE` takes the names from a JSON file: `{"test_cuda.py": {"native": ["Class.test", …], "uvm": […]}, …}`, and
`--known FILE` the outcomes of an earlier run (what `--out` wrote) for all others: so a run may be spread over several
sessions.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pytorch_suite import BACKENDS, EXCEPTIONS, read_exceptions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
#: Of the GPU's memory, for all uvm processes together; a little less than the quarter that is allowed.
SHARE = 0.24
#: Of it what must be free before anything starts.
FREE = 0.95
#: A process may use so many times the timeout of a test without an outcome before it is ended.
PATIENCE = 2.0
#: Seconds in which a process must have begun its first test: importing takes long where disks are slow.
START = 150.0

#: pytest's own store of outcomes is not wanted in PyTorch's tree.
PLUGINS = ("-p", "pytorch_outcomes", "-p", "no:cacheprovider")

#: `{test: {"outcome": …, "seconds": …, "detail": …}}`
Outcomes = dict[str, dict[str, Any]]


def conf(ratio: float) -> str:
    """The allocator configuration with this ratio."""
    return f"use_uvm:True,uvm_oversubscription_ratio:{ratio:.4f}"


def environment_of_tests(outcomes: Path) -> dict[str, str]:
    """The variables of a pytest process that writes its outcomes to this file: ours, with PyTorch's own allocator."""
    chosen = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "TORCH_UVM_CONF_OF_CHILDREN")
    environment = {key: value for key, value in os.environ.items() if key not in chosen}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    environment["TORCH_UVM_OUTCOMES"] = str(outcomes)
    return environment


class Chunk:
    """One pytest process and the tests that it has been dealt."""

    def __init__(self, run: Run, file: str, backend: str, names: list[str], ratio: float, number: int) -> None:
        self.run, self.file, self.backend, self.ratio, self.number = run, file, backend, ratio, number
        self.left = list(names)
        self.log = run.work / f"{Path(file).stem}-{backend}-{number}.jsonl"
        self._read = 0
        self._begun: str | None = None
        self._heard = 0.0
        self._progress = False
        self._process: subprocess.Popen[bytes] | None = None

    def step(self, outcomes: Outcomes) -> bool:
        """Reads what there is to read, starts what must be started. False when all is done."""
        self._listen(outcomes)
        if self._process is not None:
            if self._process.poll() is None:
                patience = self.run.timeout * PATIENCE if self._read else START
                if time.monotonic() - self._heard < patience:
                    return True
                self.end()
            self._listen(outcomes)
            if self._begun is not None:  # the process went in the middle of this one
                self._note(outcomes, self._begun, "error", 0.0, "the process crashed, or did not end in time")
            elif not self._progress and self.left:
                for name in list(self.left):
                    self._note(
                        outcomes, name, "error", 0.0, f"pytest ended with {self._process.returncode}; see {self.output}"
                    )
        if not self.left:
            return False
        self._start()
        return True

    def end(self) -> None:
        """Ends the process, if it runs, and those it has started."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, 9)
            self._process.wait()

    @property
    def output(self) -> Path:
        """What pytest printed."""
        return self.log.with_suffix(".out")

    def _start(self) -> None:
        environment = environment_of_tests(self.log)
        folder = self.run.work / f"{self.backend}-{self.number}"
        environment.update(
            # Tests compile different extensions under one name.
            TORCH_EXTENSIONS_DIR=str(folder / "extensions"),
            TORCHINDUCTOR_CACHE_DIR=str(folder / "inductor"),
            # Each process would start a pool of compiling ones of its own.
            TORCHINDUCTOR_COMPILE_THREADS="1",
        )
        if self.backend == "uvm":
            environment["PYTORCH_CUDA_ALLOC_CONF"] = conf(self.ratio * 0.8)
            # A test has most of its part for itself, and leaves enough for four processes that it may start.
            environment["TORCH_UVM_CONF_OF_CHILDREN"] = conf(self.ratio * 0.05)
        options = [*PLUGINS, "-q", "--no-header", "--tb=short", "-W", "ignore"]
        tests = [f"{self.file}::{name.replace('.', '::')}" for name in self.left]
        command = [sys.executable, "-m", "pytest", *options, f"--timeout={self.run.timeout}", *tests]
        with self.output.open("a") as output:
            self._process = subprocess.Popen(
                command, cwd=self.run.tests, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        self._begun, self._progress, self._heard, self._read = None, False, time.monotonic(), 0
        self.log.write_text("")

    def _listen(self, outcomes: Outcomes) -> None:
        lines = self.log.read_text().splitlines(keepends=True) if self.log.exists() else []
        for line in lines[self._read :]:
            if not line.endswith("\n"):
                break
            self._read += 1
            self._heard = time.monotonic()
            kind, name, *rest = json.loads(line)
            if kind == "begin":
                self._begun, self._progress = name, True
            else:
                self._begun = None
                self._note(outcomes, name, *rest)

    def _note(self, outcomes: Outcomes, name: str, outcome: str, seconds: float, detail: str) -> None:
        # A failure while tearing down comes after the outcome, and counts.
        if outcomes.get(name, {}).get("outcome") not in ("failed", "error"):
            outcomes[name] = {"outcome": outcome, "seconds": seconds, "detail": detail}
        if name in self.left:
            self.left.remove(name)
        self._begun = None if self._begun == name else self._begun


class Run:
    """What all processes of a run have in common."""

    def __init__(self, tests: Path, work: Path, timeout: float, deadline: float) -> None:
        self.tests, self.work, self.timeout = tests, work, timeout
        self._started = time.monotonic()
        self._deadline = self._started + deadline

    def left(self) -> float:
        """Seconds until the deadline."""
        return self._deadline - time.monotonic()

    def say(self, text: str) -> None:
        """A line with the time so far."""
        print(f"{time.monotonic() - self._started:6.1f} s  {text}", file=sys.stderr, flush=True)

    def do(self, file: str, backend: str, names: list[str], jobs: int, part: float, tag: int = 0) -> Outcomes:
        """Runs the tests, `jobs` processes at a time, for at most this part of the time that is left."""
        outcomes: Outcomes = {}
        jobs = max(1, min(jobs, len(names)))
        until = time.monotonic() + self.left() * part
        chunks = [
            Chunk(self, file, backend, names[number::jobs], SHARE / jobs, tag + number)
            for number in range(jobs)
            if names
        ]
        try:
            going = chunks
            while going and time.monotonic() < until:
                going = [chunk for chunk in going if chunk.step(outcomes)]
                time.sleep(0.2)
        finally:
            for chunk in chunks:
                chunk.end()
        counts = collections.Counter(answer["outcome"] for answer in outcomes.values())
        self.say(f"{file}, {backend}, {jobs} at a time: {len(outcomes)} of {len(names)} ran: {dict(counts)}")
        return outcomes

    def names(self, file: str) -> list[str]:
        """The tests of a file."""
        environment = environment_of_tests(self.work / "collected.jsonl")
        command = [sys.executable, "-m", "pytest", *PLUGINS, "-q", "--collect-only", file]
        listed = subprocess.run(command, cwd=self.tests, env=environment, capture_output=True, text=True)
        lines = [line for line in listed.stdout.splitlines() if line.startswith(f"{file}::")]
        names = [line.split("::", 1)[1].replace("::", ".") for line in lines]
        if not names:
            raise SystemExit(f"{file}: no tests found\n{listed.stdout[-2000:]}{listed.stderr[-2000:]}")
        return names


def check_gpu_is_free() -> dict[str, Any]:
    """What the GPU is. SystemExit where PyTorch finds none, or it is not free."""
    facts = "torch.__version__, torch.cuda.get_device_name(), *torch.cuda.mem_get_info()"
    code = f"import json, torch; print(json.dumps([{facts}]))"
    asked = subprocess.run(
        [sys.executable, "-c", code], env=environment_of_tests(Path(os.devnull)), capture_output=True, text=True
    )
    if asked.returncode != 0:
        raise SystemExit(f"no GPU that PyTorch can use:\n{asked.stderr}")
    torch, name, free, total = json.loads(asked.stdout.splitlines()[-1])
    if free < FREE * total:
        raise SystemExit(f"{name}: {free >> 20} of {total >> 20} MiB are free, and {FREE:.0%} must be")
    return {"torch": torch, "gpu": name, "free_bytes": free, "total_bytes": total}


def main() -> int:
    """Reads the arguments, runs, reports; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path, help="the folder test/ of PyTorch's source")
    parser.add_argument("files", nargs="+", help="test files in it")
    parser.add_argument("--jobs", type=int, default=5, help="pytest processes at a time (default 5)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds a test may take (default 60)")
    parser.add_argument("--deadline", type=float, default=86400, help="seconds for everything")
    parser.add_argument("--only", type=Path, help="run only the names in this JSON file")
    parser.add_argument("--known", type=Path, help="outcomes of an earlier run for what is not run now")
    parser.add_argument("--out", type=Path, default=ROOT / "target" / "pytorch-gpu.json", help="where the outcomes go")
    arguments = parser.parse_args()
    suites = {file: Path(file).stem.removeprefix("test_") for file in arguments.files}
    exceptions = {file: read_exceptions(EXCEPTIONS, "gpu", suite) for file, suite in suites.items()}
    only = json.loads(arguments.only.read_text()) if arguments.only else {}
    known = json.loads(arguments.known.read_text())["files"] if arguments.known else {}
    about = check_gpu_is_free()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    failed = False
    with tempfile.TemporaryDirectory(prefix="torch-uvm-pytorch-") as work:
        run = Run(arguments.tests.resolve(), Path(work), arguments.timeout, arguments.deadline)
        for index, file in enumerate(arguments.files):
            every = None if file in only else run.names(file)
            share = 1 / (len(arguments.files) - index)
            results: dict[str, Outcomes] = {backend: dict(known.get(file, {}).get(backend, {})) for backend in BACKENDS}
            for backend, part in zip(BACKENDS, (0.4 * share, 0.7 * share)):
                names = only[file][backend] if every is None else every
                results[backend].update(run.do(file, backend, names, arguments.jobs, part))
            native, uvm = results["native"], results["uvm"]
            passing = [name for name, answer in native.items() if answer["outcome"] == "passed"]
            suspects = [name for name in passing if uvm.get(name, {}).get("outcome", "not run") != "passed"]
            for number, name in enumerate(suspects):
                part = share / (len(suspects) - number)
                uvm.update(run.do(file, "uvm", [name], 1, part, tag=100 + number))
            failed |= report(file, native, uvm, exceptions[file])
            known[file] = results
            arguments.out.write_text(json.dumps({**about, "files": known}, indent=1) + "\n")
    return 1 if failed else 0


def report(file: str, native: Outcomes, uvm: Outcomes, exceptions: dict[str, str]) -> bool:
    """Prints how a file fared; True if something is wrong that no exception explains."""
    for backend, outcomes in (("native", native), ("uvm", uvm)):
        print(f"{file} {backend}: {dict(collections.Counter(answer['outcome'] for answer in outcomes.values()))}")
    wrong = False
    for name, answer in sorted(native.items()):
        there = uvm.get(name, {"outcome": "not run", "detail": ""})
        if answer["outcome"] == "passed" and there["outcome"] != "passed":
            wrong |= name not in exceptions
            note = f"excepted: {exceptions[name]}" if name in exceptions else "NOT EXCEPTED"
            detail = " | ".join(str(there["detail"]).split("\n"))[-500:]
            print(f"passes with native, {there['outcome']} with uvm: {name}: {note}\n        {detail}")
    unknown = sorted(set(uvm) - set(native))
    if unknown:
        wrong = True
        print(f"not run with native: {', '.join(unknown)}")
    return wrong


if __name__ == "__main__":
    raise SystemExit(main())
