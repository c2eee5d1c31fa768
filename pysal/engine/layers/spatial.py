"""Reads the map (N, K, h, w) in what a layer returns: channels first, channels last, or tokens in a row."""

import math
from dataclasses import dataclass

from torch import Tensor, nn

# Tokens before those of the patches: none, a class token, a distillation token beside it, or registers after it.
PREFIXES = range(9)
# How far the proportions of a map may be from the image's, as a difference of logarithms: windows and strides round up.
LIKE = 0.2
# From here on a pair of sizes is no map of the image where another pair is like it.
UNLIKE = 0.35
_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


@dataclass(frozen=True)
class Reading:
    """Where in a layer's output the map is; called with the output, it returns the map.

    Attributes:
        height: of the map.
        width: of the map.
        prefix: tokens before those of the map, where it is tokens in a row (N, prefix + h w + any number, K); None where it
            is not.
        channels_last: (N, h, w, K).
        sequence_first: the row of tokens comes before the images, (prefix + h w + any number, N, K).
        order: the token of each cell, row by row, where they are not one after the other; prefix is 0 then.
    """

    height: int
    width: int
    prefix: int | None = None
    channels_last: bool = False
    sequence_first: bool = False
    order: tuple[int, ...] | None = None

    @property
    def tokens(self) -> bool:
        """Whether channels come last, in tokens or maps, as transformers have them."""
        return self.channels_last or self.prefix is not None

    def __call__(self, value: Tensor) -> Tensor:
        """Return (N, K, h, w)."""
        if self.channels_last:
            return value.permute(0, 3, 1, 2).contiguous()
        if self.prefix is None:
            return value
        rows = value.transpose(0, 1) if self.sequence_first else value
        cells = rows[:, self.prefix : self.prefix + self.height * self.width] if self.order is None else rows[:, self.order]
        patches: Tensor = cells.transpose(1, 2).unflatten(2, (self.height, self.width))
        return patches.contiguous()


def reading(shape: tuple[int, ...], module: nn.Module, image: tuple[int, int]) -> Reading | None:
    """Return how to read a map out of a layer's output, None where there is none.

    A map has the proportions of the image. Four dimensions are channels first unless channels last fits them and channels
    first does not; three are as many tokens as a map has, and up to eight before them.

    Args:
        shape: of the output.
        module: the layer.
        image: (height, width) of the model's input.
    """
    if len(shape) == 4:
        return _of_four(shape, module, image)
    if len(shape) == 3 and shape[2] > 1:
        return _of_tokens(shape[1], image)
    return None


def _of_four(shape: tuple[int, ...], module: nn.Module, image: tuple[int, int]) -> Reading:
    first, last = (shape[2], shape[3]), (shape[1], shape[2])
    last_fits = last[0] * last[1] > 1 and _difference(last, image) < LIKE
    if _works_on_last(module) or (_difference(first, image) > UNLIKE and not isinstance(module, _CHANNELS_FIRST)):
        if last_fits:
            return Reading(*last, channels_last=True)
    return Reading(*first)


def _works_on_last(module: nn.Module) -> bool:
    """Whether a layer's channels come last for certain. Subclasses of LayerNorm may permute."""
    return type(module) is nn.Linear or (type(module) is nn.LayerNorm and len(module.normalized_shape) == 1)


def _of_tokens(tokens: int, image: tuple[int, int]) -> Reading | None:
    best: tuple[float, Reading] | None = None
    for prefix in PREFIXES:
        patches = tokens - prefix
        if patches < 2:
            break
        for height in _near(patches, image):
            size = (height, patches // height)
            difference = _difference(size, image)
            if difference < LIKE and (best is None or difference < best[0]):
                best = difference, Reading(*size, prefix=prefix)
    return best[1] if best else None


def _near(patches: int, image: tuple[int, int]) -> list[int]:
    """Return the heights that divide a number of patches and give about the image's proportions."""
    ideal = math.sqrt(patches * image[0] / image[1])
    bounds = range(max(1, int(ideal * 0.8)), int(ideal * 1.25) + 2)
    return [height for height in bounds if patches % height == 0]


def is_like(size: tuple[int, int], image: tuple[int, int]) -> bool:
    """Say whether a map may have the proportions of an image."""
    return _difference(size, image) <= UNLIKE


def _difference(size: tuple[int, int], image: tuple[int, int]) -> float:
    """Return how much the proportions differ."""
    return abs(math.log(max(1, size[0]) / max(1, size[1])) - math.log(image[0] / image[1]))
