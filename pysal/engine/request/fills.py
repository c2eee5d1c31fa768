"""What stands for "nothing there": the fill of an occluded segment, the baseline of a path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from pysal import ops
from pysal._checks import refuse, refuse_unknown, warn
from pysal.engine.running.chunks import sent

if TYPE_CHECKING:
    from pysal.engine.request.plan import Plan

Fill: TypeAlias = float | tuple[float, ...] | Tensor | str
NAMED = ("black", "white", "mean", "blur")

# sigma of the "blur" fill in multiples of the longer side: 14 pixels at 224, where a photo keeps its colours and no object
BLUR_SIGMA = 1 / 16


# By how much images that were resized may leave [0, 1].
OVERSHOOT = 0.01


def check_units(plan: Plan, said: str, value: float) -> None:
    """Warn, once in a call, of a number that means a grey level in [0, 1] where the images' own numbers mean something else.

    Args:
        plan: of the images.
        said: what was asked for: "fill=0.0".
        value: the number that it puts into the images. One outside [0, 1] was meant in the images' own range.
    """
    low, high = plan.shared("range of the images", lambda root: tuple(float(end) for end in root.inputs.aminmax()))
    inside = low >= -OVERSHOOT and high <= 1 + OVERSHOOT
    if inside or not 0 <= value <= 1 or "units" in plan.root._shared:
        return
    plan.root._shared["units"] = True
    named = "black" if value == 0 else "white" if value == 1 else "that grey"
    what = f"the images range from {low:.3g} to {high:.3g}, so {said} puts in the number {value:g} of that range"
    instead = "give images in [0, 1] to a pysal.Normalized model, or a colour (a tuple) or an image in that range"
    warn(f"{plan.where}: {what}, which need not be {named}; {instead}")


def resolve_fill(plan: Plan, argument: str, value: object, *, also: tuple[str, ...] = ()) -> Tensor:
    """Return the fill of every image of a plan as a tensor of the images' shape.

    A number or a name in [0, 1] is warned of where the images have another range.

    Args:
        plan: of the images.
        argument: the argument's name, for errors.
        value: a number; a colour, as a tuple of C numbers or a tensor (C,); "black" (0), "white" (1), "mean" (of each image and
            channel) or "blur" (a Gaussian of sigma = 1/16 of the longer side, reflecting boundary); an image (C, H, W) or
            (1, C, H, W) for all, or one per image (B, C, H, W).
        also: names that the caller takes and that are no fill, for errors.

    Raises:
        TypeError: none of the above.
        ValueError: an unknown name, a wrong shape, or a value that is not finite.
    """
    where, images, total = plan.where, plan.inputs, plan.root.images
    channels = images.shape[1]
    given = value
    if isinstance(value, str):
        if value not in NAMED:
            names = (*NAMED, *also)
            requirement = f"be one of {', '.join(map(repr, names))}, a number, a colour or an image"
            refuse_unknown(where, argument, requirement, value, names)
        if value == "mean":
            return images.mean((2, 3), keepdim=True).expand_as(images)
        if value == "blur":
            sigma = BLUR_SIGMA * max(images.shape[2:])
            return ops.gaussian_scale_space(images, [sigma] * len(images), boundary="reflect")
        value = 0.0 if value == "black" else 1.0
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        check_units(plan, f"{argument}={given!r}", float(value))
        value = torch.tensor(float(value), dtype=torch.float64, device="cpu")
    elif isinstance(value, Sequence) and all(isinstance(v, (int, float)) for v in value):
        value = torch.tensor([float(v) for v in value], dtype=torch.float64, device="cpu")
    if not isinstance(value, Tensor):
        refuse(where, argument, "be a number, a colour, a name or an image tensor", repr(value), TypeError)
    fill = value.detach().to(dtype=images.dtype)  # looked at where it lies: a GPU must wait for what it is asked
    known = plan.root._shared.setdefault("finite fills", {})
    if id(given) not in known:
        if not bool(torch.isfinite(fill).all()):
            refuse(where, argument, "be finite", "NaN or infinity")
        known[id(given)] = given  # and kept, so that nothing else gets its place
    fill = sent(fill, images.device)
    if fill.ndim == 0:
        return fill.expand_as(images)
    if fill.ndim == 1 and fill.shape[0] == channels:
        return fill[:, None, None].expand_as(images)
    if fill.ndim in (3, 4) and fill.shape[-3:] == images.shape[1:]:
        if fill.ndim == 3 or fill.shape[0] == 1:
            return fill.expand_as(images)
        if fill.shape[0] == total:
            return fill[plan.origin]
    refuse(
        where,
        argument,
        f"be a number, a colour of {channels} channels or an image of shape {tuple(images.shape[1:])}",
        f"shape {tuple(fill.shape)}",
    )
