"""Weights that lie in host memory and are copied to the device ahead of their use."""

from __future__ import annotations

import copy
import math
import sys
import threading
import traceback
import types
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Optional, Union, get_args

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ._format import format_bytes as in_words
from ._order import BACKWARD, FORWARD, START, Order
from ._owners import Owners
from ._plan import MIB, SMALLEST, Choice, Group, Groups, aligned, bytes_needed, choose, group
from ._pinned import Pinned
from ._pools import empty_cache, placement
from ._report import device_index, enabled_library, memory_info
from ._sharing import Extent, bytes_of, extents_of, strides
from ._slots import Slot, Slots

#: Where gradients of weights that stream are kept.
Gradients = Literal["device", "host"]
#: The share of the device memory that is left under the limit which `device_bytes=None` leaves to activations, gradients
#: and everything else.
RESERVE = 0.25
_GIB = 1 << 30


@dataclass(frozen=True)
class StreamStatistics:
    """What a stream has done since it was made."""

    units: int
    """Groups of weights that could stream."""
    streamed_units: int
    """Of them those that do."""
    streamed_bytes: int
    """Bytes of weights that stream: in host memory."""
    resident_bytes: int
    """Bytes of weights that stay on the device."""
    remote_bytes: int
    """Bytes of weights that neither stream nor stay: in host memory, read where they lie."""
    slots: int
    """Slots in device memory now."""
    slot_bytes: int
    """Bytes of each."""
    fetches: int
    """Copies of a unit into a slot."""
    bytes_copied: int
    """Bytes of these copies."""
    hits: int
    """Uses of a unit that was in a slot, or on its way."""
    misses: int
    """Uses of a unit whose copy was only begun then."""
    stale: int
    """Copies that were dropped unused because the weights had changed since, or another pass had begun."""
    written_back: int
    """Weights that a forward changed in place, and that were copied back."""
    replaced_slots: int
    """Slots that were made anew because somebody held a view into the old one."""


class _Weight:
    """A parameter that streams, or a buffer that shares memory with one."""

    __slots__ = ("bound", "host", "offset", "parameter", "pointer", "version")

    def __init__(self, parameter: torch.Tensor, host: torch.Tensor, offset: int) -> None:
        self.parameter = parameter
        #: Its place in host memory.
        self.host = host
        self.pointer = host.data_ptr()
        #: In elements, in a slot.
        self.offset = offset
        #: Whether `parameter.data` is in a slot, and the address and version that it then had.
        self.bound = 0
        self.version = 0

    def let_go(self) -> None:
        """The host memory is not needed any more; what it looked like is."""
        self.host = torch.empty_like(self.host, device="meta")
        self.pointer = -1

    def holds(self, byte: int) -> bool:
        """Whether a byte of a slot is one of its own, or in its gaps."""
        begin = self.offset * self.host.element_size()
        last = sum((size - 1) * stride for size, stride in zip(self.host.shape, self.host.stride()))
        return begin <= byte < begin + (last + 1) * self.host.element_size()

    def in_slot(self, slot: Slot) -> torch.Tensor:
        """Its view in a slot."""
        return slot.view(self.host.dtype, self.host.shape, self.host.stride(), self.offset)


class _Unit:
    """Weights that are fetched together."""

    def __init__(self, number: int, name: str, host: torch.Tensor, weights: list[_Weight]) -> None:
        self.number = number
        self.name = name
        #: All weights as bytes, laid out as in a slot: a CPU tensor over the memory that the weights are CUDA tensors in.
        self.host = host
        self.bytes = host.numel()
        self.weights = weights
        #: The slot that holds it.
        self.slot: Optional[Slot] = None
        #: How many forwards are using it now.
        self.active = 0
        #: The weights' versions at the last fetch.
        self.versions: list[int] = []

    def now(self) -> list[int]:
        """The weights' versions."""
        return [weight.parameter._version for weight in self.weights]


class _Saved:
    """What autograd keeps instead of a view of a slot: which weight, and how it was seen."""

    __slots__ = ("dtype", "offset", "shape", "stride", "unit", "version", "weight")

    def __init__(self, unit: _Unit, weight: _Weight, version: int, tensor: torch.Tensor) -> None:
        self.unit = unit
        self.weight = weight
        self.version = version
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self.stride = tensor.stride()
        #: From the weight's first byte, in elements of the tensor's type.
        self.offset = tensor.storage_offset() - weight.offset * weight.host.element_size() // tensor.element_size()


class _SavedCast:
    """The same for a tensor of another type that was made of a weight, as autocast does: it is made again."""

    __slots__ = ("base", "offset", "saved", "shape", "stride")

    def __init__(self, saved: _Saved, base: torch.Tensor, tensor: torch.Tensor) -> None:
        #: The weight itself, and what was made of it.
        self.saved = saved
        self.base = base.dtype
        self.shape = tensor.shape
        self.stride = tensor.stride()
        self.offset = tensor.storage_offset()

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """The tensor, from the weight."""
        return torch.as_strided(weight.to(self.base), self.shape, self.stride, self.offset)


