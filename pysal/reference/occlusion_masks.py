"""Occluded images from label maps or boxes, and segment scores put back on the pixels: the formulas."""

import torch
from torch import Tensor


def occlusion_masks(
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
    """Return image rows[n] with the pixels labelled ids[n] taken from its fill, normalised, (N, C, H, W) in `dtype`."""
    segment = labels.index_select(0, rows) == ids[:, None, None]
    return _select(images, fills, rows, segment, dtype, channels_last, mean, std)


def occlusion_masks_boxes(
    images: Tensor,
    fills: Tensor,
    boxes: Tensor,
    rows: Tensor,
    dtype: torch.dtype,
    channels_last: bool,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """Return image rows[n] with box n (top, left, bottom, right) taken from its fill, normalised, (N, C, H, W) in `dtype`."""
    top, left, bottom, right = boxes[:, :, None, None].unbind(1)
    y = torch.arange(images.shape[2], device=images.device)[:, None]
    x = torch.arange(images.shape[3], device=images.device)
    box = (top <= y) & (y < bottom) & (left <= x) & (x < right)
    return _select(images, fills, rows, box, dtype, channels_last, mean, std)


def _select(
    images: Tensor,
    fills: Tensor,
    rows: Tensor,
    hidden: Tensor,
    dtype: torch.dtype,
    channels_last: bool,
    mean: Tensor | None,
    std: Tensor | None,
) -> Tensor:
    out = torch.where(hidden[:, None], fills.index_select(0, rows), images.index_select(0, rows))
    if mean is not None and std is not None:
        compute = torch.promote_types(images.dtype, torch.float32)
        out = (out.to(compute) - mean.to(compute)[:, None, None]) / std.to(compute)[:, None, None]
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return out.to(dtype=dtype, memory_format=memory_format, copy=True)


def occlusion_masks_map(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the score of each pixel's label, (B, K, H, W); 0 where the label is outside [0, S)."""
    batch, classes, segments = scores.shape
    padded = torch.cat([scores, scores.new_zeros(batch, classes, 1)], dim=2)
    index = torch.where((0 <= labels) & (labels < segments), labels, segments).long()
    pixels = index.reshape(batch, 1, -1).expand(batch, classes, -1)
    return padded.gather(2, pixels).reshape(batch, classes, *labels.shape[1:])


def occlusion_masks_boxes_map(scores: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Return the mean score of the boxes that cover each pixel, (B, K, height, width); 0 where none does.

    A line at a time, over the boxes that cross it, so that a score which is not finite stays inside its box.
    """
    compute = torch.promote_types(scores.dtype, torch.float32)
    top, left, bottom, right = boxes.unbind(1)
    x = torch.arange(width, device=scores.device)[:, None]
    columns = (left <= x) & (x < right)
    lines = [scores.new_zeros(*scores.shape[:2], 0, width, dtype=compute)]
    for y in range(height):
        crossing = ((top <= y) & (y < bottom)).nonzero()[:, 0]
        cover = columns[:, crossing]
        total = torch.where(cover, scores[:, :, None, crossing].to(compute), 0).sum(3)
        lines.append((total / cover.sum(1).clamp(min=1))[:, :, None])
    return torch.cat(lines, dim=2).to(scores.dtype)
