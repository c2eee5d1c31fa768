"""Words for numbers: two or three digits, per cent, and what a score fell from and to."""

from __future__ import annotations

import math
from collections.abc import Sequence

MINUS = "\N{MINUS SIGN}"
"""The minus sign of numbers in pictures, which is as wide as a digit."""


TOLD = 5
"""So many of a picture's falls, the largest, say how its numbers are rounded."""


def number(value: float) -> str:
    """Return a number in two or three digits: "0.31", "−4.2·10⁻⁵"."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}".replace("-", MINUS) if value else "0"
    rounded = float(f"{value:.2e}")
    if 1e-3 <= abs(rounded) < 1e4:
        digits = max(2 - math.floor(math.log10(abs(rounded))), 0)
        text = f"{rounded:.{digits}f}"
        return (text.rstrip("0").rstrip(".") if digits else text).replace("-", MINUS)
    mantissa, power = f"{value:.1e}".split("e")
    superscript = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa}·10{superscript}".replace("-", MINUS)


def percent(probability: float, digits: int | None = None) -> str:
    """Return a probability in per cent with as many digits as tell it from 0 and 100: "67 %", "99.2 %", "0.03 %"."""
    if digits is None:
        digits = _digits(probability)
        if digits > 4:
            return "<0.0001 %" if probability < 0.5 else ">99.9999 %"
    return f"{100 * probability:.{digits}f} %"


def _rounded(value: float, digits: int, as_percent: bool) -> str:
    shown = f"{100 * value if as_percent else value:.{digits}f}"
    if as_percent and value > 0 and not float(shown):
        shown = f"<{10.0**-digits:.{digits}f}"
    return f"{shown} %" if as_percent else shown.replace("-", MINUS)


def _digits(probability: float) -> int:
    edge = 100 * min(probability, 1 - probability)
    if edge >= 5 or not edge > 0:
        return 0
    return max(-math.floor(math.log10(edge)), 1)


def falls(score: float, drops: Sequence[float], as_percent: bool) -> list[str | None]:
    """Return `fall` of each drop from one score, for a picture: all rounded alike, as the largest of them ask for."""
    fallen = sorted((drop for drop in drops if drop > 0 and math.isfinite(drop)), reverse=True)[:TOLD]
    digits = _digits_alike(score, [score - drop for drop in fallen], as_percent)
    return [fall(score, drop, as_percent, digits) for drop in drops]


def _digits_alike(before: float, after: Sequence[float], as_percent: bool) -> int | None:
    """Return how many decimals all numbers beside a score have; None where each needs its own."""
    if not math.isfinite(before):
        return None
    if as_percent:
        near = (value for value in after if abs(before - value) < 0.05)
        digits = max(map(_digits, (before, *near)))
        return digits if digits <= 4 else None
    return max(2 - math.floor(math.log10(abs(before))), 0) if 1e-3 <= abs(before) < 1e4 else None


def fall(score: float, drop: float, as_percent: bool, digits: int | None = None) -> str | None:
    """Return "95 % → 67 %" (or "8.31 → 6.02"), None where nothing visible fell."""
    return None if not drop > 0 else change(score, score - drop, as_percent, digits)


def change(before: float, after: float, as_percent: bool, digits: int | None = None) -> str | None:
    """Return "95 % → 67 %" (or "8.31 → 6.02"), with so many decimals, None where no change is visible."""
    if not (math.isfinite(before) and math.isfinite(after)):
        return None
    if digits is not None:
        old, new = (_rounded(value, digits, as_percent) for value in (before, after))
        return None if old == new else f"{old} → {new}"
    old, new = number(before), number(after)
    if as_percent:
        digits = max(_digits(before), _digits(after))
        same = digits if digits <= 1 or 1e-4 < abs(before - after) < 0.05 else None  # as many on both sides, within reason
        old, new = percent(before, same), percent(after, same)
    return None if old == new else f"{old} → {new}"
