"""Runs measurements one after the other, each in a process of its own.

Importing PyTorch takes seconds and touches no GPU, so a process may do that while the one before it measures; it then
waits for its turn. The GPU has one process at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Optional

HERE = Path(__file__).resolve().parent


class Turns:
    """A process's side of measuring side by side: it asks for each measurement, and says when it has ended."""

    ASK, DONE, GO = b"?", b".", b"!"

    def __init__(self, descriptors: str) -> None:
        self._read, self._write = (int(descriptor) for descriptor in descriptors.split(","))

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Waits for the turn, and passes it on at the end."""
        os.write(self._write, self.ASK)
        if os.read(self._read, 1) != self.GO:
            raise RuntimeError("the process that gives turns has ended")
        yield
        os.write(self._write, self.DONE)


@dataclass(frozen=True)
class Job:
    """One process to come."""

    #: `workload` or `check`: where the worker looks the name up.
    kind: str
    name: str
    backend: str
    environment: dict[str, str]
    quick: bool = False
    #: It is measured in nanoseconds, or its start is what is measured: nothing else runs beside it.
    alone: bool = False
    #: A program of its own instead of the worker; it gets the result's path as its only argument.
    program: Optional[Path] = None
    timeout: float = 300.0


@dataclass
class Outcome:
    """How it went."""

    job: Job
    #: What the worker wrote; None where it failed.
    result: Optional[dict[str, Any]]
    #: The end of its output where it failed, else empty.
    error: str
    #: From its turn (from its start, for a program of its own) to its end.
    seconds: float


class _Process:
    """A process that waits for its turn before it touches the GPU."""

    def __init__(self, job: Job, *, with_turns: bool = False) -> None:
        self.job = job
        self._turns: Optional[tuple[int, int]] = None
        theirs: tuple[int, ...] = ()
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        self._folder = tempfile.TemporaryDirectory(prefix="torch-uvm-bench-")
        self._result = Path(self._folder.name) / "result.json"
        if job.program is None:
            command = [sys.executable, "-X", "faulthandler", str(HERE / "worker.py"), job.kind, job.name, job.backend]
            command += [str(self._result)] + (["--quick"] if job.quick else [])
            if with_turns:
                (read, go), (asked, write) = os.pipe(), os.pipe()
                self._turns, theirs = (asked, go), (read, write)
                command += ["--turns", f"{read},{write}"]
        else:
            command = [sys.executable, str(job.program), str(self._result)]
        self._started = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            env=job.environment,
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            pass_fds=theirs,
        )
        for descriptor in theirs:
            os.close(descriptor)

    def finish(self) -> Outcome:
        """Gives it its turn and waits for its end."""
        began = self._started if self.job.program is not None else time.perf_counter()
        late = threading.Event()

        def end_late() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(self.job.timeout, end_late)
        timer.start()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"go\n")
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended already; the status says how
        status = self._process.wait()  # without a timeout of Python's, which polls and would blur a cold start
        seconds = time.perf_counter() - began
        timer.cancel()
        result, error = None, ""
        if status == 0 and self._result.exists():
            result = json.loads(self._result.read_text())
        else:
            self._output.seek(0)
            text = self._output.read().decode(errors="replace")[-4000:]
            ending = f"no end within {self.job.timeout:.0f} s" if late.is_set() else f"exit status {status}"
            error = f"{ending}\n{text}"
        self._close()
        return Outcome(self.job, result, error, seconds)

    def asks(self) -> bool:
        """Waits until it wants to measure; False where it has ended, or failed, instead."""
        assert self._turns is not None
        return os.read(self._turns[0], 1) == Turns.ASK

    def measure(self) -> None:
        """Lets it measure, and waits until it has."""
        assert self._turns is not None
        try:
            os.write(self._turns[1], Turns.GO)
        except BrokenPipeError:
            return  # its end is noticed when it is asked next
        os.read(self._turns[0], 1)

    def abandon(self) -> None:
        """Ends it before its turn."""
        self._process.kill()
        self._process.wait()
        self._close()

    def no_more_turns(self) -> None:
        """Ends it if it still runs, however it came to that."""
        if self._process.poll() is None:
            self._process.kill()
        for descriptor in self._turns or ():
            os.close(descriptor)
        self._turns = None

    def _close(self) -> None:
        self._output.close()
        self._folder.cleanup()


def side_by_side(jobs: Iterable[Job]) -> Iterator[Outcome]:
    """Runs the jobs at the same time, but lets them measure one after the other, round and round.

    Everything else, from the import to the warm-up, they do beside each other before the first measures, and what
    follows the last measurement after that. So the backends' samples lie within seconds of each other, and what changes
    on a machine meanwhile meets all of them.
    """
    running = [_Process(job, with_turns=True) for job in jobs]
    try:
        with ThreadPoolExecutor(max_workers=max(1, len(running))) as pool:
            outcomes = [pool.submit(process.finish) for process in running]
            asking = [process for process in running if process.asks()]
            while asking:
                for process in asking:
                    process.measure()
                asking = [process for process in asking if process.asks()]
            yield from (outcome.result() for outcome in outcomes)
    finally:
        for process in running:
            process.no_more_turns()


def in_turn(jobs: Iterable[Job], ahead: int = 1) -> Iterator[Outcome]:
    """Runs the jobs in their order; up to `ahead` of the next ones import PyTorch meanwhile."""
    waiting: deque[_Process] = deque()
    source = iter(jobs)
    upcoming: deque[Job] = deque()

    def peek() -> Optional[Job]:
        if not upcoming:
            job = next(source, None)
            if job is None:
                return None
            upcoming.append(job)
        return upcoming[0]

    try:
        while True:
            if not waiting:
                job = peek()
                if job is None:
                    return
                waiting.append(_Process(upcoming.popleft()))
            current = waiting.popleft()
            while not current.job.alone and len(waiting) < ahead:
                job = peek()
                if job is None or job.alone:  # a start that is measured begins when its turn comes
                    break
                waiting.append(_Process(upcoming.popleft()))
            # One that is alone was started when nothing else was there: nothing waits beside it.
            yield current.finish()
    finally:
        for process in waiting:
            process.abandon()
