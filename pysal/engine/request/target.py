"""Which number of a model's output is explained: one score per image."""

import copy
import functools
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pysal._checks import check_choice, check_dense, refuse
from pysal._library import widest
from pysal.engine.model.class_names import ClassNames
from pysal.engine.model.rows import map_rows, row_tensors, take_rows
from pysal.engine.request.score import SCORE_KINDS, Look, Output, ScoreKind, how, scaled
from pysal.engine.running.chunks import is_out_of_memory
from pysal.engine.running.states import outside_inference


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


def class_scores(output: Any) -> Tensor:
    """Return the tensor of class scores in whatever container a model returned it.

    A tensor (or NumPy array) is itself; a mapping or an output object gives `logits`, then `out`, then its only tensor;
    a tuple or list gives its first entry.

    Raises:
        TypeError: no tensor in it.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, np.ndarray):
        return torch.as_tensor(output, device="cpu")
    for name in ("logits", "out"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, (Tensor, np.ndarray)):
            return class_scores(found)
    if isinstance(output, Mapping):
        tensors = [value for value in output.values() if isinstance(value, (Tensor, np.ndarray))]
        if len(tensors) == 1:
            return class_scores(tensors[0])
    elif isinstance(output, (tuple, list)) and output:
        return class_scores(output[0])
    raise TypeError(
        f"pysal: the model's output must be a tensor or hold one as 'logits' or 'out', got {type(output).__name__}; "
        "pass a callable target that picks the score"
    )


def _with_rows(output: Tensor, rows: int) -> Tensor:
    """Return an output with its first dimension, which `squeeze()` drops where the pass has one row."""
    if rows == 1 and 1 not in output.shape:
        return output[None]
    return output


class Score:
    """Picks the explained score of each row out of a model's output.

    The target is fixed for the whole computation: given, or, for `None`, the class with the highest score on the clean
    image. Such an open target is filled in by passes over clean rows (`resolve`) and closed once all images are known.

    A callable is looked at once, on the first output, for whether its scores follow their rows.

    Args:
        where: the public name of the method, for errors.
        target: None, a class, one per image, a margin or a callable; see `Target`.
        kind: which number of the output is meant; see `engine.request.score`.
        images: number of images B.
        device: where the model runs.
        names: asked for the model's class names where a class is said by name.
        output: what the model's output is, where that is known already.

    Attributes:
        look: what is known of the model's output, shared by all that ask about the same images.
    """

    def __init__(
        self,
        where: str,
        target: Target,
        kind: ScoreKind,
        images: int,
        device: torch.device,
        names: Callable[[], ClassNames | None] = lambda: None,
        output: Output | None = None,
    ) -> None:
        _check_kind(where, kind)
        self.look = Look(output)
        self.where, self.kind, self._given, self._images = where, kind, target, images
        self.find = _Finder(where, names)
        self.function = _function(where, target, images)
        self._open = [target is None]  # shared by all names of this target
        classes: tuple[list[int], list[int] | None] = [-1] * images, None
        if not self.open and self.function is None:
            classes = _classes(where, target, images, self.find)
        self._largest = max(max(classes[0]), max(classes[1] or [-1]))
        self._rows_looked_at = [0]  # likewise
        made = functools.partial(torch.tensor, dtype=torch.int64, device=device)
        self.index: Tensor = outside_inference(lambda: made(classes[0]))
        self.minus: Tensor | None = None if classes[1] is None else outside_inference(lambda: made(classes[1]))

    @property
    def open(self) -> bool:
        """Whether the target of some image is still to be found."""
        return self._open[0]

    @property
    def fixed(self) -> Target:
        """The same target for another plan of these images, with the classes that an open one found."""
        if self.function is not None:
            return self._given
        return self.index if self.minus is None else Margin(self.index, self.minus)

    @property
    def is_class(self) -> bool:
        """Whether one class is explained: neither a callable nor a margin."""
        return self.function is None and self.minus is None

    def names(self, known: ClassNames | None, noun: str) -> list[str]:
        """Return what to call the target of each image, `noun` and its index where it has no name."""
        if self.function is not None:
            given = self._given if isinstance(self._given, Sequence) else [self._given] * self._images
            return [str(getattr(one, "__name__", type(one).__name__)) for one in given]

        def name(index: int) -> str:
            return known.names[index] if known is not None and index < len(known) else f"{noun} {index}"

        if self.minus is None:
            return [name(index) for index in self.index.tolist()]
        pairs = zip(self.index.tolist(), self.minus.tolist(), strict=True)
        return [f"{name(first)} minus {name(second)}" for first, second in pairs]

    def renamed(self, where: str, kind: ScoreKind) -> "Score":
        """Return the same target for another method or another kind of score."""
        _check_kind(where, kind)
        renamed = copy.copy(self)
        renamed.where, renamed.kind = where, kind
        return renamed

    def table(self, output: Any, rows: Tensor) -> Tensor | None:
        """Return the model's own (N, K) class scores, or None where the target is a callable."""
        if self.function is not None:
            return None
        scores = _with_rows(class_scores(output), len(rows))
        if scores.ndim == 1:
            scores = scores[:, None]
        if scores.ndim != 2:
            refuse(
                self.where,
                "target",
                "be a callable output -> (N,) where the model's output is not (N, K)",
                f"an output of shape {tuple(scores.shape)}",
            )
        if len(scores) != len(rows):
            refuse(self.where, "the model's output", f"have one row for each of {len(rows)} inputs", tuple(scores.shape))
        if not scores.dtype.is_floating_point:
            refuse(self.where, "the model's output", "be floating point", scores.dtype, TypeError)
        if self._largest >= scores.shape[1]:
            refuse(self.where, "target", f"be below the model's {scores.shape[1]} classes", self._largest)
        self.find.check(scores.shape[1])
        if scores.shape[1] == 1 and self.kind in ("softmax", "log_softmax"):
            what = "be 'raw', or 'sigmoid' for a logit, where the model's output is one column"
            refuse(self.where, "score", what, repr(self.kind))
        return scores if scores.dtype == torch.float64 else scores.float()

    @property
    def looks(self) -> bool:
        """Whether what the output is matters for this kind of score: what is taken as it is needs no look."""
        return self.function is None and self.kind not in ("raw", "logit")

    @property
    def undecided(self) -> bool:
        """Whether the unchanged images must be looked at before anything can be scored."""
        return self.looks and self.look.output is None

    def look_at(self, table: Tensor | None) -> None:
        """Look at the output (N, K) for some of the unchanged images."""
        if table is None:
            return
        self.look.add(table)
        if table.shape[1] == 1 and self.kind in ("probability", "log_probability") and not self.look.in_unit:
            worst = table.detach().flatten()[(table.detach().flatten() - 0.5).abs().argmax()]
            refuse(
                self.where,
                "score",
                "be 'raw', or 'sigmoid' for a logit, where the model's one output per image is no probability",
                f"{self.kind!r} of an output of {float(worst):.4g}",
            )

    def scaled(self, table: Tensor) -> Tensor:
        """Turn a table of outputs (N, K) into the kind of score that is explained."""
        return scaled(table, how(self.kind, self.look.output))

    def pick(self, classes: Tensor, rows: Tensor) -> Tensor:
        """Return (N,) the target's column of (N, K) class scores, minus the other class's where there are two."""
        score = classes.gather(1, self.index[rows].unsqueeze(1)).squeeze(1)
        return score if self.minus is None else score - classes.gather(1, self.minus[rows].unsqueeze(1)).squeeze(1)

    def __call__(self, output: Any, rows: Tensor) -> Tensor:
        """Return (N,) scores; `rows` (N,) says which image each row of the output belongs to."""
        table = self.table(output, rows)
        if table is not None:
            return self.pick(self.scaled(table), rows)
        if isinstance(output, Tensor) and getattr(self.function, "follows_rows", True):
            output = _with_rows(output, len(rows))
        # once for a single row, and once for several, for a coupling of rows shows only in these
        looked_at = self._rows_looked_at[0]
        look = getattr(self.function, "follows_rows", True) and looked_at < min(len(rows), 2)
        before = map_rows(output, len(rows), _copied) if look else None  # a callable may write into what it is given
        score = self._ask(output, rows)
        if look:
            self._check_that_scores_follow_their_rows(before, rows, score.detach())
            self._rows_looked_at[0] = len(rows)
        return score

    def _ask(self, output: Any, rows: Tensor, *, looking: bool = False) -> Tensor:
        """Return what the callable answers, if that is a score for each row; `looking`: of rows that no model answered."""
        assert self.function is not None
        try:
            score = self.function(output, rows) if isinstance(self.function, RowTarget) else self.function(output)
        except (IndexError, ValueError, RuntimeError) as error:
            # one row per image is what every callable expects: its own mistake there is best told in its own words
            own = len(rows) == self._images and not looking
            if own or is_out_of_memory(error) or not getattr(self.function, "follows_rows", True):
                raise
            said = " ".join(str(error).split())
            refuse(
                self.where,
                "target",
                f"score any number of rows ({ADVICE})",
                f"{type(error).__name__} for {len(rows)} of them: {said}",
            )
        if not isinstance(score, Tensor) or score.shape != rows.shape:
            got = f"shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
            if looking:
                refuse(self.where, "target", f"score any number of rows ({ADVICE})", f"{got} for {len(rows)} of them")
            refuse(self.where, "target(output)", f"be a tensor of shape {tuple(rows.shape)}", got)
        if not score.dtype.is_floating_point:
            refuse(self.where, "target(output)", "be floating point", score.dtype, TypeError)
        return score

    def _check_that_scores_follow_their_rows(self, output: Any, rows: Tensor, scores: Tensor) -> None:
        """Refuse a callable that scores a row by where it stands, by its neighbours or by chance.

        The rows of one output are handed over in other orders and numbers; the scores must come with them.

        Args:
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
        if found and count > 1 and isinstance(self.function, _OnePerImage):
            # each callable may have seen one row alone: now another stands beside it, which must have no say
            orders.append((torch.stack([place, place.roll(-1)], 1).flatten(), rows.repeat_interleave(2), place))
        tolerance = _rounding(scores, found)
        for number, (order, images, counting) in enumerate(orders):
            answered = self._ask(take_rows(output, order, count), images, looking=True).detach()
            got = answered[:: len(order) // len(counting)]
            expected = scores[counting]
            near = (got == expected) | ((got - expected).abs() <= tolerance) | (got.isnan() & expected.isnan())
            if bool(near.all()):
                continue
            worst = int(near.int().argmin())
            values = f"{float(expected[worst]):.6g} and {float(got[worst]):.6g}"
            if number == 0:
                refuse(self.where, "target", "score the same output the same each time it is called", f"{values} for one row")
            refuse(
                self.where,
                "target",
                f"score each row by that row alone, wherever it stands ({ADVICE})",
                f"{values} for one row in two places",
            )

    def preview(self, output: Any, rows: Tensor) -> Tensor:
        """Return (N,) the scores of clean rows; a target, or what the output is, that is still open is left so."""
        alone = copy.copy(self)
        table = self.table(output, rows) if self.open or self.undecided else None
        if table is not None and self.undecided:
            alone.look = Look()
            alone.look.add(table)
        if table is None or not self.open:
            return alone(output, rows)
        return alone.scaled(table).gather(1, table.detach().argmax(1, True)).squeeze(1)

    def classes_of_first_image(self) -> tuple[ScoreKind, int, int | None] | None:
        """Return the kind of score and the classes that are explained in the first image, None where that is not known."""
        if self.open or self.function is not None:
            return None
        return self.kind, int(self.index[0]), None if self.minus is None else int(self.minus[0])

    def resolve(self, table: Tensor | None, rows: Tensor) -> None:
        """Fix the open target of these clean rows to the class with the highest score."""
        if self.open and table is not None:
            self.index[rows] = table.detach().argmax(1)

    def close(self) -> None:
        """Say that every image's target is known now."""
        self._open[0] = False


