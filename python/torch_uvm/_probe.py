"""What PyTorch and the allocator do in a process of this environment.

`doctor` runs this file in a process of its own (`python _probe.py [--activate]`), so that whatever happens there, a
crash too, is a finding. It prints one JSON object a line: each says one thing more.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

#: Small enough for any device, and more than the smallest populated step.
TRIAL_BYTES = 4 << 20


def say(**facts: Any) -> None:
    """A line of the answer."""
    print(json.dumps(facts), flush=True)


def chain(error: BaseException) -> str:
    """An error and its causes, innermost first: that is where the reason stands."""
    texts = []
    at: BaseException | None = error
    while at is not None:
        texts.append(str(at).strip() or type(at).__name__)
        at = at.__cause__
    return "; ".join(reversed(texts))


def probe(activate: bool) -> None:
    """Imports PyTorch and uses a little of each device's memory, if the allocator is in place."""
    from importlib.metadata import PackageNotFoundError, entry_points, version

    try:
        say(torch_version=version("torch"))
    except PackageNotFoundError:
        pass  # a build in its source folder, perhaps
    points: Any = entry_points()
    group = points.select(group="torch.backends") if hasattr(points, "select") else points.get("torch.backends", ())
    say(entry_point=any(point.value.startswith("torch_uvm.") for point in group))
    try:
        import torch
    except ModuleNotFoundError as error:
        say(torch_error="PyTorch is not installed" if error.name == "torch" else chain(error))
        return
    except Exception as error:
        say(torch_error=chain(error))
        return
    say(torch_version=torch.__version__, torch_cuda=torch.version.cuda, torch_hip=torch.version.hip)
    say(autoload=torch._is_device_backend_autoload_enabled())
    if torch.version.cuda is None:
        return

    from torch_uvm import _activate, _library, _report

    try:
        library = _library.running()
        patched = library is not None and not isinstance(library, _library.Plugin)
        say(patched=patched)
        if not patched:
            say(unsupported=_library.unsupported(torch.__version__))
        if activate:
            _activate.activate()
            library = _library.running()
        say(enabled=library is not None and library.enabled())
        if library is None or not library.enabled():
            return
        try:
            say(options=_report.parse_options(library.options()))
        except ValueError as error:
            say(settings_error=str(error))
        torch.cuda.init()  # type: ignore[no-untyped-call]
        devices = []
        for device in range(torch.cuda.device_count()):
            tensor = torch.empty(TRIAL_BYTES, dtype=torch.uint8, device=f"cuda:{device}")
            del tensor
            devices.append(vars(library.memory_info(device)))
        say(devices=devices)
    except Exception as error:
        say(error=chain(error))


if __name__ == "__main__":
    # The package's folder stands first on the path because this file lies in it; its parent must be there, last.
    package = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != package]
    if str(package.parent) not in sys.path:
        sys.path.append(str(package.parent))
    probe("--activate" in sys.argv[1:])
