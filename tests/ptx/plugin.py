"""pytest -p tests.ptx.plugin --kernels LIBRARY: another library than pysal/_C_emu.so for what tests call emulated."""

from pathlib import Path

import pytest

import pysal.testing


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernels", type=Path, help="library of kernels that register as pysal_emu")


def pytest_configure(config: pytest.Config) -> None:
    pysal.testing.EMULATION = config.getoption("--kernels").resolve(strict=True)
