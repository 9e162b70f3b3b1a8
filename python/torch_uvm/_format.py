"""Numbers for people."""

from __future__ import annotations


def format_bytes(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB"):  # noqa: B007  (used after the loop)
        value /= 1024
        if value < 1024:
            break
    return f"{value:.2f} {unit}" if value < 100 else f"{value:.0f} {unit}"
