"""Occluded images in one pass, and segment scores put back on the pixels."""

from typing import Any

import torch
from torch import Tensor

from pysal import _checks
from pysal._library import define, define_derivative, widest
from pysal.reference import occlusion_masks as reference

_WRITTEN = "ScalarType dtype, bool channels_last, Tensor? mean=None, Tensor? std=None) -> Tensor"
SCHEMA = f"(Tensor images, Tensor fills, Tensor labels, Tensor rows, Tensor ids, {_WRITTEN}"
BOXES_SCHEMA = f"(Tensor images, Tensor fills, Tensor boxes, Tensor rows, {_WRITTEN}"
MAP_SCHEMA = "(Tensor scores, Tensor labels) -> Tensor"
BOXES_MAP_SCHEMA = "(Tensor scores, Tensor boxes, SymInt height, SymInt width) -> Tensor"

define("occlusion_masks", SCHEMA, reference.occlusion_masks)
define("occlusion_masks_boxes", BOXES_SCHEMA, reference.occlusion_masks_boxes)
define("occlusion_masks_map", MAP_SCHEMA, reference.occlusion_masks_map)
define("occlusion_masks_boxes_map", BOXES_MAP_SCHEMA, reference.occlusion_masks_boxes_map)


def _fake_masks(
    images: Tensor,
    fills: Tensor,
    labels: Tensor,
    rows: Tensor,
    ids: Tensor,
    dtype: torch.dtype,
    channels_last: bool,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    return _fake_images(images, rows, dtype, channels_last)


def _fake_masks_boxes(
    images: Tensor,
    fills: Tensor,
    boxes: Tensor,
    rows: Tensor,
    dtype: torch.dtype,
    channels_last: bool,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    return _fake_images(images, rows, dtype, channels_last)


def _fake_map(scores: Tensor, labels: Tensor) -> Tensor:
    return scores.new_empty(scores.shape[0], scores.shape[1], labels.shape[1], labels.shape[2])


def _fake_boxes_map(scores: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    return scores.new_empty(scores.shape[0], scores.shape[1], height, width)


def _fake_images(images: Tensor, rows: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    return torch.empty(
        (rows.shape[0], *images.shape[1:]),
        dtype=dtype,
        device=images.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


# The masks select, so a gradient goes back to the image outside the segment and to the fill inside it, summed over
# the rows of each image.
def _setup_masks(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, _, labels, rows, ids, _, _, _, std = inputs
    ctx.save_for_backward(labels, rows, ids, std)
    ctx.shape, ctx.dtype = images.shape, images.dtype


def _differentiate_masks(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    labels, rows, ids, std = ctx.saved_tensors
    hidden = (labels.index_select(0, rows) == ids[:, None, None])[:, None]
    return *_sum_by_image(ctx, grad, hidden, rows, std), *[None] * 7


def _setup_masks_boxes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, _, boxes, rows, _, _, _, std = inputs
    ctx.save_for_backward(boxes, rows, std)
    ctx.shape, ctx.dtype = images.shape, images.dtype


def _differentiate_masks_boxes(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    boxes, rows, std = ctx.saved_tensors
    hidden = _inside(boxes, ctx.shape[2], ctx.shape[3])[:, None]
    return *_sum_by_image(ctx, grad, hidden, rows, std), *[None] * 6


def _sum_by_image(
    ctx: Any, grad: Tensor, hidden: Tensor, rows: Tensor, std: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    compute = torch.promote_types(ctx.dtype, torch.float32)
    grad = grad.to(compute) if std is None else grad.to(compute) / std.to(compute)[:, None, None]
    zeros = grad.new_zeros(ctx.shape, dtype=compute)
    keep, fill = (
        zeros.index_add(0, rows, grad * part).to(ctx.dtype) if needed else None
        for part, needed in ((~hidden, ctx.needs_input_grad[0]), (hidden, ctx.needs_input_grad[1]))
    )
    return keep, fill


def _inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return which pixels each box covers, (N, height, width)."""
    top, left, bottom, right = boxes[:, :, None, None].unbind(1)
    y = torch.arange(height, device=boxes.device)[:, None]
    x = torch.arange(width, device=boxes.device)
    return (top <= y) & (y < bottom) & (left <= x) & (x < right)


# The maps are linear in the scores: their gradients are the transposes, a scatter and a sum over each box.
def _setup_map(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    scores, labels = inputs
    ctx.save_for_backward(labels)
    ctx.shape = scores.shape


def _differentiate_map(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (labels,) = ctx.saved_tensors
    batch, classes, segments = ctx.shape
    compute = torch.promote_types(grad.dtype, torch.float32)
    index = torch.where((0 <= labels) & (labels < segments), labels, segments).long()
    pixels = index.reshape(batch, 1, -1).expand(batch, classes, -1)
    sums = grad.new_zeros(batch, classes, segments + 1, dtype=compute)
    return sums.scatter_add(2, pixels, grad.to(compute).flatten(2))[:, :, :segments].to(grad.dtype), None


def _setup_boxes_map(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _differentiate_boxes_map(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (boxes,) = ctx.saved_tensors
    compute = torch.promote_types(grad.dtype, torch.float32)
    inside = _inside(boxes, grad.shape[2], grad.shape[3]).to(compute)
    share = grad.to(compute) / inside.sum(0).clamp(min=1)
    return torch.einsum("bkhw,shw->bks", share, inside).to(grad.dtype), None, None, None


torch.library.register_fake("pysal::occlusion_masks", _fake_masks)
torch.library.register_fake("pysal::occlusion_masks_boxes", _fake_masks_boxes)
torch.library.register_fake("pysal::occlusion_masks_map", _fake_map)
torch.library.register_fake("pysal::occlusion_masks_boxes_map", _fake_boxes_map)
define_derivative("occlusion_masks", _differentiate_masks, _setup_masks)
define_derivative("occlusion_masks_boxes", _differentiate_masks_boxes, _setup_masks_boxes)
define_derivative("occlusion_masks_map", _differentiate_map, _setup_map)
define_derivative("occlusion_masks_boxes_map", _differentiate_boxes_map, _setup_boxes_map)


def occlusion_masks(
    images: Tensor,
    fills: Tensor,
    labels: Tensor,
    rows: Tensor,
    ids: Tensor,
    *,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """Return, for each n, image rows[n] with the pixels of segment ids[n] replaced by its fill.

    The N occluded images are written in one pass, in the dtype and memory format the model is fed with.

    Args:
        images: (B, C, H, W), floating.
        fills: (B, C, H, W), images' dtype and device; may be expanded from fewer values.
        labels: (B, H, W), integer: the segment of each pixel.
        rows: (N,), integer in [0, B): the image of each result.
        ids: (N,), integer: the segment hidden in each result; one that no pixel has hides nothing.
        dtype: of the result, floating; None for images' dtype.
        channels_last: whether the result is in torch.channels_last memory format.
        mean: (C,), floating, with std: the result is (x - mean) / std per channel; None for x as it is.
        std: (C,), floating, > 0, with mean.

    Returns:
        (N, C, H, W) in `dtype` on images' device; differentiable in images and fills.

    Raises:
        TypeError: not a tensor, or a dtype other than the above.
        ValueError: another rank or shape, tensors on several devices, one of mean and std without the other, or (CPU tensors
            only) a row outside [0, B) or a std that is not positive.

    Source:
        Zeiler and Fergus 2014, arXiv 1311.2901, section 4.2.

    Deviations:
        None.

    Example:
        >>> images, labels = torch.ones(1, 1, 2, 2), torch.tensor([[[0, 1], [1, 2]]])
        >>> rows, ids = torch.zeros(2, dtype=torch.int32), torch.tensor([1, 2])
        >>> occlusion_masks(images, torch.zeros_like(images), labels, rows, ids)[:, 0].tolist()
        [[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 0.0]]]
    """
    where = "pysal::occlusion_masks"
    images, fills, dtype = _check_images(where, images, fills, dtype)
    labels = _checks.check_indices(where, "labels", labels, ndim=3, device=images.device)
    pixels = torch.Size((images.shape[0], *images.shape[2:]))
    _checks.check_same_shape(where, "labels", labels, "images without channels", pixels)
    rows = _checks.check_indices(where, "rows", rows, ndim=1, device=images.device, limit=images.shape[0])
    ids = _checks.check_indices(where, "ids", ids, ndim=1, device=images.device)
    _checks.check_same_shape(where, "ids", ids, "rows", rows.shape)
    mean, std = _check_normalisation(where, mean, std, images)
    out: Tensor = torch.ops.pysal.occlusion_masks(images, fills, labels, rows, ids, dtype, channels_last, mean, std)
    return out


def occlusion_masks_boxes(
    images: Tensor,
    fills: Tensor,
    boxes: Tensor,
    rows: Tensor,
    *,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """Return, for each n, image rows[n] with the pixels inside box n replaced by its fill.

    Args:
        images: (B, C, H, W), floating.
        fills: (B, C, H, W), images' dtype and device; may be expanded from fewer values.
        boxes: (N, 4), integer: top, left, bottom, right in pixels, half open, inside the image.
        rows: (N,), integer in [0, B): the image of each result.
        dtype: of the result, floating; None for images' dtype.
        channels_last: whether the result is in torch.channels_last memory format.
        mean: (C,), floating, with std: the result is (x - mean) / std per channel; None for x as it is.
        std: (C,), floating, > 0, with mean.

    Returns:
        (N, C, H, W) in `dtype` on images' device; differentiable in images and fills.

    Raises:
        TypeError: not a tensor, or a dtype other than the above.
        ValueError: another rank or shape, tensors on several devices, one of mean and std without the other, or (CPU tensors
            only) a row outside [0, B), a box that is not inside the image or a std that is not positive.

    Source:
        Zeiler and Fergus 2014, arXiv 1311.2901, section 4.2.

    Deviations:
        None.

    Example:
        >>> images, rows = torch.ones(1, 1, 2, 3), torch.zeros(1, dtype=torch.int32)
        >>> occlusion_masks_boxes(images, torch.zeros_like(images), torch.tensor([[0, 1, 2, 3]]), rows)[0, 0].tolist()
        [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    """
    where = "pysal::occlusion_masks_boxes"
    images, fills, dtype = _check_images(where, images, fills, dtype)
    rows = _checks.check_indices(where, "rows", rows, ndim=1, device=images.device, limit=images.shape[0])
    boxes = _check_boxes(where, boxes, rows.shape[0], images.device, images.shape[2], images.shape[3])
    mean, std = _check_normalisation(where, mean, std, images)
    out: Tensor = torch.ops.pysal.occlusion_masks_boxes(images, fills, boxes, rows, dtype, channels_last, mean, std)
    return out


def occlusion_masks_map(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the score of each pixel's segment.

    Args:
        scores: (B, K, S), floating: K numbers for each of S segments.
        labels: (B, H, W), integer: the segment of each pixel.

    Returns:
        (B, K, H, W) in scores' dtype and device, 0 where the label is outside [0, S); differentiable in scores.

    Raises:
        TypeError: not a tensor, or a dtype other than the above.
        ValueError: another rank, or a batch of another size.

    Source:
        Zeiler and Fergus 2014, arXiv 1311.2901, section 4.2.

    Deviations:
        None.

    Example:
        >>> occlusion_masks_map(torch.tensor([[[0.5, 0.25]]]), torch.tensor([[[0, 1, 2]]])).tolist()
        [[[[0.5, 0.25, 0.0]]]]
    """
    where = "pysal::occlusion_masks_map"
    _checks.check_tensor(where, "scores", scores, ndim=3, dtypes=_checks.FLOATING)
    labels = _checks.check_indices(where, "labels", labels, ndim=3, device=scores.device)
    if labels.shape[0] != scores.shape[0]:
        _checks.refuse(where, "labels", f"have the batch of scores, {scores.shape[0]}", f"shape {tuple(labels.shape)}")
    out: Tensor = torch.ops.pysal.occlusion_masks_map(scores, labels)
    return out


def occlusion_masks_boxes_map(scores: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Return, for each pixel, the mean score of the boxes that cover it.

    A score that is not finite shows in the pixels of its box and nowhere else.

    Args:
        scores: (B, K, S), floating: K numbers for each of S boxes.
        boxes: (S, 4), integer: top, left, bottom, right in pixels, half open, inside (height, width).
        height: of the result, pixels, >= 0.
        width: of the result, pixels, >= 0.

    Returns:
        (B, K, height, width) in scores' dtype and device, 0 where no box covers the pixel; differentiable in scores.

    Raises:
        TypeError: not a tensor, or a dtype other than the above.
        ValueError: another rank or shape, a negative size, or (CPU tensors only) a box that is not inside the image.

    Source:
        Zeiler and Fergus 2014, arXiv 1311.2901, section 4.2.

    Deviations:
        None.

    Example:
        >>> boxes = torch.tensor([[0, 0, 1, 2], [0, 1, 1, 3]])
        >>> occlusion_masks_boxes_map(torch.tensor([[[1.0, 2.0]]]), boxes, 1, 4).tolist()
        [[[[1.0, 1.5, 2.0, 0.0]]]]
    """
    where = "pysal::occlusion_masks_boxes_map"
    _checks.check_tensor(where, "scores", scores, ndim=3, dtypes=_checks.FLOATING)
    for argument, size in (("height", height), ("width", width)):
        if size < 0:
            _checks.refuse(where, argument, "be at least 0", size)
    boxes = _check_boxes(where, boxes, scores.shape[2], scores.device, height, width)
    out: Tensor = torch.ops.pysal.occlusion_masks_boxes_map(scores, boxes, height, width)
    return out


def _check_images(where: str, images: Tensor, fills: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, torch.dtype]:
    _checks.check_tensor(where, "images", images, ndim=4, dtypes=_checks.FLOATING)
    _checks.check_tensor(where, "fills", fills, dtypes=(images.dtype,))
    _checks.check_same_shape(where, "fills", fills, "images", images.shape)
    _checks.check_same_device(where, "fills", fills, "images", images.device)
    return images, fills, _checks.check_dtype(where, dtype, images.dtype)


def _check_normalisation(
    where: str, mean: Tensor | None, std: Tensor | None, images: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return mean and std in float64 on the images' device, if both are given."""
    if (mean is None) != (std is None):
        _checks.refuse(where, "mean" if mean is None else "std", "be given where the other is", "None")
    if mean is None or std is None:
        return None, None
    for argument, value in (("mean", mean), ("std", std)):
        _checks.check_tensor(where, argument, value, dtypes=_checks.FLOATING)
        if value.shape != (images.shape[1],):
            _checks.refuse(where, argument, f"have shape ({images.shape[1]},)", f"shape {tuple(value.shape)}")
    if std.device.type == "cpu" and not torch.compiler.is_compiling() and not (std > 0).all():
        _checks.refuse(where, "std", "be positive", std.tolist())
    mean, std = (value.detach().to(device=images.device, dtype=widest(images.device)) for value in (mean, std))
    return mean, std


def _check_boxes(where: str, boxes: Tensor, count: int, device: torch.device, height: int, width: int) -> Tensor:
    given = _checks.check_tensor(where, "boxes", boxes, ndim=2, dtypes=_checks.INTEGER)
    if given.shape != (count, 4):
        _checks.refuse(where, "boxes", f"have shape ({count}, 4)", f"shape {tuple(given.shape)}")
    if given.device.type == "cpu" and not torch.compiler.is_compiling():
        top, left, bottom, right = given.unbind(1)
        inside = (0 <= top) & (top <= bottom) & (bottom <= height) & (0 <= left) & (left <= right) & (right <= width)
        if not inside.all():
            bad = given[(~inside).nonzero()[0, 0]].tolist()
            _checks.refuse(where, "boxes", f"be (top, left, bottom, right) inside {height} x {width} pixels", tuple(bad))
    return given.to(device=device, dtype=torch.int32)
