"""Pointing game and mass in mask: whether a map lies on the object that somebody has marked."""

import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from pysal._checks import check_number, check_same_device, check_tensor, finite_rows, refuse
from pysal._library import widest
from pysal.metrics._maps import Reduction, check_map_batch, per_pixel

TOLERANCE = 15.0
"""Pixels by which the highest point may miss the object: what Zhang et al. allow."""


def pointing_game(maps: Tensor, masks: Tensor, *, tolerance: float = TOLERANCE, reduction: Reduction = "sum") -> Tensor:
    """Return whether the highest point of each map lies on the object: 1.0 or 0.0.

    Where several pixels are highest, as in a map of superpixels, the share of them that hits. The mean over images is the
    pointing game's accuracy.

    Args:
        maps: (B, C, H, W), floating point: larger is more important.
        masks: (B, H, W) or (B, 1, H, W), bool: the object.
        tolerance: pixels, at least 0: how far beside the object still counts.
        reduction: how C channels become one number per pixel: "sum" or "max_abs".

    Returns:
        (B,) float64 in [0, 1] on the maps' device; NaN for a map that is not finite or a mask without a pixel.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or value.

    Source:
        Zhang, Lin, Brandt, Shen and Sclaroff 2016, arXiv:1608.00507.

    Deviations:
        Ties give a share instead of the first of the highest pixels.

    Example:
        >>> map = torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])
        >>> pointing_game(map, torch.tensor([[[False, True], [False, False]]]), tolerance=0.0)
        tensor([0.5000], dtype=torch.float64)
    """
    where = "pysal.metrics.pointing_game"
    found, inside = _checked(where, maps, masks, reduction)
    tolerance = check_number(where, "tolerance", tolerance, unit=" of pixels")
    near = inside
    if tolerance:
        distances = [distance_transform_edt(~mask) for mask in inside.cpu().numpy()]
        near = torch.stack([torch.from_numpy(one <= tolerance) for one in distances]).to(found.device)
    flat = found.flatten(1)
    highest = flat == flat.amax(1, keepdim=True)
    hits = (highest & near.flatten(1)).sum(1).to(widest(highest.device)) / highest.sum(1)
    return _known(hits, found, inside)


def mass_in_mask(maps: Tensor, masks: Tensor, *, reduction: Reduction = "sum") -> Tensor:
    """Return the share of the positive attribution that lies on the object.

    Args:
        maps: see `pointing_game`.
        masks: see `pointing_game`.
        reduction: see `pointing_game`.

    Returns:
        (B,) float64 in [0, 1] on the maps' device; NaN for a map that is not finite or has nothing positive, or a mask
        without a pixel.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or value.

    Source:
        Wang, Wang, Du, Yang, Zhang, Ding, Mardziel and Hu 2020, arXiv:1910.01279 (energy-based pointing game).

    Deviations:
        Negative attribution is left out.

    Example:
        >>> map = torch.tensor([[[[3.0, 1.0], [-5.0, 0.0]]]])
        >>> mass_in_mask(map, torch.tensor([[[True, False], [True, False]]]))
        tensor([0.7500], dtype=torch.float64)
    """
    where = "pysal.metrics.mass_in_mask"
    found, inside = _checked(where, maps, masks, reduction)
    mass = found.clamp(min=0).flatten(1)
    return _known((mass * inside.flatten(1)).sum(1) / mass.sum(1), found, inside)  # 0 / 0 is NaN


def _checked(where: str, maps: object, masks: object, reduction: str) -> tuple[Tensor, Tensor]:
    checked = check_map_batch(where, maps)
    inside = check_tensor(where, "masks", masks, dtypes=(torch.bool,))
    batch, _, height, width = checked.shape
    if tuple(inside.shape) not in {(batch, height, width), (batch, 1, height, width)}:
        refuse(where, "masks", f"have shape ({batch}, {height}, {width})", f"shape {tuple(inside.shape)}")
    check_same_device(where, "masks", inside, "maps", checked.device)
    return per_pixel(where, checked, reduction), inside.view(batch, height, width)


def _known(figures: Tensor, found: Tensor, inside: Tensor) -> Tensor:
    return figures.masked_fill(~finite_rows(found) | ~inside.flatten(1).any(1), torch.nan)
