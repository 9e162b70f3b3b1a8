#!/usr/bin/env python3
"""What the figures were measured on. Run by itself it is the process that looks: `machine.py RESULT.json`."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Optional


def processor() -> str:
    """The CPU's name, and how many of them there are to use."""
    import os

    name = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def driver() -> Optional[str]:
    """The NVIDIA driver's version; None where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def look() -> dict[str, Any]:
    """Everything, from a process that may initialise CUDA."""
    import torch

    torch.cuda.init()
    free, total = torch.cuda.mem_get_info()
    properties = torch.cuda.get_device_properties(0)
    return {
        "backend": torch.cuda.get_allocator_backend(),
        "gpu": properties.name,
        "gpu_bytes": total,
        "gpu_bytes_free": free,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": processor(),
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(look()))