class _Kept:
    """Any other tensor that autograd saves, and its version: hooks switch PyTorch's own check off."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        # Without the graph: a tensor saved by the function that made it would keep itself alive.
        self.tensor = tensor.detach()
        self.version = tensor._version


class _SavedAround(torch.autograd.Function):
    """Saves a tensor as the hooks around ours want it: for versions of PyTorch that do not say which these are."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tensor)
        return anchor.view_as(anchor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None]:
        return None, None


class _AroundUnknown:
    """The hooks around ours, asked by taking ours away for a moment."""

    def __init__(self, hooks: _Hooks) -> None:
        self._hooks = weakref.ref(hooks)
        self._anchor = torch.empty(0, requires_grad=True)

    def pack(self, tensor: torch.Tensor) -> Any:
        """A node that keeps it; PyTorch checks its version where there are no hooks."""
        torch._C._autograd._pop_saved_tensors_default_hooks()
        try:
            with torch.enable_grad():
                return _SavedAround.apply(self._anchor, tensor.detach())  # type: ignore[no-untyped-call]
        finally:
            hooks = self._hooks()
            assert hooks is not None  # it has called this
            torch._C._autograd._push_saved_tensors_default_hooks(hooks.pack, hooks.unpack)

    @staticmethod
    def unpack(saved: torch.Tensor) -> Any:
        """The tensor again."""
        assert saved.grad_fn is not None
        return saved.grad_fn.saved_tensors[0]  # type: ignore[attr-defined]


class _Hooks:
    """The saved-tensor hooks of one forward. Only the innermost hooks are asked, so they ask those around them."""

    __slots__ = ("__weakref__", "_outer", "_stream")

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        around = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
        if around is not None:
            self._outer = around(True)
        else:  # PyTorch 2.6
            unknown = _AroundUnknown(self)
            self._outer = unknown.pack, unknown.unpack

    def pack(self, tensor: torch.Tensor) -> Any:
        """Keeps no view of a slot."""
        saved = self._stream._save(tensor)
        if saved is not None:
            return saved
        if self._outer is not None:
            return (self._outer[0](tensor),)
        return _Kept(tensor)

    def unpack(self, saved: Any) -> Any:
        """The tensor again."""
        if type(saved) is _Kept:
            if saved.tensor._version != saved.version:
                raise RuntimeError(_modified(saved.tensor, saved.version, saved.tensor._version))
            return saved.tensor
        if type(saved) is _Saved:
            return self._stream._load(saved)
        if type(saved) is _SavedCast:
            return saved.of(self._stream._load(saved.saved))
        assert self._outer is not None
        return self._outer[1](saved[0])


def _modified(tensor: torch.Tensor, saved: int, now: int) -> str:
    """As PyTorch says it."""
    return (
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{tensor.type()} {list(tensor.shape)}] is at version {now}; expected version {saved} instead"
    )


class _Forward:
    """Stands in for a module's forward.

    The module holds it, so it holds the module weakly: a model that is dropped, and its host memory, are gone at once.
    """

    def __init__(self, stream: Optional[Stream], module: nn.Module, units: list[_Unit]) -> None:
        self._stream = stream
        self._module = weakref.ref(module)
        self._units = units
        self._own = module.__dict__.get("forward")
        module.__dict__["forward"] = self

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The forward that it stands in for; `inspect.signature` and others look for it under this name."""
        if self._own is not None:
            return self._own  # type: ignore[no-any-return]
        module, found = self._of_class()
        bind = getattr(type(found), "__get__", None)
        return found if bind is None else bind(found, module, type(module))  # type: ignore[no-any-return]

    def _of_class(self) -> tuple[nn.Module, Any]:
        """The module, and what its class has under the name: a function, or whatever else."""
        module = self._module()
        if module is None:
            raise ReferenceError("torch_uvm.stream(): a forward was called whose module does not exist any more")
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
        """What code that inspects a module wants to know of its forward (torch.jit.script, torch.export)."""
        if name in _OF_FUNCTIONS:
            return getattr(self.__wrapped__, name)
        if name == "__globals__":  # torch.jit.script asks for it, and then for source code that it could not find
            raise AttributeError(
                "torch_uvm.stream(): the weights of this module stream, and torch.jit.script cannot see through that: "
                "call remove() first"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        stream = self._stream
        if stream is None or _reads_in_place():
            return self._run(*arguments, **named)
        _tell_dynamo()
        stream._enter(self._units)
        try:
            if not torch.is_grad_enabled():
                return self._run(*arguments, **named)
            hooks = _Hooks(stream)
            with saved_tensors_hooks(hooks.pack, hooks.unpack):
                return self._run(*arguments, **named)
        finally:
            stream._leave(self._units)

    def restore(self) -> None:
        """Puts the module's own back. Where somebody has wrapped this one meanwhile, it stays and does nothing."""
        self._stream = None
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
        return self if module is None else _Forward(None, module, [])

    def __reduce__(self) -> Any:
        """So do pickles, which do not need this package."""
        return getattr, (self._module(), "forward")


#: What functions have, and `_Forward` says of the function that it stands in for.
_OF_FUNCTIONS = frozenset(
    "__annotations__ __closure__ __code__ __defaults__ __func__ __kwdefaults__ __name__ __qualname__ __self__".split()
)


