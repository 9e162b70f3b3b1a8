#!/usr/bin/env python3
"""The benches: every workload with every allocator, each measurement in a process of its own.

    python benches/run.py [--workloads train_step,…] [--backends native,uvm,…] [--repeats 5] [--minutes 6]
                          [--out FILE.json] [--markdown FILE.md] [--quick]

The backends take turns within a round, in another order each round; a table shows medians, the spread and the ratio to
`native`. Nothing is judged by its time. The exit status is 1 if a process of ours failed or if a result is not bit for
bit that of `native` with the same seed, 2 if the command is wrong.

It runs on the machine's GPU, or on the simulated device where TORCH_UVM_SIM_LIB is set (kernels do nothing there, so
the figures mean nothing; `--quick` shows that everything runs). On a GPU no process takes more than a quarter of what
the card has free, and none more than 16 GiB; see limits.py.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

import backends
import hotpath_loops
import processes
import report
import workloads
from backends import BACKENDS, Backend
from processes import Job

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
#: What is compiled, and the compilers' caches: kept between runs.
WORK = ROOT / "target" / "bench"


def names(parser: argparse.ArgumentParser, option: str, text: str, allowed: dict[str, Any]) -> list[str]:
    """A list separated by commas; each name once."""
    chosen = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in chosen if name not in allowed]
    if unknown or not chosen:
        parser.error(f"{option}: {', '.join(unknown) or 'none given'}; allowed are {', '.join(allowed)}")
    return chosen


def simulated_device() -> bool:
    """Whether everything runs on the simulated device; ends the program where its libraries are not all there."""
    try:
        return backends.on_simulated_device()
    except backends.simulated.NoSimulator as error:
        raise SystemExit(str(error)) from None


def worker_environment(backend: Backend, libraries: dict[str, str]) -> dict[str, str]:
    """The environment of every worker of `backend`; `libraries` are variables that name what was compiled for it."""
    return backends.environment(
        backend,
        # Deterministic matrix products need a workspace of fixed size; all backends get the same.
        CUBLAS_WORKSPACE_CONFIG=":4096:8",
        # What was compiled for one backend serves all; one thread, since there is little to compile.
        TORCHINDUCTOR_CACHE_DIR=str(WORK / "inductor"),
        TORCHINDUCTOR_COMPILE_THREADS="1",
        TRITON_CACHE_DIR=str(WORK / "triton"),
        **libraries,
    )


def look_at_machine(chosen: list[str], named: bool) -> tuple[dict[str, Any], list[str], list[str]]:
    """Starts a process of each backend: what machine this is, which backends are there, why others are not.

    A backend that was asked for by name and is not there ends the program.
    """
    machine: dict[str, Any] = {}
    there, missing = [], []
    for name in dict.fromkeys([report.BASE, *chosen]):
        backend = BACKENDS[name]
        if name == "rmm":
            # It can only be put in place by the worker, before CUDA is initialised.
            import importlib.util

            error = "" if importlib.util.find_spec("rmm") else "the package rmm is not installed"
        else:
            job = Job("program", "machine", name, backends.environment(backend), program=HERE / "machine.py")
            outcome = next(processes.in_turn([job]))
            error = outcome.error.strip()
            if outcome.result is not None and outcome.result["backend"] != backend.reported:
                error = f"PyTorch's allocator is {outcome.result['backend']}, not {backend.reported}"
            elif outcome.result is not None and name == report.BASE:
                machine = outcome.result
        if not error:
            there.append(name)
            continue
        if name == report.BASE:
            raise SystemExit(f"PyTorch cannot use the GPU here: {error}")
        if named:
            raise SystemExit(f"--backends: {name} is not there: {error}")
        missing.append(f"{BACKENDS[name].title} is left out: {report.reason(error)}")
    return machine, [name for name in chosen if name in there], missing


def round_of(
    number: int, chosen: list[str], of: list[str], quick: bool, environments: dict[str, dict[str, str]]
) -> Iterator[Job]:
    """The jobs of one round: each workload with every backend before the next workload."""
    turned = chosen[number % len(chosen) :] + chosen[: number % len(chosen)]
    for name in of:
        workload = workloads.WORKLOADS[name]
        for _ in range(getattr(workload, "PROCESSES", 1)):
            for backend in turned:
                if backend in getattr(workload, "BACKENDS", BACKENDS):
                    alone, program = getattr(workload, "ALONE", False), getattr(workload, "PROGRAM", None)
                    yield Job("workload", name, backend, environments[backend], quick, alone, program)


def outcomes_of(jobs: Iterator[Job], together: bool) -> Iterator[processes.Outcome]:
    """Runs the jobs in turn, or those of one workload side by side where that is asked for and makes sense."""
    if not together:
        yield from processes.in_turn(jobs)
        return
    for _, of_workload in itertools.groupby(jobs, key=lambda job: job.name):
        group = list(of_workload)
        if any(job.alone or job.program is not None for job in group):
            yield from processes.in_turn(group)
        else:
            yield from processes.side_by_side(group)


def to_run(number: int, outcome: processes.Outcome) -> report.Run:
    """An outcome as a row of samples. Of a program of its own the whole process's time is a sample too."""
    job, result, error = outcome.job, outcome.result, outcome.error
    if job.program is not None and result is not None:
        if result["backend"] != BACKENDS[job.backend].reported:
            result, error = None, f"PyTorch's allocator was {result['backend']}"
        else:
            result["figures"]["process"] = [outcome.seconds]
    return report.Run(number, job.name, job.backend, outcome.seconds, result, error)


