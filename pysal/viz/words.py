"""Words for numbers: two or three digits, per cent, and what a score fell from and to."""

from __future__ import annotations

import math

MINUS = "\N{MINUS SIGN}"
"""The minus sign of numbers in pictures, which is as wide as a digit."""


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


def _digits(probability: float) -> int:
    edge = 100 * min(probability, 1 - probability)
    if edge >= 5 or not edge > 0:
        return 0
    return max(-math.floor(math.log10(edge)), 1)


def fall(score: float, drop: float, as_percent: bool) -> str | None:
    """Return "95 % → 67 %" (or "8.31 → 6.02"), None where nothing visible fell."""
    return None if not drop > 0 else change(score, score - drop, as_percent)


def change(before: float, after: float, as_percent: bool) -> str | None:
    """Return "95 % → 67 %" (or "8.31 → 6.02"), None where no change is visible."""
    if not (math.isfinite(before) and math.isfinite(after)):
        return None
    old, new = number(before), number(after)
    if as_percent:
        digits = max(_digits(before), _digits(after))
        same = digits if digits <= 1 or 1e-4 < abs(before - after) < 0.05 else None  # as many on both sides, within reason
        old, new = percent(before, same), percent(after, same)
    return None if old == new else f"{old} → {new}"
