"""pytest's part in running tests on the simulated device: see on_device.py and README.md."""

from __future__ import annotations

from collections.abc import Iterator

import on_device
import pytest
import simulated


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--backend native` runs the tests with PyTorch's own allocator."""
    parser.addoption("--backend", choices=("uvm", "native"), default="uvm", help="the allocator under test")
    parser.addoption(
        "--every-version-only", action="store_true", help="leave out what one version of PyTorch proves for all"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Stops at once where there is nothing to run on."""
    on_device.backend = config.getoption("--backend")
    config.addinivalue_line("markers", "one_version: does not depend on PyTorch's version")
    try:
        simulated.environment(require=True)
    except simulated.NoSimulator as error:
        raise pytest.UsageError(str(error)) from None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what `--every-version-only` leaves out."""
    if config.getoption("--every-version-only"):
        left_out = [item for item in items if item.get_closest_marker("one_version")]
        items[:] = [item for item in items if not item.get_closest_marker("one_version")]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session", autouse=True)
def nurseries() -> Iterator[None]:
    """Ends the processes that tests were forked from."""
    yield
    on_device.close_nurseries()
