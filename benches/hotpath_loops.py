"""The loops of the workload `hotpath`: allocate and free, written in C++ (hotpath.cpp), compiled and called from here.

They are compiled against the installed torch. `cargo xtask bench hotpath` measures them in the patched wheel, and
`run.py --workloads hotpath --backends native,uvm` with any PyTorch.

- `pair_4KiB`, `pair_4MiB`: allocate and free one block; nanoseconds a pair. `raw_pair_4KiB`: the same through
  raw_alloc.
- `mixed_100`, `mixed_2000`, `mixed_20000`: that many live blocks, sizes log-uniform from 512 B to 4 MiB, a random one
  replaced each time; nanoseconds an operation (a free and an allocation are two).
- `threads_4`, `threads_4_large`: four threads, each allocating and freeing blocks of 4 KiB (4 MiB); nanoseconds a
  pair as each thread sees it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KIB, MIB = 1 << 10, 1 << 20
#: Names the compiled loops to the worker.
LIBRARY = "TORCH_UVM_BENCH_HOTPATH"


@dataclass(frozen=True)
class Loop:
    """One loop of hotpath.cpp."""

    title: str
    function: str
    #: Its arguments: the last, the number of operations, can be divided; `hotpath_mixed` gets a seed after it.
    arguments: tuple[int, ...]
    #: Holds little memory: also run with --quick.
    small: bool = True

    def run(self, loops: Any, sample: int, divisor: int = 1) -> float:
        """Nanoseconds. RuntimeError where the loop fails; the library says why on stderr."""
        arguments = (*self.arguments[:-1], max(1, self.arguments[-1] // divisor))
        seed = (sample,) if self.function == "hotpath_mixed" else ()
        time = getattr(loops, self.function)(*arguments, *seed)
        if time < 0:
            raise RuntimeError(f"{self.function}{arguments} failed; see above")
        return time


LOOPS = {
    "pair_4KiB": Loop("allocate + free 4 KiB", "hotpath_pair", (4 * KIB, 100_000)),
    "pair_4MiB": Loop("allocate + free 4 MiB", "hotpath_pair", (4 * MIB, 100_000)),
    "raw_pair_4KiB": Loop("the same through raw_alloc, 4 KiB", "hotpath_raw_pair", (4 * KIB, 100_000)),
    "mixed_100": Loop("mixed sizes, 100 live, an operation", "hotpath_mixed", (100, 200_000)),
    "mixed_2000": Loop("mixed sizes, 2,000 live", "hotpath_mixed", (2_000, 200_000), small=False),
    "mixed_20000": Loop("mixed sizes, 20,000 live", "hotpath_mixed", (20_000, 200_000), small=False),
    "threads_4": Loop("four threads, 4 KiB, a pair", "hotpath_threads", (4, 4 * KIB, 50_000)),
    "threads_4_large": Loop("four threads, 4 MiB", "hotpath_threads", (4, 4 * MIB, 50_000)),
}


def include_directories(extra: list[str]) -> list[str]:
    """Include directories of PyTorch and CUDA: `extra` first, then the environment's, then those of the packages."""
    from torch.utils.cpp_extension import include_paths

    directories = list(extra) + os.environ.get("TORCH_UVM_CUDA_INCLUDE", "").split(":") + include_paths()
    for toolkit in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if toolkit:
            directories.append(f"{toolkit}/include")
    # CUDA's own headers come with packages that the wheel depends on; triton's copy includes crt/.
    packages = (
        ("triton", "backends/nvidia/include"),
        ("nvidia.cuda_runtime", "include"),
        ("nvidia", "cu13/include"),
    )
    for package, folder in packages:
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        if spec is not None and spec.submodule_search_locations:
            directories += [f"{location}/{folder}" for location in spec.submodule_search_locations]
    return [directory for directory in directories if directory and Path(directory).is_dir()]


def compile_loops(folder: Path, cxx: str, extra_includes: list[str]) -> Path:
    """Compiles hotpath.cpp against the installed torch and returns the library. RuntimeError where that fails."""
    import torch

    library = folder / "libhotpath.so"
    torch_lib = Path(torch.__file__).parent / "lib"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    standard = "c++20" if version >= (2, 14) else "c++17"  # what the headers of each need
    command = [cxx, f"-std={standard}", "-O2", "-fPIC", "-shared", "-pthread", "-Wall", "-fvisibility=hidden"]
    command.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}")
    for directory in include_directories(extra_includes):
        command += ["-isystem", directory]
    command += [str(HERE / "hotpath.cpp"), f"-L{torch_lib}", "-lc10_cuda", "-lc10", "-o", str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{cxx}: {error}") from error
    if done.returncode != 0:
        raise RuntimeError(
            f"{cxx} could not compile {HERE / 'hotpath.cpp'} (CUDA's headers are looked for in --cuda-include, "
            f"$TORCH_UVM_CUDA_INCLUDE, /usr/local/cuda, triton and the nvidia packages):\n{done.stderr}"
        )
    return library


def load(library: str) -> ctypes.CDLL:
    """The compiled loops, in a process that has imported torch."""
    loops = ctypes.CDLL(library)
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
    return loops
