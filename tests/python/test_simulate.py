"""`python -m torch_uvm simulate`: counts, verdicts, exit statuses, and several processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from on_device import about_uvm
from simulated import CHOSEN, library_directory
from simulating import simulate, torch_uvm, totals_of

from torch_uvm import _simulate

#: Takes long, and is the same for every version of PyTorch.
pytestmark = pytest.mark.one_version

MIB = 1 << 20
#: Whether PyTorch loads the package by itself, so that its allocator is heard at a program's end.
PLUGIN = any(point.value.startswith("torch_uvm.") for point in entry_points(group="torch.backends"))
SMALL = ("--device", "gh200", "--hbm", "2GiB", "--host", "10GiB")
UVM = "use_uvm:True"

#: CUDA without PyTorch, which takes seconds to import.
CUDA = """
import ctypes, os, sys
cuda = ctypes.CDLL("libcudart.so.12")
def call(name, *arguments):
    status = getattr(cuda, name)(*arguments)
    assert status == 0, (name, status)
def allocate(size, name="cudaMalloc", *more):
    pointer = ctypes.c_void_p()
    call(name, ctypes.byref(pointer), ctypes.c_size_t(size), *more)
    return pointer
"""
#: 400 MiB on a GPU of 256 MiB (soft limit 240), all of it written and read by copies: kernels would do nothing.
TINY = ("--hbm", "256MiB", "--host", "4GiB")
MIXED = """
import torch
host = torch.empty(10 << 20, dtype=torch.uint8).pin_memory()
tensors = [torch.empty(10 << 20, dtype=torch.uint8, device="cuda") for _ in range(40)]
side = torch.cuda.Stream()
for round in range(2):
    for number, tensor in enumerate(tensors):
        with torch.cuda.stream(side if number % 3 else torch.cuda.current_stream()):
            tensor.copy_(host, non_blocking=True)
host.copy_(tensors[0], non_blocking=True)
"""


@about_uvm
def test_a_program_that_fits(tmp_path: Path) -> None:
    """More than the GPU has: the peaks by place, and not one fault; the same each time."""
    options = (*TINY, "--device", "gh200", "--seed", "7")
    ended, found = simulate(MIXED, tmp_path, *options, conf=UVM)
    assert ended.status == 0 and found["status"] == 0, ended.text
    assert found["fits"] is True and found["verdict"].startswith("it fits: "), found["verdict"]
    (process,) = found["processes"]
    machine, peaks = process["machine"], process["peaks"]
    assert (machine["device_memory"], machine["host_memory"]) == (256 * MIB, 4 << 30), machine
    assert (machine["device"], machine["schedule"], process["complete"]) == ("gh200", "7", True), process
    (device,) = peaks["devices"]
    assert 200 * MIB <= device["managed"] <= 240 * MIB and device["plain"] == 0, peaks
    assert peaks["host"]["plain"] >= 10 * MIB and 160 * MIB <= peaks["host"]["managed"] <= 240 * MIB, peaks
    assert 410 * MIB <= peaks["all"] <= device["total"] + peaks["host"]["total"], peaks
    totals = found["totals"]
    counters, traffic = totals["counters"], totals["traffic"]
    assert (counters["device_faults"], counters["migrations"], counters["evictions"]) == (0, 0, 0), totals
    assert totals["populated"]["prefetches"]["bytes_device"] == device["managed"], totals
    copies = traffic["copies"]
    assert (copies["bytes_h2d"], copies["bytes_d2h"]) == (800 * MIB, 10 * MIB), copies
    assert copies["nanoseconds"] == pytest.approx(800 * MIB / (7 * 54.9) + 10 * MIB / (7 * 55.2), rel=0.01)
    # Twice the tensors that lie in the host, reached where they are.
    assert 320 * MIB <= traffic["remote"]["bytes_d2h"] <= 400 * MIB, traffic
    for words in ("it fits", "NVIDIA GH200 480GB", "GPU 0", "at once", "prefetches, pages", "Kernels do nothing"):
        assert words in ended.err, ended.text
    assert not ended.out, ended.text
    _, again = simulate(MIXED, tmp_path, *options, conf=UVM)
    for key in ("totals", "fits"):
        assert again[key] == found[key]
    assert again["processes"][0]["peaks"] == peaks


@about_uvm
def test_falling_back_to_faults_shows(tmp_path: Path) -> None:
    """The same program where nobody populates ahead of use and nobody places: pages come by faults, and thrash."""
    conf = f"{UVM},uvm_access_pattern:balanced,uvm_prefetch:False"
    _, found = simulate(MIXED, tmp_path, *TINY, "--device", "h100", conf=conf)
    counters, populated, traffic = found["totals"]["counters"], found["totals"]["populated"], found["totals"]["traffic"]
    assert counters["device_faults"] >= 400 // 2, counters
    assert populated["prefetches"]["bytes_device"] == 0 and populated["faults"]["bytes_device"] >= 240 * MIB, populated
    assert populated["faults"]["nanoseconds"] >= 240 * MIB / 12.9, populated
    assert counters["evictions"] > 0 and traffic["evictions"]["bytes_d2h"] == 2 * MIB * counters["evictions"], (
        totals_of(found)
    )


@pytest.mark.skipif(not PLUGIN, reason="about what torch-uvm's entry point adds in the program")
@about_uvm
def test_a_program_that_does_not_fit(tmp_path: Path) -> None:
    """OutOfMemoryError: not handled, handled, and with PyTorch's own allocator."""
    code = "import torch\ntensors = [torch.empty(64 << 20, dtype=torch.uint8, device='cuda') for _ in range(50)]\n"
    ended, found = simulate(code, tmp_path, *SMALL, conf=f"{UVM},uvm_oversubscription_ratio:1.2")
    assert ended.status == 1 and found["status"] == 1 and "OutOfMemoryError" in ended.err, ended.text
    assert found["fits"] is False and found["verdict"].startswith("it does not fit: "), found["verdict"]
    allocator = found["processes"][0]["allocator"]
    assert allocator["backend"] == "uvm" and allocator["devices"][0]["out_of_memory_errors"] == 1, allocator
    assert allocator["devices"][0]["allocated_peak"] <= 1.2 * (2 << 30), allocator

    code = (
        f"import torch\ntry:\n    {code.splitlines()[1]}\nexcept torch.cuda.OutOfMemoryError:\n    print('handled')\n"
    )
    ended, found = simulate(code, tmp_path, *SMALL)
    assert ended.status == 0 and ended.out == "handled\n", ended.text
    assert found["fits"] is False and "which it handled itself" in found["verdict"], found["verdict"]
    assert found["processes"][0]["allocator"]["backend"] == "native", found["processes"]
    assert found["totals"]["counters"]["out_of_memory"] > 0
    assert found["processes"][0]["peaks"]["devices"][0]["managed"] == 0


