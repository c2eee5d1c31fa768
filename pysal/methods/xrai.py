"""XRAI: which regions of the image have the densest integrated gradients."""

import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import find_objects
from skimage import morphology, transform
from skimage.segmentation import felzenszwalb
from torch import Tensor

from pysal import segments as cutting
from pysal._checks import check_choice, refuse
from pysal.engine.paths.path import Steps
from pysal.engine.request.attribution import Attribution
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.fills import Fill
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.target import Target
from pysal.engine.request.work import Work
from pysal.engine.running.precision import Precision
from pysal.methods import integrated_gradients
from pysal.segments import Segments

Array: TypeAlias = NDArray[Any]
Mask: TypeAlias = NDArray[np.bool_]
Algorithm: TypeAlias = Literal["full", "fast"]
ALGORITHMS = ("full", "fast")

# The authors' segments: of the image in [-1, 1] at 224 x 224 pixels, each widened over its edges in pixels of the image itself.
SCALES = (50, 100, 150, 250, 500, 1200)
SIZE, SIGMA, LEAST_SEGMENT, WIDENED = (224, 224), 0.8, 150, 5
_DISK: Array = morphology.disk(WIDENED)  # type: ignore[no-untyped-call]
_resized: Callable[..., Array] = transform.resize
# Sums over pixels that are added up in another order differ by less than this share of the largest value.
NEAR = 1e-5


