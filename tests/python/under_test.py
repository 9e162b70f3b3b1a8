"""The package that is tested: the installed one beside a stock PyTorch, the repository's for a patched PyTorch."""

import os
import sys

from simulated import HERE

#: The folder that the package lies in, in the repository.
SOURCE = HERE.parent.parent / "python"
try:
    import torch_uvm
except ModuleNotFoundError:
    sys.path.append(str(SOURCE))
    import torch_uvm


def from_source(variables: dict[str, str]) -> dict[str, str]:
    """The environment `variables`, with the repository's package found first."""
    path = os.pathsep.join(filter(None, (str(SOURCE), variables.get("PYTHONPATH"))))
    return {**variables, "PYTHONPATH": path}


__all__ = ["SOURCE", "from_source", "torch_uvm"]
