"""A class of a segmenter, over the pixels of a mask or at a point."""

import operator
from collections.abc import Sequence
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pysal._checks import check_choice, refuse
from pysal.engine.request.target import Call, CallTarget
from pysal.engine.running.states import outside_inference
from pysal.targets.columns import READINGS, Reading, Which, check_below, indices, read, shown
from pysal.targets.outputs import Field, maps_of

WHERE = "pysal.targets.Pixel"
Mask: TypeAlias = Tensor | np.ndarray[Any, Any]


class Pixel(CallTarget):
    """A class of a model that answers for each pixel: the mean of its scores where the model sees it, on a mask or at a point.

    Outputs of segmenters (N, K, h, w) may be smaller than the image; those of torchvision ({"out": ...}), transformers
    (`logits`; the queries of MaskFormer and Mask2Former put together) and depth models (N, h, w) are understood.

    Args:
        which: the class, by index or name, or one per image; None = the one that is predicted at the point, or has the highest
            mean on the mask, or most of the pixels. All as the unchanged image has them.
        at: (row, column) of a pixel of the image.
        mask: (H, W) for all images or (B, H, W) of each, of the image's size or another: what each pixel counts, 0 or more. A
            mask of another size than the output is averaged, or repeated. Without `at` and `mask`: the pixels in which the
            unchanged image is predicted to be of this class.
        score: "logit" for the output as it is, or "softmax", "log_softmax" (classes exclude each other), "sigmoid",
            "log_sigmoid".
        field: the name of the output's entry, or its place in a tuple, where it has several.
        dim: which dimension of the output are the classes: -1 for (N, h, w, K). None = 1, refused where the shape of the images
            says that it is the last.

    Raises:
        TypeError: a point or mask of another kind.
        ValueError: both, or numbers below 0.

    Example:
        >>> import pysal
        >>> segmenter = torch.nn.Conv2d(3, 5, 1).eval()  # scores (N, 5, H, W)
        >>> pysal.gradient(segmenter, torch.rand(2, 3, 8, 8), pysal.targets.Pixel(1, at=(2, 5))).abs().sum((1, 2, 3)) > 0
        tensor([True, True])
    """

    learns = True

    def __init__(
        self,
        which: Which | None = None,
        *,
        at: Sequence[int] | None = None,
        mask: Mask | None = None,
        score: Reading = "logit",
        field: Field | None = None,
        dim: int | None = None,
    ) -> None:
        check_choice(WHERE, "score", score, READINGS)
        if at is not None and mask is not None:
            refuse(WHERE, "mask", "be None where there is a point (at=)", type(mask).__name__)
        self.which, self.at, self.reading, self.field, self.dim = which, _point(at), score, field, dim
        self.mask = None if mask is None else _checked_mask(mask)
        place = "where it is predicted" if mask is None else "on the mask"
        place = f"at ({self.at[0]}, {self.at[1]})" if self.at else place
        self.__name__ = f"{'class' if which is None else shown(which)} {place}"

    index: Tensor
    weights: Tensor | None

    def of_call(self, call: Call) -> Self:
        """Return a copy for one call."""
        ready = super().of_call(call)
        if self.at is not None and not all(0 <= one < side for one, side in zip(self.at, call.size, strict=True)):
            refuse(call.where, "target.at", f"be a pixel of images of {call.size[0]} x {call.size[1]}", self.at)
        if self.mask is not None and self.mask.ndim == 3 and len(self.mask) != call.images:
            requirement = f"be (H, W) or have one mask for each of {call.images} images"
            refuse(call.where, "target.mask", requirement, tuple(self.mask.shape))
        ready.index = indices(call, "target", self.which)
        ready.weights = None
        return ready

    def learn(self, output: Any, rows: Tensor) -> None:
        """Find each image's class, and what each pixel of the output counts."""
        call, wanted = self.call, self.index[rows]
        maps = maps_of(call.where, output, len(rows), self.field, self.dim, self.call.size).detach()
        check_below(call, int(wanted.max()), maps.shape[1])
        height, width = maps.shape[2:]
        if self.at is not None:
            row, column = (one * small // side for one, small, side in zip(self.at, (height, width), call.size, strict=True))
            counting = maps.new_zeros(len(rows), height, width)
            counting[:, row, column] = 1.0
        elif self.mask is not None:
            own = self.mask.expand(call.images, *self.mask.shape[-2:])[rows.cpu()].to(maps)
            counting = interpolate(own[:, None], size=(height, width), mode="area")[:, 0]
        else:
            wanted, predicted = self._predicted(maps, rows)
            counting = predicted.to(maps.dtype)
        counting = counting / counting.sum((1, 2), keepdim=True)
        means = torch.einsum("nkhw,nhw->nk", maps, counting)
        self.index[rows] = torch.where(wanted < 0, means.argmax(1), wanted)
        if self.weights is None or self.weights.shape[1:] != maps.shape[2:]:
            self.weights = outside_inference(lambda: maps.new_zeros(call.images, height, width))
        self.weights[rows] = counting

    def _predicted(self, maps: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class (N,) and the pixels (N, h, w) that are predicted to be of it."""
        predicted = maps.argmax(1) if maps.shape[1] > 1 else torch.where(_positive(maps[:, 0]), 0, -1)
        counts = torch.stack([(predicted == one).sum((1, 2)) for one in range(maps.shape[1])], 1)
        wanted = torch.where(self.index[rows] < 0, counts.argmax(1), self.index[rows])
        absent = counts.gather(1, wanted[:, None]).squeeze(1) == 0
        if bool(absent.any()):
            first = int(absent.int().argmax())
            seen = ", ".join(map(str, counts[first].nonzero().flatten().tolist())) or "none"
            requirement = (
                "be a class that is predicted in every image, or come with a point or a mask "
                f"(predicted in image {int(rows[first])}: {seen})"
            )
            refuse(self.call.where, "target", requirement, f"class {int(wanted[first])}")
        return wanted, predicted == wanted[:, None, None]

    def __call__(self, output: Any, rows: Tensor) -> Tensor:
        """Return (N,) scores."""
        maps = maps_of(self.call.where, output, len(rows), self.field, self.dim, self.call.size)
        weights = self.weights
        if weights is None or weights.shape[1:] != maps.shape[2:]:
            refuse(self.call.where, "the model's output", "have the same size in every pass", tuple(maps.shape))
        index = self.index[rows].clamp_min(0)
        scores = read(maps, self.reading) if "softmax" in self.reading else maps
        own = scores[torch.arange(len(rows), device=maps.device), index.to(maps.device)]
        own = own if "softmax" in self.reading else read(own, self.reading)
        return (own * weights[rows].to(own)).sum((1, 2))


def _positive(map: Tensor) -> Tensor:
    """Return where a map of one class says yes: above a half where it holds probabilities, above 0 where it holds logits."""
    return map > (0.5 if bool((map >= 0).all()) and bool((map <= 1).all()) else 0.0)


def _point(at: object) -> tuple[int, int] | None:
    if at is None:
        return None
    try:
        row, column = map(operator.index, at)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        refuse(WHERE, "at", "be (row, column) of a pixel", repr(at), TypeError)
    if min(row, column) < 0:
        refuse(WHERE, "at", "be (row, column) of a pixel, 0 or more", (row, column))
    return row, column


def _checked_mask(mask: object) -> Tensor:
    if not isinstance(mask, (Tensor, np.ndarray)):
        refuse(WHERE, "mask", "be a tensor or array (H, W) or (B, H, W)", type(mask).__name__, TypeError)
    found = torch.as_tensor(mask, device="cpu").detach()
    if found.ndim not in (2, 3) or not found.numel():
        refuse(WHERE, "mask", "have shape (H, W) or (B, H, W)", tuple(found.shape))
    if found.dtype.is_complex:
        refuse(WHERE, "mask", "hold real numbers", found.dtype, TypeError)
    found = found.to(torch.float64)
    if not bool(found.isfinite().all()) or bool((found < 0).any()):
        refuse(WHERE, "mask", "hold finite numbers of 0 or more", float(found.min()))
    if not bool((found.flatten(-2).sum(-1) > 0).all()):
        refuse(WHERE, "mask", "count some pixel of every image", "zeros alone")
    return found
