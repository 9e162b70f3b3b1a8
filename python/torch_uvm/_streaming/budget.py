"""How much device memory the weights of a model may have, and what they need at least."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Optional

from torch import nn

from .._format import format_bytes
from .._report import memory_info
from .extents import Extent
from .plan import MIB, Choice, Groups, bytes_needed, choose, group

#: The share of the device memory that is left under the limit which `device_bytes=None` leaves to activations,
#: gradients and everything else.
RESERVE = 0.25


class Budget:
    """The device memory for the weights of one model."""

    def __init__(
        self, model: nn.Module, extents: list[Extent], device: int, ahead: int, device_bytes: Optional[int]
    ) -> None:
        """`device_bytes` is a number of bytes, or None for a share of what is left under the device limit."""
        self._model = model
        self._extents = extents
        self._device = device
        self._ahead = ahead
        self._given = device_bytes

    @property
    def known(self) -> bool:
        """Whether `choice` can be asked before the weights have left the device."""
        return self._given is not None

    def groups(self) -> Groups:
        """The model's weights, divided so that slots for them can fit."""
        return self._groups(memory_info(self._device).device_limit if self._given is None else self._given)

    def _groups(self, device_bytes: int) -> Groups:
        return group(self._model, max(1, device_bytes // (2 * (self._ahead + 1))), self._extents)

    def choice(self, groups: Groups) -> Choice:
        """What stays on the device.

        Raises:
            ValueError: `device_bytes` is too little.
            RuntimeError: what is left under the device limit is too little.
        """
        if self._given is None:
            info = memory_info(self._device)
            device_bytes = int(max(0, info.device_limit - info.populated_device) * (1 - RESERVE))
        else:
            device_bytes = self._given
        choice = choose(groups, device_bytes, self._ahead)
        if choice is not None:
            return choice
        smallest = min((unit.bytes for unit in groups.units), default=0)
        small = sum(group.bytes for group in groups.small)
        text = (
            f"{format_bytes(device_bytes)} of device memory is too little for this model's weights to stream "
            f"{self._ahead} ahead: {self._ahead + 1} slots, of at least {format_bytes(smallest)} each, and "
            f"{format_bytes(small)} of small weights must fit, beside the units that are larger than a slot"
        )
        if self._given is not None:
            enough = self._enough(lambda limit: limit, lambda needed: needed)
            raise ValueError(f"device_bytes: {text}. {enough} MiB would do")
        enough = self._enough(
            lambda limit: max(0, limit - info.populated_device) * (1 - RESERVE),
            lambda needed: info.populated_device + needed / (1 - RESERVE),
        )
        raise RuntimeError(
            f"torch_uvm.stream_weights(): {text}. Set uvm_device_limit_mb to {enough} or more, or device_bytes, which "
            "leaves less to everything else"
        )

    def _enough(self, for_weights: Callable[[int], float], limit_for: Callable[[int], float]) -> int:
        """The MiB of device memory that would do. `for_weights` says what of a limit is for weights, `limit_for` the
        inverse.

        With more memory units may be larger, and need more: it is tried until it holds.
        """
        limit = 0
        while True:
            groups = self._groups(limit)
            if choose(groups, int(for_weights(limit)), self._ahead) is not None:
                return limit // MIB
            needed = math.ceil(limit_for(bytes_needed(groups, self._ahead)))
            limit = max(limit + MIB, -(-needed // MIB) * MIB)
