"""Which allocator a process has."""

from __future__ import annotations

import simulated
import torch
from on_device import about_uvm, for_backend, on_device
from simulated import UVM, environment, run_python

REPORT = """
import torch
tensor = torch.empty(3 << 20, dtype=torch.uint8, device="cuda")
tensor.copy_(torch.arange(3 << 20, dtype=torch.int64).to(torch.uint8))
assert torch.equal(tensor.cpu(), torch.arange(3 << 20, dtype=torch.int64).to(torch.uint8))
print("backend", torch.cuda.get_allocator_backend(), torch.cuda.memory_reserved())
"""


@on_device(uvm_only=True)
def test_the_backend_is_named_uvm() -> None:
    """After any number of uses."""
    assert torch.cuda.get_allocator_backend() == "uvm"
    torch.empty(1, device="cuda")
    assert torch.cuda.get_allocator_backend() == "uvm"


def test_without_the_option_nothing_changes() -> None:
    """The off switch: no variable, and `use_uvm:False`, give PyTorch's native allocator with its 20 MiB segments."""
    for conf in ("", "use_uvm:False", "max_split_size_mb:64"):
        ended = run_python(REPORT, environment(for_backend(conf), require=True))
        assert ended.status == 0, ended.text
        assert ended.out.split() == ["backend", "native", str(20 << 20)], ended.text
        assert not ended.err, ended.text


@about_uvm
def test_use_uvm_chooses_the_backend() -> None:
    """The variable alone suffices; other keys may stand beside it, with spaces."""
    for conf in ("use_uvm:True", UVM, "max_split_size_mb:64, use_uvm : True, uvm_prefetch:False"):
        ended = run_python(REPORT, environment(conf, require=True))
        assert ended.status == 0, ended.text
        assert ended.out.split()[:2] == ["backend", "uvm"], ended.text
        assert not ended.err, ended.text


@about_uvm
def test_the_variable_for_all_accelerators() -> None:
    """PYTORCH_ALLOC_CONF, which PyTorch itself reads from 2.9 on only; where both speak, the CUDA variable wins."""
    for general, cuda, expected in (
        ("use_uvm:True", "", "uvm"),
        ("use_uvm:True,uvm_prefetch:False", "max_split_size_mb:64", "uvm"),
        ("use_uvm:True", "use_uvm:False", "native"),
        ("use_uvm:False", "use_uvm:True", "uvm"),
    ):
        ended = run_python(REPORT, environment(cuda, require=True, PYTORCH_ALLOC_CONF=general))
        assert ended.status == 0, ended.text
        assert ended.out.split()[:2] == ["backend", expected], f"{general} and {cuda}\n{ended.text}"


def test_the_other_backend_still_works() -> None:
    """`backend:cudaMallocAsync` is PyTorch's business as before."""
    code = "import torch; torch.empty(10, device='cuda'); print(torch.cuda.get_allocator_backend())"
    ended = run_python(code, environment("backend:cudaMallocAsync", require=True))
    assert ended.status == 0 and "cudaMallocAsync" in ended.out, ended.text


@about_uvm
def test_the_demonstration() -> None:
    """The program of `cargo xtask demo` ends well, with everything it promises to show."""
    source = f"import runpy, sys; sys.argv = ['demo.py']; runpy.run_path({str(DEMO)!r}, run_name='__main__')"
    ended = run_python(source, environment(UVM, require=True), timeout=300)
    assert ended.status == 0, ended.text
    for words in ("OutOfMemoryError: CUDA out of memory", "PyTorch CUDA memory summary", "allocator backend: uvm"):
        assert words in ended.out, ended.text


DEMO = simulated.HERE / "demo.py"
