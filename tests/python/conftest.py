"""pytest's part in running tests on the simulated device: see on_device.py and README.md."""

from __future__ import annotations

from collections.abc import Iterator

import on_device
import pytest
import simulated


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--backend native` runs the tests with PyTorch's own allocator."""
    parser.addoption("--backend", choices=("uvm", "native"), default="uvm", help="the allocator under test")


def pytest_configure(config: pytest.Config) -> None:
    """Stops at once where there is nothing to run on."""
    on_device.backend = config.getoption("--backend")
    try:
        simulated.environment(require=True)
    except simulated.NoSimulator as error:
        raise pytest.UsageError(str(error)) from None


@pytest.fixture(scope="session", autouse=True)
def nurseries() -> Iterator[None]:
    """Ends the processes that tests were forked from."""
    yield
    on_device.close_nurseries()
