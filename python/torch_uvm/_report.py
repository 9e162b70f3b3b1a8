"""What the allocator is doing in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Union

from . import _library
from ._library import Library
from ._tables import OPTIONS

if TYPE_CHECKING:
    import torch

    from ._records import MemoryInfo, PlaceStats

#: A device as PyTorch's functions take it; None is the current one.
Device = Union["torch.device", int, str, None]
Option = Union[bool, int, float, str, None]


def is_enabled() -> bool:
    """Whether the uvm allocator is PyTorch's CUDA allocator in this process. False where PyTorch is not installed.

    It is an answer about the choice: wrong settings are told by the first use of CUDA's memory, and by `config`.
    """
    library = _library.running()
    return library is not None and library.enabled()


def config() -> dict[str, Option]:
    """The options in force, by their names in PYTORCH_CUDA_ALLOC_CONF.

    The units are those of the names (`…_mb` are MiB). None stands for a number that follows from the device and the
    machine: `uvm_device_limit_mb` and `uvm_host_reserve_mb` where they were not set; `memory_info` has the bytes.

    Raises:
        RuntimeError: `use_uvm` is off.
        ValueError: the settings are wrong; names the key, the value and what is allowed.
    """
    return parse_options(enabled_library("config()").options())


def memory_info(device: Device = None) -> MemoryInfo:
    """The memory of a device (the current one, if None) as the allocator sees it, in bytes. Initialises CUDA.

    Raises:
        RuntimeError: `use_uvm` is off, or there is no such device.
        ValueError: `device` is not a CUDA device.
    """
    library = enabled_library("memory_info()")
    return library.memory_info(device_index(device))


def statistics(device: Device = None) -> PlaceStats:
    """What is populated where on a device (the current one, if None), and what moved so far. Initialises CUDA.

    Peaks and what accumulates start anew with `torch.cuda.reset_peak_memory_stats` and
    `torch.cuda.reset_accumulated_memory_stats`.

    Raises:
        RuntimeError: `use_uvm` is off, or there is no such device.
        ValueError: `device` is not a CUDA device.
    """
    library = enabled_library("statistics()")
    return library.place_stats(device_index(device))


def enabled_library(caller: str) -> Library:
    """The library where the allocator is PyTorch's, else RuntimeError in the name of what was called."""
    library = _library.running()
    if library is None or not library.enabled():
        raise RuntimeError(
            f"torch_uvm.{caller} needs the uvm allocator, and PyTorch's CUDA allocator is another one: set "
            "PYTORCH_CUDA_ALLOC_CONF=use_uvm:True before `import torch`. `python -m torch_uvm doctor` says more"
        )
    return library


def device_index(device: Device) -> int:
    """The number of a device; initialises CUDA, with PyTorch's errors if that fails.

    Raises:
        ValueError: `device` is not a CUDA device.
        RuntimeError: there is no such device.
    """
    import torch

    torch.cuda.init()  # type: ignore[no-untyped-call]
    if device is None:
        return torch.cuda.current_device()
    if isinstance(device, int):
        index: int | None = device
    else:
        named = torch.device(device)
        if named.type != "cuda":
            raise ValueError(f"device: '{device}' is not allowed: expected a CUDA device")
        index = torch.cuda.current_device() if named.index is None else named.index
    count = torch.cuda.device_count()
    if index is None or not 0 <= index < count:
        raise RuntimeError(f"device: {device!r} is not there: this process sees {count} CUDA device(s)")
    return index


def parse_options(settings: str) -> dict[str, Option]:
    """The typed values of a settings string that the library wrote."""
    given = dict(item.split(":", 1) for item in settings.split(",") if item)
    options: dict[str, Option] = {}
    for key in [*OPTIONS, *(key for key in given if key not in OPTIONS)]:
        value = given.get(key)
        kind = OPTIONS.get(key, str)
        options[key] = None if value is None else value == "True" if kind is bool else kind(value)
    return options
