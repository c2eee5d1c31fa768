"""Leave-one-out: how much the score drops when one segment of the image is filled in."""

import torch
from torch import Tensor

from pysal import ops
from pysal.engine.attribution import Attribution
from pysal.engine.fills import Fill, resolve_fill
from pysal.engine.plan import ExtraInputs, Model, Plan
from pysal.engine.precision import Precision
from pysal.engine.target import ScoreKind, Target
from pysal.segments import Boxes, Labels, Segments, Slic, cut


def leave_one_out(
    model: Model,
    inputs: Tensor,
    target: Target = None,
    *,
    segments: Segments = Slic(),  # noqa: B008 (immutable)
    fill: Fill = 0.0,
    score: ScoreKind = "probability",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return, at each pixel, the mean drop f(x) - f(x without a segment) of the segments that cover it.

    Only forward passes are needed, so the model may be any callable; see `numpy_model` for those on NumPy arrays.

    Args:
        model: an nn.Module in eval mode, or any callable on tensors.
        inputs: (B, C, H, W), floating point.
        target: see `gradient`.
        segments: `Grid(rows, cols)`, `Window(size, stride)`, `Slic(n_segments)`, a map of labels (H, W) for all images, or one
            per image (B, H, W) or a list of them; negative labels belong to no segment.
        fill: what a segment is filled with: a number, a colour (a tuple of C numbers), "black", "white", "mean", "blur" or an
            image.
        score: "probability", "logit" or "log_probability" of the target class; "logit" takes the model's output as it is.
        extra_inputs: see `gradient`.
        batch_size: most rows (image, segment) per model pass; see `gradient`.
        precision: see `gradient`.
        dtype: see `gradient`.

    Returns:
        (B, 1, H, W), signed, in units of the score; 0 where no segment is. `explain` gives the drop of every segment, and of
        every class, too.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, value or target.

    Source:
        Zeiler and Fergus 2013, arXiv:1311.2901, section 4.2.

    Example:
        >>> from pysal import Grid
        >>> brightness = lambda x: x.mean((1, 2, 3))
        >>> drops = leave_one_out(brightness, torch.ones(1, 3, 8, 8), segments=Grid(2, 2), score="logit")
        >>> drops.shape, float(drops[0, 0, 0, 0])
        (torch.Size([1, 1, 8, 8]), 0.25)
    """
    plan = Plan(
        "pysal.leave_one_out",
        model,
        inputs,
        target,
        score=score,
        extra_inputs=extra_inputs,
        batch_size=batch_size,
        precision=precision,
        dtype=dtype,
    )
    return attribute(plan, segments=segments, fill=fill).map


def attribute(plan: Plan, *, segments: Segments = Slic(), fill: Fill = 0.0) -> Attribution:  # noqa: B008
    """Leave out every segment of every image of a plan.

    Details: "drops", a list of B tensors (S_b,); "class_drops", for class targets, a list of (K, S_b); "boxes" (S, 4) or
    "labels" (B, H, W).
    """
    fills = resolve_fill(plan.where, "fill", fill, plan.inputs, plan.origin, plan.root.images).contiguous()
    key = segments if isinstance(segments, Slic) else id(segments)
    regions = plan.shared(("segments", key), lambda root: cut(root.where, segments, root.inputs))
    if isinstance(regions, Labels):
        regions = Labels(regions.labels[plan.origin], tuple(regions.counts[i] for i in plan.origin.tolist()))
    clean, clean_classes = plan.clean_scores()
    affected = _affected(plan.inputs, fills, regions)
    counts = _counts(regions, plan.images)
    queue = affected.nonzero()  # (N, 2): image and segment; a segment equal to its fill has drop 0 and needs no pass

    drops = torch.zeros(affected.shape, dtype=clean.dtype, device=plan.device)
    class_drops = None
    if clean_classes is not None:
        shape = (plan.images, clean_classes.shape[1], affected.shape[1])
        class_drops = torch.zeros(shape, dtype=clean.dtype, device=plan.device)

    def body(start: int, stop: int) -> None:
        rows, ids = queue[start:stop].unbind(1)
        if isinstance(regions, Boxes):
            batch = ops.occlusion_masks_boxes(plan.inputs, fills, regions.boxes[ids], rows, channels_last=plan.channels_last)
        else:
            batch = ops.occlusion_masks(plan.inputs, fills, regions.labels, rows, ids, channels_last=plan.channels_last)
        score, classes = plan.scores(batch, rows)
        drops[rows, ids] = clean[rows] - score
        if class_drops is not None and classes is not None and clean_classes is not None:
            class_drops[rows, :, ids] = clean_classes[rows] - classes

    plan.run(len(queue), body)
    scores = drops.to(plan.accumulator_dtype).unsqueeze(1)
    if isinstance(regions, Boxes):
        result = ops.occlusion_masks_boxes_map(scores, regions.boxes, *plan.inputs.shape[2:])
    else:
        result = ops.occlusion_masks_map(scores, regions.labels)
    details = {
        "drops": [drops[image, :count] for image, count in enumerate(counts)],
        **({"boxes": regions.boxes} if isinstance(regions, Boxes) else {"labels": regions.labels}),
    }
    if class_drops is not None:
        details["class_drops"] = [class_drops[image, :, :count] for image, count in enumerate(counts)]
    return Attribution(result.to(plan.dtype), passes=1 + len(queue) / plan.images, details=details)


def _counts(regions: Boxes | Labels, images: int) -> tuple[int, ...]:
    return (len(regions.boxes),) * images if isinstance(regions, Boxes) else regions.counts


def _affected(images: Tensor, fills: Tensor, regions: Boxes | Labels) -> Tensor:
    """Return (B, S): whether filling segment s changes image b at all; False beyond the segments of a ragged image."""
    changed = (images != fills).any(1).long()
    if isinstance(regions, Boxes):
        sums = torch.nn.functional.pad(changed.cumsum(1).cumsum(2), (1, 0, 1, 0))
        top, left, bottom, right = regions.boxes.long().unbind(1)
        inside = sums[:, bottom, right] - sums[:, top, right] - sums[:, bottom, left] + sums[:, top, left]
        return inside > 0
    labels = regions.labels.long().flatten(1)
    most = max(regions.counts)
    found = torch.zeros(len(images), most + 1, dtype=torch.int64, device=images.device)
    found.scatter_add_(1, torch.where(labels < 0, most, labels), changed.flatten(1))
    return found[:, :most] > 0
