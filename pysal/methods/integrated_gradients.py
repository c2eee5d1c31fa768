"""Integrated Gradients."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pysal import ops
from pysal._checks import check_flag, refuse
from pysal._library import widened
from pysal.engine.paths.path import Integral, Path, Steps, integrate
from pysal.engine.paths.quadrature import Array, Placement, Quadrature
from pysal.engine.request.attribution import Attribution
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.fills import Fill, resolve_fill
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.target import Target
from pysal.engine.request.work import Work
from pysal.engine.running.chunks import to_device
from pysal.engine.running.precision import Precision
from pysal.engine.running.states import recorded


def integrated_gradients(
    model: Model,
    inputs: Tensor,
    target: Target = None,
    *,
    baseline: Fill | list[Fill] = 0.0,
    steps: int = 50,
    quadrature: Quadrature | None = None,
    placement: Placement = "squared",
    tolerance: float | None = None,
    max_steps: int = 1000,
    create_graph: bool = False,
    score: ScoreKind = "logit",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return (x - x') times the mean gradient on the straight path from a baseline x' to the image x.

    The sum of an image's map is f(x) - f(x'), except for the completeness residual, which `explain` reports. A small residual
    does not mean a small error of the map; `tolerance` controls the error.

    Args:
        model: an nn.Module in eval mode, or any differentiable callable.
        inputs: (B, C, H, W), floating point.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        baseline: a number, a colour (a tuple of C numbers), "black", "white", "mean", "blur", an image, or a list of these,
            over which the maps are averaged.
        steps: number of gradients per image and baseline.
        quadrature: rule of integration: "midpoint" (default), "gauss_legendre", "left", "right" or "trapezoid". The weights of
            each sum to 1.
        placement: where the steps are on the path, a in [0, 1]: "squared", a = t^2, close to the baseline, where the gradient
            changes most; "uniform"; "adaptive", in proportion to the square root of the change of f over 8 intervals, found
            with 9 forward passes. `docs/quadrature.md` measures them.
        tolerance: halve the step for each image until the estimated relative l2 error of its map is below this number. The
            rule of integration is then the trapezoid rule.
        max_steps: most gradients per image and baseline with `tolerance`.
        create_graph: see `gradient`; the graph of every step stays in memory. Baselines that are given are constants. Not
            with a `tolerance`.
        score: which number of the target's column is explained. "logit" or "raw": the output as it is. "auto": the target's
            probability if the output tells one, else the output as it is. "probability" and "log_probability": the same, but
            one number per image outside [0, 1] is refused. "softmax", "log_softmax" (classes exclude each other), "sigmoid",
            "log_sigmoid" (independent labels, or a binary logit): that function, whatever the output is. What the output is
            (numbers, probabilities, logits) is found out from all images of the call together.
        extra_inputs: further arguments of the model, by position (a sequence) or by name (a mapping). Mark one that is as long
            as there are images: `pysal.PerImage(x)` has a row for each image, `pysal.Shared(x)` is the same for all.
        batch_size: most rows per model pass; None = chosen by speed and memory. Changes the result by rounding only. The model
            must answer for each row as if it were alone, which is checked by passes of two rows and of one. With `batch_size=B`
            it need not: every pass then holds the whole batch in its order. Memory grows with it, not with `steps`.
        precision: "float32", "tf32", "mixed" (float32 forward, bf16 backward) or "bf16" (rounding switches some ReLUs).
        dtype: dtype of the result; None = float32, or float64 for float64 inputs.

    Returns:
        (B, C, H, W), signed.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, value or target.

    Source:
        Sundararajan, Taly and Yan 2017, arXiv:1703.01365, equations 1 and 3. Adaptive placement after Bhat and Raychowdhury
        2023, arXiv:2302.11107.
    """
    plan = Plan("pysal.integrated_gradients", model, inputs, target, Running(score, extra_inputs, batch_size, precision, dtype))
    keeps_graph = check_flag(plan.where, "create_graph", create_graph)
    if keeps_graph and tolerance is not None:
        refuse(plan.where, "tolerance", "be None where create_graph is True", repr(tolerance))
    if keeps_graph and any(isinstance(one, Tensor) and one.requires_grad for one in _several(baseline)):
        refuse(plan.where, "baseline", "not require gradients: it is a constant", "a tensor that does")

    def find() -> Tensor:
        work = prepare(
            plan.connected(inputs) if keeps_graph else plan,
            baseline=baseline,
            steps=steps,
            quadrature=quadrature,
            placement=placement,
            tolerance=tolerance,
            max_steps=max_steps,
        )
        return work.run(report=False).map

    return recorded(find) if keeps_graph else find()


