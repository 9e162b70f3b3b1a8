"""Hints about where a tensor's memory should be, which raise an error instead of doing nothing.

A hint touches whole pages of memory. Tensors lie side by side on pages of 2 MiB, so on the first and the last page of a
tensor its neighbours are moved or advised with it; that changes where they are, never what they hold. The statistics
count the whole pages inside the tensor.

Hints are about the tensor's memory as it is now. When the tensor is freed and its memory used again, the allocator
brings the pages back to where it had placed them, as far as the device limit allows, and takes the advice away.

A tensor that is not contiguous stands for all of its storage from its first to its last element.
"""

from __future__ import annotations

from typing import Any, Literal, Union, get_args

import torch

from ._report import enabled_library

#: What `advise` can say: `cudaMemoryAdvise`.
Advice = Literal[
    "set_preferred_location",
    "unset_preferred_location",
    "set_accessed_by",
    "unset_accessed_by",
    "set_read_mostly",
    "unset_read_mostly",
]
#: A place for memory: `cpu`, or a CUDA device.
Place = Union["torch.device", int, str]

_HOST = -1
_LOCATED = ("set_preferred_location", "set_accessed_by", "unset_accessed_by")


def prefetch(tensor: torch.Tensor, device: Place, stream: torch.cuda.Stream | None = None) -> None:
    """Moves a tensor's memory to its GPU or to the host, in the order of a stream. Its contents stay.

        torch_uvm.prefetch(weights, "cpu")  # room for something else
        torch_uvm.prefetch(weights, "cuda", stream=ahead)  # back before it is used: 45 GB/s instead of 5 by page faults

    It does not wait. An empty tensor needs no move.

    Args:
        tensor: of the uvm allocator, on a CUDA device.
        device: `"cpu"`, or the tensor's own device: its number, `"cuda"`, `"cuda:0"`, a torch.device.
        stream: the tensor's current stream, if None.

    Raises:
        ValueError: the tensor is not a strided CUDA tensor, or the device is neither of these.
        RuntimeError: `use_uvm` is off; the memory is not managed (placement `device`, a MemPool's own allocator,
            another library's); the stream is capturing a CUDA graph; the host has no room left; CUDA failed. Nothing
            has moved.
    """
    library, (start, count) = enabled_library("prefetch()"), _span(tensor)
    place = _place(device, tensor)
    if count:
        library.prefetch(start, count, place, _stream(stream, tensor))


def advise(tensor: torch.Tensor, advice: Advice, device: Place | None = None) -> None:
    """Gives the driver advice about a tensor's memory, until the tensor is freed.

    - `set_preferred_location`: pages stay there, and what reaches them from elsewhere maps them if it can. It moves
      nothing by itself: `prefetch` does.
    - `set_accessed_by`: the device keeps the pages mapped wherever they are, and reaches them over the link instead of
      moving them.
    - `set_read_mostly`: a prefetch or a read makes a copy, and the pages stay; a write ends all copies but one.
    - `unset_preferred_location`, `unset_accessed_by` and `unset_read_mostly` take them back.

    Args:
        tensor: of the uvm allocator, on a CUDA device. An empty one needs no advice.
        advice: one of the above.
        device: `"cpu"` or a CUDA device, for the first two and `unset_accessed_by`.

    Raises:
        ValueError: the tensor is not a strided CUDA tensor; the advice or the device is not known, missing or too much.
        RuntimeError: `use_uvm` is off; the memory is not managed; CUDA failed.
    """
    if advice not in get_args(Advice):
        raise ValueError(f"advice: {advice!r} is not allowed: expected one of {', '.join(get_args(Advice))}")
    if (advice in _LOCATED) != (device is not None):
        wanted = "'cpu' or a CUDA device" if advice in _LOCATED else "none"
        raise ValueError(f"device: {device!r} is not allowed for {advice}: expected {wanted}")
    library, (start, count) = enabled_library("advise()"), _span(tensor)
    place = _HOST if device is None else _place(device, tensor)
    if count:
        library.advise(start, count, advice, place)


def discard(tensor: torch.Tensor, stream: torch.cuda.Stream | None = None) -> None:
    """Drops a tensor's contents, in the order of a stream, so that nothing carries them over the link again.

    The whole pages of 2 MiB inside the tensor are dropped and populated anew, on its device where the limit has room,
    so that they can be written at full speed. What the tensor holds then is indeterminate: write it before it is read.

    Args:
        tensor: of the uvm allocator, on a CUDA device.
        stream: the tensor's current stream, if None.

    Raises:
        ValueError: the tensor is not a strided CUDA tensor.
        RuntimeError: `use_uvm` is off; the memory is not managed; no whole page lies inside the tensor (an empty one
            has none); the driver cannot discard (before CUDA 13.0); the stream is capturing a CUDA graph; CUDA failed.
    """
    library, (start, count) = enabled_library("discard()"), _span(tensor)
    if not count:
        raise RuntimeError("discard: no whole page of 2 MiB lies inside an empty tensor")
    library.discard(start, count, _stream(stream, tensor))


def memory_advise(tensor: torch.Tensor, advice: Advice, device: Place | None = None) -> None:
    """`advise`, under the name by which programs look for it in `torch.cuda`. A device that the advice does not need is
    ignored, as they pass one always."""
    advise(tensor, advice, device if advice in _LOCATED else None)


def prefetch_to_device(tensor: torch.Tensor, device: Place | None = None) -> None:
    """`prefetch`, under the name by which programs look for it in `torch.cuda`; None is the tensor's own device."""
    prefetch(tensor, "cuda" if device is None else device)


def _span(tensor: Any) -> tuple[int, int]:
    """The address and the bytes from a tensor's first to its last element."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"tensor: a {type(tensor).__name__} is not allowed: expected a tensor on a CUDA device")
    if tensor.layout is not torch.strided or not tensor.is_cuda:
        raise ValueError(
            f"tensor: one of layout {tensor.layout} on {tensor.device} is not allowed: expected a strided tensor on a "
            "CUDA device"
        )
    if tensor.numel() == 0:
        return 0, 0
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


def _place(device: Any, tensor: torch.Tensor) -> int:
    """The number of a device; -1 for the host. `cuda` alone is the tensor's own."""
    if isinstance(device, int) and not isinstance(device, bool):
        named = torch.device("cuda", device) if device >= 0 else None
    else:
        try:
            named = torch.device(device)
        except (RuntimeError, TypeError):
            named = None
    if named is not None and named.type == "cpu":
        return _HOST
    if named is None or named.type != "cuda":
        raise ValueError(f"device: {device!r} is not allowed: expected 'cpu' or a CUDA device")
    index = tensor.device.index if named.index is None else named.index
    if not 0 <= index < torch.cuda.device_count():
        raise ValueError(
            f"device: {device!r} is not there: this process sees {torch.cuda.device_count()} CUDA device(s)"
        )
    return index


def _stream(stream: torch.cuda.Stream | None, tensor: torch.Tensor) -> int:
    if stream is None:
        stream = torch.cuda.current_stream(tensor.device)
    elif stream.device != tensor.device:
        raise ValueError(f"stream: one of {stream.device} is not allowed for a tensor on {tensor.device}")
    return int(stream.cuda_stream)
