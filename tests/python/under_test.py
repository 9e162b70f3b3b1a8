"""The package that is tested: installed beside a stock PyTorch; a patched one needs none, so there it is the repository's."""

import sys

from simulated import HERE

#: The folder that the package lies in, in the repository.
SOURCE = HERE.parent.parent / "python"
try:
    import torch_uvm
except ModuleNotFoundError:
    sys.path.append(str(SOURCE))
    import torch_uvm

__all__ = ["SOURCE", "torch_uvm"]
