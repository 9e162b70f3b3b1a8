#!/usr/bin/env python3
"""Times the allocator's hot path: `native` and `uvm`, in one wheel, on one machine, in one run.

Run by `cargo xtask bench hotpath`, or by hand with the patched wheel's Python:

    TORCH_UVM_SIM_LIB=DIR python benches/hotpath.py [--repeats 5] [--out target/bench/hotpath.json]

Each measurement has a process of its own, since the backend is chosen when PyTorch is loaded; the backends take
turns, and the table shows the median over all processes. `TORCH_UVM_SIM_LIB` names the simulated device's libraries
(without it the machine's own GPU is used). The loops are C++ (hotpath.cpp): no Python is timed.

Workloads:

- `pair_4KiB`, `pair_4MiB`: allocate and free one block; nanoseconds a pair. `raw_pair_4KiB`: the same through
  raw_alloc.
- `mixed_100`, `mixed_2000`, `mixed_20000`: that many live blocks, sizes log-uniform from 512 B to 4 MiB, a random one
  replaced each time; nanoseconds an operation (a free and an allocation are two).
- `threads_4`, `threads_4_large`: four threads, each allocating and freeing blocks of 4 KiB (4 MiB); nanoseconds a
  pair as each thread sees it.

This file never judges a time: it prints the table and writes `{workload: {"native_ns", "uvm_ns", "ratio"}}`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT / "tests" / "python"))

import simulated  # noqa: E402  (needs the path above)

CONFIGURATIONS = {
    "native": "",
    "uvm": "use_uvm:True,uvm_oversubscription_ratio:5.0,uvm_access_pattern:gpu_first",
}
KIB, MIB = 1 << 10, 1 << 20


def include_directories(extra: list[str]) -> list[str]:
    """Include directories of PyTorch and CUDA: `extra` first, then the environment's, then those of the packages."""
    import importlib.util

    from torch.utils.cpp_extension import include_paths

    directories = list(extra) + os.environ.get("TORCH_UVM_CUDA_INCLUDE", "").split(":") + include_paths()
    # CUDA's own headers come with packages that the wheel depends on; triton's copy includes crt/.
    for package, folder in (("triton", "backends/nvidia/include"), ("nvidia.cuda_runtime", "include")):
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        if spec is not None and spec.submodule_search_locations:
            directories += [f"{location}/{folder}" for location in spec.submodule_search_locations]
    return [directory for directory in directories if directory and Path(directory).is_dir()]


def compile_loops(target: Path, cxx: str, extra_includes: list[str]) -> Path:
    """Compiles hotpath.cpp against the installed torch and returns the library."""
    import torch

    library = target / "libhotpath.so"
    target.mkdir(parents=True, exist_ok=True)
    torch_lib = Path(torch.__file__).parent / "lib"
    command = [cxx, "-std=c++17", "-O2", "-fPIC", "-shared", "-pthread", "-Wall", "-fvisibility=hidden"]
    command.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}")
    for directory in include_directories(extra_includes):
        command += ["-isystem", directory]
    command += [str(HERE / "hotpath.cpp"), f"-L{torch_lib}", "-lc10_cuda", "-lc10", "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(
            f"{cxx} could not compile {HERE / 'hotpath.cpp'} (CUDA's headers are looked for in triton, in "
            f"nvidia-cuda-runtime and in --cuda-include):\n{done.stderr}"
        )
    return library


