#!/usr/bin/env python3
"""PyTorch's features under `uvm` against `native`: same seed, same results, bit for bit.

    python benches/correctness.py [--checks cuda_graphs,…] [--backends native,uvm] [--out FILE.json]
                                  [--markdown FILE.md]

Each check runs in a process per backend (checks.py says what each does); digests of results and the allocator's own
numbers are compared with native's. The exit status is 1 if anything differs or fails. On the simulated device
(TORCH_UVM_SIM_LIB) kernels do nothing: everything runs, numbers of the allocator are compared, results are not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Optional

import checks
import processes
import report
import run
from backends import BACKENDS
from processes import Job, Outcome


def verdict(outcome: Outcome, base: Optional[Outcome], simulated: bool) -> tuple[str, str]:
    """`ok`, `skipped`, `FAILED` or `DIFFERS`, and why."""
    if outcome.result is None:
        return "FAILED", report.reason(outcome.error)
    if "skipped" in outcome.result:
        return "skipped", outcome.result["skipped"]
    if base is None or base is outcome:
        return "ok", ""
    if base.result is None or "skipped" in base.result:
        return "FAILED", f"no result of {report.BASE} to compare with"
    for kind in ("facts",) if simulated else ("facts", "digests"):
        mine, theirs = outcome.result[kind], base.result[kind]
        for key in [*theirs, *(key for key in mine if key not in theirs)]:
            if mine.get(key) != theirs.get(key):
                return "DIFFERS", f"{key}: {mine.get(key)}, {report.BASE} {theirs.get(key)}"
    return "ok", ""


def main(arguments: Optional[list[str]] = None) -> int:
    """Runs, prints, writes; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", default=",".join(checks.CHECKS), help="which, by commas (default all)")
    parser.add_argument("--backends", default="native,uvm", help="which, by commas (default native,uvm)")
    parser.add_argument("--out", type=Path, default=run.WORK / "correctness.json", help="where the results go")
    parser.add_argument("--markdown", type=Path, help="where the table goes as Markdown")
    parser.add_argument(
        "--ahead", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="processes that import PyTorch meanwhile"
    )
    options = parser.parse_args(arguments)
    began = time.monotonic()
    of = run.names(parser, "--checks", options.checks, checks.CHECKS)
    # The features are PyTorch's own, pools among them: a backend that is a pool of its own cannot be put through them.
    allowed = {name: backend for name, backend in BACKENDS.items() if not backend.foreign}
    chosen = run.names(parser, "--backends", options.backends, allowed)
    chosen = list(dict.fromkeys([report.BASE, *chosen]))
    simulated = run.simulated_device()
    machine, chosen, _ = run.look_at_machine(chosen, named=True)
    when = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    where = report.machine_line(machine, when) + (" (simulated)" if simulated else "")
    print(where, file=sys.stderr, flush=True)
    options.out.resolve().parent.mkdir(parents=True, exist_ok=True)
    environments = {name: run.worker_environment(BACKENDS[name], {}) for name in chosen}

    jobs = [Job("check", name, backend, environments[backend]) for name in of for backend in chosen]
    outcomes: dict[str, dict[str, Outcome]] = {}
    rows = [["feature", *(BACKENDS[backend].title for backend in chosen), "what"]]
    results: dict[str, Any] = {}
    failed = 0
    for outcome in processes.in_turn(jobs, ahead=options.ahead):
        name, backend = outcome.job.name, outcome.job.backend
        mine = outcomes.setdefault(name, {})
        mine[backend] = outcome
        state, why = verdict(outcome, mine.get(report.BASE), simulated)
        print(f"{name} with {backend}: {state} ({outcome.seconds:.1f} s) {why}", file=sys.stderr, flush=True)
        if outcome.result is None:
            print(outcome.error, file=sys.stderr, flush=True)
        results.setdefault(name, {})[backend] = {
            "verdict": state,
            "why": why,
            "seconds": outcome.seconds,
            "result": outcome.result,
            "error": outcome.error,
        }
        failed += state in ("FAILED", "DIFFERS")
        if len(mine) == len(chosen):
            of_all = [results[name][each] for each in chosen]
            reasons = dict.fromkeys(each["why"] for each in of_all if each["why"])
            rows.append([checks.CHECKS[name].title, *(each["verdict"] for each in of_all), "; ".join(reasons)])

    minutes = (time.monotonic() - began) / 60
    contents = {"format": 1, "when": when, "machine": machine, "simulated": simulated, "minutes": minutes}
    options.out.write_text(json.dumps({**contents, "failed": failed, "checks": results}, indent=1) + "\n")
    print(f"\n{report.as_text(rows)}\n\n{failed} failed; {minutes * 60:.0f} s; written to {options.out}")
    if options.markdown:
        options.markdown.write_text(f"{where}.\n\n{report.as_markdown(rows)}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