ADVICE = "what differs from image to image needs one target per image or a pysal.RowTarget, which is told the image of each row"


class _OnePerImage(RowTarget):
    """One callable per image, each for the rows of its image."""

    def __init__(self, where: str, functions: Sequence[Callable[..., Tensor]]) -> None:
        self.where, self.functions = where, functions

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


def _copied(rows: Any) -> Any:
    return rows.detach().clone() if isinstance(rows, Tensor) else rows.copy()


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


def _function(where: str, target: object, images: int) -> Callable[..., Tensor] | None:
    """Return the target as a callable; None where it stands for classes."""
    if isinstance(target, Sequence) and any(map(callable, target)):
        if not all(map(callable, target)):
            refuse(where, "target", "hold callables alone or classes alone", "both")
        if len(target) != images:
            refuse(where, "target", f"have one callable for each of the {images} images", len(target))
        return _OnePerImage(where, target)
    return target if callable(target) else None


def _check_kind(where: str, kind: object) -> None:
    check_choice(where, "score", kind, SCORE_KINDS)


def of_image(target: Target, image: int, images: int) -> Target:
    """Return the target of one image out of a call of several, for a call of that image alone."""
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


class _Finder:
    """Finds classes by name, and remembers that it was asked."""

    def __init__(self, where: str, names: Callable[[], ClassNames | None]) -> None:
        self._where, self._names, self._asked = where, names, False

    def __call__(self, argument: str, name: str) -> int:
        known = self._names()
        if known is None:
            refuse(self._where, argument, "be a class index for a model that carries no class names", shown(name))
        self._asked = True
        return known.find(self._where, argument, name)

    def check(self, classes: int) -> None:
        """Refuse names that are not those of the model's answers."""
        if self._asked and classes != len(self._names() or ()):
            requirement = f"be a class index where the model names {len(self._names() or ())} classes and answers {classes}"
            refuse(self._where, "target", requirement, "a name")


