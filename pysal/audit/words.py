"""Words for the numbers of a report."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np


def settings(options: Mapping[str, Any]) -> str:
    """Return options as "name = value", with commas."""
    return ", ".join(f"{name} = {value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items())


def counted(number: int, noun: str) -> str:
    """Return "1 image", "2 images"."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def moment(text: str) -> str:
    """Return a time of the manifest for people."""
    when = datetime.fromisoformat(text).astimezone(UTC)
    return f"{when.day} {when:%B %Y, %H:%M} UTC"


def count(value: int) -> str:
    """Return a whole number with its thousands apart."""
    return f"{value:,}"


def percent(value: float | None) -> str:
    """Return a share in per cent."""
    if value is None or not np.isfinite(value):
        return "\N{EN DASH}"
    return f"{100 * value:.1f} %" if value < 0.9995 or value == 1 else ">99.9 %"


def number(value: float | None) -> str:
    """Return a figure in three digits."""
    if value is None or not np.isfinite(value):
        return "\N{EN DASH}"
    return signed(value)


def signed(value: float) -> str:
    """Return a figure with a minus sign that is as wide as a digit."""
    if abs(value) >= 1e4 or 0 < abs(value) < 5e-4:
        text = f"{value:.1e}"
    else:
        text = f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return text.replace("-", "\N{MINUS SIGN}")
