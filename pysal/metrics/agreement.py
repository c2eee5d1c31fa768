"""Agreement: whether methods rank the pixels of an image alike."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from pysal._checks import check_same_device, refuse
from pysal.methods.registry import EVERY
from pysal.metrics._maps import check_map_batch, per_pixel


def agreement(maps: Mapping[str, Tensor], *, absolute: bool = False) -> Tensor:
    """Return Spearman's rank correlation between the maps of each two methods, image by image.

    Args:
        maps: name -> (B, C, H, W), floating point, all of the same B, H and W; channels become one number per pixel as
            `pysal.explain` draws the method of that name, or their sum where there is no such method.
        absolute: whether to rank |map|, so that methods without a sign compare with those that have one.

    Returns:
        (B, M, M) float64 on the CPU, in [-1, 1], symmetric, in the order of `maps`; tied pixels share their mean rank. NaN
        where a map is constant or not finite.

    Raises:
        TypeError: no mapping, or values that are no floating-point tensors.
        ValueError: fewer than one map, or shapes or devices that differ.

    Source:
        Spearman 1904, American Journal of Psychology 15; the comparison of methods is that of Krishna et al. 2022,
        arXiv:2202.01602.

    Example:
        >>> first = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
        >>> agreement({"first": first, "second": -first}).tolist()
        [[[1.0, -1.0], [-1.0, 1.0]]]
    """
    where = "pysal.metrics.agreement"
    if not isinstance(maps, Mapping):
        refuse(where, "maps", "be a mapping of names to maps", type(maps).__name__, TypeError)
    if not maps:
        refuse(where, "maps", "hold at least one map", "none")
    pixels: dict[str, Tensor] = {}
    for name, map in maps.items():
        argument = f"maps[{name!r}]"
        checked = check_map_batch(where, map, argument)
        found = per_pixel(where, checked, reduction_of(name))
        first = next(iter(pixels.values()), found)
        if found.shape != first.shape:
            refuse(where, argument, f"have the images and size of the others, {tuple(first.shape)}", f"{tuple(found.shape)}")
        check_same_device(where, argument, found, "the others", first.device)
        pixels[name] = found.abs() if absolute else found
    ranks = [ranks_of(found) for found in pixels.values()]
    result = np.stack([[correlation(a, b) for b in ranks] for a in ranks])  # (M, M, B)
    return torch.from_numpy(result).permute(2, 0, 1).contiguous()


def reduction_of(method: str | None) -> str:
    """Return how the channels of a method's map become one number per pixel."""
    known = EVERY.get(method or "")
    return "max_abs" if known is not None and known.reduction == "max_abs" else "sum"


def ranks_of(pixels: Tensor) -> NDArray[Any]:
    """Return the centred ranks (B, H W) of maps (B, H, W), of length 1; NaN where a map is constant or not finite."""
    flat = pixels.flatten(1).cpu().numpy()
    ranks: NDArray[Any] = rankdata(flat, axis=1, nan_policy="propagate").astype(np.float64)
    ranks -= ranks.mean(1, keepdims=True)
    lengths = np.sqrt((ranks * ranks).sum(1, keepdims=True))
    usable = (lengths > 0) & np.isfinite(flat).all(1, keepdims=True)
    return np.where(usable, ranks / np.where(usable, lengths, 1.0), np.nan)


def correlation(first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    """Return Spearman's correlation (B,) of what `ranks_of` returns."""
    result: NDArray[Any] = np.clip((first * second).sum(1), -1.0, 1.0)
    return result
