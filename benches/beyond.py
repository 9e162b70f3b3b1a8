#!/usr/bin/env python3
"""Beyond the GPU's memory: what it costs when weights or optimizer state do not fit, and how it grows.

    python benches/beyond.py [--experiments forward,sweep,train] [--names stream,copies,…] [--passes 5]
                             [--out FILE.json] [--markdown FILE.md] [--plot FILE.svg] [--quick]
    python benches/beyond.py --replot FILE.json --plot FILE.svg [--markdown FILE.md]

It runs on the machine's GPU within the benches' safety rule (limits.py): `uvm_device_limit_mb` makes the GPU small, not
other processes. On the simulated device, where TORCH_UVM_SIM_LIB is set, `--quick` shows that everything runs. The exit
status is 1 if a process failed, or if a result is not, bit for bit, that of the resident model.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from pathlib import Path
from typing import Any, Optional

import backends
import processes
import report
from limits import GIB, MIB
from processes import Job
from run import WORK, names, simulated_device, worker_environment

HERE = Path(__file__).resolve().parent
#: What each name is, by experiment.
NAMES = {
    "resident": "native, all weights on the device",
    "copies": "pinned copies two layers ahead, by hand: the link's limit",
    "stream": "torch_uvm.stream",
    "remote": "weights in host memory, read where they lie",
    "prefetch": "torch_uvm.prefetch two layers ahead",
    "naive": "cudaMallocManaged alone: faults migrate (training: the optimizer's state alone does)",
    "automatic": "nothing done: gpu_first places what goes beyond the limit",
    "native": "training, native, all on the device",
    "uvm": "training, uvm, all on the device",
    "offload": "training, torch_uvm.offload_optimizer",
    "automatic_little": "training, nothing done, with the smaller limit",
    "plain": "training, the model in plain device memory, and nothing else done",
    "cpu_offload": "training, AdamW on the CPU (ZeRO-Offload's scheme)",
}
EXPERIMENTS = {
    "forward": "32 linear layers at one device limit",
    "sweep": "the same at limits from all of the weights to a fifth",
    "train": "a training step",
}


def tasks(experiments: list[str], chosen: list[str], passes: int, quick: bool) -> list[dict[str, Any]]:
    """One for each process."""
    found: list[dict[str, Any]] = []
    layers, width = (8, 1024) if quick else (32, 8192)
    weights = layers * width * width * 2
    forward = {
        "layers": layers,
        "width": width,
        "batches": [1, 64] if quick else [1, 4096],
        "passes": passes,
        "limit": 16 * MIB if quick else GIB,
        # What activations and workspaces take beside the weights.
        "reserve": 4 * MIB if quick else 256 * MIB,
        "sweep": [],
        "need": GIB // 2 if quick else 7 * GIB,
        "names": [],
    }
    of_forward = [name for name in chosen if name in ("resident", "copies", "stream", "remote", "prefetch", "naive")]
    if "forward" in experiments:
        forward["names"] = of_forward
    if "sweep" in experiments:
        shares = [1.0, 0.5, 0.25] if quick else [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
        least = forward["reserve"] + 4 * (weights // layers)
        limits_ = [weights + forward["reserve"] + (weights // layers)] + [int(share * weights) for share in shares]
        forward["sweep"] = [limit for limit in limits_ if limit >= least]
        forward["names"] = list(
            dict.fromkeys(forward["names"] + [n for n in chosen if n in ("copies", "stream", "automatic")])
        )
    if {"resident", "copies"} & set(forward["names"]):
        found.append({**forward, "kind": "forward_native", "backend": "native"})
    if set(forward["names"]) - {"resident", "copies"}:
        found.append({**forward, "kind": "forward_uvm", "backend": "uvm"})
    if "train" in experiments:
        train = {
            "size": [2, 512, 4, 256, 64] if quick else [8, 2048, 16, 8192, 512],
            "sequences": 2 if quick else 4,
            "checked": 2 if quick else 3,
            "passes": passes,
            # Everything takes 7.2 GiB; the optimizer's state 3.3 of them, gradients and weights as much together.
            "some": 96 * MIB if quick else 6 * GIB,
            "little": 48 * MIB if quick else 3 * GIB,
            "stream_bytes": 30 * MIB if quick else GIB,
            "need": GIB if quick else 11 * GIB,
        }
        native = [name for name in chosen if name in ("native", "cpu_offload", "naive")]
        if native:
            found.append({**train, "kind": "train_native", "backend": "native", "names": native})
        for name in ("uvm", "automatic", "plain", "offload", "automatic_little", "stream"):
            if name in chosen:
                found.append({**train, "kind": "train_uvm", "backend": "uvm", "names": [name]})
    return found


def median(row: dict[str, Any]) -> float:
    """Milliseconds of a row."""
    return statistics.median(row["ms"])


def judge(rows: list[dict[str, Any]], simulated: bool) -> list[str]:
    """What is wrong with the results; fills in `equal`: whether a row's result is that of the resident model."""
    wrong = []
    bases = {
        (row["experiment"] if row["experiment"] == "train" else "forward", row["batch"]): row
        for row in rows
        if row["name"] in ("resident", "native, all resident")
    }
    for row in rows:
        base = bases.get((row["experiment"] if row["experiment"] == "train" else "forward", row["batch"]))
        if simulated or base is None:
            row["equal"] = None
            continue
        row["equal"] = row["digest"] == base["digest"]
        if row["equal"]:
            continue
        if row["name"] == "native, optimizer on the CPU":  # another processor's arithmetic
            close = all(abs(a - b) <= 1e-3 * max(1.0, abs(b)) for a, b in zip(row["values"], base["values"]))
            row["equal"] = "close" if close else False
            if close:
                continue
        where = f" batch {row['batch']}" if row["batch"] else ""
        wrong.append(f"{row['experiment']} {row['name']}{where}: the result is not that of the resident model")
    return wrong