def test_plain_and_managed_memory(tmp_path: Path) -> None:
    """Counts of a program that calls CUDA itself, with work still queued when it ends."""
    code = CUDA + (
        "plain, managed = allocate(100 << 20), allocate(300 << 20, 'cudaMallocManaged', 1)\n"
        "pinned = allocate(50 << 20, 'cudaMallocHost')\n"
        "call('cudaMemsetAsync', managed, 1, ctypes.c_size_t(200 << 20), None)\n"
        "call('cudaMemcpyAsync', pinned, managed, ctypes.c_size_t(50 << 20), 2, None)\n"
    )
    ended, found = simulate(code, tmp_path, *SMALL, "--device", "h100", "--seed", "late")
    assert ended.status == 0 and found["fits"] is True, ended.text
    (process,) = found["processes"]
    assert process["pending_operations"] == 0 and process["allocator"] is None, process
    assert process["peaks"]["devices"] == [{"managed": 200 * MIB, "plain": 100 * MIB, "total": 300 * MIB}]
    assert process["peaks"]["host"] == {"managed": 0, "plain": 50 * MIB, "total": 50 * MIB}
    assert process["counters"]["device_faults"] == 100 and process["traffic"]["copies"]["bytes_d2h"] == 50 * MIB
    assert "did not say" in found["verdict"] and "not known" in ended.err, ended.text


