"""`python -m torch_uvm report`: one HTML page of a memory snapshot, which opens without a network.

plotly draws (an optional dependency, `pip install torch-uvm[report]`); its script is part of the page. A snapshot may come from
anywhere: whatever text is in it is escaped for HTML and for plotly's labels, which know some HTML themselves, and the page
forbids the browser everything but its own scripts and styles.
"""

from __future__ import annotations

import json
import os
import sys
from html import escape
from pathlib import Path
from typing import Any

from . import _snapshot, _version
from ._library import size
from ._schema import KEY, PLACES, NotASnapshot
from ._snapshot import Device, Owner, Segment, Timeline

#: How places and states are called and coloured.
PLACE_NAMES = {"device": "GPU", "host": "host", "unplaced": "unplaced", "mixed": "in mixed segments"}
PLACE_COLOURS = {"device": "#2b6cb0", "host": "#dd8a1f", "unplaced": "#7c6aa6", "mixed": "#b794a6", "": "#4a5568"}
STATE_NAMES = {
    "allocated": "allocated",
    "waiting": "freed, waits for streams",
    "free": "free (cached)",
    "mixed": "of segments in several places",
    "hole": "given back",
}
STATE_COLOURS = {"allocated": "#2f855a", "waiting": "#c53030", "free": "#c6d3de", "mixed": "#b794a6", "hole": "#ffffff"}
#: Points of a timeline, segments of a map, parts in them, owners in a chart and in the table: no more than can be seen.
MOST_POINTS, MOST_SEGMENTS, MOST_PIECES, MOST_BARS, MOST_OWNERS = 4000, 40, 6000, 15, 100
#: Letters of a text.
MOST_LETTERS = 1000
#: The page's own scripts and styles, and nothing else from anywhere.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
STYLE = """
body { font: 15px/1.45 system-ui, "Segoe UI", "Helvetica Neue", sans-serif; color: #1a202c; background: #f5f7fa; margin: 0 }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 60px }
h1 { font-size: 24px; margin: 0 0 2px } h2 { font-size: 20px; margin: 36px 0 10px } h3 { font-size: 16px; margin: 0 0 2px }
.sub, .note { color: #5a6675; margin: 0 0 12px; overflow-wrap: anywhere } .note { font-size: 13.5px; margin: 0 0 6px }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px; margin: 12px 0 }
.card, section { background: #fff; border: 1px solid #dde4ec; border-radius: 8px }
.card { padding: 10px 14px } .card b { display: block; font-size: 20px; white-space: nowrap }
.card span { color: #5a6675; font-size: 13px }
section { padding: 14px 18px; margin: 14px 0 }
.warn { border-left: 4px solid #dd8a1f }
table { border-collapse: collapse; width: 100%; font-size: 13.5px }
th { text-align: left; color: #5a6675; font-weight: 600; white-space: nowrap }
td, th { padding: 4px 10px 4px 0; border-bottom: 1px solid #edf1f5; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.c { font-family: ui-monospace, Menlo, monospace; font-size: 12.5px; overflow-wrap: anywhere }
.scroll { overflow-x: auto; max-height: 520px; overflow-y: auto }
details > pre { font-size: 12px; background: #f5f7fa; padding: 8px; overflow-x: auto; margin: 4px 0 } summary { cursor: pointer }
"""


class NoPlotly(RuntimeError):
    """plotly is not installed, or is too old."""


def page(snapshot: dict[str, Any], title: str) -> str:
    """The page of a snapshot that `_snapshot.load` has read.

    Raises:
        NoPlotly: plotly is missing.
    """
    plot = _Plots()
    ours = snapshot.get(KEY)
    found = _snapshot.devices(snapshot)
    parts = [f"<h1>GPU memory: {_text(title)}</h1>", f'<p class="sub">{_text(_origin(snapshot))}</p>']
    if ours is None:
        parts.append(
            '<section class="warn"><h3>Without places</h3>This snapshot does not tell which memory lies on the GPU and which in '
            "the host. <code>torch_uvm.dump_snapshot(filename)</code> writes one that does, where use_uvm is on.</section>"
        )
    if not found:
        parts.append("<section>No memory of any GPU is in this snapshot.</section>")
    for device in found:
        parts += _device(device, plot)
    if ours is not None and "config" in ours:
        parts += [
            "<h2>Options</h2>",
            _section("", "", _table(["option", "value"], [list(one) for one in ours["config"].items()])),
        ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width"><title>GPU memory: {_text(title)}</title>'
        f"<style>{STYLE}</style><script>{plot.library}</script></head><body><main>\n"
        + "\n".join(parts)
        + f"\n</main><script>{plot.calls()}</script></body></html>\n"
    )