def _reads_in_place() -> bool:
    """Whether this call is one that weights cannot stream in: it reads them where they lie, in host memory.

    A transform of torch.func forbids that memory which it does not know is written, and has no saved-tensor hooks; what traces
    a model (torch.export, torch.jit.trace, make_fx) would record our copies.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._get_tracing_state() is not None:
        return True
    for key in _TRACING:  # no generator: torch.export of some versions looks through this
        if torch._C._get_dispatch_mode(key) is not None:  # type: ignore[attr-defined]
            return True
    return not torch._C._autograd._saved_tensors_hooks_is_enabled()


_TRACING = tuple(torch._C._TorchDispatchModeKey.__members__.values())  # type: ignore[attr-defined]


class _Pass(_Forward):
    """Stands in for the forward of the whole model: a pass begins."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        stream = self._stream
        if stream is None or _reads_in_place():
            return self._run(*arguments, **named)
        _tell_dynamo()
        stream._begin()
        try:
            return self._run(*arguments, **named)
        finally:
            stream._end()


_told_dynamo = False
for _function in (_Forward.__call__, _Pass.__call__):
    _function._torchdynamo_disable = True  # type: ignore[attr-defined]  # not inlined into a caller's graph
    _function._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
        "torch_uvm.stream(): the weights of this module stream, which no graph can hold. Each unit's forward is compiled by "
        "itself; for one graph of the whole model call remove() first, or export with strict=False"
    )


def _tell_dynamo() -> None:
    """Lets torch.compile leave our functions alone, while it compiles the forwards that they call.

    torch._dynamo takes seconds to import: only if it is there.
    """
    global _told_dynamo
    if _told_dynamo:
        return
    decorators = sys.modules.get("torch._dynamo.decorators")
    skip, disable = getattr(decorators, "skip", None), getattr(decorators, "disable", None)
    if skip is None or disable is None:
        return
    _told_dynamo = True
    for function in (_Forward.__call__, _Pass.__call__):
        skip(function)
    for holder, names in ((Stream, ("_enter", "_leave", "_begin", "_end")), (_Hooks, ("pack", "unpack"))):
        for name in names:
            setattr(holder, name, disable(getattr(holder, name)))


