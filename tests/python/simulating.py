"""Programs under `python -m torch_uvm simulate`, and what it found out about them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from simulated import CHOSEN, Finished, library_directory
from under_test import torch_uvm

__all__ = ["simulate", "torch_uvm", "totals_of"]


def simulate(
    code: str | list[str], folder: Path, *options: str, conf: str = "", libraries: str | None = ""
) -> tuple[Finished, dict[str, Any]]:
    """Simulates a Python program, or a command; its end, and the findings of --json (empty where there are none).

    `libraries` stands for TORCH_UVM_SIM_LIB: "" the tests' own, None nothing.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(CHOSEN)}
    package = str(Path(torch_uvm.__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (environment.get("PYTHONPATH"), package)))
    if libraries is not None:
        environment["TORCH_UVM_SIM_LIB"] = libraries or str(library_directory())
    if conf:
        environment["PYTORCH_CUDA_ALLOC_CONF"] = conf
    file = folder / "findings.json"
    command = [sys.executable, "-c", code] if isinstance(code, str) else code
    done = subprocess.run(
        [sys.executable, "-m", "torch_uvm", "simulate", "--json", str(file), *options, "--", *command],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    text = file.read_text() if file.exists() else ""
    return Finished(done.returncode, done.stdout, done.stderr), json.loads(text) if text else {}


def totals_of(found: dict[str, Any]) -> str:
    """The figures, for the message of a failing assertion."""
    return json.dumps(found["totals"], indent=1)
