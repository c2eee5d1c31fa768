"""ROAD, remove and debias: the score without the most, and without the least important pixels, filled in from those around."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pysal import ops
from pysal._checks import check_ids, check_number, check_seed, finite_rows, refuse
from pysal._library import widest
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.target import Target
from pysal.engine.running.precision import Precision
from pysal.metrics._maps import Reduction, check_maps, per_pixel, rank_of_pixels
from pysal.metrics.imputation import linear_imputation

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
NOISE = 0.01


@dataclass(frozen=True)
class Road:
    """The score of images from which pixels were removed in the order of a map.

    Attributes:
        most: (B, S) float64, without the most important pixels; NaN for an image whose map is not finite.
        least: (B, S) float64, likewise without the least important ones.
        shares: (S,) float64, of the pixels that were removed.
    """

    most: Tensor
    least: Tensor
    shares: Tensor

    @property
    def difference(self) -> Tensor:
        """The mean of `least` less that of `most`, (B,) float64: higher is better."""
        return self.least.mean(1) - self.most.mean(1)


def road(
    model: Model,
    inputs: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    shares: Sequence[float] = SHARES,
    noise: float = NOISE,
    seed: int = 0,
    image_ids: Sequence[int] | Tensor | None = None,
    reduction: Reduction = "sum",
    score: ScoreKind = "auto",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
) -> Road:
    """Return the score without the most, and without the least important pixels, which are filled in from their neighbours.

    A faithful map makes the score fall where the most important pixels go first, and stay where the least important do. Where
    pixels are missing hardly shows, so the shape of the removed area tells the model little. Equal pixels count in reading
    order.

    Args:
        model: see `deletion`.
        inputs: (B, C, H, W), floating point.
        maps: (B, 1 or C, H, W), floating point: larger is more important.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        shares: of the pixels to remove, each above 0 and below 1; floor(share H W) pixels go, and one stays at least.
        noise: standard deviation of what is added to removed pixels, in units of `inputs`, at least 0.
        seed: of the noise.
        image_ids: one whole number of at least 0 per image, which picks its noise; None = its row in this call.
        reduction: how a map of C channels ranks pixels: by the "sum" of its channels or their "max_abs".
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
        Both scores for each image and share, and the mean difference, of which more is better.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, value or target.

    Source:
        Rong, Leemann, Borisov, Kasneci and Kasneci 2022, arXiv:2202.00449 (noisy linear imputation, most and least relevant
        first).

    Deviations:
        The score stands in place of whether the prediction is right, so that one image has a figure.

    Example:
        >>> brightness = lambda x: x.mean((1, 2, 3))
        >>> image = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
        >>> found = road(brightness, image, image, lambda output: output, shares=[0.25], noise=0.0)
        >>> found.most.tolist(), found.least.tolist()
        ([[0.0]], [[0.30000001192092896]])
    """
    where = "pysal.metrics.road"
    plan = Plan(where, model, inputs, target, Running(score, extra_inputs, batch_size, precision, None))
    return road_of(plan, maps, shares=shares, noise=noise, seed=seed, image_ids=image_ids, reduction=reduction)


def road_of(
    plan: Plan,
    maps: Tensor,
    *,
    shares: Sequence[float],
    noise: float,
    seed: int,
    image_ids: Sequence[int] | Tensor | None,
    reduction: str,
) -> Road:
    """Return ROAD's scores of a plan's images."""
    where, images = plan.where, plan.inputs
    maps = check_maps(where, maps, images)
    importance = per_pixel(where, maps, reduction)
    removed = check_shares(where, shares)
    noise = check_number(where, "noise", noise)
    check_seed(where, seed)
    ids = check_ids(where, "image_ids", image_ids, plan.images, plan.device)
    pixels = images.shape[2] * images.shape[3]
    counts = [min(math.floor(share * pixels), pixels - 1) for share in removed]
    ranks = rank_of_pixels(importance)
    plan.fix_target()
    each = 2 * len(removed)
    scores = torch.zeros(plan.images, each, dtype=widest(plan.device), device=plan.device)
    deviations = torch.full((plan.images,), float(noise), dtype=scores.dtype, device=plan.device)

    def body(start: int, stop: int) -> None:
        rows, draws = plan.places(start, stop, each)
        batch = []
        for row, draw in zip(rows.tolist(), draws.tolist(), strict=True):
            count = counts[draw // 2]
            # the even draws remove the most important pixels, the odd ones the least important
            kept = ranks[row] >= count if draw % 2 == 0 else ranks[row] < pixels - count
            filled = linear_imputation(images[row], kept)
            batch.append(with_noise(filled, kept, deviations[row], seed, ids[row], draw) if noise else filled)
        scores[rows, draws] = plan.scores(torch.stack(batch), rows)[0].to(scores.dtype)

    plan.expect_forwards(plan.images * each)
    plan.run(plan.images * each, body)
    scores[~finite_rows(maps)] = torch.nan
    known = torch.tensor(removed, dtype=scores.dtype, device=plan.device)
    return Road(scores[:, ::2].contiguous(), scores[:, 1::2].contiguous(), known)


def with_noise(image: Tensor, kept: Tensor, deviation: Tensor, seed: int, image_id: Tensor, draw: int) -> Tensor:
    """Return an image (C, H, W) with noise at the pixels that are not kept (H, W), which depends on (seed, id, draw) alone."""
    zero = torch.zeros(1, dtype=torch.int64, device=image.device)
    noisy = ops.gaussian_noise(image[None], deviation[None], seed, zero, image_id[None], zero + draw)[0]
    return torch.where(kept, image, noisy)


def check_shares(where: str, shares: object, argument: str = "shares") -> list[float]:
    """Return shares of an image's pixels, at least one of them, each above 0 and below 1."""
    listed = isinstance(shares, Sequence) and not isinstance(shares, str) and len(shares) > 0
    if not listed or not all(isinstance(one, (int, float)) and 0 < one < 1 for one in shares):  # type: ignore[attr-defined]
        refuse(where, argument, "be a sequence of numbers above 0 and below 1", repr(shares))
    return [float(one) for one in shares]  # type: ignore[attr-defined]
