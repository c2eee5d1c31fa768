"""Average drop and increase: the score of an image that is seen through its map alone."""

import torch
from torch import Tensor

from pysal._checks import finite_rows
from pysal._library import widened, widest
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.target import Target
from pysal.engine.running.precision import Precision
from pysal.metrics._maps import Reduction, check_maps, per_pixel


def average_drop(
    model: Model,
    inputs: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    reduction: Reduction = "sum",
    score: ScoreKind = "auto",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
) -> Tensor:
    """Return by what share of itself the score falls when the image is seen through its map alone.

    The image is multiplied by the positive part of its map, divided by the map's highest value. The mean over images is what
    Chattopadhay et al. call average drop.

    Args:
        model: see `deletion`.
        inputs: (B, C, H, W), floating point.
        maps: (B, 1 or C, H, W), floating point: larger is more important.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        reduction: how a map of C channels becomes one number per pixel: "sum" or "max_abs".
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

    Returns:
        (B,) float64 on the inputs' device, max(0, before - after) / before: in [0, 1] where the score is a probability, and
        lower is better. NaN where the score before is not above 0, and for a map that is not finite or has nothing positive.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, value or target.

    Source:
        Chattopadhay, Sarkar, Howlader and Balasubramanian 2018, arXiv:1710.11063, section 4.1.

    Deviations:
        A share, not per cent. Zero is that of `inputs`, black where the model normalises by itself.

    Example:
        >>> brightness = lambda x: x.mean((1, 2, 3))
        >>> average_drop(brightness, torch.ones(1, 1, 1, 2), torch.tensor([[[[2.0, 1.0]]]]), lambda output: output)
        tensor([0.2500], dtype=torch.float64)
    """
    where = "pysal.metrics.average_drop"
    plan = Plan(where, model, inputs, target, Running(score, extra_inputs, batch_size, precision, None))
    return average_drop_of(plan, maps, reduction=reduction)


def increase_in_confidence(
    model: Model,
    inputs: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    reduction: Reduction = "sum",
    score: ScoreKind = "auto",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
) -> Tensor:
    """Return whether the score rises when the image is seen through its map alone: 1.0 or 0.0.

    Args:
        model: see `deletion`.
        inputs: see `average_drop`.
        maps: see `average_drop`.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        reduction: see `average_drop`.
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

    Returns:
        (B,) float64 on the inputs' device; higher is better. NaN for a map that is not finite or has nothing positive.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, value or target.

    Source:
        Chattopadhay, Sarkar, Howlader and Balasubramanian 2018, arXiv:1710.11063, section 4.1 ("increase in confidence").

    Deviations:
        Those of `average_drop`.

    Example:
        >>> darkness = lambda x: -x.mean((1, 2, 3))
        >>> increase_in_confidence(darkness, torch.ones(1, 1, 1, 2), torch.tensor([[[[2.0, 1.0]]]]), lambda output: output)
        tensor([1.], dtype=torch.float64)
    """
    where = "pysal.metrics.increase_in_confidence"
    plan = Plan(where, model, inputs, target, Running(score, extra_inputs, batch_size, precision, None))
    return increase_in_confidence_of(plan, maps, reduction=reduction)


def average_drop_of(plan: Plan, maps: Tensor, *, reduction: str) -> Tensor:
    """Return the drop of a plan's images, as a share of the score."""
    before, after = _before_and_after(plan, maps, reduction)
    return (drop(before, after) / before).masked_fill(~(before > 0) | after.isnan(), torch.nan)


def increase_in_confidence_of(plan: Plan, maps: Tensor, *, reduction: str) -> Tensor:
    """Return whether the score of a plan's images rises."""
    before, after = _before_and_after(plan, maps, reduction)
    return (after > before).to(before.dtype).masked_fill(after.isnan(), torch.nan)


def drop(before: Tensor, after: Tensor) -> Tensor:
    """Return by how much scores fall, 0 where they rise."""
    return (before - after).clamp(min=0)


def through_map(image: Tensor, map: Tensor) -> Tensor:
    """Return images (..., C, H, W) as they are seen through maps (..., H, W): each pixel times its number."""
    return image * map.unsqueeze(-3)


def _before_and_after(plan: Plan, maps: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Return the scores (B,) of images as they are and through their maps, the latter NaN where there is no such image."""
    maps = check_maps(plan.where, maps, plan.inputs)
    importance = per_pixel(plan.where, maps, reduction).clamp(min=0)
    highest = importance.amax((1, 2))
    usable = finite_rows(maps) & (highest > 0)
    # divided, not multiplied by a rounded reciprocal: the highest pixel counts exactly 1, and shows the image as it is
    weights = torch.where(usable[:, None, None], importance / highest[:, None, None], 0.0)
    plan.expect_forwards(2 * plan.images)
    before = plan.clean_scores()[0].to(widest(plan.device))
    after = torch.zeros_like(before)

    def body(start: int, stop: int) -> None:
        rows = torch.arange(start, stop, device=plan.device)
        seen = through_map(widened(plan.inputs[rows]), weights[rows]).to(plan.inputs.dtype)
        after[rows] = plan.scores(seen, rows)[0].to(after.dtype)

    plan.run(plan.images, body)
    return before, after.masked_fill(~usable, torch.nan)
