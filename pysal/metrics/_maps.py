"""What figures take: maps of the images' size, whole numbers, draws that depend on an image's id alone."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from pysal import ops
from pysal._checks import FLOATING, check_same_device, check_tensor, refuse, refuse_unknown
from pysal._library import widened
from pysal.viz import reduce_channels

Reduction: TypeAlias = Literal["sum", "max_abs"]
REDUCTIONS: tuple[str, ...] = ("sum", "max_abs")


def check_maps(where: str, maps: object, inputs: Tensor, argument: str = "maps") -> Tensor:
    """Return the maps (B, 1 or C, H, W) of images (B, C, H, W) in float64.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: another shape or device.
    """
    found = check_tensor(where, argument, maps, dtypes=FLOATING)
    batch, channels, height, width = inputs.shape
    if tuple(found.shape) not in {(batch, 1, height, width), (batch, channels, height, width)}:
        wanted = f"({batch}, 1 or {channels}, {height}, {width})"
        refuse(where, argument, f"have shape {wanted}", f"shape {tuple(found.shape)}")
    check_same_device(where, argument, found, "inputs", inputs.device)
    return widened(found.detach())


def check_map_batch(where: str, maps: object, argument: str = "maps") -> Tensor:
    """Return maps (B, C, H, W) in float64, where there are no images to compare their shape with."""
    found = check_tensor(where, argument, maps, ndim=4, dtypes=FLOATING)
    if 0 in found.shape:
        refuse(where, argument, "hold at least one pixel", f"shape {tuple(found.shape)}")
    return widened(found.detach())


def per_pixel(where: str, maps: Tensor, reduction: str) -> Tensor:
    """Return one number per pixel (B, H, W); a map of one channel is taken as it is."""
    if reduction not in REDUCTIONS:
        refuse_unknown(where, "reduction", f"be {' or '.join(map(repr, REDUCTIONS))}", reduction, REDUCTIONS)
    return reduce_channels(maps, "none" if maps.shape[1] == 1 else reduction)


def uniform(seed: int, image_ids: Tensor, draws: Tensor, numbers: int) -> Tensor:
    """Return numbers in (0, 1), (N, numbers) float64, that depend on (seed, id, draw, place) alone.

    Philox's words r as (r + 0.5) / 2^32: the same on every device, in every batch and for every number of processes.
    """
    return (widened(ops.gaussian_noise_bits(seed, image_ids, draws, numbers)) + 0.5) / 2**32


def rank_of_pixels(importance: Tensor) -> Tensor:
    """Return the rank (B, H, W) of each pixel of (B, H, W), 0 for the most important; equal pixels rank in reading order."""
    flat = importance.flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(flat.shape[1], device=flat.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view(importance.shape)
