"""What the segments of images cover: how many there are, the boxes that hold them, and the patches of a transformer."""

import numpy as np
import torch
from torch import Tensor

from pysal._checks import refuse
from pysal.engine.boxes.reach import Integers
from pysal.engine.request.patch_tokens import DROP, PatchTokens
from pysal.engine.request.plan import Plan
from pysal.segments import Boxes, Labels, Segments, Slic, cut


def regions_of(plan: Plan, segments: Segments) -> Boxes | Labels:
    """Return the segments of a plan's images, which are cut once in a call."""
    key = segments if isinstance(segments, Slic) else id(segments)
    regions: Boxes | Labels = plan.shared(("segments", key), lambda root: cut(root.where, segments, root.inputs))
    if isinstance(regions, Labels):
        return Labels(regions.labels[plan.origin], tuple(regions.counts[i] for i in plan.origin.tolist()))
    return regions


def counts_of(regions: Boxes | Labels, images: int) -> tuple[int, ...]:
    """Return how many segments each image has."""
    return (len(regions.boxes),) * images if isinstance(regions, Boxes) else regions.counts


def boxes_of(regions: Boxes | Labels, image: int) -> Integers:
    """Return the boxes (S, 4) that hold the segments of an image."""
    if isinstance(regions, Boxes):
        boxes: Integers = regions.on_host
        return boxes
    labels = regions.on_host[image]
    boxes = np.zeros((regions.counts[image], 4), dtype=np.int64)
    boxes[:, :2] = labels.shape
    y, x = np.nonzero(labels >= 0)
    found = labels[y, x]
    for axis, places in enumerate((y, x)):
        np.minimum.at(boxes[:, axis], found, places)
        np.maximum.at(boxes[:, axis + 2], found, places + 1)
    return boxes


def patches_of(tokens: PatchTokens, plan: Plan, regions: Boxes | Labels) -> Tensor:
    """Return (B, S, N): the patches that are left out with each segment of each image.

    Raises:
        ValueError: a segment leaves no patch, and the model needs one.
    """
    area = tokens.patch[0] * tokens.patch[1]
    if isinstance(regions, Boxes):
        top, left, bottom, right = regions.boxes.long().to(plan.device)[:, :, None].unbind(1)
        rows, columns = (torch.arange(number, device=plan.device) for number in tokens.grid)
        (height, width), zero = tokens.patch, torch.zeros((), dtype=torch.int64, device=plan.device)
        down = torch.minimum(bottom, (rows + 1) * height) - torch.maximum(top, rows * height)
        across = torch.minimum(right, (columns + 1) * width) - torch.maximum(left, columns * width)
        pixels = (torch.maximum(down, zero)[:, :, None] * torch.maximum(across, zero)[:, None]).flatten(1)
        pixels = pixels.expand(plan.images, -1, -1)
    else:
        most = max(regions.counts)
        patches = torch.arange(tokens.count, device=plan.device).view(tokens.grid)
        patches = patches.repeat_interleave(tokens.patch[0], 0).repeat_interleave(tokens.patch[1], 1)
        labels = regions.labels.long()[:, : patches.shape[0], : patches.shape[1]]
        flat = torch.where(labels < 0, most, labels) * tokens.count + patches
        pixels = torch.zeros(plan.images, (most + 1) * tokens.count, dtype=torch.int64, device=plan.device)
        pixels.scatter_add_(1, flat.flatten(1), torch.ones_like(flat).flatten(1))
        pixels = pixels.view(plan.images, most + 1, tokens.count)[:, :most]
    without = 2 * pixels >= area
    largest, place = pixels.max(2, keepdim=True)
    small = ~without.any(2, keepdim=True) & (largest > 0)
    without |= torch.zeros_like(without).scatter_(2, place, value=True) & small
    if not tokens.allows_none and bool(without.all(2).any()):
        image, segment = without.all(2).nonzero()[0].tolist()
        requirement = f"leave a patch each with fill={DROP!r}, without any of which this model has no answer"
        refuse(plan.where, "segments", requirement, f"segment {segment} of image {image}, which covers all of them")
    return without
