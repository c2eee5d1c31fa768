"""One image gets the gradient it has among others, whatever order of memory gradients come in."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pysal
from tests.methods.networks import assert_rounding, gradients, images, seeded


def instance_normed(**options: bool) -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.InstanceNorm2d(8, **options),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.InstanceNorm2d(8, **options),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.Flatten(),
            nn.Linear(32, 4),
        )
    )


def last_channels(model: nn.Module, _example: Tensor) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def prepared_last_channels(model: nn.Module, example: Tensor) -> nn.Module:
    return pysal.prepare(last_channels(model, example), example)


@pytest.mark.parametrize("ready", [last_channels, pysal.prepare, prepared_last_channels])
@pytest.mark.parametrize("options", [{}, {"affine": True}, {"affine": True, "track_running_stats": True}], ids=str)
def test_one_image_under_instance_norm(ready: Callable[..., nn.Module], options: dict[str, bool]) -> None:
    model, batch = instance_normed(**options), images(2, 3, 8, 8)
    expected = gradients(model, batch, 1)  # of a network whose channels come first
    asked = ready(model, batch[:1])
    for size in (1, 2):
        assert_rounding(pysal.gradient(asked, batch, 1, batch_size=size), expected, 1000)
        assert_rounding(pysal.class_gradients(asked, batch, [1], batch_size=size)[:, 0], expected, 1000)
    assert_rounding(pysal.gradient(asked, batch[:1], 1), expected[:1], 1000)
    assert_rounding(pysal.captum.Saliency(asked).attribute(batch[:1], 1, abs=False), expected[:1], 1000)
