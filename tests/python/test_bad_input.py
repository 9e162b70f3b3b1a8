"""Wrong settings and wrong arguments: each is an error that names the key, the value and what is allowed; the process
lives on and ends normally."""

from __future__ import annotations

import pytest
import torch
import versions
from contents import MIB, check, filled, same
from on_device import about_uvm, on_device
from simulated import environment, run_python

# Importing must work, the first use of CUDA's memory fails, and so does the next: each time with the same words. The
# process ends by itself.
PROVOKE = """
import torch
for attempt in range(2):
    try:
        torch.empty(1 << 20, device="cuda")
    except (RuntimeError, ValueError) as error:
        print("refused:", type(error).__name__, error)
    else:
        print("accepted")
print("cpu", torch.ones(2).sum().item())
"""


def refusal(conf: str, **machine: object) -> str:
    """What a process with this configuration says; fails unless it refuses and ends normally."""
    ended = run_python(PROVOKE, environment(conf, require=True, **machine))
    assert ended.status == 0, ended.text
    assert ended.out.count("refused:") == 2 and "accepted" not in ended.out, ended.text
    assert "cpu 2.0" in ended.out, ended.text
    assert "INTERNAL ASSERT" not in ended.out, ended.text
    return ended.out


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ("uvm_oversubscription_ratio:0", "positive"),
        ("uvm_oversubscription_ratio:-1.5", "positive"),
        ("uvm_oversubscription_ratio:NaN", "positive"),
        ("uvm_oversubscription_ratio:abc", "positive"),
        ("uvm_oversubscription_ratio:inf", "positive"),
        ("uvm_access_pattern:sideways", "gpu_first, balanced, cpu_first"),
        ("uvm_prefetch:1", "True or False"),
        ("uvm_prefetch_threshold_mb:-1", "MiB"),
        ("uvm_device_limit_mb:0", "MiB"),
        ("uvm_device_limit_mb:99999999999999999999", "MiB"),
        ("uvm_host_reserve_mb:lots", "MiB"),
        ("uvm_stage1_threshold:1.5", "0 to 1"),
        ("uvm_stage1_min_bytes:1.5", "bytes"),
    ],
)
@on_device("use_uvm:True,{setting}", uvm_only=True, init=False)
def test_a_bad_value(setting: str, allowed: str) -> None:
    """The error names the key, the value and what is allowed, at the first use of CUDA's memory and at every other."""
    for _ in range(2):
        try:
            torch.empty(1 << 20, device="cuda")
        except (RuntimeError, ValueError) as error:
            text = str(error)
        else:
            raise AssertionError(f"{setting} was accepted")
        assert all(words in text for words in (*setting.split(":"), allowed)), text
        assert "INTERNAL ASSERT" not in text, text
    same(torch.ones(2).sum().item(), 2.0)


@about_uvm
def test_a_bad_value_in_the_variable_for_all_accelerators() -> None:
    """PYTORCH_ALLOC_CONF is read too, and the error says that it was there."""
    text = refusal("use_uvm:True", PYTORCH_ALLOC_CONF="uvm_oversubscription_ratio:none")
    assert all(words in text for words in ("PYTORCH_ALLOC_CONF", "uvm_oversubscription_ratio", "none", "positive")), (
        text
    )


@about_uvm
def test_an_unknown_key_of_ours() -> None:
    """The known ones are listed."""
    text = refusal("use_uvm:True,uvm_oversubscription:5.0")
    assert "uvm_oversubscription" in text and "uvm_oversubscription_ratio" in text and "uvm_access_pattern" in text, (
        text
    )


@about_uvm
def test_an_unknown_key_of_ours_without_use_uvm() -> None:
    """Also with the native allocator: a mistyped option must not pass in silence."""
    text = refusal("uvm_oversubscription:5.0")
    assert "uvm_oversubscription" in text, text


@about_uvm
def test_use_uvm_maybe() -> None:
    """Neither True nor False."""
    text = refusal("use_uvm:maybe")
    assert "use_uvm" in text and "maybe" in text and "True or False" in text, text


@pytest.mark.parametrize("conf", ["backend:cudaMallocAsync,use_uvm:True", "use_uvm:True,backend:cudaMallocAsync"])
@about_uvm
def test_two_backends(conf: str) -> None:
    """Either is fine; both are not, in whichever order."""
    text = refusal(conf)
    assert "backend" in text and "cudaMallocAsync" in text and "use_uvm" in text, text


