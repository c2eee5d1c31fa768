"""Every public method by name, with options that keep it quick, and models that show when and how they are run."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pysal
from pysal.engine.request.plan import Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.target import Target
from tests.methods.networks import seeded


def interactions(*args: Any, **options: Any) -> Tensor:
    """The map of interactions."""
    return pysal.interactions(*args, **options).map


CALLS: dict[str, Callable[..., Tensor]] = {
    "leave_one_out": functools.partial(pysal.leave_one_out, segments=pysal.Grid(2, 2)),
    "gradient": pysal.gradient,
    "guided_backprop": pysal.guided_backprop,
    "grad_cam": pysal.grad_cam,
    "guided_grad_cam": pysal.guided_grad_cam,
    "smooth_grad": functools.partial(pysal.smooth_grad, samples=3),
    "integrated_gradients": functools.partial(pysal.integrated_gradients, steps=5),
    "blur_integrated_gradients": functools.partial(pysal.blur_integrated_gradients, steps=4, max_sigma=2.0),
}
VARIANTS: dict[str, Callable[..., Tensor]] = {
    **CALLS,
    "deconvnet": functools.partial(pysal.guided_backprop, rule="deconvnet"),
    "leave_one_out of superpixels": functools.partial(pysal.leave_one_out, segments=pysal.Slic(6), fill="blur"),
    "leave_one_out both ways": functools.partial(pysal.leave_one_out, segments=pysal.Grid(2, 2), mode="both"),
    "guided_integrated_gradients": functools.partial(pysal.guided_integrated_gradients, steps=4, max_distance=0.5),
    "xrai": functools.partial(pysal.xrai, steps=2, segments=pysal.Grid(2, 2)),
    "xrai of its own regions": functools.partial(pysal.xrai, steps=2, algorithm="fast"),
    "shapley": functools.partial(pysal.shapley, segments=pysal.Grid(2, 2)),
    "shapley of random orders": functools.partial(pysal.shapley, segments=pysal.Grid(3, 3), tree="flat", passes=40),
    "interactions": functools.partial(interactions, segments=pysal.Grid(2, 2)),
    "interactions of chosen pairs": functools.partial(interactions, segments=pysal.Grid(3, 3), passes=30),
    "rise": functools.partial(pysal.rise, samples=6, cells=3),
    "smooth_grad variance": functools.partial(pysal.smooth_grad, samples=4, kind="variance"),
    "smooth_grad of integrated_gradients": functools.partial(
        pysal.smooth_grad, samples=3, base="integrated_gradients", method_options={"steps": 3}
    ),
    "smooth_grad of guided_grad_cam": functools.partial(pysal.smooth_grad, samples=3, base="guided_grad_cam"),
    "integrated_gradients adaptive": functools.partial(pysal.integrated_gradients, steps=12, placement="adaptive"),
    "integrated_gradients to a tolerance": functools.partial(
        pysal.integrated_gradients, tolerance=0.9, max_steps=33, baseline=["black", "mean"]
    ),
    "blur_integrated_gradients to a tolerance": functools.partial(
        pysal.blur_integrated_gradients, tolerance=0.9, max_steps=33, max_sigma=2.0
    ),
}


def request(model: Callable[..., Any], inputs: Tensor, target: Target, *, score: ScoreKind = "logit") -> Plan:
    """A plan as the methods make it where nothing else is asked for."""
    return Plan("pysal.gradient", model, inputs, target, Running(score, (), None, "float32", None))


class RowByRow(nn.Module):
    """A ReLU network whose scores of one image are the same bits whatever else is in its batch; spatial layer "second"."""

    def __init__(self, channels: int = 3, size: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, 5, 3, padding=1), nn.Conv2d(5, 4, 3, padding=1)
        self.weights = nn.Parameter(torch.randn(classes, 4, size, size))
        self.relu = nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.relu(self.second(self.relu(self.first(inputs))))
        return (hidden[:, None] * self.weights).flatten(2).sum(2)


def row_by_row(**sizes: int) -> RowByRow:
    return seeded(lambda: RowByRow(**sizes))  # type: ignore[return-value]


class Watched(nn.Module):
    """Runs `before(rows)` ahead of every pass of a model: to count passes, to fail, to cancel."""

    def __init__(self, model: nn.Module, before: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model, self.before = model, before
        self.eval()

    def forward(self, inputs: Tensor, *rest: Any, **named: Any) -> Any:
        self.before(inputs)
        return self.model(inputs, *rest, **named)
