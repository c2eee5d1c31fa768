"""What the figures of a few images say of all: means with intervals, differences of methods, and what follows from both."""

import itertools
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from pysal.explanation.findings import counted
from pysal.metrics import METRICS

Numbers = NDArray[np.float64]

RESAMPLES = 5000
CONFIDENCE = 0.95
# Fewer images than this say nothing of others: the interval of a bootstrap of three is that of three numbers.
FEWEST = 5
# Rank correlation of |map| with that of a model of random numbers, above which a map shows the image, not the model.
BLIND = 0.5


@dataclass(frozen=True)
class Figure:
    """A figure that methods are compared by.

    Attributes:
        name: its key in the rows of images.
        title: for people.
        better: "lower", "higher", or "neither" where it says something else than good or bad.
        summary: what it measures, in a line.
        votes: whether a recommendation counts it.
        why_not: why it does not.
    """

    name: str
    title: str
    better: str
    summary: str
    votes: bool = True
    why_not: str = ""

    @property
    def said(self) -> str:
        """The title inside of a sentence: "mass in mask", but "ROAD"."""
        return self.title if self.title[1].isupper() else self.title[0].lower() + self.title[1:]

    @property
    def sign(self) -> int:
        """1 where more is better, else -1."""
        return -1 if self.better == "lower" else 1


_COUNTED_IN = "counted in insertion less deletion"
_COARSE = "it favours maps that are bright all over"
_NO_VOTE = {
    "deletion": _COUNTED_IN,
    "insertion": _COUNTED_IN,
    "deletion_blur": _COUNTED_IN,
    "insertion_zero": _COUNTED_IN,
    "average_drop": _COARSE,
    "increase_in_confidence": _COARSE,
    "max_sensitivity": "a map that never changes has the best value",
}
DIFFERENCE = "insertion_minus_deletion"
FIGURES: dict[str, Figure] = {
    DIFFERENCE: Figure(DIFFERENCE, "Insertion \N{MINUS SIGN} deletion", "higher", "insertion less deletion, image by image"),
    **{
        name: Figure(name, one.title, one.better, one.summary, name not in _NO_VOTE, _NO_VOTE.get(name, ""))
        for name, one in METRICS.items()
    },
    "grid_pointing_game": Figure(
        "grid_pointing_game",
        "Grid pointing game",
        "higher",
        "share of the positive attribution for a class that lies on its image, of four that are put together; chance is 0.25",
    ),
    "randomisation": Figure(
        "randomisation",
        "Likeness under random weights",
        "lower",
        "rank correlation of |map| with that of the model with random weights",
        False,
        f"a mean above {BLIND} speaks against a method, a lower one for none",
    ),
    "seconds": Figure("seconds", "Time", "lower", "seconds of the processor for the map of an image", False, "it breaks ties"),
}
"""What methods are compared by, in order; a row of an image has those that could be measured."""


@dataclass(frozen=True)
class Estimate:
    """A mean over images.

    Attributes:
        mean: of the images that have the figure.
        low: lower end of its 95 % interval; NaN where fewer than 2 images have it.
        high: upper end.
        images: how many have it.
    """

    mean: float
    low: float
    high: float
    images: int


@dataclass(frozen=True)
class Vote:
    """What a figure says of the order of methods.

    Attributes:
        figure: its name.
        order: the methods, the best first.
        leaders: those that are not clearly behind the best.
        images: how many images all of them have the figure of.
        decided: whether there are enough images, and some method is clearly behind.
        ahead: how far the best is ahead of the nearest that is clearly behind, in the figure's unit, with the interval that
            decides; None where none is.
    """

    figure: str
    order: list[str]
    leaders: list[str]
    images: int
    decided: bool
    ahead: Estimate | None = None