class _Plots:
    """The figures of a page."""

    def __init__(self) -> None:
        try:
            from plotly import graph_objects  # type: ignore[import-untyped]
            from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]
        except ImportError as error:
            raise NoPlotly(
                f"report needs plotly ({error}): pip install 'torch-uvm[report]', or pip install plotly"
            ) from error
        self.objects = graph_objects
        self.library: str = get_plotlyjs()
        self._figures: list[Any] = []

    def add(self, traces: list[Any], layout: dict[str, Any], height: int) -> str:
        """Adds a figure; answers the element that it is to be drawn in."""
        figure = self.objects.Figure(traces)
        figure.update_layout(
            template="plotly_white",
            height=height,
            margin={"l": 70, "r": 20, "t": 10, "b": 44},
            font={"family": 'system-ui, "Segoe UI", sans-serif', "size": 13, "color": "#1a202c"},
            legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
            hoverlabel={"align": "left", "font": {"size": 12}},
            **layout,
        )
        figure.update_yaxes(ticks="outside", ticklen=6, tickcolor="rgba(0,0,0,0)")  # room between labels and bars
        figure.update_xaxes(title_font_size=13)
        figure.update_yaxes(title_font_size=13)
        self._figures.append(figure)
        return f'<div id="plot{len(self._figures) - 1}" style="height:{height}px"></div>'

    def calls(self) -> str:
        """The script that draws the figures."""
        config = json.dumps({"responsive": True, "displayModeBar": False})
        lines = []
        for number, figure in enumerate(self._figures):
            # Valid JSON all the same, and no text in it can end the script.
            drawn = figure.to_json().replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
            drawn = drawn.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
            lines.append(f"(f => Plotly.newPlot('plot{number}', f.data, f.layout, {config}))({drawn});")
        return "\n".join(lines)


def _origin(snapshot: dict[str, Any]) -> str:
    ours = snapshot.get(KEY)
    parts = []
    if ours is not None:
        parts.append(f"PyTorch {ours.get('torch', '?')}, uvm allocator")
    conf = snapshot.get("allocator_settings", {}).get("PYTORCH_CUDA_ALLOC_CONF")
    if conf:
        parts.append(f"PYTORCH_CUDA_ALLOC_CONF={conf}")
    return " · ".join([*parts, f"report of torch-uvm {_version.__version__}"])


def _device(device: Device, plot: _Plots) -> list[str]:
    """All that there is about one device."""
    name = (device.ours or {}).get("name")
    parts = [f"<h2>GPU {device.index}{': ' + _text(name) if name else ''}</h2>", _cards(device)]
    parts.append(_timeline(device, plot))
    if device.ours is not None and device.segments:
        parts.append(_by_place(device, plot))
    parts.append(_segments(device, plot))
    parts.append(_owners(device, plot))
    statistics = _statistics(device)
    if statistics:
        parts.append(statistics)
    return parts


def _cards(device: Device) -> str:
    """The headline figures."""
    cards: list[tuple[str, str]] = []
    info, places = _part(device, "memory_info"), _part(device, "place_stats")
    if info:
        cards += [("capacity", _size(info.get("capacity"))), ("device limit", _size(info.get("device_limit")))]
    samples = device.places.series if device.places else {}
    for place in PLACES:
        recorded = samples.get(place, [])
        peak = places.get(f"populated_{place}_peak", max(recorded, default=None))
        if peak or (info and place != "unplaced"):
            cards.append((f"peak, {PLACE_NAMES[place]}", _size(peak)))
    allocated, reserved = info.get("allocated", device.allocated), info.get("reserved", device.reserved)
    cards += [("reserved now", _size(reserved)), ("allocated now", _size(allocated))]
    statistics = _part(device, "statistics")
    if "allocated_bytes.all.peak" in statistics:
        cards.append(("allocated at most", _size(statistics["allocated_bytes.all.peak"])))
    if places:
        moved = [places.get(key) for key in ("moved_to_device", "moved_to_host")]
        hints = sum(_whole(places.get(key)) for key in ("prefetches", "advices", "discards"))
        cards += [("moved to the GPU", _size(moved[0])), ("moved to the host", _size(moved[1]))]
        cards += [
            ("hints", str(hints)),
            ("stage, changes", f"{places.get('stage', '?')}, {places.get('stage_changes', '?')}"),
        ]
    if statistics:
        cards.append(("OutOfMemoryErrors", str(statistics.get("num_ooms", "?"))))
    shown = (f'<div class="card"><b>{_text(value)}</b><span>{_text(name)}</span></div>' for name, value in cards)
    return f'<div class="cards">{"".join(shown)}</div>'


