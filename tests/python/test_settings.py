"""Settings that a running program makes: `torch.cuda.memory._set_allocator_settings`."""

from __future__ import annotations

import warnings

import pytest
import torch
from contents import MIB, block, check, filled, same
from on_device import on_device
from versions import LATER, needs, unknown_key


def settle(conf: str) -> None:
    """Makes settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a new name for the same
        torch.cuda.memory._set_allocator_settings(conf)


def refusal(conf: str) -> str:
    """What is said of settings that must be refused."""
    try:
        settle(conf)
    except (RuntimeError, ValueError) as error:
        return str(error)
    raise AssertionError(f"{conf} was accepted")


@on_device()
def test_pytorchs_keys() -> None:
    """They take effect from then on."""
    settle("max_split_size_mb:64")
    same(torch.cuda.memory._snapshot()["allocator_settings"]["max_split_size"], 64 * MIB)
    settle("roundup_power2_divisions:4")
    tensor = block(5 * MIB)
    same(torch.cuda.memory_allocated(), 5 * MIB)
    del tensor
    tensor = block(5 * MIB + 1)
    same(torch.cuda.memory_allocated(), 6 * MIB, "the next quarter of a power of two")
    check(filled(1, 3 * MIB), 1)
    del tensor


@on_device(uvm_only=True)
def test_our_keys_and_pytorchs_in_one_string() -> None:
    """Both take effect: here a capacity of 1 GiB, and blocks rounded to quarters of powers of two."""
    before = filled(1, 3 * MIB)
    settle("roundup_power2_divisions:4,use_uvm:True,uvm_oversubscription_ratio:0.5")
    tensor = block(5 * MIB + 1)
    same(torch.cuda.memory_allocated(), 9 * MIB)
    try:
        block(1100 * MIB)
    except torch.cuda.OutOfMemoryError as error:
        assert "uvm_oversubscription_ratio" in str(error), error
    else:
        raise AssertionError("1100 MiB under a capacity of 1024 MiB")
    if LATER["torch.accelerator.get_memory_info"]:
        same(torch.accelerator.get_memory_info()[1], 1024 * MIB)
    settle("use_uvm:True,uvm_oversubscription_ratio:5.0")
    check(filled(2, 1100 * MIB), 2)
    check(before, 1)
    del tensor


@pytest.mark.parametrize("others", ["", "max_split_size_mb:64,"])
@on_device(uvm_only=True)
def test_a_bad_value_at_run_time(others: str) -> None:
    """An error that names the key, the value and what is allowed; the settings stay as they were."""
    settle("max_split_size_mb:128")
    for setting, allowed in (
        ("uvm_oversubscription_ratio:none", "positive"),
        ("uvm_prefetch:1", "True or False"),
        ("uvm_access_pattern:sideways", "gpu_first, balanced, cpu_first"),
        ("use_uvm:maybe", "True or False"),
    ):
        text = refusal(others + setting)
        assert all(words in text for words in (*setting.split(":"), allowed)), text
    text = refusal(others + "uvm_oversubscription:5.0")
    assert "uvm_oversubscription" in text and "uvm_oversubscription_ratio" in text, text
    same(torch.cuda.memory._snapshot()["allocator_settings"]["max_split_size"], 128 * MIB)
    check(filled(1, 3 * MIB), 1)


@on_device(uvm_only=True)
def test_pytorchs_bad_keys_at_run_time() -> None:
    """Beside ours: PyTorch's words, and nothing of ours takes effect."""
    text = refusal("max_spilt_size_mb:64,uvm_oversubscription_ratio:0.01")
    assert unknown_key("max_spilt_size_mb") in text, text
    check(filled(1, 100 * MIB), 1)


@needs("throw_on_cudamalloc_oom:…")
@on_device()
def test_refusing_early_at_run_time() -> None:
    """`throw_on_cudamalloc_oom` can be set at any time; a value that is neither True nor False is an error."""
    torch.cuda.set_per_process_memory_fraction(0.25)
    settle("throw_on_cudamalloc_oom:True")
    assert "maybe" in refusal("throw_on_cudamalloc_oom:maybe")
    check(filled(1, 100 * MIB), 1)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        block(1024 * MIB)
