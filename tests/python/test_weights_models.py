"""Models of all kinds, copies of them, and code that inspects, transforms, traces or compiles them."""

from __future__ import annotations

import copy
import inspect
import io
import re
import tempfile
from typing import Any

import pytest
import torch
from contents import same
from on_device import on_device
from streamed import (
    SIDE,
    UNIT,
    Linear,
    a_row,
    check,
    check_read,
    contents,
    copied,
    linears,
    ones,
    stack,
    write,
)
from torch import nn
from under_test import torch_uvm
from versions import needs


@on_device(uvm_only=True)
def test_small_other_and_strange_parameters() -> None:
    """Small ones stay, tables are read where they lie or stay, layouts are kept, buffers come along."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(contents(1).t())
            self.b = nn.Parameter(contents(2).view(SIDE, 64, 2, 4).to(memory_format=torch.channels_last))
            self.c = nn.Parameter(torch.arange(5, dtype=torch.float64))
            self.e = nn.Parameter(torch.empty(0))
            self.register_buffer("d", torch.arange(7))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            same((self.a.stride(), self.b.stride()), ((1, SIDE), (512, 1, 256, 64)))
            self.read = [copied(self.a.t()), copied(self.b.permute(0, 2, 3, 1)), copied(self.c), self.d]
            return x

    table = nn.Embedding(SIDE, SIDE)
    blocks = nn.ModuleList(Block() for _ in range(4))
    model = nn.ModuleDict({"table": table, "blocks": blocks, "norm": nn.LayerNorm(8)})
    with torch_uvm.stream_weights(model, device_bytes=7 * UNIT) as stream, torch.no_grad():
        found = stream.statistics()
        same((found.units, found.remote_bytes), (4, UNIT))
        for _ in range(2):
            for block in blocks:
                block(ones())
                a, b, c, d = block.read
                check(a, 1)
                check(b.cpu().permute(0, 3, 1, 2).contiguous().view(SIDE, SIDE), 2)
                same(c.tolist(), [0.0, 1.0, 2.0, 3.0, 4.0])
                assert d.is_cuda
    assert all(parameter.is_cuda for parameter in model.parameters())


@on_device(uvm_only=True)
def test_copies_and_pickles() -> None:
    """Of a model that streams do not stream."""
    model = stack(5)
    with torch_uvm.stream_weights(model, device_bytes=3 * UNIT) as stream:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        fetches = stream.statistics().fetches
        for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            other[2].weight.data.copy_(contents(40))
            other(ones())
            check_read(other, [0, 1, 40, 3, 4])
        same(stream.statistics().fetches, fetches)
        model(ones())
        check_read(model)


@on_device(uvm_only=True, timeout=120)
@pytest.mark.parametrize("how", ["blocks", "in place", "whole"])
def test_compiled(how: str) -> None:
    """Blocks that torch.compile has wrapped, and models around units."""

    class Own(nn.Linear):  # torch.compile does not begin at the forward of one of PyTorch's modules
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight) * 2

    model = nn.Sequential(*(Own(SIDE, SIDE, bias=False) for _ in range(5)))
    counted: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        counted.append(len(graph.graph.nodes))
        return graph.forward

    run: Any = model
    if how == "blocks":
        model = run = nn.Sequential(*(torch.compile(layer, backend=backend) for layer in model))
    elif how == "in place":
        for layer in model:
            layer.compile(backend=backend)
    stream = torch_uvm.stream_weights(model, device_bytes=3 * UNIT)
    if how == "whole":
        run = torch.compile(model, backend=backend)
    for _ in range(3):
        run(torch.ones(4, SIDE, device="cuda", requires_grad=True)).sum().backward()
    found = stream.statistics()
    same(found.streamed_units, 5)
    assert found.fetches >= 3 * (5 + 2), found
    same(len(counted) > 0, True, "something was compiled")
    assert max(counted) <= 6, f"{counted} nodes: our own functions were compiled too"
    stream.remove()


def a_square() -> torch.Tensor:
    """Another one."""
    return torch.empty(SIDE, SIDE, device="cuda")


@on_device(uvm_only=True)
def test_each_weight_has_its_own_storage() -> None:
    """What looks for weights that share memory, such as safetensors' save_model, finds what it found before."""
    model = linears()
    with torch_uvm.stream_weights(model, device_bytes=4 * UNIT) as stream:
        assert stream.statistics().streamed_units
        for name, parameter in model.named_parameters():
            storage = parameter.untyped_storage()
            same((storage.data_ptr(), storage.nbytes()), (parameter.data_ptr(), parameter.numel() * 4), name)
        try:
            import safetensors.torch
        except ImportError:
            return
        with tempfile.TemporaryDirectory() as folder:
            safetensors.torch.save_model(model, f"{folder}/model.safetensors")
            loaded = safetensors.torch.load_file(f"{folder}/model.safetensors")
        for name, parameter in model.named_parameters():
            assert torch.equal(loaded[name], parameter.detach().cpu()), name


