"""Options, devices and the results file of a benchmark session."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import common


class Report:
    """The rows of one device and what they are held against."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bandwidth = common.copy_bandwidth(device)
        self.rows: list[common.Row] = []


REPORTS: dict[str, Report] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, default=None, help="folder for <suite>--<device>.json")
    parser.addoption("--with-compile", action="store_true", help="also time torch.compile of the references (slow)")


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def report(request: pytest.FixtureRequest) -> Report:
    """The report of one device, created with the device's copy bandwidth at first use."""
    name: str = request.param
    if name not in REPORTS:
        REPORTS[name] = Report(torch.device(name))
    return REPORTS[name]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Give every benchmark the same numbers and leave the generator as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for report in REPORTS.values():
        if not report.rows:
            continue
        terminalreporter.section(common.device_name(report.device))
        terminalreporter.write_line(common.as_table(report.rows))
        folder: Path | None = config.getoption("--results")
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"ops--{common.device_name(report.device)}.json"
            about = common.metadata(report.device, report.bandwidth)
            path.write_text(json.dumps(common.as_json(report.rows, about), indent=1) + "\n")
            terminalreporter.write_line(f"written: {path}")
