"""Options, devices and the results file of a benchmark session."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


class MethodReport:
    """The rows of one network."""

    def __init__(self, network: str) -> None:
        self.network = network
        self.rows: list[common.MethodRow] = []
        self.claims: list[dict[str, str | float | None]] = []

    def claim(self, name: str, value: float, at_most: float | None) -> None:
        """Note a figure and what it is meant to stay below."""
        self.claims.append({"claim": name, "value": round(value, 3), "at_most": at_most})


METHOD_REPORTS: dict[str, MethodReport] = {}


class DeviceReport:
    """The rows of one network on one device, in a file that is written after each case."""

    def __init__(self, network: str, device: torch.device, folder: Path | None) -> None:
        self.network, self.device = network, device
        self.path = None if folder is None else folder / f"gpu-{network}--{common.device_name(device)}.json"
        self.rows: list[common.DeviceRow] = []

    def add(self, rows: list[common.DeviceRow]) -> None:
        """Note a case, and write the file; what it says of other cases stays."""
        self.rows += rows
        if self.path is None:
            return
        before = json.loads(self.path.read_text())["rows"] if self.path.exists() else []
        content = common.as_json(self.rows, common.metadata(self.device, 0.0))
        measured = {(row["method"], row["images"]) for row in content["rows"]}
        content["rows"] = [row for row in before if (row["method"], row["images"]) not in measured] + content["rows"]
        write(self.path, content)


DEVICE_REPORTS: dict[str, DeviceReport] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, default=None, help="folder for <suite>--<device>.json")
    parser.addoption("--method", default=None, help="time this method only")
    parser.addoption("--network", default=None, help="time methods on this network only")
    parser.addoption("--device", default="cuda", help="where bench_gpu.py runs: cuda; cpu to try it out")
    parser.addoption("--images", type=int, default=None, help="bench_gpu.py: batches of so many images only")
    parser.addoption("--until", type=float, default=None, help="bench_gpu.py: begin no case after this time of time.time()")
    parser.addoption("--rounds", type=int, default=None, help="rounds of each method")
    parser.addoption(
        "--with-compile",
        action="store_true",
        help="also time torch.compile of the references, and on a GPU of the networks (slow)",
    )


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def report(request: pytest.FixtureRequest) -> Report:
    """The report of one device, created with the device's copy bandwidth at first use."""
    name: str = request.param
    if name not in REPORTS:
        REPORTS[name] = Report(torch.device(name))
    return REPORTS[name]


@pytest.fixture
def method_report(network: str, request: pytest.FixtureRequest) -> Iterator[MethodReport]:
    """The report of one network; written after each benchmark, so that what a stopped session has measured is not lost."""
    report = METHOD_REPORTS.setdefault(network, MethodReport(network))
    yield report
    folder: Path | None = request.config.getoption("--results")
    if folder is not None:
        cpu = torch.device("cpu")
        path = folder / f"methods-{network}--{common.device_name(cpu)}.json"
        before = json.loads(path.read_text()) if path.exists() else {"rows": [], "claims": []}
        content = common.as_json(report.rows, common.metadata(cpu, 0.0)) | {"claims": report.claims}
        for part, key in (("rows", "method"), ("claims", "claim")):
            measured = {one[key] for one in content[part]}
            content[part] = [one for one in before[part] if one[key] not in measured] + content[part]
        write(path, content)


@pytest.fixture
def device_report(network: str, request: pytest.FixtureRequest) -> DeviceReport:
    """The report of one network on the device that was asked for."""
    device = torch.device(request.config.getoption("--device"))
    return DEVICE_REPORTS.setdefault(network, DeviceReport(network, device, request.config.getoption("--results")))


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = {name: config.getoption(f"--{name}") for name in ("method", "network", "images")}
    if not any(wanted.values()):
        return
    kept = [
        item for item in items if all(value is None or _parameters(item).get(name) == value for name, value in wanted.items())
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _parameters(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Give every benchmark the same numbers and leave the generator as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for report in REPORTS.values():
        if report.rows:
            terminalreporter.section(common.device_name(report.device))
            terminalreporter.write_line(common.as_table(report.rows))
            folder: Path | None = config.getoption("--results")
            if folder is not None:
                content = common.as_json(report.rows, common.metadata(report.device, report.bandwidth))
                write(folder / f"ops--{common.device_name(report.device)}.json", content)
    for methods in METHOD_REPORTS.values():
        terminalreporter.section(methods.network)
        terminalreporter.write_line(common.methods_table(methods.rows))
        for claim in methods.claims:
            terminalreporter.write_line("{claim}: {value} (at most {at_most})".format(**claim))
