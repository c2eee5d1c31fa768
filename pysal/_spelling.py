"""What an unknown name was probably meant to be. Needs no torch: wrong calls of the command line are told at once."""

import difflib
from collections.abc import Iterable, Mapping, Sequence


def close_to(name: object, known: Iterable[str], most: int = 3, likeness: float = 0.6) -> list[str]:
    """Return the known names that a name was probably meant to be.

    One that differs in capitals, hyphens or blanks at its ends only is alone. Else those that are a letter or two away, then
    those that hold the name; where there are none, those that are less like it.

    Args:
        name: what was given; nothing but text is close to anything.
        known: the names there are.
        most: how many to return.
        likeness: of the last, in shares of their letters.
    """
    by_spelling = {_plain(one): one for one in known}
    asked = _plain(name) if isinstance(name, str) else ""
    if asked in by_spelling:
        return [by_spelling[asked]]

    def alike(share: float) -> list[str]:
        return [by_spelling[spelled] for spelled in difflib.get_close_matches(asked, by_spelling, most, share)]

    holding = [one for spelled, one in by_spelling.items() if len(asked) > 2 and asked in spelled]
    return list(dict.fromkeys([*alike(0.85), *holding]))[:most] or alike(likeness)


def did_you_mean(close: Sequence[str]) -> str:
    """Return what a requirement ends in where an unknown name is close to known ones; nothing where it is close to none."""
    return f" (did you mean {', '.join(close)}?)" if close else ""


def _plain(name: str) -> str:
    return name.strip().casefold().replace("-", "_")


def counted(endings: Mapping[str, int]) -> str:
    """Return how many files there are by the endings of their names, five at most: "2 .txt, 1 without an ending"."""
    shown = sorted(endings.items(), key=lambda kind: (-kind[1], not kind[0], kind[0]))
    kinds = [f"{count} {ending or 'without an ending'}" for ending, count in shown[:5]]
    return ", ".join([*kinds, "..."] if len(shown) > 5 else kinds)
