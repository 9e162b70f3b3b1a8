"""`python -m torch_uvm`: the package's commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; answers the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m torch_uvm", description="Unified memory for PyTorch's CUDA caching allocator."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_doctor(commands)
    _add_report(commands)
    _add_simulate(commands)
    chosen = parser.parse_args(arguments)
    return int(chosen.run(chosen))


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="say what this machine is, what will work on it, and what the options resolve to",
        description="Says what this machine is, what will work on it, and what the options in PYTORCH_CUDA_ALLOC_CONF "
        "resolve to. The exit status is 0 if use_uvm works here, or would work, and 1 if not.",
    )
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON (sizes in bytes)")
    doctor.set_defaults(run=_doctor)


def _doctor(chosen: argparse.Namespace) -> int:
    from . import _doctor

    report = _doctor.examine()
    print(_doctor.as_json(report) if chosen.json else _doctor.as_text(report))
    return 0 if report.works else 1


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = commands.add_parser(
        "report",
        help="make a page of a memory snapshot: memory by place over time, segments, owners",
        description="Makes one HTML page, which needs no network, of a snapshot that torch_uvm.dump_snapshot or "
        "torch.cuda.memory._dump_snapshot has written. It needs plotly (`pip install torch-uvm[report]`).",
    )
    report.add_argument("snapshot", metavar="SNAPSHOT", help="the snapshot's file")
    report.add_argument("-o", "--output", metavar="FILE", default="report.html", help="the page [default: report.html]")
    report.set_defaults(run=_report)


def _report(chosen: argparse.Namespace) -> int:
    from . import _report_page

    return _report_page.main(chosen.snapshot, chosen.output)


def _add_simulate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from . import _simulate

    simulate = commands.add_parser(
        "simulate",
        help="run a program on a simulated GPU and say what memory it would take, what moves, and whether it fits",
        usage="python -m torch_uvm simulate [options] -- COMMAND ...",
        description="Runs a program, without a GPU, on a machine made of software whose kernels do nothing, and says "
        "on stderr what memory it took where, what moved and why, how long that takes, and whether it fitted. "
        "PYTORCH_CUDA_ALLOC_CONF counts as on a real machine. The exit status is the program's.",
    )
    simulate.add_argument("--device", choices=_simulate.DEVICES, default="gh200", help="the kind of machine [gh200]")
    simulate.add_argument(
        "--hbm",
        metavar="SIZE",
        type=_checked(_simulate.memory_size),
        help="each GPU's memory, as 96GiB [the machine's]",
    )
    simulate.add_argument(
        "--host",
        metavar="SIZE",
        type=_checked(_simulate.memory_size),
        help="the CPU's memory, as 480GiB [the machine's]",
    )
    simulate.add_argument(
        "--devices",
        metavar="N",
        type=int,
        choices=range(1, _simulate.MOST_DEVICES + 1),
        default=1,
        help="how many GPUs [1]",
    )
    simulate.add_argument(
        "--seed",
        metavar="N",
        type=_checked(_simulate.seed),
        default="0",
        help="the order in which streams make progress: a number, late (at synchronisation only) or eager [0]",
    )
    simulate.add_argument("--json", metavar="FILE", help="write the findings there, as JSON (bytes and nanoseconds)")
    simulate.add_argument("program", nargs="+", metavar="COMMAND", help="the program and its arguments, after --")
    simulate.set_defaults(run=_simulate_command)


def _simulate_command(chosen: argparse.Namespace) -> int:
    from . import _simulate

    machine = _simulate.Machine(chosen.device, chosen.hbm, chosen.host, chosen.devices, chosen.seed)
    return _simulate.main(machine, chosen.program, chosen.json)


def _checked(parse: Callable[[str], Value]) -> Callable[[str], Value]:
    """A parser of an argument whose ValueError's text the user is to see."""

    def parsed(text: str) -> Value:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


if __name__ == "__main__":
    sys.exit(main())
