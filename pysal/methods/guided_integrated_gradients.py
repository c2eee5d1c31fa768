"""Guided Integrated Gradients: the path avoids pixels with large gradients as long as it can."""

import functools
import math

import torch
from torch import Tensor

from pysal._checks import MOST, check_count, refuse
from pysal.engine.paths.guided import GuidedPaths
from pysal.engine.request.attribution import Attribution
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.fills import Fill
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.target import Target
from pysal.engine.request.work import Work
from pysal.engine.running.precision import Precision
from pysal.methods.integrated_gradients import baselines_of, scores_of


def guided_integrated_gradients(
    model: Model,
    inputs: Tensor,
    target: Target = None,
    *,
    baseline: Fill | list[Fill] = 0.0,
    steps: int = 200,
    fraction: float = 0.25,
    max_distance: float = 0.02,
    score: ScoreKind = "logit",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the integral of the gradient from a baseline to the image, on a path along which the gradients are small.

    At each step the values with the smallest |gradient| move towards the image, until the sum of all distances to it has become
    smaller by its share. The sum of an image's map is f(x) - f(x'), except for the completeness residual.

    Args:
        model: an nn.Module in eval mode, or any differentiable callable.
        inputs: (B, C, H, W), floating point.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        baseline: see `integrated_gradients`.
        steps: number of gradients per image and baseline, one after the other: a pass holds one row of each.
        fraction: share of the values that move at a time, 0 to 1. 1 is the straight path.
        max_distance: how far a value may be ahead of the straight path, or behind it, in shares of its own way, 0 to 1. 0 is
            the straight path, 1 lets every value move whenever it likes.
        score: which number of the target's column is explained. "logit" or "raw": the output as it is. "auto": the target's
            probability if the output tells one, else the output as it is. "probability" and "log_probability": the same, but
            one number per image outside [0, 1] is refused. "softmax", "log_softmax" (classes exclude each other), "sigmoid",
            "log_sigmoid" (independent labels, or a binary logit): that function, whatever the output is. What the output is
            (numbers, probabilities, logits) is found out from all images of the call together.
        extra_inputs: further arguments of the model, by position (a sequence) or by name (a mapping). Mark one that is as long
            as there are images: `pysal.PerImage(x)` has a row for each image, `pysal.Shared(x)` is the same for all.
        batch_size: most rows per model pass; None = chosen by speed and memory. Changes the result by rounding only. The model
            must answer for each row as if it were alone, which is checked by passes of two rows and of one. With `batch_size=B`
            it need not: every pass then holds the whole batch in its order.
        precision: "float32", "tf32", "mixed" (float32 forward, bf16 backward) or "bf16" (rounding switches some ReLUs).
        dtype: dtype of the result; None = float32, or float64 for float64 inputs.

    Returns:
        (B, C, H, W), signed.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, value or target.

    Source:
        Kapishnikov et al. 2021, arXiv:2106.09788, algorithm 1 and, for `max_distance`, section 4.3 as its authors' code has it.
    """
    running = Running(score, extra_inputs, batch_size, precision, dtype)
    plan = Plan("pysal.guided_integrated_gradients", model, inputs, target, running)
    work = prepare(plan, baseline=baseline, steps=steps, fraction=fraction, max_distance=max_distance)
    return work.run(report=False).map


def prepare(plan: Plan, *, baseline: Fill | list[Fill], steps: int, fraction: float, max_distance: float) -> Work:
    """Return the work that follows the guided paths of a plan's images.

    Details: "steps" (B,), where it reports "residual" (B,).
    """
    check_count(plan.where, "steps", steps, most=MOST)
    for name, value in (("fraction", fraction), ("max_distance", max_distance)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value) or not 0 <= value <= 1:
            refuse(plan.where, name, "be a number from 0 to 1", repr(value))
    baselines = baselines_of(plan, baseline)
    return Work(plan, lambda report: _followed(plan, baselines, steps, fraction, max_distance, report))


def _followed(plan: Plan, baselines: Tensor, steps: int, fraction: float, max_distance: float, report: bool) -> Attribution:
    plan.fix_target()
    number = len(baselines)
    many = number // plan.images
    owners = torch.arange(plan.images, device=plan.device).repeat_interleave(many)
    images, numbers = plan.places(0, number, many)
    queue = images * many + numbers
    paths = GuidedPaths(baselines, plan.inputs[owners], steps=steps, fraction=fraction, max_distance=max_distance)

    @functools.cache
    def part(start: int, stop: int) -> tuple[Tensor, Tensor]:
        some = queue[start:stop]
        return some, owners[some]

    def body(start: int, stop: int) -> None:
        step = start // number
        some, rows = part(start - step * number, stop - step * number)
        batch = plan.laid_out(paths.places[some].to(plan.inputs.dtype))
        paths.advance(some, step, plan.gradients(batch, rows))

    # a step of a path begins where its last one ended: no pass reaches from one step into the next
    plan.run(steps * number, body, ends=range(number, steps * number, number))
    maps = paths.total.unflatten(0, (plan.images, many)).mean(1)
    details = {"steps": torch.full((plan.images,), steps * many, device="cpu", dtype=torch.int64)}
    if report:
        fell = plan.clean_scores()[0][owners] - scores_of(plan, owners, baselines)
        details["residual"] = (paths.total.flatten(1).sum(1) - fell).unflatten(0, (plan.images, many)).mean(1)
    return Attribution(maps.to(plan.dtype), steps * many, details)