@about_uvm
def test_native_and_use_uvm() -> None:
    """PyTorch alone would end in an internal assertion here."""
    text = refusal("use_uvm:True,backend:native")
    assert "backend" in text and "native" in text and "use_uvm" in text, text


@about_uvm
def test_pytorchs_own_bad_keys_stay_pytorchs() -> None:
    """An unknown key that is not ours: PyTorch's words."""
    text = refusal("use_uvm:True,max_spilt_size_mb:64")
    assert versions.unknown_key("max_spilt_size_mb") in text, text


@about_uvm
def test_a_device_without_concurrent_managed_access() -> None:
    """As on Windows, WSL and Tegra: the error says what is missing and what works instead."""
    text = refusal("use_uvm:True", TORCH_UVM_SIM_CONCURRENT="0")
    assert "concurrent managed access" in text.lower() or "ConcurrentManagedAccess" in text, text


@about_uvm
def test_device_placement_without_concurrent_managed_access() -> None:
    """Plain device memory needs no managed access."""
    code = """
import torch
tensor = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
tensor.copy_(torch.ones(1 << 20, dtype=torch.uint8))
assert tensor.cpu().sum().item() == 1 << 20
print(torch.cuda.get_allocator_backend())
"""
    conf = "use_uvm:True,uvm_access_pattern:device"
    ended = run_python(code, environment(conf, require=True, TORCH_UVM_SIM_CONCURRENT="0"))
    assert ended.status == 0 and ended.out.split() == ["uvm"], ended.text


@on_device()
def test_freeing_an_unknown_pointer() -> None:
    """An error that names the address; the allocator goes on, and a second free of a block is one too."""
    kept = filled(1, 3 * MIB)
    for address in (0xDEAD000, kept.data_ptr() + 512):
        try:
            torch.cuda.caching_allocator_delete(address)
        except RuntimeError as error:
            assert f"{address:x}" in str(error).lower(), error
        else:
            raise AssertionError(f"{address:#x} was freed")
    address = torch.cuda.caching_allocator_alloc(5 * MIB)
    torch.cuda.caching_allocator_delete(address)
    try:
        torch.cuda.caching_allocator_delete(address)
    except RuntimeError as error:
        assert f"{address:x}" in str(error).lower(), error
    else:
        raise AssertionError("a block was freed twice")
    check(kept, 1)
    check(filled(2, 5 * MIB), 2)
    same(torch.cuda.memory_allocated(), 3 * MIB)


@on_device()
def test_freeing_nothing() -> None:
    """A null pointer is no error."""
    torch.cuda.caching_allocator_delete(0)
    check(filled(1, MIB), 1)


@on_device()
def test_bad_arguments() -> None:
    """Devices that are not there, fractions that are none, pools that are gone."""
    calls = {
        "a fraction of 1.5": lambda: torch.cuda.set_per_process_memory_fraction(1.5),
        "a fraction below 0": lambda: torch.cuda.set_per_process_memory_fraction(-0.5),
        "device 7": lambda: torch.empty(1, device="cuda:7"),
    }
    if versions.UNBEGUN_CAPTURE_ENDS_WELL:
        calls["the end of a capture that never began"] = lambda: torch.cuda.CUDAGraph().capture_end()
    for what, call in calls.items():
        try:
            call()
        except (RuntimeError, ValueError, AssertionError, OverflowError):
            pass
        else:
            raise AssertionError(f"{what} was accepted")
    check(filled(1, MIB), 1)


@on_device(uvm_only=True)
def test_a_negative_size() -> None:
    """Where native wraps around and hands a small block out, this is an error."""
    for count in (-1, -512, -(2**40)):
        try:
            torch.cuda.caching_allocator_alloc(count)
        except (RuntimeError, ValueError):  # newer PyTorch looks itself
            pass
        else:
            raise AssertionError(f"{count} bytes were allocated")
    check(filled(1, MIB), 1)
    same(torch.cuda.memory_allocated(), 0)


@on_device()
def test_statistics_of_a_device_that_is_not_there() -> None:
    """An error, not a crash."""
    for call in (
        torch.cuda.memory_stats,
        torch.cuda.reset_peak_memory_stats,
        torch.cuda.reset_accumulated_memory_stats,
    ):
        try:
            call(5)
        except (RuntimeError, AssertionError):
            pass
        else:
            raise AssertionError(f"{call.__name__} of device 5 was accepted")
    check(filled(1, MIB), 1)
