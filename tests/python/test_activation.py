"""How the plug-in gets into a stock PyTorch: the entry point, the environment variables, the processes that follow.

The first half needs neither PyTorch nor CUDA: a few lines stand in for PyTorch, and a library compiled from
cpp/torch_uvm/c_api.h for the plug-in's, so that what cannot be had otherwise (another version, a library that refuses)
can be tried. The second half runs the plug-in that is installed beside a stock PyTorch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated import HERE, UVM, Finished, environment, run_python
from under_test import SOURCE

from torch_uvm import _activate, _library, _tables

ROOT = HERE.parent.parent
PACKAGE = SOURCE / "torch_uvm"

PATCHED = _library.running() is not None  # pytest's own process has no key of ours

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
const char* torch_uvm_description() {
  return R"(DESCRIPTION)";
}
int64_t torch_uvm_rows(const char* name, int device, uint64_t* numbers, uint64_t capacity) {
  if (device != 0) {
    error = "device " + std::to_string(device) + " is not there";
    return -1;
  }
  const std::string table = name;
  const uint64_t columns = COLUMNS;
  const uint64_t rows = table == "segments" ? 3 : table == "place_samples" ? 2 : 1;
  for (uint64_t i = 0; i < capacity && i < rows * columns; ++i) {
    const bool is_word = table == "segments" && (i % columns == 8 || i % columns == 9);
    numbers[i] = is_word ? i / columns : (uint64_t{1} << 40) * (i / columns) + i % columns;
  }
  return rows * columns;
}
int torch_uvm_prefetch(uint64_t, uint64_t, int, uint64_t) {
  error = "prefetch: nothing is there";
  return -1;
}
int torch_uvm_advise(uint64_t, uint64_t, const char*, int) {
  return 0;
}
int torch_uvm_discard(uint64_t, uint64_t, uint64_t) {
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


def fake_columns(record: type, words: dict[str, list[str]], *more: str) -> list[dict[str, Any]]:
    """Columns for the fields of a record, as the library says them; each is in `memory_stats()` as `some.<name>`."""
    names = [(field.name, field.type) for field in dataclasses.fields(record)] + [(name, "int") for name in more]
    return [
        {"name": name, "type": kind, "words": words.get(name, []), "path": f"some.{name}", "meaning": name}
        for name, kind in names
    ]


#: What the library that stands in for the plug-in's describes. It has a statistic that this package does not know.
WORDS = {"place": ["device", "host", "unplaced"], "memory": ["managed", "device", "custom"]}
TABLES = {
    "memory_info": fake_columns(_tables.MemoryInfo, {}),
    "statistics": fake_columns(_tables.PlaceStats, {}, "not_known_here"),
    "segments": fake_columns(_tables.SegmentPlace, WORDS, "pool_first", "pool_second"),
    "place_samples": fake_columns(_tables.PlaceSample, {}),
}


@pytest.fixture(scope="session")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the module path: the package with a library for "2.15" and a PyTorch of a few lines."""
    folder = tmp_path_factory.mktemp("fakes")
    shutil.copytree(PACKAGE, folder / "torch_uvm", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(FAKE_TORCH)
    source = folder / "fake.cpp"
    counts = " : ".join(f'table == "{name}" ? {len(columns)}' for name, columns in TABLES.items())
    described = json.dumps({"tables": TABLES, "options": [], "placements": []})
    source.write_text(FAKE_LIBRARY.replace("DESCRIPTION", described).replace("COLUMNS", f"{counts} : 0"))
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
    assert printed(run_fake(fakes, IMPORTED, conf)) == ["torch_uvm", "torch_uvm._activate"]


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
real = {"MemPool", "placement", "empty_cache", "offload_optimizer"}  # these need the real torch
real |= {"WeightStream", "WeightStreamStatistics", "stream", "stream_weights"}
for name in set(torch_uvm.__all__) - real:
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
        ("max_split_size_mb:64,\n\tuse_uvm:True\r\n", True),
        ("\vuse_uvm:True\f", True),
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
    assert _activate.has_our_keys(conf) is ours


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
    """The options typed, the tables by name, errors with the library's words."""
    code = """
import dataclasses, json
import torch, torch_uvm
from torch_uvm import _activate, _library
library = _library.running()
def tried(call, *arguments):
    try:
        return call(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
stats = {"theirs": 7}
_activate.add_figures(stats, library, 0)
print(json.dumps({
    "config": torch_uvm.config(), "info": dataclasses.asdict(library.memory_info(0)),
    "no device": tried(library.memory_info, 3), "no pool": tried(library.set_pool_placement, 0, (1, 2), "device"),
    "stats": dataclasses.asdict(library.place_stats(0)), "memory_stats": stats,
    "segments": [dataclasses.asdict(segment) for segment in library.segments(0)],
    "samples": [dataclasses.asdict(sample) for sample in library.place_samples(0)],
    "hints": [tried(library.prefetch, 1, 2, -1, 0), library.advise(1, 2, "set_read_mostly", 0),
              library.discard(1, 2, 0)],
}))
"""
    said = printed(run_fake(fakes, code))
    given = {
        "use_uvm": True,
        "uvm_oversubscription_ratio": 2.5,
        "uvm_access_pattern": "cpu_first",
        "uvm_prefetch": False,
        "uvm_prefetch_threshold_mb": 0,
        "uvm_host_reserve_mb": 7,
        "uvm_stage1_threshold": 0.1,
        "uvm_stage1_min_bytes": 0,
    }
    assert said["config"] == {**dict.fromkeys(_tables.OPTIONS), **given}, "None: the library does not say"
    names = {table: [column["name"] for column in columns] for table, columns in TABLES.items()}
    assert said["info"] == {name: at for at, name in enumerate(names["memory_info"])}
    assert said["no device"] == "RuntimeError: device 3 is not there"
    assert said["no pool"] == "RuntimeError: there is no such pool"
    statistics = {name: at for at, name in enumerate(names["statistics"])}
    assert said["memory_stats"].pop("uvm") == {"some": statistics}
    short = {f"uvm_{name}": statistics[name] for name in ("stage", "light_reclamations", "hard_reclamations")}
    assert said["memory_stats"] == {"theirs": 7, **short}
    del statistics["not_known_here"]
    assert said["stats"] == statistics
    rows = [{name: (row << 40) + at for at, name in enumerate(names["segments"])} for row in range(3)]
    for row, (segment, numbers) in enumerate(zip(said["segments"], rows)):
        flags = {"small": True, "growing": True}
        pool = [numbers.pop("pool_first"), numbers.pop("pool_second")]
        assert segment == {**numbers, **{key: words[row] for key, words in WORDS.items()}, **flags, "pool": pool}
    assert len(said["segments"]) == 3
    assert said["samples"] == [
        {name: (row << 40) + at for at, name in enumerate(names["place_samples"])} for row in (0, 1)
    ]
    assert said["hints"] == ["RuntimeError: prefetch: nothing is there", None, None]


def test_a_library_that_knows_less(fakes: Path) -> None:
    """A record that it cannot fill is an error that says what is missing and what to do."""
    code = """
import dataclasses
import torch, torch_uvm
from torch_uvm import _library
library = _library.running()
columns = library.columns("memory_info")
columns[0] = dataclasses.replace(columns[0], name="ability")
library.memory_info(0)
"""
    ended = run_fake(fakes, code)
    assert "RuntimeError: libtorch_uvm_215.so does not say capacity: install it and" in ended.err, ended.text


def test_wrong_settings_in_the_environment(fakes: Path) -> None:
    """`import torch` works, `config` says what is wrong."""
    ended = run_fake(fakes, "import torch, torch_uvm; torch_uvm.config()", FAKE_BAD_OPTIONS="1")
    assert "ValueError: uvm_prefetch: 'x' is not allowed" in ended.err, ended.text


def installed() -> str | None:
    """Why the second half cannot run here; None if it can."""
    if PATCHED:
        return "this PyTorch is patched: the plug-in steps aside"
    points: Any = entry_points()  # Python 3.9 has no `group` yet
    group = points.select(group="torch.backends") if hasattr(points, "select") else points.get("torch.backends", ())
    if not any(point.value == "torch_uvm._activate:autoload" for point in group):
        return "torch-uvm's wheel is not installed"
    return None


with_the_plugin = pytest.mark.skipif(installed() is not None, reason=str(installed()))

BACKEND = """
import torch
torch.empty(1 << 20, device="cuda")
print(torch.cuda.get_allocator_backend())
"""


def backend(conf: str, code: str = BACKEND, **variables: str) -> str:
    """What a process with this configuration prints; fails unless it ends well and is silent otherwise."""
    ended = run_python(code, environment(conf, require=True, **variables))
    assert ended.status == 0 and not ended.err, ended.text
    return ended.out.strip()


@pytest.mark.skipif(not PATCHED, reason="about a patched PyTorch")
def test_the_package_steps_aside() -> None:
    """In a patched PyTorch, which has chosen its allocator itself."""
    code = """
import torch, torch_uvm
from torch_uvm import _activate, _library
setters = {name: getattr(torch._C, name, None) for name in _activate.SETTERS}
_activate.autoload()
print(torch_uvm.activate(), isinstance(_library.running(), _library.Plugin))
assert setters == {name: getattr(torch._C, name, None) for name in _activate.SETTERS}
"""
    path = {"PYTHONPATH": str(SOURCE)}
    assert backend(UVM, code, **path) == "True False"
    assert backend("use_uvm:False", code, **path) == "False False"


@with_the_plugin
def test_the_variable_alone() -> None:
    """Nothing but the environment."""
    assert backend(UVM) == "uvm"
    assert backend("") == "native"


CHILDREN = """
import multiprocessing, os, subprocess, sys
import torch

def used(queue=None):
    backend = torch.cuda.get_allocator_backend()
    torch.empty(1 << 20, dtype=torch.uint8, device="cuda").copy_(torch.ones(1 << 20, dtype=torch.uint8))
    if queue is not None:
        queue.put(backend)
    return backend

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return torch.tensor([float(torch.cuda.get_allocator_backend() == sys.argv[1]), index])

def main():
    program = "import torch; torch.empty(1, device='cuda'); print(torch.cuda.get_allocator_backend())"
    print("subprocess", subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip())
    for method in ("spawn", "fork"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=used, args=(queue,))
        process.start()
        print(method, queue.get(timeout=100))
        process.join()
        rows = torch.utils.data.DataLoader(Rows(), batch_size=2, num_workers=2, multiprocessing_context=method)
        print("workers", method, torch.cat(list(rows)).tolist() == [[1.0, i] for i in range(4)])
    print("itself", used())

if __name__ == "__main__":
    main()
"""


@with_the_plugin
@pytest.mark.parametrize(("conf", "expected"), [(UVM, "uvm"), ("use_uvm:False", "native"), ("", "native")])
def test_processes_that_are_started(conf: str, expected: str, tmp_path: Path) -> None:
    """Programs, spawned and forked processes, and a DataLoader's workers have the allocator of their parent."""
    program = tmp_path / "children.py"
    program.write_text(CHILDREN)
    done = subprocess.run(
        [sys.executable, str(program), expected],
        env=environment(conf, require=True),
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert done.returncode == 0 and said == {
        "subprocess": expected,
        "spawn": expected,
        "workers spawn": "True",
        "fork": expected,
        "workers fork": "True",
        "itself": expected,
    }, Finished(done.returncode, done.stdout, done.stderr).text


KEEPS = """
import ctypes, json, os
before = {name: os.environ.get(name) for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")}
import torch
getenv = ctypes.CDLL(None).getenv
getenv.restype = ctypes.c_char_p
def now():
    in_c = {name: getenv(name.encode()) for name in before}
    return [{name: os.environ.get(name) for name in before}, {k: v and v.decode() for k, v in in_c.items()}]
after = now()
torch.empty(1, device="cuda")
used = now()
print(json.dumps(after == used == [before, before]))
"""


@with_the_plugin
@pytest.mark.parametrize(
    ("conf", "general"),
    [(UVM, ""), ("", UVM), ("max_split_size_mb:64", UVM), (UVM, "max_split_size_mb:64"), ("use_uvm:False", "")],
)
def test_the_environment_is_left_as_it_is(conf: str, general: str) -> None:
    """For Python and for C, after the import and after the first use."""
    assert backend(conf, KEEPS, **({"PYTORCH_ALLOC_CONF": general} if general else {})) == "true"


OWN_SETTINGS = """
import torch
torch.empty(1 << 20, device="cuda")
settings = torch.cuda.memory._snapshot()["allocator_settings"]
print(torch.cuda.get_allocator_backend(), settings["max_split_size"], settings["garbage_collection_threshold"])
"""


@with_the_plugin
def test_pytorchs_own_keys_keep_working() -> None:
    """In the same string as ours, before and after them, with `use_uvm` on and off, and in the other variable."""
    for conf, expected in (
        ("max_split_size_mb:64,use_uvm:True,garbage_collection_threshold:0.5", "uvm 67108864 0.5"),
        ("use_uvm:True, max_split_size_mb : 64,garbage_collection_threshold:0.5,uvm_prefetch:True", "uvm 67108864 0.5"),
        ("use_uvm:False,max_split_size_mb:64,garbage_collection_threshold:0.5", "native 67108864 0.5"),
    ):
        assert backend(conf, OWN_SETTINGS) == expected, conf
    # PyTorch knows PYTORCH_ALLOC_CONF since 2.9; where ours is all that the other variable holds, it is read.
    if _library.parse_version(torch.__version__)[0] >= 209:
        general = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64,garbage_collection_threshold:0.5"}
        assert backend("use_uvm:True", OWN_SETTINGS, **general) == "uvm 67108864 0.5"


@with_the_plugin
@pytest.mark.parametrize("conf", ["use_uvm:True,no_such_key:1", "use_uvm:False,no_such_key:1"])
def test_an_unknown_key_of_pytorchs(conf: str) -> None:
    """PyTorch's own error, which does not speak of our keys; `import torch` works."""
    code = """
import torch
print("imported")
for _ in range(2):
    try:
        torch.empty(1, device="cuda")
    except (RuntimeError, ValueError) as error:
        print(str(error).splitlines()[0])
"""
    lines = backend(conf, code).splitlines()
    assert len(lines) == 3 and lines[0] == "imported", lines
    for line in lines[1:]:
        assert "nrecognized" in line and "no_such_key" in line and "use_uvm" not in line, lines


AUTOLOAD_OFF = """
import torch
import torch_uvm
assert not torch_uvm.is_enabled()
assert torch_uvm.activate() and torch_uvm.activate() and torch_uvm.is_enabled()
torch.empty(1, device="cuda")
print(torch.cuda.get_allocator_backend())
"""


@with_the_plugin
def test_activation_by_hand() -> None:
    """Where PyTorch does not load backends by itself; with nothing asked for, it does nothing."""
    assert backend(UVM, AUTOLOAD_OFF, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == "uvm"
    code = "import torch_uvm; print(torch_uvm.activate(), torch_uvm.is_enabled())"
    assert backend("", code, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == "False False"
    assert backend("use_uvm:False", code, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == "False False"


@with_the_plugin
def test_activation_that_comes_too_late() -> None:
    """CUDA is in use: the error says so, and PyTorch's allocator goes on."""
    code = """
import os, torch, torch_uvm
kept = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "use_uvm:True"
for _ in range(2):
    try:
        torch_uvm.activate()
    except RuntimeError as error:
        assert "too late" in str(error) and "before" in str(error), error
    else:
        raise AssertionError("activated under PyTorch's feet")
kept.copy_(torch.ones(1 << 20, dtype=torch.uint8))
torch.cuda.memory._set_allocator_settings("max_split_size_mb:64")
print(torch.cuda.get_allocator_backend(), torch_uvm.is_enabled(), kept.cpu().sum().item())
"""
    ended = run_python(code, environment("", require=True))
    assert ended.status == 0 and ended.out.split() == ["native", "False", str(1 << 20)], ended.text


RUN_TIME = """
import warnings
import torch, torch_uvm
warnings.simplefilter("ignore")  # PyTorch has moved the function
torch.empty(1, device="cuda")
def set_settings(name, value):
    try:
        {"memory": torch.cuda.memory._set_allocator_settings, **functions}[name](value)
    except (RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]
names = ("_cuda_cudaCachingAllocator_set_allocator_settings", "_accelerator_setAllocatorSettings")
functions = {name: getattr(torch._C, name) for name in names if hasattr(torch._C, name)}
def split_size():
    return torch.cuda.memory._snapshot()["allocator_settings"]["max_split_size"]
for mib, name in enumerate(["memory", *functions], 100):
    assert set_settings(name, f"max_split_size_mb:{mib},uvm_device_limit_mb:{mib}") is None, name
    assert (split_size(), torch_uvm.config()["uvm_device_limit_mb"]) == (mib << 20, mib), name
    for wrong, words in (("uvm_prefetch:maybe,max_split_size_mb:64", "True or False"), ("uvm_none:1", "unknown option"),
                         ("use_uvm:False", "run time")):
        text = set_settings(name, wrong)
        assert text and words in text, (name, wrong, text)
    assert (split_size(), torch_uvm.config()["uvm_device_limit_mb"]) == (mib << 20, mib), "a refused one has an effect"
    # Where PyTorch refuses its own half it may have reset it (2.11 has); ours stays.
    text = set_settings(name, "uvm_device_limit_mb:7,no_such_key:1")
    assert text and "no_such_key" in text, (name, text)
    assert torch_uvm.config()["uvm_device_limit_mb"] == mib, "applied although PyTorch refused its half"
print(len(functions))
"""


@with_the_plugin
def test_settings_while_the_program_runs() -> None:
    """Through each of PyTorch's functions for it: both halves take effect, and ours not where PyTorch's is wrong."""
    assert int(backend(UVM, RUN_TIME)) >= 1


@with_the_plugin
def test_settings_while_the_program_runs_with_use_uvm_off() -> None:
    """PyTorch's are applied as ever; ours must be right, and `use_uvm:True` comes too late."""
    code = """
import warnings
import torch
warnings.simplefilter("ignore")
torch.empty(1, device="cuda")
torch.cuda.memory._set_allocator_settings("max_split_size_mb:64,uvm_prefetch:True")
for wrong, words in (("use_uvm:True", "too late"), ("uvm_prefetch:maybe", "True or False")):
    try:
        torch.cuda.memory._set_allocator_settings(wrong)
    except (RuntimeError, ValueError) as error:
        assert words in str(error), error
    else:
        raise AssertionError(wrong)
print(torch.cuda.memory._snapshot()["allocator_settings"]["max_split_size"])
"""
    assert backend("use_uvm:False", code) == str(64 << 20)


@with_the_plugin
def test_the_compilers_tables_hold_the_wrapped_function() -> None:
    """torch.compile looks PyTorch's functions up by name, this one too."""
    code = "import torch, torch._dynamo.trace_rules as rules; print(len(rules.get_torch_obj_rule_map()) > 1000)"
    assert backend(UVM, code) == "True"
