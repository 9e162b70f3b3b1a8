"""`python -m torch_uvm doctor`: what the machine is, what will work, what the options resolve to.

Facts come from three places: the CUDA driver and the kernel (`_machine`), and one or two processes that do what any
program does with PyTorch here (`_probe`). Nothing is worked out twice: what the options resolve to is what the
allocator says in such a process.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import _library, _machine, _version
from ._activate import VARIABLES, is_our_key, keys_of, without_white_space
from ._format import format_bytes as size
from ._machine import Cuda, Gpu, Host
from ._tables import OPTIONS

#: How long a process may take to import PyTorch and initialise CUDA, in seconds. Network file systems are slow.
PATIENCE = 300


@dataclass(frozen=True)
class Capability:
    """Something that works on a GPU, or does not."""

    name: str
    works: bool
    remark: str = ""


@dataclass(frozen=True)
class Report:
    """All that was found."""

    version: str
    #: The PyTorch versions that the plug-in carries a library for.
    supported: list[str]
    python: str
    host: Host
    cuda: Cuda
    #: PYTORCH_CUDA_ALLOC_CONF and PYTORCH_ALLOC_CONF, as far as they are set.
    settings: dict[str, str]
    #: What a process did in this environment.
    here: dict[str, Any]
    #: What one did with `use_uvm:True` added; None where there was no need to try, or no sense in it.
    added: dict[str, Any] | None
    #: By GPU.
    capabilities: list[list[Capability]]
    notes: list[str]
    #: The uvm allocator is the one that programs get in this environment.
    active: bool
    #: It works here, or would with `use_uvm:True`.
    works: bool
    verdict: str


def examine() -> Report:
    """Finds everything out. Takes seconds: PyTorch is imported, in other processes."""
    host = _machine.host()
    cuda = _machine.cuda()
    settings = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    here = _run_probe({})
    active = bool(here.get("enabled"))
    obstacle = _obstacle(cuda, here, settings)
    added = None
    if not active and obstacle is None:
        added = _run_probe(_with_use_uvm(settings), "--activate")
    works, verdict = _judge(obstacle, here, added, settings)
    return Report(
        version=_version.__version__,
        supported=[_library.version_name(number) for number in _library.supported()],
        python=f"{platform.python_version()} ({sys.executable})",
        host=host,
        cuda=cuda,
        settings=settings,
        here=here,
        added=added,
        capabilities=[_capabilities(gpu) for gpu in cuda.gpus],
        notes=[*_machine_notes(host, cuda), *_settings_notes(settings)],
        active=active,
        works=works,
        verdict=verdict,
    )


def _run_probe(variables: dict[str, str], *arguments: str) -> dict[str, Any]:
    """What `_probe` says in a process with these variables more. `error` is there if it ended badly."""
    command = [sys.executable, str(Path(__file__).with_name("_probe.py")), *arguments]
    try:
        ended = subprocess.run(
            command,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
        )
        status, out, err = ended.returncode, ended.stdout, ended.stderr
    except subprocess.TimeoutExpired as expired:
        partial = expired.stdout or b""
        out = partial.decode(errors="replace") if isinstance(partial, bytes) else partial
        status, err = None, f"no end within {PATIENCE} s"
    facts: dict[str, Any] = {}
    for line in out.splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue  # something else that prints at import
        if isinstance(said, dict):
            facts.update(said)
    if status != 0:
        how = "did not end" if status is None else f"ended with status {status}"
        facts.setdefault("error", f"the process that tried PyTorch {how}: {_last_words(err)}")
    return facts


def _last_words(err: str) -> str:
    """Why a process ended, from what it wrote to stderr: its last line, or the text of its C++ exception, which comes
    before a stack."""
    thrown = re.search(r"^\s*what\(\):\s*(.+)$", err, re.MULTILINE)
    return thrown[1].strip() if thrown else (err.strip().splitlines() or ["it said nothing"])[-1]


def _with_use_uvm(settings: dict[str, str]) -> dict[str, str]:
    """The variable that has settings already, or the first one, with `use_uvm:True` at its end: the last one counts."""
    name = next(iter(settings), VARIABLES[0])
    given = settings.get(name, "").rstrip().rstrip(",")
    return {name: f"{given},use_uvm:True" if given else "use_uvm:True"}


def _obstacle(cuda: Cuda, here: dict[str, Any], settings: dict[str, str]) -> str | None:
    """What keeps use_uvm from working: the machine, this PyTorch, or settings with which PyTorch does not start."""
    if "torch_error" in here:
        return str(here["torch_error"])
    if "torch_cuda" not in here:
        return next(iter(_malformed(settings)), str(here.get("error", "PyTorch could not be examined")))
    if here["torch_cuda"] is None:
        build = "for ROCm" if here.get("torch_hip") else "without CUDA"
        return f"PyTorch {here['torch_version']} was built {build}"
    if here.get("unsupported"):
        return str(here["unsupported"])
    if cuda.error:
        return cuda.error
    return None


def _judge(
    obstacle: str | None, here: dict[str, Any], added: dict[str, Any] | None, settings: dict[str, str]
) -> tuple[bool, str]:
    """Whether use_uvm works or would, and the sentence that says it."""
    if obstacle:
        return False, f"use_uvm does not work here: {obstacle}"
    if here.get("enabled"):
        failure = here.get("settings_error") or here.get("error")
        if failure:
            return False, f"use_uvm is on and does not work here: {failure}"
        return True, "use_uvm is on, and works here"
    tried = added or {}
    # What is wrong with the settings says more than how a version of PyTorch, or the patched one, words its error.
    malformed = next(iter(_malformed(settings)), None)
    failure = tried.get("settings_error") or tried.get("error")
    if failure:
        return False, f"use_uvm is off, and would not work here: {malformed or failure}"
    if not tried.get("enabled"):
        reason = malformed or here.get("error", "PyTorch kept its own allocator")
        return False, f"use_uvm does not work here: {reason}"
    return True, f"use_uvm is off, and would work here. {_how_to_switch_on(here, settings)}"


def _how_to_switch_on(here: dict[str, Any], settings: dict[str, str]) -> str:
    """Why the allocator is not in place although it could be."""
    wanted = any("use_uvm:True" in without_white_space(value) for value in settings.values())
    if not here.get("patched"):
        if not here.get("entry_point"):
            return (
                "torch-uvm is on the module path but not installed, so PyTorch does not load it: install its wheel, or "
                "call torch_uvm.activate() before the first use of CUDA"
            )
        if not here.get("autoload") and wanted:
            return (
                "TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps PyTorch from loading it: unset that, or call "
                "torch_uvm.activate() before the first use of CUDA"
            )
    if wanted:
        return "Another setting switches it off: the last use_uvm counts, and that of PYTORCH_CUDA_ALLOC_CONF"
    return "Set PYTORCH_CUDA_ALLOC_CONF=use_uvm:True"


def _capabilities(gpu: Gpu) -> list[Capability]:
    """What works on a GPU, from its attributes."""
    managed = gpu.managed_memory and gpu.concurrent_managed_access
    without = "" if managed else "no concurrent managed access"
    if gpu.integrated:
        coherence = "the GPU uses the host's memory: there is one memory, and it is counted once"
    elif gpu.coherent:
        coherence = "CPU and GPU reach each other's memory through shared page tables"
    else:
        coherence = "memory beyond the device limit is reached over PCIe"
    return [
        Capability("uvm allocator", True, without and "with uvm_access_pattern:device only"),
        Capability("oversubscription", managed, without),
        Capability("prefetch", managed, without),
        Capability(
            "sharing between processes (CUDA IPC)",
            True,
            "of device placement only: uvm_access_pattern:device or torch_uvm.MemPool('device')",
        ),
        Capability("hardware coherence", gpu.coherent, coherence),
    ]


def _machine_notes(host: Host, cuda: Cuda) -> Iterable[str]:
    """What to know about this machine."""
    if cuda.simulated:
        yield "CUDA is torch-uvm's simulated device: kernels do nothing, and figures of time mean nothing"
    if host.wsl:
        yield "WSL: its driver gives no concurrent managed access, so only uvm_access_pattern:device works"
    if host.tegra:
        yield "Tegra: it has no concurrent managed access, so only uvm_access_pattern:device works"
    if any(gpu.mig for gpu in cuda.gpus):
        yield "MIG: a part of a GPU is a GPU of its own to the allocator; the parts share the host's memory"
    if len(cuda.gpus) > 1:
        yield "several GPUs share the host's memory: each counts what is left of it at the moment it grows"
    if host.egm:
        yield (
            f"extended GPU memory: the firmware has handed {size(host.egm)} of host memory to the GPU, and the "
            "operating system does not count it"
        )
    if any(gpu.numa_node is not None for gpu in cuda.gpus):
        yield "the GPU's memory is a NUMA node of this machine: it is not counted as host memory"


def _settings_notes(settings: dict[str, str]) -> Iterable[str]:
    """What PyTorch will not understand, and keys that are probably meant to be ours and are not."""
    yield from _malformed(settings)
    for variable, value in settings.items():
        for key in keys_of(value):
            if key in OPTIONS:
                continue
            close = difflib.get_close_matches(key, OPTIONS, n=1, cutoff=0.8)
            if close:
                yield f"{variable}: {key} is unknown. Is {close[0]} meant?"
            elif is_our_key(key):
                yield f"{variable}: {key} is unknown. The options are {', '.join(OPTIONS)}"


def _malformed(settings: dict[str, str]) -> Iterable[str]:
    """Items that are no `key:value`. PyTorch's words for them are an internal assertion, or nothing but a stack."""
    for variable, value in settings.items():
        *items, last = re.split(r",(?![^\[]*\])", without_white_space(value))  # at commas that are not inside brackets
        for item in items if last == "" else [*items, last]:
            if item == "":
                yield f"{variable}: there is nothing between two commas, or before the first one"
            elif ":" not in item:
                meant = (
                    item.replace("=", ":", 1) if "=" in item else f"{item}:True" if item == "use_uvm" else f"{item}:…"
                )
                yield f"{variable}: '{item}' has no colon between its key and its value. Is {meant} meant?"


