"""Gradients that move into host memory as soon as they are complete."""

from __future__ import annotations

from typing import Optional

import torch

from .._pools import placement
from .extents import bytes_of, strides
from .internals import when_grad_is_complete
from .owners import Owners
from .pinned import Pinned
from .plan import SMALLEST


class HostGradients:
    """The gradients of some parameters."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self._hooks = [
            when_grad_is_complete(parameter, _MoveGradient()) for parameter in parameters if parameter.requires_grad
        ]

    def remove(self) -> None:
        """Moves no more of them. Those that are there stay where they are."""
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
        if kept is None or not kept.can_take(grad):
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

    def can_take(self, grad: torch.Tensor) -> bool:
        """Whether it can take this gradient: it is like it, and nobody holds the last one."""
        return self.cuda.dtype == grad.dtype and self.cuda.shape == grad.shape and self._owners.alone()