def estimate(values: Numbers, seed: int) -> Estimate:
    """Return the mean of what is finite, with its percentile interval over `RESAMPLES` samples with replacement."""
    known = values[np.isfinite(values)]
    if not len(known):
        return Estimate(math.nan, math.nan, math.nan, 0)
    if len(known) == 1:
        return Estimate(float(known[0]), math.nan, math.nan, 1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(_means(known, seed), [tail, 100 - tail])
    return Estimate(float(known.mean()), float(low), float(high), len(known))


def vote(figure: Figure, table: Mapping[str, Numbers]) -> Vote:
    """Return which methods lead by a figure: the best, and all whose distance from it may be chance.

    Methods are compared image by image, by Student's t of their differences. The best is not known before, so with M methods
    the confidence of each of the M (M - 1) / 2 differences is 1 - 0.05 / that number (Bonferroni): that any method is called
    behind by chance has a probability of at most 5 %. The bootstrap would be too narrow for as few images as people compare on.

    Args:
        figure: which.
        table: method -> (N,) its figure of each image, NaN where there is none.
    """
    common = np.isfinite(np.stack(list(table.values()))).all(0) if table else np.zeros(0, dtype=bool)
    images = int(common.sum())
    known = {name: figure.sign * values[common] for name, values in table.items()}
    order = sorted(known, key=lambda name: -float(known[name].mean())) if images else list(table)
    if images < FEWEST or len(order) < 2:
        return Vote(figure.name, order, order, images, False)
    pairs = len(order) * (len(order) - 1) / 2
    reach = float(stdtrit(images - 1, 1 - (1 - CONFIDENCE) / pairs / 2))
    best = order[0]
    leaders, ahead = [best], None
    for name in order[1:]:
        distance = _student(known[best] - known[name], reach)
        if distance.low <= 0:
            leaders.append(name)
        elif ahead is None:
            ahead = distance
    return Vote(figure.name, order, leaders, images, ahead is not None, ahead)


def _student(values: Numbers, reach: float) -> Estimate:
    """Return the mean of two values or more with the interval of so many standard errors."""
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    return Estimate(mean, mean - reach * error, mean + reach * error, len(values))


def _means(values: Numbers, seed: int) -> Numbers:
    """Return the means of samples with replacement, the same images in each call of as many."""
    random = np.random.default_rng([seed, zlib.crc32(b"pysal"), len(values)])
    chosen = random.integers(0, len(values), (RESAMPLES, len(values)))
    found: Numbers = values[chosen].mean(1)
    return found


def tabulated(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> dict[str, dict[str, Numbers]]:
    """Return figure -> method -> (N,) values of the images' rows, NaN where one has none, without figures that nobody has."""
    found: dict[str, dict[str, Numbers]] = {}
    for figure in FIGURES:
        table = {method: np.array([_value(row, method, figure) for row in rows], dtype=np.float64) for method in methods}
        if any(np.isfinite(values).any() for values in table.values()):
            found[figure] = table
    return found


def _value(row: Mapping[str, Any], method: str, figure: str) -> float:
    own = row["methods"].get(method, {})
    if figure == DIFFERENCE:
        both = own.get("insertion"), own.get("deletion")
        return math.nan if None in both else float(both[0]) - float(both[1])
    value = own.get(figure)
    return math.nan if value is None else float(value)


def agreement(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return method -> method -> the mean rank correlation of their maps over the images that have it."""
    found: dict[str, dict[str, float]] = {name: {} for name in methods}
    for first, second in itertools.product(methods, methods):
        values = [row.get("agreement", {}).get(first, {}).get(second) for row in rows]
        known = [value for value in values if value is not None]
        found[first][second] = float(np.mean(known)) if known else math.nan
    return found


def recommended(
    tables: Mapping[str, Mapping[str, Numbers]], methods: Sequence[str], titles: Mapping[str, str]
) -> tuple[list[str], list[str], list[Vote]]:
    """Return the methods to prefer, the sentences that say why, and what each figure says.

    A method whose maps hardly change with random weights is not recommended, if Student's interval of their likeness lies above
    `BLIND`. Of the others those are that are clearly behind by no figure that decides anything; where there is none, those that
    are by the fewest. Time decides nothing, it is told.
    """
    votes = [vote(FIGURES[name], table) for name, table in tables.items() if FIGURES[name].votes]
    decided = [one for one in votes if one.decided]
    blind, against = [], []
    for name, values in tables.get("randomisation", {}).items():
        known = values[np.isfinite(values)]
        if not len(known) or float(known.mean()) <= BLIND:
            continue
        likeness = Estimate(float(known[0]), math.nan, math.nan, 1)
        if len(known) > 1:
            wide = _student(known, float(stdtrit(len(known) - 1, (1 + CONFIDENCE) / 2)))
            likeness = replace(wide, low=max(wide.low, -1.0), high=min(wide.high, 1.0))  # as a correlation is
        measured = f"rank correlation {_with_interval(likeness)} over {counted(len(known), 'image')}"
        if likeness.low > BLIND:
            blind.append(name)
            against.append(
                f"Not recommended: {titles[name]}, whose maps of the model with random weights are much the same ({measured}), "
                "so they show the image more than the model."
            )
        else:
            why = "the interval does not decide" if len(known) > 1 else "one image decides nothing"
            against.append(
                f"Open: whether {titles[name]} shows the image more than the model. Its maps of the model with random weights "
                f"are alike ({measured}), and {why}."
            )
    candidates = [name for name in methods if name not in blind]
    if not candidates:
        return [], ["No method is recommended: all of them show the image more than the model.", *against], votes
    if not decided:
        enough = max((one.images for one in votes), default=0)
        if len(methods) < 2:
            why = "there is nothing to compare one method with"
        elif not votes:
            why = "none of the figures that were measured has a vote"
        elif enough < FEWEST:
            why = f"there {'is' if enough == 1 else 'are'} {counted(enough, 'image')}, and {FEWEST} are the fewest that can"
        else:
            why = "no figure separates the methods on these images"
        return [], [f"The evidence decides nothing: {why}.", *against], votes
    behind = {name: [one for one in decided if name not in one.leaders] for name in candidates}
    fewest = min(map(len, behind.values()))
    best = [name for name in candidates if len(behind[name]) == fewest]
    seconds = {
        name: float(np.nanmean(values)) for name, values in tables.get("seconds", {}).items() if np.isfinite(values).any()
    }
    best.sort(key=lambda name: seconds.get(name, math.inf))
    shown = _listed([titles[name] for name in best])
    if len(best) > 1:
        said = [f"To be preferred: {shown}. The evidence does not decide between them."]
    else:
        said = [f"To be preferred: {shown}."]
    said += against
    for one in decided:
        clear = _listed([titles[name] for name in one.leaders])
        apart = "" if len(one.leaders) == 1 else ", which are not told apart"
        assert one.ahead is not None  # as it decided
        said.append(
            f"By {FIGURES[one.figure].said} ({counted(one.images, 'image')}) the lead is with {clear}{apart}; the best is "
            f"{_with_interval(one.ahead)} ahead of the nearest that is behind."
        )
    if fewest:
        for name in best:
            lost = _listed([FIGURES[one.figure].said for one in behind[name]])
            said.append(f"The figures contradict each other: by {lost} others are clearly ahead of {titles[name]}.")
    if len(best) > 1 and all(name in seconds for name in best) and seconds[best[0]] > 0:
        slowest = best[-1]
        said.append(
            f"The least time of these: {titles[best[0]]}, {seconds[best[0]]:.2g} s an image. The most: {titles[slowest]}, "
            f"{seconds[slowest]:.2g} s."
        )
    open_ones = [FIGURES[one.figure].said for one in votes if not one.decided]
    if open_ones:
        said.append(
            f"Nothing is decided by {_listed(open_ones)}: no method is clearly behind, or fewer than {FEWEST} images have it."
        )
    return best, said, votes


def _with_interval(one: Estimate) -> str:
    """Return a mean with its interval; without where one image has none."""
    return f"{one.mean:.2g}" if math.isnan(one.low) else f"{one.mean:.2g} ({one.low:.2g} to {one.high:.2g})"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
