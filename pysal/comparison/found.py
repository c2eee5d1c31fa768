"""What a comparison found, for people and as JSON."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pysal.comparison.statistics import Estimate, Vote


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        settings: what was asked for, of which model and photos.
        methods: name -> title of those that were compared.
        skipped: name -> why a method or metric does not apply to the model.
        rows: one per image: its photo, class, probability, the figures of each method, and the seconds of the processor that
            all of it took.
        unread: photo -> why it was not compared.
        estimates: figure -> method -> mean and interval.
        votes: what each figure that counts says of the order.
        agreement: method -> method -> mean rank correlation of |map|.
        recommended: the methods to prefer, the fastest first; none where the evidence does not decide.
        reasons: the sentences that say why.
        explained: what is, at the start of a sentence.
        pictures: for the report: a photo's name and its pictures, (title, data URI) each.
    """

    settings: dict[str, Any]
    methods: dict[str, str]
    skipped: dict[str, str]
    rows: list[dict[str, Any]]
    unread: dict[str, str]
    estimates: dict[str, dict[str, Estimate]]
    votes: list[Vote]
    agreement: dict[str, dict[str, float]]
    recommended: list[str]
    reasons: list[str]
    explained: str
    pictures: list[tuple[str, list[tuple[str, str]]]]

    def json(self) -> dict[str, Any]:
        """Return all of it but the pictures as JSON has it, NaN as None."""
        found = {name: value for name, value in vars(self).items() if name not in ("pictures", "estimates", "votes")}
        found["estimates"] = {
            figure: {name: vars(one) for name, one in table.items()} for figure, table in self.estimates.items()
        }
        found["votes"] = [asdict(one) for one in self.votes]
        result: dict[str, Any] = plain(found)
        return result


def plain(value: Any) -> Any:
    """Return numbers that are not finite as None, also inside."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
