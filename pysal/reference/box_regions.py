"""Regions of images that are one map but for a box each: the formulas."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pysal._checks import check_reach


def box_regions(
    map: Tensor,
    boxes: Tensor,
    origins: Tensor,
    corners: Tensor,
    height: int,
    width: int,
    row_step: int,
    column_step: int,
    outside: float,
) -> Tensor:
    """Return pixel corners[n] + (i row_step, j column_step) of image n at (i, j), (N, C, height, width), channels_last."""
    check_reach("pysal::box_regions", "rows", (height, row_step))
    check_reach("pysal::box_regions", "columns", (width, column_step))
    count, channels = boxes.shape[:2]
    y = (corners[:, :1].long() + torch.arange(height, device=map.device) * row_step)[:, :, None]
    x = (corners[:, 1:].long() + torch.arange(width, device=map.device) * column_step)[:, None]
    in_map = _inside(y, x, map)
    padded = F.pad(map[0], (0, 1, 0, 1), value=outside)
    out = padded[:, torch.where(in_map, y, map.shape[2]), torch.where(in_map, x, map.shape[3])].transpose(0, 1)
    y, x = y - origins[:, 0, None, None], x - origins[:, 1, None, None]
    in_box = _inside(y, x, boxes)
    image = torch.arange(count, device=map.device)[:, None, None]
    beyond = F.pad(boxes, (0, 1, 0, 1)).permute(0, 2, 3, 1)
    changed = beyond[image, torch.where(in_box, y, boxes.shape[2]), torch.where(in_box, x, boxes.shape[3])].permute(0, 3, 1, 2)
    out = torch.where((in_map & in_box)[:, None], changed, out).reshape(count, channels, height, width)
    return out.contiguous(memory_format=torch.channels_last)


def _inside(y: Tensor, x: Tensor, image: Tensor) -> Tensor:
    return (0 <= y) & (y < image.shape[2]) & (0 <= x) & (x < image.shape[3])


def box_regions_depthwise(
    map: Tensor,
    boxes: Tensor,
    origins: Tensor,
    corners: Tensor,
    height: int,
    width: int,
    weight: Tensor,
    bias: Tensor,
    row_step: int,
    column_step: int,
    row_dilation: int,
    column_dilation: int,
    lower: float,
    upper: float,
) -> Tensor:
    """Return the depthwise convolution, clamped to [lower, upper], whose first tap of output 0 is at corners[n]."""
    check_reach("pysal::box_regions_depthwise", "rows", (height, row_step), (weight.shape[0], row_dilation))
    check_reach("pysal::box_regions_depthwise", "columns", (width, column_step), (weight.shape[1], column_dilation))
    compute = torch.promote_types(map.dtype, torch.float32)
    rows = (height - 1) * row_step + (weight.shape[0] - 1) * row_dilation + 1
    columns = (width - 1) * column_step + (weight.shape[1] - 1) * column_dilation + 1
    regions = box_regions(map, boxes, origins, corners, max(rows, 0), max(columns, 0), 1, 1, 0.0).to(compute)
    out = bias.to(compute)[:, None, None].expand(len(boxes), -1, height, width)
    for p in range(weight.shape[0]):
        for q in range(weight.shape[1]):
            taps = regions[:, :, p * row_dilation :: row_step, q * column_dilation :: column_step][:, :, :height, :width]
            out = out + weight[p, q].to(compute)[:, None, None] * taps
    return out.clamp(lower, upper).to(map.dtype).contiguous(memory_format=torch.channels_last)


def box_regions_sums(map: Tensor, boxes: Tensor, origins: Tensor) -> Tensor:
    """Return the sums over box n of boxes[n] - map, where the box lies inside the map: (N, C) float64."""
    height, width = boxes.shape[2:]
    y = (origins[:, :1].long() + torch.arange(height, device=map.device))[:, :, None]
    x = (origins[:, 1:].long() + torch.arange(width, device=map.device))[:, None]
    clean = box_regions(map, boxes[:, :, :0], origins, origins, height, width, 1, 1, 0.0)
    difference = torch.where(_inside(y, x, map)[:, None], boxes.double() - clean.double(), 0)
    return difference.sum((2, 3))
