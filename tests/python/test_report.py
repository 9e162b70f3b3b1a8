"""Snapshots with places, PyTorch's own tools on them, and the page that `python -m torch_uvm report` makes."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from on_device import on_device
from simulated import Finished
from snapshots import GIB, MIB, frame, plain, with_places
from under_test import torch_uvm

from torch_uvm import _snapshot

#: Takes long, and is the same for every version of PyTorch.
pytestmark = pytest.mark.one_version


def report(source: Path, target: Path, **variables: str) -> Finished:
    """Runs the command."""
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(Path(torch_uvm.__file__).parent.parent))))
    done = subprocess.run(
        [sys.executable, "-m", "torch_uvm", "report", str(source), "-o", str(target)],
        env={**os.environ, "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Finished(done.returncode, done.stdout, done.stderr)


class Page(HTMLParser):
    """What a page shows and what it would run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown: list[str] = []
        self.scripts: list[str] = []
        self._open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        (self.scripts if self._open == "script" else self.shown).append(data)

    @property
    def text(self) -> str:
        """The text, a line for each element."""
        return "\n".join(self.shown)

    def card(self, name: str) -> str:
        """The headline figure of this name."""
        return self.shown[self.shown.index(name) - 1]


def made(snapshot: Any, folder: Path) -> Page:
    """The page that the command makes of a snapshot."""
    source, target = folder / "snapshot.pickle", folder / "page.html"
    source.write_bytes(pickle.dumps(snapshot))
    ended = report(source, target)
    assert ended.status == 0 and str(target) in ended.out, ended.text
    return Page(target.read_text(encoding="utf-8"))


@on_device(conf="{conf}")
def run_on_device(conf: str, path: str) -> None:
    """A program whose snapshot the tests look at."""
    import torch_uvm

    torch.cuda.memory._record_memory_history(stacks="python")
    kept = []
    for _ in range(25 if conf else 15):
        kept.append(torch.empty(100 * MIB, dtype=torch.uint8, device="cuda"))
    small = torch.empty(1000, device="cuda")
    del kept[3:6]
    torch_uvm.dump_snapshot(path)
    del small


def dumped(tmp_path: Path, conf: str) -> Path:
    """A real snapshot from the simulated device."""
    path = tmp_path / "real.pickle"
    run_on_device(conf=conf, path=str(path))
    return path


@pytest.mark.parametrize("conf", ["use_uvm:True", ""])
def test_pytorchs_own_tools_open_it(conf: str, tmp_path: Path) -> None:
    """torch/cuda/_memory_viz.py, with and without our allocator."""
    import on_device as harness

    if harness.backend != "uvm" and conf:
        pytest.skip("about the uvm allocator only")
    from torch.cuda import _memory_viz

    path = dumped(tmp_path, conf)
    with open(path, "rb") as file:
        snapshot = pickle.load(file)
    assert ("torch_uvm" in snapshot) is bool(conf)
    lines = {"format_flamegraph": str}  # as they are: the program that draws them would be downloaded
    for text in (_memory_viz.segments(snapshot, **lines), _memory_viz.memory(snapshot, **lines)):
        assert "test_report.py" in text, text[:2000]
    assert "Summary of segments" in _memory_viz.segsum(snapshot)
    assert "free completed for" in _memory_viz.trace(snapshot)
    for plot in (_memory_viz.trace_plot, _memory_viz.segment_plot):
        assert "<script" in plot(snapshot)