def test_several_processes(tmp_path: Path) -> None:
    """Each is listed: one that leaves without its exit handlers, one that is killed, one that became another."""
    one = CUDA + "allocate({size} << 20)\ncall('cudaDeviceSynchronize')\n{end}\n"
    ends = {
        100: "",
        200: "os._exit(0)",
        300: f"os.kill(os.getpid(), {int(signal.SIGKILL)})",
        400: f"os.execv(sys.executable, [sys.executable, '-c', {(CUDA + 'allocate(500 << 20)')!r}])",
    }
    code = "import subprocess, sys\n" + "".join(
        f"subprocess.run([sys.executable, '-c', {one.format(size=size, end=end)!r}])\n" for size, end in ends.items()
    )
    ended, found = simulate(code, tmp_path, *SMALL)
    assert ended.status == 0, ended.text
    peaks = {process["peaks"]["devices"][0]["plain"] // MIB: process for process in found["processes"]}
    assert list(peaks) == [100, 200, 300, 400, 500], "in the order in which they began"
    assert [process["complete"] for process in found["processes"]] == [True, False, False, False, True]
    assert peaks[400]["process"] == peaks[500]["process"], "exec keeps the number"
    assert "All 5 processes together" in ended.err and "without its exit handlers" in ended.err, ended.text


def test_children_forked_by_a_program(tmp_path: Path) -> None:
    """A fork before CUDA's first use is a process of its own; one after it says nothing, not its parent's figures."""
    code = CUDA + (
        "if os.fork() == 0:\n    allocate(100 << 20)\n    sys.exit(0)\n"
        "os.wait()\nallocate(200 << 20)\n"
        "if os.fork() == 0:\n    sys.exit(0)\n"
        "os.wait()\nallocate(300 << 20)\n"
    )
    ended, found = simulate(code, tmp_path, *SMALL)
    assert ended.status == 0, ended.text
    assert [one["peaks"]["devices"][0]["plain"] // MIB for one in found["processes"]] == [100, 500]
    assert all(one["complete"] for one in found["processes"])


@pytest.mark.parametrize(("end", "status"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137), ("", 0)])
def test_the_exit_status_is_the_programs(end: str, status: int, tmp_path: Path) -> None:
    """Also where a signal ended it: then as a shell says it."""
    ended, found = simulate(f"import os, sys\nprint('said')\nsys.stdout.flush()\n{end}\n", tmp_path, *SMALL)
    assert (ended.status, found["status"], ended.out) == (status, status, "said\n"), ended.text
    assert found["fits"] is None and "none of its processes used CUDA" in found["verdict"], found["verdict"]
    assert found["totals"] is None and not found["processes"]


def test_more_host_memory_than_there_is(tmp_path: Path) -> None:
    """What the kernel's OOM killer would have ended does not fit, whatever its status."""
    code = CUDA + (
        "a = allocate(3 << 30, 'cudaMallocManaged', 1)\n"
        "call('cudaMemset', a, 1, ctypes.c_size_t(3 << 30))\ncall('cudaDeviceSynchronize')\n"
    )
    # Sizes of which the host's is smaller than what has to leave the GPU.
    ended, found = simulate(code, tmp_path, "--device", "h100", "--hbm", "2GiB", "--host", "512MiB")
    assert ended.status == 0, ended.text
    assert found["fits"] is False and "more host memory than there is" in found["verdict"], found["verdict"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--hbm", "much"), "'much': expected a size from 64MiB to 16TiB"),
        (("--host", "1MiB"), "'1MiB': expected a size from 64MiB to 16TiB"),
        (("--devices", "0"), "--devices"),
        (("--device", "h200"), "gh200-egm"),
        (("--seed", "soon"), "'soon': expected a number, late or eager"),
    ],
)
def test_wrong_options(options: tuple[str, ...], said: str, tmp_path: Path) -> None:
    """The error names the option, the value and what is allowed; the program is not run."""
    ended, found = simulate("open('ran', 'w')", tmp_path, *options)
    assert ended.status == 2 and said in ended.err and options[0] in ended.err, ended.text
    assert not found and not (tmp_path / "ran").exists()


def test_what_cannot_be_simulated(tmp_path: Path) -> None:
    """No libraries, no such program, a file that cannot be written: an error and status 2, no traceback."""
    ended, _ = simulate("", tmp_path, libraries=str(tmp_path))
    assert ended.status == 2 and str(tmp_path) in ended.err and "TORCH_UVM_SIM_LIB" in ended.err, ended.text
    ended, _ = simulate(["no-such-program"], tmp_path)
    assert ended.status == 2 and "no-such-program: cannot be started" in ended.err, ended.text
    ended, _ = simulate("open('ran', 'w')", tmp_path, "--json", str(tmp_path / "no" / "folder"))
    assert ended.status == 2 and "no/folder: cannot be written: No such file" in ended.err, ended.text
    assert not (tmp_path / "ran").exists() and "Traceback" not in ended.err, ended.text


def test_libraries_in_a_folder_with_a_space(tmp_path: Path) -> None:
    """The loader takes such a path for two."""
    folder = tmp_path / "my libraries"
    shutil.copytree(str(library_directory()), folder)
    ended, found = simulate(CUDA + "allocate(100 << 20)\n", tmp_path, *SMALL, libraries=str(folder))
    assert ended.status == 0 and found["processes"][0]["peaks"]["all"] == 100 * MIB, ended.text


@pytest.mark.skipif(
    not (Path(_simulate.__file__).parent / "sim").is_dir(),
    reason="about the libraries that the plug-in's wheel carries",
)
def test_libraries_of_the_wheel(tmp_path: Path) -> None:
    """Without TORCH_UVM_SIM_LIB they are found beside the package."""
    ended, found = simulate(CUDA + "allocate(100 << 20)\n", tmp_path, *SMALL, libraries=None)
    assert ended.status == 0 and found["processes"][0]["peaks"]["all"] == 100 * MIB, ended.text


def test_other_runs_know_nothing_of_it() -> None:
    """Importing the package loads neither the command nor the libraries."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith((*CHOSEN, "LD_PRELOAD"))}
    environment["PYTHONPATH"] = os.pathsep.join(
        (environment.get("PYTHONPATH", ""), str(Path(torch_uvm.__file__).parent.parent))
    )
    code = (
        "import sys, torch, torch_uvm\n"
        "assert not {'torch_uvm._simulate', 'torch_uvm._dry_run'} & set(sys.modules), sys.modules\n"
        "assert 'torch_uvm_sim' not in open('/proc/self/maps').read()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
