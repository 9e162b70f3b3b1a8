"""What stands in for the forward of a module whose weights stream."""

from __future__ import annotations

import copy
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any, Optional, cast

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from .fetch import Fetcher
from .internals import is_traced_or_transformed, saved_tensor_hooks_are_allowed
from .saved import Hooks
from .units import Unit

#: What functions have, and a stand-in says of the function that it stands in for.
_OF_FUNCTIONS = frozenset(
    {
        "__annotations__",
        "__closure__",
        "__code__",
        "__defaults__",
        "__func__",
        "__kwdefaults__",
        "__name__",
        "__qualname__",
        "__self__",
    }
)


class Forward:
    """Stands in for a module's forward.

    The module holds it, so it holds the module weakly: a model that is dropped, and its host memory, are gone at once.
    """

    def __init__(self, fetcher: Optional[Fetcher], module: nn.Module, units: list[Unit]) -> None:
        self._fetcher = fetcher
        self._module = weakref.ref(module)
        self._units = units
        self._own = module.__dict__.get("forward")
        module.__dict__["forward"] = self

    @property
    def streams(self) -> bool:
        """Whether `restore` has not been called."""
        return self._fetcher is not None

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The forward that it stands in for; `inspect.signature` and others look for it under this name."""
        if self._own is not None:
            return cast(Callable[..., Any], self._own)
        module, found = self._of_class()
        bind = getattr(type(found), "__get__", None)
        return cast(Callable[..., Any], found if bind is None else bind(found, module, type(module)))

    def _of_class(self) -> tuple[nn.Module, Any]:
        """The module, and what its class has under the name: a function, or whatever else."""
        module = self._module()
        if module is None:
            raise ReferenceError("torch_uvm.stream_weights(): the module of this forward does not exist any more")
        for kind in type(module).__mro__:
            if "forward" in kind.__dict__:
                return module, kind.__dict__["forward"]
        raise AttributeError(f"{type(module).__name__!r} object has no attribute 'forward'")

    def _run(self, *arguments: Any, **named: Any) -> Any:
        """Runs it. Written so that torch.export of some versions can look through it."""
        if self._own is None:
            module, found = self._of_class()
            if isinstance(found, types.FunctionType):
                return found(module, *arguments, **named)
        return self.__wrapped__(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        """What code that inspects a module wants to know of its forward, such as torch.export."""
        if name in _OF_FUNCTIONS:
            return getattr(self.__wrapped__, name)
        if name == "__globals__":  # torch.jit.script asks for it, and then for source code that it could not find
            raise AttributeError(
                "torch_uvm.stream_weights(): the weights of this module stream, and torch.jit.script cannot see "
                "through that: call remove() first"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        fetcher = self._fetcher
        if fetcher is None or _reads_in_place():
            return self._run(*arguments, **named)
        tell_dynamo()
        fetcher.begin_units(self._units)
        try:
            if not torch.is_grad_enabled():
                return self._run(*arguments, **named)
            hooks = Hooks(fetcher)
            with saved_tensors_hooks(hooks.pack, hooks.unpack):
                return self._run(*arguments, **named)
        finally:
            fetcher.end_units(self._units)

    def restore(self) -> None:
        """Puts the module's own back. Where somebody has wrapped this one meanwhile, it stays and does nothing."""
        self._fetcher = None
        module = self._module()
        if module is None or module.__dict__.get("forward") is not self:
            return
        if self._own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = self._own

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copies of the module have the module's own forward: their weights do not stream."""
        if self._own is not None:
            return copy.deepcopy(self._own, memo)
        module = memo.get(id(self._module()))
        return self if module is None else Forward(None, module, [])

    def __reduce__(self) -> Any:
        """So do pickles, which do not need this package."""
        return getattr, (self._module(), "forward")


class ModelForward(Forward):
    """Stands in for the forward of the whole model: a pass begins."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        fetcher = self._fetcher
        if fetcher is None or _reads_in_place():
            return self._run(*arguments, **named)
        tell_dynamo()
        fetcher.begin_model()
        try:
            return self._run(*arguments, **named)
        finally:
            fetcher.end_model()


def _reads_in_place() -> bool:
    """Whether weights cannot stream in this call: it reads them where they lie, in host memory.

    A transform of torch.func forbids that memory which it does not know is written, and has no saved-tensor hooks; what
    traces a model would record our copies.
    """
    return is_traced_or_transformed() or not saved_tensor_hooks_are_allowed()


_told_dynamo = False
for _function in (Forward.__call__, ModelForward.__call__):
    _function._torchdynamo_disable = True  # type: ignore[attr-defined]  # not inlined into a caller's graph
    _function._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
        "torch_uvm.stream_weights(): the weights of this module stream, which no graph can hold. Each unit's forward "
        "is compiled by itself; for one graph of the whole model call remove() first, or export with strict=False"
    )


def tell_dynamo() -> None:
    """Lets torch.compile leave our functions alone, while it compiles the forwards that they call.

    torch._dynamo takes seconds to import: only if it is there.
    """
    global _told_dynamo, _reads_in_place
    if _told_dynamo:
        return
    decorators = sys.modules.get("torch._dynamo.decorators")
    skip, disable = getattr(decorators, "skip", None), getattr(decorators, "disable", None)
    if skip is None or disable is None:
        return
    _told_dynamo = True
    # The forward that they call is compiled by itself, as if the module's own had been called.
    for function in (Forward.__call__, ModelForward.__call__, Forward._run):
        skip(function)
    ours: tuple[tuple[type, tuple[str, ...]], ...] = (
        (Fetcher, ("begin_units", "end_units", "begin_model", "end_model")),
        (Hooks, ("pack", "unpack")),
        (Forward, ("_of_class",)),
    )
    for holder, names in ours:
        for name in names:
            setattr(holder, name, disable(getattr(holder, name)))
    _reads_in_place = disable(_reads_in_place)
