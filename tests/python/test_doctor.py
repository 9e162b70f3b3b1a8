"""`python -m torch_uvm doctor`: what it finds on simulated machines, and on those where something is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated import HERE, Finished, environment
from under_test import torch_uvm

from torch_uvm import _doctor, _library, _machine

#: Whether the allocator can be had in this environment: the plug-in is installed, or PyTorch is patched.
PATCHED = isinstance(_library.running(), _library.Library) and not isinstance(_library.running(), _library.Plugin)
PLUGIN = any(point.value.startswith("torch_uvm.") for point in entry_points(group="torch.backends"))
only_with_uvm = pytest.mark.skipif(
    not (PATCHED or PLUGIN), reason="neither a patched PyTorch nor the plug-in's wheel is installed"
)
only_with_the_plugin = pytest.mark.skipif(PATCHED or not PLUGIN, reason="about the plug-in beside a stock PyTorch")

#: Modules that stand in for PyTorch where something is wrong with it.
BROKEN = {
    "missing": "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')",
    "failing": "raise ImportError('libnccl.so.2: cannot open shared object file')",
    "too new": """
try:
    raise RuntimeError('use_uvm: PyTorch 2.99.0 is not supported by this torch-uvm')
except RuntimeError as error:
    raise RuntimeError('Failed to load the backend extension: torch_uvm.') from error
""",
    "crashing": "import os; os.abort()",
    "noisy": "print('[1, 2]'); print('no JSON'); raise ImportError('after all')",
}


def doctor(variables: dict[str, str], *arguments: str) -> Finished:
    """Runs the command; fails if it ends in a traceback or in any other status than 0 and 1."""
    path = os.pathsep.join(filter(None, (variables.get("PYTHONPATH"), str(Path(torch_uvm.__file__).parent.parent))))
    done = subprocess.run(
        [sys.executable, "-m", "torch_uvm", "doctor", *arguments],
        env={**variables, "PYTHONPATH": path},
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=300,
    )
    ended = Finished(done.returncode, done.stdout, done.stderr)
    assert ended.status in (0, 1) and not ended.err, ended.text
    return ended


def findings(variables: dict[str, str]) -> dict[str, Any]:
    """What the command finds; its status and its report must agree."""
    ended = doctor(variables, "--json")
    found = json.loads(ended.out)
    assert (ended.status == 0) is found["works"], ended.text
    return found


def without_gpu() -> dict[str, str]:
    """A machine without CUDA: this one, with nothing preloaded."""
    kept = ("LD_PRELOAD", "LD_LIBRARY_PATH", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    return {name: value for name, value in os.environ.items() if name not in kept}


@only_with_uvm
def test_where_it_is_on() -> None:
    """Options and limits are those that a program gets there; status 0."""
    found = findings(environment("use_uvm:True,uvm_device_limit_mb:700,uvm_oversubscription_ratio:3", require=True))
    assert found["active"] and found["works"] and found["added"] is None, found
    assert found["verdict"] == "use_uvm is on, and works here"
    assert found["here"]["options"]["uvm_device_limit_mb"] == 700
    (info,) = found["here"]["devices"]
    assert info["device_limit"] == 700 << 20 and info["device_total"] == 2 << 30, info
    assert info["capacity"] == 3 * (2 << 30), info
    (gpu,) = found["cuda"]["gpus"]
    assert "GH200" in gpu["name"] and gpu["memory"] == 2 << 30 and gpu["concurrent_managed_access"], gpu
    assert found["host"]["memory_total"] == 10 << 30 and found["cuda"]["simulated"], found


@only_with_uvm
def test_where_it_is_off_and_would_work() -> None:
    """Status 0, what to set, and what the options would resolve to; settings that are there stay."""
    found = findings(environment("max_split_size_mb:64,uvm_device_limit_mb:700", require=True))
    assert not found["active"] and found["works"], found
    assert found["verdict"].startswith("use_uvm is off, and would work here."), found["verdict"]
    assert "Set PYTORCH_CUDA_ALLOC_CONF=use_uvm:True" in found["verdict"]
    assert found["added"]["options"]["uvm_device_limit_mb"] == 700
    assert found["added"]["devices"][0]["device_limit"] == 700 << 20
    switched_off = findings(environment("use_uvm:False", require=True))
    assert not switched_off["active"] and switched_off["works"], switched_off


@only_with_uvm
def test_for_people() -> None:
    """The same in words: machine, PyTorch, what works, options, memory, verdict."""
    ended = doctor(environment("use_uvm:True", require=True, device="gh200", hbm=None, host=None, devices=2))
    assert ended.status == 0, ended.text
    for words in (
        "NVIDIA GH200 480GB",
        "GPU 1",
        f"{torch.__version__}, CUDA {torch.version.cuda}",
        "through the host's page tables yes",
        "oversubscription          yes",
        "hardware coherence        yes",
        "uvm_oversubscription_ratio",
        "Memory of GPU 1",
        "capacity",
        "simulated device",
    ):
        assert words in ended.out, f"{words}\n{ended.text}"
    assert ended.out.rstrip().endswith("use_uvm is on, and works here"), ended.text
    assert max(map(len, ended.out.splitlines())) < 200, ended.text


@only_with_uvm
def test_a_wrong_setting() -> None:
    """Status 1, with the allocator's words."""
    found = findings(environment("use_uvm:True,uvm_prefetch:maybe", require=True))
    assert not found["works"], found
    for words in ("uvm_prefetch", "maybe", "True or False"):
        assert words in found["verdict"], found["verdict"]


