"""`python -m torch_uvm simulate`: a program on a machine made of software, and what became of its memory there.

The simulated CUDA libraries (sim/, shipped in the folder `sim` of this package) are put under the program's PyTorch,
unchanged. They count what reaches CUDA and write it down when a process ends; this reads it, adds up, and says what it
means.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._activate import VARIABLES
from ._dry_run import VARIABLE as REPORTS
from ._format import format_bytes as size

#: The machines that the simulator knows.
DEVICES = ("h100", "gh200", "gh200-egm", "gb10")
#: How many GPUs a machine may have at most.
MOST_DEVICES = 16
#: The libraries that are preloaded: they take the place of CUDA's own.
STAND_INS = ("libcudart.so.12", "libcudart.so.13", "libcuda.so.1", "libnvidia-ml.so.1")
#: Names the folder of the libraries where they are not this package's.
LIBRARIES_VARIABLE = "TORCH_UVM_SIM_LIB"
#: The variables by which the simulator is told which machine it is.
MACHINE_VARIABLES = ("DEVICE", "HBM", "HOST", "DEVICES", "SEED", "REPORT")
#: Sizes that a memory may have, in bytes.
SMALLEST, LARGEST = 64 << 20, 16 << 40
#: What no figure here can tell.
LIMITS = (
    (
        "Kernels do nothing: their time, their results, and the pages they would touch, fault on or move are not "
        "simulated. Figures of faults, moves and remote use come from copies, memsets, prefetches and evictions alone."
    ),
    "A program whose course depends on computed values may take another course here.",
    (
        "Times follow from bytes by speeds measured on an H100, scaled by the link's speed for other machines. They "
        "are sums: what several streams did at once counts each time, and whether it hid behind computing is not known."
    ),
    "Each process has a simulated machine of its own: processes do not take memory from each other.",
    "The CPU's own loads and stores of managed memory are not seen, nor is the program's pageable memory.",
)
#: The rows of the table of moves: the simulator's name, and ours.
CAUSES = {
    "copies": "copies",
    "faults": "faults, pages",
    "prefetches": "prefetches, pages",
    "evictions": "evictions, pages",
    "remote": "reached from afar, pages",
}


@dataclass(frozen=True)
class Machine:
    """Which machine is simulated; None stands for what the kind of machine has."""

    device: str = "gh200"
    hbm: str | None = None
    host: str | None = None
    devices: int = 1
    #: In which order streams make progress: a number, `late` (at synchronisation only) or `eager`.
    seed: str = "0"


class CannotSimulate(RuntimeError):
    """The simulator's libraries are not there, or the program cannot be started."""


def memory_size(text: str) -> str:
    """A size such as `96GiB` as the simulator takes it. ValueError where it would not."""
    parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    count = float(parts[1]) * 1024 ** " kmgt".index(parts[2] or " ") if parts else 0
    if not SMALLEST <= count <= LARGEST:
        raise ValueError(f"{text!r}: expected a size from 64MiB to 16TiB, such as 96GiB")
    return text.strip()


def seed(text: str) -> str:
    """An order of progress as the simulator takes it. ValueError where it would not."""
    if text in ("late", "eager") or re.fullmatch(r"\d{1,19}", text):
        return text
    raise ValueError(f"{text!r}: expected a number, late or eager")


def libraries() -> Path:
    """The folder of the simulator's libraries: $TORCH_UVM_SIM_LIB, this package's own, or those of the source tree.

    Raises:
        CannotSimulate: there are none.
    """
    package = Path(__file__).resolve().parent
    named = os.environ.get(LIBRARIES_VARIABLE)
    places = [Path(named)] if named else [package / "sim", package.parent.parent / "target/sim/lib"]
    for place in places:
        if all((place / name).exists() for name in STAND_INS):
            return place.resolve()
    raise CannotSimulate(
        f"the simulator's libraries are not in {' or '.join(map(str, places))}. torch-uvm's wheel carries them; in the "
        f"source tree `cargo xtask sim -- true` builds them. {LIBRARIES_VARIABLE} may name their folder"
    )


def variables(machine: Machine, folder: Path, reports: Path) -> dict[str, str]:
    """The environment of a program on this machine. `folder` holds the libraries; its path has no space or colon."""
    names = {f"TORCH_UVM_SIM_{name}" for name in MACHINE_VARIABLES}
    found = {name: value for name, value in os.environ.items() if name not in names}
    preload = ":".join(str(folder / name) for name in STAND_INS)
    for name, ours in (("LD_PRELOAD", preload), ("LD_LIBRARY_PATH", str(folder))):
        found[name] = ":".join(filter(None, (ours, found.get(name))))
    found["TORCH_UVM_SIM_DEVICE"] = machine.device
    found["TORCH_UVM_SIM_DEVICES"] = str(machine.devices)
    found["TORCH_UVM_SIM_SEED"] = machine.seed
    if machine.hbm is not None:
        found["TORCH_UVM_SIM_HBM"] = machine.hbm
    if machine.host is not None:
        found["TORCH_UVM_SIM_HOST"] = machine.host
    found[REPORTS] = str(reports)
    return found


