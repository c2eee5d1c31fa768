"""What stands for "nothing there": the fill of an occluded segment, the baseline of a path."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from pysal import ops
from pysal._checks import refuse

Fill: TypeAlias = float | tuple[float, ...] | Tensor | str
NAMED = ("black", "white", "mean", "blur")

# sigma of the "blur" fill in multiples of the longer side: 14 pixels at 224, where a photo keeps its colours and no object
BLUR_SIGMA = 1 / 16


def resolve_fill(where: str, argument: str, value: object, images: Tensor, origin: Tensor, total: int) -> Tensor:
    """Return the fill of every image as a tensor of the images' shape.

    Args:
        where: the public name of the method, for errors.
        argument: the argument's name, for errors.
        value: a number; a colour, as a tuple of C numbers or a tensor (C,); "black" (0), "white" (1), "mean" (of each image and
            channel) or "blur" (a Gaussian of sigma = 1/16 of the longer side, reflecting boundary); an image (C, H, W) or
            (1, C, H, W) for all, or one per image (B, C, H, W).
        images: (N, C, H, W).
        origin: (N,) the image of the call that each of the N belongs to: which of B fills it takes.
        total: number of images in the call, B.

    Raises:
        TypeError: none of the above.
        ValueError: an unknown name, a wrong shape, or a value that is not finite.
    """
    channels = images.shape[1]
    if isinstance(value, str):
        if value not in NAMED:
            refuse(where, argument, f"be one of {', '.join(map(repr, NAMED))}, a number, a colour or an image", repr(value))
        if value == "mean":
            return images.mean((2, 3), keepdim=True).expand_as(images)
        if value == "blur":
            sigma = BLUR_SIGMA * max(images.shape[2:])
            return ops.gaussian_scale_space(images, [sigma] * len(images), boundary="reflect")
        value = 0.0 if value == "black" else 1.0
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = torch.tensor(float(value), dtype=torch.float64, device="cpu")
    elif isinstance(value, Sequence) and all(isinstance(v, (int, float)) for v in value):
        value = torch.tensor([float(v) for v in value], dtype=torch.float64, device="cpu")
    if not isinstance(value, Tensor):
        refuse(where, argument, "be a number, a colour, a name or an image tensor", repr(value), TypeError)
    fill = value.detach().to(device=images.device, dtype=images.dtype)
    if not bool(torch.isfinite(fill).all()):
        refuse(where, argument, "be finite", "NaN or infinity")
    if fill.ndim == 0:
        return fill.expand_as(images)
    if fill.ndim == 1 and fill.shape[0] == channels:
        return fill[:, None, None].expand_as(images)
    if fill.ndim in (3, 4) and fill.shape[-3:] == images.shape[1:]:
        if fill.ndim == 3 or fill.shape[0] == 1:
            return fill.expand_as(images)
        if fill.shape[0] == total:
            return fill[origin]
    refuse(
        where,
        argument,
        f"be a number, a colour of {channels} channels or an image of shape {tuple(images.shape[1:])}",
        f"shape {tuple(fill.shape)}",
    )