@only_with_uvm
def test_misspelled_keys() -> None:
    """What was meant is suggested; an unknown key of ours gets the list."""
    found = findings(environment("use_umv:True,uvm_devices_limit_mb:100,uvm_zzz:1", require=True))
    notes = "\n".join(found["notes"])
    assert "use_umv is unknown. Is use_uvm meant?" in notes, notes
    assert "uvm_devices_limit_mb is unknown. Is uvm_device_limit_mb meant?" in notes, notes
    assert "uvm_zzz is unknown. The options are use_uvm, uvm_oversubscription_ratio" in notes, notes
    assert not found["works"], "PyTorch or the allocator refuses such keys"


@pytest.mark.parametrize("conf", ["max_split_size_mb:64,\n use_uvm:True", "use_uvm:True\r\n", "use_uvm\t: True,"])
@only_with_the_plugin
def test_white_space(conf: str) -> None:
    """Settings on several lines, from files with other line ends, with tabs: they are nothing to remark on."""
    found = findings(environment(conf, require=True))
    assert found["active"] and found["works"], found["verdict"]
    assert not [note for note in found["notes"] if "ALLOC_CONF" in note], found["notes"]


@pytest.mark.parametrize(
    ("conf", "words"),
    [
        ("use_uvm", "'use_uvm' has no colon between its key and its value. Is use_uvm:True meant?"),
        ("use_uvm=True", "'use_uvm=True' has no colon between its key and its value. Is use_uvm:True meant?"),
        ("use_uvm:True,max_split_size_mb=64", "'max_split_size_mb=64' has no colon"),
    ],
)
@only_with_uvm
def test_a_key_without_a_colon(conf: str, words: str) -> None:
    """PyTorch may end the process for it, with a stack of C++ functions: the finding is what to write instead."""
    found = findings(environment(conf, require=True))
    assert not found["works"] and "frame #" not in found["verdict"], found["verdict"]
    assert any(words in note for note in found["notes"]), found["notes"]
    if not found["active"]:
        assert words in found["verdict"], found["verdict"]


def test_the_last_words_of_a_process() -> None:
    """A C++ exception's text comes before a stack of many lines."""
    thrown = (
        "terminate called after throwing an instance of 'c10::Error'\n  what():  Index out of bounds\nframe #0: f()\n"
    )
    assert _doctor._last_words(thrown) == "Index out of bounds"
    assert _doctor._last_words("first\nlast\n") == "last"
    assert _doctor._last_words("") == "it said nothing"


@pytest.mark.parametrize(
    ("conf", "count"),
    [
        ("", 0),
        ("use_uvm:True,", 0),
        ("roundup_power2_divisions:[256:1,512:2],use_uvm:True", 0),
        ("expandable_segments_reserve_by_class:[a,b]", 0),
        ("use_uvm:True,,uvm_prefetch:True", 1),
        (",use_uvm:True", 1),
        ("use_uvm,uvm_prefetch", 2),
    ],
)
def test_items_that_are_none(conf: str, count: int) -> None:
    """Each is named; brackets may hold what they like."""
    assert len(list(_doctor._malformed({"PYTORCH_CUDA_ALLOC_CONF": conf}))) == count


@only_with_uvm
def test_a_gpu_without_concurrent_managed_access() -> None:
    """Status 1, and what does work there."""
    found = findings(environment("use_uvm:True", require=True, TORCH_UVM_SIM_CONCURRENT="0"))
    assert not found["works"] and "concurrent managed access" in found["verdict"], found["verdict"]
    works = {capability["name"]: capability["works"] for capability in found["capabilities"][0]}
    assert works["uvm allocator"] and not works["oversubscription"] and not works["prefetch"], works
    device = "use_uvm:True,uvm_access_pattern:device"
    assert findings(environment(device, require=True, TORCH_UVM_SIM_CONCURRENT="0"))["works"]


