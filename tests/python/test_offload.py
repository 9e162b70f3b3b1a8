"""An optimizer's state in host memory (`torch_uvm.offload_optimizer`)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from contents import same
from on_device import on_device
from streamed import (
    SIDE,
    UNIT,
    check,
    check_read,
    contents,
    ones,
    stack,
)
from torch import nn
from under_test import torch_uvm


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of tensors that are no scalars."""
    values = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(value.numel() * value.element_size() for value in values if value.dim())


def with_gradients() -> nn.Module:
    """A model of 8 MiB with gradients."""
    model = stack(8, "cuda")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


@on_device(uvm_only=True)
@pytest.mark.parametrize("name", ["fused", "foreach", "plain", "momentum", "adagrad"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_offloaded_state(name: str, when: str) -> None:
    """Lies in host memory, whether it is made later or was there; no more of it on the device."""
    model = with_gradients()
    make = {
        "fused": lambda p: torch.optim.AdamW(p, fused=True),
        "foreach": lambda p: torch.optim.Adam(p, foreach=True),
        "plain": lambda p: torch.optim.AdamW(p, foreach=False),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adagrad": lambda p: torch.optim.Adagrad(p),
    }[name]
    optimizer = make(model.parameters())
    start = torch_uvm.memory_info()
    if when == "after":
        optimizer.step()
    handle = torch_uvm.offload_optimizer(optimizer)
    for _ in range(3):
        optimizer.step()
    torch_uvm.empty_cache()
    after = torch_uvm.memory_info()
    expected = state_bytes(optimizer)
    assert expected >= 8 * UNIT
    assert after.populated_host - start.populated_host >= expected, (start, after)
    addresses = [
        value.data_ptr() for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    ]
    optimizer.step()
    found = [
        value.data_ptr() for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    ]
    same(found, addresses, "state that moves again")
    handle.remove()
    assert "_init_group" not in optimizer.__dict__


@on_device(uvm_only=True)
def test_offloaded_state_is_kept() -> None:
    """Through the move and through load_state_dict, byte for byte."""
    model = with_gradients()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer.step()
    for index, parameter in enumerate(model.parameters()):
        optimizer.state[parameter]["exp_avg"].copy_(contents(index))
    with torch_uvm.offload_optimizer(optimizer):
        for index, parameter in enumerate(model.parameters()):
            check(optimizer.state[parameter]["exp_avg"], index)
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            state["exp_avg"].copy_(contents(77))
        before = torch_uvm.memory_info()
        optimizer.load_state_dict(saved)
        for parameter in model.parameters():
            check(optimizer.state[parameter]["exp_avg"], 77)
        assert torch_uvm.memory_info().populated_host >= before.populated_host
        optimizer.step()


@on_device(uvm_only=True)
def test_state_that_shares_memory() -> None:
    """Shares it in host memory too; what something outside the state shares as well stays where it is."""
    model = with_gradients()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    flat = torch.empty(3, SIDE, SIDE, device="cuda")
    alone = torch.empty(2, SIDE, SIDE, device="cuda")
    state: Any = {parameter: {"momentum_buffer": part} for parameter, part in zip(parameters, flat)}
    state[parameters[3]] = {"momentum_buffer": alone[0], "again": alone[0][:], "whole": alone}
    state[parameters[4]] = {"momentum_buffer": alone[1], "again": state[parameters[3]]["momentum_buffer"]}
    optimizer.state.update(state)
    del state, alone
    before = torch_uvm.memory_info()
    with torch_uvm.offload_optimizer(optimizer):
        assert torch_uvm.memory_info().populated_host - before.populated_host >= 2 * UNIT
        fourth, fifth = (optimizer.state[parameter] for parameter in parameters[3:5])
        fourth["whole"].copy_(torch.stack([contents(7), contents(8)]))
        for found in (fourth["momentum_buffer"], fourth["again"], fifth["again"]):
            check(found, 7)
        check(fifth["momentum_buffer"], 8)
        fourth["again"].copy_(contents(9))
        check(fourth["whole"][0], 9)
        for seed, part in enumerate(flat):
            part.copy_(contents(seed))
        for seed, parameter in enumerate(parameters[:3]):
            check(optimizer.state[parameter]["momentum_buffer"], seed)


@on_device(uvm_only=True)
def test_training_with_everything() -> None:
    """Weights, gradients and state in host memory; a step that PyTorch does not count is seen by the next pass."""
    model = stack(8)
    with torch_uvm.stream_weights(model, device_bytes=4 * UNIT, gradients="host"):
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        torch_uvm.offload_optimizer(optimizer)
        for number in range(3):
            model(ones(True)).backward(ones())
            optimizer.step()
            for index, layer in enumerate(model):
                layer.weight.data.copy_(contents(100 * number + index))  # what the kernel would have written
            optimizer.zero_grad()
            with torch.no_grad():
                model(ones())
            check_read(model, [100 * number + index for index in range(8)])
