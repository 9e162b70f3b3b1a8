"""`python -m torch_uvm`: the package's commands."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; answers the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m torch_uvm", description="Unified memory for PyTorch's CUDA caching allocator."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser(
        "doctor",
        help="say what this machine is, what will work on it, and what the options resolve to",
        description="Says what this machine is, what will work on it, and what the options in PYTORCH_CUDA_ALLOC_CONF "
        "resolve to. The exit status is 0 if use_uvm works here, or would work, and 1 if not.",
    )
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON (sizes in bytes)")
    chosen = parser.parse_args(arguments)

    from . import _doctor

    report = _doctor.examine()
    print(_doctor.as_json(report) if chosen.json else _doctor.as_text(report))
    return 0 if report.works else 1


if __name__ == "__main__":
    sys.exit(main())
