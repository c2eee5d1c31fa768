"""Set-up of the whole suite: which kind a test is of, in which order and worker it runs, and what all tests share."""

import gc
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.browser import address, browser, served

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # an uncompiled checkout says so; PYSAL_REQUIRE=cpu makes it fail
    import pysal._library
    from pysal.engine.prepared.gains import Budget
    from pysal.engine.request.plan import Plan

__all__ = ["address", "browser", "served"]

HERE = Path(__file__).parent
# Kind -> its folders and files. Other tests are of no kind; a test that opens the page or a browser is `browser`, too.
KINDS = {
    "core": [
        *("reference", "ops", "engine", "methods", "metrics"),
        *("test_explain.py", "test_segments.py", "test_layers.py", "test_registration.py"),
    ],
    "browser": ["demo/test_page.py"],
    "process": [
        *("audit/test_commands.py", "audit/test_faults.py", "audit/test_ray.py", "demo/test_server.py", "security"),
        *("test_abi.py", "test_cli.py", "test_import.py", "test_packaging.py"),
    ],
    "docs": [
        *("test_documents.py", "test_doctests.py", "test_gallery.py", "test_quadrature_page.py", "test_readme.py"),
        *("test_site.py", "models/test_page.py"),
    ],
    "peer": ["captum", "pair", "pytorch_grad_cam", "shap"],
}
# The core tells most in least time. Then what runs long in one worker, and what can be split test by test last, so that
# no worker waits for another.
ORDER = ["core", "browser", "process", "docs", "", "peer"]
SPLIT = {"core", "peer"}
COMPARED: dict[str, tuple[int, float]] = {}  # by the workers: tests/captum/peer.py


def kinds_of(path: Path) -> list[str]:
    """The kinds of the tests of a file."""
    return [kind for kind, places in KINDS.items() if any(path.is_relative_to(HERE / place) for place in places)]


# How long an example takes says how busy the machine is; `make attack` tries twenty times as many.
EXAMPLES = 2000 if os.environ.get("PYSAL_ATTACK") else 100
PATIENT = settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("patient", PATIENT)
settings.load_profile("patient")


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None):
        os.environ["OMP_NUM_THREADS"] = "1"  # of the workers, which start later: they share the processors, threads do not


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="every combination where otherwise every pair of values is tried")


def left_closed(path: Path, wanted: str) -> bool:
    """Say whether `-m core` or `-m "not core"` deselects all of a file or folder: to read it takes as long as many tests."""
    core = [HERE / place for place in KINDS["core"]]
    inside = any(path.is_relative_to(place) for place in core)
    on_the_way = any(place.is_relative_to(path) for place in core)
    return (wanted == "core" and not inside and not on_the_way) or (wanted == "not core" and inside)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return left_closed(collection_path, config.getoption("markexpr")) or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark and order the tests; what shares a fixture of its file, the page's server or the browser runs in one worker."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    ranks = {}
    for path, tests in files.items():
        kinds = kinds_of(path)
        group = path.name
        if any({"address", "browser"} & set(getattr(item, "fixturenames", ())) for item in tests):
            kinds, group = sorted({*kinds, "browser"}), "browser"
        ranks[path] = min(ORDER.index(kind) for kind in kinds or [""])
        for item in tests:
            for kind in kinds:
                item.add_marker(kind)
            if not SPLIT & set(kinds):
                item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: ranks[item.path])


def pytest_collection_finish() -> None:
    """Take what was collected out of the sight of the garbage collector, which else goes through it in each of its rounds."""
    gc.collect()
    gc.freeze()


def pytest_report_header() -> str:
    info = pysal.build_info()
    return f"pysal: compiled={info['compiled']} simd={info.get('simd')} cuda={info['cuda']} torch={info['torch']}"


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill uninitialised outputs with NaN (or the largest integer), so that a kernel that skips an element is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def twice_as_fast(budget: Budget, name: str, way: Any) -> float:
    """Stand for a clock by which every prepared model is twice as fast as the model, and every row costs the same."""
    if name.endswith(" rows"):
        way()
        return float(name.removesuffix(" rows"))
    return 2.0 if name.startswith("model's ") else 1.0


@pytest.fixture(autouse=True)
def preparing_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every model that can be prepared run prepared, whatever a clock says of small ones on a busy machine."""
    monkeypatch.setattr(Budget, "seconds", twice_as_fast)


@pytest.fixture(autouse=True)
def small_regions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have XRAI look for regions in 64 x 64 pixels where the core asks what goes for any; tests/pair has all 224 x 224."""
    if "pysal.methods.xrai" in sys.modules and request.node.get_closest_marker("core"):
        monkeypatch.setattr("pysal.methods.xrai.SIZE", (64, 64))


@pytest.fixture
def independence_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make no pass to find out whether rows depend on each other or on chance, for tests that count or keep passes."""
    monkeypatch.setattr(Plan, "check_independence", lambda self, number=2, again=False: None)
    monkeypatch.setattr(Plan, "_check_chance", lambda self: None)
    monkeypatch.setattr(Plan, "_works_on_whole", lambda self, model, rows: False)


# What was compared with captum is said at the end, whichever worker compared it.


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None and "tests.captum.peer" in sys.modules:
        output["captum"] = sys.modules["tests.captum.peer"].FOUND


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for name, (count, worst) in getattr(node, "workeroutput", {}).get("captum", {}).items():
        before, largest = COMPARED.get(name, (0, 0.0))
        COMPARED[name] = (before + count, max(largest, worst))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    here = getattr(sys.modules.get("tests.captum.peer"), "FOUND", {})
    for name, (count, worst) in sorted((COMPARED or here).items()):
        terminalreporter.write_line(f"captum: {name:24} {count:4} cases, largest difference {worst:.1e}")
