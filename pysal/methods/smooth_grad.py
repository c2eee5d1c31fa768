"""SmoothGrad: the mean of another method's maps over noisy copies of the image."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pysal import ops
from pysal._checks import MOST, check_choice, check_count, check_ids, check_number, check_seed, refuse_unknown
from pysal._library import widened
from pysal.engine.request.attribution import Attribution, checked_options, with_defaults
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.target import Target
from pysal.engine.request.work import Work
from pysal.engine.running.precision import Precision
from pysal.methods import (
    blur_integrated_gradients,
    grad_cam,
    gradient,
    guided_backprop,
    integrated_gradients,
    leave_one_out,
)

BASES: dict[str, Callable[..., Work]] = {
    public.__name__: with_defaults(core, public)
    for public, core in (
        (gradient.gradient, gradient.prepare),
        (guided_backprop.guided_backprop, guided_backprop.prepare),
        (grad_cam.grad_cam, grad_cam.prepare),
        (grad_cam.guided_grad_cam, grad_cam.prepare_guided),
        (integrated_gradients.integrated_gradients, integrated_gradients.prepare),
        (blur_integrated_gradients.blur_integrated_gradients, blur_integrated_gradients.prepare),
        (leave_one_out.leave_one_out, leave_one_out.prepare),
    )
}


def smooth_grad(
    model: Model,
    inputs: Tensor,
    target: Target = None,
    *,
    base: str = "gradient",
    method_options: Mapping[str, Any] | None = None,
    noise: float = 0.15,
    samples: int = 50,
    kind: Literal["mean", "squared", "variance"] = "mean",
    seed: int = 0,
    image_ids: Sequence[int] | Tensor | None = None,
    score: ScoreKind = "logit",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the mean of a method's maps over copies of the image with Gaussian noise.

    The noise depends only on the seed, the image's id, the sample and the element, not on the batch size, the device or the
    other images.

    Args:
        model: an nn.Module in eval mode, or any differentiable callable.
        inputs: (B, C, H, W), floating point.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class. Fixed on the clean image.
        base: name of the method to smooth: "gradient", "guided_backprop", "grad_cam", "guided_grad_cam",
            "integrated_gradients", "blur_integrated_gradients" or "leave_one_out".
        method_options: that method's own options. Superpixels are those of the clean image, the same in all its copies.
        noise: standard deviation of the noise in multiples of each image's range max - min, 0 or more.
        samples: number of noisy copies per image.
        kind: "mean" of the maps, of their squares ("squared"), or their "variance" (never negative).
        seed: whole number in [-2^63, 2^63).
        image_ids: one whole number of at least 0 per image, which picks its noise; None = its row in this call.
        score: which number of the target's column is explained. "logit" or "raw": the output as it is. "auto": the target's
            probability if the output tells one, else the output as it is. "probability" and "log_probability": the same, but
            one number per image outside [0, 1] is refused. "softmax", "log_softmax" (classes exclude each other), "sigmoid",
            "log_sigmoid" (independent labels, or a binary logit): that function, whatever the output is. What the output is
            (numbers, probabilities, logits) is found out from all images of the call together.
        extra_inputs: further arguments of the model, by position (a sequence) or by name (a mapping). Mark one that is as long
            as there are images: `pysal.PerImage(x)` has a row for each image, `pysal.Shared(x)` is the same for all.
        batch_size: most rows per model pass; None = chosen by speed and memory. Changes the result by rounding only. The model
            must answer for each row as if it were alone, which is checked by passes of two rows and of one. With `batch_size=B`
            it need not: every pass then holds the whole batch in its order. It is also the most noisy copies at once.
        precision: "float32", "tf32", "mixed" (float32 forward, bf16 backward) or "bf16" (rounding switches some ReLUs).
        dtype: dtype of the result; None = float32, or float64 for float64 inputs.

    Returns:
        The shape of the base method's map. `explain` reports the standard error of each pixel of a "mean" too.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, value or target.

    Source:
        Smilkov et al. 2017, arXiv:1706.03825; "squared": Hooker et al. 2018, arXiv:1806.10758; "variance": Adebayo et al. 2018,
        arXiv:1810.03307.
    """
    plan = Plan("pysal.smooth_grad", model, inputs, target, Running(score, extra_inputs, batch_size, precision, dtype))
    work = prepare(
        plan, base=base, method_options=method_options, noise=noise, samples=samples, kind=kind, seed=seed, image_ids=image_ids
    )
    return work.run(report=False).map


