"""Picks the explained score of each row out of a model's output, in whatever container that comes."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysal._checks import check_choice, refuse
from pysal.engine.model.class_names import ClassNames
from pysal.engine.model.rows import map_rows
from pysal.engine.request.callable_targets import ADVICE, check_that_scores_follow_their_rows, function_of
from pysal.engine.request.class_targets import Finder, classes_of
from pysal.engine.request.score import SCORE_KINDS, Look, Output, ScoreKind, how, scaled
from pysal.engine.request.target import Call, CallTarget, Margin, RowTarget, Target
from pysal.engine.running.chunks import is_out_of_memory
from pysal.engine.running.states import outside_inference

_NO_CLASSES = torch.empty(0, dtype=torch.int64, device="cpu")


def class_scores(output: Any) -> Tensor:
    """Return the tensor of class scores in whatever container a model returned it.

    A tensor (or NumPy array) is itself; a mapping or an output object gives `logits`, `out` or CLIP's `logits_per_image`, then
    its only tensor; a tuple or list gives its first entry, unless others look the same.

    Raises:
        TypeError: no tensor in it, or several that may be meant.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, np.ndarray):
        return torch.as_tensor(output, device="cpu")
    for name in ("logits", "out", "logits_per_image"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, (Tensor, np.ndarray)):
            return class_scores(found)
    if isinstance(output, Mapping):
        tensors = [value for value in output.values() if isinstance(value, (Tensor, np.ndarray))]
        if len(tensors) == 1:
            return class_scores(tensors[0])
    elif isinstance(output, (tuple, list)) and output and len(places_alike(output)) == 1:
        return class_scores(output[0])
    raise TypeError(
        f"pysal: the model's output must be a tensor or hold one as 'logits' or 'out', got {type(output).__name__}"
        f"{held_in(output)}; pass {_target_for(output)}"
    )


def places_alike(output: Sequence[Any]) -> list[int]:
    """Return the places in a tuple or list of what looks like its first entry, which is not taken if there are others."""
    first = output[0]
    if not isinstance(first, Tensor) or not first.ndim:
        return [0]
    return [n for n, one in enumerate(output) if isinstance(one, Tensor) and one.shape == first.shape]


def held_in(output: Any) -> str:
    """Return what to say of a tuple or list any of whose entries may be meant; nothing of other outputs."""
    if not isinstance(output, (tuple, list)) or not output or len(alike := places_alike(output)) == 1:
        return ""
    return f" whose entries {', '.join(map(str, alike))} have shape {tuple(output[0].shape)}"


def _target_for(output: Any) -> str:
    """Return what to pass for an output that is no table of classes."""

    def has(name: str) -> bool:
        return name in output if isinstance(output, Mapping) else hasattr(output, name)

    if has("boxes") or has("pred_boxes"):
        return "pysal.targets.Box(...), a detection"
    if has("masks_queries_logits"):
        return "pysal.targets.Pixel(...), a class of pixels"
    if has("pooler_output") or has("image_embeds"):
        return "pysal.targets.Similarity(...) or Norm(), of an embedding"
    names = [name for name, one in output.items() if isinstance(one, Tensor)] if isinstance(output, Mapping) else []
    if not names and not held_in(output):
        return "a callable target that picks the score"
    entry = f"{names[0]!r}), of one of {', '.join(map(repr, names))}," if names else "0), of one of them,"
    return f"pysal.targets.Label(..., field={entry} or a callable target that picks the score"