def main(arguments: Optional[list[str]] = None) -> int:
    """Measures, prints, writes; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(workloads.WORKLOADS), help="which, by commas (default all)")
    parser.add_argument(
        "--backends", help=f"which, by commas (default those of {','.join(backends.DEFAULT)} that are there)"
    )
    parser.add_argument("--repeats", type=int, help="rounds (default 5; 1 with --quick)")
    parser.add_argument("--minutes", type=float, help="begin no round that would probably end later than this")
    parser.add_argument(
        "--side-by-side",
        action="store_true",
        help="the backends' processes of a workload run at once and take turns measurement by measurement: less "
        "exposed to a machine that changes meanwhile, and quicker (not for the hot path and cold starts)",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--out", type=Path, default=WORK / "benches.json", help="where the figures go")
    parser.add_argument("--markdown", type=Path, help="where the tables go as Markdown")
    parser.add_argument("--cxx", default=os.environ.get("CXX", "g++"), help="the C++ compiler")
    parser.add_argument(
        "--cuda-include", action="append", default=[], metavar="DIR", help="CUDA's headers (repeatable)"
    )
    options = parser.parse_args(arguments)
    began = time.monotonic()
    of = names(parser, "--workloads", options.workloads, workloads.WORKLOADS)
    wanted = options.backends or ",".join(backends.DEFAULT)
    chosen = names(parser, "--backends", wanted, BACKENDS)
    repeats = options.repeats if options.repeats is not None else (1 if options.quick else 5)
    if repeats < 1:
        parser.error("--repeats: must be at least 1")
    simulated = simulated_device()

    machine, chosen, missing = look_at_machine(chosen, named=options.backends is not None)
    notes = list(missing)
    when = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    where = report.machine_line(machine, when) + (" (simulated: the figures mean nothing)" if simulated else "")
    print("\n".join([where, *missing]), file=sys.stderr, flush=True)

    for folder in (WORK, options.out.resolve().parent):
        folder.mkdir(parents=True, exist_ok=True)
    libraries = {}
    try:
        if "mempool" in chosen:
            libraries[backends.MANAGED_LIBRARY] = str(backends.compile_managed(WORK, options.cxx))
        if "hotpath" in of:
            libraries[hotpath_loops.LIBRARY] = str(hotpath_loops.compile_loops(WORK, options.cxx, options.cuda_include))
    except RuntimeError as error:
        raise SystemExit(str(error)) from None
    environments = {name: worker_environment(BACKENDS[name], libraries) for name in chosen}

    runs: list[report.Run] = []
    failures: list[str] = []
    if "reduce_overhead" in of:
        # Once, not measured: it fills the compiler's caches, so that no backend pays for the others.
        first = Job("workload", "reduce_overhead", chosen[0], environments[chosen[0]], options.quick)
        outcome = next(processes.in_turn([first]))
        print(f"compiler's caches filled in {outcome.seconds:.1f} s", file=sys.stderr, flush=True)
        if outcome.result is not None and outcome.result.get("figures"):
            notes.append(f"compilation on empty caches took {outcome.result['figures']['compile'][0]:.1f} s")

    modules = {name: workloads.WORKLOADS[name] for name in of}
    longest = 0.0
    for number in range(repeats):
        started = time.monotonic()
        if options.minutes is not None and number and started + longest - began > options.minutes * 60:
            limit = f"{options.minutes:g} minutes"
            notes.append(f"{number} rounds of {repeats}: another would not have ended within {limit}")
            break
        jobs = round_of(number, chosen, of, options.quick, environments)
        for outcome in outcomes_of(jobs, options.side_by_side):
            runs.append(to_run(number, outcome))
            state = "failed" if outcome.result is None else "skipped" if "skipped" in outcome.result else "done"
            line = f"round {number + 1} of {repeats}: {outcome.job.name} with {outcome.job.backend} {state}"
            print(f"{line} ({outcome.seconds:.1f} s)", file=sys.stderr, flush=True)
            if runs[-1].error:
                print(runs[-1].error, file=sys.stderr, flush=True)
        longest = max(longest, time.monotonic() - started)
        # After every round: if the next one is cut off, the figures so far are there.
        summary = report.summarise(runs, modules, compare_digests=not simulated)
        contents = {
            "format": 1,
            "when": when,
            "machine": machine,
            "simulated": simulated,
            "quick": options.quick,
            "backends": {name: asdict(BACKENDS[name]) for name in chosen},
            "summary": asdict(summary),
            "notes": notes,
            "runs": [asdict(run) for run in runs],
        }
        options.out.write_text(json.dumps(contents, indent=1) + "\n")

    if simulated:
        notes.append("simulated device: kernels do nothing, figures mean nothing and results were not compared")
    notes += [f"{BACKENDS[name].title}: {BACKENDS[name].note}" for name in chosen if BACKENDS[name].note]
    notes += summary.notes
    failures += summary.failures
    found = report.tables(summary, modules, chosen)
    contents.update(notes=notes, failures=failures, minutes=(time.monotonic() - began) / 60)
    options.out.write_text(json.dumps(contents, indent=1) + "\n")
    for title, rows in found:
        print(f"\n{title}\n{report.as_text(rows)}")
    print()
    for line in [*(f"note: {note}" for note in notes), *(f"FAILED: {failure}" for failure in failures)]:
        print(line)
    if options.markdown:
        parts = [where + "."]
        parts += [f"{title}:\n\n{report.as_markdown(rows)}" for title, rows in found]
        lines = [*(f"- {note}" for note in notes), *(f"- **failed**: {failure}" for failure in failures)]
        parts.append("\n".join(lines))
        options.markdown.write_text("\n\n".join(part for part in parts if part) + "\n")
    print(f"written to {options.out}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
