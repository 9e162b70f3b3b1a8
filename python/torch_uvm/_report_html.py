"""The parts that a page consists of, as HTML: whatever text a snapshot holds, it stays text."""

from __future__ import annotations

from collections.abc import Set
from html import escape
from typing import Any

#: Letters of a text at most.
MOST_LETTERS = 1000
#: The page's own scripts and styles, and nothing else from anywhere.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
STYLE = """
body { font: 15px/1.45 system-ui, "Segoe UI", "Helvetica Neue", sans-serif; color: #1a202c; background: #f5f7fa }
body { margin: 0 }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 60px }
h1 { font-size: 24px; margin: 0 0 2px } h2 { font-size: 20px; margin: 36px 0 10px }
h3 { font-size: 16px; margin: 0 0 2px }
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
details > pre { font-size: 12px; background: #f5f7fa; padding: 8px; overflow-x: auto; margin: 4px 0 }
summary { cursor: pointer }
"""


def text(value: object) -> str:
    """A text for HTML; of a long one the beginning, for many parts of a snapshot may share it."""
    found = str(value)
    return escape(found if len(found) <= MOST_LETTERS else found[: MOST_LETTERS - 1] + "…")


def short(value: str, most: int = 64) -> str:
    """The end of a text, which of a path is the part that matters."""
    return value if len(value) <= most else "…" + value[1 - most :]


def section(title: str, note: str, body: str) -> str:
    """A section; `body` is HTML, title and note are texts."""
    head = f"<h3>{text(title)}</h3>" if title else ""
    return f"<section>{head}{f'<p class=note>{text(note)}</p>' if note else ''}{body}</section>"


def table(heads: list[str], rows: list[list[Any]], numeric: Set[int] = frozenset()) -> str:
    """A table; the columns in `numeric` are set to the right."""

    def line(cells: list[Any], tag: str) -> str:
        shown = (
            f"<{tag}{' class=n' if column in numeric else ''}>{text(cell)}</{tag}>" for column, cell in enumerate(cells)
        )
        return f"<tr>{''.join(shown)}</tr>"

    return f"<table>{line(heads, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
