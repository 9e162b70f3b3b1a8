"""The sections of a page on what the segments are used for."""

from __future__ import annotations

from html import escape

from . import _report_html as html
from . import _snapshot
from ._format import format_bytes as size
from ._report_plots import PLACE_NAMES, STATE_NAMES, Plots, marker, unit_of
from ._schema import PLACES
from ._snapshot import Device, Segment

#: Segments and parts of them that are drawn at most, and segments in the table: no more can be seen.
MOST_SEGMENTS, MOST_PIECES, MOST_ROWS = 40, 6000, 100


def by_place_section(device: Device, plot: Plots) -> str:
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
    unit, name = unit_of(max(sum(total.values()) for total in sums.values()))
    traces = [
        plot.objects.Bar(
            orientation="h",
            y=[PLACE_NAMES.get(place, "not known") for place in places],
            x=[sums[place][state] / unit for place in places],
            name=STATE_NAMES[state],
            marker=marker(state),
            customdata=[size(sums[place][state]) for place in places],
            hovertemplate="%{y}: %{customdata} " + STATE_NAMES[state] + "<extra></extra>",
        )
        for state in STATE_NAMES
        if any(total[state] for total in sums.values())
    ]
    layout = {"barmode": "stack", "xaxis": {"title": {"text": name}}, "bargap": 0.35}
    note = "What the segments at each place are used for. Holes were given back to the driver and hold no memory."
    return html.section("Memory by place", note, plot.add(traces, layout, 120 + 46 * len(places)))


def segments_section(device: Device, plot: Plots) -> str:
    """A map of the segments, and a table of them."""
    if not device.segments:
        return html.section("Segments", "There are none.", "")
    shown = device.segments[:MOST_SEGMENTS]
    unit, name = unit_of(max(_extent(segment) for segment in shown))
    labels = [f"{number + 1}" for number in range(len(shown))]
    rows: dict[str, list[tuple[str, float, float, str]]] = {}
    whole = sum(len(segment.pieces) for segment in shown) <= MOST_PIECES
    for label, segment in zip(labels, shown):
        for offset, length, state in _parts(segment, whole):
            about = (
                f"segment {label}, {place_of(segment)}: {size(length)} {STATE_NAMES[state]} at offset {size(offset)}"
            )
            rows.setdefault(state, []).append((label, offset / unit, length / unit, escape(about)))
    traces = [
        plot.objects.Bar(
            orientation="h",
            y=[row[0] for row in rows[state]],
            base=[row[1] for row in rows[state]],
            x=[row[2] for row in rows[state]],
            customdata=[row[3] for row in rows[state]],
            name=STATE_NAMES[state],
            marker=marker(state),
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
    table = html.table(
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
        [_segment_row(number, segment) for number, segment in enumerate(device.segments[:MOST_ROWS])],
        numeric={0, 5, 6, 7, 8, 9, 10},
    )
    drawn = plot.add(traces, layout, 130 + 24 * max(len(shown), 3))
    return html.section("Segments", note, f'{drawn}<div class="scroll">{table}</div>')


def _segment_row(number: int, segment: Segment) -> list[str]:
    populated = segment.populated
    return [
        str(number + 1),
        place_of(segment),
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


def place_of(segment: Segment) -> str:
    where = segment.where
    return "GPU and host" if where == "mixed" else PLACE_NAMES.get(where, where or "not known")
