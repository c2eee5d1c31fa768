"""Targets that are callables: one for all images or one for each, and whether their scores come with their rows."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from pysal._checks import refuse
from pysal._library import widest
from pysal.engine.model.rows import row_tensors, take_rows
from pysal.engine.request.target import Call, CallTarget, RowTarget

ADVICE = "what differs from image to image needs one target per image or a pysal.RowTarget, which is told the image of each row"


class OnePerImage(CallTarget):
    """One callable per image, each for the rows of its image."""

    def __init__(self, where: str, functions: Sequence[Callable[..., Tensor]]) -> None:
        self.where, self.functions = where, functions
        own = [one for one in functions if isinstance(one, CallTarget)]
        self.learns = any(one.learns for one in own)
        self.follows_rows = len(own) < len(functions)

    def of_call(self, call: Call) -> Self:
        """Return a copy for one call."""
        ready = super().of_call(call)
        ready.functions = [one.of_call(call) if isinstance(one, CallTarget) else one for one in self.functions]
        return ready

    def learn(self, output: Any, rows: Tensor) -> None:
        """Let each look at the rows of its image."""
        for image in dict.fromkeys(rows.tolist()):
            function = self.functions[image]
            if isinstance(function, CallTarget) and function.learns:
                own = (rows == image).nonzero().squeeze(1)
                function.learn(take_rows(output, own, len(rows)), rows[own])

    def is_nothing(self, output: Any, rows: Tensor) -> bool:
        """Whether none of these images has anything to score."""

        def nothing(image: int) -> bool:
            own = (rows == image).nonzero().squeeze(1)
            function = self.functions[image]
            return isinstance(function, CallTarget) and function.is_nothing(take_rows(output, own, len(rows)), rows[own])

        return all(map(nothing, dict.fromkeys(rows.tolist())))

    def __call__(self, output: Any, rows: Tensor) -> Tensor:
        """Return (N,) scores."""
        images = rows.tolist()
        if len(set(images)) == 1:
            return self._one(images[0], output, rows)
        if not row_tensors(output, len(rows)):
            kind = type(output).__name__
            refuse(self.where, "target", "be a pysal.RowTarget for an output whose rows cannot be told apart", f"a {kind}")
        places, scores = [], []
        for image in dict.fromkeys(images):
            own = (rows == image).nonzero().squeeze(1)
            places.append(own)
            scores.append(self._one(image, take_rows(output, own, len(rows)), rows[own]))
        return torch.cat(scores)[torch.cat(places).argsort()]

    def _one(self, image: int, output: Any, rows: Tensor) -> Tensor:
        function = self.functions[image]
        score = function(output, rows) if isinstance(function, RowTarget) else function(output)
        if not isinstance(score, Tensor) or score.shape != rows.shape:
            got = f"shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
            refuse(self.where, f"target[{image}](output)", f"be a tensor of shape {tuple(rows.shape)}", got)
        return score


def function_of(where: str, target: object, images: int) -> Callable[..., Tensor] | None:
    """Return the target as a callable; None where it stands for classes."""
    for one in target if isinstance(target, (list, tuple)) else [target]:
        if isinstance(one, type) and issubclass(one, RowTarget):
            refuse(where, "target", f"be made first, as {one.__name__}(...)", f"the class {one.__name__}", TypeError)
    if isinstance(target, Sequence) and any(map(callable, target)):
        if not all(map(callable, target)):
            refuse(where, "target", "hold callables alone or classes alone", "both")
        if len(target) != images:
            refuse(where, "target", f"have one callable for each of the {images} images", len(target))
        return OnePerImage(where, target)
    return target if callable(target) else None


def check_that_scores_follow_their_rows(
    where: str, function: object, ask: Callable[[Any, Tensor], Tensor], output: Any, rows: Tensor, scores: Tensor
) -> None:
    """Refuse a callable that scores a row by where it stands, by its neighbours or by chance.

    The rows of one output are handed over in other orders and numbers; the scores must come with them.

    Args:
        where: the public name of the method, for errors.
        function: the callable.
        ask: (output, rows) -> its scores, of rows that no model answered.
        output: what the callable was given.
        rows: (N,), the image of each row.
        scores: (N,), what it answered.
    """
    count, place = len(rows), torch.arange(len(rows), device=rows.device)
    found = row_tensors(output, count)
    # the order of the rows, the image each stands for, and which of the answers count
    orders = [(place, rows, place)]
    if found and count == 1:
        orders.append((place.repeat(3), rows.repeat(3), place.repeat(3)))
    elif found:
        orders += [(order, rows[order], order) for order in (place.roll(1), place[: count // 2], place[count // 2 :])]
    if found and count > 1 and isinstance(function, OnePerImage):
        # each callable may have seen one row alone: now another stands beside it, which must have no say
        orders.append((torch.stack([place, place.roll(-1)], 1).flatten(), rows.repeat_interleave(2), place))
    tolerance = _rounding(scores, found)
    for number, (order, images, counting) in enumerate(orders):
        answered = ask(take_rows(output, order, count), images).detach()
        got = answered[:: len(order) // len(counting)]
        expected = scores[counting]
        near = (got == expected) | ((got - expected).abs() <= tolerance) | (got.isnan() & expected.isnan())
        if bool(near.all()):
            continue
        worst = int(near.int().argmin())
        values = f"{float(expected[worst]):.6g} and {float(got[worst]):.6g}"
        if number == 0:
            refuse(where, "target", "score the same output the same each time it is called", f"{values} for one row")
        refuse(
            where,
            "target",
            f"score each row by that row alone, wherever it stands ({ADVICE})",
            f"{values} for one row in two places",
        )


def _rounding(scores: Tensor, found: Sequence[Any]) -> Tensor:
    """Return how far apart the same score may be when it is computed among other rows.

    What is done element by element is equal to the bit. Sums and products of matrices may add up in another order: their
    error is a few roundings of their terms, which are as large as the output where they cancel, but not beyond reason.
    """

    def largest(one: Tensor) -> Tensor:
        return one.detach().abs().nan_to_num(nan=0.0, posinf=0.0).amax().to(scores.device, widest(scores.device))

    own = largest(scores)
    terms = [largest(one) for one in found if isinstance(one, Tensor) and one.is_floating_point() and one.numel()]
    exponent = torch.finfo(scores.dtype).eps
    few, beyond = (100, 100) if exponent < 1e-5 else (4, 4)
    return few * exponent * torch.stack([own, *terms]).amax().clamp(max=beyond * own)