@pytest.mark.parametrize(
    ("device", "coherent", "integrated"), [("gh200", True, False), ("h100", False, False), ("gb10", True, True)]
)
def test_what_a_machine_is(device: str, coherent: bool, integrated: bool) -> None:
    """From the attributes of its GPU, whatever else works."""
    found = findings(environment("", require=True, device=device, hbm=None, host=None))
    (gpu,) = found["cuda"]["gpus"]
    assert (gpu["pageable_memory_access"] and gpu["host_page_tables"], gpu["integrated"]) == (coherent, integrated), gpu
    works = {capability["name"]: capability["works"] for capability in found["capabilities"][0]}
    assert works["hardware coherence"] is coherent and works["oversubscription"], works


def test_without_a_gpu() -> None:
    """Status 1, and the reason; PyTorch is described all the same."""
    found = findings(without_gpu())
    assert not found["works"] and not found["cuda"]["gpus"] and found["capabilities"] == [], found
    assert found["here"]["torch_version"] == torch.__version__, found
    if PATCHED or PLUGIN:
        assert "no CUDA driver" in found["verdict"], found["verdict"]
    doctor(without_gpu())


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_pytorch(kind: str, tmp_path: Path) -> None:
    """Missing, failing, crashing: the reason is in the verdict, and the machine is described."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(BROKEN[kind])
    variables = {**environment("use_uvm:True", require=True), "PYTHONPATH": str(tmp_path)}
    found = findings(variables)
    expected = {
        "missing": "PyTorch is not installed",
        "failing": "libnccl.so.2",
        "too new": "use_uvm: PyTorch 2.99.0 is not supported",
        "crashing": "status -6",
        "noisy": "after all",
    }
    assert not found["works"] and expected[kind] in found["verdict"], found["verdict"]
    assert "GH200" in found["cuda"]["gpus"][0]["name"], found
    assert expected[kind] in doctor(variables).out


@only_with_the_plugin
def test_autoload_switched_off() -> None:
    """It would work, and why it is not on."""
    found = findings(environment("use_uvm:True", require=True, TORCH_DEVICE_BACKEND_AUTOLOAD="0"))
    assert not found["active"] and found["works"], found
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in found["verdict"], found["verdict"]


def test_bad_arguments() -> None:
    """argparse's status, and the command's help."""
    for arguments in ([], ["no-such-command"], ["doctor", "--no-such-option"]):
        done = subprocess.run(
            [sys.executable, "-m", "torch_uvm", *arguments],
            env={**without_gpu(), "PYTHONPATH": str(Path(torch_uvm.__file__).parent.parent)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and "usage: python -m torch_uvm" in done.stderr, done


def test_extended_gpu_memory() -> None:
    """Read where the addresses are shown, unknown where they are hidden."""
    shown = "00000000-7fffffff : System RAM\n80000000-bfffffff : System RAM (NVIDIA)\n  80000000-8fffffff : within\n"
    assert _machine.egm(shown) == 1 << 30
    assert _machine.egm("00001000-7fffffff : System RAM\n") == 0
    assert _machine.egm("00000000-00000000 : System RAM\n00000000-00000000 : System RAM (NVIDIA)\n") is None
    assert _machine.egm("") is None


def test_cgroup_limits(tmp_path: Path) -> None:
    """The tightest one above the process, of either version; no limit is None."""
    version2 = tmp_path / "v2"
    (version2 / "a" / "b").mkdir(parents=True)
    for folder, limit, usage in ((version2 / "a", "3000", "2000"), (version2 / "a" / "b", "max", "1000")):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text(usage + "\n")
    assert _machine._cgroup(version2, "0::/a/b\n") == (3000, 2000)
    assert _machine._cgroup(version2, "0::/\n") == (None, None)
    (version2 / "a" / "b" / "memory.high").write_text("500\n")
    assert _machine._cgroup(version2, "0::/a/b\n") == (500, 1000)
    version1 = tmp_path / "v1"
    (version1 / "memory" / "job").mkdir(parents=True)
    (version1 / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (version1 / "memory" / "job" / "memory.limit_in_bytes").write_text("4096\n")
    (version1 / "memory" / "job" / "memory.usage_in_bytes").write_text("7\n")
    assert _machine._cgroup(version1, "5:cpu:/job\n4:memory:/job\n") == (4096, 7)
    # A container that sees its own cgroup at the root of the mount.
    (version1 / "memory" / "memory.limit_in_bytes").write_text("8192\n")
    (version1 / "memory" / "memory.usage_in_bytes").write_text("9\n")
    assert _machine._cgroup(version1, "4:memory:/somewhere/else\n") == (8192, 9)
