"""A program's side of `python -m torch_uvm simulate`: what PyTorch's allocator has to say when the program ends.

The simulator counts what reaches CUDA. Which allocator ran, and whether it raised OutOfMemoryError, only PyTorch knows:
`watch` writes it beside the simulator's reports. Nothing here is imported in other runs.
"""

from __future__ import annotations

import atexit
import json
import os
from pathlib import Path
from typing import Any

#: Names the folder of the reports. The simulator's own (sim/capi/src/report.rs) lie there too.
VARIABLE = "TORCH_UVM_SIM_REPORT"


def watch() -> None:
    """Has this process write `allocator-<process id>.json` at its end, if it has used CUDA by then."""
    atexit.register(_write, os.getpid())


def _write(process: int) -> None:
    """Writes what the allocator says. Whatever goes wrong here must not change how the program ends."""
    folder = os.environ.get(VARIABLE)
    if not folder or process != os.getpid():  # a forked child has come by its parent's exit handlers
        return
    try:
        facts = _facts()
        if facts is not None:
            Path(folder, f"allocator-{process}.json").write_text(json.dumps(facts))
    except Exception:
        return


def _facts() -> dict[str, Any] | None:
    """The allocator's name and figures (bytes and counts, by device); None where CUDA was not used."""
    import torch

    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    devices = []
    for device in range(torch.cuda.device_count()):
        statistics = torch.cuda.memory_stats(device)
        devices.append(
            {
                "out_of_memory_errors": statistics.get("num_ooms", 0),
                "retries": statistics.get("num_alloc_retries", 0),
                "allocated_peak": statistics.get("allocated_bytes.all.peak", 0),
                "reserved_peak": statistics.get("reserved_bytes.all.peak", 0),
                **{key: value for key, value in statistics.items() if key.startswith("uvm")},
            }
        )
    return {
        "process": os.getpid(),
        "torch": torch.__version__,
        "backend": torch.cuda.get_allocator_backend(),
        "devices": devices,
    }
