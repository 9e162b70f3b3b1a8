"""How a page draws: plotly, and what places and states are called and coloured."""

from __future__ import annotations

import json
from typing import Any

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


class NoPlotly(RuntimeError):
    """plotly is not installed, or is too old."""


class Plots:
    """The figures of a page."""

    def __init__(self) -> None:
        try:
            from plotly import graph_objects
            from plotly.offline import get_plotlyjs
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


def marker(state: str) -> dict[str, Any]:
    """How memory in a state is drawn."""
    outline = {"color": "#a0aec0" if state in ("hole", "free") else STATE_COLOURS[state], "width": 0.6}
    return {"color": STATE_COLOURS[state], "line": outline}


def unit_of(largest: int) -> tuple[int, str]:
    """The unit in which an axis is drawn."""
    for shift, name in ((30, "GiB"), (20, "MiB")):
        if largest >= 1 << shift:
            return 1 << shift, name
    return 1 << 10, "KiB"
