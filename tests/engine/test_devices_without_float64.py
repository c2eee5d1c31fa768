"""A device that has no float64, as Apple's GPUs: nothing there is of that dtype unless the images are."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pysal
from pysal import _library
from tests import every_call
from tests.every_call import FACES, WORK
from tests.methods.calls import row_by_row
from tests.methods.networks import images
from tests.pretended import Elsewhere, Pretended, here, made_there, moved

DEVICE = torch.device("meta")  # of those that are not here, the one that torch lets through


@pytest.fixture
def without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "tensor", made_there(torch.tensor))
    monkeypatch.setattr(torch, "as_tensor", made_there(torch.as_tensor))
    monkeypatch.setattr(_library, "WITHOUT_FLOAT64", [DEVICE.type])
    monkeypatch.setattr(every_call, "MAPS", Elsewhere(every_call.MAPS, DEVICE))
    monkeypatch.setattr(every_call, "MASK", Elsewhere(every_call.MASK, DEVICE))
    monkeypatch.setitem(every_call.FIGURES["mass_in_mask"], "masks", Elsewhere(every_call.IMAGES.sum(1) > 1, DEVICE))


CALLS = {**WORK, **FACES}


def asked(name: str, model: Any, batch: Tensor) -> Any:
    torch.manual_seed(0)  # captum's noise is drawn from torch's own generator
    return CALLS[name](model, batch)


@functools.cache
def expected_of(name: str) -> Any:
    return asked(name, row_by_row().float(), images(2, 3, 8, 8).float())


def assert_same(found: Any, expected: Any) -> None:
    """Float32 on both sides, in other kernels."""
    if isinstance(expected, tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, (Tensor, np.ndarray)):
        found, expected = (torch.as_tensor(here(one)).detach().double() for one in (found, expected))
        assert torch.equal(found.isnan(), expected.isnan())  # where a figure has no value
        found, expected = found.nan_to_num(), expected.nan_to_num()
        size = float(expected.abs().max())
        assert float((found - expected).abs().max()) <= 1000 * torch.finfo(torch.float32).eps * size


@pytest.mark.filterwarnings("ignore:.*has no native kernel")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("prepared", [False, True])
def test_nothing_is_float64_there(name: str, prepared: bool, request: pytest.FixtureRequest) -> None:
    expected = expected_of(name)
    request.getfixturevalue("without_float64")
    batch = Elsewhere(images(2, 3, 8, 8).float(), DEVICE)
    with Pretended(DEVICE):
        model = moved(row_by_row().float(), DEVICE)
        found = asked(name, pysal.prepare(model, batch[:1]) if prepared else model, batch)
    assert_same(found, expected)
