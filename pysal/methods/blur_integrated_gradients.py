"""Blur Integrated Gradients: the path runs from the blurriest version of the image to the image itself."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pysal import ops
from pysal._checks import check_number, refuse_unknown
from pysal.engine.paths.path import Path, Steps, integrate
from pysal.engine.paths.quadrature import Array, Placement, Quadrature
from pysal.engine.request.attribution import Attribution
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.fills import check_units
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.target import Target
from pysal.engine.request.work import Work
from pysal.engine.running.chunks import to_device
from pysal.engine.running.precision import Precision
from pysal.methods.integrated_gradients import path_details

# Step h of the difference quotient (L(sigma + h) - L(sigma)) / h, in pixels; PAIR's default.
STEP = 0.01


def blur_integrated_gradients(
    model: Model,
    inputs: Tensor,
    target: Target = None,
    *,
    max_sigma: float = 50.0,
    steps: int = 100,
    sqrt: bool = False,
    boundary: Literal["constant", "reflect"] = "constant",
    derivative: Literal["difference", "analytic"] = "difference",
    quadrature: Quadrature | None = None,
    placement: Placement = "squared",
    tolerance: float | None = None,
    max_steps: int = 1000,
    score: ScoreKind = "logit",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the integral of -dL/dsigma times the gradient at L(sigma), the image blurred by a Gaussian of width sigma.

    The sum of an image's map is f(x) - f(the blurriest image), except for the completeness residual, which `explain` reports.

    Args:
        model: an nn.Module in eval mode, or any differentiable callable.
        inputs: (B, C, H, W), floating point.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        max_sigma: width of the blurriest image, pixels, > 0; with `sqrt` the width is its square root.
        steps: number of gradients per image.
        sqrt: sigma_i = sqrt(max_sigma i / steps) instead of max_sigma i / steps.
        boundary: what lies outside the image: "constant" = zero, or "reflect" = its mirror image, which keeps the brightness.
        derivative: how dL/dsigma is computed: "difference", over a step of 0.01 pixels, or "analytic".
        quadrature: rule of integration: "midpoint" (default), "left", "right", "trapezoid" or "gauss_legendre".
        placement: where the steps are: "squared", closer together towards the sharp image; "uniform", as in the paper, which
            with quadrature="left" is PAIR's sum; "adaptive", see `integrated_gradients`.
        tolerance: see `integrated_gradients`.
        max_steps: see `integrated_gradients`.
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
        Xu, Venugopalan and Sundararajan 2020, arXiv:2004.03383, equation 6.
    """
    running = Running(score, extra_inputs, batch_size, precision, dtype)
    plan = Plan("pysal.blur_integrated_gradients", model, inputs, target, running)
    work = prepare(
        plan,
        max_sigma=max_sigma,
        steps=steps,
        sqrt=sqrt,
        boundary=boundary,
        derivative=derivative,
        quadrature=quadrature,
        placement=placement,
        tolerance=tolerance,
        max_steps=max_steps,
    )
    return work.run(report=False).map


def prepare(
    plan: Plan,
    *,
    max_sigma: float,
    steps: int,
    sqrt: bool,
    boundary: Literal["constant", "reflect"],
    derivative: Literal["difference", "analytic"],
    quadrature: Quadrature | None,
    placement: Placement,
    tolerance: float | None,
    max_steps: int,
) -> Work:
    """Return the work that integrates over the blurs of a plan's images.

    Details: "steps" (B,), with a tolerance "error" (B,), where it reports "residual" (B,).
    """
    how = Steps.check(
        plan.where, quadrature=quadrature, placement=placement, steps=steps, tolerance=tolerance, max_steps=max_steps
    )
    max_sigma = check_number(plan.where, "max_sigma", max_sigma, above=True, unit=" of pixels")
    if boundary not in ("constant", "reflect"):
        refuse_unknown(plan.where, "boundary", "be 'constant' or 'reflect'", boundary, ("constant", "reflect"))
    if derivative not in ("difference", "analytic"):
        refuse_unknown(plan.where, "derivative", "be 'difference' or 'analytic'", derivative, ("difference", "analytic"))
    if boundary == "constant":
        check_units(plan, "boundary='constant'", 0.0)
    blur = _Blur(max_sigma, sqrt, boundary, STEP if derivative == "difference" else 0.0)
    return Work(plan, lambda report: _integrated(plan, blur, how, report))


@dataclass(frozen=True)
class _Blur:
    """The path of blurs: its widest, whether widths grow with the square root, and how L and dL/dsigma are taken."""

    max_sigma: float
    sqrt: bool
    boundary: Literal["constant", "reflect"]
    step: float

    def sigma(self, s: Array) -> Array:
        """Return the width at s in [0, 1]."""
        return np.sqrt(self.max_sigma * s) if self.sqrt else self.max_sigma * s

    def slope(self, s: Array) -> Array:
        """Return dsigma/ds."""
        if not self.sqrt:
            return np.full_like(s, self.max_sigma)
        # 0 where it is infinite: there sigma is 0, and so is dL/dsigma, faster than any power of s on a grid of pixels
        return np.divide(math.sqrt(self.max_sigma) / 2, np.sqrt(s), out=np.zeros_like(s), where=s > 0)


def _integrated(plan: Plan, blur: _Blur, how: Steps, report: bool) -> Attribution:
    plan.fix_target()
    images = plan.images
    owners = torch.arange(images, device=plan.device)

    def points(paths: NDArray[np.int64], sigmas: Array) -> tuple[Tensor, Tensor]:
        if (paths == paths[0]).all():  # the usual case of one image, many steps: no copies of the image
            chosen = plan.inputs[paths[0] : paths[0] + 1].expand(len(paths), -1, -1, -1)
        else:
            chosen = plan.inputs[to_device(paths, plan.device)]
        return ops.gaussian_scale_space_derivative(chosen, sigmas.tolist(), step=blur.step, boundary=blur.boundary)

    def finish(integrals: Tensor, _paths: Tensor) -> Tensor:
        return -integrals

    integral = integrate(plan, Path(owners, points, finish, blur.sigma, blur.slope), how, report)
    result = finish(integral.total, owners)
    blurriest = float(blur.sigma(np.ones(1))[0])

    def first_scores() -> Tensor:
        scores: list[Tensor] = []

        def body(start: int, stop: int) -> None:
            blurred = ops.gaussian_scale_space(plan.inputs[start:stop], [blurriest] * (stop - start), boundary=blur.boundary)
            scores.append(plan.scores(blurred, owners[start:stop])[0])

        plan.run(images, body)
        return torch.cat(scores)

    passes = float(integral.steps.sum()) / images
    details = path_details(plan, integral, owners, result, first_scores if report else None)
    return Attribution(result.to(plan.dtype), passes, details)
