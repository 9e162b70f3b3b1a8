"""`stream_weights`: weights that lie in host memory and are copied to the device ahead of their use."""

from __future__ import annotations

import traceback
import weakref
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Optional, get_args

from torch import nn

from .._pools import empty_cache
from .._report import device_index, enabled_library
from .attach import Attachment, movable_extents
from .budget import Budget
from .extents import Extent
from .fetch import Fetcher
from .forward import Forward, ModelForward, tell_dynamo
from .gradients import HostGradients

#: Where gradients of weights that stream are kept.
Gradients = Literal["device", "host"]


@dataclass(frozen=True)
class WeightStreamStatistics:
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


class WeightStream:
    """A model whose weights stream: what `stream_weights` returns. A context manager that ends with `remove`."""

    def __init__(
        self, model: nn.Module, ahead: int, device_bytes: Optional[int], gradients: Gradients, across_passes: bool
    ) -> None:
        self._index = _device_of(model)
        self._fetcher = Fetcher(self._index, ahead, across_passes)
        self._attachment = Attachment(self._index)
        self._grads: Optional[HostGradients] = None
        #: The modules hold them.
        self._forwards: list[weakref.ref[Forward]] = []
        extents = movable_extents(model, stacklevel=3)
        try:
            self._attach(model, extents, Budget(model, extents, self._index, ahead, device_bytes), gradients)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold memory that is about to be given back
            self._stop()
            self._attachment.undo()
            empty_cache()
            raise

    def _attach(self, model: nn.Module, extents: list[Extent], budget: Budget, gradients: Gradients) -> None:
        units, slots, used_by = self._attachment.move(model, extents, budget)
        self._fetcher.start(units, slots)
        if gradients == "host":
            parameters = [weight.tensor for unit in units for weight in unit.weights if weight.tensor.is_leaf]
            self._grads = HostGradients(parameters)
        if units:
            if model not in used_by:
                self._forwards.append(weakref.ref(ModelForward(self._fetcher, model, [])))
            for module, units_of_it in used_by.items():
                self._forwards.append(weakref.ref(Forward(self._fetcher, module, units_of_it)))
        self._attachment.keep()

    def remove(self) -> None:
        """Ends it: the weights are ordinary CUDA tensors again, placed as `uvm_access_pattern` says, unit by unit.

        Graphs of forwards that have run can still be gone back through. Calling it again changes nothing.

        Raises:
            RuntimeError: a forward of the model is running.
            torch.cuda.OutOfMemoryError: the weights do not fit. Nothing streams any more, and those that did not fit
                stay in host memory, where the GPU reads them; calling it again goes on.
        """
        self._stop()
        self._attachment.to_ordinary_memory()
        empty_cache()

    def _stop(self) -> None:
        """Nothing streams any more. RuntimeError while a forward is running."""
        with self._fetcher.lock:
            self._fetcher.check_idle()
            while self._forwards:
                forward = self._forwards.pop()()
                if forward is not None:
                    forward.restore()
            if self._grads is not None:
                self._grads.remove()
                self._grads = None
            self._fetcher.stop()

    def statistics(self) -> WeightStreamStatistics:
        """What it has done until now."""
        fetcher, attachment = self._fetcher, self._attachment
        with fetcher.lock:
            slots, counts = fetcher.slots, fetcher.counts
            return WeightStreamStatistics(
                units=attachment.candidates,
                streamed_units=len(fetcher.units),
                streamed_bytes=sum(unit.bytes for unit in fetcher.units),
                resident_bytes=attachment.resident_bytes,
                remote_bytes=attachment.remote_bytes,
                slots=len(slots.all) if slots else 0,
                slot_bytes=slots.all[0].buffer.numel() if slots and slots.all else 0,
                fetches=counts.fetches,
                bytes_copied=counts.bytes_copied,
                hits=counts.hits,
                misses=counts.misses,
                stale=counts.stale,
                written_back=counts.written_back,
                replaced_slots=slots.replaced if slots else 0,
            )

    def __enter__(self) -> WeightStream:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.remove()


def _device_of(model: nn.Module) -> int:
    """The CUDA device that the model is on; the current one for a model on the CPU."""
    devices = {parameter.device for parameter in model.parameters()}
    for parameter in model.parameters():
        if parameter.device.type not in ("cuda", "cpu") or isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                "model: a parameter is on the device 'meta', or has no shape yet: expected parameters with contents, "
                "on the CPU or a CUDA device"
            )
        if parameter.is_inference():
            raise ValueError("model: a parameter was made in inference mode: expected ordinary ones")
    indices = {device.index for device in devices if device.type == "cuda"}
    if len(indices) > 1:
        raise ValueError(f"model: it is on CUDA devices {sorted(indices)}: expected one. Stream each device's part")
    return device_index(indices.pop() if indices else None)


