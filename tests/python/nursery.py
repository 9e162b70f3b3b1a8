"""Many short runs on one expensive start.

Importing PyTorch takes seconds. A *nursery* is a process that has done it, without touching CUDA, and forks a child
for each request: the child initialises CUDA for itself, does one thing and ends. A crash, a hang or a setting left
behind costs that one run only, and all runs begin alike. The allocator's configuration is read when PyTorch is
loaded, so each configuration has a nursery of its own.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO


@dataclass
class Ended:
    """How a child ended."""

    #: What its work returned; None if it did not get that far.
    reply: Any
    #: Its exit status; the negative number of the signal that ended it; None if it was ended for being late.
    status: int | None
    #: The end of what it printed.
    output: str
    seconds: float

    @property
    def ending(self) -> str:
        """The status in words."""
        if self.status is None:
            return f"did not end within {self.seconds:.0f} s"
        if self.status < 0:
            return f"the process was ended by signal {-self.status}"
        return f"the process ended with status {self.status}"


def in_fork(work: Callable[[], Any], timeout: float, *, abrupt: bool = False) -> Ended:
    """Does `work` in a fork and waits for its end, at most `timeout` seconds. What it returns must fit into JSON.

    The child ends as a Python program does, destructors and all; with `abrupt` it ends at once after its reply.
    """
    receive, reply = os.pipe()
    with tempfile.TemporaryFile("w+b") as output:
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            os.setsid()
            os.close(receive)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            _child(work, reply, abrupt)
        os.close(reply)
        received, in_time = _collect(child, receive, started + timeout)
        try:
            os.killpg(child, signal.SIGKILL)  # whatever the child has left behind, and the child if it is late
        except ProcessLookupError:
            pass
        _, status = os.waitpid(child, 0)
        os.close(receive)
        output.seek(0)
        printed = output.read()[-12000:].decode(errors="replace")
    return Ended(
        reply=json.loads(received) if received.endswith(b"\n") else None,
        status=os.waitstatus_to_exitcode(status) if in_time else None,
        output=printed,
        seconds=time.monotonic() - started,
    )


def _child(work: Callable[[], Any], reply: int, abrupt: bool) -> None:
    """The child's side of a fork. Does not return."""
    status = 0
    try:
        answer = work()
        with os.fdopen(reply, "w") as pipe:
            pipe.write(json.dumps(answer) + "\n")
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    if abrupt:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    # Up through the nursery's loop to the end of the program.
    raise SystemExit(status)


def _collect(child: int, receive: int, deadline: float) -> tuple[bytes, bool]:
    """Reads the child's reply until the child ends; False if the deadline passed first.

    The pipe's end would not do as a sign: a process that the child started may hold it open.
    """
    ended = os.pidfd_open(child)
    poll = select.poll()
    poll.register(receive, select.POLLIN)
    poll.register(ended, select.POLLIN)
    chunks: list[bytes] = []
    try:
        while True:
            events = dict(poll.poll(max(deadline - time.monotonic(), 0) * 1000))
            if not events:
                return b"".join(chunks), False
            if receive in events:
                chunk = os.read(receive, 1 << 16)
                chunks.append(chunk)
                if not chunk:
                    poll.unregister(receive)
            elif ended in events:
                return b"".join(chunks), True
    finally:
        os.close(ended)


def serve(answer: Callable[[Any], Any]) -> None:
    """The nursery's loop: requests as JSON lines on stdin, answers as JSON lines on what was stdout."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")


class Client:
    """A nursery process, seen from the one that asks."""

    def __init__(self, name: str, command: list[str], variables: dict[str, str], log: TextIO | None = None) -> None:
        self._name = name
        self._process = subprocess.Popen(
            command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )

    def ask(self, request: Any) -> Any:
        """Sends a request and waits for its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the missing answer says it
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that runs {self._name} ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """Lets the process end."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        self._process.wait()
