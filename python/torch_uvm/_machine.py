"""What the machine is: its GPUs as the CUDA driver describes them, and its host memory.

Without PyTorch: `doctor` must have answers where PyTorch is missing or does not import.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: `CUdevice_attribute`: the numbers of cuda.h.
_INTEGRATED = 18
_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76
_MANAGED_MEMORY = 83
_PAGEABLE_MEMORY_ACCESS = 88
_CONCURRENT_MANAGED_ACCESS = 89
_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES = 100
_NUMA_ID = 131
_HOST_NUMA_ID = 134


@dataclass(frozen=True)
class Gpu:
    """A GPU, as the CUDA driver describes it."""

    index: int
    name: str
    #: Its memory in bytes.
    memory: int
    compute_capability: str
    managed_memory: bool
    #: CPU and GPU may use managed memory at the same time: without it nothing can be oversubscribed.
    concurrent_managed_access: bool
    #: The GPU reaches memory of malloc and mmap.
    pageable_memory_access: bool
    #: It does so through the CPU's page tables: address translation is shared (ATS).
    host_page_tables: bool
    #: It has no memory of its own but uses the host's.
    integrated: bool
    #: The NUMA node of the CPU that it hangs on; None where the driver names none.
    host_numa_node: int | None
    #: The NUMA node that its own memory is; None where it is none.
    numa_node: int | None

    @property
    def coherent(self) -> bool:
        """CPU and GPU share address translation and keep their caches coherent in hardware (GH200, GB200, GB10)."""
        return self.pageable_memory_access and self.host_page_tables

    @property
    def mig(self) -> bool:
        """It is a part of a GPU (MIG)."""
        return " MIG " in f" {self.name} "


@dataclass(frozen=True)
class Cuda:
    """The CUDA driver and the GPUs that this process sees."""

    #: The newest CUDA that the driver speaks, such as `13.0`.
    version: str | None = None
    #: The version of the kernel module, such as `580.95.05`.
    driver: str | None = None
    gpus: list[Gpu] = field(default_factory=list)
    #: Why there are none.
    error: str | None = None
    #: torch-uvm's simulated device stands in for CUDA.
    simulated: bool = False
    #: Of the kernel module nvidia_uvm; empty where they cannot be read.
    uvm_parameters: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Host:
    """The machine without its GPUs. Sizes are bytes; None is unknown."""

    system: str
    architecture: str
    wsl: bool
    tegra: bool
    memory_total: int | None
    memory_available: int | None
    #: The tightest limit of the memory cgroups of this process; None where there is none.
    cgroup_limit: int | None
    #: What that cgroup uses.
    cgroup_usage: int | None
    #: What the firmware has handed to the GPU (extended GPU memory); None where only root may know.
    egm: int | None


def cuda() -> Cuda:
    """Asks the CUDA driver. It creates no context, so it takes no GPU memory."""
    kernel = _read("/proc/driver/nvidia/version") or ""
    module = re.search(r"Module.*?\s(\d+\.\d+(?:\.\d+)?)", kernel)
    driver = module[1] if module else None
    parameters = _parameters(Path("/sys/module/nvidia_uvm/parameters"))
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return Cuda(None, driver, [], f"no CUDA driver: {error}", False, parameters)
    simulated = "libtorch_uvm_sim" in (_read("/proc/self/maps") or "")
    number = ctypes.c_int()
    known = library.cuDriverGetVersion(ctypes.byref(number)) == 0
    version = f"{number.value // 1000}.{number.value % 1000 // 10}" if known else None
    try:
        _call(library, "cuInit", 0)
        count = ctypes.c_int()
        _call(library, "cuDeviceGetCount", ctypes.byref(count))
        gpus = [_gpu(library, index) for index in range(count.value)]
    except (_CudaError, AttributeError) as error:
        return Cuda(version, driver, [], str(error), simulated, parameters)
    missing = None if gpus else "the CUDA driver sees no GPU (is CUDA_VISIBLE_DEVICES empty?)"
    return Cuda(version, driver, gpus, missing, simulated, parameters)


class _CudaError(Exception):
    """A call of the driver failed."""


def _call(library: ctypes.CDLL, name: str, *arguments: Any) -> None:
    code = getattr(library, name)(*arguments)
    if code:
        words = ctypes.c_char_p()
        library.cuGetErrorString(code, ctypes.byref(words))
        raise _CudaError(f"{name}: {(words.value or b'unknown error').decode(errors='replace')} ({code})")


def _gpu(library: ctypes.CDLL, index: int) -> Gpu:
    device = ctypes.c_int()
    _call(library, "cuDeviceGet", ctypes.byref(device), index)
    name = ctypes.create_string_buffer(256)
    _call(library, "cuDeviceGetName", name, len(name), device)
    memory = ctypes.c_size_t()
    _call(library, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)

    def attribute(number: int, unknown: int = 0) -> int:
        value = ctypes.c_int()
        # An older driver does not know the newer ones.
        failed = library.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return unknown if failed else value.value

    def node(number: int) -> int | None:
        value = attribute(number, -1)
        return value if value >= 0 else None

    major, minor = attribute(_COMPUTE_CAPABILITY_MAJOR), attribute(_COMPUTE_CAPABILITY_MINOR)
    return Gpu(
        index=index,
        name=name.value.decode(errors="replace"),
        memory=memory.value,
        compute_capability=f"{major}.{minor}",
        managed_memory=bool(attribute(_MANAGED_MEMORY)),
        concurrent_managed_access=bool(attribute(_CONCURRENT_MANAGED_ACCESS)),
        pageable_memory_access=bool(attribute(_PAGEABLE_MEMORY_ACCESS)),
        host_page_tables=bool(attribute(_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES)),
        integrated=bool(attribute(_INTEGRATED)),
        host_numa_node=node(_HOST_NUMA_ID),
        numa_node=node(_NUMA_ID),
    )


def host() -> Host:
    """Reads what the kernel says of the machine."""
    # The simulated device names its own machine's memory here, as it does for the allocator: no cgroup limits that one.
    simulated = os.environ.get("TORCH_UVM_MEMINFO")
    text = _read(simulated or "/proc/meminfo") or ""
    membership = "" if simulated else _read("/proc/self/cgroup") or ""
    limit, usage = _cgroup(Path("/sys/fs/cgroup"), membership)
    release = platform.release()
    return Host(
        system=f"{platform.system()} {release}",
        architecture=platform.machine(),
        wsl="microsoft" in release.lower(),
        tegra="tegra" in release.lower() or Path("/etc/nv_tegra_release").exists(),
        memory_total=_kib(text, "MemTotal"),
        memory_available=_kib(text, "MemAvailable"),
        cgroup_limit=limit,
        cgroup_usage=usage,
        egm=egm(_read("/proc/iomem") or ""),
    )


def egm(iomem: str) -> int | None:
    """Bytes of `System RAM (NVIDIA)` in /proc/iomem; None where the addresses are hidden, as they are from users."""
    total = 0
    readable = False
    for line in iomem.splitlines():
        span = re.match(r"\s*([0-9a-f]+)-([0-9a-f]+) : (.*)", line)
        if not span:
            continue
        first, last = int(span[1], 16), int(span[2], 16)
        readable |= last > 0
        if span[3].startswith("System RAM (NVIDIA)"):
            total += last - first + 1
    return total if readable else None


def _cgroup(root: Path, membership: str) -> tuple[int | None, int | None]:
    """The tightest memory limit above this process, and the usage of the cgroup that has it."""
    found: list[tuple[int, int | None]] = []
    for line in membership.splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":  # version 2
            names, mounts = ["memory.max", "memory.high", "memory.current"], ["", "unified"]
        elif "memory" in controllers.split(","):
            names, mounts = ["memory.limit_in_bytes", "memory.usage_in_bytes"], ["memory"]
        else:
            continue
        for mount in mounts:
            folder = root / mount / path.lstrip("/")
            # A container sees its own cgroup at the root of the mount, whatever the path says.
            while folder != root.parent and root in (folder, *folder.parents):
                limits = [_number(_read(folder / name)) for name in names[:-1]]
                known = [limit for limit in limits if limit is not None and limit < 1 << 60]
                if known:
                    found.append((min(known), _number(_read(folder / names[-1]))))
                folder = folder.parent
    return min(found, key=lambda pair: pair[0]) if found else (None, None)


def _parameters(folder: Path) -> dict[str, str]:
    """The parameters of a kernel module that can be read."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return {}
    values = {name: _read(folder / name) for name in names}
    return {name: value.strip() for name, value in values.items() if value is not None}


def _kib(meminfo: str, name: str) -> int | None:
    line = re.search(rf"^{name}:\s+(\d+) kB", meminfo, re.MULTILINE)
    return int(line[1]) * 1024 if line else None


def _number(text: str | None) -> int | None:
    text = (text or "").strip()
    return int(text) if text.isdigit() else None


def _read(path: str | Path) -> str | None:
    """A file's text; None where it is not there or may not be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return None
