"""What PyTorch does not offer to everyone, or what its types do not know: the rest of the package asks here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional, cast

import torch

_C: Any = torch._C
_autograd: Any = torch._C._autograd
_cuda: Any = torch.cuda

Pack = Callable[[torch.Tensor], Any]
Unpack = Callable[[Any], torch.Tensor]
#: The dispatch modes that record or replace what a program computes: fake tensors, functionalization, proxies.
_TRACING_MODES = tuple(_C._TorchDispatchModeKey.__members__.values())
#: `cudaHostRegisterPortable | cudaHostRegisterMapped`: pinned for all devices, and reached by their kernels.
_PORTABLE_AND_MAPPED = 3


def new_event() -> torch.cuda.Event:
    """A CUDA event without timing."""
    return cast(torch.cuda.Event, _cuda.Event())


def new_stream(device: int) -> torch.cuda.Stream:
    """A CUDA stream."""
    return cast(torch.cuda.Stream, _cuda.Stream(device))


def register_host_memory(pointer: int, count: int) -> None:
    """Pins memory of the host and maps it for the devices. RuntimeError where CUDA does not."""
    _cuda.check_error(int(_cuda.cudart().cudaHostRegister(pointer, count, _PORTABLE_AND_MAPPED)))


def unregister_host_memory(pointer: int) -> None:
    """Undoes `register_host_memory`."""
    _cuda.check_error(int(_cuda.cudart().cudaHostUnregister(pointer)))


def use_count(storage: torch.UntypedStorage) -> int:
    """How many own a storage: tensors, saved ones too, and the storage's Python object."""
    return int(_C._storage_Use_Count(storage._cdata))


def when_grad_is_complete(parameter: torch.Tensor, call: Callable[[torch.Tensor], None]) -> Any:
    """Calls it with the parameter whenever a gradient was accumulated. Answers the hook's handle."""
    return cast(Any, parameter).register_post_accumulate_grad_hook(call)


def in_backward() -> bool:
    """Whether this thread is in a backward pass: a checkpoint recomputes."""
    return bool(_C._current_graph_task_id() != -1)


def is_traced_or_transformed() -> bool:
    """Whether a transform of torch.func or a tracer (torch.export, torch.jit.trace, make_fx) is at work."""
    if _C._functorch.peek_interpreter_stack() is not None or _C._get_tracing_state() is not None:
        return True
    for key in _TRACING_MODES:  # noqa: SIM110  (torch.export of some versions looks through this, and takes no generator)
        if _C._get_dispatch_mode(key) is not None:
            return True
    return False


def saved_tensor_hooks_are_allowed() -> bool:
    """Whether saved-tensor hooks can be entered."""
    return bool(_autograd._saved_tensors_hooks_is_enabled())


#: Whether PyTorch says which saved-tensor hooks hold now: 2.6 does not.
TELLS_SAVED_TENSOR_HOOKS = hasattr(_autograd, "_top_saved_tensors_default_hooks")


def innermost_saved_tensor_hooks() -> Optional[tuple[Pack, Unpack]]:
    """Those that hold now."""
    return cast("Optional[tuple[Pack, Unpack]]", _autograd._top_saved_tensors_default_hooks(True))


def push_saved_tensor_hooks(pack: Pack, unpack: Unpack) -> None:
    """Begins saved-tensor hooks."""
    _autograd._push_saved_tensors_default_hooks(pack, unpack)


def pop_saved_tensor_hooks() -> None:
    """Ends the innermost saved-tensor hooks."""
    _autograd._pop_saved_tensors_default_hooks()
