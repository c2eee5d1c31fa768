"""Performance information curves of a batch: how soon the score comes back as the pixels that count are shown."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pysal._checks import check_count, check_ids, check_seed, finite_rows, refuse
from pysal._library import widest
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.target import Target
from pysal.engine.running.precision import Precision
from pysal.metrics._maps import Reduction, check_maps, per_pixel, uniform
from pysal.metrics.curves import Curve
from pysal.metrics.information_curves import Array, compressed_bytes, curve_of, shown, versions
from pysal.metrics.road import check_shares

SHARES = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.13, 0.21, 0.34, 0.5, 0.75)
SEEN = 0.01
POINTS = 1000


def pic(
    model: Model,
    inputs: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    shares: Sequence[float] = SHARES,
    seen: float = SEEN,
    points: int = POINTS,
    seed: int = 0,
    image_ids: Sequence[int] | Tensor | None = None,
    reduction: Reduction = "sum",
    score: ScoreKind = "auto",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
) -> Curve:
    """Return the performance information curve: the score against how much of the image is shown, in compressed bytes.

    The image is interpolated between a few random pixels, then ever more of the most important pixels are shown as they are.
    How much that tells is the size of the picture as a lossless WebP file. Score and size are counted from those of the blurred
    picture, 0, to those of the image, 1, and each point takes the best score so far. With a probability this is the softmax
    information curve (SIC).

    Args:
        model: see `deletion`.
        inputs: (B, 1 or 3, H, W), floating point in [0, 1], at least 2 pixels a side; taken in 256 levels.
        maps: (B, 1 or C, H, W), floating point: larger is more important.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        shares: of the most important pixels to show, each above 0 and below 1; equal pixels are shown together.
        seen: share of the pixels, randomly drawn, that are always shown, above 0 and below 1.
        points: of the curve, beside the last.
        seed: of these pixels.
        image_ids: one whole number of at least 0 per image, which picks its pixels; None = its row in this call.
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
        The curve: `shares` are the information, (points + 1,) from 0 to 1, `scores` what of the score is back, (B, points + 1)
        from 0 to 1, and `auc` its area: higher is better. NaN where blurring takes nothing from an image, neither of its score
        nor of its bytes, and for a map that is not finite.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, value or target.

    Source:
        Kapishnikov, Bolukbasi, Viegas and Terry 2019, arXiv:1906.02825, section 4.1; the usual shares are those of the
        authors' examples.

    Deviations:
        Images are kept whatever their score is; the authors' program leaves out those below 0.8.

    Example:
        >>> image = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> pic(lambda x: x.std((1, 2, 3)), image, image, lambda output: output, points=4).scores.shape
        torch.Size([1, 5])
    """
    where = "pysal.metrics.pic"
    plan = Plan(where, model, inputs, target, Running(score, extra_inputs, batch_size, precision, None))
    return pic_of(plan, maps, shares=shares, seen=seen, points=points, seed=seed, image_ids=image_ids, reduction=reduction)


def pic_of(
    plan: Plan,
    maps: Tensor,
    *,
    shares: Sequence[float],
    seen: float,
    points: int,
    seed: int,
    image_ids: Sequence[int] | Tensor | None,
    reduction: str,
) -> Curve:
    """Return the performance information curves of a plan's images."""
    where, images = plan.where, plan.inputs
    maps = check_maps(where, maps, images)
    importance = per_pixel(where, maps, reduction)
    steps = check_shares(where, shares)
    [always] = check_shares(where, [seen], "seen")
    check_count(where, "points", points)
    check_seed(where, seed)
    ids = check_ids(where, "image_ids", image_ids, plan.images, plan.device)
    _, channels, height, width = images.shape
    if channels not in (1, 3) or min(height, width) < 2:
        refuse(where, "inputs", "have 1 or 3 channels and at least 2 pixels a side", f"shape {tuple(images.shape)}")
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        refuse(where, "inputs", "be in [0, 1]", f"values from {low:g} to {high:g}")
    finite = finite_rows(maps)
    pixels = height * width
    zero = torch.zeros(1, dtype=torch.int64, device=plan.device)
    pictures: list[list[Array]] = []
    for row, image in enumerate(images.detach()):
        levels = (image.cpu().double() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        levels = levels[:, :, 0] if channels == 1 else levels
        drawn = uniform(seed, ids[row : row + 1], zero, pixels)[0].argsort(stable=True)[: max(1, int(pixels * always))]
        mask: Array = np.zeros((height, width), dtype=bool)
        mask.flat[drawn.cpu().numpy()] = True
        ranked = torch.nan_to_num(importance[row]).cpu().numpy()
        pictures.append([shown(levels, mask), *versions(levels, ranked, mask, steps), levels])

    plan.fix_target()
    each = len(steps) + 2
    scores = torch.zeros(plan.images, each, dtype=widest(plan.device), device=plan.device)

    def body(start: int, stop: int) -> None:
        rows, draws = plan.places(start, stop, each)
        stacked = np.stack([pictures[row][draw] for row, draw in zip(rows.tolist(), draws.tolist(), strict=True)])
        batch = torch.from_numpy(stacked).view(len(stacked), height, width, channels).permute(0, 3, 1, 2)
        scaled = (batch.double() / 255).to(plan.device, images.dtype).contiguous()
        scores[rows, draws] = plan.scores(scaled, rows)[0].to(scores.dtype)

    plan.expect_forwards(plan.images * each)
    plan.run(plan.images * each, body)
    curves = torch.full((plan.images, points + 1), torch.nan, dtype=scores.dtype, device=plan.device)
    for row, answers in enumerate(scores.tolist()):
        sizes = [compressed_bytes(picture) for picture in pictures[row]]
        if finite[row] and sizes[0] < sizes[-1] and answers[0] < answers[-1]:
            curve = curve_of(sizes, answers, monotonous=True, points=points)[1]
            curves[row] = torch.from_numpy(curve).to(curves)
    information = torch.arange(points + 1, dtype=scores.dtype, device=plan.device) / points
    return Curve(curves, information)
