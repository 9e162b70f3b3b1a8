"""Files of unknown origin for `report`, by hypothesis: what each property of them is, and how they are made."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import pickletools
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from snapshots import with_places
from under_test import torch_uvm

from torch_uvm import _report_page, _schema, _snapshot, _unpickle

#: How many examples of each property are tried instead, others each time.
VARIABLE = "TORCH_UVM_FUZZ"
CHOSEN = int(os.environ.get(VARIABLE, "0"))
PROTOCOLS = st.integers(0, pickle.HIGHEST_PROTOCOL)


def tried(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """How often a property is looked at."""
    return settings(
        max_examples=CHOSEN or examples,
        derandomize=not CHOSEN,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def doubled(times: int) -> list[Any]:
    """A list that takes a few bytes for each doubling."""
    found: list[Any] = []
    for _ in range(times):
        found = [found, found]
    return found


def nested(depth: int) -> list[Any]:
    """Lists in lists."""
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(allow_nan=False),
    st.text(max_size=20),
    st.binary(max_size=20),
)
#: Data as a snapshot might hold it.
DATA = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=8), st.integers(-9, 9)), inner, max_size=5),
    ),
    max_leaves=20,
)
#: What may stand anywhere in its stead.
JUNK = st.one_of(
    DATA,
    st.integers(-4, 4),
    st.integers(55, 70).map(lambda bits: 1 << bits),
    st.sampled_from(
        [float("nan"), float("inf"), 1e308, 10**4000, -(10**400), "alloc", "device", "moon", "\ud800", "x" * 5000]
    ),
    st.integers(1, 80).map(doubled),
    st.integers(1, 200).map(nested),
    st.sets(st.integers(), max_size=2),
    st.binary(max_size=4).map(bytearray),
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a snapshot with every key that it has."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


@st.composite
def snapshots(draw: Any) -> dict[str, Any]:
    """A snapshot in which some places have something else, or the same as another place, or nothing."""
    snapshot = with_places()
    all_places = places(snapshot)
    for _ in range(draw(st.integers(0, 4))):
        container, key = all_places[draw(st.integers(0, len(all_places) - 1))]
        if isinstance(container, dict) and key not in container:
            continue
        how = draw(st.integers(0, 9))
        if how < 6:
            container[key] = draw(JUNK)
        elif how < 8:
            other, at = all_places[draw(st.integers(0, len(all_places) - 1))]
            container[key] = other.get(at) if isinstance(other, dict) else other[at]
        elif how == 8 and isinstance(container[key], list):
            container[key] = container[key] * draw(st.integers(0, 50))
        elif isinstance(container, dict):
            container.pop(key, None)
    return snapshot


def argument(kind: pickletools.ArgumentDescriptor | None) -> st.SearchStrategy[bytes]:
    """Bytes as an instruction takes them, lengths that are wrong among them."""
    if kind is None:
        return st.just(b"")
    numbers = st.one_of(st.integers(0, 40), st.integers(0, (1 << 63) - 1))
    if kind.n == pickletools.UP_TO_NEWLINE:
        return st.one_of(
            numbers.map(lambda number: b"%d\n" % number), st.binary(max_size=12).map(lambda text: text + b"\n")
        )
    if kind.n >= 0:
        return st.one_of(
            st.integers(0, 12).map(lambda number: number.to_bytes(kind.n, "little")),
            st.binary(min_size=kind.n, max_size=kind.n),
        )
    layout = {
        pickletools.TAKEN_FROM_ARGUMENT1: "<B",
        pickletools.TAKEN_FROM_ARGUMENT4: "<i",
        pickletools.TAKEN_FROM_ARGUMENT4U: "<I",
        pickletools.TAKEN_FROM_ARGUMENT8U: "<Q",
    }[kind.n]  # fmt: skip
    right = st.binary(max_size=12).map(lambda text: struct.pack(layout, len(text)) + text)
    return st.one_of(right, st.binary(min_size=struct.calcsize(layout), max_size=20))


INSTRUCTIONS = st.sampled_from(pickletools.opcodes).flatmap(
    lambda code: argument(code.arg).map(lambda bytes_: code.code.encode("latin-1") + bytes_)
)
PICKLES = st.one_of(
    st.binary(max_size=200),
    st.lists(INSTRUCTIONS, max_size=60).map(lambda parts: b"\x80\x04" + b"".join(parts) + b"."),
)


@st.composite
def mutated(draw: Any) -> bytes:
    """The bytes of a snapshot's pickle with some of them changed, left out, or there twice."""
    content = bytearray(pickle.dumps(with_places(), draw(PROTOCOLS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content) - 1))
        to = min(len(content), at + draw(st.integers(0, 8)))
        how = draw(st.integers(0, 2))
        content[at:to] = draw(st.binary(max_size=6)) if how else content[at:to] * 2
    return bytes(content)


def load(content: bytes) -> dict[str, Any] | None:
    """What `report` reads of a file; None where it refuses it with one line."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            return _snapshot.load(file.name)
        except _schema.NotASnapshot as error:
            line = str(error)
            assert line.isprintable() and 0 < len(line) < 600, line[:2000]
            return None


@tried(300)
@given(DATA, PROTOCOLS)
def data_comes_back(value: Any, protocol: int) -> None:
    """What is data is read as pickle reads it."""
    content = pickle.dumps(value, protocol)
    if protocol < 3 and (b"_codecs\n" in content or b"__builtin__\n" in content):  # bytes are a call there
        return
    found = _unpickle.loads(content)
    assert found == value and repr(found) == repr(value)


@tried(500)
@given(st.one_of(PICKLES, mutated()))
@example(b"\x80\x04Nr\xff\xff\xff\x0f.")
def bytes_are_read_or_refused(content: bytes) -> None:
    """Whatever the bytes are; and what can be read is looked at."""
    found = load(content)
    if found is not None:
        _snapshot.devices(found)


@tried(300)
@given(snapshots(), PROTOCOLS)
def snapshots_are_read_or_refused(snapshot: dict[str, Any], protocol: int) -> None:
    """Whatever stands in a place; and what can be read is looked at."""
    found = load(pickle.dumps(snapshot, protocol))
    if found is not None:
        _snapshot.devices(found)


@tried(20)
@given(snapshots())
def a_page_or_a_line(snapshot: dict[str, Any]) -> None:
    """The command itself."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "snapshot.pickle"), Path(folder, "page.html")
        source.write_bytes(pickle.dumps(snapshot))
        out, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            status = _report_page.main(str(source), str(target))
        if status == 0:
            assert not error.getvalue() and target.stat().st_size < 100 << 20
        else:
            assert status == 2 and error.getvalue().count("\n") == 1 and not target.exists(), error.getvalue()


PROPERTIES = (data_comes_back, bytes_are_read_or_refused, snapshots_are_read_or_refused, a_page_or_a_line)
__all__ = ["PROPERTIES", "VARIABLE", "torch_uvm"]