def xrai(
    model: Model,
    inputs: Tensor,
    target: Target = None,
    *,
    baseline: Fill | list[Fill] | None = None,
    steps: int = 100,
    segments: Segments | None = None,
    algorithm: Algorithm = "full",
    min_area: float = 0.001,
    score: ScoreKind = "logit",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the mean integrated gradients of the region that each pixel belongs to, regions taken in the order of that mean.

    The integrated gradients of the baselines are averaged; the largest of a pixel's channels counts. Regions are then taken,
    each time the one whose pixels that are not yet taken have the highest mean.

    Args:
        model: an nn.Module in eval mode, or any differentiable callable.
        inputs: (B, C, H, W), floating point.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        baseline: see `integrated_gradients`. None = two: each image's lowest value everywhere, and its highest.
        steps: number of gradients per image and baseline.
        segments: regions: a `Grid`, `Window` or `Slic`, or label maps, see `leave_one_out`. None = the authors': segments by
            Felzenszwalb and Huttenlocher at six scales, each widened by 5 pixels, which overlap.
        algorithm: "full", or "fast": regions are ranked once, by the mean of all their pixels.
        min_area: regions that would add less than this share of the image are left out, 0 to 1: 0.001 is 50 pixels at 224.
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
        (B, 1, H, W), signed. Pixels of no region have the mean of what is left.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, value or target.

    Source:
        Kapishnikov et al. 2019, arXiv:1906.02825, algorithm 1, with the segments and the baselines of its authors' code.
    """
    plan = Plan("pysal.xrai", model, inputs, target, Running(score, extra_inputs, batch_size, precision, dtype))
    work = prepare(plan, baseline=baseline, steps=steps, segments=segments, algorithm=algorithm, min_area=min_area)
    return work.run(report=False).map


def prepare(
    plan: Plan,
    *,
    baseline: Fill | list[Fill] | None,
    steps: int,
    segments: Segments | None,
    algorithm: Algorithm,
    min_area: float,
) -> Work:
    """Return the work that ranks the regions of a plan's images.

    Details: "steps" (B,). There is no residual: the largest channels add up to no change of the score.
    """
    check_choice(plan.where, "algorithm", algorithm, ALGORITHMS)
    if isinstance(min_area, bool) or not isinstance(min_area, (int, float)) or not 0 <= min_area <= 1:
        refuse(plan.where, "min_area", "be a number from 0 to 1", repr(min_area))
    how = Steps.check(plan.where, quadrature=None, placement="squared", steps=steps, tolerance=None, max_steps=1000)
    if baseline is None:
        # of these images, which in a derived plan are not those that a caller's own baselines are one each of
        flat = plan.inputs.flatten(1)
        ends = [end[:, None, None, None].expand_as(plan.inputs) for end in (flat.amin(1), flat.amax(1))]
        baselines = torch.stack(ends, 1).flatten(0, 1)
    else:
        baselines = integrated_gradients.baselines_of(plan, baseline)
    paths = integrated_gradients.from_baselines(plan, baselines, how)
    given = None if segments is None else _masks(cutting.cut(plan.where, segments, plan.inputs), plan)
    least = max(1, round(min_area * plan.inputs.shape[2] * plan.inputs.shape[3]))

    def make(_report: bool) -> Attribution:
        found = paths.run(report=False)
        shares = found.map.amax(1).cpu().double().numpy()
        maps = []
        for index, share in enumerate(shares):
            masks = regions(plan.inputs[index].movedim(0, -1).cpu().double().numpy()) if given is None else given[index]
            maps.append(torch.from_numpy(ranked(share, masks, algorithm=algorithm, area=1.0, least=least)[0]))
        result = torch.stack(maps)[:, None].to(device=plan.device, dtype=plan.dtype)
        return Attribution(result, found.passes, found.details)

    return Work(plan, make)


def _masks(found: cutting.Boxes | cutting.Labels, plan: Plan) -> list[Mask]:
    """Return the masks (S, H, W) of each image's segments."""
    if isinstance(found, cutting.Labels):
        maps = found.labels.cpu().numpy()
        return [one[None] == np.arange(count)[:, None, None] for one, count in zip(maps, found.counts, strict=True)]
    boxes = found.boxes.tolist()
    masks = np.zeros((len(boxes), *plan.inputs.shape[2:]), bool)
    for mask, (top, left, bottom, right) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return [masks] * plan.images


def regions(image: Array) -> Mask:
    """Return the authors' regions of an image (H, W, C), masks (S, H, W)."""
    low, high = image.min(), image.max()
    scaled = (image - low) / (high - low) * 2.0 - 1.0 if high > low else np.zeros(image.shape)
    small = _resized(scaled, SIZE, order=3, mode="constant", preserve_range=True, anti_aliasing=True)
    masks: list[Mask] = []
    for scale in SCALES:
        with warnings.catch_warnings():  # of more than three channels, which it takes as they are meant
            warnings.simplefilter("ignore", RuntimeWarning)
            labels = felzenszwalb(small, scale=scale, sigma=SIGMA, min_size=LEAST_SEGMENT)
        labels = _resized(labels, image.shape[:2], order=0, mode="constant", preserve_range=True, anti_aliasing=False)
        labels = labels.astype(int)
        masks += [_widened(labels == label, box) for label, box in enumerate(find_objects(labels + 1)) if box is not None]
    return np.stack(masks)


def _widened(mask: Mask, box: tuple[slice, ...]) -> Mask:
    """Return a mask widened by a disk; only its box and what is near are looked at."""
    near = tuple(slice(max(0, side.start - WIDENED), side.stop + WIDENED) for side in box)
    mask[near] = morphology.dilation(mask[near], footprint=_DISK)
    return mask


def ranked(attribution: Array, masks: Mask, *, algorithm: Algorithm, area: float, least: int) -> tuple[Array, list[Mask]]:
    """Return the mean attribution of each pixel's region, (H, W) float64, and what each region added, the highest mean first.

    Args:
        attribution: (H, W).
        masks: (S, H, W), which may overlap.
        algorithm: see `xrai`.
        area: no more regions are taken once this share of the image is; with "full".
        least: pixels that a region must add.
    """
    flat, regions_of = attribution.ravel(), masks.reshape(len(masks), -1)
    free = np.ones(flat.shape, bool)
    found = np.full(flat.shape, -np.inf)
    added: list[tuple[float, Mask]] = []

    def take(index: int) -> Mask:
        new: Mask = regions_of[index] & free
        mean = flat[new].mean()
        found[new] = mean
        added.append((mean, new.reshape(attribution.shape)))
        np.logical_and(free, ~new, out=free)
        return new

    if algorithm == "fast":
        means = [flat[mask].mean() if mask.any() else -np.inf for mask in regions_of]
        for index in sorted(range(len(means)), key=lambda index: -means[index]):
            if np.count_nonzero(regions_of[index] & free) >= least:
                take(index)
    else:
        _take_densest(flat, regions_of, free, take, area, least)
    if free.any():
        found[free] = flat[free].mean()
    traces = [mask for _, mask in sorted(added, key=lambda one: -one[0])]
    rest = [free.reshape(attribution.shape)] if free.any() else []
    return found.reshape(attribution.shape), [*traces, *rest]


def _take_densest(flat: Array, regions_of: Mask, free: Mask, take: Callable[[int], Mask], area: float, least: int) -> None:
    """Take the region whose free pixels have the highest mean, the first of equal ones, until none or the area is reached.

    What is left of each region is kept as a count and a sum, from which pixels are subtracted as they are taken: each pixel
    once. Where means are near each other, they are taken of the pixels themselves.
    """
    counts = regions_of.sum(1)
    sums = np.array([flat[mask].sum(dtype=np.float64) for mask in regions_of])
    near = NEAR * float(np.abs(flat).max())
    left = np.ones(len(regions_of), bool)
    while 1 - free.mean() <= area:
        left &= counts >= least
        if not left.any():
            return
        means = np.where(left, sums / np.maximum(counts, 1), -np.inf)
        rivals = np.flatnonzero(left & ~(means < means.max() - near))
        best = rivals[0]
        if len(rivals) > 1:
            best = rivals[np.argmax([flat[regions_of[rival] & free].mean() for rival in rivals])]
        new = np.flatnonzero(take(int(best)))
        block = regions_of[:, new]
        counts -= block.sum(1)
        sums -= block @ flat[new].astype(np.float64)
        left[best] = False
