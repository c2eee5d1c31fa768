"""Regions of images that are one map but for a box each: cut out, convolved depthwise, and summed."""

import torch
from torch import Tensor

from pysal import _checks
from pysal._library import define
from pysal.reference import box_regions as reference

SCHEMA = (
    "(Tensor map, Tensor boxes, Tensor origins, Tensor corners, SymInt height, SymInt width, int row_step, int column_step, "
    "float outside) -> Tensor"
)
DEPTHWISE_SCHEMA = (
    "(Tensor map, Tensor boxes, Tensor origins, Tensor corners, SymInt height, SymInt width, Tensor weight, Tensor bias, "
    "int row_step, int column_step, int row_dilation, int column_dilation, float lower, float upper) -> Tensor"
)
SUMS_SCHEMA = "(Tensor map, Tensor boxes, Tensor origins) -> Tensor"

define("box_regions", SCHEMA, reference.box_regions)
define("box_regions_depthwise", DEPTHWISE_SCHEMA, reference.box_regions_depthwise)
define("box_regions_sums", SUMS_SCHEMA, reference.box_regions_sums)


def _new(boxes: Tensor, height: int, width: int) -> Tensor:
    shape = (boxes.shape[0], boxes.shape[1], height, width)
    return torch.empty(shape, dtype=boxes.dtype, device=boxes.device, memory_format=torch.channels_last)