def as_json(report: Report) -> str:
    """The report for programs: its fields under their names, sizes in bytes."""
    return json.dumps(dataclasses.asdict(report), indent=2)


def as_text(report: Report) -> str:
    """The report for people."""
    lines = [
        f"torch-uvm {report.version}, for PyTorch {', '.join(report.supported) or '(patched only: no library here)'}"
    ]
    lines += ["", "Machine", *_machine_lines(report.host, report.cuda)]
    lines += ["", "PyTorch", *_torch_lines(report)]
    for gpu, capabilities in zip(report.cuda.gpus, report.capabilities):
        lines += ["", f"What works on GPU {gpu.index}"]
        lines += [
            _line(
                capability.name,
                ("yes" if capability.works else "no") + (capability.remark and f": {capability.remark}"),
            )
            for capability in capabilities
        ]
    tried = report.here if report.active else report.added or {}
    if "options" in tried:
        lines += ["", "Options" if report.active else "Options, with use_uvm:True"]
        lines += [_line(key, _option(value)) for key, value in tried["options"].items()]
    for index, info in enumerate(tried.get("devices", [])):
        lines += ["", f"Memory of GPU {index}" if report.active else f"Memory of GPU {index}, with use_uvm:True"]
        lines += [_line(name.replace("_", " "), size(info[name])) for name in _RESOLVED]
    if report.notes:
        lines += ["", "Notes", *(f"  {note}" for note in report.notes)]
    return "\n".join([*lines, "", report.verdict])