def shown(value: object) -> str:
    """Return a value as an error shows it: in one line, and cut where it is long."""
    return " ".join(reprlib.repr(value).split())


def _classes(where: str, target: object, images: int, find: Callable[[str, str], int]) -> tuple[list[int], list[int] | None]:
    """Return the class of each image, and the class whose score is taken away from its."""
    if isinstance(target, Sequence) and target and all(isinstance(one, Margin) for one in target):
        target = Margin([one.a for one in target], [one.b for one in target])
    if not isinstance(target, Margin):
        return class_indices(where, "target", target, images, find), None
    first = class_indices(where, "target.a", target.a, images, find)
    second = class_indices(where, "target.b", target.b, images, find)
    for one, other in zip(first, second, strict=True):
        if one == other:
            refuse(where, "target", "be a Margin of two different classes", f"class {one} twice")
    return first, second


def class_indices(where: str, argument: str, target: object, images: int, find: Callable[[str, str], int]) -> list[int]:
    """Return the class of each image: B indices out of an index, a name, or one of them per image."""
    requirement = "be None, a class index or name, one per image, or a callable"
    if isinstance(target, Tensor):
        check_dense(where, argument, target)
        if target.dtype.is_floating_point or target.dtype.is_complex or target.dtype == torch.bool:
            refuse(where, argument, requirement, f"a tensor of dtype {str(target.dtype).removeprefix('torch.')}", TypeError)
    elif not isinstance(target, (int, float, str, bytes, Sequence, Mapping)) and hasattr(target, "__array__"):
        array = np.asarray(target)
        if array.dtype.kind not in "iuUO" and array.ndim:
            refuse(where, argument, requirement, f"an array of dtype {array.dtype}", TypeError)
        target = array if array.ndim else array.item() if array.dtype.kind in "iuUO" else target
    if isinstance(target, (Tensor, np.ndarray)):
        if target.ndim > 1:
            refuse(where, argument, f"have shape ({images},)", tuple(target.shape))
        target = target.tolist()
    if isinstance(target, str) or (isinstance(target, (int, np.integer)) and not isinstance(target, bool)):
        return [_class_index(where, argument, target, find)] * images
    if not isinstance(target, Sequence) or isinstance(target, (bytes, bytearray, memoryview)):
        refuse(where, argument, requirement, shown(target), TypeError)
    if len(target) != images:
        refuse(where, argument, f"have one index for each of the {images} images", len(target))
    return [_class_index(where, argument, value, find) for value in target]


def _class_index(where: str, argument: str, value: object, find: Callable[[str, str], int]) -> int:
    """Return the index of one class."""
    if isinstance(value, str):
        return find(argument, value)
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0 and not getattr(value, "is_meta", False):
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        refuse(where, argument, "hold class indices", shown(value), TypeError)
    index = int(value)
    if index < 0:
        refuse(where, argument, "be a class index of 0 or more", shown(index))
    if index >= 2**63:
        refuse(where, argument, "be a class index below 2^63", shown(index))
    return index
