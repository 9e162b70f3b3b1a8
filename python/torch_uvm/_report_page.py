"""`python -m torch_uvm report`: one HTML page of a memory snapshot, which opens without a network.

plotly draws (an optional dependency, `pip install torch-uvm[report]`); its script is part of the page. A snapshot may
come from anywhere: whatever text is in it is escaped for HTML and for plotly's labels, which know some HTML themselves,
and the page forbids the browser everything but its own scripts and styles.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from . import _report_html as html
from . import _snapshot, _version
from ._format import format_bytes as size
from ._report_owners import owners_section
from ._report_plots import PLACE_NAMES, NoPlotly, Plots
from ._report_segments import by_place_section, segments_section
from ._report_timeline import timeline_section
from ._schema import KEY, PLACES, NotASnapshot
from ._snapshot import Device, number_of


def page(snapshot: dict[str, Any], title: str) -> str:
    """The page of a snapshot that `_snapshot.load` has read.

    Raises:
        NoPlotly: plotly is missing.
    """
    plot = Plots()
    ours = snapshot.get(KEY)
    found = _snapshot.devices(snapshot)
    parts = [f"<h1>GPU memory: {html.text(title)}</h1>", f'<p class="sub">{html.text(_origin(snapshot))}</p>']
    if ours is None:
        parts.append(
            '<section class="warn"><h3>Without places</h3>This snapshot does not tell which memory lies on '
            "the GPU and which in the host. <code>torch_uvm.dump_snapshot(filename)</code> writes one that does, "
            "where use_uvm is on.</section>"
        )
    if not found:
        parts.append("<section>No memory of any GPU is in this snapshot.</section>")
    for device in found:
        parts += _device(device, plot)
    if ours is not None and "config" in ours:
        parts += [
            "<h2>Options</h2>",
            html.section("", "", html.table(["option", "value"], [list(one) for one in ours["config"].items()])),
        ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{html.POLICY}">'
        f'<meta name="viewport" content="width=device-width"><title>GPU memory: {html.text(title)}</title>'
        f"<style>{html.STYLE}</style><script>{plot.library}</script></head><body><main>\n"
        + "\n".join(parts)
        + f"\n</main><script>{plot.calls()}</script></body></html>\n"
    )


def _origin(snapshot: dict[str, Any]) -> str:
    ours = snapshot.get(KEY)
    parts = []
    if ours is not None:
        parts.append(f"PyTorch {ours.get('torch', '?')}, uvm allocator")
    conf = snapshot.get("allocator_settings", {}).get("PYTORCH_CUDA_ALLOC_CONF")
    if conf:
        parts.append(f"PYTORCH_CUDA_ALLOC_CONF={conf}")
    return " · ".join([*parts, f"report of torch-uvm {_version.__version__}"])


def _device(device: Device, plot: Plots) -> list[str]:
    """All that there is about one device."""
    name = (device.ours or {}).get("name")
    parts = [f"<h2>GPU {device.index}{': ' + html.text(name) if name else ''}</h2>", _cards(device)]
    parts.append(timeline_section(device, plot))
    if device.ours is not None and device.segments:
        parts.append(by_place_section(device, plot))
    parts.append(segments_section(device, plot))
    parts.append(owners_section(device, plot))
    statistics = _statistics(device)
    if statistics:
        parts.append(statistics)
    return parts


def _cards(device: Device) -> str:
    """The headline figures."""
    cards: list[tuple[str, str]] = []
    info, places = device.part("memory_info"), device.part("place_stats")
    if info:
        cards += [("capacity", size_of(info.get("capacity"))), ("device limit", size_of(info.get("device_limit")))]
    samples = device.places.series if device.places else {}
    for place in PLACES:
        recorded = samples.get(place, [])
        peak = places.get(f"populated_{place}_peak", max(recorded, default=None))
        if peak or (info and place != "unplaced"):
            cards.append((f"peak, {PLACE_NAMES[place]}", size_of(peak)))
    allocated, reserved = info.get("allocated", device.allocated), info.get("reserved", device.reserved)
    cards += [("reserved now", size_of(reserved)), ("allocated now", size_of(allocated))]
    statistics = device.part("statistics")
    if "allocated_bytes.all.peak" in statistics:
        cards.append(("allocated at most", size_of(statistics["allocated_bytes.all.peak"])))
    if places:
        moved = [places.get(key) for key in ("moved_to_device", "moved_to_host")]
        hints = sum(number_of(places.get(key)) for key in ("prefetches", "advices", "discards"))
        cards += [("moved to the GPU", size_of(moved[0])), ("moved to the host", size_of(moved[1]))]
        cards += [
            ("hints", str(hints)),
            ("stage, changes", f"{places.get('stage', '?')}, {places.get('stage_changes', '?')}"),
        ]
    if statistics:
        cards.append(("OutOfMemoryErrors", str(statistics.get("num_ooms", "?"))))
    shown = (
        f'<div class="card"><b>{html.text(value)}</b><span>{html.text(name)}</span></div>' for name, value in cards
    )
    return f'<div class="cards">{"".join(shown)}</div>'


def _statistics(device: Device) -> str:
    """The allocator's own figures."""
    ours = {f"place_stats.{key}": value for key, value in device.part("place_stats").items()}
    theirs = device.part("statistics")
    rows = [[key, str(value)] for key, value in sorted({**ours, **theirs}.items(), key=lambda one: str(one[0]))]
    if not rows:
        return ""
    table = html.table(["statistic", "value"], rows, numeric={1})
    return html.section("Statistics", "", f"<details><summary>{len(rows)} figures</summary>{table}</details>")


def size_of(value: object) -> str:
    return size(value) if isinstance(value, int) else "?"


def main(source: str, target: str) -> int:
    """The command: writes the page; answers the exit status, 2 after an error that is said on stderr."""
    try:
        try:
            snapshot = _snapshot.load(source)
        except OSError as error:
            raise _Refused(f"{source}: cannot be read: {error.strerror}") from error
        except NotASnapshot as error:
            raise _Refused(f"{source}: is no memory snapshot: {error}") from error
        text = page(snapshot, os.path.basename(source))
        try:
            # A file's name may hold what no text can.
            Path(target).write_text(text, encoding="utf-8", errors="replace")
        except OSError as error:
            raise _Refused(f"{target}: cannot be written: {error.strerror}") from error
    except (_Refused, NoPlotly) as error:
        print(f"torch-uvm report: {error}", file=sys.stderr)
        return 2
    print(f"{target}: {size(_snapshot.file_size(target))}")
    return 0


class _Refused(Exception):
    """Why there is no page."""
