"""Puts the allocator in place in a stock PyTorch.

PyTorch calls `autoload` at the very end of `import torch` (entry point `torch_uvm` of the group `torch.backends`).
Every process that imports PyTorch comes through here, so nothing is imported before it is known that there is work.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # see __init__.py
if TYPE_CHECKING:
    from typing import Any, Callable

    from ._library import Library, Plugin

#: The variables that PyTorch reads allocator settings from.
VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
#: What PyTorch's versions call the function that takes settings at run time.
SETTERS = ("_cuda_cudaCachingAllocator_set_allocator_settings", "_accelerator_setAllocatorSettings")


def autoload() -> None:
    """The entry point: `activate`, and nothing at all where no variable has a key of ours.

    Raises:
        RuntimeError: as `activate`. `import torch` then fails, with this error as the cause.
    """
    if "TORCH_UVM_SIM_REPORT" in os.environ:  # a program under `python -m torch_uvm simulate`
        from . import _dry_run

        _dry_run.watch()
    for variable in VARIABLES:
        if has_our_keys(os.environ.get(variable, "")):
            activate()
            return


def has_our_keys(settings: str) -> bool:
    """Whether a settings string has an item that is ours to read: `use_uvm`, or one that begins with `uvm_`.

    This only decides whether the library is loaded, which then reads the string as PyTorch does.
    """
    return "uvm" in (settings := without_white_space(settings)) and any(map(is_our_key, keys_of(settings)))


def is_our_key(key: str) -> bool:
    """Whether it is a key of this allocator, known or not."""
    return key == "use_uvm" or key.startswith("uvm_")


def keys_of(settings: str) -> list[str]:
    """What stands before the colons of a settings string, or without one, between its commas."""
    return [item.partition(":")[0] for item in without_white_space(settings).split(",")]


def without_white_space(settings: str) -> str:
    """A settings string without what PyTorch's parser drops from it, wherever it stands."""
    return settings.translate(dict.fromkeys(map(ord, " \t\n\v\f\r")))


def activate() -> bool:
    """Puts the allocator in place, if PYTORCH_CUDA_ALLOC_CONF or PYTORCH_ALLOC_CONF has `use_uvm:True`.

    PyTorch does this by itself at the end of `import torch`. A program calls it where that is switched off
    (TORCH_DEVICE_BACKEND_AUTOLOAD=0), before its first use of CUDA. Calling it again changes nothing.

    What is wrong with the settings is said by the allocator when it is first used, each time.

    Returns:
        Whether PyTorch's CUDA allocator is ours now. False where the variables have no key of ours or `use_uvm:False`,
        and where PyTorch was built without CUDA. A patched PyTorch has chosen its allocator itself, and this only
        answers which.

    Raises:
        RuntimeError: there is no library for this version of PyTorch, it does not load, or PyTorch has already
            initialised CUDA with its own allocator.
    """
    import torch

    if torch.version.cuda is None:
        return False
    from . import _library

    library = _library.running()
    if library is not None:
        if library.enabled():
            _name_in_torch(library)
        return library.enabled()
    if not any(has_our_keys(os.environ.get(variable, "")) for variable in VARIABLES):
        return False
    plugin = _library.load_plugin(torch.__version__)
    if plugin.activate():
        for name in SETTERS:
            _take_over(torch._C, name, plugin)
        _library.keep_plugin(plugin)
    if plugin.enabled():
        _name_in_torch(plugin)
    return plugin.enabled()


def _name_in_torch(library: Library) -> None:
    """Puts the names that programs look for where they look: hints into `torch.cuda`, figures into its statistics."""
    import torch

    theirs = getattr(torch._C, "_cuda_memoryStats", None)
    if theirs is None or hasattr(torch.cuda, "prefetch_to_device"):
        return

    def memory_advise(tensor: Any, advice: str, device: Any = None) -> None:
        from . import _hints

        _hints.memory_advise(tensor, advice, device)  # type: ignore[arg-type]

    def prefetch_to_device(tensor: Any, device: Any = None) -> None:
        from . import _hints

        _hints.prefetch_to_device(tensor, device)

    for function, meant in ((memory_advise, "advise"), (prefetch_to_device, "prefetch")):
        function.__doc__ = f"See `torch_uvm.{meant}`."
        setattr(torch.cuda, function.__name__, function)

    def memory_stats(device: int) -> dict[str, Any]:
        found: dict[str, Any] = theirs(device)
        add_figures(found, library, device)
        return found

    memory_stats.__wrapped__ = theirs  # type: ignore[attr-defined]
    torch._C._cuda_memoryStats = memory_stats


def add_figures(stats: dict[str, Any], library: Library, device: int) -> None:
    """Adds our figures to `torch.cuda.memory_stats_as_nested_dict()`: under `uvm`, and those that programs look for
    under names of their own."""
    (row,) = library.rows("statistics", device)
    for column in library.columns("statistics"):
        *path, last = ["uvm", *column.path.split(".")]
        at = stats
        for key in path:
            at = at.setdefault(key, {})
        at[last] = row[column.name]
    for name in ("stage", "light_reclamations", "hard_reclamations"):
        stats[f"uvm_{name}"] = row[name]


def _take_over(module: Any, name: str, plugin: Plugin) -> None:
    """Lets settings made at run time through `module.name` reach our allocator too, where PyTorch has this function.

    PyTorch's Python code looks the function up in its module at each call, so that replacing it there is enough.
    """
    parse: Callable[[str], None] | None = getattr(module, name, None)
    if parse is None:
        return

    def set_settings(env: str) -> None:
        if not isinstance(env, str):
            parse(env)  # PyTorch says what is wrong with it
            return
        theirs = plugin.check_settings(env)
        parse(theirs)
        plugin.apply_settings(env)

    set_settings.__name__ = name
    set_settings.__qualname__ = name
    set_settings.__doc__ = parse.__doc__
    set_settings.__module__ = getattr(parse, "__module__", None) or module.__name__
    set_settings.__wrapped__ = parse  # type: ignore[attr-defined]
    setattr(module, name, set_settings)