def _timeline(device: Device, plot: _Plots) -> str:
    """Memory over time."""
    title = "Memory over time"
    whole = [timeline for timeline in (device.places, device.history) if timeline is not None]
    if not whole:
        note = "Nothing was recorded: call torch.cuda.memory._record_memory_history() at the start of the program."
        return _section(title, note, "")
    highest = max(max(values, default=0) for timeline in whole for values in timeline.series.values())
    unit, name = _unit(highest)
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
    limit = _whole(_part(device, "memory_info").get("device_limit"))
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
    return _section(title, note, plot.add(traces, layout, 360))


def _curve(plot: _Plots, timeline: Timeline, values: list[int], unit: int, name: str, label: str, **more: Any) -> Any:
    scaled = [value / unit for value in values]
    hover = f"{label} %{{y:.3~f}} {name}<extra></extra>"
    return plot.objects.Scatter(x=timeline.seconds, y=scaled, name=label, mode="lines", hovertemplate=hover, **more)


def _area(plot: _Plots, timeline: Timeline, values: list[int], unit: int, name: str, label: str, colour: str) -> Any:
    line = {"width": 0.5, "color": colour, "shape": "hv"}
    return _curve(plot, timeline, values, unit, name, label, stackgroup="places", line=line, fillcolor=colour)


def _by_place(device: Device, plot: _Plots) -> str:
    """What is populated at each place, and what it is used for."""
    sums: dict[str, dict[str, int]] = {}
    for segment in device.segments:
        if segment.where == "mixed":
            # Which of its blocks lie where is not in the snapshot.
            for place, count in segment.populated.items():
                sums.setdefault(place, dict.fromkeys(STATE_NAMES, 0))["mixed"] += count
            sums.setdefault(segment.place, dict.fromkeys(STATE_NAMES, 0))["hole"] += segment.holes
            continue
        total = sums.setdefault(segment.where, dict.fromkeys(STATE_NAMES, 0))
        for state in _snapshot.STATES:
            total[state] += segment.total(state)
        total["hole"] += segment.holes
    places = [place for place in (*reversed(PLACES), "") if place in sums]
    unit, name = _unit(max(sum(total.values()) for total in sums.values()))
    traces = [
        plot.objects.Bar(
            orientation="h",
            y=[PLACE_NAMES.get(place, "not known") for place in places],
            x=[sums[place][state] / unit for place in places],
            name=STATE_NAMES[state],
            marker=_marker(state),
            customdata=[size(sums[place][state]) for place in places],
            hovertemplate="%{y}: %{customdata} " + STATE_NAMES[state] + "<extra></extra>",
        )
        for state in STATE_NAMES
        if any(total[state] for total in sums.values())
    ]
    layout = {"barmode": "stack", "xaxis": {"title": {"text": name}}, "bargap": 0.35}
    note = "What the segments at each place are used for. Holes were given back to the driver and hold no memory."
    return _section("Memory by place", note, plot.add(traces, layout, 120 + 46 * len(places)))


