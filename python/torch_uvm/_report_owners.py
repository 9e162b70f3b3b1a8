"""The section of a page on who owns live memory."""

from __future__ import annotations

from html import escape

from . import _report_html as html
from ._format import format_bytes as size
from ._report_plots import PLACE_COLOURS, PLACE_NAMES, Plots, unit_of
from ._schema import PLACES
from ._snapshot import Device, Owner

#: Owners that are drawn at most, and those in the table.
MOST_BARS, MOST_OWNERS = 15, 100


def owners_section(device: Device, plot: Plots) -> str:
    """The largest owners of live memory."""
    title = "Owners of live memory"
    shown = [owner for owner in device.owners if owner.size][:MOST_BARS][::-1]
    if not shown:
        return html.section(title, "No memory is in use.", "")
    unit, name = unit_of(max(owner.size for owner in shown))
    places = [place for place in (*PLACES, "mixed", "") if any(_at(owner, place) for owner in shown)]
    traces = [
        plot.objects.Bar(
            orientation="h",
            y=list(range(len(shown))),
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
            "ticktext": [escape(html.short(owner.name)) for owner in shown],
            "automargin": True,
        },
    }
    rows = []
    for owner in device.owners[:MOST_OWNERS]:
        stack = escape("\n".join(owner.stack)) or "no stack recorded"
        numbers = (size(owner.size), owner.count, size(owner.largest))
        rows.append(
            f"<tr>{''.join(f'<td class=n>{number}</td>' for number in numbers)}"
            f'<td class="c"><details><summary>{html.text(owner.name)}</summary><pre>{stack}</pre></details></td></tr>'
        )
    heads = "".join(f"<th class=n>{head}</th>" for head in ("live", "blocks", "largest"))
    heads = f"<tr>{heads}<th>line, and the stack of its largest block</th></tr>"
    note = "By the innermost line of the program that is not PyTorch's own."
    if all(owner.name == "no stack recorded" for owner in device.owners):
        note += " No stacks were recorded: call torch.cuda.memory._record_memory_history() at the start of the program."
    if len(rows) < len(device.owners):
        note += f" The largest {len(rows)} of {len(device.owners)} are listed."
    drawn = plot.add(traces, layout, 120 + 26 * max(len(shown), 2))
    return html.section(title, note, f'{drawn}<div class="scroll"><table>{heads}{"".join(rows)}</table></div>')


def _at(owner: Owner, place: str) -> int:
    """What an owner has at a place; "" is what no place is known of."""
    return owner.by_place.get(place, 0) if place else owner.size - sum(owner.by_place.values())


def _hover(owner: Owner) -> str:
    """An owner in a few lines, for plotly."""
    stack = [html.short(line, 110) for line in owner.stack if ".py:" in line][:14]
    return "<br>".join(
        escape(line)
        for line in (f"{size(owner.size)} in {owner.count} block(s)", html.short(owner.name, 110), "", *stack)
    )