def test_a_real_snapshot(tmp_path: Path) -> None:
    """Places, segments, samples and the page agree with what the program did."""
    import on_device as harness

    if harness.backend != "uvm":
        pytest.skip("about the uvm allocator only")
    path = dumped(tmp_path, "use_uvm:True")
    snapshot = _snapshot.load(path)  # nothing but data
    (ours,) = snapshot["torch_uvm"]["devices"]
    info, places = ours["memory_info"], ours["place_stats"]
    assert places["populated_device"] == info["populated_device"] <= info["device_limit"]
    assert places["populated_host"] == info["populated_host"] >= 500 * MIB
    assert {segment["place"] for segment in ours["segments"]} == {"device", "host"}
    assert sum(segment["populated_host"] for segment in ours["segments"]) == info["populated_host"]
    last = ours["samples"][-1]
    assert (last["device"], last["host"]) == (info["populated_device"], info["populated_host"]), last
    assert max(sample["allocated"] for sample in ours["samples"]) >= 2500 * MIB
    times = [sample["time_us"] for sample in ours["samples"]]
    trace = [entry["time_us"] for entry in snapshot["device_traces"][0]]
    assert times == sorted(times) and abs(times[0] - trace[0]) < 10_000_000, (times[:2], trace[:2])

    (device,) = _snapshot.devices(snapshot)
    assert device.allocated == info["allocated"] and device.reserved == info["reserved"]
    assert device.owners[0].name.startswith(f"{__file__}:") and device.owners[0].name.endswith("run_on_device")
    assert device.owners[0].count == 22 and device.owners[0].size == 2200 * MIB
    assert set(device.owners[0].by_place) == {"device", "host"}

    target = tmp_path / "page.html"
    ended = report(path, target)
    assert ended.status == 0, ended.text
    page = Page(target.read_text(encoding="utf-8"))
    assert page.card("allocated now") == _snapshot_size(info["allocated"])
    assert page.card("peak, host") == _snapshot_size(places["populated_host_peak"])
    assert "Without places" not in page.text and "NVIDIA GH200 480GB" in page.text
    assert "test_report.py" in page.text and "run_on_device" in page.text


def _snapshot_size(count: int) -> str:
    from torch_uvm._format import format_bytes as size

    return size(count)


def test_the_page_stands_alone(tmp_path: Path) -> None:
    """Nothing is loaded from anywhere, and the browser is told to load nothing."""
    page = made(with_places(), tmp_path)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base"), tag
        assert "src" not in attributes and "href" not in attributes, (tag, attributes)
    policies = [attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv")]
    assert policies and policies[0] is not None and policies[0].startswith("default-src 'none'"), policies
    assert sum(tag == "script" for tag, _ in page.tags) == 2, "plotly's and ours"


def test_numbers_of_a_page(tmp_path: Path) -> None:
    """Headline figures, owners and segments."""
    page = made(with_places(), tmp_path)
    for name, value in {
        "capacity": "10.00 GiB",
        "peak, GPU": "1.86 GiB",
        "peak, host": "333 MiB",
        "reserved now": "22.00 MiB",
        "allocated now": "12.00 MiB",
        "moved to the GPU": "77.00 MiB",
        "moved to the host": "55.00 MiB",
        "hints": "15",
        "stage, changes": "1, 9",
        "OutOfMemoryErrors": "0",
    }.items():
        assert page.card(name) == value, name
    (device,) = _snapshot.devices(with_places())
    assert [(owner.name, owner.size, owner.count) for owner in device.owners] == [
        ("/home/me/model.py:12 build", 9 * MIB, 2),
        ("MmBackward0 (backward pass, no Python frame)", 4 * MIB, 1),
    ]
    assert device.owners[0].by_place == {"host": 9 * MIB}
    first, second = device.segments
    assert (first.where, first.size, first.holes) == ("host", 64 * MIB, 3 * MIB)
    assert [first.total(state) for state in _snapshot.STATES] == [12 * MIB, MIB, 7 * MIB]
    assert (second.where, second.size) == ("", 2 * MIB)
    assert device.places is not None and device.places.seconds == [0, 1]
    assert device.places.series["host"] == [0, 20 * MIB]
    assert device.history is not None and device.history.seconds[-1] == 1, "it goes on to the last record of both"
    for words in (
        "/home/me/model.py:12 build",
        "/venv/site-packages/torch/nn/modules/linear.py:109 __init__",
        "use_uvm",
        "0x40000000",
    ):
        assert words in page.text, words


def test_a_snapshot_without_places(tmp_path: Path) -> None:
    """PyTorch's own: the page says what is missing, and follows the history back from its end."""
    page = made(plain(), tmp_path)
    assert "Without places" in page.text and "torch_uvm.dump_snapshot(filename)" in page.text
    assert page.card("reserved now") == "22.00 MiB" and page.card("allocated now") == "12.00 MiB"
    (device,) = _snapshot.devices(plain())
    assert device.places is None and device.history is not None
    assert device.history.series["reserved"] == [22 * MIB] * 5
    assert device.history.series["allocated"] == [0, 8 * MIB, 14 * MIB, 8 * MIB, 12 * MIB]


def test_without_a_history(tmp_path: Path) -> None:
    """No stacks, no timeline: the page says how to have them. And a snapshot of nothing."""
    bare = plain(device_traces=[[]])
    for segment in bare["segments"]:
        for block in segment["blocks"]:
            del block["frames"]
    page = made(bare, tmp_path)
    assert page.text.count("_record_memory_history()") == 2 and "no stack recorded" in page.text
    assert "No memory of any GPU" in made(plain(segments=[], device_traces=[[], []]), tmp_path).text


HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\u2028\ud800'\"%{y}<a href='javascript:alert(3)'>"
)