def _segments(device: Device, plot: _Plots) -> str:
    """A map of the segments, and a table of them."""
    if not device.segments:
        return _section("Segments", "There are none.", "")
    shown = device.segments[:MOST_SEGMENTS]
    unit, name = _unit(max(_extent(segment) for segment in shown))
    labels = [f"{number + 1}" for number in range(len(shown))]
    rows: dict[str, list[tuple[str, float, float, str]]] = {}
    whole = sum(len(segment.pieces) for segment in shown) <= MOST_PIECES
    for label, segment in zip(labels, shown):
        for offset, length, state in _parts(segment, whole):
            about = f"segment {label}, {_place(segment)}: {size(length)} {STATE_NAMES[state]} at offset {size(offset)}"
            rows.setdefault(state, []).append((label, offset / unit, length / unit, escape(about)))
    traces = [
        plot.objects.Bar(
            orientation="h",
            y=[row[0] for row in rows[state]],
            base=[row[1] for row in rows[state]],
            x=[row[2] for row in rows[state]],
            customdata=[row[3] for row in rows[state]],
            name=STATE_NAMES[state],
            marker=_marker(state),
            hovertemplate="%{customdata}<extra></extra>",
        )
        for state in STATE_NAMES
        if state in rows
    ]
    layout = {
        "barmode": "overlay",
        "bargap": 0.25,
        "xaxis": {"title": {"text": f"offset in the segment, {name}"}, "rangemode": "tozero"},
        "yaxis": {
            "title": {"text": "segment"},
            "type": "category",
            "categoryorder": "array",
            "categoryarray": labels[::-1],
        },
    }
    note = "Each bar is a segment, the largest first; white is address space that holds no memory."
    if len(shown) < len(device.segments):
        note += f" The largest {len(shown)} of {len(device.segments)} are drawn."
    if not whole:
        note += " There are too many blocks to draw each: the bars show sums."
    table = _table(
        [
            "",
            "place",
            "memory",
            "pool",
            "stream",
            "on the GPU",
            "in the host",
            "allocated",
            "free",
            "blocks",
            "range",
            "address",
        ],
        [_segment_row(number, segment) for number, segment in enumerate(device.segments[:MOST_OWNERS])],
        numeric={0, 5, 6, 7, 8, 9, 10},
    )
    drawn = plot.add(traces, layout, 130 + 24 * max(len(shown), 3))
    return _section("Segments", note, f'{drawn}<div class="scroll">{table}</div>')


def _segment_row(number: int, segment: Segment) -> list[str]:
    populated = segment.populated
    return [
        str(number + 1),
        _place(segment),
        " ".join(filter(None, (segment.memory, segment.kind, "growing" if segment.growing else ""))),
        segment.pool,
        str(segment.stream),
        size(populated["device"]) if populated else "?",
        size(populated["host"]) if populated else "?",
        size(segment.total("allocated")),
        size(segment.total("free") + segment.total("waiting")),
        str(len(segment.pieces)),
        size(segment.size),
        f"{segment.address:#x}",
    ]


def _parts(segment: Segment, whole: bool) -> list[tuple[int, int, str]]:
    """Offset, length and state of what is drawn of a segment: neighbours in the same state are one."""
    if not whole:
        parts, end = [], 0
        for state in _snapshot.STATES:
            length = segment.total(state)
            if length:
                parts.append((end, length, state))
                end += length
        return parts
    parts = []
    for piece in segment.pieces:
        if parts:
            offset, length, state = parts[-1]
            if piece.offset > offset + length:
                parts.append((offset + length, piece.offset - offset - length, "hole"))
            elif state == piece.state:
                parts[-1] = (offset, length + piece.size, state)
                continue
        parts.append((piece.offset, piece.size, piece.state))
    return parts


def _extent(segment: Segment) -> int:
    """Where the last part of a segment ends."""
    return max((piece.offset + piece.size for piece in segment.pieces), default=0)


def _owners(device: Device, plot: _Plots) -> str:
    """The largest owners of live memory."""
    title = "Owners of live memory"
    shown = [owner for owner in device.owners if owner.size][:MOST_BARS][::-1]
    if not shown:
        return _section(title, "No memory is in use.", "")
    unit, name = _unit(max(owner.size for owner in shown))
    places = [place for place in (*PLACES, "mixed", "") if any(_at(owner, place) for owner in shown)]
    traces = [
        plot.objects.Bar(
            orientation="h",
            y=[number for number in range(len(shown))],
            x=[_at(owner, place) / unit for owner in shown],
            name=PLACE_NAMES.get(place, "live memory"),
            marker={"color": PLACE_COLOURS[place]},
            customdata=[_hover(owner) for owner in shown],
            hovertemplate="%{customdata}<extra></extra>",
        )
        for place in places
    ]
    layout = {
        "barmode": "stack",
        "bargap": 0.3,
        "showlegend": len(places) > 1 or places != [""],
        "xaxis": {"title": {"text": name}},
        "yaxis": {
            "tickmode": "array",
            "tickvals": list(range(len(shown))),
            "ticktext": [escape(_short(owner.name)) for owner in shown],
            "automargin": True,
        },
    }
    rows = []
    for owner in device.owners[:MOST_OWNERS]:
        stack = escape("\n".join(owner.stack)) or "no stack recorded"
        rows.append(
            f'<tr><td class="n">{size(owner.size)}</td><td class="n">{owner.count}</td><td class="n">{size(owner.largest)}</td>'
            f'<td class="c"><details><summary>{_text(owner.name)}</summary><pre>{stack}</pre></details></td></tr>'
        )
    heads = '<tr><th class="n">live</th><th class="n">blocks</th><th class="n">largest</th><th>line, and the stack of its largest block</th></tr>'
    note = "By the innermost line of the program that is not PyTorch's own."
    if all(owner.name == "no stack recorded" for owner in device.owners):
        note += " No stacks were recorded: call torch.cuda.memory._record_memory_history() at the start of the program."
    if len(rows) < len(device.owners):
        note += f" The largest {len(rows)} of {len(device.owners)} are listed."
    drawn = plot.add(traces, layout, 120 + 26 * max(len(shown), 2))
    return _section(title, note, f'{drawn}<div class="scroll"><table>{heads}{"".join(rows)}</table></div>')


