"""The peers import compilers and solvers at once that what is compared here never calls; they are installed without them."""

import sys
import warnings
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest


def as_it_is(*given: Any, **_options: Any) -> Any:
    """Stand for a decorator that compiles: the function stays as it is."""
    return given[0] if given and callable(given[0]) else lambda function: function


class Absent(ModuleType):
    """Stands for a module that is not installed."""

    __path__: list[str] = []  # noqa: RUF012
    List = list

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return as_it_is


ABSENT = {
    "numba": ("numba", "numba.typed"),
    "sparse_transform": (
        *("sparse_transform", "sparse_transform.qsft", "sparse_transform.qsft.qsft", "sparse_transform.qsft.utils"),
        *("sparse_transform.qsft.utils.general", "sparse_transform.qsft.utils.query", "sparse_transform.qsft.signals"),
        "sparse_transform.qsft.signals.input_signal_subsampled",
    ),
    "colour": ("colour",),
}
INSTALLED = all(find_spec(name) is not None for name in ("shap", "shapiq"))


@pytest.fixture(scope="session")
def peers() -> tuple[Any, Any]:
    """Shap's Partition and shapiq's ExactComputer, which take seconds to import."""
    lacking = [name for package, modules in ABSENT.items() if find_spec(package) is None for name in modules]
    sys.modules.update({name: Absent(name) for name in lacking})
    if "numba" in lacking:
        sys.modules["numba"].typed = sys.modules["numba.typed"]  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of matplotlib, about their colours
        from shap.explainers import Partition
        from shapiq.game_theory.exact import ExactComputer
    for name in lacking:
        del sys.modules[name]
    return Partition, ExactComputer


# Where the peers are not installed, as on a machine that is lent for its GPU, the other tests still run.
collect_ignore_glob = [] if INSTALLED else ["test_*.py"]