def run(machine: Machine, command: list[str]) -> dict[str, Any]:
    """Runs a program on the machine and says what happened: the findings, as `--json` writes them. Sizes are bytes.

    Raises:
        CannotSimulate: there are no libraries, or no such program.
    """
    real = libraries()
    with tempfile.TemporaryDirectory(prefix="torch-uvm-") as scratch:
        reports = Path(scratch, "reports")
        reports.mkdir()
        folder = real
        if re.search(r"[\s:]", str(real)):  # the loader would take such a path for several
            folder = Path(scratch, "lib")
            folder.symlink_to(real)
        try:
            process = subprocess.Popen(command, env=variables(machine, folder, reports))
        except OSError as error:
            raise CannotSimulate(f"{command[0]}: cannot be started: {error.strerror}") from error
        while True:
            try:
                status = process.wait()
                break
            except KeyboardInterrupt:
                continue  # the program got it too, and decides
        processes = read_reports(reports)
    # A shell's number for a process that a signal has ended.
    return findings(command, status if status >= 0 else 128 - status, processes)


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """What each process has written, in the order in which they first used CUDA."""
    processes = []
    for file in folder.glob("[0-9]*.json"):
        try:
            # One line: what may follow is the end of an older and longer one.
            report = json.loads(file.read_text(errors="replace").partition("\n")[0])
        except ValueError:
            continue
        report["allocator"] = None
        try:
            report["allocator"] = json.loads((folder / f"allocator-{report['process']}.json").read_text())
        except (OSError, ValueError):
            # Not written: the program has no PyTorch with torch-uvm's entry point, or left without its exit handlers.
            pass
        processes.append(report)
    return sorted(processes, key=lambda report: int(report["started"]))


def add_up(parts: list[Any]) -> Any:
    """The sums of numbers in objects of the same shape."""
    if parts and isinstance(parts[0], dict):
        return {key: add_up([part[key] for part in parts]) for key in parts[0]}
    return sum(parts)