def _at(owner: Owner, place: str) -> int:
    """What an owner has at a place; "" is what no place is known of."""
    return owner.by_place.get(place, 0) if place else owner.size - sum(owner.by_place.values())


def _hover(owner: Owner) -> str:
    """An owner in a few lines, for plotly."""
    stack = [_short(line, 110) for line in owner.stack if ".py:" in line][:14]
    return "<br>".join(
        escape(line) for line in (f"{size(owner.size)} in {owner.count} block(s)", _short(owner.name, 110), "", *stack)
    )


def _statistics(device: Device) -> str:
    """The allocator's own figures."""
    ours = {f"place_stats.{key}": value for key, value in _part(device, "place_stats").items()}
    theirs = _part(device, "statistics")
    rows = [[key, str(value)] for key, value in sorted({**ours, **theirs}.items(), key=lambda one: str(one[0]))]
    if not rows:
        return ""
    table = _table(["statistic", "value"], rows, numeric={1})
    return _section("Statistics", "", f"<details><summary>{len(rows)} figures</summary>{table}</details>")


def _part(device: Device, key: str) -> dict[str, Any]:
    """A dict of our part of the snapshot; empty where there is none."""
    part: dict[str, Any] = (device.ours or {}).get(key, {})
    return part


def _place(segment: Segment) -> str:
    where = segment.where
    return "GPU and host" if where == "mixed" else PLACE_NAMES.get(where, where or "not known")


def _marker(state: str) -> dict[str, Any]:
    outline = {"color": "#a0aec0" if state in ("hole", "free") else STATE_COLOURS[state], "width": 0.6}
    return {"color": STATE_COLOURS[state], "line": outline}


def _unit(largest: int) -> tuple[int, str]:
    """The unit in which an axis is drawn."""
    for shift, name in ((30, "GiB"), (20, "MiB")):
        if largest >= 1 << shift:
            return 1 << shift, name
    return 1 << 10, "KiB"


def _whole(value: object) -> int:
    """A whole number of our part's figures; 0 where it is none."""
    return value if isinstance(value, int) else 0


def _size(value: object) -> str:
    return size(value) if isinstance(value, int) else "?"


def _short(text: str, most: int = 64) -> str:
    """The end of a text, which of a path is the part that matters."""
    return text if len(text) <= most else "…" + text[1 - most :]


def _text(value: object) -> str:
    """A text for HTML; of a long one the beginning, for many parts of a snapshot may share it."""
    text = str(value)
    return escape(text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1] + "…")


def _section(title: str, note: str, body: str) -> str:
    head = f"<h3>{_text(title)}</h3>" if title else ""
    return f"<section>{head}{f'<p class=note>{_text(note)}</p>' if note else ''}{body}</section>"


def _table(heads: list[str], rows: list[list[Any]], numeric: set[int] = frozenset()) -> str:  # type: ignore[assignment]
    def line(cells: list[Any], tag: str) -> str:
        shown = (
            f"<{tag}{' class=n' if column in numeric else ''}>{_text(cell)}</{tag}>"
            for column, cell in enumerate(cells)
        )
        return f"<tr>{''.join(shown)}</tr>"

    return f"<table>{line(heads, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


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