def tables(rows: list[dict[str, Any]]) -> list[tuple[str, list[list[str]]]]:
    """Titles and rows; the first row of each is its heading."""
    found = []
    equal = {True: "equal", False: "DIFFERS", "close": "close", None: "–"}
    for batch in dict.fromkeys(row["batch"] for row in rows if row["experiment"] == "forward"):
        mine = [row for row in rows if row["experiment"] == "forward" and row["batch"] == batch]
        base = next((median(row) for row in mine if row["name"] == "copies"), None)
        table = [["weights", "ms a pass", "least–most", "GB/s over the link", "time / copies", "result"]]
        for row in sorted(mine, key=median):
            time = median(row)
            spread = f"{report.number(min(row['ms']))}–{report.number(max(row['ms']))}"
            rate = report.number(row["link"] / time / 1e6) if row["link"] else "–"
            ratio = f"{time / base:.3f}" if base else "–"
            table.append([row["name"], report.number(time), spread, rate, ratio, equal[row["equal"]]])
        found.append((f"Forward, batch {batch}", table))
    sweep = [row for row in rows if row["experiment"] == "sweep"]
    for batch in dict.fromkeys(row["batch"] for row in sweep):
        mine = [row for row in sweep if row["batch"] == batch]
        columns = list(dict.fromkeys(row["name"] for row in mine))
        table = [["device limit, GiB", *(f"{name}, ms" for name in columns), "results"]]
        for limit in sorted({row["limit"] for row in mine}, reverse=True):
            cells, verdicts = [], set()
            for name in columns:
                row = next((row for row in mine if row["limit"] == limit and row["name"] == name), None)
                cells.append(report.number(median(row)) if row else "–")
                verdicts |= {equal[row["equal"]]} if row else set()
            table.append([f"{limit / GIB:.2f}", *cells, ", ".join(sorted(verdicts))])
        found.append((f"Forward at falling device limits, batch {batch}", table))
    train = [row for row in rows if row["experiment"] == "train"]
    if train:
        base = next((median(row) for row in train if row["name"] == "native, all resident"), None)
        table = [["training", "device limit, GiB", "ms a step", "least–most", "time / native", "losses"]]
        for row in train:
            time = median(row)
            spread = f"{report.number(min(row['ms']))}–{report.number(max(row['ms']))}"
            limit = f"{row['limit'] / GIB:.2f}" if row["limit"] else "–"
            ratio = f"{time / base:.3f}" if base else "–"
            table.append([row["name"], limit, report.number(time), spread, ratio, equal[row["equal"]]])
        found.append(("A training step", table))
    return found


