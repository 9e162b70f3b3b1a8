"""The version of the installed package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("torch-uvm")
except PackageNotFoundError:
    # The source folder itself, on the module path beside a patched PyTorch.
    __version__ = "0+source"
