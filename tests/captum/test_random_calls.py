"""Calls drawn at random: any number of inputs of any rank and dtype, outputs, targets, baselines, windows and masks."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.captum.peer import IGNORED, agree, peers

pytestmark = [pytest.mark.filterwarnings(one) for one in IGNORED]

EXACT = 1e-9
SINGLE = 4 * torch.finfo(torch.float32).eps


class Draw:
    """One call, drawn with a seed."""

    def __init__(self, seed: int, dtypes: list[torch.dtype]) -> None:
        self.draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.rows = self.draw.randint(1, 4)
        self.shapes = [
            tuple(self.draw.randint(1, 5) for _ in range(self.draw.choice([1, 2, 3, 3])))
            for _ in range(self.draw.choice([1, 1, 2, 3]))
        ]
        self.tensors = [
            (torch.randn(self.rows, *shape, generator=generator, dtype=torch.float64) * 3).to(self.draw.choice(dtypes))
            for shape in self.shapes
        ]
        self.weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.shapes]
        self.classes = self.draw.choice([0, 1, 3])
        self.generator = generator
        single = len(self.shapes) == 1 and self.draw.random() < 0.6
        self.inputs: Any = self.tensors[0] if single else tuple(self.tensors)

    def forward(self, *inputs: Tensor) -> Tensor:
        scores = sum(
            (one.double() * weight).flatten(1).sum(1).sin() + one.double().square().flatten(1).sum(1) / 9
            for one, weight in zip(inputs, self.weights, strict=True)
        )
        assert isinstance(scores, Tensor)
        return torch.stack([scores * (i + 1) for i in range(self.classes)], 1) if self.classes else scores

    def target(self, *, optional: bool = False) -> Any:
        if not self.classes or (optional and self.draw.random() < 0.3):
            return None
        several = [self.draw.randrange(self.classes) for _ in range(self.rows)]
        return self.draw.choice([several, several[0], torch.tensor(several), (several[0],)])

    def baselines(self) -> Any:
        if self.draw.random() < 0.3:
            return None
        return tuple(self.draw.choice([0, 1, 0.5, one[:1], one.flip(0)]) for one in self.tensors)


def compare(name: str, draw: Draw, tolerance: float, call: Callable[[Any], Any], **ours: Any) -> None:
    """The answers agree, or both calls fail."""
    answers = []
    for one in peers(name, draw.forward, **ours):
        try:
            answers.append(call(one))
        except (RuntimeError, AssertionError) as error:
            answers.append(type(error))
    if isinstance(answers[0], type):
        assert answers[0] is answers[1]
    else:
        agree(name, *answers, tolerance)


@pytest.mark.parametrize("seed", range(8))
def test_gradients(seed: int) -> None:
    for number in range(20):
        draw = Draw(100 * seed + number, [torch.float64, torch.float64, torch.float32])
        tolerance = EXACT if all(one.dtype == torch.float64 for one in draw.tensors) else 32 * SINGLE
        target, absolute = draw.target(), draw.draw.random() < 0.5
        compare("Saliency", draw, tolerance, lambda one: one.attribute(draw.inputs, target, absolute))  # noqa: B023 (called at once)
        options = {
            "baselines": draw.baselines(),
            "target": target,
            "n_steps": draw.draw.randint(2, 9),
            "method": draw.draw.choice(["gausslegendre", "riemann_left", "riemann_middle", "riemann_trapezoid"]),
            "internal_batch_size": draw.draw.choice([None, 1, 4, 30]),
            "return_convergence_delta": draw.draw.random() < 0.5,
        }
        compare(
            "IntegratedGradients",
            draw,
            tolerance,
            lambda one: one.attribute(draw.inputs, **options),  # noqa: B023 (called at once)
            exact_captum=True,
        )


@pytest.mark.parametrize("seed", range(8))
def test_ablations(seed: int) -> None:
    for number in range(25):
        draw = Draw(100 * seed + number, [torch.float64, torch.float64, torch.float32, torch.int64])
        options: dict[str, Any] = {
            "baselines": draw.baselines(),
            "target": draw.target(optional=True),
            "perturbations_per_eval": draw.draw.choice([1, 2, 7]),
        }
        windows = tuple(tuple(draw.draw.randint(1, size) for size in shape) for shape in draw.shapes)
        steps = tuple(tuple(draw.draw.randint(1, side) for side in window) for window in windows)
        occlude = {**options, "strides": draw.draw.choice([None, steps, (1,) * len(steps)])}
        compare("Occlusion", draw, SINGLE, lambda one: one.attribute(draw.inputs, windows, **occlude))  # noqa: B023 (called at once)
        own = options["target"] is not None or not draw.classes  # for several outputs captum takes no mask of each example
        masks = tuple(
            torch.randint(-2, 4, (draw.draw.choice([1, draw.rows if own else 1]), *shape), generator=draw.generator)
            for shape in draw.shapes
        )
        ablate = {**options, "feature_mask": draw.draw.choice([None, masks])}
        compare("FeatureAblation", draw, EXACT, lambda one: one.attribute(draw.inputs, **ablate))  # noqa: B023 (called at once)