# What to pass for a tensor that is no table of classes, by its number of dimensions.
_TARGETS_FOR = {
    4: "be pysal.targets.Pixel(...) or another callable output -> (N,)",
    3: "be pysal.targets.Token, Caption or Box(...) or another callable output -> (N,)",
}


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
        size: (height, width) of the images, for targets that are places.

    Attributes:
        look: what is known of the model's output, shared by all that ask about the same images.
        is_square: whether the output that was looked at last has as many columns as rows, more than one.
    """

    is_square = False
    index: Tensor
    minus: Tensor | None

    def __init__(
        self,
        where: str,
        target: Target,
        kind: ScoreKind,
        images: int,
        device: torch.device,
        names: Callable[[], ClassNames | None] = lambda: None,
        output: Output | None = None,
        size: tuple[int, int] = (1, 1),
    ) -> None:
        _check_kind(where, kind)
        self.look = Look(output)
        self.where, self.kind, self._given, self._images = where, kind, target, images
        self.find = Finder(where, names)
        self.function = function_of(where, target, images)
        if isinstance(self.function, CallTarget):
            self.function = self.function.of_call(Call(where, images, size, device, self.find))
        learns = isinstance(self.function, CallTarget) and self.function.learns
        self._open = [target is None or learns]  # shared by all names of this target
        classes: tuple[list[int], list[int] | None] | None = None
        if not self.open and self.function is None:
            classes = classes_of(where, target, images, self.find)
        self._largest = -1 if classes is None else max(max(classes[0]), max(classes[1] or [-1]))
        self._rows_looked_at = [0]  # likewise
        self.index, self.minus = _NO_CLASSES, None
        if self.function is not None:
            return
        made = functools.partial(torch.tensor, dtype=torch.int64, device=device)
        index, minus = classes or ([-1] * images, None)
        self.index = outside_inference(lambda: made(index))
        self.minus = None if minus is None else outside_inference(lambda: made(minus))

    @property
    def open(self) -> bool:
        """Whether the target of some image is still to be found."""
        return self._open[0]

    @property
    def fixed(self) -> Target:
        """The same target for another plan of these images, with the classes that an open one found."""
        if isinstance(self.function, CallTarget) and self.function.learns:
            return _Learnt(self.function)
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
                f"{_TARGETS_FOR.get(scores.ndim, 'be a callable output -> (N,)')} where the model's output is not (N, K)",
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
        self.is_square = 1 < scores.shape[0] == scores.shape[1]
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
            ask = functools.partial(self._ask, looking=True)
            check_that_scores_follow_their_rows(self.where, self.function, ask, before, rows, score.detach())
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

    def is_of_nothing(self, output: Any, rows: Tensor) -> bool:
        """Whether these scores are constants, because what the target looks for is not there."""
        return isinstance(self.function, (CallTarget, _Learnt)) and self.function.is_nothing(output, rows)

    def preview(self, output: Any, rows: Tensor) -> Tensor:
        """Return (N,) the scores of clean rows; a target, or what the output is, that is still open is left so."""
        alone = copy.copy(self)
        if self.open and isinstance(self.function, CallTarget):
            alone.function = self.function.of_call(self.function.call)
            alone.function.learn(output, rows)
            return alone(output, rows)
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

    def resolve(self, output: Any, table: Tensor | None, rows: Tensor) -> None:
        """Fix the open target of these clean rows: to the class with the highest score, or to what it learns of them."""
        if self.open and table is not None:
            self.index[rows] = table.detach().argmax(1)
        elif self.open and isinstance(self.function, CallTarget):
            self.function.learn(output, rows)

    def close(self) -> None:
        """Say that every image's target is known now."""
        self._open[0] = False


class _Learnt(RowTarget):
    """What a target learnt in one call, for another of the same images."""

    follows_rows = False

    def __init__(self, target: CallTarget) -> None:
        super().__init__(target)
        self.__name__, self.is_nothing = str(getattr(target, "__name__", type(target).__name__)), target.is_nothing


def _with_rows(output: Tensor, rows: int) -> Tensor:
    """Return an output with its first dimension, which `squeeze()` drops where the pass has one row."""
    if rows == 1 and 1 not in output.shape:
        return output[None]
    return output


def _copied(rows: Any) -> Any:
    return rows.detach().clone() if isinstance(rows, Tensor) else rows.copy()


def _check_kind(where: str, kind: object) -> None:
    check_choice(where, "score", kind, SCORE_KINDS)