def prepare(
    plan: Plan,
    *,
    base: str,
    method_options: Mapping[str, Any] | None,
    noise: float,
    samples: int,
    kind: Literal["mean", "squared", "variance"],
    seed: int,
    image_ids: Sequence[int] | Tensor | None,
) -> Work:
    """Return the work that smooths a method over a plan's images.

    Details: "base", "kind", "samples", "standard_error" of the map's shape and, where the base has it, "approximation_error"
    (B,), the largest of each image's copies.
    """
    where = plan.where
    check_choice(where, "base", base, tuple(BASES))
    noise = check_number(where, "noise", noise)
    check_count(where, "samples", samples, most=MOST)
    if kind not in ("mean", "squared", "variance"):
        refuse_unknown(where, "kind", "be 'mean', 'squared' or 'variance'", kind, ("mean", "squared", "variance"))
    check_seed(where, seed)
    checked_ids = check_ids(plan.where, "image_ids", image_ids, plan.images, plan.device)
    options = checked_options(where, "method_options", BASES[base], method_options)
    BASES[base](plan, **options)  # refuses what it refuses of the clean images
    smoothing = _Smoothing(base, options, noise, samples, kind, seed, checked_ids)
    return Work(plan, lambda _report: _smoothed(plan, smoothing))


@dataclass(frozen=True)
class _Smoothing:
    """The options of SmoothGrad, checked; `image_ids` (B,) pick the noise of each image."""

    base: str
    options: Mapping[str, Any]
    noise: float
    samples: int
    kind: Literal["mean", "squared", "variance"]
    seed: int
    image_ids: Tensor


def _smoothed(plan: Plan, how: _Smoothing) -> Attribution:
    plan.fix_target()
    base, samples, kind, image_ids = how.base, how.samples, how.kind, how.image_ids
    flat = widened(plan.inputs.flatten(1))
    scales = how.noise * (flat.amax(1) - flat.amin(1))
    moments: list[Tensor] = []  # mean and sum of squared deviations: made when the first maps show their shape
    counts = torch.zeros(plan.images, dtype=torch.int64, device=plan.device)
    passes = 0.0
    errors: list[Tensor] = []  # of approximate maps: the largest of each image's copies

    details: dict[str, Any] = {"base": base, "kind": kind, "samples": samples}

    def body(start: int, stop: int) -> None:
        nonlocal passes
        rows, draws = plan.places(start, stop, samples)
        noisy = ops.gaussian_noise(
            plan.inputs, scales, how.seed, rows, image_ids[rows], draws, channels_last=plan.channels_last
        )
        copies = plan.derive(noisy, rows)
        copies.dtype = plan.accumulator_dtype  # the maps are rounded to the result's dtype once they are averaged
        found = BASES[base](copies, **how.options).run(report=False)
        maps = found.map.to(plan.accumulator_dtype)
        if not moments:
            shape = (plan.images, *maps.shape[1:])
            moments.extend([torch.zeros(shape, dtype=maps.dtype, device=plan.device) for _ in range(2)])
        if "mode" in found.details:
            details["mode"] = found.details["mode"]
        if (error := found.details.get("approximation_error")) is not None:
            if not errors:
                errors.append(error.new_zeros(plan.images))
            errors[0].scatter_reduce_(0, rows, error, "amax")
        ops.path_integral_moments_(moments[0], moments[1], counts, maps.square() if kind == "squared" else maps, rows)
        passes += found.passes * len(rows) / plan.images

    plan.run(plan.images * samples, body)
    mean, squares = moments
    if samples > 1:
        details["standard_error"] = (squares / (samples * (samples - 1))).sqrt()
    if errors:
        details["approximation_error"] = errors[0]
    result = squares / samples if kind == "variance" else mean
    return Attribution(result.to(plan.dtype), passes, details)
