"""What a caller may ask for: a class, a margin of two, a function of the model's output, or one of these per image."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pysal._checks import refuse


class RowTarget:
    """A callable target that is also told which image each row of the output belongs to.

    In one pass a model is given rows of several images, some of them several times: steps of a path, hidden segments, noisy
    copies. What differs from image to image (a mask, a box, a caption's embedding) is looked up by `images`.

    Args:
        function: (the model's output for N rows, images (N,) int64) -> scores (N,); `images[n]` is the image of row n, in
            the order of the call's images.

    Example:
        >>> import pysal
        >>> segmenter = torch.nn.Conv2d(3, 5, 1).eval()  # scores (N, 5, H, W)
        >>> masks = torch.rand(2, 8, 8).round()  # of each image its own
        >>> target = pysal.RowTarget(lambda output, images: (output[:, 1] * masks[images]).sum((1, 2)))
        >>> pysal.gradient(segmenter, torch.rand(2, 3, 8, 8), target).shape
        torch.Size([2, 3, 8, 8])
    """

    # whether its scores must follow their rows, which is looked at once
    follows_rows = True

    def __init__(self, function: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        if not callable(function) and type(self).__call__ is RowTarget.__call__:
            refuse("pysal.RowTarget", "function", "be callable (output, images) -> (N,)", type(function).__name__, TypeError)
        self.function = function
        if function is not None:
            self.__name__ = str(getattr(function, "__name__", type(function).__name__))

    def __call__(self, output: Any, rows: Tensor) -> Tensor:
        """Return (N,) scores; `rows` (N,) says which image each row of the output belongs to. A subclass may say how itself."""
        assert self.function is not None
        return self.function(output, rows)


class Find(Protocol):
    """Finds classes by name."""

    def __call__(self, argument: str, name: str) -> int:
        """Return the index of the class of a name, refusing one that the model does not have."""

    @property
    def named(self) -> int | None:
        """How many classes have names, None where the model carries none."""

    def check(self, classes: int) -> None:
        """Refuse names, where some were asked for, that are not those of as many answers."""


@dataclass(frozen=True)
class Call:
    """What a target is told of the call that it is used in.

    Attributes:
        where: the public name of the method, for errors.
        images: number of images B.
        size: (height, width) of the images, pixels.
        device: where the model runs.
        find: finds classes by name.
    """

    where: str
    images: int
    size: tuple[int, int]
    device: torch.device
    find: Find


class CallTarget(RowTarget):
    """A target that is made ready for each call, and may look at the unchanged images: at what is predicted or found there.

    Its scores follow their rows by construction. What it learns of an image belongs to the call, not to the target, which may
    be used again for others.

    Attributes:
        learns: whether it looks at the unchanged images before it scores anything.
        call: the call that it was made ready for.
    """

    follows_rows = False
    learns = False
    call: Call

    def of_call(self, call: Call) -> Self:
        """Return a copy for one call; a subclass checks what it was given against it."""
        ready = copy.copy(self)
        ready.call = call
        return ready

    def learn(self, output: Any, rows: Tensor) -> None:
        """Look at what the model answers to unchanged images `rows` (N,)."""

    def is_nothing(self, output: Any, rows: Tensor) -> bool:
        """Whether an output holds nothing that could be scored, so that the scores are constants."""
        return False


@dataclass(frozen=True, eq=False)
class Margin:
    """A target: the score of class `a` minus that of class `b`. Each is an index, a name, or one of either per image.

    It is the margin of what `score` says: of logits, probabilities or their logarithms.

    Example:
        >>> import pysal
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)).eval()
        >>> pysal.gradient(model, torch.rand(2, 3, 8, 8), pysal.Margin([3, 5], 7)).shape
        torch.Size([2, 3, 8, 8])
    """

    a: Any
    b: Any


Class: TypeAlias = int | str
Target: TypeAlias = (
    Class
    | Sequence[Class]
    | Sequence[Margin]
    | Sequence[Callable[[Any], Tensor]]
    | Tensor
    | Margin
    | Callable[[Any], Tensor]
    | RowTarget
    | None
)


def of_image(target: Target, image: int, images: int) -> Target:
    """Return the target of one image out of a call of several, for a call of that image alone."""
    if isinstance(target, CallTarget):
        return _OfImage(target, image, images)
    if isinstance(target, RowTarget):
        return RowTarget(lambda output, rows: target(output, rows + image))
    if isinstance(target, Margin):
        return Margin(of_image(target.a, image, images), of_image(target.b, image, images))
    if isinstance(target, (Tensor, np.ndarray)):
        return target[image : image + 1] if target.ndim == 1 and len(target) == images else target
    if isinstance(target, Sequence) and not isinstance(target, str) and len(target) == images:
        one: Any = target[image]
        own: Any = of_image(one, image, images) if isinstance(one, RowTarget) else one
        return [own]
    return target


class _OfImage(CallTarget):
    """The target of a call of several images, in a call of one of them."""

    def __init__(self, target: CallTarget, image: int, images: int) -> None:
        self.target, self.image, self.images = target, image, images
        self.learns, self.__name__ = target.learns, str(getattr(target, "__name__", type(target).__name__))

    def of_call(self, call: Call) -> Self:
        ready = super().of_call(call)
        ready.target = self.target.of_call(replace(call, images=self.images))
        return ready

    def learn(self, output: Any, rows: Tensor) -> None:
        self.target.learn(output, rows + self.image)

    def is_nothing(self, output: Any, rows: Tensor) -> bool:
        return self.target.is_nothing(output, rows + self.image)

    def __call__(self, output: Any, rows: Tensor) -> Tensor:
        return self.target(output, rows + self.image)