def test_hostile_text(tmp_path: Path) -> None:
    """Whatever the strings of a snapshot are, they stay text: in elements, in scripts, and in plotly's labels."""
    snapshot = with_places()
    ours = snapshot["torch_uvm"]
    (device,) = ours["devices"]
    ours["torch"] = device["name"] = device["segments"][0]["memory"] = HOSTILE
    for place in (ours, device, device["segments"][0], ours["config"], device["place_stats"], device["statistics"]):
        place[HOSTILE] = HOSTILE
    for place in (ours["config"], device["memory_info"], device["place_stats"], device["statistics"]):
        place.update(dict.fromkeys(place, HOSTILE))
    snapshot["allocator_settings"] = {"PYTORCH_CUDA_ALLOC_CONF": HOSTILE}
    for block in snapshot["segments"][0]["blocks"]:
        block["frames"] = [frame(HOSTILE + ".py", 1, HOSTILE)]
    snapshot["segments"][1]["segment_type"] = HOSTILE
    page = made(snapshot, tmp_path)
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    assert not [tag for tag, _ in page.tags if tag in ("img", "a")]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "</script><script>alert(1)</script>" in page.text, "it is shown as it is"
    ours_only = page.scripts[-1]
    assert "<" not in ours_only.replace("f =>", "") and "\u2028" not in ours_only
    # plotly reads its labels as HTML of a kind: there the text must be escaped once more.
    assert "\\u003cimg" not in ours_only and "\\u0026lt;img" in ours_only


