"""Set-up of the whole suite."""

import warnings

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # an uncompiled checkout says so; PYSAL_REQUIRE=cpu makes it fail
    import pysal._library
    from pysal.engine.request.plan import Plan


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


@pytest.fixture
def independence_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make no pass to find out whether the rows of a model depend on each other, for tests that count or keep passes."""
    monkeypatch.setattr(Plan, "check_independence", lambda self, number=2, again=False: None)
    monkeypatch.setattr(Plan, "_works_on_whole", lambda self, model, rows: False)