def stream_weights(
    model: nn.Module,
    ahead: int = 2,
    device_bytes: Optional[int] = None,
    gradients: Gradients = "device",
    *,
    across_passes: bool = False,
) -> WeightStream:
    """Keeps a model's weights in host memory and copies them to the device ahead of their use.

    `torch_uvm.stream` is another name of this function, its first one. The model stays as it is: an ordinary module,
    for inference and training, on the CPU or the GPU before.

        with torch_uvm.stream_weights(model):
            output = model(tokens)

    *Units* are copied one at a time: the elements of ModuleList and Sequential, and modules with parameters that lie in
    none. As many units as fit stay on the device, spread among the others. Outside a unit's forward its weights are
    CUDA tensors in host memory, so optimizers, `state_dict` and code that reads weights directly are right too, and
    slower. Weights that a forward changes in place are copied back.

    - The order of units is learned; the backward pass fetches weights again and keeps none.
    - `torch.utils.checkpoint` around units works; within one, recomputation reads the weights where they lie.
    - Under `torch.compile` each unit's forward is compiled by itself (a unit that is one of PyTorch's own modules runs
      as it is). A CUDA graph cannot be captured; `mode="reduce-overhead"` is not for it.
    - Changes that PyTorch does not count (through `.data`) are seen from the next pass on, which is a call of the
      model; inside a unit's forward they are lost.
    - A view of a weight that was made inside a forward and is kept (`weight.detach()`) stays what it was. If another
      stream uses it, keep it until that is done: `record_stream` alone is not enough.
    - Weights that share memory keep sharing it: weights tied through `.data`, views of one flat tensor, buffers that
      are views of weights. Memory that a tensor outside the model shares too (an optimizer's flat buffer, a
      `state_dict`) does not move: on the GPU such weights stay where they are, with a warning that names them; on the
      CPU they are an error. This is looked at once, at the beginning. A view that is taken outside a forward while
      weights stream is of the host memory, which the weights leave in `remove()`.
    - Transforms of `torch.func` and tracers (`torch.export`, `torch.jit.trace`, `make_fx`) read the weights where they
      lie, in host memory. `torch.jit.script` does not take such a model, and `torch.export` with `strict=True` not on
      all versions of PyTorch: the errors say so.
    - A model that is dropped without `remove()` gives its host memory back at once.

    Args:
        model: its parameters are on the CPU or on one CUDA device.
        ahead: how many units to copy ahead. There are `ahead + 1` slots, of the largest unit that streams.
        device_bytes: device memory for slots and weights that stay; None for three quarters of what is left
            under the device limit (`memory_info`), so that a quarter is left to activations.
        gradients: `device` leaves gradients where they are made; `host` moves each into host memory when it is
            complete, which is not for gradients that are views of one buffer (as DistributedDataParallel makes them).
        across_passes: copy the first units of the next pass at the end of one, where no gradients are recorded. Then
            weights must not be changed through `.data` between passes.

    Raises:
        RuntimeError: `use_uvm` is off, the model streams already, or what is left on the device is too little.
        torch.cuda.OutOfMemoryError: the host has too little memory left to pin the weights. The model is as it was.
        ValueError: an argument is not allowed, `device_bytes` is too little for the slots, or the memory of weights on
            the CPU is shared with a tensor outside the model.
    """
    enabled_library("stream_weights()")
    tell_dynamo()
    if isinstance(ahead, bool) or not isinstance(ahead, int) or ahead < 1:
        raise ValueError(f"ahead: {ahead!r} is not allowed: expected a whole number of units, at least 1")
    if device_bytes is not None and (not isinstance(device_bytes, int) or device_bytes < 0):
        raise ValueError(f"device_bytes: {device_bytes!r} is not allowed: expected a number of bytes, or None")
    if gradients not in get_args(Gradients):
        raise ValueError(f"gradients: {gradients!r} is not allowed: expected device or host")
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, Forward) and forward.streams:
            raise RuntimeError(
                "torch_uvm.stream_weights(): this model, or a part of it, streams already: remove() that first"
            )
    return WeightStream(model, ahead, device_bytes, gradients, across_passes)


#: The first names, which stay: `torch_uvm.stream` is this function.
stream = stream_weights
Stream = WeightStream
StreamStatistics = WeightStreamStatistics