def _fake(
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
    _check_regions("pysal::box_regions", (height, row_step), (width, column_step))
    return _new(boxes, height, width)


def _fake_depthwise(
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
    where = "pysal::box_regions_depthwise"
    _check_regions(where, (height, row_step), (width, column_step), weight, (row_dilation, column_dilation))
    return _new(boxes, height, width)


def _fake_sums(map: Tensor, boxes: Tensor, origins: Tensor) -> Tensor:
    return boxes.new_empty(boxes.shape[0], boxes.shape[1], dtype=torch.float64)


torch.library.register_fake("pysal::box_regions", _fake)
torch.library.register_fake("pysal::box_regions_depthwise", _fake_depthwise)
torch.library.register_fake("pysal::box_regions_sums", _fake_sums)


def box_regions(
    map: Tensor,
    boxes: Tensor,
    origins: Tensor,
    corners: Tensor,
    height: int,
    width: int,
    *,
    row_step: int = 1,
    column_step: int = 1,
    outside: float = 0.0,
) -> Tensor:
    """Return a region of each of N images that are `map` but for the box boxes[n] at origins[n].

    Pixel (i, j) of region n is pixel corners[n] + (i row_step, j column_step) of image n; beyond the image's edge it is
    `outside`, as padding is.

    Args:
        map: (1, C, H, W), floating.
        boxes: (N, C, h, w), the map's dtype and device: what is there instead; nothing where h or w is 0.
        origins: (N, 2), integer: row and column of the map where pixel (0, 0) of each box lies; a box may reach beyond the map.
        corners: (N, 2), integer: row and column of pixel (0, 0) of each region, which may lie beyond the map.
        height: of a region, >= 0.
        width: of a region, >= 0.
        row_step: rows of the image from one row of a region to the next, >= 1.
        column_step: the same for columns.
        outside: value beyond the edge of the map.

    Returns:
        (N, C, height, width) in the map's dtype and device, channels_last; not differentiable.

    Raises:
        TypeError: not a tensor, or a dtype other than the above.
        ValueError: another rank or shape, tensors on several devices, a size below 0 or a step below 1, or regions that reach
            2**31 rows or columns.

    Source:
        Nakandala, Kumar and Papakonstantinou 2019, https://doi.org/10.1145/3299869.3319874, section 4.

    Deviations:
        None.

    Example:
        >>> image = torch.arange(9.0).view(1, 1, 3, 3)
        >>> box_regions(image, torch.full((1, 1, 1, 1), 7.5), torch.tensor([[0, 1]]), torch.tensor([[-1, 0]]), 3, 2)
        tensor([[[[0.0000, 0.0000],
                  [0.0000, 7.5000],
                  [3.0000, 4.0000]]]])
    """
    where = "pysal::box_regions"
    origins = _check_boxes(where, map, boxes, origins)
    corners = _check_places(where, "corners", corners, boxes)
    for argument, value, least in (
        ("height", height, 0),
        ("width", width, 0),
        ("row_step", row_step, 1),
        ("column_step", column_step, 1),
    ):
        _check_at_least(where, argument, value, least)
    _check_regions(where, (height, row_step), (width, column_step))
    regions: Tensor = torch.ops.pysal.box_regions(map, boxes, origins, corners, height, width, row_step, column_step, outside)
    return regions


def box_regions_depthwise(
    map: Tensor,
    boxes: Tensor,
    origins: Tensor,
    corners: Tensor,
    height: int,
    width: int,
    weight: Tensor,
    bias: Tensor,
    *,
    row_step: int = 1,
    column_step: int = 1,
    row_dilation: int = 1,
    column_dilation: int = 1,
    lower: float = float("-inf"),
    upper: float = float("inf"),
) -> Tensor:
    """Return regions of the depthwise convolution of N images that are `map` but for the box boxes[n] at origins[n].

    out[n, c, i, j] = min(max(bias[c] + sum over p, q of weight[p, q, c] image[n, c, y, x], lower), upper) with
    (y, x) = corners[n] + (i row_step + p row_dilation, j column_step + q column_dilation), and 0 for the image beyond its edge.

    Args:
        map: see `box_regions`.
        boxes: see `box_regions`.
        origins: see `box_regions`.
        corners: (N, 2), integer: row and column of the image that tap (0, 0) of output (0, 0) reads.
        height: of a region of the result, >= 0.
        width: of a region of the result, >= 0.
        weight: (kh, kw, C), the map's dtype and device, kh and kw >= 1.
        bias: (C,), the map's dtype and device.
        row_step: the convolution's stride down, >= 1.
        column_step: the convolution's stride to the right, >= 1.
        row_dilation: the convolution's dilation down, >= 1.
        column_dilation: the convolution's dilation to the right, >= 1.
        lower: what the result is at least.
        upper: what the result is at most.

    Returns:
        (N, C, height, width) in the map's dtype and device, channels_last; not differentiable.

    Raises:
        TypeError: not a tensor, or a dtype other than the above.
        ValueError: another rank or shape, tensors on several devices, a size below 0, a step or dilation below 1, or regions
            that reach 2**31 rows or columns.

    Source:
        Nakandala, Kumar and Papakonstantinou 2019, https://doi.org/10.1145/3299869.3319874, section 4.

    Deviations:
        None.

    Example:
        >>> image, nothing, origin = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 0, 0), torch.zeros(1, 2, dtype=torch.int32)
        >>> box_regions_depthwise(image, nothing, origin, origin - 1, 1, 3, torch.ones(3, 3, 1), torch.zeros(1))
        tensor([[[[4., 6., 4.]]]])
    """
    where = "pysal::box_regions_depthwise"
    origins = _check_boxes(where, map, boxes, origins)
    corners = _check_places(where, "corners", corners, boxes)
    _checks.check_tensor(where, "weight", weight, ndim=3, dtypes=(map.dtype,))
    if weight.shape[2] != map.shape[1] or 0 in weight.shape[:2]:
        requirement = f"have shape (kh, kw, {map.shape[1]}), kh and kw at least 1"
        _checks.refuse(where, "weight", requirement, f"shape {tuple(weight.shape)}")
    _checks.check_tensor(where, "bias", bias, ndim=1, dtypes=(map.dtype,))
    if len(bias) != map.shape[1]:
        _checks.refuse(where, "bias", f"have {map.shape[1]} elements, one per channel", len(bias))
    for argument, tensor in (("weight", weight), ("bias", bias)):
        _checks.check_same_device(where, argument, tensor, "map", map.device)
    for argument, value, least in (
        ("height", height, 0),
        ("width", width, 0),
        ("row_step", row_step, 1),
        ("column_step", column_step, 1),
        ("row_dilation", row_dilation, 1),
        ("column_dilation", column_dilation, 1),
    ):
        _check_at_least(where, argument, value, least)
    _check_regions(where, (height, row_step), (width, column_step), weight, (row_dilation, column_dilation))
    regions: Tensor = torch.ops.pysal.box_regions_depthwise(
        map,
        boxes,
        origins,
        corners,
        height,
        width,
        weight,
        bias,
        row_step,
        column_step,
        row_dilation,
        column_dilation,
        lower,
        upper,
    )
    return regions


def box_regions_sums(map: Tensor, boxes: Tensor, origins: Tensor) -> Tensor:
    """Return, per image and channel, by how much the sum over the image differs from that over `map`.

    Args:
        map: see `box_regions`.
        boxes: see `box_regions`; what lies beyond the map counts nothing.
        origins: see `box_regions`.

    Returns:
        (N, C) float64, on the map's device: the sum of boxes[n] - map over box n; not differentiable.

    Raises:
        TypeError: not a tensor, or a dtype other than the above.
        ValueError: another rank or shape, or tensors on several devices.

    Source:
        Nakandala, Kumar and Papakonstantinou 2019, https://doi.org/10.1145/3299869.3319874, section 4.

    Deviations:
        None.

    Example:
        >>> image = torch.arange(9.0).view(1, 1, 3, 3)
        >>> box_regions_sums(image, torch.zeros(1, 1, 2, 1), torch.tensor([[1, 2]])).item()
        -13.0
    """
    where = "pysal::box_regions_sums"
    origins = _check_boxes(where, map, boxes, origins)
    sums: Tensor = torch.ops.pysal.box_regions_sums(map, boxes, origins)
    return sums


def _check_boxes(where: str, map: Tensor, boxes: Tensor, origins: Tensor) -> Tensor:
    """Refuse a map, boxes or origins that do not go together; return the origins as int32."""
    _checks.check_tensor(where, "map", map, ndim=4, dtypes=_checks.FLOATING)
    if len(map) != 1:
        _checks.refuse(where, "map", "be one map (1, C, H, W)", f"shape {tuple(map.shape)}")
    _checks.check_tensor(where, "boxes", boxes, ndim=4, dtypes=(map.dtype,))
    if boxes.shape[1] != map.shape[1]:
        _checks.refuse(where, "boxes", f"have the {map.shape[1]} channels of map", f"shape {tuple(boxes.shape)}")
    _checks.check_same_device(where, "boxes", boxes, "map", map.device)
    return _check_places(where, "origins", origins, boxes)


def _check_places(where: str, argument: str, places: Tensor, boxes: Tensor) -> Tensor:
    places = _checks.check_indices(where, argument, places, ndim=2, device=boxes.device)
    if places.shape != (len(boxes), 2):
        _checks.refuse(where, argument, f"have shape ({len(boxes)}, 2)", f"shape {tuple(places.shape)}")
    return places


def _check_regions(
    where: str,
    rows: tuple[int, int],
    columns: tuple[int, int],
    weight: Tensor | None = None,
    dilations: tuple[int, int] = (1, 1),
) -> None:
    taps = (1, 1) if weight is None else weight.shape[:2]
    _checks.check_reach(where, "rows", rows, (taps[0], dilations[0]))
    _checks.check_reach(where, "columns", columns, (taps[1], dilations[1]))


def _check_at_least(where: str, argument: str, value: int, least: int) -> None:
    if value < least:
        _checks.refuse(where, argument, f"be at least {least}", value)
