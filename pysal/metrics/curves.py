"""Deletion and insertion: how the score falls, or rises, as the pixels a map calls important are replaced, or shown."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn.functional import conv2d, pad

from pysal import ops
from pysal._checks import check_count, finite_rows, refuse, refuse_unknown
from pysal._library import widest, without_autocast
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.fills import Fill, check_units, resolve_fill
from pysal.engine.request.patch_tokens import DROP, patch_tokens
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.target import Target
from pysal.engine.running.precision import Precision
from pysal.metrics._maps import Reduction, check_maps, per_pixel, rank_of_pixels

Substrate: TypeAlias = Fill
"""What stands for nothing: "zero", "blur" (RISE's), "drop", or a number, colour or image as `leave_one_out` takes one."""

# RISE: 8 rows of a 224 x 224 image at a time, and the blur its authors insert into.
STEPS = 28
BLUR_KERNEL, BLUR_SIGMA = 11, 5.0


@dataclass(frozen=True)
class Curve:
    """The score on the way from one image to another.

    Attributes:
        scores: (B, steps + 1) float64, in units of the score; NaN for an image whose map is not finite.
        shares: (steps + 1,) float64, from 0 to 1: the share of pixels that have been replaced.
    """

    scores: Tensor
    shares: Tensor

    @property
    def auc(self) -> Tensor:
        """The area under each curve by the trapezoidal rule, (B,) float64: the mean score on the way."""
        return torch.trapezoid(self.scores, self.shares, dim=1)


def deletion(
    model: Model,
    inputs: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    steps: int = STEPS,
    substrate: Substrate = "zero",
    reduction: Reduction = "sum",
    score: ScoreKind = "auto",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
) -> Curve:
    """Return the score while the most important pixels are replaced first: a faithful map makes it fall early.

    Equal pixels are replaced in reading order. Step k replaces the pixels of rank below floor(k H W / steps).

    Args:
        model: an nn.Module in eval mode, a prepared model, or any callable on tensors.
        inputs: (B, C, H, W), floating point.
        maps: (B, 1 or C, H, W), floating point: larger is more important.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        steps: 1 to H W, or to the number of patches with substrate="drop"; 28 replace 8 rows' worth of a 224 x 224 image at a
            time.
        substrate: what pixels are replaced with: "zero"; "blur", the image under RISE's kernel of 11 x 11 pixels and sigma
            5, edges repeated; or a number, a colour (a tuple of C numbers) or an image (C, H, W) or (B, C, H, W). "drop", for
            transformers with patch tokens: patches are left out whole, those with the largest sum of the map first, and shares
            are those of patches; one stays where the model has no answer without any.
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
        The curve from the image (share 0) to the substrate (share 1), and its area: lower is better.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, value or target.

    Source:
        Petsiuk, Das and Saenko 2018, arXiv:1806.07421.

    Deviations:
        Zero is that of `inputs`, black where the model normalises by itself; the authors' is the mean colour of ImageNet.
        The blur repeats the image's edge instead of darkening it.

    Example:
        >>> brightness = lambda x: x.mean((1, 2, 3))
        >>> image = torch.tensor([[[[1.0, 0.75], [0.5, 0.25]]]])
        >>> curve = deletion(brightness, image, image, score="logit", target=lambda output: output, steps=4)
        >>> curve.scores.tolist(), curve.auc.tolist()
        ([[0.625, 0.375, 0.1875, 0.0625, 0.0]], [0.234375])
    """
    where = "pysal.metrics.deletion"
    plan = Plan(where, model, inputs, target, Running(score, extra_inputs, batch_size, precision, None))
    return deletion_curve(plan, maps, steps=steps, substrate=substrate, reduction=reduction)


def insertion(
    model: Model,
    inputs: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    steps: int = STEPS,
    substrate: Substrate = "blur",
    reduction: Reduction = "sum",
    score: ScoreKind = "auto",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
) -> Curve:
    """Return the score while the most important pixels are shown first: a faithful map makes it rise early.

    Args:
        model: see `deletion`.
        inputs: see `deletion`.
        maps: see `deletion`.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        steps: see `deletion`.
        substrate: what the image is shown on; see `deletion`.
        reduction: see `deletion`.
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
        The curve from the substrate (share 0) to the image (share 1), and its area: higher is better.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, value or target.

    Source:
        Petsiuk, Das and Saenko 2018, arXiv:1806.07421.

    Deviations:
        Those of `deletion`.

    Example:
        >>> image = torch.tensor([[[[1.0, 0.75], [0.5, 0.25]]]])
        >>> brightness = lambda x: x.mean((1, 2, 3))
        >>> insertion(brightness, image, image, lambda output: output, substrate="zero", steps=4).scores.tolist()
        [[0.0, 0.25, 0.4375, 0.5625, 0.625]]
    """
    where = "pysal.metrics.insertion"
    plan = Plan(where, model, inputs, target, Running(score, extra_inputs, batch_size, precision, None))
    return insertion_curve(plan, maps, steps=steps, substrate=substrate, reduction=reduction)


def deletion_curve(plan: Plan, maps: Tensor, *, steps: int, substrate: Substrate, reduction: str) -> Curve:
    """Return the deletion curves of a plan's images."""
    return _curve(plan, maps, steps, substrate, reduction, inserts=False)


def insertion_curve(plan: Plan, maps: Tensor, *, steps: int, substrate: Substrate, reduction: str) -> Curve:
    """Return the insertion curves of a plan's images."""
    return _curve(plan, maps, steps, substrate, reduction, inserts=True)


def _curve(plan: Plan, maps: Tensor, steps: int, substrate: Substrate, reduction: str, *, inserts: bool) -> Curve:
    images, pixels = plan.images, plan.inputs.shape[2] * plan.inputs.shape[3]
    maps = check_maps(plan.where, maps, plan.inputs)
    importance = per_pixel(plan.where, maps, reduction)
    if check_count(plan.where, "steps", steps) > pixels:
        refuse(plan.where, "steps", f"be at most the {pixels} pixels of an image", steps)
    if isinstance(substrate, str) and substrate == DROP:
        return _patch_curve(plan, importance, ~finite_rows(maps), steps, inserts=inserts)
    nothing = _substrate(plan, substrate)
    start, end = (nothing, plan.inputs) if inserts else (plan.inputs, nothing)
    bounds = torch.arange(steps + 1, device=plan.device) * pixels // steps
    labels = _steps(importance, bounds)
    plan.expect_forwards(images * (steps + 1))
    clean = plan.clean_scores()[0]
    scores = torch.zeros(images, steps + 1, dtype=widest(plan.device), device=plan.device)
    scores[:, -1 if inserts else 0] = clean.to(scores.dtype)
    first = 0 if inserts else 1  # the other end is the image itself, whose score is known

    current = start.clone(memory_format=torch.channels_last if plan.channels_last else torch.contiguous_format)

    def body(begin: int, stop: int) -> None:
        # Item n is image n % B after `first + n // B` steps, each made from the one before: what a step replaces is one
        # segment. A chunk that ran out of memory comes again in halves, and finds the images as they were before it: doing a
        # step twice changes nothing, so only a chunk of several steps needs a copy.
        nonlocal current
        turns = range(begin // images, (stop - 1) // images + 1)
        now = current if len(turns) == 1 else current.clone()
        parts: list[Tensor] = []
        places: list[Tensor] = []
        for turn in turns:
            own = slice(max(begin - turn * images, 0), min(stop - turn * images, images))
            rows = torch.arange(own.start, own.stop, device=plan.device)
            done = first + turn
            if done:
                ids = torch.full_like(rows, done - 1)
                parts.append(ops.occlusion_masks(now, end, labels, rows, ids, channels_last=plan.channels_last))
                now[own] = parts[-1]
            else:
                parts.append(now[own].clone())
            places.append(rows * (steps + 1) + done)
        rows = torch.arange(begin, stop, device=plan.device) % images
        found = plan.scores(parts[0] if len(parts) == 1 else torch.cat(parts), rows)[0]
        scores.view(-1)[torch.cat(places)] = found.to(scores.dtype)
        current = now

    plan.run(images * steps, body)
    scores[~finite_rows(maps)] = torch.nan
    return Curve(scores, bounds.to(scores.dtype) / pixels)


def _patch_curve(plan: Plan, importance: Tensor, not_finite: Tensor, steps: int, *, inserts: bool) -> Curve:
    """Return curves on which a transformer's patches are left out, or shown, those of the largest summed importance first.

    A model that averages its patches has no answer without any: one always stays, the last to go or the first to be shown.
    """
    tokens, images = patch_tokens(plan, "substrate"), plan.images
    count = tokens.count
    if steps > count:
        refuse(plan.where, "steps", f"be at most the {count} patches of an image, with substrate={DROP!r}", steps)
    always = 0 if tokens.allows_none else 1
    bounds = torch.arange(steps + 1, device=plan.device) * (count - always) // steps
    order = tokens.cells(importance).argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(count, device=plan.device).expand_as(order))
    plan.fix_target()
    scores = torch.zeros(images, steps + 1, dtype=widest(plan.device), device=plan.device)

    def body(begin: int, stop: int) -> None:
        done, rows = begin // images, torch.arange(begin, stop, device=plan.device) % images
        kept = ranks[rows] < bounds[done] + always if inserts else ranks[rows] >= bounds[done]
        found = plan.scores(plan.inputs[rows], rows, tokens.keeping(kept))[0]
        scores[rows, done] = found.to(scores.dtype)

    # a pass holds images of one step, which have as many tokens left
    plan.run(images * (steps + 1), body, ends=range(images, images * (steps + 1), images))
    scores[not_finite] = torch.nan
    return Curve(scores, bounds.to(scores.dtype) / (count - always))


def _steps(importance: Tensor, bounds: Tensor) -> Tensor:
    """Return the step (B, H, W), int32, in which each pixel is replaced, the most important in step 0."""
    return (torch.searchsorted(bounds, rank_of_pixels(importance), right=True) - 1).to(torch.int32)


def _substrate(plan: Plan, substrate: Substrate) -> Tensor:
    """Return what stands for nothing in each image, (B, C, H, W)."""
    where, images = plan.where, plan.inputs
    if isinstance(substrate, str):
        if substrate == "blur":
            return rise_blur(images)
        if substrate != "zero":
            known = ("zero", "blur", DROP)
            requirement = "be 'zero', 'blur', 'drop', a number, a colour or an image"
            refuse_unknown(where, "substrate", requirement, substrate, known)
        check_units(plan, "substrate='zero'", 0.0)
        substrate = 0.0
    return resolve_fill(plan, "substrate", substrate).contiguous()


def rise_blur(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) under the blur of RISE's evaluation: 11 x 11 pixels, sigma 5, the edge repeated.

    The kernel is an impulse that a Gaussian filter with reflecting edges has spread inside its 11 x 11 pixels: a Gaussian
    folded back, so that it sums to 1, and flatter than one that is cut off.

    Source:
        Petsiuk, Das and Saenko 2018, arXiv:1806.07421; `gkern` of the authors' evaluation.py.
    """
    impulse = np.zeros(BLUR_KERNEL)
    impulse[BLUR_KERNEL // 2] = 1.0
    arithmetic = torch.promote_types(images.dtype, torch.float32)
    line = torch.from_numpy(gaussian_filter(impulse, BLUR_SIGMA)).to(images.device, arithmetic)
    margin = BLUR_KERNEL // 2
    channels = images.shape[1]
    # one row, then one column: the kernel is their product
    blurred = pad(images.to(arithmetic), (margin,) * 4, mode="replicate")
    with without_autocast(images.device.type):
        blurred = conv2d(blurred, line.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
        blurred = conv2d(blurred, line.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return blurred.to(images.dtype).contiguous()
