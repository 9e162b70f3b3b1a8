"""The C interface of the allocator (cpp/torch_uvm/c_api.h), through ctypes.

The same functions are in two places: in a patched PyTorch they are part of its libc10_cuda.so; for a stock PyTorch this
package carries one library for each minor version, which `_activate` loads.
"""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

#: The number of the C interface that this file mirrors: TORCH_UVM_C_API of c_api.h.
C_API = 1
#: Where the plug-in's libraries lie: `libtorch_uvm_215.so` is for PyTorch 2.15.
LIBRARIES = Path(__file__).parent / "lib"


@dataclass(frozen=True)
class MemoryInfo:
    """One device's memory as the allocator sees it at this moment. All numbers are bytes."""

    capacity: int
    """Hard cap on what this process may populate, on the device and beside it."""
    free: int
    """`capacity` less what is populated and what others hold: what `torch.accelerator.get_memory_info` answers."""
    populated_device: int
    """Populated by this process and meant to live on the GPU."""
    populated_host: int
    """Populated by this process in host memory."""
    populated_unplaced: int
    """Populated by this process, wherever the driver moves it (`balanced`)."""
    allocated: int
    """In live allocations."""
    reserved: int
    """Populated in all, cached memory included."""
    device_limit: int
    """Soft limit on `populated_device`."""
    device_total: int
    """The device's memory, as CUDA says."""
    device_free: int
    """Of it free for everyone, as CUDA says. It rises only when managed memory is freed, not when it moves out."""
    host_total: int
    """The machine's memory, or its cgroup's limit where that is less."""
    host_available: int
    """Of it available now."""
    host_reserve: int
    """Of it left to everyone else."""

    def __str__(self) -> str:
        unplaced = f", {size(self.populated_unplaced)} where the driver keeps it" if self.populated_unplaced else ""
        return (
            f"capacity {size(self.capacity)}, free {size(self.free)}\n"
            f"reserved {size(self.reserved)}, of it allocated {size(self.allocated)}; "
            f"{size(self.populated_device)} on the device, {size(self.populated_host)} in host memory{unplaced}\n"
            f"device: {size(self.device_free)} free of {size(self.device_total)}, limit {size(self.device_limit)}\n"
            f"host: {size(self.host_available)} available of {size(self.host_total)}, reserve "
            f"{size(self.host_reserve)}"
        )


class _MemoryInfoStruct(ctypes.Structure):
    """`torch_uvm_memory_info_t`: the fields of MemoryInfo in their order."""

    _fields_ = [(field.name, ctypes.c_uint64) for field in fields(MemoryInfo)]


class Library:
    """A loaded library that has the C interface."""

    def __init__(self, handle: ctypes.CDLL, name: str) -> None:
        """`handle` must export `torch_uvm_c_api`; `name` is what errors call it.

        Raises:
            RuntimeError: the library speaks another number of the interface.
        """
        self._handle = handle
        self.name = name
        found = self._function("torch_uvm_c_api", ctypes.c_int)()
        if found != C_API:
            raise RuntimeError(
                f"{name} speaks version {found} of torch-uvm's C interface, the Python package in "
                f"{Path(__file__).parent} version {C_API}: install the two from the same version of torch-uvm"
            )
        self._last_error = self._function("torch_uvm_last_error", ctypes.c_char_p)
        self._torch_version = self._function("torch_uvm_torch_version", ctypes.c_int)
        self._enabled = self._function("torch_uvm_enabled", ctypes.c_int)
        self._initialized = self._function("torch_uvm_initialized", ctypes.c_int)
        self._options = self._function("torch_uvm_options", ctypes.c_char_p)
        self._memory_info = self._function(
            "torch_uvm_memory_info", ctypes.c_int, ctypes.c_int, ctypes.POINTER(_MemoryInfoStruct)
        )
        self._set_pool_placement = self._function(
            "torch_uvm_set_pool_placement",
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_uint64,
            ctypes.c_uint64,
            ctypes.c_char_p,
        )

    def _function(self, name: str, result: Any, *arguments: Any) -> Any:
        try:
            function = getattr(self._handle, name)
        except AttributeError:
            raise RuntimeError(f"{self.name} has no function {name}, which its C interface promises") from None
        function.restype = result
        function.argtypes = arguments
        return function

    def last_error(self) -> str:
        """Why this thread's last call failed."""
        return _text(self._last_error()) or "no reason given"

    def torch_version(self) -> int:
        """The PyTorch version it was compiled for: major * 100 + minor."""
        return int(self._torch_version())

    def enabled(self) -> bool:
        """Whether the uvm allocator is PyTorch's CUDA allocator."""
        return bool(self._enabled())

    def initialized(self) -> bool:
        """Whether it has been initialised with PyTorch's CUDA state."""
        return bool(self._initialized())

    def options(self) -> str:
        """The options in force as a settings string. ValueError where the environment's are wrong."""
        options = self._options()
        if options is None:
            raise ValueError(self.last_error())
        return _text(options)

    def memory_info(self, device: int) -> MemoryInfo:
        """The memory of a device. RuntimeError where CUDA is not initialised or has no such device."""
        info = _MemoryInfoStruct()
        if self._memory_info(device, ctypes.byref(info)) < 0:
            raise RuntimeError(self.last_error())
        return MemoryInfo(**{field.name: getattr(info, field.name) for field in fields(MemoryInfo)})

    def set_pool_placement(self, device: int, pool: tuple[int, int], placement: str) -> None:
        """Where what the pool takes from CUDA from now on is placed. RuntimeError where it cannot be set."""
        if self._set_pool_placement(device, pool[0], pool[1], placement.encode()) < 0:
            raise RuntimeError(self.last_error())


