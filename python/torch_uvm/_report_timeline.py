"""The section of a page on memory over time."""

from __future__ import annotations

from typing import Any

from . import _report_html as html
from . import _snapshot
from ._report_plots import PLACE_COLOURS, PLACE_NAMES, Plots, unit_of
from ._schema import PLACES
from ._snapshot import Device, Timeline, number_of

#: Points of a timeline at most: no more can be seen.
MOST_POINTS = 4000


def timeline_section(device: Device, plot: Plots) -> str:
    """Memory over time."""
    title = "Memory over time"
    whole = [timeline for timeline in (device.places, device.history) if timeline is not None]
    if not whole:
        note = "Nothing was recorded: call torch.cuda.memory._record_memory_history() at the start of the program."
        return html.section(title, note, "")
    highest = max(max(values, default=0) for timeline in whole for values in timeline.series.values())
    unit, name = unit_of(highest)
    factor, moments = (1, "seconds") if whole[0].seconds[-1] >= 1 else (1000, "milliseconds")
    drawn = []
    for timeline in whole:
        thin = _snapshot.thin(timeline, MOST_POINTS)
        drawn.append(Timeline([factor * second for second in thin.seconds], thin.series))
    # PyTorch's history knows of each allocation, our samples only of changes in what is populated.
    areas, lines = drawn[0], drawn[-1]
    traces = []
    for key in (*PLACES, "reserved"):
        values = areas.series.get(key, [])
        if any(values):
            traces.append(
                _area(plot, areas, values, unit, name, PLACE_NAMES.get(key, key), PLACE_COLOURS.get(key, "#90a4b8"))
            )
    line = {"color": "#1a202c", "width": 1.4, "shape": "hv"}
    traces.append(_curve(plot, lines, lines.series["allocated"], unit, name, "allocated", line=line))
    shapes = []
    limit = number_of(device.part("memory_info").get("device_limit"))
    if device.places is not None and 0 < limit <= 1.3 * highest:
        height = limit / unit
        dots = {"dash": "dot", "color": "#c53030"}
        shapes = [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": height, "y1": height, "line": dots}]
    layout = {
        "xaxis": {"title": {"text": f"{moments} since the first record"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": name}, "rangemode": "tozero"},
        "hovermode": "x unified",
        "shapes": shapes,
    }
    note = "Populated memory by place, stacked, and what of it is in live allocations."
    if device.places is None:
        note = "From PyTorch's history: what is reserved, and what of it is in live allocations."
    if shapes:
        note += " The dotted line is the soft limit on memory on the GPU."
    records, points = (sum(len(timeline.seconds) for timeline in some) for some in (whole, drawn))
    if points < records:
        note += f" {records} records are drawn as {points} points, each the highest of its stretch."
    return html.section(title, note, plot.add(traces, layout, 360))


def _curve(plot: Plots, timeline: Timeline, values: list[int], unit: int, name: str, label: str, **more: Any) -> Any:
    scaled = [value / unit for value in values]
    hover = f"{label} %{{y:.3~f}} {name}<extra></extra>"
    return plot.objects.Scatter(x=timeline.seconds, y=scaled, name=label, mode="lines", hovertemplate=hover, **more)


def _area(plot: Plots, timeline: Timeline, values: list[int], unit: int, name: str, label: str, colour: str) -> Any:
    line = {"width": 0.5, "color": colour, "shape": "hv"}
    return _curve(plot, timeline, values, unit, name, label, stackgroup="places", line=line, fillcolor=colour)