def findings(command: list[str], status: int, processes: list[dict[str, Any]]) -> dict[str, Any]:
    """What the processes' reports come to."""
    totals = {key: add_up([one[key] for one in processes]) for key in ("counters", "traffic", "populated")}
    fits, verdict = judge(status, processes)
    return {
        "command": command,
        "status": status,
        "settings": {name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
        "fits": fits,
        "verdict": verdict,
        "totals": totals if processes else None,
        "processes": processes,
        "limits": list(LIMITS),
    }


def judge(status: int, processes: list[dict[str, Any]]) -> tuple[bool | None, str]:
    """Whether the program fitted into the machine's memory (None: that cannot be told), and why."""
    if not processes:
        return None, f"the program ended with status {status}; none of its processes used CUDA"
    killed = sum(one["counters"]["host_overcommitted"] for one in processes)
    refused = sum(one["counters"]["out_of_memory"] for one in processes)
    known = [one["allocator"] for one in processes if one["allocator"]]
    errors = sum(device["out_of_memory_errors"] for one in known for device in one["devices"])
    said = _count(errors, "OutOfMemoryError")
    if len(known) < len(processes):
        silent = _count(len(processes) - len(known), "process")
        said += f" that is known of ({silent} did not say; CUDA refused {_count(refused, 'allocation')} in all)"
    ended = f"the program ended with status {status}, with {said}"
    if killed:
        return False, f"it does not fit: {size(killed)} more host memory than there is was needed; {ended}"
    if errors and status:
        return False, f"it does not fit: {ended}"
    if errors:
        return False, f"it does not fit as it is, but goes on: {ended}, which it handled itself"
    if status:
        return None, f"whether it fits is not known: {ended}"
    if refused and len(known) < len(processes):
        return None, f"whether it fits is not known: {ended}"
    return True, f"it fits: {ended}"


def as_json(found: dict[str, Any]) -> str:
    """The findings, for programs."""
    return json.dumps(found, indent=2)


def as_text(found: dict[str, Any]) -> str:
    """The findings, for people."""
    lines = ["", f"torch-uvm simulate: {' '.join(found['command'])}", f"  {found['verdict']}"]
    processes = found["processes"]
    if not processes:
        return "\n".join(lines)
    machine = processes[0]["machine"]
    gpus = f"{machine['devices']} x {machine['device_name']} of {size(machine['device_memory'])}"
    memory = "one memory for CPU and GPU" if machine["integrated"] else f"{size(machine['host_memory'])} of host memory"
    lines.append(f"  simulated: {gpus}, {memory} ({machine['device']}, seed {machine['schedule']})")
    lines += [f"  {name}={value}" for name, value in found["settings"].items()]
    for report in processes:
        lines += ["", *_process(report)]
    lines += ["", *_totals(found["totals"], len(processes)), "", "What this cannot tell"]
    for limit in found["limits"]:
        lines += textwrap.wrap(limit, 110, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join(lines)


def _process(report: dict[str, Any]) -> list[str]:
    """One process: who it was, and its peaks."""
    allocator, machine, peaks = report["allocator"], report["machine"], report["peaks"]
    who = " ".join(report["command"])
    lines = [f"Process {report['process']}: {who if len(who) <= 90 else who[:87] + '...'}"]
    if allocator:
        ours = [("allocated at most", "allocated_peak"), ("reserved at most", "reserved_peak")]
        lines.append(f"  PyTorch {allocator['torch']}, allocator {allocator['backend']}")
        for device, figures in enumerate(allocator["devices"]):
            said = [f"{name} {size(figures[key])}" for name, key in ours]
            said.append(f"{_count(figures['out_of_memory_errors'], 'OutOfMemoryError')}, retries: {figures['retries']}")
            lines.append(f"  GPU {device}: {', '.join(said)}")
    else:
        lines.append("  which allocator it had is not known: it did not say at its end")
    if not report["complete"]:
        lines.append(
            "  it ended without its exit handlers (a signal, or _exit): what came after its last wait is missing"
        )
    if report["pending_operations"] and report["complete"]:
        lines.append(f"  {report['pending_operations']} operations were still queued at its end, and are not counted")
    rows = [["peak memory", "managed", "plain, pinned", "at once", "of"]]
    for device, peak in enumerate(peaks["devices"]):
        rows.append([f"GPU {device}", *_peak(peak), size(machine["device_memory"])])
    rows.append(["host", *_peak(peaks["host"]), size(machine["host_memory"])])
    rows.append(["all places at once", "", "", size(peaks["all"]), ""])
    return lines + _table(rows)


def _totals(totals: dict[str, Any], processes: int) -> list[str]:
    """What moved, why, and how long that takes."""
    counters, traffic, populated = totals["counters"], totals["traffic"], totals["populated"]
    lines = [f"All {processes} processes together" if processes > 1 else "What moved"]
    rows = [["over the link", "count", "to GPUs", "to the host", "GPU to GPU", "time"]]
    for key, name in CAUSES.items():
        rows.append([name, *_moved(traffic[key])])
    rows.append(["sum", *_moved(add_up(list(traffic.values())))])
    lines += _table(rows)
    rows = [["first memory of pages", "on GPUs", "in the host", "time"]]
    for key, name in (("prefetches", "by prefetches"), ("faults", "by faults, at first use")):
        filled = populated[key]
        rows.append([name, size(filled["bytes_device"]), size(filled["bytes_host"]), _time(filled["nanoseconds"])])
    lines += ["", *_table(rows), ""]
    lines.append(
        f"  faults: {counters['device_faults']} of GPUs (a group for each 2 MiB page), "
        f"{counters['host_faults']} of the CPU"
    )
    lines.append(f"  discarded: {size(counters['discarded'])}")
    for key, what in (
        ("slow_discard_writes", "written to discarded pages without a prefetch, which is a thousand times slower"),
        ("prefetch_skipped", "not moved by prefetches for want of room"),
        ("host_overcommitted", "needed beyond the host's memory: a real machine would have killed a process"),
    ):
        if counters[key]:
            lines.append(f"  {size(counters[key])} {what}")
    if counters["out_of_memory"]:
        lines.append(f"  CUDA refused {_count(counters['out_of_memory'], 'allocation')} for want of memory")
    return lines


def _peak(peak: dict[str, int]) -> list[str]:
    return [size(peak["managed"]), size(peak["plain"]), size(peak["total"])]


def _moved(moved: dict[str, int]) -> list[str]:
    sizes = [size(moved[key]) for key in ("bytes_h2d", "bytes_d2h", "bytes_d2d")]
    return [str(moved["count"]), *sizes, _time(moved["nanoseconds"])]


def _count(count: int, thing: str) -> str:
    """A number of things: 1 process, 2 processes."""
    plural = "" if count == 1 else "es" if thing.endswith("s") else "s"
    return f"{count} {thing}{plural}"


def _time(nanoseconds: int) -> str:
    """A time for people."""
    value = float(nanoseconds)
    for unit in ("ns", "us", "ms"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "ns" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} s"


def _table(rows: list[list[str]]) -> list[str]:
    """Rows of cells, the first column to the left, the others to the right; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def main(machine: Machine, command: list[str], json_file: str | None) -> int:
    """The command: runs the program, prints the report on stderr; answers the program's exit status, or 2."""
    try:
        if json_file is not None:
            Path(json_file).touch()  # better known before a long run than after it
        found = run(machine, command)
        if json_file is not None:
            Path(json_file).write_text(as_json(found) + "\n")
    except CannotSimulate as error:
        print(f"torch-uvm simulate: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"torch-uvm simulate: {json_file}: cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    print(as_text(found), file=sys.stderr)
    return int(found["status"])