class Plugin(Library):
    """The library of this package, for a stock PyTorch."""

    def __init__(self, handle: ctypes.CDLL, name: str) -> None:
        super().__init__(handle, name)
        self._activate = self._function("torch_uvm_activate", ctypes.c_int)
        self._check_settings = self._function("torch_uvm_check_settings", ctypes.c_char_p, ctypes.c_char_p)
        self._apply_settings = self._function("torch_uvm_apply_settings", ctypes.c_int, ctypes.c_char_p)

    def activate(self) -> bool:
        """Puts the allocator in place as the environment asks, and takes our keys out of PyTorch's sight.

        False where there are none. RuntimeError where CUDA was initialised before.
        """
        done = self._activate()
        if done < 0:
            raise RuntimeError(self.last_error())
        return bool(done > 0)

    def check_settings(self, settings: str) -> str:
        """PyTorch's part of settings made at run time. ValueError where our part is wrong."""
        theirs = self._check_settings(settings.encode())
        if theirs is None:
            raise ValueError(self.last_error())
        return _text(theirs)

    def apply_settings(self, settings: str) -> None:
        """Applies settings that PyTorch has parsed its part of. RuntimeError where that fails."""
        if self._apply_settings(settings.encode()) < 0:
            raise RuntimeError(self.last_error())


_plugin: Plugin | None = None


def running() -> Library | None:
    """The library behind this process's PyTorch: a patched PyTorch's own, else the plug-in's once it is activated.

    None in a stock PyTorch that the plug-in has left alone, and where there is no PyTorch or none with CUDA.
    """
    try:
        import torch  # noqa: F401  (it loads libc10_cuda.so)
    except ImportError:
        return None
    return _patched() or _plugin


def _patched() -> Library | None:
    """The libc10_cuda.so of a patched PyTorch; None in a stock one."""
    name = "libc10_cuda.so"
    try:
        # By the name under which PyTorch has loaded it, wherever it lies.
        handle = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return None
    return Library(handle, name) if hasattr(handle, "torch_uvm_c_api") else None


def supported() -> dict[int, Path]:
    """The plug-in's libraries by the PyTorch version they are for (major * 100 + minor), oldest first."""
    found = {}
    for path in LIBRARIES.glob("libtorch_uvm_*.so"):
        number = re.fullmatch(r"libtorch_uvm_(\d+)\.so", path.name)
        if number:
            found[int(number[1])] = path
    return dict(sorted(found.items()))


def version_name(number: int) -> str:
    """215 is `2.15`."""
    return f"{number // 100}.{number % 100}"


def unsupported(torch_version: str) -> str | None:
    """Why there is no library for a PyTorch of this version; None if there is one."""
    libraries = supported()
    if not libraries:
        return (
            f"use_uvm: this copy of torch-uvm ({Path(__file__).parent}) has no library for a stock PyTorch. Install "
            "torch-uvm's wheel, or a patched PyTorch"
        )
    names = ", ".join(map(version_name, libraries))
    number, is_release = parse_version(torch_version)
    if number not in libraries:
        return (
            f"use_uvm: PyTorch {torch_version} is not supported by this torch-uvm, which supports {names}. "
            "Upgrade torch-uvm, install a supported PyTorch, or take use_uvm out of PYTORCH_CUDA_ALLOC_CONF "
            "(and PYTORCH_ALLOC_CONF)"
        )
    if not is_release:
        return (
            f"use_uvm: PyTorch {torch_version} is a pre-release, and its allocator interface may not be that of "
            f"{version_name(number)}. This torch-uvm supports the releases of PyTorch {names}. Install one of them, "
            "build torch-uvm into this PyTorch, or take use_uvm out of PYTORCH_CUDA_ALLOC_CONF (and "
            "PYTORCH_ALLOC_CONF)"
        )
    return None


def parse_version(torch_version: str) -> tuple[int, bool]:
    """`2.15.1+cu132` is (215, True); `2.16.0a0+git1234` is (216, False): not a release. (0, False) if it is neither."""
    parts = re.match(r"(\d+)\.(\d+)((?:\.\d+)*)(.*)", torch_version)
    if not parts:
        return 0, False
    return int(parts[1]) * 100 + int(parts[2]), parts[4] == "" or parts[4].startswith("+")


def load_plugin(torch_version: str) -> Plugin:
    """Loads the library for this PyTorch. It does nothing yet.

    Raises:
        RuntimeError: there is none, or it does not fit.
    """
    reason = unsupported(torch_version)
    if reason:
        raise RuntimeError(reason)
    number, _ = parse_version(torch_version)
    path = supported()[number]
    try:
        handle = ctypes.CDLL(str(path), mode=os.RTLD_LOCAL | os.RTLD_NOW)
    except OSError as error:
        raise RuntimeError(
            f"use_uvm: {path.name} cannot be loaded into PyTorch {torch_version}: {error}. It is made for the PyTorch "
            f"{version_name(number)} of PyPI; a build of another origin needs torch-uvm built into it"
        ) from error
    plugin = Plugin(handle, path.name)
    if plugin.torch_version() != number:
        raise RuntimeError(
            f"{path} was compiled for PyTorch {version_name(plugin.torch_version())}: install torch-uvm again"
        )
    return plugin


def keep_plugin(plugin: Plugin) -> None:
    """From now on this is what `running` finds."""
    global _plugin
    _plugin = plugin


def size(count: int) -> str:
    """A number of bytes for people."""
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024:
            break
    return f"{value:.2f} {unit}" if value < 100 else f"{value:.0f} {unit}"


def _text(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace")