def plot(rows: list[dict[str, Any]], path: Path) -> Optional[str]:
    """Time against device limit. Why it was not drawn, if it was not."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as pyplot
    except ImportError:
        return "no plot: matplotlib is not installed; `--replot FILE.json` draws it elsewhere"
    sweep = [row for row in rows if row["experiment"] == "sweep"]
    batches = list(dict.fromkeys(row["batch"] for row in sweep))
    if not batches:
        return "no plot: the sweep was not run"
    figure, axes = pyplot.subplots(1, len(batches), figsize=(6 * len(batches), 4), squeeze=False)
    for axis, batch in zip(axes[0], batches):
        mine = [row for row in sweep if row["batch"] == batch]
        for name in dict.fromkeys(row["name"] for row in mine):
            points = sorted((row["limit"] / GIB, median(row)) for row in mine if row["name"] == name)
            axis.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
        resident = [row for row in rows if row["name"] == "resident" and row["batch"] == batch]
        if resident:
            axis.axhline(median(resident[0]), linestyle=":", color="gray", label="resident")
        axis.set(title=f"batch {batch}", xlabel="device limit, GiB", ylabel="ms a pass", yscale="log")
        axis.invert_xaxis()
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    return None


def show(contents: dict[str, Any], markdown: Optional[Path], picture: Optional[Path]) -> None:
    """Prints the tables, and writes what was asked for."""
    lines = [contents["where"], ""]
    for title, table in tables(contents["rows"]):
        print(f"\n{title}\n{report.as_text(table)}")
        lines += [f"**{title}**", "", report.as_markdown(table), ""]
    notes = list(contents["notes"])
    if picture is not None:
        reason = plot(contents["rows"], picture)
        notes += [reason] if reason else []
    for note in notes:
        print(f"- {note}")
    if markdown is not None:
        markdown.write_text("\n".join(lines + [f"- {note}" for note in notes]) + "\n")


def main(arguments: Optional[list[str]] = None) -> int:
    """Measures, prints, writes; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", default=",".join(EXPERIMENTS), help="which, by commas (default all)")
    parser.add_argument("--names", default=",".join(NAMES), help="what to compare, by commas (default all)")
    parser.add_argument("--passes", type=int, help="timed passes (default 5; 2 with --quick)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--out", type=Path, default=WORK / "beyond.json", help="where the figures go")
    parser.add_argument("--markdown", type=Path, help="where the tables go as Markdown")
    parser.add_argument("--plot", type=Path, help="where the plot of the sweep goes (needs matplotlib)")
    parser.add_argument("--replot", type=Path, metavar="FILE.json", help="measure nothing: show what was measured")
    options = parser.parse_args(arguments)
    if options.replot is not None:
        show(json.loads(options.replot.read_text()), options.markdown, options.plot)
        return 0
    experiments = names(parser, "--experiments", options.experiments, EXPERIMENTS)
    chosen = names(parser, "--names", options.names, NAMES)
    passes = options.passes if options.passes is not None else (2 if options.quick else 5)
    if passes < 1:
        parser.error("--passes: must be at least 1")
    simulated = simulated_device()

    for folder in (WORK, options.out.resolve().parent):
        folder.mkdir(parents=True, exist_ok=True)
    look = Job(
        "program", "machine", "native", backends.environment(backends.BACKENDS["native"]), program=HERE / "machine.py"
    )
    jobs = [look]
    for task in tasks(experiments, chosen, passes, options.quick):
        environment = worker_environment(backends.BACKENDS[task["backend"]], {"TORCH_UVM_BEYOND": json.dumps(task)})
        label = f"{task['kind']} ({', '.join(task['names'])})"
        jobs.append(Job("program", label, task["backend"], environment, program=HERE / "beyond_worker.py", timeout=400))

    when = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    contents: dict[str, Any] = {"format": 1, "when": when, "where": "", "rows": [], "notes": [], "failures": []}
    for outcome in processes.in_turn(jobs):
        if outcome.job.name == "machine":
            if outcome.result is None:
                raise SystemExit(f"PyTorch cannot use the GPU here: {outcome.error.strip()}")
            contents["machine"] = outcome.result
            contents["where"] = report.machine_line(outcome.result, when)
            if simulated:
                contents["where"] += " (simulated: the figures mean nothing)"
            print(contents["where"], file=sys.stderr, flush=True)
            continue
        state = "failed" if outcome.result is None else "done"
        print(f"{outcome.job.name} {state} ({outcome.seconds:.1f} s)", file=sys.stderr, flush=True)
        if outcome.result is None:
            print(outcome.error, file=sys.stderr, flush=True)
            contents["failures"].append(f"{outcome.job.name}: {report.reason(outcome.error)}")
        else:
            contents["rows"] += outcome.result["rows"]
            contents["notes"] += outcome.result["notes"]
        options.out.write_text(json.dumps(contents, indent=1))
    contents["failures"] += judge(contents["rows"], simulated)
    options.out.write_text(json.dumps(contents, indent=1))
    show(contents, options.markdown, options.plot)
    for failure in contents["failures"]:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if contents["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