class Runs:
    """An object whose pickle calls a function when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.made_of = function, arguments

    def __reduce__(self) -> Any:
        return self.made_of


@pytest.mark.parametrize("function", [os.mkdir, print, getattr], ids=lambda function: function.__name__)
def test_pickles_that_would_run_something(function: Callable[..., Any], tmp_path: Path) -> None:
    """They are refused, and nothing has run."""
    trap = tmp_path / "ran"
    source = tmp_path / "bad.pickle"
    source.write_bytes(pickle.dumps(plain(extra=Runs(function, str(trap), *(["x"] if function is getattr else [])))))
    ended = report(source, tmp_path / "page.html")
    assert ended.status == 2 and "holds nothing but data" in ended.err and function.__name__ in ended.err, ended.text
    assert not trap.exists() and str(trap) not in ended.out and not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a pickle"),
        (b"PK\x03\x04 a zip file", "not a pickle"),
        (pickle.dumps(plain())[:-40], "not a pickle"),
        (pickle.dumps([1, 2]), "no 'segments'"),
        (pickle.dumps({"segments": 3, "device_traces": []}), "no 'segments'"),
    ],
    ids=["empty", "zip", "cut", "list", "wrong type"],
)
def test_what_is_no_snapshot(content: bytes, said: str, tmp_path: Path) -> None:
    """An error that names the file; status 2."""
    source = tmp_path / "other.pickle"
    source.write_bytes(content)
    ended = report(source, tmp_path / "page.html")
    assert ended.status == 2 and f"{source}: is no memory snapshot: " in ended.err and said in ended.err, ended.text


def test_snapshots_with_anything_in_them(tmp_path: Path) -> None:
    """Data of the wrong types in any place make a page or an error that names the place, not a crash."""
    wrong: list[Any] = [None, "text", -5, 1e308, float("nan"), [], {}, [None, {"blocks": 3}], {"a": 1}]
    source = tmp_path / "snapshot.pickle"

    def look(snapshot: dict[str, Any], place: str) -> None:
        source.write_bytes(pickle.dumps(snapshot))
        try:
            _snapshot.devices(_snapshot.load(source))
        except _snapshot.NotASnapshot as error:
            assert str(error).startswith(place), error

    for value in wrong:
        for key in plain()["segments"][0]:
            snapshot = plain()
            snapshot["segments"][0][key] = value
            look(snapshot, f"segments[0].{key}")
        for key in with_places()["torch_uvm"]["devices"][0]:
            snapshot = with_places()
            snapshot["torch_uvm"]["devices"][0][key] = value
            look(snapshot, f"torch_uvm.devices[0].{key}")
        look(plain(torch_uvm=value), "torch_uvm")
        look(plain(device_traces=[value, [value]]), "device_traces[")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    """Neither to be read nor to be written."""
    ended = report(tmp_path / "missing.pickle", tmp_path / "page.html")
    assert ended.status == 2 and "missing.pickle: cannot be read: No such file" in ended.err, ended.text
    source = tmp_path / "snapshot.pickle"
    source.write_bytes(pickle.dumps(plain()))
    ended = report(source, tmp_path / "no" / "page.html")
    assert ended.status == 2 and "page.html: cannot be written: No such file" in ended.err, ended.text


def test_without_plotly(tmp_path: Path) -> None:
    """The error says how to install it."""
    source = tmp_path / "snapshot.pickle"
    source.write_bytes(pickle.dumps(plain()))
    (tmp_path / "plotly.py").write_text("raise ImportError('there is no plotly')\n")
    path = os.pathsep.join(
        (str(tmp_path), os.environ.get("PYTHONPATH", ""), str(Path(torch_uvm.__file__).parent.parent))
    )
    ended = report(source, tmp_path / "page.html", PYTHONPATH=path)
    assert ended.status == 2 and "pip install 'torch-uvm[report]'" in ended.err, ended.text


def test_long_histories_are_thinned() -> None:
    """No peak is lost."""
    values = [7] * 100_000
    values[77_777] = 99
    thin = _snapshot.thin(_snapshot.Timeline([float(second) for second in range(100_000)], {"host": values}), 1000)
    assert len(thin.seconds) == len(thin.series["host"]) <= 1000
    assert max(thin.series["host"]) == 99 and thin.seconds[0] == 0


def test_many_blocks(tmp_path: Path) -> None:
    """A page stays readable and small where there are hundreds of thousands of blocks."""
    block = {"size": 512, "requested_size": 512, "frames": []}
    states = ("inactive", "active_allocated")
    segments = []
    for start in range(GIB, 60 * GIB, GIB):
        blocks = [{**block, "address": start + 512 * at, "state": states[at % 2]} for at in range(5000)]
        segments.append({**plain()["segments"][0], "address": start, "blocks": blocks})
    page = made(plain(segments=segments), tmp_path)
    assert "too many blocks" in page.text and re.search(r"largest 40 of 59", page.text), page.text[:3000]
    assert len(page.scripts[-1]) < 500_000
