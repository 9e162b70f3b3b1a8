"""How the plug-in gets into a stock PyTorch: the entry point, the environment variables, the processes that follow.

The first half needs neither PyTorch nor CUDA: a few lines stand in for PyTorch, and a library compiled from
cpp/torch_uvm/c_api.h for the plug-in's, so that what cannot be had otherwise (another version, a library that refuses)
can be tried. The second half runs the plug-in that is installed beside a stock PyTorch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
from simulated import HERE, UVM, Finished, environment, run_python

ROOT = HERE.parent.parent
PACKAGE = ROOT / "python" / "torch_uvm"

# A PyTorch of a few lines, whose setters write down what reaches them.
FAKE_TORCH = """
import builtins, os, sys, types
__version__ = os.environ.get("FAKE_TORCH_VERSION", "2.15.0+cu132")
version = types.SimpleNamespace(cuda=os.environ.get("FAKE_TORCH_CUDA", "13.2") or None, hip=None)
_C = types.ModuleType("torch._C")
parsed = []
def _accelerator_setAllocatorSettings(env):
    "PyTorch's words"
    if not isinstance(env, str):
        raise TypeError("PyTorch wants a str")
    parsed.append(env)
_C._accelerator_setAllocatorSettings = _accelerator_setAllocatorSettings
if os.environ.get("FAKE_TORCH_AUTOLOAD", "1") == "1":
    from torch_uvm._activate import autoload
    autoload()
"""

# A plug-in that does what the environment says.
FAKE_LIBRARY = r"""
#include <torch_uvm/c_api.h>

#include <cstdlib>
#include <cstring>
#include <string>

namespace {
thread_local std::string error = "no call has failed";
thread_local std::string answer;
std::string applied;
int number(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atoi(value) : otherwise;
}
int activated = 0;
} // namespace