def prepare(
    plan: Plan,
    *,
    baseline: Fill | list[Fill],
    steps: int,
    quadrature: Quadrature | None,
    placement: Placement,
    tolerance: float | None,
    max_steps: int,
) -> Work:
    """Return the work that integrates the gradients of a plan.

    Details: "steps" (B,), with a tolerance "error" (B,), where it reports "residual" (B,).
    """
    how = Steps.check(
        plan.where, quadrature=quadrature, placement=placement, steps=steps, tolerance=tolerance, max_steps=max_steps
    )
    return from_baselines(plan, baselines_of(plan, baseline), how)


def from_baselines(plan: Plan, baselines: Tensor, how: Steps) -> Work:
    """Return the work that integrates from baselines (B * many, C, H, W), those of an image side by side."""
    return Work(plan, lambda report: _integrated(plan, baselines, how, report))


def _integrated(plan: Plan, baselines: Tensor, how: Steps, report: bool) -> Attribution:
    plan.fix_target()

    # One path for each image and baseline: path p leads from baselines[p] to image owners[p].
    many = len(baselines) // plan.images
    owners = torch.arange(plan.images, device=plan.device).repeat_interleave(many)
    ends = plan.inputs if many == 1 else plan.inputs[owners]

    def points(paths: NDArray[np.int64], alphas: Array) -> tuple[Tensor, None]:
        rows, places = (to_device(array, plan.device) for array in (paths, alphas))
        return ops.path_integral_points(ends, baselines, rows, places, channels_last=plan.channels_last), None

    def finish(integrals: Tensor, paths: Tensor) -> Tensor:
        return ops.path_integral_product(ends[paths], baselines[paths], integrals)

    integral = integrate(plan, Path(owners, points, finish), how, report)
    maps = finish(integral.total, torch.arange(len(owners), device=plan.device))
    result = maps.unflatten(0, (plan.images, many)).mean(1)
    passes = float(integral.steps.sum()) / plan.images
    first_scores = functools.partial(scores_of, plan, owners, baselines) if report else None
    details = path_details(plan, integral, owners, maps, first_scores)
    return Attribution(result.to(plan.dtype), passes, details)


def path_details(
    plan: Plan, integral: Integral, owners: Tensor, maps: Tensor, first_scores: Callable[[], Tensor] | None
) -> dict[str, Any]:
    """Return what is reported of the paths of each image: means over its baselines, the largest error of them.

    Args:
        plan: of the images.
        integral: of the paths.
        owners: (P,) their images.
        maps: (P, C, H, W) of each path.
        first_scores: f (P,) where each path begins; None = no residual, which takes passes of its own.
    """
    images = plan.images
    details: dict[str, Any] = {}
    if first_scores is not None:
        residual = widened(maps).flatten(1).sum(1) - (plan.clean_scores()[0][owners] - first_scores())
        details["residual"] = residual.unflatten(0, (images, -1)).mean(1)
    details["steps"] = torch.from_numpy(integral.steps).unflatten(0, (images, -1)).sum(1)
    if integral.error is not None:
        details["error"] = torch.from_numpy(integral.error).unflatten(0, (images, -1)).amax(1)
    return details


def baselines_of(plan: Plan, baseline: Fill | list[Fill]) -> Tensor:
    """Return the baselines of all images, (B * many, C, H, W), those of an image side by side."""
    several = _several(baseline)
    if not several:
        refuse(plan.where, "baseline", "hold at least one baseline", "an empty list")
    resolved = [resolve_fill(plan, "baseline", one) for one in several]
    if len(resolved) == 1:
        return resolved[0].contiguous()
    return torch.stack(resolved, 1).flatten(0, 1)


def _several(baseline: Fill | list[Fill]) -> list[Fill]:
    return baseline if isinstance(baseline, list) else [baseline]


def scores_of(plan: Plan, owners: Tensor, batch: Tensor) -> Tensor:
    """Return f of changed images (P, C, H, W), in chunks."""
    many = len(batch) // plan.images
    found: list[Tensor] = []
    images, numbers = plan.places(0, len(batch), many)
    rows = images * many + numbers

    def body(start: int, stop: int) -> None:
        some = rows[start:stop]
        found.append(plan.scores(batch[some], owners[some])[0])

    plan.run(len(batch), body)
    scores = torch.cat(found)
    return torch.empty_like(scores).index_copy_(0, rows, scores)
