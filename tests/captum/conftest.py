"""How many combinations of arguments are compared."""

import itertools
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import pytest

from tests.captum.pairwise import pairwise

# Where the peer is not installed, as on a machine that is lent for its GPU, the other tests still run.
collect_ignore_glob = ["test_*.py"] if find_spec("captum") is None else []


@pytest.fixture
def combinations(request: pytest.FixtureRequest) -> Callable[..., Sequence[tuple[Any, ...]]]:
    """Return the combinations of one value per axis: with --whole all, else those of `pairwise`."""
    whole = request.config.getoption("--whole")
    return lambda *axes: list(itertools.product(*axes)) if whole else pairwise(*axes)
