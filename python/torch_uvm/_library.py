"""The C interface of the allocator (cpp/torch_uvm/c_api.h), through ctypes.

The same functions are in two places: in a patched PyTorch they are part of its libc10_cuda.so; for a stock PyTorch this
package carries one library for each minor version, which `_activate` loads.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from ._records import MemoryInfo, PlaceSample, PlaceStats, SegmentPlace

Record = TypeVar("Record")

#: The number of the C interface that this file speaks: TORCH_UVM_C_API of c_api.h.
C_API = 3
#: Where the plug-in's libraries lie: `libtorch_uvm_215.so` is for PyTorch 2.15.
LIBRARIES = Path(__file__).parent / "lib"


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of one of the library's tables."""

    name: str
    #: The type of its values here: `int`, `bool` or `str`.
    type: str
    #: What the numbers 0, 1, 2, … stand for, where the type is `str`.
    words: list[str]
    #: Where `torch.cuda.memory_stats()` has it, below `uvm.`; keys joined by dots. Empty: nowhere.
    path: str
    #: What it is, in words.
    meaning: str

    def value(self, number: int) -> Any:
        """What a number of this column stands for."""
        return self.words[number] if self.words else bool(number) if self.type == "bool" else number


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
        self._description = self._function("torch_uvm_description", ctypes.c_char_p)
        u64 = ctypes.c_uint64
        # A pointer to numbers is a plain pointer here: making ctypes' type for it takes a millisecond.
        self._rows = self._function(
            "torch_uvm_rows", ctypes.c_int64, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p, u64
        )
        self._columns: dict[str, list[Column]] = {}
        self._prefetch = self._function("torch_uvm_prefetch", ctypes.c_int, u64, u64, ctypes.c_int, u64)
        self._advise = self._function("torch_uvm_advise", ctypes.c_int, u64, u64, ctypes.c_char_p, ctypes.c_int)
        self._discard = self._function("torch_uvm_discard", ctypes.c_int, u64, u64, u64)
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

    def description(self) -> dict[str, Any]:
        """What there is, by name: the columns of each table, the options and the placements."""
        found: dict[str, Any] = json.loads(_text(self._description()))
        return found

    def columns(self, table: str) -> list[Column]:
        """The columns of a table, in the order of its numbers."""
        if not self._columns:
            tables = self.description()["tables"]
            self._columns = {name: [Column(**column) for column in columns] for name, columns in tables.items()}
        return self._columns[table]

    def rows(self, table: str, device: int) -> list[dict[str, Any]]:
        """The rows of a table of a device, by the names of its columns.

        RuntimeError where CUDA is not initialised or has no such device.
        """
        columns = self.columns(table)
        width = len(columns)
        numbers = self._numbers(table, device, width)
        return [
            {column.name: column.value(numbers[start + at]) for at, column in enumerate(columns)}
            for start in range(0, len(numbers), width)
        ]

    def _numbers(self, table: str, device: int, room: int) -> list[int]:
        """The numbers of a table, row by row. `room` is how many there are at least."""
        while True:
            found = (ctypes.c_uint64 * room)()
            count = self._done(self._rows(table.encode(), device, found, room))
            if count <= room:
                return found[:count]
            room = count + count // 8  # others may add some meanwhile

    def memory_info(self, device: int) -> MemoryInfo:
        """The memory of a device. RuntimeError as `rows`."""
        from ._records import MemoryInfo

        return self._record(MemoryInfo, self.rows("memory_info", device)[0])

    def place_stats(self, device: int) -> PlaceStats:
        """What is populated where on a device, and what moved. RuntimeError as `rows`."""
        from ._records import PlaceStats

        return self._record(PlaceStats, self.rows("statistics", device)[0])

    def segments(self, device: int) -> list[SegmentPlace]:
        """The segments of a device by address, and where their pages lie. RuntimeError as `rows`."""
        from ._records import SegmentPlace

        rows = self.rows("segments", device)
        return [self._record(SegmentPlace, {**row, "pool": (row["pool_first"], row["pool_second"])}) for row in rows]

    def place_samples(self, device: int) -> list[PlaceSample]:
        """How what is populated where has changed while the memory history was recorded, oldest first: the newest
        65,536 changes. RuntimeError as `rows`."""
        from ._records import PlaceSample

        return [self._record(PlaceSample, row) for row in self.rows("place_samples", device)]

    def _record(self, kind: type[Record], row: dict[str, Any]) -> Record:
        """A row as a record. A library that is newer than this package may say more, one that is older less."""
        fields = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
        missing = [name for name in fields if name not in row]
        if missing:
            raise RuntimeError(
                f"{self.name} does not say {', '.join(missing)}: install it and the Python package in "
                f"{Path(__file__).parent} from the same version of torch-uvm"
            )
        return kind(**{name: row[name] for name in fields})

    def prefetch(self, ptr: int, count: int, to: int, stream: int) -> None:
        """Moves `count` bytes of a live allocation to a device or, with -1, to the host, in the order of a stream."""
        self._done(self._prefetch(ptr, count, to, stream))

    def advise(self, ptr: int, count: int, advice: str, location: int) -> None:
        """Gives the driver advice about `count` bytes of a live allocation; -1 is the host."""
        self._done(self._advise(ptr, count, advice.encode(), location))

    def discard(self, ptr: int, count: int, stream: int) -> None:
        """Drops the contents of the whole pages in `count` bytes of a live allocation, in the order of a stream."""
        self._done(self._discard(ptr, count, stream))

    def _done(self, result: int) -> int:
        """RuntimeError where a call has failed."""
        if result < 0:
            raise RuntimeError(self.last_error())
        return result

    def set_pool_placement(self, device: int, pool: tuple[int, int], placement: str) -> None:
        """Where what the pool takes from CUDA from now on is placed. RuntimeError where it cannot be set."""
        self._done(self._set_pool_placement(device, pool[0], pool[1], placement.encode()))


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
        return self._done(self._activate()) > 0

    def check_settings(self, settings: str) -> str:
        """PyTorch's part of settings made at run time. ValueError where our part is wrong."""
        theirs = self._check_settings(settings.encode())
        if theirs is None:
            raise ValueError(self.last_error())
        return _text(theirs)

    def apply_settings(self, settings: str) -> None:
        """Applies settings that PyTorch has parsed its part of. RuntimeError where that fails."""
        self._done(self._apply_settings(settings.encode()))


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


def _text(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace")