#: What of MemoryInfo the options resolve to.
_RESOLVED = ("capacity", "device_limit", "device_total", "host_reserve", "host_total", "host_available")


def _machine_lines(host: Host, cuda: Cuda) -> Iterable[str]:
    yield _line("system", f"{host.system}, {host.architecture}{', WSL' if host.wsl else ''}")
    yield _line("host memory", f"{_size(host.memory_available)} available of {_size(host.memory_total)}")
    if host.cgroup_limit is not None:
        yield _line("cgroup limit", f"{size(host.cgroup_limit)}, {_size(host.cgroup_usage)} used")
    yield _line(
        "extended GPU memory", "only root may know" if host.egm is None else size(host.egm) if host.egm else "none"
    )
    yield _line("driver", f"{cuda.driver or 'unknown'}, CUDA {cuda.version or 'unknown'}")
    if cuda.uvm_parameters:
        values = ", ".join(f"{name}={value}" for name, value in cuda.uvm_parameters.items())
        yield _line("nvidia_uvm", values)
    if cuda.error:
        yield _line("GPU", cuda.error)
    for gpu in cuda.gpus:
        yield _line(f"GPU {gpu.index}", f"{gpu.name}, {size(gpu.memory)}, compute capability {gpu.compute_capability}")
        yield _line("", f"managed memory {_yes(gpu.managed_memory)}, concurrent {_yes(gpu.concurrent_managed_access)}")
        yield _line(
            "",
            f"pageable memory {_yes(gpu.pageable_memory_access)}, through the host's page tables "
            f"{_yes(gpu.host_page_tables)}, integrated {_yes(gpu.integrated)}",
        )
        yield _line("", f"NUMA node of its memory {_node(gpu.numa_node)}, of its CPU {_node(gpu.host_numa_node)}")


def _torch_lines(report: Report) -> Iterable[str]:
    here = report.here
    yield _line("Python", report.python)
    built = f"CUDA {here['torch_cuda']}" if here.get("torch_cuda") else "no CUDA"
    kind = "patched: the allocator is part of it" if here.get("patched") else "stock"
    known = f"{here['torch_version']}, {built}, {kind}" if "torch_cuda" in here else here.get("torch_version", "none")
    yield _line("PyTorch", known)
    if "torch_cuda" in here and not here.get("patched"):
        loads = "PyTorch loads it by itself" if here.get("entry_point") else "not installed: PyTorch does not load it"
        if here.get("entry_point") and not here.get("autoload"):
            loads = "TORCH_DEVICE_BACKEND_AUTOLOAD=0: PyTorch does not load it"
        yield _line("plug-in", loads)
    for name in VARIABLES:
        yield _line(name, report.settings.get(name, "(not set)"))
    yield _line("allocator", "uvm" if report.active else "PyTorch's own")


def _line(name: str, value: str) -> str:
    return f"  {name:<38}{value}" if len(name) > 24 else f"  {name:<26}{value}"


def _option(value: Any) -> str:
    return "(from the device and the machine, see below)" if value is None else str(value)


def _size(count: int | None) -> str:
    return "unknown" if count is None else size(count)


def _node(number: int | None) -> str:
    return "none" if number is None else str(number)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
