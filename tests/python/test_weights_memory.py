"""The memory of weights that stream: how much they take, what is too little, and that all of it comes back."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from typing import Any

import pytest
import torch
from contents import MIB, same
from on_device import on_device
from simulated import environment, run_python
from streamed import (
    UNIT,
    a_row,
    check,
    check_read,
    linears,
    ones,
    stack,
)
from torch import nn
from under_test import from_source, torch_uvm

from torch_uvm._streaming.pinned import pinned_bytes


@on_device(uvm_only=True)
def test_the_memory() -> None:
    """Slots and what stays are on the device, the rest in host memory; all of it comes back."""
    model = stack(16, "cuda")
    before = torch_uvm.memory_info()
    stream = torch_uvm.stream_weights(model, device_bytes=6 * UNIT)
    attached = torch_uvm.memory_info()
    assert pinned_bytes() >= 13 * UNIT
    assert before.host_available - attached.host_available >= 13 * UNIT
    assert before.allocated - attached.allocated >= 10 * UNIT - 16 * 512
    stream.remove()
    gc.collect()
    after = torch_uvm.memory_info()
    same(pinned_bytes(), 0)
    same(after.host_available, before.host_available)
    same(after.allocated, before.allocated)


@on_device("use_uvm:True,uvm_device_limit_mb:32", uvm_only=True)
def test_what_is_left_under_the_limit() -> None:
    """`device_bytes=None` takes three quarters of it, whatever lay on the device before."""
    model = stack(40, "cuda")
    with torch_uvm.stream_weights(model) as stream:
        found = stream.statistics()
        device = torch_uvm.memory_info().populated_device
        assert device <= 32 * MIB, device
        assert 4 * MIB <= found.resident_bytes + found.slots * found.slot_bytes <= 24 * MIB, found
        model(ones())
        check_read(model)


@on_device(uvm_only=True)
def test_what_is_refused() -> None:
    """With the name, the value and what is allowed; the model stays as it was."""
    model = stack(6)
    before = pinned_bytes()
    for arguments, text in (
        ({"ahead": 0}, "ahead: 0 is not allowed: expected a whole number of units, at least 1"),
        ({"device_bytes": -1}, "device_bytes: -1 is not allowed"),
        ({"gradients": "disk"}, "gradients: 'disk' is not allowed: expected device or host"),
        ({"device_bytes": 3 * UNIT - 1}, "device_bytes: 3.00 MiB of device memory is too little"),
    ):
        with pytest.raises(ValueError, match=text):
            torch_uvm.stream_weights(model, **arguments)
    with pytest.raises(ValueError, match="'meta'"):
        torch_uvm.stream_weights(nn.Linear(4, 4, device="meta"))
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(parameter.is_cuda for parameter in model.parameters())
    same(pinned_bytes(), before)
    with (
        torch_uvm.stream_weights(model, device_bytes=3 * UNIT),
        pytest.raises(RuntimeError, match="streams already"),
    ):
        torch_uvm.stream_weights(model[1:], device_bytes=3 * UNIT)


@on_device("use_uvm:True,uvm_device_limit_mb:{limit}", uvm_only=True)
@pytest.mark.parametrize("limit", [2, 8])
def test_how_much_would_do(limit: int) -> None:
    """The error says it: with so much it works, and with 1 MiB less it does not."""
    model = stack(6)
    model.append(nn.Sequential(*stack(3)))
    with pytest.raises(ValueError, match=r"device_bytes: .* is too little") as refused:
        torch_uvm.stream_weights(model, device_bytes=5)
    needed = int(re.search(r"(\d+) MiB would do", str(refused.value))[1])  # type: ignore[index]
    same(needed, 3)
    with pytest.raises(ValueError, match="too little"):
        torch_uvm.stream_weights(model, device_bytes=(needed - 1) * MIB)
    torch_uvm.stream_weights(model, device_bytes=needed * MIB).remove()
    model.to("cpu")
    if limit == 8:
        torch_uvm.stream_weights(model).remove()
        return
    with pytest.raises(RuntimeError, match="too little") as too_low:
        torch_uvm.stream_weights(model)
    enough = int(re.search(r"uvm_device_limit_mb to (\d+) or more", str(too_low.value))[1])  # type: ignore[index]
    same(enough, 4)
    torch.cuda.memory._set_allocator_settings(f"uvm_device_limit_mb:{enough}")
    torch_uvm.stream_weights(model).remove()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@on_device("use_uvm:True,uvm_host_reserve_mb:10220", uvm_only=True)
def test_too_little_memory(device: str) -> None:
    """In the host, in the middle of it: everything is where it was, and the books balance."""
    model = stack(30, device)
    before = torch_uvm.memory_info()
    with pytest.raises(torch.cuda.OutOfMemoryError, match="uvm_host_reserve_mb"):
        torch_uvm.stream_weights(model, device_bytes=3 * MIB)
    gc.collect()
    same(pinned_bytes(), 0)
    torch_uvm.empty_cache()
    same({parameter.device.type for parameter in model.parameters()}, {device})
    for index, layer in enumerate(model):
        check(layer.weight, index)
    assert not any("forward" in module.__dict__ for module in model.modules())
    after = torch_uvm.memory_info()
    same(after.allocated, before.allocated)
    same(after.populated_host, before.populated_host)


@on_device(uvm_only=True)
@pytest.mark.parametrize("gradients", ["device", "host"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_model_that_is_dropped(gradients: str, trained: bool) -> None:
    """Without remove(): its host memory is free at once, and not when cycles are collected."""
    gc.collect()
    gc.disable()
    before = pinned_bytes()
    model: Any = linears()
    stream: Any = torch_uvm.stream_weights(model, device_bytes=4 * UNIT, gradients=gradients)
    assert pinned_bytes() > before
    y = model(a_row())
    if trained:
        y.sum().backward()
    twin: Any = copy.deepcopy(model)
    dropped = weakref.ref(model), weakref.ref(twin), weakref.ref(stream)
    del model, stream, twin, y
    same([reference() for reference in dropped], [None] * 3)
    same(pinned_bytes(), before)


def test_where_use_uvm_is_off() -> None:
    """An error that says what to set."""
    code = """
import torch, torch_uvm
for call in (lambda: torch_uvm.stream_weights(torch.nn.Linear(2, 2)), lambda: torch_uvm.offload_optimizer(None)):
    try:
        call()
    except RuntimeError as error:
        assert "PYTORCH_CUDA_ALLOC_CONF=use_uvm:True" in str(error), error
    else:
        raise AssertionError(call)
"""
    ended = run_python(code, from_source(environment("", require=True)))
    assert ended.status == 0, ended.text
