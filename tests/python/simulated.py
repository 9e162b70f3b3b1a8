"""The environment of a process that runs on the simulated CUDA device.

Nothing here imports torch: the tests, the suite runner and the bench stay outside the simulator and start processes
under it. `TORCH_UVM_SIM_LIB` names the folder with the stand-in libraries (`cargo xtask` sets it; they lie in
`target/sim/lib`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARIES = ("libcudart.so.12", "libcudart.so.13", "libcuda.so.1", "libnvidia-ml.so.1")
#: What the variables that choose the machine and the allocator's configuration begin with.
CHOSEN = ("TORCH_UVM_SIM_", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING")
#: The configuration that the README starts with.
UVM = "use_uvm:True,uvm_oversubscription_ratio:5.0,uvm_access_pattern:gpu_first"


class NoSimulator(RuntimeError):
    """`TORCH_UVM_SIM_LIB` is unset, or its folder does not hold the libraries."""


def library_directory() -> Path | None:
    """The folder of the stand-in libraries; None where `TORCH_UVM_SIM_LIB` is unset. NoSimulator if it lacks one."""
    name = os.environ.get("TORCH_UVM_SIM_LIB")
    if not name:
        return None
    directory = Path(name).resolve()
    missing = [library for library in LIBRARIES if not (directory / library).exists()]
    if missing:
        raise NoSimulator(f"TORCH_UVM_SIM_LIB={name}: no {', '.join(missing)} there; `cargo xtask test` builds them")
    return directory


def environment(
    conf: str = "",
    *,
    device: str = "gh200",
    hbm: str | None = "2GiB",
    host: str | None = "10GiB",
    devices: int = 1,
    schedule: str | int = "late",
    require: bool = False,
    **extra: str,
) -> dict[str, str]:
    """The variables of a process with `conf` as its allocator configuration, on `devices` simulated devices.

    The default is a small GH200 whose streams run as late as they may. None for `hbm` or `host` keeps the profile's own
    size. `schedule` is `late`, `eager` or the seed of a random order. Without `TORCH_UVM_SIM_LIB` the process sees the
    machine's own GPU, unless `require` forbids that. `extra` is set last.
    """
    variables = {key: value for key, value in os.environ.items() if not key.startswith(CHOSEN)}
    if conf:
        variables["PYTORCH_CUDA_ALLOC_CONF"] = conf
    directory = library_directory()
    if directory is None:
        if require:
            raise NoSimulator("TORCH_UVM_SIM_LIB is not set: run `cargo xtask test`, or set it to target/sim/lib")
    else:
        preload = ":".join(str(directory / library) for library in LIBRARIES)
        for key, value in (("LD_PRELOAD", preload), ("LD_LIBRARY_PATH", str(directory))):
            inherited = variables.get(key)
            variables[key] = f"{value}:{inherited}" if inherited else value
        variables["TORCH_UVM_SIM_DEVICE"] = device
        variables["TORCH_UVM_SIM_DEVICES"] = str(devices)
        variables["TORCH_UVM_SIM_SEED"] = str(schedule)
        if hbm is not None:
            variables["TORCH_UVM_SIM_HBM"] = hbm
        if host is not None:
            variables["TORCH_UVM_SIM_HOST"] = host
    variables.update(extra)
    return variables


@dataclass
class Finished:
    """How a process ended and what it printed."""

    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Everything printed, for the message of a failing assertion."""
        return f"exit status {self.status}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


def run_python(code: str, variables: dict[str, str], timeout: float = 120) -> Finished:
    """Runs `code` in a Python process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-c", code],
            env=variables,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as expired:
        streams = [stream.decode(errors="replace") if stream else "" for stream in (expired.stdout, expired.stderr)]
        return Finished(-1, streams[0], f"{streams[1]}\n(no end within {timeout} s)")
    return Finished(done.returncode, done.stdout, done.stderr)
