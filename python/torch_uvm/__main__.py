"""`python -m torch_uvm`: the package's commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True)
class Command:
    """A command of the package."""

    name: str
    #: A line for the list of commands, and a paragraph for its own help.
    help: str
    description: str
    arguments: Callable[[argparse.ArgumentParser], None]
    #: Runs it; returns the exit status.
    run: Callable[[argparse.Namespace], int]
    usage: str | None = None


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m torch_uvm", description="Unified memory for PyTorch's CUDA caching allocator."
    )
    added = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        of_command = added.add_parser(
            command.name, help=command.help, description=command.description, usage=command.usage
        )
        command.arguments(of_command)
        of_command.set_defaults(run=command.run)
    chosen = parser.parse_args(arguments)
    return int(chosen.run(chosen))


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON (sizes in bytes)")


def _doctor(chosen: argparse.Namespace) -> int:
    from . import _doctor

    report = _doctor.examine()
    print(_doctor.as_json(report) if chosen.json else _doctor.as_text(report))
    return 0 if report.works else 1


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("snapshot", metavar="SNAPSHOT", help="the snapshot's file")
    parser.add_argument("-o", "--output", metavar="FILE", default="report.html", help="the page [default: report.html]")


def _report(chosen: argparse.Namespace) -> int:
    from . import _report_page

    return _report_page.main(chosen.snapshot, chosen.output)


def _simulate_arguments(parser: argparse.ArgumentParser) -> None:
    from . import _simulate

    parser.add_argument("--device", choices=_simulate.DEVICES, default="gh200", help="the kind of machine [gh200]")
    for option, memory in (("--hbm", "each GPU's memory, as 96GiB"), ("--host", "the CPU's memory, as 480GiB")):
        size = _checked(_simulate.memory_size)
        parser.add_argument(option, metavar="SIZE", type=size, help=f"{memory} [the machine's]")
    parser.add_argument(
        "--devices",
        metavar="N",
        type=int,
        choices=range(1, _simulate.MOST_DEVICES + 1),
        default=1,
        help="how many GPUs [1]",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=_checked(_simulate.seed),
        default="0",
        help="the order in which streams make progress: a number, late (at synchronisation only) or eager [0]",
    )
    parser.add_argument("--json", metavar="FILE", help="write the findings there, as JSON (bytes and nanoseconds)")
    parser.add_argument("program", nargs="+", metavar="COMMAND", help="the program and its arguments, after --")


def _simulate(chosen: argparse.Namespace) -> int:
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


COMMANDS = (
    Command(
        "doctor",
        "say what this machine is, what will work on it, and what the options resolve to",
        "Says what this machine is, what will work on it, and what the options in PYTORCH_CUDA_ALLOC_CONF "
        "resolve to. The exit status is 0 if use_uvm works here, or would work, and 1 if not.",
        _doctor_arguments,
        _doctor,
    ),
    Command(
        "report",
        "make a page of a memory snapshot: memory by place over time, segments, owners",
        "Makes one HTML page, which needs no network, of a snapshot that torch_uvm.dump_snapshot or "
        "torch.cuda.memory._dump_snapshot has written. It needs plotly (`pip install torch-uvm[report]`).",
        _report_arguments,
        _report,
    ),
    Command(
        "simulate",
        "run a program on a simulated GPU and say what memory it would take, what moves, and whether it fits",
        "Runs a program, without a GPU, on a machine made of software whose kernels do nothing, and says on "
        "stderr what memory it took where, what moved and why, how long that takes, and whether it fitted. "
        "PYTORCH_CUDA_ALLOC_CONF counts as on a real machine. The exit status is the program's.",
        _simulate_arguments,
        _simulate,
        usage="python -m torch_uvm simulate [options] -- COMMAND ...",
    ),
)

if __name__ == "__main__":
    sys.exit(main())
