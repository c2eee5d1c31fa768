"""Which number of a model's output is explained: one score per image."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from pysal._checks import refuse


class RowTarget:
    """A callable target that is also told which image each row of the output belongs to, as `rows` (N,)."""

    def __call__(self, output: Any, rows: Tensor) -> Tensor:
        """Return (N,) scores."""
        raise NotImplementedError


Target: TypeAlias = int | Sequence[int] | Tensor | Callable[[Any], Tensor] | RowTarget | None
ScoreKind: TypeAlias = Literal["logit", "probability", "log_probability"]
SCORE_KINDS: tuple[str, ...] = get_args(ScoreKind)


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
        return torch.as_tensor(output)
    for name in ("logits", "out"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, (Tensor, np.ndarray)):
            return class_scores(found)
    if isinstance(output, Mapping):
        tensors = [value for value in output.values() if isinstance(value, Tensor)]
        if len(tensors) == 1:
            return tensors[0]
    elif isinstance(output, (tuple, list)) and output:
        return class_scores(output[0])
    raise TypeError(
        f"pysal: the model's output must be a tensor or hold one as 'logits' or 'out', got {type(output).__name__}; "
        "pass a callable target that picks the score"
    )


def sums_to_one(table: Tensor) -> bool:
    """Say whether the rows of a table (N, K) look like probabilities."""
    return bool((table >= 0).all()) and bool(((table.sum(1) - 1).abs() < 1e-4).all())


class Score:
    """Picks the explained score of each row out of a model's output.

    The target is fixed for the whole computation: given, or, for `None`, the class with the highest score on the clean
    image. Such an open target is filled in by passes over clean rows (`resolve`) and closed once all images are known.

    Args:
        where: the public name of the method, for errors.
        target: None, a class index, one index per image, or a callable `output -> (N,)`.
        kind: which number of a classifier's output is meant.
        images: number of images B.
        device: where the model runs.
    """

    def __init__(self, where: str, target: Target, kind: ScoreKind, images: int, device: torch.device) -> None:
        if kind not in SCORE_KINDS:
            refuse(where, "score", f"be one of {', '.join(map(repr, SCORE_KINDS))}", repr(kind))
        self.where, self.kind = where, kind
        self.function = target if callable(target) else None
        self.open = target is None
        indices = [-1] * images if target is None or callable(target) else _indices(where, target, images)
        if not self.open and self.function is None and min(indices) < 0:
            refuse(where, "target", "be a class index of 0 or more", min(indices))
        self._largest = max(indices)
        with torch.inference_mode(False):
            self.index = torch.tensor(indices, dtype=torch.int64, device=device)

    def renamed(self, where: str, kind: ScoreKind) -> "Score":
        """Return the same target for another method or another kind of score."""
        if kind not in SCORE_KINDS:
            refuse(where, "score", f"be one of {', '.join(map(repr, SCORE_KINDS))}", repr(kind))
        renamed = copy.copy(self)
        renamed.where, renamed.kind = where, kind
        return renamed

    def table(self, output: Any, rows: Tensor) -> Tensor | None:
        """Return the model's own (N, K) class scores, or None where the target is a callable."""
        if self.function is not None:
            return None
        scores = class_scores(output)
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
        return scores if scores.dtype == torch.float64 else scores.float()

    def scaled(self, table: Tensor) -> Tensor:
        """Turn a table of logits (N, K) into the kind of score that is explained; one column is a binary classifier's."""
        if self.kind == "logit":
            return table
        if table.shape[1] == 1:
            return torch.sigmoid(table) if self.kind == "probability" else torch.nn.functional.logsigmoid(table)
        return torch.softmax(table, 1) if self.kind == "probability" else torch.log_softmax(table, 1)

    def pick(self, classes: Tensor, rows: Tensor) -> Tensor:
        """Return (N,) the target's column of (N, K) class scores."""
        return classes.gather(1, self.index[rows].unsqueeze(1)).squeeze(1)

    def __call__(self, output: Any, rows: Tensor) -> Tensor:
        """Return (N,) scores; `rows` (N,) says which image each row of the output belongs to."""
        table = self.table(output, rows)
        if table is not None:
            return self.pick(self.scaled(table), rows)
        assert self.function is not None
        score = self.function(output, rows) if isinstance(self.function, RowTarget) else self.function(output)
        if not isinstance(score, Tensor) or score.shape != rows.shape:
            got = f"shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
            refuse(self.where, "target(output)", f"be a tensor of shape {tuple(rows.shape)}", got)
        if not score.dtype.is_floating_point:
            refuse(self.where, "target(output)", "be floating point", score.dtype, TypeError)
        return score

    def resolve(self, table: Tensor | None, rows: Tensor) -> None:
        """Fix the open target of these clean rows to the class with the highest score."""
        if self.open and table is not None:
            self.index[rows] = table.detach().argmax(1)

    def close(self) -> None:
        """Say that every image's target is known now."""
        self.open = False


def _indices(where: str, target: object, images: int) -> list[int]:
    """Return the target as a list of B class indices."""
    requirement = "be None, a class index, one index per image or a callable"
    if isinstance(target, (bool, float)):
        refuse(where, "target", requirement, repr(target), TypeError)
    if isinstance(target, (int, np.integer)):
        return [int(target)] * images
    if isinstance(target, (Tensor, np.ndarray)):
        values = torch.as_tensor(target)
        if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
            refuse(where, "target", requirement, f"a tensor of dtype {str(values.dtype).removeprefix('torch.')}", TypeError)
        if values.ndim > 1:
            refuse(where, "target", f"have shape ({images},)", tuple(values.shape))
        target = values.tolist()
        if isinstance(target, int):
            return [target] * images
    if not isinstance(target, Sequence) or isinstance(target, (str, bytes)):
        refuse(where, "target", requirement, repr(target), TypeError)
    for value in target:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            refuse(where, "target", "hold class indices", repr(value), TypeError)
    if len(target) != images:
        refuse(where, "target", f"have one index for each of the {images} images", len(target))
    return [int(value) for value in target]