def functional(model: nn.Module) -> Any:
    """The model as a function of its parameters, as `torch.func` wants it."""
    parameters = dict(model.named_parameters())
    return parameters, lambda given: torch.func.functional_call(model, given, (a_row(),)).sum()


def without_hooks(model: nn.Module) -> torch.Size:
    """A forward where PyTorch forbids saved-tensor hooks."""
    with torch.autograd.graph.disable_saved_tensors_hooks("none"):
        return model(a_row()).shape


TRANSFORMS = {
    "grad of parameters": lambda model: len(torch.func.grad(functional(model)[1])(functional(model)[0])),
    "grad of inputs": lambda model: torch.func.grad(lambda x: model(x).sum())(a_row()).shape,
    "jvp": lambda model: torch.func.jvp(model, (a_row(),), (a_row(),))[1].shape,
    "vmap": lambda model: torch.func.vmap(model)(a_row()).shape,
    "hessian": lambda model: torch.func.hessian(lambda x: model(x).sum())(a_row()).shape,
    "no saved-tensor hooks": lambda model: without_hooks(model),
}


@on_device(uvm_only=True)
@pytest.mark.parametrize("what", sorted(TRANSFORMS))
def test_transforms(what: str) -> None:
    """torch.func's read the weights where they lie, and write no slot."""
    model = linears()
    expected = TRANSFORMS[what](model.cuda())
    with torch_uvm.stream_weights(model, device_bytes=4 * UNIT) as stream:
        same(TRANSFORMS[what](model), expected)
        same(stream.statistics().fetches, 0)
        model(a_row())
        assert stream.statistics().fetches > 0


def exported(model: nn.Module) -> Any:
    """As torch.export does it by default since 2.7."""
    return torch.export.export(model, (a_square(),), strict=False).module()


def made_fx(model: nn.Module) -> Any:
    """A graph of ATen's operators."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(model)(a_square())


TRACERS = {
    "trace": lambda model: torch.jit.trace(model, (a_square(),), check_trace=False),
    "export": exported,
    "make_fx": made_fx,
}


@on_device(uvm_only=True, timeout=120)
@pytest.mark.parametrize("what", sorted(TRACERS))
def test_tracers(what: str) -> None:
    """See the model's own forward. What they make holds no slot: it reads weights where they lie, later changes too."""

    class Copying(nn.Module):
        """Its forward is one that the simulated device computes."""

        def __init__(self, seed: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(contents(seed), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.copy_(self.weight)

    model: Any = nn.Sequential(*(Copying(seed) for seed in range(5)))
    x = a_square()
    with torch_uvm.stream_weights(model, device_bytes=3 * UNIT) as stream:
        made = TRACERS[what](model)
        same(stream.statistics().fetches, 0)
        write(model, "4.weight", 44)
        check(made(x), 44)
        model(x)
        assert stream.statistics().fetches > 0


@needs("the reason why Dynamo leaves a function out")
@on_device(uvm_only=True, timeout=120)
def test_strict_export() -> None:
    """Works or says why not, and what to do."""
    model = linears()
    with torch_uvm.stream_weights(model, device_bytes=4 * UNIT):
        try:
            torch.export.export(model, (a_row(),), strict=True)
        except Exception as error:
            assert re.search(r"torch_uvm\.stream_weights\(\).*strict=False", str(error)), error


@on_device(uvm_only=True)
def test_script() -> None:
    """It reads source code: an error that says what to do."""
    model = linears()
    with torch_uvm.stream_weights(model, device_bytes=4 * UNIT):
        with pytest.raises(AttributeError, match=r"torch.jit.script cannot .* call remove\(\) first"):
            torch.jit.script(model)
        with pytest.raises(AttributeError, match=r"torch.jit.script cannot .* call remove\(\) first"):
            torch.jit.script(model[1])
    same(torch.jit.script(model)(a_row()).shape, (2, SIDE))


@on_device(uvm_only=True)
def test_the_forward_that_stands_in() -> None:
    """Looks like the module's own to code that inspects it."""
    model = linears()
    signature, code = inspect.signature(model[0].forward), model[0].forward.__code__
    with torch_uvm.stream_weights(model, device_bytes=4 * UNIT):
        forward = model[0].forward
        same((inspect.signature(forward), forward.__code__, forward.__name__), (signature, code, "forward"))
        assert forward.__self__ is model[0] and forward.__func__ is Linear.forward
        with pytest.raises(AttributeError):
            _ = forward.something


@on_device(uvm_only=True)
def test_no_capture() -> None:
    """A graph would replay slots that hold something else by then."""
    model = stack(5)
    with torch_uvm.stream_weights(model, device_bytes=3 * UNIT), torch.no_grad():
        model(ones())
        graph = torch.cuda.CUDAGraph()
        x = ones()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            graph.capture_begin()
            with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
                model(x)
            graph.capture_end()
        model(ones())
        check_read(model)
