"""From samples to tables."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Optional

from backends import BACKENDS
from limits import GIB, MIB

#: The backend that every ratio refers to.
BASE = "native"


@dataclass
class Run:
    """One process of one workload, as the worker reported it."""

    round: int
    workload: str
    backend: str
    seconds: float
    result: Optional[dict[str, Any]]
    error: str = ""

    @property
    def usable(self) -> bool:
        """Whether it measured something."""
        return self.result is not None and "skipped" not in self.result


@dataclass
class Summary:
    """What run.py prints and writes."""

    #: workload -> figure -> backend -> median, least, most, processes, ratio.
    figures: dict[str, dict[str, dict[str, dict[str, float]]]] = field(default_factory=dict)
    #: workload -> phase -> backend -> peak bytes and their ratio.
    fragmentation: dict[str, dict[str, dict[str, dict[str, float]]]] = field(default_factory=dict)
    #: workload -> digest -> "equal" or what differs.
    equality: dict[str, dict[str, str]] = field(default_factory=dict)
    #: What makes the run fail.
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def summarise(runs: list[Run], workloads: dict[str, ModuleType], *, compare_digests: bool) -> Summary:
    """All tables. A process's value is the median of its samples; a backend's that of its processes' values."""
    summary = Summary()
    for name, workload in workloads.items():
        mine = [run for run in runs if run.workload == name]
        usable = [run for run in mine if run.usable]
        summary.figures[name] = {}
        for figure, meaning in workload.FIGURES.items():
            row = _figure_row(usable, figure)
            for cell in row.values():
                if BASE in row and not meaning.informative:
                    cell["ratio"] = cell["median"] / row[BASE]["median"]
            if row:
                summary.figures[name][figure] = row
        summary.fragmentation[name] = _fragmentation(usable)
        if compare_digests:
            summary.equality[name] = _equality(name, usable, summary)
        _failures(name, mine, summary)
    bare = summary.figures.get("first_touch", {})
    for backend, cell in bare.get("bare_prefetch", {}).items():
        share = bare["fill"][backend]["median"] / cell["median"]
        summary.notes.append(f"first touch: {backend} reaches {share:.2f} of bare prefetch-then-fill in its processes")
    return summary


def _figure_row(usable: list[Run], figure: str) -> dict[str, dict[str, float]]:
    row = {}
    for backend in BACKENDS:
        values = [
            statistics.median(run.result["figures"][figure])
            for run in usable
            if run.backend == backend and run.result is not None and run.result.get("figures", {}).get(figure)
        ]
        if values:
            row[backend] = {
                "median": statistics.median(values),
                "least": min(values),
                "most": max(values),
                "processes": len(values),
            }
    return row


def _fragmentation(usable: list[Run]) -> dict[str, dict[str, dict[str, float]]]:
    phases: dict[str, dict[str, dict[str, float]]] = {}
    for phase in ("steady", "process"):
        for backend in BACKENDS:
            peaks = [
                run.result["memory"][phase]
                for run in usable
                if run.backend == backend and run.result is not None and run.result.get("memory", {}).get(phase)
            ]
            if peaks:
                reserved = statistics.median(peak["reserved"] for peak in peaks)
                allocated = statistics.median(peak["allocated"] for peak in peaks)
                phases.setdefault(phase, {})[backend] = {
                    "reserved": reserved,
                    "allocated": allocated,
                    "ratio": reserved / allocated if allocated else float("inf"),
                }
    return phases


def _equality(name: str, usable: list[Run], summary: Summary) -> dict[str, str]:
    """Whether every process of every backend had the same digests and facts; a difference is a failure."""
    verdicts = {}
    for kind in ("digests", "facts"):
        seen: dict[str, dict[str, set[str]]] = {}
        for run in usable:
            assert run.result is not None
            for key, value in run.result.get(kind, {}).items():
                seen.setdefault(key, {}).setdefault(run.backend, set()).add(str(value))
        for key, by_backend in seen.items():
            unstable = [backend for backend, values in by_backend.items() if len(values) > 1]
            other = [
                backend for backend, values in by_backend.items() if BASE in by_backend and values != by_backend[BASE]
            ]
            if BASE not in by_backend:
                verdict = f"nothing of {BASE}'s to compare with: {', '.join(by_backend)}"
            elif unstable:
                verdict = f"differs from process to process with {', '.join(unstable)}"
            elif other:
                verdict = f"differs from {BASE} with {', '.join(other)}"
            else:
                verdict = f"equal: {', '.join(by_backend)}"
            verdicts[key] = verdict
            wrong = [backend for backend in unstable or other if not BACKENDS[backend].foreign]
            if wrong:
                values = {backend: sorted(each) for backend, each in by_backend.items()}
                detail = "" if kind == "digests" else f": {values}"
                summary.failures.append(f"{name}: {key} {verdict}{detail}")
    return verdicts


