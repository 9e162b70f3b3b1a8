"""In which order a program uses the units of a model: remembers, fetches nothing."""

from __future__ import annotations

from typing import Optional

#: A unit's number and whether the forward or the backward pass uses it.
Event = tuple[int, str]
FORWARD, BACKWARD = "forward", "backward"
#: Between two passes.
START: Event = (-1, "start")


class Order:
    """Learns what follows what, and foretells the next units.

    The last two events decide: what followed them the last time will follow again. So forward, backward and recomputed
    passes, validation between training steps and branches that alternate are all foretold once they were seen. Before
    that, units follow each other as the model holds them; the backward pass goes the other way.
    """

    def __init__(self, units: int) -> None:
        self._units = units
        self._followed: dict[tuple[Event, Event], Event] = {}
        self._before: Event = START
        self._last: Event = START

    def note(self, event: Event) -> bool:
        """Something was used, or a pass begins. False if it is the last one once more."""
        if event == self._last:
            return False
        self._followed[self._before, self._last] = event
        self._before, self._last = self._last, event
        return True

    def upcoming(self, count: int, across: bool) -> list[int]:
        """Up to `count` different units that will be used next, the next one first, without the one in use.

        `across` looks beyond the end of the pass.
        """
        before, last = self._before, self._last
        found: list[int] = []
        for _ in range(4 * count + 4):
            following = self._followed.get((before, last)) or self._guess(last)
            if following is None or (following == START and not across):
                break
            before, last = last, following
            unit = following[0]
            if unit >= 0 and unit != self._last[0] and unit not in found:
                found.append(unit)
                if len(found) == count:
                    break
        return found

    def _guess(self, last: Event) -> Optional[Event]:
        unit, phase = last
        if last == START:
            return (0, FORWARD) if self._units else None
        following = unit + 1 if phase == FORWARD else unit - 1
        return (following, phase) if 0 <= following < self._units else None
