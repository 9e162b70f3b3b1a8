"""`python -m torch_uvm report` on files of unknown origin: a page or one clear line, in bounded memory and time."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import report_fuzz
from nursery import in_fork
from snapshots import GIB, MIB, frame, plain, with_places
from under_test import torch_uvm

from torch_uvm import __main__

#: Takes long, and is the same for every version of PyTorch.
pytestmark = pytest.mark.one_version

#: Memory that the command may take besides what this process has, in bytes, and time, in seconds of the processor.
#: A page of a small snapshot takes about 150 MiB and a second.
MOST_MEMORY, MOST_SECONDS = 1 * GIB, 60


def bounded(work: Callable[[], Any], seconds: int = MOST_SECONDS) -> Any:
    """Does work in a process whose memory and time are bounded; answers what it returns."""

    def limited() -> Any:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MOST_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        return work()

    ended = in_fork(limited, timeout=10 * seconds, abrupt=True)
    assert ended.status == 0, f"{ended.ending}: {ended.output[-3000:]}"
    return ended.reply


def report(content: bytes, folder: Path) -> str | None:
    """Runs the command on a file; answers the line that it says in place of a page, None where it makes a page."""
    source, target = folder / "snapshot.pickle", folder / "page.html"
    source.write_bytes(content)

    def command() -> tuple[int, str]:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            status = __main__.main(["report", str(source), "-o", str(target)])
        return status, said.getvalue()

    status, said = bounded(command)
    if status == 0:
        assert not said and target.stat().st_size < 100 * MIB
        return None
    start = f"torch-uvm report: {source}: "
    assert status == 2 and said.startswith(start) and said.endswith("\n"), said[:3000]
    line = said[len(start) : -1]
    assert line.isprintable() and len(line) < 600 and not target.exists(), line[:3000]
    return str(line)


def doubled(times: int) -> list[Any]:
    """A list that takes a few bytes for each doubling, and more room than there is once it is written out."""
    found: list[Any] = []
    for _ in range(times):
        found = [found, found]
    return found


def in_tuples(depth: int) -> tuple[Any, ...]:
    """Tuples in tuples."""
    found: tuple[Any, ...] = ()
    for _ in range(depth):
        found = (found,)
    return found


def opcodes(*parts: bytes) -> bytes:
    """A pickle from its instructions."""
    return b"\x80\x04" + b"".join(parts) + b"."


#: What no snapshot holds, in the place where the command would show it.
def with_name(name: Any) -> dict[str, Any]:
    snapshot = with_places()
    snapshot["torch_uvm"]["devices"][0]["name"] = name
    return snapshot


def with_segment(**changes: Any) -> dict[str, Any]:
    """A snapshot whose part of ours has another segment."""
    snapshot = with_places()
    snapshot["torch_uvm"]["devices"][0]["segments"][0].update(changes)
    return snapshot


def with_action(action: Any) -> dict[str, Any]:
    return plain(device_traces=[[{"action": action, "size": 1, "time_us": 1}]])


DIGITS = b"9" * 5000

REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    # A few hundred bytes that would take all memory.
    "lists where a name is expected": (
        lambda: pickle.dumps(with_name(doubled(60))),
        r"torch_uvm\.devices\[0\]\.name is a list: expected a text",
    ),
    "lists where a PyTorch version is expected": (
        lambda: pickle.dumps(plain(torch_uvm={"version": 1, "torch": doubled(60), "devices": []})),
        r"torch_uvm\.torch is a list: expected a text",
    ),
    "lists where an option is expected": (
        lambda: pickle.dumps(plain(torch_uvm={"version": 1, "config": {"use_uvm": doubled(60)}, "devices": []})),
        r"torch_uvm\.config\['use_uvm'\] is a list",
    ),
    "lists where a name of a function is expected": (
        lambda: pickle.dumps(
            plain(
                segments=[
                    {
                        "device": 0,
                        "blocks": [
                            {"state": "active_allocated", "frames": [frame("a.py", 1, "f") | {"name": doubled(60)}]}
                        ],
                    }
                ]
            )
        ),
        r"segments\[0\]\.blocks\[0\]\.frames\[0\]\.name is a list",
    ),
    "a large memo index": (lambda: opcodes(b"Nr", struct.pack("<I", 0x0FFFFFFF)), "number 268435455"),
    "a large memo index in text": (lambda: b"Np268435455\n.", "number 268435455"),
    "a large bytearray": (lambda: opcodes(b"\x96", struct.pack("<Q", 1 << 40)), "nothing but data"),
    "a large string": (lambda: opcodes(b"\x8d", struct.pack("<Q", 1 << 62)), "ends"),
    "a string of less than nothing": (lambda: opcodes(b"T", struct.pack("<i", -5)), "nothing but data"),
    "one list of segments many times": (
        lambda: pickle.dumps(
            plain(segments=[{"device": 0, "blocks": [{"state": "inactive", "size": 1}] * 4000}] * 4000)
        ),
        "more parts than the file has bytes",
    ),
    "one history many times": (
        lambda: pickle.dumps(plain(device_traces=[[{"action": "alloc", "size": 1, "time_us": 1}] * 100_000] * 100)),
        "more parts than the file has bytes",
    ),
    "a tuple as a key, doubled": (
        lambda: opcodes(
            b"}", b")", b"\x94h\x00\x86" + b"".join(b"\x94h" + bytes([n]) + b"\x86" for n in range(1, 60)), b"Ns"
        ),
        "a tuple as the key",
    ),
    "a tuple as a key, deep": (lambda: opcodes(b"})" + b"\x85" * 1_000_000, b"Ns"), "a tuple as the key"),
    # Numbers.
    "an integer of thousands of digits": (lambda: pickle.dumps(with_name(10**5000)), "64 bits"),
    "an integer of thousands of digits in text": (lambda: b"L" + DIGITS + b"L\n.", "64 bits"),
    "an integer of millions of digits in text": (lambda: b"I" + DIGITS * 1000 + b"\n.", "64 bits"),
    "a number that is none": (lambda: b"Ix\n.", "not a pickle"),
    "a fraction that is none": (lambda: b"Fx\n.", "not a pickle"),
    "not a number": (lambda: pickle.dumps(with_segment(populated_host=float("nan"))), r"populated_host is nan"),
    "a size below 0": (
        lambda: pickle.dumps(with_segment(populated_host=-1)),
        r"populated_host is -1: expected a whole number",
    ),
    "a size of 2**63": (
        lambda: pickle.dumps(with_segment(range_bytes=1 << 63)),
        r"range_bytes is 9223372036854775808: ",
    ),
    "a GPU of number 1000": (
        lambda: pickle.dumps(plain(segments=[{"device": 1000}])),
        r"segments\[0\]\.device is 1000",
    ),
    "a history for each of 1000 GPUs": (
        lambda: pickle.dumps(plain(device_traces=[[] for _ in range(1000)])),
        "1000 items",
    ),
    # Kinds.
    "an action that cannot be looked up": (
        lambda: pickle.dumps(with_action(["alloc"])),
        r"device_traces\[0\]\[0\]\.action is a list: expected a text",
    ),
    "an action that holds one": (
        lambda: pickle.dumps(with_action((["alloc"],))),
        r"action is a tuple: expected a text",
    ),
    "an unknown place": (
        lambda: pickle.dumps(with_segment(place="moon", populated_device=1, populated_host=1)),
        r"torch_uvm\.devices\[0\]\.segments\[0\]\.place is 'moon': expected one of: device, host, unplaced",
    ),
    "a later version": (lambda: pickle.dumps(plain(torch_uvm={"version": 2})), r"torch_uvm\.version is 2: expected 1"),
    "blocks that are none": (
        lambda: pickle.dumps(plain(segments=[{"blocks": 3}])),
        r"segments\[0\]\.blocks is 3: expected a list",
    ),
    "a segment that is none": (lambda: pickle.dumps(plain(segments=[None])), r"segments\[0\] is None: expected a dict"),
    "a pool of lists": (
        lambda: pickle.dumps(plain(segments=[{"segment_pool_id": (doubled(60), 0)}])),
        "segment_pool_id",
    ),
    # What is no pickle, or one that ends early.
    "nothing on the stack": (lambda: opcodes(b"0"), "not a pickle"),
    "no mark": (lambda: opcodes(b"t"), "not a pickle"),
    "items for what is no list": (lambda: opcodes(b"N(Ne"), "not a pickle"),
    "a key without a value": (lambda: opcodes(b"}(Nu"), "not a pickle"),
    "a memo that is empty": (lambda: opcodes(b"h\x07"), "not a pickle"),
    "a later protocol": (lambda: b"\x80\x09N.", "protocol 9"),
    "a text that is no UTF-8": (lambda: opcodes(b"\x8c\x01\xff"), "holds no 'segments'"),
    "a line of control characters": (lambda: b"c\x1b[2J\x07a\nb\x9b\xe2\x80\xae\n.", "nothing but data"),
    "a long name": (lambda: b"c" + b"os" * 100_000 + b"\nb\n.", "nothing but data"),
}

PAGES: dict[str, Callable[[], bytes]] = {
    "only blocks of no size": lambda: pickle.dumps(
        plain(
            segments=[{"device": 0, "blocks": [{"size": 0, "state": "active_allocated", "frames": []}]}],
            device_traces=[[]],
        )
    ),
    "no place for memory in two": lambda: pickle.dumps(
        plain(
            torch_uvm={
                "version": 1,
                "devices": [{"device": 0, "segments": [{"populated_device": 1, "populated_host": 2}]}],
            }
        )
    ),
    "a segment and nothing in it": lambda: pickle.dumps(plain(segments=[{"device": 0}], device_traces=[])),
    "halves of characters": lambda: pickle.dumps(with_name("\ud800")),
    "actions that are not known": lambda: pickle.dumps(with_action("user_defined")),
    "keys that are not known": lambda: pickle.dumps(plain(later={"a": [doubled(60)]}, last=in_tuples(500))),
    "stacks that are shared": lambda: pickle.dumps(
        plain(
            segments=[
                {"blocks": [{"size": 1, "state": "active_allocated", "frames": frames} for _ in range(2000)]}
                for frames in [[frame("a.py", line, "f" * 100_000) for line in range(200)]]
            ]
        )
    ),
    "a name of a million letters": lambda: pickle.dumps(with_name("x" * 1_000_000)),
    "many GPUs": lambda: pickle.dumps(plain(segments=[{"device": device, "total_size": 1} for device in range(16)])),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, tmp_path: Path) -> None:
    """One line says what is wrong and where."""
    make, said = REFUSED[name]
    line = report(make(), tmp_path)
    assert line is not None and re.search(said, line), line


@pytest.mark.parametrize("name", PAGES)
def test_what_is_odd_and_no_fault(name: str, tmp_path: Path) -> None:
    """A page all the same."""
    assert report(PAGES[name](), tmp_path) is None


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol(protocol: int, tmp_path: Path) -> None:
    """Whoever has pickled a snapshot."""
    from torch_uvm import _snapshot

    source = tmp_path / "snapshot.pickle"
    wanted = with_places()
    wanted["torch_uvm"]["devices"][0]["name"] = "Ωmega \\ \n 'GPU' \x00"
    wanted["torch_uvm"]["devices"][0]["statistics"].update(
        small=-3, zero=0, large=1 << 62, half=0.5, yes=True, no=False
    )
    source.write_bytes(pickle.dumps(wanted, protocol))
    assert _snapshot.load(source) == wanted


def test_what_is_written_is_protocol_4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's visualiser reads no later one, and Python 3.14 writes a later one unless it is told."""
    import torch

    written: list[Any] = []
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", plain)
    monkeypatch.setattr(pickle, "dump", lambda snapshot, file, protocol=None: written.append(protocol))
    torch_uvm.dump_snapshot(tmp_path / "snapshot.pickle")
    assert written == [4]


def test_a_file_without_an_end(tmp_path: Path) -> None:
    """It is not read to its end."""
    status = bounded(lambda: __main__.main(["report", "/dev/zero", "-o", str(tmp_path / "page.html")]))
    assert status == 2


def test_a_pipe(tmp_path: Path) -> None:
    """What comes through one is read."""
    target = tmp_path / "page.html"
    reading, writing = os.pipe()
    os.write(writing, pickle.dumps(plain()))
    os.close(writing)
    assert bounded(lambda: __main__.main(["report", f"/dev/fd/{reading}", "-o", str(target)])) == 0
    os.close(reading)
    assert target.exists()


@pytest.mark.parametrize("check", report_fuzz.PROPERTIES, ids=lambda check: check.__name__)
def test_fuzzed(check: Callable[[], None]) -> None:
    """Made-up and mutated files. TORCH_UVM_FUZZ=10000 tries as many of each kind, others each time."""
    bounded(check, seconds=MOST_SECONDS + report_fuzz.CHOSEN)