def _failures(name: str, mine: list[Run], summary: Summary) -> None:
    for run in mine:
        if run.error:
            text = f"{name} with {run.backend}: {reason(run.error)}"
            target = summary.notes if BACKENDS[run.backend].foreign else summary.failures
            if text not in target:
                target.append(text)
        elif run.result is not None:
            skipped = run.result.get("skipped")
            for note in run.result.get("notes", []) + ([f"not run: {skipped}"] if skipped else []):
                text = f"{name} with {run.backend}: {note}"
                if text not in summary.notes:
                    summary.notes.append(text)


def reason(error: str) -> str:
    """The two lines of a failed process that say most: how it ended, and the last error that it names."""
    lines = error.strip().splitlines()
    named = [line for line in lines[1:] if re.match(r"[\w.]*(Error|Failed|Exception|Interrupt)\b", line)]
    return ": ".join([*lines[:1], *(named or lines[1:])[-1:]])


def number(value: float) -> str:
    """Three significant digits or more."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:#.3g}"


def _cell(cell: Optional[dict[str, float]]) -> str:
    if cell is None:
        return "–"
    spread = f" ({number(cell['least'])}–{number(cell['most'])})" if cell["processes"] > 1 else ""
    ratio = f", {cell['ratio']:.3f}" if "ratio" in cell else ""
    return f"{number(cell['median'])}{spread}{ratio}"


def _peak_cell(cell: Optional[dict[str, float]]) -> str:
    if cell is None:
        return "–"
    unit, name = (GIB, "GiB") if cell["reserved"] >= GIB else (MIB, "MiB")
    return f"{cell['ratio']:.3f} ({cell['reserved'] / unit:.2f} / {cell['allocated'] / unit:.2f} {name})"


def tables(summary: Summary, workloads: dict[str, ModuleType], chosen: list[str]) -> list[tuple[str, list[list[str]]]]:
    """Titles and rows; the first row of each is its heading."""
    headings = [BACKENDS[backend].title for backend in chosen]
    times: list[list[str]] = [["workload", "unit", *headings]]
    peaks: list[list[str]] = [["workload", "", *headings]]
    for name, workload in workloads.items():
        for figure, row in summary.figures[name].items():
            meaning = workload.FIGURES[figure]
            unit = meaning.unit + (", more is better" if meaning.larger_is_better else "")
            label = f"{workload.TITLE}: {meaning.title}"
            times.append([label, unit, *(_cell(row.get(backend)) for backend in chosen)])
        for phase, by_backend in summary.fragmentation[name].items():
            label = "steady phase" if phase == "steady" else "whole process"
            peaks.append([workload.TITLE, label, *(_peak_cell(by_backend.get(backend)) for backend in chosen)])
    found = [("Median of the processes (least–most of them), ratio to native", times)]
    if len(peaks) > 1:
        found.append(("Fragmentation: peak reserved / peak allocated", peaks))
    equal = [["workload", "result", "verdict"]]
    for name, verdicts in summary.equality.items():
        equal += [[workloads[name].TITLE, key, verdict] for key, verdict in verdicts.items()]
    if len(equal) > 1:
        found.append(("Numerical equality, bit for bit, same seed", equal))
    return found


def as_text(rows: list[list[str]]) -> str:
    """Aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def as_markdown(rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def machine_line(machine: dict[str, Any], when: str) -> str:
    """One sentence on where the figures come from."""
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    return (
        f"{machine['gpu']} ({machine['gpu_bytes'] / GIB:.0f} GiB){driver}, PyTorch {machine['torch']}, "
        f"Python {machine['python']}, {machine['cpu']}; {when}"
    )
