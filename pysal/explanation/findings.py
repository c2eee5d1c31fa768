"""The numbers of an explanation, checked, and what they are called."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass, field
from typing import SupportsIndex, cast

from torch import Tensor

from pysal._checks import check_tensor, refuse, refuse_unknown
from pysal.engine.request.score import Output, ScoreKind, settled, unit
from pysal.methods.traits import BY_NAME, MODE_WORDS, TRAITS

WHERE = "pysal.Explanation"
Detail = Tensor | list[Tensor] | str | float | int
KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
RESERVED = ("images", "target", "scores", "probabilities", "metadata", "file", "allow_pickle")


@dataclass(frozen=True, eq=False, repr=False)
class MethodResult:
    """What one method found, for the whole batch.

    Attributes:
        name: the public function, "integrated_gradients".
        title: what a reader calls it, "Integrated Gradients".
        map: (B, C, H, W) or (B, 1, H, W), floating point, CPU, unnormalised.
        reduction: how the channels become one picture: "max_abs", "sum" or "none" (the map has one channel).
        signed: whether the picture has two directions (for and against the target) or one.
        seconds: wall time of the method on the whole batch.
        passes: model passes per image, None where nobody counted.
        details: what else the method found. Known names: "residual", "error", "approximation_error" and "steps" (B,),
            "standard_error" of the map's shape, "drops" (B, S) or one (S_b,) tensor per image, "labels" (B, H, W) or
            "boxes" (S, 4) that say where the drops are, "mode", and "gains" and "means" like the drops, of `leave_one_out`,
            "layer", "base", "kind", "samples". Others are kept and written.
        score_kind: which score the method explained, see `Explanation.score_kind`; "" = that of the explanation.
    """

    name: str
    title: str
    map: Tensor
    reduction: str
    signed: bool
    seconds: float
    passes: int | None = None
    details: dict[str, Detail] = field(default_factory=dict)
    score_kind: str = ""

    def __repr__(self) -> str:
        return f"MethodResult({self.name!r}, map {tuple(self.map.shape)}, {self.seconds:.3g} s)"


class NoSuchMethod(ValueError, KeyError):
    """A name that no result has; a KeyError too, for an explanation is asked as a mapping is."""

    __str__ = ValueError.__str__


@dataclass(frozen=True, eq=False, repr=False)
class Findings:
    """The fields of `Explanation`, which says what they are."""

    images: Tensor
    target: Tensor
    target_names: list[str]
    scores: Tensor
    score_kind: str
    probabilities: Tensor | None
    results: dict[str, MethodResult]
    skipped: dict[str, str] = field(default_factory=dict)
    model_name: str = ""
    seconds: float = 0.0
    build: dict[str, object] = field(default_factory=dict)
    output: str = ""

    def __post_init__(self) -> None:
        count, _, height, width = check_tensor(WHERE, "images", self.images, ndim=4).shape
        for name, per_image in self.per_image().items():
            if check_tensor(WHERE, name, per_image).shape != (count,):
                refuse(WHERE, name, f"have shape ({count},), one per image", f"shape {tuple(per_image.shape)}")
        if len(self.target_names) != count:
            refuse(WHERE, "target_names", f"have {count} names, one per image", f"{len(self.target_names)}")
        for name, result in self.results.items():
            where = f"results[{name!r}]"
            if not KEY.fullmatch(name) or name in RESERVED or name != result.name:
                refuse(WHERE, where, "be filed under its name, a word that is no other key of the file", repr(result.name))
            map = check_tensor(WHERE, f"{where}.map", result.map, ndim=4)
            if map.shape[0] != count or map.shape[2:] != (height, width):
                fits = f"have shape ({count}, C, {height}, {width})"
                refuse(WHERE, f"{where}.map", fits, f"shape {tuple(map.shape)}")
            if result.reduction not in ("max_abs", "sum", "none") or (result.reduction == "none" and map.shape[1] != 1):
                fits = "be 'max_abs' or 'sum', or 'none' for a map of one channel"
                refuse(WHERE, f"{where}.reduction", fits, repr(result.reduction))
            for key in result.details:
                if not KEY.fullmatch(key):
                    refuse(WHERE, f"{where}.details", "have words as keys", repr(key))

    def per_image(self) -> dict[str, Tensor]:
        """Return the fields that have one number per image."""
        found = {"target": self.target, "scores": self.scores}
        return found if self.probabilities is None else {**found, "probabilities": self.probabilities}

    def result_of(self, where: str, name: object) -> MethodResult:
        """Return the result of a method, refusing in the name of `where` one that is not there."""
        if not isinstance(name, str):
            refuse(where, "name", f"be a method out of {', '.join(self.results) or 'none'}", repr(name), TypeError)
        if name not in self.results:
            why = self.skipped.get(name)
            left_out = "" if why is None else f"; {name} was left out: {why}"
            refuse_unknown(
                where,
                "name",
                f"be a method out of {', '.join(self.results) or 'none'}{left_out}",
                name,
                self.results,
                NoSuchMethod,
            )
        return self.results[name]

    def kind_of(self, result: MethodResult) -> str:
        """Return which score a method explained."""
        return result.score_kind or self.score_kind

    def unit_of_map(self, result: MethodResult) -> str:
        """Return what a value of a method's map means; "" where nothing short says it."""
        traits = TRAITS.get(result.name) or BY_NAME.get(result.name)
        if traits is not None and traits.noisy and not traits.unit:  # that of what is smoothed
            if result.details.get("kind", "mean") != "mean":
                return ""
            traits = TRAITS.get(str(result.details.get("base", "gradient")))
        mode = MODE_WORDS.get(str(result.details.get("mode")))
        words = traits if mode is None else mode
        return "" if words is None else words.unit.format(score=self.unit_of(self.kind_of(result)))

    def unit_of(self, kind: str) -> str:
        """Return the unit of a kind of score in a word; explanations that do not say what the output is were of logits."""
        return unit(kind, self.output or "logits")

    def score_word(self, image: int) -> str:
        """Return what the score is called; a margin of two columns is a difference of theirs."""
        margin = self.output and int(self.target[image]) < 0
        return f"difference of {self.unit_of(self.score_kind)}" if margin else self.unit_of(self.score_kind)

    def kind_again(self, kind: str) -> ScoreKind:
        """Return the kind of score that says the same of one image, whose output alone could be taken for something else."""
        if kind == "callable" or not self.output:
            return "auto" if kind == "auto" else "logit"
        return settled(cast(ScoreKind, kind), cast(Output, self.output))

    def score_before(self, result: MethodResult, image: int) -> float | None:
        """Return the clean score that the drops are falls from, None where it is not known."""
        if self.kind_of(result) == self.score_kind:
            return float(self.scores[image])
        if self.unit_of(self.kind_of(result)) == "probability" and self.probabilities is not None:
            return float(self.probabilities[image])
        return None


def index_of(where: str, image: object, count: int) -> int:
    """Return the index of an image, refusing in the name of `where` what is none."""
    if isinstance(image, bool) or not hasattr(image, "__index__"):
        refuse(where, "image", f"be an index in [0, {count})", repr(image), TypeError)
    index = operator.index(cast(SupportsIndex, image))
    if not 0 <= index < count:
        refuse(where, "image", f"be an index in [0, {count})", index)
    return index


def of_image(detail: Detail | None, image: int) -> Tensor | None:
    """Return the part of a detail that is about one image, None where there is none."""
    return detail[image] if isinstance(detail, (Tensor, list)) and image < len(detail) else None


def value_of(detail: Detail | None, image: int) -> float | None:
    """Return a detail that is a number for each image, or one for all, as that number."""
    if isinstance(detail, Tensor):
        return float(detail[image] if detail.ndim else detail)
    return float(detail) if isinstance(detail, (int, float)) else None


def counted(number: int, noun: str) -> str:
    """Return "1 step", "2 steps"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def one_line(text: str) -> str:
    """Return the text with its blanks and line ends merged."""
    return " ".join(text.split())
