"""Targets as a short text, as the command line has them."""

import re
from collections.abc import Callable

from pysal._checks import refuse
from pysal.engine.model.class_names import ClassNames, names_of
from pysal.engine.request.target import CallTarget, Margin
from pysal.targets.boxes import Box
from pysal.targets.columns import Contrast, Label, Output
from pysal.targets.embeddings import Norm
from pysal.targets.pixels import Pixel
from pysal.targets.words import Token

FORMS = (
    "margin:A/B",
    "contrast:CLASS",
    "label:CLASS",
    "output:N",
    "pixel:ROW,COLUMN/CLASS",
    "mask:CLASS",
    "box:N",
    "box:LEFT,TOP,RIGHT,BOTTOM",
    "token:N",
    "norm",
)


def parse(specification: str, model: object = None, *, where: str = "pysal.targets.parse") -> int | str | Margin | CallTarget:
    """Return the target that a short text stands for.

    =============================  ==========================================================================
    text                           target
    =============================  ==========================================================================
    ``281``, ``tabby``             a class, by index or name; ``class:NAME`` where the name is one of the below
    ``margin:281/285``             `pysal.Margin` of two classes
    ``contrast:tabby``             `Contrast` of a class, of the highest one without a name
    ``label:smiling``              `Label`
    ``output:0``                   `Output`; ``output:3,1`` of several dimensions
    ``pixel:120,80/15``            `Pixel` at row 120, column 80, of class 15, or of the predicted one
    ``mask:cat``                   `Pixel` where the class is predicted, or the most frequent one
    ``box:0``, ``box:0/CLASS``     `Box`, the first detection, of a class; ``box:10,20,60,80`` the one at a box
    ``token:42``                   `Token`
    ``norm``                       `Norm`
    =============================  ==========================================================================

    Args:
        specification: one of these. A class name of the model itself comes first.
        model: carries class names, if it does; names are then looked up at once.
        where: the public name that was called, for errors.

    Raises:
        TypeError: no text.
        ValueError: none of these, or a class that the model does not have.

    Example:
        >>> parse("margin:281/285")
        Margin(a=281, b=285)
    """
    if not isinstance(specification, str):
        refuse(where, "target", "be a text", type(specification).__name__, TypeError)
    names = names_of(model)
    text = specification.strip()
    kind, colon, rest = text.partition(":")
    kind, rest = kind.strip().casefold(), rest.strip()
    if kind == "norm" and not colon and not _is_name(names, text):
        return Norm()
    if not colon or kind not in _KINDS or _is_name(names, text):
        return _class(where, text, names)

    def of_class(name: str) -> int | str:
        """Return a class by the name that pictures show, where it has one of its own."""
        found = _class(where, name, names)
        if kind in ("margin", "class") or names is None or not isinstance(found, int):
            return found
        own = names.names[found]
        return own if [one.casefold() for one in names.names].count(own.casefold()) == 1 else found

    return _KINDS[kind](where, rest, of_class)


Find = Callable[[str], int | str]


def _is_name(names: ClassNames | None, text: str) -> bool:
    return names is not None and text.casefold() in {name.casefold() for name in names.names}


def _class(where: str, text: str, names: ClassNames | None) -> int | str:
    """Return the index of a class, or its name for a model that is to come."""
    if not text:
        refuse(where, "target", f"be a class, or one of {', '.join(FORMS)}", repr(text))
    if names is not None:
        return names.find(where, "target", text)
    return int(text) if re.fullmatch(r"\d{1,18}", text, re.ASCII) else text


def _numbers(text: str, number: int | None = None) -> list[int] | None:
    """Return whole numbers separated by commas, None where a text is something else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"-?\d{1,9}", part, re.ASCII) for part in parts):
        return None
    return [int(part) for part in parts] if number in (None, len(parts)) else None


def _margin(where: str, rest: str, find: Find) -> Margin:
    parts = [part.strip() for part in rest.split("/")]
    if len(parts) != 2 or not all(parts):
        refuse(
            where, "target", "be like margin:A/B, of two classes (by index, where a name has a stroke)", repr(f"margin:{rest}")
        )
    return Margin(find(parts[0]), find(parts[1]))


def _pixel(where: str, rest: str, find: Find) -> Pixel:
    place, _, name = rest.partition("/")
    at = _numbers(place, 2)
    if at is None or min(at) < 0:
        refuse(where, "target", "be like pixel:ROW,COLUMN or pixel:ROW,COLUMN/CLASS", repr(f"pixel:{rest}"))
    return Pixel(find(name) if name else None, at=at)


def _box(where: str, rest: str, find: Find) -> Box:
    place, _, name = rest.partition("/")
    numbers = _numbers(place)
    if numbers is None or len(numbers) not in (1, 4) or (len(numbers) == 1 and numbers[0] < 0):
        refuse(where, "target", "be like box:0 or box:LEFT,TOP,RIGHT,BOTTOM, with /CLASS or without", repr(f"box:{rest}"))
    return Box(numbers[0] if len(numbers) == 1 else numbers, of=find(name) if name else None)


def _output(where: str, rest: str, find: Find) -> Output:
    at = _numbers(rest) if rest else [0]
    if at is None:
        refuse(where, "target", "be like output:0 or output:3,1", repr(f"output:{rest}"))
    return Output(at)


def _token(where: str, rest: str, find: Find) -> Token:
    numbers = _numbers(rest, 1)
    if numbers is None or numbers[0] < 0:
        refuse(where, "target", "be like token:42, the number of a token", repr(f"token:{rest}"))
    return Token(numbers[0])


def _norm(where: str, rest: str, find: Find) -> Norm:
    if rest:
        refuse(where, "target", "be norm alone, which is of the whole output", repr(f"norm:{rest}"))
    return Norm()


def _label(where: str, rest: str, find: Find) -> Label:
    return Label(find(rest))


_KINDS: dict[str, Callable[[str, str, Find], int | str | Margin | CallTarget]] = {
    "class": lambda where, rest, find: find(rest),
    "margin": _margin,
    "contrast": lambda where, rest, find: Contrast(find(rest) if rest else None),
    "label": _label,
    "output": _output,
    "pixel": _pixel,
    "mask": lambda where, rest, find: Pixel(find(rest) if rest else None),
    "box": _box,
    "token": _token,
    "norm": _norm,
}
