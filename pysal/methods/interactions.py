"""Interactions: what pairs of segments do together, beyond what each of them does alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pysal._checks import check_count, refuse
from pysal.engine.request.attribution import Attribution
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.fills import Fill
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.target import Target
from pysal.engine.request.work import Work
from pysal.engine.running.precision import Precision
from pysal.methods.coalitions import Coalitions
from pysal.segments import Segments, Slic

# Segments are ranked by thousandths of what the first of them does, so that rounding does not choose among equals.
LEVELS = 1000


@dataclass(frozen=True, eq=False, repr=False)
class Interactions:
    """What the segments of images do in pairs.

    Segments are numbers: they count the labels of an image from the lowest, or boxes by rows.

    Attributes:
        pairs: for each image (P_b, 2), int64 on the CPU: the pairs that were tried, each with the lower number first, in order.
        values: for each image (P_b,), on the CPU: their interactions, in units of the score. Positive: the two need each other.
            Negative: they stand in for each other.
        drops: for each image (S_b,), on the CPU: how far the score falls without each segment alone.
        labels: (B, H, W), int32: where the segments are, -1 for none.
        map: (B, 1, H, W): at each pixel the sum of its segment's interactions with all that it was tried with.
        scores: (B,), of the whole images.
        complete: (B,), bool on the CPU: whether all pairs of an image were tried.
        passes: model passes for an image, in the mean.
    """

    pairs: list[Tensor]
    values: list[Tensor]
    drops: list[Tensor]
    labels: Tensor
    map: Tensor
    scores: Tensor
    complete: Tensor
    passes: float

    def __repr__(self) -> str:
        return f"Interactions({len(self.pairs)} images, pairs: {', '.join(str(len(pairs)) for pairs in self.pairs)})"

    def matrix(self, image: int = 0) -> Tensor:
        """Return the interactions of an image's segments as a symmetric matrix (S, S).

        On the diagonal are the drops, which the same formula gives of a segment with itself. Pairs that were not tried are NaN.

        Raises:
            ValueError: no such image.
        """
        self._check(image)
        drops = self.drops[image]
        first, second = self.pairs[image].unbind(1)
        found = torch.full((len(drops), len(drops)), torch.nan, dtype=drops.dtype, device="cpu")
        found[first, second] = found[second, first] = self.values[image]
        return found.diagonal_scatter(drops)

    def strongest(self, image: int = 0, count: int = 10) -> list[tuple[int, int, float]]:
        """Return the pairs of an image with the largest |interaction|, the largest first, as (segment, segment, value).

        Raises:
            ValueError: no such image, or a count below 1.
        """
        self._check(image)
        check_count("pysal.Interactions.strongest", "count", count)
        values = self.values[image]
        order = values.abs().nan_to_num(-1.0).argsort(descending=True, stable=True)[:count]
        return [(*self.pairs[image][place].tolist(), float(values[place])) for place in order]

    def _check(self, image: object) -> None:
        if isinstance(image, bool) or not isinstance(image, int) or not 0 <= image < len(self.pairs):
            refuse("pysal.Interactions", "image", f"be an index in [0, {len(self.pairs)})", repr(image))


def interactions(
    model: Model,
    inputs: Tensor,
    target: Target = None,
    *,
    segments: Segments = Slic(),  # noqa: B008 (immutable)
    fill: Fill = 0.0,
    passes: int = 1000,
    score: ScoreKind = "auto",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
    dtype: torch.dtype | None = None,
) -> Interactions:
    """Return the interactions of pairs of segments, f(x) - f(x without i) - f(x without j) + f(x without both).

    That is by how much more the score falls without i if j is there than if j is gone, too. Positive: they need each other.
    Negative: they stand in for each other. 0: each does what it does whether or not the other is there.

    All pairs are tried if `passes` allow it. Else the pairs of the segments that do most by themselves are: the larger of the
    drop without a segment and of the gain with it alone on the fill. Only forward passes are needed.

    Args:
        model: an nn.Module in eval mode, or any callable on tensors.
        inputs: (B, C, H, W), floating point.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        segments: see `leave_one_out`; they must not overlap. Pixels of no segment always stay.
        fill: see `leave_one_out`. "drop" leaves out the patches of both segments together.
        passes: most model passes for an image. S segments take 1 + S + S (S - 1) / 2 for all pairs, and at least 2 S + 3.
        score: which number of the target's column is explained. "logit" or "raw": the output as it is. "auto": the target's
            probability if the output tells one, else the output as it is. "probability" and "log_probability": the same, but
            one number per image outside [0, 1] is refused. "softmax", "log_softmax" (classes exclude each other), "sigmoid",
            "log_sigmoid" (independent labels, or a binary logit): that function, whatever the output is. What the output is
            (numbers, probabilities, logits) is found out from all images of the call together.
        extra_inputs: further arguments of the model, by position (a sequence) or by name (a mapping). Mark one that is as long
            as there are images: `pysal.PerImage(x)` has a row for each image, `pysal.Shared(x)` is the same for all.
        batch_size: most rows per model pass; None = chosen by speed and memory. Changes the result by rounding only. The model
            must answer for each row as if it were alone, which is checked by passes of two rows and of one. With `batch_size=B`
            it need not: every pass then holds the whole batch in its order.
        precision: "float32", "tf32", "mixed" (float32 forward, bf16 backward) or "bf16" (rounding switches some ReLUs).
        dtype: dtype of the result; None = float32, or float64 for float64 inputs.

    Returns:
        An `Interactions`: the pairs, their values, the drops of single segments, a map. `pysal.plots.interactions` draws the
        strongest as lines between segments. `explain(methods="interactions")` has the same in its details.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, value or target, segments that overlap, or too few passes to choose pairs by.

    Source:
        Grabisch and Roubens 1999, An axiomatic approach to the concept of interaction among players in cooperative games: the
        second difference of the score, here in the company of all other segments.

    Example:
        >>> from pysal import Grid
        >>> either = lambda x: x.amax((1, 2, 3))  # one bright segment is enough
        >>> found = interactions(either, torch.ones(1, 3, 2, 2), segments=Grid(2, 1), score="raw")
        >>> found.pairs[0].tolist(), found.values[0].tolist(), found.drops[0].tolist()
        ([[0, 1]], [-1.0], [0.0, 0.0])
    """
    plan = Plan("pysal.interactions", model, inputs, target, Running(score, extra_inputs, batch_size, precision, dtype))
    found = prepare(plan, segments=segments, fill=fill, passes=passes).run(report=False)
    details = found.details
    return Interactions(
        details["pairs"],
        [one.to(plan.dtype) for one in details["interactions"]],
        [one.to(plan.dtype) for one in details["single_drops"]],
        details["labels"],
        found.map,
        details["clean_scores"].to(plan.dtype),
        details["complete"],
        found.passes,
    )


def prepare(plan: Plan, *, segments: Segments, fill: Fill, passes: int) -> Work:
    """Return the work that tries pairs of segments of a plan's images.

    Details: "pairs", a list of B tensors (P_b, 2), int64; "interactions" (P_b,) and "single_drops" (S_b,), lists of float64;
    "clean_scores" (B,), float64; "complete" (B,), whether all pairs were tried; "labels" (B, H, W).
    """
    where = plan.where
    check_count(where, "passes", passes)
    coalitions = Coalitions(plan, segments, fill)
    screened = []
    for count in coalitions.counts:
        exact, least = 1 + count + count * (count - 1) // 2, 2 * count + 3
        if passes < min(exact, least):
            requirement = f"be at least {exact} for all pairs of {count} segment{'s' if count > 1 else ''}"
            if least < exact:
                requirement = f"be at least {least} to choose pairs of {count} segments"
            refuse(where, "passes", requirement, passes)
        screened.append(passes < exact)
    coalitions.check([_without(count, _all_pairs(count)) for count in coalitions.counts])
    if any(screened):
        coalitions.check([[0] if some else [] for some in screened])
    return Work(plan, lambda _report: _interact(coalitions, screened, passes))


def _interact(coalitions: Coalitions, screened: Sequence[bool], passes: int) -> Attribution:
    singles, pairs = [], []
    for count, some in zip(coalitions.counts, screened, strict=True):
        numbers = np.arange(count)
        singles.append(
            [*_without(count, numbers[:, None]), *([0, *(1 << segment for segment in range(count))] if some else [])]
        )
        pairs.append(np.zeros((0, 2), np.int64) if some else _all_pairs(count))
    together = [[*one, *_without(count, own)] for count, one, own in zip(coalitions.counts, singles, pairs, strict=True)]
    worth = coalitions.scores(together)
    clean = coalitions.clean().cpu().double().numpy()
    drops = [score - own[:count] for score, own, count in zip(clean, worth, coalitions.counts, strict=True)]
    values = [own[len(one) :] for one, own in zip(singles, worth, strict=True)]
    if any(screened):
        chosen: list[list[int]] = [[] for _ in screened]
        for image in np.flatnonzero(screened).tolist():
            count = coalitions.counts[image]
            gains = worth[image][count + 1 : 2 * count + 1] - worth[image][count]
            strength = np.maximum(np.abs(drops[image]), np.abs(gains))
            pairs[image] = _strongest_pairs(strength, passes - 2 * count - 2)
            chosen[image] = _without(count, pairs[image])
        more = coalitions.scores(chosen)
        values = [new if some else old for new, old, some in zip(more, values, screened, strict=True)]
    found, sums = [], []
    for score, both, drop, own in zip(clean, values, drops, pairs, strict=True):
        # f - f(-i) - f(-j) + f(-i-j), and f(-i) = f - drop(i)
        value = drop[own[:, 0]] + drop[own[:, 1]] - (score - both)
        total = np.zeros_like(drop)
        np.add.at(total, own[:, 0], value)
        np.add.at(total, own[:, 1], value)
        found.append(value)
        sums.append(total)
    details: dict[str, Any] = {
        "pairs": [torch.from_numpy(own) for own in pairs],
        "interactions": [torch.from_numpy(value) for value in found],
        "single_drops": [torch.from_numpy(drop) for drop in drops],
        "clean_scores": torch.from_numpy(clean),
        "complete": torch.tensor([not some for some in screened], dtype=torch.bool, device="cpu"),
        "labels": coalitions.labels,
    }
    return Attribution(coalitions.on_pixels(sums), passes=1 + coalitions.passes, details=details)


def _all_pairs(count: int) -> NDArray[np.int64]:
    return np.stack(np.triu_indices(count, 1), 1).astype(np.int64)


def _strongest_pairs(strength: NDArray[np.float64], most: int) -> NDArray[np.int64]:
    """Return at most so many pairs (n, 2) of segments: the two strongest, the third with each of them, and so on."""
    largest = strength.max()
    levels = np.nan_to_num(np.round(strength / (largest if largest > 0 else 1.0) * LEVELS), nan=-1.0)
    ranked = np.argsort(-levels, kind="stable")
    later, earlier = np.tril_indices(len(ranked), -1)
    found = np.sort(np.stack([ranked[earlier[:most]], ranked[later[:most]]], 1), 1)
    return found[np.lexsort((found[:, 1], found[:, 0]))].astype(np.int64)


def _without(count: int, groups: NDArray[np.int64]) -> list[int]:
    """Return the sets of all segments but those of each group (n, k)."""
    everything = (1 << count) - 1
    return [everything - sum(1 << segment for segment in group) for group in groups.tolist()]