int torch_uvm_c_api() {
  return number("FAKE_C_API", TORCH_UVM_C_API);
}
const char* torch_uvm_last_error() {
  return error.c_str();
}
int torch_uvm_torch_version() {
  return number("FAKE_COMPILED_FOR", 215);
}
int torch_uvm_enabled() {
  return activated == 1;
}
int torch_uvm_initialized() {
  return 0;
}
const char* torch_uvm_options() {
  if (std::getenv("FAKE_BAD_OPTIONS")) {
    error = "uvm_prefetch: 'x' is not allowed: expected True or False";
    return nullptr;
  }
  return "use_uvm:True,uvm_oversubscription_ratio:2.5,uvm_access_pattern:cpu_first,uvm_prefetch:False,"
         "uvm_prefetch_threshold_mb:0,uvm_host_reserve_mb:7,uvm_stage1_threshold:0.1,uvm_stage1_min_bytes:0";
}
int torch_uvm_memory_info(int device, torch_uvm_memory_info_t* info) {
  if (device != 0) {
    error = "device " + std::to_string(device) + " is not there";
    return -1;
  }
  for (size_t i = 0; i < sizeof(*info) / sizeof(uint64_t); ++i) {
    reinterpret_cast<uint64_t*>(info)[i] = (uint64_t{1} << 40) + i;
  }
  return 0;
}
int torch_uvm_set_pool_placement(int, uint64_t, uint64_t, const char*) {
  error = "there is no such pool";
  return -1;
}
int torch_uvm_activate() {
  activated = number("FAKE_ACTIVATE", 1);
  if (activated < 0) error = "CUDA was initialised too early";
  return activated;
}
const char* torch_uvm_check_settings(const char* settings) {
  if (std::strstr(settings, "uvm_prefetch:maybe")) {
    error = "uvm_prefetch: 'maybe' is not allowed: expected True or False";
    return nullptr;
  }
  answer = std::strstr(settings, "max_split_size_mb:64") ? "max_split_size_mb:64" : "";
  return answer.c_str();
}
int torch_uvm_apply_settings(const char* settings) {
  if (std::strstr(settings, "uvm_device_limit_mb:1")) {
    error = "uvm_device_limit_mb: too late";
    return -1;
  }
  applied += std::string("<") + settings + ">";
  return 0;
}
extern "C" __attribute__((visibility("default"))) const char* fake_applied() {
  return applied.c_str();
}
"""


@pytest.fixture(scope="session")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the module path: the package with a library for "2.15" and a PyTorch of a few lines."""
    folder = tmp_path_factory.mktemp("fakes")
    shutil.copytree(PACKAGE, folder / "torch_uvm", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(FAKE_TORCH)
    source = folder / "fake.cpp"
    source.write_text(FAKE_LIBRARY)
    libraries = folder / "torch_uvm" / "lib"
    libraries.mkdir()
    library = libraries / "libtorch_uvm_215.so"
    command = [os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-Wall", "-Werror", f"-I{ROOT / 'cpp'}"]
    subprocess.run([*command, "-o", str(library), str(source)], check=True, capture_output=True, text=True)
    (libraries / "libtorch_uvm_206.so").write_text("not a library")
    return folder


def run_fake(fakes: Path, code: str, conf: str = "use_uvm:True", **variables: str) -> Finished:
    """Runs code with the stand-ins for PyTorch and for the plug-in's library."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTORCH_", "TORCH_", "FAKE_"))}
    if conf:
        kept["PYTORCH_CUDA_ALLOC_CONF"] = conf
    return run_python(code, {**kept, "PYTHONPATH": str(fakes), **variables})


def printed(ended: Finished) -> Any:
    """What a process printed as JSON; fails unless it ended well and said nothing else."""
    assert ended.status == 0 and not ended.err, ended.text
    return json.loads(ended.out)


IMPORTED = """
import sys
import os, __future__, importlib.metadata, json, types  # what PyTorch has imported by then
before = set(sys.modules)
import torch
print(json.dumps(sorted(set(sys.modules) - before - {"torch"})))
"""


@pytest.mark.parametrize("conf", ["", "max_split_size_mb:64", "backend:cudaMallocAsync,pinned_use_uvmlike:True"])
def test_without_keys_of_ours_nothing_is_imported(fakes: Path, conf: str) -> None:
    """Every process that imports PyTorch pays for this: two tiny modules, and no library is loaded."""
    same = printed(run_fake(fakes, IMPORTED, conf))
    assert same == ["torch_uvm", "torch_uvm._activate"], same


def test_with_keys_of_ours_the_rest_is_imported(fakes: Path) -> None:
    """The test above can fail."""
    assert "torch_uvm._library" in printed(run_fake(fakes, IMPORTED, "use_uvm:True"))


def test_importing_the_package_imports_nothing(fakes: Path) -> None:
    """Not PyTorch either; every public name is there when it is asked for, and an unknown one is an AttributeError."""
    code = """
import sys
import __future__
before = set(sys.modules)
import torch_uvm
print(sorted(set(sys.modules) - before))
assert set(torch_uvm.__all__) <= set(dir(torch_uvm))
for name in set(torch_uvm.__all__) - {"MemPool", "placement", "empty_cache"}:  # these need the real torch.cuda
    assert getattr(torch_uvm, name) is not None, name
assert not hasattr(torch_uvm, "no_such_name")
"""
    ended = run_fake(fakes, code)
    assert ended.status == 0 and ended.out.strip() == "['torch_uvm']", ended.text


@pytest.mark.parametrize(
    ("conf", "ours"),
    [
        ("use_uvm:True", True),
        ("max_split_size_mb:64, use_ uvm : True", True),
        ("use_uvm:False", True),
        ("uvm_prefetch:True", True),
        ("uvm_no_such_key:1", True),
        ("use_uvm", True),
        ("", False),
        ("backend:native", False),
        ("use_uvm2:True,my_uvm_key:1", False),
        ("roundup_power2_divisions:[256:1,512:2]", False),
    ],
)
def test_which_keys_are_ours(conf: str, ours: bool) -> None:
    """`use_uvm` and whatever begins with `uvm_`, as the allocator has it; PyTorch drops spaces."""
    sys.path.insert(0, str(PACKAGE.parent))
    try:
        from torch_uvm._activate import has_our_keys
    finally:
        sys.path.remove(str(PACKAGE.parent))
    assert has_our_keys(conf) is ours


ENABLED = "import json, torch, torch_uvm; print(json.dumps(torch_uvm.is_enabled()))"


def test_the_entry_point_activates(fakes: Path) -> None:
    """Either variable; `is_enabled` says what the library says."""
    assert printed(run_fake(fakes, ENABLED)) is True
    assert printed(run_fake(fakes, ENABLED, "", PYTORCH_ALLOC_CONF="use_uvm:True")) is True
    assert printed(run_fake(fakes, ENABLED, FAKE_ACTIVATE="2")) is False
    assert printed(run_fake(fakes, ENABLED, "")) is False


def test_a_version_without_a_library(fakes: Path) -> None:
    """The error names this version, those that are supported, and what to do."""
    ended = run_fake(fakes, "import torch", FAKE_TORCH_VERSION="2.16.0+cu140")
    assert ended.status != 0 and "RuntimeError: use_uvm: PyTorch 2.16.0+cu140 is not supported" in ended.err, ended.text
    for words in ("2.6, 2.15", "Upgrade torch-uvm", "take use_uvm out of PYTORCH_CUDA_ALLOC_CONF"):
        assert words in ended.err, ended.text


@pytest.mark.parametrize("version", ["2.15.0a0+gitabc", "2.15.0.dev20261101+cu132", "2.15.0rc1"])
def test_a_pre_release(fakes: Path, version: str) -> None:
    """Its interface may be another one: a wrong guess would be a crash."""
    ended = run_fake(fakes, "import torch", FAKE_TORCH_VERSION=version)
    assert ended.status != 0 and f"PyTorch {version} is a pre-release" in ended.err, ended.text


def test_without_keys_an_unknown_version_is_no_error(fakes: Path) -> None:
    """Who does not use the allocator must not notice it."""
    ended = run_fake(fakes, "import torch", "max_split_size_mb:64", FAKE_TORCH_VERSION="3.0.0")
    assert ended.status == 0 and not ended.err, ended.text


def test_pytorch_without_cuda(fakes: Path) -> None:
    """There is nothing to do, and no error: the same environment serves CPU jobs."""
    assert printed(run_fake(fakes, ENABLED, FAKE_TORCH_CUDA="", FAKE_TORCH_VERSION="3.0.0")) is False


def test_a_library_that_does_not_load(fakes: Path) -> None:
    """The loader's reason is there."""
    ended = run_fake(fakes, "import torch", FAKE_TORCH_VERSION="2.6.0+cu124")
    assert ended.status != 0, ended.text
    assert "RuntimeError: use_uvm: libtorch_uvm_206.so cannot be loaded into PyTorch 2.6.0+cu124" in ended.err, (
        ended.text
    )


def test_a_library_of_another_interface(fakes: Path) -> None:
    """Mixed installations are told apart."""
    ended = run_fake(fakes, "import torch", FAKE_C_API="99")
    assert ended.status != 0 and "speaks version 99 of torch-uvm's C interface" in ended.err, ended.text


def test_a_library_compiled_for_another_version(fakes: Path) -> None:
    """A wrong vtable would be a crash."""
    ended = run_fake(fakes, "import torch", FAKE_COMPILED_FOR="214")
    assert ended.status != 0 and "was compiled for PyTorch 2.14" in ended.err, ended.text


def test_no_libraries_at_all(fakes: Path, tmp_path: Path) -> None:
    """The source folder on the module path, and a stock PyTorch."""
    shutil.copytree(fakes, tmp_path / "copy", ignore=shutil.ignore_patterns("lib"))
    ended = run_fake(tmp_path / "copy", "import torch")
    assert ended.status != 0 and "has no library for a stock PyTorch" in ended.err, ended.text


def test_too_late(fakes: Path) -> None:
    """The library's reason is the error, each time; settings made at run time stay PyTorch's."""
    code = """
import torch, torch_uvm
for _ in range(2):
    try:
        torch_uvm.activate()
    except RuntimeError as error:
        print(error)
assert torch._C._accelerator_setAllocatorSettings is torch._accelerator_setAllocatorSettings
"""
    ended = run_fake(fakes, code, FAKE_TORCH_AUTOLOAD="0", FAKE_ACTIVATE="-1")
    assert ended.status == 0 and ended.out.splitlines() == ["CUDA was initialised too early"] * 2, ended.text


SETTINGS = """
import ctypes, json
import torch, torch_uvm
from torch_uvm import _library
set_settings = torch._C._accelerator_setAllocatorSettings
def tried(value):
    try:
        set_settings(value)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
applied = ctypes.CDLL(str(_library.supported()[215])).fake_applied
applied.restype = ctypes.c_char_p
ours = "max_split_size_mb:64,uvm_prefetch:False"
print(json.dumps({
    "both": tried(ours), "wrong": tried("uvm_prefetch:maybe,max_split_size_mb:64"), "not a string": tried(7),
    "not applied": tried("uvm_device_limit_mb:1"), "parsed": torch.parsed, "applied": applied().decode(),
    "name": set_settings.__name__, "doc": set_settings.__doc__,
    "again": [torch_uvm.activate(), set_settings is torch._C._accelerator_setAllocatorSettings],
    "other": hasattr(torch._C, "_cuda_cudaCachingAllocator_set_allocator_settings"),
}))
"""


def test_settings_at_run_time(fakes: Path) -> None:
    """Ours are checked first, then PyTorch parses its own, then the whole string is applied."""
    said = printed(run_fake(fakes, SETTINGS))
    assert said == {
        "both": None,
        "wrong": "ValueError: uvm_prefetch: 'maybe' is not allowed: expected True or False",
        "not a string": "TypeError: PyTorch wants a str",
        "not applied": "RuntimeError: uvm_device_limit_mb: too late",
        "parsed": ["max_split_size_mb:64", ""],
        "applied": "<max_split_size_mb:64,uvm_prefetch:False>",
        "name": "_accelerator_setAllocatorSettings",
        "doc": "PyTorch's words",
        "again": [True, True],
        "other": False,
    }


def test_settings_at_run_time_where_use_uvm_is_off(fakes: Path) -> None:
    """Our keys are kept from PyTorch all the same."""
    said = printed(run_fake(fakes, SETTINGS, "use_uvm:False", FAKE_ACTIVATE="2"))
    assert said["parsed"] == ["max_split_size_mb:64", ""] and said["again"] == [False, True], said


def test_what_the_library_answers(fakes: Path) -> None:
    """The options typed, the structure field by field, errors with the library's words."""
    code = """
import dataclasses, json
import torch, torch_uvm
from torch_uvm import _library
library = _library.running()
def tried(call, *arguments):
    try:
        return call(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
print(json.dumps({
    "config": torch_uvm.config(), "info": dataclasses.asdict(library.memory_info(0)),
    "no device": tried(library.memory_info, 3), "no pool": tried(library.set_pool_placement, 0, (1, 2), "device"),
}))
"""
    said = printed(run_fake(fakes, code))
    assert said["config"] == {
        "use_uvm": True,
        "uvm_oversubscription_ratio": 2.5,
        "uvm_access_pattern": "cpu_first",
        "uvm_prefetch": False,
        "uvm_prefetch_threshold_mb": 0,
        "uvm_device_limit_mb": None,
        "uvm_host_reserve_mb": 7,
        "uvm_stage1_threshold": 0.1,
        "uvm_stage1_min_bytes": 0,
    }
    assert list(said["info"].values()) == [(1 << 40) + i for i in range(len(said["info"]))], said
    assert said["no device"] == "RuntimeError: device 3 is not there"
    assert said["no pool"] == "RuntimeError: there is no such pool"


def test_wrong_settings_in_the_environment(fakes: Path) -> None:
    """`import torch` works, `config` says what is wrong."""
    ended = run_fake(fakes, "import torch, torch_uvm; torch_uvm.config()", FAKE_BAD_OPTIONS="1")
    assert "ValueError: uvm_prefetch: 'x' is not allowed" in ended.err, ended.text


def test_the_python_mirror_of_the_c_interface() -> None:
    """The interface's number and the structure's fields are those of c_api.h."""
    sys.path.insert(0, str(PACKAGE.parent))
    try:
        from torch_uvm import _library
    finally:
        sys.path.remove(str(PACKAGE.parent))
    header = (ROOT / "cpp" / "torch_uvm" / "c_api.h").read_text()
    number = re.search(r"#define TORCH_UVM_C_API (\d+)", header)
    structure = re.search(r"struct torch_uvm_memory_info_t \{(.*?)\n\};", header, re.DOTALL)
    assert number and structure
    assert _library.C_API == int(number[1])
    declared = re.findall(r"^\s*uint64_t (\w+);", structure[1], re.MULTILINE)
    assert list(_library.MemoryInfo.__dataclass_fields__) == declared


def test_our_list_of_options_is_the_allocators() -> None:
    """`config` has every key that the allocator knows."""
    sys.path.insert(0, str(PACKAGE.parent))
    try:
        from torch_uvm._report import OPTIONS
    finally:
        sys.path.remove(str(PACKAGE.parent))
    source = (ROOT / "src" / "options.rs").read_text()
    keys = re.search(r"pub const KEYS: \[&'static str; \d+\] = \[(.*?)\];", source, re.DOTALL)
    assert keys
    assert list(OPTIONS) == re.findall(r'"(\w+)"', keys[1])