def worker(library: Path, backend: str, samples: int) -> None:
    """Runs every workload `samples` times in this process and prints the medians as one JSON line."""
    import torch

    torch.cuda.init()
    found = torch.cuda.get_allocator_backend()
    if found != backend:
        raise SystemExit(f"the allocator backend is {found!r}, not {backend!r}: is this the patched wheel?")
    loops = ctypes.CDLL(str(library))
    size, count = ctypes.c_size_t, ctypes.c_size_t
    signatures = {
        "hotpath_pair": (size, count),
        "hotpath_raw_pair": (size, count),
        "hotpath_mixed": (count, count, ctypes.c_uint64),
        "hotpath_threads": (count, size, count),
    }
    for name, arguments in signatures.items():
        function = getattr(loops, name)
        function.argtypes, function.restype = arguments, ctypes.c_double

    workloads: dict[str, Callable[[int], float]] = {
        "pair_4KiB": lambda _: loops.hotpath_pair(4 * KIB, 100_000),
        "pair_4MiB": lambda _: loops.hotpath_pair(4 * MIB, 100_000),
        "raw_pair_4KiB": lambda _: loops.hotpath_raw_pair(4 * KIB, 100_000),
        "mixed_100": lambda sample: loops.hotpath_mixed(100, 200_000, sample),
        "mixed_2000": lambda sample: loops.hotpath_mixed(2_000, 200_000, sample),
        "mixed_20000": lambda sample: loops.hotpath_mixed(20_000, 200_000, sample),
        "threads_4": lambda _: loops.hotpath_threads(4, 4 * KIB, 50_000),
        "threads_4_large": lambda _: loops.hotpath_threads(4, 4 * MIB, 50_000),
    }
    medians = {}
    for name, run in workloads.items():
        times = [run(sample) for sample in range(samples)]
        if min(times) < 0:
            raise SystemExit(f"{name} failed under {backend}; see above")
        medians[name] = statistics.median(times)
    print(json.dumps(medians))


def measure(library: Path, backend: str, samples: int) -> dict[str, float]:
    """One process of one backend: nanoseconds by workload."""
    # A full-size GH200: 20,000 live blocks hold about 9 GiB, and native must have them on the device.
    environment = simulated.environment(CONFIGURATIONS[backend], hbm=None, host=None, schedule="eager")
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--worker",
        backend,
        str(library),
        "--samples",
        str(samples),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise SystemExit(
            f"the {backend} process ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Compiles, measures in turns, prints the table and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "target" / "bench" / "hotpath.json", help="where the figures go"
    )
    parser.add_argument("--repeats", type=int, default=5, help="processes a backend (default 5)")
    parser.add_argument("--samples", type=int, default=3, help="runs of each workload in a process (default 3)")
    parser.add_argument("--backends", default="native,uvm", help="which backends, by commas (default native,uvm)")
    parser.add_argument("--cxx", default=os.environ.get("CXX", "g++"), help="the C++ compiler")
    parser.add_argument(
        "--cuda-include", action="append", default=[], metavar="DIR", help="CUDA's headers (repeatable)"
    )
    parser.add_argument("--worker", nargs=2, metavar=("BACKEND", "LIBRARY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(Path(arguments.worker[1]), arguments.worker[0], arguments.samples)
        return

    backends = [name.strip() for name in arguments.backends.split(",") if name.strip()]
    unknown = sorted(set(backends) - set(CONFIGURATIONS))
    if unknown or not backends:
        parser.error(f"--backends: {', '.join(unknown) or 'none given'}; allowed are {', '.join(CONFIGURATIONS)}")
    library = compile_loops(arguments.out.resolve().parent, arguments.cxx, arguments.cuda_include)
    runs: dict[str, list[dict[str, float]]] = {backend: [] for backend in backends}
    for repeat in range(arguments.repeats):
        for backend in backends:
            runs[backend].append(measure(library, backend, arguments.samples))
            print(f"round {repeat + 1} of {arguments.repeats}: {backend} measured", file=sys.stderr, flush=True)

    table: dict[str, dict[str, float]] = {}
    for workload in runs[backends[0]][0]:
        row = {f"{backend}_ns": statistics.median(run[workload] for run in runs[backend]) for backend in backends}
        if {"native_ns", "uvm_ns"} <= row.keys():
            row["ratio"] = row["uvm_ns"] / row["native_ns"]
        table[workload] = {key: round(value, 3) for key, value in row.items()}

    columns = [f"{backend}_ns" for backend in backends] + (["ratio"] if len(backends) == 2 else [])
    print(f"{'workload':<18}" + "".join(f"{column:>12}" for column in columns))
    for workload, row in table.items():
        print(f"{workload:<18}" + "".join(f"{row[column]:>12.2f}" for column in columns))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(table, indent=2) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