class Stream:
    """A model whose weights stream: what `stream` returns. A context manager that ends with `remove`."""

    def __init__(
        self, model: nn.Module, ahead: int, device_bytes: Optional[int], gradients: Gradients, across_passes: bool
    ) -> None:
        self._ahead = ahead
        self._across = across_passes
        self._lock = threading.RLock()
        self._index = _device_of(model)
        self._device = torch.device("cuda", self._index)
        #: The modules hold them, and they hold this.
        self._forwards: list[weakref.ref[_Forward]] = []
        self._units: list[_Unit] = []
        #: What lies in host memory, extent by extent.
        self._hosted: list[tuple[Extent, list[_Weight]]] = []
        self._slots: Optional[Slots] = None
        self._order = Order(0)
        self._grads: Optional[_HostGradients] = None
        self._removed = False
        # Of the pass that runs.
        self._depth = 0
        self._seen: set[int] = set()
        self._trained = False
        self._clock = 0
        # Statistics.
        self._resident_bytes = self._remote_bytes = self._candidates = 0
        self._fetches = self._bytes = self._hits = self._misses = self._stale = self._written = 0
        extents = _movable(extents_of(model))
        origins = [(extent, extent.tensors[0].device) for extent in extents if extent.weights()]
        buffers = [(module, dict(module._buffers)) for module in model.modules()]
        try:
            self._attach(model, extents, device_bytes, gradients)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold memory that is about to be given back
            for module, own in buffers:
                module._buffers.update(own)
            self._detach(origins, whole=False)
            raise

    # Attaching

    def _attach(
        self, model: nn.Module, extents: list[Extent], device_bytes: Optional[int], gradients: Gradients
    ) -> None:
        wanted = memory_info(self._index).device_limit if device_bytes is None else device_bytes
        groups = self._group(model, extents, wanted)
        self._move_buffers(model, extents)
        self._resident_bytes += sum(extent.nbytes for extent in extents if extent.held_outside)
        choice = None if device_bytes is None else self._choose(model, extents, groups, device_bytes)
        # One after the other, so that never more than one unit is on the device beside what stays there. Where it is not
        # known yet what may stay, everything goes to the host first: only then do the books say what others hold.
        hosts: dict[int, tuple[torch.Tensor, list[_Weight]]] = {}
        for index, found in enumerate(groups.units):
            if choice is None or index not in choice.resident:
                hosts[index] = self._to_host(found)
        for index, other in enumerate(groups.others):
            if choice is None or index not in choice.others:
                self._to_host(other)
        empty_cache()
        if choice is None:
            choice = self._choose(model, extents, groups, None)
        if choice.slots:
            self._slots = Slots(choice.slots, choice.slot_bytes, self._index)
        for small in groups.small:
            self._to_device(small, move=False)
        for index, other in enumerate(groups.others):
            if index in choice.others:
                self._to_device(other)
            else:
                self._remote_bytes += other.bytes
        by_module: dict[nn.Module, list[_Unit]] = {}
        for index, found in enumerate(groups.units):
            if index in choice.resident:
                hosts.pop(index, None)
                self._to_device(found)
                continue
            unit = _Unit(len(self._units), found.name, *hosts.pop(index))
            self._units.append(unit)
            for module in found.modules:
                by_module.setdefault(module, []).append(unit)
        empty_cache()
        self._candidates = len(groups.units)
        self._order = Order(len(self._units))
        if gradients == "host":
            self._grads = _HostGradients(
                [p for unit in self._units for p in (weight.parameter for weight in unit.weights) if p.is_leaf]
            )
        if self._units:
            if model not in by_module:
                self._forwards.append(weakref.ref(_Pass(self, model, [])))
            self._forwards += [weakref.ref(_Forward(self, module, units)) for module, units in by_module.items()]

    def _choose(
        self, model: nn.Module, extents: list[Extent], groups: Groups, device_bytes: Optional[int]
    ) -> Choice:
        given = device_bytes is not None
        if device_bytes is None:
            info = memory_info(self._index)
            device_bytes = int(max(0, info.device_limit - info.populated_device) * (1 - RESERVE))
        choice = choose(groups, device_bytes, self._ahead)
        if choice is not None:
            return choice
        smallest = min((unit.bytes for unit in groups.units), default=0)
        small = sum(small.bytes for small in groups.small)
        text = (
            f"{in_words(device_bytes)} of device memory is too little for this model's weights to stream {self._ahead} "
            f"ahead: {self._ahead + 1} slots, of at least {in_words(smallest)} each, and {in_words(small)} of small "
            "weights must fit, beside the units that are larger than a slot"
        )
        if given:
            needed = self._enough(model, extents, lambda least: least, lambda least: least)
            raise ValueError(f"device_bytes: {text}. {needed} MiB would do")
        info = memory_info(self._index)
        needed = self._enough(
            model,
            extents,
            lambda limit: max(0, limit - info.populated_device) * (1 - RESERVE),
            lambda least: info.populated_device + least / (1 - RESERVE),
        )
        raise RuntimeError(
            f"torch_uvm.stream(): {text}. Set uvm_device_limit_mb to {needed} or more, or device_bytes, which leaves less to "
            "everything else"
        )

    def _enough(
        self,
        model: nn.Module,
        extents: list[Extent],
        for_weights: Callable[[int], float],
        limit_for: Callable[[int], float],
    ) -> int:
        """The MiB of device memory that would do. `for_weights` says what is left of a limit, and `limit_for` the inverse.

        With more memory units may be larger, and need more: it is tried until it holds.
        """
        limit = 0
        while True:
            groups = self._group(model, extents, limit)
            if choose(groups, int(for_weights(limit)), self._ahead) is not None:
                return limit // MIB
            limit = max(limit + MIB, -(-math.ceil(limit_for(bytes_needed(groups, self._ahead))) // MIB) * MIB)

    def _group(self, model: nn.Module, extents: list[Extent], device_bytes: int) -> Groups:
        return group(model, max(1, device_bytes // (2 * (self._ahead + 1))), extents)

    def _move_buffers(self, model: nn.Module, extents: list[Extent]) -> None:
        """Moves buffers to the device; those that share memory with weights are moved with these."""
        moved: dict[torch.Tensor, torch.Tensor] = {}
        with torch.no_grad():
            for extent in extents:
                if not extent.weights() and not extent.tensors[0].is_cuda:
                    moved.update(zip(extent.tensors, extent.on(self._device)))
        with_weights = {tensor for extent in extents if extent.weights() for tensor in extent.tensors}
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_cuda and buffer not in with_weights:
                    if buffer not in moved:
                        moved[buffer] = buffer.to(self._device)
                    module._buffers[name] = moved[buffer]

    def _to_host(self, found: Group) -> tuple[torch.Tensor, list[_Weight]]:
        """Moves a group's weights into one piece of pinned memory; answers it as a CPU tensor, to copy from."""
        with torch.inference_mode(False), torch.no_grad():
            host = Pinned(found.bytes, self._index)
            weights: list[_Weight] = []
            start = 0
            for extent in found.extents:
                cuda = host.cuda(start, extent.nbytes)
                if extent.tensors[0].is_cuda:
                    extent.copy_to(cuda)
                else:
                    extent.copy_to(host.cpu, start)
                views = extent.views(cuda)
                of_extent = [
                    _Weight(tensor, view, (start + offset) // tensor.element_size())
                    for tensor, view, offset in zip(extent.tensors, views, extent.offsets)
                ]
                self._hosted.append((extent, of_extent))
                weights += of_extent
                _repoint(extent, views)
                start += aligned(extent.nbytes)
        return host.cpu, weights

    def _to_device(self, found: Group, move: bool = True) -> None:
        """Moves a group's weights into plain device memory; without `move` those that are not on the device."""
        with torch.inference_mode(False), torch.no_grad(), placement("device", self._index):
            for extent in found.extents:
                if move or not extent.tensors[0].is_cuda:
                    _repoint(extent, extent.on(self._device))
        self._resident_bytes += found.bytes

    # In use

    def _begin(self) -> None:
        """A forward of the whole model begins."""
        with self._lock:
            self._depth += 1
            if self._depth == 1 and torch._C._current_graph_task_id() == -1:
                self._begin_pass(torch.cuda.current_stream(self._index))

    def _end(self) -> None:
        with self._lock:
            self._depth -= 1

    def _begin_pass(self, stream: torch.cuda.Stream) -> None:
        """From here on weights may be others than before, without their versions telling.

        Fused optimizers and whatever writes through `.data` leave a parameter's version as it is. So copies of the last
        pass are not used again, and new ones are ordered behind all that the program has enqueued.
        """
        assert self._slots is not None
        self._seen.clear()
        self._order.note(START)
        if not self._across or self._trained:
            for slot in self._slots.all:
                if slot.unit is not None and not self._units[slot.unit].active:
                    self._stale += slot.used == 0
                    self._invalidate(slot)
            self._slots.copies.wait_stream(stream)
        self._trained = False

    def _enter(self, units: list[_Unit]) -> None:
        """A forward begins that uses these units: the current stream waits until they are on the device."""
        stream = self._stream_of_caller()
        with self._lock:
            if self._removed or self._slots is None:
                return
            entered = []
            try:
                for unit in units:
                    in_backward = torch._C._current_graph_task_id() != -1
                    if not self._depth and not in_backward and unit.number in self._seen:
                        self._begin_pass(stream)
                    self._seen.add(unit.number)
                    self._trained |= torch.is_grad_enabled()
                    self._demand(unit, FORWARD, stream)
                    self._bind(unit)
                    entered.append(unit)
                self._prefetch(stream, units)
            except BaseException:
                self._unbind(entered)
                raise

    def _leave(self, units: list[_Unit]) -> None:
        """The forward has ended, however."""
        with self._lock:
            self._unbind(units)
        if units and torch.is_autocast_enabled("cuda"):
            # It keeps a copy of each weight that it has converted, on the device.
            torch.clear_autocast_cache()

    def _bind(self, unit: _Unit) -> None:
        unit.active += 1
        if unit.active > 1:
            return
        assert unit.slot is not None
        for weight in unit.weights:
            parameter = weight.parameter
            if parameter.data_ptr() != weight.pointer:
                continue  # the program has put it elsewhere: it is used where it is
            view = weight.in_slot(unit.slot)
            parameter.data = view
            weight.bound, weight.version = view.data_ptr(), parameter._version

    def _unbind(self, units: list[_Unit]) -> None:
        for unit in units:
            if not unit.active:
                continue  # removed, or never entered
            unit.active -= 1
            if unit.active:
                continue
            slot = unit.slot
            for number, weight in enumerate(unit.weights):
                if not weight.bound:
                    continue
                parameter, bound = weight.parameter, weight.bound
                weight.bound = 0
                if parameter.data_ptr() != bound:
                    continue  # the forward has put it elsewhere
                version = parameter._version
                if version != weight.version and slot is not None:
                    with torch.inference_mode(False), torch.no_grad():
                        weight.host.copy_(parameter.data, non_blocking=True)
                    slot.versions[number] = version
                    self._written += 1
                parameter.data = weight.host
            if slot is not None:
                slot.settle()
        if self._slots is not None:
            self._slots.trim()

    def _demand(self, unit: _Unit, phase: str, stream: torch.cuda.Stream) -> Slot:
        """The slot with the unit, on which `stream` waits."""
        assert self._slots is not None
        self._slots.settle()
        self._clock += 1
        new = self._order.note((unit.number, phase))
        slot = unit.slot
        if slot is not None and not unit.active and slot.versions != unit.now():
            self._stale += 1
            self._invalidate(slot)
            slot = None
        if slot is None:
            slot = self._slots.spare((unit.number, *self._order.upcoming(self._ahead, self._looks_across())))
            if slot is None:
                slot = self._slots.spare(())
            if slot is None:
                slot = self._slots.replace(lambda slot: slot.unit is not None and self._units[slot.unit].active > 0)
            self._fetch(unit, slot, stream)
            self._misses += 1
        else:
            self._hits += new
        slot.used = self._clock
        slot.hand_out(stream)
        return slot

    def _prefetch(self, stream: torch.cuda.Stream, using: list[_Unit]) -> None:
        """Begins to copy the units that will be used next, as far as there are slots."""
        assert self._slots is not None
        upcoming = self._order.upcoming(self._ahead, self._looks_across())
        keep = {*upcoming, *(unit.number for unit in using)}
        for number in upcoming:
            unit = self._units[number]
            if unit.slot is not None:
                if unit.active or unit.slot.versions == unit.now():
                    continue
                self._stale += 1
                self._invalidate(unit.slot)
            slot = self._slots.spare(keep)
            if slot is None:
                return
            self._fetch(unit, slot, stream)

    def _looks_across(self) -> bool:
        return self._across and not self._trained

    def _fetch(self, unit: _Unit, slot: Slot, stream: torch.cuda.Stream) -> None:
        assert self._slots is not None
        if slot.unit is not None:
            self._invalidate(slot)
        versions = unit.now()
        if versions != unit.versions:
            # Written since the last time, by work that the program has enqueued.
            self._slots.copies.wait_stream(stream)
        unit.versions = versions
        slot.fill(unit.host, self._slots.copies)
        slot.unit, slot.versions, slot.used = unit.number, list(versions), 0
        unit.slot = slot
        self._fetches += 1
        self._bytes += unit.bytes

    def _invalidate(self, slot: Slot) -> None:
        if slot.unit is not None:
            self._units[slot.unit].slot = None
        slot.unit = None

    def _stream_of_caller(self) -> torch.cuda.Stream:
        stream = torch.cuda.current_stream(self._index)
        with torch.cuda.device(self._index):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "torch_uvm.stream(): a CUDA graph is being captured, and a graph cannot hold weights that move "
                    "between slots. Call remove() before the capture, or capture nothing of this model"
                )
        return stream

    def _save(self, tensor: torch.Tensor) -> Union[_Saved, _SavedCast, None]:
        """What to keep instead of a tensor in a slot, or of one that is a weight in another type; None for any other."""
        slots = self._slots
        if slots is None:
            return None
        slot = slots.of(tensor)
        if slot is None:
            return self._save_cast(tensor, slots)
        if slot.unit is None:
            return None
        unit = self._units[slot.unit]
        first = tensor.storage_offset() * tensor.element_size()
        for number, weight in enumerate(unit.weights):
            if weight.holds(first):
                version = weight.parameter._version if weight.bound else slot.versions[number]
                return _Saved(unit, weight, version, tensor)
        return None

    def _save_cast(self, tensor: torch.Tensor, slots: Slots) -> Optional[_SavedCast]:
        base = tensor._base if tensor._is_view() else tensor
        made_by = None if base is None else base.grad_fn
        if base is None or made_by is None or made_by.name() != "ToCopyBackward0" or base._version:
            return None
        parameter = getattr(made_by.next_functions[0][0], "variable", None)
        if parameter is None or not base.is_cuda or base.stride() != parameter.stride() or base.storage_offset():
            return None
        slot = slots.of(parameter)
        saved = self._save(parameter.detach()) if slot is not None else None
        return _SavedCast(saved, base, tensor) if isinstance(saved, _Saved) else None

    def _load(self, saved: _Saved) -> torch.Tensor:
        """The weight once more, for the backward pass."""
        unit, weight = saved.unit, saved.weight
        version = weight.parameter._version
        if version != saved.version:
            raise RuntimeError(_modified(weight.host, saved.version, version))
        itemsize = saved.dtype.itemsize
        with self._lock:
            if not self._removed and self._slots is not None and self._in_place(weight):
                stream = self._stream_of_caller()
                slot = self._demand(unit, BACKWARD, stream)
                offset = weight.offset * weight.host.element_size() // itemsize + saved.offset
                view = slot.view(saved.dtype, saved.shape, saved.stride, offset)
                self._prefetch(stream, [unit])
                return view
        # No longer ours: it is read where it is.
        data = weight.parameter.detach()
        if data.dtype != saved.dtype:
            data = data.view(saved.dtype)
        return torch.as_strided(data, saved.shape, saved.stride, data.storage_offset() + saved.offset)

    @staticmethod
    def _in_place(weight: _Weight) -> bool:
        return weight.parameter.data_ptr() in (weight.pointer, weight.bound)

    # The end

    def remove(self) -> None:
        """Ends it: the weights are ordinary CUDA tensors again, placed as `uvm_access_pattern` says, unit by unit.

        Graphs of forwards that have run can still be gone back through. Calling it again changes nothing.

        Raises:
            RuntimeError: a forward of the model is running.
            torch.cuda.OutOfMemoryError: the weights do not fit. Nothing streams any more, and those that did not fit stay
                in host memory, where the GPU reads them; calling it again goes on.
        """
        self._detach([], whole=True)

    def _detach(self, origins: list[tuple[Extent, torch.device]], *, whole: bool) -> None:
        """Undoes `_attach`, whatever part of it was done; moves weights to where `origins` says, else to the device.

        Without `whole` those that the device has no memory for stay in host memory, and that is no error.
        """
        with self._lock:
            if any(unit.active for unit in self._units):
                raise RuntimeError("torch_uvm.stream(): remove() while a forward of the model is running")
            self._removed = True
            while self._forwards:
                forward = self._forwards.pop()()
                if forward is not None:
                    forward.restore()
            if self._grads is not None:
                self._grads.remove()
                self._grads = None
            slots, self._slots = self._slots, None
            if slots is not None:
                torch.cuda.current_stream(self._index).wait_stream(slots.copies)
                slots.drop_all()
                for unit in self._units:
                    unit.host = torch.empty(0)  # pinned memory waits for the device before it goes
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._bring_back(origins)
        except torch.cuda.OutOfMemoryError:
            if whole:
                raise
        empty_cache()

    def _bring_back(self, origins: list[tuple[Extent, torch.device]]) -> None:
        for extent, device in origins:
            if device.type == "cpu" and extent.tensors[0].is_cuda:
                _repoint(extent, extent.on(device))
        released = 0
        while self._hosted:
            extent, weights = self._hosted[-1]
            staying = [weight.parameter.data_ptr() == weight.pointer for weight in weights]
            if any(staying):
                moved = _ordinary(extent, weights)
                for weight, data, stays in zip(weights, moved, staying):
                    if stays:
                        _repoint_one(weight.parameter, data)
            for weight in weights:
                weight.let_go()
            self._hosted.pop()
            released += extent.nbytes
            if released > _GIB:  # so that the weights are not there twice
                empty_cache()
                released = 0

    def statistics(self) -> StreamStatistics:
        """What it has done until now."""
        with self._lock:
            slots = self._slots
            return StreamStatistics(
                units=self._candidates,
                streamed_units=len(self._units),
                streamed_bytes=sum(unit.bytes for unit in self._units),
                resident_bytes=self._resident_bytes,
                remote_bytes=self._remote_bytes,
                slots=len(slots.all) if slots else 0,
                slot_bytes=slots.all[0].buffer.numel() if slots and slots.all else 0,
                fetches=self._fetches,
                bytes_copied=self._bytes,
                hits=self._hits,
                misses=self._misses,
                stale=self._stale,
                written_back=self._written,
                replaced_slots=slots.replaced if slots else 0,
            )

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.remove()


class _HostGradients:
    """Moves each gradient into host memory as soon as it is complete."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(_MoveGradient())
            for parameter in parameters
            if parameter.requires_grad
        ]

    def remove(self) -> None:
        """No more of this. Gradients stay where they are."""
        for hook in self._hooks:
            hook.remove()


class _MoveGradient:
    """Moves the gradient of one parameter, which it does not hold: the parameter holds it."""

    def __init__(self) -> None:
        self._kept: Optional[_HostGradient] = None

    def __call__(self, parameter: torch.Tensor) -> None:
        grad, kept = parameter.grad, self._kept
        if grad is None or grad.layout != torch.strided or grad.requires_grad:
            return  # sparse ones are small; one with a graph (create_graph) is part of it
        if kept is not None and grad.data_ptr() == kept.cuda.data_ptr():
            return
        if kept is None or not kept.serves(grad):
            kept = self._kept = _HostGradient(grad)
        kept.host.copy_(grad, non_blocking=True)
        parameter.grad = kept.cuda.view_as(kept.cuda)


class _HostGradient:
    """Host memory for a gradient."""

    __slots__ = ("_owners", "cuda", "host")

    def __init__(self, grad: torch.Tensor) -> None:
        """Pinned memory; for small gradients, which are not worth that, memory of the allocator's."""
        #: As a CUDA tensor, and as the tensor to copy to.
        self.cuda, self.host = self._small(grad) if bytes_of(grad) < SMALLEST else self._large(grad)
        self._owners = Owners(self.cuda)

    @staticmethod
    def _small(grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with placement("cpu_first", grad.device):
            kept = torch.empty_like(grad)
        return kept, kept

    @staticmethod
    def _large(grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pinned = Pinned(bytes_of(grad), grad.device.index)
        cuda, host = (
            torch.as_strided(flat.view(grad.dtype), grad.shape, strides(grad)) for flat in (pinned.cuda(), pinned.cpu)
        )
        return cuda, host

    def serves(self, grad: torch.Tensor) -> bool:
        """Whether it can take this gradient: it is like it, and nobody holds the last one."""
        return self.cuda.dtype == grad.dtype and self.cuda.shape == grad.shape and self._owners.alone()


def _movable(extents: list[Extent]) -> list[Extent]:
    """A model's extents, after a word about those that cannot move: tensors outside the model share their memory.

    On the GPU they stay where they are: their memory would not become free. Others would have to be moved to the GPU.
    """
    held = [extent for extent in extents if extent.weights() and extent.held_outside]
    refused = [name for extent in held if not extent.tensors[0].is_cuda for name in extent.names]
    if refused:
        raise ValueError(
            f"model: the memory of {_names(refused)} on the CPU is shared with a tensor outside the model (a flat buffer, a "
            "view, a state_dict, another model, a graph of a forward pass): what is written through one would not be seen "
            "through the other. Delete that tensor, or move the model to the GPU first"
        )
    staying = [name for extent in held for name in extent.names]
    if staying:
        warnings.warn(
            f"torch_uvm.stream(): the memory of {_names(staying)} is shared with a tensor outside the model (a flat buffer, a "
            "view, a state_dict, another model, a graph of a forward pass). It stays where it is and does not stream",
            stacklevel=4,
        )
    return extents


def _names(names: list[str]) -> str:
    """The first few of them."""
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _ordinary(extent: Extent, weights: list[_Weight]) -> list[torch.Tensor]:
    """Copies of an extent's tensors, from host memory, in memory of the default placement."""
    there = Extent([weight.host for weight in weights], extent.names, extent.offsets, extent.nbytes)
    device = weights[0].host.device
    try:
        return there.on(device)
    except torch.cuda.OutOfMemoryError:
        empty_cache()  # what weights before this one have left in the host's pools
        return there.on(device)


def _repoint(extent: Extent, views: list[torch.Tensor]) -> None:
    """Gives an extent another place."""
    for tensor, data in zip(extent.tensors, views):
        _repoint_one(tensor, data)


def _repoint_one(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Gives a tensor another place, and its gradient the same device."""
    grad = tensor.grad if tensor.is_leaf else None
    if grad is not None:
        tensor.grad = None
    tensor.data = data
    if grad is not None:
        tensor.grad = grad if grad.device == data.device else grad.to(data.device)


def _device_of(model: nn.Module) -> int:
    """The CUDA device that the model is on; the current one for a model on the CPU."""
    devices = {parameter.device for parameter in model.parameters()}
    for parameter in model.parameters():
        if parameter.device.type not in ("cuda", "cpu") or isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                "model: a parameter is on the device 'meta', or has no shape yet: expected parameters with contents, on "
                "the CPU or a CUDA device"
            )
        if parameter.is_inference():
            raise ValueError("model: a parameter was made in inference mode: expected ordinary ones")
    indices = {device.index for device in devices if device.type == "cuda"}
    if len(indices) > 1:
        raise ValueError(f"model: it is on CUDA devices {sorted(indices)}: expected one. Stream each device's part")
    return device_index(indices.pop() if indices else None)


def stream(
    model: nn.Module,
    ahead: int = 2,
    device_bytes: Optional[int] = None,
    gradients: Gradients = "device",
    *,
    across_passes: bool = False,
) -> Stream:
    """Keeps a model's weights in host memory and copies them to the device ahead of their use.

    The model stays as it is: an ordinary module, for inference and training, on the CPU or the GPU before.

        with torch_uvm.stream(model):
            output = model(tokens)

    *Units* are copied one at a time: the elements of ModuleList and Sequential, and modules with parameters that lie in
    none. As many units as fit stay on the device, spread among the others. Outside a unit's forward its weights are CUDA
    tensors in host memory, so optimizers, `state_dict` and code that reads weights directly are right too, and slower.
    Weights that a forward changes in place are copied back.

    - The order of units is learned; the backward pass fetches weights again and keeps none.
    - `torch.utils.checkpoint` around units works; within one, recomputation reads the weights where they lie.
    - Under `torch.compile` each unit's forward is compiled by itself (a unit that is one of PyTorch's own modules runs as
      it is). A CUDA graph cannot be captured; `mode="reduce-overhead"` is not for it.
    - Changes that PyTorch does not count (through `.data`) are seen from the next pass on, which is a call of the model;
      inside a unit's forward they are lost.
    - A view of a weight that was made inside a forward and is kept (`weight.detach()`) stays what it was. If another stream
      uses it, keep it until that is done: `record_stream` alone is not enough.
    - Weights that share memory keep sharing it: weights tied through `.data`, views of one flat tensor, buffers that are views
      of weights. Memory that a tensor outside the model shares too (an optimizer's flat buffer, a `state_dict`) does not move:
      on the GPU such weights stay where they are, with a warning that names them; on the CPU they are an error. This is looked
      at once, at the beginning. A view that is taken outside a forward while weights stream is of the host memory, which the
      weights leave in `remove()`.
    - Transforms of `torch.func` and tracers (`torch.export`, `torch.jit.trace`, `make_fx`) read the weights where they lie, in
      host memory. `torch.jit.script` does not take such a model, and `torch.export` with `strict=True` not on all versions
      of PyTorch: the errors say so.
    - A model that is dropped without `remove()` gives its host memory back at once.

    Args:
        model: its parameters are on the CPU or on one CUDA device.
        ahead: how many units to copy ahead. There are `ahead + 1` slots, of the largest unit that streams.
        device_bytes: device memory for slots and weights that stay; None for three quarters of what is left
            under the device limit (`memory_info`), so that a quarter is left to activations.
        gradients: `device` leaves gradients where they are made; `host` moves each into host memory when it is complete.
        across_passes: copy the first units of the next pass at the end of one, where no gradients are recorded. Then
            weights must not be changed through `.data` between passes.

    Raises:
        RuntimeError: `use_uvm` is off, the model streams already, or what is left on the device is too little.
        torch.cuda.OutOfMemoryError: the host has too little memory left to pin the weights. The model is as it was.
        ValueError: an argument is not allowed, `device_bytes` is too little for the slots, or the memory of weights on the CPU
            is shared with a tensor outside the model.
    """
    enabled_library("stream()")
    _tell_dynamo()
    if isinstance(ahead, bool) or not isinstance(ahead, int) or ahead < 1:
        raise ValueError(f"ahead: {ahead!r} is not allowed: expected a whole number of units, at least 1")
    if device_bytes is not None and (not isinstance(device_bytes, int) or device_bytes < 0):
        raise ValueError(f"device_bytes: {device_bytes!r} is not allowed: expected a number of bytes, or None")
    if gradients not in get_args(Gradients):
        raise ValueError(f"gradients: {gradients!r} is not allowed: expected device or host")
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, _Forward) and forward._stream is not None:
            raise RuntimeError("torch_uvm.stream(): this model, or a part of it, streams already: remove() that first")
    return Stream(model, ahead, device_bytes, gradients, across_passes)
